"""The section of a config that says what is trained on: which files, which of their columns mean what, and how they are cut and shown.

    files  ->  columns, cameras  ->  windows (spans, start_stride, short, control_hz)  ->  one canvas (layout, augment)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from wam.config_tree import require

Layout = Literal["single", "width", "height", "grid", "t", "separate"]
ActionKind = Literal["target", "delta", "velocity"]
GRID: dict[Layout, tuple[int, int]] = {"single": (1, 1), "grid": (2, 2), "t": (2, 2), "separate": (1, 1)}  # rows and columns; width and height have as many as cameras


def grid_of(layout: Layout, cameras: int) -> tuple[int, int]:
    """Rows and columns of a canvas."""
    return {"width": (1, cameras), "height": (cameras, 1)}.get(layout) or GRID[layout]


@dataclass(frozen=True)
class AugmentConfig:
    """Training frames that differ from the recorded ones: drawn once for a window, the same for its frames and its cameras.

    DreamZero: crop 0.95, brightness 0.3, contrast 0.4, saturation 0.5, hue 0.08.
    """

    crop: float = 1.0  # side of what is kept; in validation and at inference the middle of the picture is
    brightness: float = 0.0  # colours are scaled by 1 - brightness .. 1 + brightness
    contrast: float = 0.0  # likewise, about middle grey
    saturation: float = 0.0  # likewise, about the pixel's grey
    hue: float = 0.0  # turned by up to this part of the circle, either way
    view_dropout: float = 0.0  # probability that one of the cameras after the first is black

    def __post_init__(self) -> None:
        require(0.5 <= self.crop <= 1, f"data.augment.crop is {self.crop}", "expected the side that is kept, 0.5 .. 1 (1: everything)")
        for name in ("brightness", "contrast", "saturation"):
            require(0 <= getattr(self, name) <= 1, f"data.augment.{name} is {getattr(self, name)}", "expected 0 (none) .. 1")
        require(0 <= self.hue <= 0.5, f"data.augment.hue is {self.hue}", "expected a part of the circle, 0 .. 0.5")
        require(0 <= self.view_dropout <= 1, f"data.augment.view_dropout is {self.view_dropout}", "expected a probability")


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
    wording: Literal["first", "any"] = "first"  # of several columns of language: the first, or in training one drawn from those that say something
    spans: Literal["episode", "language"] = "episode"  # a window ends with its episode, or with its instruction (DreamZero)
    start_stride: int = 1  # rows between the starts of two windows
    short: Literal["skip", "pad", "refuse"] = "skip"  # what has no room for one block: left out and counted, one padded window, or an error
    control_hz: float | None = None  # control steps a second of the timeline; null: the dataset's rate
    action_kinds: tuple[ActionKind, ...] = ()  # for a dataset of another rate, of all dimensions or each: a target (sampled), a displacement (summed), a velocity (averaged)
    normalization: Literal["quantile", "mean_std", "min_max"] = "quantile"
    validation_fraction: float = 0.1  # episodes held out, the last of each task
    layout: Layout = "single"  # several cameras on one canvas: side by side, one above the other, 2 x 2, the first above the next two, or each for itself
    augment: AugmentConfig = AugmentConfig()
    decoder: Literal["auto", "decord", "pyav", "torchcodec"] = "auto"  # auto: PyAV, the fastest where few frames are asked for, and the one that refuses damage
    broken: Literal["refuse", "skip"] = "refuse"  # episodes whose files are missing or damaged: an error, or left out and counted
    max_broken: float = 0.1  # more than this part of the episodes broken is an error all the same
    cache: Literal["memory", "none"] = "memory"  # decoded uint8 frames kept in memory, or decoded on every access
    latents: str | None = None  # directory of encoded windows that `wam cache` wrote; null: frames are encoded at every step
    contents: Literal["paired", "video", "action"] = "paired"  # what is learnt from: both; video alone (no columns are read); states and actions alone (no cameras are read)
    outcome: Literal["recorded", "success", "unknown"] = "recorded"  # what came of episodes, for a value head: as next.success and next.done say; all succeeded at their last row; not known
    imitate: Literal["all", "successes"] = "all"  # whose actions are learnt: all, or not those of episodes that failed or were cut off (their video and values are)
    weight: float = 1.0  # of a dataset in a mixture: its share of the samples, beside the others' weights
    workers: int = 0

    def __post_init__(self) -> None:
        self._check_cameras()
        require(0 <= self.validation_fraction < 1, f"data.validation_fraction is {self.validation_fraction}", "expected 0 <= fraction < 1")
        require(self.workers >= 0, f"data.workers is {self.workers}", "expected 0 (load in the training process) or more")
        require(0 < self.weight < math.inf, f"data.weight of {self.root} is {self.weight}", "expected a finite weight above 0; leave a dataset out of mixture to give it none")
        require(self.latents is None or self.augment == AugmentConfig(), f"data.latents is {self.latents!r}, but data.augment changes pixels, and encoded windows have none", "set latents=null, or leave data.augment out")
        require(self.start_stride >= 1, f"data.start_stride is {self.start_stride}", "expected 1 (every row) or more")
        rate = self.control_hz
        require(rate is None or (math.isfinite(rate) and rate > 0), f"data.control_hz is {rate}", "expected control steps a second, or null for the dataset's rate")
        require(0 <= self.max_broken <= 1, f"data.max_broken is {self.max_broken}", "expected a part of the episodes, 0 .. 1")

    def _check_cameras(self) -> None:
        count = len(self.cameras)
        room = {"single": (1, 1), "grid": (2, 4), "t": (3, 3)}.get(self.layout, (1, 16))
        named = f"data.cameras lists {count} cameras, and data.layout is {self.layout!r}"
        wants = f"{room[0]}" if room[0] == room[1] else f"{room[0]} to {room[1]}"
        require(room[0] <= count <= room[1], named, f"it takes {wants}; layouts for several: width, height, grid (2 to 4), t (3), separate")
        require(len(set(self.cameras)) == count, f"data.cameras is {list(self.cameras)}", "name each camera once")
        drop = self.augment.view_dropout
        require(drop == 0 or count > 1, f"data.augment.view_dropout is {drop}, and there is one camera", "set it to 0, or list more cameras")
