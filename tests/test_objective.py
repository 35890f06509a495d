"""Losses: what each kind of sample trains, what is counted, and that leaving out what nothing sees changes nothing."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tiny import TASKS, tiny_episode, tiny_policy, tiny_preset
from torch import nn

from wam.config import Config
from wam.data.normalize import Normalizer
from wam.flow import add_noise
from wam.inference.session import Session
from wam.model.sampling import Step, sample
from wam.relations import Reach
from wam.timeline import ACTION_KINDS, Kind
from wam.training import objective as module
from wam.training.draws import Draws
from wam.training.objective import Losses, Objective, Part, action_errors, take_rows, video_errors

EXPERTS, BATCHES = [None, 32], [1, 3]


def _batch(config: Config, size: int) -> dict[str, Any]:
    """A collated batch of random windows."""
    t, robot = config.timeline, config.model.embodiment(config.data.embodiment)
    episode, rng = tiny_episode(config, size, t.blocks), np.random.default_rng(1)
    actions = torch.from_numpy(rng.normal(size=(2, size, t.blocks * t.actions_per_block, robot.action_dim)).astype(np.float32))
    frames = torch.from_numpy(episode.frames[:, : t.frames])
    return {
        "frames": frames,
        "frames_is_pad": torch.zeros(frames.shape[:2], dtype=torch.bool),
        "state": torch.from_numpy(episode.states),
        "action": actions[0],
        "executed": actions[1],
        "action_is_pad": torch.zeros(actions.shape[1:3], dtype=torch.bool),
        "instruction": TASKS[:size],
    }


def _objective(config: Config) -> Objective:
    policy = tiny_policy(config)
    policy.model.requires_grad_(True)
    return Objective(config, policy.model, policy.codec, policy.image)


def _losses(objective: Objective, batch: dict[str, Any], mode: str | None = None) -> Losses:
    return objective(batch, torch.Generator().manual_seed(0), mode)


def _touched(module: nn.Module | None) -> bool:
    return module is not None and any(p.grad is not None and bool(p.grad.any()) for p in module.parameters())


# ------------------------------------------------------------------------------------------------ who is trained by whom


def _sees(objective: Objective, target: Kind, kinds: frozenset[Kind]) -> bool:
    """Whether predicting `target` in some block depends on tokens of `kinds`, over any number of layers (by the table alone)."""
    layout, (mode,) = objective.layout, objective.modes
    step = mode.table.dense(layout, Reach.of(objective.config.timeline)).float()
    reached = torch.linalg.matrix_power((step + torch.eye(len(step)) > 0).double(), 8) > 0
    rows, columns = layout.kinds_L == int(target), torch.isin(layout.kinds_L, torch.tensor([int(k) for k in kinds]))
    return bool(reached[rows][:, columns].any())


ALONE = ("timeline.blocks=1", "training.state_dropout=1")


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("expert", EXPERTS)
@pytest.mark.parametrize(
    ("preset", "overrides", "states", "actions"),
    [
        ("all", (), True, True),  # video follows from what was done
        ("all", ALONE, False, False),  # unless nothing was
        ("dreamzero", (), True, False),
        ("fast_wam", (), False, False),
        ("lingbot_va", (), False, True),
        ("uwm", (), False, True),  # actions of pure noise stand beside it
        ("ge_act", (), False, False),
    ],
)
def test_a_video_sample_trains_of_the_action_part_what_video_sees(preset: str, overrides: tuple[str, ...], states: bool, actions: bool, expert: int | None, batch: int) -> None:
    """Never the decoder; encoders and expert only where a path of the table leads from video to states or actions."""
    config = tiny_preset(preset, expert, "training.modes={video: 1}", "training.reduction=supervised", *overrides)
    objective = _objective(config)
    assert (_sees(objective, Kind.V, frozenset({Kind.S})) and config.training.state_dropout < 1, _sees(objective, Kind.V, ACTION_KINDS)) == (states, actions)
    losses, model = _losses(objective, _batch(config, batch)), objective.model
    assert float(losses.action().detach()) == 0 and losses.action_part.count_B.sum() == 0
    losses.video().backward()
    assert not _touched(model.action_decoder) and _touched(model.backbone.proj_out)
    assert _touched(model.action_encoder) == actions
    assert _touched(model.state_encoder) == (states or config.model.state == "context")
    assert _touched(model.expert) == (expert is not None and (states or actions))


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("expert", EXPERTS)
@pytest.mark.parametrize("preset", ["all", "dreamzero", "fast_wam", "lingbot_va", "ge_act", "vla"])
def test_an_action_sample_never_trains_the_video_head(preset: str, expert: int | None, batch: int) -> None:
    config = tiny_preset(preset, expert, "training.modes={action_only: 1}", "training.reduction=supervised")
    objective = _objective(config)
    losses, model = _losses(objective, _batch(config, batch)), objective.model
    assert float(losses.video().detach()) == 0 and losses.video_part.count_B.sum() == 0
    losses.action().backward()
    assert not _touched(model.backbone.proj_out) and _touched(model.action_decoder) and _touched(model.action_encoder)
    assert expert is None or _touched(model.expert)
    shared_head = config.model.action_head == "modulated_linear"
    table = model.backbone.scale_shift_table.grad
    assert (table is not None and bool(table.any())) == shared_head, "the norm of the video head"


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("expert", EXPERTS)
def test_mixing_samples_does_not_rescale_a_loss(expert: int | None, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples of other kinds beside them leave the actions' errors, and what they are divided by, as they were; and the video's."""
    config = tiny_preset("all", expert, "training.modes={skip: 1, video: 1, action_only: 1}", "training.state_dropout=0")
    objective, size = _objective(config), batch + 2
    rows = _batch(config, 3)
    rows = {k: (v * 2)[:size] if isinstance(v, list) else torch.cat([v, v])[:size] for k, v in rows.items()}
    whole = _losses(objective, rows, "skip")
    kinds = [0] * batch + [1, 2]
    monkeypatch.setattr(module, "draw_modes", lambda *_: kinds)
    mixed = _losses(objective, rows)
    assert mixed.modes == ["skip"] * batch + ["video", "action_only"]
    for part, without in (("video_part", batch + 1), ("action_part", batch)):
        before, after = getattr(whole, part), getattr(mixed, part)
        keep = [i for i in range(size) if i != without]
        torch.testing.assert_close(after.sum_B[keep], before.sum_B[keep], rtol=1e-4, atol=1e-5)
        assert torch.equal(after.count_B[keep], before.count_B[keep]) and after.count_B[without] == after.sum_B[without] == 0
        expected = before.sum_B[keep].sum() / before.count_B[keep].sum()
        torch.testing.assert_close(after.mean("supervised"), expected, rtol=1e-4, atol=1e-5)
    assert set(mixed.by_mode()) == {"skip/video", "skip/action", "video/video", "action_only/action"}


