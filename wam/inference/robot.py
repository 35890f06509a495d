"""What the executor knows: how plans are made and used, and a robot on its way through time.

    Loop        the settings, the same for all robots
    Robot       its session, its past, its decided actions, the plan that is being made, what the plan in use foresaw
    Way         how one plan is made; Pending: one that is being made
    Tally       what happened to a robot, in numbers
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from wam.config import CheckConfig, ExecutionConfig, PlannerConfig, SamplingConfig
from wam.inference.adapt import Adaptive
from wam.inference.check import Surprise
from wam.inference.foreseen import Foreseen
from wam.inference.gate import MAX_HISTORY
from wam.inference.memory import StepMemory
from wam.inference.session import Plan, Session


@dataclass(frozen=True)
class Loop:
    """How plans are made and used.

    Attributes:
        replan: control steps between plans, at most what a plan covers behind its delay.
        noise_seed: with a robot's own seed, decides the noise of what is imagined aside.
    """

    mode: str
    sampling: SamplingConfig
    replan: int
    execution: ExecutionConfig = ExecutionConfig()
    check: CheckConfig = CheckConfig()
    planner: PlannerConfig = PlannerConfig()
    noise_seed: int = 0


@dataclass(frozen=True)
class Way:
    """How one plan is made.

    Attributes:
        searches: whether the planner makes it.
    """

    mode: str
    sampling: SamplingConfig
    searches: bool


@dataclass
class Tally:
    """What happened to a robot, in numbers.

    Attributes:
        plans: made; `refused` of them were not let through.
        held: control steps without a decided action.
        late: plans that came after the queue had run dry.
        surprises: comparisons above the threshold; `replans`: plans asked for because of one.
        gate: control steps changed or cut off, by rule.
        flops: of all plans and checks.
        latency_ms: of each plan, from its observation to its actions.
        jumps: (d,) each: from what was sent, or decided, last to the first action of the plan that was taken up.
    """

    plans: int = 0
    refused: int = 0
    held: int = 0
    late: int = 0
    surprises: int = 0
    replans: int = 0
    gate: Counter[str] = field(default_factory=Counter)
    flops: float = 0.0
    latency_ms: list[float] = field(default_factory=list)
    modes: Counter[str] = field(default_factory=Counter)
    checks: list[Surprise] = field(default_factory=list)
    jumps: list[np.ndarray] = field(default_factory=list)


@dataclass(frozen=True)
class Pending:
    """A plan that is being made: asked for at `start`, to be taken up at `ready`.

    Attributes:
        origin: control step of its first action; None: when it is taken up.
        held: control steps that the robot had been without a decided action when it was asked for.
        overlaps: the robot was to act until it is there.
        foreseen: what it imagines, where that is compared with what comes.
    """

    plan: Plan
    start: int
    ready: int
    held: int
    origin: int | None
    overlaps: bool
    foreseen: Foreseen | None


@dataclass
class Robot:
    """One robot, as the executor knows it.

    Attributes:
        hold: (d,): what is sent without a decided action; NaN: the last command again, before the first one `rest`.
        queue: (n, d): decided actions from now on, all of which passed the gate.
        extra_delay: control steps that a plan asked for at a step takes longer, for tests of latency.
        stopped: why it does nothing any more.
    """

    session: Session
    memory: StepMemory
    hold: np.ndarray
    rest: np.ndarray
    adaptive: Adaptive
    extra_delay: Callable[[int], int]
    queue: np.ndarray
    next_plan: int = 0
    pending: Pending | None = None
    foreseen: Foreseen | None = None
    startled: bool = False
    stopped: str | None = None
    sent: deque[np.ndarray] = field(default_factory=lambda: deque(maxlen=MAX_HISTORY))
    tally: Tally = field(default_factory=Tally)

    @property
    def now(self) -> int:
        """Its control step."""
        assert self.memory.now is not None
        return self.memory.now


@dataclass(frozen=True)
class Made:
    """A plan as it was made, for whoever watches: before the gate, executed from control step `at` on, with the milliseconds its robots waited for it."""

    robot: Robot
    plan: Plan
    milliseconds: float
    at: int


def held(hold: np.ndarray, last: np.ndarray) -> np.ndarray:
    """What a robot without a decided action is sent, (d,): its own `hold`, its last command where that has no number.

    Raises:
        ValueError: the last command has no number there either.
    """
    out = np.where(np.isnan(hold), last, hold).astype(np.float32)
    if np.isnan(out).any():
        raise ValueError("this robot holds by repeating its last command, and none was sent yet; nothing was sent")
    return out
