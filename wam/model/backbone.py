"""diffusers' Wan transformer, extended and not forked.

Parameters, names, config and loader are `diffusers.WanTransformer3DModel`'s own; any Wan checkpoint in its layout loads here.
What a world action model adds lives in our forward over its blocks:

  * each token has its own noise level: tokens of one level lie side by side, each level is embedded once and broadcast over its run;
  * how queries meet keys is passed in (`Attend`): under a mask in training, against a cache at inference;
  * cross-attention keys and values of an instruction, or of a first frame, can be computed once and passed in.

With no action tokens, one level per frame and everything attending to everything, the output equals diffusers' own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttention, WanTransformerBlock
from torch import Tensor, nn

from wam.model.attention import attention

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # unrotated q, k, v, each (B, L, H, Dh) -> (B, L, H, Dh)
KeysValues = tuple[Tensor, Tensor]


class Uncompiled:
    """An `Attend` that is left out of compiled blocks: what a cache holds, of how many rows, and where it is written must not become part of their code."""

    def __init__(self, attend: Attend):
        self.attend = attend

    @torch.compiler.disable
    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As `attend`."""
        return self.attend(q, k, v)


# ------------------------------------------------------------------------------------------------ noise levels


@dataclass(frozen=True)
class Levels:
    """Noise levels of a sequence: K of them per sample, each the level of a run of tokens.

    Attributes:
        timestep_BK: float32 in 0..1000.
        runs: K lengths that sum to L, the same for every sample of the batch.
    """

    timestep_BK: Tensor
    runs: tuple[int, ...]


@dataclass(frozen=True)
class _Piece:
    """Neighbouring runs of one length: `tokens` of the sequence are `levels` times `run`."""

    tokens: slice
    levels: slice
    run: int


@functools.lru_cache(maxsize=512)
def _pieces(runs: tuple[int, ...]) -> tuple[_Piece, ...]:
    pieces, token, level = [], 0, 0
    while level < len(runs):
        stop = level
        while stop < len(runs) and runs[stop] == runs[level]:
            stop += 1
        size = (stop - level) * runs[level]
        pieces.append(_Piece(slice(token, token + size), slice(level, stop), runs[level]))
        token, level = token + size, stop
    return tuple(pieces)


@functools.lru_cache(maxsize=512)
def _cut(runs: tuple[int, ...], start: int, stop: int) -> tuple[slice, tuple[int, ...]]:
    """The levels of tokens start..stop, and how many of these tokens each has."""
    lengths: list[int] = []
    first, offset = 0, 0
    for level, run in enumerate(runs):
        inside = min(stop, offset + run) - max(start, offset)
        if inside > 0:
            first = first if lengths else level
            lengths.append(inside)
        offset += run
    return slice(first, first + len(lengths)), tuple(lengths)


@dataclass(frozen=True)
class Modulation:
    """Embedded levels: `temb_BKD` for the heads, `shifts_BK6D` for the blocks, and the runs of tokens they hold for."""

    temb_BKD: Tensor
    shifts_BK6D: Tensor
    runs: tuple[int, ...]

    def of(self, table_16D: Tensor) -> tuple[Tensor, ...]:
        """A block's six modulations (shift, scale, gate, twice), each (B, K, D) float32."""
        return (table_16D.unsqueeze(0) + self.shifts_BK6D.float()).unbind(dim=2)

    def head(self, table_12D: Tensor) -> tuple[Tensor, Tensor]:
        """Shift and scale of an output head, each (B, K, D)."""
        shift, scale = (table_12D.unsqueeze(0) + self.temb_BKD.float().unsqueeze(2)).unbind(dim=2)
        return shift, scale

    def narrow(self, tokens: slice) -> Modulation:
        """The levels of a run of tokens."""
        levels, runs = _cut(self.runs, tokens.start, tokens.stop)
        return Modulation(self.temb_BKD[:, levels], self.shifts_BK6D[:, levels], runs)

    def split(self, runs: Sequence[tuple[int, ...]]) -> list[Modulation]:
        """The levels of several sequences that were embedded together, one after the other."""
        counts = [len(r) for r in runs]
        parts = zip(self.temb_BKD.split(counts, 1), self.shifts_BK6D.split(counts, 1), runs, strict=True)
        return [Modulation(temb, shifts, own) for temb, shifts, own in parts]

    @staticmethod
    def cat(parts: Sequence[Modulation]) -> Modulation:
        """One sequence after the other."""
        if len(parts) == 1:
            return parts[0]
        return Modulation(torch.cat([p.temb_BKD for p in parts], 1), torch.cat([p.shifts_BK6D for p in parts], 1), tuple(r for p in parts for r in p.runs))


