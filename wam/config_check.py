"""Whether what was imagined is compared with what came, what a surprise leads to, and how the scale of surprise is measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from wam.config_runtime import RuntimeConfig
from wam.config_tree import require as _require


@dataclass(frozen=True)
class CheckConfig:
    """Check and replan."""

    source: Literal["none", "plan", "forward"] = "none"  # what is compared: nothing; what the plan imagined itself; what `forward` imagines from the plan's actions
    steps: int = 1  # solver steps of `forward`
    threshold: float = 0.85  # a surprise is above this; 1.0 is what 95 of 100 held-out latent frames stay below (`wam calibrate`; docs/check.md says whence 0.85)
    then: Literal["replan", "stop", "nothing"] = "replan"  # what a surprise leads to: a new plan at once, the end of the episode, or only a note
    stalled: int | None = 8  # checks in a row in which nothing moved, seen or imagined, although actions asked for it: a surprise as well; null: never
    escalate: str | None = None  # mode of the plans after a surprise (adaptive imagination), e.g. imagine; null: the same
    escalated_steps: int | None = None  # solver steps of these plans; null: as the others
    escalated_plans: int = 2  # for how many plans
    escalate_again: Literal["always", "after_calm"] = "always"  # every surprise asks for them, or only one that follows a check without: what goes on being odd is no news

    def __post_init__(self) -> None:
        for name in ("steps", "stalled", "escalated_steps", "escalated_plans"):
            _require(getattr(self, name) is None or getattr(self, name) >= 1, f"check.{name} is {getattr(self, name)}", "it must be at least 1")
        _require(self.threshold > 0, f"check.threshold is {self.threshold}", "it is a multiple of the 95th percentile of held-out errors, above 0")


@dataclass(frozen=True)
class CalibrateConfig:
    """`wam calibrate`: the errors of imagination on held-out episodes, which surprise is measured in."""

    clips: int = 48  # held-out stretches, spread over episodes
    blocks: int = 8  # blocks of each, observed one after another
    steps: int | None = None  # solver steps of plans; default: the checkpoint's (sampling.steps)
    forward_steps: tuple[int, ...] = (1, 2)  # solver steps of `forward`, each measured by itself
    batch: int = 16  # clips side by side
    seed: int = 0
    runtime: RuntimeConfig = RuntimeConfig()

    def __post_init__(self) -> None:
        for name in ("clips", "blocks", "steps", "batch"):
            _require(getattr(self, name) is None or getattr(self, name) >= 1, f"calibrate.{name} is {getattr(self, name)}", "it must be at least 1")
        _require(all(n >= 1 for n in self.forward_steps), f"calibrate.forward_steps are {list(self.forward_steps)}", "each must be at least 1")
        _require(self.seed >= 0, f"calibrate.seed is {self.seed}", "it must be at least 0")


@dataclass(frozen=True)
class TrialConfig:
    """`wam surprise`: what a check makes of undisturbed and of disturbed episodes, all else the same."""

    env: str = "metaworld/drawer-open-v3"
    kinds: tuple[str, ...] = ("arm_pushed", "object_moved", "frames_dropped", "occlusion")  # disturbances, each in episodes of its own
    episodes: int = 10  # undisturbed, and of each kind
    seed: int = 12000  # of the first, in the validation range
    mode: str = "skip"
    strength: float = 1.0  # of disturbances
    max_steps: int = 160  # control steps an episode

    def __post_init__(self) -> None:
        for name in ("episodes", "max_steps"):
            _require(getattr(self, name) >= 1, f"surprise.{name} is {getattr(self, name)}", "it must be at least 1")
        _require(len(self.kinds) > 0, "surprise.kinds is empty", "name at least one disturbance, e.g. arm_pushed")
