"""Intervals and tests against numbers worked out elsewhere (published tables, R), and against brute force."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wam.evaluation.statistics import (
    Table,
    auroc,
    claim,
    episodes_needed,
    episodes_needed_paired,
    hierarchical_interval,
    hierarchical_paired_bootstrap,
    holm,
    mcnemar,
    pair,
    paired_bootstrap,
    paired_interval,
    percentile,
    wilson,
)

PAIRS = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60)


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(45, 50, 78.6, 95.7), (48, 50, 86.5, 98.9), (450, 500, 87.1, 92.3), (9, 10, 59.6, 98.2), (0, 10, 0.0, 27.8), (10, 10, 72.2, 100.0)],
)
def test_wilson(successes: int, n: int, low: float, high: float) -> None:
    assert [round(100 * bound, 1) for bound in wilson(successes, n)] == [low, high]


def test_wilson_narrows_with_episodes_and_with_less_confidence() -> None:
    def width(bounds: tuple[float, float]) -> float:
        return bounds[1] - bounds[0]

    assert width(wilson(450, 500)) < width(wilson(45, 50))
    assert width(wilson(45, 50, z=1.0)) < width(wilson(45, 50))


@pytest.mark.parametrize(("p1", "p2", "n"), [(0.8, 0.9, 199), (0.9, 0.95, 435), (0.6, 0.8, 82), (0.4, 0.7, 42)])
def test_episodes_needed(p1: float, p2: float, n: int) -> None:
    assert episodes_needed(p1, p2) == episodes_needed(p2, p1) == n
    assert episodes_needed(p1, p2, power=0.9) > n


def test_mcnemar() -> None:
    same = [True] * 30 + [False] * 5
    assert mcnemar(same, same) == 1.0
    # 12 episodes only a solves, 2 only b: 2 * (1 + 14 + 91) / 2^14
    a, b = same + [True] * 12 + [False] * 2, same + [False] * 12 + [True] * 2
    assert mcnemar(a, b) == mcnemar(b, a) == pytest.approx(2 * 106 / 2**14)
    assert mcnemar([True] * 5, [False] * 5) == pytest.approx(2 / 2**5)
    assert mcnemar([True, False], [False, True]) == 1.0, "a p-value is at most one"


def test_percentile() -> None:
    assert percentile([3, 1, 2], 50) == 2.0
    assert percentile([0, 10], 95) == pytest.approx(9.5)


def test_a_mean_over_tasks_is_as_sure_as_its_tasks_are_alike() -> None:
    alike = hierarchical_interval([[True] * 10 + [False] * 10] * 10)
    unlike = hierarchical_interval([[True] * 20] * 5 + [[False] * 20] * 5)
    assert unlike == pytest.approx((0.2, 0.8), abs=0.01), "five tasks of ten: a coin thrown ten times (binomial quantiles)"
    assert alike[1] - alike[0] < 0.3 * (unlike[1] - unlike[0])
    tasks = [[i < wins for i in range(20)] for wins in (20, 12, 3)]
    rng, means = np.random.default_rng(1), []
    for _ in range(4000):  # episodes drawn one by one
        chosen = [tasks[i] for i in rng.integers(3, size=3)]
        means.append(np.mean([np.mean(rng.choice(task, size=20)) for task in chosen]))
    assert hierarchical_interval(tasks) == pytest.approx(tuple(np.quantile(means, (0.025, 0.975))), abs=0.02)


def test_nonsense_is_refused() -> None:
    with pytest.raises(ValueError, match=r"2 tasks with \[1, 0\] episodes"):
        hierarchical_interval([[True], []])
    with pytest.raises(ValueError, match="3 successes in 2 episodes"):
        wilson(3, 2)
    with pytest.raises(ValueError, match="0 episodes"):
        wilson(0, 0)
    with pytest.raises(ValueError, match="two different rates"):
        episodes_needed(0.5, 0.5)
    with pytest.raises(ValueError, match="of 0 values"):
        percentile([], 50)
    with pytest.raises(ValueError, match="1 and 2 episodes"):
        mcnemar([True], [True, False])


# ------------------------------------------------------------------------------------------------ pairs


def outcomes(both: int, only_a: int, only_b: int, neither: int) -> tuple[list[bool], list[bool]]:
    return [True] * (both + only_a) + [False] * (only_b + neither), [True] * both + [False] * only_a + [True] * only_b + [False] * neither


def multinomial(counts: tuple[int, ...], chances: tuple[float, ...]) -> float:
    ways = math.factorial(sum(counts)) // math.prod(math.factorial(c) for c in counts)
    return ways * math.prod(p**c for p, c in zip(chances, counts, strict=True))


@settings(max_examples=60, deadline=None)
@given(PAIRS)
def test_a_paired_interval_holds_the_difference_and_turns_with_the_names(pairs: list[tuple[bool, bool]]) -> None:
    a, b = zip(*pairs, strict=True)
    difference, (low, high) = Table.of(a, b).difference, paired_interval(a, b)
    assert difference == pytest.approx(np.mean(a) - np.mean(b))
    assert -1 <= low <= difference <= high <= 1 and low < high, "never a point, also where no episode differs"
    assert paired_interval(b, a) == pytest.approx((-high, -low))


@pytest.mark.parametrize("chances", [(0.5, 0.25, 0.05, 0.2), (0.8, 0.1, 0.05, 0.05), (0.3, 0.2, 0.2, 0.3)])
def test_a_paired_interval_holds_the_truth_as_often_as_it_says(chances: tuple[float, ...]) -> None:
    n, covered, truth = 14, 0.0, chances[1] - chances[2]
    for counts in itertools.product(range(n + 1), repeat=3):
        if sum(counts) <= n:
            cells = (*counts, n - sum(counts))
            low, high = paired_interval(*outcomes(*cells))
            covered += multinomial(cells, chances) * (low <= truth <= high)
    assert 0.93 < covered < 0.995, "careful where rates are high and seeds are few"


def test_a_paired_bootstrap_resamples_episodes() -> None:
    a, b = outcomes(20, 12, 4, 14)
    rng, differences = np.random.default_rng(1), []
    for _ in range(4000):
        chosen = rng.integers(50, size=50)
        differences.append(np.mean(np.asarray(a)[chosen]) - np.mean(np.asarray(b)[chosen]))
    assert paired_bootstrap(a, b) == pytest.approx(tuple(np.quantile(differences, (0.025, 0.975))), abs=0.021)
    assert paired_bootstrap(a, b, seed=3) == paired_bootstrap(a, b, seed=3)
    assert paired_interval(a, b) == pytest.approx(paired_bootstrap(a, b), abs=0.04)


def test_a_mean_difference_over_tasks_resamples_tasks_and_their_pairs() -> None:
    tasks = [outcomes(10, 8, 0, 2), outcomes(5, 2, 2, 11), outcomes(18, 0, 1, 1)]
    rng, means = np.random.default_rng(1), []
    for _ in range(4000):
        drawn = []
        for index in rng.integers(3, size=3):
            chosen = rng.integers(20, size=20)
            a, b = (np.asarray(won)[chosen] for won in tasks[index])
            drawn.append(a.mean() - b.mean())
        means.append(np.mean(drawn))
    assert hierarchical_paired_bootstrap(tasks) == pytest.approx(tuple(np.quantile(means, (0.025, 0.975))), abs=0.02)
    one = outcomes(20, 12, 4, 14)
    assert hierarchical_paired_bootstrap([one]) == pytest.approx(paired_bootstrap(*one), abs=0.021)


@pytest.mark.parametrize(("only_a", "only_b"), [(0.2, 0.1), (0.25, 0.05), (0.1, 0.02)])
def test_pairs_needed_find_the_difference(only_a: float, only_b: float) -> None:
    """Of the planned number of episodes, McNemar's exact test finds it about as often as promised; of half as many, much less often."""

    def power(n: int) -> float:
        draws = np.random.default_rng(0).multinomial(n, [only_a, only_b, 1 - only_a - only_b], size=1500)
        found = {tuple(d): mcnemar([True] * d[0] + [False] * d[1], [False] * d[0] + [True] * d[1]) < 0.05 for d in np.unique(draws[:, :2], axis=0).tolist()}
        return float(np.mean([found[tuple(d)] for d in draws[:, :2].tolist()]))

    n = episodes_needed_paired(only_a, only_b)
    assert n == episodes_needed_paired(only_b, only_a) < episodes_needed_paired(only_a, only_b, power=0.9)
    assert 0.7 < power(n) < 0.85, "an exact test is a little more careful than the formula's normal curve"
    assert power(n // 2) < 0.6


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_holm_is_the_closed_test_of_bonferroni(p_values: list[float]) -> None:
    """A hypothesis falls where every set that holds it falls: p is the largest over these sets of their size times their smallest p."""
    for index, adjusted in enumerate(holm(p_values)):
        sets = [s for size in range(1, len(p_values) + 1) for s in itertools.combinations(range(len(p_values)), size) if index in s]
        assert adjusted == pytest.approx(max(min(1.0, len(s) * min(p_values[i] for i in s)) for s in sets))


def test_a_claim_says_what_is_supported_and_what_is_not() -> None:
    def by_seed(won: list[bool]) -> dict[int, bool]:
        return {20000 + i: w for i, w in enumerate(won)}

    a, b = (by_seed(won) for won in outcomes(20, 14, 2, 14))
    said = claim(a, b, ("surprise", "blind"))
    assert said.startswith("surprise 34/50 (54-79 %) against blind 22/50 (31-58 %) on the same 50 seeds: +24.0 points (")
    assert "p = 0.0042" in said and said.endswith("surprise succeeds more often.")
    assert claim(b, a, ("blind", "surprise")).endswith("surprise succeeds more often.")
    assert claim(a, b, p=0.2).endswith("so it may be smaller.") and "corrected for several comparisons" in claim(a, b, p=0.2)

    a, b = (by_seed(won) for won in outcomes(30, 6, 3, 11))
    needed = episodes_needed_paired(6 / 50, 3 / 50)
    assert needed > 50 and claim(a, b).endswith(f"This does not show a difference; if it is as large as it looks, about {needed} seeds would show it (80% power).")
    assert claim(a, a).endswith("No difference was seen, which does not show that there is none.")


def test_other_seeds_are_refused_by_name() -> None:
    a = dict.fromkeys(range(20000, 20012), True)
    assert pair({2: True, 1: False}, {1: True, 2: False}) == ([False, True], [True, False])
    with pytest.raises(ValueError, match=r"only the first drove 20000, 20001.*20007 and 2 more; only the second drove 7; drive both with the same --seed"):
        claim(a, {7: True, 20010: True, 20011: False})
    with pytest.raises(ValueError, match="0 and 12 episodes"):
        pair({}, a)


# ------------------------------------------------------------------------------------------------ AUROC


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=30))
def test_auroc_counts_pairs_and_its_interval_holds_it(rows: list[tuple[int, bool]]) -> None:
    good, bad = [s for s, won in rows if won], [s for s, won in rows if not won]
    if not good or not bad:
        with pytest.raises(ValueError, match="at least one of each"):
            auroc([s for s, _ in rows], [won for _, won in rows])
        return
    found = auroc([s for s, _ in rows], [won for _, won in rows])
    assert found.value == pytest.approx(np.mean([1.0 if g > b else 0.5 if g == b else 0.0 for g in good for b in bad]))
    assert 0 <= found.low <= found.value <= found.high <= 1 and found.low < found.high
    turned = auroc([-s for s, _ in rows], [won for _, won in rows])
    assert (turned.value, turned.low, turned.high) == pytest.approx((1 - found.value, 1 - found.high, 1 - found.low))


