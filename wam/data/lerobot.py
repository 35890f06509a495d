"""Reading LeRobot datasets: what is in the files, and nothing about windows, training or pixels.

A dataset is a list of `Episode`s: how long each is, which rows of which parquet file hold it, which frames of which mp4, and what
it was asked to do.  A format version is one function that makes that list (`_READERS`); everything after it is the same for all:

    meta/info.json  ->  reader of that version  ->  [Episode, ...]  ->  read(episode, key) -> (length, d) array

Files are checked against each other when they are read.  What does not agree is refused by name: a dataset that was cut short by
a full disk must not train a policy quietly.  Columns are small: each is loaded once, when first asked for, and kept.
"""

from __future__ import annotations

import difflib
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

Split = Literal["train", "validation"]


class DatasetError(ValueError):
    """A dataset that cannot be read or contradicts itself; the message names the file, what was found and the remedy."""


@dataclass(frozen=True)
class Feature:
    """A column, or a camera where `dtype` is "video"."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class VideoSpan:
    """Where an episode lies in an mp4, which may hold several episodes.

    Attributes:
        from_timestamp, to_timestamp: seconds in the file.
        first_frame: index in the file of the frame of the episode's first row.
    """

    path: Path
    from_timestamp: float
    to_timestamp: float
    first_frame: int


@dataclass(frozen=True)
class Episode:
    """One recording: `length` rows of `data_file`, and a span of an mp4 for each camera.

    Attributes:
        tasks: the instructions, at least one; which holds when is in the column `task_index` where there are several.
    """

    index: int
    length: int
    tasks: tuple[str, ...]
    data_file: Path
    videos: dict[str, VideoSpan]

    @property
    def instruction(self) -> str:
        """The first instruction."""
        return self.tasks[0]


class LeRobotDataset:
    """A dataset in a directory; metadata is read at once, columns when asked for.

    Attributes:
        fps: control steps (and frames) a second.
        features: columns and cameras by key.
        tasks: instructions by task index.
        episodes: in order of their index.

    Raises:
        FileNotFoundError: no dataset there; says what is missing.
        DatasetError: another version, damaged files, or files that contradict each other.
    """

    def __init__(self, root: str | Path):
        self.root = Path(root)
        self.info = _read_info(self.root)
        self.fps = float(self.info["fps"])
        self.features = {key: _feature(self.root, key, value) for key, value in self.info["features"].items()}
        self.tasks, self.episodes = _READERS[self.info["codebase_version"]](self)
        self._check_totals()
        self._columns: dict[tuple[Path, str], np.ndarray] = {}
        self._rows: dict[Path, dict[int, slice]] = {}

    def feature(self, key: str) -> Feature:
        """A feature by key.

        Raises:
            ValueError: there is none; the nearest name is given.
        """
        if key not in self.features:
            near = difflib.get_close_matches(key, self.features, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(sorted(self.features))}"
            raise DatasetError(f"{self.root} has no feature {key!r}; {hint}")
        return self.features[key]

    def camera(self, key: str) -> Feature:
        """A feature that is a video.

        Raises:
            ValueError: no such feature, or it is not a video; the cameras are listed.
        """
        feature = self.feature(key)
        if feature.dtype != "video":
            cameras = ", ".join(k for k, f in self.features.items() if f.dtype == "video") or "none"
            raise DatasetError(f"feature {key!r} of {self.root} has dtype {feature.dtype!r}; a camera has dtype 'video' (videos in this dataset: {cameras})")
        return feature

    def read(self, episode: int, key: str) -> np.ndarray:
        """A column of an episode, (length, *shape) in the feature's dtype; scalars as (length, 1).

        Raises:
            ValueError: unknown key or a key that is not a numeric column.
            DatasetError: the file is damaged, or its rows disagree with the metadata.
        """
        feature = self.feature(key)
        if feature.dtype in ("video", "image", "string"):
            raise DatasetError(f"feature {key!r} of {self.root} has dtype {feature.dtype!r}; only numeric columns can be read as arrays")
        meta = self.episodes[episode]
        rows = self._rows_of(meta)
        place = (meta.data_file, key)
        if place not in self._columns:
            self._columns[place] = _read_column(meta.data_file, key, feature)
        return self._columns[place][rows]

    def instruction(self, episode: int, row: int) -> str:
        """What the robot is asked to do at a row of an episode."""
        meta = self.episodes[episode]
        if len(meta.tasks) == 1 or "task_index" not in self.features:
            return meta.instruction
        return self.tasks[int(self.read(episode, "task_index")[row, 0])]

    def split(self, validation_fraction: float) -> dict[Split, list[int]]:
        """Episode indices for training and validation: the last part of each task's episodes is held out.

        Where the fraction is positive, a task with two episodes or more gives at least one to each side.
        """
        by_task: dict[str, list[int]] = defaultdict(list)
        for episode in self.episodes:
            by_task[episode.instruction].append(episode.index)
        parts: dict[Split, list[int]] = {"train": [], "validation": []}
        for indices in by_task.values():
            held = 0
            if validation_fraction > 0 and len(indices) >= 2:
                held = min(max(1, math.floor(validation_fraction * len(indices) + 0.5)), len(indices) - 1)
            parts["train"] += indices[: len(indices) - held]
            parts["validation"] += indices[len(indices) - held :]
        return {name: sorted(indices) for name, indices in parts.items()}

    def _rows_of(self, episode: Episode) -> slice:
        path = episode.data_file
        if path not in self._rows:
            numbers = _read_column(path, "episode_index", Feature("int64", (1,)))[:, 0]
            frames = _read_column(path, "frame_index", Feature("int64", (1,)))[:, 0]
            self._rows[path] = _runs(path, numbers, frames)
        rows = self._rows[path].get(episode.index)
        found = 0 if rows is None else rows.stop - rows.start
        if rows is None or found != episode.length:
            raise DatasetError(
                f"{path} has {found} rows of episode {episode.index}, but the episode table says {episode.length}; "
                "the recording was cut short or the files are of different datasets: record or copy the dataset again"
            )
        return rows

    def _check_totals(self) -> None:
        found = {"total_episodes": len(self.episodes), "total_frames": sum(e.length for e in self.episodes)}
        for name, count in found.items():
            if self.info.get(name) != count:
                raise DatasetError(
                    f"{self.root / 'meta/info.json'} says {name} = {self.info.get(name)}, but the episode table adds up to {count}; "
                    "the recording was cut short or the files are of different datasets: record or copy the dataset again"
                )


# ------------------------------------------------------------------------------------------------ every version


def _read_info(root: Path) -> dict[str, Any]:
    path = root / "meta/info.json"
    if not root.is_dir():
        raise FileNotFoundError(f"no dataset directory {root}; record one with `wam collect`, or set data.root")
    if not path.is_file():
        raise FileNotFoundError(f"{root} is not a LeRobot dataset: meta/info.json is missing; give the directory that holds meta/, data/ and videos/")
    try:
        info = json.loads(path.read_text())
    except ValueError as error:
        raise DatasetError(f"{path} is not valid JSON ({error}); copy or record the dataset again") from error
    missing = [key for key in ("codebase_version", "fps", "features", "data_path") if key not in info] if isinstance(info, dict) else ["every key"]
    if missing:
        raise DatasetError(f"{path} lacks {', '.join(missing)}; a LeRobot dataset has codebase_version, fps, features and data_path")
    if info["codebase_version"] not in _READERS:
        raise DatasetError(
            f"{root} is a LeRobot dataset of version {info['codebase_version']!r}; this version of wam reads {', '.join(_READERS)}: "
            "convert it with LeRobot's own tool (lerobot.datasets.v30.convert_dataset_v21_to_v30 takes v2.1 to v3.0)"
        )
    if not isinstance(info["fps"], (int, float)) or not info["fps"] > 0:
        raise DatasetError(f"{path} says fps = {info['fps']!r}; expected a positive number")
    return info


def _feature(root: Path, key: str, value: Any) -> Feature:
    try:
        return Feature(str(value["dtype"]), tuple(int(n) for n in value["shape"]))
    except (KeyError, TypeError, ValueError) as error:
        raise DatasetError(f"{root / 'meta/info.json'}: feature {key!r} is {value!r}; expected a dtype and a shape") from error


def _read_table(path: Path, columns: Iterable[str] | None = None) -> pa.Table:
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}, which the dataset's metadata names; copy the dataset again, with all its files")
    try:
        with pq.ParquetFile(path) as file:
            return file.read(columns=None if columns is None else [name for name in file.schema_arrow.names if name in set(columns)])
    except (pa.ArrowException, OSError) as error:
        raise DatasetError(
            f"{path} cannot be read as parquet ({error}); it is damaged or incomplete ({path.stat().st_size} bytes): copy or record it again"
        ) from error


def _read_column(path: Path, key: str, feature: Feature) -> np.ndarray:
    table = _read_table(path, [key])
    if key not in table.column_names:
        raise DatasetError(f"{path} has no column {key!r}, which meta/info.json lists; copy or record the dataset again")
    column = table.column(key).combine_chunks()
    rows = len(column)
    column = column.storage if isinstance(column, pa.ExtensionArray) else column
    while pa.types.is_list(column.type) or pa.types.is_large_list(column.type) or pa.types.is_fixed_size_list(column.type):
        if column.null_count:
            break
        column = column.flatten()
    size = math.prod(feature.shape)
    if column.null_count or len(column) != rows * size:
        raise DatasetError(
            f"{path}: column {key!r} holds {len(column)} numbers ({column.null_count} missing) in {rows} rows; its shape {feature.shape} asks for {rows * size}"
        )
    array = column.to_numpy(zero_copy_only=False).astype(feature.dtype, copy=False).reshape(rows, *feature.shape)
    return array if array.ndim > 1 else array[:, None]


def _runs(path: Path, episodes: np.ndarray, frames: np.ndarray) -> dict[int, slice]:
    """Where each episode's rows are; they must lie together and in order."""
    edges = np.flatnonzero(np.diff(episodes)) + 1
    starts, stops = np.concatenate([[0], edges]), np.concatenate([edges, [len(episodes)]])
    runs: dict[int, slice] = {}
    for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
        if start == stop:
            continue
        episode = int(episodes[start])
        if episode in runs or not np.array_equal(frames[start:stop], np.arange(stop - start)):
            raise DatasetError(
                f"{path}: the rows of episode {episode} are not in order (frame_index must count 0, 1, 2, ... within it); record the dataset again"
            )
        runs[episode] = slice(start, stop)
    return runs


