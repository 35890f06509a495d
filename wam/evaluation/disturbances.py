"""An environment in which something goes wrong on purpose, once an episode, the same for every policy that meets it.

    seeds (disturbances.seed, episode)  ->  kind, when, which way          drawn before the episode, whatever the policy does
    control steps   0 ....... begins ........ begins + lasts ....... end   an `Event` says when it really began, and its real size

Kinds begin in one of four ways.  `step`: at a drawn control step.  `near`: when the fingers have come a drawn part of the way to the
object, because that is when it hurts.  `grasped`: when they have been closed there for a drawn time.  `reset`: before the first
action.  A rule that never comes true, or an episode that is won before, leaves an episode without an event; such an episode says
nothing about recovery, and `wam.evaluation.recovery` counts it apart.

Nothing is hidden from the score, and nothing given away: success is what the environment says, and what would solve a task by itself
does not happen.  What a policy sees, measures and commands is what changes,
and it is not told.  Only the delay of `latency` happens outside the environment: whoever drives it asks `extra_delay`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from wam.config_disturbances import DISTURBANCES, DisturbanceConfig
from wam.evaluation.disturb_pixels import occluder, relighter, shifter
from wam.evaluation.environments import Environment, Event, Floats, Frames, Observation, StepResult
from wam.evaluation.paraphrases import paraphrase

Begins = Literal["step", "near", "grasped", "reset"]
EPISODE = float("inf")  # seconds: until the episode ends
AGAIN = 8  # control steps until what could not be done is tried again
NO_FRAME = 2  # frame stride of a stretch of one step: no frame is due


@dataclass(frozen=True)
class Kind:
    """One disturbance at strength 1.

    Attributes:
        size: in `unit`; strength multiplies it.
        seconds: how long it lasts; 0 is a single blow.
        begins: see the module's docstring.
    """

    size: float
    unit: str
    seconds: float
    begins: Begins


KINDS: dict[str, Kind] = {
    "object_moved": Kind(0.08, "m", 0, "near"),
    "gripper_opened": Kind(0.25, "s", 0.25, "grasped"),
    "arm_pushed": Kind(0.1, "m", 0.125, "near"),
    "camera_shifted": Kind(4.0, "deg", EPISODE, "step"),
    "light_changed": Kind(0.35, "of brightness", EPISODE, "step"),
    "occlusion": Kind(0.2, "of the picture", 1.0, "step"),
    "state_noise": Kind(1.0, "usual deviations", EPISODE, "step"),
    "action_noise": Kind(1.0, "usual deviations", EPISODE, "step"),
    "frames_dropped": Kind(0.5, "s", 0.5, "step"),
    "latency": Kind(0.1, "s", EPISODE, "step"),
    "paraphrase": Kind(1.0, "sentence", EPISODE, "reset"),
}
IN_PICTURES = {"camera_shifted": Kind(0.08, "of the picture's width", EPISODE, "step")}  # where a camera cannot be turned
MOVED = 0.97  # of the object's way to its goal is left: it has begun to move, so the fingers are there, wherever a task measures its object
MOTION_NOISE, PLACE_NOISE = 0.3, 0.03  # usual deviations of commands that are displacements, and of those that are places, in halves of their range
STRETCHED = ("gripper_opened", "frames_dropped")  # strength multiplies how long they last
assert set(KINDS) == set(DISTURBANCES)


# ------------------------------------------------------------------------------------------------ what is drawn


@dataclass(frozen=True)
class Drawn:
    """What is decided about an episode before it begins.

    Attributes:
        kind: None: nothing happens.
        moment: 0..1, within `disturbances.begins`: when kinds begin that do so at a drawn step.
        way_left: part of the way to the object that is left when kinds begin that wait for it.
        held: seconds that fingers have been closed before they are opened.
        seed: of everything else, e.g. directions and noise.
    """

    kind: str | None
    moment: float
    way_left: float
    held: float
    seed: int

    def begins(self, config: DisturbanceConfig, max_steps: int) -> int:
        """The control step at which kinds begin that do so at a drawn step."""
        low, high = config.begins
        return round((low + (high - low) * self.moment) * max_steps)


def draw(config: DisturbanceConfig, seed: int) -> Drawn:
    """What happens in the episode of a seed; a function of `config` and `seed` alone, and not of the order in which kinds are named."""
    generator = np.random.default_rng(np.random.SeedSequence((config.seed, seed)))
    happens, which, moment, way_left, held = generator.uniform(size=5)
    kinds = [kind for kind in KINDS if kind in config.kinds]
    kind = kinds[int(which * len(kinds))] if kinds and happens < config.share else None
    return Drawn(kind, float(moment), 0.35 + 0.35 * float(way_left), 0.1 + 0.2 * float(held), int(generator.integers(2**62)))


def extra_delay(config: DisturbanceConfig, seed: int, control_hz: int, max_steps: int) -> Callable[[int], int]:
    """How many control steps longer a plan takes that is asked for at a control step of a seed's episode; 0 unless `latency` was drawn.

    For whoever drives the environment: a plan is made outside it.
    """
    drawn = draw(config, seed)
    if drawn.kind != "latency":
        return lambda step: 0
    begins, delay = drawn.begins(config, max_steps), max(1, round(KINDS["latency"].size * config.strength * control_hz))
    return lambda step: delay if step >= begins else 0


# ------------------------------------------------------------------------------------------------ what an environment can do


class Stage(Protocol):
    """What an environment offers as `stage` that things can happen in; `wam.evaluation.metaworld_stage` is one."""

    kinds: frozenset[str]

    def begin(self) -> None:
        """An episode was begun: measure its distances."""
        ...

    def way_left(self) -> float:
        """Of the way to the object, 1 at the start."""
        ...

    def carry_left(self) -> float:
        """Of the object's way to its goal, 1 at the start."""
        ...

    def wins_nothing(self, steps: int, grip: float) -> bool:
        """Whether fingers that open for so many steps, and then get the command `grip`, do not solve the task by themselves."""
        ...

    def move_object(self, distance: float, generator: np.random.Generator, grip: float) -> float | None:
        """Move it by about so many metres; returns how many, or None: not possible now, and nothing was changed."""
        ...

    def push_direction(self, distance: float, steps: int, generator: np.random.Generator, grip: float) -> npt.NDArray[np.float64] | None:
        """A unit vector (3,) along which the arm can be pushed for so many steps, and is not pushed to success; None: there is none now."""
        ...

    def push(self, displacement: npt.NDArray[np.float64]) -> None:
        """Push the arm by (3,) metres within the next control step."""
        ...

    def turn_camera(self, degrees: float, generator: np.random.Generator) -> None:
        """Turn the camera for the rest of the episode."""
        ...

    def change_light(self, change: float, generator: np.random.Generator) -> None:
        """Change light and colours for the rest of the episode."""
        ...


