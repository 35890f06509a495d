"""A latency budget: what is chosen from measured times, how that is told, and that the times are those of real plans."""

import logging

import pytest
from tiny import tiny_policy, tiny_preset

from wam.config import SamplingConfig
from wam.inference import budget
from wam.inference.budget import Known, PlanTimes, Spread, StageTimes, candidate_steps, choose, delay_steps, pick, with_steps

OWN = SamplingConfig(steps=8)
COSTS = {"imagine": 20.0, "joint": 10.0, "skip": 2.0}  # milliseconds a step; p95 is half as much again


def _times() -> StageTimes:
    def plan(cost: float, steps: int) -> PlanTimes:
        return PlanTimes(Spread(cost * steps, cost * steps), Spread(0, 0), Spread(cost * steps + 2, 1.5 * (cost * steps + 2)))

    return StageTimes({}, {(mode, steps): plan(cost, steps) for mode, cost in COSTS.items() for steps in candidate_steps(OWN.steps)}, "a machine")


def _pick(budget_ms: float, *modes: str, hz: float = 80) -> budget.Choice:
    return pick(_times(), modes or tuple(COSTS), budget_ms, OWN, hz, 8)


def test_the_preferred_mode_takes_as_many_steps_as_fit() -> None:
    assert candidate_steps(8) == [8, 6, 4, 3, 2, 1] and candidate_steps(1) == [1]
    generous, tight, tighter = _pick(1000), _pick(100), _pick(20)
    assert (generous.mode, generous.steps, generous.fits) == ("imagine", 8, True)
    assert (tight.mode, tight.steps) == ("imagine", 3)  # 62 ms, 93 at p95; with 4 steps 82 and 123
    assert "4 solver steps take 123.0 ms" in tight.told and "62.0 ms, 93.0 ms at p95" in tight.told
    assert (tighter.mode, tighter.steps) == ("joint", 1)  # 18 at p95, where imagining takes at least 33
    assert "imagine takes at least 33.0 ms" in tighter.told
    assert _pick(20, "skip", "joint").mode == "skip", "the order of preference is the caller's"


def test_what_does_not_fit_is_the_cheapest_and_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        choice = _pick(5)
    assert (choice.mode, choice.steps, choice.fits) == ("skip", 1, False)
    assert "1.0 ms too long" in caplog.text and "imagine, joint, skip" in caplog.text
    caplog.clear()
    assert _pick(6).fits and not caplog.text


@pytest.mark.parametrize(("hz", "mode", "asynchronous", "keeps_up", "told"), [(100, "skip", False, True, "loses nothing"), (100, "joint", True, True, "5 of them go by"), (400, "joint", True, False, "do not keep up")])
def test_a_plan_is_held_against_control_step_and_block(hz: float, mode: str, asynchronous: bool, keeps_up: bool, told: str) -> None:
    choice = pick(_times(), [mode], {"skip": 6.0, "joint": 48.0}[mode], OWN, hz, 8)
    assert (choice.asynchronous, choice.keeps_up) == (asynchronous, keeps_up) and told in choice.told
    assert delay_steps(choice, hz) == {("skip", 100): 1, ("joint", 100): 5, ("joint", 400): 20}[mode, hz]


def test_steps_keep_the_shares_of_actions_and_evaluations() -> None:
    how = SamplingConfig(steps=16, action_steps=48, reuse="mask", evaluations=8)
    less = with_steps(how, 4)
    assert (less.steps, less.action_steps, less.evaluations) == (4, 12, 2) and with_steps(how, 16) == how


@pytest.mark.parametrize("preset", ["all", "lingbot_va", "fast_wam"])
def test_times_are_measured_once_for_a_shape(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with a first frame inside its block, and where the memory begins anew; a second checkpoint of the same sizes needs no other."""
    known: Known = {}
    policy, modes = tiny_policy(tiny_preset(preset, 32, "sampling.steps=2")), ["skip", "imagine"]
    choice = choose(policy, modes, 60_000, known=known, repeats=2)
    (times,) = known.values()
    assert (choice.mode, choice.steps, choice.fits) == ("skip", policy.config.sampling.steps, True)
    assert {"encode", "prefill", "commit"} <= set(times.observing) and set(times.plans) == {(m, s) for m in modes for s in candidate_steps(2)}
    for plan in times.plans.values():
        assert 0 < plan.denoise.median <= plan.whole.median <= plan.whole.p95
    monkeypatch.setattr(budget, "_measure", lambda *_: pytest.fail("measured again"))
    assert choose(policy, modes, 60_000, known=known, repeats=2) == choice
    with pytest.raises(pytest.fail.Exception):
        choose(policy, modes, 60_000, SamplingConfig(steps=1), known=known, repeats=2)


def test_what_cannot_be_chosen_is_refused() -> None:
    policy = tiny_policy(tiny_preset("all"))
    for modes, milliseconds, message in (([], 10, "no modes"), (["forward"], 10, "'forward' does not plan actions"), (["inverse"], 10, "'inverse' does not"), (["skip"], 0, "0 ms is no time")):
        with pytest.raises(ValueError, match=message):
            choose(policy, modes, milliseconds)
