"""LeRobot v2.0 and v2.1: one parquet file and one mp4 per camera for every episode; which lies where follows from its number.

    meta/tasks.jsonl                                 {"task_index", "task"} a line
    meta/episodes.jsonl                              {"episode_index", "tasks", "length"} a line
    data/chunk-000/episode_000000.parquet
    videos/chunk-000/CAMERA/episode_000000.mp4       the chunk comes before the camera; v3.0 has it the other way round

The two versions differ in their statistics alone (stats.json, or episodes_stats.jsonl), which `lerobot_stats` reads.
"""

from __future__ import annotations

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
    is_count,
    place,
    read_json_lines,
    task_texts,
)


def read_v2(root: Path, info: dict[str, Any], features: dict[str, Feature]) -> Metadata:
    """Tasks and episodes of a v2.0 or v2.1 dataset.

    Raises:
        FileNotFoundError, DatasetError: missing, damaged or contradictory metadata.
    """
    if not is_count(info.get("chunks_size"), 1):
        raise DatasetError(
            f"{root / 'meta/info.json'} says chunks_size = {info.get('chunks_size')!r}; expected the number of episodes in a chunk, 1000 in most datasets"
        )
    path = root / "meta/episodes.jsonl"
    tasks = _tasks(root / "meta/tasks.jsonl")
    rows = read_json_lines(path, ("episode_index", "length"))
    for row in rows:
        check_counts(path, row["episode_index"], row["length"])
    rows.sort(key=lambda row: row["episode_index"])
    check_numbering(path, [row["episode_index"] for row in rows])
    return tasks, [_episode(root, info, row, cameras_of(features), tasks) for row in rows]


def _tasks(path: Path) -> dict[int, str]:
    tasks: dict[int, str] = {}
    for row in read_json_lines(path, ("task_index", "task")):
        add_task(path, tasks, row["task_index"], row["task"])
    return tasks


def _episode(root: Path, info: dict[str, Any], row: dict[str, Any], cameras: list[str], tasks: dict[int, str]) -> Episode:
    index, length = row["episode_index"], row["length"]
    texts = task_texts(root / "meta/episodes.jsonl", index, row.get("tasks"), tasks)
    where = {"episode_chunk": index // info["chunks_size"], "episode_index": index}
    data_file = place(root, "data_path", info["data_path"], **where)
    videos = {
        camera: VideoSpan(place(root, "video_path", info.get("video_path"), video_key=camera, **where), 0.0, length / float(info["fps"]), 0)
        for camera in cameras
    }
    return Episode(index, length, texts, data_file, videos)
