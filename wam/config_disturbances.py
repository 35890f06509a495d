"""What goes wrong in an episode on purpose: drawn from the episode's seed, so every policy meets the same."""

from __future__ import annotations

from dataclasses import dataclass

from wam.config_tree import require as _require


@dataclass(frozen=True)
class DisturbanceConfig:
    """Disturbances of an evaluation."""

    kinds: tuple[str, ...] = ()  # e.g. [object_moved, arm_pushed]; one of them is drawn per episode.  Empty: none
    strength: float = 1.0  # of each kind's usual size
    seed: int = 0  # with an episode's seed, decides what happens and when

    def __post_init__(self) -> None:
        _require(self.strength > 0, f"disturbances.strength is {self.strength}", "it must be above 0; for none leave disturbances.kinds empty")
