"""Meta-World's fifty tasks as environments: 64 x 64 images, four numbers of state, four of action, 80 control steps a second.

Three things in Meta-World need care, and are dealt with here.  Its `reset(seed)` ignores the seed, and what an instance did before
leaks into the next episode; so an instance is put back as it was built, seeded, and only then reset.  After a reset the simulator's
derived quantities (where the drawer is drawn) are those of *before* the object was placed; so they are computed again.  And its
scripted experts read the goal from the observation, which hides it by default; so it is shown, to the experts only: the state given to
policies is the gripper's position and opening.
"""

from __future__ import annotations

import copy
import difflib
import functools
import warnings
from typing import Any

import numpy as np
import numpy.typing as npt

from wam.evaluation.environments import Floats, Frames, Observation, StepResult
from wam.evaluation.gl import use_offscreen_backend
from wam.evaluation.metaworld_tasks import CONTROL_HZ, INSTRUCTIONS

use_offscreen_backend()  # MuJoCo reads the choice while it is imported

import mujoco  # noqa: E402
from metaworld.env_dict import ALL_V3_ENVIRONMENTS  # noqa: E402
from metaworld.policies import ENV_POLICY_MAP  # noqa: E402

from wam.evaluation.canvas import describe_renderer, shared_canvas  # noqa: E402
from wam.evaluation.metaworld_stage import ALTERED, SIMULATION, Snapshot, Stage, diverged  # noqa: E402

__all__ = ["MetaWorldEnv", "describe_renderer"]


