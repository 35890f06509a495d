"""Several cameras on one canvas, looks that are the same over a window, and samples that depend on nothing but seed, epoch and index."""

import colorsys
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
from tiny import tiny_config, tiny_model

from wam.config import ConfigError, DataConfig, TimelineConfig, load_config
from wam.config_data import AugmentConfig
from wam.data.dataset import Draw, WindowDataset
from wam.data.sampler import WindowSampler, make_loader, rows_of_rank
from wam.data.video import resize_frames
from wam.data.views import PLAIN, Canvas, change_colours, colour_matrix, compose, draw_look
from wam.evaluation.environments import StepResult
from wam.evaluation.seen import seen_through
from wam.evaluation.vector import Observations
from wam.inference.session import Session
from wam.pretrained import from_pretrained
from wam.timeline import Kind
from wam.training.loop import train

TIMELINE = TimelineConfig()
WRIST, LEFT, RIGHT = (np.full((2, 8, 12, 3), value, np.uint8) for value in (50, 100, 200))
STRONG = AugmentConfig(crop=0.8, brightness=0.3, contrast=0.4, saturation=0.5, hue=0.08, view_dropout=0.5)


@pytest.mark.parametrize(
    ("layout", "cells"),
    [
        ("width", [[50, 100, 200]]),
        ("height", [[50], [100], [200]]),
        ("grid", [[50, 100], [200, 0]]),
        ("t", [[50, 50], [100, 200]]),
    ],
)
def test_cameras_go_where_the_layout_says(layout: str, cells: list) -> None:
    size = (8 * len(cells), 12 * len(cells[0]))
    canvas = compose({"wrist": WRIST, "left": LEFT, "right": RIGHT}, layout, size)
    assert canvas.shape == (2, *size, 3) and canvas.dtype == np.uint8
    np.testing.assert_array_equal(canvas[0, :, :, 0], np.kron(np.array(cells), np.ones((8, 12), np.uint8)))


def test_the_wide_camera_of_t_has_every_column_twice() -> None:
    wrist = np.random.default_rng(0).integers(0, 255, (2, 8, 12, 3), dtype=np.uint8)
    canvas = compose({"wrist": wrist, "left": LEFT, "right": RIGHT}, "t", (16, 24))
    np.testing.assert_array_equal(canvas[:, :8], np.repeat(wrist, 2, axis=2))  # DreamZero's DROID canvas
    separate = compose({"wrist": wrist, "left": LEFT, "right": RIGHT}, "separate", (8, 12))
    np.testing.assert_array_equal(separate, np.stack([wrist, LEFT, RIGHT]))
    assert compose({"wrist": wrist}, "single", (4, 6)).shape == (2, 4, 6, 3)


def test_canvases_that_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"'t' with 3 cameras is 15 high, which 2 cells do not divide; use codec.image_size with a multiple of 2"):
        Canvas("t", 3, (15, 24))
    with pytest.raises(ValueError, match="2 cameras for a canvas of 3"):
        Canvas("t", 3, (16, 24)).compose([WRIST, LEFT])
    with pytest.raises(ValueError, match=r"shape \(2, 8, 12, 3\) and type float32; expected uint8"):
        Canvas("width", 2, (16, 24)).compose([WRIST, LEFT.astype(np.float32)])
    for changes, message in (
        ({"cameras": ("a", "b")}, "lists 2 cameras, and data.layout is 'single'; it takes 1; layouts for several: width"),
        ({"cameras": ("a", "b"), "layout": "t"}, "it takes 3"),
        ({"cameras": ("a", "a"), "layout": "width"}, "name each camera once"),
        ({"augment": AugmentConfig(view_dropout=0.5)}, "view_dropout is 0.5, and there is one camera"),
    ):
        with pytest.raises(ValueError, match=message):
            DataConfig(**changes)


