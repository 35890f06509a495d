"""The objective: a batch of windows, noised, through the network, to one loss for video and one for actions.

A loss is a sum over supervised elements divided by their number, over the whole batch.  Padding, padded dimensions and what a
mode does not predict are not supervised, so samples of different modes share a batch without rescaling one another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from wam.codec.linear import LinearCodec
from wam.config import Config
from wam.flow import SMALLEST_SIGMA, add_noise, uniform, velocity_target
from wam.model.wam import Window, WorldActionModel
from wam.relations import Mode, get_mode
from wam.timeline import Kind, training_layout
from wam.training.noise import draw_levels, draw_modes


@dataclass(frozen=True)
class Losses:
    """Per-sample sums of squared errors and element counts; the batch losses come from these."""

    modes: list[str]
    video_sum_B: Tensor
    video_count_B: Tensor
    action_sum_B: Tensor
    action_count_B: Tensor

    def video(self) -> Tensor:
        """Mean squared error of the video velocity over supervised elements (0 when there are none)."""
        return self.video_sum_B.sum() / self.video_count_B.sum().clamp_min(1)

    def action(self) -> Tensor:
        """Mean squared error of the action velocity over supervised elements (0 when there are none)."""
        return self.action_sum_B.sum() / self.action_count_B.sum().clamp_min(1)

    def by_mode(self) -> dict[str, float]:
        """`<mode>/video` and `<mode>/action` losses of the modes in the batch."""
        out = {}
        for name in dict.fromkeys(self.modes):
            rows = torch.tensor([m == name for m in self.modes], device=self.video_sum_B.device)
            for part, total, count in (("video", self.video_sum_B, self.video_count_B), ("action", self.action_sum_B, self.action_count_B)):
                n = count[rows].sum()
                if n > 0:
                    out[f"{name}/{part}"] = float(total[rows].detach().sum() / n)
        return out


class Objective:
    """Computes the losses of a batch; masks of every mode are laid out once."""

    def __init__(self, config: Config, model: WorldActionModel, codec: LinearCodec):
        self.config, self.model, self.codec = config, model, codec
        self.modes: list[Mode] = [get_mode(name) for name in config.training.modes]
        layout = training_layout(model.clock, config.timeline.blocks)
        is_state_L = layout.kinds_L == int(Kind.S)
        self.seeks_state_LL = (~is_state_L[:, None] & is_state_L[None, :]).to(model.device)
        self.masks_MLL = torch.stack([m.table.dense(layout, config.timeline.history) for m in self.modes]).to(model.device)

    def __call__(self, batch: dict[str, Any], generator: torch.Generator, mode: str | None = None) -> Losses:
        """Losses of a collated batch; modes are drawn from the config unless one is given."""
        size = len(batch["frames"])
        names = list(self.config.training.modes)
        chosen = [names.index(mode)] * size if mode else draw_modes(self.config.training.modes, size, generator)
        modes = [self.modes[i] for i in chosen]
        window, video_target, action_target = self._window(batch, modes, generator)
        context = self.model.encode_text(batch["instruction"])
        mask = self._mask(chosen, generator)
        video, action = self.model(window, context, mask)

        device = self.model.device
        video_seen = self._video_seen(batch).to(device) & _predicts(modes, Kind.V, device)
        action_seen = (~batch["action_is_pad"]).to(device) & _predicts(modes, Kind.A, device)
        video_error = (video.float() - video_target).square().mean(dim=(1, 3, 4)) * self._video_weight(window.video_sigma_BF)
        action_error = (action.float() - action_target).square().mean(dim=2)
        return Losses(
            [m.name for m in modes],
            (video_error * video_seen).sum(1),
            video_seen.sum(1),
            (action_error * action_seen).sum(1),
            action_seen.sum(1),
        )

    def _video_weight(self, sigma_BF: Tensor) -> Tensor:
        """A head that puts out the data is judged on the data: its velocity's error is 1 / sigma times larger."""
        if self.config.model.video_head == "velocity":
            return torch.ones_like(sigma_BF)
        return sigma_BF.clamp_min(SMALLEST_SIGMA).square()

    def _mask(self, chosen: list[int], generator: torch.Generator) -> Tensor:
        """(B, 1, L, L): each sample's mode; some samples go without states."""
        hidden_B = uniform((len(chosen),), generator) < self.config.training.state_dropout
        masks = self.masks_MLL[torch.tensor(chosen, device=self.model.device)]
        return (masks & ~(hidden_B.to(masks.device)[:, None, None] & self.seeks_state_LL)).unsqueeze(1)

    def _window(self, batch: dict[str, Any], modes: list[Mode], generator: torch.Generator) -> tuple[Window, Tensor, Tensor]:
        device = self.model.device
        latents = self.codec.encode(batch["frames"].to(device))
        action, executed, state = (batch[k].to(device) for k in ("action", "executed", "state"))
        levels = draw_levels(self.config.noise, self.config.timeline, modes, generator)
        clean_F, video_F, action_T = (x.to(device) for x in (levels.clean_BF, levels.video_BF, levels.action_BT))
        noise = [torch.randn(x.shape, generator=generator).to(device) for x in (latents, latents[:, :, 1:], action)]
        window = Window(
            clean_BCFHW=add_noise(latents, noise[0], clean_F[:, None, :, None, None]),
            noisy_BCFHW=add_noise(latents[:, :, 1:], noise[1], video_F[:, None, :, None, None]),
            state_BNS=state,
            executed_BTA=executed,
            noisy_action_BTA=add_noise(action, noise[2], action_T[:, :, None]),
            clean_sigma_BF=clean_F,
            video_sigma_BF=video_F,
            action_sigma_BT=action_T,
            embodiment_B=torch.full((len(state),), self.model.embodiment_index(self.config.data.embodiment), device=device),
        )
        return window, velocity_target(latents[:, :, 1:], noise[1]), velocity_target(action, noise[2])

    def _video_seen(self, batch: dict[str, Any]) -> Tensor:
        """(B, kN): latent frames none of whose pixel frames is padding."""
        pad = batch["frames_is_pad"][:, 1:]
        return ~pad.unflatten(1, (-1, self.config.timeline.temporal_stride)).any(dim=2)


def _predicts(modes: list[Mode], kind: Kind, device: torch.device) -> Tensor:
    return torch.tensor([[kind in m.predicts] for m in modes], device=device)
