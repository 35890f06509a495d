"""Typed configs: what a run is, written down and checked before anything is computed.

A config is a tree of frozen dataclasses.  It is read from YAML, changed by `section.key=value` overrides, and checks its own
arithmetic when it is built.  Unknown keys and wrong types are refused with the nearest right name; sizes that do not fit are
refused with the sum spelled out.  What is resolved is saved beside the run, so a checkpoint always says how it was made.

    YAML file  ->  overrides  ->  dataclasses (typed, checked)  ->  config.yaml in the run directory
"""

from __future__ import annotations

import dataclasses
import math
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from wam.cells import read_cells
from wam.config_tree import ConfigError, from_dict, names, overlay, to_dict
from wam.config_tree import require as _require
from wam.files import write_text_atomic
from wam.presets import get_preset


# ------------------------------------------------------------------------------------------------ sections


@dataclass(frozen=True)
class CollectConfig:
    """`wam collect`: demonstrations from Meta-World's scripted experts, written as a LeRobot v3.0 dataset."""

    tasks: tuple[str, ...] = ("drawer-open-v3",)
    episodes_per_task: int = 80
    seed: int = 0  # first seed of the demonstration range; see wam.evaluation.seeds
    image_size: int = 64  # square, pixels
    camera: str = "corner4"
    action_noise: float = 0.2  # largest standard deviation of the exploration noise; an episode's own is uniform in [0, this]
    steps_after_success: int = 8  # control steps recorded after the first success
    max_steps: int = 500  # control steps before an attempt counts as failed
    workers: int = 2

    def __post_init__(self) -> None:
        _require(len(self.tasks) > 0, "collect.tasks is empty", "name at least one Meta-World task, e.g. drawer-open-v3")
        for name in ("episodes_per_task", "image_size", "max_steps", "workers"):
            _require(getattr(self, name) >= 1, f"collect.{name} is {getattr(self, name)}", "it must be at least 1")
        _require(self.image_size % 2 == 0, f"collect.image_size is {self.image_size}", "H.264 with 4:2:0 colour needs an even size")
        _require(self.steps_after_success >= 0, f"collect.steps_after_success is {self.steps_after_success}", "it must be at least 0")
        _require(self.action_noise >= 0, f"collect.action_noise is {self.action_noise}", "a standard deviation cannot be negative")


@dataclass(frozen=True)
class DataConfig:
    """Which LeRobot dataset is read, and which of its columns mean what."""

    root: str = "data/metaworld"
    embodiment: str = "metaworld"
    cameras: tuple[str, ...] = ("observation.images.corner4",)
    state: str = "observation.state"
    action: str = "action"  # what the policy should do (the label)
    executed_action: str | None = None  # what the robot really did, where the dataset records it apart; default: `action`
    normalization: Literal["quantile", "mean_std", "min_max"] = "quantile"
    validation_fraction: float = 0.1  # episodes held out, the last of each task
    cache: Literal["memory", "none"] = "memory"  # decoded uint8 frames kept in memory, or decoded on every access
    workers: int = 0

    def __post_init__(self) -> None:
        _require(len(self.cameras) == 1, f"data.cameras lists {len(self.cameras)} cameras", "this version reads exactly one")
        _require(0 <= self.validation_fraction < 1, f"data.validation_fraction is {self.validation_fraction}", "expected 0 <= fraction < 1")
        _require(self.workers >= 0, f"data.workers is {self.workers}", "expected 0 (load in the training process) or more")


