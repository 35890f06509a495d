"""LeRobot v2.0 and v2.1: one parquet file and one mp4 per camera for every episode; which lies where follows from its number.

    meta/tasks.jsonl                                 {"task_index", "task"} a line
    meta/episodes.jsonl                              {"episode_index", "tasks", "length"} a line
    data/chunk-000/episode_000000.parquet
    videos/chunk-000/CAMERA/episode_000000.mp4       the chunk comes before the camera; v3.0 has it the other way round

The two versions differ in their statistics alone (stats.json, or episodes_stats.jsonl), which are not read here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from wam.data.lerobot_files import DatasetError, Episode, Feature, Metadata, VideoSpan, cameras_of, check_numbering, is_count, place, read_json_lines


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
        if not is_count(row["episode_index"]) or not is_count(row["length"], 1):
            raise DatasetError(f"{path}: episode_index is {row['episode_index']!r} and length {row['length']!r}; expected whole numbers, with at least one row")
    rows.sort(key=lambda row: row["episode_index"])
    check_numbering(path, [row["episode_index"] for row in rows])
    return tasks, [_episode(root, info, row, cameras_of(features), tasks) for row in rows]


def _tasks(path: Path) -> dict[int, str]:
    tasks: dict[int, str] = {}
    for row in read_json_lines(path, ("task_index", "task")):
        index, text = row["task_index"], row["task"]
        if not is_count(index) or not isinstance(text, str):
            raise DatasetError(f"{path}: task_index is {index!r} and task {text!r}; expected a whole number and an instruction in words")
        if index in tasks:
            raise DatasetError(f"{path}: task {index} is both {tasks[index]!r} and {text!r}; leave one")
        tasks[index] = text
    return tasks


def _episode(root: Path, info: dict[str, Any], row: dict[str, Any], cameras: list[str], tasks: dict[int, str]) -> Episode:
    index, length, texts = row["episode_index"], row["length"], row.get("tasks") or []
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise DatasetError(f"{root / 'meta/episodes.jsonl'}: the tasks of episode {index} are {texts!r}; expected a list of instructions")
    unknown = [text for text in texts if text.strip() and text not in tasks.values()]
    if unknown:
        raise DatasetError(
            f"{root / 'meta/episodes.jsonl'}: episode {index} has the task {unknown[0]!r}, which meta/tasks.jsonl does not list; the files are of different datasets: copy them again"
        )
    where = {"episode_chunk": index // info["chunks_size"], "episode_index": index}
    data_file = place(root, "data_path", info["data_path"], **where)
    videos = {
        camera: VideoSpan(place(root, "video_path", info.get("video_path"), video_key=camera, **where), 0.0, length / float(info["fps"]), 0)
        for camera in cameras
    }
    return Episode(index, length, tuple(texts), data_file, videos)