# ------------------------------------------------------------------------------------------------ by hand


def test_reductions_by_hand() -> None:
    part = Part(torch.tensor([6.0, 0.0, 1.0]), torch.tensor([3, 0, 2]), torch.tensor([4, 4, 4]))
    found = {name: float(part.mean(name)) for name in ("supervised", "sample", "all")}
    assert found == pytest.approx({"supervised": 7 / 5, "sample": (2 + 0.5) / 2, "all": 7 / 12})
    nothing = Part(*(torch.zeros(2) for _ in range(2)), torch.full((2,), 4.0))
    assert [float(nothing.mean(name)) for name in found] == [0, 0, 0]


def test_errors_by_hand() -> None:
    """Two frames of one sample, errors 1 and 2, the second padding; three actions of two channels, one of them not the robot's, weights 1, 2, 3."""
    velocity = torch.tensor([1.0, 2.0]).view(1, 1, 2, 1, 1).expand(1, 5, 2, 4, 6)
    video = video_errors(velocity, torch.zeros_like(velocity), torch.tensor([[3.0, 1.0]]), torch.tensor([[True, False]]))
    assert [float(x) for x in (video.sum_B, video.count_B, video.total_B)] == [3, 1, 2]
    velocity = torch.tensor([[[1.0, 7.0], [2.0, 7.0], [3.0, 7.0]]])
    seen = torch.tensor([[[True], [False], [True]]]) & torch.tensor([[[True, False]]])
    action = action_errors(velocity, torch.zeros_like(velocity), torch.tensor([[1.0, 2.0, 3.0]]), seen)
    assert [float(x) for x in (action.sum_B, action.count_B, action.total_B)] == [(1 + 3 * 9) / 2, 1, 3]
    assert float(action.mean("supervised")) == 14, "the mean over supervised channels of weighted squares"


