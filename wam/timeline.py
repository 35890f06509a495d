"""Samples as segments on one clock: what each token is, when it is, and which noise level it takes.

    clock   ->   |  block 0              |  block 1              |
    latents  H   |  z1 ... zk            |  z(k+1) ... z2k       |   H = first frame, alone in its latent
    state        |  S0                   |  S1                   |   at the block's first control step
    actions      |  a0 ... a(A-1)        |  aA ... a(2A-1)       |   A control steps

A token has a *kind*, a *block*, a *position* (time, row, column) and a *noise level*.  Nothing else in the codebase knows where a
token sits in a sequence: the relation table asks for kind and block, rotary positions for the position, modulation for the level.

Time is measured in latent frames, so that video keeps Wan's integer positions.  H is at 0 and latent j at j, which is when the
last of its pixel frames is seen.  A control step that ends as that frame is seen has the same time; steps between lie between.

Letters in shapes: B batch, N blocks, k latent frames a block, F latent frames, P patches a frame, A actions a block, L tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property

import torch
from torch import Tensor

from wam.config import TimelineConfig

FIRST_BLOCK = -1  # the block id of H: it comes before block 0


class Kind(IntEnum):
    """What a token holds."""

    H = 0  # first observed latent frame
    S = 1  # state of a block
    VC = 2  # clean (observed) video
    V = 3  # noisy video, to be predicted
    AC = 4  # clean (executed) actions
    A = 5  # noisy actions, to be predicted
    G = 6  # goal image

    @property
    def label(self) -> str:
        """The name used in the design and in printed tables."""
        return {Kind.VC: "Vc", Kind.AC: "Ac"}.get(self, self.name)


VIDEO_KINDS = frozenset({Kind.H, Kind.VC, Kind.V, Kind.G})
ACTION_KINDS = frozenset({Kind.AC, Kind.A})


@dataclass(frozen=True)
class Segment:
    """A run of tokens of one kind in one block."""

    kind: Kind
    block: int
    positions: Tensor  # (tokens, 3) float64: time in latent frames, patch row, patch column

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return self.positions.shape[0]


@dataclass(frozen=True)
class Clock:
    """Where the tokens of a block sit in time and space.

    Attributes:
        timeline: sizes of a block.
        grid: patch rows and columns of a latent frame.
    """

    timeline: TimelineConfig
    grid: tuple[int, int]

    @property
    def patches(self) -> int:
        """P: patches a latent frame."""
        return self.grid[0] * self.grid[1]

    def tokens(self, kind: Kind) -> int:
        """Tokens of `kind` in one block."""
        t = self.timeline
        return {
            Kind.H: self.patches,
            Kind.S: 1,
            Kind.VC: t.latents_per_block * self.patches,
            Kind.V: t.latents_per_block * self.patches,
            Kind.AC: t.actions_per_block,
            Kind.A: t.actions_per_block,
        }[kind]

    def segment(self, kind: Kind, block: int) -> Segment:
        """The tokens of `kind` in `block`, counted from the start of the episode (or of the training window)."""
        k, steps = self.timeline.latents_per_block, self.timeline.actions_per_block
        if kind is Kind.H:
            return Segment(kind, FIRST_BLOCK, self._frames(torch.zeros(1, dtype=torch.float64)))
        if kind in VIDEO_KINDS:
            return Segment(kind, block, self._frames(torch.arange(1, k + 1, dtype=torch.float64) + block * k))
        if kind is Kind.S:
            return Segment(kind, block, self._timed(torch.tensor([block * k], dtype=torch.float64)))
        ends = torch.arange(1, steps + 1, dtype=torch.float64) * k / steps + block * k
        return Segment(kind, block, self._timed(ends))

    def _frames(self, times_F: Tensor) -> Tensor:
        rows, columns = self.grid
        return torch.cartesian_prod(times_F, torch.arange(rows, dtype=torch.float64), torch.arange(columns, dtype=torch.float64))

    def _timed(self, times: Tensor) -> Tensor:
        """States and actions share the video's clock but sit off its grid, at row and column -1."""
        return torch.stack([times, torch.full_like(times, -1), torch.full_like(times, -1)], dim=-1)


@dataclass(frozen=True)
class Layout:
    """A sequence of segments: the static description of every token in a forward pass."""

    segments: tuple[Segment, ...]

    @cached_property
    def kinds_L(self) -> Tensor:
        """(L,) int64: the kind of each token."""
        return torch.cat([torch.full((s.tokens,), int(s.kind)) for s in self.segments])

    @cached_property
    def blocks_L(self) -> Tensor:
        """(L,) int64: the block of each token."""
        return torch.cat([torch.full((s.tokens,), s.block) for s in self.segments])

    @cached_property
    def positions_L3(self) -> Tensor:
        """(L, 3) float64: time, row, column."""
        return torch.cat([s.positions for s in self.segments])

    def __len__(self) -> int:
        return sum(s.tokens for s in self.segments)

    def span(self, *kinds: Kind) -> slice:
        """The slice that holds all tokens of `kinds`; they must lie side by side."""
        where = torch.isin(self.kinds_L, torch.tensor([int(k) for k in kinds])).nonzero().flatten()
        assert len(where) > 0 and where[-1] - where[0] + 1 == len(where), f"{kinds} do not lie side by side"
        return slice(int(where[0]), int(where[-1]) + 1)


def training_layout(clock: Clock, blocks: int) -> Layout:
    """`[H Vc...Vc | V...V | S...S | Ac...Ac | A...A]`: the clean copy of a window beside the noisy one (teacher forcing)."""
    order = [clock.segment(Kind.H, FIRST_BLOCK)]
    for kind in (Kind.VC, Kind.V, Kind.S, Kind.AC, Kind.A):
        order += [clock.segment(kind, block) for block in range(blocks)]
    return Layout(tuple(order))
