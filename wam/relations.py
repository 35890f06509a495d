"""Who attends to whom: one small table, and every mode as a few opened cells.

A cell says which blocks of the key's kind a query may see: none, `<` (earlier blocks), `=` (its own), `<=`, or `all`.
The base table is teacher forcing with a clean copy: noisy tokens see the clean past and themselves, never each other.

            H    S    Vc   V    Ac   A    G
    H      all                                   H sees itself alone, so it can be cached before anything else is known
    S            =                               a state sees itself
    Vc     all   <=   <=        <         all    `Ac <` is strict: else imagined video would leak the actions it is asked about
    V      all   <=   <    =    <         all
    Ac     all   <=   <         <=        all    `Vc <` is strict: actions can be cached when they are committed, before frames arrive
    A      all   <=   <         <     =   all
    G                                     all    a goal image, where there is one; it is no mode: any mode may be given one

A model with a value head has one row more, of a token that nobody sees, so that nothing else changes by it:

    R      all   <=   <         <         all     the value of a block (and R sees itself); a valuation opens `Ac` or `Vc` of its block

A mode opens cells in the same block: `joint` lets actions see the noisy video, `imagine` the clean one, and so on.  Some pairs of
openings leak (video -> actions -> clean video is the target itself, two hops away).  So every table is checked when it is built:
what a predicted token can reach, over any number of layers, must exist when that token is predicted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from wam.cells import ALL, NONE, PAST, PAST_AND_SAME, SAME, read_cells
from wam.config import Config, RelationsConfig, TimelineConfig
from wam.timeline import ACTION_KINDS, FIRST_BLOCK, Kind, Layout

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

_SIGNS = {NONE: frozenset[int](), PAST: frozenset({-1}), SAME: frozenset({0}), PAST_AND_SAME: frozenset({-1, 0}), ALL: frozenset({-1, 0, 1})}  # of block_k - block_q

Cells = Mapping[tuple[Kind, Kind], str]
_H, _S, _VC, _V, _AC, _A, _G, _R = Kind.H, Kind.S, Kind.VC, Kind.V, Kind.AC, Kind.A, Kind.G, Kind.R

BASE: Cells = {
    (_H, _H): ALL,
    (_S, _S): SAME,
    **{(_VC, _H): ALL, (_VC, _S): PAST_AND_SAME, (_VC, _VC): PAST_AND_SAME, (_VC, _AC): PAST, (_VC, _G): ALL},
    **{(_V, _H): ALL, (_V, _S): PAST_AND_SAME, (_V, _VC): PAST, (_V, _V): SAME, (_V, _AC): PAST, (_V, _G): ALL},
    **{(_AC, _H): ALL, (_AC, _S): PAST_AND_SAME, (_AC, _VC): PAST, (_AC, _AC): PAST_AND_SAME, (_AC, _G): ALL},
    **{(_A, _H): ALL, (_A, _S): PAST_AND_SAME, (_A, _VC): PAST, (_A, _AC): PAST, (_A, _A): SAME, (_A, _G): ALL},
    (_G, _G): ALL,
}
VALUE_ROW: Cells = {(_R, _H): ALL, (_R, _S): PAST_AND_SAME, (_R, _VC): PAST, (_R, _AC): PAST, (_R, _G): ALL, (_R, _R): SAME}


class LeakError(ValueError):
    """A table through which a predicted token can reach what does not exist when it is predicted."""


def union(*relations: str) -> str:
    """The relation that sees what any of `relations` sees: `<` and `=` make `<=`."""
    signs = frozenset[int]().union(*(_SIGNS[r] for r in relations))
    return next(name for name, of in _SIGNS.items() if of == signs)


# ------------------------------------------------------------------------------------------------ the table


@dataclass(frozen=True)
class Reach:
    """How far back attention goes; the goal image is always inside.

    Attributes:
        history: in units; None: everything.
        unit: `block`, or `segment`, where a block's video and its actions count as one each (LingBot-VA): video 2b, actions 2b + 1.
        sink: the first frame stays visible, however old.
    """

    history: int | None = None
    unit: str = "block"
    sink: bool = False

    @staticmethod
    def of(timeline: TimelineConfig) -> Reach:
        """The reach that a timeline's config asks for."""
        return Reach(timeline.history, timeline.history_unit, timeline.sink)

    def allow(self, kind_q: Kind, block_q: int, kind_k: Kind, block_k: int) -> bool:
        """Is the key near enough to the query?"""
        if self.history is None or kind_k is Kind.G or (self.sink and kind_k is Kind.H):
            return True
        return abs(self._age(kind_k, block_k) - self._age(kind_q, block_q)) <= self.history

    def _age(self, kind: Kind, block: int) -> int:
        return block if self.unit == "block" else 2 * block + (kind in ACTION_KINDS)

    def mask(self, kinds_q: Tensor, blocks_q: Tensor, kinds_k: Tensor, blocks_k: Tensor) -> Tensor:
        """`allow` on tensors: queries (..., Q) and keys (..., K) to a bool that broadcasts to (..., Q, K)."""
        if self.history is None:
            return torch.ones((), dtype=torch.bool, device=kinds_k.device)
        near = (self._ages(kinds_k, blocks_k).unsqueeze(-2) - self._ages(kinds_q, blocks_q).unsqueeze(-1)).abs() <= self.history
        always = (kinds_k == int(Kind.G)) | ((kinds_k == int(Kind.H)) if self.sink else False)
        return near | always.unsqueeze(-2)

    def _ages(self, kinds: Tensor, blocks: Tensor) -> Tensor:
        if self.unit == "block":
            return blocks
        return 2 * blocks + ((kinds == int(Kind.A)) | (kinds == int(Kind.AC)))


