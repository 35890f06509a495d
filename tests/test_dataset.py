"""Windows hold the frames, states and actions they say; the order of training is a pure function of seed and step."""

import json
import shutil
from dataclasses import replace
from itertools import islice
from pathlib import Path

import lerobot_fixture as fixture
import numpy as np
import pandas as pd
import pytest
import torch

from wam.config import DataConfig, EmbodimentConfig, GroupConfig, TimelineConfig
from wam.data.dataset import Draw, WindowDataset, collate
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


# ------------------------------------------------------------------------------------------------ instructions, rates, robots


def with_language(root: Path, copy: Path) -> Path:
    """Episodes of two halves under two instructions, in two wordings, of which the second is sometimes empty."""
    shutil.copytree(root, copy)
    info = json.loads((copy / "meta/info.json").read_text())
    info["features"] |= {key: {"dtype": "string", "shape": [1], "names": None} for key in ("language_instruction", "language_instruction_2")}
    (copy / "meta/info.json").write_text(json.dumps(info))
    for path in copy.glob("data/*/*.parquet"):
        rows = pd.read_parquet(path)
        half = np.where(rows["frame_index"] < 13, "reach", "grasp")
        rows["language_instruction"], rows["language_instruction_2"] = half, np.where(half == "reach", "go there", "")
        rows.to_parquet(path, index=False)
    return copy


