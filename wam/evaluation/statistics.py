"""How sure a success rate is: counts in, intervals and comparisons out.

A rate without its count says little: 9 of 10 is anything from 60 to 98 %.  So every rate in this codebase comes as `k / n` with
Wilson's interval, two ways of driving are compared on the same episodes, and how many episodes a difference takes is worked out
before they are driven.  The formulas are short enough to be written down; none needs a package.

    same seeds         B succeeds   B fails
    A succeeds           both       only A      only these two say
    A fails             only B      neither     which is better

`claim` puts a comparison into a sentence or two, with what it does not support.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

ALPHA = 0.05  # two-sided: a difference with a smaller p-value is called significant
POWER = 0.8  # with which `claim` would have a difference found
NAMED = 8  # seeds that a message names


def wilson(successes: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval of a rate (Wilson 1927), in 0..1; it stays inside, also for 0 of n and n of n.

    Args:
        successes: k of n.
        n: episodes.
        z: normal quantile; 1.96 for 95 %.

    Raises:
        ValueError: no episodes, or more successes than episodes.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"{successes} successes in {n} episodes; expected at least one episode and 0..n successes")
    p = successes / n
    centre = p + z * z / (2 * n)
    spread = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def percentile(values: Sequence[float], q: float) -> float:
    """The q-th percentile (0..100), interpolated between neighbours.

    Raises:
        ValueError: no values, or q outside 0..100.
    """
    if len(values) == 0 or not 0 <= q <= 100:
        raise ValueError(f"percentile {q} of {len(values)} values; expected 0..100 and at least one value")
    return float(np.percentile(np.asarray(values, np.float64), q))


def episodes_needed(p1: float, p2: float, power: float = POWER) -> int:
    """Episodes of *each* of two ways of driving, so that a difference between rates p1 and p2 is found with probability `power`.

    Two independent proportions, two-sided at 5 % (Fleiss, Levin and Paik 2003, section 4.2, without continuity correction).

    Raises:
        ValueError: rates or power that are not between 0 and 1, or equal rates, which no number of episodes tells apart.
    """
    if not (0 <= p1 <= 1 and 0 <= p2 <= 1 and 0 < power < 1) or p1 == p2:
        raise ValueError(f"rates {p1} and {p2} with power {power}; expected two different rates in 0..1 and a power between 0 and 1")
    z_alpha, z_power = NormalDist().inv_cdf(1 - ALPHA / 2), NormalDist().inv_cdf(power)
    mean = (p1 + p2) / 2
    root = z_alpha * math.sqrt(2 * mean * (1 - mean)) + z_power * math.sqrt(p1 * (1 - p1) + p2 * (1 - p2))
    return math.ceil((root / (p1 - p2)) ** 2)


def mcnemar(a: Sequence[bool], b: Sequence[bool]) -> float:
    """Exact two-sided p-value that two ways of driving succeed equally often, from the same episodes in the same order (McNemar 1947).

    Only episodes in which they differ count: under the hypothesis each of those is a fair coin.

    Raises:
        ValueError: different numbers of episodes.
    """
    if len(a) != len(b):
        raise ValueError(f"{len(a)} and {len(b)} episodes; a paired test needs the same episodes, in the same order")
    only_a = sum(bool(x) and not y for x, y in zip(a, b, strict=True))
    only_b = sum(bool(y) and not x for x, y in zip(a, b, strict=True))
    n = only_a + only_b
    tail = sum(math.comb(n, i) for i in range(min(only_a, only_b) + 1)) / 2**n
    return min(1.0, 2 * tail)


def hierarchical_interval(outcomes: Sequence[Sequence[bool]], draws: int = 10_000, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean success rate over tasks, in 0..1: tasks are resampled, and episodes within each (Davison and Hinkley 1997, section 3.8).

    Args:
        outcomes: of each task, whether its episodes succeeded.

    Raises:
        ValueError: no tasks, or a task without episodes.
    """
    if not outcomes or not all(len(task) for task in outcomes):
        raise ValueError(f"{len(outcomes)} tasks with {[len(task) for task in outcomes]} episodes; expected at least one task, and at least one episode of each")
    rng = np.random.default_rng(seed)
    rates = np.array([np.mean(np.asarray(task, np.float64)) for task in outcomes])
    counts = np.array([len(task) for task in outcomes])
    chosen = rng.integers(len(outcomes), size=(draws, len(outcomes)))
    means = (rng.binomial(counts[chosen], rates[chosen]) / counts[chosen]).mean(axis=1)
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


