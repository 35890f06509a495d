"""Closed-loop evaluation: one checkpoint, one environment, several modes, the same episodes for each.

    checks  ->  for each mode:  waves of `batch` episodes  ->  latency at batch 1  ->  rollout.json, videos/

What a reader needs to believe a success rate is in the file beside it: seeds, counts, intervals, versions, settings, and the hash of the
weights.  The file is written after every wave, so an interrupted run goes on; a file made with other weights or settings is never mixed
with this run's.  Latency is measured apart, one robot at a time, because that is what a robot would feel: a share of a batch is not.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from wam.config import CheckConfig, ExecutionConfig, RolloutConfig
from wam.data.recording import Recording
from wam.data.views import Canvas
from wam.evaluation.agreement import Agreement, summarize_agreement
from wam.evaluation.environments import Floats, Frames, StepResult, off_benchmark, parse_name
from wam.evaluation.episodes import Driver, Episode, Watcher, in_waves
from wam.evaluation.film import Film
from wam.evaluation.fit import camera_settings, disagreement
from wam.evaluation.goals import GoalImages
from wam.evaluation.record import Record, open_recording
from wam.evaluation.recovery import recovery
from wam.evaluation.results import RESULTS, identity, is_complete, now, open_results, summarize
from wam.evaluation.seeds import SPLITS, TEST
from wam.evaluation.seen import look, seen_through
from wam.evaluation.statistics import percentile
from wam.evaluation.vector import VectorEnv
from wam.files import write_json_atomic
from wam.inference.budget import choose
from wam.inference.check import SurpriseScale, load_scale
from wam.inference.executor import check_times
from wam.inference.gate import GateConfig, read_gate
from wam.inference.robot import Loop
from wam.inference.session import Plan, Session
from wam.pretrained import Policy, load_policy
from wam.relations import MODES, untrained_mode_warning
from wam.timeline import Kind

log = logging.getLogger(__name__)

NEEDS_MORE = frozenset({"forward", "inverse"})  # modes that are asked about given actions or a given future
LATENCY_CHUNKS = 20  # measured at least, after each episode's first
LATENCY_EPISODES = 20  # driven at most for them


def rollout(checkpoint: Path | None, config: RolloutConfig, output: Path) -> dict[str, Any]:
    """Drive episodes in every mode of `config`; go on where an earlier call was interrupted.

    Args:
        checkpoint: directory that `wam train` wrote; None: plans come from `config.server`.
        config: what to drive, and how.
        output: gets `rollout.json` and `videos/`.

    Returns:
        The contents of `rollout.json`.

    Raises:
        FileNotFoundError: no checkpoint there.
        ValueError: settings, environment and checkpoint do not fit, results of another run in `output`, or a plan that is not finite.
        EnvironmentCrash: a simulator failed, which says nothing about the policy.
        KeyboardInterrupt: Ctrl-C; finished waves are kept, and the message says so.
    """
    if config.server is not None:
        from wam.evaluation.through_server import rollout_through_server

        return rollout_through_server(config, output)
    if checkpoint is None:
        raise ValueError("neither a checkpoint nor a server is given; name a checkpoint's directory, or rollout.server=ws://host:port")
    policy = load_policy(checkpoint, config.runtime)
    check_settings(policy, config)
    path = Path(output) / RESULTS
    config, choice = within_budget(policy, config, path)
    results = open_results(path, identity(Path(checkpoint), policy, config, replan_of(policy, config)))
    todo = [mode for mode in config.modes if not is_complete(results["modes"].get(mode), config)]
    if not todo and results["finished"]:
        log.info("%s already holds these episodes, with the same weights and settings; nothing to do", path)
        return results
    results |= {"finished": None} | ({} if choice is None else {"budget": choice})
    try:
        with _open_environment(policy, config) as env, _goals_of(policy, config) as goals:
            check_environment(policy, env)
            recording = None if config.record is None else open_recording(Path(config.record), policy, env)
            scale = load_scale(Path(checkpoint)) if config.check.source != "none" else None
            run = Run(config, env, lambda mode: driver_of(policy, mode, config, scale), recording, goals, results, path)
            for mode in todo:
                drive_mode(run, mode)
            if recording is not None:
                recording.assemble({"versions": results["versions"]})
    except KeyboardInterrupt:
        raise KeyboardInterrupt(kept_of(results, path)) from None
    results["finished"] = now()
    write_json_atomic(path, results)
    return results


def kept_of(results: Mapping[str, Any], path: Path) -> str:
    """What a person is told who interrupts."""
    kept = sum(len(mode["episode_results"]) for mode in results["modes"].values())
    return f"interrupted; {kept} finished episodes are kept in {path}; the same command goes on from there"


def within_budget(policy: Policy, config: RolloutConfig, path: Path) -> tuple[RolloutConfig, dict[str, Any] | None]:
    """The settings with the mode and solver steps that a latency budget leaves, and what was chosen; an interrupted run keeps its choice.

    Raises:
        ValueError: as `wam.inference.budget.choose`.
    """
    budget = config.execution.budget_ms
    if budget is None:
        return config, None
    choice = json.loads(path.read_text()).get("budget") if path.is_file() else None
    if choice is None or choice["budget_ms"] != budget or choice["modes"] != list(config.modes):
        found = choose(policy, config.modes, budget, policy.config.sampling.with_steps(config.steps))
        choice = {"budget_ms": budget, "modes": list(config.modes), "mode": found.mode, "steps": found.steps, "told": found.told}
    log.info("%s", choice["told"])
    return replace(config, modes=(choice["mode"],), steps=choice["steps"]), choice


@dataclass(frozen=True)
class Run:
    """What the modes of one rollout share.

    Attributes:
        driver: of a mode.
        goals: pictures of the solved task by seed, as the policy sees them, where they are asked for.
    """

    config: RolloutConfig
    env: VectorEnv
    driver: Callable[[str], Driver]
    recording: Recording | None
    goals: Callable[[Sequence[int]], dict[int, Frames]]
    results: dict[str, Any]
    path: Path


def drive_mode(run: Run, mode: str) -> None:
    """Drive what is missing of one mode, wave by wave, then measure its latency."""
    config, driver = run.config, run.driver(mode)
    done = [Episode(**entry) for entry in run.results["modes"].get(mode, {}).get("episode_results", [])]
    known = {episode.seed for episode in done}
    seeds = [seed for seed in range(config.seed, config.seed + config.episodes) if seed not in known]
    with tqdm(total=config.episodes, initial=len(done), desc=mode, unit="episode", smoothing=0.1) as progress:
        for wave in in_waves(seeds, 1 if config.execution.realtime else config.batch):
            done += _drive_wave(run, driver, wave, done, progress)
    latency = measure_latency(driver, run.env, config.seed + config.episodes, lambda seed: run.goals([seed]))
    run.results["modes"][mode] |= latency
    write_json_atomic(run.path, run.results)
    r = run.results["modes"][mode]
    rate = f"{100 * r['wilson_low']:.1f}-{100 * r['wilson_high']:.1f} %"
    log.info("%s: %d/%d (%s), %s ms a plan (p50)", mode, r["successes"], r["episodes"], rate, "?" if r["latency_ms_p50"] is None else f"{r['latency_ms_p50']:.0f}")


def _drive_wave(run: Run, driver: Driver, wave: Sequence[int], done: Sequence[Episode], progress: Any) -> list[Episode]:
    """Drive some seeds side by side, and write what came of them."""
    config, mode, hz = run.config, driver.mode, run.env.control_hz
    filmed = range(config.seed, config.seed + min(config.videos, config.episodes))
    film = Film(driver, wave, [row for row, seed in enumerate(wave) if seed in filmed], hz)
    record = None if run.recording is None else Record(run.recording, wave, config.env, mode, run.results["checkpoint_sha256"])
    agreement = Agreement(driver, wave) if config.agreement else None
    begun = time.perf_counter()
    episodes = driver.drive(run.env, wave, [_Progress(progress), film, *(w for w in (record, agreement) if w is not None)], run.goals(wave))
    film.save(run.path.parent / "videos", episodes, strip_of=config.seed)
    if record is not None:
        record.save(episodes)
    before = run.results["modes"].get(mode, {})
    row = summarize([*done, *episodes], hz)
    row["seconds"] = round(before.get("seconds", 0.0) + time.perf_counter() - begun, 2)
    if config.disturbances.kinds:
        row["recovery"] = recovery(row["episode_results"], hz, _undisturbed(run, mode, {episode["seed"] for episode in row["episode_results"]}))
    if agreement is not None:
        row["agreement"] = summarize_agreement([*before.get("agreement", {}).get("episodes", []), *agreement.episodes()], row["episode_results"])
    run.results["modes"][mode] = row
    write_json_atomic(run.path, run.results)
    return episodes


def _undisturbed(run: Run, mode: str, seeds: set[int]) -> list[dict[str, Any]] | None:
    """The same episodes without disturbances, from another rollout of the same weights.

    Raises:
        FileNotFoundError, ValueError: no such results, or of other weights or seeds.
    """
    path = run.config.disturbances.undisturbed
    if path is None:
        return None
    if not Path(path).is_file():
        raise FileNotFoundError(f"disturbances.undisturbed is {path}, and there is no such file; drive the same seeds without --disturb first")
    found = json.loads(Path(path).read_text())
    known = {name: found.get(name) == run.results[name] for name in ("env", "checkpoint_sha256", "replan", "sampling", "max_steps")}
    if not all(known.values()) or mode not in found["modes"]:
        differs = [name for name, same in known.items() if not same] or [f"mode {mode}"]
        raise ValueError(f"disturbances.undisturbed is {path}, which differs in {', '.join(differs)}; drive the same policy on the same seeds without --disturb")
    return [episode for episode in found["modes"][mode]["episode_results"] if episode["seed"] in seeds]


def driver_of(policy: Policy, mode: str, config: RolloutConfig, scale: SurpriseScale | None = None) -> Driver:
    """The driver that a rollout's settings ask for."""
    sampling = policy.config.sampling.with_steps(config.steps)
    loop = {"execution": config.execution, "check": config.check, "planner": config.planner, "disturbances": config.disturbances}
    return Driver(policy, mode, sampling, replan_of(policy, config), config.seed, scale=scale, gate=_gate(policy, config), overlap=config.overlap, **loop)  # type: ignore[arg-type]


