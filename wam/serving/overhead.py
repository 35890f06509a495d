"""What the server itself costs over the bare policy, both measured around a policy that answers at once.

    client process   | send ------------------------------------------------------ receive |     `served`: there and back, what a robot waits for
    server                  | decode  parse  [canvas]  memory  [a plan of zeros]  gate  pack |   `within`: from a message that has arrived to its reply
    bare                                      [canvas]          [a plan of zeros]                `bare`: the same three pictures, in one process, without a server
    exchange         | send -------------- receive |                                             `exchange`: the same bytes to and fro, and nothing done with them

What the server adds is `within` less `bare`: a policy that is called in process takes the same arrays of the cameras, and must resize them and
lay them on its canvas too.  Its 95th percentile is reported as that of `within` less the *median* of `bare`, which is more than the
difference of both 95th percentiles.  The client is a process of its own, as a robot's is, so it takes no time of the server's interpreter.
The four take turns, round by round, so that whatever else the machine does meets all of them.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import numpy as np
from websockets.asyncio.server import ServerConnection, serve

from wam.config import load_config
from wam.config_robot import EmbodimentConfig
from wam.data.views import Canvas
from wam.inference.batch import Call, Commit, Observe, Reset
from wam.inference.gate import Gate, GateConfig, GroupLimits
from wam.inference.session import Plan, Session
from wam.pretrained import Policy
from wam.serving.contract import Contract
from wam.serving.job import Job
from wam.serving.metrics import Metrics
from wam.serving.options import ServeOptions
from wam.serving.server import Client, PolicyServer, run_server
from wam.serving.sessions import Entry
from wam.serving.wire import pack
from wam.serving.worker import Worker, WorkerOptions
from wam.timeline import FIRST_BLOCK

CAMERAS = ("exterior_1", "exterior_2", "wrist")
SIZE, CANVAS = (180, 320), (352, 640)  # of a camera, and of the three of them in the layout of DROID
HORIZON, STRIDE, HZ, DIM = 24, 3, 15.0, 8
LIMIT_MS = 3.0

CLIENT = """
import json, sys, time
from websockets.sync.client import connect
url, count, warm, pause = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
size = int(sys.argv[5])
message = sys.stdin.buffer.read(size)
mark = message.index(b"\\xcb" + b"\\x40\\xfe\\x24\\x0c\\x9f\\xbe\\x76\\xc9") + 1  # the timestamp 123456.789, as msgpack has it
import struct
spent = []
with connect(url, compression=None, max_size=None) as socket:
    socket.recv()
    for i in range(warm + count):
        data = message[:mark] + struct.pack(">d", 1.0 + i * 24 / 15) + message[mark + 8:]
        time.sleep(pause)
        begun = time.perf_counter()
        socket.send(data)
        reply = socket.recv()
        spent.append(time.perf_counter() - begun)
        assert len(reply) > 100 and b"error" not in reply, reply[:300]
