"""LIBERO as openpi measures it: a Panda arm with two cameras, 20 commands a second, fifty given initial states for each of a suite's tasks.

    seed        initial state `seed % 50`; the simulator's own seed is 7 in each, and set at each, so that an episode does not depend on those before
    settling    10 steps of the dummy action, while objects fall onto the table; they count for nothing and are not shown
    horizon     220 spatial, 280 object, 300 goal, 520 ten, 400 ninety, after settling
    picture     drawn at 256, turned by 180 degrees, then made to fit with black bars (224 in openpi)
    state       place of the hand (3), its turn as axis x angle (3), both fingers (2)
    action      displacement (3), turn (3), gripper: -1 opens, 1 closes

The package asks a question on the terminal when it is first imported, and fetches its meshes from the Hugging Face Hub when it first
makes a task; a process that cannot do either is told so before.  This adapter was written against hf-libero 0.1.4's source and tested
with a stand-in for its interface; it was not run with the simulator.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from wam.evaluation.environments import Benchmark, Floats, Frames, Observation, StepResult
from wam.evaluation.gymnasium_env import fitted

HORIZONS = {"libero_spatial": 220, "libero_object": 280, "libero_goal": 300, "libero_10": 520, "libero_90": 400}
SETTLING, EPISODES, SIMULATOR_SEED, DRAWN = 10, 50, 7, 256
SOURCE = "openpi's LIBERO evaluation"
DUMMY = np.array([0, 0, 0, 0, 0, 0, -1], np.float32)  # stays, and opens the gripper
CAMERAS = {  # what datasets call them -> the simulator's
    "agentview": "agentview",
    "image": "agentview",
    "wrist_image": "robot0_eye_in_hand",
    "wrist": "robot0_eye_in_hand",
    "robot0_eye_in_hand": "robot0_eye_in_hand",
}


def benchmark_of(task: str) -> Benchmark | None:
    """How a task `<suite>/<number>` is measured; None for an unknown suite."""
    horizon = HORIZONS.get(task.partition("/")[0])
    return None if horizon is None else Benchmark(0, EPISODES, horizon, SOURCE)


class LiberoEnv:
    """One LIBERO task with one or two cameras."""

    state_dim, action_dim, control_hz = 8, 7, 20
    action_low, action_high = np.full(7, -1, np.float32), np.full(7, 1, np.float32)
    hold = np.array([0, 0, 0, 0, 0, 0, np.nan], np.float32)
    state_noise = np.array([0.01] * 3 + [0.05] * 3 + [0.002] * 2, np.float32)  # standard deviation of a disturbed measurement: metres, radians, fingers in metres

    def __init__(self, task: str, camera: str | Sequence[str] = "agentview", image_size: int | Sequence[int] = 224, max_steps: int | None = None) -> None:
        """Build the world.

        Args:
            task: `<suite>/<number>` or `<suite>/<name>`, e.g. `libero_goal/0`.
            camera: one or several, as datasets call them: image or agentview, wrist_image or robot0_eye_in_hand.
            image_size: of each.
            max_steps: control steps before an episode counts as failed; default: the suite's horizon.

        Raises:
            ValueError: no such suite, task or camera.
            RuntimeError: the package was never set up on this machine.
        """
        suite, _, which = task.partition("/")
        if suite not in HORIZONS:
            raise ValueError(f"LIBERO has no suite {suite!r}; suites: {', '.join(HORIZONS)}; write libero/<suite>/<number>")
        self.cameras = (camera,) if isinstance(camera, str) else tuple(camera)
        unknown = [name for name in self.cameras if name not in CAMERAS]
        if unknown or not self.cameras:
            raise ValueError(f"LIBERO has no camera {', '.join(map(repr, unknown)) or 'of no name'}; cameras: {', '.join(CAMERAS)}")
        require_setup()
        from libero.libero import benchmark, get_libero_path
        from libero.libero.envs import OffScreenRenderEnv

        tasks = benchmark.get_benchmark_dict()[suite]()
        index = _task_index(suite, which, list(tasks.get_task_names()))
        chosen = tasks.get_task(index)
        self.task, self.instruction = f"{suite}/{index}", str(chosen.language)
        self.max_steps = HORIZONS[suite] if max_steps is None else int(max_steps)
        high, wide = (image_size, image_size) if isinstance(image_size, int) else image_size
        self.image_size: tuple[int, int] = (int(high), int(wide))
        self._initial = np.asarray(tasks.get_task_init_states(index))
        file = Path(get_libero_path("bddl_files")) / chosen.problem_folder / chosen.bddl_file
        drawn = sorted({CAMERAS[name] for name in self.cameras})
        self._env: Any = OffScreenRenderEnv(bddl_file_name=str(file), camera_names=drawn, camera_heights=DRAWN, camera_widths=DRAWN)
        self._seen: Mapping[str, Any] = {}
        self.steps, self._over = 0, True

    def reset(self, seed: int) -> Observation:
        """Start an episode from initial state `seed % 50`, once everything lies still."""
        self._env.seed(SIMULATOR_SEED)
        self._env.reset()
        self._seen = self._env.set_init_state(self._initial[seed % len(self._initial)])
        for _ in range(SETTLING):
            self._seen = self._env.step(DUMMY.tolist())[0]
        self.steps, self._over = 0, False
        return Observation(self.render()[None], state_of(self._seen), rest=DUMMY.copy())

    def run(self, actions: npt.NDArray[Any], frame_stride: int) -> StepResult:
        """Execute actions (m, 7), clipped to [-1, 1], until they or the episode end.

        Raises:
            ValueError: an episode that is over.
        """
        if self._over:
            raise ValueError(f"the episode of {self.task} is over (or none was begun); call reset(seed) first")
        frames, states, rewards, successes = [], [], [], []
        for count, action in enumerate(np.clip(np.asarray(actions, np.float32), -1, 1), start=1):
            self._seen, reward, done, _ = self._env.step(action.tolist())
            self.steps += 1
            states.append(state_of(self._seen))
            rewards.append(float(reward))
            successes.append(bool(done))  # the simulator's word for: the task is solved
            if count % frame_stride == 0:
                frames.append(self.render())
            self._over = bool(done) or self.steps >= self.max_steps
            if self._over:
                break
        high, wide = self.image_size
        return StepResult(
            frames=np.stack(frames) if frames else np.zeros((0, high, wide * len(self.cameras), 3), np.uint8),
            states=np.stack(states),
            rewards=np.asarray(rewards, np.float32),
            success=np.asarray(successes, np.bool_),
            done=self._over,
        )

    def render(self) -> Frames:
        """The current pictures side by side, (H, V W, 3), upright."""
        views = [fitted(upright(self._seen[f"{CAMERAS[name]}_image"]), self.image_size, "pad", self.task) for name in self.cameras]
        return np.concatenate(views, axis=1)

    def close(self) -> None:
        """Close the simulator."""
        self._env.close()


def upright(picture: npt.NDArray[Any]) -> Frames:
    """A picture (H, W, 3) turned by 180 degrees: the simulator draws upside down, and the field's data is turned, not mirrored."""
    return np.ascontiguousarray(picture[::-1, ::-1])


