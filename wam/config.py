"""Typed configs: what a run is, written down and checked before anything is computed.

A config is a tree of frozen dataclasses.  It is read from YAML, changed by `section.key=value` overrides, and checks its own
arithmetic when it is built.  Unknown keys and wrong types are refused with the nearest right name; sizes that do not fit are
refused with the sum spelled out.  What is resolved is saved beside the run, so a checkpoint always says how it was made.

    preset, robot card  ->  YAML file  ->  overrides  ->  dataclasses (typed, checked)  ->  config.yaml in the run directory
"""

from __future__ import annotations

import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from wam.config_check import CheckConfig
from wam.config_data import DataConfig, grid_of
from wam.config_disturbances import DisturbanceConfig
from wam.config_execution import ExecutionConfig
from wam.config_model import CodecConfig, ImageConfig, LoraConfig, ModelConfig, RelationsConfig, SamplingConfig, TextConfig, TimelineConfig
from wam.config_planner import PlannerConfig
from wam.config_robot import EmbodimentConfig, GroupConfig
from wam.config_runtime import RuntimeConfig
from wam.config_time import seconds_to_steps
from wam.config_training import HistoryLevelsConfig, LevelsConfig, NoiseConfig, TrainingConfig, VideoLevelsConfig
from wam.config_tree import ConfigError, from_dict, names, overlay, read_yaml, show, to_dict
from wam.config_tree import require as _require
from wam.files import write_text_atomic
from wam.presets import get_preset
from wam.robots import lay_cards

__all__ = [
    "CheckConfig",
    "CodecConfig",
    "CollectConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "DisturbanceConfig",
    "EmbodimentConfig",
    "ExecutionConfig",
    "GroupConfig",
    "HistoryLevelsConfig",
    "ImageConfig",
    "ImagineConfig",
    "LevelsConfig",
    "LoraConfig",
    "ModelConfig",
    "NoiseConfig",
    "PlannerConfig",
    "RelationsConfig",
    "RolloutConfig",
    "SamplingConfig",
    "TextConfig",
    "TimelineConfig",
    "TrainingConfig",
    "VideoLevelsConfig",
    "from_dict",
    "load_config",
    "save_config",
    "to_dict",
]


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
    slowest_pace: float = 1.0  # an episode's demonstrator moves at a pace of its own, uniform in [this, 1] of the expert's, as people do; 1: all alike
    steps_after_success: int = 8  # control steps recorded after the first success
    max_steps: int = 500  # control steps before an attempt counts as failed
    workers: int = 2

    def __post_init__(self) -> None:
        _require(len(self.tasks) > 0, "collect.tasks is empty", "name at least one Meta-World task, e.g. drawer-open-v3")
        for name in ("episodes_per_task", "image_size", "max_steps", "workers"):
            _require(getattr(self, name) >= 1, f"collect.{name} is {getattr(self, name)}", "it must be at least 1")
        _require(self.image_size % 2 == 0, f"collect.image_size is {self.image_size}", "H.264 with 4:2:0 colour needs an even size")
        for name in ("steps_after_success", "seed"):
            _require(getattr(self, name) >= 0, f"collect.{name} is {getattr(self, name)}", "it must be at least 0")
        _require(self.action_noise >= 0, f"collect.action_noise is {self.action_noise}", "a standard deviation cannot be negative")
        _require(0 < self.slowest_pace <= 1, f"collect.slowest_pace is {self.slowest_pace}", "it must be above 0 and at most 1, the expert's own")


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
    gate: str | None = None  # limits of what may be sent, a YAML file as `wam serve --gate` takes; default: the environment's action box
    overlap: bool = False  # simulate half of the robots while the others are planned for: where planning has a processor of its own
    record: str | None = None  # directory of a LeRobot dataset that gets every episode, failures included
    agreement: bool = False  # compare what was imagined with what came, in every plan
    server: str | None = None  # ws://host:port of a policy server that makes the plans; default: this process, from a checkpoint
    key_file: str | None = None  # a file with that server's API key
    runtime: RuntimeConfig = RuntimeConfig()
    execution: ExecutionConfig = ExecutionConfig()
    check: CheckConfig = CheckConfig()
    planner: PlannerConfig = PlannerConfig()
    disturbances: DisturbanceConfig = DisturbanceConfig()

    def __post_init__(self) -> None:
        for name in ("episodes", "steps", "max_steps", "batch", "workers"):
            _require(getattr(self, name) is None or getattr(self, name) >= 1, f"rollout.{name} is {getattr(self, name)}", "it must be at least 1")
        for name in ("seed", "videos"):
            _require(getattr(self, name) >= 0, f"rollout.{name} is {getattr(self, name)}", "it must be at least 0")
        _require(len(self.modes) > 0, "rollout.modes is empty", "name at least one mode, e.g. skip; `wam relations` lists them")


@dataclass(frozen=True)
class ImagineConfig:
    """Imagined video on held-out episodes."""

    clips: int = 16  # held-out stretches, spread over episodes
    blocks: int = 6  # blocks imagined open loop from one frame
    steps: int | None = None  # solver steps a block; default: the checkpoint's (sampling.steps)
    seed: int = 0
    videos: int = 4  # clips that are saved as mp4
    runtime: RuntimeConfig = RuntimeConfig()

    def __post_init__(self) -> None:
        for name in ("clips", "blocks", "steps"):
            _require(getattr(self, name) is None or getattr(self, name) >= 1, f"imagine.{name} is {getattr(self, name)}", "it must be at least 1")
        for name in ("seed", "videos"):
            _require(getattr(self, name) >= 0, f"imagine.{name} is {getattr(self, name)}", "it must be at least 0")