def stage_of(env: Any) -> Stage | None:
    """The stage of an environment that has one."""
    stage: Stage | None = getattr(env, "stage", None)
    return stage


def able(env: Any) -> tuple[str, ...]:
    """The kinds that an environment can meet.

    Any can meet those of pictures, commands, time and language.  Noise of states needs `state_noise` (Ds,), an environment's usual
    deviations.  Things that happen in its world need a `stage` (see `wam.evaluation.metaworld_stage`), which says what it can do.
    """
    own = stage_of(env)
    can = {"camera_shifted", "light_changed", "occlusion", "frames_dropped", "latency"} | (own.kinds if own else set())
    can |= {"state_noise"} if getattr(env, "state_noise", None) is not None else set()
    can |= {"action_noise"} if np.isfinite(env.action_low).all() and np.isfinite(env.action_high).all() else set()
    can |= {"paraphrase"} if env.instruction else set()
    return tuple(kind for kind in KINDS if kind in can)


def action_deviation(env: Any) -> Floats:
    """Usual deviations of executed commands (Da,): of commands that a robot repeats to stay where it is (places, grippers), a tenth of the others'."""
    half = (env.action_high - env.action_low) / 2
    return np.where(np.isnan(env.hold), PLACE_NOISE, MOTION_NOISE).astype(np.float32) * half


