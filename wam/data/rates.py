"""Rows of a dataset on the clock of a model that runs at another rate.

    30 rows a second   r0  r1  r2  r3  r4  r5  r6 ...        pace 3: three rows a control step of 10 a second
    10 steps a second  s0          s1          s2 ...

    target     where to be (a position, a gripper's command): what is in force when the step begins      a0, a3, a6
    delta      how far to go: what all of the step's rows went together                                  a0+a1+a2, a3+a4+a5
    velocity   how fast: the mean of the step's rows                                                     (a0+a1+a2)/3, ...

A displacement cannot be cut at a fraction of a row, so its rates must divide one another; a sum of positions would be nonsense.
Which of the three an action is, only its robot's owner knows: its groups say it (`kind`), or data.action_kinds does.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from wam.config import DataConfig, TimelineConfig
from wam.config_data import ActionKind
from wam.data.lerobot import DatasetError
from wam.data.units import Units
from wam.data.windows import rows_held

MOST_PACE = 1e6  # rows a control step, or control steps a row: beyond, one of the two rates is a mistake
SUMMED = ("none", "euler", "axis_angle")  # forms of small turns that add up, to first order; a quaternion's numbers do not


def pace_of(fps: float, data: DataConfig, timeline: TimelineConfig) -> float:
    """Rows a control step: the dataset's rate over the model's, exact where one divides the other.

    Raises:
        DatasetError: the model sees more frames a second than there are.
    """
    rate = fps if data.control_hz is None else data.control_hz
    if not 1 / MOST_PACE <= fps / rate <= MOST_PACE:
        raise DatasetError(f"{data.root} has {fps:g} frames a second, and data.control_hz is {rate:g}; they may differ by a factor of {MOST_PACE:g} at most: correct data.control_hz, or fps in meta/info.json")
    pace = fps / rate
    for whole in (round(pace), 1 / max(1, round(1 / pace))):
        if whole and abs(pace - whole) < 1e-6 * whole:
            pace = float(whole)
    if timeline.stride * pace < 1 - 1e-6:
        raise DatasetError(
            f"{data.root} has {fps:g} frames a second, but data.control_hz {rate:g} / timeline.frame_stride {timeline.stride} = {rate / timeline.stride:g} are asked for, so frames would repeat; "
            f"use a frame_stride of {int(np.ceil(rate / fps))} or more, or a lower data.control_hz"
        )
    return pace


def kinds_of(units: Units, data: DataConfig, pace: float) -> tuple[ActionKind, ...]:
    """The kind of every raw action dimension; at the dataset's own rate, where it does not matter, all are targets.

    Raises:
        DatasetError: not said, of another number of dimensions, or what cannot be brought to the rate.
    """
    size = units.robot.raw_action_dim
    if pace == 1 or data.contents == "video":
        return ("target",) * size  # type: ignore[return-value]
    by_group = tuple(kind for group in units.robot.action_groups for kind in (group.kind,) * group.size)
    said = data.action_kinds * (size if len(data.action_kinds) == 1 else 1) or by_group
    where = f"{data.root} has {pace:g} rows a control step (its rate over data.control_hz)"
    if len(said) != size:
        raise DatasetError(f"{where}, and data.action_kinds lists {len(data.action_kinds)}; say of all, or of each of the {size} action dimensions, whether it is a target, delta or velocity")
    if "delta" in said and pace != round(pace) and 1 / pace != round(1 / pace):
        raise DatasetError(f"{where}, and a displacement cannot be cut at a fraction of a row; use a data.control_hz that divides the dataset's rate or is a multiple of it")
    for part in units.action:
        kinds = set(said[part.raw])
        if kinds != {"target"} and part.relative:
            raise DatasetError(f"action group {part.name!r} is relative to the state, so it is a target, but data.action_kinds says {', '.join(sorted(kinds))}; correct one of the two")
        if kinds != {"target"} and part.form not in SUMMED:
            raise DatasetError(f"action group {part.name!r} is a rotation as {part.form}, whose numbers do not add up; bring the dataset to data.control_hz beforehand")
    return said


def at_control_rate(actions: np.ndarray, kinds: Sequence[ActionKind], pace: float) -> np.ndarray:
    """What a control step that begins at a row asks for, (length, d), from the rows of an episode; sums end with the episode."""
    if pace == 1:
        return actions
    held, last = rows_held(pace), len(actions) - 1
    total = sum((actions[np.minimum(np.arange(len(actions)) + i, last)] for i in range(1, held)), actions)
    scale = {"target": 0.0, "delta": 1.0 if pace >= 1 else pace, "velocity": 1 / held}
    factors = np.array([scale[kind] for kind in kinds], np.float32)
    return np.where(np.array([kind == "target" for kind in kinds]), actions, total * factors).astype(np.float32)