def test_noise_at_level_one_carries_nothing_of_the_data() -> None:
    noise, a, b = torch.randn(3, 4).unbind(0)
    assert torch.equal(add_noise(a, noise, torch.tensor(1.0)), add_noise(b, noise, torch.tensor(1.0)))
    assert torch.equal(add_noise(a, noise, torch.tensor(0.0)), a)


# ------------------------------------------------------------------------------------------------ channels


WIDE = ("model.action_width=7", "model.embodiments=[{name: metaworld, state_dim: 4, action_dim: 4, action_channels: [5, 1, 3, 0]}]")


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("expert", EXPERTS)
@pytest.mark.parametrize("padding", ["zero", "noise"])
def test_channels_that_a_robot_lacks_are_neither_supervised_nor_moved(padding: str, expert: int | None, batch: int) -> None:
    config = tiny_preset("all", expert, *WIDE, f"model.action_padding={padding}", "training.modes={skip: 1}")
    objective = _objective(config)
    losses, model = _losses(objective, _batch(config, batch)), objective.model
    losses.action().backward()
    own, others = [0, 1, 3, 5], [2, 4, 6]
    for gradient in (model.action_decoder.out.bias.grad, model.action_decoder.out.weight.grad):
        assert gradient is not None and not gradient[..., others].any() and gradient[..., own].any(dim=0).all()
    encoder = model.action_encoder.embed.weight.grad
    assert encoder is not None and bool(encoder[:, others].any()) == (padding == "noise") and bool(encoder[:, own].any())

    policy = tiny_policy(config)
    episode = tiny_episode(config, batch, 1)
    session = Session(policy, TASKS[:batch], "metaworld", list(range(batch)))
    session.observe(*episode.at(0))
    steps: list[Step] = []
    noise = session._noise()
    sample(policy.model, policy.model.relations.mode("skip"), session._situation(None), noise, config.sampling, watch=steps.append)
    for step in steps:
        assert step.sample.action_BTA is not None and bool(step.sample.action_BTA[..., others].any()) == (padding == "noise")
    assert session.plan("skip").actions.shape == (batch, 8, 4)


def test_a_robots_channels_go_in_and_come_out_in_its_own_order() -> None:
    policy = tiny_policy(tiny_preset("all", None, *WIDE))
    session = Session(policy, TASKS[:1], "metaworld", [0])
    session.observe(*tiny_episode(policy.config, 1, 1).at(0))
    actions = np.random.default_rng(0).uniform(-0.5, 0.5, (1, 8, 4)).astype(np.float32)
    padded = session._normalized(actions)
    normal = Normalizer.from_dict(policy.normalizer).normalize("action", actions)
    assert np.array_equal(padded[..., [5, 1, 3, 0]].numpy(), normal) and not padded[..., [2, 4, 6]].any()


# ------------------------------------------------------------------------------------------------ what is left out


