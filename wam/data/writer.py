"""Writing a LeRobot v3.0 dataset.

    meta/info.json, meta/stats.json, meta/tasks.parquet
    meta/episodes/chunk-000/file-000.parquet        one row per episode: where its rows and frames are, and its statistics
    data/chunk-000/file-000.parquet                 one row per frame, many episodes a file
    videos/<key>/chunk-000/file-000.mp4             many episodes a file

Every file appears whole, and `info.json` last: a directory without it is no dataset, and is written again from the start.  Rows are
kept in memory until `finalize`, which computes exact statistics over all of them (a million frames of a small robot are about 100 MB).
The layout is LeRobot's `CODEBASE_VERSION` v3.0, lerobot/datasets.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from wam.data.writer_stats import Stats, column_stats, image_stats, pixel_histogram
from wam.data.writer_video import CODEC, PIXEL_FORMAT, encode_video, join_videos
from wam.files import atomic_path, write_json_atomic

CODEBASE_VERSION = "v3.0"
CHUNK_FILES, DATA_MB, VIDEO_MB = 1000, 100, 200  # LeRobot's defaults: files a directory, and where a new file begins
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
EPISODES_PATH = "meta/episodes/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
_INDEX_FEATURES: dict[str, dict[str, Any]] = {
    "timestamp": {"dtype": "float32", "shape": [1], "names": None},
    "frame_index": {"dtype": "int64", "shape": [1], "names": None},
    "episode_index": {"dtype": "int64", "shape": [1], "names": None},
    "index": {"dtype": "int64", "shape": [1], "names": None},
    "task_index": {"dtype": "int64", "shape": [1], "names": None},
}
_MARKER = ".writing"

Columns = Mapping[str, npt.NDArray[Any]]


class LeRobotWriter:
    """Collects episodes, then writes the dataset in `finalize`."""

    def __init__(
        self, root: Path, fps: int, features: Mapping[str, Mapping[str, Any]], robot_type: str | None = None, wam: Mapping[str, Any] | None = None
    ) -> None:
        """Prepare a directory.

        Args:
            root: does not exist, is empty, or is what an interrupted writer left; names beginning with a dot are left alone.
            fps: frames, states and actions a second.
            features: LeRobot's, e.g. `{"action": {"dtype": "float32", "shape": [4], "names": [...]}}`; `dtype: video` for cameras, shape (H, W, 3).
            robot_type: for `info.json`.
            wam: how the dataset was made; written to `info.json` under this name.

        Raises:
            FileExistsError: the directory holds a dataset, or something else.
            ValueError: a feature that LeRobot could not read.
        """
        self.root, self.fps, self.robot_type, self.wam = Path(root), fps, robot_type, dict(wam or {})
        self.features = {name: {**feature, "shape": list(feature["shape"])} for name, feature in features.items()}
        _check_features(self.features)
        self._videos = [name for name, feature in self.features.items() if feature["dtype"] == "video"]
        self._vectors = [name for name in self.features if name not in self._videos]
        self._columns: list[dict[str, npt.NDArray[Any]]] = []
        self._episodes: list[dict[str, Any]] = []
        self._parts: dict[str, list[Path]] = {key: [] for key in self._videos}
        self._histograms: dict[str, list[npt.NDArray[np.int64]]] = {key: [] for key in self._videos}
        self._tasks: dict[str, int] = {}
        _claim(self.root)

    def add_episode(
        self,
        columns: Columns,
        videos: Mapping[str, npt.NDArray[np.uint8] | tuple[Path, npt.NDArray[np.int64]]],
        task: str,
        extras: Mapping[str, int | float | str] | None = None,
    ) -> None:
        """Add one episode.

        Args:
            columns: every feature that is no video, (T, *shape) or (T,) for shape [1], in its declared dtype.
            videos: every video feature: frames (T, H, W, 3) uint8, or (file made by `encode_video`, its `pixel_histogram`);
                such a file must stay until `finalize`.
            task: the instruction.
            extras: more columns of the episodes table, e.g. the seed.

        Raises:
            ValueError: a feature is missing, unknown, or has a wrong shape or dtype; or columns are not finite.
        """
        length = self._check(columns, videos)
        index = len(self._episodes)
        task_index = self._tasks.setdefault(task, len(self._tasks))
        start = int(self._columns[-1]["index"][-1]) + 1 if self._columns else 0
        frame_index = np.arange(length, dtype=np.int64)
        rows = {name: np.asarray(columns[name]) for name in self._vectors} | {
            "timestamp": (frame_index / self.fps).astype(np.float32),
            "frame_index": frame_index,
            "episode_index": np.full(length, index, np.int64),
            "index": start + frame_index,
            "task_index": np.full(length, task_index, np.int64),
        }
        stats = {name: column_stats(values) for name, values in rows.items()}
        for key in self._videos:
            path, histogram = self._part(key, index, videos[key])
            self._parts[key].append(path)
            self._histograms[key].append(histogram)
            stats[key] = image_stats(histogram, length)
        self._columns.append(rows)
        self._episodes.append({"episode_index": index, "tasks": [task], "length": length, **(extras or {}), **_flat_stats(stats)})

    def finalize(self) -> None:
        """Write everything; the dataset exists from here on.

        Raises:
            ValueError: no episodes.
            OSError: the disk is full; what was given to the writer is untouched.
        """
        if not self._episodes:
            raise ValueError(f"no episodes were added to {self.root}; a dataset needs at least one")
        placed = self._write_rows()
        for key in self._videos:
            for where, more in zip(placed, self._write_videos(key), strict=True):
                where.update(more)
        rows = [
            {**episode, **where, "meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0} for episode, where in zip(self._episodes, placed, strict=True)
        ]
        _write_parquet(pa.Table.from_pylist(rows), self.root / EPISODES_PATH.format(chunk_index=0, file_index=0))
        with atomic_path(self.root / "meta/tasks.parquet") as temporary:
            pd.DataFrame({"task_index": list(self._tasks.values())}, index=list(self._tasks)).to_parquet(temporary, write_page_checksum=True)
        write_json_atomic(self.root / "meta/stats.json", self._global_stats())
        write_json_atomic(self.root / "meta/info.json", self._info())
        shutil.rmtree(self.root / _MARKER)

    def _check(self, columns: Columns, videos: Mapping[str, Any]) -> int:
        for given, expected, kind in ((set(columns), set(self._vectors), "columns"), (set(videos), set(self._videos), "videos")):
            if given != expected:
                raise ValueError(f"episode {len(self._episodes)}: {kind} missing {sorted(expected - given)}, unknown {sorted(given - expected)}")
        lengths = {name: len(values) for name, values in columns.items()} | {key: len(video) for key, video in videos.items() if not isinstance(video, tuple)}
        if len(set(lengths.values())) != 1 or 0 in lengths.values():
            raise ValueError(f"episode {len(self._episodes)}: columns and videos have lengths {lengths}; expected one length of at least 1")
        for name, values in columns.items():
            feature, array = self.features[name], np.asarray(values)
            shape = tuple(feature["shape"])
            if array.dtype != np.dtype(feature["dtype"]) or array.shape[1:] != (() if shape == (1,) else shape):
                raise ValueError(f"episode {len(self._episodes)}: {name} is {array.dtype} {array.shape[1:]} a frame; declared as {feature['dtype']} {shape}")
            if not np.isfinite(array).all():
                raise ValueError(f"episode {len(self._episodes)}: {name} is not finite in frame {int(np.argwhere(~np.isfinite(array))[0][0])}")
        length = next(iter(lengths.values()))
        for key, video in videos.items():
            height, width, channels = self.features[key]["shape"]
            if isinstance(video, tuple):
                pixels = int(video[1][0].sum())
                if pixels != length * height * width:
                    raise ValueError(
                        f"episode {len(self._episodes)}: {key} counts {pixels} pixels; {length} frames of {height} x {width} have {length * height * width}"
                    )
            elif video.shape[1:] != (height, width, channels):
                raise ValueError(f"episode {len(self._episodes)}: {key} has frames {video.shape[1:]}; declared as {(height, width, channels)}")
        return length

    def _part(self, key: str, index: int, video: Any) -> tuple[Path, npt.NDArray[np.int64]]:
        if isinstance(video, tuple):
            return video
        path = self.root / _MARKER / f"{key}-{index:06d}.mp4"
        encode_video(video, path, self.fps)
        return path, pixel_histogram(video)

    def _write_rows(self) -> list[dict[str, Any]]:
        """Write the rows, beginning a new file past DATA_MB; return where each episode went."""
        placed: list[dict[str, Any]] = []
        sizes = [sum(values.nbytes for values in rows.values()) for rows in self._columns]
        for file, group in enumerate(_groups(sizes, DATA_MB)):
            where = {"chunk_index": file // CHUNK_FILES, "file_index": file % CHUNK_FILES}
            episodes = [self._columns[i] for i in group]
            table = pa.table({name: _arrow([rows[name] for rows in episodes]) for name in episodes[0]})
            _write_parquet(table, self.root / DATA_PATH.format(**where))
            for rows in episodes:
                start = int(rows["index"][0])
                placed.append(
                    {**{f"data/{name}": value for name, value in where.items()}, "dataset_from_index": start, "dataset_to_index": start + len(rows["index"])}
                )
        return placed

    def _write_videos(self, key: str) -> list[dict[str, Any]]:
        """Join a camera's videos, beginning a new file past VIDEO_MB; return where each episode went."""
        placed: list[dict[str, Any]] = []
        for file, group in enumerate(_groups([path.stat().st_size for path in self._parts[key]], VIDEO_MB)):
            where = {"chunk_index": file // CHUNK_FILES, "file_index": file % CHUNK_FILES}
            join_videos([self._parts[key][i] for i in group], self.root / VIDEO_PATH.format(video_key=key, **where), self.fps)
            start = 0
            for i in group:
                end = start + self._episodes[i]["length"]
                times = {"from_timestamp": start / self.fps, "to_timestamp": end / self.fps}
                placed.append({f"videos/{key}/{name}": value for name, value in {**where, **times}.items()})
                start = end
        return placed

    def _global_stats(self) -> dict[str, Stats]:
        stats = {name: column_stats(np.concatenate([rows[name] for rows in self._columns])) for name in self._columns[0]}
        frames = sum(episode["length"] for episode in self._episodes)
        return stats | {key: image_stats(np.sum(self._histograms[key], axis=0), frames) for key in self._videos}

    def _info(self) -> dict[str, Any]:
        features = dict(self.features)
        for key in self._videos:
            features[key] = {**features[key], "info": _video_info(features[key]["shape"], self.fps)}
        return {
            "codebase_version": CODEBASE_VERSION,
            "robot_type": self.robot_type,
            "total_episodes": len(self._episodes),
            "total_frames": sum(episode["length"] for episode in self._episodes),
            "total_tasks": len(self._tasks),
            "chunks_size": CHUNK_FILES,
            "data_files_size_in_mb": DATA_MB,
            "video_files_size_in_mb": VIDEO_MB,
            "fps": self.fps,
            "splits": {"train": f"0:{len(self._episodes)}"},
            "data_path": DATA_PATH,
            "video_path": VIDEO_PATH if self._videos else None,
            "features": features | _INDEX_FEATURES,
            "wam": self.wam,
        }


def _claim(root: Path) -> None:
    """Make the directory ours: new, empty, or left by an interrupted writer (which is cleared)."""
    if (root / "meta/info.json").exists():
        raise FileExistsError(f"{root} already holds a dataset; choose another directory, or delete it")
    interrupted = (root / _MARKER).is_dir()
    foreign = sorted(path.name for path in root.iterdir() if not path.name.startswith(".")) if root.is_dir() else []
    if foreign and not interrupted:
        raise FileExistsError(f"{root} is not empty ({', '.join(foreign[:5])}) and not a dataset; choose another directory")
    for name in (_MARKER, "data", "videos", "meta"):
        shutil.rmtree(root / name, ignore_errors=True)
    (root / _MARKER).mkdir(parents=True)


def _check_features(features: Mapping[str, Mapping[str, Any]]) -> None:
    for name, feature in features.items():
        if "/" in name or name in _INDEX_FEATURES:
            raise ValueError(f"feature {name!r} is {'reserved' if name in _INDEX_FEATURES else 'written with a slash'}; choose another name, with dots")
        if feature["dtype"] == "video":
            if len(feature["shape"]) != 3 or feature["shape"][2] != 3:
                raise ValueError(f"feature {name!r} has shape {feature['shape']}; a video has (height, width, 3)")
        elif feature["dtype"] not in ("float32", "float64", "int64", "int32", "bool") or len(feature["shape"]) != 1:
            raise ValueError(
                f"feature {name!r} is {feature['dtype']} of shape {feature['shape']}; expected video, or a vector of float32, float64, int64, int32 or bool"
            )


def _video_info(shape: list[int], fps: int) -> dict[str, Any]:
    height, width, channels = shape
    return {
        "video.height": height,
        "video.width": width,
        "video.codec": CODEC,
        "video.pix_fmt": PIXEL_FORMAT,
        "video.is_depth_map": False,
        "video.fps": fps,
        "video.channels": channels,
        "has_audio": False,
    }


def _groups(sizes: list[int], megabytes: int) -> list[list[int]]:
    """Indices of consecutive items in groups of at most so many megabytes (or of one item)."""
    groups: list[list[int]] = []
    filled = 0
    for index, size in enumerate(sizes):
        if not groups or filled + size > megabytes * 2**20:
            groups.append([])
            filled = 0
        groups[-1].append(index)
        filled += size
    return groups


def _arrow(parts: list[npt.NDArray[Any]]) -> pa.Array:
    """A column: scalars as they are, vectors as fixed-size lists."""
    values = np.concatenate(parts)
    if values.ndim == 1:
        return pa.array(values)
    return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])


def _flat_stats(stats: Mapping[str, Stats]) -> dict[str, Any]:
    return {f"stats/{feature}/{name}": value for feature, values in stats.items() for name, value in values.items()}


def _write_parquet(table: pa.Table, path: Path) -> None:
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary, compression="snappy", write_page_checksum=True)  # a flipped bit is then found when it is read
