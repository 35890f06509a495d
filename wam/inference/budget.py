"""A latency budget: what a plan really takes on this machine decides the mode and the solver steps.

    observation here                                          actions there
        | encode | prefill | commit |  denoise: steps x ......  | post |
        |<---------------------- p95 <= budget ------------------------>|
        |<- a control step: no delay ->|
        |<------------- a block: the next plan is there before this one is over ------------->|

Times are measured, not modelled: a warm session with a full memory plans in every mode with every number of steps, in turns, so that a
machine that slows down slows all alike.  They depend on sizes, types, machine and threads, not on the values of the weights, so measurements
of one shape serve every checkpoint of it; they are kept in a dictionary that the caller owns, and on no disk.
"""

from __future__ import annotations

import logging
import math
import os
import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from wam.config import SamplingConfig
from wam.inference.session import Session
from wam.pretrained import Policy
from wam.timeline import Kind

log = logging.getLogger(__name__)

SHARES = (1, 3 / 4, 1 / 2, 3 / 8, 1 / 4, 3 / 16, 1 / 8, 1 / 16)  # of the checkpoint's own solver steps: what is tried
REPEATS = 20


@dataclass(frozen=True)
class Spread:
    """Milliseconds of something that was done several times."""

    median: float
    p95: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The 95th percentile is the smallest value that at least 95 % are not above."""
        ordered = sorted(values)
        return cls(statistics.median(ordered), ordered[math.ceil(0.95 * len(ordered)) - 1])


@dataclass(frozen=True)
class PlanTimes:
    """One mode with one number of solver steps; `whole` is from the observation to the actions, what was observed included."""

    denoise: Spread
    post: Spread
    whole: Spread


@dataclass(frozen=True)
class StageTimes:
    """What was measured.

    Attributes:
        observing: of each stage before a plan (encode, prefill, commit), for one block.
        plans: by mode and solver steps.
        machine: where, in words.
    """

    observing: dict[str, Spread]
    plans: dict[tuple[str, int], PlanTimes]
    machine: str

    def per_step(self, mode: str) -> float | None:
        """Median milliseconds of one solver step of a mode, from its most and its fewest; None where only one number of steps was measured."""
        measured = sorted((steps, plan.denoise.median) for (name, steps), plan in self.plans.items() if name == mode)
        (fewest, less), (most, more) = measured[0], measured[-1]
        return None if most == fewest else (more - less) / (most - fewest)


Known = dict[tuple[object, ...], StageTimes]


@dataclass(frozen=True)
class Choice:
    """A mode and its solver steps.

    Attributes:
        sampling: the checkpoint's, with these steps.
        time: milliseconds from an observation to its plan.
        fits: whether its p95 is within the budget.
        control_ms, block_ms: what a control step and a block last.
        told: what was chosen and why, with the numbers.
    """

    mode: str
    steps: int
    sampling: SamplingConfig
    time: Spread
    budget_ms: float
    fits: bool
    control_ms: float
    block_ms: float
    told: str

    @property
    def asynchronous(self) -> bool:
        """Whether the robot would stand still if it waited for its plans: they take more than a control step."""
        return self.time.p95 > self.control_ms

    @property
    def keeps_up(self) -> bool:
        """Whether the next plan is there before the block that is executed meanwhile is over."""
        return self.time.p95 <= self.block_ms


def choose(
    policy: Policy, modes: Sequence[str], budget_ms: float, sampling: SamplingConfig | None = None, known: Known | None = None, repeats: int = REPEATS
) -> Choice:
    """The first of `modes` that is within the budget at p95 with any number of steps, with the most steps that are; else the cheapest, with a warning.

    Args:
        modes: in the order of preference.
        sampling: how plans are sampled; its steps are the most that is tried; default: as the checkpoint says.
        known: measurements made before, which are used, and to which new ones are added.

    Raises:
        ValueError: no modes, one that plans no actions from observations alone, or a budget that is not positive.
    """
    if not budget_ms > 0:
        raise ValueError(f"a latency budget of {budget_ms} ms is no time to plan in; expected more than 0")
    how = sampling or policy.config.sampling
    times = stage_times(policy, modes, how, known, repeats=repeats)
    return pick(times, modes, budget_ms, how, policy.control_hz, policy.config.timeline.actions_per_block)


def pick(times: StageTimes, modes: Sequence[str], budget_ms: float, sampling: SamplingConfig, control_hz: float, actions_per_block: int) -> Choice:
    """`choose`, from times that were measured; a choice that does not fit is warned of."""
    order = [(mode, steps) for mode in modes for steps in candidate_steps(sampling.steps)]
    within = [which for which in order if times.plans[which].whole.p95 <= budget_ms]
    mode, steps = within[0] if within else min(order, key=lambda which: times.plans[which].whole.p95)
    time_, control, block = times.plans[mode, steps].whole, 1e3 / control_hz, 1e3 * actions_per_block / control_hz
    told = _told(times, modes, mode, steps, budget_ms, sampling.steps, bool(within)) + _told_of_time(time_.p95, control, block)
    if not within:
        log.warning("%s", told)
    return Choice(mode, steps, with_steps(sampling, steps), time_, budget_ms, bool(within), control, block, told)


def delay_steps(choice: Choice, control_hz: float) -> int:
    """Control steps that the world moves on while such a plan is made, at p95."""
    return math.ceil(choice.time.p95 * control_hz / 1e3)


def _told(times: StageTimes, modes: Sequence[str], mode: str, steps: int, budget_ms: float, own: int, fits: bool) -> str:
    t = times.plans[mode, steps].whole
    numbers = f"{t.median:.1f} ms, {t.p95:.1f} ms at p95"
    if not fits:
        most = f"; the least that any of {', '.join(modes)} takes" if len(modes) > 1 else ""
        return f"no plan fits into {budget_ms:g} ms on {times.machine}: mode {mode} with {_plural(steps)} takes {numbers}{most}, {t.p95 - budget_ms:.1f} ms too long; it is used nevertheless. "
    passed = modes[: modes.index(mode)]
    told = f"mode {mode} with {_plural(steps)} fits into {budget_ms:g} ms on {times.machine}: {numbers}"
    if steps < own:
        more = min(s for s in candidate_steps(own) if s > steps)
        told += f"; {_plural(more)} take {times.plans[mode, more].whole.p95:.1f} ms at p95"
    for name in passed:
        told += f"; {name} takes at least {min(p.whole.p95 for (m, _), p in times.plans.items() if m == name):.1f} ms at p95"
    return told + ". "


def _told_of_time(p95: float, control: float, block: float) -> str:
    if p95 <= control:
        return f"It is ready within a control step of {control:g} ms: synchronous time loses nothing."
    if p95 <= block:
        return f"A control step is {control:g} ms: {math.ceil(p95 / control)} of them go by, so plan while the robot moves (asynchronous); a block lasts {block:g} ms, so plans keep up."
    return f"A block lasts only {block:g} ms: plans do not keep up, and the robot will wait in any mode of time."


def _plural(steps: int) -> str:
    return f"{steps} solver step{'s' if steps > 1 else ''}"


# ------------------------------------------------------------------------------------------------ measuring


def candidate_steps(own: int) -> list[int]:
    """Numbers of solver steps that are tried, the most first."""
    return sorted({1, *(max(1, round(own * share)) for share in SHARES)}, reverse=True)


def with_steps(sampling: SamplingConfig, steps: int) -> SamplingConfig:
    """The same with `steps` solver steps; steps of actions apart and evaluations keep their share of them."""

    def share(count: int) -> int:
        return max(1, round(count * steps / sampling.steps))

    acting = None if sampling.action_steps is None else share(sampling.action_steps)
    return replace(sampling, steps=steps, action_steps=acting, evaluations=share(sampling.evaluations) if sampling.reuse == "mask" else sampling.evaluations)


def stage_times(policy: Policy, modes: Sequence[str], sampling: SamplingConfig, known: Known | None = None, rows: int = 1, repeats: int = REPEATS) -> StageTimes:
    """Stage times of each mode and number of steps for `rows` robots at once; measured unless they are known.

    Raises:
        ValueError: no modes, or one that plans no actions from observations alone.
    """
    if not modes:
        raise ValueError("no modes to choose from; give at least one that plans actions, such as skip")
    for name in modes:
        mode = policy.model.relations.mode(name)
        if Kind.A not in mode.denoised or name == "inverse":
            raise ValueError(f"mode {name!r} does not plan actions from what was observed; a budget chooses among modes that do, such as skip, joint or imagine")
    shape = [repr(getattr(policy.config, part)) for part in ("model", "timeline", "codec", "text")]
    key = (*shape, sampling, tuple(sorted(modes)), policy.model.backbone.dtype, machine(policy.model.device), rows, repeats)
    if known is not None and key in known:
        return known[key]
    times = _measure(policy, modes, sampling, rows, repeats)
    if known is not None:
        known[key] = times
    return times


def machine(device: torch.device) -> str:
    """What speed depends on, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = torch.get_num_threads()
    return f"this {platform.machine()} CPU ({cores} cores, {threads} thread{'s' if threads > 1 else ''})"


