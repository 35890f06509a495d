"""Flow matching: noise levels, targets, grids of steps and weights.  The conventions of the whole codebase are stated here, once.

    x_sigma = (1 - sigma) x_0 + sigma noise         sigma in [0, 1]; 0 is data, 1 is pure noise
    velocity = noise - x_0                          what the network predicts (Wan's convention)
    t = 1000 sigma                                  what the timestep embedding is fed
    shift_s(u) = s u / (1 + (s - 1) u)              u is the place in the schedule; s > 1 moves levels towards noise (SD3, section 5.3.2)
    weight(t) ~ exp(-2 ((t - 500) / 1000)^2) - min  the "bump": mean 1 over the 1000 levels of a schedule; 0 at both ends (DiffSynth)

Levels and steps are float32 throughout: in bf16 neighbouring timesteps above 512 would be 4 apart.  Tables and grids are computed in
float32 too, in the order in which the published systems do, so that their numbers come out to the last digit.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

TIMESTEPS = 1000.0
ENTRIES = 1000  # levels of a training table
SMALLEST_SIGMA = 0.1


def shift_levels(u: Tensor, shift: float) -> Tensor:
    """Map places in the schedule, in [0, 1], to levels; 0 and 1 stay where they are."""
    return shift * u / (1 + (shift - 1) * u)


def add_noise(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """x_sigma; `sigma` must broadcast against `x0`."""
    return (1 - sigma) * x0 + sigma * noise


def velocity_target(x0: Tensor, noise: Tensor) -> Tensor:
    """What the network learns to predict, at any level."""
    return noise - x0


def velocity_from_sample(x: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
    """The velocity at `x`, given a prediction of the data: (x - x0) / sigma, with sigma not below 0.1.

    A narrow network cannot carry the noise of a wide token through its layers, as a velocity asks of it; a prediction of the data
    asks only for what the data has (Li and He 2025, "Back to basics").  The bound keeps the loss finite near the data.
    """
    return (x - x0) / sigma.clamp_min(SMALLEST_SIGMA)


def guidance(v_cond: Tensor, v_uncond: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance: away from the other side, `scale` times as far as the condition goes (Ho and Salimans 2022)."""
    return v_uncond + scale * (v_cond - v_uncond)


def uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Uniform numbers in [0, 1), drawn on the generator's device."""
    return torch.rand(shape, generator=generator, device=generator.device)


# ------------------------------------------------------------------------------------------------ grids: the levels that sampling visits


@dataclass(frozen=True, eq=False)
class Grid:
    """The levels of a sampling run, from noise to data.

    Attributes:
        sigmas: (steps + 1,) float32, falling; where each step starts, and where the last one ends.
        whole: the network is fed whole timesteps (1000 sigma, truncated), as Wan's UniPC does; the solver keeps the exact levels.
    """

    sigmas: Tensor
    whole: bool = False

    @property
    def steps(self) -> int:
        """Number of steps."""
        return len(self.sigmas) - 1

    @property
    def timesteps(self) -> Tensor:
        """(steps,) float32: what the network is fed."""
        t = TIMESTEPS * self.sigmas[:-1]
        return t.trunc() if self.whole else t

    def ending_at(self, final: float) -> Grid:
        """The same number of steps, rescaled to end at level `final` (DreamZero-Flash: video ends noisy while actions go on to 0).

        Raises:
            ValueError: a level that the grid does not fall to.
        """
        first = float(self.sigmas[0])
        if not 0 <= final < first:
            raise ValueError(f"a grid is asked to end at level {final}, but it starts at {first:.4f}; expected 0 <= final < {first:.4f}")
        return Grid(self.sigmas * (first - final) / first + final, self.whole)


def euler_grid(steps: int, shift: float) -> Grid:
    """Uniform from 1 to 0, then shifted (Fast-WAM, LingBot-VA).

    Raises:
        ValueError: fewer than one step.
    """
    return Grid(shift_levels(torch.linspace(1, 0, _at_least_one(steps) + 1), shift))


def unipc_grid(steps: int, shift: float) -> Grid:
    """Uniform from 0.999 to 0, then shifted; whole timesteps (Wan's UniPC, DreamZero).

    Raises:
        ValueError: fewer than one step.
    """
    highest = float(torch.tensor(1 - 1 / ENTRIES))  # 0.999 in float32
    u = torch.linspace(highest, 0, _at_least_one(steps) + 1, dtype=torch.float64)
    return Grid(shift_levels(u, shift).float(), whole=True)


def _at_least_one(steps: int) -> int:
    if steps < 1:
        raise ValueError(f"solver steps is {steps}; at least 1 is needed (1 jumps from pure noise to the prediction)")
    return steps


# ------------------------------------------------------------------------------------------------ training tables and weights


def place_in_table(u: Tensor, entries: int) -> Tensor:
    """Places in [0, 1] to the nearest-from-above of `entries` equidistant ones, 1, 1 - 1/entries, ... 1/entries: never 0."""
    index = ((1 - u) * entries).long().clamp(0, entries - 1)
    return torch.linspace(1, 0, entries + 1, device=u.device)[index]


def level_table(shift: float, entries: int = ENTRIES) -> Tensor:
    """(entries,) float32: the levels of a training table, from 1 down; sigma_i = shift(1 - i / entries)."""
    return shift_levels(torch.linspace(1, 0, entries + 1)[:-1], shift)


def bump_weight(t: Tensor, shift: float) -> Tensor:
    """Loss weight of timesteps, any between 0 and 1000: the bump, with the mean over the 1000 levels of this shift as unit (Fast-WAM)."""
    least, mean = _bump_constants(shift)
    return (_bump(t) - least) / mean


def bump_weight_of_nearest(t: Tensor, shift: float, entries: int = ENTRIES) -> Tensor:
    """Loss weight of timesteps, looked up at the nearest level of the table; mean 1 over the table (DreamZero, LingBot-VA)."""
    halfway, weights = _bump_table(shift, entries)
    return weights.to(t.device)[torch.bucketize(t, halfway.to(t.device))]


def _bump(t: Tensor) -> Tensor:
    return torch.exp(-2 * ((t - TIMESTEPS / 2) / TIMESTEPS) ** 2)


@lru_cache(maxsize=16)
def _bump_constants(shift: float) -> tuple[float, float]:
    """The bump's minimum over the table, and its mean above that."""
    y = _bump(TIMESTEPS * level_table(shift))
    return float(y.min()), float((y - y.min()).mean())


@lru_cache(maxsize=16)
def _bump_table(shift: float, entries: int) -> tuple[Tensor, Tensor]:
    """Rising: the timesteps halfway between a table's levels (entries - 1,), and the levels' weights (entries,)."""
    t = TIMESTEPS * level_table(shift, entries)
    y = _bump(t) - _bump(t).min()
    return ((t[1:] + t[:-1]) / 2).flip(0), (y * (entries / y.sum())).flip(0)