def test_configs_whose_canvas_does_not_fit_the_network() -> None:
    cameras = "data.cameras=[a, b, c]"
    assert load_config(None, [cameras, "data.layout=t", "codec.image_size=[64, 128]"]).data.layout == "t"
    with pytest.raises(ConfigError, match=r"layout is 'separate' of 3 cameras, which makes 3 views, but codec.views is 1; set codec.views=3"):
        load_config(None, [cameras, "data.layout=separate"])
    with pytest.raises(ConfigError, match=r"which makes 1 views, but codec.views is 2; set codec.views=1"):
        load_config(None, ["codec.image_size=[64, 128]", "codec.views=2"])
    with pytest.raises(ConfigError, match=r"codec.views is 3, but codec.image_size is 64 wide"):
        load_config(None, [cameras, "data.layout=separate", "codec.views=3"])
    with pytest.raises(ConfigError, match=r"a view is 3 latents wide .*, which model.patch \[1, 2, 2\] does not divide"):
        load_config(None, ["data.cameras=[a, b]", "data.layout=separate", "codec.views=2", "codec.image_size=[64, 48]"])
    with pytest.raises(ConfigError, match=r"'width' of 3 cameras has 3 cells along the width, which codec.image_size \[64, 64\] is no multiple of"):
        load_config(None, [cameras, "data.layout=width"])


class OneCamera:
    """What `rollout` asks of environments."""

    name, closed = "fake/robot", False

    def __enter__(self) -> "OneCamera":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self.closed = True

    def reset(self, seeds: list[int]) -> Observations:
        return Observations(np.stack([WRIST[:1]] * len(seeds)) + np.arange(12, dtype=np.uint8)[:, None], np.zeros((len(seeds), 2), np.float32))

    def run(self, actions: np.ndarray, rows: list[int], frame_stride: int) -> list[StepResult]:
        return [StepResult(LEFT, *(np.zeros(2),) * 2, np.zeros(2, bool), False)]


def test_an_environment_is_seen_as_in_training() -> None:
    canvas, env = Canvas("single", 1, (8, 12), crop=0.5), OneCamera()
    assert seen_through(replace(canvas, crop=1.0), env) is env
    with seen_through(canvas, env) as seen:
        first, (result,) = seen.reset([1, 2]).frames, seen.run(np.zeros((1, 2)), [0], 1)
        assert seen.name == "fake/robot" and result.frames.shape == (2, 8, 12, 3)
        assert first.shape == (2, 1, 8, 12, 3)
        np.testing.assert_array_equal(first[0], canvas.compose([env.reset([1]).frames[0]]))
        assert first.min() > 52 and first.max() < 59, "the middle half"
    with pytest.raises(ValueError, match=r"sees 3 cameras on one canvas \(t\), and fake/robot shows one; drive your robot through"):
        seen_through(Canvas("t", 3, (64, 128)), env)
    assert env.closed
    two = OneCamera()
    two.cameras = ("left", "right")  # side by side in one frame
    seen = seen_through(Canvas("height", 2, (8, 6)), two)
    frame = two.reset([1]).frames[0, 0]
    high, wide = frame.shape[0], frame.shape[1] // 2
    assert seen.reset([1]).frames.shape == (1, 1, 8, 6, 3)
    np.testing.assert_array_equal(seen.reset([1]).frames[0], Canvas("height", 2, (8, 6)).compose([frame[None, :, :wide], frame[None, :, wide:]]))
    assert high and seen.run(np.zeros((1, 2)), [0], 1)[0].frames.shape == (2, 8, 6, 3)


# ------------------------------------------------------------------------------------------------ looks


def test_crops_are_the_same_cut_in_all_frames_and_cameras() -> None:
    canvas = Canvas("width", 2, (16, 48), crop=0.8)
    assert canvas.stored == (20, 30)
    stored = np.random.default_rng(0).integers(0, 255, (3, *canvas.stored, 3), dtype=np.uint8)
    rng, seen = np.random.default_rng(1), set()
    for _ in range(60):
        look = draw_look(AugmentConfig(crop=0.8), 2, rng)
        out = canvas.place([stored, stored], look)
        np.testing.assert_array_equal(out[:, :, :24], out[:, :, 24:])
        where = [(y, x) for y in range(5) for x in range(7) if np.array_equal(out[:, :, :24], stored[:, y : y + 16, x : x + 24])]
        assert len(where) == 1 and look.colours is None and look.dropped is None
        seen |= set(where)
    assert {y for y, _ in seen} == set(range(5)) and {x for _, x in seen} == set(range(7)), "every place in the margin"
    np.testing.assert_array_equal(canvas.place([stored, stored])[:, :, :24], stored[:, 2:18, 3:27])  # the middle, where nothing is drawn


