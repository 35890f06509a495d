"""Who recovers from what: of the episodes in which something really happened, those that succeed after it, and how long that takes.

    struck      the disturbance began before the episode was over       ->  recovered, or not
    not struck  it was won, or over, before that                        ->  says nothing about recovery, and is counted apart
    crashed     the simulator failed                                    ->  says nothing at all

    time to recover = first success - event.  An episode without success was watched for so long and no longer (censored): leaving it out
    would make the slow look fast, so the median is Kaplan and Meier's (1958), and that of the recovered alone stands beside it.

What a policy does decides when, and whether, it is struck.  So a comparison of two ways of driving is made on all episodes of the
same seeds first, which nothing selects, and on those in which both were struck second.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from wam.evaluation.statistics import mcnemar, wilson

Result = Mapping[str, Any]  # of one episode, as in `rollout.json`: seed, success, length, events, outcome


def kaplan_meier_median(steps: Sequence[float], happened: Sequence[bool]) -> float | None:
    """Median time to something, where some were only watched until `steps`; None if more than half were never seen to get there.

    Args:
        steps: until it happened, or until watching ended.
        happened: which of the two.

    Raises:
        ValueError: different numbers.
    """
    if len(steps) != len(happened):
        raise ValueError(f"{len(steps)} times and {len(happened)} outcomes; give one of each per episode")
    survival, at_risk = 1.0, len(steps)
    for time in sorted(set(steps)):
        here = [did for when, did in zip(steps, happened, strict=True) if when == time]
        survival *= 1 - sum(here) / at_risk
        at_risk -= len(here)
        if survival <= 0.5 + 1e-12:
            return float(time)
    return None


def recovery(disturbed: Sequence[Result], hz: float, undisturbed: Sequence[Result] | None = None) -> dict[str, Any]:
    """What disturbances did to one way of driving.

    Args:
        disturbed: episodes with `events`.
        hz: control steps a second.
        undisturbed: the same seeds without disturbances; gives success at first attempt and what the disturbances cost.

    Returns:
        `success` (all episodes), `disturbed`, `recovered` and their Wilson interval, `undisturbed` (not struck) and what came of them,
        times to recover, the same by `kinds`, and `paired`, None without `undisturbed`.  Counts are integers, rates are 0..1, and what
        cannot be said is None.

    Raises:
        ValueError: no episodes, a seed twice, or `undisturbed` of other seeds.
    """
    counted = _counted(disturbed)
    struck = [e for e in counted.values() if _event(e)]
    spared = [e for e in counted.values() if not _event(e)]
    kinds = dict.fromkeys(sorted(_event(e)["kind"] for e in struck))
    return {
        "episodes": len(counted),
        "crashed": len(disturbed) - len(counted),
        "success": _rate(counted.values()),
        **_recovered(struck, hz),
        "undisturbed": len(spared),
        "undisturbed_success": _rate(spared),
        "kinds": {kind: _recovered([e for e in struck if _event(e)["kind"] == kind], hz) for kind in kinds},
        "paired": None if undisturbed is None else _against_undisturbed(undisturbed, disturbed, hz),
    }


def compare_recovery(a: Sequence[Result], b: Sequence[Result]) -> dict[str, Any]:
    """Two ways of driving under the same disturbances, by the same seeds.

    Returns:
        `all` and `struck` (in which both were), each with `episodes`, `a` and `b` (successes), `only_a`, `only_b` and McNemar's exact `p`;
        and `kinds`, the same as `struck` by kind.  `all` is the one to claim from.

    Raises:
        ValueError: other seeds, or disturbances that were drawn otherwise.
    """
    one, other, seeds = _paired(a, b)
    both = [seed for seed in seeds if _event(one[seed]) and _event(other[seed])]
    for seed in both:
        if _event(one[seed])["kind"] != _event(other[seed])["kind"]:
            raise ValueError(
                f"seed {seed} met {_event(one[seed])['kind']} in one and {_event(other[seed])['kind']} in the other; use the same settings of disturbances for both"
            )
    kinds = sorted({_event(one[seed])["kind"] for seed in both})
    return {
        "all": _pairs(one, other, seeds),
        "struck": _pairs(one, other, both),
        "kinds": {kind: _pairs(one, other, [seed for seed in both if _event(one[seed])["kind"] == kind]) for kind in kinds},
    }


def recovery_table(report: Mapping[str, Any]) -> str:
    """`recovery`'s result as lines of text."""
    lines = [f"{'':16} {'recovered':>22}  {'seconds to recover: median':>36}"]
    for name, row in (("all", report), *report["kinds"].items()):
        if row["disturbed"]:
            rate = f"{row['recovered']}/{row['disturbed']} ({100 * row['wilson_low']:.0f}-{100 * row['wilson_high']:.0f} %)"
            median = "not within the episodes" if row["seconds_km"] is None else f"{row['seconds_km']:.2f}"
            told = f"{median}, {row['censored']} censored"
            lines.append(f"{name:16} {rate:>22}  {told:>36}")
    success = report["success"]
    lines.append(
        f"success with disturbances: {_told(success)}; not struck: {report['undisturbed']} ({_told(report['undisturbed_success'])}); crashed: {report['crashed']}"
    )
    paired = report["paired"]
    if paired:
        lines.append(
            f"success at first attempt, without: {_told(paired['first_attempt'])}; same seeds with: {_told(paired['disturbed'])}; "
            f"lost {paired['lost']}, won {paired['gained']}, McNemar p = {paired['p']:.3g}; of those won without, and struck, {_told(paired['recovered_of_winnable'])} recovered"
        )
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------ parts


