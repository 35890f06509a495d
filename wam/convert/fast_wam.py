"""Fast-WAM's released checkpoints -> ours: a video transformer of Wan2.2-5B's size and a narrow action expert that shares its attention.

    mot.mixtures.video.*             backbone.*          Wan's own names -> diffusers'
    mot.mixtures.action.*            expert.*            the same names, another width; text and time embeddings of its own
    mot.mixtures.action.action_encoder, .head            action_encoder.embed, action_decoder.out
    proprio_encoder.*                state_encoder.embed the state is the last token of the text

A file does not say which of the three variants it is (base, joint and idm have the same tensors), nor how large its heads are; both are told.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from wam.config import Config, from_dict
from wam.config_tree import overlay
from wam.convert.keys import ROW, TRANSPOSED, KeyMap, Rule, Unused
from wam.convert.options import Options
from wam.convert.policy_folder import frozen_parts, network, unscaled, write_policy
from wam.convert.report import Report, plan, write
from wam.convert.wan import HEAD_DIM, WAN
from wam.data.normalize import Method, Normalizer, Statistics
from wam.presets import get_preset
from wam.shards import ShardReader

Shapes = Mapping[str, tuple[int, ...]]
VIDEO, ACTION, PROPRIO = "mixtures.video.", "mixtures.action.", "proprio_encoder."
VARIANTS = {"base": "fast_wam", "joint": "fast_wam_joint", "idm": "fast_wam_idm"}  # our presets
LATENTS, ACTIONS, STRIDE, TOKENS = 2, 32, 4, 128  # of the published models: 32 control steps, a frame every 4th; 128 tokens of text
PUBLISHED = {7: ("libero", (224, 448)), 14: ("robotwin", (384, 320))}  # by action width: embodiment, image height and width (views side by side)
METHODS: dict[str, Method] = {"libero": "min_max", "robotwin": "mean_std"}  # how each was normalised
CONTROL_HZ = {"libero": 20.0}
TEMPLATE = "A video recorded from a robot's point of view executing the following instruction: {instruction}"
ENDS: dict[str, tuple[str, str]] = {"min_max": ("global_min", "global_max"), "mean_std": ("global_mean", "global_std")}  # fields of the statistics beside a published file

_LINEARS = ((f"{ACTION}action_encoder", "action_encoder.embed"), (f"{ACTION}head", "action_decoder.out"), ("proprio_encoder", "state_encoder.embed"))
KEYS = WAN.within(VIDEO, "backbone.") + WAN.within(ACTION, "expert.")
KEYS += KeyMap([rule for a, b in _LINEARS for rule in (Rule(f"{a}.weight", f"{b}.weight", TRANSPOSED), Rule(f"{a}.bias", f"{b}.bias", ROW))])


def file_keys() -> KeyMap:
    """The key map of a published file: the network lies under `mot`, the state's encoder beside it, the optimiser perhaps too."""
    rules = [Rule(r.source if r.source.startswith(PROPRIO) else f"mot.{r.source}", r.target, r.op) for r in KEYS.rules]
    return KeyMap(rules, [Unused(r"optimizer\..*", "state of the optimiser")])


def model_config(shapes: Shapes, variant: str, head_dim: int = HEAD_DIM, above: Mapping[str, Any] | None = None) -> Config:
    """The config of a checkpoint, its sizes read off its tensors (without `mot.`).

    Args:
        variant: base, joint or idm.
        above: what else is known, laid over the published models' settings, e.g. the timeline.

    Raises:
        ValueError: an unknown variant, or not a checkpoint of Fast-WAM; names the tensor.
    """
    if variant not in VARIANTS:
        raise ValueError(f"Fast-WAM has no variant {variant!r}; expected one of {', '.join(VARIANTS)}")
    width, channels, *patch = _shape(shapes, VIDEO + "patch_embedding.weight")
    attention = _shape(shapes, VIDEO + "blocks.0.self_attn.q.weight")[0]
    if attention % head_dim or width != attention:
        raise ValueError(f"video tokens are {width} wide and their attention {attention}; expected the same, a multiple of the head size {head_dim}: is this Fast-WAM?")
    expert_width, actions = _shape(shapes, ACTION + "action_encoder.weight")
    states = shapes.get(PROPRIO + "weight", (0, 0))[1]
    robot, image_size = PUBLISHED.get(actions, ("robot", (224, 224)))
    tree: dict[str, Any] = {
        "preset": VARIANTS[variant],
        "timeline": {"blocks": 1, "latents_per_block": LATENTS, "actions_per_block": ACTIONS, "frame_stride": STRIDE, "history": 1},
        "codec": {"kind": "wan", "channels": channels, "patch": 16, "image_size": list(image_size)},
        "text": {"kind": "umt5", "width": _shape(shapes, VIDEO + "text_embedding.0.weight")[1], "max_tokens": TOKENS, "template": TEMPLATE},
        "data": {"embodiment": robot},
        "model": {
            "layers": sum(name.startswith(VIDEO + "blocks.") and name.endswith(".modulation") for name in shapes),
            "heads": attention // head_dim,
            "head_dim": head_dim,
            "ffn_dim": _shape(shapes, VIDEO + "blocks.0.ffn.0.weight")[0],
            "freq_dim": _shape(shapes, VIDEO + "time_embedding.0.weight")[1],
            "patch": patch,
            "expert_width": expert_width,
            "expert_ffn_dim": _shape(shapes, ACTION + "blocks.0.ffn.0.weight")[0],
            "state": "context" if states else "none",
            "embodiments": [{"name": robot, "state_dim": states or 1, "action_dim": actions}],
        },
    }
    return from_dict(Config, overlay(Config, get_preset(VARIANTS[variant]), overlay(Config, tree, dict(above or {}))))