class Disturbed:
    """An environment in which an episode's disturbance happens; everything else is the environment's own."""

    def __init__(self, env: Environment, config: DisturbanceConfig) -> None:
        """Wrap an environment.

        Raises:
            ValueError: a kind that it cannot meet; lists those that it can.
        """
        can = able(env)
        cannot = [kind for kind in config.kinds if kind not in can]
        if cannot:
            raise ValueError(f"this environment ({env.instruction!r}) cannot meet the disturbances {', '.join(cannot)}; it can meet {', '.join(can)}")
        self.env, self.config = env, config
        self.instruction = env.instruction  # this episode's, after `reset`
        self._now: _Running | None = None

    def __getattr__(self, name: str) -> Any:
        if name in ("env", "foresee"):  # not set yet: a copy is being made; what is to be disturbed cannot be run ahead
            raise AttributeError(name)
        return getattr(self.env, name)

    def reset(self, seed: int) -> Observation:
        """Start an episode; see `Environment.reset`."""
        first = self.env.reset(seed)
        stage = stage_of(self.env)
        if stage is not None:
            stage.begin()
        self._now = _Running(self.env, self.config, draw(self.config, seed), last=first.frames[-1])
        self._now.try_to_begin()
        self.instruction = self._now.instruction or self.env.instruction
        return replace(first, instruction=self._now.instruction, events=tuple(self._now.events))

    def run(self, actions: npt.NDArray[Any], frame_stride: int) -> StepResult:
        """Execute actions (m, Da) until they or the episode end; see `Environment.run`."""
        if self._now is None:
            raise ValueError("there is no episode; call reset(seed) first")
        if frame_stride < 1:
            raise ValueError(f"frame_stride is {frame_stride}; it must be at least 1")
        actions = np.asarray(actions, np.float32)
        if actions.ndim != 2 or actions.shape[1] != self.env.action_dim:
            raise ValueError(f"actions have shape {actions.shape}; expected (steps, {self.env.action_dim})")
        already = len(self._now.events)
        steps: list[StepResult] = []
        for count, action in enumerate(actions, start=1):
            steps.append(self._now.step(action, count % frame_stride == 0))
            if steps[-1].done:
                break
        if not steps:
            return self.env.run(actions, frame_stride)
        return StepResult(
            frames=np.concatenate([step.frames for step in steps]),
            states=np.concatenate([step.states for step in steps]),
            rewards=np.concatenate([step.rewards for step in steps]),
            success=np.concatenate([step.success for step in steps]),
            done=steps[-1].done,
            events=tuple(self._now.events[already:]),
            crashed=steps[-1].crashed,
        )

    def render(self) -> Frames:
        """The current image as a policy would see it, (H, W, 3)."""
        image = self.env.render()
        return image if self._now is None else self._now.seen(image)

    def close(self) -> None:
        """Give back what the environment holds."""
        self.env.close()


# ------------------------------------------------------------------------------------------------ one episode