def test_colours_are_brightness_contrast_saturation_and_hue() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (2, 4, 5, 3), dtype=np.uint8)
    x, grey = frames.astype(float), frames.astype(float) @ [0.299, 0.587, 0.114]
    for matrix, wanted in (
        (colour_matrix(1, 1, 1, 0), x),
        (colour_matrix(1.3, 1, 1, 0), 1.3 * x),
        (colour_matrix(1, 0.5, 1, 0), 127.5 + 0.5 * (x - 127.5)),
        (colour_matrix(1, 1, 0.4, 0), 0.4 * x + 0.6 * grey[..., None]),
    ):
        assert np.abs(change_colours(frames, matrix) - wanted.clip(0, 255)).max() <= 0.51
    turned = change_colours(np.array([[[[160, 110, 110]]]], np.uint8), colour_matrix(1, 1, 1, 2 * np.pi / 3))[0, 0, 0] / 255
    assert abs(colorsys.rgb_to_hsv(*turned)[0] - 1 / 3) < 0.06, "red, a third of the circle on, is green"
    assert np.abs(turned @ [0.299, 0.587, 0.114] - np.array([160, 110, 110]) @ [0.299, 0.587, 0.114] / 255) < 0.01, "and as bright"
    greys = np.full((1, 2, 2, 3), 90, np.uint8)
    np.testing.assert_array_equal(change_colours(greys, colour_matrix(1, 1, 0.3, 1.0)), greys)


def test_one_of_the_cameras_after_the_first_goes_black() -> None:
    canvas, rng = Canvas("t", 3, (16, 24)), np.random.default_rng(0)
    seen = [canvas.place([WRIST, LEFT, RIGHT], draw_look(AugmentConfig(view_dropout=0.5), 3, rng))[0, [0, -1, -1], [0, 0, -1], 0].tolist() for _ in range(300)]
    counts = {state: seen.count(list(state)) for state in ((50, 100, 200), (50, 0, 200), (50, 100, 0))}
    assert sum(counts.values()) == 300, "never the first, never two"
    assert 110 < counts[50, 100, 200] < 190 and min(counts.values()) > 45
    colour = replace(draw_look(STRONG, 3, rng), dropped=2)
    assert (canvas.place([WRIST, LEFT, RIGHT], colour)[:, 8:, 12:] == 0).all(), "black stays black"


# ------------------------------------------------------------------------------------------------ datasets


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three cameras: the fixture's, and two more whose stamps count from 1000 and 2000."""
    root = fixture.write_dataset(tmp_path_factory.mktemp("views") / "tiny", (30, 26, 40, 33, 28, 31))
    videos = root / "videos"
    info = json.loads((root / "meta/info.json").read_text())
    changes = {}
    for name, first in (("left", 1000), ("right", 2000)):
        camera = f"observation.images.{name}"
        shutil.copytree(videos / fixture.CAMERA, videos / camera)
        for number, path in enumerate(sorted((videos / camera).glob("*/*.mp4"))):
            length = sum((30, 26, 40, 33, 28, 31)[3 * number : 3 * number + 3])
            fixture.write_video(path, list(range(first, first + length)))
        info["features"][camera] = info["features"][fixture.CAMERA]
        changes |= {f"videos/{camera}/{key}": None for key in ("chunk_index", "file_index", "from_timestamp", "to_timestamp")}
    table = root / "meta/episodes/chunk-000/file-000.parquet"
    rows = pd.read_parquet(table)
    for key in changes:
        rows[key] = rows[f"videos/{fixture.CAMERA}/{key.rpartition('/')[2]}"]
    rows.to_parquet(table, index=False)
    fixture.edit_info(root, features=info["features"])
    return root


