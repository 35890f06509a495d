"""Who attends to whom: one small table, and every mode as a few changed cells.

A cell says which blocks of the key's kind a query may see: none, `<` (earlier blocks), `=` (its own), `<=`, or `all`.
The base table is teacher forcing with a clean copy: noisy tokens see the clean past and themselves, never each other.

            H    S    Vc   V    Ac   A
    H      all                              H sees itself, so it can be cached
    S            =                          a state sees itself
    Vc     all   <=   <=        <           `Ac <` is strict: else imagined video would leak the actions it is asked about
    V      all   <=   <    =    <
    Ac     all   <=   <         <=          `Vc <` is strict: actions can be cached when they are committed, before frames arrive
    A      all   <=   <         <     =

A mode opens cells in the same block: `joint` lets actions see the noisy video, `imagine` the clean one, and so on.  Some pairs of
openings leak (video -> actions -> clean video is the target itself, two hops away).  So every table is checked when it is built:
what a supervised token can reach, over any number of layers, must exist when that token is predicted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cached_property

import torch
from torch import Tensor

from wam.timeline import FIRST_BLOCK, Kind, Layout

NONE, PAST, SAME, PAST_AND_SAME, ALL = "", "<", "=", "<=", "all"
_CODES = {NONE: 0, PAST: 1, SAME: 2, PAST_AND_SAME: 3, ALL: 4}

Cells = Mapping[tuple[Kind, Kind], str]
_H, _S, _VC, _V, _AC, _A = Kind.H, Kind.S, Kind.VC, Kind.V, Kind.AC, Kind.A

BASE: Cells = {
    (_H, _H): ALL,
    (_S, _S): SAME,
    **{(_VC, _H): ALL, (_VC, _S): PAST_AND_SAME, (_VC, _VC): PAST_AND_SAME, (_VC, _AC): PAST},
    **{(_AC, _H): ALL, (_AC, _S): PAST_AND_SAME, (_AC, _VC): PAST, (_AC, _AC): PAST_AND_SAME},
    **{(_V, _H): ALL, (_V, _S): PAST_AND_SAME, (_V, _VC): PAST, (_V, _AC): PAST, (_V, _V): SAME},
    **{(_A, _H): ALL, (_A, _S): PAST_AND_SAME, (_A, _VC): PAST, (_A, _AC): PAST, (_A, _A): SAME},
}


class LeakError(ValueError):
    """A table through which a supervised token can reach what it is asked to predict."""


@dataclass(frozen=True)
class Mode:
    """One way of joining video and actions: the cells it opens, what it gives, and what it predicts.

    Attributes:
        name: as used in configs and on the command line.
        opened: cells that differ from `BASE`.
        given: clean kinds of the *same* block that exist at inference, per predicted kind (beyond the past, H and the state).
        predicts: kinds that are supervised in training.
        about: one line for people.
    """

    name: str
    opened: Cells
    given: Mapping[Kind, frozenset[Kind]]
    predicts: frozenset[Kind]
    about: str
    table: RelationTable = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        table = RelationTable({**BASE, **self.opened})
        for kind in self.predicts:
            table.refuse_leaks(kind, self.given.get(kind, frozenset()), self.name)
        object.__setattr__(self, "table", table)


@dataclass(frozen=True)
class RelationTable:
    """The predicate `allow(query, key)` and its renderings."""

    cells: Cells

    def allow(self, kind_q: Kind, block_q: int, kind_k: Kind, block_k: int, history: int | None = None) -> bool:
        """May a query of `kind_q` in `block_q` see a key of `kind_k` in `block_k`, at most `history` blocks back?"""
        relation = self.cells.get((kind_q, kind_k), NONE)
        inside = history is None or abs(block_k - block_q) <= history
        return inside and {NONE: False, PAST: block_k < block_q, SAME: block_k == block_q, PAST_AND_SAME: block_k <= block_q, ALL: True}[relation]

    @cached_property
    def _codes(self) -> Tensor:
        codes = torch.zeros(len(Kind), len(Kind), dtype=torch.int64)
        for (q, k), relation in self.cells.items():
            codes[q, k] = _CODES[relation]
        return codes

    def mask(self, kinds_q: Tensor, blocks_q: Tensor, kinds_k: Tensor, blocks_k: Tensor, history: int | None = None) -> Tensor:
        """The predicate on tensors: queries (..., Q) and keys (..., K) of kinds and blocks to a bool (..., Q, K)."""
        code = self._codes.to(kinds_q.device)[kinds_q.unsqueeze(-1), kinds_k.unsqueeze(-2)]
        delta = blocks_k.unsqueeze(-2) - blocks_q.unsqueeze(-1)
        seen = (code == 4) | ((code == 3) & (delta <= 0)) | ((code == 2) & (delta == 0)) | ((code == 1) & (delta < 0))
        return seen if history is None else seen & (delta.abs() <= history)

    def dense(self, layout: Layout, history: int | None = None) -> Tensor:
        """Bool mask (L, L) of a layout, True where a query may attend."""
        return self.mask(layout.kinds_L, layout.blocks_L, layout.kinds_L, layout.blocks_L, history)

    def refuse_leaks(self, target: Kind, given: frozenset[Kind], name: str) -> None:
        """Raise `LeakError` if `target` in block 1 reaches, over any number of layers, a token that does not exist when it is predicted.

        What exists: H; states up to its own block; clean video and actions of earlier blocks; the noisy tokens of its own block
        that are denoised along with it; and the clean kinds of its own block that the mode is `given`.
        """
        tokens = [(Kind.H, FIRST_BLOCK), *((kind, block) for kind in Kind if kind is not Kind.H for block in range(3))]
        start = (target, 1)
        came_from: dict[tuple[Kind, int], tuple[Kind, int] | None] = {start: None}
        queue = deque([start])
        while queue:
            here = queue.popleft()
            if not _exists(*here, own=1, given=given):
                raise LeakError(f"table {name!r} leaks into {target.label}: {_path(here, came_from)}, and {_show(here)} does not exist when {_show(start)} is predicted")
            for token in tokens:
                if token not in came_from and self.allow(*here, *token):
                    came_from[token] = here
                    queue.append(token)


def _exists(kind: Kind, block: int, own: int, given: frozenset[Kind]) -> bool:
    if kind in (Kind.H, Kind.S):
        return block <= own
    if kind in (Kind.VC, Kind.AC):
        return block < own or (block == own and kind in given)
    return block == own


def _show(token: tuple[Kind, int]) -> str:
    return token[0].label if token[0] is Kind.H else f"{token[0].label}[{token[1]}]"


def _path(end: tuple[Kind, int], came_from: dict[tuple[Kind, int], tuple[Kind, int] | None]) -> str:
    steps, token = [], end
    while token is not None:
        steps.append(_show(token))
        token = came_from[token]  # type: ignore[assignment]
    return " -> ".join(reversed(steps))


_BOTH = frozenset({_V, _A})
MODES: dict[str, Mode] = {
    mode.name: mode
    for mode in (
        Mode("skip", {}, {}, _BOTH, "actions from what was observed; future video is only a training signal"),
        Mode("joint", {(_A, _V): SAME}, {}, _BOTH, "video and actions denoised together; actions see the video"),
        Mode("joint_mutual", {(_A, _V): SAME, (_V, _A): SAME}, {}, _BOTH, "video and actions denoised together; each sees the other"),
        Mode("imagine", {(_A, _VC): PAST_AND_SAME}, {_A: frozenset({_VC})}, _BOTH, "first the video is imagined, then the actions that lead there"),
        Mode("inverse", {(_A, _VC): PAST_AND_SAME}, {_A: frozenset({_VC})}, frozenset({_A}), "actions that explain a given video"),
        Mode("forward", {(_V, _AC): PAST_AND_SAME}, {_V: frozenset({_AC})}, _BOTH, "video that follows from given actions"),
        Mode("video", {}, {}, frozenset({_V}), "video alone: what happens next, whatever is done"),
        Mode("action_only", {}, {}, frozenset({_A}), "actions alone, without any video loss (a VLA)"),
    )
}


def get_mode(name: str) -> Mode:
    """The mode called `name`.

    Raises:
        ValueError: naming the nearest mode.
    """
    if name not in MODES:
        near = get_close_matches(name, MODES, n=1)
        raise ValueError(f"unknown mode {name!r}; {f'did you mean {near[0]!r}? ' if near else ''}modes: {', '.join(MODES)}")
    return MODES[name]


def describe(name: str) -> str:
    """A mode as text: its table (changed cells marked `*`) and what it is for."""
    mode = get_mode(name)
    head = "      " + "".join(f"{k.label:>6}" for k in Kind)
    rows = [head]
    for q in Kind:
        cells = [mode.table.cells.get((q, k), NONE) or "." for k in Kind]
        marks = ["*" if (q, k) in mode.opened else "" for k in Kind]
        rows.append(f"{q.label:<6}" + "".join(f"{c + m:>6}" for c, m in zip(cells, marks, strict=True)))
    predicts = ", ".join(k.label for k in Kind if k in mode.predicts)
    return f"{mode.name}: {mode.about}\npredicts {predicts}; rows attend to columns; * differs from the base table\n\n" + "\n".join(rows)