print(json.dumps(spent[warm:]))
"""


@dataclass(frozen=True)
class Overhead:
    """Milliseconds, p50, p95 and p99 of `requests`; see the module's docstring.

    Attributes:
        cpu_ms, exchange_cpu_ms, bare_cpu_ms: processor time a request, of the round with the least: other programs on the machine change it little.
    """

    requests: int
    message_bytes: int
    served_ms: tuple[float, float, float]
    exchange_ms: tuple[float, float, float]
    within_ms: tuple[float, float, float]
    bare_ms: tuple[float, float, float]
    cpu_ms: float
    exchange_cpu_ms: float
    bare_cpu_ms: float

    @property
    def p95_ms(self) -> float:
        """What the server adds to a plan, at its 95th percentile."""
        return self.within_ms[1] - self.bare_ms[0]

    @property
    def own_cpu_ms(self) -> float:
        """Processor time of the server for a plan, without what carries the bytes and what the bare policy takes."""
        return self.cpu_ms - self.exchange_cpu_ms - self.bare_cpu_ms

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "own_cpu_ms": self.own_cpu_ms, "p95_ms": self.p95_ms, "limit_ms": LIMIT_MS}


class Instant(Worker):
    """A worker whose policy plans zeros in no time; all else is the server's own."""

    def warm_up(self, policy: Policy, contract: Contract) -> None:
        """There is nothing to warm."""

    def _session(self, entry: Entry) -> Session:
        session = object.__new__(Session)
        session.policy, session.block = self.policy, FIRST_BLOCK
        return session

    def _plans(self, ready: list[tuple[Job, Session, list[Call]]]) -> list[Plan | Exception]:
        for _, session, calls in ready:
            for call in calls:
                session.block = FIRST_BLOCK if isinstance(call, Reset) else session.block + isinstance(call, Observe)
                assert isinstance(call, Observe | Commit | Reset) or call is calls[-1]
        self.metrics.batch.observe(len(ready))
        return [Plan(np.zeros((1, HORIZON, DIM), np.float32), None, {}) for _ in ready]


