"""The last thing between a plan and a robot: it lets through what may be executed, and cuts off what may not.

    before   ... h h h |                     what was sent last
    plan               | a0 a1 a2 a3 a4 ...
    checks               finite   position   velocity   jerk   jump from what was sent last   in time

The gate never makes a command up.  What it lets through is the plan's own, but for two things that are asked for in its configuration:
an overshoot of a position limit by a little is moved onto the limit, and the first actions may be mixed with what an earlier plan
promised for the same steps.  From the first action that breaks a rule on, the plan is cut: `hold` sends what comes before it (a robot
without further actions holds), `stop` sends nothing until a person resets, `raise` sends nothing this time.

Limits are in the robot's own units and seconds.  A target (order 0) moves by its differences; a displacement a step (order 1) is itself a
velocity over the rate.  There is no state: what was sent before is passed in.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from wam.config_tree import read_yaml

Otherwise = Literal["hold", "stop", "raise"]
Reason = Literal["not_finite", "position", "velocity", "jerk", "jump", "late"]
CUTS: tuple[Reason, ...] = ("not_finite", "position", "velocity", "jerk", "jump", "late")
CLIPPED, BLENDED = "clipped", "blended"  # what changes an action within the rules
EPSILON = 1e-6  # of a limit: float32 commands lie on it
MAX_HISTORY = 3  # actions sent before that a jerk looks at


@dataclass(frozen=True)
class GroupLimits:
    """Limits of some neighbouring dimensions of an action; None: no limit.

    Attributes:
        start, stop: the dimensions, stop exclusive.
        low, high: of positions (order 0) or displacements (order 1): a number each, or one for all.
        velocity: largest |change| a second.
        jerk: largest |third derivative|, a second cubed.
        jump: largest |difference| between the last action sent and a plan's first.
        order: 0: actions are targets; 1: displacements of one control step.
    """

    name: str
    start: int
    stop: int
    low: tuple[float, ...] | None = None
    high: tuple[float, ...] | None = None
    velocity: float | None = None
    jerk: float | None = None
    jump: float | None = None
    order: Literal[0, 1] = 0

    def __post_init__(self) -> None:
        size = self.stop - self.start
        if self.start < 0 or size < 1:
            raise ValueError(f"limits of {self.name!r} are for dimensions {self.start} to {self.stop}; expected 0 <= start < stop")
        for what in ("low", "high"):
            bounds = getattr(self, what)
            if bounds is not None and len(bounds) not in (1, size):
                raise ValueError(f"limits of {self.name!r}: {what} has {len(bounds)} numbers; give 1 for all, or {size}")
        if self.low is not None and self.high is not None and not (np.broadcast_to(self.low, size) < np.broadcast_to(self.high, size)).all():
            raise ValueError(f"limits of {self.name!r}: low {list(self.low)} is not below high {list(self.high)}; swap them")
        for what in ("velocity", "jerk", "jump"):
            limit = getattr(self, what)
            if limit is not None and not limit > 0:
                raise ValueError(f"limits of {self.name!r}: {what} is {limit}; expected a number above 0, or null for none")


@dataclass(frozen=True)
class GateConfig:
    """What a robot may be sent.

    Attributes:
        groups: limits; without any, numbers must still be finite.
        otherwise: what becomes of a plan that breaks a rule.
        slack: part of a position's range by which an action may overshoot and is moved onto the limit.
        quiet: part of a position's range by which an action may be moved onto the limit without being counted: experts' actions lie on the edge, and what imitates them overshoots a little.
        blend: first actions of a plan that are mixed, less and less, with what the earlier plan promised for the same steps.
        max_age_s: oldest observation that a plan may rest on when it is let through; None: as old as it is.
    """

    groups: tuple[GroupLimits, ...] = ()
    otherwise: Otherwise = "hold"
    slack: float = 0.05
    quiet: float = 0.0
    blend: int = 0
    max_age_s: float | None = None

    def __post_init__(self) -> None:
        if self.otherwise not in ("hold", "stop", "raise"):
            raise ValueError(f"the gate's otherwise is {self.otherwise!r}; expected hold, stop or raise")
        if not 0 <= self.slack < 1:
            raise ValueError(f"the gate's slack is {self.slack}; expected a part of a position's range, 0 <= slack < 1")
        if not 0 <= self.quiet <= self.slack:
            raise ValueError(f"the gate's quiet is {self.quiet}; expected a part of a position's range, 0 <= quiet <= slack = {self.slack}")
        if self.blend < 0:
            raise ValueError(f"the gate's blend is {self.blend}; expected a number of actions, 0 for none")
        if self.max_age_s is not None and not self.max_age_s > 0:
            raise ValueError(f"the gate's max_age_s is {self.max_age_s}; expected seconds above 0, or null")


@dataclass(frozen=True)
class Cut:
    """Where a plan was cut, and by which rule."""

    step: int
    reason: Reason
    told: str


class GateRefusal(ValueError):
    """A plan was not let through; nothing is to be sent."""

    def __init__(self, cut: Cut, stops: bool):
        super().__init__(f"{cut.told}; nothing was sent")
        self.cut, self.stops = cut, stops


@dataclass(frozen=True)
class Passed:
    """What may be sent.

    Attributes:
        actions: (n, d) float32; n below the plan's length where it was cut.
        cut: where, and why; None: nowhere.
        interventions: actions changed or cut off, by reason.
    """

    actions: np.ndarray
    cut: Cut | None = None
    interventions: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Gate:
    """The rules for a robot of `dim` dimensions at `control_hz`."""

    config: GateConfig
    dim: int
    control_hz: float

    def __post_init__(self) -> None:
        for group in self.config.groups:
            if group.stop > self.dim:
                raise ValueError(f"limits of {group.name!r} reach to dimension {group.stop}, and an action has {self.dim}; see the checkpoint's embodiment")
        if not (math.isfinite(self.control_hz) and self.control_hz > 0):
            raise ValueError(f"the gate's control_hz is {self.control_hz}; expected control steps a second")

    def __call__(self, plan: np.ndarray, before: np.ndarray | None = None, promised: np.ndarray | None = None, age_s: float = 0.0) -> Passed:
        """Let a plan through, or as much of it as may be sent.

        Args:
            plan: actions (A, d), in the robot's units.
            before: the last actions sent before the plan's first (m, d), newest last; None or empty: nothing was.
            promised: what the earlier plan had for the same steps (m, d), as far as it went; for blending.
            age_s: seconds since the observation that the plan rests on.

        Raises:
            GateRefusal: a rule is broken at the first action, or at any where `otherwise` is not `hold`.
            ValueError: arrays of other shapes.
        """
        before, promised = (np.zeros((0, self.dim)) if x is None else np.asarray(x, np.float64) for x in (before, promised))
        for name, array in (("plan", plan), ("before", before), ("promised", promised)):
            if array.ndim != 2 or array.shape[1] != self.dim:
                raise ValueError(f"the gate's {name} has shape {array.shape}; expected (n, {self.dim})")
        actions, counts = np.array(plan, np.float64), Counter[str]()
        first = self._late(age_s)
        if first is None:
            finite = self._not_finite(actions)
            end = len(actions) if finite is None else finite.step
            blended = self._blend(actions[:end], promised)
            clipped = self._clip(actions[:end])
            cuts = [cut for cut in (finite, self._broken(actions[:end], before[-MAX_HISTORY:])) if cut is not None]
            first = min(cuts, key=lambda cut: cut.step) if cuts else None
            end = len(actions) if first is None else first.step
            counts = Counter({name: n for name, n in ((BLENDED, int(blended[:end].sum())), (CLIPPED, int(clipped[:end].sum()))) if n})
        if first is not None:
            if self.config.otherwise != "hold" or first.step == 0:
                raise GateRefusal(first, self.config.otherwise == "stop")
            counts[first.reason] = len(actions) - first.step
            actions = actions[: first.step]
        return Passed(actions.astype(np.float32), first, dict(counts))

    # ------------------------------------------------------------------------------------------ what is changed

    def _blend(self, actions: np.ndarray, promised: np.ndarray) -> np.ndarray:
        """Mix the first actions in place; returns which (n,)."""
        count = min(self.config.blend, len(promised), len(actions))
        mixed = np.zeros(len(actions), bool)
        if count and np.isfinite(promised[:count]).all():
            new = (np.arange(1, count + 1) / (self.config.blend + 1))[:, None]
            actions[:count] = new * actions[:count] + (1 - new) * promised[:count]
            mixed[:count] = True
        return mixed

    def _clip(self, actions: np.ndarray) -> np.ndarray:
        """Move small overshoots onto the limit, in place; returns which actions (n,)."""
        moved = np.zeros(len(actions), bool)
        for group in self.config.groups:
            x, bounds = actions[:, group.start : group.stop], _bounds(group)
            near = np.minimum(np.maximum(x, bounds.low), bounds.high)
            over = np.abs(x - near)
            if not over.any():
                continue
            small = over <= self.config.slack * bounds.width
            moved |= (small & (over > np.maximum(self.config.quiet * bounds.width, bounds.room))).any(axis=1)
            x[small] = near[small]
        return moved

    # ------------------------------------------------------------------------------------------ what is refused

    def _late(self, age_s: float) -> Cut | None:
        limit = self.config.max_age_s
        if limit is None or age_s <= limit:
            return None
        return Cut(0, "late", f"the plan rests on an observation {age_s:.3f} s old, and {limit:g} s are allowed")

    @staticmethod
    def _not_finite(actions: np.ndarray) -> Cut | None:
        broken = np.argwhere(~np.isfinite(actions))
        if not len(broken):
            return None
        step, dimension = (int(i) for i in broken[0])
        return Cut(step, "not_finite", f"the plan holds {actions[step, dimension]} at action {step}, dimension {dimension}")

    def _broken(self, actions: np.ndarray, before: np.ndarray) -> Cut | None:
        """The first action that breaks a limit."""
        found = [cut for group in self.config.groups for cut in self._of_group(group, actions, before) if cut is not None]
        return min(found, key=lambda cut: (cut.step, CUTS.index(cut.reason)), default=None)

    def _of_group(self, group: GroupLimits, actions: np.ndarray, before: np.ndarray) -> list[Cut | None]:
        x, past = actions[:, group.start : group.stop], before[:, group.start : group.stop]
        bounds = _bounds(group)
        low, high = bounds.low, bounds.high
        over = np.maximum(low - x, x - high).max(axis=1, initial=-np.inf)
        cuts = [_first(over > bounds.room, "position", lambda i: f"{group.name} is {x[i].tolist()} at action {i}, outside of {low.tolist()} to {high.tolist()}")]
        if group.jump is not None and len(past) and len(x):
            jump = float(np.abs(x[0] - past[-1]).max())
            cuts.append(Cut(0, "jump", f"{group.name} jumps by {jump:g} at the plan's border, and {group.jump:g} is allowed") if jump > group.jump * (1 + EPSILON) else None)
        path, known = np.concatenate([past, x]), len(past)
        for reason, limit, times in (("velocity", group.velocity, 1 - group.order), ("jerk", group.jerk, 3 - group.order)):
            if limit is not None:
                cuts.append(_exceeds(group.name, reason, path, known, limit, times, self.control_hz ** (times + group.order)))  # type: ignore[arg-type]
        return cuts


def _exceeds(name: str, reason: Reason, path: np.ndarray, known: int, limit: float, times: int, scale: float) -> Cut | None:
    """The first new point of `path` whose difference, taken `times` times, is too great; the first `known` points were sent before."""
    if len(path) <= times:
        return None
    change = path
    for _ in range(times):
        change = change[1:] - change[:-1]
    size = np.abs(change).max(axis=1) * scale  # the difference that ends at point i + times
    at = np.zeros(len(path), bool)
    at[times:] = size > limit * (1 + EPSILON)
    return _first(at[known:], reason, lambda i: f"{name} has a {reason} of {size[known + i - times]:g} at action {i}, and {limit:g} is allowed")


def _first(broken: np.ndarray, reason: Reason, tell: Any) -> Cut | None:
    if not broken.any():
        return None
    step = int(broken.argmax())
    return Cut(step, reason, tell(step))


@dataclass(frozen=True)
class _Bounds:
    """Positions of a group (d,): where there is no limit, infinite; `width` is then 0.  `room`: by how much a number that lies on a limit may be beyond it in float32."""

    low: np.ndarray
    high: np.ndarray
    width: np.ndarray
    room: float


@lru_cache(maxsize=256)
def _bounds(group: GroupLimits) -> _Bounds:
    """Of one group: worked out once, not for every plan."""
    size = group.stop - group.start
    low, high = (np.broadcast_to(np.asarray((none,) if b is None else b, np.float64), size) for b, none in ((group.low, -np.inf), (group.high, np.inf)))
    finite = np.abs(np.concatenate([low, high]))
    width = np.where(np.isfinite(high - low), high - low, 0.0)
    return _Bounds(low, high, width, float(EPSILON * finite[np.isfinite(finite)].max(initial=0.0)))


# ------------------------------------------------------------------------------------------------ from a file


def read_gate(path: Path, groups: Sequence[tuple[str, int]], dim: int) -> GateConfig:
    """A gate's settings from a YAML file; see `gate_config`.

    Raises:
        FileNotFoundError, ValueError: no such file, or not such settings.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file of limits {path}; `wam serve --help` shows what one looks like")
    tree = read_yaml(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(tree, Mapping):
        raise ValueError(f"{path} holds no settings; `wam serve --help` shows what a file of limits looks like")
    return gate_config(tree, groups, dim)


def gate_config(tree: Mapping[str, Any], groups: Sequence[tuple[str, int]], dim: int) -> GateConfig:
    """A gate's settings from a file's content.

        otherwise: hold
        blend: 3
        groups:
          joint_position: {low: -2.9, high: 2.9, velocity: 1.5, jerk: 200, jump: 0.1}
          gripper_position: {low: 0, high: 1}

    Args:
        tree: as above; a group is one of the robot's, or `all`, or any name with `start` and `stop`.
        groups: the robot's (name, size), in order.
        dim: numbers of an action.

    Raises:
        ValueError: unknown keys or groups, or limits that are none.
    """
    known = {f.name for f in fields(GateConfig)}
    _refuse_unknown("the gate's settings", tree, known)
    starts = dict(zip([name for name, _ in groups], np.cumsum([0, *(size for _, size in groups)]).tolist(), strict=False))
    places: dict[str, tuple[Any, Any]] = {"all": (0, dim), **{name: (starts[name], starts[name] + size) for name, size in groups}}
    limits = []
    given = tree.get("groups") or {}
    if not isinstance(given, Mapping):
        raise ValueError(f"the gate's groups are {given!r}; expected a map from group to limits")
    for name, values in given.items():
        if not isinstance(values, Mapping):
            raise ValueError(f"limits of {name!r} are {values!r}; expected a map such as {{low: -1, high: 1}}")
        _refuse_unknown(f"limits of {name!r}", values, {f.name for f in fields(GroupLimits)} - {"name"})
        place: tuple[Any, Any] = places.get(name, (values.get("start"), values.get("stop")))
        if not all(isinstance(i, int) for i in place):
            raise ValueError(f"the robot has no action group {name!r}; it has {', '.join(places)}; or give start and stop")
        bounds: dict[str, Any] = {what: tuple(float(x) for x in (v if isinstance(v, (list, tuple)) else [v])) for what in ("low", "high") if (v := values.get(what)) is not None}
        rest: dict[str, Any] = {what: values[what] for what in ("velocity", "jerk", "jump", "order") if values.get(what) is not None}
        limits.append(GroupLimits(str(name), place[0], place[1], **(bounds | rest)))
    return GateConfig(groups=tuple(limits), **{key: value for key, value in tree.items() if key != "groups"})


def _refuse_unknown(where: str, tree: Mapping[str, Any], known: set[str]) -> None:
    strange = sorted(str(key) for key in tree if key not in known)
    if strange:
        raise ValueError(f"{where} have {', '.join(strange)}, which they do not take; they take {', '.join(sorted(known))}")
