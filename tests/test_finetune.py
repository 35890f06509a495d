"""A new run from a policy's weights: what is taken is equal, what is new or dropped is told, what does not fit is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from survival import newest_state, quick_config, same

from wam.config import Config
from wam.data.normalize import Normalizer, Statistics
from wam.model.wam import WorldActionModel
from wam.pretrained import from_pretrained
from wam.training.finetune import REPORT, start_from
from wam.training.loop import train

ROBOTS = "model.embodiments=[{name: new_arm, state_dim: 4, action_dim: 4}, {name: metaworld, state_dim: 4, action_dim: 4}]"
LIGHT = ("training.steps=1", "training.save_every=1", "data.validation_fraction=0", "training.modes={skip: 1}")


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(quick_config(*LIGHT, "training.seed=3"), tmp_path_factory.mktemp("policy"))


def _started(config: Config, policy: Path) -> tuple[WorldActionModel, object]:
    model, old = WorldActionModel(config), from_pretrained(policy)
    return model, start_from(policy, config, model, old.codec, Normalizer.load(policy / "normalizer.json", "metaworld"))


def test_weights_go_by_name_and_robots_by_theirs(policy: Path) -> None:
    torch.manual_seed(1)
    config, old = quick_config(ROBOTS, "timeline.history=3"), from_pretrained(policy).model
    model, report = _started(config, policy)
    weight, before = model.action_encoder.state_dict(), old.action_encoder.state_dict()
    name = next(n for n in weight if n.endswith("weight") and len(weight[n]) == 2)
    assert torch.equal(weight[name][1], before[name][0]) and not torch.equal(weight[name][0], before[name][0])  # metaworld is the second now
    assert torch.equal(model.backbone.patch_embedding.weight, old.backbone.patch_embedding.weight)
    assert report.new == ["robot new_arm"] and report.dropped == [] and report.statistics == []
    assert any(text.startswith("timeline.history: ") for text in report.changed) and "robot new_arm" in report.told()


def test_what_does_not_fit_is_refused(policy: Path, tmp_path: Path) -> None:
    for override, message in (
        ("codec.channels=8", r"has codec.channels 6, this run 8: .* set codec.channels=6"),
        ("model.ffn_dim=72", r"tensor 'backbone\.blocks\.0\.ffn.* has shape .*, this model's has"),
        ("model.action_width=6", r"give the model.state_width and model.action_width"),
        ("model.embodiment_weights=shared", r"model.embodiment_weights is 'shared'; set it to 'own'"),
        ("model.pretrained=elsewhere", r"exclude each other: the first starts from a whole policy, the second from a backbone alone"),
    ):
        config = quick_config(override)
        with pytest.raises(ValueError, match=message):
            start_from(policy, config, WorldActionModel(config), from_pretrained(policy).codec, Normalizer.load(policy / "normalizer.json", "metaworld"))
    config = quick_config()
    with pytest.raises(FileNotFoundError, match=r"is no policy: config.yaml is missing"):
        start_from(tmp_path, config, WorldActionModel(config), from_pretrained(policy).codec, Normalizer.load(policy / "normalizer.json", "metaworld"))


def test_statistics_that_moved_are_told(policy: Path) -> None:
    config, was = quick_config(), Normalizer.load(policy / "normalizer.json", "metaworld")
    action = was.keys["action"]
    wider = replace(was, keys={**was.keys, "action": Statistics(action.center, (*action.scale[:3], 5 * action.scale[3]), action.constant)})
    report = start_from(policy, config, WorldActionModel(config), from_pretrained(policy).codec, wider)
    assert len(report.statistics) == 1 and report.statistics[0].startswith("action dimension 3: ")


def test_a_run_that_has_a_state_needs_its_origin_no_more(policy: Path, tmp_path: Path) -> None:
    origin = shutil.copytree(policy, tmp_path / "origin")
    light = ("training.steps=2", "training.learning_rate=1e-9", "training.ema_decay=0", "training.seed=8", *LIGHT[1:])
    config = quick_config(f"training.finetune_from={origin}", *light)
    checkpoint = train(config, tmp_path / "run")
    told = json.loads((tmp_path / "run" / REPORT).read_text())
    assert told["step"] == 1 and told["new"] == told["dropped"] == [] and told["taken"] > 50
    state, old = newest_state(tmp_path / "run"), from_pretrained(policy)
    assert torch.allclose(state["model.action_decoder.table"], old.model.action_decoder.table, atol=1e-7)
    assert torch.equal(from_pretrained(checkpoint).codec.basis, old.codec.basis)  # not fitted anew, whatever the seed
    assert torch.equal(state["codec.basis"], old.codec.basis)
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "state" / "step-00000002")
    shutil.rmtree(origin)
    train(config, tmp_path / "again")
    assert same(newest_state(tmp_path / "run"), newest_state(tmp_path / "again"))