@dataclass(frozen=True)
class TimelineConfig:
    """One clock for frames, states and actions.

        pixels   p0 | p1 ... p(4k) |       4k frames a block, `frame_stride` control steps apart
        latents  H  | z1 ... zk    |       k latent frames a block (the codec folds 4 frames into one)
        state       | S            |       one, at the block's first control step
        actions     | a0 ... a(A-1)|       A control steps a block

    With `first_frame: inside` (LingBot-VA) there is no H: the first frame is the first latent of block 0, and the actions that would lead
    to it are padding.
    """

    blocks: int = 3  # N: blocks in a training window
    latents_per_block: int = 1  # k
    actions_per_block: int = 8  # A
    states_per_block: int = 1  # states a block, evenly over its control steps: DreamZero's code allows more than one, but all but the first lie in a plan's future
    frame_stride: int | None = 2  # control steps between two frames; null: frames and control steps are not tied (no data can be read then)
    history: int = 2  # how far back attention reaches, in `history_unit` (the first frame counts as the block before the first)
    history_unit: Literal["block", "segment"] = "block"  # segment: a block's video and its actions count as one each (LingBot-VA)
    first_frame: Literal["before", "inside"] = "before"  # H stands alone before block 0, or is the first latent of block 0
    sink: bool = False  # the first frame stays visible however old it is
    temporal_stride: int = 4  # frames folded into one latent frame; 4 for every Wan codec

    def __post_init__(self) -> None:
        for name in ("blocks", "latents_per_block", "actions_per_block", "states_per_block", "frame_stride", "history", "temporal_stride"):
            _require(getattr(self, name) is None or getattr(self, name) >= 1, f"timeline.{name} is {getattr(self, name)}", "it must be at least 1")
        states, actions = self.states_per_block, self.actions_per_block
        _require(actions % states == 0, f"timeline.states_per_block is {states}, which does not divide actions_per_block {actions}", "use a divisor; one state a block is usual")
        future = states > 1 and self.frame_stride is not None
        _require(not future, f"timeline.states_per_block is {states}, but a plan knows only the state at its start", "set it to 1, or frame_stride=null (no data can be read then)")
        frames = self.latents_per_block * self.temporal_stride
        steps = frames * (self.frame_stride or 0)
        _require(
            self.frame_stride is None or steps == self.actions_per_block,
            f"timeline does not fit: latents_per_block {self.latents_per_block} x temporal_stride {self.temporal_stride} = {frames} frames a block, "
            f"x frame_stride {self.frame_stride} = {steps} control steps, but actions_per_block is {self.actions_per_block}",
            f"set timeline.actions_per_block={steps}, or change frame_stride or latents_per_block",
        )
        _require(not (self.sink and self.first_frame == "inside"), "timeline.sink is true, but with first_frame 'inside' no frame stands alone", "set timeline.sink=false")

    @property
    def stride(self) -> int:
        """Control steps between two frames.

        Raises:
            ConfigError: frames and control steps are not tied.
        """
        _require(self.frame_stride is not None, "timeline.frame_stride is null, so no row of a dataset or simulator says when a frame is seen", "set it to the control steps between two frames")
        return int(self.frame_stride or 0)

    @property
    def frames_per_block(self) -> int:
        """Pixel frames a block adds (4k)."""
        return self.latents_per_block * self.temporal_stride

    @property
    def frames(self) -> int:
        """Pixel frames in a training window: the first stands alone in its latent, every later latent holds 4."""
        return 1 + (self.latents - 1) * self.temporal_stride

    @property
    def latents(self) -> int:
        """Latent frames in a training window: 1 + kN, or kN where the first frame is inside block 0."""
        return self.blocks * self.latents_per_block + (self.first_frame == "before")

    @property
    def lead(self) -> int:
        """Control steps of block 0 that lead to the first frame, of which nothing is known: padding (A / k where the first frame is inside)."""
        return self.actions_per_block // self.latents_per_block if self.first_frame == "inside" else 0


@dataclass(frozen=True)
class CodecConfig:
    """Video <-> latents: principal components fitted on the dataset (`linear`), or a pretrained Wan VAE (`wan`; 2.1: patch 8, 16 channels; 2.2: patch 16, 48)."""

    kind: Literal["linear", "wan"] = "linear"
    pretrained: str | None = None  # wan: folder in diffusers' layout (with `vae/`) or Hub id; null: the checkpoint's own folder holds it
    dtype: Literal["float32", "bfloat16"] = "float32"  # wan: what the VAE computes in; it is meant for float32
    image_size: tuple[int, int] = (64, 64)  # height, width in pixels
    patch: int = 8  # spatial stride in pixels
    channels: int = 24  # latent channels
    whitening: float = 1.0  # 1: every channel has unit variance; 0: channels keep their share of it; between: in between
    fit_frames: int = 4000  # frames used to fit the linear codec

    def __post_init__(self) -> None:
        for name in ("patch", "fit_frames"):
            _require(getattr(self, name) >= 1, f"codec.{name} is {getattr(self, name)}", "it must be at least 1")
        for side, size in zip(("height", "width"), self.image_size, strict=True):
            _require(size >= self.patch, f"codec.image_size {side} is {size}", f"it must hold at least one codec.patch of {self.patch} pixels")
            _require(
                size % self.patch == 0,
                f"codec.image_size {side} {size} is not a multiple of codec.patch {self.patch} ({size} = {size // self.patch} x {self.patch} + {size % self.patch})",
                f"use {size - size % self.patch} or {size + self.patch - size % self.patch}",
            )
        _require(0 <= self.whitening <= 1, f"codec.whitening is {self.whitening}", "expected 0..1")
        limit = 3 * self.patch * self.patch
        _require(self.kind != "linear" or self.pretrained is None, f"codec.pretrained is {self.pretrained!r}, but codec.kind is 'linear', which is fitted on the dataset", "set codec.kind=wan, or codec.pretrained=null")
        _require(1 <= self.channels <= limit, f"codec.channels is {self.channels}", f"a {self.patch}x{self.patch} RGB patch has {limit} numbers; expected 1..{limit}")


