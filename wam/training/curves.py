"""The curves of a run as one picture, `curves.png`, drawn from `log.jsonl` when training ends; so it can be drawn again at any time.

    video loss      action loss       loss by noise level, video
    action error    imagined video    loss by noise level, actions         what a run records and how it is named: `meters`, `validation`
    learning rate   gradient norm     speed, and where the time goes
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from wam.figures import FAINT, KIND_COLORS, MODE_STYLES, loss_axis, new_figure, read_log, series, smooth
from wam.timeline import Kind
from wam.training.meters import LOG

if TYPE_CHECKING:
    from matplotlib.axes import Axes

log = logging.getLogger(__name__)
CURVES = "curves.png"
STAGES = 3  # of training, in the panels by noise level
PART_COLORS = {"video": KIND_COLORS[Kind.V], "action": KIND_COLORS[Kind.A]}
GROUP_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7d8590", "#a0703c")
Records = Sequence[dict[str, float]]


def draw_curves(log: Path, path: Path) -> None:
    """Draw the curves of a training log.

    Raises:
        FileNotFoundError: there is no log.
        ValueError: the log holds nothing yet.
        ImportError: matplotlib is not installed.
    """
    records = read_log(log)
    if not any(key.startswith(("train/", "val/")) for record in records for key in record):
        raise ValueError(f"{log} holds {len(records)} records and no losses; train for at least training.log_every steps")
    with new_figure(path, 15, 11) as figure:
        panels = figure.subplots(3, 3)
        for column, part in enumerate(("video", "action")):
            _losses(panels[0, column], records, part)
            _levels(panels[column, 2], records, part)
        _compared(panels[1, 0], records, "action_mse", {"hold": "repeat the last action", "mean": "the average action"}, "sampled actions: squared error", log=True)
        _compared(panels[1, 1], records, "psnr", {"static": "copy the last frame"}, "sampled video: PSNR over moving pixels, dB", log=False)
        _groups(panels[2, 0], records, "learning_rate", "learning rate")
        _groups(panels[2, 1], records, "grad_norm", "gradient norm, before clipping")
        _speed(panels[2, 2], records)
        named = {label: handle for axes in panels[0, :2] for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
        figure.legend(named.values(), named.keys(), loc="outside upper left", ncols=len(named), fontsize=9, columnspacing=1.6)


def draw_at_end(output: Path) -> None:
    """Draw `curves.png` of a run folder; where that cannot be, say why and go on: a run is not lost for want of a picture."""
    try:
        draw_curves(output / LOG, output / CURVES)
    except (ImportError, ValueError, FileNotFoundError) as error:
        log.warning("no %s: %s", CURVES, error)


def _losses(axes: Axes, records: Records, part: str) -> None:
    """Of all modes, raw and smoothed; of each mode smoothed, and on held-out windows."""
    axes.set_title(f"{part} loss   (markers: held out; dashes: training)")
    steps, values = series(records, f"train/{part}")
    if len(steps):
        axes.plot(steps, values, color=PART_COLORS[part], alpha=0.25, linewidth=0.8)
        axes.plot(steps, smooth(values), color=PART_COLORS[part], linewidth=2.2, label=f"{part}, all modes")
    for mode, (tone, marker) in MODE_STYLES.items():
        steps, values = series(records, f"train/{mode}/{part}")
        if len(steps) > 1:
            axes.plot(steps, values, color=tone, alpha=0.15, linewidth=0.6)
            axes.plot(steps, smooth(values), color=tone, linewidth=0.9, linestyle="--")
        held, errors = series(records, f"val/{mode}/{part}")
        if len(held):
            axes.plot(held, errors, color=tone, marker=marker, markersize=4.5, linewidth=1.1, label=mode)
    _finish(axes, log=True)


def _compared(axes: Axes, records: Records, figure: str, baselines: dict[str, str], title: str, log: bool) -> None:
    """What is sampled in each mode, beside what knows nothing."""
    axes.set_title(title)
    for mode, (tone, marker) in MODE_STYLES.items():
        steps, values = series(records, f"val/{figure}/{mode}")
        if len(steps):
            axes.plot(steps, values, color=tone, marker=marker, markersize=4.5, linewidth=1.4, label=mode)
    for (name, label), line in zip(baselines.items(), ("--", ":"), strict=False):
        steps, values = series(records, f"val/{figure}/{name}")
        if len(steps):
            axes.plot(steps, values, color=FAINT, linestyle=line, linewidth=1.6, marker="_" if len(steps) == 1 else None, markersize=14, label=label)
    _finish(axes, log)
    if axes.lines:
        axes.legend(fontsize=7.5, loc="best")


def _levels(axes: Axes, records: Records, part: str) -> None:
    """Loss over noise level, averaged over equal stretches of training: the later, the darker."""
    axes.set_title(f"{part} loss by noise level")
    axes.set_xlabel("noise level $\\sigma$ (0: data, 1: noise)")
    prefix = f"level/{part}/"
    with_levels = [r for r in records if any(key.startswith(prefix) for key in r)]
    stages = [s for s in np.array_split(np.array(with_levels, dtype=object), min(STAGES, len(with_levels) or 1)) if len(s)]
    for index, stage in enumerate(stages):
        bins = sorted({key for record in stage for key in record if key.startswith(prefix)})
        means = [np.mean([record[key] for record in stage if key in record]) for key in bins]
        label = f"steps {int(stage[0]['step'])} to {int(stage[-1]['step'])}"
        axes.plot([float(key.removeprefix(prefix)) for key in bins], means, color=PART_COLORS[part], alpha=(index + 1) / len(stages), marker="o", markersize=3.5, linewidth=1.6, label=label)
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    axes.set_xlim(0, 1)
    axes.set_ylim(bottom=0)
    if stages:
        axes.legend(fontsize=7.5, loc="best")
    else:
        _nothing(axes)


def _groups(axes: Axes, records: Records, name: str, title: str) -> None:
    """One curve a parameter group; where there is one group, its own is enough."""
    axes.set_title(title)
    groups = list(dict.fromkeys(key for record in records for key in record if key.startswith(f"{name}/")))
    for index, key in enumerate(groups or [name]):
        steps, values = series(records, key)
        if len(steps):
            width = 1.3 + 0.9 * (len(groups) - 1 - index) if name == "learning_rate" else 1.4  # rates often coincide: the first is seen behind the last
            axes.plot(steps, values, color=GROUP_COLORS[index % len(GROUP_COLORS)], linewidth=width, linestyle="-" if index < len(GROUP_COLORS) else "--", label=key.removeprefix(f"{name}/"))
    if len(groups) > 1 and name == "grad_norm":
        steps, values = series(records, name)
        axes.plot(steps, values, color=FAINT, linewidth=2.0, alpha=0.6, label="all")
    _finish(axes, log=name == "grad_norm")
    if groups:
        axes.legend(fontsize=7.5, loc="best")


def _speed(axes: Axes, records: Records) -> None:
    """Samples a second, and beside them in percent: of the time, and of what the machine could compute."""
    axes.set_title("speed")
    steps, values = series(records, "samples_per_second")
    if len(steps):
        axes.plot(steps, values, color=KIND_COLORS[Kind.S], linewidth=1.6, label="samples/s (left)")
        axes.set_ylim(0, 1.25 * values.max())
    _finish(axes, log=False)
    shares = axes.twinx()
    shares.spines["right"].set_visible(True)
    shares.set_ylabel("%")
    rows = (("share/data", "waiting for data", "#d55e00", "-"), ("share/validation", "validation, so far", "#9467bd", "--"), ("share/saving", "saving, so far", FAINT, ":"), ("mfu", "of the matmul rate (MFU)", "#0072b2", "-."))
    for key, label, color, line in rows:
        steps, values = series(records, key)
        if len(steps):
            shares.plot(steps, 100 * values, color=color, linestyle=line, linewidth=1.2, label=label)
    shares.set_ylim(bottom=0)
    handles, labels = (a + b for a, b in zip(axes.get_legend_handles_labels(), shares.get_legend_handles_labels(), strict=True))
    if handles:
        shares.legend(handles, labels, fontsize=7.5, loc="best")


def _finish(axes: Axes, log: bool) -> None:
    """The axis of steps; numbers on a logarithmic scale or a plain one."""
    from matplotlib.ticker import MaxNLocator

    if not axes.lines:
        _nothing(axes)
    if log:
        loss_axis(axes)
        return
    axes.set_xlabel("step")
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.grid(axis="y")
    axes.set_axisbelow(True)


def _nothing(axes: Axes) -> None:
    axes.text(0.5, 0.5, "nothing recorded", transform=axes.transAxes, ha="center", color=FAINT)
