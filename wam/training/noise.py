"""Noise levels of a training batch: a place u in the schedule for every token, then its level.

    u  in 0..1, from a distribution, per sample, block, latent frame or token
       -> place in low..high, on the table if there is one  ->  sigma = shift(u)  ->  0 or 1 at the atoms

Draws that are not plain levels, and what each is for:

    video.at_one     acting starts with video that is pure noise; a continuous draw would almost never be there (Unified World Models,
                     arXiv 2504.02792, reads policy, forward and inverse dynamics off such atoms)
    coupled          video and actions that are denoised together are at the same place in their schedules (DreamZero)
    condition        where actions see clean video of their block, imagined video is not perfect: noised, with its true level (Fast-WAM-IDM)
    history          all that was seen is noised, with its true level, so that half-denoised imagination can stand in for it (LingBot-VA)
    prefix           when plans overlap, the first actions of a block are already committed: given as they were executed, at level 0
    Mode.pinned      a mode's own fixed levels (GE-Act: video at 1)

A level of exactly 0 means *given*: the network sees the data, so that token is never supervised (`LevelDraw.video_seeks`, `action_seeks`).
Where the numbers come from is `wam.training.draws`: a row's depend on nothing but the seed, the step and the row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wam.config import LevelsConfig, NoiseConfig, TimelineConfig
from wam.flow import TIMESTEPS, bump_weight, bump_weight_of_nearest, place_in_table, shift_levels
from wam.relations import Mode
from wam.timeline import Kind
from wam.training.draws import Draws


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
    config: NoiseConfig, timeline: TimelineConfig, modes: Sequence[Mode], random: Draws | torch.Generator, predict_first_frame: bool = False
) -> LevelDraw:
    """Draw levels for one sample per mode in `modes`, on the CPU; each row's are its own.

    Where the first frame is inside block 0 it is given, with level 0, unless `predict_first_frame`; the actions that would lead to it are
    padding, with level 0.
    """
    draws, inside = Draws.of(random, len(modes)), timeline.first_frame == "inside"
    video = _draw(config.video, timeline, Kind.V, draws)
    action = _draw(config.action, timeline, Kind.A, draws)
    first = _pin(_draw(config.video, timeline, Kind.H, draws).sigma, Kind.V, modes) if predict_first_frame and not inside else None

    together = (draws.uniform(1) < config.coupled) & _flags(modes, lambda m: _couples(m, config.couple_always))
    coupled = shift_levels(_spread(video.u, action.u.shape[1]), config.action.shift)
    video_BF = _pin(video.sigma, Kind.V, modes)
    action_BT = _pin(_prefixed(torch.where(together, coupled, action.sigma), config.prefix, timeline, draws), Kind.A, modes)
    if inside and not predict_first_frame:
        video_BF[:, 0] = 0.0
    action_BT[:, : timeline.lead] = 0.0
    return LevelDraw(_clean(config, timeline, modes, draws), video_BF, action_BT, first)


def level_weights(levels: LevelsConfig, sigma: Tensor) -> Tensor:
    """Loss weights of levels, in the shape of `sigma`: ones, or the bump of this kind's schedule."""
    if levels.weighting == "none":
        return torch.ones_like(sigma)
    t = TIMESTEPS * sigma
    return bump_weight(t, levels.shift) if levels.table is None else bump_weight_of_nearest(t, levels.shift, levels.table)


def draw_modes(weights: dict[str, float], batch: int, random: Draws | torch.Generator, possible_BM: Tensor | None = None) -> list[int]:
    """Draw a mode per sample; returns indices into `weights`' order.

    Args:
        possible_BM: bool (B, modes): which of them fit a sample; where none of a sample's does, all do.
    """
    p_BM = torch.tensor(list(weights.values()), dtype=torch.float64).expand(batch, -1)
    if possible_BM is not None:
        fitting = p_BM * possible_BM
        p_BM = torch.where(fitting.sum(1, keepdim=True) > 0, fitting, p_BM)
    ends = p_BM.cumsum(1)
    place = Draws.of(random, batch).uniform(1).double() * ends[:, -1:]
    return (place >= ends).sum(1).tolist()  # the first mode whose stretch ends beyond the place; one of weight 0 has none


