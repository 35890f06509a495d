"""Many environments side by side, spread over worker processes.

A policy that plans for twenty-five robots at once is limited by the simulator unless the simulators run in parallel, too.  Row `i` lives
in worker `i % workers`, so that the load stays even as episodes end, also where one half of the rows is planned for while the other half
is simulated and drawn:

    policy     plan 0-7 | plan 8-15 | plan 0-7  | plan 8-15 | ...        submit(rows) after each plan, collect(rows) before the next
    workers             | run 0-7   | run 8-15  | run 0-7   | ...

A simulator that crashes is never a failure of the policy.  An exception ends its row's episode; a worker that dies or hangs ends those
of all its rows that have begun, and is started again.  Each is reported as crashed, with seed, control step and traceback; others go on.
"""

from __future__ import annotations

import time
import traceback
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from wam.evaluation.environments import Environment, Event, Floats, Frames, Observation, StepResult, make_env, parse_name
from wam.evaluation.sizes import Sizes, checked_observation, checked_result, sizes_of
from wam.evaluation.workers import Worker, WorkerError, Workers

TIMEOUT_S = 300.0  # for one row's stretch or reset, the making of its environment included
NOT_THE_POLICY = "this is not a failure of the policy"


class EnvironmentCrash(RuntimeError):
    """A simulator cannot be made at all; nothing is said about the policy."""


@dataclass(frozen=True)
class Observations:
    """First observations of n episodes.

    Attributes:
        crashed: what went wrong, by row, where an environment could not begin; such a row's episode is over, its frames are black and its states NaN.
        rest: (n, Da) the commands that keep the robots where they are, NaN where there is none.
    """

    frames: Frames  # (n, 1, H, W, 3)
    states: Floats  # (n, Ds)
    instructions: tuple[str, ...] = ()  # one an episode
    events: tuple[tuple[Event, ...], ...] = ()  # of each episode, those in force from the start
    crashed: Mapping[int, str] = field(default_factory=dict)
    rest: Floats | None = None


@dataclass
class _Row:
    """An episode, as far as it is known here."""

    seed: int
    steps: int = 0  # executed
    over: bool = False
    lost: str | None = None  # why it cannot go on, until that is reported


@dataclass(frozen=True)
class _Crash:
    """What went wrong in a row, on its way from a worker."""

    text: str
    steps: int | None  # executed before it, where the environment counts them


@dataclass
class _Lane:
    """A worker's requests that are not answered, in their order, and when the first of them was begun, at the latest."""

    worker: Worker
    waiting: deque[int] = field(default_factory=deque)
    since: float = 0.0