# ------------------------------------------------------------------------------------------------ v3.0

Metadata = tuple[dict[int, str], list[Episode]]


def _read_v30(dataset: LeRobotDataset) -> Metadata:
    """Many episodes a file; which lies where is in meta/episodes/chunk-*/file-*.parquet, one row an episode."""
    root, cameras = dataset.root, [key for key, feature in dataset.features.items() if feature.dtype == "video"]
    tasks = _tasks_v30(root / "meta/tasks.parquet")
    files = sorted((root / "meta/episodes").glob("chunk-*/file-*.parquet"))
    if not files:
        raise FileNotFoundError(
            f"{root} is not a LeRobot v3.0 dataset: meta/episodes/chunk-000/file-000.parquet is missing; copy the dataset again, with all its files"
        )
    columns = ["episode_index", "length", "tasks", "data/chunk_index", "data/file_index"]
    columns += [f"videos/{camera}/{name}" for camera in cameras for name in ("chunk_index", "file_index", "from_timestamp", "to_timestamp")]
    rows: list[dict[str, Any]] = []
    for file in files:
        table = _read_table(file, columns)
        missing = [name for name in columns if name not in table.column_names and name != "tasks"]
        if missing:
            raise DatasetError(f"{file} lacks the columns {', '.join(missing)}; it was written by another version or is incomplete: record the dataset again")
        rows += table.to_pylist()
    rows.sort(key=lambda row: row["episode_index"])
    numbers = [row["episode_index"] for row in rows]
    if numbers != list(range(len(rows))):
        raise DatasetError(f"{root / 'meta/episodes'} lists the episodes {_some(numbers)}; expected 0, 1, 2, ... once each: record or copy the dataset again")
    return tasks, [_episode_v30(dataset, row, cameras, tasks) for row in rows]