@contextmanager
def _goals_of(policy: Policy, config: RolloutConfig) -> Iterator[Callable[[Sequence[int]], dict[int, Frames]]]:
    """Goal images by seed, none where nothing asks for them; their environment is closed at the end."""
    images, canvas = _goal_images(policy, config), Canvas.of(policy.config.data, policy.config.codec.image_size)
    try:
        yield lambda seeds: {} if images is None else {seed: look(canvas, picture) for seed, picture in zip(seeds, images(seeds), strict=True)}
    finally:
        if images is not None:
            images.close()


def _goal_images(policy: Policy, config: RolloutConfig) -> GoalImages | None:
    planner = config.planner
    if planner.goal == "language" and (planner.kind == "none" or planner.score != "goal"):
        return None
    return GoalImages(config.env, **camera_settings(policy))


def _gate(policy: Policy, config: RolloutConfig) -> GateConfig | None:
    if config.gate is None:
        return None
    robot = policy.config.model.embodiment(policy.config.data.embodiment)
    return read_gate(Path(config.gate), [(group.name, group.size) for group in robot.action_groups], robot.raw_action_dim)


class _Progress(Watcher):
    """Counts episodes as they end."""

    def __init__(self, bar: Any) -> None:
        self._bar = bar

    def ran(self, rows: Sequence[int], results: Sequence[StepResult]) -> None:
        self._bar.update(sum(result.done for result in results))


