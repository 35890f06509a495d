"""The objective: a batch of windows, noised, through the network, to one loss for video and one for actions.

    frames -> latents;  modes, levels and noise drawn per sample  ->  Window  ->  network  ->  squared errors of velocities
    errors x weight of their level x what is supervised           ->  `Losses`, reduced in one of three ways

Padding, channels a robot does not have, tokens that are given (level 0) and what a mode does not predict are not supervised, so
samples of different modes share a batch without rescaling one another.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from wam.codec.clip_image import ClipImage
from wam.codec.codec import Codec
from wam.codec.first_frame import first_frame_condition
from wam.config import Config
from wam.flow import SMALLEST_SIGMA, TIMESTEPS, add_noise, uniform, velocity_target
from wam.model.actions import pad_actions, pad_states
from wam.model.conditions import Conditions
from wam.model.wam import TrainingMask, Window, WorldActionModel
from wam.model.window_mask import window_mask
from wam.relations import Mode, Reach, block_mask
from wam.text.text import prompts
from wam.timeline import VIDEO_KINDS, Kind, Layout
from wam.training.noise import LevelDraw, draw_levels, draw_modes, level_weights


@dataclass(frozen=True)
class Part:
    """Weighted squared errors of one kind of token: per sample their sum over what is supervised, how many those are, and how many there are at all.

    Attributes:
        error_BU, weight_BU: the same for every frame or action by itself, where asked for: its sum over what is supervised of it, and how much that is.
        sigma_BU: its noise level.
    """

    sum_B: Tensor
    count_B: Tensor
    total_B: Tensor
    error_BU: Tensor | None = None
    weight_BU: Tensor | None = None
    sigma_BU: Tensor | None = None

    def mean(self, reduction: str) -> Tensor:
        """One loss; 0 where nothing is supervised.

        Args:
            reduction: `supervised` divides by what is supervised in the batch; `sample` takes each sample's own mean first (Fast-WAM);
                `all` divides by everything, padding included (DreamZero).
        """
        if reduction == "sample":
            has = self.count_B > 0
            return (self.sum_B / self.count_B.clamp_min(1)).sum() / has.sum().clamp_min(1)
        return self.sum_B.sum() / (self.count_B if reduction == "supervised" else self.total_B).sum().clamp_min(1)


@dataclass(frozen=True)
class Losses:
    """Errors of a batch; `modes` is each sample's."""

    modes: list[str]
    video_part: Part
    action_part: Part
    reduction: str = "supervised"

    def video(self) -> Tensor:
        """The loss of the video velocity (0 when none is supervised)."""
        return self.video_part.mean(self.reduction)

    def action(self) -> Tensor:
        """The loss of the action velocity (0 when none is supervised)."""
        return self.action_part.mean(self.reduction)

    def by_mode(self) -> dict[str, float]:
        """`<mode>/video` and `<mode>/action`: mean errors over what is supervised, of the modes in the batch."""
        out = {}
        for name in dict.fromkeys(self.modes):
            rows = torch.tensor([m == name for m in self.modes], device=self.video_part.sum_B.device)
            for part, errors in (("video", self.video_part), ("action", self.action_part)):
                n = errors.count_B[rows].sum()
                if n > 0:
                    out[f"{name}/{part}"] = float(errors.sum_B[rows].detach().sum() / n)
        return out


def video_errors(velocity_BCFHW: Tensor, target_BCFHW: Tensor, weight_BF: Tensor, seen_BF: Tensor) -> Part:
    """Weighted mean squared error of each frame, summed over the frames that are supervised."""
    error_BF = (velocity_BCFHW.float() - target_BCFHW).square().mean(dim=(1, 3, 4)) * weight_BF
    return Part((error_BF * seen_BF).sum(1), seen_BF.sum(1), torch.ones_like(error_BF).sum(1), (error_BF * seen_BF).detach(), seen_BF.float())


def action_errors(velocity_BTA: Tensor, target_BTA: Tensor, weight_BT: Tensor, seen_BTA: Tensor) -> Part:
    """Weighted squared error of each action channel that is supervised; counts are in actions, not channels, where a robot has all of them."""
    channels = velocity_BTA.shape[2]
    error_BTA = (velocity_BTA.float() - target_BTA).square() * weight_BT.unsqueeze(2)
    seen = seen_BTA.expand_as(error_BTA)
    error_BT, seen_BT = (error_BTA * seen).sum(2) / channels, seen.sum(2) / channels
    return Part((error_BTA * seen).sum((1, 2)) / channels, seen.sum((1, 2)) / channels, torch.ones_like(error_BTA).sum((1, 2)) / channels, error_BT.detach(), seen_BT)


