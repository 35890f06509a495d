"""From plans to the action of this control step.

    ChunkBroker        plan |a0 a1 ... an| (the robot waits) |a0 a1 ...
    ReplanningBroker   plan |a0 a1 ... ak ...|
                                asked here ^   the next plan arrives while these are executed; those until then are sent as decided

`step` is called once each control step and returns the action, or None: hold.  Nothing is made up, and nothing stale is executed.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np

from wam_client.client import Observation, Plan, PolicyClient, PolicyError
from wam_client.watchdog import Watchdog

MOST_FRAMES = 32  # of those seen since the last request, sent with the next


class ChunkBroker:
    """Executes a plan's first `execute` actions, then asks for the next; the robot waits meanwhile.

    Time is counted in control steps, so that waiting takes none.  Errors are raised: the caller holds, and `step` asks again.
    """

    def __init__(self, client: PolicyClient, execute: int | None = None):
        self.client, self.execute = client, execute
        self.control_dt = 1.0 / float(client.metadata["control_hz"])
        self._stride = int(client.metadata.get("frame_stride", 1))
        self._begin()

    def _begin(self) -> None:
        self.plan: Plan | None = None
        self._steps = 0
        self._done: list[np.ndarray] = []
        self._seen: list[Observation] = []

    def step(self, observation: Observation) -> np.ndarray:
        """The action of this control step.

        Raises:
            PolicyError: there is none; hold.
        """
        now = Observation(self._steps * self.control_dt, observation.images, observation.state)
        if self.plan is None or len(self._done) >= min(self.execute or len(self.plan.actions), len(self.plan.actions)):
            executed = np.stack(self._done) if self._done else None
            self.plan = self.client.plan(_together(self._seen, now), executed=executed, **_times(self._seen, now))
            self._done, self._seen = [], []
        elif len(self._done) % self._stride == 0 and self._done:
            self._seen.append(now)
        action = self.plan.actions[len(self._done)]
        self._done.append(action)
        self._steps += 1
        return action

    def reset(self) -> None:
        """A new episode."""
        self.client.reset()
        self._begin()


class ReplanningBroker:
    """Asks for the next plan in a thread while this one is executed; holds, and then stops, when none comes."""

    def __init__(self, client: PolicyClient, replan_after: int | None = None, delay_steps: int | None = None, watchdog: Watchdog | None = None):
        """A broker.

        Args:
            replan_after: control steps after which the next plan is asked for; default: half of a plan.
            delay_steps: control steps that a plan takes to come, during which the old one is executed; default: as long as the last took.
            watchdog: default: hold after the plan's own length without a fresh one, stop after five times that.
        """
        self.client, self.delay_steps = client, delay_steps
        self.control_dt = 1.0 / float(client.metadata["control_hz"])
        horizon = int(client.metadata["action_horizon"])
        self.replan_after = replan_after or max(1, horizon // 2)
        self.watchdog = watchdog or Watchdog(horizon * self.control_dt, 5 * horizon * self.control_dt)
        self.error: PolicyError | None = None
        self.plan: Plan | None = None
        self._stride = int(client.metadata.get("frame_stride", 1))
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._begin()

    def _begin(self) -> None:
        self.plan, self.error = None, None
        self._seen: list[Observation] = []
        self._done: dict[int, np.ndarray] = {}
        self._origin: float | None = None
        self._asked = 0  # the step that the server knows of
        self._took = 1

    def step(self, observation: Observation) -> np.ndarray | None:
        """The action of this control step, or None: hold.  Never waits for the server."""
        now, state = observation.time, self.watchdog.state()
        with self._lock:
            if not self._seen or now - self._seen[-1].time >= self._stride * self.control_dt * 0.999:
                self._seen = [*self._seen[1 - MOST_FRAMES :], observation]
            plan = self.plan
            due = plan is None or plan.index(now) >= self.replan_after
            if due and (self._thread is None or not self._thread.is_alive()) and state != "stop":
                self._ask(observation, plan)
            action = plan.action(now) if plan is not None and state == "fresh" else None
            if action is not None:
                self._done[self._step_of(now)] = action
        return action

    @property
    def state(self) -> str:
        """`fresh`, `hold` or `stop`."""
        return self.watchdog.state()

    def reset(self) -> None:
        """A new episode, or a person has looked after a stop."""
        self.join(self.client.timeout)
        self.client.reset()
        with self._lock:
            self._begin()
        self.watchdog.reset()

    def join(self, timeout: float) -> None:
        """Wait for a plan that is on its way."""
        if self._thread is not None:
            self._thread.join(timeout)

    # ------------------------------------------------------------------------------------------ inside

    def _step_of(self, now: float) -> int:
        """The control step of a moment, as the server counts them: from the first observation it was sent."""
        return round((now - (self._origin if self._origin is not None else now)) / self.control_dt)

    def _ask(self, observation: Observation, plan: Plan | None) -> None:
        """Start asking; the lock is held."""
        if self._origin is None:
            self._origin = observation.time
        now = self._step_of(observation.time)
        passed = range(self._asked, now)
        done = [self._done[step] for step in passed if step in self._done]
        known = len(done) == len(passed)
        history: dict[str, Any] = {"executed": np.stack(done)} if done and known else {} if known else {"gap": True}
        if plan is not None:
            start = plan.index(observation.time)
            rest = plan.actions[start : start + (self._took if self.delay_steps is None else self.delay_steps)] if start >= 0 else plan.actions[:0]
            history.update({"committed": rest} if len(rest) else {})
        frames, self._seen, self._done, self._asked = self._seen, [], {}, now
        self._thread = threading.Thread(target=self._fetch, args=(observation, frames, history), daemon=True)
        self._thread.start()

    def _fetch(self, observation: Observation, frames: list[Observation], history: dict[str, Any]) -> None:
        try:
            fresh = self.client.plan(_together(frames, observation), **dict(history, **_times(frames, observation)))
        except PolicyError as error:
            with self._lock:
                self.error = error
            return
        except Exception as error:  # a thread's error would be lost
            with self._lock:
                self.error = PolicyError("client_error", f"{type(error).__name__}: {error}")
            return
        with self._lock:
            self.plan, self.error = fresh, None
            total = fresh.reply.get("server_timing", {}).get("infer_ms", 0.0) + fresh.reply.get("server_timing", {}).get("queue_ms", 0.0)
            self._took = max(1, int(np.ceil(total / 1e3 / self.control_dt)) + 1)
        self.watchdog.feed()


def _together(frames: list[Observation], last: Observation) -> Observation:
    """Several observations as one, frames side by side, the newest last."""
    every = frames if frames and frames[-1] is last else [*frames, last]
    if len(every) == 1:
        return last
    return Observation(last.time, {name: np.stack([seen.images[name] for seen in every]) for name in last.images}, last.state)


def _times(frames: list[Observation], last: Observation) -> Any:
    every = frames if frames and frames[-1] is last else [*frames, last]
    return {"frame_times": np.array([seen.time for seen in every], np.float64)} if len(every) > 1 else {}
