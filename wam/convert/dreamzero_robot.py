"""What a DreamZero checkpoint says about its robot: statistics, the order of its channels, relative actions, and the text it expects.

    experiment_cfg/metadata.json     statistics of each key of states and actions, by embodiment
    experiment_cfg/conf.yaml         which keys are joined in which order, how each is normalised, which actions are relative

conf.yaml refers to itself (`${modality_config_oxe_droid.state.modality_keys}`); what is needed of it is resolved here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from wam.data.normalize import Normalizer, Statistics

METADATA, CONF = Path("experiment_cfg") / "metadata.json", Path("experiment_cfg") / "conf.yaml"
STATISTICS = {"q99": ("q01", "q99"), "min_max": ("min", "max")}  # ends of the range that becomes -1..1, by how a key is normalised
CONTROL_HZ = {"oxe_droid": 15.0, "agibot": 30.0, "yam": 30.0}

# The text that the checkpoints were trained with; the instruction goes in twice, in lower case.
_VIEWS = "A multi-view video shows that a robot {instruction:lower} The video is split into %s views: %s The robot {instruction:lower}"
_HANDS = "The top-left view shows the camera view from the robot's head, the top-right view shows the camera view from the right hand, the bottom-left view shows the camera view from the left hand, and the bottom-right view is a black screen (inactive view)."
_YAM = "The top-left view shows the top camera, the top-right view shows the right camera, the bottom-left view shows the left camera, and the bottom-right view is a black screen."
_DROID = "The top view shows the camera view from the robot's wrist, the bottom-left view shows the camera view from the left exterior camera, and the bottom-right view shows the camera view from the right exterior camera. During training, one of the two bottom exterior views may be a black screen (dropped view)."
_HUMAN = "A single view video shows that a human {instruction:lower}"
TEMPLATES = {
    "oxe_droid": _VIEWS % ("three", _DROID),
    **dict.fromkeys(("agibot", "xdof"), _VIEWS % ("four", _HANDS)),
    "yam": _VIEWS % ("four", _YAM),
    **dict.fromkeys(("gr1_unified", "mecka_hands"), _HUMAN),
}
NEGATIVE_PROMPT = (
    "Vibrant colors, overexposed, static, blurry details, text, subtitles, style, artwork, painting, image, still, grayscale, dull, worst quality, low quality, JPEG artifacts, ugly, mutilated, "
    "extra fingers, bad hands, bad face, deformed, disfigured, mutated limbs, fused fingers, stagnant image, cluttered background, three legs, many people in the background, walking backwards."
)


@dataclass(frozen=True)
class Robot:
    """One embodiment of a checkpoint.

    Attributes:
        state_keys, action_keys: names of the parts of a state and an action vector, with their widths, in order.
        relative: channels of an action that are differences to the state at the block's first step.
        template: the text that an instruction is put into (see `wam.text.text.prompt`).
    """

    name: str
    state_keys: Mapping[str, int]
    action_keys: Mapping[str, int]
    normalizer: Normalizer
    control_hz: float
    template: str
    relative: tuple[int, ...] = ()
    notes: tuple[str, ...] = field(default=())

    @property
    def state_dim(self) -> int:
        """Numbers in a state vector."""
        return sum(self.state_keys.values())

    @property
    def action_dim(self) -> int:
        """Numbers in an action vector."""
        return sum(self.action_keys.values())


def relative_to(robot: Robot) -> tuple[int, ...]:
    """Per action channel the state channel of the same key that it is a difference to, or -1.

    Raises:
        ValueError: a relative action whose key no state has, or in another width.
    """
    starts, at = {}, 0
    for key, width in robot.state_keys.items():
        starts[key], at = (at, width), at + width
    out: list[int] = []
    for key, width in robot.action_keys.items():
        channels = range(len(out), len(out) + width)
        if not set(channels) & set(robot.relative):
            out += [-1] * width
            continue
        start, found = starts.get(key, (0, None))
        if found != width:
            raise ValueError(f"action {key!r} of {robot.name!r} is relative to the state, but the state {key!r} has {found or 'no'} channels, expected {width}; the checkpoint's conf.yaml and metadata.json do not fit")
        out += range(start, start + width)
    return tuple(out) if robot.relative else ()


def read_robot(folder: Path, embodiment: str | None = None, control_hz: float | None = None, template: str | None = None) -> Robot:
    """The robot of a DreamZero checkpoint.

    Args:
        embodiment: which, where there are several.
        control_hz, template: where they are not known by the embodiment's name.

    Raises:
        FileNotFoundError: experiment_cfg/metadata.json or conf.yaml is missing.
        ValueError: an embodiment, statistic, rate or template that is not there; names it.
    """
    metadata, conf = _load(folder / METADATA, json.loads), _load(folder / CONF, yaml.safe_load)
    everyone = {name: entry["statistics"] for name, entry in metadata.items() if isinstance(entry, dict) and "statistics" in entry} or metadata.get("statistics", {})
    name = _choose(everyone, embodiment, folder / METADATA)
    modes = dict(_modes(resolve(conf, _of(conf, "transforms", name))))
    parts, keys, notes = {}, {}, []
    for kind in ("state", "action"):
        statistics = everyone[name].get(kind)
        if not isinstance(statistics, dict) or not statistics:
            raise ValueError(f"{folder / METADATA} has no {kind} statistics of {name!r}; expected {{key: {{q01, q99, ...}}}}")
        order = _order(conf, name, kind)
        if order is None:
            order = list(statistics)
            notes.append(f"{CONF} does not say in which order {kind}s are joined; taken from {METADATA.name}: {', '.join(order)}")
        ranges = {key: _range(statistics, key, kind, modes, folder / METADATA) for key in order}
        parts[kind] = _statistics(ranges)
        keys[kind] = {key: len(low) for key, (low, _) in ranges.items()}
    relative, rate, text = _relative(conf, keys["action"]), control_hz or CONTROL_HZ.get(name), template or TEMPLATES.get(name)
    if rate is None:
        raise ValueError(f"control steps a second of {name!r} are not known; say them with --control-hz")
    if text is None:
        raise ValueError(f"the text that {name!r} was trained with is not known (known: {', '.join(TEMPLATES)}); give it with --prompt-template, with {{instruction:lower}} where the instruction belongs")
    if relative:
        notes.append(f"actions {', '.join(map(str, relative))} are relative to the state at the block's first step")
    return Robot(name, keys["state"], keys["action"], Normalizer("quantile", 1.0, parts), rate, text, relative, tuple(notes))


def resolve(tree: Any, value: Any, depth: int = 0) -> Any:
    """`value` with every `${a.b}` that is a whole entry replaced by what stands at a.b of `tree`; others are left."""
    if depth > 50:
        raise ValueError(f"{CONF} refers to itself without end at {value!r}")
    if isinstance(value, dict):
        return {k: resolve(tree, v, depth + 1) for k, v in value.items()}
    if isinstance(value, list):
        return [resolve(tree, v, depth + 1) for v in value]
    match = re.fullmatch(r"\$\{([\w.]+)\}", value) if isinstance(value, str) else None
    if not match:
        return value
    found = tree
    for part in match[1].split("."):
        found = found.get(part) if isinstance(found, dict) else None
        found = resolve(tree, found, depth + 1) if isinstance(found, str) else found
    return value if found is None else resolve(tree, found, depth + 1)


def _load(path: Path, parse: Any) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; a DreamZero checkpoint needs {METADATA} and {CONF} beside its weights: download them too")
    try:
        tree = parse(path.read_text())
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is damaged ({' '.join(str(error).split())}); download it again") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{path} holds a {type(tree).__name__}; expected sections")
    return tree


def _choose(everyone: Mapping[str, Any], wanted: str | None, path: Path) -> str:
    if wanted is not None and wanted not in everyone:
        raise ValueError(f"{path} has no statistics of embodiment {wanted!r}; it has {', '.join(everyone) or 'none'}")
    if wanted is None and len(everyone) != 1:
        raise ValueError(f"{path} has statistics of {', '.join(everyone) or 'no embodiment'}; choose one with --embodiment")
    return wanted or next(iter(everyone))


def _of(conf: Mapping[str, Any], section: str, name: str) -> Any:
    """conf[section][name], whose section may itself be a reference."""
    entries = resolve(conf, conf.get(section)) if isinstance(conf.get(section), str) else conf.get(section)
    return entries.get(name) if isinstance(entries, dict) else None


def _order(conf: Mapping[str, Any], name: str, kind: str) -> list[str] | None:
    """Keys of a state or an action, in the order in which they are joined."""
    for section in (resolve(conf, _of(conf, "transforms", name)), resolve(conf, _of(conf, "modality_configs", name))):
        for tree in _dicts(section):
            keys = tree.get(f"{kind}_concat_order") or (tree[kind].get("modality_keys") if isinstance(tree.get(kind), dict) else None)
            if isinstance(keys, list) and all(isinstance(key, str) for key in keys):
                return [key.removeprefix(f"{kind}.") for key in keys]
    return None


def _modes(tree: Any) -> Iterator[tuple[str, str]]:
    """How each key is normalised."""
    for node in _dicts(tree):
        if isinstance(node.get("normalization_modes"), dict):
            yield from node["normalization_modes"].items()
        if node.get("target_rotations"):
            raise ValueError(f"{CONF} turns rotations into another form (target_rotations: {node['target_rotations']}); such checkpoints are not supported")


def _dicts(tree: Any) -> Iterator[dict[str, Any]]:
    if isinstance(tree, dict):
        yield tree
    for child in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        yield from _dicts(child)


def _range(statistics: Mapping[str, Any], key: str, kind: str, modes: Mapping[str, str], path: Path) -> tuple[list[float], list[float]]:
    mode = modes.get(f"{kind}.{key}", modes.get(key, "q99"))
    if mode not in STATISTICS:
        raise ValueError(f"{kind} {key!r} is normalised by {mode!r}; expected {' or '.join(STATISTICS)}")
    low, high = (statistics.get(key, {}).get(end) for end in STATISTICS[mode])
    if low is None or high is None or np.ndim(low) != 1 or np.shape(low) != np.shape(high):
        raise ValueError(f"{path}: {kind} {key!r} lacks {' and '.join(STATISTICS[mode])}, or they are not lists of one length; its statistics: {', '.join(statistics.get(key, {})) or 'none'}")
    return low, high


def _statistics(ranges: Mapping[str, tuple[list[float], list[float]]]) -> Statistics:
    """Range to -1..1; channels whose ends coincide pass through unchanged, as in the release."""
    low, high = (np.concatenate([np.asarray(ends[i], np.float64) for ends in ranges.values()]) for i in (0, 1))
    still = high == low
    center, scale = np.where(still, 0.0, (low + high) / 2), np.where(still, 1.0, (high - low) / 2)
    return Statistics(tuple(center.tolist()), tuple(scale.tolist()), tuple(np.flatnonzero(still).tolist()))


def _relative(conf: Mapping[str, Any], keys: Mapping[str, int]) -> tuple[int, ...]:
    if not resolve(conf, conf.get("relative_action")):
        return ()
    named = resolve(conf, conf.get("relative_action_keys")) or []
    wanted, channels, start = {str(key).removeprefix("action.") for key in named}, [], 0
    for key, width in keys.items():
        channels += list(range(start, start + width)) if key in wanted else []
        start += width
    return tuple(channels)
