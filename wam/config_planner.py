"""Whether several plans are made and the best is taken, and what is best."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from wam.config_tree import require as _require


@dataclass(frozen=True)
class PlannerConfig:
    """Planning by sampling and imagining."""

    kind: Literal["none", "best_of_n", "cem"] = "none"
    candidates: int = 8  # N
    score: Literal["goal", "agreement", "value"] = "agreement"
    forward_steps: int = 2  # solver steps of imagining what follows from a candidate
    iterations: int = 3  # `cem`: rounds
    elites: int = 4  # `cem`: candidates kept of a round

    def __post_init__(self) -> None:
        for name in ("candidates", "forward_steps", "iterations", "elites"):
            _require(getattr(self, name) >= 1, f"planner.{name} is {getattr(self, name)}", "it must be at least 1")
        _require(self.kind != "cem" or self.elites <= self.candidates, f"planner.elites is {self.elites} of {self.candidates} candidates", "keep fewer")
