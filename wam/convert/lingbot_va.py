"""LingBot-VA's released checkpoints -> ours: one transformer of Wan2.2-5B's size for video and actions.

    transformer/patch_embedding_mlp                      backbone.patch_embedding     a Linear over (c, p_t, p_h, p_w) is the same Conv3d
    transformer/condition_embedder, blocks, proj_out     backbone.*                   diffusers' names already
    transformer/condition_embedder_action.time_*         action_time.*                actions embed their levels with weights of their own
    transformer/condition_embedder_action.text_embedder  -                            stored, and used by nothing in the release
    transformer/action_embedder, action_proj_out         action_encoder.embed, action_decoder.out

The folder's config.json says the sizes; how long a chunk is, how far attention reaches and which channels are used is the robot's, and told.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from wam.config import Config, from_dict
from wam.config_tree import overlay
from wam.convert.keys import ROW, SAME, TRANSPOSED, KeyMap, Op, Rule, Unused
from wam.convert.wan import BLOCK
from wam.presets import get_preset

PRESET = "lingbot_va"
CHUNK, PER_FRAME, WINDOW, TOKENS = 2, 16, 72, 512  # of the published RoboTwin server: latent frames a chunk, actions a frame, attn_window, tokens of text
CHANNELS = (*range(7), 28, *range(7, 14), 29)  # RoboTwin's of the 30: pose and gripper of one arm, then of the other
SIZES = ("num_attention_heads", "attention_head_dim", "in_channels", "action_dim", "text_dim", "freq_dim", "ffn_dim", "num_layers", "patch_size")

_LINEARS = (("action_embedder", "action_encoder.embed"), ("action_proj_out", "action_decoder.out"))
_TIME = ("time_embedder.linear_1.{p}", "time_embedder.linear_2.{p}", "time_proj.{p}")
_TEXT = ("text_embedder.linear_1.{p}", "text_embedder.linear_2.{p}")
_ENDS = (*(f"condition_embedder.{name}" for name in (*_TIME, *_TEXT)), "scale_shift_table", "proj_out.{p}")


def keys(channels: int, patch: tuple[int, int, int]) -> KeyMap:
    """The key map; the patch embedding's shape says nothing of the channels and the patch that it was flattened from."""
    conv = Op("reshaped", lambda x: x.reshape(-1, channels, *patch), lambda x: x.flatten(1))
    return KeyMap(
        [
            Rule("patch_embedding_mlp.weight", "backbone.patch_embedding.weight", conv),
            Rule("patch_embedding_mlp.bias", "backbone.patch_embedding.bias", SAME),
            *(Rule(f"blocks.{{n}}.{name}", f"backbone.blocks.{{n}}.{name}") for _, name in BLOCK),
            *(Rule(name, f"backbone.{name}") for name in _ENDS),
            *(Rule(f"condition_embedder_action.{name}", f"action_time.{name}") for name in _TIME),
            *(rule for a, b in _LINEARS for rule in (Rule(f"{a}.weight", f"{b}.weight", TRANSPOSED), Rule(f"{a}.bias", f"{b}.bias", ROW))),
        ],
        [Unused(r"condition_embedder_action\.text_embedder\..*", "stored by the release and never used: text goes through condition_embedder for both streams")],
    )


def model_config(released: Mapping[str, Any], above: Mapping[str, Any] | None = None) -> Config:
    """The config of a checkpoint from the `config.json` beside it.

    Args:
        above: what else is known, laid over the published RoboTwin server's settings, e.g. chunks, window and the robot's channels.

    Raises:
        ValueError: a size is missing, or one that this network does not have.
    """
    missing = [key for key in SIZES if key not in released]
    if missing:
        raise ValueError(f"LingBot-VA's config lacks {', '.join(missing)}; give the transformer's own config.json")
    for key, value in {"cross_attn_norm": True, "eps": 1e-6, "out_channels": released["in_channels"]}.items():
        if released.get(key, value) != value:
            raise ValueError(f"LingBot-VA's config has {key} {released[key]!r}; only {value!r} is known here")
    tree: dict[str, Any] = {
        "preset": PRESET,
        "timeline": {"latents_per_block": CHUNK, "actions_per_block": CHUNK * PER_FRAME, "frame_stride": PER_FRAME // 4, "history": history(WINDOW)},
        "codec": {"kind": "wan", "channels": released["in_channels"], "patch": 16, "image_size": [384, 320]},
        "text": {"kind": "umt5", "width": released["text_dim"], "max_tokens": TOKENS},
        "data": {"embodiment": "robotwin"},
        "model": {
            "layers": released["num_layers"],
            "heads": released["num_attention_heads"],
            "head_dim": released["attention_head_dim"],
            "ffn_dim": released["ffn_dim"],
            "freq_dim": released["freq_dim"],
            "patch": list(released["patch_size"]),
            "action_width": released["action_dim"],
            "embodiments": [{"name": "robotwin", "state_dim": 1, "action_dim": len(CHANNELS), "action_channels": list(CHANNELS)}],
        },
    }
    return from_dict(Config, overlay(Config, get_preset(PRESET), overlay(Config, tree, dict(above or {}))))


def history(attn_window: int) -> int:
    """Segments that a call sees beside its own: the pool holds `attn_window // 2` chunks of two, and a call takes the place of the oldest."""
    return 2 * (attn_window // 2) - 1
