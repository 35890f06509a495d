"""Tensors that a case does not store but draws: its image branch at CLIP's own width, 1280, would be most of the file.

    x ~ N(0, 1), from a generator on the CPU seeded with crc32(salt + key)
    a vector           0.1 x, plus 1 where the key ends in `weight`
    modulation, .b     0.1 x
    .W                 x / sqrt(inputs), the axis before the last
    any other          x / sqrt(inputs), all axes but the first

That this machine draws the same numbers is checked on the weights that are stored, before any is drawn that is not.
"""

from __future__ import annotations

import re
import zlib

import torch
from torch import Tensor

from wam.evaluation.conformance.case import Case

IMAGE_WEIGHTS = ("img_emb.proj.0.weight", "img_emb.proj.0.bias", "img_emb.proj.1.weight", "img_emb.proj.1.bias", "img_emb.proj.3.weight")
CLIP_SEED = "clip"


def seeded(text: str, shape: tuple[int, ...]) -> Tensor:
    """Standard normal numbers of a name."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(text.encode())))


def draw_weight(key: str, shape: tuple[int, ...], salt: str = "") -> Tensor:
    """The weight of a key."""
    x = seeded(salt + key, shape)
    if key.endswith(("modulation", ".b")):
        return 0.1 * x
    if len(shape) == 1:
        return 0.1 * x + (1.0 if key.endswith("weight") else 0.0)
    inputs = shape[-2] if key.endswith(".W") else int(torch.tensor(shape[1:]).prod())
    return x / inputs**0.5


def wide_clip(case: Case, width: int) -> tuple[dict[str, Tensor], Tensor]:
    """A case's weights with an image branch of another width, and the image tokens (B, M, width) that go with it.

    Raises:
        ValueError: the recipe does not give the stored weights, so nothing drawn by it can be trusted.
    """
    found = re.search(r"salt = '([^']*)'", str(case.spec.get("weights_recipe", "")))
    salt = found[1] if found else ""
    old = case.input("clip_feature").shape[-1]
    for key in sorted(case.weights):
        stored, drawn = case.weights[key], draw_weight(key, tuple(case.weights[key].shape), salt)
        if not torch.allclose(stored, drawn, rtol=1e-6, atol=1e-7):
            raise ValueError(f"{case.path}: weight {key!r} is not what the case's recipe draws here (differs by {float((stored - drawn).abs().max()):.2g}); outputs of weights that are not stored cannot be computed")
    weights = dict(case.weights)
    for key in IMAGE_WEIGHTS:
        shape = tuple(width if size == old and not (key.endswith("3.weight") and axis == 0) else size for axis, size in enumerate(case.weights[key].shape))
        weights[key] = draw_weight(key, shape, salt)
    batch, tokens, _ = case.input("clip_feature").shape
    return weights, seeded(CLIP_SEED, (batch, tokens, width))
