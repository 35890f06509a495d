"""Imagined rollouts: the measures on known cases, one mask for all, clips that fit, and the whole command on the sample."""

import dataclasses
import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
from test_training import _config

from wam.config import ImagineConfig, load_config, save_config
from wam.evaluation.horizon import draw_horizon
from wam.evaluation.imagination import Clip, Judge, held_out_clips, imagine, score
from wam.evaluation.mean_motion import mean_motion
from wam.pictures import load_lpips, lpips_is_missing, moving_mask, psnr, ssim
from wam.training.loop import train

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(_config("training.steps=1"), tmp_path_factory.mktemp("run"))


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


def test_ssim_over_moving_pixels_sees_what_the_still_ones_hide() -> None:
    video = _square_moves()
    still = np.broadcast_to(video[:1], video.shape)
    mask = moving_mask(video)
    assert ssim(video, video, mask) == pytest.approx(1.0, abs=1e-6)
    assert ssim(still, video, mask) < ssim(still, video) - 0.1
    edge = np.zeros((24, 24), bool)
    edge[:5] = True
    with pytest.raises(ValueError, match="nothing moves further than 5 pixels from the edge"):
        ssim(video, video, edge)


def test_the_mask_is_where_anything_moved_at_any_time() -> None:
    mask = moving_mask(_square_moves())
    expected = np.zeros((24, 24), bool)
    expected[8:12, 4:16] = True
    assert np.array_equal(mask, expected)


def test_the_baseline_copies_the_first_frame_and_a_perfect_video_beats_it() -> None:
    video = _square_moves()
    clip = Clip(0, 0, video, np.zeros(4), np.zeros((8, 4)), "x")
    still = np.broadcast_to(video[:1], video.shape).copy()
    assert score([clip], [still])["gain_db"] == pytest.approx(0)
    assert score([clip], [video])["gain_db"] > 50
    dead = dataclasses.replace(clip, frames=still)
    assert score([clip, dead], [video, still])["still_clips_left_out"] == 1
    with pytest.raises(ValueError, match="nothing moves in any"):
        score([dead], [still])


def _square_video(left: int, speed: int, frames: int = 9) -> np.ndarray:
    video = np.full((frames, 24, 40, 3), 100, np.uint8)
    for i in range(frames):
        video[i, 8:12, left + speed * i : left + speed * i + 4] = 200
    return video


def test_mean_motion_is_the_mean_change_of_training_clips_and_wins_where_all_move_alike() -> None:
    class Source:
        episodes = (7, 9)
        frames = {7: _square_video(4, 2), 9: _square_video(4, 2)}

        def episode(self, index: int):
            return type("View", (), {"frames": self.frames[index]})

    motion = mean_motion(Source(), 4, 2)  # 4 frames, 2 rows apart: only the first row has room
    assert motion is not None and motion.clips == 2 and motion.change_FHWC.shape == (4, 24, 40, 3)
    first = _square_video(4, 2)[::2]
    np.testing.assert_array_equal(motion.video(first[0], 4), first[1:])
    assert motion.video(np.full_like(first[0], 250), 2).max() == 255, "kept within what a picture can hold"
    assert mean_motion(Source(), 5, 2) is None, "no episode is as long"

    clip = Clip(0, 0, first, np.zeros(4), np.zeros((8, 4)), "x")
    alike = score([clip], [np.broadcast_to(first[:1], first.shape)], Judge(motion))
    assert alike["gain_db"] == pytest.approx(0) and alike["gain_over_mean_motion_db"] < -50
    other = dataclasses.replace(clip, frames=_square_video(20, 2)[::2])
    assert score([other], [other.frames], Judge(motion))["mean_motion_psnr_db"] < score([other], [other.frames])["static_psnr_db"]


