"""Attention over a training window, in as many parts as there are blocks instead of one masked L x L.

In every table of this codebase a noisy token sees clean tokens and its own block, never another noisy block, and a clean token sees
clean tokens alone.  So most of a dense mask is empty, and where it is not it falls into rectangles:

                     keys    clean              V0 A0   V1 A1
    queries  clean         | masked C x C     |       |       |       one attention
             V0 A0         | masked           | ..... |       |       one for each block: its own tokens
             V1 A1         | masked           |       | ..... |       over clean ones and themselves

That is about half of the scores of the whole, without a kernel that knows of masks; where there is one (`flex`), a `BlockMask` does the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wam.model.attention import Backend, attention
from wam.timeline import Kind, Layout

_CLEAN = None  # the group of clean tokens; a noisy block's group is its number
_NOISY = frozenset({Kind.V, Kind.A, Kind.R})  # a value token, like these, is seen by none but its block's


@dataclass(frozen=True)
class WindowMask:
    """Who sees whom in a window of `layout`, as one mask per group of queries.

    Attributes:
        groups: of each run of neighbouring tokens, the group it belongs to.
        lengths: of each run, how many tokens.
        masks: per group, clean first: bool (B or 1, 1, queries, keys), where keys are the clean tokens followed by the group's own; or None for all.
    """

    groups: tuple[int | None, ...]
    lengths: tuple[int, ...]
    masks: dict[int | None, Tensor | None]

    def select(self, rows: Tensor) -> WindowMask:
        """The masks of some samples: those of modes, drawn for a batch."""
        return WindowMask(self.groups, self.lengths, {g: None if m is None else m[rows] for g, m in self.masks.items()})

    def hide(self, hidden_BL: Tensor) -> WindowMask:
        """Without the tokens in `hidden_BL` (B, L), which are seen by nobody but themselves."""
        pieces = hidden_BL.split(self.lengths, dim=1)
        clean_BC = self._group(pieces, _CLEAN)
        masks: dict[int | None, Tensor | None] = {}
        for group, mask in self.masks.items():
            own_BS = self._group(pieces, group)
            itself = torch.eye(own_BS.shape[1], dtype=torch.bool, device=own_BS.device)
            seen = ~own_BS.unsqueeze(1) | itself
            if group is not _CLEAN:
                seen = torch.cat([(~clean_BC).unsqueeze(1).expand(-1, len(itself), -1), seen], dim=2)
            masks[group] = seen.unsqueeze(1) if mask is None else mask & seen.unsqueeze(1)
        return WindowMask(self.groups, self.lengths, masks)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, backend: Backend = "auto") -> Tensor:
        """Queries over keys, (B, L, H, Dh) each, rotated already."""
        qs, ks, vs = ([*x.split(self.lengths, dim=1)] for x in (q, k, v))
        keys, values = (self._group(x, _CLEAN) for x in (ks, vs))
        outs: dict[int | None, list[Tensor]] = {}
        for group, mask in self.masks.items():
            k_group, v_group = (keys, values) if group is _CLEAN else (torch.cat([clean, *self._of(x, group)], dim=1) for clean, x in ((keys, ks), (values, vs)))
            out = attention(self._group(qs, group), k_group, v_group, mask, backend)
            outs[group] = [*out.split([n for n, g in zip(self.lengths, self.groups, strict=True) if g == group], dim=1)]
        return torch.cat([outs[group].pop(0) for group in self.groups], dim=1)

    def _of(self, pieces: Sequence[Tensor], group: int | None) -> list[Tensor]:
        return [p for p, g in zip(pieces, self.groups, strict=True) if g == group]

    def _group(self, pieces: Sequence[Tensor], group: int | None) -> Tensor:
        own = self._of(pieces, group)
        return own[0] if len(own) == 1 else torch.cat(own, dim=1)


def window_mask(dense_BLL: Tensor, layout: Layout) -> WindowMask | None:
    """Dense masks (B, L, L) of a layout in parts; None where they do not fall into parts.

    They do unless a noisy token sees another noisy block, or a clean token a noisy one; and there must be clean tokens.
    """
    by_segment = [s.block if s.kind in _NOISY else _CLEAN for s in layout.segments]
    groups: list[int | None] = []
    lengths: list[int] = []
    for segment, group in zip(layout.segments, by_segment, strict=True):
        if groups and groups[-1] == group:
            lengths[-1] += segment.tokens
        else:
            groups.append(group)
            lengths.append(segment.tokens)
    if _CLEAN not in groups:
        return None
    group_L = torch.repeat_interleave(torch.tensor([-9 if g is _CLEAN else g for g in groups]), torch.tensor(lengths)).to(dense_BLL.device)
    clean_L, same_LL = group_L == -9, group_L[:, None] == group_L[None, :]
    if bool((dense_BLL & ~(clean_L[None, :] | same_LL)).any()):
        return None
    clean, masks = clean_L.nonzero().flatten(), {}
    for group in dict.fromkeys([_CLEAN, *groups]):
        own = clean if group is _CLEAN else (group_L == group).nonzero().flatten()
        keys = clean if group is _CLEAN else torch.cat([clean, own])
        part = dense_BLL[:, own[:, None], keys[None, :]].unsqueeze(1)
        masks[group] = None if bool(part.all()) else part
    return WindowMask(tuple(groups), tuple(lengths), masks)
