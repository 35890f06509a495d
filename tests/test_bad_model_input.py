"""What a model cannot be given: one clear error that names the tensor or field, what was expected, what was found, and what to do.

Damaged shards and indices, backbones of another size and adapters of another base are told in `test_shards.py`, `test_backbones.py`, `test_lora.py`
and `test_convert_*.py`; here is what a whole policy, its sessions and the commands say.
"""

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from tiny import IMAGE_DIM, SMALL, TASKS, tiny_config, tiny_episode, tiny_policy, tiny_preset

from wam.cli import main
from wam.config import ConfigError, RelationsConfig, SamplingConfig
from wam.evaluation.rollout import check_settings
from wam.inference.session import Session
from wam.model.wam import WorldActionModel
from wam.pretrained import WEIGHTS, Policy, from_pretrained, save_pretrained
from wam.relations import LeakError, Relations

SAMPLE = Path(__file__).resolve().parents[1] / "data/metaworld_sample"


@pytest.fixture(scope="module")
def policy() -> Policy:
    return tiny_policy(tiny_config("training.modes={skip: 1}"))


def _observed(policy: Policy, batch: int = 1) -> Session:
    session = Session(policy, TASKS[:batch], "metaworld", list(range(batch)))
    session.observe(*tiny_episode(policy.config, batch, 1).at(0))
    return session


# ------------------------------------------------------------------------------------------------ checkpoints


def _edit(checkpoint: Path, old: str, new: str) -> None:
    text = (checkpoint / "config.yaml").read_text()
    assert old in text
    (checkpoint / "config.yaml").write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("layers: 2", "layers: 3", r"the checkpoint lacks 27 tensors of WorldActionModel, e\.g\. 'backbone\.blocks\.2\.scale_shift_table' \[1, 6, 48\]"),
        ("expert_width: null", "expert_width: 32", r"the checkpoint lacks 64 tensors .*'expert\."),
        ("action_width: null", "action_width: 9", r"tensor 'action_decoder\.out\.bias' has shape \[1, 4\], expected \[1, 9\]"),
        ("goal_image: false", "goal_image: true", r"lacks 1 tensor.*goal_embedding"),
        ("state: token", "state: none", r"state_encoder\."),
        ("action_head: modulated_mlp", "action_head: linear", r"action_decoder\.(table|mix)"),
    ],
)
def test_a_config_of_another_model_names_the_first_tensor(policy: Policy, old: str, new: str, told: str, tmp_path: Path) -> None:
    save_pretrained(policy, tmp_path)
    _edit(tmp_path, old, new)
    with pytest.raises(ValueError, match=rf"model\.safetensors does not match .*config\.yaml: .*{told}") as error:
        from_pretrained(tmp_path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_shards_of_a_policy_that_are_cut_or_gone(policy: Policy, tmp_path: Path) -> None:
    save_pretrained(policy, tmp_path, max_bytes=50e3)
    shard, index = sorted(tmp_path.glob("model-*"))[1], tmp_path / f"{WEIGHTS}.index.json"
    whole, listed = shard.read_bytes(), index.read_bytes()
    shard.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=rf"{shard.name} is cut short: expected {len(whole):,} bytes, found {len(whole) - 100:,}"):
        from_pretrained(tmp_path)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=rf"{shard.name} is missing"):
        from_pretrained(tmp_path)
    shard.write_bytes(whole)
    index.unlink()
    with pytest.raises(FileNotFoundError, match=r"is not a checkpoint: model\.safetensors\.index\.json is missing; give the directory"):
        from_pretrained(tmp_path)
    index.write_bytes(listed)
    assert from_pretrained(tmp_path).config == policy.config


def test_a_tensor_of_another_shape_is_named_with_both(policy: Policy, tmp_path: Path) -> None:
    save_pretrained(policy, tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / WEIGHTS)
    name = next(k for k in tensors if k.endswith("action_decoder.out.weight"))
    tensors[name] = torch.zeros(1, 48, 5)
    safetensors.torch.save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "wam-policy-2"})
    with pytest.raises(ValueError, match=r"'action_decoder\.out\.weight' has shape \[1, 48, 5\], expected \[1, 48, 4\]"):
        from_pretrained(tmp_path)


