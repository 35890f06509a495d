"""What can be done to a Meta-World episode from outside, with the physics kept valid.

    object_moved     the task places its object anew, as its own reset does, beside where it began; the hand stays where it is
    arm_pushed       the pose that the arm is held at is moved, as its commands move it; never towards the goal
    camera_shifted   the camera is turned about its own axes
    light_changed    lamps and the table's colour

An object that was taken away and put down by the task's own code stands where tasks put objects: goal, limits and what success is
measured from belong to it.  A place is refused if bodies would overlap there more than they did; then the next of the drawn places is
tried, and if none is free, nothing happens now.

No success is given away.  Before something happens, the simulation is run ahead with a robot that does nothing afterwards, and put back:
if the task were solved within a second, or the simulation diverged, nothing happens now.  (A handle on a spring opens by itself when it
is let go; a drawer that was pushed rolls on.)  What is changed here in a model is put back by `MetaWorldEnv.reset`.
"""

from __future__ import annotations

import copy
from typing import Any

import mujoco
import numpy as np
import numpy.typing as npt

from wam.evaluation.disturb_pixels import light_gains

Vector = npt.NDArray[np.float64]

SIMULATION = ("model", "data", "mujoco_renderer")  # attributes that a snapshot of an instance leaves out
ALTERED = ("body_pos", "body_quat", "site_pos", "site_quat", "cam_quat", "light_diffuse", "light_ambient", "mat_rgba")  # of a model, by tasks or from here
CANDIDATES = 16  # directions tried for one displacement
OVERLAP = 0.002  # metres that bodies may overlap more than before
LEAST = 0.5  # of the asked displacement; a smaller one does not count
WIDE = 0.04  # metres: a task varies a place if its range is at least so wide
GOALS = ("reach-v3", "reach-wall-v3")  # tasks whose object is of no account: their goal is what the hand goes to
QUIET = 80  # control steps that are run ahead after a disturbance: a second
TABLE = ("table_wood", "table_col")  # materials


def movable(task: str, env: Any) -> slice | None:
    """Which of the numbers that a task draws at reset are moved: those of its object, or of its goal where the object has one place only."""
    space = env._random_reset_space
    extent = space.high - space.low
    if task in GOALS:
        return slice(3, 6)
    for part in (slice(0, 2), slice(3, 5)):
        if part.stop <= len(extent) and extent[part].max() >= WIDE:
            return part
    return None


DIVERGED = (mujoco.mjtWarning.mjWARN_BADQPOS, mujoco.mjtWarning.mjWARN_BADQVEL, mujoco.mjtWarning.mjWARN_BADQACC)


def diverged(data: mujoco.MjData) -> bool:
    """Whether MuJoCo had to put a simulation back to its start."""
    return any(data.warning[kind].number for kind in DIVERGED)