def modulate(h_BLD: Tensor, shift_BKD: Tensor, scale_BKD: Tensor, runs: tuple[int, ...]) -> Tensor:
    """`h * (1 + scale) + shift`, each level over its run; nothing of size (B, L, D) but the result is made."""
    if len(runs) == 1:  # the usual case where tokens are denoised
        return torch.addcmul(shift_BKD, h_BLD, 1 + scale_BKD)
    return _join([torch.addcmul(_level(shift_BKD, p), _run(h_BLD, p), 1 + _level(scale_BKD, p)).flatten(1, 2) for p in _pieces(runs)])


def add_gated(x_BLD: Tensor, h_BLD: Tensor, gate_BKD: Tensor, runs: tuple[int, ...]) -> Tensor:
    """`x + gate * h` in float32, each level over its run; in the dtype of `x`."""
    if len(runs) == 1:
        return torch.addcmul(x_BLD.float(), h_BLD.float(), gate_BKD).type_as(x_BLD)
    out = [torch.addcmul(_run(x_BLD, p).float(), _run(h_BLD, p).float(), _level(gate_BKD, p)).flatten(1, 2) for p in _pieces(runs)]
    return _join(out).type_as(x_BLD)


def _run(x_BLD: Tensor, piece: _Piece) -> Tensor:
    return x_BLD[:, piece.tokens].unflatten(1, (-1, piece.run))


def _level(row_BKD: Tensor, piece: _Piece) -> Tensor:
    return row_BKD[:, piece.levels].unsqueeze(2)


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


class ExactTimesteps(nn.Module):
    """diffusers' `Timesteps` with angles in float64: cosines, then sines, (n,) -> (n, dim) float32, as Wan's own code has them."""

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim

    def forward(self, timesteps: Tensor) -> Tensor:
        """(n,) -> (n, dim)."""
        half = self.dim // 2
        frequencies = 10000.0 ** (-torch.arange(half, device=timesteps.device, dtype=torch.float64) / half)
        angle = timesteps.double().unsqueeze(-1) * frequencies
        return torch.cat([angle.cos(), angle.sin()], dim=-1).float()


def embed_levels(embedder: Any, levels: Levels) -> Modulation:
    """Embed K levels with the weights of a `condition_embedder` (diffusers' names): angles in float32, the rest in the weights' own type, also under autocast."""
    t = levels.timestep_BK
    with torch.autocast(t.device.type, enabled=False):
        sinusoid = embedder.timesteps_proj(t.flatten()).view(*t.shape, -1)
        temb = embedder.time_embedder(sinusoid.type_as(embedder.time_proj.weight))
        shifts = embedder.time_proj(nn.functional.silu(temb)).unflatten(-1, (6, -1))
    return Modulation(temb, shifts, levels.runs)


# ------------------------------------------------------------------------------------------------ conditions


