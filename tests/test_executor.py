"""Plans meet time: what is decided is held in the next plan, who is late is counted, and nothing is made up."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from fake_robot import FakeRobot, FakeVector, fake_policy

from wam.config import CheckConfig, ExecutionConfig, PlannerConfig, SamplingConfig
from wam.evaluation.episodes import Driver, Episode, Watcher
from wam.inference.check import LEVELS, Floors, Horizon, Source, SurpriseScale
from wam.inference.executor import check_times
from wam.inference.gate import GateConfig, GroupLimits
from wam.inference.robot import Loop, held
from wam.inference.session import Plan, Session
from wam.pretrained import Policy

SEEDS = [20001, 20003]  # odd ones run to the end


@pytest.fixture(scope="module")
def policy() -> Policy:
    return fake_policy()


class Log(Watcher):
    """Plans with where they begin, and what each row was sent."""

    def __init__(self, rows: int) -> None:
        self.plans: list[list[tuple[int, np.ndarray]]] = [[] for _ in range(rows)]
        self.sent: list[list[np.ndarray]] = [[] for _ in range(rows)]
        self.asked: list[list[int]] = [[] for _ in range(rows)]

    def planned(self, session: Session, rows: Sequence[int], plan: Plan, sent: np.ndarray, milliseconds: float) -> None:
        self._plan = sent[0]
        self.asked[rows[0]].append(sum(len(a) for a in self.sent[rows[0]]))

    def placed(self, row: int, at: int) -> None:
        self.plans[row].append((at, self._plan))

    def acted(self, row: int, actions: np.ndarray) -> None:
        self.sent[row].append(actions)

    def actions(self, row: int) -> np.ndarray:
        return np.concatenate(self.sent[row])


def drive(policy: Policy, seeds: Sequence[int] = SEEDS, replan: int = 8, mode: str = "skip", env: Any = None, **loop: Any) -> tuple[list[Episode], Log]:
    driver, log = Driver(policy, mode, SamplingConfig(steps=2), replan, 7, **loop), Log(len(seeds))
    return driver.drive(env or FakeVector("fake", len(seeds)), seeds, [log]), log


def test_what_is_decided_is_held_in_the_next_plan_and_no_robot_waits(policy: Policy) -> None:
    episodes, log = drive(policy, execution=ExecutionConfig(time="asynchronous", delay=4))
    for row in range(2):
        sent = log.actions(row)
        assert [at for at, _ in log.plans[row]] == [4, 8, 12, 16, 20, 24, 28, 32, 36], "the first is executed when it comes; each later one begins when it is asked for"
        assert episodes[row].held == 4 and episodes[row].late == 0, "the robot stood still before its first plan, and never again"
        for (at, plan), asked in list(zip(log.plans[row], log.asked[row], strict=True))[1:]:
            assert at == asked
            np.testing.assert_array_equal(plan[:4].clip(-1, 1), sent[at : at + 4])  # held as decided
            np.testing.assert_array_equal(plan[4:].clip(-1, 1)[: len(sent) - at - 4], sent[at + 4 : at + 8])
        borders = [4, *(at + 4 for at, _ in log.plans[row][1:] if at + 4 < len(sent))]
        jump = np.mean([np.abs(sent[at] - sent[at - 1]).max() for at in borders])  # the box is from -1 to 1
        assert jump > 1e-3 and episodes[row].jump == pytest.approx(jump, abs=1e-6)
    assert np.array_equal(log.actions(0)[:4], np.zeros((4, 4)))


def test_naive_plans_know_nothing_of_what_is_executed_meanwhile(policy: Policy) -> None:
    _, held_in = drive(policy, execution=ExecutionConfig(time="asynchronous", delay=4))
    _, naive = drive(policy, execution=ExecutionConfig(time="naive", delay=4))
    (_, first), (at, second) = naive.plans[0][:2]
    np.testing.assert_array_equal(first, held_in.plans[0][0][1])
    assert at == 8 and np.abs(second[:4].clip(-1, 1) - naive.actions(0)[8:12]).max() > 1e-3, "the plan's own first actions are dropped"
    np.testing.assert_array_equal(second[4:].clip(-1, 1), naive.actions(0)[12:16])


def test_unaligned_plans_are_executed_late_from_their_first_action_on(policy: Policy) -> None:
    _, naive = drive(policy, execution=ExecutionConfig(time="naive", delay=4))
    episodes, late = drive(policy, execution=ExecutionConfig(time="unaligned", delay=4))
    np.testing.assert_array_equal(late.actions(0)[:12], naive.actions(0)[:12])
    assert late.asked == naive.asked, "pictures are looked at as often"
    for row in range(2):
        starts, sent = [at for at, _ in late.plans[row]], late.actions(row)
        assert starts == [asked + 4 for asked in late.asked[row]]
        for at, plan in late.plans[row]:
            np.testing.assert_array_equal(plan[:4].clip(-1, 1)[: len(sent) - at], sent[at : at + 4])
        assert episodes[row].held == 4 and episodes[row].late == 0


def test_a_robot_that_thinks_stands_still_and_its_steps_are_counted(policy: Policy) -> None:
    episodes, log = drive(policy, execution=ExecutionConfig(delay=3))  # frames come every other step: 4
    assert log.asked[0] == [0, 12, 24, 36] and [at for at, _ in log.plans[0]] == [4, 16, 28, 40]
    still = np.isclose(log.actions(0), 0).all(axis=1)
    assert still[[0, 1, 2, 3, 12, 13, 14, 15, 24, 25, 26, 27]].all() and not still[4:12].any() and episodes[0].held == 16


@pytest.mark.parametrize("loop", [{"execution": ExecutionConfig(time="asynchronous", delay=4)}, {"execution": ExecutionConfig(time="ahead", delay=4)}, {"execution": ExecutionConfig(time="guided", delay=4)}])
def test_side_by_side_equals_one_by_one_in_every_mode_of_time(policy: Policy, loop: dict[str, Any]) -> None:
    together, log = drive(policy, **loop)
    halves, overlapped = drive(policy, overlap=True, **loop)
    assert halves == together
    for row, seed in enumerate(SEEDS):
        episodes, alone = drive(policy, [seed], **loop)
        assert episodes == [together[row]]
        np.testing.assert_allclose(alone.actions(0), log.actions(row), atol=1e-4)
        np.testing.assert_allclose(overlapped.actions(row), log.actions(row), atol=1e-4)


@pytest.mark.parametrize("missing", ["forward", "left_out"])
def test_the_next_block_is_planned_while_this_one_runs(policy: Policy, missing: Any) -> None:
    episodes, log = drive(policy, execution=ExecutionConfig(time="ahead", delay=8, missing_frames=missing))
    assert [at for at, _ in log.plans[0]][:4] == [8, 16, 24, 32] and log.asked[0][:4] == [0, 8, 16, 24], "asked for a block ahead"
    for at, plan in log.plans[0][:3]:
        np.testing.assert_array_equal(log.actions(0)[at : at + 8], plan.clip(-1, 1))
    assert episodes[0].held == 8 and episodes[0].late == 0


def test_a_block_ahead_that_the_gate_cut_is_followed_by_a_plan_from_now_on(policy: Policy) -> None:
    """The robot's fourth number may not go above a limit that its plans break somewhere: what is executed of each plan is still its own beginning."""
    gate = GateConfig((GroupLimits("last", 3, 4, high=(0.02,)),), slack=0.0)
    episodes, log = drive(policy, gate=gate, execution=ExecutionConfig(time="ahead", delay=4))
    assert episodes[0].gate.get("position", 0) > 0 and episodes[0].held > 0, "the limit does cut"
    for row in range(2):
        sent, starts = log.actions(row), [at for at, _ in log.plans[row]]
        ahead = [at - asked for at, asked in zip(starts, log.asked[row], strict=True)]
        assert set(ahead) <= {4, 8} and 4 in ahead[1:], "a whole block ahead, or from now on after standing still: never behind half a block that the plan knew nothing of"
        for (at, plan), until in zip(log.plans[row], [*starts[1:], len(sent)], strict=True):
            bad = np.flatnonzero(plan[:, 3] > 0.02)
            mine = min(int(bad[0]) if len(bad) else 8, until - at, len(sent) - at)
            np.testing.assert_array_equal(sent[at : at + mine], plan[:mine])


