"""Rows that put a success rate into proportion: the same environment and seeds, without a model.

    expert       the task's scripted expert: what is possible
    hold_still   the zero action: what happens by itself (gripper commands of zero leave its opening as it is)
    random       uniform in the action box: what happens by chance

A policy that is no better than holding still has learned nothing, and one that is compared where the expert fails is judged on episodes
that may have no solution.  Nothing is drawn while these run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from wam.evaluation.environments import Environment, Floats, make_env
from wam.evaluation.statistics import wilson
from wam.evaluation.workers import Worker, WorkerError, Workers

EXPERT, HOLD_STILL, RANDOM = "expert", "hold_still", "random"
BASELINES = (EXPERT, HOLD_STILL, RANDOM)
NEVER = 2  # frame stride of a stretch of one step: no frame is due


def run_baselines(env_name: str, episodes: int, seed: int, workers: int = 2, max_steps: int = 500) -> dict[str, dict[str, Any]]:
    """Drive each baseline through the same episodes.

    Args:
        env_name: e.g. `metaworld/drawer-open-v3`.
        episodes: of each baseline, with seeds `seed`, `seed + 1`, ...
        seed: first seed.
        workers: simulators side by side.
        max_steps: control steps before an episode counts as failed.

    Returns:
        Baseline -> `successes`, `episodes`, `wilson_low`, `wilson_high`.  An environment without an expert has no such row, and says so.

    Raises:
        ValueError, ImportError, RenderError: as `make_env`.
        RuntimeError: a simulator crashed.
    """
    if episodes < 1:
        raise ValueError(f"episodes is {episodes}; it must be at least 1")
    with Workers(min(workers, episodes), _handler, (env_name, max_steps)) as pool:
        names = _ask(pool[0], env_name, None)
        if EXPERT not in names:
            tqdm.write(f"{env_name} has no scripted expert; its row is left out")
        jobs = [(name, seed + i) for name in names for i in range(episodes)]
        successes = _work_off(pool, env_name, jobs)
    return {name: _row(successes[name], episodes) for name in names}


def play(env: Environment, name: str, seed: int) -> bool:
    """Drive one episode with a baseline, without drawing; returns whether it succeeded."""
    env.reset(seed)
    act = _actor(env, name, seed)
    while True:
        result = env.run(act()[None], NEVER)
        if result.done:
            return bool(result.success.any())


def available(env: Environment) -> list[str]:
    """The baselines an environment can play."""
    return [name for name in BASELINES if name != EXPERT or hasattr(env, "expert_action")]


def _actor(env: Environment, name: str, seed: int) -> Callable[[], Floats]:
    if name == EXPERT:
        expert: Callable[[], Floats] = env.expert_action  # type: ignore[attr-defined]  # an extra of some environments
        return expert
    if name == HOLD_STILL:
        still = np.clip(np.zeros(env.action_dim, np.float32), env.action_low, env.action_high)
        return lambda: still
    generator = np.random.default_rng(seed)
    return lambda: generator.uniform(env.action_low, env.action_high).astype(np.float32)


def _row(successes: int, episodes: int) -> dict[str, Any]:
    low, high = wilson(successes, episodes)
    return {"successes": successes, "episodes": episodes, "wilson_low": low, "wilson_high": high}


# ------------------------------------------------------------------------------------------------ workers


def _handler(env_name: str, max_steps: int) -> Callable[[tuple[str, int] | None], Any]:
    """Inside a worker: one environment; asked for nothing, say what it can play."""
    env = make_env(env_name, max_steps=max_steps)
    return lambda job: available(env) if job is None else play(env, *job)


def _ask(worker: Worker, env_name: str, job: tuple[str, int] | None) -> Any:
    try:
        worker.send(job)
        return worker.receive()
    except WorkerError as failure:
        _reraise(failure, env_name, job)


def _work_off(pool: Workers, env_name: str, jobs: Sequence[tuple[str, int]]) -> dict[str, int]:
    """Successes of each baseline; a worker that is done takes the next job."""
    waiting, busy = list(reversed(jobs)), dict[Worker, tuple[str, int]]()
    idle = [pool[i] for i in range(len(pool))]
    successes = dict.fromkeys((name for name, _ in jobs), 0)
    with tqdm(total=len(jobs), unit="episode", desc="baselines") as progress:
        while waiting or busy:
            while idle and waiting:
                worker = idle.pop()
                busy[worker] = waiting.pop()
                worker.send(busy[worker])
            for worker in pool.ready(list(busy)):
                job = busy.pop(worker)
                try:
                    successes[job[0]] += worker.receive()
                except WorkerError as failure:
                    _reraise(failure, env_name, job)
                idle.append(worker)
                progress.update()
    return successes


def _reraise(failure: WorkerError, env_name: str, job: tuple[str, int] | None) -> None:
    if isinstance(failure.error, (ValueError, ImportError, RuntimeError)) and job is None:
        raise failure.error from None
    what = "when it was made" if job is None else f"under baseline {job[0]!r} in the episode of seed {job[1]}"
    raise RuntimeError(f"{env_name} crashed {what}:\n{failure.text}") from failure
