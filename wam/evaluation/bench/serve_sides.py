"""Servers to be measured, each in a process of its own: this project's, and openpi's loop around the same policy.

    ours       websockets, decoding in threads, one planning thread that takes what waits together     (`wam.serving`, as `wam serve` runs it)
    openpi     for each message: unpack, policy.infer in the event loop, pack, send: one at a time     (its documented behaviour)
    instant    either of them, around a policy that answers at once: what is left is the server

openpi's server is described by its protocol and its client; what is here does as it does, around this project's policy, with a memory for
each connection, which is what a policy with a memory needs of it.  It checks nothing that openpi's does not check.
"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import msgpack
import numpy as np
import torch
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed

from wam.data.views import Canvas
from wam.evaluation.bench.report import BenchError
from wam.inference.batch import Call, Think, run
from wam.inference.gate import Gate, GateConfig
from wam.inference.session import Plan, Session
from wam.pretrained import Policy, from_pretrained
from wam.serving.contract import Contract, short
from wam.serving.job import Job
from wam.serving.memory import RobotMemory, Sent, TimeRules
from wam.serving.messages import parse
from wam.serving.metrics import Metrics
from wam.serving.options import ServeOptions
from wam.serving.server import PolicyServer, run_server
from wam.serving.sessions import Entry
from wam.serving.wire import pack
from wam.serving.worker import Worker, WorkerOptions

Loop = Literal["ours", "openpi"]
START_S, STOP_S = 300.0, 30.0
CAMERAS = ("observation.images.exterior_image_1_left", "observation.images.exterior_image_2_left", "observation.images.wrist_image_left")
PICTURE, CANVAS = (180, 320), (352, 640)  # of each camera, and of what DROID's policies see of them


@dataclass(frozen=True)
class Side:
    """A server to be measured.

    Attributes:
        instant: a policy that answers at once, to three cameras.
        options: of `ServeOptions`.
    """

    name: str
    checkpoint: Path
    loop: Loop = "ours"
    max_batch: int = 16
    instant: bool = False
    device: str = "cpu"
    threads: int = 1
    options: tuple[tuple[str, Any], ...] = ()


class ServerProcess:
    """A side that runs; use as a context manager."""

    def __init__(self, side: Side):
        self.side = side
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_main, args=(theirs, side), daemon=True)
        self._process.start()
        theirs.close()
        self.url = self._url()

    def _url(self) -> str:
        told: Any = "it did not start in time"
        try:
            if self._pipe.poll(START_S):
                told = self._pipe.recv()
        except EOFError:
            told = "its process ended"
        if not isinstance(told, int):
            self.stop()
            raise BenchError(f"the server of {self.side.name} does not run: {told}")
        return f"ws://127.0.0.1:{told}"

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End the process, gently at first."""
        self._pipe.close()
        self._process.join(STOP_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self._process.is_alive()

    def cpu_s(self) -> float:
        """Seconds that all its threads computed so far."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def rss_mib(self) -> float:
        """Memory that it holds."""
        return int(Path(f"/proc/{self._process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


# ------------------------------------------------------------------------------------------------ in the process


def _main(pipe: Any, side: Side) -> None:
    """Serve until the other end of the pipe is closed."""
    torch.set_num_threads(side.threads)
    logging.getLogger("wam").setLevel(logging.ERROR)
    logging.getLogger("websockets").setLevel(logging.CRITICAL)
    try:
        policy = from_pretrained(side.checkpoint, side.device)
        contract = Contract.of(policy)
        if side.instant:
            contract = replace(contract, cameras=CAMERAS, canvas=Canvas("t", len(CAMERAS), CANVAS))
        serving = _ours if side.loop == "ours" else _openpi
        asyncio.run(serving(side, policy, contract, pipe))
    except Exception as error:  # the parent says it
        pipe.send(f"{type(error).__name__}: {error}")


async def _closed(pipe: Any) -> None:
    """Until the other end is gone."""
    gone = asyncio.Event()
    asyncio.get_running_loop().add_reader(pipe.fileno(), gone.set)
    await gone.wait()


async def _ours(side: Side, policy: Policy, contract: Contract, pipe: Any) -> None:
    gate = Gate(GateConfig(), contract.robot.raw_action_dim, contract.control_hz)
    kind = InstantWorker if side.instant else Worker
    worker = kind(policy, contract, gate, WorkerOptions(contract.modes[0], max_batch=side.max_batch), Metrics())
    options = ServeOptions(**{"port": 0, "rate": 1e6, "burst": 10**6, "max_sessions": 64, "grace_s": 5.0, **dict(side.options)})
    stop = asyncio.Event()

    async def until_closed() -> None:
        await _closed(pipe)
        stop.set()

    watching = asyncio.create_task(until_closed())
    await run_server(PolicyServer(worker, options), stop, lambda server: pipe.send(server.port))
    await watching


async def _openpi(side: Side, policy: Policy, contract: Contract, pipe: Any) -> None:
    infer: Callable[[], Infer] = (lambda: Instant(contract)) if side.instant else (lambda: Infer(policy, contract))

    async def handler(socket: ServerConnection) -> None:
        robot, took = infer(), None
        await socket.send(pack(contract.metadata()))
        try:
            while True:
                begun = time.monotonic()
                observation = msgpack.unpackb(await socket.recv(), object_hook=_array)
                before = time.monotonic()
                reply = robot(observation)
                reply["server_timing"] = {"infer_ms": (time.monotonic() - before) * 1e3} | ({} if took is None else {"prev_total_ms": took * 1e3})
                await socket.send(pack(reply))
                took = time.monotonic() - begun
        except ConnectionClosed:
            return

    async with serve(handler, "127.0.0.1", 0, compression=None, max_size=None) as server:
        pipe.send(int(next(iter(server.sockets)).getsockname()[1]))
        await _closed(pipe)


def _array(value: dict[Any, Any]) -> Any:
    return np.ndarray(value[b"shape"], np.dtype(value[b"dtype"]), value[b"data"]) if b"__ndarray__" in value else value


class Infer:
    """One connection's `policy.infer`: observation in, actions out, with the memory that the policy was trained with."""

    def __init__(self, policy: Policy, contract: Contract):
        self.policy, self.contract = policy, contract
        self.memory = RobotMemory(contract, TimeRules())
        self.session: Session | None = None

    def __call__(self, observation: dict[str, Any]) -> dict[str, Any]:
        """A plan from what is seen now."""
        begun = time.monotonic()
        request = parse(observation, self.contract)
        self.memory.see(request, begun)
        if self.session is None:
            assert request.prompt is not None
            self.session = Session(self.policy, [request.prompt], self.contract.robot.name, [0])
        calls, _ = self.memory.calls(self.session)
        plan = run([self.session], [[*calls, Think(request.mode or self.contract.modes[0], self.policy.config.sampling)]])[0]
        assert plan is not None and plan.actions is not None and self.memory.now is not None
        self.memory.head = self.memory.now
        self.memory.plans.append(Sent(self.memory.now, plan.actions[0]))  # which the robot executes
        return {"actions": plan.actions[0], "policy_timing": {"infer_ms": (time.monotonic() - begun) * 1e3}}


class Instant(Infer):
    """The bare policy that answers at once: what the cameras saw is laid on the canvas, and zeros come back."""

    def __init__(self, contract: Contract):
        self.contract = contract

    def __call__(self, observation: dict[str, Any]) -> dict[str, Any]:
        """Zeros, and how long the canvas took."""
        pictures = [np.array(observation[f"observation/{short(camera)}"])[None] for camera in self.contract.cameras]
        begun = time.monotonic()
        self.contract.canvas.compose(pictures)
        return {"actions": _zeros(self.contract), "policy_timing": {"infer_ms": (time.monotonic() - begun) * 1e3}}


@dataclass
class _NoSession:
    policy: Policy
    block: int = 0


class InstantWorker(Worker):
    """A planning thread whose policy answers at once, with zeros; memory, gate and reply are as ever."""

    def warm_up(self, policy: Policy, contract: Contract) -> None:
        """There is nothing to warm up."""

    def _session(self, entry: Entry) -> Session:
        return cast(Session, _NoSession(self.policy))

    def _plans(self, ready: list[tuple[Job, Session, list[Call]]]) -> list[Plan | Exception]:
        return [Plan(_zeros(self.contract)[None], None, {}) for _ in ready]


def _zeros(contract: Contract) -> np.ndarray:
    return np.zeros((contract.horizon, contract.robot.raw_action_dim), np.float32)
