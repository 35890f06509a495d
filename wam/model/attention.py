"""The one place where queries meet keys: one signature, several backends, the same answer from each.

A mask is needed in training only, where one forward holds a clean and a noisy copy of every block.  At inference each group of
queries gets exactly the keys it may see, so there is nothing to mask (see `wam.model.cache`).

    backend    None  dense  BlockMask   runs on                        what it is for
    sdpa        x      x                everything                     the default; fused, masked or not
    eager       x      x                everything                     the products written out: bf16 on CPUs that have instructions for it
    flex        x      x        x       CUDA; CPU without gradients    skips the tiles of 128 x 128 scores that nobody may see
    xformers    x      x                CUDA                           a mask becomes a dense bias
    flash       x                       CUDA, 16 bits                  no mask
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable
from difflib import get_close_matches
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

Backend = Literal["auto", "sdpa", "eager", "flex", "xformers", "flash"]
Mask = Tensor | BlockMask | None

ALIGNMENT = 8  # xformers and flash-attn need head sizes, and xformers rows of a bias, of a multiple of this many numbers
TILE = 128  # what flex attention skips or computes as a whole: this many queries by this many keys


def attention(q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, mask: Mask = None, backend: Backend = "auto") -> Tensor:
    """Softmax attention; layout (B, L, H, D) as in diffusers, of views or contiguous tensors alike.

    Args:
        mask: bool, broadcastable to (B, H, L, S), or a BlockMask (see `block_mask`); True where a query may attend, which is somewhere for each.
        backend: one of the table above; `auto` takes `flex` for a BlockMask, `eager` for bf16 on such CPUs, and `sdpa` otherwise.

    Returns:
        (B, L, H, D), in the dtype of `v`.

    Raises:
        ValueError: an unknown backend (names the nearest), or one that cannot take this mask, device or dtype (names one that can).
        ImportError: the backend's package is not installed; names the extra to install.
    """
    name = _choose(q_BLHD, mask) if backend == "auto" else backend
    if name not in _BACKENDS:
        near = get_close_matches(name, ["auto", *_BACKENDS], n=1)
        raise ValueError(f"unknown attention backend {name!r}; {f'did you mean {near[0]!r}? ' if near else ''}backends: auto, {', '.join(_BACKENDS)}")
    if isinstance(mask, Tensor) and mask.dtype != torch.bool:
        raise ValueError(f"an attention mask is {mask.dtype}, but must be bool, True where a query may attend; pass mask == 0 if it is an additive bias of 0 and -inf")
    if isinstance(mask, BlockMask) and name != "flex":
        raise ValueError(f"attention backend {name!r} cannot take a BlockMask; use 'flex', or {'no mask' if name == 'flash' else 'a dense bool mask'}")
    return _BACKENDS[name](q_BLHD, k_BSHD, v_BSHD, mask)


def block_mask(mask: Tensor) -> BlockMask:
    """A dense bool mask (L, S), or (B or 1, H or 1, L, S), as a BlockMask; to be built once per forward pass, not once per layer."""
    mask_BHLS = mask[(None,) * (4 - mask.ndim)]
    batch, heads, queries, keys = mask_BHLS.shape
    tiles = F.pad(mask_BHLS, (0, -keys % TILE, 0, -queries % TILE)).unflatten(-1, (-1, TILE)).unflatten(-3, (-1, TILE))
    seen = tiles.sum(dim=(-3, -1), dtype=torch.int32)  # (B, H, L / TILE, S / TILE)

    def of_tiles(chosen: Tensor) -> tuple[Tensor, Tensor]:  # for each query tile: how many key tiles are chosen, and which, these first
        return chosen.sum(dim=-1, dtype=torch.int32), chosen.int().argsort(dim=-1, descending=True, stable=True).int()

    def allow(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return mask_BHLS[b % batch, h % heads, q, k]  # asked for each score of a tile that is neither full nor empty

    full = seen == TILE * TILE
    return BlockMask.from_kv_blocks(*of_tiles((seen > 0) & ~full), *of_tiles(full), BLOCK_SIZE=TILE, mask_mod=allow, seq_lengths=(queries, keys))


def _choose(q: Tensor, mask: Mask) -> str:
    written_out = q.device.type == "cpu" and q.dtype == torch.bfloat16 and _cpu_multiplies_bf16()
    return "flex" if isinstance(mask, BlockMask) else "eager" if written_out else "sdpa"


@functools.cache
def _cpu_multiplies_bf16() -> bool:
    """The fused kernel is slow in bf16 on CPUs with instructions for it, and written-out products are slower still on those without."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask).transpose(1, 2)


