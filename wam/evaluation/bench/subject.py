"""What is measured: a model of a size, with random weights, and diffusers' own transformer over the very same weights.

    256, 512, ...        a width: few layers, 60 patches a frame, 2 frames and 24 actions a block; what a CPU can run
    1.3b, 5b, 14b        the released Wan sizes, at the frame sizes they are used with for robots
    tiny                 the shape of 14b in milliseconds

Weights are drawn on the device in the dtype they are used in: there is never a second copy, so what fits can be measured.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

from wam.config import Config, load_config
from wam.model.actions import EmbodimentLinear
from wam.model.conditions import Conditions
from wam.model.loading import backbone_arguments
from wam.model.wam import Noisy, Window, WorldActionModel
from wam.shards import build_empty
from wam.timeline import FIRST_BLOCK, Kind

_BLOCK = ("timeline.latents_per_block=2", "timeline.actions_per_block=24", "timeline.frame_stride=3")
_ROBOT = ("model.mlp_hidden=1024", "model.action_width=32", "model.state_width=64", "text.kind=umt5", "text.max_tokens=512", "text.width=4096", "model.freq_dim=256")
_CONCAT = ("model.first_frame=concat", "model.image_dim=1280")
_WINDOW = ("timeline.blocks=4", "timeline.history=4")

NAMED: dict[str, tuple[str, ...]] = {
    # 352 x 640 pixels / 8 / 2 = 880 patches a frame (DreamZero's 14B on DROID)
    "14b": (*_BLOCK, *_ROBOT, *_WINDOW, *_CONCAT, "codec.image_size=[352, 640]", "codec.channels=16", "model.layers=40", "model.heads=40", "model.head_dim=128", "model.ffn_dim=13824"),
    # 160 x 320 pixels / 16 / 2 = 50 patches a frame (DreamZero's 5B)
    "5b": (*_BLOCK, *_ROBOT, *_WINDOW, "codec.image_size=[160, 320]", "codec.patch=16", "codec.channels=48", "model.layers=30", "model.heads=24", "model.head_dim=128", "model.ffn_dim=14336"),
    # 256 x 256 pixels / 8 / 2 = 256 patches a frame
    "1.3b": (*_BLOCK, *_ROBOT, *_WINDOW, "codec.image_size=[256, 256]", "codec.channels=16", "model.layers=30", "model.heads=12", "model.head_dim=128", "model.ffn_dim=8960"),
    "tiny": (*_BLOCK, *_ROBOT, *_WINDOW, *_CONCAT, "codec.image_size=[32, 48]", "codec.channels=4", "model.layers=2", "model.heads=2", "model.head_dim=16", "model.ffn_dim=64", "model.mlp_hidden=32", "text.width=16"),
}


def size_config(size: str, *overrides: str) -> Config:
    """The config of a size: a name, or a width in numbers.

    Raises:
        ValueError: neither.
    """
    if size in NAMED:
        return load_config(None, [*NAMED[size], *overrides])
    if not size.isdigit() or int(size) < 64 or int(size) % 64:
        raise ValueError(f"unknown size {size!r}; expected one of {', '.join(NAMED)}, or a width that is a multiple of 64, e.g. 256")
    width = int(size)
    shape = ("codec.image_size=[96, 160]", "codec.channels=16", "model.layers=2", f"model.heads={width // 64}", "model.head_dim=64", f"model.ffn_dim={4 * width}", "model.freq_dim=256", "timeline.history=3")
    return load_config(None, [*_BLOCK, *shape, *overrides])


# ------------------------------------------------------------------------------------------------ weights


def build_model(config: Config, device: torch.device, dtype: torch.dtype, seed: int = 0) -> WorldActionModel:
    """A model with random weights, drawn on the device, tensor by tensor."""
    model = build_empty(lambda: WorldActionModel(config))
    fill_randomly(model, device, dtype, seed)
    return model.eval()


@torch.no_grad()
def fill_randomly(model: nn.Module, device: torch.device, dtype: torch.dtype, seed: int) -> None:
    """Give parameters on the meta device values: matrices normal with variance 1 / fan-in, norms 1, biases 0; ties hold."""
    generator, made = torch.Generator(device).manual_seed(seed), dict[int, nn.Parameter]()
    for module in model.modules():
        for name, old in module._parameters.items():
            if old is None:
                continue
            if id(old) not in made:
                made[id(old)] = nn.Parameter(_values(module, name, old, device, dtype, generator))
            module._parameters[name] = made[id(old)]
    model.to(device)  # buffers, which are real and stay in their own dtype


def _values(module: nn.Module, name: str, old: Tensor, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    value = torch.empty(old.shape, device=device, dtype=dtype)
    if old.ndim < 2 or name == "bias":
        return value.fill_(1 if name == "weight" else 0)
    fan_in = old.shape[1] if isinstance(module, EmbodimentLinear) else old.shape[-1] if old.ndim == 3 else old[0].numel()
    return value.normal_(0, fan_in**-0.5, generator=generator)


def diffusers_twin(model: WorldActionModel) -> WanTransformer3DModel:
    """diffusers' own model that holds the very parameters of our backbone, gradients included: two sides in the memory of one."""
    twin = build_empty(lambda: WanTransformer3DModel(**backbone_arguments(model.config)))
    twin.load_state_dict(model.backbone.state_dict(keep_vars=True), assign=True)
    twin.to(model.device)
    if model.backbone.gradient_checkpointing:
        twin.enable_gradient_checkpointing()
    return twin.train(model.training)