@dataclass(frozen=True)
class TextConfig:
    """Instruction -> embeddings: bytes (ByT5's tokenizer) through a small T5 encoder that is trained with the model, or Wan's frozen UMT5-XXL (512 tokens of 4096)."""

    kind: Literal["bytes", "umt5"] = "bytes"
    pretrained: str | None = None  # umt5: folder in diffusers' layout (with `text_encoder/` and `tokenizer/`) or Hub id; null: the checkpoint's own folder, or only what `cache` holds
    cache: str | None = None  # umt5: directory of embeddings; with all instructions in it, the encoder is never loaded
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # umt5: what the encoder computes in
    template: str = "{instruction}"  # the text that an instruction is put into; {instruction:lower} is the instruction in lower case
    max_tokens: int = 48
    width: int = 64
    layers: int = 1  # bytes: of the small encoder
    heads: int = 4

    def __post_init__(self) -> None:
        for name in ("max_tokens", "width", "layers", "heads"):
            _require(getattr(self, name) >= 1, f"text.{name} is {getattr(self, name)}", "it must be at least 1")
        _require(self.kind != "bytes" or self.width % self.heads == 0, f"text.width {self.width} is not a multiple of text.heads {self.heads}", "change one of them")
        unused = self.kind == "bytes" and (self.pretrained or self.cache)
        _require(not unused, f"text.pretrained or text.cache is {unused!r}, but text.kind is 'bytes', which is trained with the model", "set text.kind=umt5, or both to null")
        _require("{instruction}" in self.template or "{instruction:lower}" in self.template, f"text.template is {self.template!r}", "it must hold {instruction} or {instruction:lower}")


@dataclass(frozen=True)
class ImageConfig:
    """The first frame -> embeddings that cross-attention also sees (`model.image_dim`): Wan's frozen CLIP (257 tokens of 1280)."""

    kind: Literal["none", "clip"] = "none"
    pretrained: str | None = None  # folder in diffusers' layout (with `image_encoder/`) or Hub id; null: the checkpoint's own folder holds it
    framing: Literal["crop", "stretch"] = "crop"  # how a frame is made square: diffusers' pipelines crop, Wan's own code (and DreamZero) stretches
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        _require(self.kind == "clip" or self.pretrained is None, f"image.pretrained is {self.pretrained!r}, but image.kind is 'none'", "set image.kind=clip, or image.pretrained=null")


@dataclass(frozen=True)
class EmbodimentConfig:
    """One robot's sizes."""

    name: str = "metaworld"
    state_dim: int = 4
    action_dim: int = 4
    action_channels: tuple[int, ...] = ()  # which channels of a wider, shared action vector are this robot's (LingBot-VA); empty: the first
    relative_to: tuple[int, ...] = ()  # per action dimension: the state dimension at the block's start that it is a difference to, or -1; empty: all absolute (DreamZero)

    def __post_init__(self) -> None:
        channels = self.action_channels
        _require(
            not channels or (len(set(channels)) == self.action_dim and min(channels) >= 0),
            f"model.embodiments: action_channels of {self.name!r} are {list(channels)}",
            f"list action_dim = {self.action_dim} different channels, from 0",
        )
        relative = self.relative_to
        _require(
            not relative or (len(relative) == self.action_dim and all(-1 <= i < self.state_dim for i in relative)),
            f"model.embodiments: relative_to of {self.name!r} is {list(relative)}",
            f"list for each of action_dim = {self.action_dim} a state dimension below {self.state_dim}, or -1",
        )
        for name in ("state_dim", "action_dim"):
            _require(getattr(self, name) >= 1, f"model.embodiments: {name} of {self.name!r} is {getattr(self, name)}", "it must be at least 1")


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters on the backbone's linear layers (through peft); all that is not the backbone trains in full."""

    rank: int = 16
    alpha: float = 16.0  # the update is scaled by alpha / rank
    dropout: float = 0.0
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")

    def __post_init__(self) -> None:
        _require(self.rank >= 1, f"model.lora.rank is {self.rank}", "it must be at least 1")
        _require(len(self.targets) > 0, "model.lora.targets is empty", "name at least one linear layer, e.g. to_q")