def test_the_curve_by_horizon_is_the_error_of_each_latent_and_joins_to_the_whole() -> None:
    clip = Clip(0, 0, _square_video(2, 3), np.zeros(4), np.zeros((16, 4)), "x")
    video = clip.frames.copy()
    video[5:] = video[4]  # right for one latent, then it stops
    found = score([clip], [video], Judge(codec=[clip.frames], group=4, group_seconds=0.1))
    near, far = found["horizon"]
    assert (near["seconds"], far["seconds"]) == (0.1, 0.2) and near["psnr_db"] == pytest.approx(100) and far["psnr_db"] < 25
    pooled = np.mean([10 ** (-point["static_psnr_db"] / 10) for point in (near, far)])
    assert -10 * np.log10(pooled) == pytest.approx(found["static_psnr_db"])
    assert near["moving_ssim"] == pytest.approx(1, abs=1e-6) and far["moving_ssim"] < 0.9 and found["codec_psnr_db"] == pytest.approx(100)
    assert "mean_motion_psnr_db" not in near and found["psnr_db"] > found["static_psnr_db"]


def test_lpips_says_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert lpips_is_missing() == "LPIPS needs the packages lpips and torchvision, which are not installed; run: pip install lpips torchvision"
    with pytest.raises(RuntimeError, match="pip install lpips"):
        load_lpips()
    clip = Clip(0, 0, _square_video(2, 3), np.zeros(4), np.zeros((16, 4)), "x")
    assert "lpips" not in score([clip], [clip.frames]) and score([clip], [clip.frames], Judge(lpips=lambda a, b, mask: 0.25))["lpips"] == 0.25


def test_clips_are_shortened_to_the_episodes_and_say_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        clips = held_out_clips(_config(), ImagineConfig(clips=5, blocks=500))
    assert "instead of imagine.blocks 500" in caplog.text
    steps = len(clips[0].executed)
    assert steps % 8 == 0 and all(len(c.frames) == steps // 2 + 1 and len(c.executed) == steps for c in clips)


def test_the_whole_command_on_the_sample(checkpoint: Path, tmp_path: Path) -> None:
    results = imagine(checkpoint, ImagineConfig(clips=3, blocks=4, steps=1, videos=1), tmp_path / "out")
    assert set(results["modes"]) == {"forward", "imagine"}
    assert json.loads((tmp_path / "out" / "imagine.json").read_text()) == results
    for figures in results["modes"].values():
        assert figures["clips"] == 3 and np.isfinite(figures["gain_db"]) and 0 <= figures["ssim"] <= 1
        assert [point["seconds"] for point in figures["horizon"]] == pytest.approx([0.1 * (i + 1) for i in range(figures["blocks"])])
        assert {"static_psnr_db", "mean_motion_psnr_db", "codec_psnr_db", "psnr_db"} <= figures["horizon"][0].keys()
    assert results["mean_motion"]["clips"] > 0 and results["action_following"]["clips"] == 3 and results["action_following"]["actions_differ"] > 0
    assert results["consistency"]["blocks"] == 3 * results["blocks"] and len(results["consistency"]["imagined"]["rmse_by_dimension"]) == 4
    assert "imagine" in results["consistency"]["inverse_is"] and set(results["left_out"]) <= {"lpips"}
    assert len(list((tmp_path / "out").glob("*.mp4"))) == 1 and {p.stem.split("_")[0] for p in (tmp_path / "out").glob("*.png")} >= {"horizon"}


def test_what_the_checkpoint_was_not_trained_for_is_left_out_with_a_note(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "skip")
    config = load_config(checkpoint / "config.yaml", ["training.modes={skip: 1}"])
    save_config(config, tmp_path / "skip" / "config.yaml")
    results = imagine(tmp_path / "skip", ImagineConfig(clips=2, blocks=2, steps=1, videos=0), tmp_path / "out")
    assert not results["modes"] and {"forward", "imagine", "action_following", "consistency"} <= set(results["left_out"])
    assert "was not trained in mode 'forward'" in results["left_out"]["forward"] and "mode 'forward'" in results["left_out"]["consistency"]
    assert not (tmp_path / "out" / "horizon.png").exists()
    with pytest.raises(ValueError, match="no error by horizon"):
        draw_horizon(results, tmp_path / "x.png")
