"""Training on the committed sample: two clips can be memorised, a resumed run equals an uninterrupted one, bad numbers stop it."""

import json
from pathlib import Path

import pytest
import torch
from survival import newest_state, same
from tiny import SMALL

from wam.config import Config, SamplingConfig, load_config
from wam.data.dataset import collate
from wam.data.mixture import training_data
from wam.inference.session import Session
from wam.model.wam import WorldActionModel
from wam.pretrained import Policy, from_pretrained
from wam.training import loop
from wam.training.build import fit_codec
from wam.training.checkpoints import state_folder
from wam.training.curves import CURVES, draw_at_end
from wam.training.loop import train
from wam.training.objective import Objective

SAMPLE = Path(__file__).parents[1] / "data" / "metaworld_sample"


def _config(*overrides: str) -> Config:
    data = (f"data.root={SAMPLE}", "data.executed_action=action.executed", "codec.image_size=[64, 64]", "codec.fit_frames=200", "timeline.blocks=2")
    quick = ("training.batch_size=4", "training.warmup_steps=1", "training.validation_batches=1", "training.validation_samples=8", "training.precision=fp32", "training.log_every=1")
    return load_config(None, (*SMALL, *data, *quick, *overrides))


def test_resume_equals_an_uninterrupted_run_to_the_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = _config("training.steps=4", "training.save_every=2", "training.validate_every=4")
    train(config, tmp_path / "whole")

    real_step, calls = loop._Run._step, []

    def interrupted(self: loop._Run, batch: dict, step: int, progress: float):
        if step == 3 and not calls:
            calls.append(step)
            raise KeyboardInterrupt
        return real_step(self, batch, step, progress)

    monkeypatch.setattr(loop._Run, "_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "parts")
    train(config, tmp_path / "parts")

    assert same(*(newest_state(tmp_path / name) for name in ("whole", "parts")))
    logs = [[json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()] for name in ("whole", "parts")]
    assert [r["step"] for r in logs[0]] == [r["step"] for r in logs[1]] == [1, 2, 3, 4, 4]
    assert all(a.get("train/video") == b.get("train/video") for a, b in zip(*logs, strict=True))


def test_a_run_with_another_config_is_refused(tmp_path: Path) -> None:
    train(_config("training.steps=1"), tmp_path)
    with pytest.raises(ValueError, match=r"another config: training\.learning_rate was 0\.001 and is 1e-05"):
        train(_config("training.steps=1", "training.learning_rate=1e-5"), tmp_path)
    train(_config("training.steps=2"), tmp_path)  # going on for longer is the same run


def test_a_damaged_state_says_what_to_do(tmp_path: Path) -> None:
    train(_config("training.steps=1"), tmp_path)
    path = state_folder(tmp_path, 1) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"model.safetensors is damaged: expected .* bytes, found 1,000; delete .* to start the run over"):
        train(_config("training.steps=1"), tmp_path)


def test_validation_stands_beside_its_baselines_and_a_checkpoint_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "draw_at_end", draw_at_end)  # which conftest.py leaves out
    checkpoint = train(_config("training.steps=1"), tmp_path)
    last = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    assert {"val/action_mse/skip", "val/action_mse/hold", "val/action_mse/mean", "val/imagine/video", "val/forward/action"} <= set(last)
    policy = from_pretrained(checkpoint)
    assert policy.control_hz == 80 and "open" in " ".join(policy.meta["tasks"]).lower()
    assert torch.equal(policy.model.action_decoder.table, newest_state(tmp_path)["ema.action_decoder.table"])
    assert (tmp_path / CURVES).stat().st_size > 10_000


def test_a_checkpoint_whose_config_does_not_match_is_refused(tmp_path: Path) -> None:
    checkpoint = train(_config("training.steps=1"), tmp_path)
    text = (checkpoint / "config.yaml").read_text()
    (checkpoint / "config.yaml").write_text(text.replace("ffn_dim: 64", "ffn_dim: 72"))
    with pytest.raises(ValueError, match=r"does not match .*: the checkpoint: tensor 'backbone\.blocks\.0\.ffn.*' has shape \[64\], expected \[72\]"):
        from_pretrained(checkpoint)
    (checkpoint / "model.safetensors").write_bytes(b"0" * 50)
    with pytest.raises(ValueError, match="damaged or incomplete"):
        from_pretrained(checkpoint)


def test_mixing_modes_does_not_rescale_a_loss() -> None:
    """A batch's loss is a mean over supervised elements: video-only samples beside others leave the action loss as it was."""
    config = _config("training.modes={skip: 1, video: 1, action_only: 1}")
    data = training_data(config)
    model = WorldActionModel(config)
    objective = Objective(config, model, fit_codec(config, data))
    batch = collate([data.windows[i] for i in (0, 5, 10, 15)])
    losses = objective(batch, torch.Generator().manual_seed(0), "video")
    assert float(losses.action().detach()) == 0 and losses.action_part.count_B.sum() == 0 and float(losses.video().detach()) > 0
    losses.video().backward()
    assert all(p.grad is None or not p.grad.any() for p in model.action_decoder.parameters())
    only = objective(batch, torch.Generator().manual_seed(0), "action_only")
    both = objective(batch, torch.Generator().manual_seed(0), "skip")
    torch.testing.assert_close(only.action(), both.action())


def _memorise(config: Config, steps: int) -> tuple[Policy, dict, Objective]:
    """Train on two windows of the sample until they are known by heart."""
    torch.manual_seed(0)
    data = training_data(config)
    codec, model = fit_codec(config, data), WorldActionModel(config)
    batch = collate([data.windows[0], data.windows[len(data) // 2]] * 6)
    objective, optimizer = Objective(config, model, codec), torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, (steps - step) / (steps / 2))
        losses = objective(batch, torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (losses.video() + losses.action()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    policy = Policy(config, model.eval().requires_grad_(False), codec, data.normalizer, {"control_hz": 80})
    return policy, batch, objective


@pytest.mark.parametrize("expert", [None, 64])
def test_two_clips_can_be_memorised_and_are_sampled_back(expert: int | None) -> None:
    """Through the path a robot uses: sampled actions match the labels, in every mode that predicts them."""
    modes = ("skip", "skip_registers", "joint", "joint_mutual", "imagine", "inverse")
    sizes = ("model.ffn_dim=128", "model.heads=2", "model.head_dim=48", f"model.expert_width={expert or 'null'}")
    config = _config(*sizes, "training.state_dropout=0", f"training.modes={{{', '.join(f'{mode}: 1' for mode in modes)}}}")
    policy, batch, objective = _memorise(config, 250)
    final = sum(float(objective(batch, torch.Generator().manual_seed(99 + i)).action().detach()) for i in range(12)) / 12
    assert final < 0.08, "over noise levels and modes; an untrained network's is above 1"
    pair = {k: v[:2] for k, v in batch.items()}
    session = Session(policy, pair["instruction"], "metaworld", [0, 1])
    states = session.normalizer.unnormalize("state", pair["state"].numpy())
    session.observe(pair["frames"][:, :1].numpy(), states[:, 0])
    label = session.normalizer.unnormalize("action", pair["action"][:, :8].numpy())
    future = policy.codec.encode(pair["frames"])[:, :, 1:2]
    for mode in modes:
        error = abs(session.plan(mode, SamplingConfig(steps=8), future=future if mode == "inverse" else None).actions - label).mean()
        assert error < 0.1, f"{mode}: {error}"
    moving = abs(label[0] - label[1]).mean()
    assert moving > 0.2, "the two clips must differ, or matching them shows nothing"
