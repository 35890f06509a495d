"""Whether there is a fresh plan: hold when there is not, and stop when that lasts.

    age of the newest plan   0 ........ hold_s ............ stop_s ........
    says                     fresh      hold                stop, until a reset
"""

from __future__ import annotations

import time
from typing import Callable


class Watchdog:
    """Fed with every plan, asked at every control step."""

    def __init__(self, hold_s: float, stop_s: float, clock: Callable[[], float] = time.monotonic):
        """A watchdog.

        Args:
            hold_s: a plan older than this is not fresh.
            stop_s: without a fresh plan for this long, stop.

        Raises:
            ValueError: not 0 < hold_s < stop_s.
        """
        if not 0 < hold_s < stop_s:
            raise ValueError(f"hold_s is {hold_s:g} and stop_s {stop_s:g}; expected 0 < hold_s < stop_s")
        self.hold_s, self.stop_s, self._clock = hold_s, stop_s, clock
        self._fed: float | None = None
        self._stopped = False

    def feed(self) -> None:
        """A plan came."""
        self._fed = self._clock()

    def state(self) -> str:
        """`fresh`, `hold` or `stop`; before the first plan, hold."""
        if self._fed is not None and not self._stopped:
            age = self._clock() - self._fed
            self._stopped = age > self.stop_s
            if age <= self.hold_s:
                return "fresh"
        return "stop" if self._stopped else "hold"

    def reset(self) -> None:
        """A person looked, and it may go on."""
        self._fed, self._stopped = None, False
