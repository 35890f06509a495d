"""Sections of a config that say how a model is trained: how noise levels are drawn and weighted, and the loop."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from wam.config_tree import require


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
        where = "levels:"
        for name in ("at_zero", "at_one"):
            require(0 <= getattr(self, name) <= 1, f"{where} {name} is {getattr(self, name)}", "a probability lies in 0..1")
        require(self.at_zero + self.at_one <= 1, f"{where} at_zero {self.at_zero} + at_one {self.at_one} is above 1", "lower one of them")
        require(0 < self.shift < math.inf, f"{where} shift is {self.shift}", "a shift is positive; 1 leaves the levels as they are drawn")
        for name in ("alpha", "beta", "std"):
            require(0 < getattr(self, name) < math.inf, f"{where} {name} is {getattr(self, name)}", "it must be positive and finite")
        require(math.isfinite(self.mean), f"{where} mean is {self.mean}", "it must be finite")
        require(0 <= self.low < self.high <= 1, f"{where} low..high is {self.low}..{self.high}", "expected 0 <= low < high <= 1")
        require(self.table is None or self.table >= 2, f"{where} table is {self.table}", "expected at least 2 entries, or null for a continuum")


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
            require(0 <= getattr(self, name) <= 1, f"noise.{name} is {getattr(self, name)}", "a probability lies in 0..1")


@dataclass(frozen=True)
class KeepConfig:
    """Which training states stay on disk; one that no rule keeps is deleted when a newer one is whole."""

    last: int = 2  # the newest ones; the newest of all always stays
    every: int | None = None  # and every state whose step is a multiple of this
    best: int = 1  # and the best ones by training.best, of those that were validated at their step

    def __post_init__(self) -> None:
        require(self.last >= 1, f"training.keep.last is {self.last}", "the newest state always stays, so it is at least 1")
        require(self.every is None or self.every >= 1, f"training.keep.every is {self.every}", "expected steps, at least 1, or null for none")
        require(self.best >= 0, f"training.keep.best is {self.best}", "it must be at least 0")


@dataclass(frozen=True)
class GuardsConfig:
    """When a step is left out, and when that is too often (see `wam.training.guards`)."""

    max_skipped: int = 10  # steps among the last `window` that may be left out; one more ends the run with a diagnosis (0: the first one does)
    explode_factor: float | None = 100.0  # a loss or gradient norm of more than this many running medians is left out; null: only what is not finite
    window: int = 100  # steps that the medians and the count look back on

    def __post_init__(self) -> None:
        require(self.max_skipped >= 0, f"training.guards.max_skipped is {self.max_skipped}", "it must be at least 0")
        require(self.window >= 1, f"training.guards.window is {self.window}", "it must be at least 1 step")
        factor = self.explode_factor
        require(factor is None or 1 < factor < math.inf, f"training.guards.explode_factor is {factor}", "expected a finite number above 1, or null")


@dataclass(frozen=True)
class EngineConfig:
    """How a run is spread over processes (see `wam.training.engine`); nothing here changes what is learned."""

    kind: Literal["auto", "single", "ddp", "deepspeed", "fsdp2"] = "auto"  # auto: what the launcher was configured for; else deepspeed where a file is named, ddp for several processes, single for one
    deepspeed: str | None = None  # a DeepSpeed JSON, e.g. configs/deepspeed/zero2.json
    offload: bool = False  # fsdp2: weights and optimiser state wait in the host's memory
    timeout_minutes: float = 30.0  # how long a process waits for the others

    def __post_init__(self) -> None:
        require(0 < self.timeout_minutes < math.inf, f"training.engine.timeout_minutes is {self.timeout_minutes}", "it must be positive and finite")
        require(self.deepspeed is None or self.kind in ("auto", "deepspeed"), f"training.engine.deepspeed is {self.deepspeed!r}, but training.engine.kind is {self.kind!r}", "set kind=deepspeed, or deepspeed=null")
        require(not self.offload or self.kind in ("auto", "fsdp2"), f"training.engine.offload is true, but training.engine.kind is {self.kind!r}", "it belongs to fsdp2; with DeepSpeed, name a JSON that offloads (configs/deepspeed/zero2_offload.json)")


@dataclass(frozen=True)
class GroupConfig:
    """How one part of the model is trained (see `wam.training.groups`)."""

    rate: float = 1.0  # times training.learning_rate
    weight_decay: float | None = None  # default: training.weight_decay
    warmup_steps: int | None = None  # default: training.warmup_steps
    freeze: bool = False

    def __post_init__(self) -> None:
        require(0 < self.rate < math.inf, f"training.groups: rate is {self.rate}", "it must be positive and finite; freeze=true leaves a part as it is")
        require(self.weight_decay is None or 0 <= self.weight_decay < math.inf, f"training.groups: weight_decay is {self.weight_decay}", "it must be at least 0 and finite, or null for training.weight_decay")
        require(self.warmup_steps is None or self.warmup_steps >= 1, f"training.groups: warmup_steps is {self.warmup_steps}", "it must be at least 1, or null for training.warmup_steps")


@dataclass(frozen=True)
class GroupsConfig:
    """The parts of a model that may be trained apart."""

    backbone: GroupConfig = GroupConfig()  # the video transformer's own weights
    adapters: GroupConfig = GroupConfig()  # LoRA on it
    expert: GroupConfig = GroupConfig()  # blocks of states and actions, where they have their own
    new: GroupConfig = GroupConfig()  # encoders and decoders of states and actions, their time embedding, a goal's mark
    text: GroupConfig = GroupConfig()  # the embedded text encoder
    value: GroupConfig = GroupConfig()  # the value token and its head


@dataclass(frozen=True)
class TrainingConfig:
    """The loop."""

    steps: int = 2000
    max_minutes: float | None = None  # end early, with the learning rate annealed to zero, when the time is up
    batch_size: int = 16  # samples of a step, over all processes and micro-batches
    accumulate: int = 1  # micro-batches of a step, one after the other: the same step in less memory
    learning_rate: float = 1e-3
    warmup_steps: int = 50
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.95)
    grad_clip: float = 1.0
    ema_decay: float = 0.995
    action_weight: float = 1.0
    video_weight: float = 1.0
    value_weight: float = 1.0  # where the model has a value head
    state_dropout: float = 0.1  # probability that a sample's states are hidden, so that video can be imagined where no state is known
    text_dropout: float = 0.0  # probability that a sample's instruction is the empty one: what guidance needs
    goal_image: float = 0.0  # probability that a sample is given the window's last frame as its goal (needs model.goal_image)
    predict_first_frame: bool = False  # the first frame is noised and predicted too (DreamZero)
    frame_padding: Literal["any", "all"] = "any"  # a latent frame is padding when any of its pixel frames is, or only when all are (Fast-WAM)
    reduction: Literal["supervised", "sample", "all"] = "supervised"  # errors over what is supervised in the batch; per sample first (Fast-WAM); over everything, padding included (DreamZero)
    modes: dict[str, float] = field(default_factory=lambda: {"skip": 0.3, "joint": 0.2, "joint_mutual": 0.1, "imagine": 0.2, "forward": 0.2})
    valuations: dict[str, float] = field(default_factory=lambda: {"action": 0.5, "outcome": 0.5})  # what a sample's values are asked of: the block's actions, Q(s, a), or its video, V(s')
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    compile: bool = False  # the repeated blocks, with torch.compile
    bucket: bool = False  # lay out only what the modes of a micro-batch need, not what those of the config do: fewer tokens, several shapes
    groups: GroupsConfig = GroupsConfig()
    engine: EngineConfig = EngineConfig()
    log_every: int = 20
    validate_every: int = 500
    validation_batches: int = 4  # of held-out windows whose losses are measured
    validation_samples: int = 16  # held-out windows from which actions and video are sampled, in every mode that is trained
    wandb: str | None = None  # a Weights & Biases project that records go to as well
    save_every: int = 500
    keep: KeepConfig = KeepConfig()
    best: str | None = "auto"  # the validation figure whose best value names the best step, whose policy is kept in best/; auto: the action error of the acting mode that is trained most, else val/loss; null: none
    best_is: Literal["lowest", "highest"] = "lowest"  # which value of `best` is the best
    guards: GuardsConfig = GuardsConfig()
    finetune_from: str | None = None  # a policy's folder whose weights a new run starts from; a run that has a state of its own goes on from that
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "warmup_steps", "log_every", "validate_every", "save_every", "validation_batches", "validation_samples"):
            require(getattr(self, name) >= 1, f"training.{name} is {getattr(self, name)}", "it must be at least 1")
        for name in ("learning_rate", "grad_clip"):
            require(0 < getattr(self, name) < math.inf, f"training.{name} is {getattr(self, name)}", "it must be positive and finite")
        for name in ("weight_decay", "action_weight", "video_weight", "value_weight", "seed"):
            require(0 <= getattr(self, name) < math.inf, f"training.{name} is {getattr(self, name)}", "it must be at least 0 and finite")
        require(self.max_minutes is None or self.max_minutes > 0, f"training.max_minutes is {self.max_minutes}", "expected minutes above 0, or null for no limit")
        require(all(0 <= beta < 1 for beta in self.betas), f"training.betas is {list(self.betas)}", "expected two numbers, 0 <= beta < 1")
        for name in ("modes", "valuations"):
            weights = getattr(self, name).values()
            require(all(0 <= p < math.inf for p in weights) and sum(weights) > 0, f"training.{name} is {getattr(self, name)}", f"weights are at least 0 and finite; give at least one {name[:-1]} a positive one")
        for name in ("state_dropout", "text_dropout", "goal_image"):
            require(0 <= getattr(self, name) <= 1, f"training.{name} is {getattr(self, name)}", "a probability lies in 0..1")
        require(0 <= self.ema_decay < 1, f"training.ema_decay is {self.ema_decay}", "expected 0 (off) <= decay < 1")
