"""The gate lets through what keeps the rules, cuts what does not, and makes nothing up."""

import numpy as np
import pytest

from wam.inference.gate import Gate, GateConfig, GateRefusal, GroupLimits, gate_config

HZ, DIM, A = 10.0, 3, 12


def _gate(**limits: object) -> Gate:
    config = {name: limits.pop(name) for name in ("otherwise", "slack", "blend", "max_age_s") if name in limits}
    return Gate(GateConfig((GroupLimits("arm", 0, 2, **limits),) if limits else (), **config), DIM, HZ)


def _smooth(scale: float = 0.1) -> np.ndarray:
    return (scale * np.linspace(0, 1, A)[:, None] * np.ones(DIM)).astype(np.float32)


def test_a_plan_that_keeps_the_rules_goes_through_bit_for_bit() -> None:
    gate = _gate(low=(-1,), high=(1,), velocity=1.0, jerk=50.0, jump=0.05)
    passed = gate(_smooth(), before=np.zeros((3, DIM)))
    assert np.array_equal(passed.actions, _smooth()) and passed.cut is None and passed.interventions == {}
    assert passed.actions.dtype == np.float32


@pytest.mark.parametrize(
    ("rule", "limits", "step"),
    [
        ("not_finite", {}, 7),
        ("position", dict(low=(-0.5, -1), high=(0.5, 1)), 7),
        ("velocity", dict(velocity=2.0), 7),
        ("jerk", dict(jerk=100.0), 7),
    ],
)
def test_a_broken_rule_cuts_the_plan_where_it_is_broken(rule: str, limits: dict, step: int) -> None:
    plan = _smooth()
    plan[step:, 0] += np.nan if rule == "not_finite" else 0.6
    passed = _gate(**limits)(plan)
    assert passed.cut is not None and (passed.cut.reason, passed.cut.step) == (rule, step)
    assert np.array_equal(passed.actions, plan[:step]) and passed.interventions == {rule: A - step}
    for otherwise, stops in (("raise", False), ("stop", True)):
        with pytest.raises(GateRefusal, match="nothing was sent") as refusal:
            _gate(otherwise=otherwise, **limits)(plan)
        assert refusal.value.stops is stops


def test_nothing_is_sent_where_the_first_action_is_refused() -> None:
    plan = _smooth() + np.float32(0.5)
    before = np.zeros((1, DIM))
    with pytest.raises(GateRefusal, match=r"arm jumps by 0\.5 at the plan's border, and 0\.2 is allowed"):
        _gate(jump=0.2)(plan, before)
    assert _gate(jump=0.2)(plan).cut is None  # nothing was sent before
    with pytest.raises(GateRefusal, match=r"0\.300 s old, and 0\.2 s are allowed"):
        _gate(max_age_s=0.2)(_smooth(), age_s=0.3)
    assert _gate(max_age_s=0.2)(_smooth(), age_s=0.2).cut is None


@pytest.mark.parametrize("order", [0, 1])
def test_rates_are_those_of_the_motion_whichever_way_it_is_written(order: int) -> None:
    """The same motion as targets and as displacements meets the same limits, borders included."""
    rng = np.random.default_rng(0)
    position = np.cumsum(rng.normal(size=(40, 2)), axis=0) * 0.1
    path = position if order == 0 else np.diff(position, axis=0, prepend=position[:1] * 0)
    before, plan = np.pad(path, ((0, 0), (0, 1)))[:20], np.pad(path, ((0, 0), (0, 1)))[20:]
    velocity = np.abs(np.diff(position, axis=0) * HZ).max(axis=1)[19:]
    jerk = np.abs(np.diff(position, n=3, axis=0) * HZ**3).max(axis=1)[17:]
    for name, sizes in (("velocity", velocity), ("jerk", jerk)):
        limit = float(np.sort(sizes)[-3])
        cut = _gate(order=order, **{name: limit * (1 + 1e-4)})(plan, before[-3:]).cut
        assert cut is not None and cut.step == int(np.flatnonzero(sizes > limit * (1 + 1e-4))[0])


def test_small_overshoots_are_moved_onto_the_limit_and_counted() -> None:
    plan = _smooth()
    plan[3:5, 0], plan[4, 2] = 0.104, 9  # the third dimension has no limits
    passed = _gate(low=(-0.1,), high=(0.1,))(plan)
    assert passed.cut is None and passed.interventions == {"clipped": 2}
    assert np.allclose(passed.actions[3:5, 0], 0.1) and np.array_equal(np.delete(passed.actions, 0, 1), np.delete(plan, 0, 1))
    assert _gate(low=(-0.1,), high=(0.1,), slack=0.0)(plan).cut.step == 3


def test_a_blend_goes_from_what_was_promised_to_what_is_planned() -> None:
    promised, plan = np.ones((4, DIM), np.float32), np.zeros((A, DIM), np.float32)
    passed = _gate(blend=3)(plan, promised=promised)
    assert np.allclose(passed.actions[:4, 0], [0.75, 0.5, 0.25, 0]) and passed.interventions == {"blended": 3}
    assert _gate(blend=3)(plan, promised=promised[:1]).interventions == {"blended": 1}
    assert _gate(blend=3)(plan).interventions == {}


def test_settings_are_read_by_the_robots_own_groups() -> None:
    tree = {"otherwise": "stop", "groups": {"arm": {"low": -1, "high": [1, 2], "jump": 0.1}, "gripper": {"low": 0, "high": 1}}}
    config = gate_config(tree, [("arm", 2), ("gripper", 1)], DIM)
    assert [(g.name, g.start, g.stop, g.low, g.high) for g in config.groups] == [("arm", 0, 2, (-1.0,), (1.0, 2.0)), ("gripper", 2, 3, (0.0,), (1.0,))]
    for wrong, told in (
        ({"other": 1}, "have other, which they do not take"),
        ({"groups": {"leg": {"low": 0}}}, "no action group 'leg'; it has all, arm, gripper"),
        ({"groups": {"arm": {"lo": 0}}}, "limits of 'arm' have lo"),
        ({"groups": {"arm": {"low": 1, "high": 0}}}, "swap them"),
        ({"groups": {"arm": {"velocity": 0}}}, "a number above 0"),
        ({"otherwise": "zero"}, "hold, stop or raise"),
    ):
        with pytest.raises(ValueError, match=told):
            gate_config(wrong, [("arm", 2), ("gripper", 1)], DIM)
