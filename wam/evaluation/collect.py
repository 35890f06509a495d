"""Demonstrations from Meta-World's scripted experts, as a LeRobot v3.0 dataset.

What is recorded is what a policy should do, in states that a policy will meet: noise is added to the action that is *executed*, and the
label beside it is what the expert would do there.  The noise is correlated over a tenth of a second (white noise at 80 Hz averages out)
and differs in strength between episodes, so that some are nearly perfect and some need many corrections.  It is added to the gripper's
motion and not to its opening, where it would only make the expert drop things.  Demonstrators may differ in pace as well, as people do: then
one picture has many right answers, and two plans in a row need not be halves of the same one.

    seed -> attempt without images -> success? -> again, the same executed actions, with images -> .collecting/<task>/<seed>.{mp4,npz}
                                      failure  -> .collecting/<task>/<seed>.rejected                       all there? -> the dataset

Failed attempts are never drawn (drawing is nine tenths of the time), and every recorded episode has been replayed once, exactly.  Which
episodes a dataset holds depends on the settings alone: the first successes in the order of seeds, whatever the number of workers and
however often the collection was interrupted.
"""

from __future__ import annotations

import errno
import importlib.metadata
import json
import shutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from wam.config import CollectConfig, to_dict
from wam.data.writer import LeRobotWriter
from wam.data.writer_stats import pixel_histogram
from wam.data.writer_video import encode_video
from wam.evaluation.environments import Floats, make_env, require_simulator
from wam.evaluation.metaworld_tasks import ACTION_NAMES, CONTROL_HZ, INSTRUCTIONS, STATE_NAMES
from wam.evaluation.seeds import require_split
from wam.evaluation.workers import Worker, WorkerError, Workers
from wam.files import atomic_path, write_json_atomic, write_text_atomic

STAGING = ".collecting"
CORRELATION = 0.9  # of the noise between control steps: a time constant of ten steps, an eighth of a second
ATTEMPTS = 5  # per wanted episode (and ten more), before an expert is given up


def collect(config: CollectConfig, root: Path) -> None:
    """Collect demonstrations; go on where an earlier call was interrupted; leave a finished dataset as it is.

    Args:
        config: what to collect.
        root: the dataset's directory.

    Raises:
        ImportError, RenderError: no simulator, or none that draws.
        ValueError: unknown task or camera, seeds outside the demonstration range, or a dataset made with other settings.
        FileExistsError: the directory holds something else.
        RuntimeError: an expert fails too often, or a simulator crashed.
        OSError, KeyboardInterrupt: the disk is full, or Ctrl-C; finished episodes are kept, and the message says so.
    """
    root = Path(root)
    if _is_complete(config, root):
        tqdm.write(f"{root} already holds this dataset, with the same settings; nothing to do")
        return
    for task in config.tasks:
        if task not in INSTRUCTIONS:
            make_env(f"metaworld/{task}")  # raises, naming the nearest
    require_simulator()
    require_split((config.seed, config.seed + config.episodes_per_task - 1), "demonstration")
    staging = root / STAGING
    _open_staging(staging, _settings(config) | {"versions": _versions()})
    try:
        tasks, renderer = _gather(config, staging)
        _assemble(config, root, staging, tasks, _provenance(config, tasks, renderer))
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; {_kept(staging)}") from None
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise OSError(errno.ENOSPC, f"the disk is full; free some space; {_kept(staging)}", str(root)) from error
    shutil.rmtree(staging)
    tqdm.write(
        f"{root}: "
        + "; ".join(f"{name}: {len(task.accepted)} episodes from {len(task.accepted) + len(task.rejected)} attempts" for name, task in tasks.items())
    )


# ------------------------------------------------------------------------------------------------ which seeds are tried


@dataclass
class _Task:
    """How far one task has come."""

    wanted: int
    next_seed: int
    accepted: list[int] = field(default_factory=list)
    rejected: list[int] = field(default_factory=list)
    running: int = 0

    @property
    def needs_attempt(self) -> bool:
        """Even if every running attempt succeeds, one more is needed.

        So no attempt is wasted, and the choice of seeds is the same for any number of workers.
        """
        return len(self.accepted) + self.running < self.wanted

    def finish(self, seed: int, success: bool) -> None:
        (self.accepted if success else self.rejected).append(seed)


