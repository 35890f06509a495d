"""Encoded windows on disk: what is read is what would have been encoded, and what is not whole or not the same is refused."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import lerobot_fixture as fixture
import numpy as np
import pytest
import torch
from safetensors.torch import load
from tiny import tiny_codec, tiny_config
from tiny_wan import wan_config, write_pipeline

from wam.cli import main
from wam.config import Config
from wam.data.dataset import WindowDataset, collate
from wam.data.latents import LatentError, cache_of, content_of, use_latents
from wam.data.mixture import training_data
from wam.text.cache import CachedText
from wam.text.text import make_text
from wam.training import loop
from wam.training.build import codec_for
from wam.training.caches import build_latents, cache
from wam.training.loop import train

LENGTHS = (30, 26, 12, 33)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fixture.write_dataset(tmp_path_factory.mktemp("latents") / "tiny", LENGTHS, gop=12, b_frames=2)


@pytest.fixture(scope="module")
def built(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("cache")
    made = build_latents(splits(config(root)), config(root), tiny_codec(config(root).codec), directory, 0)
    assert made.made == 4 and made.kept == 0 and made.windows == sum(length - 8 for length in LENGTHS)
    return directory


@pytest.fixture
def copied(built: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(built, tmp_path / "cache"))


def config(root: Path, *overrides: str) -> Config:
    return tiny_config(f"data.root={root}", "data.executed_action=action.executed", "data.validation_fraction=0.5", "data.cache=none", *overrides)


def splits(config: Config, latents: Path | None = None) -> list[WindowDataset]:
    data = replace(config.data, latents=None if latents is None else str(latents))
    return [WindowDataset(data, config.timeline, split, None, config.codec.image_size) for split in ("train", "validation")]


def opened(config: Config, directory: Path, pixels: bool = False) -> list[WindowDataset]:
    datasets = splits(config, directory)
    for windows in datasets:
        use_latents(windows, config.codec, tiny_codec(config.codec), pixels)
    return datasets


def files(directory: Path) -> list[Path]:
    return sorted(directory.glob("*/*.safetensors"))


def alter(path: Path) -> None:
    """Change one byte in the middle, where latents are."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_latents_are_what_would_have_been_encoded(root: Path, built: Path) -> None:
    c = config(root)
    codec = tiny_codec(c.codec)
    for plain, cached, both in zip(splits(c), opened(c, built), opened(c, built, pixels=True), strict=True):
        some = list(range(0, len(plain), 5))
        batch, frames = collate([cached[i] for i in some]), collate([plain[i] for i in some])["frames"]
        assert "frames" not in batch and torch.equal(batch["latents"], codec.encode(frames)), "to the bit"
        with_frames = both[3]
        np.testing.assert_array_equal(with_frames["frames"], plain[3]["frames"])
        np.testing.assert_array_equal(with_frames["latents"], cached[3]["latents"])
        for key in ("state", "action", "frames_is_pad"):
            np.testing.assert_array_equal(plain[3][key], cached[3][key])  # type: ignore[literal-required]


