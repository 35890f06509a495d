"""Validation samples what a robot's session would plan, whatever the number of processes, and stands beside baselines that are what they say."""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_meters import Listening, Pair
from tiny import SMALL, tiny_clip, tiny_codec, tiny_config, tiny_model

from wam.config import Config, load_config
from wam.data.dataset import collate
from wam.data.mixture import training_data
from wam.inference.session import Session
from wam.model.sampling import Noise
from wam.pretrained import Policy
from wam.relations import acting_modes, best_figure
from wam.training.build import fit_codec
from wam.training.draws import Draws
from wam.training.engine import Engine
from wam.training.launch import Launch
from wam.training.objective import Objective, latent_padding
from wam.training.validation import Dealt, Driven, HeldOut, unguided, validate

SAMPLE = Path(__file__).parents[1] / "data" / "metaworld_sample"
MODES = "training.modes={skip: 1, joint: 1, imagine: 1, forward: 1, inverse: 1}"


def _config(*overrides: str) -> Config:
    data = (f"data.root={SAMPLE}", "data.executed_action=action.executed", "codec.image_size=[64, 64]", "codec.fit_frames=100", "timeline.blocks=2")
    return load_config(None, (*SMALL, *data, MODES, "training.batch_size=4", "training.validation_batches=1", "training.validation_samples=4", *overrides))


@cache
def _made() -> tuple[Objective, HeldOut, dict[str, Any]]:
    """A random model over the sample, its held-out windows, and the statistics."""
    config = _config()
    data = training_data(config)
    (name, windows), *_ = data.held_out.items()
    objective = Objective(config, tiny_model(config), fit_codec(config, data))
    return objective, HeldOut(name, windows, torch.full((4,), 0.25)), data.normalizer


class Windows(list):
    """Samples as a dataset."""


def test_what_is_sampled_is_what_a_session_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    objective, part, statistics = _made()
    config, model, places = objective.config, objective.model, [3, 40]
    batch: Any = collate([part.windows[p] for p in places])
    driven = Driven(objective, Dealt(batch, places, torch.ones(2), 0), part)
    assert driven.first == 1 and set(driven.sampled) == {"skip", "joint", "imagine", "forward", "inverse"}

    session = Session(Policy(config, model, objective.codec, statistics, {"control_hz": 80}), batch["instruction"], "metaworld", [0, 1])
    t = config.timeline
    shapes = [(t.actions_per_block, config.model.actions), (config.codec.channels, t.latents_per_block, *model.latent_size)]
    monkeypatch.setattr(session, "_noise", lambda: Noise(*Draws.at(0, 1 + session.block, places).normals(shapes, model.device)))
    physical = {key: session.normalizer.unnormalize(name, batch[key].numpy()) for key, name in (("state", "state"), ("executed", "action"))}
    A, frames = t.actions_per_block, batch["frames"].numpy()
    session.observe(frames[:, :1], physical["state"][:, 0])
    session.commit(physical["executed"][:, :A])
    session.observe(frames[:, 1 : 1 + t.frames_per_block], physical["state"][:, 1])
    for mode in driven.sampled:
        plan = session.plan(mode, unguided(config.sampling), physical["executed"][:, A:] if mode == "forward" else None, future=driven.latents[:, :, driven.frames(1)] if mode == "inverse" else None)
        sample = driven.sampled[mode][0]
        if sample.action_BTA is not None:
            np.testing.assert_allclose(session.normalizer.unnormalize("action", sample.action_BTA[..., :4].numpy()), plan.actions, atol=2e-4, err_msg=mode)
        if sample.video_BCFHW is not None:
            torch.testing.assert_close(sample.video_BCFHW, plan.imagined, atol=2e-4, rtol=1e-3, msg=mode)


def test_figures_stand_beside_baselines_and_two_processes_measure_what_one_does(tmp_path: Path) -> None:
    objective, part, _ = _made()
    one = validate(objective, [part], Engine(Launch()), tmp_path / "one.png")
    listening = Listening()
    validate(objective, [part], listening, tmp_path / "other.png")
    two = validate(objective, [part], Pair(listening.said), tmp_path / "two.png")
    assert one.keys() == two.keys() and one == pytest.approx(two, rel=1e-4)
    assert {f"val/action_mse/{m}" for m in ("skip", "joint", "imagine", "inverse", "hold", "mean")} | {f"val/video_mse/{m}" for m in ("joint", "imagine", "forward", "static")} <= one.keys()
    assert {"val/psnr/forward", "val/psnr/imagine", "val/psnr/static", "val/loss", "val/inverse/action", "val/forward/video"} <= one.keys()
    assert "val/action_mse/forward" not in one and "val/inverse/video" not in one
    assert best_figure(objective.config) in one
    weights = objective.config.training.modes
    assert one["val/loss"] == pytest.approx(sum(one.get(f"val/{m}/{p}", 0.0) for m in weights for p in ("video", "action")) / len(weights))

    places = np.unique(np.linspace(0, len(part.windows) - 1, 4).round().astype(int))
    batch: Any = collate([part.windows[int(p)] for p in places])
    A = objective.config.timeline.actions_per_block
    seen = ~batch["action_is_pad"][:, A:]
    label, last = batch["action"][:, A:], batch["executed"][:, A - 1 : A]
    for name, guess in (("hold", last), ("mean", torch.full((4,), 0.25))):
        assert one[f"val/action_mse/{name}"] == pytest.approx(float((guess - label).square().mean(-1)[seen].mean()), rel=1e-5), name
    latents = objective.codec.encode(batch["frames"])
    shown = ~latent_padding(batch["frames_is_pad"], objective.config)[:, 2]
    assert one["val/video_mse/static"] == pytest.approx(float((latents[shown, :, 1] - latents[shown, :, 2]).square().mean()), rel=1e-4)
    with Image.open(tmp_path / "one.png") as image:
        assert image.width > 400 and image.height > 600
    assert not (tmp_path / "other.png").exists(), "only the main process writes"


