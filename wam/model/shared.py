"""One memory, many candidates: what N continuations of the same past attend to, with that past held, gathered and rotated once.

    row 0     past 0 (B, S)  <--- candidate 0,0 | own tokens        queries of a row's N candidates stand side by side, (B, N L), so that
                             <--- candidate 0,1 | own tokens        each product with the past is one large one and not N small ones
    row 1     past 1 (B, S)  <--- candidate 1,0 | own tokens        own keys are seen by their own candidate only, (B N, L)
                             <--- candidate 1,1 | own tokens

Attention over the past and attention over a candidate's own tokens are two softmaxes; from the logarithms of their sums (`lse`) they
become the one softmax over both:  out = out_own + sigmoid(lse_past - lse_own) (out_past - out_own).  So nothing of the past is ever
copied, and what a candidate takes is its own block.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from wam.model.cache import KVCache, Prefix, Write, room_for
from wam.model.rotary import Rotary
from wam.relations import RelationTable
from wam.timeline import Kind, Segment

LARGEST = 2**27  # scores that are written out at a time, where no kernel gives sums


# ------------------------------------------------------------------------------------------------ attention


def attend_shared(q_RLHD: Tensor, k_RTHD: Tensor, v_RTHD: Tensor, past_k_BSHD: Tensor, past_v_BSHD: Tensor, mask_B11S: Tensor | None = None) -> Tensor:
    """Attention of R = B N candidates over the past of their row and over their own tokens, (R, L, H, D).

    Args:
        mask_B11S: bool, True where a row's past may be seen, which is somewhere for each row; None: all of it.
    """
    rows, length = len(past_k_BSHD), q_RLHD.shape[1]
    folded = q_RLHD.unflatten(0, (rows, -1)).flatten(1, 2)
    past, past_lse = _with_lse(folded, past_k_BSHD, past_v_BSHD, mask_B11S)
    own, own_lse = _with_lse(q_RLHD, k_RTHD, v_RTHD, None)
    past, past_lse = (x.unflatten(1, (-1, length)).flatten(0, 1) for x in (past, past_lse))
    share = torch.sigmoid(past_lse - own_lse).unsqueeze(-1).type_as(own)
    return torch.lerp(own, past, share)


def _with_lse(q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, mask_B11S: Tensor | None) -> tuple[Tensor, Tensor]:
    """Attention (B, L, H, D), and the logarithm of the sum of its exponentials (B, L, H) in float32."""
    q, k, v = (x.transpose(1, 2) for x in (q_BLHD, k_BSHD, v_BSHD))
    if q.device.type == "cpu" and not (torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))):
        bias = None if mask_B11S is None else torch.zeros(mask_B11S.shape, dtype=q.dtype).masked_fill_(~mask_B11S, -math.inf)
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=bias)
        return out.transpose(1, 2), lse.transpose(1, 2).float()
    step = max(1, LARGEST // (len(q) * q.shape[1] * k.shape[2]))
    parts = [_written_out(part, k, v, mask_B11S) for part in q.split(step, dim=2)]
    return torch.cat([out for out, _ in parts], dim=2).transpose(1, 2), torch.cat([lse for _, lse in parts], dim=2).transpose(1, 2)


def _written_out(q_BHLD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, mask_B11S: Tensor | None) -> tuple[Tensor, Tensor]:
    scores = torch.matmul(q_BHLD * (1 / math.sqrt(q_BHLD.shape[-1])), k_BHSD.transpose(-1, -2)).float()
    if mask_B11S is not None:
        scores = scores.masked_fill(~mask_B11S, -math.inf)
    lse = scores.logsumexp(dim=-1)
    return torch.matmul((scores - lse.unsqueeze(-1)).exp().type_as(v_BHSD), v_BHSD), lse


# ------------------------------------------------------------------------------------------------ the cache


@dataclass
class _Own:
    """What every candidate holds of one kind: its segment's places, and keys (unrotated) and values (R, T, H, D) per layer."""

    blocks: list[int]
    positions_RT4: Tensor
    keys: list[Tensor]
    values: list[Tensor]


