"""`wam bench loop`: what a closed loop spends its time on, with a trained policy in a simulator.

    stages       encode | prefill | commit | denoise (by mode and solver steps) | post          one robot, full memory, warm
    plans        of 1, 4 and 16 robots that came at different times, in shared forward passes against one after the other
    episodes     the same seeds side by side, and one by one: episodes a minute, where the time goes, and whether all end alike

Where an episode's time goes: `simulate` and `render` are what the world needs, in as many processes as there are; `plan` is the policy's,
and all bookkeeping; `wait` is how long the loop stood still for the worlds.  Side by side the worlds run at once, and plans share passes;
what both sides need of the same processors is what keeps the ratio from being larger.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from wam.config import RolloutConfig
from wam.evaluation.bench.report import Output, Report, deliver, facts
from wam.evaluation.bench.rows import Comparison, Count, Row, Stage
from wam.evaluation.bench.timing import Times, alternate, clock
from wam.evaluation.episodes import Episode
from wam.evaluation.rollout import _open_environment as open_environment
from wam.evaluation.rollout import check_environment, driver_of
from wam.evaluation.vector import Observations, VectorEnv
from wam.inference.batch import Call, Commit, Observe, Think, run
from wam.inference.budget import Spread, stage_times, with_steps
from wam.inference.compute import plan_flops
from wam.inference.session import Session
from wam.pretrained import Policy, from_pretrained
from wam.timeline import FIRST_BLOCK, Kind

FASTER = {"cpu": 1.7, "cuda": 6.0}  # episodes a minute side by side, at least this many times those one by one
ROBOTS = (1, 4, 16)


@dataclass(frozen=True, kw_only=True)
class LoopOptions(Output):
    """As the command line says.

    Attributes:
        modes: default: those that the checkpoint was trained for and that plan actions.
        robots: side by side, and episodes.
        workers: processes of simulators.
        steps: most control steps of an episode.
    """

    checkpoint: Path
    env: str = "metaworld/drawer-open-v3"
    modes: tuple[str, ...] = ()
    device: str = "cpu"
    robots: int = 16
    workers: int = 2
    steps: int = 500
    repeats: int = 20
    quick: bool = False


def bench_loop(options: LoopOptions) -> Report:
    """Measure, print, and write what is asked for.

    Raises:
        ValueError, FileNotFoundError: a checkpoint, a mode or an environment that there is not, or that do not fit; before anything is measured.
        BenchError: with `check`, a limit that does not hold; after everything was printed and written.
    """
    if options.quick:
        options = replace(options, robots=2, repeats=2, steps=min(options.steps, 40))
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        policy = from_pretrained(options.checkpoint, options.device)
        modes = options.modes or _own_modes(policy)
        rows = [*_stages(policy, modes, options), *_plans(policy, modes[0], options), *_episodes(policy, modes[0], options)]
        described = facts(options.command, policy.model.device, policy.model.backbone.dtype, options.repeats) | {"clock": "wall time"}
        report = Report(tuple(rows), described)
    finally:
        torch.set_num_threads(before)
    deliver(report, options)
    return report


def _own_modes(policy: Policy) -> tuple[str, ...]:
    relations = policy.model.relations
    return tuple(name for name in policy.config.training.modes if name != "inverse" and Kind.A in relations.mode(name).denoised)


# ------------------------------------------------------------------------------------------------ stages


def _stages(policy: Policy, modes: Sequence[str], options: LoopOptions) -> list[Row]:
    """Every stage of a plan, one robot at a time."""
    times = stage_times(policy, modes, policy.config.sampling, repeats=options.repeats)
    out: list[Row] = [_stage(name, "a block, one robot", spread) for name, spread in times.observing.items()]
    for (mode, steps), plan in times.plans.items():
        at, each, how = f"{mode}, solver steps: {steps}", times.per_step(mode), with_steps(policy.config.sampling, steps)
        out.append(_stage("denoise", at, plan.denoise, "" if each is None else f"{each:.2f} ms more a step", round(plan_flops(policy, mode, how))))
        out.append(_stage("observation to actions", at, plan.whole))
    return out


def _stage(name: str, setting: str, spread: Spread, note: str = "", flops: int = 0) -> Stage:
    return Stage(name, setting, Times((spread.median,)), flops, note=", ".join(part for part in (f"p95 {spread.p95:.3g}", note) if part), facts={"p95_ms": spread.p95})


# ------------------------------------------------------------------------------------------------ plans of several robots


def _plans(policy: Policy, mode: str, options: LoopOptions) -> list[Row]:
    """Robots that came at different times, in shared passes against one after the other; both sides see and do the same."""
    out: list[Row] = []
    for robots in sorted({n for n in ROBOTS if n <= options.robots} | {options.robots}):
        sides = {name: _Robots.of(policy, mode, robots) for name in ("together", "apart")}
        taken = alternate({name: getattr(side, name) for name, side in sides.items()}, options.repeats, policy.model.device)
        together, apart = (replace(taken[name], cpu=()) for name in sides)
        at = f"{mode}, robots: {robots}"
        out.append(_stage("observe and plan", at, Spread.of(together.wall), f"{together.median / robots:.3g} ms a robot"))
        if robots > 1:
            out.append(Comparison("observe and plan", at, "together", "one by one", together, apart, 1.0))
    return out


@dataclass
class _Robots:
    """Sessions of their own, each at another block, that see noise."""

    mode: str
    sessions: list[Session]
    rng: np.random.Generator
    actions: list[np.ndarray | None]

    @classmethod
    def of(cls, policy: Policy, mode: str, robots: int) -> _Robots:
        embodiment = policy.config.data.embodiment
        first = Session(policy, ["measure how long a plan takes"], embodiment, [0])
        rest = [Session(policy, ["measure how long a plan takes"], embodiment, [seed], prepared=first.instructions) for seed in range(1, robots)]
        out = cls(mode, [first, *rest], np.random.default_rng(0), [None] * robots)
        for number, session in enumerate(out.sessions):
            for _ in range(1 + policy.config.timeline.history + number % 2):
                out._round([number], [session])
        return out

    def together(self) -> None:
        """One round of every robot in shared passes."""
        self._round(list(range(len(self.sessions))), self.sessions)

    def apart(self) -> None:
        """One round, robot by robot."""
        for number, session in enumerate(self.sessions):
            self._round([number], [session])

    def _round(self, numbers: list[int], sessions: list[Session]) -> None:
        plans = run(sessions, [self._calls(number, session) for number, session in zip(numbers, sessions, strict=True)])
        for number, plan in zip(numbers, plans, strict=True):
            assert plan is not None
            self.actions[number] = plan.actions

    def _calls(self, number: int, session: Session) -> list[Call]:
        done = self.actions[number]
        frames = self.rng.integers(0, 255, (1, session.frames_due, *session.config.codec.image_size, 3), dtype=np.uint8)
        state = self.rng.normal(size=(1, session.dims.raw_state_dim)).astype(np.float32)
        acted: list[Call] = [] if done is None or session.block == FIRST_BLOCK else [Commit(done)]
        return [*acted, Observe(frames, state), Think(self.mode, session.config.sampling)]


# ------------------------------------------------------------------------------------------------ episodes


@dataclass
class _Clocked:
    """A `VectorEnv` that notes how long its callers stood still in it; everything else is its own."""

    env: VectorEnv
    spent: dict[str, float] = field(default_factory=lambda: {"begin": 0.0, "wait": 0.0})

    def __getattr__(self, name: str) -> Any:
        return getattr(self.env, name)

    def reset(self, seeds: Sequence[int], rows: Sequence[int] | None = None) -> Observations:
        """See `VectorEnv.reset`."""
        start = time.perf_counter()
        out = self.env.reset(seeds) if rows is None else self.env.reset(seeds, rows)
        self.spent["begin"] += time.perf_counter() - start
        return out

    def collect(self, rows: Sequence[int] | None = None) -> dict[int, Any]:
        """See `VectorEnv.collect`."""
        start = time.perf_counter()
        out = self.env.collect(rows)
        self.spent["wait"] += time.perf_counter() - start
        return out


@dataclass(frozen=True)
class Driven:
    """Episodes that were driven one way.

    Attributes:
        seconds: in all; `spent` of these in the simulators: `begin` and `wait`.
    """

    episodes: list[Episode]
    seconds: float
    spent: dict[str, float]

    @property
    def steps(self) -> int:
        """Control steps."""
        return sum(episode.length for episode in self.episodes)

    def note(self, world: tuple[float, float], stride: int) -> str:
        """Episodes a minute, and where the time went; `world` is milliseconds of simulating a control step and of rendering a frame."""
        plan = self.seconds - sum(self.spent.values())
        parts = {"plan": plan} | self.spent
        shares = ", ".join(f"{name} {100 * spent / self.seconds:.0f}%" for name, spent in parts.items())
        simulated, rendered = self.steps * world[0] / 1e3, self.steps / stride * world[1] / 1e3
        return f"{60 * len(self.episodes) / self.seconds:.1f} episodes a minute; {shares}; the worlds' own work: simulate {simulated:.1f} s, render {rendered:.1f} s of {self.seconds:.1f} s"


class Alike(Count):
    """How many of a number of things are the same both ways: all must be."""

    @property
    def holds(self) -> bool:
        """Whether all are."""
        return self.times == self.limit


def _episodes(policy: Policy, mode: str, options: LoopOptions) -> list[Row]:
    """The same seeds one by one, side by side, and side by side with half of the worlds running while the others are planned for."""
    stride, n = policy.config.timeline.stride, options.robots
    config = RolloutConfig(env=options.env, modes=(mode,), episodes=n, batch=n, workers=options.workers, max_steps=options.steps)
    seeds = range(config.seed, config.seed + n)
    one = replace(config, batch=1, workers=1)
    with open_environment(policy, one) as env:
        check_environment(policy, env)
        world = _world(env, seeds[0], stride, options)
        driven = {"one by one": _drive(policy, mode, one, env, [[seed] for seed in seeds])}
    with open_environment(policy, config) as env:
        driven["side by side"] = _drive(policy, mode, config, env, [seeds])
        driven["side by side, in halves"] = _drive(policy, mode, replace(config, overlap=True), env, [seeds])
    out: list[Row] = [
        Stage("simulate", f"{options.env}, a control step", Times((world[0],))),
        Stage("render", f"{options.env}, a frame of {policy.config.codec.image_size[0]}", Times((world[1],))),
    ]
    single, at = driven["one by one"], f"{mode}, episodes: {n}"
    for way, each in driven.items():
        told = {"episodes_per_minute": 60 * n / each.seconds, "seconds": each.seconds, "spent_s": each.spent, "successes": sum(e.success for e in each.episodes)}
        out.append(Stage("episodes", f"{at}, {way}", _per_episode(each), note=each.note(world, stride), facts=told))
        if each is not single:
            limit = 1 / FASTER[policy.model.device.type] if way == "side by side" else 1.0  # halves are for where planning has a processor of its own
            out.append(Comparison("episodes", at, way, "one by one", _per_episode(each), _per_episode(single), round(limit, 3)))
            out.append(Alike("episodes that end alike", f"{at}, {way}", sum(map(_alike, each.episodes, single.episodes)), n))
    return out


def _alike(a: Episode, b: Episode) -> bool:
    return (a.seed, a.outcome, a.length, a.chunks) == (b.seed, b.outcome, b.length, b.chunks)


def _per_episode(driven: Driven) -> Times:
    return Times((1e3 * driven.seconds / len(driven.episodes),))


def _drive(policy: Policy, mode: str, config: RolloutConfig, env: VectorEnv, waves: Sequence[Sequence[int]]) -> Driven:
    """Drive waves of episodes, one after the other; the worlds were made before, by an episode that does not count."""
    driver, clocked = driver_of(policy, mode, config), _Clocked(env)
    env.reset(list(waves[0]))
    start = time.perf_counter()
    episodes = [episode for seeds in waves for episode in driver.drive(cast(VectorEnv, clocked), list(seeds))]
    return Driven(episodes, time.perf_counter() - start, clocked.spent)


def _world(env: VectorEnv, seed: int, stride: int, options: LoopOptions) -> tuple[float, float]:
    """Milliseconds that a world takes for a control step, and to draw a frame: the same stretch with its frames and without any."""
    steps = min(64, options.steps - 1) // stride * stride
    actions, cpu = np.zeros((1, steps, env.action_dim), np.float32), torch.device("cpu")
    taken: dict[int, list[float]] = {stride: [], steps + 1: []}
    for _ in range(max(3, options.repeats // 2)):
        for between, walls in taken.items():
            env.reset([seed])

            def stretch(between: int = between) -> None:
                env.submit(actions, [0], between)
                env.collect()

            walls.append(clock(stretch, cpu)[0])
    seen, blind = (float(np.median(walls)) for walls in taken.values())
    return blind / steps, max(0.0, seen - blind) / (steps / stride)
