"""One robot as the server remembers it: when messages were taken, what was planned, and so what was executed.

    request   timestamp, or its arrival, or the actions since the last one    ->  a control step
              frames, each with its time                                      ->  `StepMemory`, which tells the session
              executed, or else what the last plan had for these steps        ->  `StepMemory.executed`

So a client that sends one frame with each request and one that sends all of them get plans from a memory as it was in training, the
second from a longer one.  Times are control steps since the first observation.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Literal

import numpy as np

from wam.inference.memory import SAME, StepMemory
from wam.serving.contract import Contract
from wam.serving.errors import ServingError
from wam.serving.messages import Request

Clock = Literal["auto", "arrival", "steps"]
APART = 0.25  # frame strides: of frames nearer to one another, the later is kept


@dataclass(frozen=True)
class TimeRules:
    """How moments are found where a client does not say them.

    Attributes:
        clock: of messages without a timestamp: `arrival`, when they came; `steps`, as if `execute` actions had been executed since the last; `auto`: steps for RoboArena's, which says so, else arrival.
        execute: actions that a client executes of each plan; None: all.
        tolerance: how far from its place, in frame strides, a frame may have been taken.
        offsets: control steps of the frames of a message with several, the last 0; None: evenly since the last message.
    """

    clock: Clock = "auto"
    execute: int | None = None
    tolerance: float = 0.5
    offsets: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.execute is not None and self.execute < 1:
            raise ValueError(f"execute is {self.execute}; expected actions of a plan, at least 1")
        if not 0 <= self.tolerance < 100:
            raise ValueError(f"the frame tolerance is {self.tolerance}; expected frame strides, such as 0.5")


@dataclass(frozen=True)
class Seen:
    """What an observation was taken for.

    Attributes:
        step: control step of its newest frame.
        before: of the observation before it on the same clock; None: the memory begins with it.
        times: control step of each frame.
    """

    step: int
    before: int | None
    times: tuple[float, ...]


@dataclass(frozen=True)
class Sent:
    """A plan that was sent: its actions are for control steps `start`, `start + 1`, ..."""

    start: int
    actions: np.ndarray


class RobotMemory(StepMemory):
    """What was seen of one robot; see the module's docstring."""

    def __init__(self, contract: Contract, rules: TimeRules):
        super().__init__(contract, rules.tolerance)
        self.contract, self.rules = contract, rules
        self.origin: float | None = None  # seconds, of step 0, on the client's clock or this server's
        self.clock: str | None = None  # which of the two
        self.plans: deque[Sent] = deque()

    # ------------------------------------------------------------------------------------------ seeing

    def see(self, request: Request, arrival: float) -> Seen:
        """Take in an observation.

        Args:
            arrival: seconds on the server's clock.

        Raises:
            ServingError: it is older than one seen before, or says that other actions were executed than there was time for.
        """
        assert request.frames is not None
        exact = self._moment(request, arrival)
        now = round(exact)
        if self.now is not None and now < self.now:
            raise ServingError("stale_observation", f"the observation is {self.now - now} control steps older than the newest", "send observations in order, with a timestamp that rises")
        before = self.now
        elapsed = 0 if before is None else now - before
        if request.executed is not None and len(request.executed) != elapsed:
            raise ServingError("bad_value", f"executed holds {len(request.executed)} actions, and {elapsed} control steps have passed", "send an action for each control step since the last observation")
        self._note_executed(request, elapsed)
        times = self._times(request, exact, elapsed)
        for at, frame in zip(times, request.frames, strict=True):
            self._add_frame(at, frame)
        if request.state is not None:
            self.states.append((float(now), request.state))
        self.now = now
        self.forget()
        return Seen(now, before, tuple(times))

    def _moment(self, request: Request, arrival: float) -> float:
        clock = "client" if request.timestamp is not None else self._unsaid(request)
        seconds = request.timestamp if request.timestamp is not None else arrival
        if self.now is None or clock != self.clock:
            if self.now is not None:
                self.restart()
            self.clock, self.origin = clock, seconds
            return 0.0
        if clock == "steps":
            done = self.contract.horizon if request.executed is None else len(request.executed)
            if request.executed is None:
                done = self.rules.execute or (len(self.plans[-1].actions) if self.plans else 0)
                done = 0 if not self.plans or self.plans[-1].start != self.now else done
            return float(self.now + done)
        assert self.origin is not None
        return (seconds - self.origin) * self.contract.control_hz

    def _unsaid(self, request: Request) -> str:
        if self.rules.clock == "auto":
            return "steps" if request.dialect == "roboarena" or request.executed is not None else "arrival"
        return self.rules.clock

    def _times(self, request: Request, now: float, elapsed: int) -> list[float]:
        assert request.frames is not None
        count, hz = len(request.frames), self.contract.control_hz
        if request.frame_times is not None:
            return [float(now + (t - request.frame_times[-1]) * hz) for t in request.frame_times]
        if self.rules.offsets is not None and count == len(self.rules.offsets):
            return [now + offset for offset in self.rules.offsets]
        spacing = elapsed / count if elapsed else float(self.contract.frame_stride)
        return [now - (count - 1 - i) * spacing for i in range(count)]

    def _add_frame(self, at: float, frame: np.ndarray) -> None:
        if self.frames and at < self.frames[-1][0] - SAME:
            return  # older than what is known
        repeated = bool(self.frames) and at <= self.frames[-1][0] + SAME
        crowded = len(self.frames) > 1 and self.frames[-1][0] - self.frames[-2][0] < APART * self.contract.frame_stride
        if repeated or crowded:
            self.frames.pop()
        self.frames.append((at, frame))

    def _note_executed(self, request: Request, elapsed: int) -> None:
        if self.now is None or request.gap:
            return
        for step in range(self.now, self.now + min(elapsed, self.kept)):
            action = request.executed[step - self.now] if request.executed is not None else self.planned(step)
            if action is not None:
                self.executed[step] = action

    def since(self, before: int | None, step: int) -> tuple[np.ndarray, np.ndarray]:
        """What was planned and what was executed at the steps `before` to `step` (n, d) each; NaN where there is nothing, and at most as many steps as are remembered, and one."""
        count = 0 if before is None else min(step - before, self.kept + 1)
        planned, executed = (np.full((count, self.contract.robot.raw_action_dim), np.nan, np.float32) for _ in range(2))
        for i in range(count):
            assert before is not None
            for row, action in ((planned, self.planned(before + i)), (executed, self.executed.get(before + i))):
                if action is not None:
                    row[i] = action
        return planned, executed

    def planned(self, step: int) -> np.ndarray | None:
        """What was last planned for a step, or None."""
        for sent in reversed(self.plans):
            if sent.start <= step < sent.start + len(sent.actions):
                return sent.actions[step - sent.start]
        return None

    def forget(self) -> None:
        """Let go of what no window reaches any more, and of plans that are over."""
        super().forget()
        assert self.now is not None
        while self.plans and self.plans[0].start + len(self.plans[0].actions) < self.now - self.kept:
            self.plans.popleft()

    def restart(self) -> None:
        """Forget everything seen; nothing of before is on the clock that begins."""
        super().restart()
        self.origin = self.clock = None
        self.plans.clear()
