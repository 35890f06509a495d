"""Actions that are differences to the state at the block's start: what leaves a session is absolute, what enters its memory is relative."""

import dataclasses

import numpy as np
import pytest
import torch
from test_session import ACTIONS, FRAMES, STATES, TASKS
from tiny import tiny_config, tiny_model

from wam.codec.linear import LinearCodec
from wam.config import EmbodimentConfig
from wam.data.normalize import Normalizer
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
    codec = LinearCodec(absolute.codec)
    codec.fit(torch.from_numpy(FRAMES[:, :12]).unflatten(1, (-1, 4)).flatten(0, 1))
    normalizer = Normalizer.fit({"state": STATES.reshape(-1, 4), "action": ACTIONS.reshape(-1, 4)}).to_dict()
    return [Policy(config, tiny_model(config), codec, normalizer, {"control_hz": 80}) for config in (absolute, relative)]


def test_plans_start_from_the_state_and_memory_holds_differences(policies: list[Policy]) -> None:
    sessions = [Session(policy, TASKS[:1], "metaworld", [1]) for policy in policies]
    for session in sessions:
        session.observe(FRAMES[:1, :1], STATES[:1, 0])
    plain, moved = (session.plan("skip").actions for session in sessions)
    origin = np.where(np.array(RELATIVE) >= 0, STATES[0, 0][list(RELATIVE)], 0).astype(np.float32)
    np.testing.assert_allclose(moved, plain + origin, rtol=1e-5, atol=1e-5)
    sessions[0].commit(ACTIONS[:1, 0])
    sessions[1].commit(ACTIONS[:1, 0] + origin)
    written = [session.cache.keys[0][session.cache.kinds_BS == int(Kind.AC)] for session in sessions]
    torch.testing.assert_close(written[1], written[0], rtol=1e-3, atol=1e-4)


def test_relative_actions_need_a_state(policies: list[Policy]) -> None:
    session = Session(policies[1], TASKS[:1], "metaworld", [1])
    session.observe(FRAMES[:1, :1], None)
    with pytest.raises(ValueError, match="relative to the state at the block's start, which was not observed"):
        session.plan("skip")
