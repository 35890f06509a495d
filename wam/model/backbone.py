"""diffusers' Wan transformer, extended and not forked.

Parameters, names, config and loader are `diffusers.WanTransformer3DModel`'s own; any Wan checkpoint in its layout loads here.
What a world action model adds lives in our forward over its blocks:

  * each token has its own noise level: the few distinct levels are embedded once and gathered per token;
  * how queries meet keys is passed in (`Attend`): under a mask in training, against a cache at inference;
  * cross-attention keys and values of an instruction can be computed once and passed in.

With no action tokens, one level per frame and everything attending to everything, the output equals diffusers' own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttention, WanTransformerBlock
from torch import Tensor

from wam.flow import TIMESTEPS
from wam.model.attention import attention

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # unrotated q, k, v, each (B, L, H, Dh) -> (B, L, H, Dh)


@dataclass(frozen=True)
class Levels:
    """Noise levels of a sequence: K distinct ones per sample, and which of them each token takes.

    Attributes:
        sigma_BK: float32 in [0, 1].
        index_L: (L,) int64, the same for every sample of the batch.
    """

    sigma_BK: Tensor
    index_L: Tensor

    def per_token(self) -> Tensor:
        """(B, L) levels."""
        return self.sigma_BK[:, self.index_L]


@dataclass(frozen=True)
class Modulation:
    """Embedded levels: `temb_BKD` for the heads, `shifts_BK6D` for the blocks, and the token index."""

    temb_BKD: Tensor
    shifts_BK6D: Tensor
    index_L: Tensor

    def of(self, table_16D: Tensor) -> tuple[Tensor, ...]:
        """A block's six modulations (shift, scale, gate, twice), each (B, L, D) float32, or (B, 1, D) when there is one level."""
        rows = (table_16D.unsqueeze(0) + self.shifts_BK6D.float()).unbind(dim=2)
        return tuple(self._gather(r) for r in rows)

    def head(self, table_12D: Tensor, tokens: slice) -> tuple[Tensor, Tensor]:
        """Shift and scale of an output head for a run of tokens."""
        shift, scale = (table_12D.unsqueeze(0) + self.temb_BKD.float().unsqueeze(2)).unbind(dim=2)
        index = self.index_L[tokens]
        return shift.index_select(1, index), scale.index_select(1, index)

    def _gather(self, row_BKD: Tensor) -> Tensor:
        return row_BKD if row_BKD.shape[1] == 1 else row_BKD.index_select(1, self.index_L)


@dataclass(frozen=True)
class Context:
    """Instructions for cross-attention, each distinct one held once.

    Attributes:
        text_UTD: embedded text of U distinct instructions, in the backbone's width; or None when `keys_values` is given.
        rows_B: which of the U each sample has.
        keys_values: per layer (k, v), each (U, T, H, Dh), computed ahead.
    """

    rows_B: Tensor
    text_UTD: Tensor | None = None
    keys_values: tuple[tuple[Tensor, Tensor], ...] | None = None

    def select(self, rows: Tensor) -> Context:
        """The same instructions for some of the samples."""
        return Context(self.rows_B[rows], self.text_UTD, self.keys_values)


def _heads(x: Tensor, attn: WanAttention) -> Tensor:
    return x.unflatten(-1, (attn.heads, -1))