def test_datasets_have_figures_of_their_own_by_what_they_hold(tmp_path: Path) -> None:
    objective, part, _ = _made()
    samples = [part.windows[i] for i in (0, 30)]
    video = HeldOut("people", Windows([{**s, "has_action": False} for s in samples]), part.mean_action)
    action = HeldOut("blind", Windows([{**s, "has_video": False} for s in samples]), part.mean_action)
    paired = HeldOut("robot", Windows(samples), part.mean_action)
    found = validate(objective, [paired, video, action], Engine(Launch()), tmp_path / "strip.png")
    assert {"val/robot/action_mse/skip", "val/people/video_mse/imagine", "val/people/imagine/video", "val/blind/skip/action"} <= found.keys()
    assert not any(k.startswith("val/people/") and "action" in k for k in found) and not any(k.startswith("val/blind/") and ("video" in k or "mse" in k) for k in found)
    assert found["val/action_mse/skip"] == pytest.approx(found["val/robot/action_mse/skip"])
    assert found["val/video_mse/imagine"] == pytest.approx((found["val/robot/video_mse/imagine"] + found["val/people/video_mse/imagine"]) / 2, rel=1e-4)


@pytest.mark.parametrize(
    "overrides",
    [
        ("timeline.blocks=1", "preset=fast_wam", "training.modes={skip: 1}"),
        ("preset=lingbot_va", "training.modes={skip: 1, imagine: 1, inverse: 1}", "sampling.guidance=1", "timeline.latents_per_block=2", "timeline.actions_per_block=16", "sampling.action_steps=4"),
        ("preset=uwm", "timeline.blocks=1", "training.modes={skip_registers: 1, imagine: 1, forward: 1, inverse: 1}"),
        ("model.goal_image=true", "training.goal_image=0.8"),
        ("preset=dreamzero", "sampling.guidance=1"),
    ],
    ids=["one block", "first frame inside", "single copies", "goal", "live states"],
)
def test_every_form_of_first_frame_goal_and_state_is_driven(overrides: tuple[str, ...]) -> None:
    config = load_config(None, (*SMALL, "training.batch_size=2", "training.validation_batches=1", "training.validation_samples=2", MODES, *overrides))
    t, generator = config.timeline, np.random.default_rng(0)
    robot, inside = config.model.embodiments[0], t.first_frame == "inside"
    count = 1 + t.temporal_stride * (t.blocks * t.latents_per_block - inside)
    steps = t.blocks * t.actions_per_block
    sample = {
        "frames": generator.integers(0, 255, (count, *config.codec.image_size, 3), dtype=np.uint8),
        "frames_is_pad": np.zeros(count, bool),
        "state": generator.normal(size=(t.blocks * t.states_per_block, robot.state_dim)).astype(np.float32),
        "state_is_pad": np.zeros(t.blocks * t.states_per_block, bool),
        "action": generator.normal(size=(steps, robot.action_dim)).astype(np.float32),
        "executed": generator.normal(size=(steps, robot.action_dim)).astype(np.float32),
        "action_is_pad": np.zeros(steps, bool),
        **{"instruction": "open it", "embodiment": robot.name, "has_video": True, "has_action": True, "episode": 0, "start": 0},
    }
    objective = Objective(config, tiny_model(config), tiny_codec(config.codec), tiny_clip() if config.model.image_dim else None)
    found = validate(objective, [HeldOut("noise", Windows([sample, sample]), torch.zeros(robot.action_dim))], Engine(Launch()))
    assert all(np.isfinite(v) for v in found.values()) and {f"val/action_mse/{m}" for m in acting_modes(config)} <= found.keys()
    assert ("val/action_mse/hold" in found) == (t.blocks > 1)


def test_the_best_is_the_acting_mode_that_is_trained_most_or_the_loss() -> None:
    assert best_figure(tiny_config("training.modes={skip: 1, joint: 3, inverse: 9}")) == "val/action_mse/joint"
    assert best_figure(tiny_config("training.modes={video: 1, forward: 1}")) == "val/loss"
    assert best_figure(tiny_config("training.best=val/psnr/forward")) == "val/psnr/forward" and best_figure(tiny_config("training.best=null")) is None
