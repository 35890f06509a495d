"""An action expert: blocks of its own, of any width, that share the attention of the video blocks (a mixture of transformers).

    video tokens   --> Block N -----.               same heads x head_dim on both sides,
                                     |  one softmax  so queries, keys and values meet in one attention
    action tokens  --> Expert N ----'               norms, projections, feed-forward, text and levels: each its own

Action tokens then cost what their width costs, not what the video's does.  Names are diffusers' own, so a video checkpoint can be
interpolated into an expert (`wam.model.loading`), as Fast-WAM does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.attention import FeedForward
from diffusers.models.embeddings import PixArtAlphaTextProjection, TimestepEmbedding, Timesteps
from diffusers.models.normalization import FP32LayerNorm
from diffusers.models.transformers.transformer_wan import WanAttention
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from wam.model.backbone import Attend, Backbone, Context, Levels, Modulation, Uncompiled, block_forward, embed_levels, text_keys_values


class TimeEmbedder(nn.Module):
    """Levels to modulations: the part of diffusers' `condition_embedder` that deals with time, under its names."""

    def __init__(self, width: int, freq_dim: int):
        super().__init__()
        self.timesteps_proj = Timesteps(num_channels=freq_dim, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedder = TimestepEmbedding(in_channels=freq_dim, time_embed_dim=width)
        self.time_proj = nn.Linear(width, 6 * width)

    def forward(self, levels: Levels) -> Modulation:
        """Embed K levels."""
        return embed_levels(self, levels)


class TimeTextEmbedder(TimeEmbedder):
    """Levels and instructions, in the expert's width."""

    def __init__(self, width: int, freq_dim: int, text_dim: int):
        super().__init__(width, freq_dim)
        self.text_embedder = PixArtAlphaTextProjection(text_dim, width, act_fn="gelu_tanh")


class ExpertBlock(nn.Module):
    """A Wan block whose tokens are `width` wide and whose attention is heads x head_dim wide."""

    def __init__(self, width: int, ffn_dim: int, heads: int, head_dim: int, eps: float):
        super().__init__()
        self.norm1 = FP32LayerNorm(width, eps, elementwise_affine=False)
        self.attn1 = WanAttention(dim=width, heads=heads, dim_head=head_dim, eps=eps)
        self.attn2 = WanAttention(dim=width, heads=heads, dim_head=head_dim, eps=eps, cross_attention_dim_head=head_dim)
        self.norm2 = FP32LayerNorm(width, eps, elementwise_affine=True)
        self.ffn = FeedForward(width, inner_dim=ffn_dim, activation_fn="gelu-approximate")
        self.norm3 = FP32LayerNorm(width, eps, elementwise_affine=False)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, width) * width**-0.5)

    forward = block_forward


class Expert(nn.Module):
    """As many blocks as the backbone has, for states and actions."""

    def __init__(self, width: int, ffn_dim: int, backbone: Backbone):
        super().__init__()
        c = backbone.config
        self.width = width
        self.condition_embedder = TimeTextEmbedder(width, c.freq_dim, c.text_dim)
        self.blocks = nn.ModuleList(ExpertBlock(width, ffn_dim, c.num_attention_heads, c.attention_head_dim, c.eps) for _ in range(c.num_layers))

    def embed_text(self, text_UTE: Tensor, rows_B: Tensor) -> Context:
        """Project text-encoder states of U distinct instructions into the expert's width."""
        return Context(rows_B, self.condition_embedder.text_embedder(text_UTE))

    def prepare_context(self, context: Context) -> Context:
        """Compute every layer's cross-attention keys and values, once per instruction."""
        assert context.text_UTD is not None
        return Context(context.rows_B, context.text_UTD, tuple(text_keys_values(block.attn2, context.text_UTD) for block in self.blocks))

    def run(self, x_BLE: Tensor, modulation: Modulation, context: Context, attends: Callable[[int], Attend]) -> Tensor:
        """All blocks on action tokens alone: what an action step against a cache needs."""
        for layer, block in enumerate(self.blocks):
            x_BLE = block(x_BLE, modulation, context.of_layer(layer), attends(layer))
        return x_BLE


def run_both(
    backbone: Backbone,
    expert: Expert,
    video: tuple[Tensor, Modulation, Context],
    action: tuple[Tensor, Modulation, Context],
    attends: Callable[[int], Attend],
) -> tuple[Tensor, Tensor]:
    """Video and action tokens through their own blocks, with one attention over both (video tokens first)."""
    (x_BLD, video_modulation, video_context), (x_BAE, action_modulation, action_context) = video, action

    def layer_of(layer: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        def forward(x_BLD: Tensor, x_BAE: Tensor) -> tuple[Tensor, Tensor]:
            return _meet(
                lambda x, attend: backbone.blocks[layer](x, video_modulation, video_context.of_layer(layer), attend),
                lambda x, attend: expert.blocks[layer](x, action_modulation, action_context.of_layer(layer), attend),
                x_BLD,
                x_BAE,
                attends(layer),
            )

        return forward

    for layer in range(len(backbone.blocks)):
        forward = layer_of(layer)
        if torch.is_grad_enabled() and backbone.gradient_checkpointing:
            x_BLD, x_BAE = checkpoint(forward, x_BLD, x_BAE, use_reentrant=False)
        else:
            x_BLD, x_BAE = forward(x_BLD, x_BAE)
    return x_BLD, x_BAE


def _meet(video: Callable[..., Any], action: Callable[..., Any], x_BLD: Tensor, x_BAE: Tensor, attend: Attend) -> tuple[Tensor, Tensor]:
    """Call one block inside the attention of the other, so that each stays a whole module call (sharding and hooks act on those)."""
    apart: Callable[[Attend], Attend] = Uncompiled if isinstance(attend, Uncompiled) else lambda own: own  # or one block would be compiled into the other
    videos: list[Tensor] = []
    actions: list[Tensor] = []

    def of_actions(q_a: Tensor, k_a: Tensor, v_a: Tensor) -> Tensor:
        def of_video(q_v: Tensor, k_v: Tensor, v_v: Tensor) -> Tensor:
            out = attend(*(torch.cat(pair, dim=1) for pair in ((q_v, q_a), (k_v, k_a), (v_v, v_a))))
            actions.append(out[:, q_v.shape[1] :])
            return out[:, : q_v.shape[1]]

        videos.append(video(x_BLD, apart(of_video)))
        return actions[0]

    x_BAE = action(x_BAE, apart(of_actions))
    return videos[0], x_BAE