# ------------------------------------------------------------------------------------------------ tables


def test_a_table_that_leaks_is_refused_with_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(LeakError, match=r"table 'forward' leaks into V: V\[1\] -> Ac\[1\] -> Vc\[1\], and Vc\[1\] does not exist when V\[1\] is predicted; close a cell on this path"):
        Relations(RelationsConfig({"Ac->Vc": "<="})).mode("forward")
    monkeypatch.chdir(tmp_path)
    settings = [*SMALL, f"data.root={SAMPLE}", "data.executed_action=action.executed", "codec.image_size=[64, 64]", "codec.fit_frames=100", "timeline.blocks=2"]
    (tmp_path / "config.yaml").write_text("")
    assert main(["train", "--config", "config.yaml", *settings, 'relations.cells={"A->Vc": "<="}', "training.modes={skip: 1}", "--output", "out"]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("wam: error: ")]
    assert len(lines) == 1 and "leaks into A: A[1] -> Vc[1]" in lines[0] and not Path("out").exists()


def test_a_session_does_not_run_a_mode_that_leaks() -> None:
    session = Session(tiny_policy(tiny_preset("lingbot_va")), TASKS[:1], "metaworld", [0])
    episode = tiny_episode(session.config, 1, 1)
    session.observe(*episode.at(0))
    with pytest.raises(LeakError, match=r"V\[1\] -> Ac\[1\] -> Vc\[1\]"):
        session.plan("forward", actions=episode.done(0))
    rollout = replace(session.config.rollout, modes=("inverse",))
    with pytest.raises(ValueError, match="cannot drive"):
        check_settings(session.policy, rollout)


def test_a_mode_that_was_not_trained_is_warned_of_once_with_what_to_choose(policy: Policy, caplog: pytest.LogCaptureFixture) -> None:
    session = _observed(policy)
    with caplog.at_level(logging.WARNING, logger="wam"):
        for mode in ("skip", "action_only", "imagine", "imagine"):
            session.plan(mode)
    (said,) = [record.getMessage() for record in caplog.records]
    assert said == (
        "mode 'imagine' is not what this model was trained for (preset 'all', modes skip), so its output means little; choose skip or action_only, or train it: training.modes={imagine: 1}"
    )
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="wam"):
        check_settings(policy, replace(policy.config.rollout, modes=("imagine",)))
    assert said in [record.getMessage() for record in caplog.records]


