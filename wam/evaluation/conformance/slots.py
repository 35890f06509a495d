"""LingBot-VA's cache as the release lays it out, seen from the order of its calls.

The release keeps, per layer, one flat pool of slots; a call takes the first free ones and, when there are too few, evicts the lowest ids:

    slot     0 ....... 11 | 12 .... 21 | 22 ...... 33 | 34 .... 43        a window of two chunks of 12 video and 10 action tokens
    id       0            | 1          | 2            | 3
    is_pred  0            | 0          | 1            | 1                 predicted: freed before the real observation is written

Ours is a ring of blocks.  What stands in which slot is bookkeeping of the calls alone; whether it still stands there is read off our
cache, so that a segment which ours forgot, or kept too long, shows in the view.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from wam.timeline import Kind

Update = Literal["drop", "predicted", "real"]  # the release's update_cache 0, 1, 2
Segment = tuple[Kind, int]  # clean video or clean actions of a block


@dataclass
class Pool:
    """The release's pool of one layer.

    Attributes:
        ids, predicted: per slot; -1 and False where it is free.
        owners: per slot, the segment and its token, or None.
    """

    slots: int
    ids: list[int] = field(default_factory=list)
    predicted: list[bool] = field(default_factory=list)
    owners: list[tuple[Segment, int] | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.ids, self.predicted, self.owners = [-1] * self.slots, [False] * self.slots, [None] * self.slots

    def call(self, segment: Segment, tokens: int, update: Update) -> None:
        """One network call: slots are taken, evicting the lowest ids if need be, and given back unless they are kept.

        Raises:
            ValueError: the call alone is larger than the pool.
        """
        if tokens > self.slots:
            raise ValueError(f"a call of {tokens} tokens does not fit into a pool of {self.slots} slots; the case's attn_window is too small for its chunks")
        lacking = tokens - self.ids.count(-1)
        for slot in sorted((s for s in range(self.slots) if self.ids[s] >= 0), key=lambda s: self.ids[s])[: max(lacking, 0)]:
            self._free(slot)
        if update == "drop":
            return
        new = max(self.ids) + 1
        free = [slot for slot in range(self.slots) if self.ids[slot] < 0][:tokens]
        for token, slot in enumerate(free):
            self.ids[slot], self.predicted[slot], self.owners[slot] = new, update == "predicted", (segment, token)

    def free_predicted(self) -> None:
        """What was only imagined makes way for what is observed."""
        for slot in range(self.slots):
            if self.predicted[slot]:
                self._free(slot)

    def _free(self, slot: int) -> None:
        self.ids[slot], self.predicted[slot], self.owners[slot] = -1, False, None


def slot_view(pool: Pool, held: Mapping[Segment, int]) -> dict[str, Tensor]:
    """`mask`, `id` and `is_pred` per slot, float32.

    Args:
        held: the segments that our cache holds within the window, and how many tokens of each.

    Raises:
        ValueError: our cache holds a segment that the release has evicted or freed.
    """
    expected = {owner[0] for owner in pool.owners if owner}
    surplus = sorted(set(held) - expected, key=lambda s: (s[1], s[0]))
    if surplus:
        names = ", ".join(f"{kind.label}[{block}]" for kind, block in surplus)
        raise ValueError(f"our cache still shows {names}, which the released pool has freed by then")
    there = [owner is not None and owner[1] < held.get(owner[0], 0) for owner in pool.owners]
    mask = torch.tensor(there, dtype=torch.float32)
    ids = torch.where(mask > 0, torch.tensor(pool.ids, dtype=torch.float32), -1.0)
    return {"mask": mask, "id": ids, "is_pred": mask * torch.tensor(pool.predicted, dtype=torch.float32)}


def pool_view(pool: Pool, tensors: Mapping[Segment, Tensor], like: tuple[int, ...]) -> Tensor:
    """Keys or values (B, tokens, H, Dh) of the segments, laid out in slots (B, slots, H, Dh); never used slots are zero."""
    out = torch.zeros(like)
    for slot, owner in enumerate(pool.owners):
        if owner is not None and owner[0] in tensors and owner[1] < tensors[owner[0]].shape[1]:
            out[:, slot] = tensors[owner[0]][:, owner[1]].cpu().float()
    return out
