"""What came of episodes: when each succeeded, and how far a window's blocks are from it.

    rows            0 1 2 ...            s | s+1 ... T-1        next.success is first true at row s: what is seen from s + 1 on has succeeded
    block ends            e0      e1                            steps to success: s + 1 - e0, s + 1 - e1, never below 0
    failed                                                      inf: the episode ended (next.done at its last row) and never succeeded
    not known                                                   -1: no such column, an episode that was cut off, or a block that ends beyond it

LeRobot's columns `next.success` and `next.done` say it; demonstrations without them may all be called successes (`data.outcome`).
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from wam.data.lerobot import LeRobotDataset

SUCCESS, DONE = "next.success", "next.done"
UNKNOWN = -1.0  # steps to success of which nothing is known
Outcomes = Literal["recorded", "success", "unknown"]


def success_row(source: LeRobotDataset, episode: int, outcomes: Outcomes) -> float:
    """The first row of an episode at which success is seen; inf where it never came, NaN where that is not known.

    Args:
        outcomes: what the columns say; `success`: every episode has succeeded as its last row is seen; `unknown`: of none it is known.

    Raises:
        DatasetError: damaged files.
    """
    if outcomes == "success":
        return float(source.episodes[episode].length - 1)
    if outcomes == "unknown" or SUCCESS not in source.features:
        return math.nan
    reached = np.flatnonzero(source.read(episode, SUCCESS)[:, 0])
    if len(reached):
        return float(reached[0] + 1)
    cut_off = DONE in source.features and not bool(source.read(episode, DONE)[-1, 0])
    return math.nan if cut_off else math.inf


def steps_to_success(row: float, ends: np.ndarray, stop: int, pace: float) -> np.ndarray:
    """(N,) float32: control steps from rows `ends`, at which blocks end, to success at `row`; `UNKNOWN` where the row is NaN, and for ends that are not before `stop`.

    Args:
        pace: rows a control step.
    """
    steps = np.maximum(row - ends, 0) / pace
    return np.where((ends < stop) & ~np.isnan(steps), steps, UNKNOWN).astype(np.float32)
