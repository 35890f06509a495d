"""The value head: what will come of an episode, read off one token a block.

    R of a block sees    the past, and of its own block either its actions or its video           and is seen by nobody
    value of the action  Q(s, a)     before anything is done: which of several plans is best
    value of the outcome V(s')       of frames that came, or that were imagined to come

The token is a learned one at noise level 0, beside the actions; its head puts out a logit.  Both kinds of value are numbers in 0..1 of the
moment at which the block ends, and the target of a cross-entropy, whose minimum is their mean over what may happen:

    success     exp(-steps until success / horizon), 0 where it never comes: the chance of success, discounted (without a horizon: the bare chance)
    progress    1 - steps until success / horizon, not below 0; 0 where it never comes
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from wam.config import ModelConfig


class ValueHead(nn.Module):
    """The value token, and what reads it; from scratch every value begins at one half."""

    def __init__(self, width: int):
        super().__init__()
        self.token = nn.Parameter(torch.randn(width) * width**-0.5)
        self.norm = nn.LayerNorm(width)
        self.mix = nn.Linear(width, width)
        self.out = nn.Linear(width, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def tokens(self, batch: int, count: int) -> Tensor:
        """(B, n, E): the token, before the first block."""
        return self.token.expand(batch, count, -1)

    def forward(self, x_BnE: Tensor) -> Tensor:
        """Tokens after the last block to logits (B, n), float32."""
        return self.out(nn.functional.silu(self.mix(self.norm(x_BnE.type_as(self.token))))).squeeze(-1).float()


def value_target(config: ModelConfig, steps: Tensor) -> Tensor:
    """Control steps until success to values in 0..1: inf (it never comes) to 0, 0 (it is there) to 1."""
    if config.value_horizon is None:
        return steps.isfinite().to(steps.dtype)
    if config.value == "progress":
        return (1 - steps / config.value_horizon).clamp_min(0)
    return torch.exp(-steps / config.value_horizon)


def value_errors(logit: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of every value above the least there could be (the target's own entropy), so that the right value costs nothing."""
    least = torch.special.entr(target) + torch.special.entr(1 - target)
    return nn.functional.binary_cross_entropy_with_logits(logit.float(), target, reduction="none") - least
