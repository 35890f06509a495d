"""Any gymnasium environment with a box of actions, as an environment of ours: what gymnasium leaves open is said in the name's settings.

    gym/<id> ? pixels=<where the picture is> & state=<where the state is> & success=<how one knows> & make.<argument>=<value> & ...

    observation   {"pixels": (H, W, 3), "agent": {"pos": (2,), "vel": (2,)}}     pixels=pixels    state=[agent.pos, agent.vel]
    observation   (H, W, 3)                                                      pixels=.         state=none
    observation   (Ds,), and env.render() draws                                  pixels=render    state=.

What is not said and cannot be read from the environment (`metadata["render_fps"]`, the time limit of its registration) is an error, not
a default.  One control step is one `step`.  That a picture's red and blue changed places cannot be detected; `bgr=true` puts them right.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from wam.evaluation.environments import Floats, Frames, Observation, StepResult

Fit = Literal["exact", "stretch", "pad"]


class GymEnv:
    """One gymnasium environment with a camera."""

    def __init__(
        self,
        task: str,
        camera: str = "render",
        image_size: int | Sequence[int] | None = None,
        max_steps: int | None = None,
        pixels: str = "render",
        state: str | Sequence[str] = ".",
        fit: Fit = "stretch",
        scale: float | None = None,
        bgr: bool = False,
        success: str = "is_success",
        reward_threshold: float | None = None,
        hold: str | Sequence[float | None] = "last",
        rest: str | Sequence[float] | None = None,
        instruction: str = "",
        control_hz: float | None = None,
        make: Mapping[str, Any] | None = None,
    ) -> None:
        """Make it.

        Args:
            task: gymnasium's id; `module:id` imports the module that registers it.
            camera: what datasets call this picture.
            image_size: of the frames given to a policy; default: as the environment draws.
            max_steps: control steps before an episode counts as failed; default: the registered limit.
            pixels: dotted key of the picture in the observation, `.` for all of it, or `render`.
            state: dotted keys whose numbers are joined, `.` for all of the observation, or `none`.
            fit: how a picture of another size becomes one of `image_size`: not at all, stretched, or padded with black.
            scale: what a picture in floats is multiplied with, 255 for one in 0..1; None refuses floats.
            bgr: the picture is blue, green, red.
            success: key of `info` that is true on success, or `terminated`.
            reward_threshold: success is a reward of at least this, in place of `success`.
            hold: see `Environment.hold`: `zero`, `last`, or a value for each number of an action, null where the last is repeated.
            rest: the command that keeps the robot where it is: numbers, or a dotted key of the observation; None: there is none.
            instruction: what the robot is asked to do.
            control_hz: control steps a second; default: the environment's `render_fps`.
            make: arguments of `gymnasium.make`.

        Raises:
            ValueError: no such environment, actions that are no flat box, or something that must be said and is not.
        """
        import gymnasium

        given = dict(make or {})
        if pixels == "render":
            given.setdefault("render_mode", "rgb_array")
        try:
            self._env: Any = gymnasium.make(task, max_episode_steps=max_steps, **given)
        except (gymnasium.error.Error, ImportError, TypeError) as error:
            raise ValueError(f"gymnasium cannot make {task!r} ({type(error).__name__}: {error}); gym/module:Id imports the module that registers an environment") from error
        box = self._env.action_space
        if not isinstance(box, gymnasium.spaces.Box) or len(box.shape) != 1:
            raise ValueError(f"{task} takes actions of {box}; only a flat box of numbers can be driven")
        self.task, self.instruction = task, instruction
        self.cameras: tuple[str, ...] = (camera,)
        self.action_dim, self.action_low, self.action_high = int(box.shape[0]), box.low.astype(np.float32), box.high.astype(np.float32)
        self._pixels, self._state = pixels, [] if state == "none" else [state] if isinstance(state, str) else list(state)
        self._fit, self._scale, self._bgr, self._success, self._threshold, self._rest = fit, scale, bgr, success, reward_threshold, rest
        self.hold = hold_of(hold, self.action_dim)
        self.control_hz = _rate(task, control_hz, self._env.metadata.get("render_fps"))
        self.max_steps = _limit(task, max_steps, getattr(self._env.spec, "max_episode_steps", None))
        self.steps, self._over = 0, True
        self._seen: Any = self._env.reset(seed=0)[0]
        self._size = None if image_size is None else (image_size, image_size) if isinstance(image_size, int) else (int(image_size[0]), int(image_size[1]))
        high, wide = self._size or self._picture().shape[:2]
        self.image_size: tuple[int, int] = (high, wide)
        self.state_dim = len(self._numbers())

    def reset(self, seed: int) -> Observation:
        """Start an episode, from gymnasium's seed."""
        self._seen, _ = self._env.reset(seed=int(seed))
        self.steps, self._over = 0, False
        return Observation(self.render()[None], self._numbers(), rest=self._resting())

    def run(self, actions: npt.NDArray[Any], frame_stride: int) -> StepResult:
        """Execute actions (m, Da), clipped to the box, until they or the episode end.

        Raises:
            ValueError: an episode that is over, or something that is not where the settings say.
        """
        if self._over:
            raise ValueError(f"the episode of {self.task} is over (or none was begun); call reset(seed) first")
        frames, states, rewards, successes = [], [], [], []
        for count, action in enumerate(np.clip(np.asarray(actions, np.float32), self.action_low, self.action_high), start=1):
            self._seen, reward, terminated, truncated, info = self._env.step(action.astype(self._env.action_space.dtype))
            self.steps += 1
            states.append(self._numbers())
            rewards.append(float(reward))
            successes.append(self._succeeded(float(reward), bool(terminated), info))
            if count % frame_stride == 0:
                frames.append(self.render())
            self._over = bool(terminated or truncated or successes[-1] or self.steps >= self.max_steps)
            if self._over:
                break
        return StepResult(
            frames=np.stack(frames) if frames else np.zeros((0, *self.image_size, 3), np.uint8),
            states=np.asarray(states, np.float32).reshape(len(states), self.state_dim),
            rewards=np.asarray(rewards, np.float32),
            success=np.asarray(successes, np.bool_),
            done=self._over,
        )

    def render(self) -> Frames:
        """The current picture, (H, W, 3)."""
        return fitted(self._picture(), self._size, self._fit, self.task)

    def close(self) -> None:
        """Close gymnasium's environment."""
        self._env.close()

    # -------------------------------------------------------------------------------------------- where things are

    def _picture(self) -> Frames:
        raw = np.asarray(self._env.render() if self._pixels == "render" else found(self._seen, self._pixels, self.task))
        if raw.ndim != 3 or raw.shape[-1] != 3:
            raise ValueError(f"{self.task} has a picture of shape {raw.shape} at pixels={self._pixels}; expected (height, width, 3)")
        if raw.dtype != np.uint8:
            if self._scale is None or not np.issubdtype(raw.dtype, np.floating):
                raise ValueError(f"{self.task} draws in {raw.dtype}; pictures are uint8 in 0..255. Say scale=255 if they are in 0..1")
            raw = np.clip(np.rint(raw * self._scale), 0, 255).astype(np.uint8)
        return np.ascontiguousarray(raw[..., ::-1] if self._bgr else raw)

    def _numbers(self) -> Floats:
        parts = [np.asarray(found(self._seen, key, self.task), np.float32).reshape(-1) for key in self._state]
        return np.concatenate(parts) if parts else np.zeros(0, np.float32)

    def _resting(self) -> Floats | None:
        if self._rest is None:
            return None
        rest = np.asarray(found(self._seen, self._rest, self.task) if isinstance(self._rest, str) else self._rest, np.float32).reshape(-1)
        if rest.shape != (self.action_dim,):
            raise ValueError(f"{self.task}: rest={self._rest} gives {len(rest)} numbers, an action has {self.action_dim}")
        return rest

    def _succeeded(self, reward: float, terminated: bool, info: Mapping[str, Any]) -> bool:
        if self._threshold is not None:
            return reward >= self._threshold
        if self._success == "terminated":
            return terminated
        if self._success not in info:
            known = ", ".join(sorted(info)) or "nothing"
            raise ValueError(f"{self.task} does not say {self._success!r} in info (it says {known}); set success= to one of them or to terminated, or reward_threshold=")
        return bool(info[self._success])


