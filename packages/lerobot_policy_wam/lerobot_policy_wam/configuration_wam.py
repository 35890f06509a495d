"""What LeRobot knows of a policy: where its folder is, how it plans, and which rows of a dataset it trains on.

    --policy.type=wam --policy.checkpoint=runs/demo/train/checkpoint      a folder that `wam train` wrote
    --policy.path=outputs/wam_demo                                        a LeRobot folder: config.json, its pipelines, the policy in wam/
    --policy.type=wam --policy.config_file=mine.yaml                      lerobot-train alone: a new policy, made as that config says

Sizes, rates, cameras and statistics are the policy's own and lie in its folder; nothing of them is repeated here, so nothing can differ.
"""

from dataclasses import dataclass, field
from pathlib import Path

from lerobot.configs.policies import PreTrainedConfig
from lerobot.configs.types import FeatureType, NormalizationMode, PolicyFeature
from lerobot.optim.optimizers import AdamWConfig
from lerobot.optim.schedulers import DiffuserSchedulerConfig
from wam.config import Config, load_config
from wam.config_robot import EmbodimentConfig
from wam.pretrained import CONFIG
from wam.relations import MODES, acting_modes
from wam.timeline import Kind

from lerobot_policy_wam.names import ACTION, STATE, camera_keys, short
from lerobot_policy_wam.windows import Offsets

INSIDE = "wam"  # where a LeRobot folder has the policy
NEEDS_MORE = ("forward", "inverse")  # modes that are asked about given actions or a given future


def _identity() -> dict[str, NormalizationMode]:
    return dict.fromkeys(("VISUAL", "STATE", "ACTION"), NormalizationMode.IDENTITY)


