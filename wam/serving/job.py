"""A plan that is wanted: made on the event loop, worked on by the planning thread, answered through a future."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
import uuid
from dataclasses import dataclass
from typing import Any

import numpy as np

from wam.serving.errors import ServingError
from wam.serving.messages import Request
from wam.serving.sessions import Entry

log = logging.getLogger(__name__)


@dataclass
class Job:
    """See the module's docstring.

    Attributes:
        arrival, decode_s: when the message came (`time.monotonic`), and how long reading it took.
        gone: set when nobody waits for it any more: its connection's.
        mode, steps: how it is planned.
        committed: actions of the plan that are decided already (1, n, d).
        surprise: what came of the plan before, as the reply tells it.
    """

    entry: Entry
    request: Request
    arrival: float
    decode_s: float
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[dict[str, Any]]
    gone: threading.Event
    mode: str = ""
    steps: int = 0
    committed: np.ndarray | None = None
    surprise: dict[str, Any] | None = None

    @property
    def late_s(self) -> float:
        """Seconds since its deadline; 0 or less: there is time, or it has none."""
        deadline = self.request.deadline_s
        return 0.0 if deadline is None else time.monotonic() - self.arrival - deadline

    def resolve(self, result: dict[str, Any] | Exception) -> None:
        """Hand the result to the event loop."""

        def settle() -> None:
            if not self.future.done():
                self.future.set_exception(result) if isinstance(result, Exception) else self.future.set_result(result)

        try:
            self.loop.call_soon_threadsafe(settle)
        except RuntimeError:  # the loop has closed: the server is gone, and so is whoever asked
            log.debug("a plan was made for a loop that has closed")


def internal(error: Exception) -> ServingError:
    """What a client is told of a mistake of ours: a number that the log has too."""
    number = uuid.uuid4().hex[:12]
    log.error("error %s", number, exc_info=error)
    return ServingError("internal_error", f"something is wrong with the server (number {number})", "hold; the server's log says more under this number")