def test_a_killed_build_goes_on_and_a_damaged_file_is_made_again(root: Path, copied: Path, caplog: pytest.LogCaptureFixture) -> None:
    c, before = config(root), {path.name: load(path.read_bytes()) for path in files(copied)}
    kept, cut, altered, gone = files(copied)
    cut.write_bytes(cut.read_bytes()[:-100])
    alter(altered)
    gone.unlink()
    half = kept.parent / f".{gone.stem}.abc.safetensors"  # what a killed writer leaves
    half.write_bytes(b"half a file")
    os.utime(half, (0, 0))
    inode = kept.stat().st_ino
    made = build_latents(splits(c), c, tiny_codec(c.codec), copied, 2)
    assert (made.made, made.kept) == (3, 1) and kept.stat().st_ino == inode and not half.exists()
    for name, tensors in before.items():
        again = load(kept.with_name(name).read_bytes())
        assert all(torch.equal(again[key], tensor) for key, tensor in tensors.items()), "workers make the same"
    assert "all verified" in str(build_latents(splits(c), c, tiny_codec(c.codec), copied, 0))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), r"episode-00000\d-000.safetensors is damaged .*run `wam cache` again"),
        (alter, r"the checksum of window \d+ does not hold; run `wam cache` again"),
        (lambda path: path.write_bytes(b"not a file of tensors"), "is damaged"),
        (lambda path: shutil.copy(path.with_name("episode-000003-000.safetensors"), path), "is damaged or of another cache: its shard does not fit"),
    ],
)
def test_damage_is_refused_by_name(root: Path, copied: Path, damage: Any, message: str) -> None:
    train, _ = opened(config(root), copied)
    damage(files(copied)[1])
    assert train[0]["latents"].shape == (6, 5, 4, 6)
    with pytest.raises(LatentError, match=message):
        for index in range(len(train)):
            train[index]


