"""Solvers of dx/dsigma = velocity along a grid of levels, and rules that spare evaluations of the network.

    x  = pure noise
    for i in range(grid.steps):
        if any(due := reuse.due(i)):                           rows of the batch, each by itself
            v = network(x, grid.timesteps[i]) in rows that are due, v in the others;  reuse.record(v)
        x = solver.step(v, i, x)                                from grid.sigmas[i] to grid.sigmas[i + 1]

A solver object serves one trajectory of one kind of token: it holds the few tensors that a multistep method looks back on, and nothing
else.  All coefficients depend on the grid alone; they are plain numbers, worked out in float64 when the solver is built, so that a step is
a sum of scaled tensors: no small tensors are made, nothing waits for the device, and a step can be captured in a CUDA graph.  (diffusers'
own UniPC solves a linear system on the device in every step, and cannot be told where a grid ends; on the grids that it can be given, the
tests hold both against each other.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from wam.flow import Grid, euler_grid, unipc_grid

# ------------------------------------------------------------------------------------------------ solvers


class Solver(Protocol):
    """Steps along the grid it was built for, in order."""

    def step(self, velocity: Tensor, i: int, x: Tensor) -> Tensor:
        """From level i to level i + 1; `velocity` is the network's at `x`, or the last one that was evaluated."""
        ...


class Euler:
    """x + (sigma' - sigma) velocity: first order, and exact on straight paths."""

    def __init__(self, grid: Grid):
        self.deltas = grid.sigmas.diff().tolist()

    def step(self, velocity: Tensor, i: int, x: Tensor) -> Tensor:
        """See `Solver`."""
        return x + self.deltas[i] * velocity.to(x.dtype)


@dataclass(frozen=True)
class _Weights:
    """One update: x' = start x_s + (sum of weights[j] m_j), where m are predictions of the data, the newest first."""

    start: float
    data: tuple[float, ...]

    def __call__(self, x: Tensor, data: list[Tensor]) -> Tensor:
        x = self.start * x
        for weight, m in zip(self.data, data, strict=True):
            x = x + weight * m
        return x


class UniPC:
    """UniPC of order 2 with B(h) = expm1(-h), predicting the data (Zhao et al. 2023, arXiv 2302.04867, sections 3.1 to 3.3).

    A step first corrects `x` with the data it has just been shown (UniC), then predicts the next level (UniP).  The first step and, as
    Wan and diffusers do (`lower_order_final`), the last are of order 1.
    """

    def __init__(self, grid: Grid):
        sigmas = grid.sigmas.double().tolist()
        orders = [min(2, i + 1, grid.steps - i) for i in range(grid.steps)]
        self.sigmas = sigmas
        self.predictors = [_predictor(sigmas, i, order) for i, order in enumerate(orders)]
        self.correctors = [_corrector(sigmas, i, order) for i, order in enumerate(orders[:-1])]
        self.data: list[Tensor] = []  # predictions of the data at the last two levels, the newest first
        self.start: Tensor | None = None  # where the last step began, after its correction

    def step(self, velocity: Tensor, i: int, x: Tensor) -> Tensor:
        """See `Solver`."""
        data = x - self.sigmas[i] * velocity.to(x.dtype)
        if i > 0:
            assert self.start is not None, f"UniPC was asked for step {i} before step {i - 1}"
            update = self.correctors[i - 1]
            x = update(self.start, [data, *self.data][: len(update.data)])
        self.start, self.data = x, [data, *self.data][:2]
        update = self.predictors[i]
        return update(x, self.data[: len(update.data)])


def _predictor(sigmas: list[float], i: int, order: int) -> _Weights:
    """UniP from level i to i + 1; data at levels i, i - 1.

    With alpha = 1 - sigma, lambda = log(alpha / sigma) and h = lambda' - lambda:

        x' = (sigma'/sigma) x - alpha' B (m_i + (m_{i-1} - m_i) / (2 r)),    B = expm1(-h),   r = (lambda_{i-1} - lambda_i) / h
    """
    ratio, scale, _ = _step(sigmas, i)
    if order == 1:
        return _Weights(ratio, (-scale,))
    back = 0.5 / _lookback(sigmas, i)
    return _Weights(ratio, (-scale * (1 - back), -scale * back))


def _corrector(sigmas: list[float], i: int, order: int) -> _Weights:
    """UniC of the step from level i to i + 1; data at levels i + 1, i, i - 1.

        x' = (sigma'/sigma) x - alpha' B (m_i + rho_1 (m_{i-1} - m_i) / r + rho_2 (m_{i+1} - m_i))

    where rho_1 + rho_2 = phi_2 / B and r rho_1 + rho_2 = 2 phi_3 / B, with phi_2 = -B/h - 1 and phi_3 = -phi_2/h - 1/2; of order 1,
    rho_2 = 1/2 alone.
    """
    ratio, scale, h = _step(sigmas, i)
    if order == 1:
        return _Weights(ratio, (-scale / 2, -scale / 2))
    B, r = math.expm1(-h), _lookback(sigmas, i)
    phi_2 = -B / h - 1
    phi_3 = -phi_2 / h - 0.5
    rho_1 = (phi_2 / B - 2 * phi_3 / B) / (1 - r)
    rho_2 = phi_2 / B - rho_1
    back = rho_1 / r
    return _Weights(ratio, (-scale * rho_2, -scale * (1 - back - rho_2), -scale * back))


def _step(sigmas: list[float], i: int) -> tuple[float, float, float]:
    """sigma'/sigma, alpha' B and h of the step from level i."""
    h = _log_ratio(sigmas[i + 1]) - _log_ratio(sigmas[i])
    return sigmas[i + 1] / sigmas[i], (1 - sigmas[i + 1]) * math.expm1(-h), h


