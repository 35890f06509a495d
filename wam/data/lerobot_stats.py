"""The statistics that a dataset carries along: of the whole in v2.0 and v3.0, of every episode in v2.1, where they are pooled here.

    mean = sum n_e m_e / N        variance = sum n_e (s_e^2 + (m_e - mean)^2) / N        N = sum n_e, over episodes e

That is the mean and deviation of all rows, exactly.  Quantiles cannot be pooled (the extremes of the episodes' are an envelope), so
there are none for v2.1.  Training fits its own statistics to the rows (`wam.data.normalize`); these are for comparing with.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from wam.data.lerobot_files import DatasetError, read_json, read_json_lines

Stats = dict[str, dict[str, np.ndarray]]  # by feature, then "min", "max", "mean", "std", "count" and whatever else the file has
POOLED = ("min", "max", "mean", "std", "count")


def read_stats(root: Path, version: str, episodes: int) -> Stats:
    """What the dataset says about its columns; empty where it says nothing.

    Args:
        version: of the dataset, as "v2.1".
        episodes: how many it has.

    Raises:
        DatasetError: a damaged file, statistics that are no numbers, or of other episodes than the dataset has.
    """
    if version == "v2.1":
        path = root / "meta/episodes_stats.jsonl"
        return _pooled(path, episodes) if path.is_file() else {}
    path = root / "meta/stats.json"
    return _arrays(path, "the dataset", read_json(path)) if path.is_file() else {}


def _pooled(path: Path, episodes: int) -> Stats:
    rows = read_json_lines(path, ("episode_index", "stats"))
    numbers = [row["episode_index"] for row in rows]
    if sorted(map(str, numbers)) != sorted(map(str, range(episodes))):
        raise DatasetError(f"{path} has statistics of {len(set(map(str, numbers)))} episodes in {len(numbers)} lines; expected one line for each of {episodes}")
    parts = [_arrays(path, f"episode {row['episode_index']}", row["stats"]) for row in rows]
    return {key: _pool(path, key, [part.get(key, {}) for part in parts]) for key in dict.fromkeys(name for part in parts for name in part)}


def _pool(path: Path, key: str, parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    if any(name not in part for part in parts for name in POOLED) or len({part[name].shape for part in parts for name in POOLED[:4]}) != 1:
        raise DatasetError(f"{path}: not every episode has {', '.join(POOLED)} of {key!r} in one shape; compute the statistics again, or remove the file")
    counts = np.array([part["count"].sum() for part in parts])
    if not counts.min() > 0:
        raise DatasetError(f"{path}: an episode has the count {counts.min():g} of {key!r}; expected its rows: compute the statistics again, or remove the file")
    means, deviations = (np.stack([part[name] for part in parts]) for name in ("mean", "std"))
    weights = (counts / counts.sum()).reshape(-1, *[1] * (means.ndim - 1))
    mean = (weights * means).sum(0)
    return {
        "min": np.min([part["min"] for part in parts], axis=0),
        "max": np.max([part["max"] for part in parts], axis=0),
        "mean": mean,
        "std": np.sqrt((weights * (deviations**2 + (means - mean) ** 2)).sum(0)),
        "count": np.array([counts.sum()]),
    }


def _arrays(path: Path, whose: str, stats: Any) -> Stats:
    if not isinstance(stats, dict) or not all(isinstance(entry, dict) for entry in stats.values()):
        raise DatasetError(f"{path}: the statistics of {whose} are no object of features with min, max, ...; compute them again, or remove the file")
    found: Stats = {}
    for key, entry in stats.items():
        try:
            found[key] = {name: np.atleast_1d(np.asarray(value, dtype=np.float64)) for name, value in entry.items()}
        except (TypeError, ValueError) as error:
            raise DatasetError(f"{path}: the statistics of {key!r} of {whose} are no numbers ({error}); compute them again, or remove the file") from error
        bad = next((name for name, value in found[key].items() if not np.isfinite(value).all()), None)
        if bad is not None:
            raise DatasetError(f"{path}: {bad} of {key!r} of {whose} is not finite; compute the statistics again, or remove the file")
    return found
