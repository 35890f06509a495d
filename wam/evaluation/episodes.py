"""Episodes of simulated robots: many side by side, each as if it were alone.

    decide (plans for all that are due, together)  ->  simulate a stretch of each  ->  tell the executor what came  ->  decide ...

Every robot has its own clock, memory, noise and instruction (`wam.inference.executor`), so what happens in an episode does not depend on
its neighbours.  With `overlap` one half of the robots is simulated while the other half is planned for, which pays where planning has a
processor of its own, such as a GPU.  An environment that crashes ends its episode as `crashed`: nothing is said about the policy, and
nothing else is lost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from wam.config import CheckConfig, DisturbanceConfig, ExecutionConfig, PlannerConfig, SamplingConfig
from wam.evaluation.disturbances import extra_delay
from wam.evaluation.environments import Event, Floats, Frames, StepResult
from wam.evaluation.vector import VectorEnv
from wam.inference.check import SurpriseScale
from wam.inference.executor import Executor
from wam.inference.gate import Gate, GateConfig, GroupLimits
from wam.inference.planner import Simulate
from wam.inference.robot import Loop, Made, Robot
from wam.inference.session import Plan, Session
from wam.pretrained import Policy

Outcome = Literal["success", "failed", "stopped", "crashed"]
CLIPPING = 0.99  # of the box's width: an action this far outside is moved onto its edge, as simulators do
NOTED = 0.05  # of the box's width: by more than this, it is counted as an intervention


@dataclass(frozen=True)
class Episode:
    """What came of one episode.

    Attributes:
        length: control steps executed.
        chunks: plans made; `evaluated` by mode.
        interventions: control steps that the gate changed or cut off, `gate` by rule.
        outcome: `stopped` by the gate or by a surprise, `crashed` by the simulator; `why` says more.
        held: control steps without a decided action; `late`: plans that came after the robot had run dry; `refused`: plans not let through.
        surprises, replans: comparisons above the threshold, and plans asked for because of one.
        flops: of its plans and checks.
        jump: how much commands change where one plan follows another: the mean over these borders of the largest change of a dimension, in half widths of the action box; None: no border, or no box.
        latency_ms_p50, latency_ms_p95, latency_ms_max: from an observation to a plan, as it was in this run (a batch waits together).
        events: what was done to it on purpose.
    """

    seed: int
    success: bool
    length: int
    chunks: int
    interventions: int
    outcome: Outcome = "failed"
    why: str | None = None
    gate: dict[str, int] = field(default_factory=dict)
    modes: dict[str, int] = field(default_factory=dict)
    held: int = 0
    late: int = 0
    refused: int = 0
    surprises: int = 0
    replans: int = 0
    flops: float = 0.0
    reward: float = 0.0  # the largest
    events: tuple[dict[str, Any], ...] = ()
    jump: float | None = field(default=None, compare=False)
    latency_ms_p50: float | None = field(default=None, compare=False)
    latency_ms_p95: float | None = field(default=None, compare=False)
    latency_ms_max: float | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "events", tuple(self.events))


class Watcher:
    """Sees what happens in a wave, and changes nothing.  Subclasses override what they need."""

    def began(self, row: int, instruction: str, frame: Frames, state: Floats) -> None:
        """A robot's episode began: what it is asked, and what was seen first (H, W, 3), (Ds,)."""

    def planned(self, session: Session, rows: Sequence[int], plan: Plan, sent: Floats, milliseconds: float) -> None:
        """A plan was made for `rows`: actions `sent` (B, A, Da), before the gate; `milliseconds` since the observation it rests on."""

    def placed(self, row: int, at: int) -> None:
        """The plan just made for a row is executed from its control step `at` on."""

    def ran(self, rows: Sequence[int], results: Sequence[StepResult]) -> None:
        """Stretches were executed in `rows`."""

    def acted(self, row: int, actions: Floats) -> None:
        """What a row was sent for the stretch that `ran` is told of next, (n, Da)."""


