"""The one place where queries meet keys: one signature, several backends, the same answer from each.

A mask is needed in training only, where one forward holds a clean and a noisy copy of every block.  At inference each group of
queries gets exactly the keys it may see, so there is nothing to mask (see `wam.model.cache`).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Backend = Literal["auto", "sdpa", "eager"]


def attention(q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, mask: Tensor | None = None, backend: Backend = "auto") -> Tensor:
    """Softmax attention; layout (B, L, H, D) as in diffusers.

    Args:
        mask: bool, broadcastable to (B, H, L, S); True where a query may attend.
        backend: `sdpa` is PyTorch's fused kernel; `eager` writes the products out, which is faster for bf16 on CPUs (short
            sequences: the scores are materialised); `auto` takes `eager` there and `sdpa` elsewhere.

    Returns:
        (B, L, H, D), in the dtype of `v`.
    """
    q, k, v = (x.transpose(1, 2) for x in (q_BLHD, k_BSHD, v_BSHD))
    if backend == "auto":
        backend = "eager" if q.device.type == "cpu" and q.dtype == torch.bfloat16 else "sdpa"
    out = _eager(q, k, v, mask) if backend == "eager" else F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.transpose(1, 2)


def _eager(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    scores = torch.matmul(q * (1 / math.sqrt(q.shape[-1])), k.transpose(-1, -2))
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return torch.matmul(scores.softmax(dim=-1), v)
