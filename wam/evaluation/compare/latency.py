"""How long each row takes from an observation to a plan, for one robot: rows in turns, so that a busy moment of the machine meets all alike.

    round i:   row 1 remembers block i, sees its end, plans block i + 1   |   row 2 the same   |   ...

Every row sees the same recorded episode, over and over; what is timed is what a robot waits for (the block written into the memory, the
picture encoded, the plan).  The first rounds, in which the memory fills up, are not counted.  Beside it stands what a plan computes,
counted from sizes, which no machine changes.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from wam.config import ImagineConfig, SamplingConfig
from wam.evaluation.compare.plan import Plan, Row
from wam.evaluation.compare.run import LATENCY, checkpoint_of
from wam.evaluation.imagination import Clip, held_out_clips
from wam.evaluation.statistics import percentile
from wam.files import write_json_atomic
from wam.inference.compute import plan_flops, remember_flops
from wam.inference.session import Session
from wam.pretrained import Policy, from_pretrained

BLOCKS = 8  # of the recorded episode, or as many as it has


def measure_latency(plan: Plan, output: Path) -> None:
    """Time `latency_plans` plans of every row and write `latency.json`: milliseconds, percentiles, stages, and FLOPs of a plan."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    policies = {v.name: from_pretrained(checkpoint_of(v, output), device) for v in plan.variants}
    rows = [row for row in plan.rows if not row.extra]  # another closed loop is timed where it is driven
    clips = {name: held_out_clips(policy.config, ImagineConfig(clips=1, blocks=BLOCKS), plan.config.data.root)[0] for name, policy in policies.items()}
    robots = {row.name: _Robot.of(policies[row.variant], row, clips[row.variant]) for row in rows}
    warm = max(p.config.timeline.history for p in policies.values()) + 1
    for i in range(warm + plan.settings.latency_plans):
        for robot in robots.values():
            robot.turn(counts=i >= warm)
    write_json_atomic(output / LATENCY, {row.name: _figures(robots[row.name], row) for row in rows})


@dataclass
class _Robot:
    """One row's session and what its turns took."""

    session: Session
    clip: Clip
    mode: str
    sampling: SamplingConfig
    block: int
    milliseconds: list[float]
    stages: list[dict[str, float]]

    @staticmethod
    def of(policy: Policy, row: Row, clip: Clip) -> _Robot:
        session = Session(policy, [clip.instruction], policy.config.data.embodiment, [0])
        session.observe(clip.frames[None, :1], clip.state[None])
        session.plan(row.mode)
        return _Robot(session, clip, row.mode, policy.config.sampling.with_steps(row.rollout.steps), 0, [], [])

    def turn(self, counts: bool) -> None:
        """The block was executed as recorded: remember it, see its end, plan the next."""
        t = self.session.config.timeline
        here = self.block % (len(self.clip.executed) // t.actions_per_block)
        steps, frames = here * t.actions_per_block, here * t.frames_per_block
        assert self.clip.states is not None
        state = self.clip.states[min(steps + t.actions_per_block, len(self.clip.states) - 1)]
        begun = time.perf_counter()
        self.session.commit(self.clip.executed[None, steps : steps + t.actions_per_block])
        self.session.observe(self.clip.frames[None, frames + 1 : frames + 1 + t.frames_per_block], state[None])
        timings = self.session.plan(self.mode, self.sampling).timings
        if counts:
            self.milliseconds.append(1e3 * (time.perf_counter() - begun))
            self.stages.append(timings)
        self.block += 1


def _figures(robot: _Robot, row: Row) -> dict[str, Any]:
    policy, ms = robot.session.policy, robot.milliseconds
    names = sorted({name for stages in robot.stages for name in stages})
    return {
        "milliseconds": ms,
        "p50": percentile(ms, 50),
        "p95": percentile(ms, 95),
        "stages": {name: percentile([stages.get(name, 0.0) for stages in robot.stages], 50) for name in names},
        "plan_flops": plan_flops(policy, row.mode, robot.sampling),
        "remember_flops": remember_flops(policy),
        "control_hz": policy.control_hz,
        "replan": row.rollout.replan or policy.config.timeline.actions_per_block,
        "solver_steps": robot.sampling.steps,
    }
