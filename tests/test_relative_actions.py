"""Actions that are differences to the state at the block's start: what leaves a session is absolute, what enters its memory is relative."""

import dataclasses

import numpy as np
import pytest
import torch
from tiny import TASKS, tiny_config, tiny_episode, tiny_policy

from wam.config import EmbodimentConfig
from wam.inference.session import Session
from wam.pretrained import Policy
from wam.timeline import Kind

RELATIVE = (2, -1, 0, -1)  # the first action starts from state 2, the third from state 0


@pytest.fixture(scope="module")
def policies() -> list[Policy]:
    """The same weights, once with absolute actions and once with two relative ones."""
    absolute = tiny_config()
    robot = EmbodimentConfig("metaworld", 4, 4, relative_to=RELATIVE)
    relative = dataclasses.replace(absolute, model=dataclasses.replace(absolute.model, embodiments=(robot,)))
    return [tiny_policy(config) for config in (absolute, relative)]


def test_plans_start_from_the_state_and_memory_holds_differences(policies: list[Policy]) -> None:
    sessions = [Session(policy, TASKS[:1], "metaworld", [1]) for policy in policies]
    episode = tiny_episode(policies[0].config, 1, 1)
    (frames, state), done = episode.at(0), episode.done(0)
    for session in sessions:
        session.observe(frames, state)
    plain, moved = (session.plan("skip").actions for session in sessions)
    origin = np.where(np.array(RELATIVE) >= 0, state[0][list(RELATIVE)], 0).astype(np.float32)
    np.testing.assert_allclose(moved, plain + origin, rtol=1e-5, atol=1e-5)
    sessions[0].commit(done)
    sessions[1].commit(done + origin)
    written = [session.cache.keys[0][session.cache.kinds_BS == int(Kind.AC)] for session in sessions]
    torch.testing.assert_close(written[1], written[0], rtol=1e-3, atol=1e-4)


def test_relative_actions_need_a_state(policies: list[Policy]) -> None:
    session = Session(policies[1], TASKS[:1], "metaworld", [1])
    session.observe(tiny_episode(policies[1].config, 1, 1).at(0)[0], None)
    with pytest.raises(ValueError, match="relative to the state at the block's start, which was not observed"):
        session.plan("skip")