@dataclass(frozen=True)
class Driver:
    """A policy and how it is used.

    Attributes:
        replan: control steps executed of each plan: a whole block, or a smaller multiple of the frame stride.
        noise_seed: with an episode's seed, decides the noise its plans start from.
        scale: what surprise is measured in, where `check` asks for it.
        gate: what a robot may be sent; None: finite numbers, moved into the environment's action box.
        overlap: simulate one half of the robots while planning for the other.
    """

    policy: Policy
    mode: str
    solver: SamplingConfig
    replan: int
    noise_seed: int
    execution: ExecutionConfig = ExecutionConfig()
    check: CheckConfig = CheckConfig()
    planner: PlannerConfig = PlannerConfig()
    disturbances: DisturbanceConfig = DisturbanceConfig()
    scale: SurpriseScale | None = None
    gate: GateConfig | None = None
    overlap: bool = False

    @property
    def loop(self) -> Loop:
        """How the executor is to make and use plans."""
        return Loop(self.mode, self.solver, self.replan, self.execution, self.check, self.planner, self.noise_seed)

    @property
    def stride(self) -> int:
        """Control steps between frames."""
        return self.policy.config.timeline.stride

    @property
    def imagines_aside(self) -> bool:
        """Whether it can be asked what follows from actions, beside the plans."""
        return self.policy.config.training.modes.get("forward", 0) > 0

    def executor(self, gate: Gate, watch: Callable[[Made], None], simulate: Simulate) -> Executor:
        """What makes the plans and uses them."""
        return Executor(self.policy, self.loop, gate, self.scale, watch, simulate)

    def drive(self, env: VectorEnv, seeds: Sequence[int], watchers: Sequence[Watcher] = (), goals: Mapping[int, Frames] | None = None) -> list[Episode]:
        """Drive one episode per seed, side by side, until all are over.

        Args:
            goals: pictures of the solved task (H, W, 3) by seed; what they are used for, `planner.goal` and `planner.score` say.

        Raises:
            ValueError: a plan that is not finite; names the mode, the control step and the seeds.
            EnvironmentCrash: an environment that cannot be run at all.
        """
        wave = _Wave(self, env, seeds, watchers, goals or {})
        halves = [wave.rows[: len(wave.rows) // 2], wave.rows[len(wave.rows) // 2 :]] if self.overlap and len(wave.rows) > 1 else [wave.rows]
        waiting: list[int] | None = None  # rows that are being simulated
        turn = 0
        while wave.running:
            mine = [row for row in halves[turn % len(halves)] if row in wave.running and row not in (waiting or [])]
            wave.decide(mine)
            stretches = wave.stretches(mine)
            if waiting is not None:
                wave.take(env.collect())
            waiting = mine
            wave.submit(stretches)
            if len(halves) == 1:
                wave.take(env.collect())
                waiting = None
            turn += 1
        return wave.episodes()


    def first_plan(self, env: VectorEnv, seed: int, goals: Mapping[int, Frames] | None = None) -> tuple[Floats, Floats, float]:
        """What would be sent first in an episode (n, Da), without delay; the whole plan (A, Da) and its milliseconds.  Nothing is executed.

        Raises:
            ValueError: as `drive`, or an environment that cannot begin.
        """
        plans: list[tuple[Floats, float]] = []

        class Keep(Watcher):
            def planned(self, session: Session, rows: Sequence[int], plan: Plan, sent: Floats, milliseconds: float) -> None:
                plans.append((sent[0], milliseconds))

        wave = _Wave(self, env, [seed], [Keep()], goals or {})
        if not wave.running:
            raise ValueError(wave.counts[0].why)
        wave.executor.decide([wave.running[0]])
        return wave.running[0].queue, *plans[0]


class _Wave:
    """The robots of one call of `drive`."""

    def __init__(self, driver: Driver, env: VectorEnv, seeds: Sequence[int], watchers: Sequence[Watcher], goals: Mapping[int, Frames]):
        self.driver, self.env, self.seeds, self.watchers = driver, env, seeds, watchers
        self.counts = [_Count() for _ in seeds]
        self._row_of: dict[int, int] = {}
        gate = Gate(driver.gate or box_gate(env.action_low, env.action_high), env.action_dim, env.control_hz)
        self.executor = driver.executor(gate, self._made, self._simulate)
        first = env.reset(seeds)
        self.running: dict[int, Robot] = {}
        for row, seed in enumerate(seeds):
            self.counts[row].events += first.events[row] if first.events else ()
            if row in first.crashed:
                self.counts[row].end("crashed", first.crashed[row])
                continue
            rest = None if first.rest is None else first.rest[row]
            instruction = first.instructions[row] if first.instructions else env.instruction
            late = extra_delay(driver.disturbances, seed, env.control_hz, env.max_steps)
            planner, picture = driver.planner, goals.get(seed)
            goal, target = (picture if wanted else None for wanted in (planner.goal != "language", planner.kind != "none" and planner.score == "goal"))
            told = "" if planner.goal == "image" else instruction
            robot = self.executor.begin(told, generator_seed(driver.noise_seed, seed), first.frames[row, 0], first.states[row], env.hold, rest, goal, target, late)
            self.running[row] = robot
            self._row_of[id(robot)] = row
            for watcher in watchers:
                watcher.began(row, instruction, first.frames[row, 0], first.states[row])
        self.robots = dict(self.running)
        self.rows = list(self.running)

    def decide(self, rows: Sequence[int]) -> None:
        """Plan where plans are due."""
        try:
            self.executor.decide([self.running[row] for row in rows])
        except ValueError as error:
            raise ValueError(f"mode {self.driver.mode!r}, episodes of seeds {[self.seeds[row] for row in rows]}: {error}") from error
        for row in rows:
            robot = self.running[row]
            if robot.stopped is not None:
                self.counts[row].end("stopped", robot.stopped)
                del self.running[row]

    def stretches(self, rows: Sequence[int]) -> dict[int, Floats]:
        """What each robot that still runs does next."""
        return {row: self.executor.stretch(self.running[row]) for row in rows if row in self.running}

    def submit(self, stretches: Mapping[int, Floats]) -> None:
        """Hand stretches to the simulators, those of one length together."""
        self._sent = getattr(self, "_sent", {}) | dict(stretches)
        for length in sorted({len(actions) for actions in stretches.values()}):
            rows = [row for row, actions in stretches.items() if len(actions) == length]
            self.env.submit(np.stack([stretches[row] for row in rows]), rows, self.driver.stride)

    def take(self, results: Mapping[int, StepResult]) -> None:
        """Note what came of the stretches."""
        rows = sorted(results)
        for watcher in self.watchers:
            for row in rows:
                watcher.acted(row, self._sent[row])
            watcher.ran(rows, [results[row] for row in rows])
        for row in rows:
            result, robot, count = results[row], self.running[row], self.counts[row]
            sent = self._sent.pop(row)[: len(result.states)]
            count.add(result)
            if result.crashed is not None:
                count.end("crashed", result.crashed)
            elif result.done:
                count.end("success" if result.success.any() else "failed", None)
            else:
                self.executor.saw(robot, result.frames, result.states, sent)
                continue
            del self.running[row]

    def episodes(self) -> list[Episode]:
        """What came of each, in the order of the seeds."""
        return [count.episode(int(seed), self.robots.get(row), ((self.env.action_high - self.env.action_low) / 2).astype(np.float32)) for row, (seed, count) in enumerate(zip(self.seeds, self.counts, strict=True))]

    def _simulate(self, sessions: Sequence[Session], actions_BNTd: Floats) -> Frames:
        rows = {id(robot.session): row for row, robot in self.running.items()}
        return self.env.foresee(actions_BNTd, [rows[id(session)] for session in sessions], self.driver.stride)

    def _made(self, made: Made) -> None:
        row = self._row_of[id(made.robot)]
        assert made.plan.actions is not None
        for watcher in self.watchers:
            watcher.planned(made.robot.session, [row], made.plan, made.plan.actions, made.milliseconds)
            watcher.placed(row, made.at)


@dataclass
class _Count:
    """An episode as it is counted."""

    length: int = 0
    reward: float = 0.0
    outcome: Outcome | None = None
    why: str | None = None
    events: tuple[Event, ...] = ()

    def add(self, result: StepResult) -> None:
        self.length += len(result.states)
        self.reward = max([self.reward, *(float(r) for r in result.rewards)])
        self.events += result.events

    def end(self, outcome: Outcome, why: str | None) -> None:
        self.outcome, self.why = outcome, why

    def episode(self, seed: int, robot: Robot | None, half: Floats) -> Episode:
        assert self.outcome is not None
        events = tuple({"kind": e.kind, "step": e.step, "size": e.size, "unit": e.unit, "lasts": e.lasts} for e in self.events)
        ended = {"outcome": self.outcome, "why": self.why, "reward": self.reward, "events": events}
        if robot is None:
            return Episode(seed, False, self.length, 0, 0, **ended)  # type: ignore[arg-type]
        t = robot.tally
        spread = {f"latency_ms_{name}": float(np.percentile(t.latency_ms, q)) if t.latency_ms else None for name, q in (("p50", 50), ("p95", 95), ("max", 100))}
        counted = {"held": t.held, "late": t.late, "refused": t.refused, "surprises": t.surprises, "replans": t.replans, "flops": t.flops, "jump": _mean_jump(t.jumps, half)}
        return Episode(seed, self.outcome == "success", self.length, t.plans, sum(t.gate.values()), gate=dict(t.gate), modes=dict(t.modes), **ended, **counted, **spread)  # type: ignore[arg-type]


def _mean_jump(jumps: Sequence[Floats], half: Floats) -> float | None:
    inside = np.isfinite(half)
    return float((np.stack(jumps) / half)[:, inside].max(axis=1).mean()) if jumps and inside.any() else None


def box_gate(low: Floats, high: Floats) -> GateConfig:
    """Limits of an environment's action box: what lies outside is moved onto its edge, as simulators do, and counted."""
    box = GroupLimits("all", 0, len(low), low=tuple(float(x) for x in low), high=tuple(float(x) for x in high))
    return GateConfig((box,), slack=CLIPPING, quiet=NOTED)


def generator_seed(*parts: int) -> int:
    """One seed from several numbers, unlike that of any others in practice."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)


def in_waves(seeds: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """Seeds, `size` at a time."""
    return (seeds[i : i + size] for i in range(0, len(seeds), size))