def test_the_interval_of_auroc_is_delongs_in_the_middle_and_no_point_at_the_end() -> None:
    rng = np.random.default_rng(0)
    good, bad = rng.normal(0.8, 1, 60), rng.normal(0, 1, 40)
    found = auroc([*good, *bad], [True] * 60 + [False] * 40)
    ahead = (good[:, None] > bad[None]).astype(float)
    spread = 1.96 * np.sqrt(ahead.mean(1).var(ddof=1) / 60 + ahead.mean(0).var(ddof=1) / 40)  # DeLong, DeLong and Clarke-Pearson 1988
    assert (found.low, found.high) == pytest.approx((found.value - spread, found.value + spread), abs=0.02)
    perfect = auroc([3, 4, 5, 6, 1, 2], [True] * 4 + [False] * 2)
    assert perfect.value == perfect.high == 1 and perfect.low < 0.6, "two failures told apart prove little"
    held = []
    for _ in range(400):  # normal scores a standard deviation apart: the area is 0.760
        found = auroc(np.concatenate([rng.normal(1, 1, 20), rng.normal(0, 1, 6)]).tolist(), [True] * 20 + [False] * 6)
        held.append(found.low <= 0.7602 <= found.high)
    assert 0.92 < np.mean(held) < 0.99
    with pytest.raises(ValueError, match="1 not finite"):
        auroc([float("nan"), 1.0], [True, False])
