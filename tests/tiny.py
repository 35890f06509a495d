"""Tiny real configs, policies, episodes and inputs that the tests share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch
from torch import nn

from wam.codec.clip_image import ClipImage
from wam.codec.linear import LinearCodec
from wam.config import CodecConfig, Config, load_config
from wam.data.normalize import Normalizer
from wam.model.wam import Window, WorldActionModel
from wam.pretrained import Policy

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
TASKS = ["open the drawer", "close the door", "open the drawer"]
FORGETFUL = ("fast_wam", "fast_wam_joint", "fast_wam_idm", "uwm", "vla")  # presets of one observation and one block
IMAGE_DIM = 32


def tiny_config(*overrides: str) -> Config:
    """A model that runs in milliseconds; `overrides` as on the command line."""
    return load_config(None, (*SMALL, *overrides))


def tiny_preset(preset: str, expert: int | None = None, *overrides: str) -> Config:
    """A preset on the tiny sizes, with or without an expert, without guidance unless asked for."""
    sizes = [f"preset={preset}", f"model.expert_width={expert or 'null'}", f"model.expert_ffn_dim={40 if expert else 'null'}", "sampling.guidance=1", "sampling.steps=3"]
    sizes += ["timeline.blocks=1"] if preset in FORGETFUL else []
    if preset == "lingbot_va":
        sizes += ["timeline.latents_per_block=2", "timeline.actions_per_block=16", "sampling.action_steps=4"]
        sizes += ["model.action_head=linear"] if expert else []  # its own head is the video's, of another width than an expert
    return tiny_config(*sizes, *overrides)


def tiny_model(config: Config, seed: int = 0) -> WorldActionModel:
    """A model with random weights everywhere: layers that start at zero would hide mistakes."""
    torch.manual_seed(seed)
    model = WorldActionModel(config).eval()
    for parameter in model.parameters():
        if bool((parameter == 0).all()):
            nn.init.normal_(parameter, std=0.1)
    return model.requires_grad_(False)


def tiny_clip() -> ClipImage:
    """A random CLIP vision transformer of `IMAGE_DIM` numbers a token."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    sizes = CLIPVisionConfig(hidden_size=IMAGE_DIM, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=56, patch_size=28)
    return ClipImage(CLIPVisionModel(sizes).eval())


@cache
def tiny_codec(config: CodecConfig) -> LinearCodec:
    """A codec fitted on noise."""
    codec = LinearCodec(config)
    codec.fit(torch.from_numpy(np.random.default_rng(0).integers(0, 255, (9, 4, *config.image_size, 3), dtype=np.uint8)))
    return codec


def tiny_policy(config: Config) -> Policy:
    """A random model with a fitted codec and normaliser, and an image encoder where the model takes its embeddings."""
    rng, m = np.random.default_rng(0), config.model
    robot = m.embodiment(config.data.embodiment)
    normalizer = Normalizer.fit({"state": rng.normal(size=(50, robot.state_dim)), "action": rng.uniform(-1, 1, (50, robot.action_dim))})
    return Policy(config, tiny_model(config), tiny_codec(config.codec), normalizer.to_dict(), {"control_hz": 80}, tiny_clip() if m.image_dim else None)


# ------------------------------------------------------------------------------------------------ episodes


