"""Fast-WAM's released checkpoints -> ours: a video transformer of Wan2.2-5B's size and a narrow action expert that shares its attention.

    mot.mixtures.video.*             backbone.*          Wan's own names -> diffusers'
    mot.mixtures.action.*            expert.*            the same names, another width; text and time embeddings of its own
    mot.mixtures.action.action_encoder, .head            action_encoder.embed, action_decoder.out
    proprio_encoder.*                state_encoder.embed the state is the last token of the text

A file does not say which of the three variants it is (base, joint and idm have the same tensors), nor how large its heads are; both are told.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from wam.config import Config, from_dict
from wam.config_tree import overlay
from wam.convert.keys import ROW, TRANSPOSED, KeyMap, Rule, Unused
from wam.convert.wan import HEAD_DIM, WAN
from wam.presets import get_preset

Shapes = Mapping[str, tuple[int, ...]]
VIDEO, ACTION, PROPRIO = "mixtures.video.", "mixtures.action.", "proprio_encoder."
VARIANTS = {"base": "fast_wam", "joint": "fast_wam_joint", "idm": "fast_wam_idm"}  # our presets
LATENTS, ACTIONS, STRIDE, TOKENS = 2, 32, 4, 128  # of the published models: 32 control steps, a frame every 4th; 128 tokens of text
PUBLISHED = {7: ("libero", (224, 448)), 14: ("robotwin", (384, 320))}  # by action width: embodiment, image height and width (views side by side)

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
        "text": {"kind": "umt5", "width": _shape(shapes, VIDEO + "text_embedding.0.weight")[1], "max_tokens": TOKENS},
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


def _shape(shapes: Shapes, name: str) -> tuple[int, ...]:
    if name not in shapes:
        legacy = "; a file with 'dit' holds the video expert alone, which is no policy" if any(n.startswith("dit.") for n in shapes) else ""
        raise ValueError(f"tensor {name!r} is missing, so this is not a checkpoint of Fast-WAM{legacy}")
    return tuple(shapes[name])