# ------------------------------------------------------------------------------------------------ the same episodes, driven twice


def pair(a: Mapping[int, bool], b: Mapping[int, bool]) -> tuple[list[bool], list[bool]]:
    """Outcomes by seed of two ways of driving, in the order of the seeds.

    Raises:
        ValueError: no seeds, or seeds that only one of the two drove; names them.
    """
    if not a or not b:
        raise ValueError(f"{len(a)} and {len(b)} episodes; a paired comparison needs at least one seed that both drove")
    alone = {name: sorted(one.keys() - other.keys()) for name, one, other in (("first", a, b), ("second", b, a))}
    if any(alone.values()):
        told = "; ".join(f"only the {name} drove {_some(seeds)}" for name, seeds in alone.items() if seeds)
        raise ValueError(f"the seeds are not the same: {told}; drive both with the same --seed and --episodes")
    seeds = sorted(a)
    return [bool(a[seed]) for seed in seeds], [bool(b[seed]) for seed in seeds]


def _some(seeds: Sequence[int]) -> str:
    return f"{', '.join(map(str, seeds[:NAMED]))}{f' and {len(seeds) - NAMED} more' if len(seeds) > NAMED else ''}"


@dataclass(frozen=True)
class Table:
    """How many of the same episodes both, only one, or neither solved."""

    both: int
    only_a: int
    only_b: int
    neither: int

    @classmethod
    def of(cls, a: Sequence[bool], b: Sequence[bool]) -> Table:
        """Count outcomes of the same episodes in the same order.

        Raises:
            ValueError: different numbers of episodes, or none.
        """
        if len(a) != len(b) or not len(a):
            raise ValueError(f"{len(a)} and {len(b)} episodes; expected outcomes of the same episodes, in the same order, and at least one")
        x, y = np.asarray(a, np.bool_), np.asarray(b, np.bool_)
        return cls(int((x & y).sum()), int((x & ~y).sum()), int((~x & y).sum()), int((~x & ~y).sum()))

    @property
    def episodes(self) -> int:
        """n."""
        return self.both + self.only_a + self.only_b + self.neither

    @property
    def difference(self) -> float:
        """Rate of A minus rate of B, -1..1."""
        return (self.only_a - self.only_b) / self.episodes


def paired_interval(a: Sequence[bool], b: Sequence[bool], z: float = 1.96) -> tuple[float, float]:
    """Interval of a paired difference of rates, A minus B, from the two Wilson intervals (Newcombe 1998, Statistics in Medicine 17, method 10).

    Unlike a bootstrap it does not shrink to a point where few or no episodes differ.

    Raises:
        ValueError: different numbers of episodes, or none.
    """
    t = Table.of(a, b)
    n, wins_a, wins_b = t.episodes, t.both + t.only_a, t.both + t.only_b
    (low_a, high_a), (low_b, high_b) = wilson(wins_a, n, z), wilson(wins_b, n, z)
    margins = wins_a * (n - wins_a) * wins_b * (n - wins_b)
    alike = float(t.both * t.neither - t.only_a * t.only_b)
    alike = max(alike - n / 2, 0.0) if alike > 0 else alike  # continuity: episodes are alike only where more than half an episode says so
    phi = alike / math.sqrt(margins) if margins else 0.0
    p, q, d = wins_a / n, wins_b / n, t.difference

    def reach(u: float, v: float) -> float:
        return math.sqrt(max(0.0, u * u - 2 * phi * u * v + v * v))

    return d - reach(p - low_a, high_b - q), d + reach(high_a - p, q - low_b)


