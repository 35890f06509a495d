"""Wan's own checkpoints to diffusers' layout: T2V-1.3B, I2V-14B, TI2V-5B and any size between, read off the tensors.

    diffusion_pytorch_model*.safetensors, config.json            -> transformer/
    models_t5_umt5-xxl-enc-bf16.pth, google/umt5-xxl/            -> text_encoder/, tokenizer/
    Wan2.1_VAE.pth or Wan2.2_VAE.pth                             -> vae/
    models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth      -> image_encoder/                 (I2V only)

The names of the transformer here are also those of every model that was built on Wan: DreamZero, Fast-WAM and LingBot-VA.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from diffusers import WanTransformer3DModel

from wam.convert.clip import clip_component
from wam.convert.keys import KeyMap, Rule
from wam.convert.options import Options
from wam.convert.report import Component, Report, Shape, plan, shapes, write
from wam.convert.umt5 import umt5_component
from wam.convert.vae import vae_component
from wam.shards import ShardReader, TensorSource, build_empty

HEAD_DIM = 128  # of every released Wan; the weights do not tell the number of heads
EMBEDDER = "condition_embedder"
BLOCK = (
    ("modulation", "scale_shift_table"),
    ("self_attn.{x}.{p}", "attn1.to_{x}.{p}"),
    ("self_attn.o.{p}", "attn1.to_out.0.{p}"),
    ("self_attn.norm_q.weight", "attn1.norm_q.weight"),
    ("self_attn.norm_k.weight", "attn1.norm_k.weight"),
    ("norm3.{p}", "norm2.{p}"),  # the norm before cross-attention, the only one with weights
    ("cross_attn.{x}.{p}", "attn2.to_{x}.{p}"),
    ("cross_attn.o.{p}", "attn2.to_out.0.{p}"),
    ("cross_attn.norm_q.weight", "attn2.norm_q.weight"),
    ("cross_attn.norm_k.weight", "attn2.norm_k.weight"),
    ("cross_attn.k_img.{p}", "attn2.add_k_proj.{p}"),
    ("cross_attn.v_img.{p}", "attn2.add_v_proj.{p}"),
    ("cross_attn.norm_k_img.weight", "attn2.norm_added_k.weight"),
    ("ffn.0.{p}", "ffn.net.0.proj.{p}"),
    ("ffn.2.{p}", "ffn.net.2.{p}"),
)
ENDS = (
    ("patch_embedding.{p}", "patch_embedding.{p}"),
    ("text_embedding.0.{p}", f"{EMBEDDER}.text_embedder.linear_1.{{p}}"),
    ("text_embedding.2.{p}", f"{EMBEDDER}.text_embedder.linear_2.{{p}}"),
    ("time_embedding.0.{p}", f"{EMBEDDER}.time_embedder.linear_1.{{p}}"),
    ("time_embedding.2.{p}", f"{EMBEDDER}.time_embedder.linear_2.{{p}}"),
    ("time_projection.1.{p}", f"{EMBEDDER}.time_proj.{{p}}"),
    ("img_emb.proj.0.{p}", f"{EMBEDDER}.image_embedder.norm1.{{p}}"),
    ("img_emb.proj.1.{p}", f"{EMBEDDER}.image_embedder.ff.net.0.proj.{{p}}"),
    ("img_emb.proj.3.{p}", f"{EMBEDDER}.image_embedder.ff.net.2.{{p}}"),
    ("img_emb.proj.4.{p}", f"{EMBEDDER}.image_embedder.norm2.{{p}}"),
    ("img_emb.emb_pos", f"{EMBEDDER}.image_embedder.pos_embed"),
    ("head.modulation", "scale_shift_table"),
    ("head.head.{p}", "proj_out.{p}"),  # rows in the same order: (p_t, p_h, p_w, channel)
)
WAN = KeyMap([*(Rule(f"blocks.{{n}}.{a}", f"blocks.{{n}}.{b}") for a, b in BLOCK), *(Rule(a, b) for a, b in ENDS)])

TRANSFORMER = "diffusion_pytorch_model"
TEXT_ENCODER, IMAGE_ENCODER, VAE = "models_t5_*.pth", "models_clip_*.pth", "Wan2.*_VAE.pth"
TOKENIZER = Path("google") / "umt5-xxl"


def transformer_config(source: TensorSource, prefix: str, where: str, heads: int | None = None, eps: float = 1e-6) -> dict[str, Any]:
    """diffusers' config of a Wan transformer under Wan's own names, from its shapes.

    Args:
        heads: attention heads, where a config says so; default: width / 128.

    Raises:
        ValueError: it lacks a tensor that tells a size, or its width does not divide into heads.
    """
    names = set(source.names())

    def shape(name: str) -> Shape:
        if prefix + name not in names:
            raise ValueError(f"{where}: tensor {prefix + name!r} is missing; expected a transformer under Wan's own names (blocks.0.self_attn.q.weight, ...)")
        return source.shape(prefix + name)

    width, channels, *patch = shape("patch_embedding.weight")
    heads = heads or width // HEAD_DIM
    if heads == 0 or width % heads:
        raise ValueError(f"{where}: the width is {width} and there are {heads} heads; expected a width that is a multiple of them: is num_heads in config.json right?")
    layers = sum(name.startswith(f"{prefix}blocks.") and name.endswith(".modulation") for name in names)
    out = shape("head.head.weight")[0] // (patch[0] * patch[1] * patch[2])
    image = shape("img_emb.proj.0.weight")[0] if f"{prefix}img_emb.proj.0.weight" in names else None
    config = {"patch_size": list(patch), "num_attention_heads": heads, "attention_head_dim": width // heads, "in_channels": channels, "out_channels": out, "num_layers": layers}
    config |= {"text_dim": shape("text_embedding.0.weight")[1], "freq_dim": shape("time_embedding.0.weight")[1], "ffn_dim": shape("blocks.0.ffn.0.weight")[0]}
    positions = source.shape(f"{prefix}img_emb.emb_pos")[1] if f"{prefix}img_emb.emb_pos" in names else None
    normed = f"{prefix}blocks.0.norm3.weight" in names
    config |= {"cross_attn_norm": normed, "qk_norm": "rms_norm_across_heads", "eps": eps, "image_dim": image, "added_kv_proj_dim": width if image else None}
    return config | {"rope_max_seq_len": 1024, "pos_embed_seq_len": positions}


def transformer_shapes(config: dict[str, Any]) -> dict[str, Shape]:
    """Every tensor of a diffusers Wan transformer of this config; nothing is allocated."""
    return shapes(build_empty(lambda: WanTransformer3DModel(**config)))


def convert(src: Path, dst: Path, options: Options) -> Report:
    """A folder with one of Wan's own checkpoints, to a folder in diffusers' layout.

    Raises:
        FileNotFoundError: no transformer in it, a missing shard or index.
        ValueError: a tensor that is missing, unexpected or of another shape, or a damaged file.
    """
    report = Report("wan", str(src))
    parts: list[tuple[ShardReader, Component]] = []
    transformer = ShardReader(src, TRANSFORMER) if src.is_dir() else ShardReader(src)
    settings = _settings(src / "config.json") if src.is_dir() else {}
    config = transformer_config(transformer, "", str(src), settings.get("num_heads"), settings.get("eps", 1e-6))
    folder, written = "transformer", {"_class_name": "WanTransformer3DModel", **config}
    parts.append((transformer, Component("transformer", WAN, transformer_shapes(config), folder, TRANSFORMER, written)))
    for pattern, build in ((TEXT_ENCODER, umt5_component), (VAE, vae_component), (IMAGE_ENCODER, clip_component)):
        file = _only(src, pattern)
        if file is None:
            report.notes.append(f"no {pattern} in {src}: left out")
            continue
        reader = ShardReader(file)
        parts.append((reader, build(reader, "", str(file))))
    for reader, component in parts:
        report.add(plan(reader, [component], str(reader.path)))
    for reader, component in parts:
        with reader:
            write(reader, [component], dst, options.max_bytes)
    if (src / TOKENIZER).is_dir():
        shutil.copytree(src / TOKENIZER, dst / "tokenizer", dirs_exist_ok=True)
        report.notes.append("tokenizer: copied")
    report.save(dst)
    return report


def _settings(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        settings = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); download it again") from error
    return settings if isinstance(settings, dict) else {}


def _only(folder: Path, pattern: str) -> Path | None:
    found = sorted(folder.glob(pattern)) if folder.is_dir() else []
    if len(found) > 1:
        raise ValueError(f"{folder} has several files {pattern}: {', '.join(f.name for f in found)}; expected one, move the others away")
    return found[0] if found else None