def dry_run(checkpoint: Path | None, config: RolloutConfig) -> str:
    """What each mode would send first in the first episode: the environment is reset and looked at, and nothing is executed.

    Raises:
        ValueError, FileNotFoundError, EnvironmentCrash: as `rollout`.
    """
    if config.server is not None:
        from wam.evaluation.through_server import dry_run_through_server

        return dry_run_through_server(config)
    if checkpoint is None:
        raise ValueError("neither a checkpoint nor a server is given; name a checkpoint's directory, or rollout.server=ws://host:port")
    policy = load_policy(checkpoint, config.runtime)
    check_settings(policy, config)
    lines: list[str] = []
    config = replace(config, batch=1, execution=ExecutionConfig(), check=CheckConfig())
    with _open_environment(policy, config) as env, _goals_of(policy, config) as goals:
        check_environment(policy, env)
        for mode in config.modes:
            lines += first_plan(driver_of(policy, mode, config), env, config.seed, goals([config.seed]))
    return "\n".join(lines)


def first_plan(driver: Driver, env: VectorEnv, seed: int, goals: Mapping[int, Frames] | None = None) -> list[str]:
    """The lines of a dry run."""
    actions, plan, milliseconds = driver.first_plan(env, seed, goals)
    told = f"{driver.mode}, seed {seed}, {milliseconds:.0f} ms: {len(actions)} of {len(plan)} actions would pass the gate; nothing was sent"
    return [told, *(f"  {i:3d}  {np.array2string(action, precision=4, sign=' ', max_line_width=200)}" for i, action in enumerate(actions))]


