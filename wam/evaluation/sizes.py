"""What an environment says about itself, and whether what it gives is that: checked where it comes from, before a policy sees it.

    frames   uint8 (n, H, W, 3): all that are due, of the size said, several cameras side by side
    states   float32 (n, Ds): finite
    rewards, success (n,): one per executed action

What does not fit is an error of the environment, and is never mended by a guess: a picture in 0..1 is not scaled, a late frame is not
replaced by the one before.  That red and blue changed places cannot be seen in the numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from wam.evaluation.environments import Environment, Floats, Observation, StepResult


@dataclass(frozen=True)
class Sizes:
    """What an environment says about itself."""

    state_dim: int
    action_dim: int
    action_low: Floats
    action_high: Floats
    hold: Floats
    control_hz: int
    cameras: tuple[str, ...]
    image_size: int | tuple[int, int]
    instruction: str
    max_steps: int
    foresees: bool = False  # it can be run ahead and put back

    @property
    def frame(self) -> tuple[int, int, int]:
        """(H, W, 3) of a frame, in which cameras lie side by side."""
        high, wide = (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size
        return high, wide * len(self.cameras), 3


def sizes_of(env: Environment) -> Sizes:
    """What an environment says about itself.

    Raises:
        ValueError: it lacks something that every environment says.
    """
    names = [name for name in Sizes.__dataclass_fields__ if name != "foresees"]
    missing = [name for name in names if not hasattr(env, name)]
    if missing:
        raise ValueError(f"the environment {type(env).__name__} has no {', '.join(missing)}; see Environment in wam/evaluation/environments.py")
    said: dict[str, Any] = {name: getattr(env, name) for name in names}
    for name in ("action_low", "action_high", "hold"):
        said[name] = np.asarray(said[name], np.float32)
        if said[name].shape != (said["action_dim"],):
            raise ValueError(f"the environment {type(env).__name__} has a {name} of shape {said[name].shape}; expected ({said['action_dim']},)")
    return Sizes(**said, foresees=hasattr(env, "foresee"))


def checked_observation(first: Observation, sizes: Sizes) -> Observation:
    """A first observation, if it is one.

    Raises:
        ValueError: frames of another size or type, or states that are not finite.
    """
    _check_frames(first.frames, 1, sizes)
    _check_states(first.state[None], 1, sizes)
    return first


def checked_result(result: StepResult, asked: int, stride: int, sizes: Sizes) -> StepResult:
    """What came of a stretch, if it is whole.

    Raises:
        ValueError: frames that are missing, of another size or type, states that are not finite, or counts that differ.
    """
    n = len(result.states)
    if not (1 <= n <= asked and len(result.rewards) == len(result.success) == n and (result.done or n == asked)):
        counts = f"{n} states, {len(result.rewards)} rewards and {len(result.success)} flags of success"
        raise ValueError(f"a stretch of {asked} actions that is {'the last' if result.done else 'not the last'} gave {counts}; each is one per executed action")
    _check_frames(result.frames, n // stride, sizes)
    _check_states(result.states, n, sizes)
    return result


def _check_frames(frames: Any, count: int, sizes: Sizes) -> None:
    if frames.dtype != np.uint8:
        raise ValueError(f"the environment's images are {frames.dtype}; expected uint8, 0..255, red green blue")
    if frames.shape[1:] != sizes.frame:
        raise ValueError(f"the environment's frames have shape {frames.shape[1:]}; expected {sizes.frame}: {len(sizes.cameras)} cameras of {sizes.image_size} side by side")
    if len(frames) != count:
        raise ValueError(f"the environment gave {len(frames)} frames where {count} are due; a frame that is late or missing cannot be planned from")


def _check_states(states: Any, count: int, sizes: Sizes) -> None:
    if states.shape != (count, sizes.state_dim):
        raise ValueError(f"the environment's states have shape {states.shape}; expected {(count, sizes.state_dim)}")
    broken = np.argwhere(~np.isfinite(states))
    if len(broken):
        step, place = (int(i) for i in broken[0])
        raise ValueError(f"the environment's state holds {states[step, place]} at place {place}, step {step} of the stretch; a policy needs finite numbers")