EVERYTHING = Reach()


@dataclass(frozen=True)
class RelationTable:
    """The predicate `allow(query, key)` and its renderings."""

    cells: Cells

    def allow(self, kind_q: Kind, block_q: int, kind_k: Kind, block_k: int, reach: Reach = EVERYTHING) -> bool:
        """May a query of `kind_q` in `block_q` see a key of `kind_k` in `block_k`, within `reach`?"""
        sign = (block_k > block_q) - (block_k < block_q)
        return sign in _SIGNS[self.relation(kind_q, kind_k)] and reach.allow(kind_q, block_q, kind_k, block_k)

    def relation(self, kind_q: Kind, kind_k: Kind) -> str:
        """The cell of a pair of kinds."""
        return self.cells.get((kind_q, kind_k), NONE)

    @cached_property
    def _sees_KK3(self) -> Tensor:
        """(kinds, kinds, 3): by kind of query, kind of key, and sign of block_k - block_q plus 1."""
        return torch.tensor([[[sign in _SIGNS[self.relation(q, k)] for sign in (-1, 0, 1)] for k in Kind] for q in Kind])

    def mask(self, kinds_q: Tensor, blocks_q: Tensor, kinds_k: Tensor, blocks_k: Tensor, reach: Reach = EVERYTHING) -> Tensor:
        """The predicate on tensors: queries (..., Q) and keys (..., K) of kinds and blocks to a bool (..., Q, K)."""
        sign = (blocks_k.unsqueeze(-2) - blocks_q.unsqueeze(-1)).sign()
        seen = self._sees_KK3.to(kinds_q.device)[kinds_q.unsqueeze(-1), kinds_k.unsqueeze(-2), sign + 1]
        return seen & reach.mask(kinds_q, blocks_q, kinds_k, blocks_k)

    def dense(self, layout: Layout, reach: Reach = EVERYTHING) -> Tensor:
        """Bool mask (L, L) of a layout, True where a query may attend.  Worked out by segments, all of whose tokens see the same."""
        kinds_R, blocks_R, segment_L = _segments(layout)
        return self.mask(kinds_R, blocks_R, kinds_R, blocks_R, reach)[segment_L][:, segment_L]

    def refuse_leaks(self, target: Kind, exists: Callable[[Kind, int], bool], name: str, block: int = 1) -> None:
        """Raise `LeakError` if `target` in `block` reaches, over any number of layers, a token that does not exist when it is predicted.

        Three blocks and the first frame suffice: a relation depends on the order of two blocks alone.
        """
        tokens = [(_H, FIRST_BLOCK), (_G, FIRST_BLOCK), (_V, FIRST_BLOCK), *((kind, b) for kind in Kind if kind not in (_H, _G) for b in range(3))]
        start = (target, block)
        came_from: dict[tuple[Kind, int], tuple[Kind, int] | None] = {start: None}
        queue = deque([start])
        while queue:
            here = queue.popleft()
            if not exists(*here):
                raise LeakError(
                    f"table {name!r} leaks into {target.label}: {_path(here, came_from)}, and {_show(here)} does not exist when {_show(start)} is predicted; close a cell on this path"
                )
            for token in tokens:
                if token not in came_from and self.allow(*here, *token):
                    came_from[token] = here
                    queue.append(token)


