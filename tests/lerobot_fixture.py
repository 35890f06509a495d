"""A tiny LeRobot v3.0 dataset, written without `wam`, whose pixels say which frame they are; and any v3.0 dataset in other flavours.

Two tasks; episodes 0..n-1 alternate between them; several episodes share an mp4, as LeRobot writes them.  A frame shows its own
number (counted over the file) as 4 x 4 black and white squares, which survive compression, so a decoder that is off by one shows.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import av
import numpy as np
import pandas as pd

CAMERA = "observation.images.corner4"
TASKS = ("open the drawer", "close the drawer")
FPS = 10


def stamp(number: int, size: int = 64) -> np.ndarray:
    """A frame that shows `number` in 16 bits."""
    bits = np.array([(number >> i) & 1 for i in range(16)], np.uint8).reshape(4, 4)
    grey = np.kron(bits * 200 + 28, np.ones((size // 4, size // 4), np.uint8)).astype(np.uint8)
    return np.stack([grey, grey, 255 - grey], axis=-1)


def read_stamp(frame: np.ndarray) -> int:
    """The number a frame shows."""
    cell = frame.shape[0] // 4
    cells = frame[..., 0].reshape(4, cell, 4, cell).mean(axis=(1, 3)) > 128
    return int(sum(1 << i for i, bit in enumerate(cells.reshape(-1)) if bit))


def write_video(
    path: Path, numbers: list[int], *, codec: str = "libx264", gop: int = 2, b_frames: int = 0, size: int = 64, fps: int = FPS, faststart: bool = False
) -> None:
    """An mp4 of stamped frames."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options={"movflags": "faststart"} if faststart else {}) as container:
        stream = container.add_stream(codec, rate=fps, options={"crf": "18"} | ({"preset": "12", "svtav1-params": "lp=1"} if codec == "libsvtav1" else {}))
        stream.width = stream.height = size
        stream.pix_fmt = "yuv420p"
        stream.codec_context.gop_size = gop
        if codec == "libx264":
            stream.codec_context.max_b_frames = b_frames
        for number in numbers:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(stamp(number, size), format="rgb24")))
        container.mux(stream.encode())


def columns(episode: int, length: int) -> dict[str, np.ndarray]:
    """State, action and executed action of an episode: functions of (episode, row) that a test can recompute."""
    t = np.arange(length, dtype=np.float32)[:, None]
    phase = np.arange(3, dtype=np.float32)
    state = np.concatenate([np.sin(0.3 * t + phase + episode), np.full((length, 1), 0.7, np.float32)], axis=1)
    action = np.cos(0.2 * t + np.arange(4, dtype=np.float32) + episode)
    return {"observation.state": state.astype(np.float32), "action": action.astype(np.float32), "action.executed": (action * 0.9).astype(np.float32)}


def write_dataset(
    root: Path, lengths: tuple[int, ...] = (30, 26, 40, 33, 28, 31, 6), *, episodes_per_file: int = 3, size: int = 64, gop: int = 2, b_frames: int = 0
) -> Path:
    """Write the dataset; returns `root`."""
    video_path = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
    data_path = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
    rows, data, total = [], {0: [], 1: []}, 0
    for first in range(0, len(lengths), episodes_per_file):
        file, at = first // episodes_per_file, 0
        for episode in range(first, min(first + episodes_per_file, len(lengths))):
            length, half = lengths[episode], int(episode >= len(lengths) // 2)  # two parquet files, cut elsewhere than the videos
            rows.append(_episode_row(episode, length, file, at, half, total))
            data[half].append(_frame_rows(episode, length, total))
            at, total = at + length, total + length
        write_video(root / video_path.format(video_key=CAMERA, chunk_index=0, file_index=file), list(range(at)), size=size, gop=gop, b_frames=b_frames)
    for file, frames in data.items():
        if frames:
            _write(pd.concat(frames, ignore_index=True), root / data_path.format(chunk_index=0, file_index=file))
    _write(pd.DataFrame(rows), root / "meta/episodes/chunk-000/file-000.parquet")
    _write(pd.DataFrame({"task_index": [0, 1]}, index=list(TASKS)), root / "meta/tasks.parquet", index=True)
    info = {
        "codebase_version": "v3.0", "fps": FPS, "total_episodes": len(lengths), "total_frames": total, "total_tasks": 2, "chunks_size": 1000,
        "data_path": data_path, "video_path": video_path, "features": _features(size),
    }  # fmt: skip
    (root / "meta/info.json").write_text(json.dumps(info))
    return root


def edit_info(root: Path, **changes: object) -> None:
    """Change entries of meta/info.json."""
    path = root / "meta/info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_episodes(root: Path, **changes: object) -> None:
    """Replace columns of the episode table."""
    path = root / "meta/episodes/chunk-000/file-000.parquet"
    _write(pd.read_parquet(path).assign(**changes), path)


def truncate(path: Path, keep: float = 0.6) -> None:
    """Cut a file short."""
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])


