"""What the writer writes is LeRobot v3.0: read back with plain pyarrow and PyAV, and checked against the format's own definitions."""

import json
from pathlib import Path

import av
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lerobot_fixture import read_stamp, stamp

from wam.data import writer
from wam.data.writer import LeRobotWriter

KEY = "observation.images.front"
FPS = 80
FEATURES = {
    KEY: {"dtype": "video", "shape": [32, 48, 3], "names": ["height", "width", "channels"]},
    "action": {"dtype": "float32", "shape": [4], "names": ["a", "b", "c", "d"]},
    "next.reward": {"dtype": "float32", "shape": [1], "names": None},
    "next.done": {"dtype": "bool", "shape": [1], "names": None},
}
LENGTHS, TASKS = (5, 9, 4), ("open", "close", "open")


def frames(start: int, length: int) -> np.ndarray:
    """Frames that show their own number in a 32 x 32 part."""
    return np.stack([np.pad(stamp(start + i, 32), ((0, 0), (0, 16), (0, 0))) for i in range(length)])


def columns(episode: int, length: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(episode)
    done = np.zeros(length, bool)
    done[-1] = True
    return {"action": rng.normal(size=(length, 4)).astype(np.float32), "next.reward": rng.normal(size=length).astype(np.float32), "next.done": done}


def write(root: Path) -> Path:
    out = LeRobotWriter(root, FPS, FEATURES, "arm", {"made_by": "a test"})
    for episode, (length, task) in enumerate(zip(LENGTHS, TASKS, strict=True)):
        out.add_episode(columns(episode, length), {KEY: frames(100 * episode, length)}, task, {"seed": 40 + episode})
    out.finalize()
    return root


def test_rows_are_lerobots(tmp_path: Path) -> None:
    root = write(tmp_path / "set")
    table = pq.read_table(root / "data/chunk-000/file-000.parquet")
    assert {field.name: field.type for field in table.schema} == {
        "action": pa.list_(pa.float32(), 4),
        "next.reward": pa.float32(),
        "next.done": pa.bool_(),
        "timestamp": pa.float32(),
        **dict.fromkeys(("frame_index", "episode_index", "index", "task_index"), pa.int64()),
    }
    rows = table.to_pandas()
    assert rows["index"].tolist() == list(range(18)) and rows["episode_index"].tolist() == [0] * 5 + [1] * 9 + [2] * 4
    assert rows["task_index"].tolist() == [0] * 5 + [1] * 9 + [0] * 4
    assert np.array_equal(rows["timestamp"], (rows["frame_index"] / FPS).astype(np.float32))
    assert np.array_equal(np.stack(rows["action"]), np.concatenate([columns(e, n)["action"] for e, n in enumerate(LENGTHS)]))
    tasks = pd.read_parquet(root / "meta/tasks.parquet")
    assert tasks.index.tolist() == ["open", "close"] and tasks["task_index"].tolist() == [0, 1]


def test_info_says_what_a_reader_needs(tmp_path: Path) -> None:
    info = json.loads((write(tmp_path / "set") / "meta/info.json").read_text())
    expected = {
        "codebase_version": "v3.0",
        "fps": 80,
        "total_episodes": 3,
        "total_frames": 18,
        "total_tasks": 2,
        "chunks_size": 1000,
        "splits": {"train": "0:3"},
    }
    assert {key: info[key] for key in expected} == expected
    assert info["data_path"] == "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
    assert info["video_path"] == "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
    assert list(info["features"]) == [*FEATURES, "timestamp", "frame_index", "episode_index", "index", "task_index"]
    assert info["features"][KEY]["info"]["video.codec"] == "h264" and info["wam"] == {"made_by": "a test"}


def test_each_episode_finds_its_frames(tmp_path: Path) -> None:
    root = write(tmp_path / "set")
    episodes = pd.read_parquet(root / "meta/episodes/chunk-000/file-000.parquet")
    with av.open(str(root / f"videos/{KEY}/chunk-000/file-000.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec.canonical_name, stream.pix_fmt, float(stream.average_rate)) == ("h264", "yuv420p", FPS)
        decoded = [
            (round(float(frame.time) * FPS), frame.key_frame, read_stamp(frame.to_ndarray(format="rgb24")[:, :32])) for frame in container.decode(video=0)
        ]
    assert [number for number, _, _ in decoded] == list(range(18)), "frame times are whole frames, from zero"
    for row in episodes.to_dict("records"):
        episode, start = row["episode_index"], round(row[f"videos/{KEY}/from_timestamp"] * FPS)
        assert [shown for _, _, shown in decoded[start : start + row["length"]]] == [100 * episode + i for i in range(row["length"])]
        assert decoded[start][1], "an episode begins with a keyframe"
        assert round(row[f"videos/{KEY}/to_timestamp"] * FPS) == start + row["length"]
        assert (
            row["dataset_to_index"] - row["dataset_from_index"] == row["length"] and row["tasks"].tolist() == [TASKS[episode]] and row["seed"] == 40 + episode
        )
    assert {"data/chunk_index", "data/file_index", f"videos/{KEY}/chunk_index", "meta/episodes/file_index", "stats/action/q99"} <= set(episodes)


def test_statistics_are_exact(tmp_path: Path) -> None:
    root = write(tmp_path / "set")
    stats = json.loads((root / "meta/stats.json").read_text())
    actions = np.concatenate([columns(e, n)["action"] for e, n in enumerate(LENGTHS)]).astype(np.float64)
    pixels = np.concatenate([frames(100 * e, n) for e, n in enumerate(LENGTHS)]) / 255
    for name, quantile in {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}.items():
        np.testing.assert_allclose(stats["action"][name], np.quantile(actions, quantile, axis=0), atol=1e-12)
        np.testing.assert_allclose(np.ravel(stats[KEY][name]), np.quantile(pixels, quantile, axis=(0, 1, 2), method="inverted_cdf"), atol=1e-12)
    for name in ("mean", "std", "min", "max"):
        np.testing.assert_allclose(stats["action"][name], getattr(actions, name)(0), atol=1e-12)
        np.testing.assert_allclose(stats[KEY][name], getattr(pixels, name)((0, 1, 2)).reshape(3, 1, 1), atol=1e-12)
    assert stats["action"]["count"] == stats[KEY]["count"] == [18] and np.shape(stats["next.reward"]["mean"]) == (1,)


def test_files_begin_anew_past_their_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "DATA_MB", 0)
    monkeypatch.setattr(writer, "VIDEO_MB", 0)
    monkeypatch.setattr(writer, "CHUNK_FILES", 2)
    root = write(tmp_path / "set")
    episodes = pd.read_parquet(root / "meta/episodes/chunk-000/file-000.parquet").to_dict("records")
    assert [(e["data/chunk_index"], e["data/file_index"]) for e in episodes] == [(0, 0), (0, 1), (1, 0)]
    assert [e[f"videos/{KEY}/from_timestamp"] for e in episodes] == [0, 0, 0]
    assert len(pq.read_table(root / "data/chunk-001/file-000.parquet")) == 4
    with av.open(str(root / f"videos/{KEY}/chunk-001/file-000.mp4")) as container:
        assert len(list(container.decode(video=0))) == 4


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    out = LeRobotWriter(tmp_path / "set", FPS, FEATURES)
    good, video = columns(0, 3), frames(0, 3)
    with pytest.raises(ValueError, match=r"missing \['next.done'\], unknown \['done'\]"):
        out.add_episode({"action": good["action"], "next.reward": good["next.reward"], "done": good["next.done"]}, {KEY: video}, "open")
    with pytest.raises(ValueError, match=r"lengths.*'next.done': 3"):
        out.add_episode(good | {"action": good["action"][:2]}, {KEY: video}, "open")
    with pytest.raises(ValueError, match=r"action is float64 \(4,\).*float32"):
        out.add_episode(good | {"action": good["action"].astype(np.float64)}, {KEY: video}, "open")
    with pytest.raises(ValueError, match=r"action is float32 \(5,\).*\(4,\)"):
        out.add_episode(good | {"action": np.zeros((3, 5), np.float32)}, {KEY: video}, "open")
    with pytest.raises(ValueError, match="action is not finite in frame 0"):
        out.add_episode(good | {"action": np.full((3, 4), np.nan, np.float32)}, {KEY: video}, "open")
    with pytest.raises(ValueError, match=r"has frames \(32, 32, 3\)"):
        out.add_episode(good, {KEY: video[:, :, :32]}, "open")
    with pytest.raises(ValueError, match="no episodes"):
        out.finalize()
    with pytest.raises(ValueError, match="reserved"):
        LeRobotWriter(tmp_path / "other", FPS, {"index": FEATURES["action"]})


def test_nothing_is_overwritten_and_an_interrupted_writer_is_replaced(tmp_path: Path) -> None:
    first = LeRobotWriter(tmp_path / "set", FPS, FEATURES)
    first.add_episode(columns(0, 3), {KEY: frames(0, 3)}, "open")
    first._write_rows()  # and here the power fails
    assert not (tmp_path / "set/meta/info.json").exists()
    root = write(tmp_path / "set")
    assert sorted(path.name for path in root.iterdir()) == ["data", "meta", "videos"]
    with pytest.raises(FileExistsError, match="already holds a dataset"):
        LeRobotWriter(root, FPS, FEATURES)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("dear to me")
    with pytest.raises(FileExistsError, match=r"not empty \(thesis.tex\)"):
        LeRobotWriter(tmp_path / "mine", FPS, FEATURES)
