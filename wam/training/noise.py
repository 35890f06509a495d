"""Noise levels of a training batch: a place u in the schedule for every token, then its level.

    u  in 0..1, from a distribution, per sample, block, latent frame or token
       -> place in low..high, on the table if there is one  ->  sigma = shift(u)  ->  0 or 1 at the atoms

Draws that are not plain levels, and what each is for:

    video.at_one     acting starts with video that is pure noise; a continuous draw would almost never be there (Unified World Models,
                     arXiv 2504.02792, reads policy, forward and inverse dynamics off such atoms)
    coupled          video and actions that are denoised together are at the same place in their schedules (DreamZero)
    condition        where actions see clean video of their block, imagined video is not perfect: noised, with its true level (Fast-WAM-IDM)
    history          all that was seen is noised, with its true level, so that half-denoised imagination can stand in for it (LingBot-VA)
    prefix           when plans overlap, the first actions of a block are already committed: given, at level 0
    Mode.pinned      a mode's own fixed levels (GE-Act: video at 1)

A level of exactly 0 means *given*: the network sees the data, so that token is never supervised (`LevelDraw.video_seeks`, `action_seeks`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from wam.config import LevelsConfig, NoiseConfig, TimelineConfig
from wam.flow import TIMESTEPS, bump_weight, bump_weight_of_nearest, place_in_table, shift_levels, uniform
from wam.relations import Mode
from wam.timeline import Kind


@dataclass(frozen=True)
class LevelDraw:
    """Levels of a batch, float32 sigmas in [0, 1].

    Attributes:
        clean_BF: clean frames (B, latents), the first frame included.
        video_BF: noisy frames (B, kN) of blocks 0..N-1.
        action_BT: actions (B, N A).
        first_B1: the noisy first frame before block 0 (B, 1), where it is predicted.
    """

    clean_BF: Tensor
    video_BF: Tensor
    action_BT: Tensor
    first_B1: Tensor | None = None

    @property
    def video_seeks(self) -> Tensor:
        """(B, kN) bool: frames that are not given."""
        return self.video_BF > 0

    @property
    def action_seeks(self) -> Tensor:
        """(B, N A) bool: actions that are not given."""
        return self.action_BT > 0


def draw_levels(
    config: NoiseConfig, timeline: TimelineConfig, modes: Sequence[Mode], generator: torch.Generator, predict_first_frame: bool = False
) -> LevelDraw:
    """Draw levels for one sample per mode in `modes`; the same generator state gives the same draw.

    Where the first frame is inside block 0 it is given, with level 0, unless `predict_first_frame`; the actions that would lead to it are
    padding, with level 0.
    """
    batch, inside, device = len(modes), timeline.first_frame == "inside", generator.device
    video = _draw(config.video, timeline, Kind.V, batch, generator)
    action = _draw(config.action, timeline, Kind.A, batch, generator)
    first = _pin(_draw(config.video, timeline, Kind.H, batch, generator).sigma, Kind.V, modes) if predict_first_frame and not inside else None

    together = (uniform((batch, 1), generator) < config.coupled) & _flags(modes, lambda m: _couples(m, config.couple_always), device)
    coupled = shift_levels(_spread(video.u, action.u.shape[1]), config.action.shift)
    video_BF = _pin(video.sigma, Kind.V, modes)
    action_BT = _pin(_prefixed(torch.where(together, coupled, action.sigma), config.prefix, timeline, generator), Kind.A, modes)
    if inside and not predict_first_frame:
        video_BF[:, 0] = 0.0
    action_BT[:, : timeline.lead] = 0.0
    return LevelDraw(_clean(config, timeline, modes, generator), video_BF, action_BT, first)


def level_weights(levels: LevelsConfig, sigma: Tensor) -> Tensor:
    """Loss weights of levels, in the shape of `sigma`: ones, or the bump of this kind's schedule."""
    if levels.weighting == "none":
        return torch.ones_like(sigma)
    t = TIMESTEPS * sigma
    return bump_weight(t, levels.shift) if levels.table is None else bump_weight_of_nearest(t, levels.shift, levels.table)


def draw_modes(weights: dict[str, float], batch: int, generator: torch.Generator) -> list[int]:
    """Draw a mode per sample; returns indices into `weights`' order."""
    p = torch.tensor(list(weights.values()), dtype=torch.float64)
    return torch.multinomial(p, batch, replacement=True, generator=generator).tolist()


# ------------------------------------------------------------------------------------------------ one kind of token


