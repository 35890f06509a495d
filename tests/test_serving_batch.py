"""Sessions that stand at different blocks and share a forward pass get what each would get alone."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from test_session import SETTINGS
from tiny import TASKS, tiny_episode, tiny_policy, tiny_preset

from wam.config import EmbodimentConfig
from wam.inference.batch import Call, Commit, Joined, Observe, Reset, Think, run
from wam.inference.session import Plan, Session
from wam.pretrained import Policy

ROBOTS, BLOCKS = 3, 3
TRIED = [name for name in SETTINGS if name not in ("guidance", "unipc", "reuse")]  # which differ from others in the solver alone


@cache
def _policy(name: str) -> Policy:
    preset, _, overrides = SETTINGS[name]
    return tiny_policy(tiny_preset(preset, 32, *overrides))


def _calls(policy: Policy, mode: str, robot: int) -> list[list[Call]]:
    """What robot `robot` asks for, chunk by chunk."""
    episode = tiny_episode(policy.config, ROBOTS, BLOCKS).rows([robot])
    out: list[list[Call]] = []
    for block in range(episode.first_block, BLOCKS):
        frames, state = episode.at(block)
        before: list[Call] = [] if block == episode.first_block else [Commit(episode.done(block - 1))]
        out.append([*before, Observe(frames, state), Think(mode, policy.config.sampling)])
    return out


def _sessions(policy: Policy) -> list[Session]:
    goals = tiny_episode(policy.config, ROBOTS, BLOCKS).goals if policy.config.model.goal_image else None
    return [Session(policy, [TASKS[r]], "metaworld", [100 + r], None if goals is None else goals[r : r + 1]) for r in range(ROBOTS)]


def _agree(mine: Plan | None, theirs: Plan | None) -> None:
    assert mine is not None and theirs is not None
    for a, b in ((mine.actions, theirs.actions), (mine.imagined, theirs.imagined)):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", TRIED)
def test_batched_is_alone_whichever_block_each_robot_is_at(name: str) -> None:
    """Robot r starts r chunks after robot 0, so that their blocks differ as soon as they are together."""
    _batched_is_alone(_policy(name), SETTINGS[name][1])


def test_each_robots_actions_are_relative_to_its_own_state() -> None:
    config = tiny_preset("all", None)
    robot = EmbodimentConfig("metaworld", 4, 4, relative_to=(2, -1, 0, -1))
    _batched_is_alone(tiny_policy(replace(config, model=replace(config.model, embodiments=(robot,)))), "skip")


def _batched_is_alone(policy: Policy, mode: str) -> None:
    calls = [_calls(policy, mode, r) for r in range(ROBOTS)]
    alone = [[run([session], [chunk])[0] for chunk in chunks] for session, chunks in zip(_sessions(policy), calls, strict=True)]
    together, sizes = _sessions(policy), []
    for tick in range(BLOCKS + ROBOTS):
        here = [r for r in range(ROBOTS) if 0 <= tick - r < len(calls[r])]
        sizes.append(len(here))
        plans = run([together[r] for r in here], [calls[r][tick - r] for r in here])
        for r, plan in zip(here, plans, strict=True):
            _agree(plan, alone[r][tick - r])
    assert max(sizes) > 1


def test_a_robot_that_begins_anew_and_one_that_goes_on_share_what_they_can() -> None:
    policy, mode = _policy("all"), "skip"
    calls = [_calls(policy, mode, r) for r in range(ROBOTS)]
    laid: list[Call] = [Reset(), *(call for chunk in calls[1][:2] for call in chunk if not isinstance(call, Think)), calls[1][1][-1]]
    results: list[Sequence[Plan | None]] = []
    for joint in (True, False):
        a, b, _ = _sessions(policy)
        for session, robot in ((a, 0), (b, 1)):
            run([session], [calls[robot][0]])
        results.append(run([a, b], [calls[0][1], laid]) if joint else [run([a], [calls[0][1]])[0], run([b], [laid])[0]])
    for mine, theirs in zip(*results, strict=True):
        _agree(mine, theirs)


def test_instructions_are_held_once_and_only_by_those_they_belong_to() -> None:
    policy = _policy("states in the text")
    sessions = _sessions(policy)
    calls = [_calls(policy, "skip", r) for r in range(ROBOTS)]
    for chunk in range(2):
        run(sessions, [c[chunk] for c in calls])
        assert [len(s.conditions.text_UTE) for s in sessions] == [1] * ROBOTS
    sessions = _sessions(_policy("all"))
    sessions[2].instructions = sessions[2].conditions = sessions[0].conditions
    assert len(Joined(sessions).conditions.text_UTE) == 2


def test_a_joined_session_times_what_each_waited_for() -> None:
    policy = _policy("all")
    sessions = _sessions(policy)
    plans = run(sessions, [_calls(policy, "skip", r)[0] for r in range(ROBOTS)])
    for plan in plans:
        assert plan is not None and {"encode", "prefill", "denoise", "post"} <= set(plan.timings)
