"""Who is remembered: one entry a robot, found by its session_id or by its connection.

    get      finds or makes one; a full store forgets the one that was longest unused, if that is long enough, or refuses
    expire   forgets those unused for too long
    drop     forgets one

An entry is the only thing that a robot's requests share, so forgetting one touches no other.  Requests of one entry go one at a time.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from wam.inference.session import Session
from wam.serving.contract import Contract
from wam.serving.errors import ServingError
from wam.serving.memory import RobotMemory, TimeRules

if TYPE_CHECKING:
    from wam.serving.surprise import Expected


@dataclass
class Entry:
    """One robot.

    Attributes:
        session: made with the first plan; made anew when the instruction or the goal changes, and for other weights.
        goal: a picture, uint8 (H, W, 3), as the policy sees it.
        expected: the newest plan with what it foresaw, for comparing.
        stopped: why the gate stopped it, until a reset.
        lock: held while a request of this robot is worked on.
    """

    key: str
    memory: RobotMemory
    used: float
    session: Session | None = None
    prompt: str | None = None
    seed: int | None = None
    goal: np.ndarray | None = None
    expected: Expected | None = None
    stopped: str | None = None
    plans: int = 0
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    def reset(self) -> None:
        """As if it had just been made, but for its place in the store."""
        self.memory.restart()
        self.session = self.prompt = self.seed = self.goal = self.expected = self.stopped = None
        self.plans = 0


@dataclass
class SessionStore:
    """Entries by key, the longest unused first; see the module's docstring.

    Attributes:
        most: entries.
        idle_s: unused for longer than this, an entry is forgotten.
        spare_s: unused for longer than this, it may make room for a new one.
    """

    contract: Contract
    rules: TimeRules
    most: int
    idle_s: float
    spare_s: float
    entries: OrderedDict[str, Entry] = field(default_factory=OrderedDict)

    def get(self, key: str, now: float) -> tuple[Entry, list[str]]:
        """The entry of `key`, and the keys of those that made room for it.

        Raises:
            ServingError: the store is full of entries in use.
        """
        gone: list[str] = []
        if key not in self.entries:
            while len(self.entries) >= self.most:
                spare = next((e for e in self.entries.values() if not e.lock.locked() and now - e.used >= self.spare_s), None)
                if spare is None:
                    raise ServingError("too_many_sessions", f"all {self.most} sessions are in use", "close one, or try again later")
                gone.append(spare.key)
                self.drop(spare.key)
            self.entries[key] = Entry(key, RobotMemory(self.contract, self.rules), now)
        entry = self.entries[key]
        entry.used = now
        self.entries.move_to_end(key)
        return entry, gone

    def drop(self, key: str) -> None:
        """Forget an entry, if it is there."""
        self.entries.pop(key, None)

    def expire(self, now: float) -> list[str]:
        """Forget what was unused for too long; returns the keys."""
        old = [e.key for e in self.entries.values() if now - e.used > self.idle_s and not e.lock.locked()]
        for key in old:
            self.drop(key)
        return old
