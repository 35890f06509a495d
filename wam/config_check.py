"""Whether what was imagined is compared with what came, and what a surprise leads to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from wam.config_tree import require as _require


@dataclass(frozen=True)
class CheckConfig:
    """Check and replan."""

    source: Literal["none", "plan", "forward"] = "none"  # what is compared: nothing; what the plan imagined itself; what `forward` imagines from the plan's actions
    steps: int = 1  # solver steps of `forward`
    threshold: float = 3.0  # a surprise is above this, in units of the error seen in validation
    then: Literal["replan", "stop", "nothing"] = "replan"  # what a surprise leads to: a new plan at once, the end of the episode, or only a note
    escalate: str | None = None  # mode of the plans after a surprise (adaptive imagination), e.g. imagine; null: the same
    escalated_plans: int = 2  # for how many plans

    def __post_init__(self) -> None:
        _require(self.steps >= 1, f"check.steps is {self.steps}", "it must be at least 1")
        _require(self.threshold > 0, f"check.threshold is {self.threshold}", "it is a multiple of the validation error, above 0")
        _require(self.escalated_plans >= 1, f"check.escalated_plans is {self.escalated_plans}", "it must be at least 1")