@dataclass
class _Running:
    """The disturbance of the episode that runs."""

    env: Any
    config: DisturbanceConfig
    drawn: Drawn
    last: Frames  # the last picture that was handed out
    instruction: str | None = None
    steps: int = 0
    closed: int = 0  # control steps that fingers have been told to close, up to now
    grip: float = 0.0  # their last command
    next_try: int = 0  # the step at which to try again what could not be done
    events: list[Event] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.generator = np.random.default_rng(self.drawn.seed)
        self.picture: Callable[[Frames], Frames] | None = None
        self.push: npt.NDArray[np.float64] | None = None  # metres a control step

    @property
    def kind(self) -> str | None:
        """What goes on now."""
        if not self.events:
            return None
        event = self.events[0]
        return event.kind if event.step <= self.steps < event.step + event.lasts else None

    def step(self, action: Floats, frame_is_due: bool) -> StepResult:
        """One control step."""
        self.try_to_begin()
        if self.kind == "arm_pushed":
            self.env.stage.push(self.push)
        result: StepResult = self.env.run(self._executed(action)[None], 1 if frame_is_due else NO_FRAME)
        self.closed, self.grip = self.closed + 1 if action[-1] > 0 else 0, float(action[-1])
        frames = np.stack([self.seen(frame) for frame in result.frames]) if len(result.frames) else result.frames
        if len(frames):
            self.last = frames[-1]
        states = self._measured(result.states)
        self.steps += len(result.states)
        return replace(result, frames=frames, states=states)

    # -------------------------------------------------------------------------------------------- how it begins

    def try_to_begin(self) -> None:
        """Begin what was drawn, if its time has come."""
        kind = self.drawn.kind
        if kind is None or self.events or self.steps < self.next_try or not self._due(KINDS[kind].begins):
            return
        stage, strength = stage_of(self.env), self.config.strength
        usual = KINDS[kind] if stage is not None and kind in stage.kinds else IN_PICTURES.get(kind, KINDS[kind])
        seconds = usual.seconds * (strength if kind in STRETCHED else 1)
        lasts = self.env.max_steps if seconds == EPISODE else max(1, round(seconds * self.env.control_hz)) if seconds else 0
        size = self._begin(kind, usual.size * strength, lasts)
        if size is None:
            self.next_try = self.steps + AGAIN
        else:
            self.events.append(Event(kind, self.steps, size, usual.unit, lasts))

    def _due(self, begins: Begins) -> bool:
        if begins == "reset":
            return self.steps == 0
        if begins == "step":
            return self.steps >= self.drawn.begins(self.config, self.env.max_steps)
        stage = self.env.stage
        if begins == "near":
            return bool(stage.way_left() <= self.drawn.way_left or stage.carry_left() <= MOVED)
        # half the way to the goal is left: an object that is dropped may not fall into it
        return self.closed >= self.drawn.held * self.env.control_hz and bool(stage.way_left() <= self.drawn.way_left and stage.carry_left() >= 0.5)

    def _begin(self, kind: str, size: float, lasts: int) -> float | None:
        """Do what begins a disturbance; returns its real size, or None if it cannot be done now."""
        stage, generator = stage_of(self.env), self.generator
        if stage is not None and kind in stage.kinds:
            return self._begin_in_the_world(stage, kind, size, lasts)
        if kind == "camera_shifted":
            self.picture = shifter(size, generator)
        if kind == "light_changed":
            self.picture = relighter(size, generator)
        if kind == "occlusion":
            self.picture = occluder(size, generator)
        if kind == "paraphrase":
            self.instruction = paraphrase(self.env.instruction, generator)
        return size

    def _begin_in_the_world(self, stage: Stage, kind: str, size: float, lasts: int) -> float | None:
        if kind == "object_moved":
            return stage.move_object(size, self.generator, self.grip)
        if kind == "gripper_opened" and not stage.wins_nothing(lasts, self.grip):
            return None
        if kind == "arm_pushed":
            direction = stage.push_direction(size, lasts, self.generator, self.grip)
            if direction is None:
                return None
            self.push = direction * size / lasts
        if kind == "camera_shifted":
            stage.turn_camera(size, self.generator)
        if kind == "light_changed":
            stage.change_light(size, self.generator)
        return size

    # -------------------------------------------------------------------------------------------- how it goes on

    def _executed(self, action: Floats) -> Floats:
        """What the robot does when it is commanded `action` (Da,)."""
        if self.kind == "gripper_opened":
            action = action.copy()
            action[-1] = self.env.action_low[-1]
        if self.kind == "action_noise":
            noise = self.generator.normal(size=len(action)) * action_deviation(self.env) * self.config.strength
            action = np.clip(action + noise, self.env.action_low, self.env.action_high).astype(np.float32)
        return action

    def _measured(self, states: Floats) -> Floats:
        """What the robot measures of `states` (1, Ds)."""
        if self.kind != "state_noise":
            return states
        return (states + self.generator.normal(size=states.shape) * self.env.state_noise * self.config.strength).astype(np.float32)

    def seen(self, frame: Frames) -> Frames:
        """What the camera hands out for `frame` (H, W, 3)."""
        if self.kind == "frames_dropped":
            return self.last
        return frame if self.picture is None or self.kind is None else self.picture(frame)