def _tasks_v30(path: Path) -> dict[int, str]:
    table = _read_table(path)
    names = [name for name in table.column_names if name != "task_index"]
    if "task_index" not in table.column_names or len(names) != 1:
        raise DatasetError(f"{path} has the columns {', '.join(table.column_names)}; expected task_index, and the instructions as its index")
    return dict(zip(table.column("task_index").to_pylist(), table.column(names[0]).to_pylist(), strict=True))


def _episode_v30(dataset: LeRobotDataset, row: dict[str, Any], cameras: list[str], tasks: dict[int, str]) -> Episode:
    root, info, index, length = dataset.root, dataset.info, int(row["episode_index"]), int(row["length"])
    data_file = _place(root, "data_path", info["data_path"], chunk_index=row["data/chunk_index"], file_index=row["data/file_index"])
    instructions = tuple(row.get("tasks") or ())
    if not instructions and len(tasks) == 1:
        instructions = tuple(tasks.values())
    if not instructions or not all(isinstance(text, str) and text.strip() for text in instructions):
        raise DatasetError(
            f"{root}: episode {index} has no instruction (its tasks are {row.get('tasks')!r}); give every episode a task in words, in meta/tasks.parquet and meta/episodes"
        )
    videos = {camera: _span_v30(dataset, row, camera, index, length) for camera in cameras}
    return Episode(index, length, instructions, data_file, videos)


