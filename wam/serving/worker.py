"""Where plans are made: one thread, off the event loop, which takes what waits and plans for all of it at once.

    event loop   job ->  [ queue ]                        -> future resolved
    worker               take one, wait a little for others -> see, tell the sessions, plan (one forward) -> gate -> reply

While a batch is computed the next one gathers.  A lone robot never waits: the wait is only as long as other robots are likely to come
(as many as there are that planned lately), and is bounded.  A job whose client has gone, or whose deadline has passed, is not worked on.

When a batch fails, each of its robots is planned for alone, with its memory told anew: what one robot sent cannot cost another its plan.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
import uuid
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from wam.inference.batch import Call, Think, run
from wam.inference.gate import MAX_HISTORY, Gate, GateRefusal
from wam.inference.session import Plan, Session
from wam.model.conditions import Conditions
from wam.pretrained import Policy
from wam.serving.contract import Contract
from wam.serving.errors import ServingError
from wam.serving.memory import Sent
from wam.serving.messages import Request
from wam.serving.metrics import Metrics
from wam.serving.sessions import Entry

log = logging.getLogger(__name__)

LATELY_S = 5.0  # a robot that planned this lately is likely to come again


@dataclass
class Job:
    """A plan that is wanted.

    Attributes:
        arrival, decode_s: when the message came (`time.monotonic`), and how long reading it took.
        gone: set when nobody waits for it any more.
        committed: actions of the plan that are decided already (1, n, d).
    """

    entry: Entry
    request: Request
    arrival: float
    decode_s: float
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[dict[str, Any]]
    gone: threading.Event = field(default_factory=threading.Event)
    committed: np.ndarray | None = None

    @property
    def deadline(self) -> float | None:
        return None if self.request.deadline_s is None else self.arrival + self.request.deadline_s

    def resolve(self, result: dict[str, Any] | Exception) -> None:
        """Hand the result to the event loop."""

        def settle() -> None:
            if not self.future.done():
                self.future.set_exception(result) if isinstance(result, Exception) else self.future.set_result(result)

        try:
            self.loop.call_soon_threadsafe(settle)
        except RuntimeError:  # the loop has closed: the server is gone, and so is whoever asked
            log.debug("a plan was made for a loop that has closed")


@dataclass(frozen=True)
class WorkerOptions:
    """How plans are made.

    Attributes:
        mode, seed, steps: where a request does not say; steps None: the checkpoint's.
        max_batch: robots in a forward pass.
        wait_s: longest that the first of a batch waits for others.
    """

    mode: str
    seed: int = 0
    max_batch: int = 16
    wait_s: float = 0.003
    steps: int | None = None

    def __post_init__(self) -> None:
        if self.max_batch < 1:
            raise ValueError(f"max_batch is {self.max_batch}; expected at least 1")
        if not 0 <= self.wait_s <= 1:
            raise ValueError(f"wait_s is {self.wait_s}; expected seconds, 0 to 1")


class Worker:
    """See the module's docstring."""

    def __init__(self, policy: Policy, contract: Contract, gate: Gate, options: WorkerOptions, metrics: Metrics):
        self.policy, self.contract, self.gate, self.options, self.metrics = policy, contract, gate, options, metrics
        self._queue: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._texts: weakref.WeakValueDictionary[str, Conditions] = weakref.WeakValueDictionary()  # of sessions that live
        self._lately: dict[str, float] = {}
        self._waiting = 0
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    # ------------------------------------------------------------------------------------------ from the event loop

    def start(self, warmed: Callable[[Exception | None], None]) -> None:
        """Start the thread; `warmed` is called in it once the model has planned, or with what went wrong."""

        def work() -> None:
            try:
                self.warm_up()
            except Exception as error:
                log.exception("the model could not be warmed up")
                warmed(error)
                return
            warmed(None)
            self._serve()

        self._thread = threading.Thread(target=work, name="wam-worker", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Queue a job."""
        with self._lock:
            self._waiting += 1
        self._queue.put(job)
        self.metrics.queue.set(self._waiting)

    def stop(self, timeout: float) -> None:
        """Finish what is queued and end the thread; gives up waiting for it after `timeout` seconds."""
        self._queue.put(None)
        if self._thread is not None:
            self._thread.join(timeout)

    @property
    def waiting(self) -> int:
        """Jobs that no forward pass has taken yet."""
        return self._waiting

    # ------------------------------------------------------------------------------------------ the thread

    def warm_up(self) -> None:
        """Plan once for one robot, and once for a batch: kernels are chosen, buffers allocated, code compiled."""
        t, size = self.policy.config.timeline, self.policy.config.codec.image_size
        state = np.zeros((1, self.contract.robot.raw_state_dim), np.float32)
        think = Think(self.options.mode, self.policy.config.sampling.with_steps(self.options.steps))
        count = min(2, self.options.max_batch)
        for robots in sorted({1, count}):
            sessions = [self._session("warm up", self.options.seed) for _ in range(robots)]
            for session in sessions:
                session.observe(np.zeros((1, 1, *size, 3), np.uint8), state)
            plans = run(sessions, [[think]] * robots)
            assert all(plan is not None and plan.actions is not None and plan.actions.shape[1] <= t.actions_per_block for plan in plans)

    def _serve(self) -> None:
        while True:
            job = self._queue.get()
            if job is None:
                return
            batch, last = self._gather(job)
            with self._lock:
                self._waiting -= len(batch)
            self.metrics.queue.set(self._waiting)
            try:
                self._work(batch)
            except Exception as error:  # nothing that a robot sent may end the thread that the others live on
                refusal = _internal(error)
                for each in batch:
                    each.resolve(refusal)
            if last:
                return

    def _gather(self, first: Job) -> tuple[list[Job], bool]:
        """The jobs of the next forward pass, and whether the server stops after it."""
        now = time.monotonic()
        self._lately = {key: at for key, at in self._lately.items() if now - at < LATELY_S}
        expected = min(self.options.max_batch, len(self._lately | {first.entry.key: now}))
        batch, until = [first], now + self.options.wait_s
        while len(batch) < self.options.max_batch:
            try:
                left = until - time.monotonic() if len(batch) < expected else 0.0
                job = self._queue.get(timeout=left) if left > 0 else self._queue.get_nowait()
            except queue.Empty:
                return batch, False
            if job is None:
                return batch, True
            batch.append(job)
        return batch, False

    def _work(self, batch: list[Job]) -> None:
        started = time.monotonic()
        ready: list[tuple[Job, Session, list[Call]]] = []
        for job in batch:
            if job.gone.is_set():
                job.resolve(ServingError("deadline_expired", "nobody waits for this plan any more", "connect again"))
                continue
            try:
                ready.append((job, *self._prepare(job)))
            except Exception as error:
                job.resolve(error if isinstance(error, ServingError) else _internal(error))
        for job, result in zip([job for job, _, _ in ready], self._plans(ready), strict=True):
            try:
                job.resolve(result if isinstance(result, Exception) else self._finish(job, result, started, len(ready)))
            except Exception as error:
                job.resolve(_internal(error))

    def _prepare(self, job: Job) -> tuple[Session, list[Call]]:
        """What the robot's session is to be told and asked.

        Raises:
            ServingError: nothing can be planned for it.
        """
        entry, request = job.entry, job.request
        self._in_time(job)
        if entry.stopped is not None:
            raise ServingError("stopped", f"the gate stopped this session: {entry.stopped}", "look at the robot, then reset the session")
        prompt = request.prompt or entry.prompt
        if prompt is None:
            raise ServingError("missing_key", "the prompt is missing", "send an instruction with the first message of a session")
        entry.memory.see(request, job.arrival)
        seed = request.seed if request.seed is not None else entry.seed if entry.seed is not None else self.options.seed
        if entry.session is None or prompt != entry.prompt or seed != entry.seed:
            entry.session, entry.memory.head = self._session(prompt, seed), None
            entry.prompt, entry.seed = prompt, seed
        calls, anew = entry.memory.calls(entry.session)
        self.metrics.restarts.labels("anew" if anew else "same" if not calls else "appended" if entry.memory.head is not None and len(calls) == 2 else "begun").inc()
        return entry.session, [*calls, self._think(job)]

    def _think(self, job: Job) -> Think:
        request, job.committed = job.request, self._committed(job.entry, job.request)
        return Think(request.mode or self.options.mode, self.policy.config.sampling.with_steps(request.steps or self.options.steps), job.committed)

    def _committed(self, entry: Entry, request: Request) -> np.ndarray | None:
        """The first actions of the plan that are decided already, (1, n, d)."""
        if request.committed is not None:
            committed = request.committed
        else:
            assert entry.memory.now is not None
            planned = [entry.memory.planned(entry.memory.now + i) for i in range(request.commit_steps)]
            if any(p is None for p in planned):
                raise ServingError("bad_value", f"commit_steps is {request.commit_steps}, and the plan before has fewer actions left", "ask for less, or send the actions as committed")
            committed = np.stack(planned) if planned else np.zeros((0, 0))  # type: ignore[arg-type]
        if len(committed) > self.contract.shortest_plan:
            raise ServingError("wrong_shape", f"{len(committed)} actions are committed", f"send up to {self.contract.shortest_plan}, which a plan has")
        return committed[None] if len(committed) else None

    def _session(self, prompt: str, seed: int) -> Session:
        session = Session(self.policy, [prompt], self.contract.robot.name, [seed])
        known = self._texts.get(prompt)
        if known is not None:  # the same tensors for the same words: a batch then holds them once
            session.instructions = session.conditions = known
        self._texts[prompt] = session.instructions
        return session

    def _plans(self, ready: list[tuple[Job, Session, list[Call]]]) -> list[Plan | Exception]:
        """A plan for each, or what went wrong with it alone."""
        if not ready:
            return []
        try:
            plans = run([session for _, session, _ in ready], [calls for _, _, calls in ready])
            self.metrics.batch.observe(len(ready))
            return [plan if plan is not None else RuntimeError("no plan") for plan in plans]
        except Exception as error:
            for job, _, _ in ready:
                job.entry.session = job.entry.memory.head = None
            if len(ready) == 1:
                return [_internal(error)]
            log.warning("a batch of %d failed (%s); planning for each alone", len(ready), error)
            return [self._alone(job) for job, _, _ in ready]

    def _alone(self, job: Job) -> Plan | Exception:
        """One robot's plan, from a memory that is told anew."""
        entry = job.entry
        try:
            assert entry.prompt is not None and entry.seed is not None
            entry.session = self._session(entry.prompt, entry.seed)
            calls, _ = entry.memory.calls(entry.session)
            plan = run([entry.session], [[*calls, self._think(job)]])[0]
            assert plan is not None
            return plan
        except Exception as error:
            entry.session = entry.memory.head = None
            return error if isinstance(error, ServingError) else _internal(error)

    # ------------------------------------------------------------------------------------------ what goes out

    def _finish(self, job: Job, plan: Plan, started: float, size: int) -> dict[str, Any] | Exception:
        """The reply to a plan that is let through, in time."""
        entry = job.entry
        entry.memory.head = entry.memory.now
        assert plan.actions is not None and entry.memory.now is not None and entry.session is not None
        begun = time.monotonic()
        now, actions = entry.memory.now, plan.actions[0]
        if job.committed is not None:
            actions[: job.committed.shape[1]] = job.committed[0]  # as they were decided: the network's copy is rounded, and clipped to its range
        before = [a for a in (entry.memory.executed.get(now - i) for i in range(MAX_HISTORY, 0, -1)) if a is not None]
        promised = [a for a in (entry.memory.planned(now + i) for i in range(len(actions))) if a is not None]
        try:
            self._in_time(job)
            passed = self.gate(actions, np.stack(before) if before else None, np.stack(promised) if promised else None, time.monotonic() - job.arrival)
            if passed.cut is not None and job.request.dialect == "openpi":
                raise ServingError("gate_refused", f"{passed.cut.told}, and openpi's clients take whole plans only", "hold; ask again from another observation")
        except GateRefusal as refusal:
            self.metrics.gate.labels(refusal.cut.reason).inc(len(actions))
            if refusal.stops:
                entry.stopped = str(refusal)
                return ServingError("stopped", str(refusal), "look at the robot, then reset the session")
            return ServingError("gate_refused", str(refusal), "hold; ask again from another observation")
        except ServingError as error:
            return error
        for reason, count in passed.interventions.items():
            self.metrics.gate.labels(reason).inc(count)
        entry.memory.plans.append(Sent(now, passed.actions))
        entry.plans += 1
        self._lately[entry.key] = time.monotonic()
        return self._reply(job, plan, passed, started, begun, size)

    def _reply(self, job: Job, plan: Plan, passed: Any, started: float, begun: float, size: int) -> dict[str, Any]:
        entry, memory, hz, done = job.entry, job.entry.memory, self.contract.control_hz, time.monotonic()
        waited = {"decode": job.decode_s * 1e3, "queue": (started - job.arrival - job.decode_s) * 1e3}
        stages = {**waited, **plan.timings, "gate": (done - begun) * 1e3, "total": (done - job.arrival) * 1e3}
        self.metrics.stages(stages)
        steps = (memory.now or 0) / hz
        start = job.request.timestamp if job.request.timestamp is not None else steps if memory.clock == "steps" else (memory.origin or 0.0) + steps
        assert entry.session is not None
        return {
            "actions": passed.actions,
            "server_timing": {"infer_ms": (done - started) * 1e3, "queue_ms": stages["queue"], "decode_ms": stages["decode"], "batch": size},
            "policy_timing": {"infer_ms": sum(plan.timings.values()), **{name.replace(" ", "_") + "_ms": spent for name, spent in plan.timings.items()}},
            "plan": {
                "id": uuid.uuid4().hex,
                "clock": memory.clock,
                "step": memory.now,
                "valid_from": float(start),
                "valid_until": float(start) + len(passed.actions) / hz,
                "control_dt": 1 / hz,
                "cut": None if passed.cut is None else {"step": passed.cut.step, "reason": passed.cut.reason, "message": passed.cut.told},
                "interventions": dict(passed.interventions),
                "memory_blocks": entry.session.block,
            },
        }

    def _in_time(self, job: Job) -> None:
        late = 0.0 if job.deadline is None else time.monotonic() - job.deadline
        if late > 0:
            self.metrics.missed.inc()
            raise ServingError("deadline_expired", f"the plan's deadline passed {late * 1e3:.0f} ms ago", "hold; ask again from a new observation")


def _internal(error: Exception) -> ServingError:
    """What a client is told of a mistake of ours: a number that the log has too."""
    number = uuid.uuid4().hex[:12]
    log.error("error %s", number, exc_info=error)
    return ServingError("internal_error", f"something is wrong with the server (number {number})", "hold; the server's log says more under this number")
