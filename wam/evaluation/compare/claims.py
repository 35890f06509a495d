"""Which rows are tested against which, the tests, and the sentences that rest on them.

    reference      every other row against it, in every condition        one family: corrected together (Holm)
    questions      a few pairs that ask the question directly            another family

Both were chosen before anything was driven.  A sentence is made from one test (or one interval) and names its episodes; where a test found
nothing, it says how large a difference is still possible and how many episodes one as large as that seen would take.  Episodes whose
simulator crashed say nothing about a policy: their seeds are left out of both rows, and counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np

from wam.evaluation.compare.plan import Condition
from wam.evaluation.statistics import ALPHA, Table, claim, episodes_needed_paired, holm, mcnemar, pair, paired_interval

Family = Literal["reference", "questions"]
Outcomes = Mapping[str, Mapping[Condition, Mapping[int, bool | None]]]  # row, condition, seed: whether the episode succeeded, None where the simulator crashed
QUESTIONS = (  # pairs of rows (variant/mode) and what they ask; asked where both rows are there
    ("fast_wam/skip", "vla/action_only", "Does predicting video in training help a policy that imagines nothing when it acts?"),
    ("imagine/imagine", "fast_wam/skip", "Trained for one thing each: does imagining first beat leaving it out?"),
    ("dreamzero/joint_mutual", "fast_wam/skip", "Trained for one thing each: does denoising video beside the actions beat leaving it out?"),
    ("imagine/imagine", "dreamzero/joint_mutual", "Trained for one thing each: is video better before the actions than beside them?"),
    ("all/imagine", "imagine/imagine", "Imagining first: do weights that know every mode do it as well as weights trained for it?"),
    ("all/joint_mutual", "dreamzero/joint_mutual", "Beside the actions: do weights that know every mode do it as well as weights trained for it?"),
)
CEILING = 0.95  # a condition in which every row succeeds at least this often tells no rows apart


@dataclass(frozen=True)
class Claim:
    """One comparison of two rows on the same seeds.

    Attributes:
        both, only_a, only_b, neither: episodes by who succeeded.
        difference, low, high: rate of A minus rate of B, with its 95% interval (Newcombe).
        p, p_holm: McNemar's exact test, and corrected for all comparisons of the family.
        tests: comparisons in the family.
        must_differ: episodes that must differ, all one way, before the corrected test could find anything.
        needed: episodes that would show the difference seen with 80% power; None where none was seen.
        left_out: seeds that crashed in either row.
        says: the sentences.
    """

    family: Family
    condition: Condition
    a: str
    b: str
    question: str
    both: int
    only_a: int
    only_b: int
    neither: int
    difference: float
    low: float
    high: float
    p: float
    p_holm: float = 1.0
    tests: int = 1
    must_differ: int = 0
    needed: int | None = None
    left_out: int = 0
    says: str = ""

    @property
    def episodes(self) -> int:
        """n."""
        return self.both + self.only_a + self.only_b + self.neither

    @property
    def shows(self) -> bool:
        """Is the difference significant after correction?"""
        return self.p_holm < ALPHA


def claims(outcomes: Outcomes, reference: str) -> list[Claim]:
    """Every comparison of both families, corrected, in words.

    Raises:
        ValueError: two rows that did not drive the same seeds.
    """
    found = []
    families: tuple[tuple[Family, list[tuple[str, str, str]]], ...] = (
        ("reference", [(row, reference, f"Does {row} differ from {reference}?") for row in outcomes if row != reference]),
        ("questions", [(a, b, question) for a, b, question in QUESTIONS if a in outcomes and b in outcomes and reference not in (a, b)]),
    )
    for family, pairs in families:
        own = [_compare(family, condition, a, b, question, outcomes) for a, b, question in pairs for condition in outcomes[a]]
        corrected = holm([c.p for c in own])
        found += [_spoken(replace(c, p_holm=p, tests=len(own), must_differ=must_differ(len(own))), outcomes) for c, p in zip(own, corrected, strict=True)]
    return found


def _compare(family: Family, condition: Condition, a: str, b: str, question: str, outcomes: Outcomes) -> Claim:
    first, second, left_out = _same(outcomes[a][condition], outcomes[b][condition])
    won = pair(first, second)
    t, (low, high) = Table.of(*won), paired_interval(*won)
    needed = episodes_needed_paired(t.only_a / t.episodes, t.only_b / t.episodes) if t.only_a != t.only_b else None
    return Claim(family, condition, a, b, question, t.both, t.only_a, t.only_b, t.neither, t.difference, low, high, mcnemar(*won), needed=needed, left_out=left_out)


def _same(a: Mapping[int, bool | None], b: Mapping[int, bool | None]) -> tuple[dict[int, bool], dict[int, bool], int]:
    """Without the seeds that crashed (None) in either."""
    crashed = {seed for side in (a, b) for seed, won in side.items() if won is None}
    first, second = ({seed: bool(won) for seed, won in side.items() if seed not in crashed} for side in (a, b))
    return first, second, len(crashed)


def _spoken(c: Claim, outcomes: Outcomes) -> Claim:
    first, second, _ = _same(outcomes[c.a][c.condition], outcomes[c.b][c.condition])
    says = claim(first, second, (c.a, c.b), c.p_holm)
    if not c.shows:
        differ = c.only_a + c.only_b
        says += f" They differ in {differ} of {c.episodes} episodes; with {c.tests} comparisons at least {c.must_differ} must, all one way, before any difference counts"
        says += "." if c.must_differ <= c.episodes else f", so {c.episodes} episodes could not have shown one."
    return replace(c, says=f"{says} {c.left_out} seeds are left out: their simulator crashed." if c.left_out else says)


def must_differ(tests: int) -> int:
    """Fewest episodes that must differ, all one way, for McNemar's exact p-value to pass Holm's first step among `tests` comparisons."""
    count = 1
    while 2 * 0.5**count * tests >= ALPHA:
        count += 1
    return count


# ------------------------------------------------------------------------------------------------ latency


def slower(a: Sequence[float], b: Sequence[float], draws: int = 4000) -> tuple[float, float, float]:
    """How many times as long A takes as B: ratio of medians with its 95% interval, by resampling rounds (both were timed in turns).

    Raises:
        ValueError: rows that were not timed in the same rounds.
    """
    if len(a) != len(b) or not len(a):
        raise ValueError(f"{len(a)} and {len(b)} plans; expected the same rounds of both")
    x, y = np.asarray(a), np.asarray(b)
    chosen = np.random.default_rng(0).integers(len(x), size=(draws, len(x)))
    ratios = np.median(x[chosen], axis=1) / np.median(y[chosen], axis=1)
    return float(np.median(x) / np.median(y)), float(np.quantile(ratios, 0.025)), float(np.quantile(ratios, 0.975))


def speeds(milliseconds: Mapping[str, Sequence[float]], reference: str) -> list[dict[str, Any]]:
    """Each row's plans against the reference's, in words: a sign test over the rounds (which plan took longer?), corrected for the number of rows."""
    rows = [row for row in milliseconds if row != reference] if reference in milliseconds else []
    signs = [_signs(milliseconds[row], milliseconds[reference]) for row in rows]
    out = []
    for row, p in zip(rows, holm(signs), strict=True):
        ratio, low, high = slower(milliseconds[row], milliseconds[reference])
        shows = p < ALPHA and (low > 1 or high < 1)
        says = (
            f"A plan of {row} takes {ratio:.2f} times as long as one of {reference} (95% interval {low:.2f} to {high:.2f}; medians of {len(milliseconds[row])} plans each, timed in turns; "
            f"sign test over the turns, corrected, p = {p:.2g}).{'' if shows else ' This does not show a difference.'}"
        )
        out.append({"row": row, "ratio": ratio, "low": low, "high": high, "p": p, "shows": shows, "says": says})
    return out


def _signs(a: Sequence[float], b: Sequence[float]) -> float:
    """Exact two-sided p-value that A takes longer as often as B; only rounds in which they differ count, as episodes do."""
    return mcnemar([x > y for x, y in zip(a, b, strict=True)], [x < y for x, y in zip(a, b, strict=True)])


# ------------------------------------------------------------------------------------------------ as a whole


def answer(found: Sequence[Claim], reference: str) -> str:
    """The comparison in a sentence for each condition, from the family of the reference."""
    parts = []
    for condition in dict.fromkeys(c.condition for c in found):
        mine = [c for c in found if c.family == "reference" and c.condition == condition]
        better, worse = ([c.a for c in mine if c.shows and (c.difference > 0) is up] for up in (True, False))
        where = "Undisturbed" if condition == "calm" else "Disturbed"
        told = [f"{_names(better)} succeed{'s' if len(better) == 1 else ''} more often than {reference}"] if better else []
        told += [f"{_names(worse)} succeed{'s' if len(worse) == 1 else ''} less often than {reference}"] if worse else []
        if not mine:
            continue
        smallest = min(c.episodes for c in mine)
        if told:
            parts.append(f"{where}, on {smallest} seeds: {'; '.join(told)} (corrected p < {ALPHA:g}).")
        else:
            widest = max(max(abs(c.low), abs(c.high)) for c in mine)
            parts.append(f"{where}, on {smallest} seeds: no row differs significantly from {reference}; differences of up to {100 * widest:.0f} points remain possible.")
    return " ".join(parts)


def _names(rows: Sequence[str]) -> str:
    return ", ".join(rows[:-1]) + (" and " if len(rows) > 1 else "") + rows[-1]


def limits(found: Sequence[Claim], rates: Mapping[Condition, Mapping[str, tuple[int, int]]], facts: Mapping[str, Any]) -> list[str]:
    """What no test here can support, each from a count.

    Args:
        rates: successes and episodes of each row by condition.
        facts: `env`, `trained` (names of variants with weights of their own), `seed` of training, `taken`.
    """
    out = []
    if len(facts["trained"]) > 1:
        out.append(
            f"Each of the {len(facts['trained'])} variants was trained once (seed {facts['seed']}). Tests between two variants say whether these weights differ on these seeds; "
            "how much of that is the luck of one training, one training cannot say. Rows of one variant share their weights, so between those there is no such luck."
        )
    out.append(f"One task was driven ({facts['env']}): the number of tasks is 1, so nothing here says how rows compare on others.")
    for condition, rows in rates.items():
        good = {row: won / n for row, (won, n) in rows.items() if n}
        if good and min(good.values()) >= CEILING:
            out.append(f"{'Undisturbed' if condition == 'calm' else 'Disturbed'} episodes are at their ceiling: every row succeeds in at least {100 * min(good.values()):.0f}% of them, which leaves too little to tell rows apart.")
        if good and max(good.values()) <= 1 - CEILING:
            out.append(f"{'Undisturbed' if condition == 'calm' else 'Disturbed'} episodes are at their floor: no row succeeds in more than {100 * max(good.values()):.0f}% of them, so they tell no rows apart; train longer.")
    if facts["taken"]:
        out.append(f"{_names(facts['taken'])} {'was' if len(facts['taken']) == 1 else 'were'} not trained here, so data and budget are equal only as far as the table of variants shows.")
    return out


def to_json(found: Sequence[Claim]) -> list[dict[str, Any]]:
    """Claims as they are written."""
    return [{**asdict(c), "episodes": c.episodes, "shows": c.shows} for c in found]
