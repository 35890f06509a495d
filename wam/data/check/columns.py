"""Checks of states and actions: sizes, labels that are no commands, dimensions that do not move or move too far, signs.

All of them trained policies without a word: a network normalises, clips and averages whatever it is given.
"""

from __future__ import annotations

import numpy as np

from wam.data.check.evidence import Evidence, dimension_names
from wam.data.check.findings import Finding, Level, some
from wam.data.normalize import SMALLEST_RANGE
from wam.data.rotations import convert

EQUAL = 0.99  # share of rows that must coincide before labels count as copies of the state
HEAVY = 5.0  # half-ranges (between the 1st and 99th percentile) from the middle
CLIPPED, AT_LIMIT = 0.5, 0.05  # share of rows at a dimension's least and greatest value
UNIT = 1e-3  # how far from 1 a quaternion's norm may be


def slices(evidence: Evidence) -> list[Finding]:
    """Widths of states and actions against the config's robot."""
    data, found = evidence.config.data, []
    robot = evidence.config.model.embodiment(data.embodiment)
    if robot.state_groups or robot.action_groups:
        return _groups(evidence)
    for key, name, size in (
        (data.state, "state_dim", robot.state_dim),
        (data.action, "action_dim", robot.action_dim),
        (data.executed_action, "action_dim", robot.action_dim),
    ):
        if key is None or key not in evidence.rows:
            continue
        width, names = evidence.rows[key][0].shape[1], dimension_names(evidence.dataset.info, key)
        if width != size:
            found.append(
                Finding(
                    "error",
                    "slices",
                    key,
                    f"{width} dimensions{f' ({chr(44).join(names)})' if names else ''}",
                    f"{name} = {size} of robot {robot.name!r}",
                    f"set {name} of model.embodiments to {width}, or name another column",
                )
            )
        if names and len(names) != width:
            found.append(
                Finding(
                    "warning",
                    "slices",
                    key,
                    f"{len(names)} names for {width} dimensions",
                    "a name for each",
                    "correct `names` in meta/info.json: the order of dimensions is in doubt",
                )
            )
    return found


def _groups(evidence: Evidence) -> list[Finding]:
    """A robot's groups against the columns that they are slices of."""
    units, found = evidence.units, []
    for what in ("state", "action"):
        for part in getattr(units, what):
            for key in dict.fromkeys((part.column, part.executed)):
                width = evidence.rows[key][0].shape[1] if key in evidence.rows else part.stop
                if part.stop > width:
                    where = f"{what} group {part.name!r}"
                    found.append(Finding("error", "slices", where, f"dimensions {part.start}..{part.stop - 1} of {key}", f"a slice of its {width} dimensions", "correct the group's column, start or size"))
    return found


def finite(evidence: Evidence) -> list[Finding]:
    """Numbers that are none."""
    found = []
    for key, episodes in evidence.rows.items():
        broken = [i for i, rows in enumerate(episodes) if not np.isfinite(rows).all()]
        if broken:
            found.append(Finding("error", "finite", key, f"NaN or infinity in the episodes {some(broken)}", "numbers", "repair or leave out these episodes"))
    return found


def labels(evidence: Evidence) -> list[Finding]:
    """Labels that are the state itself: a policy trained on them learns to stay where it is."""
    if not evidence.state or not evidence.action:
        return []
    found = []
    cases: tuple[tuple[int, Level, str, str], ...] = (
        (
            0,
            "error",
            "the state of the same row",
            "record what was commanded, or take the next row's state as the label: these teach the robot to stay where it is",
        ),
        (-1, "error", "the state of the row before", "move the actions a row or more earlier: these teach the robot to go back"),
        (
            1,
            "info",
            "the state of the next row",
            "fine for a position controller that reaches its target in one step; else record what was commanded, which leads the arm and says how hard it presses",
        ),
    )
    for shift, level, words, remedy in cases:
        same = [d for d, s in _pairs(evidence) if _coincide(evidence, d, s, shift) >= EQUAL]
        if same:
            found.append(
                Finding(level, "labels", ", ".join(evidence.part_of("action", d)[1] for d in same), f"equals {words} in at least {EQUAL:.0%} of rows", "commands", remedy)
            )
    return found


def _pairs(evidence: Evidence) -> list[tuple[int, int]]:
    """Dimensions of an action and of the state that may be the same quantity: those of a group and of the state that has its name (or that it is relative to), else by place."""
    robot = evidence.units.robot
    if not (robot.state_groups and robot.action_groups):
        return [(d, d) for d in range(min(evidence.state[0].shape[1], evidence.action[0].shape[1]))]
    states = {g.name: part.raw for g, part in zip(robot.state_groups, evidence.units.state, strict=True)}
    pairs = []
    for group, part in zip(robot.action_groups, evidence.units.action, strict=True):
        own = states.get(group.relative_to or group.name)
        if own is not None and own.stop - own.start == group.size:
            pairs += list(zip(range(part.raw.start, part.raw.stop), range(own.start, own.stop), strict=True))
    return pairs


