"""Sessions: independent rows, real observations only in memory, nothing computed twice, physical units at both ends, clear refusals."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from tiny import IMAGE_DIM, TASKS, Episode, tiny_episode, tiny_policy, tiny_preset
from torch import nn

from wam.codec.linear import LinearCodec
from wam.config import Config, SamplingConfig
from wam.inference.session import Plan, Session
from wam.pretrained import Policy
from wam.relations import LeakError
from wam.solvers import SimilarReuse

GUIDED = ("sampling.guidance=2.5", "training.text_dropout=0.1")
CONCAT = ("model.first_frame=concat", f"model.image_dim={IMAGE_DIM}", "timeline.blocks=2")
SETTINGS: dict[str, tuple[str, str, tuple[str, ...]]] = {  # preset, mode, overrides
    "all": ("all", "joint_mutual", ()),
    "guidance": ("all", "joint", GUIDED),
    "guided imagination": ("all", "imagine", GUIDED),
    "unipc": ("all", "imagine", ("sampling.solver=unipc", "sampling.steps=5")),
    "reuse": ("all", "joint", ("sampling.reuse=mask", "sampling.steps=5", "sampling.evaluations=3")),
    "first frame inside": ("lingbot_va", "imagine", ("sampling.guidance=3",)),
    "first frame alone inside": ("lingbot_va", "imagine", ("timeline.latents_per_block=1", "timeline.actions_per_block=8", "timeline.history=3")),
    "live states": ("dreamzero", "joint_mutual", ("timeline.blocks=2", "sampling.guidance=2")),
    "states in the text": ("fast_wam", "skip", ()),
    "a single copy": ("uwm", "imagine", ()),
    "first frame on the channels": ("all", "skip_registers", CONCAT),
    "goal": ("all", "skip", ("model.goal_image=true", "timeline.sink=true", "timeline.history=1", *GUIDED)),
}
EXPERTS, BATCHES, BLOCKS = [None, 32], [1, 3], 3


@cache
def _policy(name: str, expert: int | None = None) -> Policy:
    preset, _, overrides = SETTINGS[name]
    return tiny_policy(tiny_preset(preset, expert, *overrides))


@pytest.fixture(scope="module")
def policy() -> Policy:
    return _policy("all")


def _episode(config: Config) -> Episode:
    return tiny_episode(config, 3, BLOCKS)


def _new(policy: Policy, rows: list[int]) -> Session:
    goals = _episode(policy.config).goals[rows] if policy.config.model.goal_image else None
    return Session(policy, [TASKS[r] for r in rows], "metaworld", [100 + r for r in rows], goals)


def _observe(session: Session, rows: list[int], block: int) -> None:
    session.observe(*_episode(session.config).rows(rows).at(block))


def _done(session: Session, rows: list[int], block: int) -> np.ndarray:
    return _episode(session.config).rows(rows).done(block)


def _blocks(config: Config) -> range:
    return range(_episode(config).first_block, BLOCKS)


def _step(session: Session, rows: list[int], block: int, mode: str, **how: Any) -> Plan:
    """One round of the loop: observe, plan, commit what the episode did (of a plan that began anew, as much as it holds)."""
    _observe(session, rows, block)
    plan = session.plan(mode, **how)
    session.commit(_done(session, rows, block))
    return plan


def _parts(plan: Plan) -> Iterator[np.ndarray]:
    yield from (np.asarray(x) for x in (plan.actions, plan.imagined) if x is not None)


# ------------------------------------------------------------------------------------------------ independence


@pytest.mark.parametrize("expert", EXPERTS)
@pytest.mark.parametrize("name", SETTINGS)
def test_rows_of_a_batch_and_interleaved_sessions_get_what_each_would_get_alone(name: str, expert: int | None) -> None:
    policy, mode = _policy(name, expert), SETTINGS[name][1]
    together, interleaved, alone = _new(policy, [0, 1, 2]), [_new(policy, [r]) for r in range(3)], _new(policy, [1])
    for block in _blocks(policy.config):
        plan = _step(together, [0, 1, 2], block, mode)
        own = [_step(session, [row], block, mode) for row, session in enumerate(interleaved)]
        for row, single in enumerate(own):
            for mine, theirs in zip(_parts(single), _parts(plan), strict=True):
                np.testing.assert_allclose(mine[0], theirs[row], rtol=1e-3, atol=1e-4)
        for mine, theirs in zip(_parts(_step(alone, [1], block, mode)), _parts(own[1]), strict=True):
            assert np.array_equal(mine, theirs)


@pytest.mark.parametrize("mode", ["joint", "skip"])
def test_rows_that_skip_steps_by_their_own_similarity_get_what_each_would_get_alone(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = tiny_policy(tiny_preset("all", None, "sampling.reuse=similarity", "sampling.steps=12"))
    asked: list[tuple[bool, ...]] = []
    due = SimilarReuse.due
    monkeypatch.setattr(SimilarReuse, "due", lambda self, i: asked.append(due(self, i)) or asked[-1])
    monkeypatch.setattr(SimilarReuse, "RULES", ((0.9, 3),))
    together = _new(policy, [0, 1, 2])
    _observe(together, [0, 1, 2], 0)
    plan = together.plan(mode)
    assert len(set(zip(*asked, strict=True))) > 1, "rows skip different steps"
    for row in range(3):
        alone = _new(policy, [row])
        _observe(alone, [row], 0)
        for mine, theirs in zip(_parts(alone.plan(mode)), _parts(plan), strict=True):
            np.testing.assert_allclose(mine[0], theirs[row], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", SETTINGS)
def test_rows_that_are_dropped_do_not_change_the_others(name: str) -> None:
    policy, mode = _policy(name, 32), SETTINGS[name][1]
    all_rows, some = _new(policy, [0, 1, 2]), _new(policy, [0, 2])
    first, second, *_ = _blocks(policy.config)
    _step(all_rows, [0, 1, 2], first, mode)
    _step(some, [0, 2], first, mode)
    all_rows.select([0, 2])
    plans = [_step(session, [0, 2], second, mode) for session in (all_rows, some)]
    for mine, theirs in zip(*map(_parts, plans), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=1e-4)


# ------------------------------------------------------------------------------------------------ memory


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("expert", EXPERTS)
@pytest.mark.parametrize("name", ["live states", "states in the text", "a single copy", "first frame on the channels"])
def test_a_memory_that_is_full_starts_again_from_the_newest_frame(name: str, expert: int | None, batch: int) -> None:
    policy, rows, (_, mode, _) = _policy(name, expert), list(range(batch)), SETTINGS[name]
    lasts = policy.config.timeline.blocks
    old, new = _new(policy, rows), _new(policy, rows)
    for block in range(lasts):
        _step(old, rows, block, mode)
    frames, state = _episode(policy.config).rows(rows).at(lasts)
    old.observe(frames, state)
    new.observe(frames[:, -1:], state)
    assert old.block == new.block == 0
    for session in (old, new):
        session.generators = [torch.Generator().manual_seed(7 + r) for r in rows]
    for mine, theirs in zip(*(_parts(session.plan(mode)) for session in (old, new)), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=1e-4)


def test_a_table_that_remembers_nothing_starts_again_whatever_its_positions() -> None:
    config = tiny_preset("fast_wam", None, "model.positions=time")
    session = Session(tiny_policy(config), TASKS[:1], "metaworld", [0])
    for block in range(3):
        _step(session, [0], block, "skip")
        assert session.block == 0
    forever = _new(_policy("all"), [0])
    for block in range(3):
        _step(forever, [0], block, "skip")
        assert forever.block == block


@pytest.mark.parametrize("name", ["all", "guidance", "first frame inside", "live states"])
@pytest.mark.parametrize("mode", ["imagine", "joint", "forward", "inverse", "skip_registers"])
def test_what_is_imagined_does_not_stay_in_memory(name: str, mode: str) -> None:
    """Planning in any mode leaves the next plan as it would have been."""
    policy = _policy(name)
    plain, curious = _new(policy, [0]), _new(policy, [0])
    for session in (plain, curious):
        _observe(session, [0], 0)
    given = {"forward": {"actions": _done(curious, [0], 0)}, "inverse": {"future": torch.randn(curious._noise().video_BCFHW.shape)}}.get(mode, {})
    if (mode, name) == ("forward", "first frame inside"):
        with pytest.raises(LeakError, match=r"V\[1\] -> Ac\[1\] -> Vc\[1\]"):
            curious.plan(mode, **given)
    else:
        curious.plan(mode, **given)
    for session in (plain, curious):
        session.commit(_done(session, [0], 0))
        _observe(session, [0], 1)
        session.generators = [torch.Generator().manual_seed(5)]
    for mine, theirs in zip(*(_parts(session.plan("skip")) for session in (plain, curious)), strict=True):
        assert np.array_equal(mine, theirs)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("expert", EXPERTS)
@pytest.mark.parametrize("name", ["all", "guided imagination", "unipc", "reuse", "first frame inside", "live states"])
def test_a_committed_prefix_is_returned_and_the_rest_follows_from_it(name: str, expert: int | None, batch: int) -> None:
    policy, rows, (_, mode, _) = _policy(name, expert), list(range(batch)), SETTINGS[name]
    plans = []
    for factor in (1.0, -1.0, None):
        session = _new(policy, rows)
        _observe(session, rows, 0)
        prefix = _done(session, rows, 0)[:, :3]
        plans.append(session.plan(mode, committed=None if factor is None else factor * prefix).actions)
    np.testing.assert_allclose(plans[0][:, :3], prefix, atol=1e-5)
    np.testing.assert_allclose(plans[1][:, :3], -prefix, atol=1e-5)
    assert all(abs(a[:, 3:] - b[:, 3:]).max() > 1e-3 for a, b in ((plans[0], plans[1]), (plans[0], plans[2])))


# ------------------------------------------------------------------------------------------------ nothing twice


@cache
def _counted() -> Policy:
    config = tiny_preset("all", 32, *CONCAT, "timeline.blocks=4", "model.goal_image=true", *GUIDED)
    return tiny_policy(config)


@pytest.mark.parametrize("batch", BATCHES)
def test_what_depends_on_the_instruction_or_the_first_frame_is_computed_once(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three chunks in every mode that acts: text and image encoders, their projections, and every layer's keys and values run once each."""
    policy, rows, calls = _counted(), list(range(batch)), Counter[str]()
    model, image = policy.model, policy.image
    assert image is not None and model.expert is not None and model.text is not None
    once: dict[str, nn.Module] = {"text": model.text, "image": image, "text projection": model.backbone.condition_embedder.text_embedder}
    once |= {"image projection": model.backbone.condition_embedder.image_embedder, "expert's text projection": model.expert.condition_embedder.text_embedder}
    for layer, (block, expert) in enumerate(zip(model.backbone.blocks, model.expert.blocks, strict=True)):
        once |= {f"{name} of layer {layer}": getattr(block.attn2, name) for name in ("to_k", "to_v", "add_k_proj", "add_v_proj")}
        once |= {f"expert's {name} of layer {layer}": getattr(expert.attn2, name) for name in ("to_k", "to_v")}
    hooks = [module.register_forward_hook(lambda *_, name=name: calls.update([name])) for name, module in once.items()]
    encode = LinearCodec.encode

    def counted(self: LinearCodec, frames: torch.Tensor, first: bool = True) -> torch.Tensor:
        calls.update(["goal or first frame's condition"] if first and not (frames.shape[1] == 1 and session_began) else [])
        return encode(self, frames, first)

    session_began = False
    monkeypatch.setattr(LinearCodec, "encode", counted)
    try:
        session = _new(policy, rows)
        session_began = True
        for block in range(3):
            _observe(session, rows, block)
            for mode in ("skip", "joint", "imagine", "skip_registers", "action_only"):
                session.plan(mode)
            session.commit(_done(session, rows, block))
    finally:
        for hook in hooks:
            hook.remove()
    assert calls == Counter({**dict.fromkeys(once, 1), "goal or first frame's condition": 2})