# ------------------------------------------------------------------------------------------------ checks


def replan_of(policy: Policy, config: RolloutConfig) -> int:
    """Control steps executed of each plan."""
    return policy.config.timeline.actions_per_block if config.replan is None else config.replan


def check_settings(policy: Policy, config: RolloutConfig) -> None:
    """Check what can be checked before a simulator is started; warn of what makes a result mean less.

    Raises:
        ValueError: an unknown mode, one that plans no actions or that the checkpoint's table leaks in, or a replan interval that does not fit the checkpoint's timeline.
    """
    for name in config.modes:
        mode = policy.model.relations.mode(name)
        if Kind.A not in mode.predicts or name in NEEDS_MORE:
            able = ", ".join(n for n, m in MODES.items() if Kind.A in m.predicts and n not in NEEDS_MORE)
            raise ValueError(f"mode {name!r} ({mode.about}) does not plan actions from what was observed, so it cannot drive; modes that can: {able}")
        warning = untrained_mode_warning(policy.config, name)
        if warning:
            log.warning("%s", warning)
    for name in config.modes:
        check_times(policy, Loop(name, policy.config.sampling, replan_of(policy, config), config.execution, config.check, config.planner))
    if config.execution.time == "asynchronous" and policy.config.noise.prefix == 0:
        log.warning("execution.time is 'asynchronous', but this checkpoint never saw decided actions in its plans (noise.prefix is 0) and may not go on from them; use guided, or train with noise.prefix")
    _warn_of_seeds(policy, config)


