"""Environments side by side: in two phases, and with ones that raise, die, hang, or give what cannot be seen."""

from __future__ import annotations

import time
from collections.abc import Iterator

import flaky_env as flaky
import numpy as np
import pytest

from wam.evaluation.environments import make_env, off_benchmark, parse_name
from wam.evaluation.vector import EnvironmentCrash, VectorEnv

NAME = "python/flaky_env:Flaky"


@pytest.fixture(scope="module")
def four() -> Iterator[VectorEnv]:
    """Four rows on two workers: rows 0 and 2 share one, rows 1 and 3 the other."""
    with VectorEnv(NAME, 4, workers=2, timeout_s=60.0) as env:
        yield env


def actions(rows: int, steps: int = 4, **by_row: float) -> np.ndarray:
    """Zeros, and in some rows something that makes the second step fail."""
    out = np.zeros((rows, steps, 3), np.float32)
    for row, what in by_row.items():
        out[int(row[1:]), 1, 0] = what
    return out


# ------------------------------------------------------------------------------------------------ two phases


def test_one_half_runs_while_the_other_is_planned_for(four: VectorEnv) -> None:
    four.reset([10, 11, 12, 13])
    four.submit(actions(2), [0, 1], 2)
    four.submit(actions(2), [2, 3], 4)
    with pytest.raises(ValueError, match=r"rows \[0\] are still running or were not collected"):
        four.submit(actions(1), [0], 2)
    with pytest.raises(ValueError, match="call collect"):
        four.reset([1])
    second = four.collect([3, 2])
    assert list(second) == [3, 2] and len(second[3].frames) == 1
    first = four.collect()
    assert list(first) == [0, 1] and [len(r.frames) for r in first.values()] == [2, 2] and first[1].states[-1].tolist() == [11, 4]
    assert four.collect() == {}
    with pytest.raises(ValueError, match=r"rows \[1\] were not submitted"):
        four.collect([1])
    four.run(actions(1, 8), [0], 2)
    with pytest.raises(ValueError, match=r"row 0 \(seed 10\): the episode is over"):
        four.submit(actions(1), [0], 2)


def test_workers_work_while_nobody_listens() -> None:
    """Two stretches of 0.4 s on one worker are done after 0.8 s, although the first was not collected before the second began."""
    with VectorEnv(NAME, 2, workers=1, seconds=0.1) as slow:
        slow.reset([1, 2])
        slow.submit(actions(2, 4), [0, 1], 1)
        time.sleep(1.0)
        begun = time.monotonic()
        slow.collect()
        assert time.monotonic() - begun < 0.5, "0.8 s of simulation lay in the second that the policy took"


def test_rows_begin_again_one_by_one(four: VectorEnv) -> None:
    four.reset([10, 11, 12, 13])
    four.run(actions(4), range(4), 2)
    again = four.reset([99], rows=[2])
    assert again.states.tolist() == [[99, 0]] and again.rest is not None and again.rest.tolist() == [[0, 0, 0]]
    assert [r.states[-1].tolist() for r in four.run(actions(2), [1, 2], 2)] == [[11, 8], [99, 4]]
    with pytest.raises(ValueError, match="distinct rows"):
        four.reset([1, 2], rows=[3, 3])


# ------------------------------------------------------------------------------------------------ crashes


def test_an_exception_ends_its_row_alone(four: VectorEnv) -> None:
    four.reset([10, 11, 12, 13])
    four.run(actions(4), range(4), 2)
    fine, broken = four.run(actions(2, r1=flaky.RAISES), [0, 2], 2)
    assert fine.crashed is None and fine.states[-1].tolist() == [10, 8] and broken.done and not len(broken.states)
    for part in ("Flaky crashed in the episode of seed 12 at control step 5", "not a failure of the policy", "Traceback", "the arm is stuck"):
        assert part in str(broken.crashed)
    with pytest.raises(ValueError, match=r"row 2 \(seed 12\): the episode is over"):
        four.submit(actions(1), [2], 2)
    assert four.run(actions(1), [1], 2)[0].states[-1].tolist() == [11, 8]
    assert four.reset([5] * 4).states.tolist() == [[5, 0]] * 4, "it was made anew"


def test_a_dead_worker_loses_its_own_rows_and_is_started_again(four: VectorEnv) -> None:
    four.reset([10, 11, 12, 13])
    four.submit(actions(2, r1=flaky.DIES), [0, 1], 2)
    results = four.collect()
    assert results[0].crashed is None and "seed 11 at control step 0" in str(results[1].crashed) and "exit code 7" in str(results[1].crashed)
    later = four.run(actions(2), [2, 3], 2)
    assert later[0].crashed is None and later[0].states[-1].tolist() == [12, 4]
    assert "seed 13 at control step 0" in str(later[1].crashed) and "shared with the episode of seed 11" in str(later[1].crashed)
    assert four.run(actions(1), [2], 2)[0].states[-1].tolist() == [12, 8], "the other worker's row goes on"
    four.reset([1, 2, 3, 4])
    assert all(r.crashed is None for r in four.run(actions(4), range(4), 2))


