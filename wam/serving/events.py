"""What happens to a robot, told to whoever watches: a recording, a page.

    observed ...  planned  observed  planned  refused  observed ...  ended

Watchers are called where it happens, on the event loop or on the planning thread, one event of a robot after another; they take note and
return at once.  Arrays are the server's own, are never changed after they were told, and are not to be changed by who is told.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from wam.serving.memory import RobotMemory, Seen
from wam.serving.messages import Request


@dataclass(frozen=True)
class Observed:
    """An observation was taken in.

    Attributes:
        key: of the robot's entry.
        step: control step of the newest frame and of the state.
        before: of the observation before it on the same clock; None: a memory begins.
        times: control step of each frame.
        frames: uint8 (T, H, W, 3), as the policy sees them.
        state: (d,), or None.
        sent: (n, d') what was planned for the steps `before`, `before + 1`, ...; NaN: nothing was.
        executed: (n, d') what the memory takes for executed; NaN: nobody knows.
        timestamp: as the client said it.
    """

    key: str
    step: int
    before: int | None
    times: tuple[float, ...]
    frames: np.ndarray
    state: np.ndarray | None
    sent: np.ndarray
    executed: np.ndarray
    prompt: str | None
    clock: str
    timestamp: float | None


@dataclass(frozen=True)
class Planned:
    """A plan was sent.

    Attributes:
        step: control step of its first action.
        made, passed: (A, d) before the gate, (n, d) after it.
        committed: first actions that were decided already.
        imagined: latents (C, k, h, w), or None.
        goal: a picture that the policy was given, uint8 (H, W, 3), or None.
        about: the reply's `plan`, `server_timing` and `policy_timing`.
    """

    key: str
    step: int
    mode: str
    steps: int
    seed: int
    committed: int
    made: np.ndarray
    passed: np.ndarray
    imagined: Tensor | None
    goal: np.ndarray | None
    about: Mapping[str, Any]


@dataclass(frozen=True)
class Refused:
    """A request got an error."""

    key: str
    code: str
    message: str


@dataclass(frozen=True)
class Ended:
    """A robot is forgotten, or begins anew.

    Attributes:
        why: reset, disconnected, idle, room, stopping.
        outcome: success or failed, where the client said so with its reset.
    """

    key: str
    why: str
    outcome: str | None = None


Event = Observed | Planned | Refused | Ended
Watcher = Callable[[Event], None]


def observed(key: str, memory: RobotMemory, request: Request, seen: Seen, prompt: str | None) -> Observed:
    """The event of an observation that a memory has just taken in."""
    assert request.frames is not None and memory.clock is not None
    sent, executed = memory.since(seen.before, seen.step)
    return Observed(key, seen.step, seen.before, seen.times, request.frames, request.state, sent, executed, prompt, memory.clock, request.timestamp)