def state_of(seen: Mapping[str, Any]) -> Floats:
    """Hand, turn and fingers, (8,)."""
    return np.concatenate([seen["robot0_eef_pos"], axis_angle(seen["robot0_eef_quat"]), seen["robot0_gripper_qpos"]]).astype(np.float32)


def axis_angle(quaternion: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """A rotation given as (x, y, z, w) as its axis times its angle, 0..2 pi; (3,)."""
    x, y, z, w = (float(v) for v in quaternion)
    w = min(1.0, max(-1.0, w))
    sine = np.sqrt(1 - w * w)
    return np.zeros(3) if sine < 1e-8 else np.array([x, y, z]) * (2 * np.arccos(w) / sine)


def require_setup() -> None:
    """Check that importing the package asks no question, which nobody could answer in a worker.

    Raises:
        RuntimeError: it would.
    """
    folder = Path(os.environ.get("LIBERO_CONFIG_PATH", Path.home() / ".libero"))
    if not (folder / "config.yaml").is_file():
        raise RuntimeError(f'LIBERO was never set up here ({folder / "config.yaml"} does not exist); run once in a terminal: python -c "import libero.libero", and answer its question')


def _task_index(suite: str, which: str, names: list[str]) -> int:
    if which in names:
        return names.index(which)
    if which.isdigit() and int(which) < len(names):
        return int(which)
    raise ValueError(f"LIBERO's {suite} has no task {which!r}; give a number, 0..{len(names) - 1}, or a name: {', '.join(names[:3])}, ...")