@dataclass(frozen=True)
class Context:
    """What cross-attention sees: instructions, each distinct one held once, and per sample the tokens of an image.

    Attributes:
        rows_B: which of the U instructions each sample has.
        text_UTD: embedded text in the width of the blocks; or None when `text_keys_values` is given.
        text_keys_values: per layer (k, v), each (U, T, H, Dh), computed ahead.
        image_BMD, image_keys_values: likewise for the image, one per sample; both None where the model takes none.
        copies: rows of a batch, side by side, that each sample stands for; their queries meet its keys together.
    """

    rows_B: Tensor
    text_UTD: Tensor | None = None
    text_keys_values: tuple[KeysValues, ...] | None = None
    image_BMD: Tensor | None = None
    image_keys_values: tuple[KeysValues, ...] | None = None
    copies: int = 1

    def select(self, rows: Tensor) -> Context:
        """The same for some of the rows, all copies of a sample or none."""
        rows = rows[:: self.copies] // self.copies
        image = None if self.image_BMD is None else self.image_BMD[rows]
        image_kv = None if self.image_keys_values is None else tuple((k[rows], v[rows]) for k, v in self.image_keys_values)
        return Context(self.rows_B[rows], self.text_UTD, self.text_keys_values, image, image_kv, self.copies)

    def of_layer(self, layer: int) -> Context:
        """What one layer needs: of what was computed ahead, its own, so that no block has to know its number."""
        text, image = self.text_keys_values, self.image_keys_values
        return replace(self, text_keys_values=None if text is None else (text[layer],), image_keys_values=None if image is None else (image[layer],))

    def followed_by(self, more: Context) -> Context:
        """Each sample's text, and then the text of `more`; keys and values are joined where both have them, and not computed again."""
        texts = None if self.text_UTD is None or more.text_UTD is None else self._join(self.text_UTD, more.text_UTD, more.rows_B)
        ahead = None
        if self.text_keys_values is not None and more.text_keys_values is not None:
            pairs = zip(self.text_keys_values, more.text_keys_values, strict=True)
            ahead = tuple((self._join(k, k2, more.rows_B), self._join(v, v2, more.rows_B)) for (k, v), (k2, v2) in pairs)
        return replace(self, rows_B=torch.arange(len(self.rows_B), device=self.rows_B.device), text_UTD=texts, text_keys_values=ahead)

    def _join(self, mine: Tensor, theirs: Tensor, rows_B: Tensor) -> Tensor:
        return torch.cat([mine[self.rows_B], theirs[rows_B]], dim=1)