class Objective:
    """Computes the losses of a batch; what modes need of a window, and their masks, are laid out once."""

    def __init__(self, config: Config, model: WorldActionModel, codec: Codec, image: ClipImage | None = None):
        self.config, self.model, self.codec, self.image = config, model, codec, image
        self.modes: list[Mode] = [model.relations.mode(name) for name in config.training.modes]
        self.robot = config.model.embodiment(config.data.embodiment)
        self.reach = Reach.of(config.timeline)
        self.layout = needed(model.training_layout(config.timeline.blocks), self.modes, self.reach)
        self.flex = config.model.attention == "flex"
        self.dense_MLL = torch.stack([m.table.dense(self.layout, self.reach) for m in self.modes]).to(model.device)
        self.parts = window_mask(self.dense_MLL, self.layout)

    def __call__(self, batch: dict[str, Any], generator: torch.Generator, mode: str | None = None) -> Losses:
        """Losses of a collated batch; modes are drawn from the config unless one is given."""
        size, t = len(batch["frames"]), self.config.training
        names = list(t.modes)
        chosen = [names.index(mode)] * size if mode else draw_modes(t.modes, size, generator)
        modes = [self.modes[i] for i in chosen]
        levels = draw_levels(self.config.noise, self.config.timeline, modes, generator, t.predict_first_frame)
        window, video_target, action_target = self._window(batch, levels, generator)
        conditions = self._conditions(batch, window, generator)
        video, action = self.model(window, conditions, self._mask(chosen, generator), self.layout)

        device = self.model.device
        video_seen = self._video_seen(batch, levels).to(device) & _predicts(modes, Kind.V, device)
        action_seen = (~batch["action_is_pad"] & levels.action_seeks).to(device) & _predicts(modes, Kind.A, device)
        channels = self.model.robot_channels(window.embodiment_B)
        video_sigma, action_sigma = window.video_t_BF / TIMESTEPS, window.action_t_BT / TIMESTEPS
        return Losses(
            [m.name for m in modes],
            replace(video_errors(video, video_target, self._video_weight(video_sigma), video_seen), sigma_BU=video_sigma),
            replace(action_errors(action, action_target, level_weights(self.config.noise.action, action_sigma), action_seen.unsqueeze(2) & (channels > 0)), sigma_BU=action_sigma),
            t.reduction,
        )

    def _video_weight(self, sigma_BF: Tensor) -> Tensor:
        """The level's weight; a head that puts out the data is judged on the data: its velocity's error is 1 / sigma times larger."""
        weight = level_weights(self.config.noise.video, sigma_BF)
        return weight if self.config.model.video_head == "velocity" else weight * sigma_BF.clamp_min(SMALLEST_SIGMA).square()

    def _mask(self, chosen: list[int], generator: torch.Generator) -> TrainingMask:
        """Each sample's mode; some samples go without states, some without a goal."""
        t, kinds_L, device = self.config.training, self.layout.kinds_L, self.model.device
        hidden = (uniform((len(chosen), 1), generator) < t.state_dropout).cpu() & (kinds_L == int(Kind.S))
        if self.config.model.goal_image:
            hidden |= (uniform((len(chosen), 1), generator) >= t.goal_image).cpu() & (kinds_L == int(Kind.G))
        if self.flex:
            return block_mask([self.modes[i].table for i in chosen], self.layout, self.reach, hidden, device)
        rows = torch.tensor(chosen, device=device)
        if self.parts is not None:
            parts = self.parts.select(rows)
            return parts.hide(hidden.to(device)) if bool(hidden.any()) else parts
        itself = torch.eye(len(kinds_L), dtype=torch.bool, device=device)
        return (self.dense_MLL[rows] & (~hidden.to(device).unsqueeze(1) | itself)).unsqueeze(1)

    def _window(self, batch: dict[str, Any], levels: LevelDraw, generator: torch.Generator) -> tuple[Window, Tensor, Tensor]:
        device, before = self.model.device, self.config.timeline.first_frame == "before"
        latents = self.codec.encode(batch["frames"].to(device))
        m = self.config.model
        action, executed = (self.actions_of(batch, key) for key in ("action", "executed"))
        state = pad_states(m, batch["state"].to(device))
        embodiment = torch.full((len(state),), self.model.embodiment_index(self.config.data.embodiment), device=device)
        future = latents[:, :, 1:] if before and levels.first_B1 is None else latents
        sigma_F = levels.video_BF if levels.first_B1 is None else torch.cat([levels.first_B1, levels.video_BF], dim=1)
        clean_F, video_F, action_T = (x.to(device) for x in (levels.clean_BF, sigma_F, levels.action_BT))
        noise = [torch.randn(x.shape, generator=generator).to(device) for x in (latents, future, action)]
        keep = self.model.action_channels(embodiment)
        noisy_action = add_noise(action, noise[2], action_T[:, :, None])
        window = Window(
            clean_BCFHW=add_noise(latents, noise[0], clean_F[:, None, :, None, None]),
            noisy_BCFHW=add_noise(future, noise[1], video_F[:, None, :, None, None]),
            executed_BTA=executed,
            noisy_action_BTA=noisy_action if keep is None else noisy_action * keep,
            clean_t_BF=TIMESTEPS * clean_F,
            video_t_BF=TIMESTEPS * video_F,
            action_t_BT=TIMESTEPS * action_T,
            embodiment_B=embodiment,
            state_BNS=state,
            goal_BC1HW=self.codec.encode(batch["frames"][:, -1:].to(device)) if m.goal_image else None,
        )
        return window, velocity_target(future, noise[1]), velocity_target(action, noise[2])

    def actions_of(self, batch: dict[str, Any], key: str) -> Tensor:
        """A batch's actions (B, N A, .) on the device; zeros in place of those that would lead to a first frame inside block 0, as in a session."""
        lead = self.config.timeline.lead
        actions = pad_actions(self.config.model, self.robot, batch[key].to(self.model.device))
        return torch.cat([torch.zeros_like(actions[:, :lead]), actions[:, lead:]], dim=1)

    def _conditions(self, batch: dict[str, Any], window: Window, generator: torch.Generator) -> Conditions:
        """`conditions_of`, with some of the instructions dropped."""
        dropped = (uniform((len(batch["instruction"]),), generator) < self.config.training.text_dropout).tolist()
        assert window.state_BNS is not None
        return self.conditions_of(batch, window.state_BNS, window.embodiment_B, dropped)

    def conditions_of(self, batch: dict[str, Any], state_BNS: Tensor, embodiment_B: Tensor, dropped: list[bool] | None = None) -> Conditions:
        """Instructions, and where the model takes them the window's first state, its first frame and that frame's image embeddings."""
        m, device = self.config.model, self.model.device
        texts = prompts(batch["instruction"], self.config.text.template)
        conditions = self.model.encode_text(["" if gone else text for text, gone in zip(texts, dropped or [False] * len(texts), strict=True)])
        if m.state == "context":
            conditions = self.model.with_state(conditions, state_BNS[:, 0], embodiment_B)
        if self.image is not None:
            conditions = self.model.with_image(conditions, self.image(batch["frames"][:, 0].to(device)).to(device))
        if m.first_frame == "concat":
            conditions = conditions.with_first_frame(first_frame_condition(self.codec, batch["frames"][:, :1].to(device), self.config.timeline.latents))
        return conditions

    def _video_seen(self, batch: dict[str, Any], levels: LevelDraw) -> Tensor:
        """(B, frames of the noisy video): latent frames that are neither padding nor given."""
        real = ~latent_padding(batch["frames_is_pad"], self.config)
        if levels.first_B1 is not None:
            return real & torch.cat([levels.first_B1 > 0, levels.video_seeks], dim=1)
        return (real[:, 1:] if self.config.timeline.first_frame == "before" else real) & levels.video_seeks