def test_a_state_in_the_text_leaves_the_instructions_keys_as_they_are() -> None:
    """Of the text, only the state's one token is new at the first observation, and nothing after it."""
    policy = tiny_policy(tiny_preset("all", 32, "model.state=context"))
    lengths: list[int] = []
    hook = policy.model.backbone.blocks[0].attn2.to_k.register_forward_hook(lambda module, inputs, out: lengths.append(inputs[0].shape[1]))
    session = _new(policy, [0])
    for block in range(3):
        _step(session, [0], block, "joint")
    hook.remove()
    assert len(lengths) == 2 and lengths[0] > 1 and lengths[1] == 1


# ------------------------------------------------------------------------------------------------ plans


def test_forward_depends_on_the_actions_it_is_given(policy: Policy) -> None:
    videos = []
    for factor in (1, -1, 1):
        session = _new(policy, [0])
        _observe(session, [0], 0)
        plan = session.plan("forward", actions=factor * _done(session, [0], 0))
        assert plan.actions is None
        videos.append(plan.imagined)
    assert torch.equal(videos[0], videos[2]) and not torch.allclose(videos[0], videos[1])


def test_more_solver_steps_and_seeds_change_a_plan(policy: Policy) -> None:
    plans = []
    for seed, steps in ((1, 2), (1, 4), (2, 2), (1, 2)):
        session = Session(policy, TASKS[:1], "metaworld", [seed])
        _observe(session, [0], 0)
        plans.append(session.plan("skip", SamplingConfig(steps=steps)).actions)
    assert np.array_equal(plans[0], plans[3])
    assert not np.allclose(plans[0], plans[1]) and not np.allclose(plans[0], plans[2])


