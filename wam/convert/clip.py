"""The image encoder: the visual half of open-CLIP's XLM-R ViT-H/14, as Wan's I2V checkpoints carry it, to `transformers.CLIPVisionModel`.

Wan reads the embeddings one layer before the last; the last layer and the final norm come along since the class has them.  What only
compares images with texts (the projection head, the temperature, the whole text half) has no place here.
"""

from __future__ import annotations

from typing import Any

from transformers import CLIPVisionConfig, CLIPVisionModel

from wam.convert.keys import KeyMap, Rule, Unused, flat, part
from wam.convert.report import Component, shapes
from wam.shards import TensorSource, build_empty

HEAD_DIM = 80  # of ViT-H/14; the fused projection does not tell the number of heads
LAYER = (("norm1", "layer_norm1"), ("attn.proj", "self_attn.out_proj"), ("norm2", "layer_norm2"), ("mlp.0", "mlp.fc1"), ("mlp.2", "mlp.fc2"))
QKV = [Rule("visual.transformer.{n}.attn.to_qkv.{p}", f"encoder.layers.{{n}}.self_attn.{name}_proj.{{p}}", part(i, 3)) for i, name in enumerate("qkv")]

CLIP = KeyMap(
    [
        Rule("visual.cls_embedding", "embeddings.class_embedding", flat(2)),
        Rule("visual.pos_embedding", "embeddings.position_embedding.weight", flat(1)),
        Rule("visual.patch_embedding.weight", "embeddings.patch_embedding.weight"),
        Rule("visual.pre_norm.{p}", "pre_layrnorm.{p}"),
        Rule("visual.post_norm.{p}", "post_layernorm.{p}"),
        *QKV,
        *(Rule(f"visual.transformer.{{n}}.{a}.{{p}}", f"encoder.layers.{{n}}.{b}.{{p}}") for a, b in LAYER),
    ],
    [
        Unused(r"visual\.head", "projects the image's token to compare it with a text; Wan reads the tokens before it"),
        Unused(r"log_scale", "temperature of comparing images with texts"),
        Unused(r"textual\..*", "CLIP's text half; Wan reads texts with UMT5"),
    ],
)


def clip_config(source: TensorSource, prefix: str, where: str) -> dict[str, Any]:
    """transformers' config of a released image encoder, from its shapes.

    Raises:
        ValueError: it lacks a tensor that tells a size.
    """
    names = source.names()
    for name in ("visual.patch_embedding.weight", "visual.pos_embedding", "visual.transformer.0.mlp.0.weight"):
        if prefix + name not in names:
            raise ValueError(f"{where}: tensor {prefix + name!r} is missing; expected an image encoder under the names of open-CLIP's XLM-R ViT-H/14")
    width, _, patch, _ = source.shape(f"{prefix}visual.patch_embedding.weight")
    side = round((source.shape(f"{prefix}visual.pos_embedding")[1] - 1) ** 0.5)
    layers = sum(name.startswith(f"{prefix}visual.transformer.") and name.endswith(".norm1.weight") for name in names)
    config = {"hidden_size": width, "intermediate_size": source.shape(f"{prefix}visual.transformer.0.mlp.0.weight")[0], "num_hidden_layers": layers, "num_attention_heads": max(width // HEAD_DIM, 1)}
    return config | {"image_size": side * patch, "patch_size": patch, "hidden_act": "gelu", "layer_norm_eps": 1e-5, "projection_dim": 1024}


def clip_component(source: TensorSource, prefix: str, where: str, referenced: str | None = None) -> Component:
    """A released image encoder under `prefix`, as `image_encoder/` in diffusers' layout."""
    config = clip_config(source, prefix, where)
    module = build_empty(lambda: CLIPVisionModel(CLIPVisionConfig(**config)))
    stem = "vision_model."  # as files on the Hub have it; whether the class itself does, differs between versions of transformers
    targets = {name.removeprefix(stem): shape for name, shape in shapes(module).items()}
    written = {"architectures": ["CLIPVisionModel"], "model_type": "clip_vision_model", **config}
    return Component("image_encoder", CLIP.within(prefix), targets, "image_encoder", "model", written, referenced, prefix=stem)