def latent_padding(frames_is_pad: Tensor, config: Config) -> Tensor:
    """(B, 1 + 4 (F - 1)) of pixel frames to (B, F) of latent frames, by the config's rule."""
    groups = frames_is_pad[:, 1:].unflatten(1, (-1, config.timeline.temporal_stride))
    later = groups.any(dim=2) if config.training.frame_padding == "any" else groups.all(dim=2)
    return torch.cat([frames_is_pad[:, :1], later], dim=1)


def needed(layout: Layout, modes: list[Mode], reach: Reach) -> Layout:
    """The layout without the segments that nothing supervised sees, over any number of layers, in any of the modes."""
    n, kinds, blocks = len(layout.segments), torch.tensor([int(s.kind) for s in layout.segments]), torch.tensor([s.block for s in layout.segments])
    keep = torch.zeros(n, dtype=torch.bool)
    for mode in modes:
        sees = mode.table.mask(kinds, blocks, kinds, blocks, reach)
        seen = torch.isin(kinds, torch.tensor([int(k) for k in mode.predicts]))
        while True:
            more = seen | (sees & seen[:, None]).any(0)
            if torch.equal(more, seen):
                break
            seen = more
        keep |= seen
    keep |= torch.isin(kinds, torch.tensor([int(Kind.V), int(Kind.A)]))
    assert any(s.kind in VIDEO_KINDS for s in layout.segments)
    return Layout(tuple(s for s, kept in zip(layout.segments, keep.tolist(), strict=True) if kept))


def _predicts(modes: list[Mode], kind: Kind, device: torch.device) -> Tensor:
    return torch.tensor([[kind in m.predicts] for m in modes], device=device)
