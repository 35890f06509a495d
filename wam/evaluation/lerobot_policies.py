"""LeRobot's policies (ACT, diffusion, ...) through the same episodes as ours, from an interpreter that has LeRobot.

    this process                                   PYTHON outside/lerobot_policy.py FOLDER
    VectorEnv: frames, states    -- a pipe -->     preprocessor, select_action, postprocessor
    clip to the box, run         <-- actions --

LeRobot pins other versions of much that is used here, so it lives in an environment of its own, and the python of that is given; where
LeRobot is installed beside this project, that is this one.  It is driven as its own evaluation drives it: one action for each control
step of all robots of a batch, those whose episode is over carried along, and a policy's own queue of actions decides when it looks again.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from wam.evaluation.baselines import Outcome, baseline_row
from wam.evaluation.environments import Floats
from wam.evaluation.vector import VectorEnv

SIDE = Path(__file__).parent / "outside" / "lerobot_policy.py"
IMAGE, STATE = "observation.image", "observation.state"
KINDS = ("act", "diffusion")
REMEDY = "give the python of an environment that has it, with --lerobot-python (pip install lerobot==0.4.4 there)"


class LeRobotPolicy:
    """One policy in a process of its own; use as a context manager."""

    def __init__(self, python: Path, folder: Path, device: str = "cpu") -> None:
        """Start the process and load the policy.

        Args:
            python: an interpreter with LeRobot.
            folder: a `pretrained_model` folder.

        Raises:
            FileNotFoundError: no policy there.
            RuntimeError: LeRobot is not there, or cannot load it.
        """
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"{folder} holds no LeRobot policy (no config.json); it is the folder pretrained_model of a checkpoint")
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  # lives as long as the process; a pipe that nobody reads would fill, and stop it
        try:
            self._process = subprocess.Popen([str(python), str(SIDE), str(folder), device], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said)
        except OSError as error:
            raise RuntimeError(f"{python} cannot be started ({error}); {REMEDY}") from error
        try:
            told = self._hear()[0]
        except RuntimeError as error:
            self.close()
            raise RuntimeError(f"LeRobot cannot load {folder} in {python}: {error}; {REMEDY}") from None
        self.kind, self.versions, self.action_dim = str(told["type"]), dict(told["versions"]), int(told["action_dim"])
        self.inputs: dict[str, list[int]] = told["inputs"]
        self.cameras = tuple(key for key in self.inputs if key.startswith(IMAGE))  # observation.image, or observation.images.<name>

    def act(self, seen: Mapping[str, npt.NDArray[Any]], task: str, reset: bool) -> Floats:
        """Actions (n, Da) for what n robots see: pictures uint8 (n, H, W, 3), states float32 (n, Ds).

        Raises:
            RuntimeError: the policy failed.
        """
        arrays = {key: np.ascontiguousarray(value) for key, value in seen.items()}
        told = [{"key": key, "dtype": str(value.dtype), "shape": value.shape} for key, value in arrays.items()]
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"reset": reset, "task": task, "arrays": told}).encode() + b"\n")
            for value in arrays.values():
                self._process.stdin.write(value.tobytes())
            self._process.stdin.flush()
        except OSError as error:
            raise RuntimeError(f"the process of the {self.kind} policy is gone ({error})") from error
        answer, stream = self._hear()
        shape = answer["shape"]
        return np.frombuffer(stream.read(4 * int(np.prod(shape))), np.float32).reshape(shape)

    def _hear(self) -> tuple[dict[str, Any], Any]:
        stream = self._process.stdout
        assert stream is not None
        line = stream.readline()
        if not line:
            code = self._process.wait()
            self._said.seek(0)
            said = self._said.read().decode(errors="replace").strip().splitlines()
            raise RuntimeError(said[-1] if said else f"its process ended with exit code {code}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer, stream

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()
        self._said.close()

    def __enter__(self) -> LeRobotPolicy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# ------------------------------------------------------------------------------------------------ driving


def run_lerobot(
    env_name: str,
    folder: Path,
    episodes: int,
    seed: int,
    python: Path | None = None,
    workers: int = 2,
    max_steps: int = 500,
    batch: int = 25,
    device: str = "cpu",
) -> dict[str, dict[str, Any]]:
    """Drive a LeRobot policy through the episodes of seeds `seed`, `seed + 1`, ...; a row as `run_baselines` gives them, by the policy's kind.

    Args:
        folder: `pretrained_model` of a checkpoint.
        python: an interpreter with LeRobot; default: this one.

    Raises:
        ValueError: the policy's cameras, state or actions are not the environment's.
        FileNotFoundError, RuntimeError: see `LeRobotPolicy` and `baseline_row`.
    """
    with LeRobotPolicy(python or Path(sys.executable), Path(folder), device) as policy, _environment(policy, env_name, min(batch, episodes), workers, max_steps) as env:
        outcomes: list[Outcome] = []
        with tqdm(total=episodes, unit="episode", desc=policy.kind) as progress:
            for first in range(seed, seed + episodes, batch):
                outcomes += drive(policy, env, range(first, min(first + batch, seed + episodes)))
                progress.update(len(outcomes) - progress.n)
        return {policy.kind: {**baseline_row(env_name, policy.kind, outcomes), "policy": str(folder), "versions": policy.versions}}


@contextmanager
def _environment(policy: LeRobotPolicy, env_name: str, rows: int, workers: int, max_steps: int) -> Iterator[VectorEnv]:
    """The environment through the policy's cameras."""
    sizes = {tuple(policy.inputs[key][1:]) for key in policy.cameras}
    if len(sizes) > 1:
        raise ValueError(f"the {policy.kind} policy takes pictures of several sizes ({sorted(sizes)}); an environment draws all at one")
    settings: dict[str, Any] = {"max_steps": max_steps}
    if policy.cameras:
        high, wide = sizes.pop()
        names = tuple(key.rsplit(".", 1)[-1] for key in policy.cameras)
        settings |= {"camera": names[0] if len(names) == 1 else names, "image_size": high if high == wide else (high, wide)}
    with VectorEnv(env_name, rows, workers, **settings) as env:
        state = policy.inputs.get(STATE, [env.state_dim])
        if state != [env.state_dim] or policy.action_dim != env.action_dim:
            raise ValueError(f"the {policy.kind} policy takes a state of {state} and gives {policy.action_dim} numbers; {env_name} has {env.state_dim} and {env.action_dim}")
        yield env


