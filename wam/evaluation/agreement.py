"""Did it go as imagined?  Per plan of a driven episode, and whether the answer tells successes from failures.

    control steps    at ................ at + block          next plan's `at`: what comes later follows from other actions
    before           z
    imagined             z1'      z2'                        by the plan itself, or by forward dynamics from its actions, aside
    came                 z1       z2                         encoded from `before` on

    d = came - before, d' = imagined - before      agreement = 1 - |d' - d|^2 / (|d'|^2 + |d|^2)      over the patches that move in either

1 is exactly as imagined, 0 what a guess of no change would get, below 0 worse than that; a change imagined that did not come counts as much as one
that came unimagined.  A static scene is easy to predict, so patches that move in neither do not count, and a plan in which nothing moves
has no score.  Both sides are latents, so what the codec cannot show is no disagreement.

Agreement after an episode has gone wrong predicts little: failures last longer, and much of them is a robot that is stuck.  So AUROC is
also given for `early` plans, those made before the shortest episode was over.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wam.evaluation.environments import Floats, Frames, StepResult
from wam.evaluation.episodes import Driver, Watcher, generator_seed
from wam.evaluation.statistics import auroc
from wam.inference.outcome import outcome
from wam.inference.session import Plan, Session
from wam.pretrained import Policy
from wam.relations import untrained_mode_warning
from wam.timeline import Kind

MOVES = 0.05  # mean squared change of a patch's latents, whose variance is 1; still patches of compressed camera video stay below it
SCORES = ("mean", "lowest", "early")


def compare(imagined_CkHW: Tensor, came_CkHW: Tensor, before_CHW: Tensor) -> float | None:
    """Agreement of what was imagined with what came, -1..1; None where nothing moves in either (formula: the module's docstring)."""
    thought, real = (x.float() - before_CHW.float().unsqueeze(1) for x in (imagined_CkHW, came_CkHW))
    changes_kHW = torch.stack([thought.square().mean(dim=0), real.square().mean(dim=0)])
    moving_kHW = changes_kHW.amax(dim=0) > MOVES
    if not bool(moving_kHW.any()):
        return None
    apart = (thought - real).square().mean(dim=0)[moving_kHW].sum()
    return float(1 - apart / changes_kHW.sum(dim=0)[moving_kHW].sum())


def why_not(policy: Policy, mode: str) -> str | None:
    """Why plans of a mode cannot be compared with what comes; None where they can."""
    if Kind.V in policy.model.relations.mode(mode).denoised or mode == "imagine":
        return None
    warning = untrained_mode_warning(policy.config, "forward")
    return None if warning is None else f"mode {mode!r} imagines nothing by itself, and {warning}"


# ------------------------------------------------------------------------------------------------ watching


@dataclass
class _Open:
    """A plan that is still being executed."""

    at: int
    imagined_CkHW: Tensor


@dataclass
class _Row:
    """One robot: its clock, the frames that open plans may need, and what the closed ones scored."""

    now: int = 0
    frames: dict[int, Frames] = field(default_factory=dict)
    open: list[_Open] = field(default_factory=list)
    asked: int = 0
    scores: list[dict[str, Any]] = field(default_factory=list)


class Agreement(Watcher):
    """Scores the plans of a wave; changes nothing of it, and draws from no generator of a session.

    The frame before the first action is not told to watchers; in its place stands the first that comes.

    Attributes:
        sources: how many plans imagined by themselves (`plan`), and for how many `forward` was asked aside.
    """

    def __init__(self, driver: Driver, seeds: Sequence[int]):
        """Watch episodes of `seeds`, one a row.

        Raises:
            ValueError: the mode imagines nothing and forward dynamics was not trained.
        """
        reason = why_not(driver.policy, driver.mode)
        if reason:
            raise ValueError(reason)
        self._driver, self._seeds = driver, seeds
        self._rows = [_Row() for _ in seeds]
        self._made: dict[int, Tensor] = {}
        self._stride, self._folded = driver.policy.config.timeline.stride, driver.policy.codec.temporal_stride
        self._first_inside = driver.policy.config.timeline.first_frame == "inside"
        self.sources: Counter[str] = Counter()

    def planned(self, session: Session, rows: Sequence[int], plan: Plan, sent: Floats, milliseconds: float) -> None:
        for i, row in enumerate(rows):
            mine = self._rows[row]
            mine.asked += 1
            if plan.imagined is not None:
                imagined = plan.imagined[i].cpu()
            else:
                seed = generator_seed(self._driver.noise_seed, int(self._seeds[row]), mine.asked)
                imagined = outcome(session, [i], sent[[i]], self._driver.solver, [seed])[0].cpu()
            begins = self._first_inside and session.block == 0  # its first latent is the frame that was given
            self._made[row] = imagined[:, 1:] if begins else imagined
            self.sources["plan" if plan.imagined is not None else "forward"] += 1

    def placed(self, row: int, at: int) -> None:
        self._rows[row].open.append(_Open(at, self._made.pop(row)))

    def ran(self, rows: Sequence[int], results: Sequence[StepResult]) -> None:
        for row, result in zip(rows, results, strict=True):
            mine = self._rows[row]
            for number, frame in enumerate(result.frames, start=1):
                mine.frames[mine.now + number * self._stride] = frame
            mine.now += len(result.states)
            self._close(mine, over=False)

    def episodes(self) -> list[dict[str, Any]]:
        """Of each seed, when all episodes are over: how many plans were made, and `by_plan` the agreement of each (None: nothing moved, or too little of it came)."""
        for mine in self._rows:
            self._close(mine, over=True)
        return [{"seed": int(seed), "plans": len(mine.scores), "by_plan": mine.scores} for seed, mine in zip(self._seeds, self._rows, strict=True)]

    def _close(self, mine: _Row, over: bool) -> None:
        """Score the plans of which no more can come."""
        while mine.open:
            plan = mine.open[0]
            until = plan.at + plan.imagined_CkHW.shape[1] * self._folded * self._stride
            if len(mine.open) > 1:
                until = min(until, mine.open[1].at)
            if not over and mine.now < until:
                break
            mine.scores.append({"at": plan.at, "agreement": self._score(mine, plan, min(until, mine.now))})
            mine.open.pop(0)
        oldest = mine.open[0].at if mine.open else mine.now
        mine.frames = {at: frame for at, frame in mine.frames.items() if at >= oldest}

    def _score(self, mine: _Row, plan: _Open, until: int) -> float | None:
        """Compare the whole latents that came."""
        count = max(0, until - plan.at) // (self._folded * self._stride)
        times = [plan.at + i * self._stride for i in range(1 + count * self._folded)]
        seen = [mine.frames.get(at) for at in times]
        seen[0] = seen[1] if count and plan.at == 0 else seen[0]
        known = [frame for frame in seen if frame is not None]
        if not count or len(known) < len(seen):
            return None
        policy = self._driver.policy
        with torch.no_grad():
            latents = policy.codec.encode(torch.from_numpy(np.stack(known))[None].to(policy.model.device))[0].cpu()
        return compare(plan.imagined_CkHW[:, :count], latents[:, 1:], latents[:, 0])


# ------------------------------------------------------------------------------------------------ what it says about success


def summarize_agreement(episodes: Sequence[Mapping[str, Any]], results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Agreement by episode, and how well it tells successes from failures.

    Args:
        episodes: as `Agreement.episodes`, of any number of waves.
        results: the `episode_results` of the same seeds: `seed`, `success`, `length`, and `outcome` where a simulator crashed.

    Returns:
        `episodes` with the scores `mean` and `lowest` over their plans and `early`, over those that began before the shortest episode was over; the mean
        of successes and of failures; and `auroc` of each score, or `notes` why there is none.
    """
    by_seed = {int(r["seed"]): r for r in results if r.get("outcome") != "crashed"}
    missing = sorted(int(e["seed"]) for e in episodes if int(e["seed"]) not in {int(r["seed"]) for r in results})
    if missing:
        raise ValueError(f"seeds {missing[:8]} have agreements but no results; give the episode_results of the same episodes")
    kept = [e for e in episodes if int(e["seed"]) in by_seed]
    early = min((int(by_seed[int(e["seed"])]["length"]) for e in kept), default=0)
    rows = [{**e, **_scores(e["by_plan"], early), "success": bool(by_seed[int(e["seed"])]["success"])} for e in kept]
    found, notes = {}, {}
    for name in SCORES:
        scored = [row for row in rows if row[name] is not None]
        won = [row["success"] for row in scored]
        if len(set(won)) < 2:
            notes[name] = f"{sum(won)} successes and {len(won) - sum(won)} failures with a score; AUROC needs both"
        else:
            found[name] = asdict(auroc([row[name] for row in scored], won))
    sides = {side: [row["mean"] for row in rows if row["success"] is success and row["mean"] is not None] for side, success in (("successes", True), ("failures", False))}
    means = {f"mean_of_{side}": float(np.mean(values)) if values else None for side, values in sides.items()}
    return {"early_steps": early, **means, "auroc": found, "notes": notes, "episodes": rows}


def _scores(plans: Sequence[Mapping[str, Any]], early: int) -> dict[str, float | None]:
    known = [p["agreement"] for p in plans if p["agreement"] is not None]
    first = [p["agreement"] for p in plans if p["agreement"] is not None and p["at"] < early]
    return {"mean": float(np.mean(known)) if known else None, "lowest": min(known, default=None), "early": float(np.mean(first)) if first else None}
