"""One robot's past by control step, and what is to be told to its session.

    control steps   ...  b ................. b + A .............. now
    frames seen          x   x   x  x    x   x   x   x  x    x    x        when they were taken, which need not be regular
    picked               H   .   .   .   .   .   .   .   .   .   .         every `frame_stride` steps, the nearest in time
    executed             | what was really sent to the robot     |

Training windows begin anywhere, so a memory may end at any moment: if a whole block has passed since the session was last told, it is
appended; if not, or if a frame of it is missing, as many whole blocks as are known are written anew so that they end now; at the least
the newest frame alone, which is how every window begins.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from dataclasses import dataclass
from operator import itemgetter
from typing import Protocol

import numpy as np

from wam.inference.batch import Call, Commit, Observe, Reset
from wam.inference.session import Session
from wam.pretrained import Policy
from wam.timeline import FIRST_BLOCK

SAME = 1e-6  # control steps


class Span(Protocol):
    """What a memory must know of a policy's window."""

    @property
    def blocks(self) -> int:
        """Blocks of a training window."""

    @property
    def horizon(self) -> int:
        """Control steps of a block."""

    @property
    def lead(self) -> int:
        """Of these, those missing from block 0 (the first frame lies inside it)."""

    @property
    def frame_stride(self) -> int:
        """Control steps between frames."""

    @property
    def needs_state(self) -> bool:
        """Whether there is no plan without a state."""


@dataclass(frozen=True)
class PolicySpan:
    """A `Span` read off a policy."""

    blocks: int
    horizon: int
    lead: int
    frame_stride: int
    needs_state: bool

    @classmethod
    def of(cls, policy: Policy) -> PolicySpan:
        """The window that a policy was trained with."""
        t, robot = policy.config.timeline, policy.config.model.embodiment(policy.config.data.embodiment)
        relative = any(g.relative_to for g in robot.action_groups) or any(i >= 0 for i in robot.relative_to)
        return cls(t.blocks, t.actions_per_block, t.lead, t.stride, policy.config.model.state != "none" or relative)


