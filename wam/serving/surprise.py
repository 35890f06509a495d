"""Whether what came is what was imagined: for every robot, plan by plan, told in replies and counted.

    plan at t       imagined   z1 ....... z2 .......         its own (source plan), or what `forward` makes of its actions
    next request    came       z1 ....... z2 .......         as far as frames have come, and the plan's own actions were executed

Nothing is done about a surprise here: the client that is told decides.  What is needed for the comparison is made after a plan has been
sent, so it costs that plan nothing; the comparison itself encodes the new frames once more, before the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from wam.config import CheckConfig
from wam.inference.batch import Call, Think, run
from wam.inference.check import Checker, SurpriseScale, imagines, source_name
from wam.inference.foreseen import Foreseen
from wam.inference.session import Plan
from wam.pretrained import Policy
from wam.relations import untrained_mode_warning
from wam.serving.job import Job
from wam.serving.memory import RobotMemory

Source = Literal["auto", "none", "plan", "forward"]
SOURCES: tuple[Source, ...] = ("auto", "none", "plan", "forward")


@dataclass(frozen=True)
class Expected:
    """A plan that was sent, and what it foresaw; `actions` (n, d) are those that were let through."""

    plan_id: str
    actions: np.ndarray
    foreseen: Foreseen


@dataclass(frozen=True)
class Surprises:
    """The check of one policy."""

    policy: Policy
    checker: Checker

    @classmethod
    def of(cls, policy: Policy, scale: SurpriseScale | None, source: Source, mode: str, steps: int, forward_steps: int = 1) -> Surprises | None:
        """The check, where it is asked for; `auto`: of plans that imagine, where the checkpoint was calibrated for them.

        Raises:
            ValueError: it is asked for, and cannot be made: not calibrated, or nothing is imagined.
        """
        if source == "auto":
            source = "plan" if scale is not None and imagines(policy, mode) and source_name(mode, steps) in scale.sources else "none"
        if source == "none":
            return None
        if scale is None:
            raise ValueError("surprise is measured in errors of validation, and this checkpoint has none; run `wam calibrate --checkpoint DIR`, or leave --check out")
        if source == "forward" and untrained_mode_warning(policy.config, "forward") is not None:
            raise ValueError("--check is forward, which this checkpoint was not trained for; use plan, with a mode that imagines, or train with training.modes.forward")
        checker = Checker(policy, CheckConfig(source=source, steps=forward_steps, then="nothing"), scale)
        checker.require(mode, steps)
        return cls(policy, checker)

    def foresee(self, sent: Sequence[tuple[Job, Plan, dict[str, Any]]]) -> None:
        """Note what the plans that were just sent imagine."""
        imagined = [None if plan.imagined is None else plan.imagined[0] for _, plan, _ in sent]
        forward = self.checker.config.source == "forward"
        if forward and sent:
            how = replace(self.policy.config.sampling, steps=self.checker.config.steps)
            calls: list[list[Call]] = [[Think("forward", how, actions=plan.actions, seeds=(job.entry.plans,))] for job, plan, _ in sent]
            sessions = [job.entry.session for job, _, _ in sent if job.entry.session is not None]
            imagined = [None if made is None or made.imagined is None else made.imagined[0] for made in run(sessions, calls)]
        for (job, _, reply), video in zip(sent, imagined, strict=True):
            entry, step = job.entry, job.entry.memory.now
            entry.expected = None
            way = ("forward", self.checker.config.steps) if forward else (job.mode, job.steps)
            if video is None or entry.session is None or step is None or source_name(*way) not in self.checker.scale.sources:
                continue
            entry.expected = Expected(reply["plan"]["id"], reply["actions"], Foreseen.of(entry.session, entry.memory, video, step, way))

    def compare(self, memory: RobotMemory, expected: Expected | None) -> dict[str, Any] | None:
        """What has come of a plan, as a reply tells it; None: not enough yet to say."""
        if expected is None:
            return None
        foreseen, fresh = expected.foreseen, False
        while (steps := foreseen.take(self.policy, memory)) is not None:
            if not _followed(memory, expected, steps):
                foreseen.lost = True  # what came is of something else
                break
            fresh = True
        if not fresh:
            return None
        found = self.checker.compare(foreseen.imagined, foreseen.observed, foreseen.before, *foreseen.way)
        told = {"value": float(found.value), "surprised": found.surprised, "still": found.still, "why": found.why, "frames": [float(value) for value in found.frames]}
        return {**told, "plan": expected.plan_id, "source": source_name(*foreseen.way)}


def _followed(memory: RobotMemory, expected: Expected, steps: range) -> bool:
    """Whether the plan's own actions were executed; else what it imagined is of something else."""
    for step in steps:
        done, at = memory.executed.get(step), step - expected.foreseen.origin
        if done is None or at >= len(expected.actions) or not np.allclose(done, expected.actions[at], rtol=1e-3, atol=1e-4):
            return False
    return True
