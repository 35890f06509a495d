"""The published ways of joining video and actions, and ours, as the settings that differ from the defaults.

A preset is a partial config.  `preset: NAME` lays it under what a YAML file and the command line say, and the resolved config, cells of
the relation table included, is saved with the weights.
"""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

PRESETS: dict[str, dict[str, Any]] = {"all": {}}


def get_preset(name: str) -> dict[str, Any]:
    """The settings of a preset.

    Raises:
        ValueError: naming the nearest preset.
    """
    if name not in PRESETS:
        near = get_close_matches(str(name), PRESETS, n=1)
        raise ValueError(f"unknown preset {name!r}; {f'did you mean {near[0]!r}? ' if near else ''}presets: {', '.join(PRESETS)}")
    return PRESETS[name]
