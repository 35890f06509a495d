"""What the noisy tokens of one plan see: worked out once, used at every solver step.

    a group's keys    | cache, rotated once ............ | its own noisy tokens, written at every step |
                        `Prefix.seen`                      a slice of the live tokens

Queries of one kind see the same keys, so each group is one attention without a mask (unless rows of the batch see different parts of
the cache).  Kinds that see the same are one group.  The buffers are allocated with room for the live tokens, so a step copies only
those, never the cache: a step grows with history only by the attention itself.  Of several plans from one past, the past is read once
for all of them (`wam.model.shared`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from wam.model.attention import Backend, attention
from wam.model.backbone import Attend, Uncompiled
from wam.model.cache import KVCache, Prefix
from wam.model.rotary import Rotary
from wam.model.shared import attend_shared
from wam.relations import RelationTable
from wam.timeline import Kind, Layout


@dataclass(frozen=True)
class Group:
    """Queries (a slice of the live tokens) that see the same: a prefix of the cache, then a slice of the live tokens."""

    queries: slice
    keys: slice
    prefix: Prefix


@dataclass(frozen=True)
class View:
    """The live tokens of a plan and their groups; `blocks` is each row's block."""

    layout: Layout
    blocks: list[int]
    rotary: Rotary
    groups: tuple[Group, ...]
    backend: Backend

    def attends(self, layer: int) -> Attend:
        """How queries meet keys in a layer."""
        rotary, backend, groups = self.rotary, self.backend, [(g, g.prefix.of_layer(layer)) for g in self.groups]

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k = rotary.rotate(q), rotary.rotate(k)
            out = [_attend(prefix, q[:, group.queries], k[:, group.keys], v[:, group.keys], backend) for group, prefix in groups]
            return out[0] if len(out) == 1 else torch.cat(out, dim=1)

        return Uncompiled(attend)


def _attend(prefix: Prefix, q: Tensor, k: Tensor, v: Tensor, backend: Backend) -> Tensor:
    """One group's attention in one layer, whose prefix this is."""
    (keys,), (values,), own = prefix.keys, prefix.values, k.shape[1]
    if prefix.seen and k.requires_grad:  # what is differentiated must not be written over by the next step
        return attend_after(prefix, q, k, v, backend)
    if prefix.seen:
        keys[:, prefix.seen : prefix.seen + own] = k
        values[:, prefix.seen : prefix.seen + own] = v
        k, v = keys[:, : prefix.seen + own].type_as(q), values[:, : prefix.seen + own].type_as(q)
    return _meet(prefix, q, k, v, own, backend)


def attend_after(prefix: Prefix, q: Tensor, k: Tensor, v: Tensor, backend: Backend) -> Tensor:
    """Attention over a layer's prefix and then over `k` and `v`, which are not written behind it."""
    (keys,), (values,), own = prefix.keys, prefix.values, k.shape[1]
    if prefix.seen:
        k, v = torch.cat([keys[:, : prefix.seen].type_as(q), k], dim=1), torch.cat([values[:, : prefix.seen].type_as(q), v], dim=1)
    return _meet(prefix, q, k, v, own, backend)


def _meet(prefix: Prefix, q: Tensor, k: Tensor, v: Tensor, own: int, backend: Backend) -> Tensor:
    """Attention over keys whose last `own` are the queries' own, before which come those of the prefix, and what it shares."""
    if prefix.shared is not None:
        (keys,), (values,) = prefix.shared.keys, prefix.shared.values
        return attend_shared(q, k, v, keys.type_as(q), values.type_as(q), prefix.shared.mask_B11S)
    mask = None
    if prefix.mask_B11S is not None:
        mask = torch.cat([prefix.mask_B11S, prefix.mask_B11S.new_ones(len(q), 1, 1, own)], dim=-1)
    return attention(q, k, v, mask, backend)


def make_view(cache: KVCache, table: RelationTable, kinds: tuple[Kind, ...], blocks: list[int], backend: Backend) -> View:
    """Groups of the live tokens of `kinds`, in this order, each row at its own block."""
    layouts = [Layout(tuple(cache.clock.segment(kind, block) for kind in kinds)) for block in blocks]
    layout = layouts[0]
    rotary = Rotary.at(torch.stack([each.positions_L4 for each in layouts]), cache.keys[0].shape[-1], cache.keys[0].device)
    groups: list[tuple[slice, slice, Tensor]] = []
    for kind in kinds:
        among = [other for other in kinds if table.allow(kind, 0, other, 0)]
        queries, keys, seen = layout.span(kind), layout.span(*among), cache.visible(table, kind, blocks)
        if groups and groups[-1][1] == keys and torch.equal(groups[-1][2], seen):
            groups[-1] = (slice(groups[-1][0].start, queries.stop), keys, seen)
        else:
            groups.append((queries, keys, seen))
    return View(layout, blocks, rotary, tuple(Group(q, k, cache.read(seen, k.stop - k.start)) for q, k, seen in groups), backend)
