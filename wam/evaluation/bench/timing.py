"""Clocks and paired measurements: what is compared runs in one process, in turns, call by call.

    round 1   ours  theirs        A machine that slows down, or that others use too, slows both sides alike.  On a CPU the
    round 2   theirs  ours        judged clock is the time that this process computed (`cpu`), which others hardly touch;
    round 3   ours  theirs        on a GPU it is the time that passed (`wall`), with the device waited for.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

Call = Callable[[], Any]


@dataclass(frozen=True)
class Times:
    """Milliseconds of the same call, made several times.

    Attributes:
        wall: that passed.
        cpu: that all threads of this process computed; empty on a GPU, where the process only waits.
    """

    wall: tuple[float, ...]
    cpu: tuple[float, ...] = ()

    @property
    def judged(self) -> tuple[float, ...]:
        """The clock that decides."""
        return self.cpu or self.wall

    @property
    def median(self) -> float:
        """Median of the judged clock."""
        return statistics.median(self.judged)

    @property
    def minimum(self) -> float:
        """Least of the judged clock."""
        return min(self.judged)

    def to_dict(self) -> dict[str, Any]:
        """Every number, for JSON."""
        clocks = {"wall_ms": self.wall} | ({"cpu_ms": self.cpu} if self.cpu else {})
        return {name: {"median": statistics.median(x), "minimum": min(x), "all": list(x)} for name, x in clocks.items()}


def clock(call: Call, device: torch.device) -> tuple[float, float]:
    """Wall and process time of one call, in milliseconds; a GPU is waited for before and after."""
    _wait(device)
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    _wait(device)
    return (time.perf_counter() - wall) * 1e3, (time.process_time() - cpu) * 1e3


def alternate(calls: Mapping[str, Call], repeats: int, device: torch.device, warmups: int = 1) -> dict[str, Times]:
    """Make all calls in turns, `repeats` rounds of them; every second round runs backwards, so that none is always the first."""
    for call in list(calls.values()) * warmups:
        call()
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for number in range(repeats):
        for name in list(calls)[:: 1 if number % 2 == 0 else -1]:
            taken[name].append(clock(calls[name], device))
    return {name: Times(tuple(w for w, _ in pairs), () if device.type == "cuda" else tuple(c for _, c in pairs)) for name, pairs in taken.items()}


def measure(call: Call, repeats: int, device: torch.device, warmups: int = 1) -> Times:
    """One call by itself."""
    return alternate({"": call}, repeats, device, warmups)[""]


def increase(long: Times, short: Times) -> Times:
    """How much longer one takes than the other, round by round."""
    return Times(*(tuple(a - b for a, b in zip(x, y, strict=True)) for x, y in ((long.wall, short.wall), (long.cpu, short.cpu))))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