@dataclass(frozen=True)
class _Drawn:
    """Places in the schedule and levels of one kind of token, both (B, tokens); atoms are levels, not places."""

    u: Tensor
    sigma: Tensor


def _draw(levels: LevelsConfig, timeline: TimelineConfig, kind: Kind, batch: int, generator: torch.Generator) -> _Drawn:
    frames = timeline.blocks * timeline.latents_per_block
    tokens = {Kind.H: 1, Kind.V: frames, Kind.A: timeline.blocks * timeline.actions_per_block}[kind]
    units = 1 if kind is Kind.H else {"sample": 1, "block": timeline.blocks, "frame": frames, "token": tokens}[levels.per]
    u = levels.low + (levels.high - levels.low) * _places(levels, (batch, units), generator)
    u = u if levels.table is None else place_in_table(u, levels.table)
    atom = uniform((batch, units), generator)
    sigma = torch.where(atom < levels.at_one, 1.0, shift_levels(u, levels.shift))
    sigma = torch.where(atom >= 1 - levels.at_zero, 0.0, sigma)
    return _Drawn(_spread(u, tokens), _spread(sigma, tokens))


def _places(levels: LevelsConfig, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if levels.distribution == "uniform":
        return uniform(shape, generator)
    if levels.distribution == "logit_normal":
        return torch.sigmoid(levels.mean + levels.std * torch.randn(shape, generator=generator, device=generator.device))
    seed = int(torch.randint(2**62, (1,), generator=generator, device=generator.device))  # torch's Beta takes no generator
    draw = np.random.default_rng(seed).beta(levels.alpha, levels.beta, shape).astype(np.float32)
    return torch.from_numpy(draw).to(generator.device)


def _spread(x_BU: Tensor, tokens: int) -> Tensor:
    """(B, units) to (B, tokens): each unit's value for all the tokens in its stretch of the window."""
    units = x_BU.shape[1]
    return x_BU[:, torch.arange(tokens, device=x_BU.device) * units // tokens]


# ------------------------------------------------------------------------------------------------ what is given, and what modes ask for


def _clean(config: NoiseConfig, timeline: TimelineConfig, modes: Sequence[Mode], generator: torch.Generator) -> Tensor:
    """(B, latents): zeros, but for noise on the whole history, or on what actions of the same block condition on."""
    batch, before = len(modes), timeline.first_frame == "before"
    history = _draw(config.history, timeline, Kind.V, batch, generator).sigma
    condition = _draw(config.condition, timeline, Kind.V, batch, generator).sigma
    if before:
        history = torch.cat([_draw(config.history, timeline, Kind.H, batch, generator).sigma, history], dim=1)
        condition = torch.cat([torch.zeros_like(condition[:, :1]), condition], dim=1)
    condition[:, 0] = 0.0  # the first frame is never imagined
    seen = _flags(modes, lambda m: m.sees(Kind.A, Kind.VC), generator.device)
    conditioned = (uniform((batch, 1), generator) < config.condition_probability) & seen
    old = uniform((batch, 1), generator) < config.history_probability
    return _pin(torch.where(conditioned, condition, torch.where(old, history, 0.0)), Kind.VC, modes)


def _prefixed(action_BT: Tensor, probability: float, timeline: TimelineConfig, generator: torch.Generator) -> Tensor:
    """Level 0 for the first 1..A-1 actions of every block, in some of the samples."""
    batch, steps = len(action_BT), timeline.actions_per_block
    if probability == 0 or steps == 1:
        return action_BT
    chosen = uniform((batch, 1, 1), generator) < probability
    length = torch.randint(1, steps, (batch, timeline.blocks, 1), generator=generator, device=generator.device)
    given = chosen & (torch.arange(steps, device=generator.device) < length)
    return action_BT.masked_fill(given.flatten(1), 0.0)


def _couples(mode: Mode, always: bool) -> bool:
    return Kind.V not in mode.pinned and (always or mode.sees(Kind.A, Kind.V))


def _pin(sigma: Tensor, kind: Kind, modes: Sequence[Mode]) -> Tensor:
    """The levels that modes fix, in their samples."""
    sigma = sigma.clone()
    for row, mode in enumerate(modes):
        if kind in mode.pinned:
            sigma[row] = mode.pinned[kind]
    return sigma


def _flags(modes: Sequence[Mode], of: Callable[[Mode], bool], device: torch.device) -> Tensor:
    """(B, 1) bool: a property of each sample's mode."""
    return torch.tensor([[of(mode)] for mode in modes], device=device)
