"""From finished phases to one file of figures, tests and sentences: `compare.json`, which the report is written from.

    rollout.json of every variant and condition     successes, outcomes by seed, recovery, operations a second
    latency.json, imagine/imagine.json              milliseconds, rows in turns; gain over a still picture
    run folders                                     what each variant really changed, updates, operations, minutes
    wam.evaluation.compare.claims                   tests and sentences
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from wam.config import to_dict
from wam.evaluation.compare.claims import answer, claims, limits, speeds, to_json
from wam.evaluation.compare.imagined import FOLDER as IMAGINED
from wam.evaluation.compare.imagined import RESULTS as IMAGINED_RESULTS
from wam.evaluation.compare.plan import Plan, Row, Variant, describe
from wam.evaluation.compare.run import BASELINES, LATENCY, checkpoint_of, drive_folder, driven_as
from wam.evaluation.demo import machine, versions
from wam.evaluation.recovery import recovery
from wam.evaluation.results import RESULTS as ROLLOUT
from wam.evaluation.statistics import wilson
from wam.figures import read_log
from wam.pretrained import META, STEM
from wam.shards import ShardReader
from wam.training.state import config_tree

FORMAT = "wam-compare-1"
LOG = "log.jsonl"
Tree = dict[str, Any]


def analyse(plan: Plan, output: Path, seconds: Mapping[str, float], command: str) -> Tree:
    """Everything the report shows.

    Args:
        seconds: of each phase, over all attempts.
    """
    latency, imagined = _read(output / LATENCY), _read(output / IMAGINED / IMAGINED_RESULTS)
    rows = {row.name: _row(plan, output, row, latency, imagined["rows"]) for row in plan.rows}
    outcomes = {name: {c: {int(e["seed"]): _won(e) for e in row[c]["episodes_by_seed"]} for c in plan.conditions} for name, row in rows.items()}
    found, reference = claims(outcomes, plan.settings.reference), plan.settings.reference
    rates = {c: {name: (row[c]["successes"], row[c]["episodes"]) for name, row in rows.items()} for c in plan.conditions}
    facts = {
        "env": plan.config.rollout.env,
        "trained": [v.name for v in plan.variants],
        "seed": plan.config.training.seed,
        "taken": [v.name for v in plan.variants if v.taken],
    }
    in_turns = {name: row for name, row in rows.items() if row["timed_apart"]}  # what was timed at another moment of the machine beats nobody by milliseconds
    fronts = {c: front({name: (row["latency"]["p50"], row[c]["successes"] / max(1, row[c]["episodes"])) for name, row in in_turns.items()}) for c in plan.conditions}
    return {
        "format": FORMAT,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "env": plan.config.rollout.env,
        "conditions": list(plan.conditions),
        "reference": reference,
        "budget": to_dict(plan.settings.budget),
        "disturbances": to_dict(plan.settings.disturbances),
        "variants": {v.name: _variant(plan, output, v, seconds) for v in plan.variants},
        "rows": rows,
        "front": fronts,
        "baselines": _read(output / BASELINES),
        "imagination": {name: {k: x for k, x in row.items() if k != "per_clip"} for name, row in imagined["rows"].items()},
        "imagined": {key: imagined[key] for key in ("mask", "blocks", "clips")},
        "answer": answer(found, reference),
        "claims": to_json(found),
        "speeds": speeds({name: row["milliseconds"] for name, row in latency.items()}, reference),
        "limits": limits(found, rates, facts),
        "seconds": {p.name: round(seconds.get(p.name, 0.0), 1) for p in plan.phases},
        "plan": describe(plan),
        "command": command,
        "versions": versions(),
        "machine": machine(),
        "config": to_dict(plan.config),
    }


def _read(path: Path) -> Tree:
    tree: Tree = json.loads(path.read_text())
    return tree


def _won(episode: Mapping[str, Any]) -> bool | None:
    """Whether it succeeded; None where the simulator crashed, which says nothing of the policy."""
    return None if episode.get("outcome") == "crashed" else bool(episode["success"])


# ------------------------------------------------------------------------------------------------ rows


def _row(plan: Plan, output: Path, row: Row, latency: Tree, imagined: Tree) -> Tree:
    driven = {c: _read(drive_folder(output, driven_as(row), c) / ROLLOUT) for c in plan.conditions}
    own = {c: results["modes"][row.mode] for c, results in driven.items()}
    hz = float(driven["calm"]["control_hz"])
    timed = _timed(latency[row.name]) if row.name in latency else _driven_latency(own["calm"])
    steps = row.rollout.replan or plan.variant(row.variant).config.timeline.actions_per_block
    still = "source" in timed
    return {
        "variant": row.variant,
        "mode": row.mode,
        "about": row.about,
        "extra": row.extra,
        "overrides": list(plan.settings.extras[row.name].overrides) if row.extra else [],
        "latency": timed,
        "actions_a_plan": steps,
        "control_hz": hz,
        "waiting_hz": steps / (steps / hz + timed["p50"] / 1e3),
        "timed_apart": not still,
        "imagination": {k: imagined[row.name][k] for k in ("psnr_db", "static_psnr_db", "gain_db", "clips")} if row.name in imagined else None,
        **{c: _condition(entry, hz) for c, entry in own.items()},
        "recovery": recovery(own["disturbed"]["episode_results"], hz, own["calm"]["episode_results"]) if "disturbed" in own else None,
    }


def _timed(entry: Tree) -> Tree:
    return {key: entry[key] for key in ("p50", "p95", "stages", "plan_flops", "remember_flops", "solver_steps")} | {"plans": len(entry["milliseconds"])}


def _driven_latency(entry: Tree) -> Tree:
    """Of a closed loop of its own: as `rollout` measured it, one robot at a time."""
    return {"p50": entry["latency_ms_p50"], "p95": entry["latency_ms_p95"], "plans": entry["latency_chunks"], "source": "closed loop"}


def _condition(entry: Tree, hz: float) -> Tree:
    """A row's episodes in one condition."""
    episodes = entry["episode_results"]
    counted = [e for e in episodes if _won(e) is not None]
    won = [e for e in counted if e["success"]]
    low, high = wilson(len(won), len(counted)) if counted else (0.0, 1.0)
    executed = sum(e["length"] for e in episodes)
    return {
        "successes": len(won),
        "episodes": len(counted),
        "crashed": len(episodes) - len(counted),
        "wilson_low": low,
        "wilson_high": high,
        "mean_length": statistics.mean(e["length"] for e in won) if won else None,
        "interventions": sum(e["interventions"] for e in episodes),
        "plans": sum(e["chunks"] for e in episodes),
        "plans_by_mode": _summed([e.get("modes", {}) for e in episodes]),
        "flops_a_second": sum(e["flops"] for e in episodes) * hz / executed if executed else None,
        "episodes_by_seed": [{key: e.get(key) for key in ("seed", "success", "length", "outcome", "chunks")} | {"kinds": [x["kind"] for x in e.get("events", ())]} for e in episodes],
    }


