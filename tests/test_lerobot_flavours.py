"""One dataset in every flavour of LeRobot gives the same samples; what contradicts itself in a flavour is refused by name."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import lerobot_fixture as fixture
import numpy as np
import pandas as pd
import pytest

from wam.config import DataConfig, TimelineConfig
from wam.data.dataset import WindowDataset
from wam.data.lerobot import DatasetError, LeRobotDataset, Span
from wam.data.video import VideoDecoder, broken_files

SAMPLE = Path(__file__).parents[1] / "data/metaworld_sample"
DATA = DataConfig(root=str(SAMPLE), executed_action="action.executed", validation_fraction=0.0, cache="memory")
NAMED = replace(DATA, cameras=("video.front",), state="state.whole", action="action.whole", executed_action="action.done")
TIMELINE = TimelineConfig(blocks=2, actions_per_block=4, frame_stride=1)


def samples(data: DataConfig) -> list[dict]:
    """Windows all over the dataset."""
    windows = WindowDataset(data, TIMELINE, "train")
    return [dict(windows[i]) for i in range(0, len(windows), 37)]


@pytest.fixture(scope="module")
def wanted() -> list[dict]:
    return samples(DATA)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fixture.write_dataset(tmp_path_factory.mktemp("tiny") / "v3", (12, 10, 11, 9, 8, 7))


@pytest.fixture(scope="module")
def tiny_v2(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fixture.write_flavour(tiny, tmp_path_factory.mktemp("tiny") / "v2", "v2.1", modality=True)


@pytest.fixture
def root(tiny_v2: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(tiny_v2, tmp_path / "tiny"))


@pytest.mark.parametrize(
    ("version", "language", "modality"),
    [
        ("v3.0", "string", False),
        ("v3.0", "annotation index", True),
        ("v2.0", "task", False),
        ("v2.0", "annotation text", False),
        ("v2.1", "task", True),
        ("v2.1", "annotation index", False),
        ("v2.1", "string", True),
        ("v2.1", "annotation text", True),
    ],
)
def test_every_flavour_gives_the_same_samples(wanted: list[dict], tmp_path: Path, version: str, language: fixture.Language, modality: bool) -> None:
    root = fixture.write_flavour(SAMPLE, tmp_path / "flavour", version, language=language, modality=modality)
    found = samples(replace(NAMED if modality else DATA, root=str(root)))
    assert len(found) == len(wanted) > 20 and len({sample["instruction"] for sample in found}) == 4
    for sample, other in zip(found, wanted, strict=True):
        assert sample.keys() == other.keys()
        for key, value in other.items():
            np.testing.assert_array_equal(sample[key], value, err_msg=key)
    assert LeRobotDataset(root).embodiment == ("tiny_arm" if modality else None)


def test_names_are_slices_cameras_and_annotations(tiny: Path, tiny_v2: Path) -> None:
    plain, dataset = LeRobotDataset(tiny), LeRobotDataset(tiny_v2)
    state = plain.read(3, "observation.state")
    np.testing.assert_array_equal(dataset.read(3, "state.position"), state[:, :3])
    np.testing.assert_array_equal(dataset.read(3, "state.gripper"), state[:, 3:])
    assert dataset.feature("state.gripper").shape == (1,) and not dataset.modality.groups["action.whole"].absolute
    assert dataset.camera("video.front") == dataset.camera(fixture.CAMERA)
    assert dataset.episodes[3].videos["video.front"] == dataset.episodes[3].videos["video.corner4"] == dataset.episodes[3].videos[fixture.CAMERA]
    with pytest.raises(DatasetError, match=r"no feature 'state.positoin'; did you mean 'state.position'\?"):
        dataset.read(0, "state.positoin")
    with pytest.raises(DatasetError, match="a camera has dtype 'video'"):
        dataset.camera("state.position")


@pytest.mark.parametrize("language", ["annotation index", "annotation text"])
def test_instructions_change_within_an_episode(tiny: Path, tmp_path: Path, language: fixture.Language) -> None:
    root = fixture.write_flavour(tiny, tmp_path / "v2", "v2.1", language=language, modality=True)
    path = root / "data/chunk-000/episode_000000.parquet"
    table, (first, second) = pd.read_parquet(path), fixture.TASKS
    table.loc[4:6, "annotation.human.task"] = 1 if language == "annotation index" else second
    table.to_parquet(path)
    dataset = LeRobotDataset(root)
    assert dataset.language == ("annotation.human.task",) and dataset.episodes[0].tasks == (first, second)
    assert dataset.spans(0) == [Span(0, 4, first), Span(4, 7, second), Span(7, 12, first)]
    assert dataset.words(0).rows.tolist() == [0] * 4 + [1] * 3 + [0] * 5
    assert [dataset.instruction(0, row) for row in range(12)] == [dataset.words(0).texts[i] for i in dataset.words(0).rows]
    assert dataset.spans(1) == [Span(0, 10, second)] and dataset.spans(1, "task_index") == [Span(0, 10, first)]


def test_alternatives_of_one_instruction(tiny: Path, tmp_path: Path) -> None:
    root = fixture.write_flavour(tiny, tmp_path / "v2", "v2.0", language="string")
    info = json.loads((root / "meta/info.json").read_text())
    info["features"] |= {f"language_instruction_{n}": {"dtype": "string", "shape": [1]} for n in (2, 3)}
    for path in root.glob("data/*/*.parquet"):
        table = pd.read_parquet(path).assign(language_instruction_2="pull it", language_instruction_3=None)
        table.loc[5:, "language_instruction"] = ""
        table.to_parquet(path)
    fixture.edit_info(root, features=info["features"])
    dataset = LeRobotDataset(root)
    assert dataset.language == ("language_instruction", "language_instruction_2", "language_instruction_3")
    assert dataset.spans(0) == [Span(0, 5, fixture.TASKS[0]), Span(5, 12, "pull it")]
    assert dataset.alternatives(0, 0) == (fixture.TASKS[0], "pull it") and dataset.alternatives(0, 5) == ("pull it",)
    assert LeRobotDataset(root, ["language_instruction_2"]).spans(0) == [Span(0, 12, "pull it")]
    with pytest.raises(DatasetError, match=r"episode_000000.parquet: row 5 of episode 0 has no instruction in language_instruction;"):
        LeRobotDataset(root, ["language_instruction"])
    info["features"]["task"] = info["features"].pop("language_instruction_3")
    fixture.edit_info(root, features=info["features"])
    with pytest.raises(DatasetError, match="language_instruction_2, task may hold the instructions; say which with `language`"):
        LeRobotDataset(root)
    with pytest.raises(DatasetError, match=r"'action' .* is float32 of shape \(4,\); language is a task index"):
        LeRobotDataset(root, ["action"])


def test_videos_that_are_cut_short_are_found(tiny: Path, tmp_path: Path) -> None:
    root = fixture.write_flavour(tiny, tmp_path / "v2", "v2.1", modality=True)
    for dataset, counts in ((LeRobotDataset(tiny), [33, 24]), (LeRobotDataset(root), [12, 10, 11, 9, 8, 7])):
        needed = dataset.frames_needed(fixture.CAMERA)
        assert list(needed.values()) == counts and broken_files(needed, VideoDecoder()) == {}
    longer, short = (dataset.episodes[number].videos["video.front"].path for number in (0, 5))
    shutil.copy(short, longer)
    assert list(broken_files(dataset.frames_needed("video.front"), VideoDecoder())) == [longer]


def test_statistics_of_episodes_pool_to_those_of_the_whole(tiny: Path, root: Path, tmp_path: Path) -> None:
    whole, pooled = LeRobotDataset(fixture.write_flavour(tiny, tmp_path / "v2.0", "v2.0")).stats(), LeRobotDataset(root).stats()
    assert whole.keys() == pooled.keys() == {"observation.state", "action", "action.executed"} and LeRobotDataset(tiny).stats() == {}
    for key, entry in whole.items():
        assert entry.keys() == pooled[key].keys()
        for name, value in entry.items():
            np.testing.assert_allclose(pooled[key][name], value, atol=1e-9)
    path = root / "meta/episodes_stats.jsonl"
    text = path.read_text()
    stats = json.loads(text.splitlines()[1])["stats"]
    for changes, message in (
        ({"episode_index": 0}, r"statistics of 5 episodes in 6 lines; expected one line for each of 6"),
        ({"stats": 3}, "the statistics of episode 1 are no object"),
        ({"stats": stats | {"action": {"min": ["x"]}}}, "the statistics of 'action' of episode 1 are no numbers"),
        ({"stats": stats | {"action": stats["action"] | {"mean": [float("nan")] * 4}}}, "mean of 'action' of episode 1 is not finite"),
        ({"stats": stats | {"action": stats["action"] | {"mean": [1, 2]}}}, "not every episode has .* of 'action' in one shape"),
        ({"stats": stats | {"action": stats["action"] | {"count": [0]}}}, "count 0 of 'action'"),
        ({"stats": {}}, "not every episode has min, max, mean, std, count of 'observation.state'"),
    ):
        path.write_text(text)
        edit_line(path, 1, **changes)
        with pytest.raises(DatasetError, match=message):
            LeRobotDataset(root).stats()


def test_discarded_episodes_are_in_no_split(root: Path) -> None:
    fixture.edit_info(root, discarded_episode_indices=[1, 4])
    assert LeRobotDataset(root).split(0.0) == {"train": [0, 2, 3, 5], "validation": []}
    fixture.edit_info(root, discarded_episode_indices=[9])
    with pytest.raises(DatasetError, match=r"discarded_episode_indices is \[9\]; expected episodes of 0..5"):
        LeRobotDataset(root)


@pytest.mark.parametrize("path", ["meta/episodes.jsonl", "meta/tasks.jsonl", "data/chunk-000/episode_000000.parquet"])
def test_missing_and_truncated_files(root: Path, path: str) -> None:
    fixture.truncate(root / path, 0.9)
    with pytest.raises(DatasetError, match=rf"{path}.*(line \d of \d is not valid JSON|cannot be read as parquet)"):
        LeRobotDataset(root).read(0, "action")
    (root / path).unlink()
    with pytest.raises(FileNotFoundError, match=rf"no file .*{path}"):
        LeRobotDataset(root).read(0, "action")


def edit_line(path: Path, number: int, **changes: object) -> None:
    lines = path.read_text().splitlines()
    lines[number] = json.dumps(json.loads(lines[number]) | changes)
    path.write_text("\n".join(lines))


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("episodes", {"length": 0}, r"episode_index is 1 and length 0; expected whole numbers"),
        ("episodes", {"length": "9"}, r"length '9'"),
        ("episodes", {"length": 11}, r"total_frames = 57, but the episode table adds up to 58"),
        ("episodes", {"episode_index": 3}, r"lists the episodes 0, 2, 3, 3, 4, 5; expected 0, 1, 2"),
        ("episodes", {"tasks": ["sing"]}, r"episode 1 has the task 'sing', which meta/tasks does not list"),
        ("episodes", {"tasks": "sing"}, r"the tasks of episode 1 are 'sing'; expected a list"),
        ("episodes", {"tasks": []}, r"episode 1 has no instruction \(its tasks are \[\]\)"),
        ("tasks", {"task_index": 0}, r"task 0 is both 'open the drawer' and 'close the drawer'"),
        ("tasks", {"task": None}, r"task_index is 1 and task None"),
    ],
)
def test_lines_that_cannot_be_used(root: Path, file: str, changes: dict, message: str) -> None:
    edit_line(root / f"meta/{file}.jsonl", 1, **changes)
    with pytest.raises(DatasetError, match=message):
        LeRobotDataset(root)


def test_rows_that_contradict_the_tables(root: Path) -> None:
    for changes, message in (
        ({"chunks_size": 0}, "chunks_size = 0; expected the number of episodes"),
        ({"video_path": None}, "has no video_path"),
        ({"video_path": "videos/{camera}.mp4"}, "video_path 'videos/{camera}.mp4' does not take video_key, episode_chunk, episode_index"),
    ):
        text = (root / "meta/info.json").read_text()
        fixture.edit_info(root, **changes)
        with pytest.raises(DatasetError, match=message):
            LeRobotDataset(root)
        (root / "meta/info.json").write_text(text)
    shutil.copy(root / "data/chunk-000/episode_000001.parquet", root / "data/chunk-000/episode_000000.parquet")
    with pytest.raises(DatasetError, match=r"episode_000000.parquet has 0 rows of episode 0, but the episode table says 12"):
        LeRobotDataset(root).read(0, "action")
    edit_line(root / "meta/episodes.jsonl", 1, tasks=list(fixture.TASKS))
    path = root / "data/chunk-000/episode_000001.parquet"
    pd.read_parquet(path).assign(task_index=7).to_parquet(path)
    with pytest.raises(DatasetError, match=r"task_index of episode 1 is 7, and the dataset lists 2 tasks without it"):
        LeRobotDataset(root).spans(1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], r"modality.json holds list; expected an object with sections among state, action, video, annotation"),
        ({"stat": {}}, "holds stat; expected"),
        ({"state": []}, r"state is \[\]; expected an object of names"),
        ({"state": {"arm": 3}}, "state.arm is 3; expected an object"),
        (
            {"state": {"arm": {"start": 2, "end": 5}}},
            r"state.arm is the slice 2..5 of 'observation.state', which has 4 dimensions; expected 0 <= start < end <= 4",
        ),
        ({"state": {"arm": {"start": 2}}}, r"the slice 2..None"),
        ({"state": {"arm": {"original_key": "joints", "start": 0, "end": 2}}}, "state.arm stands for 'joints', which meta/info.json does not list"),
        ({"state": {"arm": {"original_key": fixture.CAMERA, "start": 0, "end": 2}}}, "expected a vector of numbers"),
        ({"action": {"executed": {"start": 0, "end": 4}}}, "action.executed is 'action' here, and a column of its own"),
        ({"action": {"executed": {"original_key": "action.executed", "start": 0, "end": 2}}}, "is the slice 0..2 here, and a column of 4 dimensions"),
        ({"action": {"arm": {"start": 0, "end": 2, "absolute": "no"}}}, "absolute of action.arm is 'no'"),
        ({"video": {"top": {}}}, "video.top stands for 'observation.images.top'"),
        ({"video": {"top": {"original_key": "action"}}}, "expected a camera"),
        ({"annotation": {"words": {"original_key": "action"}}}, r"annotation.words stands for 'action', which is float32; expected task indices"),
    ],
)
def test_names_that_point_nowhere(root: Path, content: object, message: str) -> None:
    (root / "meta/modality.json").write_text(json.dumps(content))
    with pytest.raises(DatasetError, match=message):
        LeRobotDataset(root)


def test_embodiment_without_a_tag(root: Path) -> None:
    (root / "meta/embodiment.json").write_text('{"tag": "x"}')
    with pytest.raises(DatasetError, match=r"embodiment.json holds \{'tag': 'x'\}; expected \{'embodiment_tag': NAME\}"):
        LeRobotDataset(root)


def test_datasets_on_the_hub(tiny_v2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(name: str, **options: object) -> str:
        asked.append((name, options))
        if name == "lab/none":
            raise OSError("no network")
        return str(tiny_v2)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert len(LeRobotDataset("hf:lab/arm").episodes) == len(LeRobotDataset("hf:lab/arm@v2").episodes) == 6
    assert asked == [("lab/arm", {"repo_type": "dataset", "revision": None}), ("lab/arm", {"repo_type": "dataset", "revision": "v2"})]
    with pytest.raises(DatasetError, match=r"hf:lab/none cannot be fetched .*no network.* or give a directory"):
        LeRobotDataset("hf:lab/none")