@dataclass(frozen=True)
class ModelConfig:
    """The network: a `diffusers.WanTransformer3DModel`, extended with action and state tokens."""

    pretrained: str | None = None  # folder or Hub id of a Wan transformer in diffusers' layout that training starts from; its sizes must be those below
    layers: int = 6
    heads: int = 4
    head_dim: int = 48
    ffn_dim: int = 768
    freq_dim: int = 64
    eps: float = 1e-6  # of the norms in blocks and head; every released Wan: 1e-6
    angles: Literal["float32", "float64"] = "float32"  # precision of a level's sinusoid: diffusers' and LingBot-VA's; Wan's own code, DreamZero's and Fast-WAM's (they differ by 3e-6)
    patch: tuple[int, int, int] = (1, 2, 2)
    video_head: Literal["velocity", "sample"] = "velocity"  # what the video head puts out; pretrained Wan: the velocity
    first_frame: Literal["token", "concat"] = "token"  # concat: mask and first frame are joined to every frame's channels (Wan2.1 I2V)
    image_dim: int | None = None  # width of the image embeddings that cross-attention also sees (CLIP: 1280); null: none
    expert_width: int | None = None  # width of an action expert with its own blocks and shared attention; null: actions share the video blocks
    expert_ffn_dim: int | None = None  # default: 4 x expert_width
    positions: Literal["time", "frame_fraction", "index"] = "time"  # of states and actions: on the video's clock; LingBot-VA's; 1-D over the whole head (DreamZero, Fast-WAM)
    action_embed: Literal["level_mlp", "linear"] = "level_mlp"  # action and its level, mixed (DreamZero); or one projection (Fast-WAM, LingBot-VA)
    action_head: Literal["modulated_mlp", "mlp", "linear", "modulated_linear"] = "modulated_mlp"  # ours; DreamZero; Fast-WAM; LingBot-VA
    action_time: Literal["shared", "own"] = "shared"  # own: actions embed their levels with weights of their own (LingBot-VA; an expert always does)
    state: Literal["token", "context", "none"] = "token"  # a token of its own; the last token of the text (Fast-WAM); not seen
    state_level: Literal["clean", "action"] = "clean"  # action: the state is modulated by the level of its block's first action (DreamZero)
    activation: Literal["silu", "relu"] = "silu"  # of the state encoder's and the action head's hidden layer
    mlp_hidden: int | None = None  # width of that layer; default: the token's width
    action_width: int | None = None  # numbers in an action vector, padded; default: the widest embodiment's
    state_width: int | None = None  # likewise for states
    action_padding: Literal["zero", "noise"] = "zero"  # what channels that a robot does not have hold while its actions are denoised (DreamZero: noise)
    embodiment_weights: Literal["own", "shared"] = "own"  # one set of encoders and decoders per embodiment, or one for all (DreamZero)
    goal_image: bool = False  # the model can be given a goal image
    attention: Literal["auto", "sdpa", "eager", "flex", "xformers", "flash"] = "auto"
    gradient_checkpointing: bool = False
    lora: LoraConfig | None = None
    embodiments: tuple[EmbodimentConfig, ...] = (EmbodimentConfig(),)

    def __post_init__(self) -> None:
        for name in ("layers", "heads", "ffn_dim", "image_dim", "expert_width", "expert_ffn_dim", "mlp_hidden", "action_width", "state_width"):
            _require(getattr(self, name) is None or getattr(self, name) >= 1, f"model.{name} is {getattr(self, name)}", "it must be at least 1")
        _require(0 < self.eps < 1, f"model.eps is {self.eps}", "it must be positive and small, e.g. 1e-6")
        _require(self.freq_dim >= 2 and self.freq_dim % 2 == 0, f"model.freq_dim is {self.freq_dim}", "sines and cosines need an even number")
        _require(self.patch[0] == 1 and min(self.patch) >= 1, f"model.patch is {list(self.patch)}", "expected [1, height, width] in latents: every latent frame has its own tokens")
        _require(self.head_dim % 2 == 0 and self.head_dim >= 12, f"model.head_dim is {self.head_dim}", "rotary positions need an even head_dim of at least 12")
        _require(self.expert_width is None or self.action_head != "modulated_linear", "model.action_head is 'modulated_linear', which shares the video head's table, but expert_width is set", "choose another head, or expert_width=null")
        _require(self.lora is None or self.pretrained is not None, "model.lora adapts a pretrained backbone, but model.pretrained is null", "name one, or set model.lora=null")
        names = [e.name for e in self.embodiments]
        _require(len(set(names)) == len(names) > 0, f"model.embodiments are {names}", "name each embodiment once, and at least one")
        for what in ("action", "state"):
            widest, width = max(self._span(e, what) for e in self.embodiments), getattr(self, f"{what}_width")
            _require(width is None or width >= widest, f"model.{what}_width is {width}, but an embodiment has {widest} {what} channels", f"set it to at least {widest}, or to null")

    @staticmethod
    def _span(robot: EmbodimentConfig, what: str) -> int:
        if what == "state":
            return robot.state_dim
        return max((robot.action_dim - 1, *robot.action_channels)) + 1

    @property
    def width(self) -> int:
        """D: heads x head_dim."""
        return self.heads * self.head_dim

    def embodiment(self, name: str) -> EmbodimentConfig:
        """The embodiment called `name`.

        Raises:
            ConfigError: naming those there are.
        """
        found = next((e for e in self.embodiments if e.name == name), None)
        _require(found is not None, f"this model has no embodiment {name!r}; it was trained for {', '.join(e.name for e in self.embodiments)}", "name one of these")
        assert found is not None
        return found

    @property
    def token_width(self) -> int:
        """Width of action and state tokens: the expert's, or D."""
        return self.expert_width or self.width

    @property
    def actions(self) -> int:
        """Numbers in a (padded) action vector."""
        return self.action_width or max(self._span(e, "action") for e in self.embodiments)

    @property
    def states(self) -> int:
        """Numbers in a (padded) state vector."""
        return self.state_width or max(self._span(e, "state") for e in self.embodiments)


