"""What is written is read; what is damaged or contradicts itself is refused by name."""

import json
import shutil
from pathlib import Path

import lerobot_fixture as fixture
import numpy as np
import pandas as pd
import pytest

from wam.data.lerobot import DatasetError, LeRobotDataset

LENGTHS = (30, 26, 40, 33, 28, 31, 6)
DATA = "data/chunk-000/file-000.parquet"
EPISODES = "meta/episodes/chunk-000/file-000.parquet"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fixture.write_dataset(tmp_path_factory.mktemp("lerobot") / "tiny", LENGTHS)


@pytest.fixture
def root(shared: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(shared, tmp_path / "tiny"))


def test_metadata_and_columns(shared: Path) -> None:
    dataset = LeRobotDataset(shared)
    assert dataset.fps == fixture.FPS and dataset.tasks == dict(enumerate(fixture.TASKS))
    assert [e.length for e in dataset.episodes] == list(LENGTHS)
    assert [e.instruction for e in dataset.episodes] == [fixture.TASKS[i % 2] for i in range(len(LENGTHS))]
    at = 0
    for episode in dataset.episodes:
        at = 0 if episode.index % 3 == 0 else at
        span = episode.videos[fixture.CAMERA]
        assert span.path.is_file() and span.path.name == f"file-{episode.index // 3:03d}.mp4" and span.first_frame == at
        at += episode.length
        for key, wanted in fixture.columns(episode.index, episode.length).items():
            np.testing.assert_array_equal(dataset.read(episode.index, key), wanted)
        assert dataset.read(episode.index, "frame_index")[:, 0].tolist() == list(range(episode.length))
    assert dataset.camera(fixture.CAMERA).shape == (64, 64, 3)


def test_split_holds_out_the_last_of_each_task(shared: Path) -> None:
    dataset = LeRobotDataset(shared)  # task 0 has episodes 0 2 4 6, task 1 has 1 3 5
    assert dataset.split(0) == {"train": [0, 1, 2, 3, 4, 5, 6], "validation": []}
    assert dataset.split(0.1) == {"train": [0, 1, 2, 3, 4], "validation": [5, 6]}
    assert dataset.split(0.5) == {"train": [0, 1, 2], "validation": [3, 4, 5, 6]}
    assert dataset.split(0.99) == {"train": [0, 1], "validation": [2, 3, 4, 5, 6]}


def test_instruction_changes_within_an_episode(root: Path) -> None:
    tasks = [[fixture.TASKS[i % 2]] for i in range(len(LENGTHS))]
    tasks[0] = list(fixture.TASKS)
    fixture.edit_episodes(root, tasks=tasks)
    table = pd.read_parquet(root / DATA)
    table.loc[(table.episode_index == 0) & (table.frame_index >= 12), "task_index"] = 1
    table.to_parquet(root / DATA)
    dataset = LeRobotDataset(root)
    assert [dataset.instruction(0, row) for row in (0, 11, 12, 29)] == [fixture.TASKS[0]] * 2 + [fixture.TASKS[1]] * 2


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (".", "no dataset directory"),
        ("meta/info.json", "meta/info.json is missing"),
        ("meta/tasks.parquet", "meta/tasks.parquet, which"),
        (EPISODES, "file-000.parquet is missing"),
        (DATA, DATA),
    ],
)
def test_missing_files(root: Path, path: str, message: str) -> None:
    (shutil.rmtree if path == "." else Path.unlink)(root / path)
    with pytest.raises(FileNotFoundError, match=message):
        LeRobotDataset(root).read(0, "action")


@pytest.mark.parametrize("path", ["meta/tasks.parquet", EPISODES, DATA])
def test_truncated_parquet(root: Path, path: str) -> None:
    fixture.truncate(root / path)
    with pytest.raises(DatasetError, match=rf"{path} cannot be read as parquet .* copy or record it again"):
        LeRobotDataset(root).read(0, "action")


def test_info_that_cannot_be_used(root: Path) -> None:
    info = (root / "meta/info.json").read_text()
    for changes, message in (
        ({"codebase_version": "v1.6"}, "version 'v1.6'; this version of wam reads v2.0, v2.1, v3.0"),
        ({"fps": 0}, "fps = 0"),
        ({"total_episodes": 9}, "total_episodes = 9, but the episode table adds up to 7"),
        ({"total_frames": 1}, "total_frames = 1"),
        ({"features": {"action": {}}}, "feature 'action' is {}"),
        ({"video_path": None}, "has no video_path"),
    ):
        (root / "meta/info.json").write_text(json.dumps(json.loads(info) | changes))
        with pytest.raises(DatasetError, match=message):
            LeRobotDataset(root)
    for text, message in (("{", "not valid JSON"), ("[]", "lacks every key"), ('{"fps": 3}', "lacks codebase_version, features, data_path")):
        (root / "meta/info.json").write_text(text)
        with pytest.raises(DatasetError, match=message):
            LeRobotDataset(root)


def test_metadata_that_contradicts_the_files(root: Path) -> None:
    table = pd.read_parquet(root / DATA)
    table.iloc[:-1].to_parquet(root / DATA)
    dataset = LeRobotDataset(root)
    dataset.read(0, "action")
    with pytest.raises(DatasetError, match=rf"{DATA} has 39 rows of episode 2, but the episode table says 40"):
        dataset.read(2, "action")
    table.iloc[::-1].to_parquet(root / DATA)
    with pytest.raises(DatasetError, match="the rows of episode 2 are not in order"):
        LeRobotDataset(root).read(0, "action")
    table.drop(columns="action").to_parquet(root / DATA)
    with pytest.raises(DatasetError, match="no column 'action'"):
        LeRobotDataset(root).read(0, "action")
    table["action"] = [row[:2] for row in table["action"]]
    table.to_parquet(root / DATA)
    with pytest.raises(DatasetError, match=r"column 'action' holds .* its shape \(4,\) asks for"):
        LeRobotDataset(root).read(0, "action")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": [[]] * 7}, "episode 0 has no instruction"),
        ({"tasks": [[" "]] * 7}, "episode 0 has no instruction"),
        ({"episode_index": [0, 1, 2, 3, 4, 5, 5]}, "expected 0, 1, 2"),
        ({f"videos/{fixture.CAMERA}/to_timestamp": 2.0}, "spans 0..2 s = 20 frames at 10 fps"),
        ({f"videos/{fixture.CAMERA}/file_index": None}, "episode 0 has no video of"),
    ],
)
def test_episode_tables_that_cannot_be_used(root: Path, changes: dict, message: str) -> None:
    fixture.edit_episodes(root, **changes)
    with pytest.raises(DatasetError, match=message):
        LeRobotDataset(root)


def test_wrong_keys(shared: Path) -> None:
    dataset = LeRobotDataset(shared)
    with pytest.raises(DatasetError, match=r"no feature 'actoin'; did you mean 'action'\?"):
        dataset.read(0, "actoin")
    with pytest.raises(DatasetError, match=r"did you mean 'observation.images.corner4'"):
        dataset.camera("observation.images.corner2")
    with pytest.raises(DatasetError, match=r"a camera has dtype 'video' .*corner4"):
        dataset.camera("action")
    with pytest.raises(DatasetError, match="only numeric columns"):
        dataset.read(0, fixture.CAMERA)
