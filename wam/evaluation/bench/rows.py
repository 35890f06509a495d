"""What a measurement becomes: a row that says what was compared, under which limit, and whether that holds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from wam.evaluation.bench.timing import Times


@dataclass(frozen=True)
class Comparison:
    """Two sides, measured in turns.

    Attributes:
        name, setting: what is compared, and at which size.
        ours, theirs: what the two sides are, in words.
        limit: largest ratio that is allowed.
    """

    name: str
    setting: str
    ours: str
    theirs: str
    ours_ms: Times
    theirs_ms: Times
    limit: float

    @property
    def ratio(self) -> float:
        """Of the medians, ours over theirs."""
        return self.ours_ms.median / self.theirs_ms.median

    @property
    def holds(self) -> bool:
        """Whether the ratio is within its limit."""
        return self.ratio <= self.limit

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        sides = {side: {"what": what, **times.to_dict()} for side, what, times in (("ours", self.ours, self.ours_ms), ("theirs", self.theirs, self.theirs_ms))}
        return {"row": self.name, "setting": self.setting, **sides, "ratio": self.ratio, "ratio_of_minima": self.ours_ms.minimum / self.theirs_ms.minimum, "limit": self.limit, "holds": self.holds}


@dataclass(frozen=True)
class Count:
    """How often something was computed in a session, once per layer or module that computes it."""

    name: str
    setting: str
    times: int
    limit: int = 1

    @property
    def holds(self) -> bool:
        """Whether it was computed, and not more often than allowed."""
        return 0 < self.times <= self.limit

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"row": self.name, "setting": self.setting, "times": self.times, "limit": self.limit, "holds": self.holds}


@dataclass(frozen=True)
class Stage:
    """One stage by itself, against the machine's own matmul rate.

    Attributes:
        flops: floating-point operations that the stage needs (multiply and add are two), counted in `wam.model.flops`.
        rate: measured matmul rate of the machine in the same dtype, FLOP a second; of a stage that did not run, both are 0.
        note: what else there is to say; of a stage that did not run, why.
    """

    name: str
    setting: str
    ms: Times | None
    flops: int = 0
    rate: float = 0.0
    note: str = ""
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def share(self) -> float | None:
        """Share of the matmul rate."""
        return None if self.ms is None or not self.rate or not self.flops else self.flops / (self.ms.median * 1e-3) / self.rate

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        times = {} if self.ms is None else self.ms.to_dict()
        return {"row": self.name, "setting": self.setting, **times, "flops": self.flops, "share_of_matmul_rate": self.share, "note": self.note, **self.facts}


Row = Comparison | Count | Stage
