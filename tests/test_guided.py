"""Planning while the robot moves: drawn to promised actions, held to committed ones, and ahead of frames that have not come."""

import re
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from test_modes import AC, CASES, VC, A, V, _at_the_end, _conditions, _drive, _given, _modes, _no_states, _session, _teacher, _without_state, window_of
from test_objective import _batch
from tiny import TASKS, Episode, tiny_episode, tiny_policy, tiny_preset
from torch import Tensor

from wam.config import SamplingConfig
from wam.inference.batch import Back, Commit, Go, Observe, Think, run
from wam.inference.guided import plan_guided, soft_weights
from wam.inference.session import Plan, Session
from wam.model.sampling import Noise, Situation, Step, sample
from wam.pretrained import Policy
from wam.relations import Mode
from wam.training.objective import Objective

SETTINGS: dict[str, tuple[str, ...]] = {  # what a gradient has to go through
    "all": (),
    "guidance": ("sampling.guidance=2.5", "training.text_dropout=0.1"),
    "unipc": ("sampling.solver=unipc", "sampling.steps=5"),
    "reuse": ("sampling.reuse=mask", "sampling.steps=5", "sampling.evaluations=4"),
}
AHEAD = {  # preset, mode of planning, overrides
    "all": ("all", "imagine", ("timeline.history=1",)),
    "guidance": ("all", "joint", SETTINGS["guidance"]),
    "live states": ("dreamzero", "joint_mutual", ()),
    "first frame inside": ("lingbot_va", "imagine", ()),
}
BLOCKS = 3


@cache
def _policy(preset: str, expert: int | None, *overrides: str) -> Policy:
    return tiny_policy(tiny_preset(preset, expert, *overrides))


def _robots(policy: Policy, rows: list[int], blocks: int = 1) -> tuple[Session, Episode]:
    """A session that has seen `blocks` blocks begin, and what goes on."""
    episode = tiny_episode(policy.config, 3, BLOCKS).rows(rows)
    session = Session(policy, [TASKS[r] for r in rows], "metaworld", [100 + r for r in rows])
    for block in range(episode.first_block, episode.first_block + blocks):
        session.observe(*episode.at(block))
        if block < episode.first_block + blocks - 1:
            session.commit(episode.done(block))
    return session, episode


def _planned(policy: Policy, mode: str, *promised: Any, guidance: float = 5.0, rows: list[int] = [0, 1]) -> np.ndarray:  # noqa: B006
    """The actions of a plan, drawn to (committed, promised) where they are given."""
    session, _ = _robots(policy, rows)
    plan = plan_guided(session, mode, None, *promised, guidance) if promised else session.plan(mode)
    assert plan.actions is not None
    return plan.actions


# ------------------------------------------------------------------------------------------------ promised


def test_weights_are_those_of_the_paper() -> None:
    found = soft_weights(2, 5, 8)
    soft = [c * (np.e**c - 1) / (np.e - 1) for c in (3 / 4, 2 / 4, 1 / 4)]
    np.testing.assert_allclose(found, [1, 1, *soft, 0, 0, 0])
    assert soft_weights(0, 0, 3) == [0, 0, 0] and soft_weights(4, 4, 4) == [1, 1, 1, 1]


