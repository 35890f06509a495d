"""How a system's outputs are computed: in stages, each of which says which outputs are its own.

Output names carry their parameters (`infer_action_10steps/action`, `sample/released_skip8/chunk1/video`), so a stage is made from names,
not from a list of known cases.  A name that no stage claims, and one that its stage does not compute, fail by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Stage:
    """One computation and the outputs of the case that it accounts for; `run` may return more than those."""

    outputs: tuple[str, ...]
    run: Callable[[], dict[str, Tensor]]


@dataclass(frozen=True)
class Plan:
    """A case made ready: its stages, and the released weights that nothing in the release uses."""

    system: str
    stages: tuple[Stage, ...]
    unused: tuple[str, ...] = ()


def group(names: Iterable[str], key: Callable[[str], str | None]) -> dict[str, tuple[str, ...]]:
    """Names by `key(name)`, in order of first appearance; those of key None are left out (nobody claims them)."""
    out: dict[str, list[str]] = {}
    for name in names:
        what = key(name)
        if what is not None:
            out.setdefault(what, []).append(name)
    return {what: tuple(members) for what, members in out.items()}
