"""LingBot-VA's released checkpoints -> ours: one transformer of Wan2.2-5B's size for video and actions.

    transformer/patch_embedding_mlp                      backbone.patch_embedding     a Linear over (c, p_t, p_h, p_w) is the same Conv3d
    transformer/condition_embedder, blocks, proj_out     backbone.*                   diffusers' names already
    transformer/condition_embedder_action.time_*         action_time.*                actions embed their levels with weights of their own
    transformer/condition_embedder_action.text_embedder  -                            stored, and used by nothing in the release
    transformer/action_embedder, action_proj_out         action_encoder.embed, action_decoder.out

The folder's config.json says the sizes; how long a chunk is, how far attention reaches and which channels are used is the robot's, and told.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wam.config import Config, from_dict
from wam.config_tree import overlay
from wam.convert.keys import ROW, SAME, TRANSPOSED, KeyMap, Op, Rule, Unused
from wam.convert.options import Options
from wam.convert.policy_folder import copy_parts, frozen_parts, network, unscaled, write_policy
from wam.convert.report import Report, plan, write
from wam.convert.wan import BLOCK
from wam.data.normalize import Normalizer
from wam.presets import get_preset
from wam.shards import ShardReader

PRESET, TRANSFORMER = "lingbot_va", "transformer"
CHUNK, PER_FRAME, WINDOW, TOKENS = 2, 16, 72, 512  # of the published RoboTwin server: latent frames a chunk, actions a frame, attn_window, tokens of text
PUBLISHED_WIDTH = 30
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
    for key, value in {"cross_attn_norm": True, "out_channels": released["in_channels"]}.items():
        if released.get(key, value) != value:
            raise ValueError(f"LingBot-VA's config has {key} {released[key]!r}; only {value!r} is known here")
    robot, channels = ("robotwin", CHANNELS) if released["action_dim"] == PUBLISHED_WIDTH else ("robot", tuple(range(released["action_dim"])))
    tree: dict[str, Any] = {
        "preset": PRESET,
        "timeline": {"latents_per_block": CHUNK, "actions_per_block": CHUNK * PER_FRAME, "frame_stride": PER_FRAME // 4, "history": history(WINDOW)},
        "codec": {"kind": "wan", "channels": released["in_channels"], "patch": 16, "image_size": [384, 320]},
        "text": {"kind": "umt5", "width": released["text_dim"], "max_tokens": TOKENS},
        "data": {"embodiment": robot},
        "model": {
            "layers": released["num_layers"],
            "heads": released["num_attention_heads"],
            "head_dim": released["attention_head_dim"],
            "ffn_dim": released["ffn_dim"],
            "freq_dim": released["freq_dim"],
            "eps": float(released.get("eps", 1e-6)),
            "patch": list(released["patch_size"]),
            "action_width": released["action_dim"],
            "embodiments": [{"name": robot, "state_dim": 1, "action_dim": len(channels), "action_channels": list(channels)}],
        },
    }
    return from_dict(Config, overlay(Config, get_preset(PRESET), overlay(Config, tree, dict(above or {}))))


def convert(src: Path, dst: Path, options: Options) -> Report:
    """A published folder (or its `transformer` alone) to a policy folder.

    Raises:
        FileNotFoundError: config.json, weights, a shard or its index is missing (named).
        ValueError: a damaged file, or a tensor that is missing, unexpected or of another shape; named.
    """
    report = Report("lingbot-va", str(src))
    folder = src / TRANSFORMER if (src / TRANSFORMER).is_dir() else src
    released = _read(folder / "config.json")
    above, parts = frozen_parts(src if folder != src else src.parent, options.reference, options.components == "include", report)
    above["codec"] |= {"image_size": list(options.image_size)} if options.image_size else {}
    above["text"] |= {"template": options.prompt_template} if options.prompt_template else {}
    config = model_config(released, above)
    report.notes.append(f"chunks, window and channels are the RoboTwin server's ({CHUNK} latent frames of {PER_FRAME} actions, attn_window {WINDOW}); for another robot, change timeline and model.embodiments in config.yaml")
    report.notes.append("statistics are part of the release's server, not of its checkpoint: actions are not normalised, and are what the network takes and gives")
    with ShardReader(folder) as source:
        component = network(config, keys(config.codec.channels, config.model.patch))
        report.add(plan(source, [component], str(folder)))
        write(source, [component], dst, options.max_bytes)
    copy_parts(parts, dst)
    robot = config.model.embodiments[0]
    write_policy(dst, config, Normalizer("quantile", None, {"state": unscaled(robot.state_dim), "action": unscaled(robot.action_dim)}), report, {"control_hz": options.control_hz})
    return report


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; give the folder that holds `{TRANSFORMER}/`, or that folder itself")
    try:
        tree = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); download it again") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{path} holds a {type(tree).__name__}; expected the transformer's settings")
    return tree


def history(attn_window: int) -> int:
    """Segments that a call sees beside its own: the pool holds `attn_window // 2` chunks of two, and a call takes the place of the oldest."""
    return 2 * (attn_window // 2) - 1
