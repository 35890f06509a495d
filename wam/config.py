"""Typed configs: what a run is, written down and checked before anything is computed.

A config is a tree of frozen dataclasses.  It is read from YAML, changed by `section.key=value` overrides, and checks its own
arithmetic when it is built.  Unknown keys and wrong types are refused with the nearest right name; sizes that do not fit are
refused with the sum spelled out.  What is resolved is saved beside the run, so a checkpoint always says how it was made.

    YAML file  ->  overrides  ->  dataclasses (typed, checked)  ->  config.yaml in the run directory
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from wam.files import write_text_atomic

T = TypeVar("T")


class ConfigError(ValueError):
    """A config that cannot be used; the message names the key, the value, what was expected and the remedy."""


def _require(condition: bool, problem: str, remedy: str) -> None:
    if not condition:
        raise ConfigError(f"{problem}; {remedy}")


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
    """

    blocks: int = 3  # N: blocks in a training window
    latents_per_block: int = 1  # k
    actions_per_block: int = 8  # A
    frame_stride: int = 2  # control steps between two frames
    history: int = 2  # blocks back that attention reaches (the first frame counts as the block before the first)
    temporal_stride: int = 4  # frames folded into one latent frame; 4 for every Wan codec

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            _require(getattr(self, f.name) >= 1, f"timeline.{f.name} is {getattr(self, f.name)}", "it must be at least 1")
        frames = self.latents_per_block * self.temporal_stride
        steps = frames * self.frame_stride
        _require(
            steps == self.actions_per_block,
            f"timeline does not fit: latents_per_block {self.latents_per_block} x temporal_stride {self.temporal_stride} = {frames} frames a block, "
            f"x frame_stride {self.frame_stride} = {steps} control steps, but actions_per_block is {self.actions_per_block}",
            f"set timeline.actions_per_block={steps}, or change frame_stride or latents_per_block",
        )

    @property
    def frames_per_block(self) -> int:
        """Pixel frames a block adds (4k)."""
        return self.latents_per_block * self.temporal_stride

    @property
    def frames(self) -> int:
        """Pixel frames in a training window, 1 + 4kN: the first stands alone in its latent."""
        return 1 + self.blocks * self.frames_per_block

    @property
    def latents(self) -> int:
        """Latent frames in a training window, 1 + kN."""
        return 1 + self.blocks * self.latents_per_block


@dataclass(frozen=True)
class CodecConfig:
    """Video <-> latents."""

    kind: Literal["linear"] = "linear"
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
        _require(1 <= self.channels <= limit, f"codec.channels is {self.channels}", f"a {self.patch}x{self.patch} RGB patch has {limit} numbers; expected 1..{limit}")


@dataclass(frozen=True)
class TextConfig:
    """Instruction -> embeddings: bytes (ByT5's tokenizer) through a small T5 encoder that is trained with the model."""

    kind: Literal["bytes"] = "bytes"
    max_tokens: int = 48
    width: int = 64
    layers: int = 1
    heads: int = 4

    def __post_init__(self) -> None:
        for name in ("max_tokens", "width", "layers", "heads"):
            _require(getattr(self, name) >= 1, f"text.{name} is {getattr(self, name)}", "it must be at least 1")
        _require(self.width % self.heads == 0, f"text.width {self.width} is not a multiple of text.heads {self.heads}", "change one of them")


@dataclass(frozen=True)
class EmbodimentConfig:
    """One robot's sizes."""

    name: str = "metaworld"
    state_dim: int = 4
    action_dim: int = 4

    def __post_init__(self) -> None:
        for name in ("state_dim", "action_dim"):
            _require(getattr(self, name) >= 1, f"model.embodiments: {name} of {self.name!r} is {getattr(self, name)}", "it must be at least 1")