def _counted(episodes: Sequence[Result]) -> dict[int, Result]:
    """Episodes by seed, without those whose simulator crashed."""
    counted = {int(e["seed"]): e for e in episodes if e.get("outcome") != "crashed"}
    seeds = [int(e["seed"]) for e in episodes]
    if not seeds or len(set(seeds)) != len(seeds):
        raise ValueError(f"{len(seeds)} episodes of {len(set(seeds))} seeds; expected at least one episode, and one of each seed")
    return dict(sorted(counted.items()))


def _event(episode: Result) -> dict[str, Any]:
    """What struck an episode before it was over; empty if nothing did."""
    return next((event for event in episode.get("events", ()) if event["step"] < episode["length"]), {})


def _rate(episodes: Any) -> dict[str, Any]:
    found = [bool(e["success"]) for e in episodes]
    low, high = wilson(sum(found), len(found)) if found else (None, None)
    return {"successes": sum(found), "episodes": len(found), "wilson_low": low, "wilson_high": high}


def _recovered(struck: Sequence[Result], hz: float) -> dict[str, Any]:
    times = [e["length"] - _event(e)["step"] for e in struck]
    won = [bool(e["success"]) for e in struck]
    median = kaplan_meier_median(times, won)
    of_recovered = [time for time, did in zip(times, won, strict=True) if did]
    rate = _rate(struck)
    return {
        "disturbed": len(struck),
        "recovered": rate["successes"],
        "wilson_low": rate["wilson_low"],
        "wilson_high": rate["wilson_high"],
        "censored": len(struck) - rate["successes"],
        "steps_km": median,
        "seconds_km": None if median is None else median / hz,
        "steps_p50": statistics.median(of_recovered) if of_recovered else None,
        "seconds_p50": statistics.median(of_recovered) / hz if of_recovered else None,
    }


def _against_undisturbed(without: Sequence[Result], with_events: Sequence[Result], hz: float) -> dict[str, Any]:
    undisturbed, disturbed, seeds = _paired(without, with_events)
    pairs = _pairs(undisturbed, disturbed, seeds)
    both = [seed for seed in seeds if undisturbed[seed]["success"] and disturbed[seed]["success"] and _event(disturbed[seed])]
    longer = [(disturbed[seed]["length"] - undisturbed[seed]["length"]) / hz for seed in both]
    return {
        "first_attempt": _rate(undisturbed[seed] for seed in seeds),
        "disturbed": _rate(disturbed[seed] for seed in seeds),
        "lost": pairs["only_a"],
        "gained": pairs["only_b"],
        "p": pairs["p"],
        "recovered_of_winnable": _rate(disturbed[seed] for seed in seeds if undisturbed[seed]["success"] and _event(disturbed[seed])),
        "seconds_longer_p50": statistics.median(longer) if longer else None,
    }


def _paired(a: Sequence[Result], b: Sequence[Result]) -> tuple[dict[int, Result], dict[int, Result], list[int]]:
    """Episodes of both by seed, and the seeds at which neither crashed."""
    one, other = _counted(a), _counted(b)
    apart = {int(e["seed"]) for e in a} ^ {int(e["seed"]) for e in b}
    if apart:
        raise ValueError(f"{len(apart)} seeds were driven by only one of the two (first: {sorted(apart)[:5]}); drive both with the same seeds")
    return one, other, sorted(one.keys() & other.keys())


def _pairs(a: Mapping[int, Result], b: Mapping[int, Result], seeds: Sequence[int]) -> dict[str, Any]:
    x, y = ([bool(one[seed]["success"]) for seed in seeds] for one in (a, b))
    only_a, only_b = (sum(p and not q for p, q in zip(*order, strict=True)) for order in ((x, y), (y, x)))
    return {"episodes": len(seeds), "a": sum(x), "b": sum(y), "only_a": only_a, "only_b": only_b, "p": mcnemar(x, y)}


def _told(rate: Mapping[str, Any]) -> str:
    if not rate["episodes"]:
        return "none"
    return f"{rate['successes']}/{rate['episodes']}, {100 * rate['wilson_low']:.0f}-{100 * rate['wilson_high']:.0f} %"
