"""What the value head says of candidates: which of N plans, or of N imagined outcomes, promises most.

    session, B rows     H | Vc Ac | ... S  now                               read once for all candidates, and left as it is
    Q(s, a)                                 | Ac of candidate n, R  -> value   before anything is imagined: one forward pass
    V(s')                                   | Vc of candidate n, R  -> value   of what was imagined to follow, or of what came

A value is a number in 0..1 of the moment at which the block ends; what it means is the checkpoint's `model.value` (see `wam.model.value`).
"""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from wam.inference.session import Session
from wam.model.actions import pad_actions
from wam.model.sampling import Held, Situation, conditional
from wam.model.shared import SharedCache
from wam.model.wam import WorldActionModel
from wam.relations import trained_valuations
from wam.timeline import FIRST_BLOCK, Kind

log = logging.getLogger(__name__)
ASKED_OF = {"action": Kind.AC, "outcome": Kind.VC}


def value_of(session: Session, actions: np.ndarray | None = None, latents: Tensor | None = None) -> Tensor:
    """Values (B, N) in 0..1 of N candidates for every row of a session: Q of actions, or V of latents.

    Args:
        actions: the coming block's (B, N, A, action_dim), physical units.
        latents: the coming block's (B, N, C, k, h, w), imagined or real.

    Raises:
        ValueError: not exactly one of the two, wrong shapes, numbers that are not finite, nothing observed yet, actions that are committed
            already, or a model without a value head.
        LeakError: the model's table has no such value.
    """
    if (actions is None) == (latents is None):
        raise ValueError("give actions or latents, one of the two: a value is asked of what is done, or of what comes of it")
    if session.block == FIRST_BLOCK:
        raise ValueError("nothing has been observed yet; call observe(first_frame, state) before value_of()")
    if actions is not None:
        value, valuation = _actions(session, actions), "action"
    else:
        assert latents is not None
        value, valuation = _latents(session, latents), "outcome"
    copies = value.shape[1]
    values = appraise(session.model, candidates_at(session, copies), valuation, value.flatten(0, 1))
    if valuation not in trained_valuations(session.config) and valuation not in session._warned:
        session._warned.add(valuation)
        log.warning("values of the %s are not what this model was trained for, so they mean little; train them: training.valuations={%s: 1}", valuation, valuation)
    return values.unflatten(0, (-1, copies))


@torch.no_grad()
def appraise(model: WorldActionModel, at: Situation, valuation: str, value: Tensor) -> Tensor:
    """Values (R,) in 0..1 of one block each, in a situation of R rows.

    Args:
        valuation: `action` or `outcome`.
        value: normalised actions (R, A, .), or latents (R, C, k, h, w).

    Raises:
        ValueError: no value head, or no such valuation.
        LeakError: the model's table has no such value.
    """
    table = model.relations.valuation(valuation).table
    at = conditional(at) if at.guided else at
    kind = ASKED_OF[valuation]
    view = model.appraisal_view(at.cache, table, kind, at.blocks)
    return torch.sigmoid(model.appraise(view, kind, value, at.conditions, at.embodiment_B))


def candidates_at(session: Session, copies: int) -> Situation:
    """Where a session stands, for `copies` candidates a row side by side, which share its memory."""
    at = session._situation(None)
    return replace(
        at,
        cache=SharedCache(at.cache, copies),
        blocks=[block for block in at.blocks for _ in range(copies)],
        conditions=at.conditions.copied(copies),
        embodiment_B=at.embodiment_B.repeat_interleave(copies),
        held=Held(),
    )


def _actions(session: Session, actions: np.ndarray) -> Tensor:
    """(B, N, A, .): normalised and padded; in block 0, behind the zeros that lead to a first frame inside it."""
    lead = session.config.timeline.lead if session.block == 0 else 0
    steps, dims = session.config.timeline.actions_per_block - lead, session.dims.raw_action_dim
    if actions.ndim != 4 or actions.shape[0] != session.batch or actions.shape[1] < 1 or actions.shape[2:] != (steps, dims):
        raise ValueError(f"candidates have shape {actions.shape}; expected (rows, candidates, actions_per_block, action_dim) = ({session.batch}, N, {steps}, {dims})")
    if not np.isfinite(actions).all():
        raise ValueError("candidates hold non-finite numbers; nothing was valued")
    if session.committed:
        raise ValueError("the actions of this block are committed already; ask before commit(), or ask of the latents")
    origin = None if session.origin is None else np.repeat(session.origin[:, None], actions.shape[1], axis=1)
    normal = torch.from_numpy(session.normalizer.normalize("action", session.units.encode_actions(actions.astype(np.float32), origin)))
    padded = pad_actions(session.config.model, session.dims, normal).to(session.model.device)
    return torch.nn.functional.pad(padded, (0, 0, lead, 0))


def _latents(session: Session, latents: Tensor) -> Tensor:
    shape = (session.config.codec.channels, session.config.timeline.latents_per_block, *session.model.latent_size)
    if latents.ndim != 6 or latents.shape[0] != session.batch or latents.shape[1] < 1 or tuple(latents.shape[2:]) != shape:
        raise ValueError(f"outcomes have shape {tuple(latents.shape)}; expected latents (rows, candidates, channels, latents_per_block, height, width) = ({session.batch}, N, {', '.join(map(str, shape))})")
    return latents.to(session.model.device)
