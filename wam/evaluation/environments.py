"""What a closed-loop evaluation needs from a simulator, and the one place where environments are made by name.

An environment is driven in stretches of control steps, because a policy plans stretches; it hands back every state and reward, and the
frames at the model's own stride.  An episode ends at its first success or after `max_steps`; the rest of a stretch is not executed.

    actions   a0  a1  a2  a3  a4  a5 ...      one per control step
    states        s1  s2  s3  s4  s5 ...      after each step
    frames            f1      f2     ...      after every `frame_stride`-th step of the stretch

A name says which: `<suite>/<task>`, and after a question mark settings of the environment's own, which win over those of a caller:
`gym/gym_pusht/PushT-v0?state=agent_pos&make.obs_type=pixels_agent_pos`.  So a name alone identifies what results were measured on.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import importlib.util
import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from wam.config_disturbances import DisturbanceConfig
from wam.config_tree import read_yaml
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

    frames: Frames  # (1, H, W, 3), upright, red green blue; several cameras lie side by side, as `Environment.cameras` names them
    state: Floats  # (Ds,)
    instruction: str | None = None  # this episode's, where it is another than the environment's
    events: tuple[Event, ...] = ()  # that were in force from the start
    rest: Floats | None = None  # (Da,) the command that keeps the robot where it is now; None where there is no such command


@dataclass(frozen=True)
class StepResult:
    """What came of a stretch of m actions, of which the first `n <= m` were executed.

    A stretch in which the environment itself failed has n = 0, is done, and is neither a success nor a failure of the policy.
    """

    frames: Frames  # (n // frame_stride, H, W, 3)
    states: Floats  # (n, Ds)
    rewards: Floats  # (n,)
    success: npt.NDArray[np.bool_]  # (n,); only the last can be true
    done: bool  # the episode is over: it succeeded, or its steps are used up
    events: tuple[Event, ...] = ()  # that began in this stretch
    crashed: str | None = None  # what went wrong in the environment: seed, control step and its own traceback


class Environment(Protocol):
    """One robot in one simulated world.

    `hold` is what a robot is sent that has no plan: NaN where its last command is repeated (positions, grippers), a number where that is
    sent (0 for displacements).  Some environments also have `expert_action()`, a scripted expert, and `foresee(actions (N, m, Da),
    frame_stride)`, the frames (N, m // frame_stride, H, W, 3) of each of N stretches that could be executed now, after which nothing has happened.
    """

    state_dim: int
    action_dim: int
    action_low: Floats  # (Da,)
    action_high: Floats  # (Da,)
    hold: Floats  # (Da,)
    control_hz: int
    cameras: tuple[str, ...]  # in the order in which they lie in a frame
    instruction: str
    max_steps: int

    @property
    def image_size(self) -> int | tuple[int, int]:
        """Of each camera: of a square one, or (height, width)."""
        ...

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


# ------------------------------------------------------------------------------------------------ by name


def make_env(name: str, *, disturbances: DisturbanceConfig | None = None, **settings: Any) -> Environment:
    """Make an environment from `<suite>/<task>`, e.g. `metaworld/drawer-open-v3`.

    Args:
        name: suite and task, and perhaps settings.
        disturbances: what goes wrong on purpose; none, or no kinds: the environment as it is.
        settings: the environment's own arguments, e.g. `camera`, `image_size`, `max_steps`.

    Raises:
        ValueError: no such suite or task, names the nearest; a setting that the environment does not have; or a disturbance that it cannot do, lists which it can.
        ImportError: the simulator is not installed; names the extra to install.
        RenderError: the machine cannot render offscreen.
    """
    suite, task, own = parse_name(name)
    try:
        env = suite.make(task, {**settings, **own})
    except _UnknownSetting as error:
        raise ValueError(f"environment {name!r} {error}") from None
    if disturbances is None or not disturbances.kinds:
        return env
    from wam.evaluation.disturbances import Disturbed

    return Disturbed(env, disturbances)


@dataclass(frozen=True)
class Benchmark:
    """How a benchmark is measured by those who publish on it; `source` says where that is written."""

    first_seed: int
    episodes: int  # of each task
    max_steps: int
    source: str


def _no_variables() -> dict[str, str]:
    return {}


def _no_benchmark(task: str) -> Benchmark | None:
    return None


@dataclass(frozen=True)
class Suite:
    """A kind of environments.

    Attributes:
        make: from a task and settings.
        example: a name.
        packages: distributions whose versions decide what happens in an episode.
        variables: of the operating system, that libraries read while they are imported in a process that runs such environments.
        benchmark: of a task.
    """

    make: Callable[[str, dict[str, Any]], Environment]
    example: str
    packages: tuple[str, ...] = ()
    variables: Callable[[], dict[str, str]] = _no_variables
    benchmark: Callable[[str], Benchmark | None] = _no_benchmark


def parse_name(name: str) -> tuple[Suite, str, dict[str, Any]]:
    """An environment's name as suite, task and settings.

    Raises:
        ValueError: no such suite, or settings that are none.
    """
    kind, _, rest = name.partition("/")
    kind, mark, _ = kind.partition("?")  # a suite of one task needs no slash: pusht?max_steps=200
    if kind not in SUITES:
        known = f"suites: {', '.join(SUITES)}; write <suite>/<task>, e.g. metaworld/drawer-open-v3"
        raise ValueError(f"environment {name!r} names no known suite{_nearest(kind, SUITES)}; {known}")
    task, _, query = (name[len(kind) :] if mark else rest).partition("?")
    own: dict[str, Any] = {}
    for part in filter(None, query.split("&")):
        key, equals, value = part.partition("=")
        if not equals or not key:
            raise ValueError(f"environment {name!r} has the setting {part!r}; write key=value, and & between settings")
        place = own
        *outer, last = key.split(".")
        for step in outer:
            place = place.setdefault(step, {})
        place[last] = read_yaml(value, f"the setting {key} of environment {name!r}")
    return SUITES[kind], task, own


def package_versions(name: str) -> dict[str, str]:
    """Versions of what decides an episode of this environment, as far as it is installed; results are comparable where they are equal."""
    found = {}
    for package in parse_name(name)[0].packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # e.g. one of two distributions of the same simulator
            continue
    return found


def off_benchmark(name: str, first_seed: int, episodes: int, max_steps: int) -> str | None:
    """Why a result would not be comparable with published ones on this environment; None: it is, or nobody publishes on it."""
    suite, task, own = parse_name(name)
    usual, max_steps = suite.benchmark(task), own.get("max_steps", max_steps)
    if usual is None:
        return None
    told = (("seed", first_seed, usual.first_seed), ("episodes", episodes, usual.episodes), ("max_steps", max_steps, usual.max_steps))
    other = [f"{what} is {ours}, theirs {theirs}" for what, ours, theirs in told if ours != theirs]
    return f"{name} is not measured as in {usual.source}: {'; '.join(other)}" if other else None


class _UnknownSetting(ValueError):
    """A setting that an environment does not have."""


def _built(cls: Callable[..., Environment], arguments: tuple[Any, ...], settings: Mapping[str, Any]) -> Environment:
    """Call a constructor after its settings were checked by name."""
    known = [name for name, p in inspect.signature(cls).parameters.items() if p.kind is not p.VAR_KEYWORD][len(arguments) :]
    for name in settings:
        if name not in known:
            raise _UnknownSetting(f"has no setting {name!r}{_nearest(name, known)}; settings: {', '.join(known) or 'none'}")
    return cls(*arguments, **settings)


def require_simulator() -> None:
    """Check that Meta-World can run and draw here, before anything is written for it.

    Raises:
        ImportError: the simulator is not installed; names the extra to install.
        RenderError: the machine cannot render offscreen.
    """
    require_modules("metaworld", "mujoco", "gymnasium")
    choose_backend()


def _require(extra: str, *modules: str) -> None:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"{', '.join(missing)} cannot be imported; pip install 'wam[{extra}]'")


# ------------------------------------------------------------------------------------------------ suites


def _make_metaworld(task: str, settings: dict[str, Any]) -> Environment:
    require_simulator()
    from wam.evaluation.metaworld import MetaWorldEnv

    return _built(MetaWorldEnv, (task,), settings)


def _make_gym(task: str, settings: dict[str, Any]) -> Environment:
    _require("gym", "gymnasium")
    from wam.evaluation.gymnasium_env import GymEnv

    return _built(GymEnv, (task,), settings)


def _make_pusht(task: str, settings: dict[str, Any]) -> Environment:
    if task:
        raise ValueError(f"PushT has one task; write pusht, not pusht/{task}")
    os.environ.update(_headless())
    _require("pusht", "gymnasium", "gym_pusht")
    from wam.evaluation.pusht import PushTEnv

    return _built(PushTEnv, (), settings)


def _make_libero(task: str, settings: dict[str, Any]) -> Environment:
    _require("libero", "libero", "robosuite")
    from wam.evaluation.libero import LiberoEnv

    return _built(LiberoEnv, (task,), settings)


def _make_remote(task: str, settings: dict[str, Any]) -> Environment:
    _require("serve", "websockets", "msgpack")
    from wam.evaluation.remote import RemoteEnv

    return _built(RemoteEnv, (task,), settings)


def _make_own(task: str, settings: dict[str, Any]) -> Environment:
    """A class of the user's own, `<module>:<class>`, that is an `Environment`."""
    module, _, name = task.partition(":")
    if not name:
        raise ValueError(f"python/{task} names no class; write python/<module>:<class>, e.g. python/my_lab.arm:Arm")
    found = getattr(importlib.import_module(module), name, None)
    if found is None:
        raise ValueError(f"the module {module} ({importlib.import_module(module).__file__}) has no class {name}")
    return _built(found, (), settings)


def _mujoco() -> dict[str, str]:
    return {"MUJOCO_GL": choose_backend()}


def _headless() -> dict[str, str]:
    """PushT draws into memory; its library opens no window and no sound card."""
    return {"SDL_VIDEODRIVER": "dummy", "SDL_AUDIODRIVER": "dummy", "PYGAME_HIDE_SUPPORT_PROMPT": "1"}


def _pusht_benchmark(task: str) -> Benchmark:
    from wam.evaluation.pusht import BENCHMARK

    return BENCHMARK


def _libero_benchmark(task: str) -> Benchmark | None:
    from wam.evaluation.libero import benchmark_of

    return benchmark_of(task)


SUITES: dict[str, Suite] = {
    "metaworld": Suite(_make_metaworld, "metaworld/drawer-open-v3", ("metaworld", "mujoco", "gymnasium"), _mujoco),
    "pusht": Suite(_make_pusht, "pusht", ("gym-pusht", "pymunk", "pygame", "opencv-python", "gymnasium"), _headless, _pusht_benchmark),
    "libero": Suite(_make_libero, "libero/libero_goal/0", ("hf-libero", "libero", "robosuite", "mujoco"), _mujoco, _libero_benchmark),
    "gym": Suite(_make_gym, "gym/Pendulum-v1", ("gymnasium", "mujoco"), _headless),
    "remote": Suite(_make_remote, "remote/ws://127.0.0.1:8700"),
    "python": Suite(_make_own, "python/my_lab.arm:Arm"),
}


def _nearest(name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""
