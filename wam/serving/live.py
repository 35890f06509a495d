"""What a page shows of a running server, gathered while somebody watches, and never at a plan's cost.

    event loop, planning thread   an event  ->  [ queue ]                       full: dropped, and counted
    a thread of its own           pairs, decodes, encodes  ->  [ ring ]         when the model rests; the oldest make room
    event loop                    GET /live?after=n  <-  what is newer than n   waits for it, a little

While nobody asks, an event costs one comparison.  Pictures and actions are kept of the robots that are looked at, numbers of all.  What
a plan imagined is decoded when the model rests, and dropped when it does not.  Queue, ring, replies, pictures a second and watchers are
bounded, and there is nothing to send to: a watcher that does not ask gets nothing, and one that does not read loses its connection.
"""

from __future__ import annotations

import asyncio
import base64
import copy
import io
import itertools
import json
import logging
import queue
import threading
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wam.inference.check import source_name
from wam.inference.session import Session
from wam.pretrained import Policy
from wam.serving.errors import ServingError
from wam.serving.events import Ended, Event, Observed, Planned, Refused

log = logging.getLogger(__name__)

WAIT_S, GATHER_S, GAP_S, LINGER_S = 2.0, 0.03, 0.15, 4.0  # a reply waits for news, and for what comes with it; replies to one watcher are apart; after the last question the watcher is thought gone
MOST_WATCHERS, MOST_QUESTIONS, MOST_QUEUED, MOST_TRACKED = 8, 3, 64, 8
RING_BYTES, REPLY_BYTES = 4 << 20, 1 << 20
FRAME_S, IMAGINED_S, FORWARD_S = 0.12, 0.25, 1.0  # least time between two pictures of a robot, two imagined blocks, two that are imagined for the page alone
REST_S, LOOK_S = 0.25, 0.05  # how long the page waits for the model to rest, and how often it looks if nobody says so
PAIRS, LONG_SIDE, QUALITY = 4, 480, 82
NEAR = 0.5  # frame strides: a frame this near to an imagined one is what came of it


@dataclass
class Imagined:
    """A block that was imagined: the plan's number, the control steps of the frames that are shown, and which of these have come."""

    number: str
    steps: tuple[float, ...]
    came: set[int] = field(default_factory=set)


@dataclass
class Track:
    """One robot that is looked at."""

    pictured: float = -1e9
    decoded: float = -1e9
    blocks: deque[Imagined] = field(default_factory=lambda: deque(maxlen=2))


@dataclass(frozen=True)
class Watch:
    """One who watches: which robot, and until when it is thought to."""

    robot: str
    until: float
    answered: float = 0.0


@dataclass(frozen=True)
class Noted:
    """An event, the policy whose it is, and, where its outcome is to be imagined for the page, a copy of the session that made the plan."""

    event: Event
    policy: Policy
    aside: Session | None = None


