"""Success as a function of added delay: what a slower computer, a longer cable or a larger model would cost.

    delay 0 ms   entry of rollout.json     \
    delay 50 ms  entry, the same seeds      >  curve  ->  rates with Wilson intervals, loss against the smallest delay (paired), frequency reached
    delay 100 ms entry, the same seeds     /

The control frequency reached counts the steps for which something was decided: a robot that holds still while a plan is made runs at its
nominal rate and reaches less.  Every delay is driven on the same seeds, so a loss is a paired difference, corrected for the number of delays.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wam.evaluation.paired import outcomes
from wam.evaluation.statistics import ALPHA, holm, mcnemar, pair, paired_interval, points, wilson
from wam.figures import MODE_STYLES, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STYLES = (("#0072b2", "o"), ("#d55e00", "s"), ("#009e73", "^"), ("#cc79a7", "D"), ("#8a6d00", "v"), ("#4b4b8f", "P"))  # of series without a colour of their own


def curve(entries: Mapping[float, Mapping[str, Any]], control_hz: float) -> dict[str, Any]:
    """Success by added delay.

    Args:
        entries: of each delay in milliseconds, what `rollout.json` holds of the mode (`modes.<mode>`), on the same seeds.
        control_hz: nominal control steps a second.

    Returns:
        `points` in the order of their delays, each with counts, Wilson interval, `control_hz_reached`, `plans_per_second`, `late` plans, and the
        paired difference to the smallest delay; `claim`: what they support, in a sentence.

    Raises:
        ValueError: no delays, a negative one, or other seeds than at the smallest; names them.
    """
    if not entries or min(entries) < 0:
        raise ValueError(f"delays {sorted(entries)}; expected at least one, in milliseconds, none below 0")
    rows = [_point(delay, entries[delay], control_hz) for delay in sorted(entries)]
    base = min(entries)
    p_values = []
    for row in rows[1:]:
        a, b = _paired(entries[row["delay_ms"]], entries[base], row["delay_ms"])
        row["low"], row["high"] = paired_interval(a, b)
        row["difference"], row["p"] = sum(a) / len(a) - sum(b) / len(b), mcnemar(a, b)
        p_values.append(row["p"])
    for row, p in zip(rows[1:], holm(p_values), strict=True):
        row["p_corrected"] = p
    return {"control_hz": control_hz, "points": rows, "claim": _claim(rows)}


def _point(delay: float, entry: Mapping[str, Any], control_hz: float) -> dict[str, Any]:
    won, crashed = outcomes(entry)
    if not won:
        raise ValueError(f"at {delay:g} ms every episode's simulator crashed; nothing is known of the policy")
    low, high = wilson(sum(won.values()), len(won))
    driven = [row for row in entry["episode_results"] if int(row["seed"]) in won]
    steps = sum(int(row["length"]) for row in driven)
    held = sum(int(row["held"]) for row in driven) if all("held" in row for row in driven) else None
    late = sum(int(row["late"]) for row in driven) if all("late" in row for row in driven) else None
    plans = sum(int(row["chunks"]) for row in driven)
    return {
        "delay_ms": delay,
        "successes": sum(won.values()),
        "episodes": len(won),
        "crashed_left_out": len(crashed),
        "wilson_low": low,
        "wilson_high": high,
        "control_hz_reached": None if held is None or not steps else control_hz * (1 - held / steps),
        "plans_per_second": control_hz * plans / steps if steps else None,
        "late": late,
    }


def _paired(entry: Mapping[str, Any], base: Mapping[str, Any], delay: float) -> tuple[list[bool], list[bool]]:
    (a, crashed_a), (b, crashed_b) = outcomes(entry), outcomes(base)
    crashed = crashed_a | crashed_b
    try:
        return pair({s: w for s, w in a.items() if s not in crashed}, {s: w for s, w in b.items() if s not in crashed})
    except ValueError as error:
        raise ValueError(f"{delay:g} ms against the smallest delay: {error}") from error


def _claim(rows: list[dict[str, Any]]) -> str:
    first = rows[0]
    start = f"{first['successes']}/{first['episodes']} at {first['delay_ms']:g} ms of added delay."
    worse = next((row for row in rows[1:] if row["difference"] < 0 and row["p_corrected"] < ALPHA), None)
    if worse is not None:
        loss = f"{points(worse['difference'], worse['low'], worse['high'])}, p = {worse['p_corrected']:.2g} corrected for {len(rows) - 1} delays"
        return f"{start} The smallest delay at which it succeeds less often is {worse['delay_ms']:g} ms: {worse['successes']}/{worse['episodes']}, {loss}."
    if len(rows) == 1:
        return start
    bound = min(row["low"] for row in rows[1:])
    return f"{start} No loss is shown up to {rows[-1]['delay_ms']:g} ms; one of up to {-100 * min(bound, 0):.0f} points at one of the delays is not ruled out."


def draw_curves(curves: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Draw curves by name: success with Wilson intervals over delay, and beside it the control frequency reached.

    Raises:
        ValueError: no curves.
    """
    if not curves:
        raise ValueError("no curve of success over delay; drive with rollout.execution.delay at several values")
    with new_figure(path, 9.6, 3.5) as figure:
        success, frequency = figure.subplots(1, 2, width_ratios=(3, 2))
        for number, (name, found) in enumerate(curves.items()):
            color, marker = MODE_STYLES.get(name, STYLES[number % len(STYLES)])
            _success(success, found["points"], name, color, marker, number - (len(curves) - 1) / 2)
            reached = [(row["delay_ms"], row["control_hz_reached"]) for row in found["points"] if row["control_hz_reached"] is not None]
            if reached:
                frequency.plot(*zip(*reached, strict=True), color=color, marker=marker, markersize=4, linewidth=1.6)
        success.set(ylabel="success, %, 95% interval", ylim=(-2, 102))
        frequency.set(ylabel="control steps decided, per second", ylim=(0, None))
        for axes in (success, frequency):
            axes.set_xlabel("added delay, ms")
            axes.grid(axis="y")
            axes.set_axisbelow(True)
        figure.legend(*success.get_legend_handles_labels(), loc="outside upper center", ncols=5)


def _success(axes: Axes, rows: list[dict[str, Any]], name: str, color: str, marker: str, place: float) -> None:
    """One line, moved aside a little so that bars of several do not hide each other."""
    span = max(row["delay_ms"] for row in rows) or 1.0
    delays = [row["delay_ms"] + 0.006 * span * place for row in rows]
    rates = [100 * row["successes"] / row["episodes"] for row in rows]
    bars = [[rate - 100 * row["wilson_low"] for rate, row in zip(rates, rows, strict=True)], [100 * row["wilson_high"] - rate for rate, row in zip(rates, rows, strict=True)]]
    axes.errorbar(delays, rates, yerr=[[max(0.0, x) for x in side] for side in bars], color=color, marker=marker, markersize=5, linewidth=1.6, elinewidth=1.1, capsize=2.5, label=name)