def _lookback(sigmas: list[float], i: int) -> float:
    """r < 0: the previous step, in units of the step from level i."""
    return (_log_ratio(sigmas[i - 1]) - _log_ratio(sigmas[i])) / (_log_ratio(sigmas[i + 1]) - _log_ratio(sigmas[i]))


def _log_ratio(sigma: float) -> float:
    """lambda: log of signal over noise; infinite at both ends, where the updates have limits."""
    if sigma in (0.0, 1.0):
        return math.inf if sigma == 0.0 else -math.inf
    return math.log((1 - sigma) / sigma)


SolverName = Literal["euler", "unipc"]


def make_grid(name: SolverName, steps: int, shift: float) -> Grid:
    """The grid that a solver is used on in the published systems; `Grid.ending_at` changes where it ends."""
    return unipc_grid(steps, shift) if name == "unipc" else euler_grid(steps, shift)


def make_solver(name: SolverName, grid: Grid) -> Solver:
    """A solver for one trajectory along `grid`."""
    return UniPC(grid) if name == "unipc" else Euler(grid)


# ------------------------------------------------------------------------------------------------ reuse of velocities


class Reuse(Protocol):
    """Decides, step by step and row by row, whether the network is evaluated or the last velocity serves again (DreamZero's "DiT cache")."""

    def due(self, i: int) -> tuple[bool, ...]:
        """Rows for which the network is evaluated at step i.  Asked once per step, in order."""
        ...

    def record(self, velocity: Tensor) -> None:
        """The (guided) video velocities (B, ...) after an evaluation: new in the rows that were due, as they were in the others."""
        ...


# DreamZero's evaluations of 16 steps, by their number: dense where the path bends, at both ends.
PUBLISHED: dict[int, tuple[int, ...]] = {
    5: (0, 1, 2, 7, 12),
    6: (0, 1, 5, 10, 14, 15),
    7: (0, 1, 2, 6, 10, 14, 15),
    8: (0, 1, 2, 6, 10, 13, 14, 15),
}


def evaluated_steps(steps: int, evaluations: int) -> tuple[int, ...]:
    """Which steps are evaluated: DreamZero's choice where there is one, else the first two (a multistep solver looks back) and the rest evenly to the last.

    Raises:
        ValueError: no evaluation at all.
    """
    if evaluations < 1:
        raise ValueError(f"{evaluations} evaluations of {steps} steps were asked for; at least 1 is needed, and the first step is always one")
    if evaluations >= steps:
        return tuple(range(steps))
    if steps == 16 and evaluations in PUBLISHED:
        return PUBLISHED[evaluations]
    if evaluations <= 2:
        return tuple(range(evaluations))
    return (0, *(round(1 + j * (steps - 2) / (evaluations - 2)) for j in range(evaluations - 1)))


class FixedReuse:
    """A fixed set of evaluated steps."""

    def __init__(self, steps: tuple[int, ...], rows: int):
        self.steps, self.rows = frozenset(steps), rows

    def due(self, i: int) -> tuple[bool, ...]:
        """See `Reuse`."""
        return (i in self.steps,) * self.rows

    def record(self, velocity: Tensor) -> None:
        """Nothing depends on it."""


class SimilarReuse:
    """Skips steps while the velocity hardly turns: 4 where the last two are alike (cosine above 0.95), 2 above 0.93 (DreamZero).

    After skipping, the network is evaluated once before they are compared again.  Every row has its own two velocities and its own skips, so
    it gets what it would get alone; a pass is saved where all skip.  A comparison reads one number a row off the device.
    """

    RULES = ((0.95, 4), (0.93, 2))

    def __init__(self, rows: int) -> None:
        self.before: Tensor | None = None  # the last two velocities of each row
        self.now: Tensor | None = None
        self.countdown = [0] * rows  # to the evaluation that ends a skip

    def due(self, i: int) -> tuple[bool, ...]:
        """See `Reuse`."""
        if self.before is not None:
            lengths = [0] * len(self.countdown) if all(self.countdown) else self._lengths()
            self.countdown = [left - 1 if left else length for left, length in zip(self.countdown, lengths, strict=True)]
        return tuple(left == 0 for left in self.countdown)

    def record(self, velocity: Tensor) -> None:
        """See `Reuse`."""
        if self.before is None or self.now is None:
            self.before, self.now = self.now, velocity
        else:
            self.before, self.now = choose_rows([left == 0 for left in self.countdown], self.now, self.before), velocity

    def _lengths(self) -> list[int]:
        assert self.now is not None and self.before is not None
        alike = torch.nn.functional.cosine_similarity(self.now.flatten(1).float(), self.before.flatten(1).float(), dim=1)
        return [next((steps for threshold, steps in self.RULES if similarity > threshold), 0) for similarity in alike.tolist()]


def choose_rows(due: Sequence[bool], new: Tensor, old: Tensor) -> Tensor:
    """(B, ...): `new` in the rows that are due, `old` in the others."""
    if all(due):
        return new
    return torch.where(torch.tensor(due, device=new.device).view(-1, *[1] * (new.ndim - 1)), new, old)


def make_reuse(name: Literal["none", "mask", "similarity"], steps: int, evaluations: int, rows: int = 1) -> Reuse:
    """The rule called `name`, for one trajectory of `steps` steps of each of `rows` rows."""
    if name == "similarity":
        return SimilarReuse(rows)
    return FixedReuse(evaluated_steps(steps, evaluations if name == "mask" else steps), rows)
