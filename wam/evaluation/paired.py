"""Two ways of driving on the same seeds, from the files that `wam rollout` wrote: what the comparison shows, and what it does not.

    A/rollout.json   seed 20000  ok  no  ok ...         both, only A, only B, neither  ->  difference, interval, p  ->  a sentence
    B/rollout.json   seed 20000  ok  ok  no ...

The same seed is the same initial state, so what is hard about an episode is hard for both, and only episodes in which they differ say
who is better.  Of a suite every task is compared, and the mean over tasks with an interval that resamples tasks, too.  Several
comparisons in one call are corrected for being several (Holm).  An episode whose simulator crashed says nothing of either policy: its
seed is left out of both, and counted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wam.evaluation.statistics import (
    ALPHA,
    POWER,
    Table,
    claim,
    episodes_needed_paired,
    hierarchical_paired_bootstrap,
    holm,
    mcnemar,
    pair,
    paired_bootstrap,
    paired_interval,
    points,
)

FORMAT = "wam-paired-1"
ROLLOUT, SUITE = "rollout.json", "suite.json"
MUST_MATCH = ("env", "max_steps", "control_hz")
NOT_SETTINGS = frozenset({"format", "modes", "baselines", "machine", "started", "finished", "seeds", "versions", "command", *MUST_MATCH})


@dataclass(frozen=True)
class Side:
    """One of the two: a file, and the mode (or baseline) in it.

    Attributes:
        name: as sentences call it.
        tasks: the contents of each task's `rollout.json`, by environment; one where it is no suite.
    """

    name: str
    mode: str
    tasks: Mapping[str, Mapping[str, Any]]


# ------------------------------------------------------------------------------------------------ reading


def read_tasks(path: Path) -> dict[str, dict[str, Any]]:
    """The contents of every `rollout.json` of a run, by environment: of the file itself, of the folder that holds one, or of a suite's folder.

    Raises:
        FileNotFoundError: neither a rollout nor a suite, or a suite's task that is missing.
        ValueError: a file that holds no rollout.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in (SUITE, ROLLOUT) if (path / name).is_file()]
        if not found:
            raise FileNotFoundError(f"{path} holds neither {ROLLOUT} nor {SUITE}; give what `wam rollout` wrote")
        path = found[0]
    content = _read(path)
    if "suite" not in content:
        return {str(content.get("env")): content}
    envs = dict.fromkeys(env for mode in content["modes"].values() for env in mode["tasks"])
    return {env: _read(path.parent / env.rsplit("/", 1)[-1] / ROLLOUT) for env in envs}


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"no {path}; `wam rollout` writes it")
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); give what `wam rollout` wrote") from error
    if not isinstance(content, dict) or not isinstance(content.get("modes"), dict):
        raise ValueError(f"{path} holds no modes; give the {ROLLOUT} or {SUITE} that `wam rollout` wrote")
    return content


