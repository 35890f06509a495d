"""What is written of a closed-loop evaluation: what decides its outcome, what came of it, and how a person reads it.

    identity        environment, weights, sampling, loop, seeds, versions: results that differ in any of it are never mixed
    modes.<mode>    counts with their interval, and `episode_results`, one entry an episode
    the rest        command, machine, when
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

import wam
from wam.config import RolloutConfig, to_dict
from wam.evaluation.environments import package_versions
from wam.evaluation.episodes import Episode
from wam.evaluation.gl import choose_backend
from wam.evaluation.seeds import TEST
from wam.evaluation.statistics import wilson
from wam.pretrained import Policy, runtime_of, weights_sha256

RESULTS = "rollout.json"
FORMAT = "wam-rollout-1"


def identity(checkpoint: Path, policy: Policy, config: RolloutConfig, replan: int) -> dict[str, Any]:
    """What decides an episode's outcome; results that differ in any of it are never mixed."""
    policy_is = {"checkpoint_sha256": weights_sha256(checkpoint), "server": None, "sampling": to_dict(policy.config.sampling.with_steps(config.steps))}
    return policy_is | {"runtime": runtime_of(policy), "control_hz": policy.control_hz} | episodes_identity(config, replan)


def episodes_identity(config: RolloutConfig, replan: int) -> dict[str, Any]:
    """The part of `identity` that is not the policy's.

    The number of episodes belongs to it, because it is to be chosen before results are seen.
    """
    last = config.seed + config.episodes - 1
    return {
        "env": config.env,
        "replan": replan,
        "loop": {name: to_dict(getattr(config, name)) for name in ("execution", "check", "planner", "disturbances")} | {"gate": config.gate},
        "max_steps": config.max_steps,
        "seeds": {"first": config.seed, "last": last, "test": config.seed in TEST and last in TEST},
        "gl_backend": choose_backend(),
        "versions": _versions(config.env),
    }


def _versions(env: str) -> dict[str, str]:
    """Of what decides an episode: this code, what computes, and the simulator."""
    own = {"wam": wam.__version__, "python": platform.python_version()}
    return own | {name: importlib.metadata.version(name) for name in ("torch", "diffusers")} | package_versions(env)


def open_results(path: Path, decides: dict[str, Any]) -> dict[str, Any]:
    """Earlier results of the same run, or an empty file's worth."""
    if not path.is_file():
        return {"format": FORMAT, **decides, "command": shlex.join(sys.argv), "machine": platform.platform(), "started": now(), "finished": None, "modes": {}}
    earlier: dict[str, Any] = json.loads(path.read_text())
    before, after = _flat(earlier), _flat(decides)
    differences = [f"{name} {before.get(name)!r}, now {value!r}" for name, value in after.items() if before.get(name) != value]
    if differences:
        raise ValueError(f"{path} holds results of another run ({'; '.join(differences)}); choose another --output, or delete it to start again")
    return earlier


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"sampling": {"steps": 2}}` to `{"sampling.steps": 2}`."""
    parts = (_flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value} for name, value in tree.items())
    return {name: value for part in parts for name, value in part.items()}


def is_complete(mode: dict[str, Any] | None, config: RolloutConfig) -> bool:
    """Whether a mode's episodes were all driven and its latency measured."""
    return mode is not None and len(mode["episode_results"]) == config.episodes and "latency_ms" in mode


def now() -> str:
    """The time, as results say it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def summarize(episodes: Sequence[Episode], control_hz: float) -> dict[str, Any]:
    """Counts and interval of a mode's episodes, and the episodes themselves in the order of their seeds.

    Episodes in which the simulator crashed say nothing about the policy: they are counted apart and not among `episodes`.
    """
    ordered = sorted(episodes, key=lambda episode: episode.seed)
    scored = [episode for episode in ordered if episode.outcome != "crashed"]
    won = [episode for episode in scored if episode.success]
    low, high = wilson(len(won), len(scored)) if scored else (0.0, 1.0)
    steps = sum(episode.length for episode in scored)
    acted = steps - sum(episode.held for episode in scored)
    return {
        "successes": len(won),
        "episodes": len(scored),
        "crashed": len(ordered) - len(scored),
        "stopped": sum(episode.outcome == "stopped" for episode in scored),
        "wilson_low": low,
        "wilson_high": high,
        "mean_length": float(np.mean([episode.length for episode in won])) if won else None,
        "mean_reward": float(np.mean([episode.reward for episode in scored])) if scored else None,
        "interventions": sum(episode.interventions for episode in ordered),
        "held": sum(episode.held for episode in scored),
        "late": sum(episode.late for episode in scored),
        "control_hz_reached": control_hz * acted / steps if steps else None,
        "surprises": sum(episode.surprises for episode in scored),
        "replans": sum(episode.replans for episode in scored),
        "jump": float(np.mean(jumps)) if (jumps := [episode.jump for episode in scored if episode.jump is not None]) else None,
        "flops_per_episode": float(np.mean([episode.flops for episode in scored])) if any(episode.flops for episode in scored) else None,
        "episode_results": [{**asdict(episode), "events": list(episode.events)} for episode in ordered],
    }


def summary(results: dict[str, Any]) -> str:
    """Results as a table for people: a row for each mode."""
    rows = [("mode", "success", "95 % interval", "ms a plan p50 / p95", "control Hz", "held", "gate", "crashed")]
    for mode, r in results["modes"].items():
        interval = f"{100 * r['wilson_low']:.1f}-{100 * r['wilson_high']:.1f} %"
        latency = " / ".join("?" if r.get(f"latency_ms_{q}") is None else f"{r[f'latency_ms_{q}']:.0f}" for q in ("p50", "p95"))
        hz = "?" if r["control_hz_reached"] is None else f"{r['control_hz_reached']:.1f}"
        rows.append((mode, f"{r['successes']}/{r['episodes']}", interval, latency, hz, str(r["held"]), str(r["interventions"]), str(r["crashed"])))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
