"""LeRobot v3.0: many episodes a file; which lies where is in the episode table.

    meta/tasks.parquet                               instruction (the index) -> task_index
    meta/episodes/chunk-000/file-000.parquet         one row an episode: length, tasks, file numbers, seconds in each mp4
    data/chunk-000/file-000.parquet                  the rows of many episodes
    videos/CAMERA/chunk-000/file-000.mp4             the frames of many episodes

Frames are found by time: an episode begins in its mp4 at `from_timestamp`, so its first frame is `from_timestamp x fps`.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from wam.data.lerobot_files import (
    DatasetError,
    Episode,
    Feature,
    Metadata,
    VideoSpan,
    add_task,
    cameras_of,
    check_counts,
    check_numbering,
    place,
    read_table,
    task_texts,
)


def read_v3(root: Path, info: dict[str, Any], features: dict[str, Feature]) -> Metadata:
    """Tasks and episodes of a v3.0 dataset.

    Raises:
        FileNotFoundError, DatasetError: missing, damaged or contradictory metadata.
    """
    cameras = cameras_of(features)
    tasks = _tasks(root / "meta/tasks.parquet")
    files = sorted((root / "meta/episodes").glob("chunk-*/file-*.parquet"))
    if not files:
        raise FileNotFoundError(
            f"{root} is not a LeRobot v3.0 dataset: meta/episodes/chunk-000/file-000.parquet is missing; copy the dataset again, with all its files"
        )
    columns = ["episode_index", "length", "tasks", "data/chunk_index", "data/file_index"]
    columns += [f"videos/{camera}/{name}" for camera in cameras for name in ("chunk_index", "file_index", "from_timestamp", "to_timestamp")]
    rows: list[dict[str, Any]] = []
    for file in files:
        table = read_table(file, columns)
        missing = [name for name in columns if name not in table.column_names and name != "tasks"]
        if missing:
            raise DatasetError(f"{file} lacks the columns {', '.join(missing)}; it was written by another version or is incomplete: record the dataset again")
        rows += table.to_pylist()
    for row in rows:
        check_counts(root / "meta/episodes", row["episode_index"], row["length"])
    rows.sort(key=lambda row: row["episode_index"])
    check_numbering(root / "meta/episodes", [row["episode_index"] for row in rows])
    return tasks, [_episode(root, info, row, cameras, tasks) for row in rows]


def _tasks(path: Path) -> dict[int, str]:
    table = read_table(path)
    names = [name for name in table.column_names if name != "task_index"]
    if "task_index" not in table.column_names or len(names) != 1:
        raise DatasetError(f"{path} has the columns {', '.join(table.column_names)}; expected task_index, and the instructions as its index")
    tasks: dict[int, str] = {}
    for index, text in zip(table.column("task_index").to_pylist(), table.column(names[0]).to_pylist(), strict=True):
        add_task(path, tasks, index, text)
    return tasks


def _episode(root: Path, info: dict[str, Any], row: dict[str, Any], cameras: list[str], tasks: dict[int, str]) -> Episode:
    index, length = row["episode_index"], row["length"]
    data_file = place(root, "data_path", info["data_path"], chunk_index=row["data/chunk_index"], file_index=row["data/file_index"])
    videos = {camera: _span(root, info, row, camera, index, length) for camera in cameras}
    return Episode(index, length, task_texts(root / "meta/episodes", index, row.get("tasks"), tasks), data_file, videos)


def _span(root: Path, info: dict[str, Any], row: dict[str, Any], camera: str, index: int, length: int) -> VideoSpan:
    part = {name: row[f"videos/{camera}/{name}"] for name in ("chunk_index", "file_index", "from_timestamp", "to_timestamp")}
    absent = [name for name, value in part.items() if value is None]
    if absent:
        raise DatasetError(
            f"{root}: episode {index} has no video of {camera} ({', '.join(absent)} missing in meta/episodes); leave the episode out, or record it again"
        )
    fps, start, end = float(info["fps"]), part["from_timestamp"], part["to_timestamp"]
    if not all(isinstance(time, (int, float)) and math.isfinite(time) for time in (start, end)) or start < 0:
        raise DatasetError(f"{root}: the video of {camera} of episode {index} spans {start!r}..{end!r} s in meta/episodes; expected seconds from 0 on")
    first, frames = round(start * fps), round((end - start) * fps)
    if frames < length:
        raise DatasetError(
            f"{root}: episode {index} has {length} rows, but its video of {camera} spans {start:g}..{end:g} s = {frames} frames at {fps:g} fps; "
            "the recording was cut short: record it again"
        )
    path = place(root, "video_path", info.get("video_path"), video_key=camera, chunk_index=part["chunk_index"], file_index=part["file_index"])
    return VideoSpan(path, float(start), float(end), first)
