"""Several tasks, one checkpoint: each task is a rollout of its own, and the suite is the table over them.

    metaworld/mt10  ->  rollout of each task in <output>/<task>/  ->  suite.json, suite.md

A mean over tasks is not a rate of one coin: tasks differ, and episodes of a task are alike.  So each task keeps its own count and
Wilson interval, and the mean's interval resamples tasks first and then episodes within them (a hierarchical bootstrap).  An interrupted
suite goes on with the first task that is not whole.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from wam.config import RolloutConfig
from wam.evaluation.rollout import rollout
from wam.evaluation.statistics import hierarchical_interval
from wam.files import write_json_atomic, write_text_atomic

log = logging.getLogger(__name__)
FORMAT = "wam-suite-1"
MT10 = (
    "reach-v3",
    "push-v3",
    "pick-place-v3",
    "door-open-v3",
    "drawer-open-v3",
    "drawer-close-v3",
    "button-press-topdown-v3",
    "peg-insert-side-v3",
    "window-open-v3",
    "window-close-v3",
)
SUITES = ("metaworld/mt10", "metaworld/mt50")


def tasks_of(env: str) -> tuple[str, ...]:
    """The environments of a suite, `<suite>/<task>` each; of anything else, itself alone."""
    if env == "metaworld/mt10":
        return tuple(f"metaworld/{task}" for task in MT10)
    if env == "metaworld/mt50":
        from wam.evaluation.environments import require_simulator

        require_simulator()
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS

        return tuple(f"metaworld/{task}" for task in sorted(ALL_V3_ENVIRONMENTS))
    return (env,)


def rollout_suite(checkpoint: Path | None, config: RolloutConfig, output: Path) -> dict[str, Any]:
    """Drive every task of the suite `config.env` and put the counts side by side.

    Args:
        output: gets `suite.json`, `suite.md` and a directory for each task, as `rollout` writes it.

    Returns:
        The contents of `suite.json`.

    Raises:
        ValueError, FileNotFoundError, EnvironmentCrash, KeyboardInterrupt: as `rollout`; finished tasks are kept.
    """
    output = Path(output)
    tasks = {}
    for env in tasks_of(config.env):
        log.info("%s", env)
        tasks[env] = rollout(checkpoint, replace(config, env=env), output / env.rsplit("/", 1)[-1])
        results = {"format": FORMAT, "suite": config.env, "modes": {mode: _over_tasks(tasks, mode) for mode in config.modes}}
        write_json_atomic(output / "suite.json", results)
    write_text_atomic(output / "suite.md", table(results))
    return results


def _over_tasks(tasks: dict[str, dict[str, Any]], mode: str) -> dict[str, Any]:
    """Counts of each task in a mode, and the mean over tasks."""
    kept = ("successes", "episodes", "wilson_low", "wilson_high", "latency_ms_p50", "latency_ms_p95")
    rows = {env: {key: results["modes"][mode].get(key) for key in kept} for env, results in tasks.items()}
    outcomes = [[bool(e["success"]) for e in results["modes"][mode]["episode_results"]] for results in tasks.values()]
    mean = sum(sum(task) / len(task) for task in outcomes) / len(outcomes)
    low, high = hierarchical_interval(outcomes)
    return {"tasks": rows, "mean": mean, "mean_low": low, "mean_high": high}


def table(results: dict[str, Any]) -> str:
    """A suite as Markdown: a row for each task, a column for each mode, counts with their intervals."""
    modes: Sequence[str] = list(results["modes"])
    lines = [f"| task | {' | '.join(modes)} |", f"|---|{'---|' * len(modes)}"]
    for env in next(iter(results["modes"].values()))["tasks"]:
        cells = (results["modes"][mode]["tasks"][env] for mode in modes)
        lines.append(f"| {env.rsplit('/', 1)[-1]} | " + " | ".join(f"{c['successes']}/{c['episodes']} ({_range(c['wilson_low'], c['wilson_high'])})" for c in cells) + " |")
    means = (results["modes"][mode] for mode in modes)
    lines.append("| **mean over tasks** | " + " | ".join(f"{100 * m['mean']:.1f} % ({_range(m['mean_low'], m['mean_high'])})" for m in means) + " |")
    return "\n".join(lines) + "\n"


def _range(low: float, high: float) -> str:
    return f"{100 * low:.0f}-{100 * high:.0f} %"