@dataclass(frozen=True)
class ModelConfig:
    """The network: a `diffusers.WanTransformer3DModel`, extended with action and state tokens."""

    layers: int = 6
    heads: int = 4
    head_dim: int = 48
    ffn_dim: int = 768
    freq_dim: int = 64
    patch: tuple[int, int, int] = (1, 2, 2)
    video_head: Literal["velocity", "sample"] = "velocity"  # what the video head puts out; pretrained Wan: the velocity
    embodiments: tuple[EmbodimentConfig, ...] = (EmbodimentConfig(),)

    def __post_init__(self) -> None:
        for name in ("layers", "heads", "ffn_dim"):
            _require(getattr(self, name) >= 1, f"model.{name} is {getattr(self, name)}", "it must be at least 1")
        _require(self.freq_dim >= 2 and self.freq_dim % 2 == 0, f"model.freq_dim is {self.freq_dim}", "sines and cosines need an even number")
        _require(self.patch[0] == 1 and min(self.patch) >= 1, f"model.patch is {list(self.patch)}", "expected [1, height, width] in latents: every latent frame has its own tokens")
        _require(self.head_dim % 2 == 0 and self.head_dim >= 12, f"model.head_dim is {self.head_dim}", "rotary positions need an even head_dim of at least 12")
        names = [e.name for e in self.embodiments]
        _require(len(set(names)) == len(names) > 0, f"model.embodiments are {names}", "name each embodiment once, and at least one")

    @property
    def width(self) -> int:
        """D: heads x head_dim."""
        return self.heads * self.head_dim


@dataclass(frozen=True)
class NoiseConfig:
    """How noise levels are drawn in training, apart for video and actions (sigma in [0, 1]; see `wam.flow`)."""

    video_shift: float = 3.0
    action_shift: float = 1.0
    video_at_one: float = 0.3  # probability that a block's video is pure noise
    coupled: float = 0.5  # probability that a sample's actions take the video's level, where actions see noisy video
    condition_noise: float = 0.5  # probability that clean video an action conditions on is noised, with its true level

    def __post_init__(self) -> None:
        for name in ("video_at_one", "coupled", "condition_noise"):
            _require(0 <= getattr(self, name) <= 1, f"noise.{name} is {getattr(self, name)}", "a probability lies in 0..1")
        for name in ("video_shift", "action_shift"):
            _require(getattr(self, name) > 0, f"noise.{name} is {getattr(self, name)}", "a shift is positive; 1 leaves the levels uniform")


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
        _require(0 <= self.state_dropout <= 1, f"training.state_dropout is {self.state_dropout}", "a probability lies in 0..1")
        _require(0 <= self.ema_decay < 1, f"training.ema_decay is {self.ema_decay}", "expected 0 (off) <= decay < 1")


@dataclass(frozen=True)
class RolloutConfig:
    """Closed-loop evaluation in a simulator."""

    env: str = "metaworld/drawer-open-v3"
    modes: tuple[str, ...] = ("skip", "joint", "joint_mutual", "imagine")
    episodes: int = 50
    seed: int = 20000  # first seed of the test range; disjoint from demonstrations and validation
    replan: int | None = None  # control steps between plans; default: the whole block
    steps: int = 4  # solver steps a plan
    max_steps: int = 500
    batch: int = 25  # episodes driven side by side
    workers: int = 2
    videos: int = 3  # episodes of each mode that are saved as mp4

    def __post_init__(self) -> None:
        for name in ("episodes", "steps", "max_steps", "batch", "workers"):
            _require(getattr(self, name) >= 1, f"rollout.{name} is {getattr(self, name)}", "it must be at least 1")


@dataclass(frozen=True)
class ImagineConfig:
    """Imagined video on held-out episodes."""

    clips: int = 16  # held-out stretches, spread over episodes
    blocks: int = 6  # blocks imagined open loop from one frame
    steps: int = 8
    seed: int = 0
    videos: int = 4  # clips that are saved as mp4

    def __post_init__(self) -> None:
        for name in ("clips", "blocks", "steps"):
            _require(getattr(self, name) >= 1, f"imagine.{name} is {getattr(self, name)}", "it must be at least 1")