def _measure(policy: Policy, modes: Sequence[str], sampling: SamplingConfig, rows: int, repeats: int) -> StageTimes:
    """Blocks of noise are observed; in each, every mode plans with every number of steps."""
    driver, order = _Subject.of(policy, rows), [(mode, steps) for mode in modes for steps in candidate_steps(sampling.steps)]
    for _ in range(policy.config.timeline.history + 1):
        driver.observe()
        driver.plan(*order[0], sampling)
    for mode, steps in order[1:]:
        driver.plan(mode, steps, sampling)
    observed: list[dict[str, float]] = []
    planned: dict[tuple[str, int], list[tuple[dict[str, float], float]]] = {which: [] for which in order}
    for number in range(repeats):
        observed.append(driver.observe())
        for which in order if number % 2 == 0 else reversed(order):
            planned[which].append(driver.plan(*which, sampling))
    stages = {stage: Spread.of([seen.get(stage, 0.0) for seen in observed]) for stage in sorted({stage for seen in observed for stage in seen})}
    before = [sum(seen.values()) for seen in observed]
    plans = {which: _plan_times(taken, before) for which, taken in planned.items()}
    return StageTimes(stages, plans, machine(policy.model.device))


def _plan_times(taken: Sequence[tuple[Mapping[str, float], float]], before: Sequence[float]) -> PlanTimes:
    parts = {stage: Spread.of([timings[stage] for timings, _ in taken]) for stage in ("denoise", "post")}
    return PlanTimes(parts["denoise"], parts["post"], Spread.of([seen + whole for seen, (_, whole) in zip(before, taken, strict=True)]))


