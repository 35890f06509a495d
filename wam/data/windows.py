"""Windows: which rows of an episode a training sample is made of.  Time arithmetic only; nothing is read here.

Row i holds what was observed at control step i and the action that was executed from row i to row i + 1.

    start = 3, N = 2 blocks of A = 8 actions and 4 frames, so frame_stride is 2

    rows      3   4   5   6   7   8   9   10  11  12  13 ...  19
    frames    f0      f1      f2      f3      f4      f5      f8     1 + 4kN, `frame_stride` rows apart
    states    S0                              S1                     each block's first row
    actions   a0  a1  a2  a3  a4  a5  a6  a7  a8  a9  a10 ...        N * A, every row (a15 leads to f8)

Where the first frame is inside block 0, the actions begin `timeline.lead` rows earlier: those lead to the first frame and are padding.

A window may reach beyond its episode: such indices are clamped to the last row and marked as padding.  Its first block never
does, and neither do the frames that close it; an episode without room for one block has no windows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from wam.config import TimelineConfig


@dataclass(frozen=True)
class WindowIndices:
    """Rows of an episode, with what lies beyond its end clamped to the last row and marked.

    Attributes:
        frames, frames_is_pad: (1 + 4kN,)
        state, state_is_pad: (N,)
        action, action_is_pad: (N * A,)
    """

    frames: np.ndarray
    frames_is_pad: np.ndarray
    state: np.ndarray
    state_is_pad: np.ndarray
    action: np.ndarray
    action_is_pad: np.ndarray


def count_starts(length: int, timeline: TimelineConfig) -> int:
    """How many rows of an episode a window may start at: 0 .. length - 1 - A, none where the episode is too short."""
    return max(0, length - timeline.actions_per_block)


def window_indices(length: int, start: int, timeline: TimelineConfig) -> WindowIndices:
    """The rows of the window that starts at row `start` of an episode of `length` rows.

    Raises:
        ValueError: no window starts there.
    """
    starts = count_starts(length, timeline)
    if not 0 <= start < starts:
        raise ValueError(
            f"no window starts at row {start} of an episode of {length} rows; {_arithmetic(timeline)}, so {f'0..{starts - 1} can start one' if starts else 'none can start one'}"
        )
    last = length - 1
    frames = start + timeline.stride * np.arange(timeline.frames)
    state = start + timeline.actions_per_block * np.arange(timeline.blocks)
    action = start - timeline.lead + np.arange(timeline.blocks * timeline.actions_per_block)
    return WindowIndices(
        np.minimum(frames, last),
        frames > last,
        np.minimum(state, last),
        state > last,
        np.clip(action, 0, last),
        (action > last) | (action < start),
    )


@dataclass(frozen=True)
class WindowTable:
    """All windows of some episodes, in order; window i starts at row `locate(i)[1]` of the episode at position `locate(i)[0]`.

    Attributes:
        ends: (episodes,) running number of windows.
        too_short: positions of the episodes that have none.
    """

    ends: np.ndarray
    too_short: tuple[int, ...]

    def __len__(self) -> int:
        return int(self.ends[-1])

    def locate(self, index: int) -> tuple[int, int]:
        """Position of the episode, and start row, of a window.

        Raises:
            IndexError: there is no such window.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        position = int(np.searchsorted(self.ends, index, side="right"))
        return position, index - (int(self.ends[position - 1]) if position else 0)


def window_table(lengths: list[int], timeline: TimelineConfig) -> WindowTable:
    """Every window of episodes with these lengths; episodes that are too short have none.

    Raises:
        ValueError: no episodes, or all of them are too short; with the arithmetic.
    """
    counts = [count_starts(length, timeline) for length in lengths]
    if sum(counts) == 0:
        found = f"the longest of {len(lengths)} episodes has {max(lengths)} rows" if lengths else "there are no episodes"
        raise ValueError(f"no window fits: {_arithmetic(timeline)}, but {found}; use a smaller timeline.actions_per_block, or longer episodes")
    return WindowTable(np.cumsum(counts), tuple(i for i, count in enumerate(counts) if count == 0))


def _arithmetic(timeline: TimelineConfig) -> str:
    a = timeline.actions_per_block
    return f"a window needs one whole block, timeline.actions_per_block {a} + 1 = {a + 1} rows"