def _warn_of_seeds(policy: Policy, config: RolloutConfig) -> None:
    seeds = range(config.seed, config.seed + config.episodes)
    reused = sorted(set(seeds) & demonstration_seeds(policy))
    if reused:
        log.warning("%d of the %d seeds were demonstrations this checkpoint was trained on (first: %s); use --seed %d", len(reused), len(seeds), reused[:5], TEST.start)
        return
    suite, task, _ = parse_name(config.env)
    if suite.benchmark(task) is not None:  # it has initial states of its own
        other = off_benchmark(config.env, config.seed, config.episodes, config.max_steps)
        if other:
            log.warning("%s", other)
        return
    if seeds[0] not in TEST or seeds[-1] not in TEST:
        overlapping = [name for name, split in SPLITS.items() if name != "test" and seeds[0] < split.stop and seeds[-1] >= split.start]
        overlap = f"overlap the {' and '.join(overlapping)} seeds" if overlapping else "lie outside every range"
        log.warning("seeds %d..%d %s; report results on test seeds, %d..%d", seeds[0], seeds[-1], overlap, TEST.start, TEST.stop - 1)


def demonstration_seeds(policy: Policy) -> set[int]:
    """Seeds of the episodes in the training data, as far as its datasets say."""
    source = policy.meta.get("source") or {}
    recorded = [(part.get("recorded") or {}).get("seeds") or {} for part in source.get("mixture") or [source]]
    return {int(seed) for seeds in recorded for task in seeds.values() for seed in task.get("accepted", [])}


def _open_environment(policy: Policy, config: RolloutConfig) -> VectorEnv:
    """The environment seen through the cameras and at the size the policy was trained with."""
    canvas = Canvas.of(policy.config.data, policy.config.codec.image_size)
    rows = 1 if config.execution.realtime else min(config.batch, config.episodes)
    settings = {"max_steps": config.max_steps, "disturbances": config.disturbances, **camera_settings(policy)}
    return seen_through(canvas, VectorEnv(config.env, rows, config.workers, **settings))


def check_environment(policy: Policy, env: VectorEnv) -> None:
    """Check that an environment is the robot the policy was trained for.

    Raises:
        ValueError: cameras, sizes of states, actions or images, or control rates, that differ; with a table of both sides.
    """
    differs = disagreement(policy, env)
    if differs:
        raise ValueError(differs)
    tasks = policy.meta.get("tasks")
    if tasks and env.instruction not in tasks:
        log.warning("%s asks for %r, but the checkpoint was trained on: %s", env.name, env.instruction, "; ".join(sorted(tasks)))


# ------------------------------------------------------------------------------------------------ latency


class _Stopwatch(Watcher):
    """Time of each plan but an episode's first, which has no history and meets cold caches."""

    def __init__(self) -> None:
        self.totals: list[float] = []
        self.stages: list[dict[str, float]] = []
        self._episode: Session | None = None

    def planned(self, session: Session, rows: Sequence[int], plan: Plan, sent: Floats, milliseconds: float) -> None:
        if session is self._episode:
            self.totals.append(milliseconds)
            self.stages.append(plan.timings)
        self._episode = session


def measure_latency(driver: Driver, env: VectorEnv, seed: int, goals: Callable[[int], Mapping[int, Frames]] = lambda seed: {}) -> dict[str, Any]:
    """From an observation to actions that may be sent, for one robot: median, 95th percentile and longest, whole and by stage.

    Drives episodes from `seed` on, which are not scored, one at a time, until enough plans are measured.
    """
    watch = _Stopwatch()
    for episode in range(LATENCY_EPISODES):
        if len(watch.totals) >= LATENCY_CHUNKS:
            break
        driver.drive(env, [seed + episode], [watch], goals(seed + episode))
    stages = sorted({stage for timings in watch.stages for stage in timings})

    def spread(values: list[float]) -> dict[str, float | None]:
        return {name: percentile(values, q) if values else None for name, q in (("p50", 50), ("p95", 95), ("max", 100))}

    whole = spread(watch.totals)
    return {
        "latency_ms_p50": whole["p50"],
        "latency_ms_p95": whole["p95"],
        "latency_ms_max": whole["max"],
        "latency_ms": {stage: spread([timings.get(stage, 0.0) for timings in watch.stages]) for stage in stages},
        "latency_chunks": len(watch.totals),
        "latency_batch": 1,
    }
