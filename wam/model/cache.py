"""The KV cache: what one robot (or a batch of them) has really observed and done.

A ring of blocks beside the first frame and the goal.  Each block owns the same slots in every layer, so writing a kind again replaces
it: an observed frame replaces the imagined one, and a block that left the history is overwritten by the newest.

    slots     | G | H | region 0 | region 1 | ... |          block b lives in region b mod (number of regions)
    a region  | S | Ac ... Ac | Vc ......... Vc |             kinds a model has no tokens of take no slots

Keys are stored before rotation, with absolute positions beside them: a session can run for hours, and what a query sees is decided by
the relation table from kinds and blocks, as in training.  Rows of a batch may be at different blocks.  The bookkeeping lives on the
CPU, so that deciding what is visible never waits for a GPU.

Registers (noisy video that is only looked at, never denoised) are written where the block's clean video will be.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from wam.model.rotary import Rotary
from wam.relations import Reach, RelationTable
from wam.timeline import Clock, Kind, Segment

Write = Callable[[Tensor, Tensor], None]  # keeps unrotated keys and values of one layer

_EMPTY = -(10**9)
_IN_REGION = (Kind.S, Kind.AC, Kind.VC)


@dataclass(frozen=True)
class Prefix:
    """What a group of queries sees of the cache: rotated keys and values per layer, with room for the queries' own behind them.

    Attributes:
        keys, values: per layer, (B, S + own, H, Dh); the last `own` are written at every solver step.
        seen: S.
        mask_B11S: bool, or None when every row sees all S.
        shared: what comes before, of rows that stand for several of these (`wam.model.shared`); None: nothing.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    seen: int
    mask_B11S: Tensor | None
    shared: Prefix | None = None

    def of_layer(self, layer: int) -> Prefix:
        """What one layer needs."""
        shared = None if self.shared is None else self.shared.of_layer(layer)
        return Prefix((self.keys[layer],), (self.values[layer],), self.seen, self.mask_B11S, shared)