PRUNED = [
    ("all", "{skip: 1}"),
    ("all", "{skip_registers: 1}"),
    ("all", "{inverse: 1, forward: 1}"),
    ("dreamzero", "{joint_mutual: 1}"),
    ("fast_wam_idm", "{imagine: 1}"),
    ("lingbot_va", "{imagine: 1}"),
    ("uwm", "{joint_mutual: 1, forward: 1}"),
]


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("expert", EXPERTS)
@pytest.mark.parametrize(("preset", "modes"), PRUNED)
def test_leaving_out_what_nothing_supervised_sees_changes_no_loss(preset: str, modes: str, expert: int | None, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_preset(preset, expert, f"training.modes={modes}")
    inputs, pruned = _batch(config, batch), _objective(config)
    monkeypatch.setattr(module, "needed", lambda layout, *_: layout)
    whole = _objective(config)
    assert len(pruned.layout) < len(whole.layout) or (preset, modes) == ("all", "{inverse: 1, forward: 1}")
    a, b = _losses(pruned, inputs), _losses(whole, inputs)
    for found, expected in ((a.video(), b.video()), (a.action(), b.action())):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_what_is_needed() -> None:
    def kinds(preset: str, modes: str) -> set[str]:
        objective = _objective(tiny_preset(preset, None, f"training.modes={modes}"))
        return {f"{s.kind.label}{s.block}" for s in objective.layout.segments}

    assert kinds("fast_wam", "{skip: 1}") == {"H-1", "V0", "A0"}
    assert kinds("fast_wam_idm", "{imagine: 1}") == {"H-1", "Vc0", "V0", "A0"}
    assert {"Vc3", "Ac3"}.isdisjoint(kinds("all", "{skip: 1}")) and "Vc3" in kinds("all", "{imagine: 1}") and "Ac3" in kinds("all", "{forward: 1}")


def test_actions_before_the_first_frame_are_zeros_as_in_a_session() -> None:
    config = tiny_preset("lingbot_va")
    objective, batch = _objective(config), _batch(config, 2)
    lead = config.timeline.lead
    assert lead == 8
    for key in ("action", "executed"):
        found = objective.actions_of(batch, key)
        assert not found[:, :lead].any() and torch.equal(found[:, lead:], batch[key][:, lead:])
    changed = {**batch, "executed": batch["executed"].clone(), "action": batch["action"].clone()}
    changed["executed"][:, :lead] += 1
    changed["action"][:, :lead] += 1
    assert torch.equal(_losses(objective, batch).action(), _losses(objective, changed).action())


@pytest.mark.parametrize("expert", EXPERTS)
def test_laying_out_what_the_drawn_modes_need_changes_no_loss(expert: int | None) -> None:
    config = tiny_preset("all", expert, "training.modes={skip: 1, imagine: 1, forward: 1}")
    objective, inputs = _objective(config), _batch(config, 2)
    for mode in range(3):
        drawn = replace(objective.draw(inputs, torch.Generator().manual_seed(3), list(config.training.modes)[mode]), among=frozenset({mode}))
        whole = objective.losses(inputs, objective.draw(inputs, torch.Generator().manual_seed(3), list(config.training.modes)[mode]))
        small = objective.losses(inputs, drawn)
        assert len(objective.lay(drawn.among).layout) < len(objective.layout)
        for part in ("video_part", "action_part"):
            torch.testing.assert_close(getattr(small, part).sum_B, getattr(whole, part).sum_B, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------ the whole batch


@pytest.mark.parametrize("reduction", ["supervised", "sample", "all"])
def test_parts_of_a_batch_add_up_to_its_loss(reduction: str) -> None:
    """However rows are shared: each part's total over the whole batch's denominator, which is known before the network runs."""
    config = tiny_preset("all", None, f"training.reduction={reduction}")
    objective, inputs = _objective(config), _batch(config, 3)
    inputs["action_is_pad"][0, 3:] = True
    inputs["frames_is_pad"][1, 5:] = True
    whole = objective(inputs, Draws.at(7, 2, range(3)))
    rows = [slice(0, 1), slice(1, 3)]
    parts = [(take_rows(inputs, s), Draws.at(7, 2, range(s.start, s.stop))) for s in rows]
    drawn = [objective.draw(*part) for part in parts]
    losses = [objective.losses(batch, d) for (batch, _), d in zip(parts, drawn, strict=True)]
    together = Losses.cat(losses)
    assert together.modes == whole.modes
    for index, part in enumerate(("video_part", "action_part")):
        denominator = sum(d.counts()[index].denominator(reduction) for d in drawn)
        found = sum(getattr(x, part).total(reduction) for x in losses) / denominator
        torch.testing.assert_close(found, getattr(whole, part).mean(reduction), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(getattr(together, part).mean(reduction), found)
        assert getattr(together, part).error_BU.shape == getattr(whole, part).error_BU.shape
    means = torch.stack([x.action() for x in losses]).mean()
    assert reduction != "supervised" or not torch.isclose(means, whole.action(), rtol=1e-3), "an average of averages is another number"
