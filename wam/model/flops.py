"""Floating-point operations, counted from sizes: what a stage has to compute, whatever kernel does it.

A multiply and an add are two.  Counted are matrix products: projections, attention (over the pairs of queries and keys that see each
other), feed-forward, cross-attention, the embedding of levels, patches and actions, and the heads.  Not counted is what is linear in
the tokens (norms, modulation, softmax), below one in a hundred at released sizes.  `torch.utils.flop_counter` agrees exactly.

    forward            1
    backward           2 with weight gradients, 1 without (adapters); checkpointing computes more, which no task asks for: not counted
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from wam.config import Config
from wam.relations import Mode, Reach
from wam.timeline import ACTION_KINDS, VIDEO_KINDS, Kind, Layout


@dataclass(frozen=True)
class Work:
    """What goes through the network for one row of a batch.

    Attributes:
        video, action: tokens of either kind (states and actions together).
        pairs: of queries and keys in self-attention, all tokens together.
        video_levels, action_levels: distinct noise levels that are embedded.
        predicted, acted: tokens that the video head, and that the action head is applied to.
        states, values: of the action tokens, those that are states, and those that are values.
        instructions: texts that are projected, and whose cross-attention keys and values are computed, for this row; 0: ahead.
        images: likewise.
    """

    video: int
    action: int
    pairs: int
    video_levels: int = 1
    action_levels: int = 1
    predicted: int = 0
    acted: int = 0
    states: int = 0
    instructions: int = 0
    images: int = 0
    values: int = 0


def linear(tokens: int, inputs: int, outputs: int) -> int:
    """A matrix product: every token's `inputs` numbers to `outputs`."""
    return 2 * tokens * inputs * outputs


def forward_flops(config: Config, work: Work) -> int:
    """Of one row's forward pass."""
    m = config.model
    inner, narrow = m.width, m.token_width
    video_ffn, action_ffn = m.ffn_dim, (m.expert_ffn_dim or 4 * narrow) if m.expert_width else m.ffn_dim
    blocks = m.layers * (_block(config, work.video, inner, video_ffn) + _block(config, work.action, narrow, action_ffn) + 4 * work.pairs * inner)
    embed = linear(work.video, _patch(config, inputs=True), inner) + linear(work.predicted, inner, _patch(config, inputs=False))
    return blocks + embed + _conditions(config, work) + _levels(config, work) + _actions(config, work)


def _block(config: Config, tokens: int, width: int, ffn: int) -> int:
    """Projections, cross-attention and feed-forward of one layer, for tokens of a width; self-attention's pairs are counted apart."""
    m = config.model
    seen = config.text.max_tokens + (257 if m.image_dim is not None and width == m.width else 0)
    return linear(tokens, width, m.width) * 6 + 4 * tokens * seen * m.width + linear(tokens, width, ffn) * 2


def _patch(config: Config, inputs: bool) -> int:
    channels = config.codec.channels
    extra = config.timeline.temporal_stride + channels if inputs and config.model.first_frame == "concat" else 0
    return (channels + extra) * config.model.patch[1] * config.model.patch[2]


def _conditions(config: Config, work: Work) -> int:
    """Text and image to the blocks' width, and every layer's keys and values of them."""
    m, text = config.model, work.instructions * config.text.max_tokens
    total = 0
    for width in (m.width, *([m.token_width] if m.expert_width else [])):
        total += linear(text, config.text.width, width) + linear(text, width, width) + m.layers * 2 * linear(text, width, m.width)
    if m.image_dim is not None and work.images:
        total += linear(257 * work.images, m.image_dim, m.image_dim) + linear(257 * work.images, m.image_dim, m.width) + m.layers * 2 * linear(257 * work.images, m.width, m.width)
    return total


def _levels(config: Config, work: Work) -> int:
    m = config.model
    sides = ((work.video, work.video_levels, m.width), (work.action, work.action_levels, m.token_width))
    return sum(linear(levels, m.freq_dim, width) + 7 * linear(levels, width, width) for tokens, levels, width in sides if tokens)


def _actions(config: Config, work: Work) -> int:
    m, actions = config.model, work.action - work.states - work.values
    width, hidden = m.token_width, m.mlp_hidden or m.token_width
    into = linear(actions, m.actions, width) + (linear(actions, 2 * width, width) + linear(actions, width, width) if m.action_embed == "level_mlp" else 0)
    states = linear(work.states, m.states, hidden) + linear(work.states, hidden, width) if m.state == "token" else 0
    mlp = m.action_head in ("modulated_mlp", "mlp")
    out = linear(work.acted, width, hidden) + linear(work.acted, hidden, m.actions) if mlp else linear(work.acted, width, m.actions)
    value = linear(work.values, width, width) + linear(work.values, width, 1)
    return into + states + out + value


# ------------------------------------------------------------------------------------------------ of what is measured


def step_work(tokens: dict[Kind, int], cached: int) -> Work:
    """A denoising step of one block at one level, or a segment that is written: all of its tokens see each other and `cached` more."""
    video = sum(n for kind, n in tokens.items() if kind in VIDEO_KINDS)
    action = sum(tokens.values()) - video
    return Work(video, action, (video + action) * (cached + video + action), predicted=tokens.get(Kind.V, 0), acted=tokens.get(Kind.A, 0), states=tokens.get(Kind.S, 0))


def window_work(config: Config, layout: Layout, pairs: int) -> Work:
    """A training window: one level per frame of video and per noisy action, one for all that is clean among states and actions."""

    def count(*kinds: Kind) -> int:
        return sum(s.tokens for s in layout.segments if s.kind in kinds)

    m, video = config.model, count(*VIDEO_KINDS)
    patches = math.prod(size // config.codec.patch // p for size, p in zip(config.codec.image_size, m.patch[1:], strict=True))
    action, clean = count(*ACTION_KINDS, Kind.S, Kind.R), sum(bool(count(kind)) for kind in (Kind.S, Kind.AC, Kind.R))
    image = int(m.image_dim is not None)
    return Work(video, action, pairs, video // patches, count(Kind.A) + clean, count(Kind.V), count(Kind.A), count(Kind.S), instructions=1, images=image, values=count(Kind.R))


def training_flops(config: Config, layout: Layout, modes: Sequence[Mode], reach: Reach) -> tuple[dict[str, int], int]:
    """What a training step computes for one window in each mode, and for every distinct instruction of a batch: forward and backward.

    Attention is counted over the pairs that see each other in the mode (masked, not dense), backward as two forwards, or as one where the
    backbone is frozen under adapters.  Frozen parts (codec, pretrained text and image encoders) and the small embedded text encoder are not counted.
    """
    passes = 2 if config.model.lora is not None else 3
    by_mode, instruction = {}, 0
    for mode in modes:
        whole = window_work(config, layout, seen_pairs(mode, layout, reach))
        alone = forward_flops(config, replace(whole, instructions=0))
        by_mode[mode.name], instruction = passes * alone, passes * (forward_flops(config, whole) - alone)
    return by_mode, instruction


def seen_pairs(mode: Mode, layout: Layout, reach: Reach) -> int:
    """Pairs of queries and keys that see each other in a window, in one mode."""
    kinds, blocks, tokens = (torch.tensor([value(s) for s in layout.segments]) for value in (lambda s: int(s.kind), lambda s: s.block, lambda s: s.tokens))
    return int((mode.table.mask(kinds, blocks, kinds, blocks, reach) * tokens[:, None] * tokens[None, :]).sum())
