"""DreamZero's released checkpoints to ours: a Wan transformer with state and action tokens, and the frozen parts it was trained around.

    action_head.model.*            backbone.*, state_encoder.*, action_encoder.*, action_decoder.*     -> model.safetensors
    action_head.vae.model.*        the VAE (2.1 beside the 14B, 2.2 beside the 5B)                     -> vae/
    action_head.text_encoder.*     UMT5                                                                -> text_encoder/
    action_head.image_encoder.*    CLIP                                                                -> image_encoder/

A LoRA checkpoint holds only what was trained; it is merged onto its base first (`wam.convert.dreamzero_lora`).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from wam.config import Config, from_dict
from wam.config_tree import overlay
from wam.convert.clip import clip_component
from wam.convert.dreamzero_lora import Merged, canonical, has_lora, is_lora_only, merge_from_base
from wam.convert.dreamzero_robot import NEGATIVE_PROMPT, Robot, read_robot, relative_to
from wam.convert.keys import KeyMap, Rule
from wam.convert.options import Options
from wam.convert.policy_folder import TOKENIZER, write_policy
from wam.convert.report import Component, Report, Shape, plan, write
from wam.convert.umt5 import umt5_component
from wam.convert.vae import vae_component
from wam.convert.wan import WAN, transformer_config, transformer_shapes
from wam.presets import get_preset
from wam.shards import MemorySource, ShardReader, TensorSource

PRESET = "dreamzero"
MODEL, TEXT, IMAGE, VAE = "action_head.model.", "action_head.text_encoder.", "action_head.image_encoder.model.", "action_head.vae.model."
PARTS = {"text_encoder": (TEXT, umt5_component), "image_encoder": (IMAGE, clip_component), "vae": (VAE, vae_component)}
HEADS = (
    ("state_encoder.layer1", "state_encoder.embed"),
    ("state_encoder.layer2", "state_encoder.mix"),
    ("action_encoder.W1", "action_encoder.embed"),
    ("action_encoder.W2", "action_encoder.join"),
    ("action_encoder.W3", "action_encoder.mix"),
    ("action_decoder.layer1", "action_decoder.mix"),
    ("action_decoder.layer2", "action_decoder.out"),
)
KEYS = WAN.within("", "backbone.") + KeyMap([rule for a, b in HEADS for rule in (Rule(f"{a}.W", f"{b}.weight"), Rule(f"{a}.b", f"{b}.bias"))])

# Of every shipped checkpoint; its own config.json goes before.
BLOCKS = {"max_chunk_size": 4, "num_frame_per_block": 2, "num_action_per_block": 24, "text_len": 512, "eps": 1e-6}
IMAGE_SIZES = {"concat": (352, 640), "token": (160, 320)}  # the canvas of camera views
I2V, TI2V = "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers", "Wan-AI/Wan2.2-TI2V-5B-Diffusers"
REFERENCES = {"concat": dict.fromkeys(PARTS, I2V), "token": {"text_encoder": TI2V, "vae": TI2V, "image_encoder": I2V}}


def model_config(shapes: Mapping[str, Shape], settings: Mapping[str, Any], above: Mapping[str, Any] | None = None, where: str = "the checkpoint") -> Config:
    """The config of a checkpoint: widths from its tensors (without `action_head.model.`), heads and blocks from its own config.

    Args:
        settings: of the transformer, as the release names them (num_heads, num_frame_per_block, ...).
        above: what else is known, laid over the rest: the robot, image size, where frozen parts are.

    Raises:
        ValueError: a tensor that tells a size is missing, or sizes contradict each other; named.
    """
    source = MemorySource({name: torch.empty(shape, device="meta") for name, shape in shapes.items()})
    known = {**BLOCKS, **{key: value for key, value in settings.items() if value is not None}}
    wan = transformer_config(source, "", where, known.get("num_heads"), known["eps"])
    _check_settings(wan, settings, where)
    sizes = _head_sizes(shapes, wan["num_attention_heads"] * wan["attention_head_dim"], where)
    if wan["image_dim"] is None:
        raise ValueError(f"{where}: tensor 'img_emb.proj.0.weight' is missing; expected the image branch that every DreamZero model has")
    channels, latents, actions = wan["out_channels"], known["num_frame_per_block"], known["num_action_per_block"]
    first = _first_frame(wan["in_channels"], channels, where)
    pixels = 16 if channels == 48 else 8
    stride = actions / (4 * latents)
    tree = {
        "preset": PRESET,
        "timeline": {"blocks": known["max_chunk_size"], "history": known["max_chunk_size"], "latents_per_block": latents, "actions_per_block": actions, "frame_stride": int(stride) if stride >= 1 and stride == int(stride) else None},
        "codec": {"kind": "wan", "channels": channels, "patch": pixels, "image_size": list(IMAGE_SIZES[first])},
        "text": {"kind": "umt5", "width": wan["text_dim"], "max_tokens": known["text_len"]},
        "image": {"kind": "clip", "framing": "stretch"},
        "sampling": {"negative_prompt": NEGATIVE_PROMPT},
        "data": {"embodiment": "robot"},
        "model": {
            **{"layers": wan["num_layers"], "heads": wan["num_attention_heads"], "head_dim": wan["attention_head_dim"], "ffn_dim": wan["ffn_dim"], "freq_dim": wan["freq_dim"], "eps": wan["eps"]},
            **{"patch": wan["patch_size"], "first_frame": first, "image_dim": wan["image_dim"], **sizes},
            "embodiments": [{"name": "robot", "state_dim": sizes["state_width"], "action_dim": sizes["action_width"]}],
        },
    }
    config = from_dict(Config, overlay(Config, get_preset(PRESET), overlay(Config, tree, dict(above or {}))))
    _check_tokens(config, settings, where)
    return config


def model_shapes(config: Config, wan: dict[str, Any]) -> dict[str, Shape]:
    """Every tensor of the model under its name here, from the sizes alone."""
    m = config.model
    width, hidden = m.width, m.mlp_hidden or m.width
    layers = {
        **{"state_encoder.embed": (m.states, hidden), "state_encoder.mix": (hidden, width)},
        **{"action_encoder.embed": (m.actions, width), "action_encoder.join": (2 * width, width), "action_encoder.mix": (width, width)},
        **{"action_decoder.mix": (width, hidden), "action_decoder.out": (hidden, m.actions)},
    }
    heads: dict[str, Shape] = {}
    for name, (inside, outside) in layers.items():
        heads |= {f"{name}.weight": (1, inside, outside), f"{name}.bias": (1, outside)}
    return {f"backbone.{name}": shape for name, shape in transformer_shapes(wan).items()} | heads


def convert(src: Path, dst: Path, options: Options) -> Report:
    """A DreamZero checkpoint to a policy folder.

    Raises:
        FileNotFoundError: config.json, statistics, weights, a shard or its index is missing (named).
        ValueError: a tensor that is missing, unexpected or of another shape; a LoRA checkpoint without its base or for another one.
    """
    tree = _read(src / "config.json")
    settings = diffusion_settings(tree)
    robot = read_robot(src, options.embodiment, options.control_hz, options.prompt_template)
    report = Report("dreamzero", str(src), notes=list(robot.notes))
    source, where = _source(src, tree, options, report)
    shapes = {name.removeprefix(MODEL): source.shape(name) for name in source.names() if name.startswith(MODEL)}
    above, referenced = _above(robot, shapes, options)
    config = model_config(shapes, settings, above, where)
    wan = transformer_config(source, MODEL, where, config.model.heads, {**BLOCKS, **settings}["eps"])
    components = [Component("transformer", KEYS.within(MODEL), model_shapes(config, wan), prefix="model.")]
    components += _frozen(source, config, referenced, where, report)
    fates = plan(source, components, where)
    report.add(source.told(fates) if isinstance(source, Merged) else fates)
    write(source, components, dst, options.max_bytes)
    if options.components == "include":
        _tokenizer([src, *([options.base] if options.base else [])], dst, options.tokenizer, report)
    write_policy(dst, config, robot.normalizer, report, _meta(robot, report))
    return report


def diffusion_settings(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The transformer's settings in a checkpoint's config.json: the section of action_head_cfg that has num_heads, over its surroundings."""
    head = tree.get("action_head_cfg", tree)
    head = head.get("config", head) if isinstance(head, dict) else {}
    inner = head.get("diffusion_model_cfg", {}) if isinstance(head, dict) else {}
    settings = {**{k: v for k, v in head.items() if not isinstance(v, dict)}, **inner}
    return {key: value for key, value in settings.items() if not (isinstance(value, str) and value.startswith("${"))}


