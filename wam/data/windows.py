"""Windows: which rows of an episode a training sample is made of.  Time arithmetic only; nothing is read here.

Row i holds what was observed at control step i and the action that was executed from row i to row i + 1.

    start = 3, N = 2 blocks of A = 8 actions and 4 frames, so frame_stride is 2

    rows      3   4   5   6   7   8   9   10  11  12  13 ...  19
    frames    f0      f1      f2      f3      f4      f5      f8     1 + 4kN, `frame_stride` rows apart
    states    S0                              S1                     each block's first row
    actions   a0  a1  a2  a3  a4  a5  a6  a7  a8  a9  a10 ...        N * A, every row (a15 leads to f8)

Where the first frame is inside block 0, the actions begin `timeline.lead` rows earlier: those lead to the first frame and are padding.
A dataset of another rate has `pace` rows a control step: step j is at row start + j * pace.  Frames and states are those of the row
nearest in time, an action is the one in force: of the last row at or before the step.

A window lies in one span of rows (an episode, or the part of it under one instruction) and may reach beyond its end: such indices are
clamped to the span's last row and marked as padding.  Its first block never does, and neither do the frames that close it, unless
short spans are to be padded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from wam.config import TimelineConfig

Short = Literal["skip", "pad", "refuse"]
BEYOND = 2**40  # rows: no span has as many, and sums with it stay whole
HALF = 0.5 + 1e-9  # a step halfway between two rows takes the later, whatever floating point makes of it


class Place(NamedTuple):
    """Where a window is: the episode's position in its table, the first row, and where its span stops (exclusive)."""

    position: int
    start: int
    stop: int


@dataclass(frozen=True)
class WindowIndices:
    """Rows of an episode, with what lies beyond the span's end clamped to its last row and marked.

    Attributes:
        frames, frames_is_pad: (1 + 4kN,)
        state, state_is_pad: (N,)
        action, action_is_pad: (N * A,), the row at which each control step begins
    """

    frames: np.ndarray
    frames_is_pad: np.ndarray
    state: np.ndarray
    state_is_pad: np.ndarray
    action: np.ndarray
    action_is_pad: np.ndarray


@dataclass(frozen=True)
class Rules:
    """How spans are cut into windows.

    Attributes:
        pace: rows a control step (the dataset's rate over the model's).
        start_stride: rows between the starts of two windows.
        short: what becomes of a span without room for one block.
    """

    pace: float = 1.0
    start_stride: int = 1
    short: Short = "skip"


def rows_at(steps: np.ndarray | int, pace: float) -> np.ndarray:
    """The rows nearest to control steps, counted from the row of step 0."""
    return np.floor(np.multiply(steps, pace) + HALF).astype(np.int64)


def rows_in_force(steps: np.ndarray, pace: float) -> np.ndarray:
    """The last rows at or before control steps."""
    return np.floor(np.multiply(steps, pace) + 1e-9).astype(np.int64)


def rows_held(pace: float) -> int:
    """Rows over which a control step lasts, at least the one it begins at."""
    return max(1, round(pace))


def block_rows(timeline: TimelineConfig, pace: float = 1.0) -> int:
    """Rows from a block's first to the next block's first; `BEYOND` where they are more than any file has."""
    return int(min(math.floor(timeline.actions_per_block * pace + HALF), BEYOND))


def count_starts(length: int, timeline: TimelineConfig, pace: float = 1.0) -> int:
    """How many rows of a span a window may start at: those with a whole block before the last row."""
    return max(0, length - block_rows(timeline, pace))


def window_indices(stop: int, start: int, timeline: TimelineConfig, pace: float = 1.0) -> WindowIndices:
    """The rows of the window that starts at row `start` of a span that stops at row `stop` (exclusive).

    Raises:
        ValueError: the span has no such row.
    """
    if not 0 <= start < stop:
        raise ValueError(f"no window starts at row {start} of a span that ends before row {stop}; {f'0..{stop - 1} can' if stop > 0 else 'it is empty'}")
    last, steps = stop - 1, timeline.blocks * timeline.actions_per_block
    frames = start + rows_at(timeline.stride * np.arange(timeline.frames), pace)
    state = start + rows_at(np.maximum(timeline.actions_per_block * np.arange(timeline.blocks) - timeline.lead, 0), pace)  # as a block's first action begins
    action = start + rows_in_force(np.arange(steps) - timeline.lead, pace)
    return WindowIndices(
        np.minimum(frames, last),
        frames > last,
        np.minimum(state, last),
        state > last,
        np.clip(action, 0, last),
        (action + rows_held(pace) - 1 > last) | (np.arange(steps) < timeline.lead),
    )