def _show(token: tuple[Kind, int]) -> str:
    return token[0].label if token[0] in (_H, _G) else f"{token[0].label}[{token[1]}]"


def _path(end: tuple[Kind, int], came_from: dict[tuple[Kind, int], tuple[Kind, int] | None]) -> str:
    steps, token = [], end
    while token is not None:
        steps.append(_show(token))
        token = came_from[token]  # type: ignore[assignment]
    return " -> ".join(reversed(steps))


# ------------------------------------------------------------------------------------------------ masks of a batch


def _segments(layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """Kinds and blocks of a layout's R segments, and the segment of each of its L tokens."""
    kinds, blocks, tokens = (torch.tensor(column, dtype=torch.long) for column in zip(*((int(s.kind), s.block, s.tokens) for s in layout.segments), strict=True))
    return kinds, blocks, torch.repeat_interleave(torch.arange(len(kinds)), tokens)


def dense_masks(tables: Sequence[RelationTable], layout: Layout, reach: Reach = EVERYTHING, hidden_BL: Tensor | None = None) -> Tensor:
    """Bool (B, L, L), one table per sample; keys in `hidden_BL` are seen by nobody but themselves."""
    distinct = {id(t): t for t in tables}
    drawn = {key: table.dense(layout, reach) for key, table in distinct.items()}
    mask_BLL = torch.stack([drawn[id(t)] for t in tables])
    if hidden_BL is None:
        return mask_BLL
    itself_LL = torch.eye(len(layout), dtype=torch.bool, device=mask_BLL.device)
    return mask_BLL & (~hidden_BL.to(mask_BLL.device).unsqueeze(1) | itself_LL)


def block_mask(
    tables: Sequence[RelationTable],
    layout: Layout,
    reach: Reach = EVERYTHING,
    hidden_BL: Tensor | None = None,
    device: torch.device | str = "cpu",
    tile: int = 128,
) -> BlockMask:
    """`dense_masks` for `flex_attention`, one table per sample of the batch, without ever building an (L, L) mask.

    Every token of a segment sees the same, so a tile's allowed pairs can be counted from how many tokens of each of the R segments its
    rows and columns hold: `count = rows_TR allowed_RR columns_RT`.  A tile with none is skipped, a full one needs no mask.
    """
    from torch.nn.attention.flex_attention import BlockMask

    length, batch = len(layout), len(tables)
    kinds_R, blocks_R, segment_L = _segments(layout)
    allowed_BRR = torch.stack([t.mask(kinds_R, blocks_R, kinds_R, blocks_R, reach) for t in tables]).to(device)
    segment_L = segment_L.to(device)
    hidden_BL = torch.zeros(batch, length, dtype=torch.bool, device=device) if hidden_BL is None else hidden_BL.to(device)

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return allowed_BRR[b, segment_L[q], segment_L[k]] & (~hidden_BL[b, k] | (q == k))

    tiles = -(-length // tile)
    rows_TR = torch.zeros(tiles, len(kinds_R), device=device)  # whole numbers below 2^24: exact in float32
    rows_TR.index_put_((torch.arange(length, device=device) // tile, segment_L), torch.ones(length, device=device), accumulate=True)
    itself_BL = hidden_BL & allowed_BRR[:, segment_L, segment_L]
    shown_BTR, itself_BT = _per_tile(~hidden_BL, segment_L, tile, tiles, len(kinds_R)), _per_tile(itself_BL, segment_L, tile, tiles, len(kinds_R)).sum(-1)
    count_BTT = torch.einsum("tr,brs,bus->btu", rows_TR, allowed_BRR.float(), shown_BTR) + torch.diag_embed(itself_BT)
    full_BTT = count_BTT == tile * tile
    partial_BTT = (count_BTT > 0) & ~full_BTT
    return BlockMask.from_kv_blocks(
        *_tile_lists(partial_BTT), *_tile_lists(full_BTT), BLOCK_SIZE=tile, mask_mod=mask_mod, seq_lengths=(length, length)
    )


def _per_tile(which_BL: Tensor, segment_L: Tensor, tile: int, tiles: int, segments: int) -> Tensor:
    """(B, T, R): how many of the chosen tokens each tile holds of each segment."""
    flat = (torch.arange(len(segment_L), device=segment_L.device) // tile) * segments + segment_L
    out = torch.zeros(len(which_BL), tiles * segments, device=segment_L.device)
    return out.index_add_(1, flat, which_BL.float()).unflatten(1, (tiles, segments))


def _tile_lists(chosen_BTT: Tensor) -> tuple[Tensor, Tensor]:
    """How many tiles each row of tiles has (B, 1, T), and which, first the chosen ones (B, 1, T, T)."""
    order = torch.argsort(chosen_BTT.int(), dim=-1, descending=True, stable=True)
    return chosen_BTT.sum(-1, dtype=torch.int32).unsqueeze(1), order.to(torch.int32).unsqueeze(1)


# ------------------------------------------------------------------------------------------------ modes


@dataclass(frozen=True)
class Mode:
    """One way of joining video and actions: the cells it opens, what it is given, and what it predicts.

    Attributes:
        name: as used in configs and on the command line.
        opened: cells that it adds to the base table: with `=`, a cell `<` becomes `<=`.
        given: clean kinds of the *same* block that exist at inference, per predicted kind (beyond the past, H, G and the state).
        predicts: kinds that are supervised in training.
        about: one line for people.
        pinned: noisy kinds that stay at one level, in training and at inference: 1 is pure noise (registers), 0 is the data itself, given.
        live: noisy kinds that must be present at inference, video before actions; default: what is predicted.
        base: the table that `opened` is laid over.
    """

    name: str
    opened: Cells
    given: Mapping[Kind, frozenset[Kind]]
    predicts: frozenset[Kind]
    about: str
    pinned: Mapping[Kind, float] = field(default_factory=dict)
    live: tuple[Kind, ...] = ()
    base: Cells = field(default_factory=lambda: BASE, repr=False)
    table: RelationTable = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.live:
            object.__setattr__(self, "live", tuple(k for k in (_V, _A) if k in self.predicts))
        assert self.pinned.keys() <= set(self.live) and not self.pinned.keys() & self.predicts, f"mode {self.name!r}: what is pinned is live and not predicted"
        cells = {**self.base, **{pair: union(self.base.get(pair, NONE), opened) for pair, opened in self.opened.items()}}
        object.__setattr__(self, "table", RelationTable(cells))
        for target in sorted(self.predicts):
            self.table.refuse_leaks(target, lambda kind, block, target=target: self._exists(kind, block, target), self.name)  # type: ignore[misc]

    def _exists(self, kind: Kind, block: int, target: Kind, own: int = 1) -> bool:
        """Is a token there when `target` of block `own` is predicted?

        H and G; states up to its own block; clean video and actions of earlier blocks; the clean kinds of its own block that are given;
        itself, and the noisy tokens of its own block that are live along with it (which a kind pinned at 0 is, too).
        """
        if kind in (_H, _G):
            return True
        if kind is _S:
            return block <= own
        if kind in (_VC, _AC):
            return block < own or (block == own and kind in self.given.get(target, frozenset()))
        return block == own and (kind is target or kind in self.live)

    def sees(self, kind_q: Kind, kind_k: Kind) -> bool:
        """May a query see a key of its own block?"""
        return self.table.allow(kind_q, 0, kind_k, 0)

    @property
    def denoised(self) -> tuple[Kind, ...]:
        """The live kinds that are not pinned, video before actions: what a solver steps."""
        return tuple(k for k in self.live if k not in self.pinned)


_SEES_VIDEO: Cells = {(_A, _V): SAME}
_MUTUAL: Cells = {(_A, _V): SAME, (_V, _A): SAME}
_BOTH, _VIDEO, _ACTIONS = frozenset({_V, _A}), frozenset({_V}), frozenset({_A})
_FROM_VIDEO, _FROM_ACTIONS = {_A: frozenset({_VC})}, {_V: frozenset({_AC})}

_CLEAN = (
    Mode("skip", {}, {}, _BOTH, "actions from what was observed; future video is only a training signal", live=(_A,)),
    Mode("skip_registers", _SEES_VIDEO, {}, _ACTIONS, "as skip, and actions read video tokens that hold pure noise", pinned={_V: 1.0}, live=(_V, _A)),
    Mode("joint", _SEES_VIDEO, {}, _BOTH, "video and actions denoised together; actions see the video"),
    Mode("joint_mutual", _MUTUAL, {}, _BOTH, "video and actions denoised together; each sees the other"),
    Mode("imagine", {(_A, _VC): SAME}, _FROM_VIDEO, _BOTH, "first the video is imagined, then the actions that lead there", live=(_A,)),
    Mode("inverse", {(_A, _VC): SAME}, _FROM_VIDEO, _ACTIONS, "actions that explain a given video"),
    Mode("forward", {(_V, _AC): SAME}, _FROM_ACTIONS, _BOTH, "video that follows from given actions", live=(_V,)),
    Mode("video", {}, {}, _VIDEO, "video alone: what happens next, whatever is done"),
    Mode("action_only", {}, {}, _ACTIONS, "actions alone, without any video loss (a VLA)"),
)
_SINGLE = (  # conditions are levels of the noisy copy instead of clean tokens (Unified World Models, Zhu et al. 2025, section III)
    Mode("skip_registers", _MUTUAL, {}, _ACTIONS, "actions beside video that stays pure noise", pinned={_V: 1.0}, live=(_V, _A)),
    Mode("imagine", _MUTUAL, {}, _ACTIONS, "first the video is imagined, then the actions beside it, held clean", pinned={_V: 0.0}, live=(_V, _A)),
    Mode("inverse", _MUTUAL, {}, _ACTIONS, "actions beside a given video, held clean", pinned={_V: 0.0}, live=(_V, _A)),
    Mode("forward", _MUTUAL, {}, _VIDEO, "video beside given actions, held clean", pinned={_A: 0.0}, live=(_V, _A)),
    Mode("video", _MUTUAL, {}, _VIDEO, "video beside actions that stay pure noise", pinned={_A: 1.0}, live=(_V, _A)),
)
_VALUATIONS: dict[str, tuple[Kind, str]] = {  # what of its own block a value token sees
    "action": (_AC, "the value of what is about to be done: Q(s, a)"),
    "outcome": (_VC, "the value of what came, or is imagined to come, of it: V(s')"),
}
_FORMS = {"clean": {m.name: m for m in _CLEAN}, "single": {**{m.name: m for m in _CLEAN}, **{m.name: m for m in _SINGLE}}}


class Relations:
    """The relation table of a config, and every mode over it, each checked for leaks before it is handed out.

    With `copies: clean`, conditions stand beside the noisy tokens as clean copies, `Vc` and `Ac`; with `copies: single` (UWM) they are the
    noisy tokens themselves, held at level 0 (given) or 1 (absent), and video and actions see each other in every such mode.
    """

    def __init__(self, config: RelationsConfig | None = None, predict_first_frame: bool = False, values: bool = False):
        """Read the cells of `config` over `BASE`.

        Args:
            predict_first_frame: V in block -1, a noisy copy of H, is predicted too, and so must not see H.
            values: the model has a value head.

        Raises:
            ValueError: an unknown kind or relation.
        """
        config = config or RelationsConfig()
        self.base: Cells = {**BASE, **(VALUE_ROW if values else {}), **parse_cells(config.cells)}
        self.valuations: tuple[str, ...] = tuple(_VALUATIONS) if values else ()
        self.copies = config.copies
        self.modes: tuple[str, ...] = tuple(_FORMS["clean"])
        self._predict_first_frame = predict_first_frame
        self._built: dict[str, Mode] = {}

    @staticmethod
    def of(config: Config) -> Relations:
        """The relations of a whole config.

        Raises:
            ValueError: a window of several blocks whose later blocks would never see an observation.
        """
        relations = Relations(config.relations, config.training.predict_first_frame, config.model.value != "none")
        if config.timeline.blocks > 1 and not relations.remembers:
            raise ValueError(
                f"timeline.blocks is {config.timeline.blocks}, but relations.cells (preset {config.preset!r}) let nothing see earlier blocks; set timeline.blocks=1"
            )
        return relations

    @property
    def remembers(self) -> bool:
        """Is anything of earlier blocks seen?  If not, every plan starts from the newest frame, as H."""
        return any(-1 in _SIGNS[self.base.get((q, k), NONE)] for q in (_V, _A) for k in (_VC, _AC))

    def mode(self, name: str) -> Mode:
        """The mode called `name` over this table.

        Raises:
            ValueError: naming the nearest mode.
            LeakError: with the path along which the table leaks.
        """
        if name not in self.modes:
            near = get_close_matches(str(name), self.modes, n=1)
            raise ValueError(f"unknown mode {name!r}; {f'did you mean {near[0]!r}? ' if near else ''}modes: {', '.join(self.modes)}")
        if name not in self._built:
            mode = replace(_FORMS[self.copies][name], base=self.base)
            if self._predict_first_frame and _V in mode.predicts:
                mode.table.refuse_leaks(_V, lambda kind, block: kind is _G or (kind, block) == (_V, FIRST_BLOCK), name, FIRST_BLOCK)
            self._built[name] = mode
        return self._built[name]


    def valuation(self, name: str) -> Mode:
        """How a value token alone is asked: of a block's actions (`action`) or of its video (`outcome`).

        Raises:
            ValueError: the model has no value head, or there is no such valuation.
            LeakError: with the path along which the table leaks.
        """
        if name not in self.valuations:
            have = f"valuations: {', '.join(self.valuations)}" if self.valuations else "this model has no value head; train one with model.value=success"
            raise ValueError(f"unknown valuation {name!r}; {have}")
        kind, about = _VALUATIONS[name]
        return Mode(f"value of the {name}", {(_R, kind): SAME}, {_R: frozenset({kind})}, frozenset({_R}), about, live=(_R,), base=self.base)

    def valued(self, mode: str, valuation: str) -> Mode:
        """A mode whose blocks have a value token beside all else.  Raises as `mode` and `valuation`."""
        own, value = self.mode(mode), self.valuation(valuation)
        return replace(own, opened={**own.opened, **value.opened}, given={**own.given, **value.given}, predicts=own.predicts | value.predicts)


def parse_cells(cells: Mapping[str, str]) -> dict[tuple[Kind, Kind], str]:
    """Cells as configs write them, `{"Ac->Vc": "<="}`, to pairs of kinds.

    Raises:
        ValueError: as `wam.cells.read_cells`.
    """
    by_label = {kind.label: kind for kind in Kind}
    return {(by_label[q], by_label[k]): relation for (q, k), relation in read_cells(cells).items()}


_DEFAULT = Relations()
MODES: dict[str, Mode] = {name: _DEFAULT.mode(name) for name in _DEFAULT.modes}


def get_mode(name: str) -> Mode:
    """The mode called `name` over the base table.

    Raises:
        ValueError: naming the nearest mode.
    """
    return _DEFAULT.mode(name)



# ------------------------------------------------------------------------------------------------ what a config was trained for


_NEED_MORE = ("inverse", "forward")  # than an observation: the video that comes, or the actions


def trained_modes(config: Config) -> tuple[str, ...]:
    """The modes that are drawn in training."""
    return tuple(name for name, weight in config.training.modes.items() if weight > 0)


def trained_valuations(config: Config) -> tuple[str, ...]:
    """The valuations that are drawn in training; none where the model has no value head."""
    return tuple(name for name, weight in config.training.valuations.items() if weight > 0) if config.model.value != "none" else ()


def acting_modes(config: Config) -> tuple[str, ...]:
    """The trained modes that give actions from what was observed, the one that is trained most first."""
    relations, weights = Relations.of(config), config.training.modes
    acting = [name for name in trained_modes(config) if name != "inverse" and (name == "imagine" or _A in relations.mode(name).denoised)]
    return tuple(sorted(acting, key=lambda name: -weights[name]))


def best_figure(config: Config) -> str | None:
    """The validation figure that names the best step: `training.best`; with `auto` the action error of the first acting mode, or where none acts the loss."""
    if config.training.best != "auto":
        return config.training.best
    return next((f"val/action_mse/{name}" for name in acting_modes(config)), "val/loss")


def untrained_mode_warning(config: Config, name: str) -> str | None:
    """What to say when a mode is asked for that training never showed the network, or None.

    Modes share rows: `skip` trains what `action_only` and `video` need, and independent levels with mass at 0 and 1 train UWM's modes.

    Raises:
        ValueError, LeakError: as `Relations.mode`.
    """
    relations = Relations.of(config)
    mode = relations.mode(name)
    if _is_trained(config, relations, mode):
        return None
    wanted = _A if _A in mode.denoised else _V
    free = [n for n in relations.modes if n not in _NEED_MORE]
    choices = [n for n in free if (m := _legal(relations, n)) and wanted in m.denoised and _is_trained(config, relations, m)]
    choices.sort(key=lambda n: n not in trained_modes(config))
    trained = ", ".join(trained_modes(config))
    choose = f"choose {' or '.join(choices)}, or train it" if choices else "train it"
    return f"mode {name!r} is not what this model was trained for (preset {config.preset!r}, modes {trained}), so its output means little; {choose}: training.modes={{{name}: 1}}"


def _legal(relations: Relations, name: str) -> Mode | None:
    try:
        return relations.mode(name)
    except LeakError:
        return None


def _is_trained(config: Config, relations: Relations, mode: Mode) -> bool:
    shown = any(_shows(config, relations.mode(name), mode) for name in trained_modes(config))
    return shown and (mode.name != "imagine" or _is_trained(config, relations, relations.mode("video")))


def _shows(config: Config, trained: Mode, asked: Mode) -> bool:
    """Did training in one mode show what inference in another needs: the same rows, the same levels, and a loss on what is denoised?"""
    if not set(asked.denoised) <= trained.predicts:
        return False
    if any(trained.table.relation(q, k) != asked.table.relation(q, k) for q in asked.live for k in Kind):
        return False
    return all(_shows_level(config, trained, kind, level) for kind, level in asked.pinned.items())


def _shows_level(config: Config, trained: Mode, kind: Kind, level: float) -> bool:
    if kind in trained.pinned:
        return trained.pinned[kind] == level
    drawn = config.noise.video if kind is _V else config.noise.action
    return config.noise.coupled < 1 and (drawn.at_one if level == 1 else drawn.at_zero) > 0
