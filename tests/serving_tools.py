"""A server around a tiny policy on a real socket, and what its robots see."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from tiny import TASKS, Episode, tiny_episode, tiny_policy, tiny_preset
from websockets.sync.client import ClientConnection, connect

from wam.inference.gate import Gate, GateConfig
from wam.pretrained import Policy
from wam.serving.contract import Contract
from wam.serving.metrics import Metrics
from wam.serving.options import ServeOptions
from wam.serving.recorder import Recorder
from wam.serving.reload import Loaded
from wam.serving.server import PolicyServer, run_server
from wam.serving.wire import pack, unpack
from wam.serving.worker import Worker, WorkerOptions

NO_LIMITS = GateConfig()
MODE, TIMEOUT = "skip", 20.0
BLOCKS = 4


@cache
def policy() -> Policy:
    """80 Hz, blocks of 8 actions and 4 frames, so a frame every 2 control steps."""
    return tiny_policy(tiny_preset("all", None, "timeline.blocks=3", "sampling.steps=2"))


def make_worker(gate: GateConfig = NO_LIMITS, contract: Contract | None = None, **options: Any) -> Worker:
    contract = contract or Contract.of(policy())
    metrics = Metrics()
    return Worker(policy(), contract, Gate(gate, contract.robot.raw_action_dim, contract.control_hz), WorkerOptions(**{"mode": MODE, **options}), metrics)


class Running:
    """A server in a thread of its own."""

    def __init__(self, worker: Worker, options: ServeOptions, **parts: Any):
        self.worker, self.options, self.parts = worker, options, parts
        self.error: BaseException | None = None
        self._up, self._thread = threading.Event(), threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        async def main() -> None:
            self.loop, self.stopping = asyncio.get_running_loop(), asyncio.Event()
            self.server = PolicyServer(self.worker, self.options, **self.parts)
            await run_server(self.server, self.stopping, lambda _: self._up.set())

        try:
            asyncio.run(main())
        except BaseException as error:
            self.error = error
        finally:
            self._up.set()

    def start(self) -> Running:
        self._thread.start()
        assert self._up.wait(TIMEOUT), "the server did not come up"
        if self.error is not None:
            raise self.error
        return self

    def stop(self) -> None:
        if self._thread.is_alive():
            self.loop.call_soon_threadsafe(self.stopping.set)
            self._thread.join(TIMEOUT)
            assert not self._thread.is_alive(), "the server did not stop"

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self.server.port}"


@contextmanager
def serving(worker: Worker | None = None, recorder: Recorder | None = None, load: Callable[[], Loaded] | None = None, **options: Any) -> Iterator[Running]:
    """A running server; options as of `ServeOptions`."""
    running = Running(worker or make_worker(), ServeOptions(port=0, **{"grace_s": 2.0, **options}), recorder=recorder, load=load).start()
    try:
        yield running
    finally:
        running.stop()


class Talk:
    """A client without any library's help: what goes in and comes out of the socket."""

    def __init__(self, url: str, **options: Any):
        self.socket: ClientConnection = connect(url, compression=None, max_size=None, open_timeout=TIMEOUT, **options).__enter__()
        self.metadata = unpack(self.socket.recv(TIMEOUT))

    def send(self, message: Any) -> None:
        self.socket.send(message if isinstance(message, (bytes, str)) else pack(message))

    def receive(self) -> Any:
        """A reply: text as the error it tells, bytes as the value."""
        data = self.socket.recv(TIMEOUT)
        if isinstance(data, bytes):
            return unpack(data)
        return json.loads(data) if data.startswith("{") else data

    def ask(self, message: Any) -> Any:
        self.send(message)
        return self.receive()

    def error(self, message: Any) -> dict[str, Any]:
        """What is wrong with a message."""
        reply = self.ask(message)
        assert isinstance(reply, dict) and "error" in reply, reply
        return reply["error"]

    def __enter__(self) -> Talk:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()


def episode(robot: int) -> Episode:
    """What a robot sees and does."""
    return tiny_episode(policy().config, 3, BLOCKS).rows([robot])


def observation(robot: int, block: int, frames: str = "all", **more: Any) -> dict[str, Any]:
    """A message of openpi's dialect as a block begins, with all frames since the last, or the newest alone."""
    seen, state = episode(robot).at(block)
    picture = seen[0, -1] if frames == "one" or block == 0 else seen[0]
    t, hz = policy().config.timeline, policy().control_hz
    return {"observation/corner4": picture, "observation/state": state[0], "prompt": TASKS[robot], "timestamp": block * t.actions_per_block / hz, "seed": 100 + robot, **more}