class Block(WanTransformerBlock):
    """A Wan block whose self-attention is passed in; parameters and their names are diffusers' own."""

    def forward(self, x_BLD: Tensor, modulation: Modulation, context: Context, attend: Attend, layer: int = 0) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.of(self.scale_shift_table)

        h = torch.addcmul(shift1, self.norm1(x_BLD.float()), 1 + scale1).type_as(x_BLD)
        q, k, v = self.attn1.norm_q(self.attn1.to_q(h)), self.attn1.norm_k(self.attn1.to_k(h)), self.attn1.to_v(h)
        h = attend(*(_heads(y, self.attn1) for y in (q.type_as(v), k.type_as(v), v))).flatten(2)
        x_BLD = torch.addcmul(x_BLD.float(), self.attn1.to_out[0](h).float(), gate1).type_as(x_BLD)

        x_BLD = x_BLD + self._cross_attention(self.norm2(x_BLD.float()).type_as(x_BLD), context, layer)

        h = torch.addcmul(shift2, self.norm3(x_BLD.float()), 1 + scale2).type_as(x_BLD)
        return torch.addcmul(x_BLD.float(), self.ffn(h).float(), gate2).type_as(x_BLD)

    def text_keys_values(self, text_UTD: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-attention keys and values (U, T, H, Dh) of embedded instructions."""
        k = self.attn2.norm_k(self.attn2.to_k(text_UTD))
        v = self.attn2.to_v(text_UTD)
        return _heads(k.type_as(v), self.attn2), _heads(v, self.attn2)

    def _cross_attention(self, h_BLD: Tensor, context: Context, layer: int) -> Tensor:
        if context.keys_values is not None:
            k, v = context.keys_values[layer]
        else:
            assert context.text_UTD is not None
            k, v = self.text_keys_values(context.text_UTD)
        q = self.attn2.to_q(h_BLD)
        q = _heads(self.attn2.norm_q(q).type_as(v), self.attn2)
        if k.shape[0] == 1:
            k, v = k.expand(len(q), -1, -1, -1), v.expand(len(q), -1, -1, -1)
        else:
            k, v = k.index_select(0, context.rows_B), v.index_select(0, context.rows_B)
        return self.attn2.to_out[0](attention(q, k, v).flatten(2))


class Backbone(WanTransformer3DModel):
    """`WanTransformer3DModel` with our forward; saves, loads and adapts (LoRA) as diffusers' own."""

    _no_split_modules = ["Block"]
    _repeated_blocks = ["Block"]

    @functools.wraps(WanTransformer3DModel.__init__)  # diffusers reads a model's config keys off this signature
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for block in self.blocks:
            block.__class__ = Block  # the same parameters under the same names, another forward

    @property
    def width(self) -> int:
        """D: heads x head_dim."""
        return self.config.num_attention_heads * self.config.attention_head_dim

    def embed_video(self, latents_BCFHW: Tensor) -> Tensor:
        """Patch tokens (B, F * P, D), frame by frame."""
        return self.patch_embedding(latents_BCFHW).flatten(2).transpose(1, 2)

    def embed_levels(self, levels: Levels) -> Modulation:
        """Embed the distinct levels, in float32."""
        embedder = self.condition_embedder
        sigma = levels.sigma_BK
        sinusoid = embedder.timesteps_proj(sigma.flatten() * TIMESTEPS).view(*sigma.shape, -1)
        temb = embedder.time_embedder(sinusoid.type_as(embedder.time_proj.weight))
        shifts = embedder.time_proj(embedder.act_fn(temb)).unflatten(-1, (6, -1))
        return Modulation(temb, shifts, levels.index_L)

    def embed_text(self, text_UTE: Tensor, rows_B: Tensor) -> Context:
        """Project text-encoder states of U distinct instructions into the backbone's width."""
        return Context(rows_B, self.condition_embedder.text_embedder(text_UTE))

    def prepare_context(self, context: Context) -> Context:
        """Compute every layer's cross-attention keys and values, once per instruction."""
        assert context.text_UTD is not None
        return Context(context.rows_B, None, tuple(block.text_keys_values(context.text_UTD) for block in self.blocks))

    def video_head(self, x_BLD: Tensor, modulation: Modulation, tokens: slice, grid: tuple[int, int]) -> Tensor:
        """Tokens of whole frames to latents (B, C, F, h, w)."""
        shift, scale = modulation.head(self.scale_shift_table, tokens)
        x = self.proj_out(torch.addcmul(shift, self.norm_out(x_BLD[:, tokens].float()), 1 + scale).type_as(x_BLD))
        (p_t, p_h, p_w), (rows, columns) = self.config.patch_size, grid
        x = x.view(len(x), -1, rows, columns, p_t, p_h, p_w, self.config.out_channels)
        return x.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)

    def run(self, x_BLD: Tensor, modulation: Modulation, context: Context, attends: Callable[[int], Attend]) -> Tensor:
        """All blocks; `attends(layer)` says how that layer's queries meet keys."""
        for layer, block in enumerate(self.blocks):
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x_BLD = self._gradient_checkpointing_func(block, x_BLD, modulation, context, attends(layer), layer)
            else:
                x_BLD = block(x_BLD, modulation, context, attends(layer), layer)
        return x_BLD

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Not used: a world action model has three paths of its own (`wam.model.wam`)."""
        raise RuntimeError("Backbone has no forward of its own; call WorldActionModel.forward_train, prefill or denoise")


@torch.no_grad()
def initialise(backbone: Backbone, seed: int) -> None:
    """Initialise a backbone that is trained from scratch: a plain pre-norm transformer that modulation and text act on only as they learn to.

    Weights are normal with variance 1 / fan-in; what is added to the residual stream is scaled down by the number of additions; shifts,
    scales and the video head start at 0, gates at 1.
    """
    generator = torch.Generator().manual_seed(seed)
    additions = 3 * len(backbone.blocks)
    for name, parameter in backbone.named_parameters():
        if "norm" in name:
            continue
        if "scale_shift_table" in name:
            parameter.zero_()
            if name.startswith("blocks."):
                parameter[:, [2, 5]] = 1
        elif parameter.ndim < 2 or name.startswith("proj_out"):
            parameter.zero_()
        else:
            deviation = parameter[0].numel() ** -0.5
            if "time_proj" in name:
                deviation *= 0.02
            elif name.endswith(("to_out.0.weight", "ffn.net.2.weight")):
                deviation *= additions**-0.5
            parameter.normal_(0, deviation, generator=generator)
    for block in backbone.blocks:
        _look_at_the_same_place(block.attn1, backbone.config.attention_head_dim)


def _look_at_the_same_place(attn: WanAttention, head_dim: int) -> None:
    """Bias half of the heads, at first, to attend to their own row and column, at any time.

    Most of a video is what was there before.  Constant queries and keys in the fastest rotary pairs of an axis make scores that
    fall with the distance along it; without them a small network spends most of a short training on finding that out.
    """
    spatial = 2 * (head_dim // 6)
    bias = torch.zeros(attn.heads, head_dim)
    for axis in range(2):
        first = head_dim - 2 * spatial + axis * spatial
        bias[: attn.heads // 2, first], bias[: attn.heads // 2, first + 2] = 5.0, 3.0
    attn.to_q.bias.copy_(bias.flatten())
    attn.to_k.bias.copy_(bias.flatten())