class VectorEnv:
    """`n` environments of one name; use as a context manager."""

    def __init__(self, name: str, n: int, workers: int = 2, timeout_s: float = TIMEOUT_S, **settings: Any) -> None:
        """Start the workers and learn the environment's sizes, which become attributes here.

        Args:
            name: for `make_env`, e.g. `metaworld/drawer-open-v3`.
            n: rows.
            workers: processes; no more are started than there are rows.
            timeout_s: seconds after which a row that does not answer counts as hung.
            settings: the environment's own arguments.

        Raises:
            ValueError, ImportError, RenderError: as `make_env`.
            EnvironmentCrash: the environment cannot be made.
        """
        if n < 1 or workers < 1 or timeout_s <= 0:
            raise ValueError(f"n is {n}, workers is {workers} and timeout_s is {timeout_s}; n and workers must be at least 1, timeout_s above 0")
        self.name, self.n, self.timeout_s = name, n, timeout_s
        self._rows: dict[int, _Row] = {}
        self._answers: dict[int, Any] = {}
        self._beginning: set[int] = set()  # rows of the reset in progress
        self._workers = Workers(min(n, workers), _row_handler, (name, settings), parse_name(name)[0].variables())
        self._lanes = [_Lane(self._workers[i]) for i in range(len(self._workers))]
        try:
            self._take_sizes(self._ask_sizes())
        except WorkerError as failure:
            self.close()
            if isinstance(failure.error, (ValueError, ImportError, RuntimeError)):
                raise failure.error from None
            raise EnvironmentCrash(f"{name} cannot be made:\n{failure.text}") from failure
        except BaseException:
            self.close()
            raise

    def _ask_sizes(self) -> Sizes:
        first = self._workers[0]
        first.send(("sizes", 0, None))
        if not self._workers.ready([first], self.timeout_s):
            first.kill()
            raise EnvironmentCrash(f"{self.name} cannot be made: it takes more than {self.timeout_s:g} s")
        sizes: Sizes = first.receive()
        return sizes

    def _take_sizes(self, sizes: Sizes) -> None:
        self._sizes = sizes
        self.state_dim, self.action_dim = sizes.state_dim, sizes.action_dim
        self.action_low, self.action_high, self.hold = sizes.action_low, sizes.action_high, sizes.hold
        self.control_hz, self.image_size, self.cameras = sizes.control_hz, sizes.image_size, sizes.cameras
        self.instruction, self.max_steps = sizes.instruction, sizes.max_steps

    # -------------------------------------------------------------------------------------------- episodes

    def reset(self, seeds: Sequence[int], rows: Sequence[int] | None = None) -> Observations:
        """Begin episodes.

        Args:
            seeds: one a row.
            rows: where; default: all are forgotten, and the new ones are in rows 0, 1, ...

        Returns:
            What is seen first, in the order given; environments that crashed are named in `crashed`.

        Raises:
            ValueError: no seeds, rows that there are not, or results that were not collected.
        """
        places = list(range(len(seeds))) if rows is None else list(rows)
        if not 1 <= len(seeds) == len(places) <= self.n or len(set(places)) < len(places) or not set(places) <= set(range(self.n)):
            raise ValueError(f"{len(seeds)} seeds for rows {places} of {self.n}; expected one seed for each of 1..{self.n} distinct rows")
        if busy := self._busy():
            raise ValueError(f"rows {sorted(busy)} are still running or were not collected; call collect() before reset()")
        if rows is None:
            self._rows.clear()
        self._beginning.clear()
        for row, seed in zip(places, seeds, strict=True):
            self._rows[row] = _Row(int(seed))
            self._beginning.add(row)
            self._send("reset", row, int(seed))
        self._gather(set(places))
        self._beginning.clear()
        first = [self._answers.pop(row) for row in places]
        crashed = {row: str(answer.crashed) for row, answer in zip(places, first, strict=True) if isinstance(answer, StepResult)}
        return self._observations([self._black() if isinstance(answer, StepResult) else answer for answer in first], crashed)

    def _observations(self, first: list[Observation], crashed: dict[int, str]) -> Observations:
        unknown = np.full(self.action_dim, np.nan, np.float32)
        return Observations(
            np.stack([o.frames for o in first]),
            np.stack([o.state for o in first]),
            tuple(o.instruction or self.instruction for o in first),
            tuple(o.events for o in first),
            crashed,
            np.stack([unknown if o.rest is None else o.rest for o in first]),
        )

    def _black(self) -> Observation:
        return Observation(np.zeros((1, *self._sizes.frame), np.uint8), np.full(self.state_dim, np.nan, np.float32))

    def run(self, actions: npt.NDArray[Any], rows: Sequence[int], frame_stride: int) -> list[StepResult]:
        """Execute a stretch of actions in some rows and wait for it: `submit` and `collect`, in the order of `rows`."""
        self.submit(actions, rows, frame_stride)
        results = self.collect(rows)
        return [results[row] for row in rows]

    def submit(self, actions: npt.NDArray[Any], rows: Sequence[int], frame_stride: int) -> None:
        """Let some rows execute a stretch of actions, and do not wait; a row stops at its success or its last step.

        Args:
            actions: (m, steps, Da), one stretch for each of `rows`.
            rows: m distinct rows whose episodes are not over.
            frame_stride: control steps between frames.

        Raises:
            ValueError: shapes or rows that do not fit, actions that are not finite, or an episode that is over.
        """
        actions = np.asarray(actions, np.float32)
        if actions.ndim != 3 or actions.shape[0] != len(rows) or actions.shape[2] != self.action_dim:
            raise ValueError(f"actions have shape {actions.shape}; expected ({len(rows)} rows, steps, {self.action_dim})")
        if frame_stride < 1:
            raise ValueError(f"frame_stride is {frame_stride}; it must be at least 1")
        if len(set(rows)) != len(rows) or not set(rows) <= set(self._rows):
            raise ValueError(f"rows are {list(rows)}; expected distinct rows among those reset: {sorted(self._rows)}")
        if not np.isfinite(actions).all():
            raise ValueError(f"actions of row {rows[int(np.argwhere(~np.isfinite(actions))[0][0])]} are not finite")
        for row in rows:
            if self._rows[row].over:
                raise ValueError(f"row {row} (seed {self._rows[row].seed}): the episode is over; call reset(seeds) first")
        if busy := self._busy() & set(rows):
            raise ValueError(f"rows {sorted(busy)} are still running or were not collected; call collect() first")
        for i, row in enumerate(rows):
            lost = self._rows[row].lost
            if lost is not None:
                self._answers[row] = self._crashed(row, lost)
            else:
                self._send("run", row, (actions[i], frame_stride))

    def collect(self, rows: Sequence[int] | None = None) -> dict[int, StepResult]:
        """Wait for what was submitted.

        Args:
            rows: some of the rows submitted; default: all.

        Raises:
            ValueError: rows that were not submitted.
        """
        wanted = sorted(self._busy()) if rows is None else list(rows)
        if not set(wanted) <= self._busy():
            raise ValueError(f"rows {sorted(set(wanted) - self._busy())} were not submitted; submitted: {sorted(self._busy())}")
        self._gather(set(wanted))
        results: dict[int, StepResult] = {row: self._answers.pop(row) for row in wanted}
        for row, result in results.items():
            self._rows[row].steps += len(result.states)
            self._rows[row].over |= result.done
        return results

    def foresee(self, actions: npt.NDArray[Any], rows: Sequence[int], frame_stride: int) -> Frames:
        """What would be seen of several stretches, in some rows; nothing is executed.

        A row that crashes over it is black here, and its crash is what the stretch that is submitted next comes to.

        Args:
            actions: (m, N, steps, Da), N stretches for each of `rows`.
            rows: m distinct rows whose episodes are not over, and which are not running.

        Returns:
            (m, N, steps // frame_stride, H, W, 3).

        Raises:
            ValueError: an environment that cannot be run ahead.
        """
        if not self._sizes.foresees:
            raise ValueError(f"{self.name} cannot be run ahead and put back, as metaworld/ tasks without disturbances can; use planner.outcomes=imagined")
        assert self._busy().isdisjoint(rows) and len(actions) == len(rows)
        asked = [row for row in rows if self._rows[row].lost is None]
        for i, row in enumerate(rows):
            if row in asked:
                self._send("foresee", row, (np.asarray(actions[i], np.float32), frame_stride))
        self._gather(set(asked))
        seen = np.zeros((len(rows), actions.shape[1], actions.shape[2] // frame_stride, *self._sizes.frame), np.uint8)
        for i, row in enumerate(rows):
            answer = self._answers.pop(row, None)
            if isinstance(answer, StepResult):
                self._rows[row].lost, self._rows[row].over = answer.crashed, False
            elif answer is not None:
                seen[i] = answer
        return seen

    # -------------------------------------------------------------------------------------------- workers

    def _busy(self) -> set[int]:
        return {row for lane in self._lanes for row in lane.waiting} | set(self._answers)

    def _lane(self, row: int) -> _Lane:
        return self._lanes[row % len(self._lanes)]

    def _send(self, method: Literal["reset", "run", "foresee"], row: int, request: Any) -> None:
        lane = self._lane(row)
        if not lane.waiting:
            lane.since = time.monotonic()
        lane.waiting.append(row)
        try:
            lane.worker.send((method, row, request))
        except WorkerError as failure:
            self._lose(lane, failure.text)

    def _gather(self, wanted: set[int]) -> None:
        """Take answers until those of all wanted rows are there."""
        try:
            while missing := wanted - set(self._answers):
                lanes = [lane for lane in self._lanes if not missing.isdisjoint(lane.waiting)]
                patience = min(lane.since for lane in lanes) + self.timeout_s - time.monotonic()
                answered = self._workers.ready([lane.worker for lane in lanes], max(0.0, patience))
                for lane in lanes:
                    if lane.worker in answered:
                        self._take(lane)
                    elif time.monotonic() - lane.since >= self.timeout_s:
                        self._lose(lane, f"it did not answer within {self.timeout_s:g} s, and was ended")
        except BaseException:  # an answer may have been read by half
            self.close()
            raise

    def _take(self, lane: _Lane) -> None:
        """One answer of a worker, or its end."""
        try:
            answer = lane.worker.receive()
        except WorkerError as failure:
            if failure.died:
                self._lose(lane, failure.text)
                return
            answer = _Crash(failure.text, None)
        row, lane.since = lane.waiting.popleft(), time.monotonic()
        self._answers[row] = self._crashed(row, self._story(row, answer.text, answer.steps)) if isinstance(answer, _Crash) else answer

    def _lose(self, lane: _Lane, text: str) -> None:
        """A worker is gone, over one row's request, and so are the episodes in it.  It is started again, and episodes that had not begun begin there."""
        index = self._lanes.index(lane)
        guilty = lane.waiting[max(0, lane.worker.unheard - 1)]
        lane.worker = self._workers.replace(index)
        here = [row for row, episode in self._rows.items() if row % len(self._lanes) == index and not episode.over]
        waiting = set(lane.waiting)
        lane.waiting.clear()
        for row in here:
            shared = f"its process was shared with the episode of seed {self._rows[guilty].seed}: {text}"
            if row == guilty:
                self._answers[row] = self._crashed(row, self._story(row, text))
            elif row in self._beginning:
                self._answers.pop(row, None)
                self._send("reset", row, self._rows[row].seed)
            elif row in waiting:
                self._answers[row] = self._crashed(row, self._story(row, shared))
            else:
                self._rows[row].lost = self._story(row, shared)

    def _story(self, row: int, text: str, steps: int | None = None) -> str:
        episode = self._rows[row]
        return f"{self.name} crashed in the episode of seed {episode.seed} at control step {episode.steps if steps is None else steps}; {NOT_THE_POLICY}.\n{text}"

    def _crashed(self, row: int, why: str) -> StepResult:
        """What a row has come to whose environment failed."""
        self._rows[row].over = True
        none = np.zeros(0, np.float32)
        frames, states = np.zeros((0, *self._sizes.frame), np.uint8), np.zeros((0, self.state_dim), np.float32)
        return StepResult(frames, states, none, none.astype(np.bool_), done=True, crashed=why)

    def close(self) -> None:
        """End the workers."""
        self._workers.close()

    def __enter__(self) -> VectorEnv:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


# ------------------------------------------------------------------------------------------------ in a worker


def _row_handler(name: str, settings: dict[str, Any]) -> Callable[[Any], Any]:
    """Inside a worker: the environments of its rows, each made when first needed, and made anew after a crash."""
    rows: dict[int, Environment] = {}
    known: list[Sizes] = []

    def env(row: int) -> Environment:
        if row not in rows:
            rows[row] = make_env(name, **settings)
        return rows[row]

    def sizes(row: int) -> Sizes:
        if not known:
            known.append(sizes_of(env(row)))
        return known[0]

    def handle(request: Any) -> Any:
        method, row, asked = request
        if method == "sizes":
            return sizes(row)
        try:
            if method == "reset":
                return checked_observation(env(row).reset(asked), sizes(row))
            actions, stride = asked
            if method == "foresee":
                return env(row).foresee(actions, stride)  # type: ignore[attr-defined]
            return checked_result(env(row).run(actions, stride), len(actions), stride, sizes(row))
        except Exception:
            text, broken = traceback.format_exc(), rows.pop(row, None)
            if broken is not None:
                with suppress(Exception):  # what it says at its end adds nothing to what went wrong
                    broken.close()
            return _Crash(text, getattr(broken, "steps", None) if method == "run" else 0)

    return handle