# ------------------------------------------------------------------------------------------------ inputs


@dataclass(frozen=True)
class Inputs:
    """Random inputs of a model: what a robot, a dataset or an encoder would give."""

    model: WorldActionModel
    generator: torch.Generator

    @staticmethod
    def of(model: WorldActionModel, seed: int = 0) -> Inputs:
        """Inputs from a seed."""
        return Inputs(model, torch.Generator(model.device).manual_seed(seed))

    def normal(self, *shape: int) -> Tensor:
        """Standard normal float32."""
        return torch.randn(shape, generator=self.generator, device=self.model.device)

    def timesteps(self, *shape: int) -> Tensor:
        """Uniform in 0..1000."""
        return 1000 * torch.rand(shape, generator=self.generator, device=self.model.device)

    def conditions(self, batch: int, frames: int | None = None) -> Conditions:
        """One instruction for all rows, the image and the first frame where the model takes them; nothing prepared ahead.

        Args:
            frames: latent frames that a first frame on the channels conditions; default: a training window's.
        """
        config, model = self.model.config, self.model
        rows = torch.zeros(batch, dtype=torch.int64, device=model.device)
        conditions = model.embed_text(self.text(), rows)
        if config.model.image_dim is not None:
            conditions = model.with_image(conditions, self.image(batch))
        if config.model.first_frame == "concat":
            channels = config.timeline.temporal_stride + config.codec.channels
            conditions = conditions.with_first_frame(self.normal(batch, channels, frames or config.timeline.latents, *model.latent_size))
        return conditions

    def text(self) -> Tensor:
        """What the text encoder would give for one instruction."""
        return self.normal(1, self.model.config.text.max_tokens, self.model.config.text.width)

    def image(self, batch: int) -> Tensor:
        """What CLIP would give for a first frame."""
        return self.normal(batch, 257, self.model.config.model.image_dim or 0)

    def video(self, batch: int, frames: int) -> Tensor:
        """Latents."""
        return self.normal(batch, self.model.config.codec.channels, frames, *self.model.latent_size)

    def window(self, batch: int) -> Window:
        """A training window: levels as the objective draws them, one per frame of video and one per action."""
        t, m = self.model.config.timeline, self.model.config.model
        frames, actions = t.blocks * t.latents_per_block, t.blocks * t.actions_per_block
        return Window(
            clean_BCFHW=self.video(batch, t.latents),
            noisy_BCFHW=self.video(batch, frames),
            executed_BTA=self.normal(batch, actions, m.actions),
            noisy_action_BTA=self.normal(batch, actions, m.actions),
            clean_t_BF=torch.zeros(batch, t.latents, device=self.model.device),
            video_t_BF=self.timesteps(batch, frames),
            action_t_BT=self.timesteps(batch, actions),
            embodiment_B=self.embodiment(batch),
            state_BNS=self.normal(batch, t.blocks, m.states),
        )

    def noisy(self, batch: int) -> Noisy:
        """One block's noisy video and actions, at one level."""
        t = self.model.config.timeline
        level = self.timesteps(batch, 1)
        return Noisy(self.video(batch, t.latents_per_block), level, self.normal(batch, t.actions_per_block, self.model.config.model.actions), level)

    def embodiment(self, batch: int) -> Tensor:
        """The first robot."""
        return torch.zeros(batch, dtype=torch.int64, device=self.model.device)

    def segment(self, kind: Kind, batch: int) -> Tensor:
        """What `prefill` writes of a kind."""
        t, m = self.model.config.timeline, self.model.config.model
        if kind in (Kind.S, Kind.AC):
            return self.normal(batch, 1, m.states) if kind is Kind.S else self.normal(batch, t.actions_per_block, m.actions)
        return self.video(batch, 1 if kind is Kind.H else t.latents_per_block)


@dataclass(frozen=True)
class Memory:
    """A cache that holds what was seen, and the block that comes next."""

    cache: Any
    block: int
    conditions: Conditions
    embodiment_B: Tensor


@torch.no_grad()
def remember(inputs: Inputs, batch: int, past: int) -> Memory:
    """A memory of the first frame, `past` blocks, and the state now."""
    model, embodiment = inputs.model, inputs.embodiment(batch)
    table = model.relations.mode("skip").table
    frames = 1 + (past + 2) * model.config.timeline.latents_per_block
    conditions = model.prepare(inputs.conditions(batch, frames))
    cache = model.new_cache(batch)

    def write(kind: Kind, block: int) -> None:
        model.prefill(cache, table, kind, inputs.segment(kind, batch), [block] * batch, conditions, embodiment)

    write(Kind.H, FIRST_BLOCK)
    for block in range(past + 1):
        write(Kind.S, block)
        if block < past:
            write(Kind.AC, block)
            write(Kind.VC, block)
    return Memory(cache, past, conditions, embodiment)


def with_timeline(config: Config, **changes: Any) -> Config:
    """The config with another timeline."""
    return replace(config, timeline=replace(config.timeline, **changes))