def _source(src: Path, tree: Mapping[str, Any], options: Options, report: Report) -> tuple[TensorSource, str]:
    """The tensors of a whole checkpoint: as they are, or merged onto their base."""
    reader = ShardReader(src)
    head = diffusion_settings(tree)
    alpha = float(head.get("lora_alpha", 4))
    if is_lora_only(reader):
        if options.base is None:
            raise ValueError(f"{src} holds a LoRA checkpoint, which is nothing without the checkpoint it was trained on; name that with --base DIR")
        source = merge_from_base(reader, src, options, alpha, tree.get("base_sha256"), report)
        return source, f"{src} on {options.base}"
    if options.base is not None:
        raise ValueError(f"{src} holds a whole checkpoint, no LoRA, but --base {options.base} is given; leave --base out")
    view = canonical(reader)
    return (Merged(view, view, alpha, str(src)), str(src)) if has_lora(reader) else (view, str(src))


def _above(robot: Robot, shapes: Mapping[str, Shape], options: Options) -> tuple[dict[str, Any], dict[str, str] | None]:
    """What the robot and the caller say of the config, and where frozen parts are read from (None: from the release)."""
    channels = shapes.get("patch_embedding.weight", (0, 0))[1]
    first = "token" if 4 * channels == shapes.get("head.head.weight", (0,))[0] else "concat"
    referenced = None if options.components == "include" else {part: options.reference or default for part, default in REFERENCES[first].items()}
    names = {"codec": "vae", "text": "text_encoder", "image": "image_encoder"}
    above: dict[str, Any] = {section: {"pretrained": referenced[part] if referenced else None} for section, part in names.items()}
    above["text"]["template"] = robot.template
    if options.image_size is not None:
        above["codec"]["image_size"] = list(options.image_size)
    above["data"] = {"embodiment": robot.name}
    above["model"] = {"embodiments": [{"name": robot.name, "state_dim": robot.state_dim, "action_dim": robot.action_dim, "relative_to": list(relative_to(robot))}]}
    return above, referenced