@dataclass(frozen=True)
class RelationsConfig:
    """Cells of the relation table that differ from the base table, e.g. `{Ac->Vc: "<="}`; every mode opens its own on top (see `wam.relations`).

    Relations are none, "<" (earlier blocks), "=" (its own), "<=" and all, in quotes: a bare = means something else to YAML.
    """

    cells: dict[str, str] = field(default_factory=dict)
    copies: Literal["clean", "single"] = "clean"  # conditions are clean copies beside the noisy tokens; or the noisy ones themselves, held at level 0 or 1 (UWM)

    def __post_init__(self) -> None:
        try:
            read_cells(self.cells)
        except ValueError as error:
            raise ConfigError(str(error)) from error


@dataclass(frozen=True)
class SamplingConfig:
    """How plans are sampled, where nothing else is asked for; part of what a checkpoint was trained and published with."""

    solver: Literal["euler", "unipc"] = "euler"
    steps: int = 4
    action_steps: int | None = None  # where actions are denoised apart from video; default: as many
    guidance: float = 1.0  # classifier-free guidance on video; 1: none
    untrained_guidance: bool = False  # guide although training dropped no instructions, so that the other side was never learnt (DreamZero does)
    action_guidance: float = 1.0  # the same on actions (LingBot-VA's code allows it; no release uses it)
    negative_prompt: str = ""  # the instruction of guidance's other side
    video_shift: float | None = None  # of the grid that video is denoised on; default: noise.video.shift, as in training
    action_shift: float | None = None  # likewise for actions
    video_stop: float = 0.0  # level at which imagined video stops before actions are read off it
    video_final: float = 0.0  # level at which video ends while actions go on to 0 (DreamZero-Flash)
    reuse: Literal["none", "mask", "similarity"] = "none"  # steps that take the last velocity instead of evaluating the network (DreamZero's DiT cache)
    evaluations: int = 8  # with `mask`: how many of the steps are evaluated

    def with_steps(self, steps: int | None) -> SamplingConfig:
        """The same with another number of solver steps, where one is given."""
        return self if steps is None else dataclasses.replace(self, steps=steps, action_steps=None)

    def __post_init__(self) -> None:
        for name in ("steps", "evaluations", "action_steps"):
            _require(getattr(self, name) is None or getattr(self, name) >= 1, f"sampling.{name} is {getattr(self, name)}", "it must be at least 1")
        for name in ("video_stop", "video_final"):
            _require(0 <= getattr(self, name) < 1, f"sampling.{name} is {getattr(self, name)}", "a level to stop at lies in 0 <= level < 1")
        for name in ("guidance", "action_guidance"):
            _require(0 < getattr(self, name) < math.inf, f"sampling.{name} is {getattr(self, name)}", "it must be positive; 1 means none")
        for name in ("video_shift", "action_shift"):
            shift = getattr(self, name)
            _require(shift is None or 0 < shift < math.inf, f"sampling.{name} is {shift}", "a shift is positive; 1 leaves the levels evenly spaced")

    @property
    def guided(self) -> bool:
        """Whether the negative instruction is needed too."""
        return self.guidance != 1 or self.action_guidance != 1