@pytest.mark.parametrize(("name", "expert"), [("all", None), ("guidance", 32), ("unipc", 32), ("reuse", None)])
def test_plans_are_pulled_to_what_was_promised_in_every_mode(name: str, expert: int | None) -> None:
    """Towards the promised actions, hardly where those are its own, not at all without weight; as alone, with the noise that a plain plan has."""
    policy, wished = _policy("all", expert, *SETTINGS[name]), np.random.default_rng(3).uniform(-1, 1, (2, 6, 4)).astype(np.float32)
    modes = [mode.name for mode in _modes(policy.model) if A in mode.denoised and mode.name != "inverse"]
    assert len(modes) >= 5
    modes = modes if name == "all" else ["joint_mutual"]
    for mode in modes:
        plain, pulled, hardly = _planned(policy, mode), _planned(policy, mode, None, wished), _planned(policy, mode, None, wished, guidance=1e-6)
        assert np.array_equal(_planned(policy, mode, None, wished, guidance=0.0), plain) and not np.array_equal(hardly, plain)
        np.testing.assert_allclose(hardly, plain, atol=1e-4)
        before, after = (np.abs(x[:, :3] - wished[:, :3]).mean() for x in (plain, pulled))
        assert np.isfinite(pulled).all() and after < 0.4 * before, f"{mode}: {before:.3f} without, {after:.3f} with guidance"
        own = _planned(policy, mode, None, plain[:, :6])
        assert np.abs(own - plain).mean() < 0.25 * np.abs(pulled - plain).mean(), f"{mode}: a plan that was promised already moves"
        alone = _planned(policy, mode, None, wished[1:], rows=[1])
        np.testing.assert_allclose(alone[0], pulled[1], rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("preset", ["lingbot_va", "dreamzero", "fast_wam"])
def test_what_is_executed_meanwhile_weighs_most_and_is_returned(preset: str) -> None:
    """Also in block 0 behind a first frame inside it, with live states, and with states in the text; a joined memory as each alone."""
    policy = _policy(preset, 32)
    mode = next(name for name in ("imagine", "joint_mutual", "skip") if name in policy.config.training.modes or name == "skip")
    wished = np.random.default_rng(3).uniform(-1, 1, (2, 5, 4)).astype(np.float32)
    plain, frozen = _planned(policy, mode), _planned(policy, mode, wished[:, :4], wished)
    assert plain.shape == frozen.shape and np.array_equal(frozen[:, :4], wished[:, :4])
    assert np.abs(frozen[:, 4] - wished[:, 4]).mean() < np.abs(plain[:, 4] - wished[:, 4]).mean()
    sessions = [_robots(policy, [row])[0] for row in (0, 1)]
    guide = _Guide()
    plans = run(sessions, [[Think(mode, policy.config.sampling, wished[r : r + 1, :4], wished[r : r + 1], plan_with=guide.plan)] for r in (0, 1)])
    assert guide.rows == [2]
    for row, plan in enumerate(plans):
        assert plan is not None and plan.actions is not None
        np.testing.assert_allclose(plan.actions[0], frozen[row], rtol=1e-3, atol=2e-4)


class _Guide:
    """Plans in place of a session, and notes for how many robots at once."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def plan(self, session: Session, mode: str, sampling: SamplingConfig, committed: np.ndarray | None, promised: np.ndarray | None) -> Plan:
        assert promised is not None
        self.rows.append(session.batch)
        return plan_guided(session, mode, sampling, committed, promised, 5.0)


def test_the_gradient_may_be_left_out() -> None:
    """Where the network's answer does not follow the actions, what is expected of them does, one for one, and both ways are the same; else they differ."""
    wished = np.random.default_rng(3).uniform(-1, 1, (2, 6, 4)).astype(np.float32)
    for constant in (True, False):
        policy = tiny_policy(tiny_preset("all"))
        if constant:
            policy.model.action_decoder.out.weight.zero_()
        plans = [plan_guided(_robots(policy, [0, 1])[0], "skip", None, None, wished, 5.0, gradient).actions for gradient in ("network", "identity")]
        assert np.allclose(*plans, atol=1e-5) == constant


def test_what_cannot_be_promised_is_refused() -> None:
    policy = _policy("all", None)
    session, _ = _robots(policy, [0, 1])
    for promised, message in ((np.zeros((2, 9, 4)), "up to 8 actions"), (np.zeros((1, 3, 4)), "expected (rows"), (np.full((2, 3, 4), np.nan), "non-finite")):
        with pytest.raises(ValueError, match=re.escape(message)):
            plan_guided(session, "skip", None, None, promised.astype(np.float32), 5.0)
    with pytest.raises(ValueError, match="'video' plans no actions"):
        plan_guided(session, "video", None, None, np.zeros((2, 3, 4), np.float32), 5.0)
    with pytest.raises(ValueError, match="guidance is -1"):
        plan_guided(session, "skip", None, None, np.zeros((2, 3, 4), np.float32), -1.0)


# ------------------------------------------------------------------------------------------------ given: a trained prefix


@pytest.mark.parametrize(("name", "expert"), [("all", None), ("all", 32), ("state in the text", None), ("dreamzero", 32), ("lingbot_va", None), ("fast_wam", 32), ("uwm", None)])
def test_a_held_prefix_is_what_training_gives(name: str, expert: int | None) -> None:
    """Every mode that acts: the same tokens at the same levels and places, hence the same velocities as the window's last block in training."""
    case = CASES[name]
    policy, blocks, given = tiny_policy(case.config(expert)), case.blocks, 3
    model, episode = policy.model, tiny_episode(policy.config, 2, blocks)
    window, session = window_of(policy, episode, blocks), _session(policy, episode)
    start = {A: torch.randn(_given(model, window, 0, AC).shape), V: torch.randn(_given(model, window, 0, VC).shape)}
    with torch.no_grad():
        _drive(session, episode, blocks)
        conditions, at = _conditions(policy, episode, window), session._situation(episode.done(blocks - 1)[:, :given])
        for mode in (mode for mode in _modes(model) if A in mode.denoised):
            future = _given(model, window, session.block, VC) if mode.name == "inverse" else None
            first, plan = _first_action_step(policy, mode, at, start, future)
            x = start | {A: torch.cat([_given(model, window, session.block, AC)[:, :given], start[A][:, given:]], dim=1)}
            known = plan.video_BCFHW if mode.name == "imagine" else future
            teacher = replace(window, clean_BCFHW=torch.cat([window.clean_BCFHW[:, :, : -start[V].shape[2]], known], dim=2)) if known is not None else window
            x[V] = known if known is not None and mode.pinned.get(V) == 0 else x[V]
            levels = {A: 1000.0, V: 1000.0 * mode.pinned.get(V, 1.0)}
            now = _at_the_end(teacher, x, levels)
            now.action_t_BT[:, -start[A].shape[1] :][:, :given] = 0.0
            expected = _teacher(model, now, conditions, mode, _no_states if _without_state(model, mode.live) else None)[A][:, -start[A].shape[1] :]
            torch.testing.assert_close(first, expected, rtol=1e-4, atol=1e-5, msg=lambda text, mode=mode: f"{mode.name}: {text}")
            now.action_t_BT[:, -start[A].shape[1] :] = 1000.0
            assert not torch.allclose(first, _teacher(model, now, conditions, mode)[A][:, -start[A].shape[1] :], atol=1e-3), "the level is seen"


def _first_action_step(policy: Policy, mode: Mode, at: Situation, start: dict[Any, Tensor], future: Tensor | None) -> tuple[Tensor, Any]:
    """The velocity of the actions at the first step of a plan, and the plan."""
    steps: list[Step] = []
    plan = sample(policy.model, mode, at, Noise(start[A], start[V]), SamplingConfig(steps=2), future, watch=steps.append)
    velocity = [step.action_velocity for step in steps if step.index == 0][-1]  # a single copy's actions are there, pinned, while video is imagined
    assert velocity is not None
    return velocity, plan


def test_training_draws_prefixes_as_sessions_hold_them() -> None:
    """At level 0 in place of noise, before what is sought, never supervised; some of every block but never all of it.  It is what was executed: a label would tell what the expert thinks of the picture."""
    policy = tiny_policy(tiny_preset("all", None, "noise.prefix=1", "training.modes={skip: 1.0}"))
    objective, batch = Objective(policy.config, policy.model, policy.codec), _batch(policy.config, 3)
    drawn = objective.draw(batch, torch.Generator().manual_seed(0))
    window, _, _ = objective._window(batch, drawn)
    A_ = policy.config.timeline.actions_per_block
    given = window.action_t_BT.unflatten(1, (-1, A_)) == 0
    count = given.sum(dim=2)
    assert bool((given == (torch.arange(A_) < count.unsqueeze(2))).all()) and int(count.min()) >= 1 and int(count.max()) < A_
    assert torch.equal(drawn.action_seen_BTA.any(dim=2).unflatten(1, (-1, A_)), ~given)
    held = batch["executed"].unflatten(1, (-1, A_))[given]
    torch.testing.assert_close(window.noisy_action_BTA.unflatten(1, (-1, A_))[given], held, rtol=0, atol=1e-6)


# ------------------------------------------------------------------------------------------------ ahead of the frames


@pytest.mark.parametrize(("name", "frames"), [*((name, "left out") for name in AHEAD), ("all", "imagined"), ("first frame inside", "imagined")])
def test_what_really_came_replaces_what_was_imagined(name: str, frames: str) -> None:
    """Whatever was planned ahead, in whichever mode: the memory is afterwards, to the bit, that of a session which waited."""
    preset, mode, overrides = AHEAD[name]
    policy = _policy(preset, 32, *overrides)
    (waits, episode), (goes, _) = _robots(policy, [0, 1]), _robots(policy, [0, 1])
    latents = _latents(goes) if frames == "imagined" else None
    for block in range(episode.first_block, BLOCKS - 1):
        for session in (waits, goes):
            session.commit(episode.done(block))
        if latents is None and block == 0 and preset == "lingbot_va":
            with pytest.raises(ValueError, match="holds the first frame"):
                goes.imagine(None)
            goes.imagine(_latents(goes))
        else:
            goes.imagine(latents)
        ahead = goes.plan(mode)
        assert ahead.actions is not None and np.isfinite(ahead.actions).all() and goes.block == block + 1
        goes.commit(np.clip(ahead.actions, -1, 1))
        goes.imagine(_latents(goes))  # and one further
        goes.plan("skip_registers" if preset == "all" else mode)
        for session in (waits, goes):
            session.observe(*episode.at(block + 1))
        _same_memory(goes, waits)
    for session in (waits, goes):
        session.generators = [torch.Generator().manual_seed(7 + r) for r in range(2)]
    assert np.array_equal(*(session.plan(mode).actions for session in (goes, waits)))


def test_a_plan_ahead_knows_the_actions_and_what_was_imagined() -> None:
    """It differs from one that waited, from one without the frames, and from one after other actions; and with the frames that come it is the same."""
    policy = _policy("all", 32)
    plans = []
    for latents, factor in ((None, 1.0), (None, -1.0), ("imagined", 1.0), ("real", 1.0)):
        session, episode = _robots(policy, [0, 1])
        session.commit(factor * episode.done(0))
        session.imagine(None if latents is None else _latents(session) if latents == "imagined" else policy.codec.encode(torch.from_numpy(episode.frames[:, :5]))[:, :, 1:])
        plans.append(session.plan("skip").actions)
    session, episode = _robots(policy, [0, 1])
    session.commit(episode.done(0))
    session.observe(episode.at(1)[0], None)
    waited = session.plan("skip").actions
    np.testing.assert_allclose(plans[3], waited, atol=1e-5)
    assert all(np.abs(a - b).max() > 1e-3 for i, a in enumerate(plans) for b in plans[:i])


def test_sessions_go_ahead_together_and_come_back_alone() -> None:
    policy = _policy("all", None)
    together, alone = ([_robots(policy, [row], blocks=1 + row)[0] for row in (0, 1)] for _ in range(2))
    episodes = [_robots(policy, [row])[1] for row in (0, 1)]
    think = Think("skip", policy.config.sampling)
    calls = [[Commit(e.done(row)), Go(_latents(s)), think] for row, (e, s) in enumerate(zip(episodes, together, strict=True))]
    plans = [*run(together, calls)]
    single = [run([session], [own])[0] for session, own in zip(alone, calls, strict=True)]
    for mine, theirs in zip(plans, single, strict=True):
        np.testing.assert_allclose(mine.actions, theirs.actions, rtol=1e-3, atol=1e-4)
    came = [Observe(*e.at(row + 1)) for row, e in enumerate(episodes)]
    run(together, [[came[0]], [Back(), Commit(episodes[1].done(1)), came[1]]])
    for row, session in enumerate(together):
        waits, episode = _robots(policy, [row], blocks=1 + row)
        waits.commit(episode.done(row))
        waits.observe(*episode.at(row + 1))
        assert session.block == waits.block and session.before is None
        for mine, theirs in zip(session.cache.keys, waits.cache.keys, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
        assert torch.equal(session.cache.blocks_BS, waits.cache.blocks_BS)


def test_a_fork_leaves_the_session_as_it_is_and_rows_can_be_dropped_meanwhile() -> None:
    policy = _policy("all", None)
    (waits, episode), (goes, _) = _robots(policy, [0, 1]), _robots(policy, [0, 1])
    fork = goes.fork()
    fork.commit(-episode.done(0))
    fork.observe(episode.at(1)[0], None)
    fork.plan("imagine")
    for session in (waits, goes):
        session.commit(episode.done(0))
    goes.imagine(None)
    for session in (waits, goes):
        session.select([1])
        session.observe(episode.at(1)[0][1:], episode.at(1)[1][1:])
    _same_memory(goes, waits)


def test_nothing_is_imagined_before_its_actions_or_beyond_a_memory_that_begins_anew() -> None:
    session, _ = _robots(_policy("all", None), [0])
    with pytest.raises(ValueError, match="once its actions are known"):
        session.imagine(None)
    session, episode = _robots(_policy("fast_wam", None), [0])
    session.commit(episode.done(0))
    assert session.begins_anew
    with pytest.raises(ValueError, match="begins anew after 1 blocks"):
        session.imagine(None)


def _latents(session: Session) -> Tensor:
    """Something imagined of a block."""
    c, k = session.config.codec.channels, session.config.timeline.latents_per_block
    return torch.randn(session.batch, c, k, *session.model.latent_size, generator=torch.Generator().manual_seed(1))


def _same_memory(mine: Session, theirs: Session) -> None:
    assert (mine.block, mine.committed, mine.before) == (theirs.block, theirs.committed, None)
    for name in ("kinds_BS", "blocks_BS", "positions_BS4"):
        assert torch.equal(getattr(mine.cache, name), getattr(theirs.cache, name)), name
    for a, b in zip([*mine.cache.keys, *mine.cache.values], [*theirs.cache.keys, *theirs.cache.values], strict=True):
        assert torch.equal(a, b)
    for name in ("state", "first", "acted"):
        a, b = getattr(mine, name), getattr(theirs, name)
        assert (a is None) == (b is None) and (a is None or torch.equal(a, b)), name