Language = Literal["task", "string", "annotation index", "annotation text"]
LANGUAGE_COLUMNS = {"string": "language_instruction", "annotation index": "annotation.human.task", "annotation text": "annotation.human.task"}
MODALITY = {
    "state": {"whole": {"start": 0, "end": 4}, "position": {"start": 0, "end": 3}, "gripper": {"original_key": "observation.state", "start": 3, "end": 4}},
    "action": {"whole": {"start": 0, "end": 4, "absolute": False}, "done": {"original_key": "action.executed", "start": 0, "end": 4}},
    "video": {"corner4": {}, "front": {"original_key": CAMERA}},
}


def write_flavour(source: Path, root: Path, version: str, *, language: Language = "task", modality: bool = False) -> Path:
    """A v3.0 dataset with one parquet file, written anew: another version, its language in a column, names for its parts; returns `root`."""
    info = json.loads((source / "meta/info.json").read_text())
    tasks = pd.read_parquet(source / "meta/tasks.parquet")
    texts = {int(number): str(text) for text, number in tasks["task_index"].items()}
    episodes = pd.read_parquet(source / "meta/episodes/chunk-000/file-000.parquet")
    rows = pd.concat([pd.read_parquet(path) for path in sorted(source.glob("data/*/*.parquet"))], ignore_index=True)
    if language != "task":
        column = LANGUAGE_COLUMNS[language]
        rows[column] = rows["task_index"] if language == "annotation index" else rows["task_index"].map(texts)
        info["features"][column] = {"dtype": "int64" if language == "annotation index" else "string", "shape": [1], "names": None}
        rows["task_index"], episodes = 0, episodes.drop(columns="tasks")
    (root / "meta").mkdir(parents=True)
    if version == "v3.0":
        shutil.copytree(source / "videos", root / "videos")
        _write(rows, root / "data/chunk-000/file-000.parquet")
        _write(episodes.assign(**{"data/file_index": 0}), root / "meta/episodes/chunk-000/file-000.parquet")
        _write(tasks, root / "meta/tasks.parquet", index=True)
    else:
        info |= _write_v2(source, root, version, info, episodes, rows, texts)
    (root / "meta/info.json").write_text(json.dumps(info))
    if modality:
        names = MODALITY | ({"annotation": {"human.task": {}}} if language.startswith("annotation") else {})
        (root / "meta/modality.json").write_text(json.dumps(names))
        (root / "meta/embodiment.json").write_text(json.dumps({"embodiment_tag": "tiny_arm"}))
    return root