def _gather(config: CollectConfig, staging: Path) -> tuple[dict[str, _Task], dict[str, str]]:
    """Attempt seeds in order until every task has its episodes in the staging directory; also return what drew them."""
    tasks = {name: _Task(config.episodes_per_task, config.seed) for name in config.tasks}
    total = len(tasks) * config.episodes_per_task
    with (
        tqdm(total=total, unit="episode", desc="collecting", smoothing=0.05) as progress,
        Workers(min(config.workers, total), _attempt_handler, (config, staging)) as workers,
    ):
        idle, busy = [workers[i] for i in range(len(workers))], dict[Worker, tuple[str, int]]()
        while True:
            for job in iter(lambda: _next_job(config, staging, tasks, progress) if idle else None, None):
                worker = idle.pop()
                worker.send(job)
                busy[worker] = job
            if not busy:
                break
            for worker in workers.ready(list(busy)):
                name, seed = busy.pop(worker)
                tasks[name].running -= 1
                success = _answer(worker, name, seed)
                tasks[name].finish(seed, success)
                progress.update(success)
                idle.append(worker)
        workers[0].send(None)
        renderer = workers[0].receive()
    for task in tasks.values():
        task.accepted.sort()
        task.rejected.sort()
    return tasks, renderer


def _next_job(config: CollectConfig, staging: Path, tasks: dict[str, _Task], progress: Any) -> tuple[str, int] | None:
    """The next attempt that is needed and was not made by an earlier run; None if there is none for now."""
    for name, task in tasks.items():
        while task.needs_attempt:
            seed = task.next_seed
            require_split((seed,), "demonstration")
            if seed - config.seed >= ATTEMPTS * config.episodes_per_task + 10:
                solved = f"the expert of {name} solved {len(task.accepted)} of {seed - config.seed} attempts"
                raise RuntimeError(f"{solved}; lower collect.action_noise ({config.action_noise}) or raise collect.max_steps ({config.max_steps})")
            task.next_seed += 1
            if _episode_path(staging, name, seed).exists():
                task.finish(seed, True)
                progress.update()
            elif _rejected_path(staging, name, seed).exists():
                task.finish(seed, False)
            else:
                task.running += 1
                return name, seed
    return None


def _answer(worker: Worker, name: str, seed: int) -> bool:
    try:
        return bool(worker.receive())
    except WorkerError as failure:
        if isinstance(failure.error, (ValueError, OSError, ImportError)):
            raise failure.error from None
        raise RuntimeError(f"metaworld/{name} crashed in the attempt of seed {seed}:\n{failure.text}") from failure


# ------------------------------------------------------------------------------------------------ one attempt, inside a worker


def _attempt_handler(config: CollectConfig, staging: Path) -> Callable[[tuple[str, int] | None], Any]:
    """Inside a worker: make attempts, keeping the environment of the task at hand; asked for nothing, say what draws here."""
    environments: dict[str, Any] = {}

    def handle(job: tuple[str, int] | None) -> Any:
        if job is None:
            from wam.evaluation.metaworld import describe_renderer

            return describe_renderer()
        task, seed = job
        if task not in environments:
            environments.clear()
            environments[task] = make_env(f"metaworld/{task}", camera=config.camera, image_size=config.image_size, max_steps=config.max_steps)
        env = environments[task]
        executed = _attempt(env, config, seed)
        if executed is None:
            write_text_atomic(_rejected_path(staging, task, seed), "")
            return False
        frames, columns = _record(env, seed, *executed)
        encode_video(frames, _video_path(staging, task, seed), env.control_hz)
        with atomic_path(_episode_path(staging, task, seed)) as temporary:  # last: an episode is finished when this is there
            arrays: dict[str, Any] = {"histogram": pixel_histogram(frames), "noise": np.array(noise_std(config, task, seed)), **columns}
            np.savez_compressed(temporary, **arrays)
        return True

    return handle


