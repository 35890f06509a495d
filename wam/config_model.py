"""Sections of a config that say what a model is: its clock, codec, text and image encoders, robots, network, relations and sampling.

They are saved with the weights: whoever loads a checkpoint gets the same network, the same table and the same units.  Each checks its own
arithmetic when it is built; what has to fit between sections is checked by `wam.config.Config`.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Literal

from wam.cells import read_cells
from wam.config_robot import EmbodimentConfig
from wam.config_tree import ConfigError, require


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
            require(getattr(self, name) is None or getattr(self, name) >= 1, f"timeline.{name} is {getattr(self, name)}", "it must be at least 1")
        states, actions = self.states_per_block, self.actions_per_block
        require(actions % states == 0, f"timeline.states_per_block is {states}, which does not divide actions_per_block {actions}", "use a divisor; one state a block is usual")
        future = states > 1 and self.frame_stride is not None
        require(not future, f"timeline.states_per_block is {states}, but a plan knows only the state at its start", "set it to 1, or frame_stride=null (no data can be read then)")
        frames = self.latents_per_block * self.temporal_stride
        steps = frames * (self.frame_stride or 0)
        require(
            self.frame_stride is None or steps == self.actions_per_block,
            f"timeline does not fit: latents_per_block {self.latents_per_block} x temporal_stride {self.temporal_stride} = {frames} frames a block, "
            f"x frame_stride {self.frame_stride} = {steps} control steps, but actions_per_block is {self.actions_per_block}",
            f"set timeline.actions_per_block={steps}, or change frame_stride or latents_per_block",
        )
        require(not (self.sink and self.first_frame == "inside"), "timeline.sink is true, but with first_frame 'inside' no frame stands alone", "set timeline.sink=false")

    @property
    def stride(self) -> int:
        """Control steps between two frames.

        Raises:
            ConfigError: frames and control steps are not tied.
        """
        require(self.frame_stride is not None, "timeline.frame_stride is null, so no row of a dataset or simulator says when a frame is seen", "set it to the control steps between two frames")
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
    views: int = 1  # cameras side by side in the picture that are encoded each by itself and told apart by an index (data.layout: separate)
    whitening: float = 1.0  # 1: every channel has unit variance; 0: channels keep their share of it; between: in between
    fit_frames: int = 4000  # frames used to fit the linear codec

    def __post_init__(self) -> None:
        for name in ("patch", "fit_frames"):
            require(getattr(self, name) >= 1, f"codec.{name} is {getattr(self, name)}", "it must be at least 1")
        for side, size in zip(("height", "width"), self.image_size, strict=True):
            require(size >= self.patch, f"codec.image_size {side} is {size}", f"it must hold at least one codec.patch of {self.patch} pixels")
            require(
                size % self.patch == 0,
                f"codec.image_size {side} {size} is not a multiple of codec.patch {self.patch} ({size} = {size // self.patch} x {self.patch} + {size % self.patch})",
                f"use {size - size % self.patch} or {size + self.patch - size % self.patch}",
            )
        width = self.image_size[1]
        require(
            self.views >= 1 and width % (self.views * self.patch) == 0,
            f"codec.views is {self.views}, but codec.image_size is {width} wide, which {self.views} views of whole patches of {self.patch} do not make",
            f"use 1, or a width that is a multiple of {max(self.views, 1) * self.patch}",
        )
        require(0 <= self.whitening <= 1, f"codec.whitening is {self.whitening}", "expected 0..1")
        limit = 3 * self.patch * self.patch
        require(self.kind != "linear" or self.pretrained is None, f"codec.pretrained is {self.pretrained!r}, but codec.kind is 'linear', which is fitted on the dataset", "set codec.kind=wan, or codec.pretrained=null")
        require(1 <= self.channels <= limit, f"codec.channels is {self.channels}", f"a {self.patch}x{self.patch} RGB patch has {limit} numbers; expected 1..{limit}")


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
            require(getattr(self, name) >= 1, f"text.{name} is {getattr(self, name)}", "it must be at least 1")
        require(self.kind != "bytes" or self.width % self.heads == 0, f"text.width {self.width} is not a multiple of text.heads {self.heads}", "change one of them")
        unused = self.kind == "bytes" and (self.pretrained or self.cache)
        require(not unused, f"text.pretrained or text.cache is {unused!r}, but text.kind is 'bytes', which is trained with the model", "set text.kind=umt5, or both to null")
        require("{instruction}" in self.template or "{instruction:lower}" in self.template, f"text.template is {self.template!r}", "it must hold {instruction} or {instruction:lower}")


@dataclass(frozen=True)
class ImageConfig:
    """The first frame -> embeddings that cross-attention also sees (`model.image_dim`): Wan's frozen CLIP (257 tokens of 1280)."""

    kind: Literal["none", "clip"] = "none"
    pretrained: str | None = None  # folder in diffusers' layout (with `image_encoder/`) or Hub id; null: the checkpoint's own folder holds it
    framing: Literal["crop", "stretch"] = "crop"  # how a frame is made square: diffusers' pipelines crop, Wan's own code (and DreamZero) stretches
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        require(self.kind == "clip" or self.pretrained is None, f"image.pretrained is {self.pretrained!r}, but image.kind is 'none'", "set image.kind=clip, or image.pretrained=null")


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters on the backbone's linear layers (through peft); all that is not the backbone trains in full."""

    rank: int = 16
    alpha: float = 16.0  # the update is scaled by alpha / rank
    dropout: float = 0.0
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")

    def __post_init__(self) -> None:
        require(self.rank >= 1, f"model.lora.rank is {self.rank}", "it must be at least 1")
        require(0 < self.alpha < math.inf, f"model.lora.alpha is {self.alpha}", "it must be positive; as large as the rank leaves the update as it is")
        require(0 <= self.dropout < 1, f"model.lora.dropout is {self.dropout}", "a probability of dropping lies in 0 <= p < 1")
        require(len(self.targets) > 0, "model.lora.targets is empty", "name at least one linear layer, e.g. to_q")


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
    value: Literal["none", "success", "progress"] = "none"  # a value head (see wam.model.value): chance of success, discounted by the time until it; or how near success is
    value_horizon: int | None = 200  # control steps: success counts exp(-steps / horizon) (null: 1, however late), progress falls to 0 this long before it
    attention: Literal["auto", "sdpa", "eager", "flex", "xformers", "flash"] = "auto"
    gradient_checkpointing: bool = False
    lora: LoraConfig | None = None
    embodiments: tuple[EmbodimentConfig, ...] = (EmbodimentConfig(),)

    def __post_init__(self) -> None:
        for name in ("layers", "heads", "ffn_dim", "image_dim", "expert_width", "expert_ffn_dim", "mlp_hidden", "action_width", "state_width"):
            require(getattr(self, name) is None or getattr(self, name) >= 1, f"model.{name} is {getattr(self, name)}", "it must be at least 1")
        require(0 < self.eps < 1, f"model.eps is {self.eps}", "it must be positive and small, e.g. 1e-6")
        require(self.freq_dim >= 2 and self.freq_dim % 2 == 0, f"model.freq_dim is {self.freq_dim}", "sines and cosines need an even number")
        require(self.patch[0] == 1 and min(self.patch) >= 1, f"model.patch is {list(self.patch)}", "expected [1, height, width] in latents: every latent frame has its own tokens")
        require(self.head_dim % 2 == 0 and self.head_dim >= 12, f"model.head_dim is {self.head_dim}", "rotary positions need an even head_dim of at least 12")
        require(self.value_horizon is None or self.value_horizon >= 1, f"model.value_horizon is {self.value_horizon}", "expected control steps, at least 1")
        require(self.value != "progress" or self.value_horizon is not None, "model.value_horizon is null, but model.value is 'progress', which is measured by it", "set the control steps before success at which progress begins, e.g. 200")
        require(self.value == "none" or self.state != "token" or self.state_level == "clean", f"model.value is {self.value!r}, but model.state_level is 'action': no clean state is there for a value to see", "set model.state_level=clean, or model.value=none")
        require(self.expert_width is None or self.action_head != "modulated_linear", "model.action_head is 'modulated_linear', which shares the video head's table, but expert_width is set", "choose another head, or expert_width=null")
        require(self.lora is None or self.pretrained is not None, "model.lora adapts a pretrained backbone, but model.pretrained is null", "name one, or set model.lora=null")
        names = [e.name for e in self.embodiments]
        require(len(set(names)) == len(names) > 0, f"model.embodiments are {names}", "name each embodiment once, and at least one")
        for what in ("action", "state"):
            widest, width = max(self._span(e, what) for e in self.embodiments), getattr(self, f"{what}_width")
            require(width is None or width >= widest, f"model.{what}_width is {width}, but an embodiment has {widest} {what} channels", f"set it to at least {widest}, or to null")

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
        require(found is not None, f"this model has no embodiment {name!r}; it was trained for {', '.join(e.name for e in self.embodiments)}", "name one of these")
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
            require(getattr(self, name) is None or getattr(self, name) >= 1, f"sampling.{name} is {getattr(self, name)}", "it must be at least 1")
        for name in ("video_stop", "video_final"):
            require(0 <= getattr(self, name) < 1, f"sampling.{name} is {getattr(self, name)}", "a level to stop at lies in 0 <= level < 1")
        for name in ("guidance", "action_guidance"):
            require(0 < getattr(self, name) < math.inf, f"sampling.{name} is {getattr(self, name)}", "it must be positive; 1 means none")
        for name in ("video_shift", "action_shift"):
            shift = getattr(self, name)
            require(shift is None or 0 < shift < math.inf, f"sampling.{name} is {shift}", "a shift is positive; 1 leaves the levels evenly spaced")

    @property
    def guided(self) -> bool:
        """Whether the negative instruction is needed too."""
        return self.guidance != 1 or self.action_guidance != 1
