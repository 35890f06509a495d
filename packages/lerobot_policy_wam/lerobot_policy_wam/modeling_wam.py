"""The policy that LeRobot drives and trains: a world action model in LeRobot's interface.

    lerobot-eval, -record, -rollout   select_action(observation)         every control step -> memory -> a queue of actions
    one observation at a time         predict_action_chunk(observation)  a plan from this observation alone; a prefix may be decided already
    lerobot-train                     forward(batch)                     the objective of `wam train`, on LeRobot's windows
    films of what was imagined        last_predicted_latents, decode_predicted_latents

Weights, statistics, codec and config are a `wam` policy, loaded from its folder and saved as one (`<folder>/wam`), so both projects read
what either trained.  What LeRobot's trainer does not do is not done: no average of the weights, no augmentation but LeRobot's own.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lerobot.configs.policies import PreTrainedConfig
from lerobot.policies.pretrained import PreTrainedPolicy
from torch import Tensor
from wam.codec.codec import make_image
from wam.config import load_config
from wam.data.mixture import training_data
from wam.data.normalize import normalizer_for
from wam.data.units import Units
from wam.data.views import Canvas
from wam.inference.gate import Gate, GateConfig, read_gate
from wam.pretrained import CONFIG, Policy, from_pretrained, save_pretrained
from wam.training.build import build_model, codec_for, text_for
from wam.training.finetune import begin_from
from wam.training.groups import freeze, make_optimizer
from wam.training.objective import PARTS, Objective

from lerobot_policy_wam.configuration_wam import INSIDE, WAMConfig
from lerobot_policy_wam.names import STATE, camera_keys, frames_of, tasks_of, vector_of
from lerobot_policy_wam.robots import Robots, Settings
from lerobot_policy_wam.windows import Windows, check_trainable

log = logging.getLogger(__name__)


class WAMPolicy(PreTrainedPolicy):
    """See the module's docstring.

    Attributes:
        policy: the `wam` policy; its model and codec are modules of this one.
        robots: the memory of what `select_action` saw.
        last_predicted_latents: what the last plan of the first row imagined (1, C, k, h, w), until it is taken; None where nothing was.
    """

    config_class = WAMConfig
    name = "wam"

    def __init__(self, config: WAMConfig, dataset_meta: Any = None, **unused: Any):
        """Load the policy that the config names, or make a new one (`config_file`) of LeRobot's dataset.

        Args:
            dataset_meta: LeRobot's, where it trains.
            unused: what LeRobot gives every policy, such as `dataset_stats`; this one has statistics of its own.

        Raises:
            FileNotFoundError: no policy there.
            ValueError: a policy that does not fit the environment or dataset, or options that do not fit the policy.
        """
        super().__init__(config)
        self.config: WAMConfig = config
        config.validate_features()
        made = bool(config.config_file) and config.pretrained_path is None
        self.policy = make_new(config, dataset_meta) if made else from_pretrained(config.folder())
        if dataset_meta is not None:
            for told in check_trainable(self.policy.config, float(dataset_meta.fps), self.policy.control_hz):
                log.warning("%s", told)
        self.model, self.codec = self.policy.model, self.policy.codec
        if self.policy.image is not None:
            self.image = self.policy.image
        whole = self.policy.config
        robot = config.robot(whole)
        self.units, self.canvas = Units.of(robot, whole.data), Canvas.of(whole.data, whole.codec.image_size)
        self.settings = Settings(robot.name, config.acting_mode(whole), whole.sampling.with_steps(config.solver_steps), config.executed(whole), config.noise_seed)
        self.gate = _gate_of(config, self.policy)
        self.objective: Objective | None = None
        self.windows = Windows(whole, robot.name, normalizer_for(self.policy.normalizer, robot.name), config.cameras, config.task)
        log.info("%s plans %d actions at %g Hz in mode %s, and %d of them are executed", robot.name, whole.timeline.actions_per_block, self.policy.control_hz, self.settings.mode, self.settings.execute)
        self.reset()

    @classmethod
    def from_pretrained(cls, pretrained_name_or_path: str | Path, *, config: PreTrainedConfig | None = None, **kwargs: Any) -> WAMPolicy:
        """Load a LeRobot folder (`wam-to-lerobot`, `lerobot-train`), a folder that `wam train` wrote, or either from the Hub.

        Raises:
            FileNotFoundError: neither is there.
        """
        hub = {name: kwargs.pop(name) for name in ("force_download", "resume_download", "proxies", "token", "cache_dir", "local_files_only", "revision") if name in kwargs}
        kwargs.pop("strict", None)  # every tensor must be there, whatever is asked
        folder = Path(pretrained_name_or_path)
        if not folder.exists():
            from huggingface_hub import snapshot_download

            hub = {name: value for name, value in hub.items() if name not in ("resume_download", "proxies") and value is not None}
            folder = Path(snapshot_download(str(pretrained_name_or_path), **hub))
        if config is None:
            config = WAMConfig(checkpoint=str(folder), push_to_hub=False) if (folder / CONFIG).is_file() else PreTrainedConfig.from_pretrained(folder)
        assert isinstance(config, WAMConfig)
        config.pretrained_path = folder
        policy = cls(config, **kwargs)
        return policy.to(config.device).eval()

    def _save_pretrained(self, save_directory: Path) -> None:
        """LeRobot's config, and the policy in `wam/`."""
        replace(self.config, checkpoint=INSIDE, config_file="")._save_pretrained(save_directory)
        save_pretrained(self.policy, save_directory / INSIDE)

    # ------------------------------------------------------------------------------------------ driving

    def reset(self) -> None:
        """Episodes begin: forget what was seen, and draw other noise."""
        if not hasattr(self, "robots"):
            self.robots, self.chunks = (Robots(self.policy, self.settings, self.gate) for _ in range(2))
        else:
            self.robots.reset()
            self.chunks.reset()
        self.last_predicted_latents: Tensor | None = None

    def select_action(self, batch: dict[str, Any], **_: Any) -> Tensor:
        """The next action of every row (B, d), physical units; call it once every control step, so that the memory has the clock.

        Raises:
            ValueError: something is missing from the observation, or wrong with it.
            GateRefusal: a plan breaks a limit at its first action; nothing may be sent.
        """
        self.robots.see(*self._observed(batch))
        actions = self.robots.act()
        self._note(self.robots)
        return torch.from_numpy(actions).to(self.config.device)

    def predict_action_chunk(self, batch: dict[str, Any], inference_delay: int | None = None, prev_chunk_left_over: Tensor | None = None, **_: Any) -> Tensor:
        """A plan (B, A, d) in physical units from this observation alone: how much time passed since another is not known here.

        Args:
            inference_delay: control steps that will have been executed when the plan is there (LeRobot's RTC).
            prev_chunk_left_over: actions of the plan before from this observation on, (B, n, d) or (n, d); the first `inference_delay` of them are
                held as decided, and the rest of the plan follows from them.

        Raises:
            ValueError, GateRefusal: as `select_action`; plans of which the gate lets a different number of actions through.
        """
        robots = self.chunks
        frames, states, tasks = self._observed(batch)
        if len(robots.rows) == len(frames):
            robots.forget()
        else:
            robots.reset()
        robots.see(frames, states, tasks)
        plans = robots.plan(robots.rows, self._decided(inference_delay, prev_chunk_left_over, len(frames)))
        self._note(robots)
        actions = [plan.actions[0] for plan in plans if plan.actions is not None]
        if len({len(each) for each in actions}) > 1:
            raise ValueError(f"the gate cut plans to {', '.join(str(len(each)) for each in actions)} actions, which do not go into one tensor; plan for one robot at a time, or use select_action")
        return torch.from_numpy(np.stack(actions)).to(self.config.device)

    def drop_queued_actions(self) -> None:
        """Plan anew at the next step."""
        self.robots.drop_queued()

    def decode_predicted_latents(self, latents: Tensor) -> Tensor:
        """What plans imagined (1, C, F, h, w), one after the other, as pictures uint8 (4F, H, W, 3) on the CPU."""
        with torch.no_grad():
            return self.codec.decode(latents.to(self.model.device), first=False)[0].cpu()

    def _observed(self, batch: dict[str, Any]) -> tuple[np.ndarray, np.ndarray | None, list[str]]:
        """Frames uint8 (B, H, W, 3), raw states (B, d) and instructions."""
        whole, robot = self.policy.config, self.units.robot
        frames = frames_of(batch, camera_keys(whole.data.cameras, self.config.cameras, batch), self.canvas)
        states = vector_of(batch, "state", self.units.state, STATE, robot.raw_state_dim)
        if frames.ndim != 4 or (states is not None and states.shape[0] != len(frames)):
            raise ValueError(f"the observation has frames {frames.shape} and states {None if states is None else states.shape}; expected one of each a row, as environments give them")
        return frames, states, tasks_of(batch, len(frames), self.config.task)

    def _decided(self, delay: int | None, left_over: Tensor | None, rows: int) -> np.ndarray | None:
        if not delay or left_over is None:
            return None
        left = left_over.detach().cpu().float().numpy()
        left = np.broadcast_to(left, (rows, *left.shape)) if left.ndim == 2 else left
        if left.shape[0] != rows or left.shape[1] < delay:
            raise ValueError(f"prev_chunk_left_over has shape {tuple(left_over.shape)}; expected {rows} rows of at least inference_delay = {delay} actions")
        return left[:, :delay].astype(np.float32)

    def _note(self, robots: Robots) -> None:
        if robots.imagined is not None:
            self.last_predicted_latents, robots.imagined = robots.imagined.detach().cpu(), None

    # ------------------------------------------------------------------------------------------ training

    def get_optim_params(self) -> list[dict[str, Any]]:
        """What trains, as in `wam train`: matrices, which decay, apart from the rest; frozen parts are left out."""
        whole = self.policy.config
        self.model.float().requires_grad_(True)
        freeze(whole, self.model)
        lr = self.config.get_optimizer_preset().lr
        groups = []
        for group in make_optimizer(whole, self.model).param_groups:
            own = getattr(whole.training.groups, group["part"])
            decay = {"weight_decay": group["weight_decay"]} if not group["weight_decay"] or own.weight_decay is not None else {}
            groups.append({"params": group["params"], **decay, **({"lr": lr * own.rate} if own.rate != 1 else {})})
        return groups

    def forward(self, batch: dict[str, Any], reduction: str = "mean") -> tuple[Tensor, dict[str, float]]:
        """The loss of a batch of windows, and its parts.

        Raises:
            ValueError: a batch that was not read with this policy's delta indices, or another reduction.
        """
        if reduction != "mean":
            raise ValueError(f"reduction {reduction!r} is not available: losses are divided by what is supervised in the whole batch")
        if self.objective is None or self.objective.device != self.model.device:
            self.objective = Objective(self.policy.config, self.model, self.codec, self.policy.image, self.model.device)
        t = self.policy.config.training
        draws = torch.Generator().manual_seed(int(torch.randint(2**62, (1,))))  # from the generator that LeRobot seeds, saves and restores
        losses = self.objective(self.windows(batch), draws)
        values = {"video": losses.video(), "action": losses.action(), **({} if losses.value_part is None else {"value": losses.value()})}
        weights = dict(zip(PARTS, (t.video_weight, t.action_weight, t.value_weight), strict=True))
        loss = torch.stack([weights[name] * value for name, value in values.items()]).sum()
        return loss, {**{f"{name}_loss": float(value.detach()) for name, value in values.items()}, **losses.by_mode()}


