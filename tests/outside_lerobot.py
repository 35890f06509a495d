"""LeRobot itself with the plugin, for an interpreter that has both: evaluation, training, going on, and one plan; a line of JSON at the end.

    python outside_lerobot.py CHECKPOINT DATASET FOLDER        a `wam` policy, a LeRobot v3.0 dataset, where to write
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from lerobot.configs.policies import PreTrainedConfig
from lerobot.configs.types import FeatureType, NormalizationMode, PolicyFeature
from lerobot.envs.configs import EnvConfig
from lerobot.policies.factory import get_policy_class, make_pre_post_processors
from lerobot.scripts import lerobot_eval, lerobot_train
from lerobot.utils.import_utils import register_third_party_plugins

STEPS = 11


class TinyEnv(gym.Env):
    """A picture and four numbers that follow the actions; a success after a number of steps that the seed says, so that rows end apart."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}
    log: list = []

    def __init__(self, max_episode_steps: int = STEPS, render_mode: str = "rgb_array"):
        self._max_episode_steps, self.render_mode = max_episode_steps, render_mode
        self.observation_space = spaces.Dict({"pixels": spaces.Box(0, 255, (48, 64, 3), np.uint8), "agent_pos": spaces.Box(-9, 9, (4,), np.float64)})
        self.action_space = spaces.Box(-9, 9, (4,), np.float32)

    def _seen(self) -> dict:
        rows = np.arange(48 * 64 * 3).reshape(48, 64, 3)
        return {"pixels": ((rows + 40 * self.position.sum() + 7 * self.step_) % 256).astype(np.uint8), "agent_pos": self.position}

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.position, self.step_, self.end = self.np_random.uniform(-1, 1, 4), 0, 5 + (seed or 0) % 4
        return self._seen(), {"is_success": False}

    def step(self, action):
        assert np.isfinite(action).all()
        self.log.append(np.asarray(action).tolist())
        self.position, self.step_ = np.clip(self.position + 0.1 * action, -9, 9), self.step_ + 1
        done = self.step_ >= self.end
        return self._seen(), float(done), done, False, {"is_success": done}

    def render(self):
        return self._seen()["pixels"]


@EnvConfig.register_subclass("tiny")
@dataclass
class TinyConfig(EnvConfig):
    task: str | None = "Tiny-v0"
    fps: int = 10
    features: dict = field(
        default_factory=lambda: {
            "action": PolicyFeature(FeatureType.ACTION, (4,)),
            "agent_pos": PolicyFeature(FeatureType.STATE, (4,)),
            "pixels": PolicyFeature(FeatureType.VISUAL, (48, 64, 3)),
        }
    )
    features_map: dict = field(default_factory=lambda: {"action": "action", "agent_pos": "observation.state", "pixels": "observation.image"})

    @property
    def gym_kwargs(self) -> dict:
        return {}


gym.register("gym_tiny/Tiny-v0", TinyEnv)


def run(main, *arguments: str) -> None:
    """A command of LeRobot's, in this process."""
    sys.argv = [main.__name__, *arguments]
    main()


def evaluate(output: Path, *arguments: str) -> tuple[dict, list]:
    """`lerobot-eval`: what it says, and the actions that environments got."""
    TinyEnv.log.clear()
    run(lerobot_eval.eval_main, "--env.type=tiny", "--eval.n_episodes=3", "--eval.batch_size=2", f"--output_dir={output}", "--policy.task=open the drawer", *arguments)
    return json.loads((output / "eval_info.json").read_text()), list(TinyEnv.log)


