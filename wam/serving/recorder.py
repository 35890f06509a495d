"""Recording what a server receives and sends: robots of today, training data of tomorrow.

    event loop, planning thread    put an event, or count it as dropped             never wait
    [ queue, bounded by bytes ]
    recording thread               one `Take` a robot, episode by episode           -> DIR/served/NAME.npz  the plans
                                                                                    -> Recording            rows and frames (LeRobot v3.0)

An episode goes from a robot's first observation to its reset or end.  It is cut, and the next begins, where nobody knows what was executed,
where the instruction changes, after a dropped event, and where it would not fit into memory.  A crash loses the episodes in progress.

Rows are control steps.  At a row stand the newest state, what was sent and what the memory takes for executed, and every `frame_stride`
rows the frame that was taken nearest to it; where none was near, the one before is held, and `held` in the plans' file names the row.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import wam
from wam.data.recording import EpisodeBuffer, Outcome, Recording, RecordingFormat
from wam.serving.contract import Contract
from wam.serving.events import Ended, Event, Observed, Planned, Refused
from wam.serving.metrics import Metrics
from wam.serving.served import Served, write_served

log = logging.getLogger(__name__)

CANVAS = "observation.images.canvas"  # of several cameras on one picture
QUEUE_BYTES, EPISODE_BYTES = 256 << 20, 128 << 20  # of pictures
QUEUE_EVENTS = 4096
ASSEMBLE_S = 60.0  # between two times that new episodes are made part of the dataset


def recording_format(contract: Contract) -> RecordingFormat:
    """What a server's recording looks like: the policy's own canvas, rate and sizes.

    Raises:
        ValueError: a control rate that is no whole number.
    """
    if contract.control_hz != int(contract.control_hz):
        raise ValueError(f"this policy's control rate is {contract.control_hz:g} a second, and a recording needs whole numbers; leave --record out")
    robot, size = contract.robot, contract.canvas.size
    camera = contract.cameras[0] if len(contract.cameras) == 1 else CANVAS
    names = [
        tuple(f"{g.name}_{i}" for g in groups for i in range(g.size)) or tuple(f"{what}_{i}" for i in range(count))
        for what, groups, count in (("state", robot.state_groups, robot.raw_state_dim), ("action", robot.action_groups, robot.raw_action_dim))
    ]
    return RecordingFormat(int(contract.control_hz), {camera: (size[0], size[1])}, names[0], names[1], robot.name, contract.frame_stride)


@dataclass
class Take:
    """One episode while it goes on; control steps are counted from `start`.

    Attributes:
        frames: by multiples of the frame stride: how far from its place it was taken, when, and the picture.
        states: by the step at which they were sent.
        rows: of each step so far: what was sent, what was executed.
    """

    key: str
    name: str
    start: int
    prompt: str | None
    frames: dict[int, tuple[float, float, np.ndarray]] = field(default_factory=dict)
    states: dict[int, np.ndarray] = field(default_factory=dict)
    rows: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    observations: list[dict[str, Any]] = field(default_factory=list)
    plans: list[Planned] = field(default_factory=list)
    at: list[int] = field(default_factory=list)  # of each plan: the observation it rests on
    errors: list[dict[str, Any]] = field(default_factory=list)

    def saw(self, event: Observed, stride: int) -> None:
        """Take an observation in."""
        now = event.step - self.start
        for at, frame in zip(event.times, event.frames, strict=True):
            place = round((at - self.start) / stride)
            away = abs(at - self.start - place * stride)
            if place >= 0 and (place not in self.frames or away < self.frames[place][0]):
                self.frames[place] = (away, at - self.start, frame)
        if event.state is not None:
            self.states[now] = event.state
        self.observations.append({"step": now, "clock": event.clock, "timestamp": event.timestamp, "frames": len(event.times)})


class Recorder:
    """See the module's docstring; call it with events, and `close` it."""

    def __init__(self, root: Path, contract: Contract, metrics: Metrics, episode_bytes: int = EPISODE_BYTES):
        """Begin a recording, or go on with one.

        Raises:
            FileExistsError, ValueError: as `Recording`, or a control rate that cannot be recorded.
        """
        self.contract, self.metrics = contract, metrics
        self.form = recording_format(contract)
        self.recording = Recording(root, self.form)
        (self.camera,) = self.form.cameras
        pixels = 3 * self.form.cameras[self.camera][0] * self.form.cameras[self.camera][1]
        self.longest = max(2 * contract.horizon, episode_bytes // pixels)  # control steps of an episode
        self._takes: dict[str, Take] = {}
        self._broken: set[str] = set()  # robots of whom something was dropped
        self._queue: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._bytes = self._events = self._count = 0
        self._lock = threading.Lock()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="wam-recorder", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------------------------------------ from elsewhere

    def __call__(self, event: Event) -> None:
        """Take note of an event, or count it as dropped; never waits."""
        size = event.frames.nbytes if isinstance(event, Observed) else 0
        with self._lock:
            full = self._bytes + size > QUEUE_BYTES or self._events >= QUEUE_EVENTS
            if full or self._closing:
                self._broken.add(event.key)
            else:
                self._bytes, self._events = self._bytes + size, self._events + 1
        if full or self._closing:
            self.metrics.unrecorded.labels("event").inc()
            return
        self.metrics.recording_queue.set(self._bytes)
        self._queue.put(event)

    def close(self, timeout: float) -> bool:
        """End all episodes, write what is queued, and make it one dataset; returns whether there was time for that."""
        with self._lock:
            self._closing = True
        self._queue.put(None)
        self._thread.join(timeout)
        return not self._thread.is_alive()

    # ------------------------------------------------------------------------------------------ the thread

    def _run(self) -> None:
        self._assemble()
        assembled = time.monotonic()
        while True:
            try:
                event = self._queue.get(timeout=ASSEMBLE_S)
            except queue.Empty:
                event = None
                if not self._closing:
                    self._assemble()
                    assembled = time.monotonic()
                    continue
            if event is None:
                break
            with self._lock:
                self._bytes -= event.frames.nbytes if isinstance(event, Observed) else 0
                self._events -= 1
                broken = event.key in self._broken
                self._broken.discard(event.key)
            self.metrics.recording_queue.set(self._bytes)
            try:
                self._take(event, broken)
                if time.monotonic() - assembled > ASSEMBLE_S and self._queue.empty():
                    self._assemble()
                    assembled = time.monotonic()
            except Exception:  # a full disk, a picture that cannot be encoded: the next episode may be luckier, and no robot waits for it
                log.exception("an episode was lost")
                self.metrics.unrecorded.labels("episode").inc()
                self._takes.pop(event.key, None)
        for key in list(self._takes):
            self._end_safely(key)
        self._assemble()

    def _end_safely(self, key: str) -> None:
        try:
            self._end(key, "stopped", "stopping")
        except Exception:
            log.exception("an episode was lost")
            self.metrics.unrecorded.labels("episode").inc()

    def _assemble(self) -> None:
        try:
            self.recording.assemble({"versions": {"wam": wam.__version__}})
        except OSError:
            log.exception("the dataset could not be assembled; its episodes are kept")

    def _take(self, event: Event, broken: bool) -> None:
        take = self._takes.get(event.key)
        if broken and take is not None:
            self._end(event.key, "stopped", "something was dropped")
            take = None
        if isinstance(event, Observed):
            self._observed(take, event)
        elif isinstance(event, Ended):
            outcome: Outcome = "success" if event.outcome == "success" else "failed" if event.outcome == "failed" else "stopped"
            self._end(event.key, outcome, event.why)
        elif take is not None and isinstance(event, Planned):
            if take.observations and take.observations[-1]["step"] == event.step - take.start:
                take.plans.append(event)
                take.at.append(len(take.observations) - 1)
        elif take is not None and isinstance(event, Refused):
            take.errors.append({"after": len(take.observations) - 1, "code": event.code, "message": event.message})

    def _observed(self, take: Take | None, event: Observed) -> None:
        """Rows of what was executed since the observation before; and whether the episode goes on."""
        if take is not None and (event.before is None or event.before - take.start != len(take.rows)):
            self._end(event.key, "stopped", "the clock began anew")
            take = None
        if take is not None:
            known = np.isfinite(event.executed).all(axis=1)
            count = len(known) if known.all() else int(np.argmin(known))
            for sent, done in zip(event.sent[:count], event.executed[:count], strict=True):
                take.rows.append((sent if np.isfinite(sent).all() else done, done))
            whole = event.before is not None and count == event.step - event.before
            changed = take.prompt is not None and event.prompt is not None and event.prompt != take.prompt
            if not whole or changed or len(take.rows) >= self.longest:
                if whole:
                    take.saw(event, self.form.frame_every)  # its frame and state belong to this episode as well: they are what came of it
                self._end(event.key, "stopped", "nobody knows what was executed" if not whole else "another instruction" if changed else "as long as an episode may be")
                take = None
        if take is None:
            self._count += 1  # names are in the order in which episodes began
            name = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{self._count:06d}-{uuid.uuid4().hex[:8]}"
            take = self._takes[event.key] = Take(event.key, name, event.step, event.prompt)
        take.prompt = take.prompt or event.prompt
        take.saw(event, self.form.frame_every)

    # ------------------------------------------------------------------------------------------ writing

    def _end(self, key: str, outcome: Outcome, why: str) -> None:
        """Write an episode that is over."""
        take = self._takes.pop(key, None)
        if take is None:
            return
        if not take.prompt or 0 not in take.states or 0 not in take.frames:
            if take.rows:
                self.metrics.unrecorded.labels("episode").inc()
                log.warning("an episode of %d control steps was not recorded: it has no %s", len(take.rows), "instruction" if not take.prompt else "state")
            return
        buffer, held = self._buffer(take, outcome == "success")
        facts: dict[str, int | float | str] = {"session": key, "why": why, "plans": len(take.plans), "errors": len(take.errors), "held_frames": len(held), "interventions": sum(_changed(plan) for plan in take.plans)}
        write_served(self.recording.root, take.name, self._served(take, held, outcome, why))
        if self.recording.add(take.name, buffer, outcome, facts):
            self.metrics.recorded.inc()

    def _buffer(self, take: Take, success: bool) -> tuple[EpisodeBuffer, list[int]]:
        """Rows and frames as a recording takes them, and the rows whose frame is held although one was due."""
        buffer, stride, held = EpisodeBuffer(self.form, take.prompt or ""), self.form.frame_every, []
        frame, state = take.frames[0][2], take.states[0]
        buffer.begin({self.camera: frame}, state)
        for step, (sent, done) in enumerate(take.rows, start=1):
            state = take.states.get(step, state)
            due = step % stride == 0
            if due and step // stride in take.frames:
                frame = take.frames[step // stride][2]
            elif due and step < len(take.rows):
                held.append(step)
            buffer.add(sent, state, {self.camera: frame} if due else None, executed=done, success=success and step == len(take.rows))
        return buffer, held

    def _served(self, take: Take, held: list[int], outcome: str, why: str) -> Served:
        stride, rows = self.form.frame_every, len(take.rows)
        seen = [(place * stride, at) for place, (_, at, _) in sorted(take.frames.items()) if place * stride < rows]
        tail = [(at, frame) for place, (_, at, frame) in sorted(take.frames.items()) if place * stride >= rows]
        about = {"session": take.key, "prompt": take.prompt, "outcome": outcome, "why": why, "rows": rows, "held": held}
        return Served.of(about, self.contract, seen, tail, take.states, take.observations, list(zip(take.at, take.plans, strict=True)), take.errors)


def _changed(plan: Planned) -> int:
    """Actions that the gate changed or cut off."""
    return int(sum(plan.about["plan"]["interventions"].values()))