def test_a_plan_that_comes_too_late_leaves_the_robot_holding_and_is_counted(policy: Policy) -> None:
    episodes, _ = drive(policy, execution=ExecutionConfig(time="asynchronous", delay=6))  # 2 of 8 actions are left of each plan, for 6 steps
    assert episodes[0].late > 0 and episodes[0].held > 6
    whole, _ = drive(policy, execution=ExecutionConfig(time="unaligned", delay=6))  # all 8 are executed
    assert whole[0].late == 0 and whole[0].held == 6


def test_what_the_gate_refuses_leaves_what_was_decided(policy: Policy) -> None:
    gate = GateConfig((GroupLimits("all", 0, 4, low=(-1e-6,), high=(1e-6,)),), slack=0.0)
    episodes, log = drive(policy, gate=gate)
    assert episodes[0].refused == episodes[0].chunks > 1 and episodes[0].held == episodes[0].length and not log.actions(0).any()
    assert episodes[0].gate["position"] == 8 * episodes[0].refused
    stopped, _ = drive(policy, gate=dataclasses.replace(gate, otherwise="stop"))
    assert stopped[0].outcome == "stopped" and "outside of" in (stopped[0].why or "") and stopped[0].length == 0
    with pytest.raises(ValueError, match=r"mode 'skip', episodes of seeds .* at control step 0: .*nothing was sent"):
        drive(policy, gate=dataclasses.replace(gate, otherwise="raise"))


class Falls(FakeRobot):
    """Its simulator fails at step 16 of the episode of seed 20001."""

    def run(self, actions: np.ndarray, frame_stride: int) -> Any:
        if self.seed == 20001 and self.steps >= 16:
            none = np.zeros(0, np.float32)
            return dataclasses.replace(super().run(actions, frame_stride), states=np.zeros((0, 4), np.float32), rewards=none, success=none.astype(bool), done=True, crashed="it fell over")
        return super().run(actions, frame_stride)