@dataclass(frozen=True)
class Config:
    """Everything a run is."""

    collect: CollectConfig = CollectConfig()
    data: DataConfig = DataConfig()
    timeline: TimelineConfig = TimelineConfig()
    codec: CodecConfig = CodecConfig()
    text: TextConfig = TextConfig()
    model: ModelConfig = ModelConfig()
    noise: NoiseConfig = NoiseConfig()
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
        robots = [e.name for e in self.model.embodiments]
        _require(self.data.embodiment in robots, f"data.embodiment is {self.data.embodiment!r}, but model.embodiments has {', '.join(robots)}", "name one of these, or add it with its sizes")
        replan = self.rollout.replan
        _require(
            replan is None or 1 <= replan <= self.timeline.actions_per_block,
            f"rollout.replan is {replan}, but a plan holds timeline.actions_per_block = {self.timeline.actions_per_block} control steps",
            f"use 1..{self.timeline.actions_per_block}",
        )
        _require(
            replan is None or replan % self.timeline.frame_stride == 0,
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
            raise ConfigError(f"{path} holds a {type(tree).__name__}; expected sections with the keys {_names(Config)}")
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
    return from_dict(Config, tree)


def save_config(config: Config, path: str | Path) -> None:
    """Write the resolved config as YAML, atomically."""
    write_text_atomic(Path(path), yaml.safe_dump(to_dict(config), sort_keys=False))


def to_dict(value: Any) -> Any:
    """Dataclasses to plain dictionaries and lists, as YAML and JSON write them."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, (tuple, list)):
        return [to_dict(v) for v in value]
    if isinstance(value, dict):
        return {k: to_dict(v) for k, v in value.items()}
    return value


def from_dict(cls: type[T], tree: Any, where: str = "") -> T:
    """Build a config dataclass from a plain dictionary, refusing unknown keys and wrong types.

    Raises:
        ConfigError: with the full key, the value, and the nearest right name or the expected type.
    """
    if not isinstance(tree, dict):
        raise ConfigError(f"{where or 'the config'} is {tree!r}; expected a section with keys {_names(cls)}")
    hints = typing.get_type_hints(cls)
    known = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    values = {}
    for key, value in tree.items():
        full = f"{where}.{key}" if where else str(key)
        if key not in known:
            raise ConfigError(f"unknown key {full!r}; {_nearest(str(key), known, where)}")
        values[key] = _convert(hints[key], value, full)
    return cls(**values)


def _convert(kind: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _convert(next(a for a in args if a is not type(None)), value, where)
    if origin is Literal:
        if value not in args:
            raise ConfigError(f"{where} is {value!r}; expected one of {', '.join(map(repr, args))}{_did_you_mean(str(value), [str(a) for a in args])}")
        return value
    if origin is tuple:
        return _convert_tuple(args, value, where)
    if origin is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{where} is {value!r}; expected a mapping")
        return {_convert(args[0], k, where): _convert(args[1], v, f"{where}.{k}") for k, v in value.items()}
    if dataclasses.is_dataclass(kind):
        return from_dict(typing.cast(type, kind), value, where)
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if kind is float and isinstance(value, str):  # YAML 1.1 reads 1e-3 as text
        try:
            return float(value)
        except ValueError:
            pass
    if isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    raise ConfigError(f"{where} is {value!r} ({type(value).__name__}); expected {kind.__name__}")


def _convert_tuple(args: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise ConfigError(f"{where} is {value!r}; expected a list, e.g. [{value!r}]")
    if args[-1] is Ellipsis:
        return tuple(_convert(args[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if len(value) != len(args):
        raise ConfigError(f"{where} has {len(value)} entries; expected {len(args)}")
    return tuple(_convert(a, v, f"{where}[{i}]") for i, (a, v) in enumerate(zip(args, value, strict=True)))


def _names(cls: Any) -> str:
    return ", ".join(f.name for f in dataclasses.fields(cls))


def _nearest(key: str, known: set[str], where: str) -> str:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    prefix = f"{where}." if where else ""
    if near:
        return f"did you mean {prefix + near[0]!r}?"
    return f"{where or 'the config'} has the keys {', '.join(sorted(known))}"


def _did_you_mean(value: str, known: list[str]) -> str:
    near = difflib.get_close_matches(value, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""