def _heads(x: Tensor, attn: WanAttention) -> Tensor:
    return x.view(*x.shape[:-1], attn.heads, x.shape[-1] // attn.heads)


def text_keys_values(attn: WanAttention, text_UTD: Tensor) -> KeysValues:
    """Cross-attention keys and values (U, T, H, Dh) of embedded instructions."""
    v = attn.to_v(text_UTD)
    return _heads(attn.norm_k(attn.to_k(text_UTD)).type_as(v), attn), _heads(v, attn)


def image_keys_values(attn: WanAttention, image_BMD: Tensor) -> KeysValues:
    """Cross-attention keys and values (B, M, H, Dh) of embedded images."""
    v = attn.add_v_proj(image_BMD)
    return _heads(attn.norm_added_k(attn.add_k_proj(image_BMD)).type_as(v), attn), _heads(v, attn)


def cross_attention(attn: WanAttention, h_BLD: Tensor, context: Context) -> Tensor:
    """Queries over the instruction and, with a softmax of their own, over the image; summed, as in Wan's image-to-video form.

    Args:
        context: of this layer.
    """
    if context.text_keys_values is not None:
        ((k, v),) = context.text_keys_values
    else:
        assert context.text_UTD is not None
        k, v = text_keys_values(attn, context.text_UTD)
    q = _heads(attn.norm_q(attn.to_q(h_BLD)).type_as(v), attn)
    if context.copies > 1:
        q = q.unflatten(0, (-1, context.copies)).flatten(1, 2)
    if k.shape[0] == 1:
        k, v = k.expand(len(q), -1, -1, -1), v.expand(len(q), -1, -1, -1)
    else:
        k, v = k.index_select(0, context.rows_B), v.index_select(0, context.rows_B)
    out = attention(q, k, v)
    if context.image_keys_values is not None:
        out = out + attention(q, *context.image_keys_values[0])
    elif context.image_BMD is not None:
        out = out + attention(q, *image_keys_values(attn, context.image_BMD))
    return attn.to_out[0](out.reshape(h_BLD.shape[0], h_BLD.shape[1], -1))


# ------------------------------------------------------------------------------------------------ blocks


def block_forward(block: Any, x_BLD: Tensor, modulation: Modulation, context: Context, attend: Attend) -> Tensor:
    """One transformer block: modulated self-attention, cross-attention, modulated feed-forward; (B, L, D) -> (B, L, D)."""
    shift1, scale1, gate1, shift2, scale2, gate2 = modulation.of(block.scale_shift_table)
    runs, attn = modulation.runs, block.attn1

    h = modulate(block.norm1(x_BLD.float()), shift1, scale1, runs).type_as(x_BLD)
    q, k, v = attn.norm_q(attn.to_q(h)), attn.norm_k(attn.to_k(h)), attn.to_v(h)
    h = attend(_heads(q.type_as(v), attn), _heads(k.type_as(v), attn), _heads(v, attn))
    x_BLD = add_gated(x_BLD, attn.to_out[0](h.flatten(2)), gate1, runs)

    x_BLD = x_BLD + cross_attention(block.attn2, block.norm2(x_BLD.float()).type_as(x_BLD), context)

    h = modulate(block.norm3(x_BLD.float()), shift2, scale2, runs).type_as(x_BLD)
    return add_gated(x_BLD, block.ffn(h), gate2, runs)


class Block(WanTransformerBlock):
    """A Wan block whose self-attention is passed in; parameters and their names are diffusers' own."""

    forward = block_forward


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

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in; diffusers' own looks at every module to tell, which takes as long as a small step."""
        return self.patch_embedding.weight.dtype

    def embed_video(self, latents_BCFHW: Tensor) -> Tensor:
        """Patch tokens (B, F * P, D), frame by frame."""
        return self.patch_embedding(latents_BCFHW).flatten(2).transpose(1, 2).contiguous()

    def embed_levels(self, levels: Levels) -> Modulation:
        """Embed noise levels."""
        return embed_levels(self.condition_embedder, levels)

    def embed_text(self, text_UTE: Tensor, rows_B: Tensor) -> Context:
        """Project text-encoder states of U distinct instructions into the backbone's width."""
        return Context(rows_B, self.condition_embedder.text_embedder(text_UTE))

    def embed_image(self, context: Context, image_BMI: Tensor) -> Context:
        """The context with each sample's image embeddings (B, M, image_dim)."""
        return replace(context, image_BMD=self.condition_embedder.image_embedder(image_BMI), image_keys_values=None)

    def prepare_context(self, context: Context) -> Context:
        """Compute every layer's cross-attention keys and values that are not there yet: once per instruction, once per image."""
        text, image = context.text_keys_values, context.image_keys_values
        if text is None:
            assert context.text_UTD is not None
            text = tuple(text_keys_values(block.attn2, context.text_UTD) for block in self.blocks)
        if image is None and context.image_BMD is not None:
            image = tuple(image_keys_values(block.attn2, context.image_BMD) for block in self.blocks)
        return replace(context, text_keys_values=text, image_keys_values=image)

    def video_head(self, x_BLD: Tensor, modulation: Modulation, grid: tuple[int, int]) -> Tensor:
        """Tokens of whole frames, with their levels, to latents (B, C, F, h, w)."""
        x = self.head_tokens(x_BLD, modulation)
        (p_t, p_h, p_w), (rows, columns) = self.config.patch_size, grid
        x = x.view(len(x), -1, rows, columns, p_t, p_h, p_w, self.config.out_channels)
        return x.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)

    def head_tokens(self, x_BLD: Tensor, modulation: Modulation) -> Tensor:
        """Tokens to what the video head puts out per token, (B, L, patch * C), patch first."""
        return self.proj_out(self.norm_head(x_BLD, modulation))

    def norm_head(self, x_BLD: Tensor, modulation: Modulation) -> Tensor:
        """Tokens normalised and modulated by the output head's table."""
        return modulate(self.norm_out(x_BLD.float()), *modulation.head(self.scale_shift_table), modulation.runs).type_as(x_BLD)

    def run(self, x_BLD: Tensor, modulation: Modulation, context: Context, attends: Callable[[int], Attend]) -> Tensor:
        """All blocks; `attends(layer)` says how that layer's queries meet keys."""
        for layer, block in enumerate(self.blocks):
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x_BLD = self._gradient_checkpointing_func(block, x_BLD, modulation, context.of_layer(layer), attends(layer))
            else:
                x_BLD = block(x_BLD, modulation, context.of_layer(layer), attends(layer))
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
