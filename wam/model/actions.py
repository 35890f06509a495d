"""States and actions into the stream, and actions out of it.  Each embodiment has its own weights, chosen by name."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from wam.config import EmbodimentConfig
from wam.flow import TIMESTEPS


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


def sinusoid(sigma: Tensor, dim: int) -> Tensor:
    """Sine and cosine features of noise levels: (...) -> (..., dim) float32, on timesteps 1000 sigma."""
    half = dim // 2
    frequencies = torch.exp(-torch.arange(half, device=sigma.device, dtype=torch.float32) * (9.210340371976184 / half))
    angle = sigma.float().unsqueeze(-1) * TIMESTEPS * frequencies
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


class ActionEncoder(nn.Module):
    """An action and its noise level to a token (as DreamZero and GR00T: project, join with the level, mix)."""

    def __init__(self, embodiments: tuple[EmbodimentConfig, ...], width: int):
        super().__init__()
        dim = max(e.action_dim for e in embodiments)
        self.width = width
        self.embed = EmbodimentLinear(len(embodiments), dim, width)
        self.join = EmbodimentLinear(len(embodiments), 2 * width, width)
        self.mix = EmbodimentLinear(len(embodiments), width, width)

    def forward(self, action_BnA: Tensor, sigma_Bn: Tensor, embodiment_B: Tensor) -> Tensor:
        """(B, n, action_dim), (B, n) -> (B, n, D)."""
        token = self.embed(action_BnA, embodiment_B)
        level = sinusoid(sigma_Bn, self.width).type_as(token)
        return self.mix(nn.functional.silu(self.join(torch.cat([token, level], dim=-1), embodiment_B)), embodiment_B)


class StateEncoder(nn.Module):
    """A robot's state to a token."""

    def __init__(self, embodiments: tuple[EmbodimentConfig, ...], width: int):
        super().__init__()
        self.embed = EmbodimentLinear(len(embodiments), max(e.state_dim for e in embodiments), width)
        self.mix = EmbodimentLinear(len(embodiments), width, width)

    def forward(self, state_BnS: Tensor, embodiment_B: Tensor) -> Tensor:
        """(B, n, state_dim) -> (B, n, D)."""
        return self.mix(nn.functional.silu(self.embed(state_BnS, embodiment_B)), embodiment_B)


class ActionDecoder(nn.Module):
    """Action tokens to the velocity of the actions; starts at zero."""

    def __init__(self, embodiments: tuple[EmbodimentConfig, ...], width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.table = nn.Parameter(torch.randn(1, 2, width) * width**-0.5)
        self.mix = EmbodimentLinear(len(embodiments), width, width)
        self.out = EmbodimentLinear(len(embodiments), width, max(e.action_dim for e in embodiments), zero=True)

    def forward(self, x_BnD: Tensor, shift_BnD: Tensor, scale_BnD: Tensor, embodiment_B: Tensor) -> Tensor:
        """(B, n, D) and the modulation of its levels -> (B, n, action_dim)."""
        h = torch.addcmul(shift_BnD, self.norm(x_BnD.float()), 1 + scale_BnD).type_as(x_BnD)
        return self.out(nn.functional.silu(self.mix(h, embodiment_B)), embodiment_B)