def config(root: Path, **changes: object) -> DataConfig:
    cameras = (fixture.CAMERA, "observation.images.left", "observation.images.right")
    return replace(DataConfig(root=str(root), cameras=cameras, layout="t", validation_fraction=0.4), **changes)


@pytest.mark.parametrize("cache", ["memory", "none"])
def test_a_window_of_three_cameras(root: Path, cache: str) -> None:
    data = WindowDataset(config(root, cache=cache), TIMELINE, "train")
    assert data.image_size == (128, 128)
    sample = data[40]
    frame = sample["frames"][3]
    number = fixture.read_stamp(frame[:64, ::2])
    assert [fixture.read_stamp(frame[64:, :64]), fixture.read_stamp(frame[64:, 64:])] == [number + 1000, number + 2000], "all of one moment"
    separate = WindowDataset(config(root, cache=cache, layout="separate"), TIMELINE, "train")
    assert separate[40]["frames"].shape == (3, TIMELINE.frames, 64, 64, 3)
    np.testing.assert_array_equal(Canvas("t", 3, (128, 128)).place(list(separate[40]["frames"])), sample["frames"])
    view = data.episode(data.episodes[1])
    assert fixture.read_stamp(view.frames[5][64:, 64:]) == fixture.read_stamp(view.frames[0][64:, 64:]) + 5


def test_cameras_that_stay_separate_come_to_the_network_side_by_side(root: Path) -> None:
    apart = WindowDataset(config(root, layout="separate"), TIMELINE, "train")[40]["frames"]
    together = WindowDataset(config(root, layout="separate"), TIMELINE, "train", image_size=(64, 192))[40]["frames"]
    np.testing.assert_array_equal(together, np.concatenate(list(apart), axis=2))


