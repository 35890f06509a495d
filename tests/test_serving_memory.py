"""Frames are picked by time: clients that send one frame or all of them get plans from a memory as it was in training."""

from collections import deque
from dataclasses import replace

import numpy as np
import pytest
from serving_tools import BLOCKS, MODE, episode, policy
from test_session import SETTINGS
from tiny import TASKS, tiny_episode, tiny_policy, tiny_preset

from wam.inference.batch import Commit, Observe, Reset, Think, run
from wam.inference.memory import _nearest
from wam.inference.session import Session
from wam.serving.contract import Contract
from wam.serving.errors import ServingError
from wam.serving.memory import RobotMemory, Sent, TimeRules
from wam.serving.messages import Request

A, STRIDE, HZ = 8, 2, 80.0


def _memory(**rules: object) -> RobotMemory:
    return RobotMemory(Contract.of(policy()), TimeRules(**rules))


def _session() -> Session:
    return Session(policy(), TASKS[:1], "metaworld", [100])


def _request(step: float, frames: np.ndarray | None = None, **more: object) -> Request:
    """An observation at a control step; pixels say when they were taken."""
    taken = np.full((1, 32, 48, 3), int(step) % 251, np.uint8) if frames is None else frames
    return Request("openpi", "plan", frames=taken, state=np.full(4, step, np.float32), **{"timestamp": step / HZ, **more})


def _told(memory: RobotMemory, session: Session) -> list:
    """The calls of a request, carried out."""
    calls, _ = memory.calls(session)
    run([session], [calls])
    memory.head = memory.now
    return calls


def _planned(memory: RobotMemory, count: int = A) -> None:
    memory.plans.append(Sent(memory.now, np.arange(count)[:, None] * np.ones(4, np.float32) + memory.now))


def test_all_frames_at_once_or_one_by_one_are_the_same_memory_and_the_one_of_a_plain_session() -> None:
    config, plain = policy().config, _session()
    at_once, one_by_one, sessions = _memory(), _memory(), (_session(), _session())
    for block in range(BLOCKS):
        frames, state = episode(0).at(block)
        if block:
            plain.commit(episode(0).done(block - 1))
        plain.observe(frames, state)
        expected = plain.plan(MODE, config.sampling).actions
        executed = episode(0).done(block - 1)[0] if block else None
        at_once.see(Request("openpi", "plan", frames=frames[0], state=state[0], timestamp=block * A / HZ, executed=executed), 0.0)
        for i, frame in enumerate(frames[0]):
            now = block * A - (len(frames[0]) - 1 - i) * STRIDE
            part = None if executed is None else executed[i * STRIDE : (i + 1) * STRIDE]
            one_by_one.see(Request("openpi", "observe", frames=frame[None], state=state[0], timestamp=now / HZ, executed=part), 0.0)
        for memory, session in zip((at_once, one_by_one), sessions, strict=True):
            _told(memory, session)
            plan = run([session], [[Think(MODE, config.sampling)]])[0]
            assert np.array_equal(plan.actions, expected)


@pytest.mark.parametrize("name", ["states in the text", "live states", "first frame inside", "first frame alone inside", "first frame on the channels"])
def test_every_kind_of_memory_is_told_as_a_rollout_tells_it(name: str) -> None:
    """Models of one block, that start again when they are full, or whose first frame lies inside its block; requests as blocks begin."""
    preset, mode, overrides = SETTINGS[name]
    own = tiny_policy(tiny_preset(preset, None, *overrides))
    seen = tiny_episode(own.config, 1, 4)
    plain, served = (Session(own, TASKS[:1], "metaworld", [100]) for _ in range(2))
    memory, now = RobotMemory(Contract.of(own), TimeRules()), 0
    for block in range(seen.first_block, 4):
        frames, state = seen.at(block)
        begins = block == seen.first_block
        if not begins:
            done = seen.done(block - 1)
            plain.commit(done)
            now += done.shape[1]
        plain.observe(frames, state)
        memory.see(Request("openpi", "plan", frames=frames[0], state=state[0], timestamp=now / own.control_hz, executed=None if begins else done[0]), 0.0)
        _told(memory, served)
        assert served.block == plain.block and np.array_equal(served.plan(mode).actions, plain.plan(mode).actions)


def test_frames_are_picked_by_when_they_were_taken() -> None:
    memory, session = _memory(), _session()
    memory.see(_request(0), 0.0)
    assert [type(c) for c in _told(memory, session)] == [Observe]
    _planned(memory)
    for step in (1.1, 2.2, 3.9, 5, 6.1, 7.2):  # none too far from 2, 4, 6
        memory.see(_request(step), 0.0)
    memory.see(_request(8), 0.0)
    commit, observe = _told(memory, session)
    assert isinstance(commit, Commit) and np.array_equal(commit.actions[0, :, 0], range(8))
    assert observe.frames[0, :, 0, 0, 0].tolist() == [2, 3, 6, 8] and observe.state[0, 0] == 8