def found(observation: Any, key: str, task: str) -> Any:
    """What an observation holds at a dotted key.

    Raises:
        ValueError: there is nothing; lists what there is.
    """
    if key == ".":
        return observation
    at = observation
    for part in key.split("."):
        if not isinstance(at, Mapping) or part not in at:
            there = ", ".join(map(str, at)) if isinstance(at, Mapping) else f"an array of shape {np.shape(at)}, which is ."
            raise ValueError(f"{task} has nothing at {key!r} in its observation; there is: {there}")
        at = at[part]
    return at


def fitted(picture: Frames, size: tuple[int, int] | None, fit: Fit, task: str) -> Frames:
    """A picture at the size asked for."""
    if size is None or picture.shape[:2] == size:
        return picture
    if fit == "exact":
        raise ValueError(f"{task} draws pictures of {picture.shape[0]}x{picture.shape[1]}, and {size[0]}x{size[1]} are asked for; say fit=stretch or fit=pad, or let it draw at that size")
    return padded(picture, size) if fit == "pad" else _resized(picture, size)


def padded(picture: Frames, size: tuple[int, int]) -> Frames:
    """A picture as large as it fits into `size` without being distorted, black around it."""
    high, wide = picture.shape[:2]
    ratio = min(size[0] / high, size[1] / wide)
    inner = max(1, round(high * ratio)), max(1, round(wide * ratio))
    out = np.zeros((*size, 3), np.uint8)
    top, left = (size[0] - inner[0]) // 2, (size[1] - inner[1]) // 2
    out[top : top + inner[0], left : left + inner[1]] = _resized(picture, inner)
    return out


def _resized(picture: Frames, size: tuple[int, int]) -> Frames:
    from wam.data.video import resize_frames  # needs PyTorch, which a worker that draws at the right size does without

    resized: Frames = resize_frames(np.array(picture[None]), size)[0]  # a copy: what came over a wire is read-only
    return resized


def hold_of(hold: str | Sequence[float | None], dim: int) -> Floats:
    """`zero`, `last` or numbers, null where the last is repeated, as `Environment.hold`.

    Raises:
        ValueError: another word, or another count.
    """
    if isinstance(hold, str):
        if hold not in ("zero", "last"):
            raise ValueError(f"hold is {hold!r}; it is zero, last, or {dim} numbers (null where the last command is repeated)")
        return np.full(dim, 0 if hold == "zero" else np.nan, np.float32)
    if len(hold) != dim:
        raise ValueError(f"hold has {len(hold)} numbers, an action has {dim}")
    return np.array([np.nan if value is None else value for value in hold], np.float32)


def _rate(task: str, told: float | None, known: float | None) -> int:
    rate = told if told is not None else known
    if rate is None or rate <= 0 or rate != round(rate):
        raise ValueError(f"the control rate of {task} is {rate}; say control_hz=<whole steps a second>")
    return int(rate)


def _limit(task: str, told: int | None, known: int | None) -> int:
    limit = told if told is not None else known
    if limit is None or limit < 1:
        raise ValueError(f"{task} has no time limit ({limit}); say max_steps=<control steps>")
    return int(limit)