def make_new(config: WAMConfig, dataset_meta: Any) -> Policy:
    """A new policy as a YAML of `wam train` says, for LeRobot's dataset: statistics and a linear codec are taken from it.

    Raises:
        ValueError: there is no dataset, or the config does not fit it.
    """
    if dataset_meta is None:
        raise ValueError(f"a new policy ({config.config_file}) is made by lerobot-train, of its dataset; to drive one, give --policy.checkpoint or --policy.path")
    whole = load_config(Path(config.config_file), (f"data.root={dataset_meta.root}", "data.cache=none"))
    check_trainable(whole, float(dataset_meta.fps))
    data = training_data(whole)
    codec, device = codec_for(whole, data), "cpu"
    model = build_model(whole, device, text_for(whole, data))
    begin_from(whole, Path(whole.data.root), False, False, model, codec, data.normalizers.get(whole.data.embodiment))
    meta = {"step": 0, "control_hz": data.control_hz, "tasks": data.windows.instructions, "source": data.windows.source}
    return Policy(whole, model, codec, data.normalizer, meta, make_image(whole))


def _gate_of(config: WAMConfig, policy: Policy) -> Gate:
    robot = config.robot(policy.config)
    limits = read_gate(Path(config.gate), [(group.name, group.size) for group in robot.action_groups], robot.raw_action_dim) if config.gate else GateConfig()
    return Gate(limits, robot.raw_action_dim, policy.control_hz)