def entries(content: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Everything that was driven and has its episodes listed: modes, and baselines beside them."""
    driven = {**(content.get("baselines") or {}), **content["modes"]}
    return {name: entry for name, entry in driven.items() if entry.get("episode_results")}


def outcomes(entry: Mapping[str, Any]) -> tuple[dict[int, bool], frozenset[int]]:
    """Whether each seed's episode succeeded, and the seeds whose simulator crashed, which have no outcome.

    Raises:
        ValueError: no episodes, or a seed that was driven twice.
    """
    rows = entry.get("episode_results") or []
    seeds = [int(row["seed"]) for row in rows]
    twice = sorted({seed for seed in seeds if seeds.count(seed) > 1})
    if not rows or twice:
        raise ValueError(f"episode_results holds {f'seed {twice[0]} twice' if twice else 'no episodes'}; expected one episode for each seed")
    crashed = frozenset(int(row["seed"]) for row in rows if row.get("outcome") == "crashed")
    return {int(row["seed"]): bool(row["success"]) for row in rows if int(row["seed"]) not in crashed}, crashed


# ------------------------------------------------------------------------------------------------ comparing


def within_steps(content: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """A rollout's contents as if its limit had been `steps` control steps: what succeeded later did not.

    Raises:
        ValueError: a limit that is none, or longer than the rollout's own.
    """
    if not 1 <= steps <= content["max_steps"]:
        raise ValueError(f"{content['env']} was driven for {content['max_steps']} control steps an episode, so what came of it within {steps} is not known; use 1 to {content['max_steps']}")

    def cut(entry: Mapping[str, Any]) -> dict[str, Any]:
        rows = entry.get("episode_results")
        return dict(entry) if not rows else {**entry, "episode_results": [{**row, "success": row["success"] and row["length"] <= steps} for row in rows]}

    driven = {part: {name: cut(entry) for name, entry in (content.get(part) or {}).items()} for part in ("modes", "baselines")}
    return {**content, **driven, "max_steps": steps}


def compare_runs(a: Path, b: Path | None = None, modes: Sequence[str] = (), labels: tuple[str, str] | None = None, within: int | None = None) -> dict[str, Any]:
    """Compare two runs, or two modes of one, on the same seeds.

    Args:
        a, b: files or folders, as `read_tasks`; without b, two modes of a.
        modes: none: every mode that both drove; one: that one; two: the first of a, the second of b.
        labels: what to call the two; default: where their paths differ.
        within: control steps in which an episode must have succeeded; default: the runs' own limit.

    Returns:
        `comparisons`, one a pair of modes: `tasks` by environment, each with counts, difference, intervals, p and `claim`; and `over_tasks` where there are several.

    Raises:
        FileNotFoundError, ValueError: no such files or modes, or runs of other environments, limits or seeds; names what differs.
    """
    tasks_a, tasks_b = ({env: content if within is None else within_steps(content, within) for env, content in read_tasks(path).items()} for path in (a, b or a))
    _require_same_tasks(tasks_a, tasks_b)
    chosen = _mode_pairs(tasks_a, tasks_b, modes, b is None)
    paths = _labels(Path(a), Path(b or a))
    sides = []
    for x, y in chosen:
        name_a, name_b = labels if labels and len(chosen) == 1 else [_name((labels or paths)[i], mode, x != y) for i, mode in enumerate((x, y))]
        sides.append((Side(name_a, x, tasks_a), Side(name_b, y, tasks_b)))
    comparisons = [compare(one, other) for one, other in sides]
    _correct([c["over_tasks"] if c["over_tasks"] else next(iter(c["tasks"].values())) for c in comparisons])
    for (one, other), comparison in zip(sides, comparisons, strict=True):
        if comparison["over_tasks"]:
            _correct(list(comparison["tasks"].values()))
        _say(comparison, one, other)
    differ = {env: found for env in tasks_a if (found := settings_that_differ(tasks_a[env], tasks_b[env]))}
    return {"format": FORMAT, "a": str(a), "b": str(b or a), "within": within, "settings_that_differ": differ, "comparisons": comparisons}


def compare(a: Side, b: Side) -> dict[str, Any]:
    """Counts and intervals of each task, and over tasks where there are several; sentences come when p-values have been corrected."""
    tasks = {env: _one_task(env, a, b) for env in a.tasks}
    return {"a": a.name, "b": b.name, "mode_a": a.mode, "mode_b": b.mode, "tasks": tasks, "over_tasks": _over_tasks(a, b) if len(tasks) > 1 else None}


def _paired(env: str, a: Side, b: Side) -> tuple[dict[int, bool], dict[int, bool], int]:
    """Outcomes by seed of one task, and how many seeds were left out because a simulator crashed."""
    (first, crashed_a), (second, crashed_b) = (outcomes(entries(side.tasks[env])[side.mode]) for side in (a, b))
    crashed = crashed_a | crashed_b
    return {s: w for s, w in first.items() if s not in crashed}, {s: w for s, w in second.items() if s not in crashed}, len(crashed)


def _one_task(env: str, a: Side, b: Side) -> dict[str, Any]:
    first, second, crashed = _paired(env, a, b)
    try:
        x, y = pair(first, second)
    except ValueError as error:
        raise ValueError(f"{env}, {a.name} and {b.name}: {error}") from error
    t, (low, high), (boot_low, boot_high) = Table.of(x, y), paired_interval(x, y), paired_bootstrap(x, y)
    return {
        "episodes": t.episodes,
        "successes_a": t.both + t.only_a,
        "successes_b": t.both + t.only_b,
        **vars(t),
        "crashed_left_out": crashed,
        "difference": t.difference,
        "low": low,
        "high": high,
        "bootstrap_low": boot_low,
        "bootstrap_high": boot_high,
        "p": mcnemar(x, y),
        "episodes_needed": _needed(t),
    }


def _over_tasks(a: Side, b: Side) -> dict[str, Any]:
    """Means over tasks: the interval resamples tasks and pairs within them, p is McNemar's of all pairs together."""
    pairs = [pair(*_paired(env, a, b)[:2]) for env in a.tasks]
    means = [sum(sum(won) / len(won) for won in side) / len(pairs) for side in zip(*pairs, strict=True)]
    low, high = hierarchical_paired_bootstrap(pairs)
    every_a, every_b = ([won for task in side for won in task] for side in zip(*pairs, strict=True))
    t = Table.of(every_a, every_b)
    return {
        "tasks": len(pairs),
        "episodes": len(every_a),
        "mean_a": means[0],
        "mean_b": means[1],
        "difference": means[0] - means[1],
        "low": low,
        "high": high,
        "p": mcnemar(every_a, every_b),
        "episodes_needed": _needed(t),
    }


def _needed(t: Table) -> int | None:
    """Pairs that would show the difference seen; None where none was."""
    return None if t.only_a == t.only_b else episodes_needed_paired(t.only_a / t.episodes, t.only_b / t.episodes)


def _correct(family: Sequence[dict[str, Any]]) -> None:
    for entry, p in zip(family, holm([entry["p"] for entry in family]), strict=True):
        entry["p_corrected"], entry["corrected_for"] = p, len(family)


def _say(comparison: dict[str, Any], a: Side, b: Side) -> None:
    for env, entry in comparison["tasks"].items():
        first, second, crashed = _paired(env, a, b)
        said = claim(first, second, (a.name, b.name), entry["p_corrected"] if entry["corrected_for"] > 1 else None)
        entry["claim"] = said + (f" {crashed} seeds are left out because a simulator crashed." if crashed else "")
    if comparison["over_tasks"]:
        comparison["over_tasks"]["claim"] = _claim_over_tasks(comparison["over_tasks"], a.name, b.name)


def _claim_over_tasks(over: Mapping[str, Any], a: str, b: str) -> str:
    p, better = over["p_corrected"], a if over["difference"] > 0 else b
    facts = (
        f"Mean over {over['tasks']} tasks: {a} {100 * over['mean_a']:.1f} % against {b} {100 * over['mean_b']:.1f} %: "
        f"{points(over['difference'], over['low'], over['high'])}, tasks resampled, p = {p:.2g} (McNemar's exact test of all {over['episodes']} pairs)."
    )
    if p >= ALPHA:
        needed = over["episodes_needed"]
        more = (
            f"; if it is as large as it looks, about {-(-needed // over['tasks'])} seeds of each task would show it ({POWER:.0%} power)"
            if needed and needed > over["episodes"]
            else ""
        )
        return f"{facts} This does not show a difference on these tasks{more}."
    if over["low"] <= 0 <= over["high"]:
        return f"{facts} {better} succeeds more often on these tasks; that it would on others like them is not shown, because tasks differ too much."
    return f"{facts} {better} succeeds more often."


# ------------------------------------------------------------------------------------------------ what may be compared


def settings_that_differ(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Settings of two rollouts that are not the same, by dotted name: [of a, of b]."""
    one, other = _flat(a), _flat(b)
    return {key: [one.get(key), other.get(key)] for key in sorted(one.keys() | other.keys()) if one.get(key) != other.get(key)}


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if not prefix and key in NOT_SETTINGS:
            continue
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def _require_same_tasks(a: Mapping[str, Mapping[str, Any]], b: Mapping[str, Mapping[str, Any]]) -> None:
    if a.keys() != b.keys():
        raise ValueError(f"the environments differ: {', '.join(a)} against {', '.join(b)}; a paired comparison needs the same")
    for env in a:
        for key in MUST_MATCH:
            if a[env].get(key) != b[env].get(key):
                raise ValueError(
                    f"{env}: {key} is {a[env].get(key)!r} in one and {b[env].get(key)!r} in the other; episodes are the same only where it is the same"
                )


def _mode_pairs(a: Mapping[str, Mapping[str, Any]], b: Mapping[str, Mapping[str, Any]], modes: Sequence[str], same_run: bool) -> list[tuple[str, str]]:
    """Which modes are compared."""
    in_a, in_b = (set.intersection(*(set(entries(content)) for content in tasks.values())) for tasks in (a, b))
    if len(modes) > 2 or (same_run and len(modes) != 2):
        what = "two modes of one run" if same_run else "one mode, or one of each run"
        raise ValueError(f"--mode {','.join(modes) or '(none)'}: name {what}, e.g. --mode skip,joint; driven: {', '.join(sorted(in_a | in_b))}")
    chosen = [(modes[0], modes[-1])] if modes else [(mode, mode) for mode in entries(next(iter(a.values()))) if mode in in_a & in_b]
    if not chosen:
        raise ValueError(
            f"the runs have no mode in common: {', '.join(sorted(in_a))} against {', '.join(sorted(in_b))}; name one of each, e.g. --mode skip,joint"
        )
    for mode, known, which in ((chosen[0][0], in_a, "first"), (chosen[0][1], in_b, "second")):
        if mode not in known:
            raise ValueError(f"mode {mode!r} was not driven in the {which} run (in every task); driven: {', '.join(sorted(known))}")
    return chosen


def _labels(a: Path, b: Path) -> tuple[str, str]:
    """Where two paths differ: `runs/x/rollout.json` and `runs/y/rollout.json` are x and y."""
    one, other = (list(path.parts[:-1] if path.name in (ROLLOUT, SUITE) else path.parts) for path in (a, b))
    while one and other and one[0] == other[0]:
        one, other = one[1:], other[1:]
    while one and other and one[-1] == other[-1]:
        one, other = one[:-1], other[:-1]
    return "/".join(one) or "A", "/".join(other) or "B"


def _name(label: str, mode: str, other_mode: bool) -> str:
    return mode if label in ("A", "B") and other_mode else f"{label} {mode}"


# ------------------------------------------------------------------------------------------------ showing


def text(results: Mapping[str, Any]) -> str:
    """A comparison for people: a table of counts, the sentences, and which settings differ."""
    within = results.get("within")
    lines = [] if within is None else [f"Success within {within} control steps.", ""]
    for comparison in results["comparisons"]:
        lines += [f"A: {comparison['a']}    B: {comparison['b']}", "", *_table(comparison), ""]
        lines += [*_sentences(comparison), ""]
    differ: dict[str, list[Any]] = {}
    for found in results["settings_that_differ"].values():
        differ |= found
    if differ:
        lines += ["Settings that differ (A, B):", *(f"  {key}: {_shown(one)}, {_shown(other)}" for key, (one, other) in differ.items())]
    return "\n".join(lines).rstrip() + "\n"


def _sentences(comparison: Mapping[str, Any]) -> list[str]:
    """The claim; of a suite that over tasks, and those of tasks that show a difference by themselves (the file has all)."""
    over, tasks = comparison["over_tasks"], comparison["tasks"]
    if not over:
        return [entry["claim"] for entry in tasks.values()]
    shown = [f"{_short(env)}: {entry['claim']}" for env, entry in tasks.items() if entry["p_corrected"] < ALPHA]
    return [over["claim"], *(shown or [f"No task shows a difference by itself (p corrected for {len(tasks)} tasks)."])]


def _table(comparison: Mapping[str, Any]) -> list[str]:
    head = ("task", "A", "B", "both", "only A", "only B", "neither", "points", "95 % interval", "bootstrap", "p")
    rows: list[tuple[str, ...]] = [head]
    for env, e in comparison["tasks"].items():
        counts = (str(e[key]) for key in ("both", "only_a", "only_b", "neither"))
        sides = (f"{e[key]}/{e['episodes']}" for key in ("successes_a", "successes_b"))
        rows.append(
            (_short(env), *sides, *counts, f"{100 * e['difference']:+.1f}", _span(e["low"], e["high"]), _span(e["bootstrap_low"], e["bootstrap_high"]), _p(e))
        )
    over = comparison["over_tasks"]
    if over:
        sides = (f"{100 * over[key]:.1f} %" for key in ("mean_a", "mean_b"))
        rows.append(("mean over tasks", *sides, *[""] * 4, f"{100 * over['difference']:+.1f}", "", _span(over["low"], over["high"]), _p(over)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    return ["  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))).rstrip() for row in rows]


def _p(entry: Mapping[str, Any]) -> str:
    family = f" (of {entry['corrected_for']})" if entry["corrected_for"] > 1 else ""
    return f"{entry['p_corrected']:.2g}{family}"


def _span(low: float, high: float) -> str:
    return f"{100 * low:+.1f}..{100 * high:+.1f}"


def _short(env: str) -> str:
    return env.rsplit("/", 1)[-1]


def _shown(value: Any) -> str:
    return f"{value[:12]}..." if isinstance(value, str) and len(value) > 40 else str(value)