def test_the_nearest_frame_is_found_among_many_as_by_looking_at_each() -> None:
    rng = np.random.default_rng(0)
    for count in (0, 1, 2, 40):
        seen = deque((float(at), np.array(at)) for at in np.sort(rng.choice(200, count, replace=False)) / 2)
        for at in np.arange(-8.0, 110.0, 0.25):
            near = min(seen, key=lambda pair: abs(pair[0] - at), default=None)  # of two as near the first, which is the earlier
            expected = None if near is None or abs(near[0] - at) > 1.5 else near[1]
            assert _nearest(seen, float(at), 1.5) is expected
    twice = deque([(1.0, np.array(0)), (1.0, np.array(1))])
    assert _nearest(twice, 1.0, 0.5) is twice[1][1], "of one moment the newest"


def test_a_missing_frame_or_an_unknown_action_begins_anew_from_the_newest_frame() -> None:
    for steps, planned in (((3, 8), A), ((2, 4, 6, 8), 5), ((2, 4, 6, 9), A)):
        memory, session = _memory(), _session()
        memory.see(_request(0), 0.0)
        _told(memory, session)
        _planned(memory, planned)
        for step in steps:
            memory.see(_request(step), 0.0)
        reset, observe = _told(memory, session)
        assert isinstance(reset, Reset) and observe.frames.shape[1] == 1 and observe.frames.ravel()[0] == steps[-1] and session.block == 0


def test_planning_again_inside_a_block_lays_the_window_so_that_it_ends_now() -> None:
    memory, session = _memory(), _session()
    for step in range(0, 21, STRIDE):  # plans every other step
        memory.see(_request(step), 0.0)
        calls = _told(memory, session)
        assert session.block == min(step // A, 2), "as many whole blocks as have passed, up to a training window's"
        _planned(memory)
    assert isinstance(calls[0], Reset) and calls[1].frames.ravel()[0] == 20 - 2 * A
    assert [int(c.frames[0, -1, 0, 0, 0]) for c in calls if isinstance(c, Observe)] == [4, 12, 20]
    executed = np.concatenate([c.actions[0, :, 0] for c in calls if isinstance(c, Commit)])
    assert np.array_equal(executed, np.arange(4, 20)), "of each plan, what was executed before the next came"
    assert memory.calls(session) == ([], 0), "nothing is told twice"


def test_a_block_is_appended_for_ever_and_little_is_kept() -> None:
    memory, session = _memory(), _session()
    for step in range(0, 12 * A + 1, STRIDE):
        memory.see(_request(step), 0.0)
        if step % A == 0:
            calls = _told(memory, session)
            assert session.block == step // A and not isinstance(calls[0], Reset)
            _planned(memory)
    assert len(memory.frames) <= 4 * A and len(memory.executed) <= 5 * A and len(memory.plans) <= 6 and len(memory.states) <= 5 * A
    for i in range(5000):  # a camera of ten thousand frames a second
        memory._add_frame(memory.now + i * 0.008, np.zeros((1, 1, 3), np.uint8))
    assert len(memory.frames) < 1000


def test_moments_that_are_not_said() -> None:
    steps = _memory(clock="steps")
    arrival = _memory(clock="arrival")
    auto = _memory()
    for memory, dialect, expected in ((steps, "openpi", [0, 8, 8]), (arrival, "openpi", [0, 10, 20]), (auto, "roboarena", [0, 8, 8]), (auto, "openpi", [0, 10, 20])):
        memory.restart()
        seen = []
        for i in range(3):
            request = replace(_request(0, timestamp=None), dialect=dialect)
            seen.append(memory.see(request, 5 + i / 8).step)
            if i == 0:
                _planned(memory)
        assert seen == expected, "as many steps as the last plan had actions; asking again at once is the same moment"
    with pytest.raises(ServingError, match="older than the newest") as stale:
        memory.see(_request(0, timestamp=None), 5.0)
    assert stale.value.code == "stale_observation"
    with pytest.raises(ServingError, match="executed holds 3 actions, and 0 control steps have passed"):
        memory.see(_request(0, timestamp=None, executed=np.zeros((3, 4), np.float32)), 5.25) if memory.clock == "arrival" else None


def test_frames_of_a_message_lie_evenly_or_where_the_client_says() -> None:
    four = np.arange(4, dtype=np.uint8)[:, None, None, None] * np.ones((1, 32, 48, 3), np.uint8)
    for rules, more, expected in (
        ({}, {}, [2, 4, 6, 8]),
        ({"offsets": (-7.0, -5.0, -3.0, 0.0)}, {}, [1, 3, 5, 8]),
        ({}, {"frame_times": np.array([3, 5, 7, 8]) / HZ}, [3, 5, 7, 8]),
    ):
        memory = _memory(**rules)
        memory.see(_request(0), 0.0)
        memory.see(_request(8, four, **more), 0.0)
        np.testing.assert_allclose([at for at, _ in memory.frames][1:], expected)
