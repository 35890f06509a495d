"""Windows hold the frames, states and actions they say; the order of training is a pure function of seed and step."""

import json
import shutil
from dataclasses import replace
from itertools import islice
from pathlib import Path

import lerobot_fixture as fixture
import numpy as np
import pytest
import torch

from wam.config import DataConfig, TimelineConfig
from wam.data.dataset import WindowDataset, collate
from wam.data.normalize import Normalizer
from wam.data.sampler import WindowSampler, make_loader
from wam.data.video import VideoError
from wam.data.windows import window_indices

TIMELINE = TimelineConfig()
SIZE = (64, 64)
LENGTHS = (30, 26, 40, 33, 28, 31, 6, 5)
SAMPLE = Path(__file__).resolve().parents[1] / "data/metaworld_sample"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fixture.write_dataset(tmp_path_factory.mktemp("dataset") / "tiny", LENGTHS, gop=12, b_frames=2)


@pytest.fixture
def copy(root: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(root, tmp_path / "tiny"))


def config(root: Path, **changes: object) -> DataConfig:
    return replace(DataConfig(root=str(root), executed_action="action.executed", validation_fraction=0.5), **changes)


@pytest.mark.parametrize("cache", ["memory", "none"])
def test_windows_hold_what_they_say(root: Path, cache: str) -> None:
    data = config(root, cache=cache)
    dataset = WindowDataset(data, TIMELINE, "train", None, SIZE)
    assert dataset.episodes == [0, 1, 2, 3] and dataset.too_short == []
    assert len(dataset) == sum(length - 8 for length in LENGTHS[:4])
    normalizer = dataset.fit_normalizer()
    normal = WindowDataset(data, TIMELINE, "train", normalizer, SIZE)
    for index in range(0, len(dataset), 7):
        sample, length = dataset[index], LENGTHS[dataset[index]["episode"]]
        rows, columns = window_indices(length, sample["start"], TIMELINE), fixture.columns(sample["episode"], length)
        first = dataset.lerobot.episodes[sample["episode"]].videos[fixture.CAMERA].first_frame
        assert [fixture.read_stamp(frame) for frame in sample["frames"]] == (first + rows.frames).tolist()
        for key, column, indices in (
            ("state", "observation.state", rows.state),
            ("action", "action", rows.action),
            ("executed", "action.executed", rows.action),
        ):
            np.testing.assert_array_equal(sample[key], columns[column][indices])
            np.testing.assert_array_equal(normal[index][key], normalizer.normalize("state" if key == "state" else "action", columns[column][indices]))
        for key in ("frames", "state", "action"):
            np.testing.assert_array_equal(sample[f"{key}_is_pad"], getattr(rows, f"{key}_is_pad"))
        assert sample["instruction"] == fixture.TASKS[sample["episode"] % 2]


def test_both_caches_give_the_same_batches(root: Path) -> None:
    batches = [collate([WindowDataset(config(root, cache=cache), TIMELINE, "train", None, SIZE)[i] for i in (0, 30, 70)]) for cache in ("memory", "none")]
    for key, value in batches[0].items():
        assert value == batches[1][key] if isinstance(value, list) else torch.equal(value, batches[1][key]), key
    assert batches[0]["frames"].shape == (3, TIMELINE.frames, *SIZE, 3) and batches[0]["frames"].dtype == torch.uint8
    assert batches[0]["state"].shape == (3, 3, 4) and batches[0]["action"].shape == batches[0]["executed"].shape == (3, 24, 4)


def test_validation_leaves_out_short_episodes_and_says_so(root: Path) -> None:
    dataset = WindowDataset(config(root), TIMELINE, "validation", None, SIZE)
    assert dataset.episodes == [4, 5] and dataset.too_short == [6, 7]
    view = dataset.episode(5)
    assert [fixture.read_stamp(frame) for frame in view.frames] == [LENGTHS[3] + LENGTHS[4] + t for t in range(LENGTHS[5])]
    np.testing.assert_array_equal(view.executed, fixture.columns(5, LENGTHS[5])["action.executed"])
    assert view.instruction == fixture.TASKS[1] and len(view.state) == len(view.action) == LENGTHS[5]
    with pytest.raises(ValueError, match="episode 0 is not in this split"):
        dataset.episode(0)
    assert WindowDataset(config(root, executed_action=None), TIMELINE, "train", None, SIZE)[3]["executed"] is not None


