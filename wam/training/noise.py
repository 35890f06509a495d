"""Noise levels of a training batch, drawn apart for video and actions.

Video levels are shared by a block's frames, action levels by a block's actions.  Three draws are not plain uniform levels, and
each is what some mode meets at inference:

    video_at_one      acting starts with video that is pure noise; a continuous draw would almost never be there
    coupled           where actions see noisy video, both go from noise to data together
    condition_noise   where actions see clean video, imagined video is not perfect: it is noised, and labelled with its true level
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from wam.config import NoiseConfig, TimelineConfig
from wam.flow import shift_levels, uniform
from wam.relations import Mode
from wam.timeline import Kind


@dataclass(frozen=True)
class LevelDraw:
    """Levels of a batch: clean frames (B, 1 + kN), noisy frames (B, kN), actions (B, N A)."""

    clean_BF: Tensor
    video_BF: Tensor
    action_BT: Tensor


def draw_levels(config: NoiseConfig, timeline: TimelineConfig, modes: list[Mode], generator: torch.Generator) -> LevelDraw:
    """Draw levels for one sample per mode in `modes`; the same generator state gives the same draw."""
    batch, blocks = len(modes), timeline.blocks
    u_video, u_action = uniform((batch, blocks), generator), uniform((batch, blocks), generator)
    coupled = uniform((batch, 1), generator) < config.coupled
    at_one = uniform((batch, blocks), generator) < config.video_at_one
    noised = uniform((batch, 1), generator) < config.condition_noise
    u_clean = uniform((batch, 1 + blocks), generator)

    sees_noisy = torch.tensor([[(Kind.A, Kind.V) in m.opened] for m in modes], device=generator.device)
    sees_clean = torch.tensor([[(Kind.A, Kind.VC) in m.opened] for m in modes], device=generator.device)
    action = shift_levels(torch.where(coupled & sees_noisy, u_video, u_action), config.action_shift)
    video = torch.where(at_one, 1.0, shift_levels(u_video, config.video_shift))
    clean = torch.where(noised & sees_clean, u_clean, 0.0)
    clean[:, 0] = 0.0  # the first frame is never imagined
    k, steps = timeline.latents_per_block, timeline.actions_per_block
    clean_BF = torch.cat([clean[:, :1], clean[:, 1:].repeat_interleave(k, dim=1)], dim=1)
    return LevelDraw(clean_BF, video.repeat_interleave(k, dim=1), action.repeat_interleave(steps, dim=1))


def draw_modes(weights: dict[str, float], batch: int, generator: torch.Generator) -> list[int]:
    """Draw a mode per sample; returns indices into `weights`' order."""
    p = torch.tensor(list(weights.values()), dtype=torch.float64)
    return torch.multinomial(p, batch, replacement=True, generator=generator).tolist()
