"""Flow matching: noise levels, targets, and the solver.  The conventions of the whole codebase are stated here, once.

    x_sigma = (1 - sigma) x_0 + sigma noise         sigma in [0, 1]; 0 is data, 1 is pure noise
    velocity = noise - x_0                          what the network predicts (Wan's convention)
    t = 1000 sigma                                  what the timestep embedding is fed
    shift_s(u) = s u / (1 + (s - 1) u)              s > 1 moves levels towards noise (SD3, section 5.3.2)

Levels and steps are float32 throughout: in bf16 neighbouring timesteps above 512 would be 4 apart.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

TIMESTEPS = 1000.0
SMALLEST_SIGMA = 0.1


def shift_levels(u: Tensor, shift: float) -> Tensor:
    """Map levels in [0, 1] by the timestep shift; 0 and 1 stay where they are."""
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


def solver_levels(steps: int, shift: float) -> Tensor:
    """(steps + 1,) float32 levels from 1 to 0: uniform, then shifted.

    Raises:
        ValueError: fewer than one step.
    """
    if steps < 1:
        raise ValueError(f"solver steps is {steps}; at least 1 is needed (1 jumps from pure noise to the prediction)")
    return shift_levels(torch.linspace(1, 0, steps + 1, dtype=torch.float64), shift).float()


def euler(x: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """One Euler step of dx/dsigma = velocity."""
    return x + (sigma_next - sigma) * velocity


def integrate(x: Tensor, levels: Tensor, velocity: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Euler's method from `levels[0]` to `levels[-1]`; `velocity(x, sigma)` is the network."""
    for sigma, sigma_next in zip(levels[:-1], levels[1:], strict=True):
        x = euler(x, velocity(x, sigma), sigma, sigma_next)
    return x


def uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Uniform levels in [0, 1), drawn on the generator's device."""
    return torch.rand(shape, generator=generator, device=generator.device)