def _write_v2(source: Path, root: Path, version: str, info: dict, episodes: pd.DataFrame, rows: pd.DataFrame, texts: dict[int, str]) -> dict:
    """Files of their own for every episode, in chunks of five; returns what changes in info.json."""
    template = {
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
    }
    frames = {path: list(_decoded(path)) for path in sorted(source.glob("videos/*/*/*.mp4"))}
    for row in episodes.to_dict("records"):
        where = {"episode_chunk": row["episode_index"] // 5, "episode_index": row["episode_index"]}
        _write(rows[rows.episode_index == row["episode_index"]], root / template["data_path"].format(**where))
        file = info["video_path"].format(video_key=CAMERA, chunk_index=0, file_index=row[f"videos/{CAMERA}/file_index"])
        first = round(row[f"videos/{CAMERA}/from_timestamp"] * info["fps"])
        _encode_losslessly(frames[source / file][first : first + row["length"]], root / template["video_path"].format(video_key=CAMERA, **where), info["fps"])
    whole, *parts = [_stats(rows), *(_stats(rows[rows.episode_index == number]) for number in episodes.episode_index)]
    if version == "v2.1":
        _write_lines(root / "meta/episodes_stats.jsonl", [{"episode_index": number, "stats": part} for number, part in enumerate(parts)])
    else:
        (root / "meta/stats.json").write_text(json.dumps(whole))
    kept = ["episode_index", "length", *(["tasks"] if "tasks" in episodes else [])]
    _write_lines(root / "meta/episodes.jsonl", json.loads(episodes[kept].to_json(orient="records")))
    _write_lines(root / "meta/tasks.jsonl", [{"task_index": number, "task": text} for number, text in texts.items()])
    return template | {"codebase_version": version, "chunks_size": 5, "total_chunks": 3, "total_videos": len(episodes)}


def _stats(rows: pd.DataFrame) -> dict:
    """Of every vector."""
    vectors = {key: np.stack(list(rows[key])).astype(np.float64) for key in ("observation.state", "action", "action.executed")}
    return {
        key: {name: getattr(values, name)(axis=0).tolist() for name in ("min", "max", "mean", "std")} | {"count": [len(values)]}
        for key, values in vectors.items()
    }


def _decoded(path: Path) -> Iterator[np.ndarray]:
    """Frames as they are stored, before any conversion of colours."""
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            yield frame.to_ndarray(format="yuv420p")


def _encode_losslessly(frames: list[np.ndarray], path: Path, fps: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"qp": "0", "preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = frames[0].shape[1], frames[0].shape[0] * 2 // 3, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="yuv420p")))
        container.mux(stream.encode())


def _write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _features(size: int) -> dict:
    scalar = {name: {"dtype": "int64", "shape": [1], "names": None} for name in ("frame_index", "episode_index", "index", "task_index")}
    vectors = {name: {"dtype": "float32", "shape": [4], "names": None} for name in ("observation.state", "action", "action.executed")}
    return (
        {CAMERA: {"dtype": "video", "shape": [size, size, 3], "names": ["height", "width", "channels"]}, "timestamp": {"dtype": "float32", "shape": [1]}}
        | vectors
        | scalar
    )


def _episode_row(episode: int, length: int, file: int, at: int, data_file: int, total: int) -> dict:
    video = {"chunk_index": 0, "file_index": file, "from_timestamp": at / FPS, "to_timestamp": (at + length) / FPS}
    return {
        "episode_index": episode, "tasks": [TASKS[episode % 2]], "length": length, "data/chunk_index": 0, "data/file_index": data_file,
        "dataset_from_index": total, "dataset_to_index": total + length, **{f"videos/{CAMERA}/{k}": v for k, v in video.items()}, "stats/action/min": [0.0] * 4,
    }  # fmt: skip


def _frame_rows(episode: int, length: int, total: int) -> pd.DataFrame:
    t = np.arange(length)
    vectors = {key: list(value) for key, value in columns(episode, length).items()}
    return pd.DataFrame(
        vectors | {"timestamp": (t / FPS).astype(np.float32), "frame_index": t, "episode_index": episode, "index": total + t, "task_index": episode % 2}
    )


def _write(frame: pd.DataFrame, path: Path, index: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    frame.to_parquet(path, index=index)
