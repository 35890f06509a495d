"""One robot as the server remembers it: frames by time, states, what was planned; and what is to be told to its session.

    control steps   ...  b ................. b + A .............. now
    frames seen          x   x   x  x    x   x   x   x  x    x    x        when they were taken, which need not be regular
    picked               H   .   .   .   .   .   .   .   .   .   .         every `frame_stride` steps, the nearest in time
    executed             | what plans sent, or what the client says |

Training windows begin anywhere, so a memory may end at any moment: if a whole block has passed since the last plan, it is appended;
if not, or if a frame of it is missing, as many whole blocks as are known are written anew so that they end now; at the least the newest
frame alone, which is how every window begins.  So a client that sends one frame with each request and one that sends all of them get
plans from a memory as it was in training, the second from a longer one.

Times are control steps since the first observation.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from wam.inference.batch import Call, Commit, Observe, Reset
from wam.inference.session import Session
from wam.serving.contract import Contract
from wam.serving.errors import ServingError
from wam.serving.messages import Request
from wam.timeline import FIRST_BLOCK

Clock = Literal["auto", "arrival", "steps"]
APART = 0.25  # frame strides: of frames nearer to one another, the later is kept
SAME = 1e-6


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
class Sent:
    """A plan that was sent: its actions are for control steps `start`, `start + 1`, ..."""

    start: int
    actions: np.ndarray


@dataclass
class RobotMemory:
    """What was seen of one robot; see the module's docstring."""

    contract: Contract
    rules: TimeRules
    origin: float | None = None  # seconds, of step 0, on the client's clock or this server's
    clock: str | None = None  # which of the two
    now: int | None = None  # the newest observation's step
    head: int | None = None  # the step at which the session stands
    frames: deque[tuple[float, np.ndarray]] = field(default_factory=deque)
    states: deque[tuple[float, np.ndarray]] = field(default_factory=deque)
    executed: dict[int, np.ndarray] = field(default_factory=dict)  # by step
    plans: deque[Sent] = field(default_factory=deque)

    # ------------------------------------------------------------------------------------------ seeing

    def see(self, request: Request, arrival: float) -> int:
        """Take in an observation; returns its step.

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
        elapsed = 0 if self.now is None else now - self.now
        if request.executed is not None and len(request.executed) != elapsed:
            raise ServingError("bad_value", f"executed holds {len(request.executed)} actions, and {elapsed} control steps have passed", "send an action for each control step since the last observation")
        self._note_executed(request, elapsed)
        for at, frame in zip(self._times(request, exact, elapsed), request.frames, strict=True):
            self._add_frame(at, frame)
        if request.state is not None:
            self.states.append((float(now), request.state))
        self.now = now
        self._forget()
        return now

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
        for step in range(self.now, self.now + min(elapsed, self._kept)):
            action = request.executed[step - self.now] if request.executed is not None else self.planned(step)
            if action is not None:
                self.executed[step] = action

    def planned(self, step: int) -> np.ndarray | None:
        """What was last planned for a step, or None."""
        for sent in reversed(self.plans):
            if sent.start <= step < sent.start + len(sent.actions):
                return sent.actions[step - sent.start]
        return None

    @property
    def _kept(self) -> int:
        """Control steps that are remembered."""
        return (self.contract.blocks + 1) * self.contract.horizon + self.contract.frame_stride

    def _forget(self) -> None:
        assert self.now is not None
        oldest = self.now - self._kept
        for queue in (self.frames, self.states):
            while queue and queue[0][0] < oldest:
                queue.popleft()
        while len(self.states) > 4 * self._kept:
            self.states.popleft()
        self.executed = {step: action for step, action in self.executed.items() if step >= oldest}
        while self.plans and self.plans[0].start + len(self.plans[0].actions) < oldest:
            self.plans.popleft()

    def restart(self) -> None:
        """Forget everything seen; nothing of before is on the clock that begins."""
        self.origin = self.clock = self.now = self.head = None
        for queue in (self.frames, self.states, self.plans):
            queue.clear()
        self.executed.clear()

    # ------------------------------------------------------------------------------------------ telling

    def calls(self, session: Session) -> tuple[list[Call], int]:
        """What brings the session to now, and how many blocks before now it then holds that were told anew (0: it was appended to, or begins)."""
        assert self.now is not None
        if self.head == self.now:
            return [], 0
        if self.head is not None and session.block != FIRST_BLOCK:
            length = self._length(session.block)
            if self.head + length == self.now:  # a session that is full begins again from the newest frame by itself
                told = self._block(self.head, self.now, session.block)
                if told is not None:
                    return told, 0
        inside = self.contract.lead > 0
        most = self.contract.blocks - 1 - (inside and self._length(0) == 0)
        for blocks in range(most, 0, -1):
            told = self._window(blocks)
            if told is not None:
                return told, blocks
        frame, state = self._frame(self.now, newest=True), self._state(self.now)
        assert frame is not None
        return [*self._fresh(session), Observe(frame[None, None], None if state is None else state[None])], 0

    @staticmethod
    def _fresh(session: Session) -> list[Call]:
        return [] if session.block == FIRST_BLOCK else [Reset()]

    def _length(self, block: int) -> int:
        """Control steps of a block."""
        return self.contract.horizon - (self.contract.lead if block == 0 else 0)

    def _window(self, blocks: int) -> list[Call] | None:
        """A memory of `blocks` whole blocks that ends now, or None where not all of it is known."""
        assert self.now is not None
        first = 0 if self._length(0) else 1  # a first block that is the first frame alone is over as it begins
        lengths = [self._length(first + i) for i in range(blocks)]
        begin = self.now - sum(lengths)
        frame, state = self._frame(begin), self._state(begin)
        if frame is None or (state is None and self.contract.needs_state):
            return None
        calls: list[Call] = [Reset(), Observe(frame[None, None], None if state is None else state[None])]
        for i, length in enumerate(lengths):
            told = self._block(begin, begin + length, first + i)
            if told is None:
                return None
            calls += told
            begin += length
        return calls

    def _block(self, begin: int, end: int, block: int) -> list[Call] | None:
        """A block's actions, frames and the state at its end, or None where not all of it is known."""
        stride = self.contract.frame_stride
        actions = [self.executed.get(step) for step in range(begin, end)]
        frames = [self._frame(at) for at in range(begin + stride, end + 1, stride)]
        state = self._state(end)
        if any(a is None for a in actions) or any(f is None for f in frames) or (state is None and self.contract.needs_state):
            return None
        return [Commit(np.stack(actions)[None]), Observe(np.stack(frames)[None], None if state is None else state[None])]  # type: ignore[arg-type]

    def _frame(self, at: float, newest: bool = False) -> np.ndarray | None:
        """The frame nearest to a moment, if it is near enough, or in any case the newest."""
        if newest:
            return self.frames[-1][1] if self.frames else None
        found = min(self.frames, key=lambda pair: abs(pair[0] - at), default=None)
        if found is None or abs(found[0] - at) > self.rules.tolerance * self.contract.frame_stride + SAME:
            return None
        return found[1]

    def _state(self, at: float) -> np.ndarray | None:
        found = min(reversed(self.states), key=lambda pair: abs(pair[0] - at), default=None)
        return None if found is None or abs(found[0] - at) > 0.5 else found[1]