class StepMemory:
    """What was seen of one robot, and done; see the module's docstring.

    Attributes:
        tolerance: how far from its place, in frame strides, a frame may have been taken.
        now: the newest observation's step; None before the first.
        head: the step at which the session stands; None where it must be told anew.
    """

    def __init__(self, span: Span, tolerance: float = 0.5):
        self.span, self.tolerance = span, tolerance
        self.now: int | None = None
        self.head: int | None = None
        self.frames: deque[tuple[float, np.ndarray]] = deque()
        self.states: deque[tuple[float, np.ndarray]] = deque()
        self.executed: dict[int, np.ndarray] = {}

    # ------------------------------------------------------------------------------------------ seeing

    def ran(self, frames: np.ndarray, states: np.ndarray, executed: np.ndarray) -> None:
        """Take in a stretch of n control steps from `now` on.

        Args:
            frames: uint8 (n // frame_stride, H, W, 3), the first `frame_stride` steps after now.
            states: (n, d): after each step.
            executed: (n, d'): what was sent.
        """
        assert self.now is not None
        stride = self.span.frame_stride
        self.executed.update({self.now + i: action for i, action in enumerate(executed)})
        self.states.extend((float(self.now + i), state) for i, state in enumerate(states, start=1))
        self.frames.extend((float(self.now + stride * i), frame) for i, frame in enumerate(frames, start=1))
        self.now += len(executed)
        self.forget()

    def begin(self, frame: np.ndarray, state: np.ndarray | None) -> None:
        """The first observation, at step 0: a frame uint8 (H, W, 3) and a state (d,)."""
        self.restart()
        self.now = 0
        self.frames.append((0.0, frame))
        if state is not None:
            self.states.append((0.0, state))

    @property
    def kept(self) -> int:
        """Control steps that are remembered."""
        return (self.span.blocks + 1) * self.span.horizon + self.span.frame_stride

    def forget(self) -> None:
        """Let go of what no window reaches any more."""
        assert self.now is not None
        oldest = self.now - self.kept
        for queue in (self.frames, self.states):
            while queue and queue[0][0] < oldest:
                queue.popleft()
        while len(self.states) > 4 * self.kept:
            self.states.popleft()
        self.executed = {step: action for step, action in self.executed.items() if step >= oldest}

    def restart(self) -> None:
        """Forget everything seen; nothing of before is on the clock that begins."""
        self.now = self.head = None
        self.frames.clear()
        self.states.clear()
        self.executed.clear()

    # ------------------------------------------------------------------------------------------ telling

    def calls(self, session: Session) -> tuple[list[Call], int]:
        """What brings the session to now, and how many blocks before now it then holds that were told anew (0: it was appended to, or begins).

        Once they are carried out, set `head` to `now`.
        """
        assert self.now is not None
        if self.head == self.now:
            return [], 0
        if self.head is not None and session.block != FIRST_BLOCK:
            length = self._length(session.block)
            if self.head + length == self.now:  # a session that is full begins again from the newest frame by itself
                told = self._block(self.head, self.now)
                if told is not None:
                    return told, 0
        inside = self.span.lead > 0
        most = self.span.blocks - 1 - (inside and self._length(0) == 0)
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
        return self.span.horizon - (self.span.lead if block == 0 else 0)

    def _window(self, blocks: int) -> list[Call] | None:
        """A memory of `blocks` whole blocks that ends now, or None where not all of it is known."""
        assert self.now is not None
        first = 0 if self._length(0) else 1  # a first block that is the first frame alone is over as it begins
        lengths = [self._length(first + i) for i in range(blocks)]
        begin = self.now - sum(lengths)
        frame, state = self._frame(begin), self._state(begin)
        if frame is None or (state is None and self.span.needs_state):
            return None
        calls: list[Call] = [Reset(), Observe(frame[None, None], None if state is None else state[None])]
        for length in lengths:
            told = self._block(begin, begin + length)
            if told is None:
                return None
            calls += told
            begin += length
        return calls

    def _block(self, begin: int, end: int) -> list[Call] | None:
        """A block's actions, frames and the state at its end, or None where not all of it is known."""
        stride, state = self.span.frame_stride, self._state(end)
        if state is None and self.span.needs_state:
            return None
        frames: list[np.ndarray] = []
        actions: list[np.ndarray] = []
        for at in range(begin + stride, end + 1, stride):
            if (frame := self._frame(at)) is None:
                return None  # at once: a robot that sends few frames is asked for every length of its memory
            frames.append(frame)
        for step in range(begin, end):
            if (action := self.executed.get(step)) is None:
                return None
            actions.append(action)
        return [Commit(np.stack(actions)[None]), Observe(np.stack(frames)[None], None if state is None else state[None])]

    def frame(self, at: float) -> np.ndarray | None:
        """The frame of a control step (H, W, 3), or None where none was taken near it."""
        return self._frame(at)

    def _frame(self, at: float, newest: bool = False) -> np.ndarray | None:
        """The frame nearest to a moment, if it is near enough, or in any case the newest."""
        if newest:
            return self.frames[-1][1] if self.frames else None
        return _nearest(self.frames, at, self.tolerance * self.span.frame_stride + SAME)

    def _state(self, at: float) -> np.ndarray | None:
        return _nearest(self.states, at, 0.5)


def _nearest(seen: deque[tuple[float, np.ndarray]], at: float, within: float) -> np.ndarray | None:
    """Of what was seen, in the order of its times: the nearest to a moment, if it is as near as that; of two as near the earlier, of one moment the newest."""
    behind = bisect_right(seen, at, key=itemgetter(0))
    found: tuple[float, np.ndarray] | None = seen[behind - 1] if behind else None
    if behind < len(seen) and (found is None or seen[behind][0] - at < at - found[0]):
        found = seen[behind]
    return None if found is None or abs(found[0] - at) > within else found[1]
