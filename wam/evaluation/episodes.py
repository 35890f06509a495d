"""Episodes in lockstep: many robots planned for in one batch, each as if it were alone.

    observe -> plan -> gate -> execute -> remember -> plan -> ...

All rows of a wave stand at the same control step, so one forward pass plans for all; rows whose episode is over are dropped.  A row's
noise comes from a generator of its own, so what happens in an episode does not depend on its neighbours.

Robots that execute whole blocks stream: what is new is appended to the session's memory.  Robots that plan again before a block is
over would find themselves inside a block, where the model never was in training; so their window is laid anew to end at the present,
which is in distribution because training windows begin anywhere:

    control steps   ...  t - 2A ...... t - A ........ t  = now, any multiple of `replan`
    window               H | block 0   | block 1     | block 2: the plan, of which `replan` steps are executed
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from wam.config import SamplingConfig
from wam.evaluation.environments import Floats, StepResult
from wam.evaluation.vector import Observations, VectorEnv
from wam.inference.session import Plan, Session
from wam.pretrained import Policy

TOLERANCE = 0.05  # of the action box's width: a plan that lies on the edge, as experts' actions often do, overshoots by a little


@dataclass(frozen=True)
class Episode:
    """What came of one episode.

    Attributes:
        length: control steps executed.
        chunks: plans made.
        interventions: executed control steps that the gate moved back into the action box, by more than `TOLERANCE`.
    """

    seed: int
    success: bool
    length: int
    chunks: int
    interventions: int


# ------------------------------------------------------------------------------------------------ the gate


@dataclass(frozen=True)
class Gate:
    """The last thing between a plan and a robot: numbers must be finite, and inside the action box (Da,)."""

    low: Floats
    high: Floats

    def __call__(self, actions: Floats) -> tuple[Floats, npt.NDArray[np.bool_]]:
        """Actions (B, A, Da) clipped to the box, and which control steps (B, A) lay outside.

        Raises:
            ValueError: an action that is not finite; no other action is put in its place.
        """
        broken = np.argwhere(~np.isfinite(actions))
        if len(broken):
            row, step, dimension = (int(i) for i in broken[0])
            raise ValueError(
                f"the plan of row {row} holds {actions[row, step, dimension]} at action {step}, dimension {dimension}; nothing was sent to the robot"
            )
        slack = TOLERANCE * (self.high - self.low)
        outside = np.asarray(((actions < self.low - slack) | (actions > self.high + slack)).any(axis=-1), np.bool_)
        return np.clip(actions, self.low, self.high).astype(np.float32), outside


# ------------------------------------------------------------------------------------------------ two ways to remember


class Stream:
    """Memory of robots that execute whole blocks: each block is written into the session once."""

    def __init__(self, session: Session, first: Observations) -> None:
        self.session = session
        session.observe(first.frames, first.states)

    def select(self, rows: Sequence[int]) -> None:
        """Keep only some rows, in the given order."""
        self.session.select(rows)

    def advance(self, executed: Floats, frames: npt.NDArray[np.uint8], states: Floats) -> None:
        """Take in a stretch: actions (B, A, Da), frames (B, 4k, H, W, 3), states after each step (B, A, Ds)."""
        self.session.commit(executed)
        self.session.observe(frames, states[:, -1])


class Memory:
    """Memory of robots that plan more often: the last blocks that fit a training window, written anew so that they end at the present."""

    def __init__(self, session: Session, first: Observations) -> None:
        timeline = session.policy.config.timeline
        self.session = session
        self._block, self._stride = timeline.actions_per_block, timeline.stride
        self._reach = (timeline.blocks - 1) * timeline.actions_per_block  # control steps that can lie before the planned block
        self._frames, self._states = first.frames, first.states[:, None]
        self._executed = np.zeros((session.batch, 0, session.dims.raw_action_dim), np.float32)
        self._recall()

    def select(self, rows: Sequence[int]) -> None:
        """Keep only some rows, in the given order."""
        index = list(rows)
        self.session.select(index)
        self._frames, self._states, self._executed = self._frames[index], self._states[index], self._executed[index]

    def advance(self, executed: Floats, frames: npt.NDArray[np.uint8], states: Floats) -> None:
        """Take in a stretch of n control steps, n a multiple of the frame stride, as `Stream.advance`."""
        self._executed = _last(np.concatenate([self._executed, executed], axis=1), self._reach)
        self._frames = _last(np.concatenate([self._frames, frames], axis=1), self._reach // self._stride + 1)
        self._states = _last(np.concatenate([self._states, states], axis=1), self._reach + 1)
        self._recall()

    def _recall(self) -> None:
        """Write as many whole blocks as are remembered into an empty session."""
        now = self._executed.shape[1]
        start = now % self._block
        first = start // self._stride
        self.session.reset()
        self.session.observe(self._frames[:, first : first + 1], self._states[:, start])
        for begin in range(start, now, self._block):
            end = begin + self._block
            self.session.commit(self._executed[:, begin:end])
            self.session.observe(self._frames[:, begin // self._stride + 1 : end // self._stride + 1], self._states[:, end])


def _last(array: npt.NDArray, count: int) -> npt.NDArray:
    return array[:, max(0, array.shape[1] - count) :]


# ------------------------------------------------------------------------------------------------ the loop


class Watcher:
    """Sees what happens in a wave, and changes nothing.  Subclasses override what they need."""

    def planned(self, session: Session, rows: Sequence[int], plan: Plan, sent: Floats, milliseconds: float) -> None:
        """A plan was made for `rows`; `sent` (B, A, Da) is what the gate let through, `milliseconds` the time since the last observation."""

    def ran(self, rows: Sequence[int], results: Sequence[StepResult]) -> None:
        """Stretches were executed in `rows`."""


@dataclass(frozen=True)
class Driver:
    """A policy and how it is used.

    Attributes:
        replan: control steps executed of each plan: a whole block, or a smaller multiple of the frame stride.
        noise_seed: with an episode's seed, decides the noise its plans start from.
    """

    policy: Policy
    mode: str
    solver: SamplingConfig
    replan: int
    noise_seed: int

    def drive(self, env: VectorEnv, seeds: Sequence[int], watchers: Sequence[Watcher] = ()) -> list[Episode]:
        """Drive one episode per seed, side by side, until all are over.

        Raises:
            ValueError: a plan that is not finite; names the mode, the control step and the seeds.
            EnvironmentCrash: a simulator failed.
        """
        timeline = self.policy.config.timeline
        remember = Stream if self.replan == timeline.actions_per_block else Memory
        gate, tally = Gate(env.action_low, env.action_high), _Tally.new(len(seeds))
        session = Session(
            self.policy, [env.instruction] * len(seeds), self.policy.config.data.embodiment, [generator_seed(self.noise_seed, seed) for seed in seeds]
        )
        rows = list(range(len(seeds)))
        first = env.reset(seeds)
        start = time.perf_counter()
        memory = remember(session, first)
        while True:
            plan = session.plan(self.mode, self.solver)
            assert plan.actions is not None, f"mode {self.mode} plans no actions"
            try:
                sent, outside = gate(plan.actions)
            except ValueError as error:
                step, planned = int(tally.length.max()), [seeds[row] for row in rows]
                raise ValueError(f"mode {self.mode!r} at control step {step} (rows are the episodes of seeds {planned}): {error}") from error
            elapsed = (time.perf_counter() - start) * 1e3
            for watcher in watchers:
                watcher.planned(session, rows, plan, sent, elapsed)
            results = env.run(sent[:, : self.replan], rows, timeline.stride)
            for watcher in watchers:
                watcher.ran(rows, results)
            tally.add(rows, results, outside)
            keep = [i for i, result in enumerate(results) if not result.done]
            if not keep:
                return tally.episodes(seeds)
            start = time.perf_counter()
            rows = [rows[i] for i in keep]
            memory.select(keep)
            memory.advance(sent[keep, : self.replan], np.stack([results[i].frames for i in keep]), np.stack([results[i].states for i in keep]))


@dataclass(frozen=True)
class _Tally:
    """Counts per row of a wave."""

    success: npt.NDArray[np.bool_]
    length: npt.NDArray[np.int64]
    chunks: npt.NDArray[np.int64]
    interventions: npt.NDArray[np.int64]

    @classmethod
    def new(cls, rows: int) -> _Tally:
        return cls(np.zeros(rows, np.bool_), *(np.zeros(rows, np.int64) for _ in range(3)))

    def add(self, rows: Sequence[int], results: Sequence[StepResult], outside: npt.NDArray[np.bool_]) -> None:
        for i, (row, result) in enumerate(zip(rows, results, strict=True)):
            executed = len(result.states)
            self.success[row] = result.success.any()
            self.length[row] += executed
            self.chunks[row] += 1
            self.interventions[row] += outside[i, :executed].sum()

    def episodes(self, seeds: Sequence[int]) -> list[Episode]:
        return [
            Episode(int(seed), bool(self.success[row]), int(self.length[row]), int(self.chunks[row]), int(self.interventions[row]))
            for row, seed in enumerate(seeds)
        ]


def generator_seed(*parts: int) -> int:
    """One seed from several numbers, unlike that of any others in practice."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)


def imagine_outcome(session: Session, rows: Sequence[int], actions: Floats, solver: SamplingConfig, seeds: Sequence[int]) -> Tensor:
    """What some rows of a session think will follow from actions (n, A, Da): latents (n, C, k, h, w).

    The session itself is left as it is, its generators included.

    Args:
        rows: positions in the session.
        seeds: of the noise, one a row.
    """
    aside = copy.copy(session)
    aside.timings = {}
    aside.select(rows)  # copies the cache
    aside.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    imagined = aside.plan("forward", solver, actions).imagined
    assert imagined is not None
    return imagined
