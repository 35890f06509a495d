"""Who recovers: of the episodes in which something really happened, those that succeed after it, and how long that took."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from wam.evaluation.statistics import wilson


def recovery(episodes: Sequence[Mapping[str, Any]], hz: float) -> dict[str, Any]:
    """Counts of one row in one condition, from the episodes of a `rollout.json`.

    Episodes that ended before anything happened say nothing about recovery; those whose simulator crashed say nothing at all.

    Args:
        hz: control steps a second.
    """
    counted = [e for e in episodes if e.get("outcome") != "crashed"]
    met = [(e, event) for e in counted for event in list(e.get("events", ()))[:1] if event["step"] < e["length"]]
    recovered = [(e, event) for e, event in met if e["success"]]
    low, high = wilson(len(recovered), len(met)) if met else (None, None)
    kinds = dict.fromkeys(sorted(event["kind"] for _, event in met))
    return {
        "disturbed": len(met),
        "recovered": len(recovered),
        "wilson_low": low,
        "wilson_high": high,
        "undisturbed": len(counted) - len(met),
        "seconds_p50": statistics.median((e["length"] - event["step"]) / hz for e, event in recovered) if recovered else None,
        "kinds": {kind: {"disturbed": sum(x["kind"] == kind for _, x in met), "recovered": sum(x["kind"] == kind for _, x in recovered)} for kind in kinds},
    }