@PreTrainedConfig.register_subclass("wam")
@dataclass
class WAMConfig(PreTrainedConfig):
    """Options of a world action model in LeRobot.

    Attributes:
        checkpoint: a policy's folder, or a Hub id; in a LeRobot folder, relative to it.
        config_file: instead, a YAML of `wam train`: lerobot-train makes a new policy of its dataset.
        embodiment: whose states and actions these are; "": the one that the policy was trained on.
        mode: how actions are planned (`wam relations` lists modes); "": the acting mode that was trained most.
        solver_steps: of the sampler; None: as the checkpoint says.
        n_action_steps: actions executed of each plan; None: all.
        noise_seed: of what plans are drawn from, with the episode's number and the row.
        gate: a YAML of limits on actions (`wam.inference.gate`); "": actions must be finite.
        task: an instruction for every robot, instead of what the environment or dataset says.
        cameras: by camera of the policy, the observation's key, where it is not found by name.
        save_predicted_video: LeRobot's evaluation films what was imagined; needs a mode that imagines.
        optimizer_lr, optimizer_weight_decay, optimizer_grad_clip_norm, scheduler_warmup_steps: None: as the policy was trained.
        normalization_mapping: LeRobot's own; the policy normalises by itself, so all must be IDENTITY.
    """

    checkpoint: str = ""
    config_file: str = ""
    embodiment: str = ""
    mode: str = ""
    solver_steps: int | None = None
    n_action_steps: int | None = None
    noise_seed: int = 0
    gate: str = ""
    task: str | None = None
    cameras: dict[str, str] = field(default_factory=dict)
    save_predicted_video: bool = False
    optimizer_lr: float | None = None
    optimizer_weight_decay: float | None = None
    optimizer_grad_clip_norm: float | None = None
    scheduler_warmup_steps: int | None = None
    normalization_mapping: dict[str, NormalizationMode] = field(default_factory=_identity)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.checkpoint and self.config_file:
            raise ValueError(f"both --policy.checkpoint={self.checkpoint} and --policy.config_file={self.config_file} are given; the first is a policy, the second makes a new one")
        changed = [f"{kind}: {mode.value}" for kind, mode in self.normalization_mapping.items() if mode is not NormalizationMode.IDENTITY]
        if changed:
            raise ValueError(f"normalization_mapping has {', '.join(changed)}; this policy normalises by itself, with the statistics of its own folder: leave all at IDENTITY")
        if self.n_action_steps is not None and self.n_action_steps < 1:
            raise ValueError(f"n_action_steps is {self.n_action_steps}; expected at least 1 action of each plan, or null for all")

    # ------------------------------------------------------------------------------------------ the policy behind it

    def folder(self) -> str:
        """The policy's folder, or Hub id.

        Raises:
            ValueError: there is none.
        """
        home = None if self.pretrained_path is None else Path(self.pretrained_path)
        if home is not None and (home / INSIDE / CONFIG).is_file():
            return str(home / INSIDE)
        if self.checkpoint:
            inside = home is not None and (home / self.checkpoint / CONFIG).is_file()
            return str(home / self.checkpoint) if inside and home is not None else self.checkpoint
        if home is not None and (home / CONFIG).is_file():
            return str(home)
        raise ValueError("there is no policy: give --policy.checkpoint=FOLDER that `wam train` wrote, or --policy.path=FOLDER that wam-to-lerobot made of it (a new one is made by lerobot-train, with --policy.config_file)")

    def wam_config(self) -> Config:
        """The config of the policy, or of the one that is to be made.

        Raises:
            FileNotFoundError, ValueError: there is none.
        """
        if self.config_file and not (self.pretrained_path and (Path(self.pretrained_path) / INSIDE / CONFIG).is_file()):
            return load_config(Path(self.config_file))
        folder = Path(self.folder())
        if not folder.exists() and not folder.is_absolute() and len(folder.parts) == 2:  # a Hub id
            from wam.model.loading import local_folder

            folder = local_folder(str(folder))
        if not (folder / CONFIG).is_file():
            raise FileNotFoundError(f"{folder} holds no policy: {CONFIG} is missing; give the folder that `wam train` wrote, e.g. runs/demo/train/checkpoint")
        return load_config(folder / CONFIG)

    def robot(self, config: Config) -> EmbodimentConfig:
        """The robot that is driven."""
        return config.model.embodiment(self.embodiment or config.data.embodiment)

    def acting_mode(self, config: Config) -> str:
        """The mode that plans.

        Raises:
            ValueError: it plans no actions, or imagines nothing where that is to be filmed.
        """
        able = [name for name, mode in MODES.items() if Kind.A in mode.predicts and name not in NEEDS_MORE]
        name = self.mode or next(iter(acting_modes(config)), "")
        if name not in able:
            raise ValueError(f"mode {name!r} does not plan actions from what was observed; modes that can: {', '.join(able)} (--policy.mode)")
        imagines = name == "imagine" or Kind.V in MODES[name].denoised
        if self.save_predicted_video and not imagines:
            raise ValueError(f"mode {name!r} imagines no video, so there is nothing to save; use --policy.mode=joint, or save_predicted_video=false")
        return name

    def executed(self, config: Config) -> int:
        """Actions executed of each plan.

        Raises:
            ValueError: more than a plan has.
        """
        most = config.timeline.actions_per_block
        if self.n_action_steps is not None and self.n_action_steps > most:
            raise ValueError(f"n_action_steps is {self.n_action_steps}, and a plan has {most} actions; use 1 to {most}, or null for all")
        return self.n_action_steps or most

    def features(self, config: Config) -> tuple[dict[str, PolicyFeature], dict[str, PolicyFeature]]:
        """Inputs and outputs in LeRobot's terms, under the observation's keys."""
        robot, size = self.robot(config), config.codec.image_size
        names = {camera: self.cameras.get(camera) or self.cameras.get(short(camera)) or camera for camera in config.data.cameras}
        inputs = {key: PolicyFeature(type=FeatureType.VISUAL, shape=(3, *size)) for key in names.values()}
        if config.model.state != "none":
            inputs[STATE] = PolicyFeature(type=FeatureType.STATE, shape=(robot.raw_state_dim,))
        return inputs, {ACTION: PolicyFeature(type=FeatureType.ACTION, shape=(robot.raw_action_dim,))}

    # ------------------------------------------------------------------------------------------ what LeRobot asks

    @property
    def observation_delta_indices(self) -> list[int]:
        """Rows of pictures and states that a training window is made of."""
        return list(Offsets.of(self.wam_config().timeline).observation)

    @property
    def action_delta_indices(self) -> list[int]:
        """Rows of actions that a training window is made of."""
        return list(Offsets.of(self.wam_config().timeline).action)

    @property
    def reward_delta_indices(self) -> None:
        """Rewards are not looked at."""
        return None

    @property
    def drop_n_last_frames(self) -> int:
        """Rows at an episode's end at which no window begins: it would have no whole block."""
        return self.wam_config().timeline.actions_per_block

    def get_optimizer_preset(self) -> AdamWConfig:
        """AdamW as the policy was trained, but for what is given."""
        t = self.wam_config().training
        lr, decay, clip = self.optimizer_lr, self.optimizer_weight_decay, self.optimizer_grad_clip_norm
        return AdamWConfig(
            lr=t.learning_rate if lr is None else lr,
            betas=t.betas,
            weight_decay=t.weight_decay if decay is None else decay,
            grad_clip_norm=t.grad_clip if clip is None else clip,
        )

    def get_scheduler_preset(self) -> DiffuserSchedulerConfig:
        """Warm-up, then a cosine to the run's end, as `wam train` has it."""
        warmup = self.wam_config().training.warmup_steps if self.scheduler_warmup_steps is None else self.scheduler_warmup_steps
        return DiffuserSchedulerConfig(name="cosine", num_warmup_steps=warmup)

    def validate_features(self) -> None:
        """Compare what LeRobot's environment or dataset has with the policy.

        Raises:
            ValueError: cameras, a state or actions that do not fit; says what to do.
        """
        config = self.wam_config()
        robot = self.robot(config)
        if self.input_features:
            camera_keys(config.data.cameras, self.cameras, self.input_features)
        found = None if self.action_feature is None else self.action_feature.shape[-1]
        if found is not None and found != robot.raw_action_dim:
            raise ValueError(f"the robot or environment takes actions of {found} numbers, and the policy gives {robot.raw_action_dim} ({robot.name}); choose another with --policy.embodiment ({', '.join(e.name for e in config.model.embodiments)}), or train one on this robot's data")