def _frozen(source: TensorSource, config: Config, referenced: Mapping[str, str] | None, where: str, report: Report) -> list[Component]:
    """Text encoder, image encoder and VAE, as far as the release has them; what they put out must be what the transformer takes in."""
    takes = {"text_encoder": ("d_model", config.text.width), "image_encoder": ("hidden_size", config.model.image_dim), "vae": ("z_dim", config.codec.channels)}
    components = []
    for part, (prefix, build) in PARTS.items():
        if any(name.startswith(prefix) for name in source.names()):
            component = build(source, prefix, where, referenced[part] if referenced else None)
            field, width = takes[part]
            if component.config is None or component.config[field] != width:
                raise ValueError(f"{where}: the {part} puts out {component.config and component.config[field]} numbers, the transformer takes {width}; they are of different models")
            components.append(component)
        elif referenced is None:
            raise ValueError(f"{where}: no tensor begins with {prefix!r}; the {part} is not in this checkpoint: name one with --components reference (--reference DIR or Hub id)")
        if referenced is not None:
            report.notes.append(f"{part}: read from {referenced[part]}")
    return components


def _head_sizes(shapes: Mapping[str, Shape], width: int, where: str) -> dict[str, int]:
    for name, what in (("state_encoder.layer1.W", "[1, states, hidden]"), ("action_decoder.layer2.W", "[1, hidden, actions]")):
        if name not in shapes:
            raise ValueError(f"{where}: tensor {name!r} {what} is missing; is this Wan itself, or a DreamZero checkpoint without its action head?")
        if len(shapes[name]) != 3 or shapes[name][0] != 1:
            raise ValueError(f"{where}: tensor {name!r} has shape {list(shapes[name])}; expected {what}: DreamZero shares one head among all robots")
    _, states, hidden = shapes["state_encoder.layer1.W"]
    return {"mlp_hidden": hidden, "state_width": states, "action_width": shapes["action_decoder.layer2.W"][2]}


