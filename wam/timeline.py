"""Samples as segments on one clock: what each token is, when it is, and which noise level it takes.

    clock   ->   |  block 0              |  block 1              |
    latents  H   |  z1 ... zk            |  z(k+1) ... z2k       |   H = first frame, alone in its latent
    state        |  S0                   |  S1                   |   at the block's first control step
    actions      |  a0 ... a(A-1)        |  aA ... a(2A-1)       |   A control steps
    value        |                    R0 |                    R1 |   how good it is to be at the block's end, where the model has a value head

A token has a *kind*, a *block*, a *position* (time, row, column, index) and a *noise level*.  Nothing else in the codebase knows where
a token sits in a sequence: the relation table asks for kind and block, rotary positions for the position, modulation for the level.

Time is measured in latent frames, so that video keeps Wan's integer positions.  H is at 0 and latent j at j, which is when the last of
its pixel frames is seen.  Where states and actions sit is one of three published answers (`model.positions`):

    time            a control step that ends as a frame is seen has that frame's time; steps between lie between
    frame_fraction  the n actions of latent frame f lie at f + i / (n + 1), i = 1..n (LingBot-VA)
    index           off the clock: 0, 1, 2, ... counted from the start, on the fourth axis (DreamZero, Fast-WAM)

Letters in shapes: B batch, N blocks, k latent frames a block, F latent frames, P patches a frame, A actions a block, L tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from wam.config import TimelineConfig

FIRST_BLOCK = -1  # the block id of H and G: they come before block 0
GOAL_TIME = -1.0  # a goal image is at no time of the episode: before its first frame, in no frame's place
Positions = Literal["time", "frame_fraction", "index"]


class Kind(IntEnum):
    """What a token holds."""

    H = 0  # first observed latent frame
    S = 1  # state of a block
    VC = 2  # clean (observed) video
    V = 3  # noisy video, to be predicted (in block -1: the first frame's noisy copy)
    AC = 4  # clean (executed) actions
    A = 5  # noisy actions, to be predicted
    G = 6  # goal image
    R = 7  # value of a block: what will come of the episode

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
    positions: Tensor  # (tokens, 4) float64: time in latent frames, patch row, patch column, index off the clock

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
        positions: where states and actions sit (see the module's docstring).
        views: cameras side by side in the grid, each of which counts its columns from 0.
    """

    timeline: TimelineConfig
    grid: tuple[int, int]
    positions: Positions = "time"
    views: int = 1

    @property
    def patches(self) -> int:
        """P: patches a latent frame."""
        return self.grid[0] * self.grid[1]

    def tokens(self, kind: Kind) -> int:
        """Tokens of `kind` in one block."""
        t = self.timeline
        return {
            Kind.H: self.patches,
            Kind.G: self.patches,
            Kind.S: t.states_per_block,
            Kind.VC: t.latents_per_block * self.patches,
            Kind.V: t.latents_per_block * self.patches,
            Kind.AC: t.actions_per_block,
            Kind.A: t.actions_per_block,
            Kind.R: 1,
        }[kind]

    def frames(self, block: int) -> range:
        """Latent frames of a block; of block -1, the first frame."""
        if block == FIRST_BLOCK:
            return range(0, 1)
        k = self.timeline.latents_per_block
        first = block * k + (self.timeline.first_frame == "before")
        return range(first, first + k)

    def segment(self, kind: Kind, block: int) -> Segment:
        """The tokens of `kind` in `block`, counted from the start of the episode (or of the training window)."""
        if kind is Kind.G:
            return Segment(kind, FIRST_BLOCK, self._patches([GOAL_TIME]))
        if kind in VIDEO_KINDS:
            block = FIRST_BLOCK if kind is Kind.H else block
            return Segment(kind, block, self._patches(self.frames(block)))
        return Segment(kind, block, {Kind.S: self._state, Kind.R: self._value}.get(kind, self._actions)(block))

    def _state(self, block: int) -> Tensor:
        t, states = self.timeline, torch.arange(self.timeline.states_per_block)
        if self.positions == "index":
            return _indexed(states + block * t.states_per_block)
        return _timed(self.frames(block)[0] - (t.first_frame == "before") + states.double() * t.latents_per_block / t.states_per_block)

    def _actions(self, block: int) -> Tensor:
        k, steps = self.timeline.latents_per_block, self.timeline.actions_per_block
        if self.positions == "index":
            return _indexed(torch.arange(steps) + block * steps)
        first = self.frames(block)[0]
        if self.positions == "frame_fraction":
            n = steps // k
            inside = torch.arange(1, n + 1, dtype=torch.float64) / (n + 1)
            return _timed((torch.arange(first, first + k, dtype=torch.float64)[:, None] + inside).flatten())
        return _timed(torch.arange(1, steps + 1, dtype=torch.float64) * k / steps + first - 1)

    def _value(self, block: int) -> Tensor:
        """Where the block's last action ends."""
        if self.positions == "index":
            return _indexed(torch.tensor([(block + 1) * self.timeline.actions_per_block - 1]))
        return _timed(torch.tensor([self.frames(block)[-1]], dtype=torch.float64))

    def _patches(self, frames: Sequence[float]) -> Tensor:
        rows, columns = (torch.arange(n, dtype=torch.float64) for n in self.grid)
        columns = columns % (self.grid[1] // self.views)
        placed = torch.cartesian_prod(torch.tensor(list(frames), dtype=torch.float64), rows, columns)
        return torch.cat([placed, torch.zeros(len(placed), 1, dtype=torch.float64)], dim=1)


def _timed(times: Tensor) -> Tensor:
    """States and actions on the video's clock sit off its grid, at row and column -1."""
    return torch.stack([times, torch.full_like(times, -1), torch.full_like(times, -1), torch.zeros_like(times)], dim=-1)


def _indexed(index: Tensor) -> Tensor:
    zero = torch.zeros(len(index), dtype=torch.float64)
    return torch.stack([zero, zero, zero, index.double()], dim=-1)


@dataclass(frozen=True)
class Layout:
    """A sequence of segments: the static description of every token in a forward pass.  Video kinds come first."""

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
    def positions_L4(self) -> Tensor:
        """(L, 4) float64: time, row, column, index."""
        return torch.cat([s.positions for s in self.segments])

    def __len__(self) -> int:
        return sum(s.tokens for s in self.segments)

    @property
    def video_tokens(self) -> int:
        """Tokens of video kinds, which come first."""
        return sum(s.tokens for s in self.segments if s.kind in VIDEO_KINDS)

    def span(self, *kinds: Kind) -> slice:
        """The slice that holds all tokens of `kinds`; they must lie side by side."""
        where = torch.isin(self.kinds_L, torch.tensor([int(k) for k in kinds])).nonzero().flatten()
        assert len(where) > 0 and where[-1] - where[0] + 1 == len(where), f"{kinds} do not lie side by side"
        return slice(int(where[0]), int(where[-1]) + 1)


@dataclass(frozen=True)
class Parts:
    """Which optional segments a training window has.

    Attributes:
        goal: a goal image (G) first.
        noisy_first: the first frame has a noisy copy that is predicted (V in block -1).
        states: state tokens (S).
        values: value tokens (R).
    """

    goal: bool = False
    noisy_first: bool = False
    states: bool = True
    values: bool = False


def training_layout(clock: Clock, blocks: int, parts: Parts = Parts()) -> Layout:
    """`[G | H Vc...Vc | V...V | S...S | Ac...Ac | A...A | R...R]`: the clean copy of a window beside the noisy one (teacher forcing)."""
    order = [clock.segment(Kind.G, FIRST_BLOCK)] if parts.goal else []
    if clock.timeline.first_frame == "before":
        order.append(clock.segment(Kind.H, FIRST_BLOCK))
    order += [clock.segment(Kind.VC, block) for block in range(blocks)]
    order += [clock.segment(Kind.V, block) for block in range(FIRST_BLOCK if parts.noisy_first else 0, blocks)]
    for kind in (*((Kind.S,) if parts.states else ()), Kind.AC, Kind.A, *((Kind.R,) if parts.values else ())):
        order += [clock.segment(kind, block) for block in range(blocks)]
    return Layout(tuple(order))