def test_guidance_moves_video_and_what_reads_it_and_one_is_none() -> None:
    policy = _policy("guidance")
    imagined, actions = [], []
    for guidance in (1.0, 2.5, 5.0):
        session = _new(policy, [0])
        _observe(session, [0], 0)
        plan = session.plan("joint", replace(policy.config.sampling, guidance=guidance))
        imagined.append(plan.imagined)
        actions.append(plan.actions)
    unguided = Session(tiny_policy(tiny_preset("all")), TASKS[:1], "metaworld", [100])
    _observe(unguided, [0], 0)
    np.testing.assert_allclose(unguided.plan("joint").actions, actions[0], rtol=1e-3, atol=1e-4)
    assert not torch.allclose(imagined[0], imagined[1], atol=1e-3) and not torch.allclose(imagined[1], imagined[2], atol=1e-3)
    assert not np.allclose(actions[0], actions[2], atol=1e-4)


def test_every_stage_is_timed(policy: Policy) -> None:
    session = _new(policy, [0])
    _observe(session, [0], 0)
    assert set(session.plan("skip").timings) == {"text", "encode", "first frame", "prefill", "denoise", "post"}
    session.commit(_done(session, [0], 0))
    _observe(session, [0], 1)
    assert set(session.plan("skip").timings) == {"commit", "encode", "prefill", "denoise", "post"}