@dataclass(frozen=True)
class Episode:
    """What robots see and do, in physical units: frames uint8 (B, F, H, W, 3), states (B, N, .), actions (B, N A - lead, .), goals (B, H, W, 3)."""

    config: Config
    frames: np.ndarray
    states: np.ndarray
    actions: np.ndarray
    goals: np.ndarray

    @property
    def first_block(self) -> int:
        """The first block that is planned: 1 where block 0 is the first frame alone."""
        t = self.config.timeline
        return int(t.first_frame == "inside" and t.latents_per_block == 1)

    def at(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Frames that have come since the block before, and the state, as `block` begins."""
        start = 0 if block == self.first_block else self._seen(block - 1)
        return self.frames[:, start : self._seen(block)], self.states[:, block]

    def _seen(self, block: int) -> int:
        """Pixel frames seen as `block` begins."""
        t = self.config.timeline
        return 1 + t.temporal_stride * (block * t.latents_per_block - (t.first_frame == "inside" and block > 0))

    def done(self, block: int) -> np.ndarray:
        """Actions executed in a block."""
        t = self.config.timeline
        ends = [max(0, b * t.actions_per_block - t.lead) for b in (block, block + 1)]
        return self.actions[:, ends[0] : ends[1]]

    def rows(self, rows: list[int]) -> Episode:
        """Some of the robots."""
        return Episode(self.config, self.frames[rows], self.states[rows], self.actions[rows], self.goals[rows])


def tiny_episode(config: Config, batch: int, blocks: int, seed: int = 5) -> Episode:
    """Random pictures, states and actions of `blocks` whole blocks."""
    rng, t, robot = np.random.default_rng(seed), config.timeline, config.model.embodiment(config.data.embodiment)
    size, inside = config.codec.image_size, t.first_frame == "inside"
    frames = rng.integers(0, 255, (batch, 1 + t.temporal_stride * (blocks * t.latents_per_block - inside), *size, 3), dtype=np.uint8)
    states = rng.normal(size=(batch, blocks, robot.state_dim)).astype(np.float32)
    actions = rng.uniform(-1, 1, (batch, blocks * t.actions_per_block - t.lead, robot.action_dim)).astype(np.float32)
    return Episode(config, frames, states, actions, rng.integers(0, 255, (batch, *size, 3), dtype=np.uint8))


# ------------------------------------------------------------------------------------------------ windows


def random_window(model: WorldActionModel, batch: int, blocks: int, seed: int = 1) -> Window:
    """A window of noise with a level of its own for every frame and every action."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    t, m, c = model.config.timeline, model.config.model, model.config.codec.channels
    frames, actions = blocks * t.latents_per_block, blocks * t.actions_per_block
    clean, noisy = frames + (t.first_frame == "before"), frames + model.config.training.predict_first_frame
    return Window(
        clean_BCFHW=normal(batch, c, clean, *model.latent_size),
        noisy_BCFHW=normal(batch, c, noisy, *model.latent_size),
        state_BNS=normal(batch, blocks, m.states),
        executed_BTA=normal(batch, actions, m.actions),
        noisy_action_BTA=normal(batch, actions, m.actions),
        clean_t_BF=torch.zeros(batch, clean),
        video_t_BF=1000 * torch.rand(batch, noisy, generator=generator),
        action_t_BT=1000 * torch.rand(batch, actions, generator=generator),
        embodiment_B=torch.zeros(batch, dtype=torch.int64),
        goal_BC1HW=normal(batch, c, 1, *model.latent_size) if m.goal_image else None,
    )


def window_of(policy: Policy, episode: Episode, blocks: int) -> Window:
    """An episode as training sees it: the clean part is what a session observes, the noisy part is random."""
    window, t, normalizer = random_window(policy.model, len(episode.frames), blocks), policy.config.timeline, Normalizer.from_dict(policy.normalizer)
    clean = policy.codec.encode(torch.from_numpy(episode.frames[:, : 1 + t.temporal_stride * (window.clean_BCFHW.shape[2] - 1)]))
    executed = torch.from_numpy(normalizer.normalize("action", episode.actions[:, : blocks * t.actions_per_block - t.lead]))
    goals = policy.codec.encode(torch.from_numpy(episode.goals).unsqueeze(1)) if policy.config.model.goal_image else None
    return replace(
        window,
        clean_BCFHW=clean,
        executed_BTA=nn.functional.pad(executed, (0, 0, t.lead, 0)),
        state_BNS=torch.from_numpy(normalizer.normalize("state", episode.states[:, :blocks])),
        goal_BC1HW=goals,
    )