@dataclass(frozen=True)
class LevelsConfig:
    """How the levels of one kind of token are drawn (sigma in [0, 1]; see `wam.flow` and `wam.training.noise`).

    A place u in the schedule is drawn, put into low..high and, with `table`, onto its grid; then it is shifted; then atoms replace it.
    """

    distribution: Literal["uniform", "beta", "logit_normal"] = "uniform"
    alpha: float = 1.0  # beta: Beta(alpha, beta); above beta, levels gather at noise (DreamZero-Flash: 7, 1)
    beta: float = 1.0
    mean: float = 0.0  # logit_normal: of the logit of u; above 0, levels gather at noise (SD3: 0, 1)
    std: float = 1.0
    low: float = 0.0  # u lies in low..high
    high: float = 1.0
    shift: float = 1.0
    at_zero: float = 0.0  # probability of exactly 0: given
    at_one: float = 0.0  # probability of exactly 1: pure noise
    per: Literal["sample", "block", "frame", "token"] = "block"  # what shares a draw; frame: a latent frame and the actions that lead to it; token: an action (of video: a frame)
    table: int | None = None  # draw from this many equidistant places (DreamZero: 1000) instead of a continuum
    weighting: Literal["none", "bump"] = "none"  # loss weight of a level

    def __post_init__(self) -> None:
        where = "noise: levels'"
        for name in ("at_zero", "at_one"):
            _require(0 <= getattr(self, name) <= 1, f"{where} {name} is {getattr(self, name)}", "a probability lies in 0..1")
        _require(self.at_zero + self.at_one <= 1, f"{where} at_zero {self.at_zero} + at_one {self.at_one} is above 1", "lower one of them")
        _require(0 < self.shift < math.inf, f"{where} shift is {self.shift}", "a shift is positive; 1 leaves the levels as they are drawn")
        for name in ("alpha", "beta", "std"):
            _require(0 < getattr(self, name) < math.inf, f"{where} {name} is {getattr(self, name)}", "it must be positive and finite")
        _require(math.isfinite(self.mean), f"{where} mean is {self.mean}", "it must be finite")
        _require(0 <= self.low < self.high <= 1, f"{where} low..high is {self.low}..{self.high}", "expected 0 <= low < high <= 1")
        _require(self.table is None or self.table >= 2, f"{where} table is {self.table}", "expected at least 2 entries, or null for a continuum")


@dataclass(frozen=True)
class VideoLevelsConfig(LevelsConfig):
    """Levels of noisy video, with our defaults: much of it nearly or wholly noise, as where a plan begins."""

    shift: float = 3.0
    at_one: float = 0.3


@dataclass(frozen=True)
class HistoryLevelsConfig(LevelsConfig):
    """Levels of noise on what was seen, with LingBot-VA's defaults: the cleaner half of its schedule."""

    high: float = 0.5
    shift: float = 5.0
    per: Literal["sample", "block", "frame", "token"] = "frame"


@dataclass(frozen=True)
class NoiseConfig:
    """How noise levels are drawn in training, apart for video, actions and what they are conditioned on (see `wam.training.noise`)."""

    video: VideoLevelsConfig = VideoLevelsConfig()
    action: LevelsConfig = LevelsConfig()
    coupled: float = 0.5  # probability that a sample's actions take the video's place in the schedule (each with its own shift)
    couple_always: bool = False  # in every mode (DreamZero); else only in modes where actions see noisy video
    condition_probability: float = 0.5  # probability that clean video an action conditions on is noised, with its true level
    condition: LevelsConfig = LevelsConfig()
    history_probability: float = 0.0  # probability that all clean frames of a sample are noised, with their true levels (LingBot-VA: 0.5)
    history: HistoryLevelsConfig = HistoryLevelsConfig()
    prefix: float = 0.0  # probability that the first actions of a sample's blocks are given, as they are when plans overlap

    def __post_init__(self) -> None:
        for name in ("coupled", "condition_probability", "history_probability", "prefix"):
            _require(0 <= getattr(self, name) <= 1, f"noise.{name} is {getattr(self, name)}", "a probability lies in 0..1")