def _coincide(evidence: Evidence, dimension: int, of_state: int, shift: int) -> float:
    """Share of the rows in which the state moves, and action[i] = state[i + shift].  A dimension that never moves says nothing: 0."""
    equal = moving = 0
    spread = np.ptp(np.concatenate([s[:, of_state] for s in evidence.state]))
    if spread < SMALLEST_RANGE:
        return 0.0
    for state, action in zip(evidence.state, evidence.action, strict=True):
        s, a = state[:, of_state], action[:, dimension]
        if len(s) < 3:
            continue
        rows = np.arange(1, len(s) - 1)
        moves = np.abs(s[rows] - s[rows + 1]) + np.abs(s[rows] - s[rows - 1]) > 1e-5 * spread
        equal += int((np.abs(a[rows] - s[rows + shift]) < 1e-6 * spread)[moves].sum())
        moving += int(moves.sum())
    return equal / moving if moving else 0.0


def ranges(evidence: Evidence) -> list[Finding]:
    """Dimensions that (nearly) never move, and such with values far outside the rest."""
    found = []
    for key, rows in evidence.numbers().items():
        rows = rows[np.isfinite(rows).all(1)]
        if not len(rows):
            continue
        least, low, high, greatest = np.quantile(rows, (0, 0.01, 0.99, 1), axis=0)
        for d in range(rows.shape[1]):
            where, half, middle = evidence.name(key, d), (high[d] - low[d]) / 2, (high[d] + low[d]) / 2
            if greatest[d] - least[d] < SMALLEST_RANGE:
                found.append(
                    Finding(
                        "warning",
                        "ranges",
                        where,
                        f"always {middle:.6g}",
                        "a dimension that moves",
                        "leave it out, unless other datasets of the mixture use it: it is only centred",
                    )
                )
            elif half * 2 < SMALLEST_RANGE:
                found.append(
                    Finding(
                        "warning",
                        "ranges",
                        where,
                        f"99% of rows within {half * 2:.2g} of each other, all within {greatest[d] - least[d]:.4g}",
                        "a dimension that moves in more than 1% of rows",
                        "check that it is recorded; data.normalization=min_max scales it by what moves",
                    )
                )
            elif (worst := max(greatest[d] - middle, middle - least[d]) / half) > HEAVY:
                row = int(np.argmax(np.abs(rows[:, d] - middle)))
                found.append(
                    Finding(
                        "warning",
                        "ranges",
                        where,
                        f"{rows[row, d]:.4g} lies {worst:.1f} half-ranges from the middle of [{low[d]:.4g}, {high[d]:.4g}] (1st to 99th percentile)",
                        f"at most {HEAVY:g}",
                        "look for broken readings and wrapped angles; with quantile normalisation they are clipped, with min_max they squeeze everything else",
                    )
                )
    return found


def clipping(evidence: Evidence) -> list[Finding]:
    """Mass of an action at its least and greatest value: what the demonstrator wanted beyond it is lost."""
    found: list[Finding] = []
    if not evidence.action:
        return found
    rows = np.concatenate(evidence.action)
    for d in range(rows.shape[1]):
        values = rows[:, d]
        if len(np.unique(values)) <= 3 or not np.isfinite(values).all():  # a switch, not a speed; or broken, which `finite` says
            continue
        tolerance = 1e-6 * np.ptp(values)
        low, high = float((values <= values.min() + tolerance).mean()), float((values >= values.max() - tolerance).mean())
        if low + high >= AT_LIMIT:
            level: Level = "warning" if low + high >= CLIPPED else "info"
            found.append(
                Finding(
                    level,
                    "clipping",
                    evidence.part_of("action", d)[1],
                    f"{low:.0%} of rows at {values.min():.4g} and {high:.0%} at {values.max():.4g}",
                    f"less than {CLIPPED if level == 'warning' else AT_LIMIT:.0%} together",
                    "check that actions were not clipped when they were recorded or converted; a controller that saturates is faithful",
                )
            )
    return found


