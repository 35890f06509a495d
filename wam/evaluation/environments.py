"""What a closed-loop evaluation needs from a simulator, and the one place where environments are made by name.

An environment is driven in stretches of control steps, because a policy plans stretches; it hands back every state and reward, and the
frames at the model's own stride.  An episode ends at its first success or after `max_steps`; the rest of a stretch is not executed.

    actions   a0  a1  a2  a3  a4  a5 ...      one per control step
    states        s1  s2  s3  s4  s5 ...      after each step
    frames            f1      f2     ...      after every `frame_stride`-th step of the stretch
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from wam.config_disturbances import DisturbanceConfig
from wam.evaluation.gl import choose_backend, require_modules

Frames = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Event:
    """Something that was done to an episode on purpose (`wam.evaluation.disturbances`).

    Attributes:
        kind: e.g. `object_moved`.
        step: control steps executed before it; 0 is before the first action.
        size: how much, in `unit`.
        lasts: control steps that it goes on for; 0 is a single blow, what never ends lasts for the episode's `max_steps`.
    """

    kind: str
    step: int
    size: float
    unit: str
    lasts: int


@dataclass(frozen=True)
class Observation:
    """What a policy sees before its first action."""

    frames: Frames  # (1, H, W, 3), upright
    state: Floats  # (Ds,)
    instruction: str | None = None  # this episode's, where it is another than the environment's
    events: tuple[Event, ...] = ()  # that were in force from the start


@dataclass(frozen=True)
class StepResult:
    """What came of a stretch of m actions, of which the first `n <= m` were executed."""

    frames: Frames  # (n // frame_stride, H, W, 3)
    states: Floats  # (n, Ds)
    rewards: Floats  # (n,)
    success: npt.NDArray[np.bool_]  # (n,); only the last can be true
    done: bool  # the episode is over: it succeeded, or its steps are used up
    events: tuple[Event, ...] = ()  # that began in this stretch


class Environment(Protocol):
    """One robot in one simulated world."""

    state_dim: int
    action_dim: int
    action_low: Floats  # (Da,)
    action_high: Floats  # (Da,)
    control_hz: int
    image_size: int
    instruction: str
    max_steps: int

    def reset(self, seed: int) -> Observation:
        """Start an episode; the seed alone decides its initial state."""
        ...

    def run(self, actions: npt.NDArray[Any], frame_stride: int) -> StepResult:
        """Execute actions (m, Da) until they or the episode end."""
        ...

    def render(self) -> Frames:
        """The current image, (H, W, 3), upright."""
        ...

    def close(self) -> None:
        """Give back what the environment holds."""
        ...


def make_env(name: str, *, disturbances: DisturbanceConfig | None = None, **settings: Any) -> Environment:
    """Make an environment from `<suite>/<task>`, e.g. `metaworld/drawer-open-v3`.

    Args:
        name: suite and task.
        disturbances: what goes wrong on purpose; none, or no kinds: the environment as it is.
        settings: the environment's own arguments, e.g. `camera`, `image_size`, `max_steps`.

    Raises:
        ValueError: no such suite or task, names the nearest; or a disturbance that the environment cannot do, lists which it can.
        ImportError: the simulator is not installed; names the extra to install.
        RenderError: the machine cannot render offscreen.
    """
    suite, _, task = name.partition("/")
    if suite not in SUITES:
        known = f"suites: {', '.join(SUITES)}; write <suite>/<task>, e.g. metaworld/drawer-open-v3"
        raise ValueError(f"environment {name!r} names no known suite{_nearest(suite, SUITES)}; {known}")
    env = SUITES[suite](task, settings)
    if disturbances is None or not disturbances.kinds:
        return env
    from wam.evaluation.disturbances import Disturbed

    return Disturbed(env, disturbances)


def require_simulator() -> None:
    """Check that Meta-World can run and draw here, before anything is written for it.

    Raises:
        ImportError: the simulator is not installed; names the extra to install.
        RenderError: the machine cannot render offscreen.
    """
    require_modules("metaworld", "mujoco", "gymnasium")
    choose_backend()


def _make_metaworld(task: str, settings: dict[str, Any]) -> Environment:
    require_simulator()
    from wam.evaluation.metaworld import MetaWorldEnv

    return MetaWorldEnv(task, **settings)


SUITES: dict[str, Callable[[str, dict[str, Any]], Environment]] = {"metaworld": _make_metaworld}


def _nearest(name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""