class FallingVector(FakeVector):
    robot = Falls


def test_a_crash_is_a_crash_and_the_others_go_on(policy: Policy) -> None:
    episodes, _ = drive(policy, env=FallingVector("fake", 2))
    assert (episodes[0].outcome, episodes[0].why, episodes[0].length) == ("crashed", "it fell over", 16)
    assert episodes[1].outcome == "failed" and episodes[1].length == 40


def test_times_that_do_not_fit_are_refused(policy: Policy) -> None:
    for execution, replan, message in (
        (ExecutionConfig(time="asynchronous", delay=8), 8, "delay is 8, and a plan holds 8"),
        (ExecutionConfig(time="ahead"), 4, "plans whole blocks of 8"),
        (ExecutionConfig(time="ahead"), 8, "check.source has nothing to compare with"),
        (ExecutionConfig(time="unaligned"), 8, "nothing comes as it was imagined"),
        (ExecutionConfig(time="unaligned", delay=8), 8, "it would be over before it comes"),
        (ExecutionConfig(time="guided"), 8, "a search has no velocities to guide"),
        (ExecutionConfig(), 3, r"rollout.replan is 3, but frames come every 2 .*use one of 2, 4, 6, 8"),
    ):
        with pytest.raises(ValueError, match=message):
            check_times(policy, Loop("skip", SamplingConfig(steps=1), replan, execution, CheckConfig(source="forward"), PlannerConfig(kind="best_of_n")))


def test_holding_repeats_a_command_and_makes_none_up() -> None:
    hold, none = np.array([0, np.nan], np.float32), np.full(2, np.nan, np.float32)
    assert held(hold, np.array([5, 7], np.float32)).tolist() == [0, 7]
    with pytest.raises(ValueError, match="none was sent yet; nothing was sent"):
        held(hold, none)


# ------------------------------------------------------------------------------------------------ predict and check


LONG = ("timeline.latents_per_block=2", "timeline.actions_per_block=16")  # frames can be compared in the middle of a block


def scale_of(error: float, *sources: str) -> SurpriseScale:
    """A scale by which `error` is usual."""
    usual = (error,) * len(LEVELS)
    horizons = tuple(Horizon(1, 0, usual, usual) for _ in range(2))
    return SurpriseScale("0" * 64, dict.fromkeys(sources, Source(Floors(0.0, 0.0), horizons, usual, usual)), {})


@pytest.mark.parametrize(("source", "name"), [("forward", "forward/1"), ("plan", "joint/2")])
def test_a_surprise_asks_for_a_plan_at_once(source: Any, name: str) -> None:
    policy, mode = fake_policy(*LONG), "joint" if source == "plan" else "skip"

    def asked(error: float, **check: Any) -> tuple[list[int], Episode]:
        episodes, log = drive(policy, [20001], 16, mode, scale=scale_of(error, name), check=CheckConfig(source=source, **check))
        return log.asked[0], episodes[0]

    assert asked(1e6)[0] == [0, 16, 32], "nothing is unusual"
    steps, episode = asked(1e-6)
    assert steps == [0, 8, 16, 24, 32] and episode.surprises == 4 and episode.replans == 4, "after the first of two latent frames"
    assert asked(1e-6, then="nothing")[0] == [0, 16, 32]
    _, stopped = asked(1e-6, then="stop")
    assert (stopped.outcome, stopped.length) == ("stopped", 8) and "surprised: latent frame 1" in (stopped.why or "")


def test_imagination_is_dear_only_when_it_is_needed() -> None:
    policy = fake_policy(*LONG)
    check = CheckConfig(source="forward", escalate="imagine", escalated_plans=1)
    calm, _ = drive(policy, [20001], 16, scale=scale_of(1e6, "forward/1"), check=check)
    alarmed, _ = drive(policy, [20001], 16, scale=scale_of(1e-6, "forward/1"), check=check)
    assert calm[0].modes == {"skip": 3} and alarmed[0].modes == {"skip": 1, "imagine": 4}
    assert 2 * calm[0].flops < alarmed[0].flops
    searching, _ = drive(policy, [20001], 16, scale=scale_of(1e-6, "forward/1"), check=check, planner=PlannerConfig(kind="best_of_n", candidates=2, when="surprised"))
    assert searching[0].modes == {"skip": 1, "best_of_n of imagine": 4}


def test_a_check_without_a_calibration_is_refused(policy: Policy) -> None:
    with pytest.raises(ValueError, match="run `wam calibrate --checkpoint DIR`"):
        drive(policy, check=CheckConfig(source="forward"))
    with pytest.raises(ValueError, match=r"not calibrated for 'forward/1'"):
        drive(policy, check=CheckConfig(source="forward"), scale=scale_of(1.0, "joint/2"))
    with pytest.raises(ValueError, match="plans in mode 'skip' imagine no video"):
        drive(policy, check=CheckConfig(source="plan"), scale=scale_of(1.0, "joint/2"))
