"""Which seeds may be used for what, stated once.

A result counts only if the episodes it is measured on were never trained or tuned on.  A seed fixes an episode's initial state, so
disjoint ranges of seeds keep demonstrations, validation and test apart, for every task and every user of the code.

    0 .......... 9999 | 10000 ...... 19999 | 20000 ........ 29999
    demonstrations    | validation         | test
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

Split = Literal["demonstration", "validation", "test"]

DEMONSTRATION = range(0, 10_000)
VALIDATION = range(10_000, 20_000)
TEST = range(20_000, 30_000)
SPLITS: dict[Split, range] = {"demonstration": DEMONSTRATION, "validation": VALIDATION, "test": TEST}


def split_of(seed: int) -> Split:
    """The split a seed belongs to.

    Raises:
        ValueError: the seed lies in no range.
    """
    for name, seeds in SPLITS.items():
        if seed in seeds:
            return name
    raise ValueError(f"seed {seed} lies in no range; {_ranges()}")


def require_split(seeds: Iterable[int], split: Split) -> None:
    """Check that every seed lies in one split's range.

    Raises:
        ValueError: naming the first seed outside, and the ranges.
    """
    for seed in seeds:
        if seed not in SPLITS[split]:
            raise ValueError(f"seed {seed} is not a {split} seed; {_ranges()}")


def require_disjoint(one: Iterable[int], other: Iterable[int]) -> None:
    """Check that two sets of seeds share none, e.g. those of a dataset and of an evaluation.

    Raises:
        ValueError: naming the seeds in both.
    """
    shared = sorted(set(one) & set(other))
    if shared:
        raise ValueError(f"{len(shared)} seeds are in both sets (first: {shared[:5]}); an evaluation must not reuse the episodes of training; {_ranges()}")


def _ranges() -> str:
    return "ranges: " + ", ".join(f"{name} {seeds.start}..{seeds.stop - 1}" for name, seeds in SPLITS.items())
