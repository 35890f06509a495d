"""The text encoder: names of Wan's own T5 (`models_t5_umt5-xxl-enc-bf16.pth`) to those of `transformers.UMT5EncoderModel`."""

from __future__ import annotations

from typing import Any

from transformers import UMT5Config, UMT5EncoderModel

from wam.convert.keys import KeyMap, Rule
from wam.convert.report import Component, shapes
from wam.shards import TensorSource, build_empty

BLOCK = (
    ("norm1.weight", "layer.0.layer_norm.weight"),
    ("attn.{x}.weight", "layer.0.SelfAttention.{x}.weight"),
    ("attn.o.weight", "layer.0.SelfAttention.o.weight"),
    ("pos_embedding.embedding.weight", "layer.0.SelfAttention.relative_attention_bias.weight"),
    ("norm2.weight", "layer.1.layer_norm.weight"),
    ("ffn.gate.0.weight", "layer.1.DenseReluDense.wi_0.weight"),  # the gate, through GELU
    ("ffn.fc1.weight", "layer.1.DenseReluDense.wi_1.weight"),
    ("ffn.fc2.weight", "layer.1.DenseReluDense.wo.weight"),
)
UMT5 = KeyMap(
    [
        Rule("token_embedding.weight", "shared.weight"),
        *(Rule(f"blocks.{{n}}.{a}", f"encoder.block.{{n}}.{b}") for a, b in BLOCK),
        Rule("norm.weight", "encoder.final_layer_norm.weight"),
    ]
)


def umt5_config(source: TensorSource, prefix: str, where: str) -> dict[str, Any]:
    """transformers' config of a released text encoder, from its shapes.

    Raises:
        ValueError: it lacks a tensor that tells a size.
    """
    names = source.names()
    for name in ("token_embedding.weight", "blocks.0.attn.q.weight", "blocks.0.ffn.fc1.weight", "blocks.0.pos_embedding.embedding.weight"):
        if prefix + name not in names:
            raise ValueError(f"{where}: tensor {prefix + name!r} is missing; expected a text encoder under the names of models_t5_umt5-xxl-enc-bf16.pth")
    vocabulary, width = source.shape(f"{prefix}token_embedding.weight")
    buckets, heads = source.shape(f"{prefix}blocks.0.pos_embedding.embedding.weight")
    inner = source.shape(f"{prefix}blocks.0.attn.q.weight")[0]
    layers = sum(name.startswith(f"{prefix}blocks.") and name.endswith(".norm1.weight") for name in names)
    config = {"vocab_size": vocabulary, "d_model": width, "d_kv": inner // heads, "num_heads": heads, "num_layers": layers, "d_ff": source.shape(f"{prefix}blocks.0.ffn.fc1.weight")[0]}
    fixed = {"feed_forward_proj": "gated-gelu", "relative_attention_num_buckets": buckets, "relative_attention_max_distance": 128, "layer_norm_epsilon": 1e-6, "tie_word_embeddings": True}
    return {**config, **fixed, "dropout_rate": 0.0, "scalable_attention": True, "is_encoder_decoder": False, "use_cache": False}


def umt5_component(source: TensorSource, prefix: str, where: str, referenced: str | None = None) -> Component:
    """A released text encoder under `prefix`, as `text_encoder/` in diffusers' layout."""
    config = umt5_config(source, prefix, where)
    targets = shapes(build_empty(lambda: UMT5EncoderModel(UMT5Config(**config))))
    targets.pop("encoder.embed_tokens.weight", None)  # the same tensor as shared.weight
    written = {"architectures": ["UMT5EncoderModel"], "model_type": "umt5", **config}
    return Component("text_encoder", UMT5.within(prefix), targets, "text_encoder", "model", written, referenced)
