"""Another checkpoint in place of the running one, without a robot's connection noticing.

    loading thread    load beside the running one -> is it the same robot? -> warm up -> swap
    planning thread   ........... batch ........... batch ........... | other weights | batch: every session made anew, told its robot's memory

Until the swap all plans are the old weights', after it all are the new ones'; where anything is wrong, the old ones stay.  Both lie in
memory for a while.  What is loaded is what lies at the place that the server was started with: train into it, or turn a link.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from wam.inference.check import SurpriseScale
from wam.pretrained import Policy
from wam.serving.contract import Contract
from wam.serving.logs import event
from wam.serving.worker import Worker

log = logging.getLogger(__name__)

SWAP_S = 120.0  # longest that a batch may take
SAME = ("robot", "cameras", "canvas", "needs_state", "takes_goal", "control_hz", "horizon", "lead", "frame_stride", "frames_per_block", "blocks")
State = Literal["running", "loading", "loaded", "refused", "failed"]


@dataclass(frozen=True)
class Loaded:
    """A checkpoint that may be taken up; `scale`: what surprise is measured in, where it was calibrated."""

    policy: Policy
    contract: Contract
    scale: SurpriseScale | None


class AnotherRobot(ValueError):
    """The checkpoint is not of the robots that are connected."""


def differences(old: Contract, new: Contract, mode: str) -> list[str]:
    """What keeps robots of one contract from going on with another."""
    found = [f"{name} is {_short(getattr(old, name))}, and would be {_short(getattr(new, name))}" for name in SAME if getattr(old, name) != getattr(new, name)]
    return found + ([f"plans are made in mode {mode!r}, and it acts in {', '.join(new.modes)}"] if mode not in new.modes else [])


class Reloader:
    """See the module's docstring.

    Attributes:
        state, why: how the last reload went.
        count: checkpoints that were taken up.
    """

    def __init__(self, worker: Worker, load: Callable[[], Loaded]):
        self.worker, self.load, self.metrics = worker, load, worker.metrics
        self.state: State = "running"
        self.why, self.count = "", 0

    def begin(self) -> bool:
        """Begin to load, on the running loop; False: it is loading already."""
        if self.state == "loading":
            return False
        self.state, self.why = "loading", ""
        self.metrics.reloading.set(1)
        event(log, "reloading")
        loop = asyncio.get_running_loop()

        def work() -> None:
            error: Exception | None = None
            try:
                self._take_up()
            except Exception as raised:
                error = raised
            try:
                loop.call_soon_threadsafe(self._done, error)
            except RuntimeError:  # the loop has closed: the server stopped meanwhile
                log.debug("a checkpoint was loaded for a server that has stopped")

        threading.Thread(target=work, name="wam-reload", daemon=True).start()  # a server that stops does not wait for it
        return True

    def told(self) -> dict[str, Any]:
        """How it stands."""
        return {"state": self.state, "why": self.why, "reloads": self.count, "checkpoint": dict(self.worker.contract.about)}

    def _done(self, error: Exception | None) -> None:
        if error is None:
            self.state, self.count = "loaded", self.count + 1
        elif isinstance(error, AnotherRobot):
            self.state, self.why = "refused", str(error)
        else:
            log.error("the checkpoint could not be loaded", exc_info=error)
            self.state, self.why = "failed", f"{type(error).__name__}; the server's log says more"
        self.metrics.reloading.set(0)
        self.metrics.reloads.labels(self.state).inc()
        event(log, "reloaded" if error is None else "not reloaded", logging.INFO if error is None else logging.ERROR, why=self.why)

    def _take_up(self) -> None:
        loaded = self.load()
        found = differences(self.worker.contract, loaded.contract, self.worker.options.mode)
        if found:
            raise AnotherRobot(f"the checkpoint is of another robot: {'; '.join(found)}; the running one stays. Serve it by a server of its own")
        self.worker.warm_up(loaded.policy, loaded.contract)
        self.worker.swap(loaded.policy, loaded.contract, loaded.scale, SWAP_S)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
