"""Wan's 3-D rotary positions at any position, whole or fractional, and a fourth axis off the clock.

A head's channels are split over time, row and column as Wan splits them (h = w = 2 (d // 6), the rest for time); neighbouring channels
form the rotated pairs.  The fourth axis turns the whole head by an index, as DreamZero and Fast-WAM place actions.  Rotations add, so a
token's turn is the sum over its four coordinates and no token needs a rule of its own.

Tables are computed in float64 and used in float32, so they equal diffusers' own at whole positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

THETA = 10000.0


def _frequencies(dim: int, theta: float) -> Tensor:
    return 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)


@dataclass(frozen=True)
class Rotary:
    """Unit complex numbers of a run of tokens, (..., L, 1, head_dim / 2) complex64; `...` is empty or the batch."""

    turn: Tensor

    @staticmethod
    def at(positions: Tensor, head_dim: int, device: torch.device | str = "cpu", theta: float = THETA) -> Rotary:
        """The rotation at positions (..., L, 4): time, row, column, index."""
        spatial = 2 * (head_dim // 6)
        positions = positions.double().cpu()
        axes = [positions[..., axis, None] * _frequencies(dim, theta) for axis, dim in enumerate((head_dim - 2 * spatial, spatial, spatial))]
        angle = (torch.cat(axes, dim=-1) + positions[..., 3, None] * _frequencies(head_dim, theta)).unsqueeze(-2)
        return Rotary(torch.polar(torch.ones_like(angle), angle).to(torch.complex64).to(device))

    def rotate(self, x: Tensor) -> Tensor:
        """Rotate queries or keys (B, L, H, D); computed in float32, returned in the dtype of `x`.

        A pair of channels is one complex number: a single product, several times faster than writing out sines and cosines.
        """
        pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], x.shape[-1] // 2, 2))
        return torch.view_as_real(pairs * self.turn).flatten(-2).type_as(x)
