"""Tiny real configs and inputs that the tests share."""

from __future__ import annotations

import torch
from torch import nn

from wam.config import Config, load_config
from wam.model.wam import Window, WorldActionModel

SMALL = (
    "codec.image_size=[32, 48]",
    "codec.channels=6",
    "model.layers=2",
    "model.heads=2",
    "model.head_dim=24",
    "model.ffn_dim=64",
    "model.freq_dim=32",
    "text.width=16",
    "text.heads=2",
    "timeline.blocks=4",
)


def tiny_config(*overrides: str) -> Config:
    """A model that runs in milliseconds; `overrides` as on the command line."""
    return load_config(None, (*SMALL, *overrides))


def tiny_model(config: Config, seed: int = 0) -> WorldActionModel:
    """A model with random weights everywhere: layers that start at zero would hide mistakes."""
    torch.manual_seed(seed)
    model = WorldActionModel(config).eval()
    for parameter in model.parameters():
        if bool((parameter == 0).all()):
            nn.init.normal_(parameter, std=0.1)
    return model.requires_grad_(False)


def random_window(model: WorldActionModel, batch: int, blocks: int, seed: int = 1) -> Window:
    """A window of noise with a level of its own for every block's video and every action."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    t, c = model.config.timeline, model.config.codec.channels
    k, a = t.latents_per_block, t.actions_per_block
    video_sigma = torch.rand(batch, blocks, generator=generator).repeat_interleave(k, dim=1)
    return Window(
        clean_BCFHW=normal(batch, c, 1 + blocks * k, *model.latent_size),
        noisy_BCFHW=normal(batch, c, blocks * k, *model.latent_size),
        state_BNS=normal(batch, blocks, 4),
        executed_BTA=normal(batch, blocks * a, 4),
        noisy_action_BTA=normal(batch, blocks * a, 4),
        clean_t_BF=torch.zeros(batch, 1 + blocks * k),
        video_t_BF=1000 * video_sigma,
        action_t_BT=1000 * torch.rand(batch, blocks * a, generator=generator),
        embodiment_B=torch.zeros(batch, dtype=torch.int64),
    )