def drive(policy: LeRobotPolicy, env: VectorEnv, seeds: Sequence[int]) -> list[Outcome]:
    """One episode per seed, side by side, one control step at a time."""
    first = env.reset(list(seeds))
    frames, states = first.frames[:, 0].copy(), np.nan_to_num(first.states)  # a row that crashed is carried along, and its actions go nowhere
    length, best = np.zeros(len(seeds), int), np.full(len(seeds), -np.inf)
    won, crashed = np.zeros(len(seeds), bool), dict(first.crashed)
    active, reset = [row for row in range(len(seeds)) if row not in crashed], True
    while active:
        views = np.split(frames, max(1, len(policy.cameras)), axis=2)
        seen: dict[str, npt.NDArray[Any]] = dict(zip(policy.cameras, views, strict=False))
        if STATE in policy.inputs:
            seen[STATE] = states.astype(np.float32)
        actions = np.clip(policy.act(seen, env.instruction, reset), env.action_low, env.action_high)
        reset = False
        for row, result in zip(active, env.run(actions[active][:, None], active, 1), strict=True):
            if result.crashed is not None:
                crashed[row] = result.crashed
            else:
                frames[row], states[row] = result.frames[-1], result.states[-1]
                length[row] += 1
                best[row], won[row] = max(best[row], float(result.rewards[-1])), bool(result.success[-1])
            if result.done:
                active = [other for other in active if other != row]
    return [
        Outcome(seed, bool(won[row]) and row not in crashed, int(length[row]), float(best[row]) if length[row] else None, crashed.get(row))
        for row, seed in enumerate(seeds)
    ]


# ------------------------------------------------------------------------------------------------ training


def train_lerobot(python: Path, kind: str, dataset: Path, output: Path, steps: int, batch_size: int = 8, device: str = "cpu", more: Sequence[str] = ()) -> Path:
    """Train one of LeRobot's policies with LeRobot's own command; returns the folder to load.

    Args:
        kind: `act`, `diffusion`, or another of LeRobot's types.
        dataset: a LeRobot dataset in a folder.
        output: a folder that does not exist yet.
        more: further arguments of `lerobot-train`, e.g. `--policy.chunk_size=16`.

    Raises:
        ValueError: the output exists.
        RuntimeError: LeRobot's training failed; its last words.
    """
    if output.exists():
        raise ValueError(f"{output} exists; LeRobot's training wants a new folder")
    command = [
        *(str(python), "-m", "lerobot.scripts.lerobot_train"),
        *(f"--dataset.repo_id=local/{dataset.name}", f"--dataset.root={dataset}", f"--output_dir={output}"),
        *(f"--policy.type={kind}", f"--policy.device={device}", "--policy.push_to_hub=false", "--policy.pretrained_backbone_weights=null"),
        *(f"--steps={steps}", f"--save_freq={steps}", f"--batch_size={batch_size}", "--num_workers=0", "--eval_freq=0", "--wandb.enable=false"),
        *more,
    ]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", check=False)
    except OSError as error:
        raise RuntimeError(f"{python} cannot be started ({error}); {REMEDY}") from error
    folder = output / "checkpoints" / "last" / "pretrained_model"
    if done.returncode or not folder.is_dir():
        raise RuntimeError(f"lerobot-train ended with exit code {done.returncode}: {' | '.join(done.stdout.strip().splitlines()[-5:])}; {REMEDY}")
    return folder