def test_who_killed_a_worker_is_known(four: VectorEnv) -> None:
    """Row 3 dies right after row 1, whose answer may or may not have been on its way."""
    for _ in range(2):
        four.reset([10, 11, 12, 13])
        four.submit(actions(2, r1=flaky.DIES), [1, 3], 2)
        results = four.collect()
        assert str(results[3].crashed).endswith("exit code 7, without a traceback") and "shared" not in str(results[3].crashed)
        assert "shared with the episode of seed 13" in str(results[1].crashed or four.run(actions(1), [1], 2)[0].crashed)


def test_answers_before_a_death_count(four: VectorEnv) -> None:
    four.reset([10, 11, 12, 13])
    four.submit(actions(1), [1], 2)
    time.sleep(0.3)
    four.submit(actions(1, r0=flaky.DIES), [3], 2)
    results = four.collect()
    assert results[1].states[-1].tolist() == [11, 4] and results[3].crashed
    assert "shared with the episode of seed 13" in str(four.run(actions(1), [1], 2)[0].crashed), "but it cannot go on"


def test_a_hanging_environment_is_ended() -> None:
    with VectorEnv(NAME, 2, workers=2, timeout_s=60.0) as env:
        env.reset([10, 11])
        env.timeout_s = 2.0
        begun = time.monotonic()
        fine, hung = env.run(actions(2, r1=flaky.HANGS), [0, 1], 2)
        assert time.monotonic() - begun < 20 and fine.crashed is None
        assert "seed 11" in str(hung.crashed) and "did not answer within 2 s" in str(hung.crashed)


def test_a_crash_at_reset_is_told_by_row(four: VectorEnv) -> None:
    first = four.reset([10, flaky.RAISES_AT_RESET, 12, 13])
    assert list(first.crashed) == [1] and "the table is not there" in first.crashed[1] and "at control step 0" in first.crashed[1]
    assert np.isnan(first.states[1]).all() and not first.frames[1].any() and first.states[3].tolist() == [13, 0]
    with pytest.raises(ValueError, match=r"row 1 .*over"):
        four.submit(actions(1), [1], 2)
    assert [r.crashed for r in four.run(actions(3), [0, 2, 3], 2)] == [None] * 3
    first = four.reset([10, 11, 12, flaky.DIES_AT_RESET])
    assert list(first.crashed) == [3] and "exit code 3" in first.crashed[3]
    assert four.run(actions(1), [1], 2)[0].states[-1].tolist() == [11, 4], "the row beside it had not begun, so it began again"
    first = four.reset([flaky.DIES_AT_RESET, 11, flaky.DIES_AT_RESET, 13])
    assert list(first.crashed) == [0, 2] and first.states[3].tolist() == [13, 0]


def test_an_environment_that_cannot_be_made_raises() -> None:
    with pytest.raises(EnvironmentCrash, match=r"(?s)cannot be made.*no such robot"):
        VectorEnv(NAME, 2, fails=True)
    with pytest.raises(ValueError, match=r"has no setting 'secnds'; did you mean 'seconds'\?; settings: max_steps, seconds"):
        VectorEnv(NAME, 1, secnds=1)


@pytest.mark.parametrize(
    ("what", "said"),
    [(flaky.IS_BLIND, "state holds nan at place 0, step 1"), (flaky.LOSES_A_FRAME, "1 frames where 2 are due"), (flaky.PAINTS_IN_FLOATS, "images are float64; expected uint8")],
)
def test_what_cannot_be_seen_is_the_environments_error(four: VectorEnv, what: float, said: str) -> None:
    four.reset([10, 11])
    fine, broken = four.run(actions(2, r1=what), [0, 1], 2)
    assert fine.crashed is None and said in str(broken.crashed) and broken.done


# ------------------------------------------------------------------------------------------------ names


def test_a_name_may_hold_settings() -> None:
    suite, task, own = parse_name("gym/gym_pusht/PushT-v0?state=[a, b]&make.obs_type=state&reward_threshold=0.95")
    assert suite.example == "gym/Pendulum-v1" and task == "gym_pusht/PushT-v0" and own == {"state": ["a", "b"], "make": {"obs_type": "state"}, "reward_threshold": 0.95}
    assert parse_name("pusht?max_steps=9")[1:] == ("", {"max_steps": 9}) and parse_name("remote/ws://a:1?fit=pad")[1:] == ("ws://a:1", {"fit": "pad"})
    assert make_env(NAME + "?max_steps=3", max_steps=5).max_steps == 3, "the name's own settings win"
    for name, said in (("gum/x", "did you mean 'gym'"), ("gym/x?oops", "write key=value"), ("python/flaky_env", "names no class"), ("python/flaky_env:Flakey", "has no class Flakey")):
        with pytest.raises(ValueError, match=said):
            make_env(name)


def test_results_that_nobody_can_compare_say_why() -> None:
    assert off_benchmark(NAME, 1, 2, 3) is None and off_benchmark("pusht", 100_000, 50, 300) is None
    assert "seed is 20000, theirs 100000; max_steps is 500, theirs 300" in str(off_benchmark("pusht", 20_000, 50, 500))
    assert off_benchmark("libero/libero_goal/3", 0, 50, 300) is None and "theirs 280" in str(off_benchmark("libero/libero_object/0", 0, 50, 300))
