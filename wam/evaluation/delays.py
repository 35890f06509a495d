"""Success against delay, for several ways in which plans meet time: the same checkpoint, mode and seeds for all.

    <output>/synchronous-0/     delay 0, where all ways are one
    <output>/<time>-<delay>/    a rollout each, resumable
    <output>/delays.{json,md,png}

A delay is a number of control steps that the world moves on while a plan is made, so the figures do not depend on this machine.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from wam.config import RolloutConfig
from wam.config_execution import TimeMode
from wam.evaluation.latency_curve import curve, draw_curves
from wam.evaluation.rollout import rollout
from wam.files import write_json_atomic, write_text_atomic

log = logging.getLogger(__name__)
FORMAT = "wam-delays-1"


def rollout_delays(checkpoint: Path, config: RolloutConfig, times: Sequence[TimeMode], delays: Sequence[int], output: Path) -> dict[str, Any]:
    """Drive the same episodes at every delay in every way, and put them side by side.

    Args:
        config: its first mode is driven; its own execution gives all but `time` and `delay`.
        delays: control steps; 0 is driven once.

    Returns:
        The contents of `delays.json`: `curves` by way, as `latency_curve.curve`.

    Raises:
        ValueError: several modes, or as `rollout`; finished rollouts are kept.
    """
    if len(config.modes) != 1:
        raise ValueError(f"delays are compared in one mode, and rollout.modes is {', '.join(config.modes)}; choose one with --mode")
    if 0 not in delays:
        delays = [0, *delays]
    curves: dict[str, Any] = {}
    entries: dict[str, dict[float, Any]] = {time: {} for time in times}
    for delay in sorted(set(delays)):
        for time in times if delay else ("synchronous",):
            log.info("%s, delay %d", time, delay)
            execution = replace(config.execution, time=time, delay=delay, realtime=False)
            results = rollout(checkpoint, replace(config, execution=execution), output / f"{time}-{delay}")
            for name in [time] if delay else times:
                entries[name][1e3 * delay / results["control_hz"]] = results["modes"][config.modes[0]]
    for time in times:
        curves[time] = curve(entries[time], results["control_hz"])
    found = {"format": FORMAT, "env": config.env, "mode": config.modes[0], "control_hz": results["control_hz"], "delays": sorted(set(delays)), "curves": curves}
    write_json_atomic(output / "delays.json", found)
    write_text_atomic(output / "delays.md", table(found))
    draw_curves(curves, output / "delays.png")
    return found


def table(found: dict[str, Any]) -> str:
    """Delays as Markdown: a row for each, a column for each way, counts with their intervals and the control rate reached; then what they support."""
    times = list(found["curves"])
    lines = [f"| delay | {' | '.join(times)} |", f"|---|{'---|' * len(times)}"]
    for i, delay in enumerate(found["delays"]):
        cells = (_cell(found["curves"][time]["points"][i]) for time in times)
        lines.append(f"| {delay} steps, {1e3 * delay / found['control_hz']:.0f} ms | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"{time}: {found['curves'][time]['claim']}" for time in times)]) + "\n"


def _cell(point: dict[str, Any]) -> str:
    hz = "" if point["control_hz_reached"] is None else f", {point['control_hz_reached']:.0f} Hz"
    return f"{point['successes']}/{point['episodes']} ({100 * point['wilson_low']:.0f}-{100 * point['wilson_high']:.0f} %){hz}"
