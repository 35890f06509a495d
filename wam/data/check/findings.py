"""What a check says: one sentence of where, what was found, what was expected and what to do about it.

`error` is a dataset (or a setting) that trains a policy that cannot work, `warning` one that may, and `info` what only a person can
judge.  A check never repairs anything.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Level = Literal["error", "warning", "info"]
LEVELS: tuple[Level, ...] = ("error", "warning", "info")


@dataclass(frozen=True)
class Finding:
    """One thing that a check found.

    Attributes:
        check: the check's name in `wam.data.check.run.CHECKS`.
        where: file, column, dimension, episodes or setting.
    """

    level: Level
    check: str
    where: str
    found: str
    expected: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.level}: {self.check}: {self.where}: {self.found}; expected {self.expected}: {self.remedy}"


def some(numbers: Iterable[int], most: int = 8) -> str:
    """`3, 5, 7, ... (20 in all)`."""
    listed = list(numbers)
    return ", ".join(map(str, listed[:most])) + (f", ... ({len(listed)} in all)" if len(listed) > most else "")
