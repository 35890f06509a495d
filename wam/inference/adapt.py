"""Adaptive imagination: think little while all goes as imagined, more when it does not.  One small state machine a robot.

                 next()         saw(surprise)                next()
    calm    ->   skip   ->      as imagined: go on     ->    skip
                                surprised: replan      ->    imagine, imagine (escalated_plans)   ->   skip
                                surprised again        ->    counted anew from there; with `escalate_again: after_calm`, news only after a check without one

It decides and counts, and computes nothing.  A frame in which nothing moves, imagined or seen, is no surprise; but a robot that is told to
move and stands still for many checks is stalled, however well its standing still is predicted, and that is one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from wam.config import CheckConfig, SamplingConfig
from wam.inference.check import Surprise
from wam.inference.compute import check_flops, plan_flops
from wam.inference.session import Session
from wam.pretrained import Policy

Verdict = Literal["go on", "replan", "stop"]
LITTLE = 0.05  # of half an action dimension's usual range (what -1..1 stands for): less is no motion


@dataclass
class Adaptive:
    """What the next plan of one robot is to be.

    Attributes:
        left: plans that are still to be escalated.
        armed: a surprise would be news: none came since the last check without one.
        still: checks in a row in which nothing moved although actions asked for it.
        plans: how many were made, by mode and by whether they were escalated.
        surprises, stalls, checks: how many there were; a stall is a surprise as well.
    """

    config: CheckConfig
    calm: str | None = None
    left: int = 0
    armed: bool = True
    still: int = 0
    checks: int = 0
    surprises: int = 0
    stalls: int = 0
    plans: Counter[tuple[str, bool]] = field(default_factory=Counter)

    def begin(self, mode: str) -> None:
        """A new episode, whose plans are in `mode` while nothing surprises; counts begin anew."""
        self.calm, self.left, self.armed, self.still = mode, 0, True, 0
        self.checks = self.surprises = self.stalls = 0
        self.plans = Counter()

    @property
    def escalated(self) -> bool:
        """Whether the next plan is one of those after a surprise."""
        return self.left > 0

    def sampling(self, how: SamplingConfig) -> SamplingConfig:
        """How the next plan is sampled: ask before `next`, which counts it."""
        return how.with_steps(self.config.escalated_steps) if self.escalated else how

    def next(self) -> str:
        """The mode of the next plan, which is counted as made.

        Raises:
            ValueError: no episode was begun.
        """
        if self.calm is None:
            raise ValueError("no episode was begun; call begin(mode) first")
        escalated = self.escalated
        mode = self.config.escalate or self.calm if escalated else self.calm
        self.left = max(0, self.left - 1)
        self.plans[mode, escalated] += 1
        return mode

    def saw(self, surprise: Surprise, acted: bool = True) -> Verdict:
        """What a check means for what is going on.

        Args:
            acted: the actions executed meanwhile asked for motion (`asks_for_motion`).
        """
        self.checks += 1
        self.still = self.still + 1 if surprise.still and acted else 0
        stalled = self.config.stalled is not None and self.still >= self.config.stalled
        if not surprise.surprised and not stalled:
            self.armed = True
            return "go on"
        self.surprises += 1
        if stalled:
            self.stalls += 1
            self.still = 0
        if self.armed or self.config.escalate_again == "always":
            self.left, self.armed = self.config.escalated_plans, False
        return "go on" if self.config.then == "nothing" else self.config.then

    def flops(self, policy: Policy, how: SamplingConfig) -> float:
        """What the plans so far have computed, their checks included; `how` is the sampling of calm plans.  See `wam.inference.compute`."""
        check = check_flops(policy, self.config)
        steps = {False: how, True: how.with_steps(self.config.escalated_steps)}
        return sum(count * (plan_flops(policy, mode, steps[escalated]) + check) for (mode, escalated), count in self.plans.items())


def why_stalled(checks: int) -> str:
    """For people."""
    return f"nothing moved in {checks} checks in a row, although the actions asked for it"


def asks_for_motion(session: Session, actions: np.ndarray, rows: Sequence[int] | None = None) -> np.ndarray:
    """Bool (n,): whether actions (n, m, action_dim), physical units, ask their robots to move.

    Displacements and velocities do where they are not about 0, targets where they change, relative ones where they leave the state they start from.

    Args:
        rows: the n positions in the session; default: all.
    """
    chosen = list(range(session.batch)) if rows is None else list(rows)
    origin = None if session.origin is None else session.origin[chosen]
    normal = session.normalizer.normalize("action", session.units.encode_actions(actions.astype(np.float32), origin))
    stays = np.broadcast_to(session.units.no_motion(), normal.shape[-1:])
    zero = session.normalizer.normalize("action", np.where(np.isfinite(stays), stays, 0).astype(np.float32))
    from_zero = np.isfinite(stays) | _displacements(session)
    reference = np.where(from_zero, zero, normal[:, :1])
    return np.asarray((np.abs(normal - reference) > LITTLE).any(axis=(1, 2)), np.bool_)


def _displacements(session: Session) -> np.ndarray:
    """Bool (D,): dimensions of the network's actions in which 0 is no motion."""
    kinds = {g.name: g.kind for g in session.dims.action_groups}
    out = np.zeros(session.units.action_dim, np.bool_)
    for part in session.units.action:
        out[part.seen] = kinds.get(part.name, "target") in ("delta", "velocity")
    return out
