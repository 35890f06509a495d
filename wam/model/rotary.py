"""Wan's 3-D rotary positions at any position, whole or fractional.

A head's channels are split over time, row and column as Wan splits them (h = w = 2 (d // 6), the rest for time); neighbouring
channels form the rotated pairs.  Tables are computed in float64 and used in float32, so they equal diffusers' own at whole
positions; states and actions take fractional times and row = column = -1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

THETA = 10000.0


@dataclass(frozen=True)
class Rotary:
    """Cosines and sines of a run of tokens, each (..., L, 1, head_dim / 2) float32; `...` is empty or the batch."""

    cos: Tensor
    sin: Tensor

    @staticmethod
    def at(positions: Tensor, head_dim: int, device: torch.device | str = "cpu", theta: float = THETA) -> Rotary:
        """Tables for positions (..., L, 3): time, row, column."""
        spatial = 2 * (head_dim // 6)
        angles = []
        for axis, dim in enumerate((head_dim - 2 * spatial, spatial, spatial)):
            frequencies = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)
            angles.append(positions[..., axis, None].double().cpu() * frequencies)
        angle = torch.cat(angles, dim=-1).unsqueeze(-2)
        return Rotary(angle.cos().float().to(device), angle.sin().float().to(device))

    def rotate(self, x: Tensor) -> Tensor:
        """Rotate queries or keys (B, L, H, D); computed in float32, returned in the dtype of `x`."""
        even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack((even * self.cos - odd * self.sin, even * self.sin + odd * self.cos), dim=-1).flatten(-2).type_as(x)