def block_ends(start: int, timeline: TimelineConfig, pace: float = 1.0) -> np.ndarray:
    """(N,) the rows at which the blocks of a window end: where the frame that their last action leads to is."""
    return start + rows_at(timeline.actions_per_block * np.arange(1, timeline.blocks + 1) - timeline.lead, pace)


@dataclass(frozen=True)
class WindowTable:
    """All windows of some episodes, in order.

    Attributes:
        ends: (spans,) running number of windows.
        places: (spans, 3) int64: position of the episode, first row, stop.
        start_stride: rows between two windows of a span.
        too_short: positions of the episodes that have none.
        short_spans: (position, first row, stop) of every span that has none, or one that is padded.
    """

    ends: np.ndarray
    places: np.ndarray
    start_stride: int
    too_short: tuple[int, ...]
    short_spans: tuple[Place, ...]

    def __len__(self) -> int:
        return int(self.ends[-1])

    def place(self, index: int) -> Place:
        """Where a window is.

        Raises:
            IndexError: there is no such window.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        span = int(np.searchsorted(self.ends, index, side="right"))
        position, first, stop = self.places[span].tolist()
        return Place(position, first + self.start_stride * (index - (int(self.ends[span - 1]) if span else 0)), stop)

    def locate(self, index: int) -> tuple[int, int]:
        """Position of the episode, and start row, of a window; raises as `place`."""
        return self.place(index)[:2]


def whole(lengths: Sequence[int]) -> list[list[tuple[int, int]]]:
    """Spans of episodes that are one span each."""
    return [[(0, length)] for length in lengths]


def window_table(spans: Sequence[Sequence[tuple[int, int]]], timeline: TimelineConfig, rules: Rules = Rules(), numbers: Sequence[int] | None = None) -> WindowTable:
    """Every window of episodes with these spans, (first row, stop) each.

    Args:
        numbers: what messages call the episodes; their positions where None.

    Raises:
        ValueError: no episodes, all of their spans too short, or one of them where that is to be refused; with the arithmetic.
    """
    places = np.array([(p, first, stop) for p, parts in enumerate(spans) for first, stop in parts], np.int64).reshape(-1, 3)
    lengths = places[:, 2] - places[:, 1]
    room = np.maximum(0, lengths - block_rows(timeline, rules.pace))
    short = [Place(*row) for row in places[room == 0].tolist()]
    if short and rules.short == "refuse":
        p, first, stop = short[0]
        raise ValueError(
            f"{len(short)} of {len(places)} {_kind(spans)} are too short, the first of them rows {first}..{stop - 1} of episode {p if numbers is None else numbers[p]}: {_arithmetic(timeline, rules)}; set data.short=skip or pad"
        )
    counts = -(-room // rules.start_stride)
    if rules.short == "pad":
        counts = np.where(room == 0, np.minimum(lengths, 1), counts)
    if counts.sum() == 0:
        found = f"the longest of {len(places)} {_kind(spans)} has {lengths.max()} rows" if len(places) else "there are no episodes"
        raise ValueError(f"no window fits: {_arithmetic(timeline, rules)}, but {found}; use a smaller timeline.actions_per_block, longer episodes, or data.short=pad")
    windows = np.bincount(places[:, 0], counts, len(spans))
    return WindowTable(np.cumsum(counts), places, rules.start_stride, tuple(np.flatnonzero(windows == 0).tolist()), tuple(short))


def control_grids(first: int, stop: int, pace: float) -> list[tuple[np.ndarray, np.ndarray]]:
    """The rows of a span as the model's clock sees it, of states and of actions: one pair for each row that a clock may start at."""
    grids, held = [], rows_held(pace)
    for start in range(first, min(stop, first + held)):
        steps = np.arange(int((stop - start) / pace) + 2)
        states, actions = start + rows_at(steps, pace), start + rows_in_force(steps, pace)
        inside = (states < stop) & (actions + held <= stop)
        if inside.any():
            grids.append((states[inside], actions[inside]))
    return grids


def _kind(spans: Sequence[Sequence[tuple[int, int]]]) -> str:
    return "episodes" if all(len(parts) == 1 for parts in spans) else "spans"


def _arithmetic(timeline: TimelineConfig, rules: Rules) -> str:
    a, rows = timeline.actions_per_block, block_rows(timeline, rules.pace)
    steps = f"timeline.actions_per_block {a}" + ("" if rules.pace == 1 else f" x {rules.pace:g} rows a control step = {rows} rows,")
    return f"a window needs one whole block, {steps} + 1 = {rows + 1} rows"
