"""Intervals and tests against numbers worked out elsewhere (published tables, R)."""

import numpy as np
import pytest

from wam.evaluation.statistics import episodes_needed, hierarchical_interval, mcnemar, percentile, wilson


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
