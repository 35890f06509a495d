"""`wam surprise`: does the check tell disturbed episodes from undisturbed ones, before anything is built on it?

    episode       | block | block | block | ...        the policy drives and never replans; every block is checked when it is over
    latent frame  | 1   2 | 1   2 | 1   2 |            each with its surprise
    event                     ^                        a disturbance begins at some control step
    after                     1 | 2   3 | ...          latent frames since, the one in which it began being the first

All latent frames of the undisturbed episodes are set against those that come so long after an event, in episodes of the same seeds: the
area under the ROC curve is the chance that the disturbed one surprises more.  Beside it stands how many are above thresholds.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from wam.config import CheckConfig, DisturbanceConfig, TimelineConfig
from wam.config_check import TrialConfig
from wam.evaluation.environments import Environment, make_env
from wam.evaluation.statistics import auroc
from wam.figures import FAINT, INK, new_figure
from wam.files import write_json_atomic
from wam.inference.check import Checker, imagines, load_scale
from wam.inference.outcome import newest, outcome
from wam.inference.session import Session
from wam.pretrained import Policy, load_policy

log = logging.getLogger(__name__)
RESULTS, FIGURE = "surprise_trial.json", "surprise_trial.png"
AFTER = 4  # latent frames since an event that are looked at
THRESHOLDS = (0.7, 0.8, 0.85, 0.9, 1.0, 1.2)
COLORS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#882255")


def trial(checkpoint: Path, config: TrialConfig, check: CheckConfig, output: Path) -> dict[str, Any]:
    """Drive and check episodes; writes numbers and a figure into `output`, and returns the numbers.

    Raises:
        ValueError, FileNotFoundError: an uncalibrated checkpoint, plans that imagine nothing to compare, or a disturbance that the environment cannot do.
    """
    policy = load_policy(checkpoint)
    checker = Checker(policy, check, load_scale(checkpoint))
    checker.require(config.mode, policy.config.sampling.steps)
    episodes = []
    for kind in tqdm((None, *config.kinds), desc="surprise", unit="kind"):
        disturbances = DisturbanceConfig() if kind is None else DisturbanceConfig(kinds=(kind,), strength=config.strength)
        env = make_env(config.env, disturbances=disturbances, max_steps=config.max_steps, image_size=policy.config.codec.image_size[0])
        try:
            episodes += [{"kind": kind or "none", **_drive(policy, checker, env, config, seed)} for seed in range(config.seed, config.seed + config.episodes)]
        finally:
            env.close()
    results = {"checkpoint": str(checkpoint), "trial": asdict(config), "check": asdict(check), **summary(episodes), "episodes": episodes}
    write_json_atomic(output / RESULTS, results)
    draw(results, output / FIGURE)
    return results


def _drive(policy: Policy, checker: Checker, env: Environment, config: TrialConfig, seed: int) -> dict[str, Any]:
    """One episode: the surprise of every latent frame, the control step at which something began, and whether the task was solved."""
    t, how = policy.config.timeline, policy.config.sampling
    first = env.reset(seed)
    session = Session(policy, [first.instruction or env.instruction], policy.config.data.embodiment, [seed])
    frame, began, step = first.frames[-1:], [e.step for e in first.events], 0
    session.observe(first.frames[None], first.state[None])
    values: list[float] = []
    while True:
        plan = session.plan(config.mode)
        assert plan.actions is not None, f"mode {config.mode} plans no actions"
        acted = np.clip(plan.actions, env.action_low, env.action_high)
        imagined = plan.imagined if imagines(policy, config.mode) and checker.config.source == "plan" else outcome(session, [0], acted, how.with_steps(checker.config.steps), [seed + step])
        result = env.run(acted[0], t.stride)
        if result.crashed is not None:
            raise RuntimeError(f"{config.env} crashed in the episode of seed {seed}: {result.crashed}")
        began += [event.step for event in result.events]
        step += len(result.states)
        if len(result.states) < t.actions_per_block:
            return _told(seed, result.success, step, began, values, t)
        before, frame = newest(policy, frame), result.frames[-1:]
        session.commit(acted)
        latents = session.observe(result.frames[None], result.states[-1:])
        assert imagined is not None
        values += list(checker.compare(imagined[0], latents[0], before[0], config.mode, how.steps).frames)
        if result.done:
            return _told(seed, result.success, step, began, values, t)


def _told(seed: int, success: np.ndarray, length: int, began: Sequence[int], values: Sequence[float], timeline: TimelineConfig) -> dict[str, Any]:
    each = timeline.actions_per_block // timeline.latents_per_block
    return {"seed": seed, "success": bool(success.any()), "length": length, "began": began[0] if began else None, "steps_per_frame": each, "values": list(values)}


def summary(episodes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """AUROC and shares above thresholds, by kind and by latent frames since the event."""
    calm = [value for e in episodes if e["kind"] == "none" for value in e["values"]]
    out: dict[str, Any] = {"undisturbed": {"frames": len(calm), "above": _above(calm)}, "kinds": {}}
    for kind in dict.fromkeys(e["kind"] for e in episodes if e["kind"] != "none"):
        mine = [e for e in episodes if e["kind"] == kind and e["began"] is not None]
        out["kinds"][kind] = [_against(calm, [v for e in mine for v in _after(e, n)]) for n in range(AFTER)]
    return out


def _after(episode: dict[str, Any], count: int) -> list[float]:
    """The value of the latent frame so many after the one in which the event began, if there is one."""
    index = int(episode["began"] // episode["steps_per_frame"]) + count
    return episode["values"][index : index + 1]


def _against(calm: Sequence[float], disturbed: Sequence[float]) -> dict[str, Any]:
    if not calm or not disturbed:
        return {"frames": len(disturbed)}
    area = auroc([*calm, *disturbed], [False] * len(calm) + [True] * len(disturbed))
    return {"frames": len(disturbed), "auroc": area.value, "interval": [area.low, area.high], "median": float(np.median(disturbed)), "above": _above(disturbed)}


def _above(values: Sequence[float]) -> dict[str, float]:
    return {f"{t:g}": float(np.mean(np.asarray(values) > t)) for t in THRESHOLDS} if values else {}


def text(results: dict[str, Any]) -> str:
    """The figures for people."""
    shown = (0.8, 0.85, 0.9, 1.0)
    head = " ".join(f"{f'> {t:g}':>7}" for t in shown)
    calm = results["undisturbed"]
    lines = [f"{'':<16} {'after':>5} {'frames':>6} {'AUROC':>6} {'95% interval':>14} {'median':>7} {head}"]
    lines.append(f"{'undisturbed':<16} {'':>5} {calm['frames']:>6} {'':>6} {'':>14} {'':>7} " + " ".join(f"{calm['above'][f'{t:g}']:>7.2f}" for t in shown))
    for kind, rows in results["kinds"].items():
        for n, row in enumerate(rows):
            if "auroc" not in row:
                continue
            numbers = f"{row['frames']:>6} {row['auroc']:>6.3f} {row['interval'][0]:>6.2f} ..{row['interval'][1]:>5.2f} {row['median']:>7.2f}"
            lines.append(f"{kind if n == 0 else '':<16} {n + 1:>5} {numbers} " + " ".join(f"{row['above'][f'{t:g}']:>7.2f}" for t in shown))
    return "\n".join(lines)


def draw(results: dict[str, Any], path: Path) -> None:
    """Surprise around an event, by kind, against undisturbed episodes; and the share above every threshold."""
    calm = np.sort([v for e in results["episodes"] if e["kind"] == "none" for v in e["values"]])
    limit = results["check"]["threshold"]
    with new_figure(path, 8.4, 3.2) as figure:
        time, share = figure.subplots(1, 2)
        time.axhspan(*np.quantile(calm, (0.05, 0.95)), color="#d5dbe1", alpha=0.6, lw=0)
        time.axhline(float(np.median(calm)), color=FAINT, lw=1, label="undisturbed (5-95 %)")
        share.plot(calm, 1 - np.arange(len(calm)) / len(calm), color=INK, lw=1.6, label="undisturbed")
        for color, kind in zip(COLORS, results["kinds"], strict=False):
            mine = [e for e in results["episodes"] if e["kind"] == kind and e["began"] is not None]
            around = {n: [v for e in mine for v in (_after(e, n) if e["began"] // e["steps_per_frame"] + n >= 0 else [])] for n in range(-4, 8)}
            steps = [n for n, values in around.items() if len(values) >= 3]
            time.plot([n + 1 for n in steps], [np.median(around[n]) for n in steps], color=color, marker="o", ms=3, lw=1.4, label=kind)
            hit = np.sort([max(values) for e in mine if (values := [v for n in range(AFTER) for v in _after(e, n)])])
            share.plot(hit, 1 - np.arange(len(hit)) / max(1, len(hit)), color=color, lw=1.4, drawstyle="steps-pre", label=kind)
        time.axhline(limit, color=INK, lw=1, ls=":")
        share.axvline(limit, color=INK, lw=1, ls=":")
        time.set(xlabel="latent frames since the event (1: it began here)", ylabel="surprise", title="Median surprise around an event")
        share.set(xlabel="threshold", ylabel="share above", title=f"Above a threshold, greatest of {AFTER} frames after", xlim=(0.3, 1.8))
        time.legend(fontsize=7)
        share.legend(fontsize=7)
