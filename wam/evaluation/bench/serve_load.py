"""Robots that ask a server as fast as it answers, and how long each answer took.

    connect, first plans (not measured)  ->  all at once: a block seen, a plan asked, a plan got, a block seen ...  for a while

They speak openpi's dialect, so that any of the servers can be asked, and say what a robot sees in a block: its frames, its state, the
time.  Pictures are noise, which costs a server as much as any others.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from websockets.asyncio.client import ClientConnection, connect

from wam.evaluation.bench.report import BenchError
from wam.serving.wire import pack, unpack

PROMPT = "open the drawer"
WAIT_S = 120.0  # for any one reply
WARM = 2  # plans of each robot before anything is measured
PER_ROBOT = 3  # replies of each robot, on average, that a measurement has at least


@dataclass
class Load:
    """What came of it.

    Attributes:
        latencies: milliseconds from before a message is packed to after its reply is unpacked, one a plan.
        seconds: from the first to the last.
        cpu_s: that the server computed meanwhile.
        batches: robots in the forward pass of each plan, where the server says so.
        within: milliseconds from a message's arrival to its reply, as the server tells them.
        policy: likewise of the policy alone.
    """

    latencies: list[float] = field(default_factory=list)
    seconds: float = 0.0
    cpu_s: float = 0.0
    batches: list[int] = field(default_factory=list)
    within: list[float] = field(default_factory=list)
    policy: list[float] = field(default_factory=list)

    @property
    def ms_a_plan(self) -> float:
        """Milliseconds that passed for each plan."""
        return self.seconds / len(self.latencies) * 1e3

    def __add__(self, other: Load) -> Load:
        return Load(self.latencies + other.latencies, self.seconds + other.seconds, self.cpu_s + other.cpu_s, self.batches + other.batches, self.within + other.within, self.policy + other.policy)


class Robot:
    """One robot on a connection of its own.

    Args:
        told: the server's metadata.
        picture: height and width of its cameras.
        frames: in each message but the first.
    """

    def __init__(self, socket: ClientConnection, told: dict[str, Any], mode: str, number: int, picture: tuple[int, int], frames: int):
        self.socket, self.told, self.mode, self.blocks = socket, told, mode, 0
        rng = np.random.default_rng(number)
        self.seen = {f"observation/{name}": rng.integers(0, 255, (frames, *picture, 3), dtype=np.uint8) for name in told["cameras"]}
        self.state = rng.normal(size=int(told["state_dim"])).astype(np.float32) * 0.1

    def message(self) -> dict[str, Any]:
        """What it sees as its next block begins."""
        pictures = {name: frames[-1] if self.blocks == 0 or len(frames) == 1 else frames for name, frames in self.seen.items()}
        steps = self.blocks * int(self.told["block_actions"])
        self.blocks += 1
        return {**pictures, "observation/state": self.state, "prompt": PROMPT, "timestamp": steps / float(self.told["control_hz"]), "mode": self.mode}

    async def ask(self) -> dict[str, Any]:
        """A plan.

        Raises:
            BenchError: an error came back.
        """
        await self.socket.send(pack(self.message()))
        data = await asyncio.wait_for(self.socket.recv(), WAIT_S)
        reply = json.loads(data) if isinstance(data, str) else unpack(data)
        if "actions" not in reply:
            raise BenchError(f"the server gave no plan: {reply}")
        return dict(reply)


async def hello(url: str) -> tuple[ClientConnection, dict[str, Any]]:
    """A connection, and the server's metadata."""
    socket = await connect(url, compression=None, max_size=None, open_timeout=WAIT_S, ping_interval=None)
    data = await asyncio.wait_for(socket.recv(), WAIT_S)
    assert isinstance(data, bytes)
    return socket, unpack(data)


async def load(url: str, robots: int, mode: str, seconds: float, cpu_s: Callable[[], float], picture: tuple[int, int] | None = None, frames: int | None = None) -> Load:
    """Let robots ask for at least `seconds`, and until they have several replies each.

    Args:
        picture: height and width of each camera; default: as large as the policy sees it.
        frames: in a message; default: those of a block.
    """
    greeted = [await hello(url) for _ in range(robots)]
    told = greeted[0][1]
    size = picture or (int(told["camera_size"][0]), int(told["camera_size"][1]))
    crew = [Robot(socket, told, mode, number, size, frames or int(told["frames_per_block"])) for number, (socket, _) in enumerate(greeted)]
    out = Load()
    try:
        for _ in range(WARM):
            await asyncio.gather(*(robot.ask() for robot in crew))
        begun, computed = time.perf_counter(), cpu_s()

        async def go(robot: Robot) -> None:
            while time.perf_counter() - begun < seconds or len(out.latencies) < PER_ROBOT * robots:
                asked = time.perf_counter()
                reply = await robot.ask()
                out.latencies.append((time.perf_counter() - asked) * 1e3)
                told = reply["server_timing"]
                out.batches.append(int(told.get("batch", 1)))
                out.within.append(sum(float(told.get(part, 0.0)) for part in ("decode_ms", "queue_ms", "infer_ms")))
                out.policy.append(float(reply["policy_timing"]["infer_ms"]))

        await asyncio.gather(*(go(robot) for robot in crew))
        out.seconds, out.cpu_s = time.perf_counter() - begun, cpu_s() - computed
    finally:
        await asyncio.gather(*(socket.close() for socket, _ in greeted))
    return out
