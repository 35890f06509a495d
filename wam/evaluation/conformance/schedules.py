"""The released systems' tables of levels, timesteps and weights: a JSON of numbers, without tensors beside it.

    dreamzero | fastwam | lingbot          whose
      training, inference, unipc_probe     tables of training, grids of sampling, a solver on a known velocity
        steps.{n}.sigmas, ...              the numbers; each leaf is an output, e.g. dreamzero/inference/steps/16/sigmas

Every number is computed again by `wam.flow` and `wam.solvers`, but for those that say what to compute (`GIVEN`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wam.evaluation.conformance.case import FORMAT, Case
from wam.evaluation.conformance.stages import Plan, Stage, group
from wam.flow import TIMESTEPS, Grid, bump_weight, bump_weight_of_nearest, euler_grid, level_table, shift_levels, unipc_grid
from wam.solvers import evaluated_steps, make_solver

NAME = "schedules"
SYSTEMS = ("dreamzero", "fastwam", "lingbot")
GIVEN = ("num", "shift", "probe_u", "x0")  # what tables are asked for, not what they hold
STEPS, SHIFT = 16, 5.0  # of DreamZero's reuse of velocities, and of every schedule that names no shift


def recognises(spec: dict[str, Any]) -> bool:
    """Is this a JSON of schedules?"""
    return spec.get("format") == FORMAT and "case" not in spec and any(isinstance(spec.get(system), dict) for system in SYSTEMS)


def load(path: Path, spec: dict[str, Any]) -> Case:
    """The JSON as a case without weights."""
    numbers = {"/".join(keys): torch.tensor(value, dtype=torch.float64) for keys, value in _leaves(spec) if not isinstance(value, str)}
    inputs = {name: x for name, x in numbers.items() if name.rpartition("/")[2] in GIVEN}
    outputs = {name: x for name, x in numbers.items() if name not in inputs}
    return Case(path, spec | {"case": path.stem, "outputs": dict.fromkeys(outputs)}, {}, inputs, outputs)


def prepare(case: Case) -> Plan:
    """A stage for each table."""
    return Plan(NAME, tuple(Stage(names, partial(_table, case, prefix)) for prefix, names in group(case.outputs, _owner).items()))


def _leaves(node: Any, keys: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(node, dict):
        for key, child in node.items():
            yield from _leaves(child, (*keys, key))
    else:
        yield keys, node


def _owner(name: str) -> str | None:
    parent = name.rpartition("/")[0]
    return next((parent for pattern in TABLES if re.fullmatch(pattern, parent)), None)


def _table(case: Case, prefix: str) -> dict[str, Tensor]:
    compute, found = next((compute, found) for pattern, compute in TABLES.items() if (found := re.fullmatch(pattern, prefix)))
    return {f"{prefix}/{name}": torch.as_tensor(x) for name, x in compute(case, prefix, *found.groups()).items()}


def _given(case: Case, name: str, default: float) -> float:
    return float(case.inputs[name]) if name in case.inputs else default


Numbers = dict[str, Any]


def _discrete(case: Case, prefix: str) -> Numbers:
    entries, shift = int(_given(case, f"{prefix}/num", TIMESTEPS)), _given(case, f"{prefix}/shift", SHIFT)
    sigmas = level_table(shift, entries)
    return {"sigmas": sigmas, "timesteps": TIMESTEPS * sigmas, "weights": bump_weight_of_nearest(TIMESTEPS * sigmas, shift, entries)}


def _continuous(case: Case, prefix: str) -> Numbers:
    shift = _given(case, f"{prefix}/shift", SHIFT)
    grid, probe = TIMESTEPS * level_table(shift), TIMESTEPS * shift_levels(case.input(f"{prefix}/probe_u").float(), shift)
    bump = torch.exp(-2 * ((torch.tensor([500.0, 250.0]) - 500) / 1000) ** 2)
    weight = bump_weight(torch.tensor([500.0, 250.0]), shift)
    scale = float(bump.diff() / weight.diff())  # the two constants of a weight, read off two weights
    out = {"y_min": float(bump[0] - scale * weight[0]), "weight_norm_const": scale, "grid_timesteps": grid, "weights_on_grid": bump_weight(grid, shift)}
    return out | {"probe_t": probe, "probe_weight": bump_weight(probe, shift)}


def _ends(case: Case, prefix: str) -> Numbers:
    grid = unipc_grid(1, 1.0)
    return {"sigma_max": grid.sigmas[0], "sigma_min": grid.sigmas[1]}


def _levels(grid: Grid) -> Numbers:
    return {"sigmas": grid.sigmas, "timesteps": grid.timesteps}


def _unipc(case: Case, prefix: str, steps: str) -> Numbers:
    return _levels(unipc_grid(int(steps), _given(case, "dreamzero/training/shift", SHIFT)))


def _decoupled(case: Case, prefix: str, steps: str) -> Numbers:
    final = re.search(r"final_noise=([\d.]*\d)", str(case.spec["dreamzero"]["inference"].get("decoupled_note", "")))
    return _levels(unipc_grid(int(steps), _given(case, "dreamzero/training/shift", SHIFT)).ending_at(float(final[1]) if final else 0.8))


def _masks(case: Case, prefix: str) -> Numbers:
    return {str(n): torch.tensor(evaluated_steps(STEPS, n)) for n in range(1, STEPS + 1)}


def _probe(case: Case, prefix: str) -> Numbers:
    """A solver on a velocity that is a formula of the sample and the timestep."""
    out = {}
    for name in (name.rpartition("/")[2] for name in case.outputs if name.startswith(f"{prefix}/trajectory/")):
        grid = unipc_grid(int(name), _given(case, "dreamzero/training/shift", SHIFT))
        solver, x, taken = make_solver("unipc", grid), case.input(f"{prefix}/x0").float(), []
        for i, t in enumerate(grid.timesteps):
            x = solver.step(torch.sin(3 * x) + t / TIMESTEPS * x - 0.25, i, x)
            taken.append(x)
        out[name] = torch.stack(taken)
    return out


def _fast_wam(case: Case, prefix: str, steps: str) -> Numbers:
    grid = euler_grid(int(steps), _given(case, "fastwam/training/shift", SHIFT))
    out = {"timesteps": grid.timesteps, "deltas": grid.sigmas.diff()}
    return out | {f"{name}_bf16": x.bfloat16().float() for name, x in out.items()}


def _lingbot(case: Case, prefix: str, stream: str, steps: str) -> Numbers:
    grid = euler_grid(int(steps), _given(case, f"lingbot/{stream}/shift", SHIFT))
    return {"sigmas": grid.sigmas[:-1], "timesteps": grid.timesteps}


TABLES: dict[str, Callable[..., Numbers]] = {
    r"dreamzero/training": _discrete,
    r"dreamzero/inference": _ends,
    r"dreamzero/inference/steps/(\d+)": _unipc,
    r"dreamzero/inference/dit_step_masks": _masks,
    r"dreamzero/inference/decoupled_video_sigmas/(\d+)": _decoupled,
    r"dreamzero/unipc_probe/trajectory": lambda case, prefix: _probe(case, "dreamzero/unipc_probe"),
    r"fastwam/training": _continuous,
    r"fastwam/inference/steps/(\d+)": _fast_wam,
    r"lingbot/(video|action)/steps/(\d+)": _lingbot,
}