def _eager(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores_BHLS = torch.matmul(q * (1 / math.sqrt(q.shape[-1])), k.transpose(-1, -2))
    if mask is not None:
        scores_BHLS = scores_BHLS.masked_fill_(~mask, -math.inf)  # in place: its own values are not needed to go back
    return torch.matmul(scores_BHLS.softmax(dim=-1), v).transpose(1, 2)


def _flex(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    if q.device.type == "cpu" and any(x.requires_grad for x in (q, k, v)):
        raise ValueError("attention backend 'flex' computes no gradients on a CPU; train with 'sdpa' and a dense bool mask there")
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    blocks = block_mask(mask.expand(*mask.shape[:-2], q.shape[2], k.shape[2])) if isinstance(mask, Tensor) else mask
    return _flex_kernel(q.device.type)(q, k, v, block_mask=blocks).transpose(1, 2)


@functools.cache
def _flex_kernel(device: str) -> Callable[..., Any]:
    """Flex attention is a kernel only once it is compiled; on a CPU compiling takes longer than the small inputs it gets there."""
    return cast(Callable[..., Any], flex_attention if device == "cpu" else torch.compile(flex_attention))


def _xformers(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    kernel = _import("xformers", "xformers.ops").memory_efficient_attention
    _need_cuda("xformers", q, (torch.float32, torch.float16, torch.bfloat16))
    bias = None
    if mask is not None:
        batch, queries, heads, keys = len(q), q.shape[1], q.shape[2], k.shape[1]
        rows = q.new_zeros(*mask[(None,) * (4 - mask.ndim)].shape[:2], queries, keys + -keys % ALIGNMENT)
        bias = rows[..., :keys].masked_fill_(~mask, -math.inf).expand(batch, heads, -1, -1)
    return kernel(*(_aligned(x) for x in (q, k, v)), attn_bias=bias, scale=1 / math.sqrt(q.shape[-1]))[..., : v.shape[-1]]


def _flash(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    if mask is not None:
        raise ValueError("attention backend 'flash' cannot take a mask; use 'flex' with a BlockMask, or 'sdpa' or 'xformers' with a dense one")
    kernel = _import("flash", "flash_attn").flash_attn_func
    _need_cuda("flash", q, (torch.float16, torch.bfloat16))
    return kernel(*(_aligned(x) for x in (q, k, v)), softmax_scale=1 / math.sqrt(q.shape[-1]))[..., : v.shape[-1]]


def _import(backend: str, module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"attention backend {backend!r} cannot be imported ({error}); pip install 'wam[cuda]', or use 'sdpa'") from error


def _need_cuda(backend: str, q: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if q.device.type != "cuda" or q.dtype not in dtypes:
        raise ValueError(f"attention backend {backend!r} got {q.dtype} on {q.device.type}, but computes {', '.join(map(str, dtypes))} on cuda; use 'sdpa' for everything else")


def _aligned(x: Tensor) -> Tensor:
    """Zeros after each head's numbers, up to a multiple of `ALIGNMENT`: they add nothing to a product, and are cut off the result."""
    return F.pad(x, (0, -x.shape[-1] % ALIGNMENT))


_BACKENDS: dict[str, Callable[..., Tensor]] = {"sdpa": _sdpa, "eager": _eager, "flex": _flex, "xformers": _xformers, "flash": _flash}
