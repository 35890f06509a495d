"""Sessions: independent rows, real observations only in memory, physical units at both ends, clear refusals."""

import numpy as np
import pytest
import torch
from tiny import tiny_config, tiny_model

from wam.codec.linear import LinearCodec
from wam.data.normalize import Normalizer
from wam.inference.session import Session
from wam.config import SamplingConfig
from wam.pretrained import Policy

RNG = np.random.default_rng(0)
FRAMES = RNG.integers(0, 255, (3, 13, 32, 48, 3), dtype=np.uint8)
STATES = RNG.normal(size=(3, 4, 4)).astype(np.float32)
ACTIONS = RNG.uniform(-1, 1, (3, 3, 8, 4)).astype(np.float32)
TASKS = ["open the drawer", "close the door", "open the drawer"]


@pytest.fixture(scope="module")
def policy() -> Policy:
    config = tiny_config()
    codec = LinearCodec(config.codec)
    codec.fit(torch.from_numpy(FRAMES[:, :12]).unflatten(1, (-1, 4)).flatten(0, 1))
    normalizer = Normalizer.fit({"state": STATES.reshape(-1, 4), "action": ACTIONS.reshape(-1, 4)})
    return Policy(config, tiny_model(config), codec, normalizer.to_dict(), {"control_hz": 80})


def _new(policy: Policy, rows: list[int]) -> Session:
    return Session(policy, [TASKS[r] for r in rows], "metaworld", [100 + r for r in rows])


def _observe(session: Session, rows: list[int], block: int) -> None:
    frames = FRAMES[rows, :1] if block == 0 else FRAMES[rows, 4 * block - 3 : 4 * block + 1]
    session.observe(frames, STATES[rows, block])


@pytest.mark.parametrize("mode", ["skip", "joint", "joint_mutual", "imagine"])
def test_a_batch_gives_each_row_what_it_would_get_alone(policy: Policy, mode: str) -> None:
    together, alone = _new(policy, [0, 1, 2]), [_new(policy, [r]) for r in range(3)]
    for block in range(3):
        _observe(together, [0, 1, 2], block)
        plan = together.plan(mode)
        together.commit(ACTIONS[:, block])
        for row, session in enumerate(alone):
            _observe(session, [row], block)
            own = session.plan(mode)
            session.commit(ACTIONS[[row], block])
            np.testing.assert_allclose(own.actions[0], plan.actions[row], rtol=1e-4, atol=1e-5)


def test_two_interleaved_sessions_equal_two_separate_ones(policy: Policy) -> None:
    def drive(session: Session, row: int, block: int) -> np.ndarray:
        _observe(session, [row], block)
        plan = session.plan("joint").actions
        session.commit(plan)
        return plan

    first, second = _new(policy, [0]), _new(policy, [1])
    mixed = [(drive(first, 0, b), drive(second, 1, b)) for b in range(3)]
    for row in (0, 1):
        session = _new(policy, [row])
        for block in range(3):
            assert np.array_equal(drive(session, row, block), mixed[block][row])


def test_rows_that_are_dropped_do_not_change_the_others(policy: Policy) -> None:
    all_rows, some = _new(policy, [0, 1, 2]), _new(policy, [0, 2])
    for session, rows in ((all_rows, [0, 1, 2]), (some, [0, 2])):
        _observe(session, rows, 0)
        session.plan("skip")
        session.commit(ACTIONS[rows, 0])
    all_rows.select([0, 2])
    for session in (all_rows, some):
        _observe(session, [0, 2], 1)
    np.testing.assert_allclose(all_rows.plan("skip").actions, some.plan("skip").actions, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["imagine", "joint", "forward"])
def test_what_is_imagined_does_not_stay_in_memory(policy: Policy, mode: str) -> None:
    """Planning in any mode leaves the next plan as it would have been."""
    plain, curious = _new(policy, [0]), _new(policy, [0])
    for session in (plain, curious):
        _observe(session, [0], 0)
    curious.plan(mode, actions=ACTIONS[:1, 0] if mode == "forward" else None)
    for session in (plain, curious):
        session.commit(ACTIONS[:1, 0])
        _observe(session, [0], 1)
        session.generators = [torch.Generator().manual_seed(5)]
    assert np.array_equal(plain.plan("skip").actions, curious.plan("skip").actions)


def test_forward_depends_on_the_actions_it_is_given(policy: Policy) -> None:
    videos = []
    for factor in (1, -1, 1):
        session = _new(policy, [0])
        _observe(session, [0], 0)
        plan = session.plan("forward", actions=factor * ACTIONS[:1, 0])
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


def test_every_stage_is_timed(policy: Policy) -> None:
    session = _new(policy, [0])
    _observe(session, [0], 0)
    assert {"text", "encode", "prefill", "denoise", "post"} == set(session.plan("skip").timings)


def test_refusals(policy: Policy) -> None:
    session = _new(policy, [0])
    with pytest.raises(ValueError, match="nothing has been observed"):
        session.plan("skip")
    with pytest.raises(ValueError, match=r"expected uint8 \(rows, frames, height, width, 3\) = \(1, 1, 32, 48, 3\)"):
        session.observe(FRAMES[:1, :4], STATES[:1, 0])
    with pytest.raises(ValueError, match="non-finite numbers; check the robot"):
        session.observe(FRAMES[:1, :1], STATES[:1, 0] * np.nan)
    _observe(session, [0], 0)
    with pytest.raises(ValueError, match="needs actions to be given"):
        session.plan("forward")
    with pytest.raises(ValueError, match="did you mean 'joint'"):
        session.plan("joit")
    with pytest.raises(ValueError, match="were not committed"):
        _observe(session, [0], 1)
    with pytest.raises(ValueError, match=r"actions have shape \(1, 4, 4\)"):
        session.commit(ACTIONS[:1, 0, :4])
    with pytest.raises(ValueError, match="non-finite"):
        session.commit(ACTIONS[:1, 0] * np.inf)
    with pytest.raises(ValueError, match="no embodiment 'yam'; it was trained for metaworld"):
        Session(policy, TASKS[:1], "yam", [0])
    with pytest.raises(ValueError, match="the instruction is empty"):
        Session(policy, [" "], "metaworld", [0])