def paired_bootstrap(a: Sequence[bool], b: Sequence[bool], draws: int = 10_000, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of the difference of rates, A minus B, by resampling episodes with both of their outcomes (Efron and Tibshirani 1993, chapter 13).

    Raises:
        ValueError: different numbers of episodes, or none.
    """
    return _quantiles(_resampled(Table.of(a, b), draws, np.random.default_rng(seed)))


def hierarchical_paired_bootstrap(tasks: Sequence[tuple[Sequence[bool], Sequence[bool]]], draws: int = 10_000, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean over tasks of the paired difference: tasks are resampled, and the episodes of each with both of their outcomes.

    Args:
        tasks: of each task, outcomes of A and of B for the same episodes in the same order.

    Raises:
        ValueError: no tasks, or one whose episodes are not paired.
    """
    if not tasks:
        raise ValueError("0 tasks; expected at least one")
    rng = np.random.default_rng(seed)
    tables = [Table.of(a, b) for a, b in tasks]
    chosen = rng.integers(len(tables), size=(draws, len(tables)))
    differences = np.empty(chosen.shape)
    for index, table in enumerate(tables):
        here = chosen == index
        differences[here] = _resampled(table, int(here.sum()), rng)
    return _quantiles(differences.mean(axis=1))


def _resampled(table: Table, draws: int, rng: np.random.Generator) -> np.ndarray:
    """Differences (draws,) of resampled episodes: drawing n of them is drawing how many are of each kind."""
    n = table.episodes
    counts = rng.multinomial(n, np.array([table.only_a, table.only_b, table.both + table.neither]) / n, size=draws)
    return (counts[:, 0] - counts[:, 1]) / n


def _quantiles(values: np.ndarray) -> tuple[float, float]:
    return float(np.quantile(values, 0.025)), float(np.quantile(values, 0.975))


def episodes_needed_paired(only_a: float, only_b: float, power: float = POWER) -> int:
    """Episodes, driven by both, so that McNemar's test finds the difference with probability `power` (Connor 1987, Biometrics 43).

    Pairs need fewer than two independent samples (`episodes_needed`) where the same episodes are hard for both.

    Args:
        only_a, only_b: shares of all episodes that only one of the two solves, as seen or as expected.

    Raises:
        ValueError: shares outside 0..1 or above 1 together, equal shares, or a power that is not between 0 and 1.
    """
    if not (min(only_a, only_b) >= 0 and only_a + only_b <= 1 and 0 < power < 1) or only_a == only_b:
        raise ValueError(f"shares {only_a} and {only_b} with power {power}; expected two different shares that are at most 1 together, and a power between 0 and 1")
    z_alpha, z_power = NormalDist().inv_cdf(1 - ALPHA / 2), NormalDist().inv_cdf(power)
    differ, difference = only_a + only_b, only_a - only_b
    root = z_alpha * math.sqrt(differ) + z_power * math.sqrt(differ - difference**2)
    return math.ceil((root / difference) ** 2)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values of several comparisons, each enlarged so that all of them together are wrong at most as often as one (Holm 1979).

    Raises:
        ValueError: a p-value outside 0..1.
    """
    if not all(0 <= p <= 1 for p in p_values):
        raise ValueError(f"p-values {list(p_values)}; expected numbers in 0..1")
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def claim(a: Mapping[int, bool], b: Mapping[int, bool], names: tuple[str, str] = ("A", "B"), p: float | None = None) -> str:
    """What a comparison on the same seeds supports, in one or two sentences.

    Args:
        a, b: whether each seed's episode succeeded.
        names: of the two ways of driving.
        p: the p-value where it is to be another than McNemar's, such as one of several comparisons after `holm`; the sentence says that it is corrected.

    Raises:
        ValueError: the seeds are not the same; names them.
    """
    first, second = pair(a, b)
    table, value = Table.of(first, second), mcnemar(first, second) if p is None else p
    low, high = paired_interval(first, second)
    rates = [f"{name} {sum(won)}/{len(won)} ({_range(*wilson(sum(won), len(won)))})" for name, won in zip(names, (first, second), strict=True)]
    test = "McNemar's exact test" if p is None else "McNemar's exact test, corrected for several comparisons"
    facts = f"{rates[0]} against {rates[1]} on the same {table.episodes} seeds: {points(table.difference, low, high)}, p = {value:.2g} ({test})."
    return f"{facts} {_verdict(table, value, names)}"


def _verdict(table: Table, p: float, names: tuple[str, str]) -> str:
    d = table.difference
    if p < ALPHA:
        return f"{names[0] if d > 0 else names[1]} succeeds more often."
    if d == 0:
        return "No difference was seen, which does not show that there is none."
    needed = episodes_needed_paired(table.only_a / table.episodes, table.only_b / table.episodes)
    if needed > table.episodes:
        return f"This does not show a difference; if it is as large as it looks, about {needed} seeds would show it ({POWER:.0%} power)."
    return f"This does not show a difference; {needed} seeds would be enough in {POWER:.0%} of cases if it is as large as it looks, so it may be smaller."


def points(difference: float, low: float, high: float) -> str:
    """A difference of rates in percentage points, with its sign and its interval."""
    return f"{100 * difference:+.1f} points ({100 * low:+.1f} to {100 * high:+.1f})"


def _range(low: float, high: float) -> str:
    return f"{100 * low:.0f}-{100 * high:.0f} %"


# ------------------------------------------------------------------------------------------------ does a score tell successes from failures?


@dataclass(frozen=True)
class Auroc:
    """Probability that a success scores above a failure, ties half (Hanley and McNeil 1982), with its 95 % interval."""

    value: float
    low: float
    high: float
    successes: int
    failures: int


def auroc(scores: Sequence[float], outcomes: Sequence[bool], z: float = 1.96) -> Auroc:
    """Area under the ROC curve of a score, with the interval of Newcombe (2006, Statistics in Medicine 25, part 2, method 5).

    The interval holds every area that lies within `z` of its own standard error of the value seen, as Wilson's does for a rate; so it
    does not shrink to a point where a few failures are told apart perfectly, as those of DeLong and of the bootstrap do.

    Args:
        scores: higher is to mean success.

    Raises:
        ValueError: different numbers, scores that are not finite, or outcomes that are all alike.
    """
    values, won = np.asarray(scores, np.float64), np.asarray(outcomes, np.bool_)
    if values.shape != won.shape or values.ndim != 1 or not np.isfinite(values).all():
        raise ValueError(f"{values.size} scores ({int((~np.isfinite(values)).sum())} not finite) of {won.size} episodes; expected one finite score of each")
    m, n = int(won.sum()), int((~won).sum())
    if not m or not n:
        raise ValueError(f"{m} successes and {n} failures; AUROC needs at least one of each")
    ahead = values[won][:, None] - values[~won][None, :]
    value = float((ahead > 0).mean() + 0.5 * (ahead == 0).mean())

    def near(area: float) -> bool:
        extra = (m + n) / 2 - 1
        variance = area * (1 - area) * (1 + extra * ((1 - area) / (2 - area) + area / (1 + area))) / (m * n)
        return abs(value - area) <= z * math.sqrt(variance)

    return Auroc(value, _edge(near, value, 0.0), _edge(near, value, 1.0), m, n)


def _edge(near: Callable[[float], bool], inside: float, outside: float) -> float:
    """The last number between `inside` and `outside` that is near, by bisection; `outside` itself where it is."""
    if near(outside):
        return outside
    for _ in range(60):
        middle = (inside + outside) / 2
        inside, outside = (middle, outside) if near(middle) else (inside, middle)
    return inside
