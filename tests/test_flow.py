"""Flow matching: the conventions, and the published systems' tables, grids and weights, to the digit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from wam.flow import (
    add_noise,
    bump_weight,
    bump_weight_of_nearest,
    euler_grid,
    guidance,
    level_table,
    place_in_table,
    shift_levels,
    unipc_grid,
    velocity_from_sample,
    velocity_target,
)

PUBLISHED: dict[str, Any] = json.loads((Path(__file__).parent / "data" / "schedules.json").read_text())


def same(found: Tensor, published: list[float]) -> bool:
    return torch.equal(found, torch.tensor(published, dtype=torch.float32))


def test_the_path_runs_from_data_to_noise_at_the_target_velocity() -> None:
    x0, noise = torch.randn(3), torch.randn(3)
    a, b = add_noise(x0, noise, torch.tensor(0.2)), add_noise(x0, noise, torch.tensor(0.7))
    assert torch.allclose(b - a, 0.5 * velocity_target(x0, noise), atol=1e-6)
    assert torch.allclose(velocity_from_sample(b, x0, torch.tensor(0.7)), velocity_target(x0, noise), atol=1e-6)


def test_shift_moves_levels_towards_noise_and_leaves_the_ends() -> None:
    assert torch.allclose(shift_levels(torch.tensor([0.0, 0.5, 1.0]), 5.0), torch.tensor([0.0, 5 / 6, 1.0]))


def test_guidance_runs_from_one_side_through_the_other() -> None:
    cond, uncond = torch.randn(4), torch.randn(4)
    assert torch.equal(guidance(cond, uncond, 0.0), uncond) and torch.allclose(guidance(cond, uncond, 1.0), cond)
    assert torch.allclose(guidance(cond, uncond, 5.0) - cond, 4 * (cond - uncond), atol=1e-5)


def test_the_training_table_is_dreamzeros() -> None:
    table, levels = PUBLISHED["dreamzero"]["table"], level_table(5.0)
    assert len(levels) == 1000 and levels[0] == 1
    assert same(levels[table["index"]], table["sigmas"])
    assert same(1000 * levels[table["index"]], table["timesteps"])


def test_places_are_put_onto_the_table() -> None:
    u = torch.tensor([1.0, 0.99951, 0.99949, 0.5, 0.0])
    assert same(place_in_table(u, 1000), [1.0, 1.0, 1.0, 0.5, 0.001])
    every = torch.linspace(1, 0, 1001)[:-1]
    assert torch.equal(shift_levels(place_in_table(every - 2e-4, 1000), 5.0), level_table(5.0)), "each entry is met, and none is 0"


@pytest.mark.parametrize("steps", ["16", "10", "8", "4"])
def test_the_unipc_grid_is_dreamzeros(steps: str) -> None:
    grid, published = unipc_grid(int(steps), 5.0), PUBLISHED["dreamzero"]["unipc"]["steps"][steps]
    assert same(grid.sigmas, published["sigmas"]) and same(grid.timesteps, published["timesteps"])


@pytest.mark.parametrize("steps", ["16", "4"])
def test_video_ends_noisy_on_dreamzero_flashs_grid(steps: str) -> None:
    published = PUBLISHED["dreamzero"]["decoupled"]
    grid = unipc_grid(int(steps), 5.0).ending_at(published["final"])
    assert same(grid.sigmas, published["steps"][steps]["sigmas"]) and same(grid.timesteps, published["steps"][steps]["timesteps"])


@pytest.mark.parametrize("steps", ["20", "10", "4"])
def test_the_euler_grid_is_fast_wams(steps: str) -> None:
    grid, published = euler_grid(int(steps), 5.0), PUBLISHED["fast_wam"]["euler"][steps]
    assert same(grid.timesteps, published["timesteps"]) and same(grid.sigmas.diff(), published["deltas"])


@pytest.mark.parametrize(("kind", "steps"), [("video", "3"), ("video", "5"), ("video", "25"), ("action", "10"), ("action", "50")])
def test_the_euler_grids_are_lingbots(kind: str, steps: str) -> None:
    published = PUBLISHED["lingbot_va"][kind]
    grid = euler_grid(int(steps), published["shift"])
    assert same(grid.sigmas[:-1], published["steps"][steps]["sigmas"]) and same(grid.timesteps, published["steps"][steps]["timesteps"])


def test_grids_end_where_they_are_told() -> None:
    grid = euler_grid(10, 5.0)
    assert grid.sigmas[0] == 1 and grid.sigmas[-1] == 0 and grid.steps == len(grid.timesteps) == 10
    rescaled = grid.ending_at(0.3)
    assert rescaled.sigmas[0] == 1 and rescaled.sigmas[-1] == pytest.approx(0.3) and rescaled.steps == 10
    assert torch.equal(grid.ending_at(0.0).sigmas, grid.sigmas)
    with pytest.raises(ValueError, match=r"end at level 1\.0, but it starts at 0\.9998"):
        unipc_grid(10, 5.0).ending_at(1.0)


@pytest.mark.parametrize("build", [euler_grid, unipc_grid])
def test_no_steps_are_refused(build: Any) -> None:
    with pytest.raises(ValueError, match="steps is 0; at least 1"):
        build(0, 1.0)


def test_the_bump_is_fast_wams_between_the_entries_too() -> None:
    published = PUBLISHED["fast_wam"]
    t = 1000 * shift_levels(torch.tensor(published["u"]), 5.0)
    assert same(t, published["timesteps"]) and same(bump_weight(t, 5.0), published["weights"])


def test_the_looked_up_bump_is_dreamzeros() -> None:
    table = PUBLISHED["dreamzero"]["table"]
    assert same(bump_weight_of_nearest(torch.tensor(table["timesteps"]), 5.0), table["weights"])
    near = torch.tensor([999.85, 6.0, 3.0])  # nearest entries: 999.7998, 4.98, 4.98
    assert torch.equal(bump_weight_of_nearest(near, 5.0), bump_weight_of_nearest(torch.tensor([999.7998, 4.98, 4.98]), 5.0))
    assert not torch.allclose(bump_weight(near, 5.0), bump_weight_of_nearest(near, 5.0), rtol=1e-2)


@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_the_bump_has_mean_one_over_its_own_schedule(shift: float) -> None:
    t = 1000 * level_table(shift)
    assert float(bump_weight(t, shift).mean()) == pytest.approx(1, abs=1e-5)
    assert float(bump_weight_of_nearest(t, shift).mean()) == pytest.approx(1, abs=1e-5)
    assert bump_weight(torch.tensor([1000.0, 500.0]), shift).argmax() == 1
