"""Whether several plans are made and the best is taken, what is best, and what a robot is told to aim at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from wam.config_tree import require as _require

Score = Literal["goal", "agreement", "value"]


@dataclass(frozen=True)
class PlannerConfig:
    """Planning by sampling and imagining (docs/planning.md)."""

    kind: Literal["none", "best_of_n", "cem"] = "none"
    candidates: int = 8  # N
    score: Score = "agreement"  # what is best: the imagined end is nearest to the goal image; most other candidates are near; the value head promises most
    outcomes: Literal["imagined", "simulated"] = "imagined"  # what follows from candidates: by forward dynamics, or as the simulator itself shows it, run ahead and put back: what a world model without error would be worth
    imagined: int | None = None  # `best_of_n`: of the N, how many are imagined and scored: those most unlike each other; default: all
    forward_steps: int = 1  # solver steps of imagining what follows from a candidate; one gives the mean of what may follow, which tells candidates apart best
    distance: Literal["l1", "l2"] = "l1"  # to the goal, in latents
    iterations: int = 3  # `cem`: rounds
    elites: int = 4  # `cem`: candidates kept of a round
    prior: Literal["policy", "gaussian"] = "policy"  # `cem`: where the first round comes from: the policy's own samples, or a Gaussian around 0 as V-JEPA 2-AC has it
    sigma: float = 0.5  # `cem` with prior=gaussian: its standard deviation, in normalised units
    when: Literal["always", "surprised"] = "always"  # surprised: only for the plans after a surprise (rollout.check), which are then worth more thought
    goal: Literal["language", "image", "both"] = "language"  # what an evaluated robot is given: its instruction, a picture of the solved task and no instruction, or both

    def __post_init__(self) -> None:
        for name in ("candidates", "forward_steps", "iterations", "elites"):
            _require(getattr(self, name) >= 1, f"planner.{name} is {getattr(self, name)}", "it must be at least 1")
        _require(self.imagined is None or 1 <= self.imagined <= self.candidates, f"planner.imagined is {self.imagined} of {self.candidates} candidates", f"use 1..{self.candidates}, or null for all")
        _require(self.outcomes == "imagined" or self.score != "agreement", f"planner.outcomes is {self.outcomes!r} and planner.score is {self.score!r}", "set planner.score=goal or value, which look at what follows")
        _require(self.sigma > 0, f"planner.sigma is {self.sigma}", "a standard deviation is above 0")
        if self.kind == "cem":
            _require(self.imagined is None, f"planner.imagined is {self.imagined}, but every candidate of planner.kind=cem is imagined", "leave it out, or lower planner.candidates")
            _require(self.elites < self.candidates, f"planner.elites is {self.elites} of {self.candidates} candidates", "keep fewer, or every round ends where it began")
            _require(self.score != "agreement", "planner.kind is 'cem' and planner.score is 'agreement', which its own rounds would drive up", "set planner.score=goal")