@dataclass(frozen=True)
class TrainingConfig:
    """The loop."""

    steps: int = 2000
    max_minutes: float | None = None  # end early, with the learning rate annealed to zero, when the time is up
    batch_size: int = 16
    learning_rate: float = 1e-3
    warmup_steps: int = 50
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.95)
    grad_clip: float = 1.0
    ema_decay: float = 0.995
    action_weight: float = 1.0
    video_weight: float = 1.0
    state_dropout: float = 0.1  # probability that a sample's states are hidden, so that video can be imagined where no state is known
    text_dropout: float = 0.0  # probability that a sample's instruction is the empty one: what guidance needs
    goal_image: float = 0.0  # probability that a sample is given the window's last frame as its goal (needs model.goal_image)
    predict_first_frame: bool = False  # the first frame is noised and predicted too (DreamZero)
    frame_padding: Literal["any", "all"] = "any"  # a latent frame is padding when any of its pixel frames is, or only when all are (Fast-WAM)
    reduction: Literal["supervised", "sample", "all"] = "supervised"  # errors over what is supervised in the batch; per sample first (Fast-WAM); over everything, padding included (DreamZero)
    modes: dict[str, float] = field(default_factory=lambda: {"skip": 0.3, "joint": 0.2, "joint_mutual": 0.1, "imagine": 0.2, "forward": 0.2})
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    log_every: int = 20
    validate_every: int = 500
    validation_batches: int = 4
    save_every: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "warmup_steps", "log_every", "validate_every", "save_every", "validation_batches"):
            _require(getattr(self, name) >= 1, f"training.{name} is {getattr(self, name)}", "it must be at least 1")
        for name in ("learning_rate", "grad_clip"):
            _require(0 < getattr(self, name) < math.inf, f"training.{name} is {getattr(self, name)}", "it must be positive and finite")
        for name in ("weight_decay", "action_weight", "video_weight", "seed"):
            _require(0 <= getattr(self, name) < math.inf, f"training.{name} is {getattr(self, name)}", "it must be at least 0 and finite")
        _require(self.max_minutes is None or self.max_minutes > 0, f"training.max_minutes is {self.max_minutes}", "expected minutes above 0, or null for no limit")
        _require(all(0 <= beta < 1 for beta in self.betas), f"training.betas is {list(self.betas)}", "expected two numbers, 0 <= beta < 1")
        weights = self.modes.values()
        _require(all(0 <= p < math.inf for p in weights) and sum(weights) > 0, f"training.modes is {self.modes}", "weights are at least 0 and finite; give at least one mode a positive one")
        for name in ("state_dropout", "text_dropout", "goal_image"):
            _require(0 <= getattr(self, name) <= 1, f"training.{name} is {getattr(self, name)}", "a probability lies in 0..1")
        _require(0 <= self.ema_decay < 1, f"training.ema_decay is {self.ema_decay}", "expected 0 (off) <= decay < 1")


@dataclass(frozen=True)
class RolloutConfig:
    """Closed-loop evaluation in a simulator."""

    env: str = "metaworld/drawer-open-v3"
    modes: tuple[str, ...] = ("skip", "joint", "joint_mutual", "imagine")
    episodes: int = 50
    seed: int = 20000  # first seed of the test range; disjoint from demonstrations and validation
    replan: int | None = None  # control steps between plans; default: the whole block
    steps: int | None = None  # solver steps a plan; default: the checkpoint's (sampling.steps)
    max_steps: int = 500
    batch: int = 25  # episodes driven side by side
    workers: int = 2
    videos: int = 3  # episodes of each mode that are saved as mp4

    def __post_init__(self) -> None:
        for name in ("episodes", "steps", "max_steps", "batch", "workers"):
            _require(getattr(self, name) is None or getattr(self, name) >= 1, f"rollout.{name} is {getattr(self, name)}", "it must be at least 1")


@dataclass(frozen=True)
class ImagineConfig:
    """Imagined video on held-out episodes."""

    clips: int = 16  # held-out stretches, spread over episodes
    blocks: int = 6  # blocks imagined open loop from one frame
    steps: int | None = None  # solver steps a block; default: the checkpoint's (sampling.steps)
    seed: int = 0
    videos: int = 4  # clips that are saved as mp4

    def __post_init__(self) -> None:
        for name in ("clips", "blocks", "steps"):
            _require(getattr(self, name) is None or getattr(self, name) >= 1, f"imagine.{name} is {getattr(self, name)}", "it must be at least 1")