# ------------------------------------------------------------------------------------------------ one kind of token


@dataclass(frozen=True)
class _Drawn:
    """Places in the schedule and levels of one kind of token, both (B, tokens); atoms are levels, not places."""

    u: Tensor
    sigma: Tensor


def _draw(levels: LevelsConfig, timeline: TimelineConfig, kind: Kind, draws: Draws) -> _Drawn:
    frames = timeline.blocks * timeline.latents_per_block
    tokens = {Kind.H: 1, Kind.V: frames, Kind.A: timeline.blocks * timeline.actions_per_block}[kind]
    units = 1 if kind is Kind.H else {"sample": 1, "block": timeline.blocks, "frame": frames, "token": tokens}[levels.per]
    u = levels.low + (levels.high - levels.low) * _places(levels, units, draws)
    u = u if levels.table is None else place_in_table(u, levels.table)
    atom = draws.uniform(units)
    sigma = torch.where(atom < levels.at_one, 1.0, shift_levels(u, levels.shift))
    sigma = torch.where(atom >= 1 - levels.at_zero, 0.0, sigma)
    return _Drawn(_spread(u, tokens), _spread(sigma, tokens))


def _places(levels: LevelsConfig, units: int, draws: Draws) -> Tensor:
    if levels.distribution == "beta":
        return draws.beta(levels.alpha, levels.beta, units)
    u = draws.uniform(units)
    if levels.distribution == "uniform":
        return u
    return torch.sigmoid(levels.mean + levels.std * torch.special.ndtri(u.double().clamp(2**-25, 1 - 2**-25))).float()


def _spread(x_BU: Tensor, tokens: int) -> Tensor:
    """(B, units) to (B, tokens): each unit's value for all the tokens in its stretch of the window."""
    units = x_BU.shape[1]
    return x_BU[:, torch.arange(tokens, device=x_BU.device) * units // tokens]


# ------------------------------------------------------------------------------------------------ what is given, and what modes ask for


def _clean(config: NoiseConfig, timeline: TimelineConfig, modes: Sequence[Mode], draws: Draws) -> Tensor:
    """(B, latents): zeros, but for noise on the whole history, or on what actions of the same block condition on."""
    history = _draw(config.history, timeline, Kind.V, draws).sigma
    condition = _draw(config.condition, timeline, Kind.V, draws).sigma
    if timeline.first_frame == "before":
        history = torch.cat([_draw(config.history, timeline, Kind.H, draws).sigma, history], dim=1)
        condition = torch.cat([torch.zeros_like(condition[:, :1]), condition], dim=1)
    condition[:, 0] = 0.0  # the first frame is never imagined
    conditioned = (draws.uniform(1) < config.condition_probability) & _flags(modes, lambda m: m.sees(Kind.A, Kind.VC))
    old = draws.uniform(1) < config.history_probability
    return _pin(torch.where(conditioned, condition, torch.where(old, history, 0.0)), Kind.VC, modes)


def _prefixed(action_BT: Tensor, probability: float, timeline: TimelineConfig, draws: Draws) -> Tensor:
    """Level 0 for the first 1..A-1 actions of every block, in some of the samples."""
    steps = timeline.actions_per_block
    if probability == 0 or steps == 1:
        return action_BT
    chosen = draws.uniform(1).unsqueeze(2) < probability
    length = 1 + (draws.uniform(timeline.blocks).unsqueeze(2) * (steps - 1)).long()  # 1..A-1
    given = chosen & (torch.arange(steps) < length)
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


def _flags(modes: Sequence[Mode], of: Callable[[Mode], bool]) -> Tensor:
    """(B, 1) bool: a property of each sample's mode."""
    return torch.tensor([[of(mode)] for mode in modes])