def test_windows_inside_one_instruction(root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = config(with_language(root, tmp_path / "spoken"), cache="none", spans="language", language=("language_instruction", "language_instruction_2"), wording="any")
    dataset = WindowDataset(data, TIMELINE, "train", None, SIZE)
    assert len(dataset) == sum(13 - 8 + max(0, length - 13 - 8) for length in LENGTHS[:4]) and dataset.instructions == ["go there", "grasp", "reach"]
    assert not caplog.records
    WindowDataset(replace(data, short="pad"), TIMELINE, "validation", None, SIZE)
    assert "2 of 6 spans" in caplog.text and "are padded: rows 0..5 of episode 6, rows 0..4 of episode 7" in caplog.text
    for index in range(0, len(dataset), 3):
        sample, plain = dataset[Draw(index, 0, 0)], dataset[index]
        stop = 13 if sample["start"] < 13 else LENGTHS[sample["episode"]]
        assert plain["instruction"] == ("reach" if stop == 13 else "grasp")
        assert sample["instruction"] in (("reach", "go there") if stop == 13 else ("grasp",))
        assert sample["frames_is_pad"].tolist() == [sample["start"] + 2 * i >= stop for i in range(13)]
    drawn = [dataset[Draw(0, epoch, 0)]["instruction"] for epoch in range(40)]
    assert 8 < drawn.count("reach") < 32 and drawn == [dataset[Draw(0, epoch, 0)]["instruction"] for epoch in range(40)]


def test_a_dataset_of_another_rate(root: Path) -> None:
    data = config(root, control_hz=5.0, action_kinds=("delta", "target", "velocity", "target"))
    timeline = TimelineConfig(latents_per_block=1, actions_per_block=4, frame_stride=1)
    dataset = WindowDataset(data, timeline, "train", None, SIZE)
    assert dataset.fps == 5.0 and dataset.lerobot.fps == 10.0
    sample = dataset[20]
    episode, start = sample["episode"], sample["start"]
    first = dataset.lerobot.episodes[episode].videos[fixture.CAMERA].first_frame
    columns, rows = fixture.columns(episode, LENGTHS[episode]), np.minimum(start + 2 * np.arange(13), LENGTHS[episode] - 1)
    assert [fixture.read_stamp(frame) for frame in sample["frames"]] == (first + rows).tolist()
    np.testing.assert_array_equal(sample["state"], columns["observation.state"][rows[:12:4]])
    action = columns["action"]
    for step in np.flatnonzero(~sample["action_is_pad"]):
        now, then = action[start + 2 * step], action[start + 2 * step + 1]
        np.testing.assert_allclose(sample["action"][step], [now[0] + then[0], now[1], (now[2] + then[2]) / 2, now[3]], rtol=1e-5)
    dataset.normalizer = dataset.fit_normalizer()
    stacked = np.concatenate([sample["action"][~sample["action_is_pad"]] for sample in (dataset[i] for i in range(len(dataset)))])
    assert (np.quantile(stacked, 0.995, axis=0) < 1.2).all() and (np.quantile(stacked, 0.98, axis=0) > 0.8).all(), "statistics are those of the control steps"
    view = dataset.episode(1)
    assert len(view.frames) == len(view.action) == 13 and [fixture.read_stamp(f) for f in view.frames[:3]] == [LENGTHS[0], LENGTHS[0] + 2, LENGTHS[0] + 4]
    with pytest.raises(ValueError, match=r"data.action_kinds lists 0"):
        WindowDataset(replace(data, action_kinds=()), timeline, "train", None, SIZE)


def test_relative_actions_are_encoded_at_each_block_and_decoded_again(root: Path) -> None:
    groups = [GroupConfig("arm", 3), GroupConfig("grip", 1, start=3)]
    robot = EmbodimentConfig(state_groups=tuple(groups), action_groups=(replace(groups[0], relative_to="arm"), groups[1]))
    dataset = WindowDataset(config(root, cache="none"), TIMELINE, "train", None, SIZE, robot)
    dataset.normalizer = normalizer = dataset.fit_normalizer()
    plain = WindowDataset(config(root, cache="none"), TIMELINE, "train", None, SIZE)
    for index in (0, 11, 60):
        sample, raw = dataset[index], plain[index]
        blocks = normalizer.unnormalize("action", sample["executed"]).reshape(3, 8, 4)
        decoded = dataset.units.decode_actions(blocks, raw["state"]).reshape(24, 4)
        real = ~sample["action_is_pad"]
        inside = (np.abs(sample["executed"]) < normalizer.clip).all(axis=1)
        assert inside[real].mean() > 0.9
        np.testing.assert_allclose(decoded[real & inside], raw["executed"][real & inside], atol=1e-5)
    assert np.abs(dataset.mean_action()).max() < 0.5


def test_video_alone_and_actions_alone(root: Path) -> None:
    video = WindowDataset(config(root, contents="video", state="nothing", action="neither", executed_action=None), TIMELINE, "train", None, SIZE)
    action = WindowDataset(config(root, contents="action", cameras=("nowhere",)), TIMELINE, "train", None, SIZE)
    batch = collate([video[5], action[5], WindowDataset(config(root), TIMELINE, "train", None, SIZE)[5]])
    assert batch["has_video"].tolist() == [True, False, True] and batch["has_action"].tolist() == [False, True, True]
    assert batch["action"].shape == (3, 24, 4) and not batch["action"][0].any() and batch["action_is_pad"][0].all()
    assert torch.equal(batch["frames"][0], batch["frames"][2]) and not batch["frames"][1].any() and batch["frames_is_pad"][1].all()
    assert torch.equal(batch["action"][1], batch["action"][2]) and torch.equal(batch["state"][1], batch["state"][2])
    with pytest.raises(ValueError, match="has video alone"):
        video.fit_normalizer()


# ------------------------------------------------------------------------------------------------ broken files


@pytest.mark.parametrize("cache", ["memory", "none"])
def test_broken_files_are_left_out_after_a_count(copy: Path, cache: str, caplog: pytest.LogCaptureFixture) -> None:
    whole = WindowDataset(config(copy, cache=cache), TIMELINE, "train", None, SIZE)
    data = config(copy, cache=cache, broken="skip", max_broken=0.5)
    assert WindowDataset(data, TIMELINE, "train", None, SIZE).broken == {} and not caplog.records
    fixture.truncate(copy / f"videos/{fixture.CAMERA}/chunk-000/file-001.mp4")
    dataset = WindowDataset(data, TIMELINE, "train", None, SIZE)
    assert dataset.episodes == [0, 1, 2] and list(dataset.broken) == [3] and dataset.source["broken"] == 1
    assert "1 of 4 train episodes" in caplog.text and "file-001.mp4: the file is truncated" in caplog.text
    for index in range(0, len(dataset), 9):
        np.testing.assert_array_equal(dataset[index]["frames"], whole[index]["frames"])
        np.testing.assert_array_equal(dataset[index]["action"], whole[index]["action"])
    with pytest.raises(ValueError, match=r"1 of 4 train episodes .* broken \(3\), more than data.max_broken 0.1 of them"):
        WindowDataset(replace(data, max_broken=0.1), TIMELINE, "train", None, SIZE)
    with pytest.raises(VideoError, match=r"file-001.mp4: the file is truncated"):
        WindowDataset(replace(data, broken="refuse"), TIMELINE, "train", None, SIZE)


def test_rows_that_are_no_numbers_are_left_out_too(copy: Path) -> None:
    path = copy / "data/chunk-000/file-000.parquet"
    rows = pd.read_parquet(path)
    rows.at[40, "action"] = np.full(4, np.inf, np.float32)  # row 10 of episode 1
    rows.to_parquet(path, index=False)
    with pytest.raises(ValueError, match="action of episode 1 is inf at row 10"):
        WindowDataset(config(copy, cache="none"), TIMELINE, "train", None, SIZE)
    dataset = WindowDataset(config(copy, cache="none", broken="skip", max_broken=0.25), TIMELINE, "train", None, SIZE)
    assert dataset.episodes == [0, 2, 3] and "action of episode 1 is inf" in dataset.broken[1]


def test_a_frame_that_fails_later_names_its_file(copy: Path) -> None:
    dataset = WindowDataset(config(copy, cache="none"), TIMELINE, "train", None, SIZE)
    dataset[0]
    (copy / f"videos/{fixture.CAMERA}/chunk-000/file-001.mp4").unlink()
    with pytest.raises(VideoError, match=r"no video file .*file-001.mp4"):
        dataset[len(dataset) - 1]


@pytest.mark.parametrize("decoder", ["decord", "pyav"])
def test_a_decoder_is_chosen(root: Path, decoder: str) -> None:
    dataset = WindowDataset(config(root, cache="none", decoder=decoder), TIMELINE, "train", None, SIZE)
    dataset[0]
    assert {name for name in ("decord", "pyav", "torchcodec") if getattr(dataset.decoder.counts, name)} == {decoder}