class Live:
    """See the module's docstring.  Is a `Watcher` of a server's events."""

    def __init__(self, policy: Callable[[], Policy], busy: Callable[[], bool], session_of: Callable[[str], Session | None] | None = None):
        """A live view of a server.

        Args:
            policy: that plans now.
            busy: whether the model is at work, or about to be.
            session_of: a robot's session; with it, the outcome of plans that imagine nothing is imagined for the page.

        Raises:
            ValueError: outcomes are to be imagined by a policy that was not trained to.
        """
        if session_of is not None and not foresees(policy()):
            raise ValueError("this policy was not trained to imagine what follows from actions (training.modes has no 'forward'), so the page cannot show it; serve without --watch-imagined")
        self.policy, self.busy, self.session_of = policy, busy, session_of
        self.run = uuid.uuid4().hex
        self.dropped = self.unseen = 0  # events for want of room; imagined blocks because the model was at work
        self.last = 0
        self._queue: queue.Queue[Noted | None] = queue.Queue(MOST_QUEUED)
        self._wanted: Planned | None = None
        self._calm = threading.Event()
        self._ring: deque[tuple[int, str | None, bytes]] = deque()
        self._held = 0
        self._watches: dict[str, Watch] = {}
        self._focus: frozenset[str] = frozenset()
        self._until = self._forwarded = 0.0
        self._tracks: dict[str, Track] = {}
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiters: dict[str, asyncio.Future[None]] = {}
        self._asking: Counter[str] = Counter()
        self._thread: threading.Thread | None = None
        self._closed = False

    # ------------------------------------------------------------------------------------------ told

    @property
    def watched(self) -> bool:
        """Whether anybody watches."""
        return time.monotonic() < self._until

    def __call__(self, event: Event) -> None:
        """Take note of an event; returns at once."""
        if not self.watched or (isinstance(event, Observed) and event.key not in self._focus):
            return
        if isinstance(event, Planned) and event.imagined is None and event.key in self._focus and self.session_of is not None:
            self._wanted = event
        self._note(Noted(event, self.policy()))

    def sent(self) -> None:
        """Replies have left: on the planning thread.  Sets a copy of a session aside, from which the outcome of its plan can be imagined, if nobody waits."""
        self._calm.set()
        event, self._wanted = self._wanted, None
        now = time.monotonic()
        if event is None or self.session_of is None or now - self._forwarded < FORWARD_S or self.busy() or self._queue.full():
            return
        session = self.session_of(event.key)
        if session is None or session.before is not None or not foresees(session.policy):
            return
        self._forwarded, aside = now, copy.copy(session)
        aside.timings = {}
        aside.select([0])  # copies the cache
        aside.generators = [torch.Generator().manual_seed(event.seed)]
        self._note(Noted(event, session.policy, aside))

    def _note(self, noted: Noted) -> None:
        try:
            self._queue.put_nowait(noted)
        except queue.Full:
            self.dropped += 1

    # ------------------------------------------------------------------------------------------ asked

    def attend(self, watcher: str, robot: str) -> None:
        """Somebody asks about a robot: from now on events are gathered for a while.

        Raises:
            ServingError: there are too many watchers, or too many questions of this one, or the server stops.
        """
        if self._closed:
            raise ServingError("shutting_down", "the server is stopping", "ask again later")
        now = time.monotonic()
        self._watches = {name: watch for name, watch in self._watches.items() if watch.until > now}
        if watcher not in self._watches and len(self._watches) >= MOST_WATCHERS:
            raise ServingError("rate_limited", f"{MOST_WATCHERS} pages watch already", "close one")
        if self._asking[watcher] >= MOST_QUESTIONS:
            raise ServingError("rate_limited", "this page has asked before and not been answered yet", "wait for the answer")
        known = self._watches.get(watcher)
        self._watches[watcher] = Watch(robot, now + WAIT_S + LINGER_S, known.answered if known else 0.0)
        self._focus = frozenset(watch.robot for watch in self._watches.values())
        self._until = now + WAIT_S + LINGER_S
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="wam-live", daemon=True)
            self._thread.start()

    async def poll(self, watcher: str, robot: str, after: int, run: str, state: Callable[[], Mapping[str, Any]]) -> bytes:
        """The reply to one question of a watcher who was attended to: JSON of `state` and of the events after number `after`, once there are any."""
        now, self._loop = time.monotonic(), asyncio.get_running_loop()
        after = after if run == self.run else 0
        self._asking[watcher] += 1
        try:
            await asyncio.sleep(max(0.0, self._watches[watcher].answered + GAP_S - now))
            if self.last <= after and run == self.run and not self._closed:
                await self._news(watcher)
        finally:
            self._asking[watcher] -= 1
            self._asking += Counter()  # forgets those that ask no more
        now = time.monotonic()
        self._until = now + LINGER_S
        self._watches[watcher] = replace(self._watches[watcher], until=now + LINGER_S, answered=now)
        return self._reply(robot, after, state())

    async def _news(self, watcher: str) -> None:
        """Wait for an event; a question of the same watcher that waited before waits no longer."""
        assert self._loop is not None
        news = self._loop.create_future()
        before, self._waiters[watcher] = self._waiters.get(watcher), news
        if before is not None and not before.done():
            before.set_result(None)
        if (await asyncio.wait({news}, timeout=WAIT_S))[0]:
            await asyncio.sleep(GATHER_S)  # events come in bursts, and a reply costs more than what is in it
        if self._waiters.get(watcher) is news:
            del self._waiters[watcher]

    def _reply(self, robot: str, after: int, state: Mapping[str, Any]) -> bytes:
        """The newest events that fit; `missed` says how many did not, or had left the ring."""
        with self._lock:
            ring, last = list(self._ring), self.last
        fits, size = [], 0
        for number, whose, data in reversed(ring):
            size += len(data)
            if number <= after or size > REPLY_BYTES:
                break
            if whose is None or whose == robot:
                fits.append(data)
        oldest = next((number for number, _, _ in ring), last + 1)
        head = {"run": self.run, "cursor": last, "missed": max(0, oldest - 1 - after) if after else 0, "dropped": self.dropped, "unseen": self.unseen, **state}
        return json.dumps(head, allow_nan=False)[:-1].encode() + b',"events":[' + b",".join(reversed(fits)) + b"]}"

    def close(self) -> None:
        """Let those go that wait, and the thread end; on the event loop."""
        self._closed, self._until = True, 0.0
        self._wake()
        with self._queue.mutex:
            self._queue.queue.clear()
        self._queue.put(None)
        self._calm.set()

    def join(self, timeout: float) -> None:
        """Wait for the thread to end; gives up after `timeout` seconds."""
        if self._thread is not None:
            self._thread.join(timeout)

    @property
    def held(self) -> int:
        """Bytes of events that are kept."""
        return self._held

    # ------------------------------------------------------------------------------------------ the thread

    def _run(self) -> None:
        while (noted := self._queue.get()) is not None:
            self._rests()  # what is done while a plan is made takes the interpreter from it
            while noted is not None:
                try:
                    self._take(noted)
                except Exception:  # what cannot be shown must not end what shows the rest
                    log.exception("the page could not be shown an event of %s", noted.event.key)
                try:
                    noted = self._queue.get_nowait()
                except queue.Empty:
                    break
            else:
                return

    def _take(self, noted: Noted) -> None:
        event = noted.event
        for key in [key for key in self._tracks if key not in self._focus]:
            del self._tracks[key]
        track = self._tracks.setdefault(event.key, Track()) if event.key in self._focus and len(self._tracks) < MOST_TRACKED else None
        if isinstance(event, Refused):
            self._tell(None, {"type": "refused", "robot": event.key, "code": event.code, "message": event.message})
        elif isinstance(event, Ended):
            self._tracks.pop(event.key, None)
            self._tell(None, {"type": "ended", "robot": event.key, "why": event.why, "outcome": event.outcome})
        elif isinstance(event, Planned):
            if noted.aside is None:
                self._planned(event, track)
            if track is not None and (event.imagined is not None or noted.aside is not None):
                self._imagined(event, track, noted)
        elif track is not None:
            self._observed(event, track)

    def _observed(self, event: Observed, track: Track) -> None:
        if event.before is None:
            track.blocks.clear()
        now, last = time.monotonic(), len(event.frames) - 1
        told: dict[str, Any] = {"type": "seen", "robot": event.key, "step": event.step, "before": event.before, "executed": rows(event.executed)}
        if last >= 0 and now - track.pictured >= FRAME_S:
            track.pictured, told["picture"] = now, picture(event.frames[last])
        self._tell(event.key, told)
        for block in track.blocks:
            self._came(event, block)

    def _came(self, event: Observed, block: Imagined) -> None:
        """What of an imagined block has come with an observation."""
        if not event.times:
            return
        near = NEAR * self.policy().config.timeline.stride
        for i, step in enumerate(block.steps):
            nearest = min(range(len(event.times)), key=lambda j: abs(event.times[j] - step))
            if i not in block.came and abs(event.times[nearest] - step) <= near:
                block.came.add(i)
                self._tell(event.key, {"type": "came", "robot": event.key, "plan": block.number, "index": i, "picture": picture(event.frames[nearest])})

    def _planned(self, event: Planned, track: Track | None) -> None:
        about, timing = event.about["plan"], event.about["server_timing"]
        spent = {"decode": timing["decode_ms"], "queue": timing["queue_ms"]} | {name.removesuffix("_ms"): ms for name, ms in event.about["policy_timing"].items() if name != "infer_ms"}
        told = {
            "type": "plan",
            "robot": event.key,
            "step": event.step,
            "mode": event.mode,
            "batch": timing["batch"],
            "stages": {name: round(float(ms), 3) for name, ms in spent.items()},
            "total": round(float(timing["decode_ms"] + timing["queue_ms"] + timing["infer_ms"]), 3),
            "interventions": about["interventions"],
            "cut": about["cut"],
        }
        self._tell(None, told)
        if track is None:
            return
        self._tell(event.key, {"type": "actions", "robot": event.key, "step": event.step, "committed": event.committed, "made": rows(event.made), "passed": rows(event.passed)})
        found = event.about.get("surprise")
        if found is not None:
            self._tell(event.key, {"type": "surprise", "robot": event.key, "step": event.step, **{name: found[name] for name in ("value", "surprised", "still", "why", "source")}})

    def _imagined(self, event: Planned, track: Track, noted: Noted) -> None:
        """Show some frames of a block that was imagined, or is now, if the model rests."""
        now = time.monotonic()
        if now - track.decoded < IMAGINED_S:
            return
        if not self._rests():
            self.unseen += 1
            return
        track.decoded, config = now, noted.policy.config
        with torch.no_grad():
            latents, way = event.imagined, source_name(event.mode, event.steps)
            if noted.aside is not None:
                latents, way = self._outcome(noted.aside, event.made), source_name("forward", config.sampling.steps)
            assert latents is not None
            inside = config.timeline.first_frame == "inside" and event.about["plan"]["memory_blocks"] == 0  # such a block begins with the frame that was seen
            frames = noted.policy.codec.decode(latents[None], first=inside)[0].cpu().numpy()[1 if inside else 0 :]
        shown = sorted({round((i + 1) * len(frames) / PAIRS) - 1 for i in range(PAIRS)} & set(range(len(frames))))
        number, steps = event.about["plan"]["id"], tuple(float(event.step + config.timeline.stride * (i + 1)) for i in shown)
        track.blocks.append(Imagined(number, steps))
        self._tell(event.key, {"type": "imagined", "robot": event.key, "plan": number, "at": event.step, "steps": steps, "pictures": [picture(frames[i]) for i in shown], "source": way})

    @staticmethod
    def _outcome(aside: Session, actions: np.ndarray) -> Tensor:
        """What follows from a plan's actions, as the policy imagines it: latents (C, k, h, w)."""
        imagined = aside.plan("forward", actions=actions[None]).imagined
        assert imagined is not None
        return imagined[0]

    def _rests(self) -> bool:
        """Wait a little for the model to rest; whether it does."""
        until = time.monotonic() + REST_S
        while self.busy() and not self._closed:
            self._calm.clear()
            left = until - time.monotonic()
            if left <= 0:
                return False
            self._calm.wait(min(left, LOOK_S))
        return not self._closed

    def _tell(self, whose: str | None, event: Mapping[str, Any]) -> None:
        """Keep an event, of all or of those who look at one robot, and wake who waits."""
        number = next(self._numbers)
        data = json.dumps({"n": number, "time": round(time.time(), 3), **event}, allow_nan=False, separators=(",", ":")).encode()
        with self._lock:
            self._ring.append((number, whose, data))
            self._held += len(data)
            while self._held > RING_BYTES:
                self._held -= len(self._ring.popleft()[2])
            self.last = number
        if self._loop is not None and not self._closed:
            try:
                self._loop.call_soon_threadsafe(self._wake)
            except RuntimeError:  # the loop has closed, and with it whoever waited
                log.debug("an event came for a page whose server has gone")

    def _wake(self) -> None:
        for waiter in self._waiters.values():
            if not waiter.done():
                waiter.set_result(None)


def foresees(policy: Policy) -> bool:
    """Whether a policy was trained to imagine what follows from actions."""
    return policy.config.training.modes.get("forward", 0) > 0


def rows(values_ND: np.ndarray) -> list[list[float | None]]:
    """Numbers as JSON has them: five digits, null for what is not finite."""
    return [[float(f"{x:.5g}") if np.isfinite(x) else None for x in row] for row in values_ND]


def picture(frame_HWC: np.ndarray) -> str:
    """A uint8 frame (H, W, 3) as the text of a JPEG's address, its long side at most `LONG_SIDE`."""
    from PIL import Image

    image = Image.fromarray(frame_HWC)
    image.thumbnail((LONG_SIDE, LONG_SIDE))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=QUALITY, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()