def convert(src: Path, dst: Path, options: Options) -> Report:
    """A published file (`*.pt`, or the same tensors as safetensors) to a policy folder.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a damaged file, a tensor that is missing, unexpected or of another shape (named), or statistics that do not fit.
    """
    report, variant = Report("fast-wam", str(src)), options.variant or "base"
    if options.variant is None:
        report.notes.append("variant: base; a file does not say which it is: --variant joint or idm, if it is one of those")
    with ShardReader(src) as source:
        shapes = {name.removeprefix("mot."): source.shape(name) for name in source.names()}
        above, _ = frozen_parts(None, options.reference, options.components == "include", report)
        above |= {"codec": above["codec"] | ({"image_size": list(options.image_size)} if options.image_size else {})}
        above["text"] |= {"template": options.prompt_template} if options.prompt_template else {}
        config = model_config(shapes, variant, options.head_dim or HEAD_DIM, above)
        normalizer = _statistics(src, config, report)
        component = network(config, file_keys())
        report.add(plan(source, [component], str(src)))
        write(source, [component], dst, options.max_bytes)
    robot = config.data.embodiment
    write_policy(dst, config, normalizer, report, {"control_hz": options.control_hz or CONTROL_HZ.get(robot), "variant": variant})
    return report


def _statistics(src: Path, config: Config, report: Report) -> Normalizer:
    """Of the `NAME_dataset_stats.json` beside NAME.pt: per key of states and actions, joined in their order."""
    robot = config.model.embodiments[0]
    dims = {"state": robot.state_dim, "action": robot.action_dim}
    found = next((path for path in (src.with_name(f"{src.stem}_dataset_stats.json"), src.with_name("dataset_stats.json")) if path.is_file()), None)
    if found is None:
        report.notes.append(f"no {src.stem}_dataset_stats.json beside {src.name}: states and actions are not normalised, and are what the network takes and gives")
        return Normalizer("min_max", None, {kind: unscaled(dim) for kind, dim in dims.items()})
    method = METHODS.get(robot.name, "min_max")
    try:
        tree = json.loads(found.read_text())
        ends = {kind: [np.concatenate([np.asarray(entry[end], np.float64) for entry in tree[kind].values()]) for end in ENDS[method]] for kind in dims}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{found} is damaged or lacks {error}; expected {{state, action: {{key: {{{', '.join(ENDS[method])}}}}}}}: download it again") from error
    for kind, (first, second) in ends.items():
        if first.shape != (dims[kind],) or second.shape != first.shape:
            raise ValueError(f"{found} has {list(first.shape)} and {list(second.shape)} numbers for {kind}s; expected {dims[kind]} each: is it of another robot?")
    report.notes.append(f"statistics: {found.name}, {method}")
    return Normalizer(method, None, {kind: _scaled(method, *pair) for kind, pair in ends.items()})


def _scaled(method: str, first: np.ndarray, second: np.ndarray) -> Statistics:
    """Least and greatest to -1..1, or mean and deviation to 0 and 1; channels that do not move are only centred."""
    center, scale = ((first + second) / 2, (second - first) / 2) if method == "min_max" else (first, second)
    still = scale <= 0
    return Statistics(tuple(center.tolist()), tuple(np.where(still, 1.0, scale).tolist()), tuple(np.flatnonzero(still).tolist()))


def _shape(shapes: Shapes, name: str) -> tuple[int, ...]:
    if name not in shapes:
        legacy = "; a file with 'dit' holds the video expert alone, which is no policy" if any(n.startswith("dit.") for n in shapes) else ""
        raise ValueError(f"tensor {name!r} is missing, so this is not a checkpoint of Fast-WAM{legacy}")
    return tuple(shapes[name])