class KVCache:
    """Preallocated keys and values of clean tokens, batched over sessions; see the module's docstring."""

    def __init__(self, clock: Clock, kinds: frozenset[Kind], batch: int, layers: int, heads: int, head_dim: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32):
        t = clock.timeline
        self.clock, self.reach = clock, Reach.of(t)
        self.regions = t.history + 1 if t.history_unit == "block" else t.history // 2 + 2
        first, self._starts = 0, {}
        for kind in (Kind.G, Kind.H):
            if kind in kinds:
                self._starts[kind] = first
                first += clock.tokens(kind)
        self._first_region, offset, self._offsets = first, 0, {}
        for kind in _IN_REGION:
            if kind in kinds:
                self._offsets[kind] = offset
                offset += clock.tokens(kind)
        self._offsets[Kind.V] = self._offsets.get(Kind.VC, 0)
        self.region_slots = offset
        slots = first + self.regions * offset
        self.keys = [torch.zeros(batch, slots, heads, head_dim, device=device, dtype=dtype) for _ in range(layers)]
        self.values = [torch.zeros_like(k) for k in self.keys]
        self.kinds_BS = torch.zeros(batch, slots, dtype=torch.int64)
        self.blocks_BS = torch.full((batch, slots), _EMPTY)
        self.positions_BS4 = torch.zeros(batch, slots, 4, dtype=torch.float64)

    @property
    def batch(self) -> int:
        """B: rows."""
        return self.blocks_BS.shape[0]

    def place(self, segments: list[Segment]) -> Tensor:
        """Claim slots for one segment per row and note what they will hold; returns slot indices (B, tokens).

        A region whose block has left the history is emptied first.
        """
        return torch.stack([self._place(row, segment) for row, segment in enumerate(segments)])

    def _place(self, row: int, segment: Segment) -> Tensor:
        if segment.kind in self._starts:
            first = self._starts[segment.kind]
        else:
            start = self._first_region + (segment.block % self.regions) * self.region_slots
            region = slice(start, start + self.region_slots)
            if (self.blocks_BS[row, region] != segment.block).all():
                self.blocks_BS[row, region] = _EMPTY
            first = start + self._offsets[segment.kind]
        here = slice(first, first + segment.tokens)
        self.kinds_BS[row, here] = int(segment.kind)
        self.blocks_BS[row, here] = segment.block
        self.positions_BS4[row, here] = segment.positions
        return torch.arange(first, first + segment.tokens)

    def writer(self, layer: int, index_BT: Tensor) -> Write:
        """What stores unrotated keys and values (B, T, H, Dh) of one layer in claimed slots; it holds that layer's tensors and no number of it."""
        keys, values = self.keys[layer], self.values[layer]
        rows, index = torch.arange(self.batch, device=keys.device).unsqueeze(1), index_BT.to(keys.device)

        def write(k_BTHD: Tensor, v_BTHD: Tensor) -> None:
            keys[rows, index] = k_BTHD.to(keys.dtype)
            values[rows, index] = v_BTHD.to(values.dtype)

        return write

    def drop(self, kind: Kind, block_B: list[int]) -> None:
        """Forget a kind of one block per row (a provisional, imagined one)."""
        self.blocks_BS[(self.kinds_BS == int(kind)) & (self.blocks_BS == torch.tensor(block_B).unsqueeze(1))] = _EMPTY

    def forget_before(self, frame: int) -> None:
        """Forget video frames before a latent frame, wherever in a block that is, and the first frame like any other (as DreamZero's window does)."""
        video = torch.isin(self.kinds_BS, torch.tensor([int(Kind.H), int(Kind.VC)]))
        self.blocks_BS[video & (self.positions_BS4[..., 0] < frame)] = _EMPTY

    def forget(self, kind: Kind, block_B: list[int]) -> None:
        """Forget for good what lies beyond the reach of a query of `kind` in each row's block."""
        q_kind, q_block = torch.full((self.batch, 1), int(kind)), torch.tensor(block_B).unsqueeze(1)
        near = self.reach.mask(q_kind, q_block, self.kinds_BS, self.blocks_BS).squeeze(1)
        self.blocks_BS[~near & (self.blocks_BS < q_block)] = _EMPTY

    def visible(self, table: RelationTable, kind: Kind, block_B: list[int]) -> Tensor:
        """Bool (B, S): the slots a query of `kind` in each row's block may see."""
        q_kind, q_block = torch.full((self.batch, 1), int(kind)), torch.tensor(block_B).unsqueeze(1)
        seen = table.mask(q_kind, q_block, self.kinds_BS, self.blocks_BS, self.reach).squeeze(1)
        return seen & (self.blocks_BS != _EMPTY)

    def without(self, visible_BS: Tensor, kind: Kind, block_B: list[int]) -> Tensor:
        """What is visible but for one segment per row: one that is written again must not see its own earlier version."""
        stale = (self.kinds_BS == int(kind)) & (self.blocks_BS == torch.tensor(block_B).unsqueeze(1))
        return visible_BS & ~stale

    def holds(self, kind: Kind, block: int) -> bool:
        """Whether every row has this segment."""
        return bool(((self.kinds_BS == int(kind)) & (self.blocks_BS == block)).any(dim=1).all())

    def read(self, visible_BS: Tensor, own: int) -> Prefix:
        """Gather and rotate what is visible, with room for `own` more tokens: computed once, then shared by every solver step."""
        index = visible_BS.any(dim=0).nonzero().flatten()
        chosen, seen = visible_BS[:, index], len(index)
        device = self.keys[0].device
        rotary = Rotary.at(self.positions_BS4[:, index], self.keys[0].shape[-1], device)
        on_device = index.to(device)

        shape = (len(visible_BS), seen, own)
        keys = tuple(room_for([rotary.rotate(k.index_select(1, on_device))], shape, k) for k in self.keys)
        values = tuple(room_for([v.index_select(1, on_device)], shape, v) for v in self.values)
        mask = None if bool(chosen.all()) else chosen[:, None, None, :].to(device)
        return Prefix(keys, values, seen, mask)

    def head(self, rows: int) -> KVCache:
        """The first rows, sharing this cache's memory."""
        out = object.__new__(KVCache)
        out.__dict__.update(self.__dict__)
        out.keys, out.values = [k[:rows] for k in self.keys], [v[:rows] for v in self.values]
        out.kinds_BS, out.blocks_BS, out.positions_BS4 = self.kinds_BS[:rows], self.blocks_BS[:rows], self.positions_BS4[:rows]
        return out

    def select(self, rows: list[int]) -> KVCache:
        """A cache of its own with some of the rows."""
        out = object.__new__(KVCache)
        out.__dict__.update(self.__dict__)
        index = torch.tensor(rows, dtype=torch.int64)
        out.keys = [k.index_select(0, index.to(k.device)) for k in self.keys]
        out.values = [v.index_select(0, index.to(v.device)) for v in self.values]
        out.kinds_BS, out.blocks_BS, out.positions_BS4 = self.kinds_BS[index], self.blocks_BS[index], self.positions_BS4[index]
        return out

    @staticmethod
    def concat(caches: list[KVCache]) -> KVCache:
        """One cache with the rows of several, which must have the same sizes."""
        out = object.__new__(KVCache)
        out.__dict__.update(caches[0].__dict__)
        out.keys = [torch.cat(ks) for ks in zip(*(c.keys for c in caches), strict=True)]
        out.values = [torch.cat(vs) for vs in zip(*(c.values for c in caches), strict=True)]
        out.kinds_BS = torch.cat([c.kinds_BS for c in caches])
        out.blocks_BS = torch.cat([c.blocks_BS for c in caches])
        out.positions_BS4 = torch.cat([c.positions_BS4 for c in caches])
        return out


def room_for(parts: list[Tensor], shape: tuple[int, int, int], like: Tensor) -> Tensor:
    """Keys or values `parts` (B, ., H, Dh) one after the other, in a buffer (B, S + own, H, Dh) of which the last `own` are free.

    Args:
        shape: B, S, own.
        like: of the heads, type and device.
    """
    batch, seen, own = shape
    heads, head_dim = like.shape[-2:]
    out = like.new_empty(batch, heads, seen + own, head_dim).transpose(1, 2)  # a head's keys lie side by side: attention reads them faster
    start = 0
    for part in parts:
        out[:, start : start + part.shape[1]] = part
        start += part.shape[1]
    return out