class Stage:
    """Does things to the episode that runs in one instance of Meta-World's classes."""

    def __init__(self, task: str, env: Any, camera: int) -> None:
        self._env, self._camera, self._part = env, camera, movable(task, env)
        self._to_goal = task in GOALS
        can = {"gripper_opened", "arm_pushed", "camera_shifted", "light_changed"} | ({"object_moved"} if self._part else set())
        self.kinds = frozenset(can)
        self._way = self._carry = self._depth = 0.0
        arm = [joint for joint in range(env.model.njnt) if env.model.joint(joint).name.startswith(("right_j", "r_close", "l_close"))]
        self._dofs = [dof for dof in range(env.model.nv) if env.model.dof_jntid[dof] not in arm]  # of what is no part of the robot

    def begin(self) -> None:
        """Measure the distances that the episode begins with."""
        self._way, self._carry, self._depth = self._reach(), self._carried(), self._overlap()

    def way_left(self) -> float:
        """Distance from fingers to object (or goal, where that is what is reached for), as a part of that at the start."""
        return self._reach() / max(self._way, 1e-6)

    def carry_left(self) -> float:
        """Distance from object to goal, as a part of that at the start."""
        return self._carried() / max(self._carry, 1e-6)

    # -------------------------------------------------------------------------------------------- the object

    def move_object(self, distance: float, generator: np.random.Generator, grip: float) -> float | None:
        """Place the object (or goal) anew and at rest, about `distance` metres from where it began.

        Args:
            grip: the fingers' last command.

        Returns:
            The distance moved in metres, or None if no drawn place is free now: then the episode is as it was.
        """
        assert self._part is not None, "this task has nothing to move"
        env = self._env
        old = np.array(env._last_rand_vec, np.float64)
        before, depth = Snapshot(env), min(self._depth, self._overlap()) - OVERLAP
        for place in self._places(old, distance, generator):
            if self._place(place) and self._overlap() >= depth and not self._solved() and self.wins_nothing(0, grip):
                return float(np.linalg.norm(place - old))
            before.restore(env)
        return None

    def _places(self, old: Vector, distance: float, generator: np.random.Generator) -> list[Vector]:
        """Drawn vectors in the task's own range that lie about `distance` from the old one."""
        part, space = self._part, self._env._random_reset_space
        places = []
        for _ in range(CANDIDATES):
            direction = generator.normal(size=len(old[part]))
            new = old.copy()
            new[part] = np.clip(old[part] + distance * direction / np.linalg.norm(direction), space.low[part], space.high[part])
            if np.linalg.norm(new - old) >= LEAST * distance:
                places.append(new)
        return places

    def _place(self, vector: Vector) -> bool:
        """Run the task's own placement with `vector`, without its moving of the hand; False if the task does not accept it."""
        env, asked = self._env, 0

        def given() -> Vector:
            nonlocal asked
            asked += 1
            if asked > 1:  # tasks ask again when object and goal are too close
                raise _Refused
            env._last_rand_vec = vector
            return vector.copy()

        env._reset_hand, env._get_state_rand_vec = (lambda steps=0: None), given
        try:
            env.reset_model()
        except _Refused:
            return False
        finally:
            del env._reset_hand, env._get_state_rand_vec
        env.data.qvel[self._dofs] = 0
        mujoco.mj_forward(env.model, env.data)
        return True

    def _solved(self) -> bool:
        """Whether the task counts as solved as things lie; asking changes nothing."""
        env = self._env
        attributes = _attributes(env)
        space = env.sawyer_observation_space
        _, info = env.evaluate_state(np.clip(env._get_obs(), space.low, space.high), np.zeros(4, np.float32))
        vars(env).update(attributes)
        return bool(info["success"])

    # -------------------------------------------------------------------------------------------- the arm

    def push_direction(self, distance: float, steps: int, generator: np.random.Generator, grip: float) -> Vector | None:
        """A drawn unit vector, sideways rather than up or down, that does not lead towards the goal and has room in the arm's range.

        Args:
            steps: control steps over which the arm is to be pushed.
            grip: the fingers' last command.

        Returns:
            (3,), or None if there is none now.
        """
        env = self._env
        held = env.data.mocap_pos[0]
        towards = env._target_pos - (env.tcp_center if self._to_goal else env._get_pos_objects()[:3])
        for _ in range(CANDIDATES):
            angle, rise = generator.uniform(0, 2 * np.pi), generator.uniform(-0.3, 0.5)
            direction = np.array([np.cos(angle), np.sin(angle), rise])
            direction /= np.linalg.norm(direction)
            moved = np.clip(held + distance * direction, env.mocap_low, env.mocap_high) - held
            if direction @ towards <= 0 and moved @ towards <= 0 and np.linalg.norm(moved) >= LEAST * distance:
                return direction if self.wins_nothing(steps, grip, direction * distance / steps) else None
        return None

    def push(self, displacement: Vector) -> None:
        """Move the pose that the arm is held at by (3,) metres, within the arm's range."""
        data = self._env.data
        data.mocap_pos[0] = np.clip(data.mocap_pos[0] + displacement, self._env.mocap_low, self._env.mocap_high)

    def wins_nothing(self, steps: int, grip: float, push: Vector | None = None) -> bool:
        """Run ahead `steps` of a disturbance and `QUIET` more, with a robot that stands still, and put everything back.

        Args:
            steps: control steps of the disturbance, in which the fingers are commanded to open unless the arm is pushed.
            grip: the fingers' command after it, and while the arm is pushed.
            push: metres a control step (3,).

        Returns:
            Whether the task is not solved by itself, and the simulation is sound.
        """
        env, before = self._env, Snapshot(self._env)
        sound = True
        for step in range(steps + QUIET):
            if push is not None and step < steps:
                self.push(push)
            env.curr_path_length = 0
            *_, info = env.step(np.array([0, 0, 0, -1 if push is None and step < steps else grip]))
            if info["success"] or diverged(env.data):
                sound = False
                break
        before.restore(env)
        return sound

    # -------------------------------------------------------------------------------------------- what the camera sees

    def turn_camera(self, degrees: float, generator: np.random.Generator) -> None:
        """Turn the camera by an angle about a drawn axis in its picture, so that the view moves and tilts a little."""
        angle = generator.uniform(0, 2 * np.pi)
        turn, turned = np.zeros(4), np.zeros(4)
        mujoco.mju_axisAngle2Quat(turn, np.array([np.cos(angle), np.sin(angle), 0.0]), np.deg2rad(degrees))
        mujoco.mju_mulQuat(turned, self._env.model.cam_quat[self._camera], turn)
        self._env.model.cam_quat[self._camera] = turned
        mujoco.mj_forward(self._env.model, self._env.data)

    def change_light(self, change: float, generator: np.random.Generator) -> None:
        """Change lamps in brightness and colour, and give the table another tint."""
        model = self._env.model
        gains = light_gains(change, generator)
        model.light_diffuse[:] *= gains
        model.light_ambient[:] *= gains
        headlight = model.vis.headlight
        headlight.diffuse[:] *= gains
        headlight.ambient[:] *= gains
        tint = np.clip(1 + generator.uniform(-change, change, 3), 0.1, None)
        for name in TABLE:
            material = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_MATERIAL, name)
            if material >= 0:
                model.mat_rgba[material, :3] = np.clip(model.mat_rgba[material, :3] * tint, 0, 1)

    # -------------------------------------------------------------------------------------------- distances

    def _reach(self) -> float:
        env = self._env
        return float(np.linalg.norm(env.tcp_center - (env._target_pos if self._to_goal else env._get_pos_objects()[:3])))

    def _carried(self) -> float:
        env = self._env
        return float(np.linalg.norm(env._target_pos - env._get_pos_objects()[:3]))

    def _overlap(self) -> float:
        """The deepest overlap of two bodies, as a negative distance in metres."""
        contact = self._env.data.contact
        return float(min(contact.dist.min(), 0.0)) if len(contact.dist) else 0.0


class _Refused(Exception):
    """A task asked for another place."""


class Snapshot:
    """Everything of an instance that placing an object, or a step, can change."""

    def __init__(self, env: Any) -> None:
        self._attributes = _attributes(env)
        self._model = {name: getattr(env.model, name).copy() for name in ALTERED}
        self._state = np.empty(mujoco.mj_stateSize(env.model, _STATE))
        mujoco.mj_getState(env.model, env.data, self._state, _STATE)
        self._warnings = {kind: env.data.warning[kind].number for kind in DIVERGED}

    def restore(self, env: Any) -> None:
        vars(env).update(copy.deepcopy(self._attributes))
        for name, values in self._model.items():
            getattr(env.model, name)[:] = values
        mujoco.mj_setState(env.model, env.data, self._state, _STATE)
        mujoco.mj_forward(env.model, env.data)
        for kind, count in self._warnings.items():
            env.data.warning[kind].number = count


_STATE = mujoco.mjtState.mjSTATE_INTEGRATION.value


def _attributes(env: Any) -> dict[str, Any]:
    return copy.deepcopy({name: value for name, value in vars(env).items() if name not in SIMULATION})
