"""The planner: several plans are made, what follows from them is imagined where the score asks for it, and the best is taken.

    best_of_n   N chunks of the policy - all, or the most unlike - imagine ------------------------------ score -> best
    cem         N chunks of the policy, or a Gaussian - imagine - score - elites -> new N around them -. -- score -> best
                                                           ^-----------------------------------------'   best of all rounds

The cross-entropy method is V-JEPA 2-AC's (Assran et al. 2025, section 3.2): sample, imagine, keep the elites, fit, again.  What differs:
the first round is the policy's own samples (`prior: gaussian` starts around 0, with one action held for the block, as there); the Gaussian
has the elites' own covariance in place of one variance a dimension, so that what it draws stays as smooth as they are; elites stay in the
running, and the best candidate of all rounds is executed in place of the mean, which may lie between two ways of doing a task.

Rows of a session are independent, whoever they are planned for with.  With one candidate the planner is `Session.plan`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from wam.config import PlannerConfig, SamplingConfig
from wam.inference.candidates import Candidates, imagining
from wam.inference.scores import agreement_scores, goal_scores, last_pictures
from wam.inference.session import Plan, Session
from wam.inference.value import value_of
from wam.model.sampling import Sample
from wam.pretrained import Policy
from wam.relations import trained_valuations, untrained_mode_warning
from wam.timeline import FIRST_BLOCK

Simulate = Callable[[Sequence[Session], np.ndarray], np.ndarray]  # robots and N stretches (B, N, A, d) of each, to the block's frames that would come of each, uint8 (B, N, n, H, W, 3)


@dataclass(frozen=True)
class Search:
    """Everything a plan was chosen from.

    Attributes:
        actions_BNTA: the candidates of the last round, normalised; with `cem`, elites of earlier rounds among them; with `imagined`, only those that were.
        scores_BN: of these, the higher the better.
        outcomes: (B, N, C, k, h, w), what follows from them, or what the mode imagined; None: neither was asked for.
        best_B: the chosen one of each row.
        rounds_RB: best score of each row after each round.
    """

    actions_BNTA: Tensor
    scores_BN: Tensor
    outcomes: Tensor | None
    best_B: Tensor
    rounds_RB: Tensor


class Planner:
    """A policy and how its plans are chosen; it remembers nothing from one plan to the next."""

    def __init__(self, policy: Policy, config: PlannerConfig, simulate: Simulate | None = None):
        """Check that the policy can do what is asked.

        Args:
            simulate: what follows from actions, where `outcomes` asks for a simulator.

        Raises:
            ValueError: outcomes are to be imagined, and the checkpoint was not trained in mode `forward`; a value is asked of one without a value head;
                simulated outcomes, and there is no simulator or nothing looks at them.
            LeakError: its table has no forward dynamics.
        """
        self.policy, self.config, self.simulate = policy, config, simulate if config.outcomes == "simulated" else None
        if config.kind != "none" and config.outcomes == "simulated" and simulate is None:
            raise ValueError("planner.outcomes is 'simulated', and there is no simulator to run ahead; use planner.outcomes=imagined")
        valuations = trained_valuations(policy.config)
        if config.kind != "none" and config.score == "value" and not valuations:
            raise ValueError("planner.score is 'value', but this checkpoint has no trained value head; train one (model.value, training.valuations), or use planner.score=goal or agreement")
        self.follows = config.score == "goal" or (config.score == "value" and "outcome" in valuations)  # scores look at what follows from actions
        self.imagines = self.follows and self.simulate is None
        if self.simulate is not None and not self.follows:
            raise ValueError("planner.outcomes is 'simulated', but this checkpoint's values are of actions (training.valuations), so nothing looks at what follows; use planner.score=goal")
        warning = untrained_mode_warning(policy.config, "forward") if config.kind != "none" and self.imagines else None
        if warning:
            raise ValueError(f"planner.score is {config.score!r}, which imagines what follows from actions: {warning}")

    @torch.no_grad()
    def plan(self, session: Session, mode: str, sampling: SamplingConfig, committed: np.ndarray | None = None) -> Plan:
        """Plan the coming block of every row.

        Args:
            mode: one that gives actions, for drawing candidates.
            committed: the block's first n actions (B, n, action_dim), decided already: every candidate begins with them.

        Returns:
            A plan as `Session.plan`'s; `imagined` is what follows from its actions where that was imagined, else what the mode imagined.

        Raises:
            ValueError: as `Session.plan`; a mode without actions, or a score by goal of a session that has none.
        """
        if self.config.kind == "none" or (self.config.kind == "best_of_n" and self.config.candidates == 1):
            return session.plan(mode, sampling, committed=committed)
        found = self.search(session, mode, sampling, committed)
        rows = torch.arange(len(found.best_B), device=found.best_B.device)
        with session._timed("post"):
            actions = session._physical(Sample(found.actions_BNTA[rows, found.best_B]))
        imagined = None if found.outcomes is None or self.simulate is not None else found.outcomes[rows, found.best_B]
        timings, session.timings = session.timings, {}
        return Plan(actions, imagined, timings)

    @torch.no_grad()
    def search(self, session: Session, mode: str, sampling: SamplingConfig, committed: np.ndarray | None = None) -> Search:
        """What `plan` chooses from, and its choice."""
        self._check(session, mode)
        session._warn_if_untrained(mode)
        candidates = Candidates.open(session, self.config.candidates, session._held(committed))
        how = imagining(sampling, self.config.forward_steps)
        if self.config.kind == "cem" and self.config.prior == "gaussian":
            found = self._judge(candidates, self._around_zero(candidates), how, None)
        else:
            with session._timed("candidates"):
                drawn = candidates.draw(mode, sampling)
            assert drawn.action_BTA is not None
            actions = drawn.action_BTA.unflatten(0, (-1, candidates.count))
            video = None if drawn.video_BCFHW is None else drawn.video_BCFHW.unflatten(0, (-1, candidates.count))
            if self.follows and self.config.imagined is not None:
                candidates, actions = candidates.keep(actions, self.config.imagined)
            found = self._judge(candidates, actions, how, video)
        for _ in range(self.config.iterations - 1 if self.config.kind == "cem" else 0):
            found = self._next_round(candidates, found, how)
        return found

    def _check(self, session: Session, mode: str) -> None:
        if session.block == FIRST_BLOCK:
            raise ValueError("nothing has been observed yet; call observe(first_frame, state) before plan()")
        if mode in ("forward", "inverse", "video"):
            raise ValueError(f"mode {mode!r} does not plan actions from what was observed; a planner needs one that does, such as skip")
        if self.config.score == "goal" and session.target is None:
            raise ValueError("planner.score is 'goal', but this session has no goal image; open it with goals (or, for a model that takes none, targets)")

    # ------------------------------------------------------------------------------------------ scores

    def _judge(self, candidates: Candidates, actions_BNTA: Tensor, how: SamplingConfig, video: Tensor | None) -> Search:
        """Imagine what follows, where the score needs it, and score."""
        session = candidates.session
        with session._timed("outcomes"):
            outcomes = self._outcomes(candidates, actions_BNTA, how) if self.follows else video
        with session._timed("scores"):
            scores = self._scores(session, actions_BNTA, outcomes)
        best = scores.argmax(dim=1)
        return Search(actions_BNTA, scores, outcomes, best, scores.amax(dim=1).unsqueeze(0))

    def _scores(self, session: Session, actions_BNTA: Tensor, outcomes: Tensor | None) -> Tensor:
        if self.config.score == "goal":
            assert outcomes is not None and session.target is not None and session.newest is not None
            return goal_scores(last_pictures(self.policy.codec, outcomes), session.target[:, :, 0], session.newest[:, :, 0], self.config.distance)
        if self.config.score == "value":
            return value_of(session, latents=outcomes) if self.follows else value_of(session, actions=self._physical(session, actions_BNTA))
        return agreement_scores(actions_BNTA)

    def _outcomes(self, candidates: Candidates, actions_BNTA: Tensor, how: SamplingConfig) -> Tensor:
        """What follows from each candidate, (B, N, C, k, h, w)."""
        if self.simulate is None:
            return candidates.imagine(actions_BNTA, how)
        session = candidates.session
        frames = torch.from_numpy(self.simulate(session.members, self._physical(session, actions_BNTA))).to(session.model.device)
        return torch.stack([copy.deepcopy(session.stream).encode(frames[:, n]) for n in range(frames.shape[1])], dim=1)  # as `Session.observe` would

    @staticmethod
    def _physical(session: Session, actions_BNTA: Tensor) -> np.ndarray:
        return np.stack([session._physical(Sample(actions_BNTA[:, n])) for n in range(actions_BNTA.shape[1])], axis=1)

    # ------------------------------------------------------------------------------------------ the cross-entropy method

    def _around_zero(self, candidates: Candidates) -> Tensor:
        """Actions (B, N, A, .) of a Gaussian around 0, each held for the whole block."""
        shape = candidates.noise.action_BTA.shape[1:]
        drawn = self._normal(candidates, shape[1]).unsqueeze(2).expand(-1, -1, shape[0], -1)
        return self._settled(candidates, self.config.sigma * drawn)

    def _next_round(self, candidates: Candidates, found: Search, how: SamplingConfig) -> Search:
        """Fit a Gaussian to the elites and judge what it draws; the elites stay in the running, and the best of both are kept."""
        elites = found.scores_BN.topk(self.config.elites, dim=1).indices
        kept = _take(found.actions_BNTA, elites)
        middle = kept.mean(dim=1, keepdim=True)
        spread = (kept - middle) / max(self.config.elites - 1, 1) ** 0.5
        drawn = middle + torch.einsum("bne,beta->bnta", self._normal(candidates, self.config.elites), spread)
        new = self._judge(candidates, self._settled(candidates, drawn), how, None)
        scores = torch.cat([_take(found.scores_BN, elites), new.scores_BN], dim=1)
        order = scores.topk(self.config.candidates, dim=1).indices
        outcomes = None
        if new.outcomes is not None and found.outcomes is not None:
            outcomes = _take(torch.cat([_take(found.outcomes, elites), new.outcomes], dim=1), order)
        scores = scores.gather(1, order)
        rounds = torch.cat([found.rounds_RB, scores[:, :1].T])
        return Search(_take(torch.cat([kept, new.actions_BNTA], dim=1), order), scores, outcomes, torch.zeros_like(found.best_B), rounds)

    def _normal(self, candidates: Candidates, count: int) -> Tensor:
        """(B, N, count), each row from its own generator."""
        session = candidates.session
        return torch.stack([torch.randn(candidates.count, count, generator=g) for g in session.generators]).to(session.model.device)

    def _settled(self, candidates: Candidates, actions_BNTA: Tensor) -> Tensor:
        """What was drawn, inside the range that memory holds, with what is given in its place and nothing in channels that the robot does not have."""
        session, model = candidates.session, candidates.session.model
        limit = session.normalizer.clip
        out = actions_BNTA if limit is None else actions_BNTA.clamp(-limit, limit)
        held = candidates.held_actions()
        if held is not None:
            out = torch.where(held[1].unsqueeze(-1), held[0].to(out.dtype), out)
        keep = model.action_channels(session.embodiment_B[: session.batch])
        return out if keep is None else out * keep.unsqueeze(1)


def _take(x: Tensor, index_BK: Tensor) -> Tensor:
    """(B, N, ...) to (B, K, ...): each row's own."""
    rows = torch.arange(len(index_BK), device=index_BK.device).unsqueeze(1)
    return x[rows, index_BK]


def search_flops(config: PlannerConfig, imagines: bool, draw: float, outcome: float) -> float:
    """Of one robot's search, from those of one plan and of one imagined outcome; scores cost next to nothing."""
    rounds = config.iterations if config.kind == "cem" else 1
    draws = 0 if config.kind == "cem" and config.prior == "gaussian" else config.candidates
    return draws * draw + ((config.imagined or config.candidates) * rounds * outcome if imagines else 0.0)
