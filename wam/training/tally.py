"""Sums of losses and gradient norms that stay on the device until they are shown.

A GPU is never asked for a number between two records: errors are added up where they are, by mode and by noise level, and fetched as one
vector, summed over all processes.  So a shown loss is the mean over everything that was supervised since the last record, on any number
of processes.

    errors (B,) or (B, tokens)  --index_add-->  [part, mode | level bin, (sum, count)]  --once per record-->  engine.sum, host
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from wam.training.engine import Engine
from wam.training.objective import PARTS, Losses, Part

BINS = 10  # of noise levels, equally wide in sigma 0..1


class Tally:
    """Sums since the last `take`."""

    def __init__(self, modes: Sequence[str], device: torch.device, reduction: str = "supervised", values: bool = False):
        """`values`: there is a value head."""
        self.modes, self.device, self.reduction = list(modes), device, reduction
        self.parts = PARTS if values else PARTS[:-1]
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.whole = torch.zeros(len(self.parts), 2, dtype=torch.float64, device=self.device)
        self.by_mode = torch.zeros(len(self.parts), len(self.modes), 2, dtype=torch.float64, device=self.device)
        self.by_level = torch.zeros(len(self.parts), BINS, 2, dtype=torch.float64, device=self.device)
        self.norm = torch.zeros(2, dtype=torch.float64, device=self.device)

    @torch.no_grad()
    def add(self, losses: Losses) -> None:
        """Take in a batch's errors; waits for nothing."""
        rows = torch.tensor([self.modes.index(m) for m in losses.modes]).to(self.device, non_blocking=True)
        for index, part in enumerate(losses.parts):
            pair = torch.stack([part.sum_B, part.count_B], dim=1).detach().double()
            self.by_mode[index].index_add_(0, rows, pair)
            self.whole[index] += _fraction(part, self.reduction)
            if part.error_BU is not None and part.weight_BU is not None and part.sigma_BU is not None:
                bins = (part.sigma_BU * BINS).long().clamp(0, BINS - 1).flatten()
                self.by_level[index].index_add_(0, bins, torch.stack([part.error_BU.flatten(), part.weight_BU.flatten()], dim=1).double())

    @torch.no_grad()
    def add_norm(self, norm: Tensor | float) -> None:
        """Take in the norm of a step's gradient."""
        norm = torch.as_tensor(norm, dtype=torch.float64, device=self.device)
        finite = norm.isfinite()  # that of a step that was left out is not a norm
        self.norm += torch.stack([torch.where(finite, norm, 0.0), finite.double()])

    def take(self, engine: Engine) -> dict[str, float]:
        """Means over all processes since the last call, by name; then everything is forgotten.  All processes call it together.

        Names: `train/<part>`, `train/<mode>/<part>`, `level/<part>/<middle of the bin>`, `grad_norm`; without what nothing was supervised of.
        """
        flat = torch.cat([x.flatten() for x in (self.whole, self.by_mode, self.by_level, self.norm)])
        numbers = engine.sum(flat).cpu().view(-1, 2)
        names = [f"train/{p}" for p in self.parts] + [f"train/{m}/{p}" for p in self.parts for m in self.modes]
        names += [f"level/{p}/{(i + 0.5) / BINS:.2f}" for p in self.parts for i in range(BINS)] + ["grad_norm"]
        self.reset()
        return {name: total / count for name, (total, count) in zip(names, numbers.tolist(), strict=True) if count > 0}


def _fraction(part: Part, reduction: str) -> Tensor:
    """The loss as a sum and what it is divided by, so that steps and processes can be added up."""
    if reduction == "sample":
        has = part.count_B > 0
        pair = (part.sum_B / part.count_B.clamp_min(1)).sum(), has.sum()
    else:
        pair = part.sum_B.sum(), (part.count_B if reduction == "supervised" else part.total_B).sum()
    return torch.stack([x.detach().double() for x in pair])