def one_plan(folder: Path) -> dict:
    """`predict_action_chunk` beside a session of `wam` that sees the same."""
    from wam.data.views import Canvas
    from wam.inference.session import Session
    from wam.pretrained import from_pretrained

    config = PreTrainedConfig.from_pretrained(folder)
    config.mode = "joint"
    policy = get_policy_class("wam").from_pretrained(folder, config=config)
    before, after = make_pre_post_processors(policy.config, pretrained_path=str(folder))
    rng = np.random.default_rng(0)
    pictures, states = rng.integers(0, 256, (2, 48, 64, 3), dtype=np.uint8), rng.normal(size=(2, 4)).astype(np.float32)
    seen = {"observation.images.corner4": torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255, "observation.state": torch.from_numpy(states), "task": ["open the drawer", "close it"]}
    chunk = after(policy.predict_action_chunk(before(dict(seen)))).numpy()
    held = policy.predict_action_chunk(before(dict(seen)), inference_delay=2, prev_chunk_left_over=torch.from_numpy(chunk[:, 1:]))
    ours, whole = from_pretrained(folder / "wam"), policy.policy.config
    expected = []
    for row, robot in enumerate(policy.chunks.rows):
        session = Session(ours, [seen["task"][row]], whole.data.embodiment, [robot.seed])
        session.observe(Canvas.of(whole.data, whole.codec.image_size).compose([pictures[row : row + 1]])[None], states[row : row + 1])
        plan = session.plan(policy.settings.mode)
        expected.append(plan.actions[0])
    film = policy.decode_predicted_latents(torch.cat([policy.last_predicted_latents] * 2, dim=2))
    left = held[:, :2] - torch.from_numpy(chunk[:, 1:3])
    return {"apart": float(np.abs(chunk - np.stack(expected)).max()), "shape": list(chunk.shape), "held": float(left.abs().max()), "film": [*film.shape, str(film.dtype)]}


def refusals(checkpoint: Path) -> list[str]:
    """What is said of options that do not fit the policy."""
    from lerobot_policy_wam import WAMConfig, WAMPolicy

    said = []
    for wrong in (
        {"mode": "forward"},
        {"mode": "skip", "save_predicted_video": True},
        {"n_action_steps": 9},
        {"normalization_mapping": {"ACTION": NormalizationMode.MEAN_STD}},
        {"output_features": {"action": PolicyFeature(FeatureType.ACTION, (7,))}},
        {"input_features": {"observation.images.top": PolicyFeature(FeatureType.VISUAL, (3, 8, 8)), "observation.image": PolicyFeature(FeatureType.VISUAL, (3, 8, 8))}},
        {"checkpoint": str(checkpoint / "nowhere")},
        {"checkpoint": ""},
    ):
        try:
            WAMPolicy(WAMConfig(**{"checkpoint": str(checkpoint), "device": "cpu", **wrong}))
            said.append(f"{wrong} was taken")
        except (FileNotFoundError, ValueError) as error:
            said.append(str(error))
    return said


def main() -> None:
    """Do it all."""
    from lerobot_policy_wam.folder import to_lerobot

    torch.set_num_threads(1)
    checkpoint, dataset, output = (Path(text) for text in sys.argv[1:])
    register_third_party_plugins()
    folder = to_lerobot(checkpoint, output / "policy", {"corner4": "observation.image"}, device="cpu")
    told, actions = evaluate(output / "eval", f"--policy.path={folder}", "--policy.mode=joint", "--policy.n_action_steps=3")
    _, same = evaluate(output / "bare", "--policy.type=wam", f"--policy.checkpoint={checkpoint}", "--policy.device=cpu", "--policy.mode=joint", "--policy.n_action_steps=3")
    plain = to_lerobot(checkpoint, output / "plain", device="cpu")
    plan = one_plan(plain)
    train = [f"--dataset.repo_id=local/{dataset.name}", f"--dataset.root={dataset}", "--batch_size=4", "--num_workers=0", "--save_freq=2", "--log_freq=1", "--eval_freq=0", "--wandb.enable=false", "--dataset.use_imagenet_stats=false"]
    run(lerobot_train.train, f"--policy.path={plain}", f"--output_dir={output / 'run'}", "--steps=2", "--policy.optimizer_lr=0.003", *train)
    saved = output / "run" / "checkpoints" / "000002" / "pretrained_model"
    run(lerobot_train.train, f"--config_path={saved / 'train_config.json'}", "--resume=true", "--steps=3")
    trained = output / "run" / "checkpoints" / "last" / "pretrained_model"
    after = one_plan(trained)
    from safetensors.torch import load_file

    tensors = [load_file(path / "wam" / "model.safetensors") for path in (plain, saved, trained)]
    moved = [max(float((a[name] - b[name]).abs().max()) for name in a if name.startswith("model.")) for a, b in zip(tensors, tensors[1:], strict=False)]
    codec = max(float((tensors[0][name] - tensors[-1][name]).abs().max()) for name in tensors[0] if name.startswith("codec."))
    print(json.dumps({"overall": told["overall"], "per_task": told["per_task"], "steps": len(actions), "same": actions == same, "plan": plan, "after": after, "moved": moved, "codec": codec, "refused": refusals(checkpoint)}))


if __name__ == "__main__":
    main()
