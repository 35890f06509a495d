"""Levels of training: their distributions, what shares a draw, and what the published systems do, as configs."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from wam.config import ConfigError, HistoryLevelsConfig, LevelsConfig, NoiseConfig, TimelineConfig, VideoLevelsConfig, from_dict
from wam.flow import level_table, shift_levels
from wam.relations import get_mode
from wam.timeline import Kind
from wam.training.draws import Draws, philox
from wam.training.noise import LevelDraw, draw_levels, draw_modes, level_weights

PUBLISHED: dict[str, Any] = json.loads((Path(__file__).parent / "data" / "schedules.json").read_text())
TIMELINE = TimelineConfig(blocks=3, latents_per_block=2, actions_per_block=8, frame_stride=1)
INSIDE = replace(TIMELINE, first_frame="inside")
QUIET = NoiseConfig(video=VideoLevelsConfig(shift=1, at_one=0), coupled=0, condition_probability=0)  # plain uniform levels


def draw(config: NoiseConfig, modes: list[str], timeline: TimelineConfig = TIMELINE, seed: int = 0, **more: Any) -> LevelDraw:
    return draw_levels(config, timeline, [get_mode(m) for m in modes], torch.Generator().manual_seed(seed), **more)


def video_levels(**levels: Any) -> Tensor:
    """Many draws of video levels, one per sample and block, flat."""
    return draw(replace(QUIET, video=VideoLevelsConfig(**{"shift": 1.0, "at_one": 0.0, **levels})), ["skip"] * 4000).video_BF[:, ::2].flatten()


def distinct(levels: Tensor) -> int:
    return int(torch.tensor([len(row.unique()) for row in levels]).max())


# ------------------------------------------------------------------------------------------------ distributions


def test_a_shifted_uniform_draw_has_the_quantiles_of_the_shift() -> None:
    levels = video_levels(shift=5)
    assert torch.allclose(levels.quantile(torch.tensor([0.1, 0.5, 0.9])), shift_levels(torch.tensor([0.1, 0.5, 0.9]), 5.0), atol=0.02)


def test_beta_and_logit_normal_draws_have_their_moments() -> None:
    beta = video_levels(distribution="beta", alpha=7, beta=1)
    assert float(beta.mean()) == pytest.approx(7 / 8, abs=0.003) and float(beta.var()) == pytest.approx(7 / (64 * 9), abs=0.001)
    assert float(video_levels(distribution="beta", alpha=1, beta=1.5).mean()) == pytest.approx(1 / 2.5, abs=0.01)
    logits = torch.logit(video_levels(distribution="logit_normal", mean=0.5, std=1.5))
    assert float(logits.mean()) == pytest.approx(0.5, abs=0.05) and float(logits.std()) == pytest.approx(1.5, abs=0.05)


def test_bounds_lie_before_the_shift() -> None:
    levels = video_levels(low=0.25, high=0.5, shift=5)
    assert float(levels.min()) == pytest.approx(0.625, abs=0.01) and float(levels.max()) == pytest.approx(5 / 6, abs=0.01)


def test_atoms_have_the_mass_that_was_asked_for() -> None:
    levels = video_levels(at_zero=0.2, at_one=0.3)
    assert float((levels == 0).float().mean()) == pytest.approx(0.2, abs=0.015) and float((levels == 1).float().mean()) == pytest.approx(0.3, abs=0.015)
    between = levels[(levels > 0) & (levels < 1)]
    assert float(between.mean()) == pytest.approx(0.5, abs=0.015), "the rest is drawn as before"
    assert (video_levels(at_zero=0.5, at_one=0.5) % 1 == 0).all()


def test_a_table_is_met_exactly_everywhere_and_evenly() -> None:
    levels = video_levels(table=1000, shift=5)
    table = level_table(5.0)
    index = (levels.unsqueeze(-1) == table).float().argmax(-1)
    assert torch.equal(levels, table[index]), "no level lies beside the table"
    assert len(index.unique()) > 990 and float(index.float().mean()) == pytest.approx(499.5, abs=10)


def test_the_defaults_draw_what_they_always_did() -> None:
    levels = draw(NoiseConfig(), ["joint"] * 2000)
    video, action = levels.video_BF[:, ::2], levels.action_BT[:, ::8]
    assert float((video == 1).float().mean()) == pytest.approx(0.3, abs=0.02)
    assert torch.allclose(video[video < 1].quantile(torch.tensor([0.25, 0.75])), shift_levels(torch.tensor([0.25, 0.75]), 3.0), atol=0.02)
    assert float(action.mean()) == pytest.approx(0.5, abs=0.02), "actions are not shifted"
    same = torch.isclose(action, video / (3 - 2 * video), atol=1e-5)[video < 1]
    assert float(same.float().mean()) == pytest.approx(0.5, abs=0.03), "half of the samples are coupled, in the place in the schedule"


# ------------------------------------------------------------------------------------------------ what shares a draw


@pytest.mark.parametrize(("per", "video", "action"), [("sample", 1, 1), ("block", 3, 3), ("frame", 6, 6), ("token", 6, 24)])
def test_how_many_levels_a_sample_has(per: Any, video: int, action: int) -> None:
    levels = draw(replace(QUIET, video=VideoLevelsConfig(per=per, at_one=0), action=LevelsConfig(per=per)), ["skip"] * 16)
    assert levels.video_BF.shape == (16, 6) and levels.action_BT.shape == (16, 24) and levels.clean_BF.shape == (16, 7)
    assert distinct(levels.video_BF) == video and distinct(levels.action_BT) == action
    stretches = levels.action_BT.unflatten(1, (action, -1))
    assert (stretches == stretches[..., :1]).all(), "what shares a draw lies side by side"


def test_draws_are_independent_between_blocks_kinds_and_samples_and_repeat_with_the_generator() -> None:
    levels = draw(QUIET, ["skip"] * 2000)
    columns = torch.cat([levels.video_BF[:, ::2], levels.action_BT[:, ::8]], dim=1)
    off_diagonal = torch.corrcoef(columns.T) - torch.eye(6)
    assert float(off_diagonal.abs().max()) < 0.08
    again, other = draw(QUIET, ["skip"] * 2000), draw(QUIET, ["skip"] * 2000, seed=1)
    assert torch.equal(levels.action_BT, again.action_BT) and not torch.isclose(levels.action_BT, other.action_BT).all()
    beta = replace(QUIET, action=LevelsConfig(distribution="beta", alpha=3))
    assert torch.equal(draw(beta, ["skip"] * 4).action_BT, draw(beta, ["skip"] * 4).action_BT)
    assert not torch.equal(draw(beta, ["skip"] * 4).action_BT, draw(beta, ["skip"] * 4, seed=1).action_BT)


def test_coupling_shares_the_place_in_the_schedule_where_actions_see_noisy_video() -> None:
    config = replace(QUIET, coupled=1, video=VideoLevelsConfig(shift=5, at_one=0), action=LevelsConfig(shift=2))
    video_u = lambda levels: levels.video_BF / (5 - 4 * levels.video_BF)  # noqa: E731
    joint = draw(config, ["joint", "joint_mutual"] * 8)
    assert torch.allclose(joint.action_BT[:, ::4], shift_levels(video_u(joint), 2.0), atol=1e-5)
    skip = draw(config, ["skip", "imagine"] * 8)
    assert not torch.isclose(skip.action_BT[:, ::4], shift_levels(video_u(skip), 2.0), atol=1e-5).any()
    always = draw(replace(config, couple_always=True), ["skip", "imagine"] * 8)
    assert torch.allclose(always.action_BT[:, ::4], shift_levels(video_u(always), 2.0), atol=1e-5)


def test_coupling_is_drawn_once_per_sample() -> None:
    levels = draw(replace(QUIET, coupled=0.25), ["joint"] * 4000)
    same = levels.action_BT[:, ::4] == levels.video_BF
    assert torch.equal(same.all(dim=1), same.any(dim=1)) and float(same.float().mean()) == pytest.approx(0.25, abs=0.03)


# ------------------------------------------------------------------------------------------------ conditions, history, what is given


def test_conditions_are_noised_only_where_actions_see_them_and_never_the_first_frame() -> None:
    imagine = draw(replace(QUIET, condition_probability=1.0), ["imagine"] * 32).clean_BF
    assert (imagine[:, 0] == 0).all() and (imagine[:, 1:] > 0).all() and distinct(imagine[:, 1:]) == 3
    inside = draw(replace(QUIET, condition_probability=1.0), ["imagine"] * 32, INSIDE).clean_BF
    assert (inside[:, 0] == 0).all() and (inside[:, 1:] > 0).all()
    assert (draw(replace(QUIET, condition_probability=1.0), ["skip", "forward", "joint"] * 8).clean_BF == 0).all()
    half = draw(replace(QUIET, condition_probability=0.5), ["imagine"] * 2000).clean_BF[:, 1:] > 0
    assert torch.equal(half.all(dim=1), half.any(dim=1)) and float(half.float().mean()) == pytest.approx(0.5, abs=0.03)


def test_history_is_noised_in_every_mode_frame_by_frame() -> None:
    config = replace(QUIET, history_probability=0.5)
    clean = draw(config, ["skip", "forward"] * 1000).clean_BF
    noised = clean > 0
    assert torch.equal(noised.all(dim=1), noised.any(dim=1)) and float(noised.float().mean()) == pytest.approx(0.5, abs=0.03)
    assert distinct(clean) == 7, "each frame its own, the first too"
    levels = clean[noised]
    assert float(levels.max()) < 5 / 6 and float(levels.median()) == pytest.approx(5 * 0.25 / 2, abs=0.02), "the cleaner half of the schedule"


def test_conditions_come_before_history() -> None:
    config = replace(QUIET, history_probability=1.0, condition_probability=1.0, condition=LevelsConfig(low=0.95))
    clean = draw(config, ["imagine"] * 16).clean_BF
    assert (clean[:, 1:] >= 0.95).all() and (clean[:, 0] == 0).all()
    assert (draw(config, ["skip"] * 16).clean_BF < 0.95).all()


def test_a_first_frame_that_is_predicted_has_a_draw_of_its_own() -> None:
    levels = draw(QUIET, ["skip"] * 2000, predict_first_frame=True)
    assert levels.first_B1 is not None and levels.first_B1.shape == (2000, 1)
    columns = torch.cat([levels.first_B1, levels.video_BF[:, ::2]], dim=1)
    assert float((torch.corrcoef(columns.T) - torch.eye(4)).abs().max()) < 0.08
    assert draw(QUIET, ["skip"]).first_B1 is None


def test_a_first_frame_inside_the_first_block_is_given_and_its_actions_are_padding() -> None:
    levels = draw(replace(QUIET, video=VideoLevelsConfig(at_one=0, per="frame")), ["skip"] * 16, INSIDE)
    assert levels.clean_BF.shape == levels.video_BF.shape == (16, 6) and INSIDE.lead == 4
    assert (levels.video_BF[:, 0] == 0).all() and (levels.video_BF[:, 1:] > 0).all()
    assert (levels.action_BT[:, :4] == 0).all() and (levels.action_BT[:, 4:] > 0).all()
    assert not levels.video_seeks[:, 0].any() and levels.video_seeks[:, 1:].all() and torch.equal(levels.action_seeks, levels.action_BT > 0)
    predicted = draw(QUIET, ["skip"] * 16, INSIDE, predict_first_frame=True)
    assert (predicted.video_BF > 0).all() and predicted.first_B1 is None, "it is one of the noisy frames"


def test_a_committed_prefix_is_given_in_every_block_of_some_samples() -> None:
    levels = draw(replace(QUIET, prefix=0.5), ["skip"] * 2000)
    given = (levels.action_BT == 0).unflatten(1, (3, 8))
    length = given.sum(dim=2)
    assert torch.equal(given, torch.arange(8) < length[..., None]), "the first actions, without holes"
    chosen = (length > 0).all(dim=1)
    assert torch.equal(chosen, (length > 0).any(dim=1)) and float(chosen.float().mean()) == pytest.approx(0.5, abs=0.04)
    counts = length[chosen].flatten().bincount(minlength=9)
    assert counts[0] == counts[8] == 0 and counts[1:8].min() > 0.8 * counts.sum() / 7, "1..7, evenly"


def test_modes_fix_levels_of_their_own_samples() -> None:
    registers, given = get_mode("skip_registers"), replace(get_mode("video"), live=(Kind.V, Kind.A), pinned={Kind.A: 0.0})
    config, modes = replace(QUIET, coupled=1, video=VideoLevelsConfig(at_one=0, low=0.9)), [registers, given, get_mode("joint")]
    levels = draw_levels(config, TIMELINE, modes, torch.Generator().manual_seed(0), predict_first_frame=True)
    assert levels.first_B1 is not None and levels.first_B1[0] == 1
    assert (levels.video_BF[0] == 1).all() and (levels.action_BT[0] < 1).all() and not (levels.action_BT[0] == 0).any()
    assert (levels.action_BT[2] >= 0.9).all() and (levels.action_BT[0] < 0.9).any(), "no coupling to video that is pinned"
    assert (levels.action_BT[1] == 0).all() and (levels.video_BF[1:] < 1).all() and (levels.video_BF[1:] > 0).all()


# ------------------------------------------------------------------------------------------------ the published draws


def test_dreamzero() -> None:
    """One index of 1000 per block, the first frame's own, actions always their block's; the bump, looked up."""
    levels = VideoLevelsConfig(shift=5, at_one=0, table=1000, weighting="bump")
    config = replace(QUIET, video=levels, action=LevelsConfig(shift=5, table=1000, weighting="bump"), coupled=1, couple_always=True)
    found = draw(config, ["joint_mutual", "skip"] * 1000, predict_first_frame=True)
    assert found.first_B1 is not None and torch.isin(found.first_B1, level_table(5.0)).all()
    assert torch.isin(found.video_BF, level_table(5.0)).all() and distinct(found.video_BF) == 3
    assert torch.equal(found.action_BT.unflatten(1, (3, 8)), found.video_BF[:, ::2, None].expand(-1, -1, 8)), "to the bit"
    t = 1000 * found.video_BF
    assert float(t.mean()) == pytest.approx(747.6, abs=10) and float((t > 900).float().mean()) == pytest.approx(0.358, abs=0.02)
    weights = level_weights(levels, found.video_BF)
    assert weights.shape == t.shape and float(weights.mean()) == pytest.approx(1, abs=0.03)
    assert float(weights[t > 900].sum() / weights.sum()) == pytest.approx(0.101, abs=0.015)
    table = PUBLISHED["dreamzero"]["table"]
    assert torch.equal(level_weights(levels, torch.tensor(table["sigmas"])), torch.tensor(table["weights"]))


def test_dreamzero_flash() -> None:
    """Video near noise by Beta(7, 1) before the shift; a level of its own for every action."""
    video = VideoLevelsConfig(distribution="beta", alpha=7, shift=5, at_one=0, table=1000, weighting="bump")
    found = draw(replace(QUIET, video=video, action=LevelsConfig(shift=5, table=1000, per="token")), ["joint_mutual"] * 2000)
    assert float(1000 * found.video_BF.mean()) == pytest.approx(969, abs=3)
    assert float(level_weights(video, found.video_BF).mean()) == pytest.approx(0.20, abs=0.02)
    assert distinct(found.action_BT) >= 22 and torch.isin(found.action_BT, level_table(5.0)).all()


def test_fast_wam_idm() -> None:
    """Independent continuous draws per sample; a condition that is clean half of the time, else anywhere; the bump between entries too."""
    levels = LevelsConfig(shift=5, per="sample", weighting="bump")
    video = VideoLevelsConfig(shift=5, at_one=0, per="sample", weighting="bump")
    found = draw(NoiseConfig(video=video, action=levels, condition=levels, coupled=0), ["imagine"] * 2000)
    assert distinct(found.video_BF) == distinct(found.action_BT) == 1 and not torch.isin(found.video_BF, level_table(5.0)).all()
    three = torch.stack([found.video_BF[:, 0], found.action_BT[:, 0], found.clean_BF[:, 1]])
    assert float((torch.corrcoef(three) - torch.eye(3)).abs().max()) < 0.08
    assert float((found.clean_BF[:, 1:] == 0).float().mean()) == pytest.approx(0.5, abs=0.04)
    published = PUBLISHED["fast_wam"]
    weights = level_weights(levels, shift_levels(torch.tensor(published["u"]), 5.0))
    assert torch.allclose(weights, torch.tensor(published["weights"]), rtol=0, atol=1e-6)


def test_lingbot_va() -> None:
    """Every latent frame and the actions that lead to it on their own; half of the samples with noised history."""
    config = NoiseConfig(
        video=VideoLevelsConfig(shift=5, at_one=0, per="frame", table=1000),
        action=LevelsConfig(per="frame", table=1000),
        coupled=0,
        condition_probability=0,
        history_probability=0.5,
        history=HistoryLevelsConfig(table=1000),
    )
    found = draw(config, ["imagine"] * 500, INSIDE, predict_first_frame=True)
    assert distinct(found.video_BF) == 6 and distinct(found.action_BT[:, INSIDE.lead :]) == 5
    assert torch.isin(found.action_BT[:, INSIDE.lead :], level_table(1.0)).all()
    noised = found.clean_BF[found.clean_BF > 0]
    assert torch.isin(noised, level_table(5.0)[500:]).all()


# ------------------------------------------------------------------------------------------------ the rest


def test_weights_are_ones_unless_asked_for() -> None:
    assert torch.equal(level_weights(LevelsConfig(), torch.rand(2, 3)), torch.ones(2, 3))


def test_modes_are_drawn_by_weight_from_the_generator() -> None:
    weights = {"skip": 3.0, "joint": 0.0, "forward": 1.0}
    draws = draw_modes(weights, 4000, torch.Generator().manual_seed(1))
    assert draws == draw_modes(weights, 4000, torch.Generator().manual_seed(1))
    assert draws.count(1) == 0 and draws.count(0) / 4000 == pytest.approx(0.75, abs=0.03)


def test_a_changed_key_leaves_the_others_at_their_defaults() -> None:
    config = from_dict(NoiseConfig, {"video": {"shift": 5.0}, "history": {"table": 1000}})
    assert config.video == VideoLevelsConfig(shift=5.0) and config.video.at_one == 0.3
    assert config.history.high == 0.5 and config.history.per == "frame"


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"video": {"at_zero": 0.6, "at_one": 0.6}}, "at_zero 0.6 [+] at_one 0.6 is above 1"),
        ({"action": {"shift": 0}}, "shift is 0.0; a shift is positive"),
        ({"action": {"distribution": "beta", "alpha": 0}}, "alpha is 0.0"),
        ({"history": {"low": 0.7}}, "low..high is 0.7..0.5"),
        ({"condition": {"table": 1}}, "table is 1; expected at least 2"),
        ({"prefix": 1.5}, "noise.prefix is 1.5"),
        ({"action": {"per": "tokens"}}, "did you mean 'token'"),
        ({"video": {"mean": math.inf}}, "mean is inf"),
    ],
)
def test_bad_levels_are_refused(tree: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_dict(NoiseConfig, tree, "noise")


# ------------------------------------------------------------------------------------------------ row by row


def test_philox_is_philox() -> None:
    """Known answers of Random123 1.14 (kat_vectors, philox4x32 10)."""
    for word, expected in ((0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]), (2**32 - 1, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD])):
        x = np.full(1, word, np.uint64)
        assert [int(y[0]) for y in philox((x, x), (x, x, x, x))] == expected


def test_a_rows_numbers_do_not_depend_on_its_batch() -> None:
    """Eight rows at once, or four and four; other rows, steps and seeds have others."""
    config = NoiseConfig(video=VideoLevelsConfig(per="frame"), action=LevelsConfig(distribution="beta", alpha=2, beta=3, per="token"), history_probability=0.5, prefix=0.5)
    modes = [get_mode(m) for m in ("skip", "joint", "imagine", "joint_mutual") * 2]

    def numbers(rows: range, step: int = 5, seed: int = 1) -> list[Tensor]:
        draws = Draws.at(seed, step, rows)
        drawn = torch.tensor(draw_modes({"a": 1, "b": 2, "c": 1}, len(rows), draws))
        levels = draw_levels(config, TIMELINE, [modes[i % 8] for i in rows], draws, predict_first_frame=True)
        return [drawn, levels.clean_BF, levels.video_BF, levels.action_BT, levels.first_B1, *draws.normals([(2, 3), (300,)], torch.device("cpu")), draws.uniform(500)]  # type: ignore[list-item]

    whole = numbers(range(8))
    for part in (range(4), range(4, 8), range(3, 4)):
        assert all(torch.equal(a[part.start : part.stop], b) for a, b in zip(whole, numbers(part), strict=True))
    for other in (numbers(range(8, 16)), numbers(range(8), step=6), numbers(range(8), seed=2), numbers(range(8), seed=1 + 2**32)):
        assert all(not torch.equal(a, b) for a, b in zip(whole[1:], other[1:], strict=True))
    flat = torch.cat([x.flatten() for x in numbers(range(4000))[5:7]])
    assert abs(float(flat.mean())) < 0.01 and abs(float(flat.std()) - 1) < 0.01
    u = Draws.at(0, 0, range(2000)).uniform(50)
    assert abs(float(u.mean()) - 0.5) < 0.003 and float(u.min()) >= 0 and float(u.max()) < 1 and len(u.unique()) > 0.99 * u.numel()


@pytest.mark.parametrize(("alpha", "beta"), [(7.0, 1.0), (1.0, 4.0), (2.0, 3.0)])
def test_beta_has_its_moments(alpha: float, beta: float) -> None:
    x = Draws.at(0, 0, range(4000)).beta(alpha, beta, 20).double()
    mean = alpha / (alpha + beta)
    assert float(x.mean()) == pytest.approx(mean, abs=5e-3)
    assert float(x.var()) == pytest.approx(mean * (1 - mean) / (alpha + beta + 1), rel=0.03)


def test_modes_that_do_not_fit_a_sample_are_not_drawn() -> None:
    possible = torch.tensor([[True, False, True], [False, False, False]]).repeat_interleave(500, dim=0)
    drawn = draw_modes({"a": 1, "b": 5, "c": 3}, 1000, Draws.at(0, 0, range(1000)), possible)
    assert set(drawn[:500]) == {0, 2} and drawn[:500].count(2) == pytest.approx(375, abs=40)
    assert set(drawn[500:]) == {0, 1, 2}, "where none fits, all do"
    assert 1 not in draw_modes({"a": 1, "b": 0, "c": 3}, 1000, Draws.at(0, 1, range(1000)))
