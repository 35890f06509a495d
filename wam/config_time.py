"""Lengths in seconds: where a config counts control steps, it may say `0.8 s` instead.

    data.control_hz: 15
    timeline.actions_per_block: 1.6 s     ->  24 control steps
    timeline.frame_stride: 0.2 s          ->  3

They become steps before anything else is checked, so what is saved with a run is in steps.
"""

from __future__ import annotations

import math
import re
from typing import Any

from wam.config_tree import ConfigError

IN_STEPS = (("timeline", "actions_per_block"), ("timeline", "frame_stride"), ("rollout", "replan"))
SECONDS = re.compile(r"\s*([0-9.]+(?:e-?[0-9]+)?)\s*(s|ms)\s*")


def seconds_to_steps(tree: dict[str, Any]) -> dict[str, Any]:
    """A config's tree with lengths in seconds ("0.8 s", "800 ms") as control steps.

    Raises:
        ConfigError: there is no data.control_hz to count by, or the length is not a whole number of steps; with the arithmetic.
    """
    out = dict(tree)
    for section, key in IN_STEPS:
        values = out.get(section)
        value = values.get(key) if isinstance(values, dict) else None
        found = SECONDS.fullmatch(value) if isinstance(value, str) else None
        if found is not None:
            out[section] = {**out[section], key: _steps(f"{section}.{key}", found, out)}
    return out


def _steps(name: str, found: re.Match[str], tree: dict[str, Any]) -> int:
    data = tree.get("data")
    rate = data.get("control_hz") if isinstance(data, dict) else None
    text = found.group(0).strip()
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not (math.isfinite(rate) and rate > 0):
        raise ConfigError(f"{name} is {text!r}, and data.control_hz is {rate!r}; set data.control_hz to the control steps a second, or give steps")
    try:
        steps = float(found.group(1)) / (1000 if found.group(2) == "ms" else 1) * rate
    except ValueError:
        raise ConfigError(f"{name} is {text!r}; expected seconds, such as '0.8 s'") from None
    whole = round(steps)
    if whole < 1 or abs(steps - whole) > 1e-6 * whole:
        near = sorted({max(1, math.floor(steps)), max(1, math.ceil(steps))})
        raise ConfigError(f"{name} is {text!r} x data.control_hz {rate:g} = {steps:g} control steps; use {' or '.join(f'{n / rate:.6g} s ({n})' for n in near)}")
    return whole
