"""The rows of a vectorised environment: each robot with its own memory, noise, instruction and queue of actions.

    step            0        1        2   ...   8        9            every call brings what all robots see now, a control step after the last
    see             x        x        x         x        x
    plan            p                           p                     where a queue is empty; all that are due go through one forward pass
    queue           a0 ...                  a7  a8 ...

The memory of a robot is `wam.inference.memory.StepMemory`, which tells its session frames as in training, whatever number of actions is
executed of a plan.  What was sent is taken to be what was executed: LeRobot does not say what a robot or simulator made of it.  Every plan
passes the action gate; one that is not let through is an error, since `select_action` cannot say "hold", and no action is made up.

Letters: B robots, A actions of a plan, d numbers of an action.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from wam.config import SamplingConfig
from wam.inference.batch import Think, run
from wam.inference.gate import MAX_HISTORY, Gate
from wam.inference.memory import PolicySpan, StepMemory
from wam.inference.session import Plan, Session
from wam.model.conditions import Conditions
from wam.pretrained import Policy


class EveryStep(StepMemory):
    """A memory that sees each control step, so that a plan may begin at any."""

    def step(self, frame: np.ndarray, state: np.ndarray | None, executed: np.ndarray) -> None:
        """What is seen one control step after the last observation: a frame uint8 (H, W, 3), a state (d,), and the action sent in between."""
        assert self.now is not None
        self.executed[self.now] = executed
        self.now += 1
        self.frames.append((float(self.now), frame))
        if state is not None:
            self.states.append((float(self.now), state))
        self.forget()


@dataclass
class Robot:
    """One row."""

    memory: EveryStep
    seed: int
    task: str | None = None
    session: Session | None = None
    queue: deque[np.ndarray] = field(default_factory=deque)
    promised: np.ndarray | None = None  # what the last plan had for the steps after those that were taken of it
    sent: np.ndarray | None = None


@dataclass(frozen=True)
class Settings:
    """How plans are made.

    Attributes:
        mode: a mode of `wam.relations` that plans actions.
        execute: actions taken of each plan.
        seed: of the robots' noise, with the episode's number and the row.
    """

    embodiment: str
    mode: str
    sampling: SamplingConfig
    execute: int
    seed: int = 0


class Robots:
    """See the module's docstring.

    Attributes:
        episode: how often they were reset.
        imagined: what the last plan of the first robot imagined (1, C, k, h, w), or None.
    """

    def __init__(self, policy: Policy, settings: Settings, gate: Gate):
        self.policy, self.settings, self.gate = policy, settings, gate
        self.span = PolicySpan.of(policy)
        self.episode = -1
        self.reset()

    def reset(self) -> None:
        """Episodes begin: all is forgotten, and the next observation says how many robots there are."""
        self.rows: list[Robot] = []
        self.texts: dict[str, Conditions] = {}
        self.imagined: torch.Tensor | None = None
        self.episode += 1

    def forget(self) -> None:
        """Forget what was seen, but keep sessions, and with them instructions and the place in their noise."""
        for robot in self.rows:
            robot.memory.restart()
            robot.queue.clear()
            robot.promised = robot.sent = None

    def drop_queued(self) -> None:
        """Plan anew at the next step."""
        for robot in self.rows:
            robot.queue.clear()

    # ------------------------------------------------------------------------------------------ the loop

    def see(self, frames: np.ndarray, states: np.ndarray | None, tasks: Sequence[str]) -> None:
        """Take in what all robots see now: frames uint8 (B, H, W, 3), states (B, d) or None, an instruction each.

        Raises:
            ValueError: another number of robots than before, in the middle of an episode; no state where there is no plan without.
        """
        if not self.rows:
            self.rows = [Robot(EveryStep(self.span), _seed_of(self.settings.seed, self.episode, row)) for row in range(len(frames))]
        if len(frames) != len(self.rows):
            raise ValueError(f"the observation has {len(frames)} rows, and the episode began with {len(self.rows)}; call reset() where another begins")
        if states is None and self.span.needs_state:
            raise ValueError("the state is missing from the observation (observation.state), and this policy plans nothing without it")
        for row, robot in enumerate(self.rows):
            state = None if states is None else states[row]
            if robot.memory.now is None:
                robot.memory.begin(frames[row], state)
            else:
                if robot.sent is None:
                    raise ValueError("two observations without an action between them; call reset() where an episode begins")
                robot.memory.step(frames[row], state, robot.sent)
            robot.sent = None
            self._ask(robot, tasks[row])

    def act(self) -> np.ndarray:
        """The next action of each robot (B, d) float32, physical units; plans for those that have none left.

        Raises:
            GateRefusal: a plan that is not let through.
            ValueError: see `plan`.
        """
        due = [robot for robot in self.rows if not robot.queue]
        if due:
            for robot, plan in zip(due, self.plan(due), strict=True):
                assert plan.actions is not None
                robot.queue.extend(plan.actions[0, : self.settings.execute])
                robot.promised = plan.actions[0, self.settings.execute :]
        for robot in self.rows:
            robot.sent = robot.queue.popleft()
        return np.stack([robot.sent for robot in self.rows if robot.sent is not None])

    def plan(self, robots: Sequence[Robot], committed: np.ndarray | None = None) -> list[Plan]:
        """A plan for each of `robots`, from all that it saw, through the gate.

        Args:
            committed: the first actions of each plan that are decided already (B, n, d).

        Raises:
            GateRefusal: a plan that is not let through, with the row.
            ValueError: nothing was seen, or something that the session refuses.
        """
        calls = []
        for i, robot in enumerate(robots):
            assert robot.session is not None and robot.memory.now is not None
            told, _ = robot.memory.calls(robot.session)
            calls.append([*told, Think(self.settings.mode, self.settings.sampling, None if committed is None else committed[i : i + 1])])
        with torch.inference_mode(False), torch.no_grad():  # what a session keeps is used by later calls, whatever they run under
            plans = run([robot.session for robot in robots if robot.session is not None], calls)
        return [self._passed(robot, plan, None if committed is None else committed[i]) for i, (robot, plan) in enumerate(zip(robots, plans, strict=True))]

    # ------------------------------------------------------------------------------------------ inside

    def _ask(self, robot: Robot, task: str) -> None:
        """A session for what the robot is asked to do; another instruction opens another, which is told the past anew."""
        if task == robot.task:
            return
        with torch.inference_mode(False), torch.no_grad():
            robot.session = Session(self.policy, [task], self.settings.embodiment, [robot.seed], prepared=self.texts.get(task))
        self.texts[task] = robot.session.instructions
        robot.task, robot.memory.head = task, None
        robot.queue.clear()

    def _passed(self, robot: Robot, plan: Plan | None, committed: np.ndarray | None) -> Plan:
        """What the gate lets through of a plan."""
        assert plan is not None and plan.actions is not None and robot.memory.now is not None
        memory, now = robot.memory, robot.memory.now
        memory.head = now
        actions = plan.actions[0]
        if committed is not None:
            actions[: len(committed)] = committed  # as they were decided: the network's copy is rounded, and clipped to its range
        before = [memory.executed[step] for step in range(now - MAX_HISTORY, now) if step in memory.executed]
        passed = self.gate(actions, np.stack(before) if before else None, robot.promised)
        if robot is self.rows[0] and plan.imagined is not None:
            self.imagined = plan.imagined
        return Plan(passed.actions[None], plan.imagined, plan.timings)


def _seed_of(seed: int, episode: int, row: int) -> int:
    """A seed for each robot of each episode."""
    return int(np.random.SeedSequence([seed, episode, row]).generate_state(1, np.uint64)[0] >> 1)


