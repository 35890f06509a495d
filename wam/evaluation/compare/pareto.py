"""Success against milliseconds: what a plan's latency buys.

    success ^        o joint        every point with its 95% interval of success and, to the right, the 95th percentile of its latency;
            |   o skip - - o imagine      joined: the rows that no other beats in both
            +----------------> milliseconds a plan, logarithmic

Colour and marker say the mode, as everywhere; filled is the variant that knows every mode, hollow are those trained for one thing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wam.figures import FAINT, INK, MODE_STYLES, PAPER, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TITLES = {"calm": "undisturbed", "disturbed": "disturbed"}
EXTRA = ("#7a5195", "*")  # rows with a closed loop of their own


def draw_pareto(rows: Mapping[str, Mapping[str, Any]], front: Mapping[str, Sequence[str]], several: str, path: Path) -> None:
    """A panel for each condition.

    Args:
        rows: as in `compare.json`: `latency` with p50 and p95, and a condition's successes, episodes and interval.
        front: rows that no other beats, by condition.
        several: the variant whose points are filled.
    """
    conditions = list(front)
    with new_figure(path, 4.7 * len(conditions), 4.6) as figure:
        panels = figure.subplots(1, len(conditions), sharey=True, sharex=True, squeeze=False)[0]
        for axes, condition in zip(panels, conditions, strict=True):
            _panel(axes, rows, front[condition], condition, several)
        panels[0].set_ylabel("episodes that succeed, %")
        handles, names = panels[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=3 if len(conditions) > 1 else 2, handletextpad=0.3, columnspacing=1.4)


def _panel(axes: Axes, rows: Mapping[str, Mapping[str, Any]], front: Sequence[str], condition: str, several: str) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.set_title(TITLES[condition])
    axes.set_xscale("log")
    points = {name: (row["latency"]["p50"], 100 * row[condition]["successes"] / max(1, row[condition]["episodes"])) for name, row in rows.items()}
    axes.plot([points[name][0] for name in front], [points[name][1] for name in front], color=FAINT, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
    for name, row in rows.items():
        (x, y), own = points[name], row[condition]
        color, marker = EXTRA if row["extra"] else MODE_STYLES[row["mode"]]
        low, high = 100 * own["wilson_low"], 100 * own["wilson_high"]
        across = [[0.0], [max(0.0, row["latency"]["p95"] - x)]]
        axes.errorbar(x, y, xerr=across, yerr=[[max(0.0, y - low)], [max(0.0, high - y)]], fmt="none", ecolor=color, elinewidth=1.1, alpha=0.55, zorder=2)
        filled = row["variant"] == several
        size = 9 if name in front else 7
        axes.plot([x], [y], marker=marker, markersize=size, color=color, markerfacecolor=color if filled else PAPER, markeredgewidth=1.6, linestyle="none", label=name, zorder=4 if name in front else 3)
    axes.set_ylim(-4, 106)
    axes.set_xlabel("milliseconds a plan")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="both")
    axes.set_axisbelow(True)
    axes.tick_params(axis="both", which="minor", length=0)
    for label in axes.get_yticklabels():
        label.set_color(INK)