@dataclass
class _Subject:
    """Robots that see noise and do what they plan; everything is as long as on a real one."""

    session: Session
    rng: np.random.Generator
    actions: np.ndarray | None = None

    @classmethod
    def of(cls, policy: Policy, rows: int) -> _Subject:
        rng, size = np.random.default_rng(0), policy.config.codec.image_size
        goals = rng.integers(0, 255, (rows, *size, 3), dtype=np.uint8) if policy.config.model.goal_image else None
        return cls(Session(policy, ["measure how long a plan takes"] * rows, policy.config.data.embodiment, range(rows), goals), rng)

    def observe(self) -> dict[str, float]:
        """Do what was planned last, and see what comes; returns milliseconds by stage."""
        s = self.session
        s.timings = {}
        if self.actions is not None:
            s.commit(self.actions)
        frames = self.rng.integers(0, 255, (s.batch, s.frames_due, *s.config.codec.image_size, 3), dtype=np.uint8)
        s.observe(frames, self.rng.normal(size=(s.batch, s.dims.raw_state_dim)).astype(np.float32))
        taken, s.timings = s.timings, {}
        return taken

    def plan(self, mode: str, steps: int, sampling: SamplingConfig) -> tuple[dict[str, float], float]:
        """A plan's milliseconds by stage, and in all."""
        start = time.perf_counter()
        plan = self.session.plan(mode, with_steps(sampling, steps))
        taken = (time.perf_counter() - start) * 1e3
        self.actions = plan.actions
        return plan.timings, taken