def instant_worker() -> Worker:
    """Three cameras, eight joints, limits for each: as a DROID robot is served."""
    config = load_config(None, ())
    policy = cast(Policy, _Bare(config))
    robot = EmbodimentConfig("droid", DIM, DIM)
    contract = Contract(robot, CAMERAS, Canvas("t", len(CAMERAS), CANVAS), True, HZ, HORIZON, 0, STRIDE, HORIZON // STRIDE, 4, ("skip",))
    gate = Gate(GateConfig(groups=(GroupLimits("joints", 0, DIM, low=(-3.0,), high=(3.0,), velocity=3.0, jerk=1e4, jump=0.5),)), DIM, HZ)
    return Instant(policy, contract, gate, WorkerOptions("skip", check="none"), Metrics())


@dataclass(frozen=True)
class _Bare:
    config: Any


def message() -> bytes:
    """One request, with a frame of every camera; its timestamp is 123456.789, which the client replaces."""
    frames = {f"observation/{name}": picture for name, picture in zip(CAMERAS, pictures(), strict=True)}
    return pack({**frames, "observation/state": np.zeros(DIM, np.float32), "prompt": "put the cup on the shelf", "timestamp": 123456.789})


def pictures() -> list[np.ndarray]:
    """A frame of every camera, uint8 (H, W, 3): noise."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, 255, (*SIZE, 3), np.uint8) for _ in CAMERAS]


def bare(canvas: Canvas, cameras: Sequence[np.ndarray]) -> tuple[np.ndarray, Plan]:
    """What is left without a server: pictures of the cameras, uint8 (H, W, 3), on the policy's canvas, and its answer at once."""
    return canvas.compose([picture[None] for picture in cameras]), Plan(np.zeros((1, HORIZON, DIM), np.float32), None, {})


def measure(requests: int = 300, warm: int = 30, pause_s: float = 0.01, rounds: int = 3) -> Overhead:
    """Serve, ask, and count: in each round so many requests, after some that are not counted."""
    data = message()
    took: dict[str, list[float]] = {"served": [], "exchanged": [], "bare": [], "within": []}
    cpu: dict[str, list[float]] = {"served": [], "exchanged": [], "bare": []}
    for _ in range(rounds):
        policy = _Policy()
        sides = (lambda: _through(policy, data, requests, warm, pause_s), lambda: _through(_Echo(), data, requests, warm, pause_s), lambda: _alone(requests, warm, pause_s))  # noqa: B023
        for name, side in zip(cpu, sides, strict=True):
            times, spent = side()
            took[name] += times
            cpu[name].append(spent)
        took["within"] += policy.within[warm:]
    p = {name: _percentiles(times) for name, times in took.items()}
    return Overhead(rounds * requests, len(data), p["served"], p["exchanged"], p["within"], p["bare"], min(cpu["served"]), min(cpu["exchanged"]), min(cpu["bare"]))


def _alone(requests: int, warm: int, pause_s: float) -> tuple[list[float], float]:
    """Milliseconds of each call of the bare policy, and processor time a call.

    The pictures have just arrived, as a camera's have, and what was seen is kept for a while, as a memory keeps it; so neither is slower here than in the server.
    """
    canvas, cameras = Canvas("t", len(CAMERAS), CANVAS), pictures()
    spent, cpu = [], 0.0
    kept: deque[object] = deque(maxlen=8)
    for i in range(warm + requests):
        time.sleep(pause_s)
        fresh = [picture.copy() for picture in cameras]
        begun, computed = time.perf_counter(), time.thread_time()
        done = bare(canvas, fresh)
        if i >= warm:
            spent.append(1e3 * (time.perf_counter() - begun))
            cpu += time.thread_time() - computed
        kept.append((fresh, done))
    return spent, 1e3 * cpu / requests


def _through(server: _Served, data: bytes, requests: int, warm: int, pause_s: float) -> tuple[list[float], float]:
    """Milliseconds of each request, and processor time a request."""
    server.start()
    begun = time.process_time()
    try:
        command = [sys.executable, "-c", CLIENT, f"ws://127.0.0.1:{server.port}", str(requests), str(warm), str(pause_s), str(len(data))]
        done = subprocess.run(command, input=data, capture_output=True, check=False, timeout=600)
    finally:
        spent = time.process_time() - begun
        server.stop()
    if done.returncode:
        raise RuntimeError(f"the measuring client failed: {done.stderr.decode()[-500:]}")
    return [1e3 * float(s) for s in json.loads(done.stdout)], 1e3 * spent / (requests + warm)


def _percentiles(values: Sequence[float]) -> tuple[float, float, float]:
    p50, p95, p99 = (float(x) for x in np.percentile(values, (50, 95, 99)))
    return p50, p95, p99


class _Served(ABC):
    """A server on a loop in a thread of its own, at a port that is free."""

    port = 0

    def __init__(self) -> None:
        self._up, self._thread = threading.Event(), threading.Thread(target=lambda: asyncio.run(self._main()), daemon=True)

    def start(self) -> None:
        """Until it listens."""
        self._thread.start()
        if not self._up.wait(30):
            raise RuntimeError("the server to be measured did not come up")

    def stop(self) -> None:
        """Until it is gone."""
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join(30)

    async def _main(self) -> None:
        self._loop, self._stopping = asyncio.get_running_loop(), asyncio.Event()
        await self._run()

    def _listening(self, port: int) -> None:
        self.port = port
        self._up.set()

    @abstractmethod
    async def _run(self) -> None:
        """Listen, say so (`_listening`), and serve until `_stopping`."""


class _Timed(PolicyServer):
    """A server that notes how long each answer takes, in milliseconds."""

    within: list[float]

    async def _answer(self, client: Client, data: str | bytes) -> str | bytes:
        begun = time.perf_counter()
        reply = await super()._answer(client, data)
        self.within.append(1e3 * (time.perf_counter() - begun))
        return reply


class _Policy(_Served):
    """The policy server."""

    within: list[float]

    async def _run(self) -> None:
        server = _Timed(instant_worker(), ServeOptions(port=0, rate=1e4, burst=1000))
        self.within = server.within = []
        await run_server(server, self._stopping, lambda s: self._listening(s.port))


class _Echo(_Served):
    """Takes a message, and sends as many bytes as a plan has."""

    async def _run(self) -> None:
        async def talk(socket: ServerConnection) -> None:
            await socket.send(b"hello")
            async for _ in socket:
                await socket.send(b"\0" * 1500)

        async with serve(talk, "127.0.0.1", 0, compression=None, max_size=None) as server:
            self._listening(next(iter(server.sockets)).getsockname()[1])
            await self._stopping.wait()


if __name__ == "__main__":
    print(json.dumps(measure().to_dict()))
