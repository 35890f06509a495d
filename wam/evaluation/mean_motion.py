"""The dataset's mean motion: what a predictor knows that has seen the training episodes and looks at nothing but the first frame.

    training clips    x0 x1 x2 ...          mean over clips of  xt - x0          =  change after t frames, (H, W, 3)
    prediction        f  f + change_1  f + change_2 ...                             from any first frame f, kept within 0..255

Copying the first frame is beaten by anyone who knows which way things usually go: the arm comes in from the left, the drawer comes out.
A model that beats only the copy may have learned no more than that, so this is the second baseline of imagined video.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from wam.data.dataset import WindowDataset

EPISODES, STARTS = 64, 8  # at most: episodes, spread evenly over the training split, and clips of each, spread evenly over their room
ABOUT = "the first frame, and on it the mean change of the training clips since their first frame, at the same time"


@dataclass(frozen=True)
class MeanMotion:
    """Mean change since a clip's first frame.

    Attributes:
        change_FHWC: (F, H, W, 3) float32, in grey levels, after 1..F frames.
        clips: that it is the mean of.
    """

    change_FHWC: np.ndarray
    clips: int

    def video(self, first_HWC: np.ndarray, frames: int) -> np.ndarray:
        """What it expects after a first frame: uint8 (frames, H, W, 3), the first frame left out."""
        return (first_HWC.astype(np.float32) + self.change_FHWC[:frames]).round().clip(0, 255).astype(np.uint8)


def mean_motion(source: WindowDataset, frames: int, stride: int) -> MeanMotion | None:
    """The mean motion of a split's episodes.

    Args:
        frames: F, how far ahead.
        stride: rows between frames.

    Returns:
        None where no episode is long enough.
    """
    total: np.ndarray | None = None
    count, span = 0, frames * stride
    for position in _spread(len(source.episodes), EPISODES):
        pictures = source.episode(source.episodes[position]).frames
        for start in _spread(len(pictures) - span, STARTS):
            clip = pictures[start : start + span + 1 : stride].astype(np.float32)
            change = clip[1:] - clip[:1]
            total = change if total is None else total + change
            count += 1
    return None if total is None else MeanMotion(total / count, count)


def _spread(room: int, most: int) -> list[int]:
    """At most `most` places in 0..room - 1, evenly spread; none where there is no room."""
    return sorted({round(x) for x in np.linspace(0, room - 1, min(most, room)).tolist()}) if room > 0 else []