@dataclass(frozen=True)
class Config:
    """Everything a run is."""

    preset: str = "all"  # the published answers that lie under everything else; see `wam.presets`
    collect: CollectConfig = CollectConfig()
    data: DataConfig = DataConfig()
    timeline: TimelineConfig = TimelineConfig()
    codec: CodecConfig = CodecConfig()
    text: TextConfig = TextConfig()
    image: ImageConfig = ImageConfig()
    model: ModelConfig = ModelConfig()
    relations: RelationsConfig = field(default_factory=RelationsConfig)
    noise: NoiseConfig = NoiseConfig()
    sampling: SamplingConfig = SamplingConfig()
    training: TrainingConfig = field(default_factory=TrainingConfig)
    rollout: RolloutConfig = RolloutConfig()
    imagine: ImagineConfig = ImagineConfig()
    output: str = "runs/default"

    def __post_init__(self) -> None:
        for axis, size, patch in zip(("height", "width"), self.codec.image_size, self.model.patch[1:], strict=True):
            latent = size // self.codec.patch
            _require(
                latent % patch == 0,
                f"a latent frame is {latent} {'high' if axis == 'height' else 'wide'} (image {axis} {size} / codec.patch {self.codec.patch}), which model.patch {patch} does not divide",
                f"use an image {axis} that is a multiple of {self.codec.patch * patch}",
            )
        _require(
            self.image.kind == "none" or self.model.image_dim is not None,
            f"image.kind is {self.image.kind!r}, but the model takes no image embeddings (model.image_dim is null)",
            "set model.image_dim to the encoder's width (1280 for Wan's CLIP), or image.kind=none",
        )
        _require(
            self.training.goal_image == 0 or self.model.goal_image,
            f"training.goal_image is {self.training.goal_image}, but the model takes no goal image",
            "set model.goal_image=true",
        )
        s = self.sampling
        _require(
            s.guidance == 1 or self.training.text_dropout > 0 or s.untrained_guidance,
            f"sampling.guidance is {s.guidance}, but training.text_dropout is 0: the model never learns what an absent instruction means",
            "set training.text_dropout=0.1, or sampling.guidance=1, or sampling.untrained_guidance=true to do it all the same",
        )
        robots = [e.name for e in self.model.embodiments]
        _require(self.data.embodiment in robots, f"data.embodiment is {self.data.embodiment!r}, but model.embodiments has {', '.join(robots)}", "name one of these, or add it with its sizes")
        replan = self.rollout.replan
        _require(
            replan is None or 1 <= replan <= self.timeline.actions_per_block,
            f"rollout.replan is {replan}, but a plan holds timeline.actions_per_block = {self.timeline.actions_per_block} control steps",
            f"use 1..{self.timeline.actions_per_block}",
        )
        _require(
            replan is None or self.timeline.frame_stride is None or replan % self.timeline.frame_stride == 0,
            f"rollout.replan is {replan}, but frames come every timeline.frame_stride = {self.timeline.frame_stride} control steps and a plan begins at a frame",
            f"use a multiple of {self.timeline.frame_stride}",
        )


# ------------------------------------------------------------------------------------------------ reading and writing


def load_config(path: str | Path | None, overrides: typing.Sequence[str] = ()) -> Config:
    """Read a YAML config and apply `section.key=value` overrides (values are YAML).

    Raises:
        FileNotFoundError: there is no such file.
        ConfigError: an unknown key, a wrong type, or sizes that do not fit.
    """
    tree: dict[str, Any] = {}
    if path is not None:
        path = Path(path)
        if not path.is_file():
            near = ", ".join(sorted(str(p) for p in path.parent.glob("*.yaml"))) or "none"
            raise FileNotFoundError(f"no config file {path}; configs in {path.parent}/: {near}")
        try:
            tree = yaml.safe_load(path.read_text()) or {}
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is not valid YAML: {error}") from error
        if not isinstance(tree, dict):
            raise ConfigError(f"{path} holds a {type(tree).__name__}; expected sections with the keys {names(Config)}")
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise ConfigError(f"override {override!r} has no '='; write section.key=value, e.g. training.steps=200")
        node = tree
        *parents, last = key.split(".")
        for name in parents:
            if node.get(name) is None:  # absent, or a section left empty
                node[name] = {}
            child = node[name]
            if not isinstance(child, dict):
                raise ConfigError(f"override {override!r}: {name} is {child!r}, not a section")
            node = child
        try:
            node[last] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"override {override!r}: the value is not valid YAML: {error}") from error
    try:
        below = get_preset(tree.get("preset", Config.preset))
    except ValueError as error:
        raise ConfigError(f"preset: {error}") from error
    return from_dict(Config, overlay(Config, below, tree))


def save_config(config: Config, path: str | Path) -> None:
    """Write the resolved config as YAML, atomically."""
    write_text_atomic(Path(path), yaml.safe_dump(to_dict(config), sort_keys=False))
