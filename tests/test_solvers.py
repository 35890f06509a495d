"""Solvers against fields that are known exactly, against a published run, and against diffusers; and which steps are spared."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from wam.flow import Grid, euler_grid, unipc_grid
from wam.solvers import Reuse, Solver, SolverName, choose_rows, evaluated_steps, make_grid, make_reuse, make_solver

PUBLISHED: dict[str, Any] = json.loads((Path(__file__).parent / "data" / "schedules.json").read_text())["dreamzero"]
MEAN, SPREAD = 0.7, 0.3  # data of the Gaussian field


def integrate(solver: Solver, grid: Grid, x: Tensor, velocity: Callable[[Tensor, float], Tensor]) -> Tensor:
    for i, sigma in enumerate(grid.sigmas[:-1].tolist()):
        x = solver.step(velocity(x, sigma), i, x)
    return x


def gaussian_velocity(x: Tensor, sigma: float) -> Tensor:
    """E[noise - x0 | x] where the data are Gaussian."""
    variance = ((1 - sigma) * SPREAD) ** 2 + sigma**2
    z = (x - (1 - sigma) * MEAN) / variance
    return sigma * z - (MEAN + (1 - sigma) * SPREAD**2 * z)


def gaussian_path(z: Tensor, sigma: float) -> Tensor:
    """Where the flow has taken noise z by level sigma."""
    return (1 - sigma) * MEAN + math.sqrt(((1 - sigma) * SPREAD) ** 2 + sigma**2) * z


@pytest.mark.parametrize("steps", [1, 4, 10])
@pytest.mark.parametrize("shift", [1.0, 5.0])
@pytest.mark.parametrize("name", ["euler", "unipc"])
def test_a_straight_path_is_followed_exactly(name: SolverName, steps: int, shift: float) -> None:
    x0, noise, grid = torch.randn(8), torch.randn(8), make_grid(name, steps, shift)
    start = x0 + grid.sigmas[0] * (noise - x0)
    found = integrate(make_solver(name, grid), grid, start, lambda x, sigma: (x - x0) / sigma)
    assert torch.allclose(found, x0, atol=1e-5)


def gaussian_error(name: SolverName, grid: Grid) -> float:
    z = torch.linspace(-2, 2, 9, dtype=torch.float64)
    start = gaussian_path(z, float(grid.sigmas[0]))
    found = integrate(make_solver(name, grid), grid, start, gaussian_velocity)
    return float((found - gaussian_path(z, float(grid.sigmas[-1]))).abs().max())


def test_euler_converges_with_order_one_and_unipc_faster() -> None:
    euler = [gaussian_error("euler", euler_grid(n, 1.0)) for n in (16, 32, 64)]
    assert euler[0] / euler[1] == pytest.approx(2, abs=0.3) and euler[1] / euler[2] == pytest.approx(2, abs=0.2)
    unipc = [gaussian_error("unipc", euler_grid(n, 1.0).ending_at(0.1)) for n in (16, 32, 64)]
    assert unipc[0] / unipc[1] > 3.5 and unipc[1] / unipc[2] > 3.5, "at least order two"
    assert unipc[0] < gaussian_error("euler", euler_grid(16, 1.0).ending_at(0.1)) / 3


@pytest.mark.parametrize("final", [0.0, 0.4])
@pytest.mark.parametrize("name", ["euler", "unipc"])
@pytest.mark.parametrize("build", [euler_grid, unipc_grid])
def test_any_solver_follows_any_grid_to_its_end(name: SolverName, final: float, build: Callable[[int, float], Grid]) -> None:
    assert gaussian_error(name, build(64, 3.0).ending_at(final)) < (0.05 if name == "euler" else 0.01)


@pytest.mark.parametrize("steps", ["16", "10", "8", "4"])
def test_unipc_walks_as_the_released_solver_does(steps: str) -> None:
    probe = PUBLISHED["probe"]
    grid = unipc_grid(int(steps), 5.0)
    solver, x = make_solver("unipc", grid), torch.tensor([probe["x0"]])
    for i, expected in enumerate(probe["trajectory"][steps]):
        x = solver.step(torch.sin(3 * x) + grid.timesteps[i] / 1000 * x - 0.25, i, x)
        assert torch.allclose(x, torch.tensor(expected), rtol=0, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 3, 16, 20])
def test_unipc_walks_as_diffusers_does(steps: int) -> None:
    from diffusers import UniPCMultistepScheduler

    grid = unipc_grid(steps, 3.0)
    theirs = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    theirs.set_timesteps(sigmas=grid.sigmas[:-1].double().numpy().astype(np.float64))
    assert torch.equal(theirs.sigmas, grid.sigmas)
    ours, x = make_solver("unipc", grid), torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    y = x
    for i, t in enumerate(theirs.timesteps):
        x, y = ours.step(torch.sin(3 * x) - 0.2, i, x), theirs.step(torch.sin(3 * y) - 0.2, t, y).prev_sample
        assert torch.allclose(x, y, rtol=0, atol=5e-6)


@pytest.mark.parametrize("name", ["euler", "unipc"])
def test_a_step_reads_nothing_off_the_device(name: SolverName) -> None:
    grid = make_grid(name, 6, 5.0)
    solver, x = make_solver(name, grid), torch.empty(2, 3, device="meta")  # has no numbers to read
    for i in range(grid.steps):
        x = solver.step(torch.empty(2, 3, device="meta", dtype=torch.bfloat16), i, x)
    assert x.shape == (2, 3) and x.dtype == torch.float32


@pytest.mark.parametrize("name", ["euler", "unipc"])
def test_velocities_of_a_network_in_bf16_are_not_scaled_in_bf16(name: SolverName) -> None:
    grid, x, v = make_grid(name, 6, 5.0), torch.randn(9), torch.randn(9).bfloat16()
    assert torch.equal(make_solver(name, grid).step(v, 0, x), make_solver(name, grid).step(v.float(), 0, x))


@pytest.mark.parametrize("evaluations", [5, 6, 7, 8])
def test_published_evaluations_of_sixteen_steps(evaluations: int) -> None:
    assert list(evaluated_steps(16, evaluations)) == PUBLISHED["evaluated_of_16"][str(evaluations)]


def test_other_numbers_of_evaluations_begin_with_two_and_reach_the_last_step() -> None:
    for steps in (1, 2, 3, 4, 10, 16, 25):
        for evaluations in range(1, steps + 1):
            chosen = evaluated_steps(steps, evaluations)
            assert len(set(chosen)) == min(evaluations, steps) and list(chosen) == sorted(chosen) and set(chosen) <= set(range(steps))
            assert chosen[0] == 0 and (evaluations < 3 or (steps, evaluations) == (16, 5) or chosen[-1] == steps - 1)
            assert evaluations < 2 or chosen[1] == 1
    assert evaluated_steps(4, 9) == (0, 1, 2, 3)
    with pytest.raises(ValueError, match="at least 1"):
        evaluated_steps(16, 0)


def pattern(reuse: Reuse, velocities: Callable[[int], Tensor], steps: int = 16) -> str:
    marks, seen = "", 0
    for i in range(steps):
        if reuse.due(i)[0]:
            reuse.record(velocities(seen))
            seen += 1
            marks += "x"
        else:
            marks += "."
    return marks


def turning(cosine: float) -> Callable[[int], Tensor]:
    """Velocities (1, 2, 1) that turn by the same angle each time."""
    angle = math.acos(cosine)
    return lambda n: torch.tensor([[[math.cos(n * angle)], [math.sin(n * angle)]]])


@pytest.mark.parametrize(
    ("name", "evaluations", "cosine", "expected"),
    [
        ("none", 8, 1.0, "xxxxxxxxxxxxxxxx"),
        ("mask", 8, 0.0, "xxx...x...x..xxx"),
        ("similarity", 8, 0.96, "xx....x....x...."),
        ("similarity", 8, 0.94, "xx..x..x..x..x.."),
        ("similarity", 8, 0.92, "xxxxxxxxxxxxxxxx"),
    ],
)
def test_which_steps_take_the_last_velocity(name: Literal["none", "mask", "similarity"], evaluations: int, cosine: float, expected: str) -> None:
    assert pattern(make_reuse(name, 16, evaluations), turning(cosine)) == expected


def test_the_last_two_velocities_are_compared() -> None:
    def velocities(n: int) -> Tensor:
        return torch.eye(3)[:, :1] if n < 2 else torch.eye(3)[:, n % 3 :][:, :1]  # alike at first, then each across the one before

    assert pattern(make_reuse("similarity", 16, 8), lambda n: velocities(n).unsqueeze(0)) == "xx....xxxxxxxxxx"


def test_each_row_skips_by_itself() -> None:
    """Rows that turn by 0.96, 0.94 and 0.92 side by side: each is evaluated at the steps, and has the velocities, that it has alone."""
    cosines = (0.96, 0.94, 0.92)

    def driven(rows: Sequence[float]) -> tuple[list[str], list[list[Tensor]]]:
        reuse, seen, marks, used = make_reuse("similarity", 16, 8, len(rows)), [0] * len(rows), [""] * len(rows), []
        held = torch.zeros(len(rows), 2, 1)
        for i in range(16):
            due = reuse.due(i)
            if any(due):
                held = choose_rows(due, torch.cat([turning(c)(n) for c, n in zip(rows, seen, strict=True)]), held)
                seen = [n + d for n, d in zip(seen, due, strict=True)]
                reuse.record(held)
            marks = [m + ("x" if d else ".") for m, d in zip(marks, due, strict=True)]
            used.append(list(held))
        return marks, used

    together, used = driven(cosines)
    assert len(set(together)) == 3
    for row, cosine in enumerate(cosines):
        (alone,), mine = driven([cosine])
        assert alone == together[row]
        for one, both in zip(mine, used, strict=True):
            torch.testing.assert_close(one[0], both[row], rtol=0, atol=0)


def test_solvers_go_on_with_velocities_used_again() -> None:
    def ending(reuse: Reuse) -> Tensor:
        grid = unipc_grid(16, 5.0)
        solver, z = make_solver("unipc", grid), torch.linspace(-2, 2, 9, dtype=torch.float64)
        x, velocity = gaussian_path(z, float(grid.sigmas[0])), torch.empty(0)
        for i, sigma in enumerate(grid.sigmas[:-1].tolist()):
            if reuse.due(i)[0]:
                velocity = gaussian_velocity(x, sigma)
            x = solver.step(velocity, i, x)
        return x - gaussian_path(z, 0.0)

    full, half, five = (float(ending(make_reuse("mask", 16, n)).abs().max()) for n in (16, 8, 5))
    assert full < half < five
