"""The section of a config that says what is trained on: which files, and which of their columns mean what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from wam.config_tree import require


@dataclass(frozen=True)
class DataConfig:
    """Which LeRobot dataset is read, and which of its columns mean what."""

    root: str = "data/metaworld"
    embodiment: str = "metaworld"
    cameras: tuple[str, ...] = ("observation.images.corner4",)
    state: str = "observation.state"
    action: str = "action"  # what the policy should do (the label)
    executed_action: str | None = None  # what the robot really did, where the dataset records it apart; default: `action`
    language: tuple[str, ...] = ()  # columns of instructions, the first that says something at a row; empty: the dataset's tasks
    normalization: Literal["quantile", "mean_std", "min_max"] = "quantile"
    validation_fraction: float = 0.1  # episodes held out, the last of each task
    cache: Literal["memory", "none"] = "memory"  # decoded uint8 frames kept in memory, or decoded on every access
    workers: int = 0

    def __post_init__(self) -> None:
        require(len(self.cameras) == 1, f"data.cameras lists {len(self.cameras)} cameras", "this version reads exactly one")
        require(0 <= self.validation_fraction < 1, f"data.validation_fraction is {self.validation_fraction}", "expected 0 <= fraction < 1")
        require(self.workers >= 0, f"data.workers is {self.workers}", "expected 0 (load in the training process) or more")
