"""The KV cache: what one robot (or a batch of them) has really observed and done.

A ring of blocks.  Each block owns the same slots in every layer, so writing a kind again replaces it: an observed frame replaces
the imagined one, and a block that left the history is overwritten by the newest.

    ring      | block c-2 | block c-1 | block c   |        history + 1 blocks; block b lives in region b mod (history + 1)
    a region  | S | Ac ... Ac | Vc ......... Vc |          H, the first frame, lives in the region of block -1

Keys are stored before rotation, with absolute positions beside them: a session can run for hours, and what a query sees is
decided by the relation table from kinds and blocks, as in training.  Rows of a batch may be at different blocks.  The
bookkeeping lives on the CPU, so that deciding what is visible never waits for a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from wam.model.rotary import Rotary
from wam.relations import RelationTable
from wam.timeline import FIRST_BLOCK, Clock, Kind, Segment

_EMPTY = -(10**9)
_CACHED = (Kind.S, Kind.AC, Kind.VC)


@dataclass(frozen=True)
class Prefix:
    """What a group of queries sees of the cache: rotated keys and values per layer, and a mask only where rows differ.

    Attributes:
        keys, values: per layer, (B, S, H, Dh).
        mask_B11S: bool, or None when every row sees all S.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    mask_B11S: Tensor | None


class KVCache:
    """Preallocated keys and values of the clean tokens of the last `history + 1` blocks, batched over sessions."""

    def __init__(self, clock: Clock, batch: int, layers: int, heads: int, head_dim: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32):
        self.clock = clock
        self.regions = clock.timeline.history + 1
        offset, self._offsets = 0, {}
        for kind in _CACHED:
            self._offsets[kind] = offset
            offset += clock.tokens(kind)
        self._offsets[Kind.H] = self._offsets[Kind.VC]
        self.region_slots = offset
        slots = self.regions * self.region_slots
        self.keys = [torch.zeros(batch, slots, heads, head_dim, device=device, dtype=dtype) for _ in range(layers)]
        self.values = [torch.zeros_like(k) for k in self.keys]
        self.kinds_BS = torch.zeros(batch, slots, dtype=torch.int64)
        self.blocks_BS = torch.full((batch, slots), _EMPTY)
        self.positions_BS3 = torch.zeros(batch, slots, 3, dtype=torch.float64)

    @property
    def batch(self) -> int:
        """B: rows."""
        return self.blocks_BS.shape[0]

    def place(self, segments: list[list[Segment]]) -> Tensor:
        """Claim slots for one list of segments per row and note what they will hold; returns slot indices (B, tokens).

        A region whose block has left the history is emptied first.
        """
        index = []
        for row, parts in enumerate(segments):
            slots = []
            for segment in parts:
                start = (segment.block % self.regions) * self.region_slots
                region = slice(start, start + self.region_slots)
                if (self.blocks_BS[row, region] != segment.block).all():
                    self.blocks_BS[row, region] = _EMPTY
                first = start + self._offsets[segment.kind]
                here = slice(first, first + segment.tokens)
                self.kinds_BS[row, here] = int(segment.kind)
                self.blocks_BS[row, here] = segment.block
                self.positions_BS3[row, here] = segment.positions
                slots.append(torch.arange(first, first + segment.tokens))
            index.append(torch.cat(slots))
        return torch.stack(index)

    def write(self, layer: int, index_BT: Tensor, k_BTHD: Tensor, v_BTHD: Tensor) -> None:
        """Store unrotated keys and values of one layer in claimed slots."""
        rows = torch.arange(self.batch, device=k_BTHD.device).unsqueeze(1)
        index = index_BT.to(k_BTHD.device)
        self.keys[layer][rows, index] = k_BTHD.to(self.keys[layer].dtype)
        self.values[layer][rows, index] = v_BTHD.to(self.values[layer].dtype)

    def drop(self, kind: Kind, block_B: list[int]) -> None:
        """Forget a kind of one block per row (a provisional, imagined one)."""
        for row, block in enumerate(block_B):
            here = (self.kinds_BS[row] == int(kind)) & (self.blocks_BS[row] == block)
            self.blocks_BS[row, here] = _EMPTY

    def visible(self, table: RelationTable, kind: Kind, block_B: list[int]) -> Tensor:
        """Bool (B, S): the slots a query of `kind` in each row's block may see."""
        history = self.clock.timeline.history
        q_kind = torch.full((self.batch, 1), int(kind))
        q_block = torch.tensor(block_B).unsqueeze(1)
        seen = table.mask(q_kind, q_block, self.kinds_BS, self.blocks_BS, history).squeeze(1)
        return seen & (self.blocks_BS != _EMPTY)

    def read(self, visible_BS: Tensor) -> Prefix:
        """Gather and rotate what is visible: computed once, then shared by every solver step."""
        index = visible_BS.any(dim=0).nonzero().flatten()
        chosen = visible_BS[:, index]
        device = self.keys[0].device
        rotary = Rotary.at(self.positions_BS3[:, index], self.keys[0].shape[-1], device)
        on_device = index.to(device)
        keys = tuple(rotary.rotate(k.index_select(1, on_device)) for k in self.keys)
        values = tuple(v.index_select(1, on_device) for v in self.values)
        mask = None if bool(chosen.all()) else chosen[:, None, None, :].to(device)
        return Prefix(keys, values, mask)

    def select(self, rows: list[int]) -> KVCache:
        """A cache of its own with some of the rows."""
        out = object.__new__(KVCache)
        out.__dict__.update(self.__dict__)
        index = torch.tensor(rows, dtype=torch.int64)
        out.keys = [k.index_select(0, index.to(k.device)) for k in self.keys]
        out.values = [v.index_select(0, index.to(v.device)) for v in self.values]
        out.kinds_BS, out.blocks_BS, out.positions_BS3 = self.kinds_BS[index], self.blocks_BS[index], self.positions_BS3[index]
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
        out.positions_BS3 = torch.cat([c.positions_BS3 for c in caches])
        return out


def segments_of(clock: Clock, kinds: tuple[Kind, ...], blocks: list[int]) -> list[list[Segment]]:
    """The segments of `kinds` for each row's block (H is at its own)."""
    return [[clock.segment(kind, FIRST_BLOCK if kind is Kind.H else block) for kind in kinds] for block in blocks]


