"""Real-time chunking: a plan that is drawn to what an earlier one promised (Black, Galliker and Levine 2025, arXiv 2506.07339).

    the block's steps   0 .......... d ..................... m ............ A
    weight              1    1    1  .9  .6  .4  .2  .1      0    0    0
                        executed     promised by the         free
                        meanwhile    plan before

A checkpoint that was trained with prefixes (`noise.prefix`) is simply given its first actions: they are held at level 0 among those that
are denoised (`Session.plan(committed=...)`), which is inpainting that the network has learnt.  For one that was not, this is off its
training data.  Here nothing is held.  At each solver step the actions that the network expects are compared with the promised ones, and
the velocities are turned so that they come nearer: pseudo-inverse guidance (Song et al. 2023), which is the score of a Gaussian
observation of the data, taken through the network's own gradient.

In this codebase's convention x = (1 - s) x0 + s noise, the network's u is noise - x0, and so

    x0_hat  = x - s u                               what is expected, at level s
    score   = -(x + (1 - s) u) / s                  since the noise expected is x + (1 - s) u;  hence  du = -s / (1 - s) d(score)
    d(score) = J^T W (y - x0_hat) / r^2             J = d x0_hat / d x,   r^2 = s^2 / (s^2 + (1 - s)^2),   W the weights above
    u'      = u - min(most, s / ((1 - s) r^2)) J^T W (y - x0_hat)

which is the paper's equation 2 with its time 1 - s.  Video that is denoised beside the actions is turned by the same gradient: the two are
one sample.  The factor is also kept from more than one over the length of a step, so that plans of few steps do not overshoot; with the
paper's 5 steps and weight 5 both bounds are the same.  A step costs a backward pass through the network.

A policy that is sure of itself hardly changes its mind with its noise: J is small, and guidance reaches only what the policy finds likely.
`gradient="identity"` puts 1 in place of J, as LeRobot's implementation in effect does: it pulls as hard on any policy, at no cost.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import numpy as np
import torch

from wam.config import SamplingConfig
from wam.inference.session import Plan, Session
from wam.model.sampling import Pull
from wam.timeline import Kind


def plan_guided(
    session: Session,
    mode: str,
    sampling: SamplingConfig | None,
    committed_BdA: np.ndarray | None,
    promised_BmA: np.ndarray,
    guidance: float,
    gradient: Literal["network", "identity"] = "network",
) -> Plan:
    """Plan the coming block in any mode that plans actions, drawn to what an earlier plan promised.

    Rows are independent, noise is drawn as by `Session.plan`, and nothing is left behind in the session.

    Args:
        committed_BdA: the block's first d actions (B, d, action_dim), which will have been executed before this plan can act: they weigh 1, stand in
            place of the first promised ones, and are returned as they are.
        promised_BmA: the block's first m actions (B, m, action_dim), from its first control step on, as decided before; physical units.
        guidance: largest weight of the guidance; 0: none.
        gradient: J of the module's docstring, or 1 in its place, which costs no backward pass.

    Raises:
        ValueError: as `Session.plan`; a mode that plans no actions; promised actions that are misshapen, not finite or more than the block has.
    """
    at = session.model.relations.mode(mode)
    if Kind.A not in at.denoised:
        raise ValueError(f"mode {mode!r} plans no actions, so nothing can be promised of them; use session.plan")
    if guidance < 0 or not math.isfinite(guidance):
        raise ValueError(f"guidance is {guidance}; expected a finite number of at least 0")
    frozen = 0 if committed_BdA is None else committed_BdA.shape[1]
    promised = promised_BmA if committed_BdA is None else np.concatenate([committed_BdA, promised_BmA[:, frozen:]], axis=1)
    _check(session, promised)
    plan = session.plan(mode, sampling, pull=_pull(session, promised, frozen, guidance, gradient == "network") if guidance and promised.shape[1] else None)
    if committed_BdA is None or plan.actions is None:
        return plan
    return replace(plan, actions=np.concatenate([committed_BdA.astype(np.float32), plan.actions[:, frozen:]], axis=1))


def soft_weights(frozen: int, overlap: int, steps: int) -> list[float]:
    """Weights of `steps` actions: 1 for the first `frozen`, falling exponentially to 0 at `overlap` (equation 5 of the paper)."""
    falling = [(overlap - i) / (overlap - frozen + 1) for i in range(frozen, overlap)]
    soft = [c * math.expm1(c) / math.expm1(1) for c in falling]
    return [*([1.0] * frozen), *soft, *([0.0] * (steps - max(frozen, overlap)))]


def _pull(session: Session, promised_BmA: np.ndarray, frozen: int, guidance: float, through_network: bool) -> Pull:
    """What is promised, as the network sees it: normalised, in the padded vector, behind the lead of a first block."""
    t, m = session.config.timeline, promised_BmA.shape[1]
    lead = t.lead if session.block == 0 else 0
    towards = torch.zeros(session.batch, t.actions_per_block, session.config.model.actions, device=session.model.device)
    towards[:, lead : lead + m] = session._normalized(promised_BmA)
    weights = [0.0] * lead + soft_weights(frozen, m, t.actions_per_block - lead)
    robot_B1A = session.model.robot_channels(session.embodiment_B[: session.batch])
    return Pull(towards, torch.tensor(weights, device=towards.device)[None, :, None] * robot_B1A, guidance, through_network)


def _check(session: Session, promised: np.ndarray) -> None:
    t = session.config.timeline
    rows, dims, most = session.batch, session.dims.raw_action_dim, t.actions_per_block - (t.lead if session.block == 0 else 0)
    if promised.ndim != 3 or promised.shape[::2] != (rows, dims) or promised.shape[1] > most:
        raise ValueError(f"promised actions have shape {promised.shape}; expected (rows, up to {most} actions, action_dim) = ({rows}, m, {dims})")
    if not np.isfinite(promised).all():
        raise ValueError("promised actions hold non-finite numbers; nothing was planned")
