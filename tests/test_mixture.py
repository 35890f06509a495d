"""Several datasets in one run: whose turn it is, what of a sample is looked at, and that mixing changes nothing but the mix."""

from __future__ import annotations

import numpy as np
import pytest

from wam.data.mixture import MixtureSampler, Quotas


def test_quotas_follow_weights_and_add_up() -> None:
    for weights in ((1.0, 1.0), (3.0, 1.0, 0.5), (1000.0, 1.0), (0.3, 0.3, 0.4)):
        quotas = Quotas(weights, seed=1)
        shares = np.array(weights) / sum(weights)
        row = np.concatenate([quotas.order(cycle) for cycle in range(6)])
        for cycle in range(7):
            count = np.bincount(row[: cycle * quotas.cycle], minlength=len(weights))
            np.testing.assert_array_equal(count, quotas.before(cycle))
            assert np.abs(count - shares * cycle * quotas.cycle).max() <= 1, "within one sample of its share, however long the run"
        assert np.bincount(quotas.order(0), minlength=len(weights)).min() >= 1
        assert not np.array_equal(quotas.order(0), quotas.order(1))


def test_order_is_a_function_of_seed_and_place() -> None:
    sizes, weights = (7, 20, 3), (1.0, 2.0, 1.0)
    sampler = MixtureSampler(sizes, weights, 5, seed=3)
    row = np.concatenate([sampler.indices(step) for step in range(200)])
    for step in (150, 0, 77):
        np.testing.assert_array_equal(MixtureSampler(sizes, weights, 5, seed=3).indices(step), row[5 * step : 5 * step + 5])
    np.testing.assert_array_equal(MixtureSampler(sizes, weights, 25, seed=3).indices(3), row[75:100])  # batches are cut from one row
    assert not np.array_equal(MixtureSampler(sizes, weights, 5, seed=4).indices(0), row[:5])
    starts = (0, 7, 27)
    for part, (size, start) in enumerate(zip(sizes, starts, strict=True)):
        own = row[(row >= start) & (row < start + size)] - start
        for epoch in range(len(own) // size):
            assert sorted(own[epoch * size : (epoch + 1) * size]) == list(range(size)), "every window once in each of a dataset's epochs"
        assert len(own) / size == pytest.approx(sampler.passes(200)[part])
    epochs = [draw.epoch for step in range(200) for draw in sampler.draws(step) if draw.index >= 27]
    assert epochs == sorted(epochs) and epochs[-1] == (len(epochs) - 1) // 3
    with pytest.raises(ValueError, match="expected at least"):
        MixtureSampler(sizes, weights, 0, 0)