def test_what_is_missing_or_unfinished_is_refused_at_once(root: Path, copied: Path, tmp_path: Path) -> None:
    files(copied)[0].unlink()
    with pytest.raises(LatentError, match=r"lacks 1 files, e.g. episode-000000-000.safetensors; run `wam cache` again"):
        opened(config(root), copied)
    manifest = next(copied.glob("*/manifest.json"))
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "complete": False}))
    with pytest.raises(LatentError, match=r"is not finished \(3 files so far\); run `wam cache` again"):
        opened(config(root), copied)
    manifest.write_text("{")
    with pytest.raises(LatentError, match=r"manifest.json is not valid JSON"):
        opened(config(root), copied)
    with pytest.raises(LatentError, match="holds no encoded windows; make them with `wam cache`"):
        opened(config(root), tmp_path / "elsewhere")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("codec.channels=5",), r"codec.channels is 6 there and 5 here; codec.weights is \w{8}... there and \w{8}... here"),
        (("codec.image_size=[64, 64]",), r"pictures.image_size is \[32, 48\] there and \[64, 64\] here"),
        (("timeline.blocks=3",), "windows.frames is 17 there and 13 here"),
        (("data.start_stride=2",), "Nearest is tiny-.*: windows.start_stride is 1 there and 2 here; run `wam cache`"),
    ],
)
def test_other_settings_are_refused_by_name(root: Path, built: Path, overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(LatentError, match=message):
        opened(config(root, *overrides), built)


def test_other_videos_are_another_cache(root: Path, built: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(root, tmp_path / "copied"))
    assert opened(config(copy), built)[0][0]["latents"] is not None, "the same bytes in another place are the same"
    video = next(copy.glob("videos/**/*.mp4"))
    fixture.write_video(video, list(range(200)), gop=5)
    with pytest.raises(LatentError, match=r"content is .* there and .* here"):
        opened(config(copy), built)
    source = splits(config(root))[0].lerobot
    stamps = json.loads((built / "files.json").read_text())
    assert content_of(source, config(root).data.cameras, tmp_path / "new") == content_of(source, config(root).data.cameras, built)
    assert all(len(entry) == 3 for entry in stamps.values()) and not (tmp_path / "new").exists()


def test_augmentation_that_needs_pixels_is_refused(root: Path) -> None:
    with pytest.raises(ValueError, match=r"data.latents is 'x', but data.augment changes pixels"):
        config(root, "data.latents=x", "data.augment.brightness=0.3")


def test_training_from_latents_is_training_from_frames(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same weights, to the bit; and the linear codec is the one that was kept."""
    monkeypatch.setattr(loop, "draw_at_end", lambda output: None)
    quick = ("training.steps=3", "training.batch_size=3", "training.precision=fp32", "training.validation_batches=1", "training.validation_samples=2", "codec.fit_frames=100", "data.cache=memory")
    c = config(root, *quick)
    latents = config(root, *quick, f"data.latents={tmp_path / 'latents'}")
    with pytest.raises(LatentError, match=r"latents holds no codec that was fitted for this config. Run `wam cache`"):
        codec_for(latents, training_data(latents))
    made = cache(latents, 1)
    assert made.made == 4 and cache(latents, 1).made == 0
    weights = [load((train(run, tmp_path / name) / "model.safetensors").read_bytes()) for name, run in (("frames", c), ("encoded", latents))]
    assert weights[0].keys() == weights[1].keys() and all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    other = config(root, *quick, f"data.latents={tmp_path / 'latents'}", "codec.whitening=0.3")
    with pytest.raises(LatentError, match=r"The nearest was fitted with other settings: codec.whitening is 1.0 there and 0.3 here. Run `wam cache`"):
        codec_for(other, training_data(other))
    kept = next((tmp_path / "latents").glob("codec-*"))
    alter(kept)
    with pytest.raises(LatentError, match=r"codec-\w+.safetensors is damaged: its checksum does not hold; delete it"):
        codec_for(latents, training_data(latents))


def test_pretrained_codecs_and_instructions(root: Path, tmp_path: Path) -> None:
    """Wan's VAE from the cache and from frames: the same but for the last bits; and the text encoder is not needed any more."""
    folder = write_pipeline(tmp_path / "wan", "t2v")
    c = wan_config("t2v", folder, f"data.root={root}", "data.validation_fraction=0", "data.cache=none", f"data.latents={tmp_path / 'latents'}", f"text.cache={tmp_path / 'text'}", "training.text_dropout=0.1", "timeline.blocks=1")
    made = cache(c, 1)
    assert made.made == 4
    data = training_data(c)
    codec = codec_for(c, data)
    some = [0, 7, 11]
    frames = torch.stack([torch.from_numpy(plain_frames(data.windows, i)) for i in some])
    torch.testing.assert_close(collate([data.windows[i] for i in some])["latents"], codec.encode(frames), rtol=1e-5, atol=1e-5)
    text = make_text(replace(c.text, pretrained=None))
    assert isinstance(text, CachedText) and text.encoder is None
    assert text([*fixture.TASKS, ""]).shape == (len(fixture.TASKS) + 1, c.text.max_tokens, 16) and text.counts.encoded == 0
    other = replace(c, codec=replace(c.codec, dtype="bfloat16"))
    with pytest.raises(LatentError, match=r"codec.dtype is 'float32' there and 'bfloat16' here"):
        codec_for(other, training_data(other))


def plain_frames(windows: Any, index: int) -> np.ndarray:
    """A window's frames, whatever its samples have."""
    place = windows.table.place(index)
    frames: np.ndarray = windows.canvas.place(windows.pictures.read(windows.episodes[place.position], windows.rows(index).frames))
    return frames


def test_the_command(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = [f"data.root={root}", "data.control_hz=null", "data.executed_action=action.executed", "codec.image_size=[32, 48]", "codec.channels=6", "codec.fit_frames=100"]
    assert main(["cache", *settings]) == 2 and "data.latents is null" in capsys.readouterr().err
    command = ["cache", *settings, "--output", str(tmp_path / "latents"), "--workers", "2"]
    for expected in (r"69 windows of 0.00\d MB, 0.000 GB in 4 files \(0 were there\); [\d,]+ frames/s", r"4 files \(4 were there\); all verified"):
        assert main(command) == 0
        assert re.search(expected, capsys.readouterr().out)


def test_nothing_says_where_latents_go(root: Path) -> None:
    with pytest.raises(ValueError, match=r"data.latents is null, .* give --output DIR"):
        cache(config(root), 1)


def test_folder_names(root: Path, built: Path) -> None:
    c = config(root)
    cache = cache_of(splits(c)[0], built, c.codec, tiny_codec(c.codec))
    assert cache.folder.name.startswith("tiny-") and cache.shape == (6, 5, 4, 6) and cache.folder.is_dir()