def test_a_network_tells_views_apart_by_an_index_alone() -> None:
    model = tiny_model(tiny_config("data.cameras=[a, b]", "data.layout=separate", "codec.views=2", "codec.image_size=[32, 64]"))
    rows, columns = model.clock.grid
    placed = model.clock.segment(Kind.H, -1).positions.view(rows, 2, columns // 2, 4)
    assert torch.equal(placed[:, 0], placed[:, 1]), "each view counts its columns from 0"
    latents = torch.randn(2, 6, 3, *model.latent_size)
    tokens = model.embed_video(latents, None).view(2, 3, rows, 2, columns // 2, -1)
    swapped = model.embed_video(torch.cat(latents.chunk(2, dim=-1)[::-1], dim=-1), None).view(tokens.shape)
    difference = model.view_table[1] - model.view_table[0]
    torch.testing.assert_close(tokens[:, :, :, 1], swapped[:, :, :, 0] + difference)
    torch.testing.assert_close(tokens[:, :, :, 0], swapped[:, :, :, 1] - difference)


def test_a_policy_of_separate_cameras_trains_and_drives(root: Path, tmp_path: Path) -> None:
    cameras = json.dumps([fixture.CAMERA, "observation.images.left", "observation.images.right"])
    data = (f"data.root={root}", f"data.cameras={cameras}", "data.layout=separate", "data.validation_fraction=0.4", "codec.views=3", "codec.image_size=[32, 96]", "codec.fit_frames=64")
    quick = ("training.steps=2", "training.batch_size=2", "training.warmup_steps=1", "training.validate_every=5", "training.validation_batches=1", "training.validation_samples=2", "timeline.blocks=2")
    policy = from_pretrained(train(tiny_config(*data, *quick), tmp_path / "run"))
    assert policy.model.view_table.shape == (3, policy.model.backbone.width)
    session = Session(policy, ["open the drawer"], "metaworld", [1])
    session.observe(Canvas.of(policy.config.data, policy.config.codec.image_size).compose([np.full((1, 40, 40, 3), v, np.uint8) for v in (20, 90, 200)])[None], np.zeros((1, 4), np.float32))
    plan = session.plan("joint")
    assert plan.imagined is not None and plan.imagined.shape[-1] == 12 and plan.actions is not None and np.isfinite(plan.actions).all()


def test_a_policy_composes_what_it_was_trained_on(root: Path) -> None:
    data = WindowDataset(config(root, augment=AugmentConfig(crop=0.8)), TIMELINE, "validation", image_size=(96, 160))
    sample, episode = data[0], data.lerobot.episodes[data.episodes[0]]
    spans = [episode.videos[camera] for camera in data.data.cameras]
    cameras = {camera: data.decoder.read_frames(span.path, span.first_frame + data.rows(0).frames) for camera, span in zip(data.data.cameras, spans, strict=True)}
    np.testing.assert_array_equal(compose(cameras, "t", (96, 160), crop=0.8), sample["frames"])


@pytest.mark.parametrize("cache", ["memory", "none"])
def test_the_same_batches_from_any_workers_and_processes_with_augmentation(root: Path, cache: str) -> None:
    dataset = WindowDataset(config(root, cache=cache, augment=STRONG), TIMELINE, "train", image_size=(32, 48))
    sampler = WindowSampler(len(dataset), 4, seed=1)
    steps = -(-len(dataset) // 4) + 1  # into the second epoch
    first, several = steps - 3, (0, 2) if cache == "none" else (0,)
    whole = list(islice(make_loader(dataset, sampler, 0, first), 3))
    for workers in several:
        halves = [list(islice(make_loader(dataset, sampler, workers, first + 1, rank, 2), 2)) for rank in range(2)]
        for batch, *parts in zip(whole[1:], *halves, strict=True):
            for key, value in batch.items():
                both = [part[key] for part in parts]
                assert value == both[0] + both[1] if isinstance(value, list) else torch.equal(value, torch.cat(both)), key
    with pytest.raises(ValueError, match="a batch of 4 cannot be divided among 3 processes; use a multiple of 3"):
        rows_of_rank(4, 0, 3)


def test_samples_are_functions_of_seed_epoch_and_index(root: Path) -> None:
    dataset = WindowDataset(config(root, augment=STRONG), TIMELINE, "train", image_size=(32, 48))
    draws = [Draw(7, 0, 3), Draw(7, 1, 3), Draw(8, 0, 3), Draw(7, 0, 4)]
    seen = [dataset[draw]["frames"] for draw in draws]
    assert all(not np.array_equal(seen[0], other) for other in seen[1:]), "another epoch, window or seed looks otherwise"
    again = WindowDataset(config(root, augment=STRONG, cache="none"), TIMELINE, "train", image_size=(32, 48))
    for draw, frames in reversed(list(zip(draws, seen, strict=True))):
        np.testing.assert_array_equal(again[draw]["frames"], frames)
    plain = WindowDataset(config(root, augment=AugmentConfig(crop=STRONG.crop)), TIMELINE, "train", image_size=(32, 48))
    np.testing.assert_array_equal(dataset[7]["frames"], plain[7]["frames"])  # an index alone asks for what was recorded
    held_out = [WindowDataset(config(root, augment=a), TIMELINE, "validation", image_size=(32, 48)) for a in (STRONG, AugmentConfig(crop=STRONG.crop))]
    np.testing.assert_array_equal(held_out[0][Draw(3, 5, 1)]["frames"], held_out[1][3]["frames"])  # nor is validation augmented


def test_resizing_uint8_is_bilinear_to_a_level() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (3, 24, 36, 3), dtype=np.uint8)
    for size in ((12, 18), (30, 50), (24, 36)):
        exact = torch.nn.functional.interpolate(torch.from_numpy(frames).permute(0, 3, 1, 2).double(), size=size, mode="bilinear", antialias=True)
        assert np.abs(resize_frames(frames, size) - exact.permute(0, 2, 3, 1).numpy()).max() <= 1.01
    assert PLAIN.at == (0.5, 0.5)
