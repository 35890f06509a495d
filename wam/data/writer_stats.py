"""Statistics of a dataset's columns, in LeRobot's keys, exact.

LeRobot estimates quantiles from running histograms and averages them over episodes; actions are normalised with them, so here they are
computed from all rows.  Images are 8-bit: a histogram of 256 values per channel holds everything, adds up over episodes, and is small.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}
Stats = dict[str, list[Any]]


def column_stats(rows: npt.NDArray[Any]) -> Stats:
    """Statistics over the first axis of (T, ...) rows; a scalar column gives lists of one."""
    values = rows.reshape(len(rows), -1).astype(np.float64)
    shape = rows.shape[1:] or (1,)
    result = {
        "min": values.min(0),
        "max": values.max(0),
        "mean": values.mean(0),
        "std": values.std(0),
        **dict(zip(QUANTILES, np.quantile(values, list(QUANTILES.values()), axis=0), strict=True)),
    }
    return {**{name: value.reshape(shape).tolist() for name, value in result.items()}, "count": [len(rows)]}


def pixel_histogram(frames: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    """How often each channel takes each value: (T, H, W, 3) -> (3, 256)."""
    return np.stack([np.bincount(frames[..., channel].ravel(), minlength=256) for channel in range(3)])


def image_stats(histogram: npt.NDArray[np.int64], frames: int) -> Stats:
    """Per-channel statistics on [0, 1], each of shape (3, 1, 1) as LeRobot has them, from (3, 256)."""
    values = np.arange(256) / 255
    share = histogram / histogram.sum(1, keepdims=True)
    mean = share @ values
    seen = histogram > 0
    result = {
        "min": values[seen.argmax(1)],
        "max": values[255 - seen[:, ::-1].argmax(1)],
        "mean": mean,
        "std": np.sqrt((share * (values - mean[:, None]) ** 2).sum(1)),
        **{name: values[(share.cumsum(1) >= q - 1e-12).argmax(1)] for name, q in QUANTILES.items()},
    }
    return {**{name: value.reshape(3, 1, 1).tolist() for name, value in result.items()}, "count": [frames]}
