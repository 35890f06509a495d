"""Many environments side by side, spread over worker processes.

A policy that plans for twenty-five robots at once is limited by the simulator unless the simulators run in parallel, too.  Row `i` lives
in worker `i % workers`, so that the load stays even as episodes end.  A simulator that crashes is an error of the evaluation, never a
failure of the policy: it is reported with the environment's name, the episode's seed and the worker's own traceback.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from wam.evaluation.environments import Environment, Event, Floats, Frames, Observation, StepResult, make_env
from wam.evaluation.workers import WorkerError, Workers


class EnvironmentCrash(RuntimeError):
    """A simulator failed; the evaluation cannot go on, and nothing is said about the policy."""


@dataclass(frozen=True)
class Observations:
    """First observations of n episodes."""

    frames: Frames  # (n, 1, H, W, 3)
    states: Floats  # (n, Ds)
    instructions: tuple[str, ...] = ()  # one an episode
    events: tuple[tuple[Event, ...], ...] = ()  # of each episode, those in force from the start


@dataclass(frozen=True)
class _Sizes:
    """What an environment says about itself."""

    state_dim: int
    action_dim: int
    action_low: Floats
    action_high: Floats
    control_hz: int
    image_size: int
    instruction: str
    max_steps: int


class VectorEnv:
    """`n` environments of one name; use as a context manager."""

    def __init__(self, name: str, n: int, workers: int = 2, **settings: Any) -> None:
        """Start the workers and learn the environment's sizes, which become attributes here.

        Args:
            name: for `make_env`, e.g. `metaworld/drawer-open-v3`.
            n: rows.
            workers: processes; no more are started than there are rows.
            settings: the environment's own arguments.

        Raises:
            ValueError, ImportError, RenderError: as `make_env`.
        """
        if n < 1 or workers < 1:
            raise ValueError(f"n is {n} and workers is {workers}; both must be at least 1")
        self.name, self.n = name, n
        self._seeds: dict[int, int] = {}
        self._workers = Workers(min(n, workers), _row_handler, (name, settings))
        try:
            self._workers[0].send(("sizes", None))
            self._take_sizes(self._workers[0].receive())
        except WorkerError as failure:
            self.close()
            if isinstance(failure.error, (ValueError, ImportError, RuntimeError)):
                raise failure.error from None
            raise EnvironmentCrash(f"{name} cannot be made:\n{failure.text}") from failure
        except BaseException:
            self.close()
            raise

    def _take_sizes(self, sizes: _Sizes) -> None:
        self.state_dim, self.action_dim = sizes.state_dim, sizes.action_dim
        self.action_low, self.action_high = sizes.action_low, sizes.action_high
        self.control_hz, self.image_size = sizes.control_hz, sizes.image_size
        self.instruction, self.max_steps = sizes.instruction, sizes.max_steps

    def reset(self, seeds: Sequence[int]) -> Observations:
        """Begin episodes in rows 0, 1, ...

        Args:
            seeds: one a row; fewer than `n` leave the last rows unused.

        Raises:
            ValueError: no seeds, or more than rows.
            EnvironmentCrash: a simulator failed.
        """
        if not 1 <= len(seeds) <= self.n:
            raise ValueError(f"{len(seeds)} seeds for {self.n} rows; expected 1..{self.n}")
        self._seeds = {row: int(seed) for row, seed in enumerate(seeds)}
        first: list[Observation] = self._ask("reset", self._seeds)
        return Observations(
            np.stack([o.frames for o in first]),
            np.stack([o.state for o in first]),
            tuple(o.instruction or self.instruction for o in first),
            tuple(o.events for o in first),
        )

    def run(self, actions: npt.NDArray[Any], rows: Sequence[int], frame_stride: int) -> list[StepResult]:
        """Execute a stretch of actions in some rows; a row stops at its success or its last step.

        Args:
            actions: (m, steps, Da), one stretch for each of `rows`.
            rows: m distinct rows whose episodes are not over.
            frame_stride: control steps between frames.

        Raises:
            ValueError: shapes or rows that do not fit, actions that are not finite, or an episode that is over.
            EnvironmentCrash: a simulator failed.
        """
        actions = np.asarray(actions, np.float32)
        if actions.ndim != 3 or actions.shape[0] != len(rows) or actions.shape[2] != self.action_dim:
            raise ValueError(f"actions have shape {actions.shape}; expected ({len(rows)} rows, steps, {self.action_dim})")
        if len(set(rows)) != len(rows) or not set(rows) <= set(self._seeds):
            raise ValueError(f"rows are {list(rows)}; expected distinct rows among those reset: 0..{len(self._seeds) - 1}")
        if not np.isfinite(actions).all():
            raise ValueError(f"actions of row {rows[int(np.argwhere(~np.isfinite(actions))[0][0])]} are not finite")
        return self._ask("run", {row: (actions[i], frame_stride) for i, row in enumerate(rows)})

    def _ask(self, method: str, requests: dict[int, Any]) -> list[Any]:
        """Send each worker its rows' requests, then gather the answers in the order of the rows given."""
        shares: dict[int, dict[int, Any]] = {}
        for row, request in requests.items():
            shares.setdefault(row % len(self._workers), {})[row] = request
        answers: dict[int, Any] = {}
        try:
            for worker, share in shares.items():
                self._try(worker, share, partial(self._workers[worker].send, (method, share)))
            for worker, share in shares.items():
                answers.update(self._try(worker, share, self._workers[worker].receive))
        except BaseException:  # answers still on their way would be taken for those of the next request
            self.close()
            raise
        return [answers[row] for row in requests]

    def _try(self, worker: int, share: dict[int, Any], call: Callable[[], Any]) -> Any:
        try:
            return call()
        except WorkerError as failure:
            if isinstance(failure.error, _RowError):
                seed, cause = self._seeds.get(failure.error.row), failure.error.cause
                if isinstance(cause, ValueError):
                    raise ValueError(f"row {failure.error.row} (seed {seed}): {cause}") from None
                raise EnvironmentCrash(f"{self.name} crashed in the episode of seed {seed}; this is not a failure of the policy.\n{failure.text}") from failure
            seeds = ", ".join(str(self._seeds.get(row)) for row in share)
            raise EnvironmentCrash(
                f"{self.name} crashed in worker {worker}, which ran the episodes of seeds {seeds}; this is not a failure of the policy.\n{failure.text}"
            ) from failure

    def close(self) -> None:
        """End the workers."""
        self._workers.close()

    def __enter__(self) -> VectorEnv:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class _RowError(Exception):
    """What went wrong in one row, on its way from a worker."""

    def __init__(self, row: int, cause: Exception) -> None:
        super().__init__(row, cause)
        self.row, self.cause = row, cause


def _row_handler(name: str, settings: dict[str, Any]) -> Callable[[Any], Any]:
    """Inside a worker: the environments of its rows, each made when first needed."""
    rows: dict[int, Environment] = {}

    def sizes() -> _Sizes:
        env = rows.setdefault(0, make_env(name, **settings))
        return _Sizes(**{field: getattr(env, field) for field in _Sizes.__dataclass_fields__})

    def one(method: str, row: int, request: Any) -> Observation | StepResult:
        if row not in rows:
            rows[row] = make_env(name, **settings)
        return rows[row].reset(request) if method == "reset" else rows[row].run(*request)

    def handle(request: Any) -> Any:
        method, share = request
        if method == "sizes":
            return sizes()
        answers = {}
        for row, asked in share.items():
            try:
                answers[row] = one(method, row, asked)
            except Exception as error:
                raise _RowError(row, error) from error
        return answers

    return handle