def _span_v30(dataset: LeRobotDataset, row: dict[str, Any], camera: str, index: int, length: int) -> VideoSpan:
    part = {name: row[f"videos/{camera}/{name}"] for name in ("chunk_index", "file_index", "from_timestamp", "to_timestamp")}
    absent = [name for name, value in part.items() if value is None]
    if absent:
        raise DatasetError(
            f"{dataset.root}: episode {index} has no video of {camera} ({', '.join(absent)} missing in meta/episodes); leave the episode out, or record it again"
        )
    start, end = float(part["from_timestamp"]), float(part["to_timestamp"])
    first, frames = round(start * dataset.fps), round((end - start) * dataset.fps)
    if frames < length:
        raise DatasetError(
            f"{dataset.root}: episode {index} has {length} rows, but its video of {camera} spans {start:g}..{end:g} s = {frames} frames at {dataset.fps:g} fps; "
            "the recording was cut short: record it again"
        )
    template = dataset.info.get("video_path")
    if not template:
        raise DatasetError(f"{dataset.root / 'meta/info.json'} lists the camera {camera} but has no video_path; add the template LeRobot writes")
    path = _place(dataset.root, "video_path", template, video_key=camera, chunk_index=part["chunk_index"], file_index=part["file_index"])
    return VideoSpan(path, start, end, first)


def _place(root: Path, name: str, template: str, **where: Any) -> Path:
    try:
        return root / template.format(**where)
    except (KeyError, IndexError, ValueError, TypeError, AttributeError) as error:
        raise DatasetError(f"{root / 'meta/info.json'}: {name} {template!r} does not take {', '.join(where)}; copy or record the dataset again") from error


def _some(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")


_READERS: dict[str, Callable[[LeRobotDataset], Metadata]] = {"v3.0": _read_v30}