# ------------------------------------------------------------------------------------------------ sizes


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (("codec.image_size=[40, 48]",), r"a latent frame is 5 high \(image height 40 / codec\.patch 8\), which model\.patch 2 does not divide; use an image height that is a multiple of 16"),
        (("codec.image_size=[32, 50]",), r"codec\.image_size width 50 is not a multiple of codec\.patch 8 \(50 = 6 x 8 \+ 2\); use 48 or 56"),
        (("timeline.actions_per_block=7",), r"timeline does not fit: .* 8 control steps, but actions_per_block is 7; set timeline\.actions_per_block=8"),
        (("model.action_width=3",), r"model\.action_width is 3, but an embodiment has 4 action channels; set it to at least 4"),
        (("timeline.first_frame=inside", "timeline.sink=true"), r"with first_frame 'inside' no frame stands alone; set timeline\.sink=false"),
        (("model.image_dim=null", "image.kind=clip"), r"model\.image_dim is null\); set model\.image_dim"),
        (("training.goal_image=0.5",), r"training\.goal_image is 0\.5, but the model takes no goal image; set model\.goal_image=true"),
        (("model.expert_width=32", "model.action_head=modulated_linear"), r"action_head is 'modulated_linear', .* expert_width is set; choose another head, or expert_width=null"),
        (("sampling.guidance=5",), r"sampling\.guidance is 5\.0, but training\.text_dropout is 0.*set training\.text_dropout=0\.1, or sampling\.guidance=1"),
    ],
)
def test_sizes_that_do_not_fit(overrides: tuple[str, ...], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        tiny_config(*overrides)


def test_windows_that_would_see_no_observation() -> None:
    with pytest.raises(ValueError, match=r"timeline\.blocks is 2, but relations\.cells \(preset 'uwm'\) let nothing see earlier blocks; set timeline\.blocks=1"):
        WorldActionModel(tiny_preset("uwm", None, "timeline.blocks=2"))


# ------------------------------------------------------------------------------------------------ sessions


def test_frames_of_another_size_or_number(policy: Policy) -> None:
    session = Session(policy, TASKS[:1], "metaworld", [0])
    state = np.zeros((1, 4), np.float32)
    for frames in (np.zeros((1, 1, 32, 40, 3), np.uint8), np.zeros((1, 1, 32, 48, 3), np.float32), np.zeros((1, 5, 32, 48, 3), np.uint8)):
        with pytest.raises(ValueError, match=r"expected uint8 \(rows, frames, height, width, 3\) = \(1, 1, 32, 48, 3\)") as error:
            session.observe(frames, state)
        assert f"frames are {frames.dtype} {frames.shape}" in str(error.value)
    with pytest.raises(ValueError, match=r"state has shape \(1, 5\); expected \(rows, state_dim\) = \(1, 4\)"):
        session.observe(np.zeros((1, 1, 32, 48, 3), np.uint8), np.zeros((1, 5), np.float32))


@pytest.mark.parametrize("mode", ["skip", "joint", "imagine"])
def test_guidance_needs_a_memory_that_was_opened_with_it(policy: Policy, mode: str) -> None:
    with pytest.raises(ValueError, match=r"guidance 3\.0 compares two instructions, but this memory was written with one; open the session with guidance, or use guidance 1"):
        _observed(policy).plan(mode, SamplingConfig(guidance=3.0))


def test_goals(policy: Policy) -> None:
    goals = np.zeros((1, 32, 48, 3), np.uint8)
    with pytest.raises(ValueError, match=r"a goal image was given, but this model takes none; train one with model\.goal_image=true"):
        Session(policy, TASKS[:1], "metaworld", [0], goals)
    seeker = tiny_policy(tiny_config("model.goal_image=true"))
    with pytest.raises(ValueError, match=r"goals are uint8 \(1, 32, 40, 3\); expected uint8 \(rows, height, width, 3\) = \(1, 32, 48, 3\)"):
        Session(seeker, TASKS[:1], "metaworld", [0], goals[:, :, :40])


def test_names_of_robots(policy: Policy) -> None:
    with pytest.raises(ValueError, match="no embodiment 'yam'; it was trained for metaworld"):
        Session(policy, TASKS[:1], "yam", [0])
    with pytest.raises(ConfigError, match=r"data\.embodiment is 'yam', but model\.embodiments has metaworld; name one of these, or add it with its sizes"):
        tiny_config("data.embodiment=yam")


def test_a_frame_beyond_the_first_frames_reach() -> None:
    policy = tiny_policy(tiny_config("model.first_frame=concat", f"model.image_dim={IMAGE_DIM}", "timeline.blocks=2"))
    session, model = _observed(policy), policy.model
    with pytest.raises(ValueError, match=r"latent frame 3 lies beyond the 3 that the first frame conditions; start the session again from the newest frame"):
        session.conditions.first_frame_at([list(model.clock.frames(2))])


def test_instructions_without_an_encoder(policy: Policy) -> None:
    config = replace(policy.config, text=replace(policy.config.text, kind="umt5"))
    with pytest.raises(ValueError, match=r"built without its text encoder \(text\.kind 'umt5'\)"):
        WorldActionModel(config).encode_text(["open"])