def noise_std(config: CollectConfig, task: str, seed: int) -> float:
    """An episode's own noise, uniform in [0, action_noise]."""
    return float(_noise_generator(task, seed).uniform(0, config.action_noise))


def exploration_noise(config: CollectConfig, task: str, seed: int, steps: int) -> Floats:
    """Correlated noise on the gripper's motion, (steps, 4), from the episode's seed: n' = c n + sqrt(1 - c^2) e, stationary."""
    generator = _noise_generator(task, seed)
    std = generator.uniform(0, config.action_noise)
    noise = generator.normal(size=(steps, 3))
    for step in range(1, steps):
        noise[step] = CORRELATION * noise[step - 1] + np.sqrt(1 - CORRELATION**2) * noise[step]
    return np.pad(std * noise, ((0, 0), (0, 1))).astype(np.float32)


def pace_of(config: CollectConfig, task: str, seed: int) -> float:
    """How fast an episode's demonstrator moves, as a part of the expert's speed, uniform in [slowest_pace, 1]."""
    return float(np.random.default_rng((seed, zlib.crc32(task.encode()), 1)).uniform(config.slowest_pace, 1))


def _noise_generator(task: str, seed: int) -> np.random.Generator:
    return np.random.default_rng((seed, zlib.crc32(task.encode())))


def _attempt(env: Any, config: CollectConfig, seed: int) -> tuple[Floats, Floats, Floats] | None:
    """Let the noisy expert try, without images; return labels and executed actions (T, 4) and states (T, 4), or None if it failed."""
    env.reset(seed)
    noise = exploration_noise(config, env.task, seed, config.max_steps + config.steps_after_success)
    pace = np.array([*[pace_of(config, env.task, seed)] * 3, 1], np.float32)
    labels: list[Floats] = []
    executed: list[Floats] = []
    states: list[Floats] = []
    end = config.max_steps
    solved = False
    while len(executed) < end:
        states.append(env.state())
        labels.append(pace * env.expert_action())
        executed.append(np.clip(labels[-1] + noise[len(executed)], env.action_low, env.action_high))
        _, _, success = env.step(executed[-1])
        if success and not solved:
            solved, end = True, len(executed) + config.steps_after_success
    return (np.stack(labels), np.stack(executed), np.stack(states)) if solved else None


def _record(env: Any, seed: int, labels: Floats, executed: Floats, states: Floats) -> tuple[npt.NDArray[np.uint8], dict[str, npt.NDArray[Any]]]:
    """Execute an episode again, with images: frames (T, H, W, 3) before each action, and columns."""
    frames, rewards, successes = [env.reset(seed).frames[0]], [], []
    for step, action in enumerate(executed):
        if not np.array_equal(env.state(), states[step]):
            raise RuntimeError(f"the replay of seed {seed} left the attempt's path at control step {step}; the simulation is not deterministic")
        if step > 0:
            frames.append(env.render())
        _, reward, success = env.step(action)
        rewards.append(reward)
        successes.append(success)
    done = np.zeros(len(executed), np.bool_)
    done[-1] = True
    return np.stack(frames), {
        "observation.state": states,
        "action": labels,
        "action.executed": executed,
        "next.reward": np.array(rewards, np.float32),
        "next.success": np.array(successes, np.bool_),
        "next.done": done,
    }


# ------------------------------------------------------------------------------------------------ the staging directory and the dataset


def _settings(config: CollectConfig) -> dict[str, Any]:
    """The settings that decide what a dataset holds; the number of workers does not, nor does the expert's own pace."""
    return {name: value for name, value in to_dict(config).items() if name != "workers" and (name, value) != ("slowest_pace", 1.0)}


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("metaworld", "mujoco", "gymnasium", "numpy")}


