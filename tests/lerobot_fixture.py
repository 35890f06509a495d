"""A tiny LeRobot v3.0 dataset, written without `wam`, whose pixels say which frame they are.

Two tasks; episodes 0..n-1 alternate between them; several episodes share an mp4, as LeRobot writes them.  A frame shows its own
number (counted over the file) as 4 x 4 black and white squares, which survive compression, so a decoder that is off by one shows.
"""

import json
from pathlib import Path

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