def test_refusals(policy: Policy) -> None:
    session = _new(policy, [0])
    episode = _episode(policy.config).rows([0])
    frames, state = episode.at(0)
    actions = episode.done(0)
    with pytest.raises(ValueError, match="nothing has been observed"):
        session.plan("skip")
    with pytest.raises(ValueError, match=r"expected uint8 \(rows, frames, height, width, 3\) = \(1, 1, 32, 48, 3\)"):
        session.observe(episode.frames[:, :4], state)
    with pytest.raises(ValueError, match="non-finite numbers; check the robot"):
        session.observe(frames, state * np.nan)
    session.observe(frames, state)
    with pytest.raises(ValueError, match="needs actions to be given"):
        session.plan("forward")
    with pytest.raises(ValueError, match="did you mean 'joint'"):
        session.plan("joit")
    for committed, told in ((actions[:, :, :3], r"\(1, 8, 3\); expected \(rows, up to 8 actions, action_dim\) = \(1, n, 4\)"), (actions * np.nan, "non-finite")):
        with pytest.raises(ValueError, match=told):
            session.plan("skip", committed=committed)
    with pytest.raises(ValueError, match=r"a future has shape \(1, 6, 1, 4, 4\); expected latents .* = \(1, 6, 1, 4, 6\)"):
        session.plan("inverse", future=torch.zeros(1, 6, 1, 4, 4))
    with pytest.raises(ValueError, match="were not committed"):
        _observe(session, [0], 1)
    with pytest.raises(ValueError, match=r"actions have shape \(1, 4, 4\)"):
        session.commit(actions[:, :4])
    with pytest.raises(ValueError, match="non-finite"):
        session.commit(actions * np.inf)
    with pytest.raises(ValueError, match="no embodiment 'yam'; it was trained for metaworld"):
        Session(policy, TASKS[:1], "yam", [0])
    with pytest.raises(ValueError, match="the instruction is empty"):
        Session(policy, [" "], "metaworld", [0])