def _first_frame(inputs: int, channels: int, where: str) -> str:
    if inputs == channels:
        return "token"
    if inputs == 2 * channels + 4:
        return "concat"
    raise ValueError(f"{where}: patch_embedding.weight takes {inputs} channels and head.head puts out {channels}; expected {channels}, or {2 * channels + 4} with mask and first frame")


def _check_settings(wan: Mapping[str, Any], settings: Mapping[str, Any], where: str) -> None:
    found = {"dim": wan["num_attention_heads"] * wan["attention_head_dim"], "num_layers": wan["num_layers"], "ffn_dim": wan["ffn_dim"], "in_dim": wan["in_channels"], "out_dim": wan["out_channels"]}
    for name, value in found.items():
        if settings.get(name, value) != value:
            raise ValueError(f"{where}: config.json says {name} {settings[name]}, but the weights have {value}; the two are of different checkpoints")


def _check_tokens(config: Config, settings: Mapping[str, Any], where: str) -> None:
    height, width = (size // config.codec.patch // patch for size, patch in zip(config.codec.image_size, config.model.patch[1:], strict=True))
    expected = settings.get("frame_seqlen", height * width)
    if expected != height * width:
        raise ValueError(f"{where}: config.json says {expected} tokens a frame, but images of {config.codec.image_size[0]} x {config.codec.image_size[1]} make {height} x {width} = {height * width}; give the size with --image-size HEIGHTxWIDTH")


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; a DreamZero checkpoint has a config.json (action_head_cfg) beside its weights: download it too")
    try:
        tree = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); download it again") from error
    if not isinstance(tree, dict) or not isinstance(tree.get("action_head_cfg"), dict):
        raise ValueError(f"{path} has no section action_head_cfg; is {path.parent} a DreamZero checkpoint?")
    return tree


def _tokenizer(folders: Sequence[Path], dst: Path, named: str | None, report: Report) -> None:
    """The text encoder's: the one that is named, or one that lies beside the weights; the release itself has none, it takes google/umt5-xxl's."""
    found = next((folder / TOKENIZER for folder in folders if (folder / TOKENIZER).is_dir()), None)
    if named is not None:
        from transformers import AutoTokenizer

        AutoTokenizer.from_pretrained(named).save_pretrained(dst / TOKENIZER)
    elif found is not None:
        shutil.copytree(found, dst / TOKENIZER, dirs_exist_ok=True)
    else:
        report.notes.append(f"the release has no tokenizer: put google/umt5-xxl's files into {dst / TOKENIZER}, or convert with --tokenizer google/umt5-xxl")


def _meta(robot: Robot, report: Report) -> dict[str, Any]:
    channels = {"state_keys": dict(robot.state_keys), "action_keys": dict(robot.action_keys), "relative_actions": list(robot.relative)}
    return {"control_hz": robot.control_hz, "prompt_template": robot.template, **channels, **({"base_sha256": report.base_sha256} if report.base_sha256 else {})}
