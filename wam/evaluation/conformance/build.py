"""A case's weights in our network: through the released key map, with nothing missing and nothing left over."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from wam.config import Config
from wam.convert.keys import KeyMap
from wam.convert.report import Component, plan, shapes
from wam.model.wam import WorldActionModel
from wam.shards import MemorySource, load_into

CODEC_PATCH = 16  # pixels a latent is wide; cases bring latents, so only the ratio matters


def outside(channels: int, latent_size: tuple[int, int], text_width: int, tokens: int) -> dict[str, Any]:
    """The parts of a config around the network, for a case that brings latents and text embeddings."""
    return {
        "codec": {"kind": "wan", "channels": channels, "patch": CODEC_PATCH, "image_size": [side * CODEC_PATCH for side in latent_size]},
        "text": {"kind": "umt5", "width": text_width, "max_tokens": tokens},  # stands outside of the weights, and is not needed
    }


def build(config: Config, weights: Mapping[str, Tensor], keys: KeyMap, where: str) -> tuple[WorldActionModel, tuple[str, ...]]:
    """The model of a config with a case's weights, in float32, and the released names that have no use.

    Raises:
        ValueError: the weights do not fit the config; names the tensor.
    """
    model = WorldActionModel(config)
    component = Component("the network", keys, shapes(model))
    fates = plan(MemorySource(weights), [component], where)
    converted = {target: tensor.contiguous() for name, weight in weights.items() for target, tensor in keys.apply(name, weight).items()}
    load_into(model, MemorySource(converted), what=where)
    return model.eval(), tuple(fate.source for fate in fates if fate.fate == "unused")


def gradient_norms(model: WorldActionModel, names: Iterable[str], keys: KeyMap, loss: Tensor) -> Tensor:
    """L2 norm of d loss / d weight for released `names`, in their order; 0 for weights that the loss does not depend on."""
    parameters = dict(model.named_parameters())
    parts = [(name, parameters[target]) for name in names for target, _ in keys.targets(name)]
    gradients = torch.autograd.grad(loss, [parameter for _, parameter in parts], allow_unused=True, retain_graph=True)
    squares = dict.fromkeys(names, 0.0)
    for (name, _), gradient in zip(parts, gradients, strict=True):
        squares[name] += 0.0 if gradient is None else float(gradient.double().square().sum())
    return torch.tensor([squares[name] for name in names]).sqrt()