def _summed(counts: Sequence[Mapping[str, int]]) -> dict[str, int]:
    return {name: sum(count.get(name, 0) for count in counts) for name in dict.fromkeys(name for count in counts for name in count)}


def front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """The rows that no other beats: none is at most as slow and at least as good, and better in one of the two.  Fastest first.

    Args:
        points: milliseconds and success rate by row.
    """

    def beaten(name: str) -> bool:
        ms, rate = points[name]
        return any(m <= ms and r >= rate and (m, r) != (ms, rate) for other, (m, r) in points.items() if other != name)

    return sorted((name for name in points if not beaten(name)), key=lambda name: points[name])


# ------------------------------------------------------------------------------------------------ variants


def _variant(plan: Plan, output: Path, variant: Variant, seconds: Mapping[str, float]) -> Tree:
    """What a variant is, and what its training took."""
    folder = checkpoint_of(variant, output)
    step = json.loads((folder / META).read_text()).get("step")
    log = output / "train" / variant.name / LOG
    batch = variant.config.training.batch_size
    return {
        "about": variant.about,
        "modes": list(variant.modes),
        "overrides": list(variant.overrides),
        "changes": changes(plan, variant),
        "taken": str(variant.taken) if variant.taken else None,
        "steps": step,
        "windows": step * batch if step is not None else None,
        "flops": step * variant.cost.needed if step is not None else None,
        "flops_computed": step * variant.cost.computed if step is not None else None,
        "flops_a_step": variant.cost.needed,
        "training_minutes": minutes_of(log) if log.is_file() else None,
        "phase_minutes": seconds.get(f"train {variant.name}", 0.0) / 60 if variant.taken is None else None,
        "parameters": _parameters(folder),
        "trained_modes": dict(variant.config.training.modes),
        "error": _last_error(log),
    }


FREE = ("training.steps", "training.max_minutes")  # what the budget decides


def changes(plan: Plan, variant: Variant) -> dict[str, list[Any]]:
    """Settings that differ from the shared config's, from the configs that were trained: name to shared and own value."""
    shared, own = config_tree(plan.config), config_tree(variant.config)
    names = [name for name in dict.fromkeys((*shared, *own)) if shared.get(name) != own.get(name)]
    modes = [name for name in names if name.startswith("training.modes.")]
    rest = {name: [shared.get(name), own.get(name)] for name in names if name not in modes and name not in FREE}
    return ({"training.modes": [dict(plan.config.training.modes), dict(variant.config.training.modes)]} if modes else {}) | rest


def minutes_of(log: Path) -> float:
    """Minutes of the training steps themselves, without validation and saving: of each record, its steps by their rate."""
    total, before = 0.0, 0.0
    for record in read_log(log):
        if "steps_per_second" in record:
            total += (record["step"] - before) / record["steps_per_second"]
            before = record["step"]
    return total / 60


def _last_error(log: Path) -> dict[str, float]:
    """The last validation's errors of sampled actions by mode, in normalised units."""
    if not log.is_file():
        return {}
    records = [r for r in read_log(log) if any(name.startswith("val/action_mse/") for name in r)]
    return {name.removeprefix("val/action_mse/"): value for name, value in records[-1].items() if name.startswith("val/action_mse/")} if records else {}


def _parameters(folder: Path) -> int:
    """Numbers in the checkpoint's weights, codec and text encoder included."""
    with ShardReader(folder, STEM) as reader:
        return sum(math.prod(reader.shape(name)) for name in reader.names())