def _is_complete(config: CollectConfig, root: Path) -> bool:
    path = root / "meta/info.json"
    if not path.is_file():
        return False
    made = json.loads(path.read_text()).get("wam", {}).get("collect")
    if made is None:
        raise ValueError(f"{root} holds a dataset that wam collect did not make; choose another data.root")
    _refuse_other_settings(root, made, _settings(config), f"choose another data.root, or delete {root} to collect again")
    return True


def _open_staging(staging: Path, settings: dict[str, Any]) -> None:
    path = staging / "settings.json"
    if path.is_file():
        _refuse_other_settings(
            staging, json.loads(path.read_text()), settings, f"finish with the settings it was begun with, or delete {staging} to begin again"
        )
        return
    root = staging.parent
    foreign = sorted(p.name for p in root.iterdir() if not p.name.startswith(".")) if root.is_dir() else []
    if foreign:
        raise FileExistsError(errno.EEXIST, f"not empty ({', '.join(foreign[:5])}) and not a dataset; choose another data.root", str(root))
    write_json_atomic(path, settings)


def _refuse_other_settings(where: Path, made: dict[str, Any], wanted: dict[str, Any], remedy: str) -> None:
    differences = [f"{name} {made.get(name)!r}, now {wanted.get(name)!r}" for name in sorted(made | wanted) if made.get(name) != wanted.get(name)]
    if differences:
        raise ValueError(f"{where} was collected with other settings ({'; '.join(differences)}); {remedy}")


def _episode_path(staging: Path, task: str, seed: int) -> Path:
    return staging / task / f"{seed:06d}.npz"


def _video_path(staging: Path, task: str, seed: int) -> Path:
    return staging / task / f"{seed:06d}.mp4"


def _rejected_path(staging: Path, task: str, seed: int) -> Path:
    return staging / task / f"{seed:06d}.rejected"


def _kept(staging: Path) -> str:
    return f"{len(list(staging.glob('*/[!.]*.npz')))} finished episodes are kept in {staging}; the same command goes on from there"


def _assemble(config: CollectConfig, root: Path, staging: Path, tasks: dict[str, _Task], provenance: dict[str, Any]) -> None:
    """Make the dataset from the staged episodes."""
    camera = f"observation.images.{config.camera}"
    side = config.image_size
    features: dict[str, dict[str, Any]] = {
        camera: {"dtype": "video", "shape": [side, side, 3], "names": ["height", "width", "channels"]},
        "observation.state": {"dtype": "float32", "shape": [4], "names": list(STATE_NAMES)},
        "action": {"dtype": "float32", "shape": [4], "names": list(ACTION_NAMES)},
        "action.executed": {"dtype": "float32", "shape": [4], "names": list(ACTION_NAMES)},
        "next.reward": {"dtype": "float32", "shape": [1], "names": None},
        "next.success": {"dtype": "bool", "shape": [1], "names": None},
        "next.done": {"dtype": "bool", "shape": [1], "names": None},
    }
    writer = LeRobotWriter(root, CONTROL_HZ, features, "sawyer", provenance)
    for name, task in tasks.items():
        for seed in task.accepted:
            with np.load(_episode_path(staging, name, seed)) as stored:
                columns = {key: stored[key] for key in features if key != camera}
                video = (_video_path(staging, name, seed), stored["histogram"])
                extras: dict[str, int | float | str] = {"seed": seed, "environment": f"metaworld/{name}", "action_noise": float(stored["noise"])}
            writer.add_episode(columns, {camera: video}, INSTRUCTIONS[name], extras)
    writer.finalize()


def _provenance(config: CollectConfig, tasks: dict[str, _Task], renderer: dict[str, str]) -> dict[str, Any]:
    """How the dataset was made: enough to make it again, and to keep its seeds out of an evaluation."""
    return {
        "collect": _settings(config),
        "simulator": "metaworld",
        "versions": _versions(),
        "renderer": renderer,
        "noise": {
            "kind": "first-order autoregressive, on dx dy dz",
            "correlation": CORRELATION,
            "largest_std": config.action_noise,
            "label": "the expert's action at the episode's pace, without noise",
        },
        "seeds": {name: {"accepted": task.accepted, "rejected": task.rejected} for name, task in tasks.items()},
    }