def gripper(evidence: Evidence) -> list[Finding]:
    """A switch (two values) and the state that follows it: the same sign in every episode, and in every row where both have the same units."""
    found: list[Finding] = []
    if not evidence.state or not evidence.action:
        return found
    actions, states = np.concatenate(evidence.action), np.concatenate(evidence.state)
    marked = {group.name for group in evidence.units.robot.action_groups if group.gripper}
    for d in range(actions.shape[1]):
        values = np.unique(actions[:, d].round(4))
        if len(values) > 2 and evidence.part_of("action", d)[0].name in marked:
            values = values[[0, -1]]  # a gripper that is told how far
        if len(values) != 2:
            continue
        scores = np.stack(
            [_follows(a[:, d], s, (values[0], values[1]), states, evidence.dataset.fps) for a, s in zip(evidence.action, evidence.state, strict=True)]
        )  # (episodes, state)
        lengths = np.array([len(a) for a in evidence.action], float)
        pooled = np.average(scores, axis=0, weights=lengths)
        partner = int(np.argmax(np.abs(pooled) + [("grip" in n.lower()) for n in _padded(evidence, states.shape[1])]))
        if np.abs(scores[:, partner]).mean() < 0.3:
            continue
        found += _polarity(evidence, d, partner, values, scores[:, partner], np.sign(pooled[partner]), states)
    return found


def _padded(evidence: Evidence, width: int) -> list[str]:
    """A name for every dimension of the state, that of its group included."""
    named = (evidence.part_of("state", d) for d in range(width))
    return [f"{part.name} {name}" for part, name in named]


def _follows(switch: np.ndarray, state: np.ndarray, values: tuple[float, float], all_states: np.ndarray, fps: float) -> np.ndarray:
    """(state,) in -1..1: whether the state, a little later, is in its upper half where the switch is at its upper value (1) or its lower (-1)."""
    later = min(max(1, round(0.2 * fps)), len(switch) - 1)
    low, high = all_states.min(0), all_states.max(0)
    place = 2 * (state - low) / np.maximum(high - low, SMALLEST_RANGE) - 1
    on = np.where(switch > sum(values) / 2, 1.0, -1.0)
    return np.asarray((on[: len(on) - later, None] * place[later:]).mean(0)) if len(on) > later else np.zeros(state.shape[1])


def _polarity(evidence: Evidence, d: int, partner: int, values: np.ndarray, scores: np.ndarray, sign: float, states: np.ndarray) -> list[Finding]:
    where = f"{evidence.part_of('action', d)[1]} and {evidence.part_of('state', partner)[1]}"
    against = np.flatnonzero(scores * sign < -0.5).tolist()
    if against:
        return [
            Finding(
                "error",
                "gripper",
                where,
                f"in the episodes {some(against)} the state goes the other way than in the rest",
                "one polarity in the whole dataset",
                "turn the sign of the action in these episodes",
            )
        ]
    low, high = states[:, partner].min(), states[:, partner].max()
    margin = 0.15 * (high - low)
    same_units = abs(values[0] - low) <= margin and abs(values[1] - high) <= margin
    if sign < 0 and same_units:
        return [
            Finding(
                "error",
                "gripper",
                where,
                f"the action is {values[1]:g} where the state goes to {low:.3g}, and {values[0]:g} where it goes to {high:.3g}",
                "action and state, which have the same units, to agree",
                "turn the sign of one of them",
            )
        ]
    moves = "grows" if sign > 0 else "shrinks"
    return [
        Finding(
            "info",
            "gripper",
            where,
            f"at {values[1]:g} the state {moves}, at {values[0]:g} it {'shrinks' if sign > 0 else 'grows'}",
            "what your robot does",
            "check it against the robot's own convention (is 1 open or closed?)",
        )
    ]


def quaternions(evidence: Evidence) -> list[Finding]:
    """Four neighbouring dimensions of unit norm that jump to their negative: the same rotation, but the other end of the numbers.

    A group that is said to be a quaternion is looked at as the network sees it: with one sign (w >= 0), or in another form that does not jump.
    """
    found = []
    groups = {(part.column, part.start): part for part in (*evidence.units.state, *evidence.units.action) if part.form.startswith("quaternion")}
    for key, episodes in evidence.rows.items():
        width = episodes[0].shape[1]
        for d in range(width - 3):
            parts = [rows[:, d : d + 4] for rows in episodes]
            whole = np.concatenate(parts)
            if (np.abs(np.linalg.norm(whole, axis=1) - 1) > UNIT).mean() > 0.01 or np.ptp(whole, axis=0).max() < SMALLEST_RANGE:
                continue
            group = groups.get((key, d))
            if group is not None and not group.seen_as.startswith("quaternion"):
                continue
            parts = parts if group is None else [convert(q, group.form, group.form) for q in parts]
            flips = {i: int(((q[1:] * q[:-1]).sum(1) < -0.5).sum()) for i, q in enumerate(parts)}
            bad = [i for i, count in flips.items() if count]
            if bad:
                found.append(
                    Finding(
                        "error",
                        "quaternions",
                        f"{key}[{d}:{d + 4}]",
                        f"{sum(flips.values())} jumps from q to -q in the episodes {some(bad)}",
                        "neighbouring rows on one side",
                        "say that they are a rotation, with network_rotation rotation_6d in a group of the robot's card; or turn the sign of a row that is nearer to the negative of the row before",
                    )
                )
    return found
