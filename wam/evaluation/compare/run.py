"""A comparison, phase by phase: what is finished is kept, what is left is told with the time it may take.

    output/dataset                     demonstrations             output/train/<variant>          run and checkpoint
    output/drive/<variant>/<condition> rollout.json, videos       output/latency.json, imagine/   rows in turns; imagined video
    output/baselines.json              rows without a model       output/compare.json             every figure and every test
    output/compare_state.json          what is done, its settings, seconds of all attempts        output/report.html

Training and driving that were done with other settings are never mixed with this comparison: they are refused by name.  The phases that
take little are done again when their settings or the rows change, so rows can be added later.  Training and driving go on inside a phase,
too, where they were interrupted.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from wam.config import to_dict
from wam.config_check import CalibrateConfig
from wam.evaluation.compare.plan import Condition, Phase, Plan, Row, Variant, duration
from wam.files import write_json_atomic
from wam.pretrained import weights_sha256

STATE, RESULTS = "compare_state.json", "compare.json"
LATENCY, BASELINES = "latency.json", "baselines.json"
COSTLY = ("collect", "train", "drive")


def run(plan: Plan, output: Path, command: str) -> Path:
    """Do what the plan says and what is not done yet; returns the report's path.

    Args:
        command: how it was asked for, as the report shows it.

    Raises:
        ValueError: a phase in `output` that was done with other settings; an unknown environment, or a disturbance that it cannot meet.
        Any error of `collect`, `train`, `rollout` and `imagine`; what is finished is kept.
    """
    from wam.evaluation.compare.analysis import analyse
    from wam.evaluation.compare.page import write_report
    from wam.evaluation.environments import make_env

    output.mkdir(parents=True, exist_ok=True)
    diary = Diary.open(output / STATE, plan)
    if any(phase.kind == "drive" and phase.name not in diary.done for phase in plan.phases):
        make_env(plan.config.rollout.env, disturbances=plan.settings.disturbances).close()  # what cannot be driven shows before hours of training
    for phase in plan.phases[:-1]:
        key = _key(plan, output, phase)
        with diary.phase(phase, key) as todo:
            if todo:
                _do(plan, output, phase)
    with diary.phase(plan.phases[-1], None):
        write_json_atomic(output / RESULTS, analyse(plan, output, diary.seconds, command))
        report = write_report(output)
    return report


def _do(plan: Plan, output: Path, phase: Phase) -> None:
    """One phase."""
    if phase.kind == "collect":
        from wam.evaluation.collect import collect

        collect(plan.config.collect, Path(plan.config.data.root))
    elif phase.kind == "train":
        from wam.training.loop import train

        train(plan.variant(phase.of).config, output / "train" / phase.of)
    elif phase.kind == "calibrate":
        from wam.evaluation.calibrate import calibrate

        calibrate(checkpoint_of(plan.variant(phase.of), output), calibration(plan, phase.of), plan.config.data.root)
    elif phase.kind == "drive":
        _drive(plan, output, phase)
    elif phase.kind == "baselines":
        from wam.evaluation.baselines import run_baselines

        r = plan.config.rollout
        write_json_atomic(output / BASELINES, run_baselines(r.env, r.episodes, r.seed, r.workers, r.max_steps, replay=Path(plan.config.data.root)))
    else:
        from wam.evaluation.compare.imagined import imagine_rows
        from wam.evaluation.compare.latency import measure_latency

        {"latency": measure_latency, "imagine": imagine_rows}[phase.kind](plan, output)


def _drive(plan: Plan, output: Path, phase: Phase) -> None:
    from wam.evaluation.rollout import rollout

    rows = rows_of(plan, phase.of)
    config = replace(plan.rollout(rows[0], phase.condition), modes=tuple(row.mode for row in rows))
    rollout(checkpoint_of(plan.variant(rows[0].variant), output), config, drive_folder(output, phase.of, phase.condition))


def calibration(plan: Plan, variant: str) -> CalibrateConfig:
    """What is measured so that every check of a variant knows its errors: also those of the solver steps that its rows ask `forward` for."""
    steps = {row.rollout.check.steps for row in plan.rows if row.variant == variant and row.rollout.check.source == "forward"}
    return replace(plan.settings.calibrate, steps=plan.config.rollout.steps, forward_steps=tuple(sorted({*plan.settings.calibrate.forward_steps, *steps})))


# ------------------------------------------------------------------------------------------------ where things are


def checkpoint_of(variant: Variant, output: Path) -> Path:
    """The folder that `rollout` reads: what was trained here, or what was taken."""
    return variant.taken or output / "train" / variant.name / "checkpoint"


def drive_folder(output: Path, name: str, condition: Condition) -> Path:
    """Where a variant's episodes, or those of a row of its own, are."""
    return output / "drive" / name / condition


