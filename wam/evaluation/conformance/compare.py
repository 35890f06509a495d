"""What we computed against what is stored: two numbers per output, and nothing left out.

    relative L2    || ours - stored || / || stored ||        structural mistakes move it by 1e-3, a wrong GELU by 4e-5, round-off by 1e-6
    largest        max | ours - stored |                     one wrong token in a large output

An output that nobody computes counts as failed, with a line that says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

RELATIVE_L2 = 1e-5
LARGEST_OVER_RELATIVE = 10.0  # the bound on the largest error is this many times the bound on the relative one (1e-4 by default)


@dataclass(frozen=True)
class Line:
    """One output: errors are None where nothing could be compared, and `note` says why."""

    output: str
    max_abs: float | None
    relative_l2: float | None
    passed: bool
    note: str = ""


@dataclass
class Result:
    """One case.

    Attributes:
        unused: released weights that the release stores and never uses.
        refused: why nothing of it was computed, where that is so.
    """

    case: str
    path: str
    system: str
    lines: list[Line] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    refused: str = ""

    @property
    def passed(self) -> bool:
        """Every output of the case is within tolerance."""
        return bool(self.lines) and all(line.passed for line in self.lines)

    @property
    def worst(self) -> float | None:
        """The largest relative L2 error."""
        return max((line.relative_l2 for line in self.lines if line.relative_l2 is not None), default=None)

    def to_dict(self) -> dict[str, Any]:
        """For JSON; an infinite or undefined error is null (JSON has no number for it)."""
        outputs = [{k: None if isinstance(v, float) and not abs(v) < float("inf") else v for k, v in asdict(line).items()} for line in self.lines]
        worst = self.worst
        finite = worst if worst is not None and worst < float("inf") else None
        return {"case": self.case, "path": self.path, "system": self.system, "passed": self.passed, "worst_relative_l2": finite, "outputs": outputs, "unused_weights": self.unused, "refused": self.refused}


def compare(name: str, stored: Tensor, ours: Tensor, tolerance: float = RELATIVE_L2) -> Line:
    """Errors of one output, in float64."""
    if tuple(stored.shape) != tuple(ours.shape):
        return Line(name, None, None, False, f"ours has shape {list(ours.shape)}, stored is {list(stored.shape)}")
    a, b = stored.double(), ours.detach().cpu().double()
    if not bool(torch.isfinite(b).all()):
        return Line(name, float("inf"), float("inf"), False, "ours holds non-finite numbers")
    difference, size = float((a - b).norm()), float(a.norm())
    largest = float((a - b).abs().max()) if a.numel() else 0.0
    relative = difference / size if size > 0 else (0.0 if difference == 0 else float("inf"))
    return Line(name, largest, relative, relative <= tolerance and largest <= tolerance * LARGEST_OVER_RELATIVE)


def render(result: Result) -> str:
    """A case as text: one row an output."""
    if result.refused:
        return f"{result.case}: FAIL  {result.refused}"
    width = max((len(line.output) for line in result.lines), default=6)
    rows = [f"{result.case} ({result.system}): {result.path}", f"  {'output':<{width}}  {'max abs':>9}  {'rel. L2':>9}"]
    for line in result.lines:
        row = f"  {line.output:<{width}}  {_number(line.max_abs):>9}  {_number(line.relative_l2):>9}  {'pass' if line.passed else 'FAIL'}"
        rows.append(f"{row}  {line.note}" if line.note else row)
    if result.unused:
        rows.append(f"  stored by the release and used by nothing in it: {', '.join(result.unused)}")
    good = sum(line.passed for line in result.lines)
    rows.append(f"  {good} of {len(result.lines)} outputs within tolerance; worst relative L2 {_number(result.worst)}")
    return "\n".join(rows)


def summary(results: Sequence[Result]) -> str:
    """The last line: how many cases and outputs passed."""
    lines = [line for result in results for line in result.lines]
    return f"{sum(r.passed for r in results)} of {len(results)} cases, {sum(line.passed for line in lines)} of {len(lines)} outputs within tolerance"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2e}"
