"""How sure a success rate is: counts in, intervals and comparisons out.

A rate without its count says little: 9 of 10 is anything from 60 to 98 %.  So every rate in this codebase comes as `k / n` with
Wilson's interval, two ways of driving are compared on the same episodes (McNemar), and how many episodes a difference takes is
worked out before they are driven.  The formulas are short enough to be written down; none needs a package.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

ALPHA = 0.05  # two-sided, for `episodes_needed`


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


def episodes_needed(p1: float, p2: float, power: float = 0.8) -> int:
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