class SharedCache(KVCache):
    """The rows of a cache, each seen by N candidates side by side: row i by candidates i N to i N + N - 1.

    It lives for one plan.  Reads of the past are kept, so a plan of many rounds gathers and rotates each row once; what is written
    (actions whose outcome is imagined, imagined frames, registers) belongs to the candidates, and the cache below is left as it is.
    """

    def __init__(self, base: KVCache, copies: int):
        """Let `copies` candidates see each row of `base`."""
        self.__dict__.update(base.__dict__)
        self.base, self.copies = base, copies
        self.own: dict[Kind, _Own] = {}
        self._reads: list[tuple[Tensor, Prefix]] = []

    @property
    def batch(self) -> int:
        """R: candidates of all rows."""
        return self.base.batch * self.copies

    def for_copies(self, copies: int) -> SharedCache:
        """The same rows for another number of candidates, which own nothing yet; what was read of the past serves them too."""
        out = SharedCache(self.base, copies)
        out._reads = self._reads
        return out

    def place(self, segments: list[Segment]) -> Tensor:
        """Note what each candidate will hold; there are no slots to find."""
        positions = torch.stack([s.positions for s in segments])
        keys, values = ([x.new_empty(*positions.shape[:2], *x.shape[2:]) for x in side] for side in (self.base.keys, self.base.values))
        self.own[segments[0].kind] = _Own([s.block for s in segments], positions, keys, values)
        self._placed = segments[0].kind
        return torch.zeros(0, dtype=torch.int64)

    def writer(self, layer: int, index_BT: Tensor) -> Write:
        """What keeps keys and values of one layer, of the kind that was placed last."""
        own = self.own[self._placed]
        keys, values = own.keys[layer], own.values[layer]

        def write(k_RTHD: Tensor, v_RTHD: Tensor) -> None:
            keys.copy_(k_RTHD)
            values.copy_(v_RTHD)

        return write

    def drop(self, kind: Kind, block_B: list[int]) -> None:
        """Forget what the candidates hold of a kind."""
        self.own.pop(kind, None)

    def forget(self, kind: Kind, block_B: list[int]) -> None:
        """Forget for good what lies beyond the reach of a query, in the cache below."""
        self.base.forget(kind, self._per_row(block_B))

    def forget_before(self, frame: int) -> None:
        """As the cache below does."""
        self.base.forget_before(frame)

    def visible(self, table: RelationTable, kind: Kind, block_B: list[int]) -> Tensor:
        """Bool (B, S + T): what the candidates of a row may see of the past, and then of their own; the same for all candidates of a row."""
        blocks = self._per_row(block_B)
        seen = self.base.visible(table, kind, blocks)
        for other, own in self.own.items():  # a candidate's own stands in the place of what was there
            seen = self.base.without(seen, other, self._per_row(own.blocks))
        mine = [torch.tensor([table.allow(kind, here, other, there, self.reach) for here, there in zip(blocks, self._per_row(own.blocks), strict=True)]) for other, own in self.own.items()]
        counts = [own.positions_RT4.shape[1] for own in self.own.values()]
        return torch.cat([seen, *(allowed.unsqueeze(1).expand(-1, count) for allowed, count in zip(mine, counts, strict=True))], dim=1)

    def without(self, visible_BS: Tensor, kind: Kind, block_B: list[int]) -> Tensor:
        """What is visible but for a segment that is about to be written again."""
        slots = self.base.blocks_BS.shape[1]
        parts = [self.base.without(visible_BS[:, :slots], kind, self._per_row(block_B))]
        for other, own in self.own.items():
            start = slots + sum(p.shape[1] for p in parts[1:])
            part = visible_BS[:, start : start + own.positions_RT4.shape[1]]
            parts.append(torch.zeros_like(part) if other is kind else part)
        return torch.cat(parts, dim=1)

    def read(self, visible_BS: Tensor, own: int) -> Prefix:
        """The past of every row, gathered and rotated once, and each candidate's own with room for `own` more tokens."""
        slots, start, seen = self.base.blocks_BS.shape[1], self.base.blocks_BS.shape[1], []
        for kept in self.own.values():
            part = visible_BS[:, start : start + kept.positions_RT4.shape[1]]
            start += part.shape[1]
            if bool(part.any()):
                assert bool(part.all()), "candidates of all rows see the same of their own"
                seen.append(kept)
        past = self._past(visible_BS[:, :slots])
        mine, like = sum(k.positions_RT4.shape[1] for k in seen), self.base.keys[0]
        shape = (self.batch, mine, own if mine else 0)  # tokens with nothing of their own before them need no room behind it
        layers = range(len(self.base.keys))
        rotaries = [Rotary.at(k.positions_RT4, like.shape[-1], like.device) for k in seen]
        keys = tuple(room_for([r.rotate(k.keys[layer]) for k, r in zip(seen, rotaries, strict=True)], shape, like) for layer in layers)
        values = tuple(room_for([k.values[layer] for k in seen], shape, like) for layer in layers)
        return Prefix(keys, values, mine, None, past if past.seen else None)

    def _past(self, visible_BS: Tensor) -> Prefix:
        for known, prefix in self._reads:
            if torch.equal(known, visible_BS):
                return prefix
        prefix = self.base.read(visible_BS, own=0)
        self._reads.append((visible_BS, prefix))
        return prefix

    def head(self, rows: int) -> SharedCache:
        """The first candidates, sharing the memory of what they see."""
        assert rows % self.copies == 0, "rows go with all of their candidates"
        out = SharedCache(self.base.head(rows // self.copies), self.copies)
        out.own = {kind: _Own(o.blocks[:rows], o.positions_RT4[:rows], [k[:rows] for k in o.keys], [v[:rows] for v in o.values]) for kind, o in self.own.items()}
        return out

    def select(self, rows: list[int]) -> KVCache:
        """It lives for one plan, and its rows are never dropped."""
        raise AssertionError("select on the cache below")

    def bytes_held(self) -> int:
        """Bytes of keys and values that this view holds beside the cache below: reads of the past, and what candidates own."""
        tensors: list[Sequence[Tensor]] = [x for _, prefix in self._reads for x in (prefix.keys, prefix.values)]
        tensors += [x for own in self.own.values() for x in (own.keys, own.values)]
        return sum(t.numel() * t.element_size() for group in tensors for t in group)

    def _per_row(self, of_candidates: list[Any]) -> list[Any]:
        return of_candidates[:: self.copies]