def driven_as(row: Row) -> str:
    """What a row's episodes are filed under: its variant, whose modes are driven together, or its own name."""
    return row.name if row.extra else row.variant


def rows_of(plan: Plan, name: str) -> list[Row]:
    """The rows that are driven together under `name`."""
    return [row for row in plan.rows if driven_as(row) == name]


# ------------------------------------------------------------------------------------------------ what is done already


def _key(plan: Plan, output: Path, phase: Phase) -> dict[str, Any]:
    """What decides a phase's outcome, by name."""
    if phase.kind == "collect":
        return to_dict(plan.config.collect)
    if phase.kind == "train":
        return _without(to_dict(plan.variant(phase.of).config), "collect", "rollout", "imagine", "output")
    if phase.kind == "baselines":
        return {name: getattr(plan.config.rollout, name) for name in ("env", "episodes", "seed", "max_steps")}
    weights = {v.name: weights_sha256(path) for v in plan.variants if (path := checkpoint_of(v, output)).is_dir()}
    if phase.kind == "calibrate":
        return {"weights": weights[phase.of], "calibrate": to_dict(calibration(plan, phase.of))}
    if phase.kind == "drive":
        row = rows_of(plan, phase.of)[0]
        return {"weights": weights[row.variant], "rollout": _without(to_dict(plan.rollout(row, phase.condition)), "modes", "workers")}
    rows = [row.name for row in plan.rows if not row.extra]
    return {"weights": weights, "rows": rows} | (
        {"plans": plan.settings.latency_plans, "steps": plan.config.rollout.steps} if phase.kind == "latency" else to_dict(plan.config.imagine)
    )


def _without(tree: dict[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in tree.items() if key not in names}


def _sha256(tree: object) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True, default=str).encode()).hexdigest()


@dataclass
class Diary:
    """Which phases are done, with which settings, and the seconds of all their attempts; what is left, and how long it may take.

    Attributes:
        done: a phase's name to the hash of what decided it.
        ratio: seconds that phases of a kind took, over those that were estimated.
    """

    path: Path
    plan: Plan
    seconds: dict[str, float] = field(default_factory=dict)
    done: dict[str, str] = field(default_factory=dict)

    @staticmethod
    def open(path: Path, plan: Plan) -> Diary:
        """The diary of an earlier call, or an empty one."""
        earlier: Mapping[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
        return Diary(path, plan, dict(earlier.get("seconds", {})), dict(earlier.get("done", {})))

    @contextmanager
    def phase(self, phase: Phase, key: dict[str, Any] | None) -> Iterator[bool]:
        """Time a phase and note that it is done; yields whether there is anything to do.

        Args:
            key: what decides it; None: it is done every time.

        Raises:
            ValueError: it is costly, and was done with another key.
        """
        sha = None if key is None else _sha256(key)
        if phase.kind in COSTLY and self.done.get(phase.name, sha) != sha:
            raise ValueError(f"{self.path.parent}: {phase.name!r} was done with other settings or weights; choose another --output, or delete {self.path.parent} to start again")
        todo = sha is None or self.done.get(phase.name) != sha
        number = [p.name for p in self.plan.phases].index(phase.name) + 1
        print(f"== {number}/{len(self.plan.phases)} {phase.name}: {phase.what}; {self._told(phase) if todo else 'done already'}", file=sys.stderr, flush=True)
        begun = time.monotonic()
        try:
            yield todo
            if sha is not None:
                self.done[phase.name] = sha
        finally:
            if todo:
                self.seconds[phase.name] = self.seconds.get(phase.name, 0.0) + time.monotonic() - begun
                write_json_atomic(self.path, {"seconds": self.seconds, "done": self.done})

    def _told(self, phase: Phase) -> str:
        left = sum(self.expected(p) for p in self.plan.phases if p.name not in self.done)
        return f"about {duration(self.expected(phase))}, {duration(left)} left in all"

    def expected(self, phase: Phase) -> float:
        """Seconds that a phase may take: as estimated, times what the finished phases of its kind took over theirs."""
        alike = [p for p in self.plan.phases if p.kind == phase.kind and p.name in self.done and p.name in self.seconds]
        estimated = sum(p.seconds for p in alike)
        return phase.seconds * (sum(self.seconds[p.name] for p in alike) / estimated if estimated else 1.0)
