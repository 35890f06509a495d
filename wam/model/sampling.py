"""One plan: from what is in the cache to actions, video, or both, in any mode.

    skip           A from noise, against the cache
    joint(_mutual) V and A from noise, side by side
    imagine        V from noise; written into the cache as if it had been seen; A from noise against it; forgotten again
    inverse        as imagine, with a given future in place of the imagined one
    forward        given actions written into the cache; V from noise against them
    video          V from noise

These are functions of a model and a cache; they hold nothing.  Steps follow `wam.flow.solver_levels`, with a shift for video and
one for actions, as in training.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from wam.flow import euler, solver_levels
from wam.model.backbone import Context
from wam.model.cache import KVCache
from wam.model.wam import Noisy, WorldActionModel
from wam.relations import Mode, get_mode
from wam.timeline import Kind


@dataclass(frozen=True)
class Solver:
    """How a plan is integrated.

    Attributes:
        steps: Euler steps.
        video_stop: level at which imagined video stops before actions are read off it (0: fully denoised).
    """

    steps: int = 4
    video_stop: float = 0.0


@dataclass(frozen=True)
class Situation:
    """Whom a plan is for: rows of a batch, each at its own block."""

    cache: KVCache
    blocks: list[int]
    context: Context
    embodiment_B: Tensor


@dataclass(frozen=True)
class Sample:
    """What was sampled; absent parts are None.  Actions (B, A, .) are normalised, video (B, C, k, h, w) is latents."""

    action_BTA: Tensor | None = None
    video_BCFHW: Tensor | None = None


@dataclass(frozen=True)
class Noise:
    """Where sampling starts: pure noise, drawn by the caller so that each row can have its own generator."""

    action_BTA: Tensor
    video_BCFHW: Tensor


@torch.no_grad()
def sample(model: WorldActionModel, mode: Mode, at: Situation, noise: Noise, solver: Solver, given: Tensor | None = None) -> Sample:
    """Sample one block.

    Args:
        given: normalised actions (B, A, .) for `forward`, latents (B, C, k, h, w) for `inverse`.

    Raises:
        ValueError: a mode that needs `given` without it.
    """
    if mode.name in ("forward", "inverse"):
        if given is None:
            raise ValueError(f"mode {mode.name!r} needs {'actions' if mode.name == 'forward' else 'a future video'} to be given")
        kind, wanted = (Kind.AC, Kind.V) if mode.name == "forward" else (Kind.VC, Kind.A)
        return _conditioned(model, mode, at, noise, solver, kind, given, wanted, 0.0)
    if mode.name == "imagine":
        video = _denoise(model, get_mode("video"), at, noise, solver, (Kind.V,), solver.video_stop).video_BCFHW
        assert video is not None
        acted = _conditioned(model, mode, at, noise, solver, Kind.VC, video, Kind.A, solver.video_stop)
        return Sample(acted.action_BTA, video)
    return _denoise(model, mode, at, noise, solver, _denoised_kinds(mode))


def _denoised_kinds(mode: Mode) -> tuple[Kind, ...]:
    if mode.name == "video":
        return (Kind.V,)
    sees_video = (Kind.A, Kind.V) in mode.opened
    return (Kind.V, Kind.A) if sees_video else (Kind.A,)


def _conditioned(model: WorldActionModel, mode: Mode, at: Situation, noise: Noise, solver: Solver, kind: Kind, given: Tensor, wanted: Kind, sigma: float) -> Sample:
    """Write a condition into the block, denoise what follows from it, and forget it."""
    model.prefill(at.cache, mode.table, kind, given, at.blocks, at.context, at.embodiment_B, sigma)
    try:
        return _denoise(model, mode, at, noise, solver, (wanted,))
    finally:
        at.cache.drop(kind, at.blocks)


def _denoise(model: WorldActionModel, mode: Mode, at: Situation, noise: Noise, solver: Solver, kinds: tuple[Kind, ...], stop: float = 0.0) -> Sample:
    """Euler steps of the noisy tokens of `kinds` (V before A), from pure noise to `stop`."""
    view = model.view(at.cache, mode.table, kinds, at.blocks)
    config = model.config.noise
    action = noise.action_BTA if Kind.A in kinds else None
    video = noise.video_BCFHW if Kind.V in kinds else None
    action_levels = _stopped(solver_levels(solver.steps, config.action_shift), stop).to(model.device)
    video_levels = _stopped(solver_levels(solver.steps, config.video_shift), stop).to(model.device)
    for i in range(solver.steps):
        noisy = Noisy(
            video,
            video_levels[i] if video is not None else None,
            action,
            action_levels[i].expand(action.shape[:2]) if action is not None else None,
        )
        video_velocity, action_velocity = model.denoise(view, noisy, at.context, at.embodiment_B)
        if video is not None and video_velocity is not None:
            video = euler(video, video_velocity.float(), video_levels[i], video_levels[i + 1])
        if action is not None and action_velocity is not None:
            action = euler(action, action_velocity.float(), action_levels[i], action_levels[i + 1])
    return Sample(action, video)


def _stopped(levels: Tensor, stop: float) -> Tensor:
    """Levels rescaled to end at `stop`."""
    return stop + (1 - stop) * levels
