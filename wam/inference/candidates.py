"""Candidates: N ways to go on from where a session stands, drawn and imagined side by side on one memory.

    session, B rows      row 0            row 1
    candidates, B N      0  1  ... N-1    N  ... 2N-1             each its own noise, from its row's generator
    actions              (B, N, A, .)     normalised: what the network denoises
    outcomes             (B, N, C, k, h, w)                       what forward dynamics imagines of each

The past is held, gathered and rotated once a row (`wam.model.shared`), for the drawing of actions, for the imagining of what follows, and
for every round of a search.  The first candidate starts from the noise that `Session.plan` would have drawn.  All candidates of a row are
imagined from the same noise, so that their outcomes differ by their actions and not by luck.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from wam.config import SamplingConfig
from wam.inference.scores import agreement_scores
from wam.inference.session import Session
from wam.model.sampling import Held, Noise, Sample, Situation, conditional, sample
from wam.model.shared import SharedCache
from wam.timeline import Kind


@dataclass(frozen=True)
class Candidates:
    """N candidates for each row of a session, for one plan.

    Attributes:
        at: the situation of all B N of them.
        outcome_noise: where imagining starts, of each row; drawn on `open`, after the noise of the candidates.
        held: what of the block is given, of each row.
    """

    session: Session
    count: int
    at: Situation
    noise: Noise
    outcome_noise: Tensor
    held: Held

    @staticmethod
    def open(session: Session, count: int, held: Held) -> Candidates:
        """Draw the noise of `count` candidates a row, and let them see the session's memory.

        Args:
            held: what of the block is given, of each row, e.g. a committed prefix.
        """
        draws = [session._noise() for _ in range(count)]
        noise = Noise(*(torch.stack([getattr(d, name) for d in draws], dim=1).flatten(0, 1) for name in ("action_BTA", "video_BCFHW")))
        many = _many(session, SharedCache(session.cache, count), held)
        return Candidates(session, count, many, noise, session._noise().video_BCFHW, held)

    def keep(self, actions_BNTA: Tensor, count: int) -> tuple[Candidates, Tensor]:
        """The `count` of a row's candidates that are most unlike each other, and their actions (B, count, A, .).

        The first is where they are densest; each further one is the farthest from those that are kept (farthest-point sampling), so near
        copies of one another go first.  They read the past as it was read.
        """
        flat, order = actions_BNTA.flatten(2), [agreement_scores(actions_BNTA).argmax(dim=1)]
        rows = torch.arange(len(flat), device=flat.device)
        nearest = torch.full(flat.shape[:2], torch.inf, device=flat.device)
        while len(order) < count:
            nearest = torch.minimum(nearest, (flat - flat[rows, order[-1]].unsqueeze(1)).square().sum(dim=2))
            order.append(nearest.argmax(dim=1))
        chosen, cache = torch.stack(order, dim=1), self.at.cache
        assert isinstance(cache, SharedCache)
        noise = Noise(*(x.unflatten(0, (-1, self.count))[rows.unsqueeze(1), chosen].flatten(0, 1) for x in (self.noise.action_BTA, self.noise.video_BCFHW)))
        few = replace(self, count=count, at=_many(self.session, cache.for_copies(count), self.held), noise=noise)
        return few, actions_BNTA[rows.unsqueeze(1), chosen]

    @property
    def rows(self) -> int:
        """B: robots."""
        return self.at.rows // self.count

    def draw(self, mode: str, how: SamplingConfig) -> Sample:
        """Plans of all candidates in a mode: actions (B N, A, .), and video where the mode imagines it."""
        model = self.session.model
        return sample(model, model.relations.mode(mode), self.at, self.noise, how)

    def imagine(self, actions_BNTA: Tensor, how: SamplingConfig) -> Tensor:
        """What forward dynamics says follows from normalised actions, (B, N, C, k, h, w)."""
        model, n = self.session.model, actions_BNTA.shape[1]
        assert n == self.count, f"{n} candidates in a memory shared by {self.count}"
        at = self.at
        if at.guided:  # outcomes are not guided: the side of the instruction is enough, once both have forgotten the same
            for kind in (Kind.AC, Kind.V):
                at.cache.forget(kind, at.blocks)
            at = conditional(at)
        noise = Noise(self.noise.action_BTA, self.outcome_noise.repeat_interleave(n, 0))
        out = sample(model, model.relations.mode("forward"), at, noise, how, actions_BNTA.flatten(0, 1))
        assert out.video_BCFHW is not None
        return out.video_BCFHW.unflatten(0, (-1, n))

    def held_actions(self) -> tuple[Tensor, Tensor] | None:
        """Given actions (B, N, A, .) and where they are given (B, N, A); None: nothing is."""
        held = self.at.held.action
        return None if held is None else (held[0].unflatten(0, (-1, self.count)), held[1].unflatten(0, (-1, self.count)))


def _many(session: Session, cache: SharedCache, held: Held) -> Situation:
    """Where a session stands, for all candidates of its rows."""
    alone, count = session._situation(None), cache.copies
    return replace(
        alone,
        cache=cache,
        blocks=[block for block in alone.blocks for _ in range(count)],
        conditions=alone.conditions.copied(count),
        embodiment_B=alone.embodiment_B.repeat_interleave(count),
        state_BnS=None if alone.state_BnS is None else alone.state_BnS.repeat_interleave(count, 0),
        held=Held(*(None if x is None else (x[0].repeat_interleave(count, 0), x[1].repeat_interleave(count, 0)) for x in (held.video, held.action))),
    )


def imagining(how: SamplingConfig, steps: int) -> SamplingConfig:
    """How outcomes are imagined: a few solver steps, unguided, down to level 0."""
    return replace(how, steps=steps, action_steps=None, guidance=1.0, action_guidance=1.0, reuse="none", video_stop=0.0, video_final=0.0)
