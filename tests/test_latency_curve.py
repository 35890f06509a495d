"""Success over added delay: counts and intervals by delay, a paired loss, the frequency that is reached, and a figure."""

from pathlib import Path
from typing import Any

import pytest

from wam.evaluation.latency_curve import curve, draw_curves
from wam.evaluation.statistics import mcnemar, wilson


def entry(wins: int, held: int = 0, episodes: int = 40, first: int = 20000) -> dict[str, Any]:
    rows = [{"seed": first + i, "success": i < wins, "length": 100, "chunks": 10, "held": held, "late": 2} for i in range(episodes)]
    return {"episode_results": rows}


def test_a_loss_is_paired_and_corrected_and_the_frequency_is_what_was_decided(tmp_path: Path) -> None:
    found = curve({100.0: entry(20, held=50), 0.0: entry(36), 50.0: entry(34, held=25)}, control_hz=80)
    delays = [row["delay_ms"] for row in found["points"]]
    zero, middle, last = found["points"]
    assert delays == [0, 50, 100] and (zero["wilson_low"], zero["wilson_high"]) == wilson(36, 40) and "p" not in zero
    assert [row["control_hz_reached"] for row in found["points"]] == [80, 60, 40] and zero["plans_per_second"] == 8 and zero["late"] == 80
    assert middle["difference"] == pytest.approx(-0.05) and middle["p"] == 0.5 == middle["p_corrected"]
    assert last["p_corrected"] == pytest.approx(2 * mcnemar([True] * 20 + [False] * 20, [True] * 36 + [False] * 4))
    assert found["claim"].startswith("36/40 at 0 ms of added delay. The smallest delay at which it succeeds less often is 100 ms: 20/40, -40.0 points (")
    calm = curve({0.0: entry(36), 50.0: entry(34)}, 80)
    assert "No loss is shown up to 50 ms; one of up to" in calm["claim"] and "is not ruled out" in calm["claim"]
    draw_curves({"synchronous": found, "skip": calm}, tmp_path / "latency.png")
    assert (tmp_path / "latency.png").stat().st_size > 10_000


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="50 ms against the smallest delay: the seeds are not the same: only the first drove 20040"):
        curve({0.0: entry(10), 50.0: entry(10, episodes=41)}, 80)
    with pytest.raises(ValueError, match="none below 0"):
        curve({-1.0: entry(3)}, 80)
    with pytest.raises(ValueError, match="at least one"):
        curve({}, 80)
    with pytest.raises(ValueError, match="no curve"):
        draw_curves({}, tmp_path / "x.png")
    old = {"episode_results": [{"seed": 1, "success": True, "length": 8, "chunks": 1}]}
    assert curve({0.0: old}, 80)["points"][0]["control_hz_reached"] is None, "not known is not made up"
