"""States and actions into the stream, and actions out of it.  Each embodiment has its own weights, chosen by name, or all share one set.

The published answers differ in a few layers:

    in     level_mlp    an action joined with its noise level, mixed (DreamZero, GR00T)        linear   one projection (Fast-WAM, LingBot-VA)
    out    modulated_mlp (ours)   mlp (DreamZero)   linear (Fast-WAM)   modulated_linear (LingBot-VA; the norm is the video head's own)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from wam.config import EmbodimentConfig, ModelConfig
from wam.model.backbone import Modulation, modulate


class EmbodimentLinear(nn.Module):
    """A linear layer per embodiment, applied per sample: (B, n, in) -> (B, n, out)."""

    def __init__(self, embodiments: int, features_in: int, features_out: int, zero: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(embodiments, features_in, features_out))
        self.bias = nn.Parameter(torch.zeros(embodiments, features_out))
        if not zero:
            nn.init.normal_(self.weight, std=features_in**-0.5)

    def forward(self, x_BnI: Tensor, embodiment_B: Tensor) -> Tensor:
        """Apply each sample's own weights."""
        if self.weight.shape[0] == 1:
            return nn.functional.linear(x_BnI, self.weight[0].T, self.bias[0])
        return torch.baddbmm(self.bias[embodiment_B].unsqueeze(1), x_BnI, self.weight[embodiment_B])


def activate(config: ModelConfig, x: Tensor) -> Tensor:
    """The hidden layer's nonlinearity."""
    return nn.functional.silu(x) if config.activation == "silu" else nn.functional.relu(x)


def sinusoid(timestep: Tensor, dim: int) -> Tensor:
    """Sine and cosine features of timesteps in 0..1000: (...) -> (..., dim) float32."""
    half = dim // 2
    frequencies = torch.exp(-torch.arange(half, device=timestep.device, dtype=torch.float32) * (math.log(10000.0) / half))
    angle = timestep.float().unsqueeze(-1) * frequencies
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


def channels_of(robot: EmbodimentConfig) -> list[int]:
    """Where a robot's action dimensions lie in the padded vector."""
    return list(robot.action_channels or range(robot.action_dim))


def channel_masks(config: ModelConfig) -> Tensor:
    """(embodiments, actions): 1 where a robot has an action channel."""
    out = torch.zeros(len(config.embodiments), config.actions)
    for row, robot in enumerate(config.embodiments):
        out[row, channels_of(robot)] = 1
    return out


def pad_actions(config: ModelConfig, robot: EmbodimentConfig, actions: Tensor) -> Tensor:
    """A robot's actions (..., action_dim) in the padded vector (..., actions), zero elsewhere."""
    out = actions.new_zeros(*actions.shape[:-1], config.actions)
    out[..., channels_of(robot)] = actions
    return out


def pad_states(config: ModelConfig, states: Tensor) -> Tensor:
    """A robot's states (..., state_dim) in the padded vector (..., states), zero elsewhere."""
    return nn.functional.pad(states, (0, config.states - states.shape[-1]))


def _sets(config: ModelConfig) -> int:
    """Sets of embodiment weights."""
    return 1 if config.embodiment_weights == "shared" else len(config.embodiments)


class ActionEncoder(nn.Module):
    """An action, and with `level_mlp` its noise level, to a token."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        sets, width = _sets(config), config.token_width
        self.width = width
        self.embed = EmbodimentLinear(sets, config.actions, width)
        self.with_level = config.action_embed == "level_mlp"
        if self.with_level:
            self.join = EmbodimentLinear(sets, 2 * width, width)
            self.mix = EmbodimentLinear(sets, width, width)

    def forward(self, action_BnA: Tensor, timestep_Bn: Tensor, embodiment_B: Tensor) -> Tensor:
        """(B, n, actions), timesteps (B, n) or (B, 1) -> (B, n, D)."""
        token = self.embed(action_BnA, embodiment_B)
        if not self.with_level:
            return token
        level = sinusoid(timestep_Bn, self.width).type_as(token).expand_as(token)
        return self.mix(nn.functional.silu(self.join(torch.cat([token, level], dim=-1), embodiment_B)), embodiment_B)


class StateEncoder(nn.Module):
    """A robot's state to a token of the stream (two layers) or of the text (one, in the text encoder's width)."""

    def __init__(self, config: ModelConfig, text_width: int):
        super().__init__()
        self.config, sets = config, _sets(config)
        hidden = text_width if config.state == "context" else config.mlp_hidden or config.token_width
        self.embed = EmbodimentLinear(sets, config.states, hidden)
        if config.state == "token":
            self.mix = EmbodimentLinear(sets, hidden, config.token_width)

    def forward(self, state_BnS: Tensor, embodiment_B: Tensor) -> Tensor:
        """(B, n, states) -> (B, n, D), or (B, n, text width)."""
        x = self.embed(state_BnS, embodiment_B)
        return self.mix(activate(self.config, x), embodiment_B) if self.config.state == "token" else x


class ActionDecoder(nn.Module):
    """Action tokens to the velocity of the actions; from scratch it starts at zero."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config, sets, width = config, _sets(config), config.token_width
        if config.action_head == "modulated_mlp":
            self.norm = nn.LayerNorm(width, elementwise_affine=False)
            self.table = nn.Parameter(torch.randn(1, 2, width) * width**-0.5)
        hidden = width
        if config.action_head in ("modulated_mlp", "mlp"):
            hidden = config.mlp_hidden or width
            self.mix = EmbodimentLinear(sets, width, hidden)
        self.out = EmbodimentLinear(sets, hidden, config.actions, zero=True)

    def forward(self, x_BnD: Tensor, modulation: Modulation, embodiment_B: Tensor) -> Tensor:
        """(B, n, D) and its levels -> (B, n, actions).  `modulated_linear` expects tokens that the video head's norm has passed."""
        if self.config.action_head == "modulated_mlp":
            x_BnD = modulate(self.norm(x_BnD.float()), *modulation.head(self.table), modulation.runs).type_as(x_BnD)
        if self.config.action_head in ("modulated_mlp", "mlp"):
            x_BnD = activate(self.config, self.mix(x_BnD, embodiment_B))
        return self.out(x_BnD, embodiment_B)