@dataclass(frozen=True)
class Config:
    """Everything a run is."""

    preset: str = "all"  # the published answers that lie under everything else; see `wam.presets`
    collect: CollectConfig = CollectConfig()
    data: DataConfig = DataConfig()
    mixture: tuple[DataConfig, ...] = ()  # several datasets in one run; in YAML each entry says only what differs from `data`.  Empty: `data` alone
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

    @property
    def sources(self) -> tuple[DataConfig, ...]:
        """The datasets that are trained on: those of the mixture, or `data` alone."""
        return self.mixture or (self.data,)

    def template(self, embodiment: str) -> str:
        """The text that a robot's instructions are put into: its own, or `text.template`."""
        own = next((e.template for e in self.model.embodiments if e.name == embodiment), None)
        return own or self.text.template

    def __post_init__(self) -> None:
        for axis, size, patch in zip(("height", "width"), self.codec.image_size, self.model.patch[1:], strict=True):
            latent = size // self.codec.patch
            _require(
                latent % patch == 0,
                f"a latent frame is {latent} {'high' if axis == 'height' else 'wide'} (image {axis} {size} / codec.patch {self.codec.patch}), which model.patch {patch} does not divide",
                f"use an image {axis} that is a multiple of {self.codec.patch * patch}",
            )
        view = self.codec.image_size[1] // self.codec.patch // self.codec.views
        _require(
            view % self.model.patch[2] == 0,
            f"a view is {view} latents wide (image width {self.codec.image_size[1]} / codec.patch {self.codec.patch} / codec.views {self.codec.views}), which model.patch {list(self.model.patch)} does not divide",
            f"use an image width that is a multiple of {self.codec.views * self.codec.patch * self.model.patch[2]}",
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
        for where, d in (("data", self.data), *((f"mixture[{i}]", d) for i, d in enumerate(self.mixture))):  # what shows video alone may be of anyone
            known = d.embodiment in robots or (d.contents == "video" and where != "data")
            self._check_canvas(where, d)
            _require(known, f"{where}.embodiment is {d.embodiment!r}, but model.embodiments has {', '.join(robots)}", "name one of these, or add it with its sizes")
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

    def _check_canvas(self, where: str, data: DataConfig) -> None:
        """Compare a dataset's layout of cameras with the picture that the network takes."""
        views = len(data.cameras) if data.layout == "separate" else 1
        _require(
            views == self.codec.views or data.contents == "action",
            f"{where}.layout is {data.layout!r} of {len(data.cameras)} cameras, which makes {views} views, but codec.views is {self.codec.views}",
            f"set codec.views={views}{' and codec.image_size to the cameras side by side' if views > 1 else ''}, or use another layout",
        )
        for axis, size, cells in zip(("height", "width"), self.codec.image_size, grid_of(data.layout, len(data.cameras)), strict=True):
            canvas = f"{where}.layout {data.layout!r} of {len(data.cameras)} cameras has {cells} cells along the {axis}"
            _require(size % cells == 0, f"{canvas}, which codec.image_size {list(self.codec.image_size)} is no multiple of", f"use an image {axis} that is a multiple of {cells}")


# ------------------------------------------------------------------------------------------------ reading and writing


def load_config(path: str | Path | None, overrides: typing.Sequence[str] = ()) -> Config:
    """Read a YAML config and apply `section.key=value` overrides (values are YAML).  `robot: NAME` lays a robot card under both (`wam.robots`).

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
            tree = read_yaml(path.read_text(encoding="utf-8"), str(path)) or {}
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path} is not valid YAML: {error}; write it as UTF-8 text") from error
        if not isinstance(tree, dict):
            raise ConfigError(f"{path} holds a {type(tree).__name__}; expected sections with the keys {names(Config)}")
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise ConfigError(f"override {show(override)} has no '='; write section.key=value, e.g. training.steps=200")
        node = tree
        *parents, last = key.split(".")
        for name in parents:
            if node.get(name) is None:  # absent, or a section left empty
                node[name] = {}
            child = node[name]
            if not isinstance(child, dict):
                raise ConfigError(f"override {show(override)}: {name} is {show(child)}, not a section; give a whole list or mapping at once, e.g. a.b=[{{c: 1}}]")
            node = child
        node[last] = read_yaml(value, f"override {show(override)}: the value")
    try:
        below = get_preset(str(tree.get("preset", Config.preset)))
    except ValueError as error:
        raise ConfigError(f"preset: {error}") from error
    tree = lay_cards(below, tree, Config)
    if isinstance(tree.get("mixture"), list) and isinstance(tree.get("data") or {}, dict):  # whatever else it is, `from_dict` says
        tree["mixture"] = [overlay(DataConfig, tree.get("data") or {}, entry) if isinstance(entry, dict) else entry for entry in tree["mixture"]]
    return from_dict(Config, seconds_to_steps(tree))


def save_config(config: Config, path: str | Path) -> None:
    """Write the resolved config as YAML, atomically."""
    write_text_atomic(Path(path), yaml.safe_dump(to_dict(config), sort_keys=False))
