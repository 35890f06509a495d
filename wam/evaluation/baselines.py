"""Rows that put a success rate into proportion: the same environment and seeds, driven by something else than a world model.

    expert       the task's scripted expert: what is possible
    replay       a recorded episode's actions, open loop (`wam.evaluation.replay`): what remembering without seeing gives
    hold_still   the command that keeps the robot still: what happens by itself
    random       uniform in the action box: what happens by chance
    act, ...     LeRobot's policies, driven through the same episodes (`wam.evaluation.lerobot_policies`)

A policy that is no better than holding still has learned nothing, and one that is compared where the expert fails is judged on episodes
that may have no solution.  Each row keeps its episodes by seed, so that any two rows, and any policy driven on these seeds, can be compared
in pairs.  Nothing is drawn while the first four run.  An episode whose environment crashed counts in no rate; it is named apart.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from wam.evaluation.environments import Environment, Floats, Observation, make_env, parse_name
from wam.evaluation.replay import Recordings, read_recordings
from wam.evaluation.statistics import wilson
from wam.evaluation.workers import Worker, WorkerError, Workers

EXPERT, HOLD_STILL, RANDOM, REPLAY = "expert", "hold_still", "random", "replay"
BASELINES = (EXPERT, HOLD_STILL, RANDOM)  # that need nothing but the environment
NEVER = 2  # frame stride of a stretch of one step: no frame is due
TIMEOUT_S = 900.0  # for an episode, the making of its environment included


@dataclass(frozen=True)
class Outcome:
    """What came of one episode.

    Attributes:
        length: control steps executed.
        max_reward: the largest, which some benchmarks report (PushT's coverage); None where no step was executed.
        crashed: what went wrong in the environment; such an episode is neither a success nor a failure.
        replayed: the recorded episode that was replayed.
    """

    seed: int
    success: bool
    length: int
    max_reward: float | None = None
    crashed: str | None = None
    replayed: int | None = None


def run_baselines(
    env_name: str,
    episodes: int,
    seed: int,
    workers: int = 2,
    max_steps: int = 500,
    names: Sequence[str] | None = None,
    replay: Path | None = None,
    timeout_s: float = TIMEOUT_S,
) -> dict[str, dict[str, Any]]:
    """Drive each baseline through the same episodes.

    Args:
        env_name: e.g. `metaworld/drawer-open-v3`.
        episodes: of each baseline, with seeds `seed`, `seed + 1`, ...
        seed: first seed.
        workers: simulators side by side.
        max_steps: control steps before an episode counts as failed.
        names: which; default: expert, hold_still and random, as far as the environment can play them, and replay where `replay` is given.
        replay: dataset whose episodes are replayed.
        timeout_s: for one episode; an environment that takes longer counts as crashed.

    Returns:
        Baseline -> `successes`, `episodes` (those that did not crash), `wilson_low`, `wilson_high`, `crashed`, `mean_max_reward` and
        `episode_results`, one `Outcome` per seed.  What an environment cannot play by default is left out, and said.

    Raises:
        ValueError, ImportError, RenderError: as `make_env`; a baseline that is asked for by name and cannot be played.
        RuntimeError: every episode of a baseline crashed.
    """
    if episodes < 1:
        raise ValueError(f"episodes is {episodes}; it must be at least 1")
    recordings = None if replay is None else read_recordings(Path(replay), env_name)
    variables = parse_name(env_name)[0].variables()
    with Workers(min(workers, episodes), _handler, (env_name, max_steps, recordings), variables) as pool:
        able = _ask_what(pool[0], env_name)
        chosen = list(names) if names is not None else [name for name in (*BASELINES, REPLAY) if name in able]
        if strange := [name for name in chosen if name not in able]:
            raise ValueError(f"{env_name} cannot play {', '.join(strange)}; it can: {', '.join(able)} (replay needs a dataset; hold_still a command that keeps it still)")
        if names is None and (missing := [name for name in BASELINES if name not in able]):
            tqdm.write(f"{env_name} cannot play {' and '.join(missing)}; left out")
        outcomes = _work_off(pool, [(name, seed + i) for name in chosen for i in range(episodes)], timeout_s)
    return {name: baseline_row(env_name, name, outcomes[name]) for name in chosen}


def baseline_row(env_name: str, name: str, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Counts, interval and episodes of a baseline.

    Raises:
        RuntimeError: every episode crashed.
    """
    ordered = sorted(outcomes, key=lambda outcome: outcome.seed)
    fine = [outcome for outcome in ordered if outcome.crashed is None]
    if not fine:
        raise RuntimeError(f"{env_name} crashed under baseline {name!r} in all {len(ordered)} episodes; in that of seed {ordered[0].seed}:\n{ordered[0].crashed}")
    won = sum(outcome.success for outcome in fine)
    low, high = wilson(won, len(fine))
    rewards = [outcome.max_reward for outcome in fine if outcome.max_reward is not None]
    return {
        "successes": won,
        "episodes": len(fine),
        "wilson_low": low,
        "wilson_high": high,
        "crashed": len(ordered) - len(fine),
        "mean_max_reward": float(np.mean(rewards)) if rewards else None,
        "episode_results": [asdict(outcome) for outcome in ordered],
    }


# ------------------------------------------------------------------------------------------------ one episode


def play(env: Environment, name: str, seed: int, recordings: Recordings | None = None) -> Outcome:
    """Drive one episode with a baseline, without drawing."""
    first = env.reset(seed)
    act, replayed = _actor(env, name, seed, first, recordings)
    length, best, won = 0, None, False
    while True:
        result = env.run(act()[None], NEVER)
        length += len(result.states)
        best = max(float(reward) for reward in (*result.rewards, *([] if best is None else [best])))
        won = won or bool(result.success.any())
        if result.done:
            return Outcome(seed, won, length, best, replayed=replayed)


def available(env: Environment, recordings: Recordings | None = None, first: Observation | None = None) -> list[str]:
    """The baselines an environment can play; `first` says whether there is a command that keeps it still."""
    needs = {EXPERT: hasattr(env, "expert_action"), HOLD_STILL: still(env, first) is not None, RANDOM: bool(np.isfinite([env.action_low, env.action_high]).all())}
    return [name for name in BASELINES if needs[name]] + [REPLAY] * (recordings is not None)


def still(env: Environment, first: Observation | None) -> Floats | None:
    """The command that keeps a robot where it is from its first observation on, (Da,); None: there is none."""
    hold = np.asarray(env.hold, np.float32)
    rest = first.rest if first is not None else None
    command = hold if rest is None else np.where(np.isnan(hold), rest, hold).astype(np.float32)
    return None if np.isnan(command).any() else np.clip(command, env.action_low, env.action_high)


def _actor(env: Environment, name: str, seed: int, first: Observation, recordings: Recordings | None) -> tuple[Callable[[], Floats], int | None]:
    """What gives the next action, and the recorded episode that it comes from."""
    if name == EXPERT:
        expert: Callable[[], Floats] = env.expert_action  # type: ignore[attr-defined]  # an extra of some environments
        return expert, None
    if name == RANDOM:
        generator = np.random.default_rng(seed)
        return lambda: generator.uniform(env.action_low, env.action_high).astype(np.float32), None
    calm = still(env, first)
    if name == HOLD_STILL:
        if calm is None:
            raise ValueError("this environment has no command that keeps it still")
        return lambda: calm, None
    assert recordings is not None, name
    number = recordings.nearest(seed, first)
    recorded = iter(recordings.actions[number])
    after = calm if calm is not None else recordings.actions[number][-1]  # position commands: the last place is kept
    return lambda: next(recorded, after), recordings.episodes[number]


# ------------------------------------------------------------------------------------------------ workers


def _handler(env_name: str, max_steps: int, recordings: Recordings | None) -> Callable[[tuple[str, int] | None], Any]:
    """Inside a worker: one environment, made anew after a crash; asked for nothing, say what it can play."""
    envs: list[Environment] = [make_env(env_name, max_steps=max_steps)]

    def handle(job: tuple[str, int] | None) -> Any:
        if job is None:
            return available(envs[0], recordings, envs[0].reset(0))
        try:
            if not envs:
                envs.append(make_env(env_name, max_steps=max_steps))
            return play(envs[0], *job, recordings)
        except Exception:
            text, broken = traceback.format_exc(), envs[0] if envs else None
            envs.clear()
            return Outcome(job[1], False, int(getattr(broken, "steps", 0)), crashed=text)

    return handle


def _ask_what(worker: Worker, env_name: str) -> list[str]:
    try:
        worker.send(None)
        able: list[str] = worker.receive()
        return able
    except WorkerError as failure:
        if isinstance(failure.error, (ValueError, ImportError, RuntimeError)):
            raise failure.error from None
        raise RuntimeError(f"{env_name} crashed when it was made:\n{failure.text}") from failure


def _work_off(pool: Workers, jobs: Sequence[tuple[str, int]], timeout_s: float) -> dict[str, list[Outcome]]:
    """Outcomes of each baseline; a worker that is done takes the next job, one that dies or hangs is replaced."""
    waiting, busy = list(reversed(jobs)), dict[int, tuple[tuple[str, int], float]]()
    outcomes: dict[str, list[Outcome]] = {name: [] for name, _ in jobs}
    with tqdm(total=len(jobs), unit="episode", desc="baselines") as progress:
        while waiting or busy:
            for index in range(len(pool)):
                if waiting and index not in busy:
                    busy[index] = (waiting.pop(), time.monotonic())
                    pool[index].send(busy[index][0])
            patience = min(since for _, since in busy.values()) + timeout_s - time.monotonic()
            answered = pool.ready([pool[index] for index in busy], max(0.0, patience))
            for index, ((name, seed), since) in list(busy.items()):
                if pool[index] in answered:
                    outcomes[name].append(_receive(pool, index, seed))
                elif time.monotonic() - since >= timeout_s:
                    pool.replace(index)
                    outcomes[name].append(Outcome(seed, False, 0, crashed=f"the episode was not over after {timeout_s:g} s"))
                else:
                    continue
                del busy[index]
                progress.update()
    return outcomes


def _receive(pool: Workers, index: int, seed: int) -> Outcome:
    try:
        outcome: Outcome = pool[index].receive()
        return outcome
    except WorkerError as failure:
        pool.replace(index)
        return Outcome(seed, False, 0, crashed=failure.text)
