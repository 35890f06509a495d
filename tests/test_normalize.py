"""There and back, the same for numpy and torch, exact percentiles, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wam.data.normalize import Method, Normalizer, statistics

RNG = np.random.default_rng(0)
ROWS = np.concatenate(
    [RNG.normal(3, 2, (1000, 2)), RNG.uniform(-1, 1, (1000, 1)), np.full((1000, 1), 5.0), np.where(np.arange(1000) % 250 == 0, 1.0, -1.0)[:, None]], axis=1
)


@pytest.fixture(params=["quantile", "mean_std", "min_max"])
def normalizer(request: pytest.FixtureRequest) -> Normalizer:
    return Normalizer.fit({"state": ROWS, "action": ROWS[:, :3]}, request.param)


def test_there_and_back(normalizer: Normalizer) -> None:
    x = ROWS.astype(np.float32)
    normal = normalizer.normalize("state", x)
    kept = np.ones_like(x, bool) if normalizer.clip is None else np.abs(normal) < normalizer.clip
    assert kept.mean() > 0.95 and normal.dtype == np.float32
    np.testing.assert_allclose(normalizer.unnormalize("state", normal)[kept], x[kept], atol=1e-5)
    assert normalizer.keys["state"].constant == (3,)
    assert normalizer.normalize("state", ROWS[0] + np.eye(5)[3])[3] == 1, "a dimension that does not move keeps its unit"
    assert (normal[:, 3] == 0).all() and np.unique(normal[:, 4]).size == 2


def test_numpy_and_torch_agree(normalizer: Normalizer) -> None:
    x = ROWS.astype(np.float32).reshape(10, 100, 5)
    for apply in (normalizer.normalize, normalizer.unnormalize):
        np.testing.assert_array_equal(apply("state", x), apply("state", torch.from_numpy(x)).numpy())
    assert normalizer.normalize("state", torch.ones(5, dtype=torch.int64)).dtype == torch.float32
    assert normalizer.normalize("state", torch.ones(5, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_quantiles_are_exact_and_clipped() -> None:
    normalizer = Normalizer.fit({"action": ROWS}, "quantile")
    low, high = np.quantile(ROWS, (0.01, 0.99), axis=0)
    np.testing.assert_allclose(normalizer.normalize("action", low)[:3], -1, atol=1e-12)
    np.testing.assert_allclose(normalizer.normalize("action", high)[:3], 1, atol=1e-12)
    assert normalizer.normalize("action", np.full(5, 1e6)).tolist() == [1.5] * 5
    assert normalizer.normalize("action", np.array([0, 0, 0, 5, 1.0]))[4] == 1, "a rare event keeps its range"
    assert Normalizer.fit({"action": ROWS}, "quantile", clip=None).normalize("action", np.full(5, 1e6)).max() > 1e5
    assert Normalizer.fit({"action": ROWS}, "mean_std").clip is None


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from(["quantile", "mean_std", "min_max", "none"]), min_size=1, max_size=4), st.sampled_from(["quantile", "mean_std"]), st.integers(0, 99))
def test_parts_with_methods_of_their_own_are_those_methods_side_by_side(methods: list[Method], whole: Method, seed: int) -> None:
    rng = np.random.default_rng(seed)
    columns = [rng.normal(rng.uniform(-9, 9), rng.uniform(0, 5), (60, int(rng.integers(1, 3)))) * rng.integers(0, 2) for _ in methods]
    joined = Normalizer.of_parts({"action": [(statistics("action", x, m), m) for x, m in zip(columns, methods, strict=True)]}, whole)
    assert Normalizer.from_dict(json.loads(json.dumps(joined.to_dict()))) == joined
    rows = np.concatenate(columns, axis=1)
    for scale in (1.0, 3.0):  # three times as far out, some of it is clipped
        alone = [Normalizer.fit({"action": x}, m).normalize("action", scale * x) for x, m in zip(columns, methods, strict=True)]
        np.testing.assert_array_equal(joined.normalize("action", scale * rows), np.concatenate(alone, axis=1))
        np.testing.assert_array_equal(joined.normalize("action", torch.from_numpy(scale * rows)).numpy(), np.concatenate(alone, axis=1))
    kept = np.abs(joined.normalize("action", rows)) < 1.5
    np.testing.assert_allclose(joined.unnormalize("action", joined.normalize("action", rows))[kept], rows[kept], atol=1e-9)


def test_saved_and_loaded_to_the_bit(normalizer: Normalizer, tmp_path: Path) -> None:
    normalizer.save(tmp_path / "normalizer.json")
    assert Normalizer.load(tmp_path / "normalizer.json") == normalizer
    assert Normalizer.from_dict(json.loads(json.dumps(normalizer.to_dict()))) == normalizer


def test_refusals(tmp_path: Path) -> None:
    normalizer = Normalizer.fit({"state": ROWS})
    with pytest.raises(ValueError, match=r"state has shape \(2, 4\); its statistics have 5 dimensions"):
        normalizer.normalize("state", np.zeros((2, 4)))
    with pytest.raises(ValueError, match="no normalisation statistics for 'action'; there are state"):
        normalizer.unnormalize("action", torch.zeros(5))
    with pytest.raises(ValueError, match="unknown normalisation 'max'"):
        Normalizer.fit({"state": ROWS}, "max")
    for rows in (np.zeros((0, 3)), np.zeros(3)):
        with pytest.raises(ValueError, match="at least one row"):
            Normalizer.fit({"state": rows})
    broken = ROWS.copy()
    broken[7, 2] = np.nan
    with pytest.raises(ValueError, match=r"state is not finite in dimension 2 .*training row 7"):
        Normalizer.fit({"state": broken})
    with pytest.raises(FileNotFoundError, match=r"absent.json"):
        Normalizer.load(tmp_path / "absent.json")
    tree = normalizer.to_dict()
    for change, message in (
        ({"version": 99}, "version 99"),
        ({"keys": {"state": {"center": [0.0]}}}, "lack or garble 'scale'"),
        ({"keys": {"state": {"center": [0.0], "scale": [0.0], "constant": []}}}, "positive scales"),
    ):
        (tmp_path / "bad.json").write_text(json.dumps(tree | change))
        with pytest.raises(ValueError, match=rf"bad.json: .*{message}"):
            Normalizer.load(tmp_path / "bad.json")
