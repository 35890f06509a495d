"""How often a session computes what depends on the instruction or on the first frame alone: once, whatever it goes on to do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from wam.codec.clip_image import ClipImage
from wam.config import Config, SamplingConfig, load_config
from wam.evaluation.bench.compare import INSTRUCTION, drive, make_policy
from wam.evaluation.bench.rows import Count
from wam.evaluation.bench.subject import build_model
from wam.inference.session import Session

CHUNKS = 3
_OVERRIDES = ("codec.image_size=[32, 48]", "codec.channels=6", "model.layers=2", "model.heads=2", "model.head_dim=24", "model.ffn_dim=64", "text.width=16", "text.heads=2", "timeline.blocks=4")
_TAKES_ALL = ("model.first_frame=concat", "model.image_dim=32", "model.expert_width=24")


def count_recomputation() -> list[Count]:
    """Counts over a session of three chunks of a small model that takes an instruction, an image and a first frame, and has an expert."""
    config = load_config(None, [*_OVERRIDES, *_TAKES_ALL])
    counter, session = Counter[str](), _session(config)
    _watch(session, counter)
    generator = np.random.default_rng(0)
    opened = Session(session.policy, [INSTRUCTION], config.data.embodiment, [0])
    for _ in range(CHUNKS):
        drive(opened, "joint", SamplingConfig(steps=2), generator)
    return [Count(name, f"a session of {CHUNKS} chunks", counter[name]) for name in counter]


def _session(config: Config) -> Session:
    model = build_model(config, torch.device("cpu"), torch.float32)
    policy = make_policy(model)
    vision = CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=16)
    policy.image = ClipImage(CLIPVisionModel(vision))
    return Session(policy, [INSTRUCTION], config.data.embodiment, [0])


def _watch(session: Session, counter: Counter[str]) -> None:
    """Count calls of the modules that compute what should be computed once; the count of a row is that of its busiest module."""
    model, policy = session.model, session.policy
    expert = model.expert
    assert expert is not None and policy.image is not None and model.text is not None
    watched: dict[str, list[nn.Module]] = {
        "text encoder": [model.text],
        "text projection": [model.backbone.condition_embedder.text_embedder, expert.condition_embedder.text_embedder],
        "image encoder": [policy.image],
        "image projection": [model.backbone.condition_embedder.image_embedder],
        "text keys and values of each layer": [m for block in (*model.backbone.blocks, *expert.blocks) for m in (block.attn2.to_k, block.attn2.to_v)],
        "image keys and values of each layer": [m for block in model.backbone.blocks for m in (block.attn2.add_k_proj, block.attn2.add_v_proj)],
    }
    for name, modules in watched.items():
        counter[name] = 0
        for module in modules:
            module.register_forward_hook(_hook(counter, name, Counter[int](), id(module)))
    policy.codec.encode_pixels = _counted(policy.codec.encode_pixels, counter, "first frame on the channels")  # type: ignore[method-assign]


def _hook(counter: Counter[str], name: str, own: Counter[int], key: int) -> Callable[..., None]:
    def count(*_: Any) -> None:
        own[key] += 1
        counter[name] = max(counter[name], own[key])

    return count


def _counted(call: Callable[..., Any], counter: Counter[str], name: str) -> Callable[..., Any]:
    counter[name] = 0

    def counting(*args: Any) -> Any:
        counter[name] += 1
        return call(*args)

    return counting
