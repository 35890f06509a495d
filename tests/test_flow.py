"""Flow matching: the conventions, the solver on an exact field, and the draws of training."""

import pytest
import torch
from tiny import tiny_config

from wam.config import NoiseConfig
from wam.flow import add_noise, integrate, shift_levels, solver_levels, velocity_target
from wam.relations import get_mode
from wam.training.noise import draw_levels, draw_modes


def test_the_path_runs_from_data_to_noise_at_the_target_velocity() -> None:
    x0, noise = torch.randn(3), torch.randn(3)
    a, b = add_noise(x0, noise, torch.tensor(0.2)), add_noise(x0, noise, torch.tensor(0.7))
    assert torch.allclose(b - a, 0.5 * velocity_target(x0, noise), atol=1e-6)


@pytest.mark.parametrize("steps", [1, 4, 10])
@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_the_solver_is_exact_on_a_straight_path(steps: int, shift: float) -> None:
    x0, noise = torch.randn(8), torch.randn(8)
    levels = solver_levels(steps, shift)
    assert levels[0] == 1 and levels[-1] == 0 and len(levels) == steps + 1
    found = integrate(noise, levels, lambda x, sigma: (x - x0) / sigma)
    assert torch.allclose(found, x0, atol=1e-5)


def test_shift_five_is_what_wan_uses() -> None:
    assert torch.allclose(shift_levels(torch.tensor([0.0, 0.5, 1.0]), 5.0), torch.tensor([0.0, 5 / 6, 1.0]))


def test_no_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        solver_levels(0, 1.0)


def _draw(modes: list[str], **noise: float):
    config = tiny_config()
    return config, draw_levels(NoiseConfig(**noise), config.timeline, [get_mode(m) for m in modes], torch.Generator().manual_seed(0))


def test_levels_are_shared_inside_a_block_and_independent_between() -> None:
    config, levels = _draw(["skip"] * 64)
    actions = levels.action_BT.unflatten(1, (config.timeline.blocks, -1))
    assert (actions == actions[..., :1]).all()
    assert len(actions[0, :, 0].unique()) == config.timeline.blocks
    correlation = torch.corrcoef(torch.stack([levels.video_BF.flatten(), actions[..., 0].flatten()]))[0, 1]
    assert abs(float(correlation)) < 0.2


def test_coupling_only_where_actions_see_noisy_video() -> None:
    _, coupled = _draw(["joint"] * 32, coupled=1, video_at_one=0, video_shift=1, action_shift=1)
    assert torch.equal(coupled.action_BT[:, ::8], coupled.video_BF)
    _, free = _draw(["skip"] * 32, coupled=1, video_at_one=0, video_shift=1, action_shift=1)
    assert not torch.isclose(free.action_BT[:, ::8], free.video_BF).any()


def test_conditions_are_noised_only_where_actions_see_them_and_never_the_first_frame() -> None:
    _, imagine = _draw(["imagine"] * 32, condition_noise=1)
    assert (imagine.clean_BF[:, 0] == 0).all() and (imagine.clean_BF[:, 1:] > 0).all()
    _, skip = _draw(["skip", "forward"] * 16, condition_noise=1)
    assert (skip.clean_BF == 0).all()


def test_the_mass_at_pure_noise_is_what_was_asked_for() -> None:
    _, levels = _draw(["skip"] * 2000, video_at_one=0.3)
    assert float((levels.video_BF == 1).float().mean()) == pytest.approx(0.3, abs=0.02)


def test_modes_are_drawn_by_weight_from_the_generator() -> None:
    weights = {"skip": 3.0, "joint": 0.0, "forward": 1.0}
    draws = draw_modes(weights, 4000, torch.Generator().manual_seed(1))
    assert draws == draw_modes(weights, 4000, torch.Generator().manual_seed(1))
    assert draws.count(1) == 0 and draws.count(0) / 4000 == pytest.approx(0.75, abs=0.03)
