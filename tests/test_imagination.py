"""Imagined rollouts: the measures on known cases, one mask for all, clips that fit, and the whole command on the sample."""

import dataclasses
import json
import logging
from pathlib import Path

import numpy as np
import pytest
from test_training import _config

from wam.config import ImagineConfig
from wam.evaluation.imagination import held_out_clips, imagine, score
from wam.pictures import moving_mask, psnr, ssim
from wam.training.loop import train

RNG = np.random.default_rng(0)


def _square_moves(frames: int = 5) -> np.ndarray:
    video = np.full((frames, 24, 24, 3), 100, np.uint8)
    for i in range(frames):
        video[i, 8:12, 4 + 2 * i : 8 + 2 * i] = 200
    return video


def test_psnr_of_a_known_error() -> None:
    a = np.full((2, 8, 8, 3), 100, np.uint8)
    assert psnr(a + 51, a) == pytest.approx(-20 * np.log10(0.2), abs=1e-6)
    half = np.zeros((8, 8), bool)
    half[:4] = True
    b = a.copy()
    b[:, :4] += 51
    assert psnr(b, a, half) == pytest.approx(13.979, abs=1e-3)
    assert psnr(b, a, ~half) > 90
    with pytest.raises(ValueError, match="nothing moves"):
        psnr(a, a, np.zeros((8, 8), bool))
    with pytest.raises(ValueError, match="must be the same"):
        psnr(a, a[:1])


def test_ssim_is_one_for_equals_and_falls_with_noise() -> None:
    video = _square_moves()
    noisy = np.clip(video + RNG.normal(0, 30, video.shape), 0, 255).astype(np.uint8)
    assert ssim(video, video) == pytest.approx(1.0, abs=1e-6)
    assert ssim(noisy, video) < 0.7


def test_the_mask_is_where_anything_moved_at_any_time() -> None:
    mask = moving_mask(_square_moves())
    expected = np.zeros((24, 24), bool)
    expected[8:12, 4:16] = True
    assert np.array_equal(mask, expected)


def test_the_baseline_copies_the_first_frame_and_a_perfect_video_beats_it() -> None:
    from wam.evaluation.imagination import Clip

    video = _square_moves()
    clip = Clip(0, 0, video, np.zeros(4), np.zeros((8, 4)), "x")
    still = np.broadcast_to(video[:1], video.shape).copy()
    assert score([clip], [still])["gain_db"] == pytest.approx(0)
    assert score([clip], [video])["gain_db"] > 50
    dead = dataclasses.replace(clip, frames=still)
    assert score([clip, dead], [video, still])["still_clips_left_out"] == 1
    with pytest.raises(ValueError, match="nothing moves in any"):
        score([dead], [still])


def test_clips_are_shortened_to_the_episodes_and_say_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        clips = held_out_clips(_config(), ImagineConfig(clips=5, blocks=500))
    assert "instead of imagine.blocks 500" in caplog.text
    steps = len(clips[0].executed)
    assert steps % 8 == 0 and all(len(c.frames) == steps // 2 + 1 and len(c.executed) == steps for c in clips)


def test_the_whole_command_on_the_sample(tmp_path: Path) -> None:
    checkpoint = train(_config("training.steps=1"), tmp_path / "run")
    results = imagine(checkpoint, ImagineConfig(clips=3, blocks=4, steps=1, videos=1), tmp_path / "out")
    assert set(results["modes"]) == {"forward", "imagine"}
    assert json.loads((tmp_path / "out" / "imagine.json").read_text()) == results
    for figures in results["modes"].values():
        assert figures["clips"] == 3 and np.isfinite(figures["gain_db"]) and 0 <= figures["ssim"] <= 1
    assert len(list((tmp_path / "out").glob("*.mp4"))) == 1 and len(list((tmp_path / "out").glob("*.png"))) == 1
