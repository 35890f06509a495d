"""`wam bench serve --soak MINUTES`: robots come and go, some of them badly, and the server stays as it was.

    steady     plans with what it sees, a few to many, then goodbye          garbage   bytes that are no message, or nearly one; each is answered
    killed     asks, and its connection is cut while the plan is made        slow      asks several times and reads late
    nameless, or with a session_id that it or another may come back with
    as fast as they are answered, or with `rate` requests a second of all together, at random times: a soak is about time, not load

Every request is accounted for: answered, refused with a code, abandoned by its own robot, or lost, which none may be.  The memory that
the server's process holds is sampled all along; its first quarter is warming up, the rest is cut into blocks, and a line through their
means has a slope with an interval.  What grows by more than the limits, for sure, fails.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
import urllib.request
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm
from websockets.exceptions import ConnectionClosed, WebSocketException

from wam.evaluation.bench.serve_load import WAIT_S, Robot, hello
from wam.evaluation.bench.serve_sides import ServerProcess, Side
from wam.files import write_json_atomic
from wam.serving.wire import pack, unpack

ROBOTS, SEATS = 6, 6  # at a time, and sessions that the server has room for: named ones stay, so there is always one to make room
BLOCKS, T_95 = 12, 2.228  # means that the line goes through, and Student's t of 95 % for them (10 degrees of freedom)
WARMING = 0.25  # of the time
GROWTH, GRAINS = 16.0, 8.0  # MiB an hour, and MiB in all, that are no leak: allocators take memory in pieces
LEAST_S = 120.0  # a shorter soak says nothing about memory
KINDS = {"steady": 6, "killed": 2, "slow": 1, "garbage": 3}
SETTLE_S = 30.0  # for the server to notice that all have gone


@dataclass(frozen=True, kw_only=True)
class SoakOptions:
    """As the command line says.

    Attributes:
        rate: requests a second of all robots together; None: as fast as they are answered.
    """

    checkpoint: Path
    minutes: float
    rate: float | None = None
    mode: str = "skip"
    device: str = "cpu"
    threads: int = 1
    seed: int = 0
    json: Path | None = None


@dataclass(frozen=True)
class Growth:
    """Of memory: MiB an hour, with its 95 % interval, over so many hours."""

    slope: float
    low: float
    high: float
    hours: float

    @property
    def holds(self) -> bool:
        """Whether it is not surely a leak."""
        return not (self.low > 0 and self.slope > GROWTH and self.slope * self.hours > GRAINS)


@dataclass
class Soak:
    """What came of it.

    Attributes:
        requests: `asked`, `answered`, `refused`, `abandoned`, `lost`.
        codes: of what was refused.
        robots: by kind.
        memory: (seconds, MiB) samples.
        left: connections that the server still counts when all have gone.
        internal: errors of the server's own.
    """

    requests: Counter[str] = field(default_factory=Counter)
    codes: Counter[str] = field(default_factory=Counter)
    robots: Counter[str] = field(default_factory=Counter)
    memory: list[tuple[float, float]] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    left: int = 0
    internal: int = 0
    alive: bool = True

    def problems(self) -> list[str]:
        """What is not as it should be."""
        r, grown = self.requests, growth(self.memory)
        out = [] if self.alive else ["the server's process ended"]
        if r["lost"] or r["asked"] != r["answered"] + r["refused"] + r["abandoned"]:
            out.append(f"{r['asked'] - r['answered'] - r['refused'] - r['abandoned']} requests were lost: {'; '.join(self.lost[:3])}")
        if self.internal:
            out.append(f"{self.internal} internal errors; the server's log has them")
        if self.left:
            out.append(f"{self.left} connections are still counted after all robots have gone")
        if grown is not None and not grown.holds:
            out.append(f"memory grows by {grown.slope:.1f} MiB an hour ({grown.low:.1f} to {grown.high:.1f}), above {GROWTH:g}")
        return out

    def text(self) -> str:
        """For people."""
        r, grown, held = self.requests, growth(self.memory), [mib for _, mib in self.memory]
        lines = [f"{sum(self.robots.values())} robots came and went: " + ", ".join(f"{count} {kind}" for kind, count in sorted(self.robots.items()))]
        lines.append(f"{r['asked']} requests: {r['answered']} answered, {r['refused']} refused, {r['abandoned']} abandoned by their robots, {r['lost']} lost")
        lines.append("refused: " + (", ".join(f"{code} {count}" for code, count in self.codes.most_common()) or "none"))
        slope = "too short for a slope" if grown is None else f"after the first quarter {grown.slope:+.1f} MiB an hour (95 %: {grown.low:+.1f} to {grown.high:+.1f}; limit {GROWTH:g})"
        lines.append(f"memory: {held[0]:.0f} MiB at first, {max(held):.0f} at most, {held[-1]:.0f} at last; {slope}")
        return "\n".join([*lines, *(f"NOT AS IT SHOULD BE: {problem}" for problem in self.problems())])

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        grown = growth(self.memory)
        counted = {name: dict(getattr(self, name)) for name in ("requests", "codes", "robots")}
        slope = None if grown is None else {"mib_per_hour": grown.slope, "low": grown.low, "high": grown.high, "limit": GROWTH}
        return counted | {"memory": self.memory, "growth": slope, "lost": self.lost, "left": self.left, "internal": self.internal, "problems": self.problems()}


def bench_soak(options: SoakOptions) -> int:
    """Soak, print, write what is asked for; 1 where something is not as it should be.

    Raises:
        FileNotFoundError: no checkpoint there.
        BenchError: the server does not run.
    """
    if not options.checkpoint.is_dir():
        raise FileNotFoundError(f"no checkpoint {options.checkpoint}; `wam train` writes one")
    seats = (("max_sessions", SEATS), ("spare_s", 0.0), ("idle_s", 20.0))
    with ServerProcess(Side("wam serve", options.checkpoint, device=options.device, threads=options.threads, options=seats)) as server:
        soak = asyncio.run(_soak(server, options))
    print(soak.text())
    if options.json is not None:
        write_json_atomic(options.json, soak.to_dict())
        print(f"wrote {options.json}")
    return 1 if soak.problems() else 0


def growth(samples: Sequence[tuple[float, float]]) -> Growth | None:
    """Of samples (seconds, MiB), after warming up; None: too few of them, or too short a time.

    Samples lie too close for each to count by itself, so the line goes through the means of blocks (batch means).
    """
    if not samples or samples[-1][0] - samples[0][0] < LEAST_S:
        return None
    at, mib = np.array(samples).T
    warm = at >= at[0] + WARMING * (at[-1] - at[0])
    if warm.sum() < 2 * BLOCKS:
        return None
    x, y = (np.array([part.mean() for part in np.array_split(values[warm], BLOCKS)]) for values in (at / 3600, mib))
    away = x - x.mean()
    slope = float(away @ y / (away @ away))
    residual = y - y.mean() - slope * away
    error = T_95 * float(np.sqrt(residual @ residual / (BLOCKS - 2) / (away @ away)))
    return Growth(slope, slope - error, slope + error, float(np.ptp(at[warm])) / 3600)


# ------------------------------------------------------------------------------------------------ robots


class Pace:
    """Whose turn it is, of robots that share a number of requests a second; gaps are random, so some ask at the same time."""

    def __init__(self, rate: float | None, rng: random.Random):
        self.rate, self.rng, self.next = rate, rng, time.monotonic()

    async def turn(self, requests: int, until: float) -> None:
        """Wait until so many more may be made, or until the end."""
        if self.rate is None:
            return
        now = time.monotonic()
        at = max(self.next, now)
        self.next = at + sum(self.rng.expovariate(self.rate) for _ in range(requests))
        await asyncio.sleep(min(at, max(until, now)) - now)


async def _soak(server: ServerProcess, options: SoakOptions) -> Soak:
    soak, begun = Soak(), time.monotonic()
    until = begun + options.minutes * 60
    pace = Pace(options.rate, random.Random(options.seed))
    crew = [asyncio.create_task(_seat(server, options, soak, pace, until, random.Random(options.seed * 1000 + seat))) for seat in range(ROBOTS)]
    with tqdm(total=round(options.minutes * 60), desc="soak", bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed} gone, {remaining} to go{postfix}", mininterval=1.0) as progress:
        while not all(task.done() for task in crew):
            await asyncio.sleep(min(1.0, max(0.01, options.minutes * 60 / 100)))
            soak.alive = server.alive
            if not soak.alive:
                break
            if time.monotonic() < until:
                soak.memory.append((time.monotonic() - begun, server.rss_mib()))
            progress.set_postfix_str(f"{soak.requests['asked']} requests, {soak.requests['lost']} lost, {soak.memory[-1][1]:.0f} MiB" if soak.memory else "", refresh=False)
            progress.update(min(round(time.monotonic() - begun), progress.total) - progress.n)
    await asyncio.gather(*crew)
    settled = time.monotonic() + SETTLE_S
    while soak.alive and time.monotonic() < settled:
        soak.left, soak.internal = await asyncio.to_thread(_counted, server.url)
        if not soak.left:
            break
        await asyncio.sleep(0.2)
    return soak


def _counted(url: str) -> tuple[int, int]:
    """Connections that the server counts, and internal errors."""
    with urllib.request.urlopen(url.replace("ws://", "http://") + "/metrics", timeout=WAIT_S) as answer:
        lines = [line.split() for line in answer.read().decode().splitlines() if line and not line.startswith("#")]
    found = {line[0]: float(line[1]) for line in lines}
    return int(found.get("wam_connections", 0)), int(found.get('wam_errors_total{code="internal_error"}', 0))


async def _seat(server: ServerProcess, options: SoakOptions, soak: Soak, pace: Pace, until: float, rng: random.Random) -> None:
    """One robot after another."""
    while time.monotonic() < until and server.alive:
        kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
        soak.robots[kind] += 1
        socket, told = await hello(server.url)
        robot = Robot(socket, told, options.mode, rng.randrange(1000), (int(told["camera_size"][0]), int(told["camera_size"][1])), int(told["frames_per_block"]))
        named = {"session_id": f"robot {rng.randrange(2 * ROBOTS)}", "timestamp": None} if rng.random() < 0.5 else {}
        try:
            await _behave(kind, robot, named, soak, pace, rng, until)
        finally:
            await socket.close()


async def _behave(kind: str, robot: Robot, more: dict[str, Any], soak: Soak, pace: Pace, rng: random.Random, until: float) -> None:
    for _ in range(rng.randint(1, 12)):
        await pace.turn(3 if kind == "slow" else 1, until)
        if time.monotonic() >= until:
            break
        message = pack(robot.message() | more)
        if kind == "garbage":
            message = spoilt(message, robot.message() | more, rng)
        if kind == "slow":
            for _ in range(3):
                await _send(robot, message, soak)
            await asyncio.sleep(rng.random())
            for _ in range(3):
                await _receive(robot, soak)
            continue
        await _send(robot, message, soak)
        if kind == "killed" and rng.random() < 0.4:
            await asyncio.sleep(rng.random() * 0.05)
            robot.socket.transport.abort()
            soak.requests["abandoned"] += 1
            return
        await _receive(robot, soak)


async def _send(robot: Robot, message: bytes, soak: Soak) -> None:
    soak.requests["asked"] += 1
    try:
        await robot.socket.send(message)
    except ConnectionClosed:
        return  # what is lost is counted where its reply is waited for


async def _receive(robot: Robot, soak: Soak) -> None:
    """Account for one reply."""
    try:
        data = await asyncio.wait_for(robot.socket.recv(), WAIT_S)
    except (TimeoutError, WebSocketException) as error:
        soak.requests["lost"] += 1
        soak.lost.append(f"no reply: {type(error).__name__} {error}")
        return
    reply = json.loads(data) if isinstance(data, str) else unpack(data)
    if isinstance(reply, dict) and "error" in reply:
        soak.requests["refused"] += 1
        soak.codes[reply["error"]["code"]] += 1
    else:
        soak.requests["answered"] += 1


def spoilt(message: bytes, values: dict[str, Any], rng: random.Random) -> bytes:
    """A message that is broken in one of several ways."""
    kind = rng.randrange(5)
    if kind == 0:
        return rng.randbytes(rng.randrange(1, 4000))
    if kind == 1:
        return message[: rng.randrange(1, len(message))]
    if kind == 2:
        nested: Any = 0
        for _ in range(rng.randrange(7, 40)):
            nested = [nested]
        return pack(values | {"prompt": nested})
    if kind == 3:
        name = rng.choice([name for name in values if values[name] is not None])
        return pack(values | {name: rng.choice([None, -1, 1.5, "x", [], {}, np.full(3, np.nan), np.zeros((2, 2), np.uint8)])})
    place = rng.randrange(len(message) - 1)
    return message[:place] + rng.randbytes(1) + message[place + 1 :]
