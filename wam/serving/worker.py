"""Where plans are made: one thread, off the event loop, which takes what waits and plans for all of it at once.

    event loop   job ->  [ queue ]                        -> future resolved
    worker               take one, wait a little for others -> see, tell the sessions, plan (one forward) -> gate -> reply
    swap                 between two batches: other weights; every session is made anew, and told what its robot's memory holds

While a batch is computed the next one gathers.  A lone robot never waits: the wait is only as long as other robots are likely to come
(as many as there are that planned lately), and is bounded.  A job whose client has gone, or whose deadline has passed, is not worked on.

When a batch fails, each of its robots is planned for alone, with its memory told anew: what one robot sent cannot cost another its plan.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from wam.inference.batch import Call, Commit, Observe, Think, run
from wam.inference.check import SurpriseScale, imagines
from wam.inference.gate import Gate
from wam.inference.session import Plan, Session
from wam.model.compiled import is_compiled
from wam.model.conditions import Conditions
from wam.pretrained import Policy
from wam.serving.contract import Contract
from wam.serving.errors import ServingError
from wam.serving.events import Event, Planned, Watcher, observed
from wam.serving.job import Job, internal
from wam.serving.messages import Request
from wam.serving.metrics import Metrics
from wam.serving.outgoing import in_time, let_through, pictures_of, reply_to
from wam.serving.sessions import Entry
from wam.serving.surprise import Source, Surprises

log = logging.getLogger(__name__)

LATELY_S = 5.0  # a robot that planned this lately is likely to come again


@dataclass(frozen=True)
class WorkerOptions:
    """How plans are made.

    Attributes:
        mode, seed, steps: where a request does not say; steps None: the checkpoint's.
        max_batch: robots in a forward pass.
        wait_s: longest that the first of a batch waits for others.
        check: what is compared with what comes, where the checkpoint is calibrated; auto: what plans imagine, if they do.
        check_steps: solver steps of `forward`, where that is compared.
    """

    mode: str
    seed: int = 0
    max_batch: int = 16
    wait_s: float = 0.003
    steps: int | None = None
    check: Source = "auto"
    check_steps: int = 1

    def __post_init__(self) -> None:
        if self.max_batch < 1:
            raise ValueError(f"max_batch is {self.max_batch}; expected at least 1")
        if not 0 <= self.wait_s <= 1:
            raise ValueError(f"wait_s is {self.wait_s}; expected seconds, 0 to 1")


@dataclass
class Swap:
    """Other weights, for the thread to go on with; `done` once it does."""

    policy: Policy
    contract: Contract
    surprises: Surprises | None
    done: threading.Event = field(default_factory=threading.Event)


class Worker:
    """See the module's docstring.

    Attributes:
        watchers: told what happens to robots (`wam.serving.events`); filled before the thread starts.
        after: called on the planning thread when a batch has been answered.
    """

    def __init__(self, policy: Policy, contract: Contract, gate: Gate, options: WorkerOptions, metrics: Metrics, scale: SurpriseScale | None = None):
        """Nothing runs yet; see `start`.

        Raises:
            ValueError: a check is asked for that cannot be made.
        """
        self.policy, self.contract, self.gate, self.options, self.metrics = policy, contract, gate, options, metrics
        self.surprises = self.surprises_of(policy, scale)
        self.watchers: list[Watcher] = []
        self.after: list[Callable[[], None]] = []
        self._planning = False
        self._queue: queue.SimpleQueue[Job | Swap | None] = queue.SimpleQueue()
        self._texts: weakref.WeakValueDictionary[str, Conditions] = weakref.WeakValueDictionary()  # of sessions that live
        self._lately: dict[str, float] = {}
        self._waiting = 0
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    # ------------------------------------------------------------------------------------------ from elsewhere

    def start(self, warmed: Callable[[Exception | None], None]) -> None:
        """Start the thread; `warmed` is called in it once the model has planned, or with what went wrong."""

        def work() -> None:
            try:
                self.warm_up(self.policy, self.contract)
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

    def swap(self, policy: Policy, contract: Contract, scale: SurpriseScale | None, timeout: float) -> None:
        """Go on with other weights after the batch that is computed now; they have been warmed up.  Blocks until it is so.

        Raises:
            ValueError: a check is asked for that cannot be made with them.
            TimeoutError: the thread did not come to it.
        """
        swap = Swap(policy, contract, self.surprises_of(policy, scale))
        self._queue.put(swap)
        if not swap.done.wait(timeout):
            raise TimeoutError(f"the planning thread did not take the new weights within {timeout:g} s; it is still busy with a batch")

    def surprises_of(self, policy: Policy, scale: SurpriseScale | None) -> Surprises | None:
        """The check of a policy, as the options ask for it."""
        o = self.options
        return Surprises.of(policy, scale, o.check, o.mode, policy.config.sampling.with_steps(o.steps).steps, o.check_steps)

    def tell(self, event: Event) -> None:
        """Tell watchers; what goes wrong with one of them is logged, and costs no robot its plan."""
        for watcher in self.watchers:
            try:
                watcher(event)
            except Exception:
                log.exception("a watcher failed")

    def stop(self, timeout: float) -> None:
        """Finish what is queued and end the thread; gives up waiting for it after `timeout` seconds."""
        self._queue.put(None)
        if self._thread is not None:
            self._thread.join(timeout)

    @property
    def busy(self) -> bool:
        """Whether a plan is being made, or waits to be."""
        return self._planning or self._waiting > 0

    @property
    def waiting(self) -> int:
        """Jobs that no forward pass has taken yet."""
        return self._waiting

    def warm_up(self, policy: Policy, contract: Contract) -> None:
        """Plan once for one robot, and once for a batch: kernels are chosen, buffers allocated, code compiled.

        Compiled blocks are driven until a memory is full, also for three robots, whose code serves more: that is compiled here, and not while a robot waits.
        """
        t, size = policy.config.timeline, policy.config.codec.image_size
        state = np.zeros((1, contract.robot.raw_state_dim), np.float32)
        think = Think(self.options.mode, policy.config.sampling.with_steps(self.options.steps))
        compiled = is_compiled(policy.model)
        for robots in sorted({min(n, self.options.max_batch) for n in ((1, 2, 3) if compiled else (1, 2))}):
            sessions = [Session(policy, ["warm up"], contract.robot.name, [self.options.seed]) for _ in range(robots)]
            seen: list[Call] = []
            for _ in range(t.history + 2 if compiled else 1):
                seen.append(Observe(np.zeros((1, sessions[0].frames_due, *size, 3), np.uint8), state))
                plans = run(sessions, [[*seen, think]] * robots)
                seen = [Commit(np.zeros((1, t.actions_per_block, contract.robot.raw_action_dim), np.float32))]
                assert all(plan is not None and plan.actions is not None and plan.actions.shape[1] <= t.actions_per_block for plan in plans)

    # ------------------------------------------------------------------------------------------ the thread

    def _serve(self) -> None:
        job: Job | Swap | None = self._queue.get()
        while job is not None:
            if isinstance(job, Swap):
                self.policy, self.contract, self.surprises = job.policy, job.contract, job.surprises
                self._texts.clear()
                job.done.set()
                job = self._queue.get()
                continue
            batch, after = self._gather(job)
            self._planning = True
            with self._lock:
                self._waiting -= len(batch)
            self.metrics.queue.set(self._waiting)
            try:
                self._work(batch)
            except Exception as error:  # nothing that a robot sent may end the thread that the others live on
                refusal = internal(error)
                for each in batch:
                    each.resolve(refusal)
            self._planning = False
            self._afterwards()
            job = self._queue.get() if after is batch else after

    def _afterwards(self) -> None:
        for call in self.after:
            try:
                call()
            except Exception:
                log.exception("what follows a batch failed")

    def _gather(self, first: Job) -> tuple[list[Job], Any]:
        """The jobs of the next forward pass, and what came after them that is none (a swap; None: the server stops), or the jobs again."""
        now = time.monotonic()
        self._lately = {key: at for key, at in self._lately.items() if now - at < LATELY_S}
        expected = min(self.options.max_batch, len(self._lately | {first.entry.key: now}))
        batch, until = [first], now + self.options.wait_s
        while len(batch) < self.options.max_batch:
            try:
                left = until - time.monotonic() if len(batch) < expected else 0.0
                job = self._queue.get(timeout=left) if left > 0 else self._queue.get_nowait()
            except queue.Empty:
                break
            if not isinstance(job, Job):
                return batch, job
            batch.append(job)
        return batch, batch

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
                job.resolve(error if isinstance(error, ServingError) else internal(error))
        answered = list(zip([job for job, _, _ in ready], self._plans(ready), strict=True))
        sent: list[tuple[Job, Plan, dict[str, Any]]] = []
        for job, result in sorted(answered, key=lambda pair: pair[0].request.want_imagined):  # decoding takes time, and others wait
            try:
                if isinstance(result, Exception):
                    raise result
                reply = self._finish(job, result, started, len(ready))
                job.resolve(reply)
                sent.append((job, result, reply))
            except Exception as error:
                job.resolve(error if isinstance(error, ServingError) else internal(error))
        if self.surprises is not None and sent:
            self._foresee(self.surprises, sent)

    def _foresee(self, surprises: Surprises, sent: Sequence[tuple[Job, Plan, dict[str, Any]]]) -> None:
        try:
            surprises.foresee(sent)
        except Exception:
            log.exception("what plans lead to could not be imagined; they are not checked")
            for job, _, _ in sent:
                job.entry.expected = None

    def _prepare(self, job: Job) -> tuple[Session, list[Call]]:
        """What the robot's session is to be told and asked.

        Raises:
            ServingError: nothing can be planned for it.
        """
        entry, request = job.entry, job.request
        in_time(job, self.metrics)
        if entry.stopped is not None:
            raise ServingError("stopped", f"the gate stopped this session: {entry.stopped}", "look at the robot, then reset the session")
        goal = entry.goal if request.goal is None or (entry.goal is not None and np.array_equal(request.goal, entry.goal)) else request.goal
        prompt = request.prompt or entry.prompt or (None if goal is None else "")
        if prompt is None:
            raise ServingError("missing_key", "the prompt is missing", "send an instruction with the first message of a session")
        seen = entry.memory.see(request, job.arrival)
        if self.watchers:
            self.tell(observed(entry.key, entry.memory, request, seen, prompt))
        self._compare(job, begins=seen.before is None)
        seed = request.seed if request.seed is not None else entry.seed if entry.seed is not None else self.options.seed
        same = prompt == entry.prompt and seed == entry.seed and goal is entry.goal
        entry.prompt, entry.seed, entry.goal = prompt, seed, goal
        if entry.session is None or not same or entry.session.policy is not self.policy:
            entry.session, entry.memory.head = self._session(entry), None
        calls, anew = entry.memory.calls(entry.session)
        self.metrics.restarts.labels("anew" if anew else "same" if not calls else "appended" if entry.memory.head is not None and len(calls) == 2 else "begun").inc()
        return entry.session, [*calls, self._think(job)]

    def _compare(self, job: Job, begins: bool) -> None:
        """What came of the plan before."""
        entry = job.entry
        if begins or self.surprises is None:
            entry.expected = None
            return
        job.surprise = self.surprises.compare(entry.memory, entry.expected)
        if job.surprise is not None:
            self.metrics.surprise.observe(job.surprise["value"])
            self.metrics.surprises.labels("surprised" if job.surprise["surprised"] else "still" if job.surprise["still"] else "expected").inc()

    def _think(self, job: Job) -> Think:
        request, job.committed = job.request, self._committed(job.entry, job.request)
        job.mode = request.mode or self.options.mode
        sampling = self.policy.config.sampling.with_steps(request.steps or self.options.steps)
        job.steps = sampling.steps
        if job.mode not in self.contract.modes:  # it was parsed before other weights came
            raise ServingError("unknown_mode", f"mode is {job.mode!r}", f"ask for one that this policy acts in: {', '.join(self.contract.modes)}")
        if request.want_imagined and not imagines(self.policy, job.mode):
            able = [mode for mode in self.contract.modes if imagines(self.policy, mode)]
            raise ServingError("bad_value", f"want is imagined, and plans in mode {job.mode!r} imagine no video", f"ask for a mode that does: {', '.join(able) or 'this policy has none'}")
        return Think(job.mode, sampling, job.committed)

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

    def _session(self, entry: Entry) -> Session:
        """A new session of an entry; the same words have the same tensors, so a batch holds them once."""
        assert entry.prompt is not None and entry.seed is not None
        goals = None if entry.goal is None else entry.goal[None]
        session = Session(self.policy, [entry.prompt], self.contract.robot.name, [entry.seed], goals, self._texts.get(entry.prompt))
        self._texts[entry.prompt] = session.instructions
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
                return [internal(error)]
            log.warning("a batch of %d failed (%s); planning for each alone", len(ready), error)
            return [self._alone(job) for job, _, _ in ready]

    def _alone(self, job: Job) -> Plan | Exception:
        """One robot's plan, from a memory that is told anew."""
        entry = job.entry
        try:
            entry.session = self._session(entry)
            calls, _ = entry.memory.calls(entry.session)
            plan = run([entry.session], [[*calls, self._think(job)]])[0]
            assert plan is not None
            return plan
        except Exception as error:
            entry.session = entry.memory.head = None
            return error if isinstance(error, ServingError) else internal(error)

    def _finish(self, job: Job, plan: Plan, started: float, size: int) -> dict[str, Any]:
        """The reply to a plan that is let through, in time.

        Raises:
            ServingError: it is not.
        """
        entry, begun = job.entry, time.monotonic()
        entry.memory.head = entry.memory.now
        passed = let_through(job, plan, self.gate, self.metrics)
        reply = reply_to(job, plan, passed, started, size, self.contract)
        done = time.monotonic()
        waited = {"decode": job.decode_s * 1e3, "queue": reply["server_timing"]["queue_ms"]}
        self.metrics.stages({**waited, **plan.timings, "gate": (done - begun) * 1e3, "total": (done - job.arrival) * 1e3})
        self._lately[entry.key] = time.monotonic()
        if self.watchers:
            assert entry.memory.now is not None and plan.actions is not None and entry.seed is not None
            about: dict[str, Any] = {name: reply[name] for name in ("plan", "server_timing", "policy_timing", "surprise") if name in reply}
            committed = 0 if job.committed is None else job.committed.shape[1]
            imagined = None if plan.imagined is None else plan.imagined[0]
            self.tell(Planned(entry.key, entry.memory.now, job.mode, job.steps, entry.seed, committed, plan.actions[0], passed.actions, imagined, entry.goal, about))
        if job.request.want_imagined:
            reply["imagined"] = pictures_of(self.policy, plan, self.contract)
        return reply