def test_frames_of_another_size_are_resized(root: Path) -> None:
    frames = [WindowDataset(config(root, cache=cache), TIMELINE, "train", None, (32, 48))[40]["frames"] for cache in ("memory", "none")]
    assert frames[0].shape == (TIMELINE.frames, 32, 48, 3)
    np.testing.assert_array_equal(*frames)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cameras": ("observation.images.corner",)}, "did you mean 'observation.images.corner4'"),
        ({"cameras": ("action",)}, "a camera has dtype 'video'"),
        ({"state": "observation.stat"}, "did you mean 'observation.state'"),
        ({"action": fixture.CAMERA}, r"shape \(64, 64, 3\); a state or action is a vector"),
        ({"executed_action": "frame_index"}, "'frame_index' has 1 dimensions, data.action 'action' has 4"),
        ({"validation_fraction": 0.0}, "no validation episodes: 8 episodes of 2 tasks"),
    ],
)
def test_configs_that_do_not_fit(root: Path, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WindowDataset(config(root, **changes), TIMELINE, "validation", None, SIZE)


def test_normalizer_is_fitted_on_the_split_and_set_later(root: Path) -> None:
    data = config(root, cache="none")
    dataset = WindowDataset(data, TIMELINE, "train")
    physical = dataset.mean_action()
    rows = np.concatenate([fixture.columns(e, LENGTHS[e])["action"] for e in dataset.episodes])
    np.testing.assert_allclose(physical, rows.mean(axis=0), atol=1e-6)
    normalizer = dataset.fit_normalizer()
    assert normalizer == Normalizer.fit(
        {"state": np.concatenate([fixture.columns(e, LENGTHS[e])["observation.state"] for e in dataset.episodes]), "action": rows}
    )
    dataset.normalizer = normalizer
    np.testing.assert_array_equal(dataset[5]["action"], WindowDataset(data, TIMELINE, "train", normalizer)[5]["action"])
    np.testing.assert_array_equal(dataset.episode(0).action, rows[: LENGTHS[0]])  # whole episodes stay in physical units
    with pytest.raises(ValueError, match=r"action has shape \(129, 1\); its statistics have 4 dimensions"):
        WindowDataset(config(root, action="frame_index", executed_action=None), TIMELINE, "train", normalizer)


def test_what_a_checkpoint_says_about_its_data(root: Path) -> None:
    dataset = WindowDataset(config(root, cache="none"), TIMELINE, "train")
    assert dataset.fps == fixture.FPS and dataset.instructions == sorted(fixture.TASKS) and dataset.image_size == SIZE
    assert json.loads(json.dumps(dataset.source)) == {"root": str(root), "episodes": 4, "frames": 129, "fps": 10.0, "recorded": None}


def test_all_episodes_too_short(root: Path) -> None:
    timeline = TimelineConfig(actions_per_block=48, frame_stride=12)
    with pytest.raises(ValueError, match=r"48 \+ 1 = 49 rows, but the longest of 4 episodes has 40 rows"):
        WindowDataset(config(root), timeline, "train", None, SIZE)


@pytest.mark.parametrize("cache", ["memory", "none"])
def test_broken_video_is_found_before_training(copy: Path, cache: str) -> None:
    video = copy / f"videos/{fixture.CAMERA}/chunk-000/file-001.mp4"
    fixture.truncate(video)
    with pytest.raises(VideoError, match=r"file-001.mp4: the file is truncated"):
        WindowDataset(config(copy, cache=cache), TIMELINE, "train", None, SIZE)
    fixture.write_video(video, list(range(10)))
    with pytest.raises(VideoError, match=r"file-001.mp4: asked for frame \d+, but the file has 10 frames"):
        dataset = WindowDataset(config(copy, cache=cache), TIMELINE, "train", None, SIZE)
        dataset[len(dataset) - 1]


def test_sampler_is_a_function_of_seed_and_step() -> None:
    sampler = WindowSampler(10, 4, seed=3)
    row = np.concatenate([sampler.indices(step) for step in range(15)])
    for epoch in range(6):
        assert sorted(row[10 * epoch : 10 * epoch + 10]) == list(range(10)), "every window once an epoch"
    assert not np.array_equal(row[:10], row[10:20])
    for step in (14, 0, 7):
        np.testing.assert_array_equal(WindowSampler(10, 4, seed=3).indices(step), row[4 * step : 4 * step + 4])
    assert not np.array_equal(WindowSampler(10, 4, seed=4).indices(0), row[:4])
    assert sorted(WindowSampler(3, 7, seed=0).indices(0)[:6]) == [0, 0, 1, 1, 2, 2], "a batch may be larger than the data"
    for arguments in ((0, 4, 0), (5, 0, 0), (5, 4, -1)):
        with pytest.raises(ValueError, match="expected at least"):
            WindowSampler(*arguments)


@pytest.mark.parametrize("cache", ["memory", "none"])
def test_loader_resumes_at_any_step_with_any_workers(root: Path, cache: str) -> None:
    dataset = WindowDataset(config(root, cache=cache), TIMELINE, "train", None, SIZE)
    dataset[0]  # opens a reader here, which workers must not touch
    sampler = WindowSampler(len(dataset), 4, seed=1)
    before = torch.get_rng_state()
    runs = [list(islice(make_loader(dataset, sampler, workers, start), 5 - start)) for workers, start in ((0, 0), (2, 0), (0, 3), (2, 3))]
    assert torch.equal(before, torch.get_rng_state()), "torch's global stream is left alone"
    for run in runs[1:]:
        for batch, wanted in zip(run, runs[0][-len(run) :], strict=True):
            for key, value in wanted.items():
                assert value == batch[key] if isinstance(value, list) else torch.equal(value, batch[key]), key


@pytest.mark.skipif(not (SAMPLE / "meta/info.json").is_file(), reason="the Meta-World sample is not in this checkout")
def test_the_metaworld_sample() -> None:
    data = DataConfig(root=str(SAMPLE), executed_action="action.executed")
    dataset = WindowDataset(data, TIMELINE, "train", None, SIZE)
    dataset.normalizer = dataset.fit_normalizer()
    sample = dataset[len(dataset) // 2]
    assert sample["frames"].std() > 10 and np.isfinite(sample["action"]).all() and np.abs(sample["action"]).max() <= 1.5
    assert not dataset.decoder.counts.fallbacks, "the sample is H.264"
    lazy = WindowDataset(replace(data, cache="none"), TIMELINE, "train", None, SIZE)
    np.testing.assert_array_equal(lazy[len(lazy) // 2]["frames"], sample["frames"])