class MetaWorldEnv:
    """One Meta-World task with a camera."""

    state_dim = 4
    action_dim = 4
    control_hz = CONTROL_HZ
    hold = np.array([0, 0, 0, np.nan], np.float32)  # displacements of zero; the gripper goes on pressing as it did
    state_noise = np.array([0.01, 0.01, 0.01, 0.05], np.float32)  # standard deviation of a disturbed measurement: metres, and of the opening

    def __init__(self, task: str, camera: str = "corner4", image_size: int = 64, max_steps: int = 500) -> None:
        """Build the world.

        Args:
            task: e.g. `drawer-open-v3`.
            camera: one of the world's cameras; corner4 is the field's standard view.
            image_size: square, pixels.
            max_steps: control steps before an episode counts as failed.

        Raises:
            ValueError: unknown task or camera, or a size below 1; names the nearest or all.
            RenderError: the machine cannot render offscreen.
        """
        if task not in INSTRUCTIONS:
            near = ", ".join(difflib.get_close_matches(task, INSTRUCTIONS, n=3, cutoff=0.4)) or ", ".join(INSTRUCTIONS)
            raise ValueError(f"Meta-World has no task {task!r}; nearest: {near}")
        if image_size < 1 or max_steps < 1:
            raise ValueError(f"image_size {image_size} and max_steps {max_steps} must be at least 1")
        self.task, self.camera, self.image_size, self.max_steps = task, camera, image_size, max_steps
        self.cameras: tuple[str, ...] = (camera,)
        self.instruction = INSTRUCTIONS[task]
        self.action_low, self.action_high = np.full(4, -1, np.float32), np.full(4, 1, np.float32)
        self._env = _build(task)
        self._camera = _camera_id(self._env.model, camera)
        self._canvas = shared_canvas(self._env.model_name, self._env.model, image_size)
        self._expert = ENV_POLICY_MAP[task]()  # type: ignore[abstract]  # the map holds subclasses
        self.stage = Stage(task, self._env, self._camera)  # for disturbances
        self._built = {name: getattr(self._env.model, name).copy() for name in ALTERED}
        self._headlight = {name: getattr(self._env.model.vis.headlight, name).copy() for name in ("diffuse", "ambient")}
        self._attributes = copy.deepcopy({k: v for k, v in vars(self._env).items() if k not in SIMULATION})
        self._observed: npt.NDArray[np.float64] | None = None  # the simulator's 39 numbers, the goal among them
        self._over = True
        self.steps = 0

    def reset(self, seed: int) -> Observation:
        """Start an episode; the same seed gives the same one, in any process and whatever was run before."""
        env = self._env
        for name, values in self._built.items():
            getattr(env.model, name)[:] = values
        for name, values in self._headlight.items():
            getattr(env.model.vis.headlight, name)[:] = values
        vars(env).update(copy.deepcopy(self._attributes))
        mujoco.mj_resetData(env.model, env.data)
        mujoco.mj_forward(env.model, env.data)
        env.seed(seed)
        env.reset()
        mujoco.mj_forward(env.model, env.data)  # the object was placed after the last step: bring positions up to date
        env._prev_obs = env._get_curr_obs_combined_no_goal()
        self._observed = np.clip(env._get_obs(), env.sawyer_observation_space.low, env.sawyer_observation_space.high)
        self.steps, self._over = 0, False
        return Observation(self.render()[None], self.state(), rest=np.zeros(4, np.float32))

    def state(self) -> Floats:
        """Gripper position (metres) and opening (0..1), (4,)."""
        return self._full_observation()[:4].astype(np.float32)

    def expert_action(self) -> Floats:
        """What Meta-World's scripted expert does now, clipped to the action box, (4,)."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "Constant(s) may be too high": the clipping below is meant
            action = self._expert.get_action(self._full_observation())
        return np.clip(np.asarray(action, np.float32), self.action_low, self.action_high)

    def step(self, action: npt.NDArray[Any]) -> tuple[Floats, float, bool]:
        """Execute one action (4,), clipped to the box, also after the episode is over.

        Returns:
            The state after it, the reward, and whether the task is now solved.

        Raises:
            ValueError: wrong shape, or not finite.
            RuntimeError: the simulation diverged.
        """
        sent = _checked(action, (4,)).astype(np.float64)
        self._full_observation()
        env = self._env
        env.curr_path_length = 0  # Meta-World refuses steps beyond its own 500; max_steps is counted here
        self._observed, reward, _, _, info = env.step(np.clip(sent, -1, 1))
        self.steps += 1
        if diverged(env.data):
            raise RuntimeError(
                f"the simulation of {self.task} diverged at control step {self.steps}; MuJoCo put it back to its start, so this episode means nothing"
            )
        return self.state(), float(reward), bool(info["success"])

    def run(self, actions: npt.NDArray[Any], frame_stride: int) -> StepResult:
        """Execute actions until they, or the episode, end.

        Args:
            actions: (m, 4), clipped to [-1, 1].
            frame_stride: control steps between frames; frames follow the stretch's steps `frame_stride`, `2 frame_stride`, ...

        Raises:
            ValueError: actions of a wrong shape or not finite, a stride below 1, or an episode that is over.
        """
        actions = _checked(actions, (len(actions), 4))
        if frame_stride < 1:
            raise ValueError(f"frame_stride is {frame_stride}; it must be at least 1")
        if self._over:
            raise ValueError(f"the episode of {self.task} is over (or none was begun); call reset(seed) first")
        frames, states, rewards, successes = [], [], [], []
        for count, action in enumerate(actions, start=1):
            state, reward, success = self.step(action)
            states.append(state)
            rewards.append(reward)
            successes.append(success)
            if count % frame_stride == 0:
                frames.append(self.render())
            self._over = success or self.steps >= self.max_steps
            if self._over:
                break
        return StepResult(
            frames=np.asarray(frames, np.uint8).reshape(len(frames), self.image_size, self.image_size, 3),
            states=np.asarray(states, np.float32).reshape(len(states), 4),
            rewards=np.asarray(rewards, np.float32),
            success=np.asarray(successes, np.bool_),
            done=self._over,
        )

    def foresee(self, actions: npt.NDArray[Any], frame_stride: int) -> Frames:
        """What would be seen of several stretches (N, steps, 4), each executed from here; nothing is executed.

        Returns:
            (N, steps // frame_stride, H, W, 3): as `run` would show it; the world stands still where the episode ends.
        """
        actions = _checked(actions, (*np.shape(actions)[:2], 4))
        now, observed, steps = Snapshot(self._env), self._full_observation(), self.steps
        frames = []
        for stretch in actions:
            over = False
            try:
                for count, action in enumerate(stretch, start=1):
                    over = over or self.step(action)[2] or self.steps >= self.max_steps
                    if count % frame_stride == 0:
                        frames.append(self.render())
            finally:
                now.restore(self._env)
                self._observed, self.steps = observed, steps
        return np.asarray(frames, np.uint8).reshape(len(actions), -1, self.image_size, self.image_size, 3)

    def render(self) -> Frames:
        """The current image, (H, W, 3), upright."""
        return self._canvas.draw(self._env.model, self._env.data, self._camera)

    def close(self) -> None:
        """Nothing to give back: the canvas belongs to the process."""

    def _full_observation(self) -> npt.NDArray[np.float64]:
        if self._observed is None:
            raise ValueError(f"the environment {self.task} has no episode; call reset(seed) first")
        return self._observed


def _checked(actions: npt.NDArray[Any], shape: tuple[int, ...]) -> Floats:
    """Actions as float32, the precision datasets store, so that a replay is exact."""
    array = np.asarray(actions, np.float32)
    if array.shape != shape:
        raise ValueError(f"actions have shape {array.shape}; expected {shape} (dx, dy, dz, gripper)")
    if not np.isfinite(array).all():
        raise ValueError(f"actions contain {array[~np.isfinite(array)][0]}; a robot needs finite numbers")
    return array


def _camera_id(model: mujoco.MjModel, camera: str) -> int:
    names = [model.camera(i).name for i in range(model.ncam)]
    if camera not in names:
        raise ValueError(f"Meta-World has no camera {camera!r}; cameras: {', '.join(names)}")
    return names.index(camera)


@functools.lru_cache(maxsize=2)
def _compiled(path: str) -> mujoco.MjModel:
    """A world file, compiled once for many instances, which copy it; few are kept, as each takes 20 MB."""
    return mujoco.MjModel.from_xml_path(path)


def _build(task: str) -> Any:
    """An instance of Meta-World's class that places objects by its seed and shows the goal in its observation."""
    base = ALL_V3_ENVIRONMENTS[task]

    def initialize(self: Any) -> tuple[mujoco.MjModel, mujoco.MjData]:
        model = copy.copy(_compiled(self.fullpath))
        return model, mujoco.MjData(model)

    env = type(base.__name__, (base,), {"_initialize_simulation": initialize})()
    env.seeded_rand_vec, env._freeze_rand_vec = True, False
    env._set_task_called, env._partially_observable = True, False
    vars(env).pop("sawyer_observation_space", None)  # computed while the goal was still hidden, and used to clip
    return env
