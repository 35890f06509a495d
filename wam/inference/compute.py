"""Floating-point operations of a plan, counted from sizes, so that modes can be compared by what they cost on any machine.

    plan        tokens that are denoised x evaluations of the network, and what the mode writes into the memory on the way
    remember    a block's state, actions and frames, written once they are there; the same for every mode
    check       the outcome of a plan's actions, where that is imagined to be compared with what comes

Counted for one robot whose memory is full: `wam.model.flops` says what is counted.  Not counted is what the memory does not grow by
(instruction, goal and first frame, once an episode) and the codec.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from wam.config import CheckConfig, SamplingConfig
from wam.model.flops import Work, forward_flops, step_work
from wam.model.wam import WorldActionModel
from wam.pretrained import Policy
from wam.relations import Mode, Reach, RelationTable
from wam.timeline import FIRST_BLOCK, VIDEO_KINDS, Kind, Layout


def plan_flops(policy: Policy, mode: str, sampling: SamplingConfig | None = None, past: int | None = None) -> float:
    """Of one robot's plan in a mode.  With reuse by similarity, which decides while it runs, every step is taken to be evaluated.

    Args:
        sampling: how; default: as the checkpoint says.
        past: whole blocks that are remembered; default: as many as are ever seen.

    Raises:
        ValueError, LeakError: as `Relations.mode`.
    """
    how, memory = sampling or policy.config.sampling, _Memory.of(policy, past)
    asked = memory.model.relations.mode(mode)
    sides = 2 if policy.config.sampling.guided else 1
    if mode == "imagine":
        alone = memory.model.relations.mode("video")
        first = _denoise(memory, alone, how, alone.live, sides)
        if asked.pinned:
            return first + _denoise(memory, asked, how, asked.live, sides)
        return first + sides * memory.write(asked.table, Kind.VC) + _denoise(memory.with_own(Kind.VC), asked, how, asked.live, sides)
    if mode in ("forward", "inverse") and not asked.pinned:
        given = Kind.AC if mode == "forward" else Kind.VC
        return sides * memory.write(asked.table, given) + _denoise(memory.with_own(given), asked, how, asked.live, sides)
    steady = not asked.sees(Kind.V, Kind.A) and not (memory.model.live_state and asked.sees(Kind.V, Kind.S))
    if asked.pinned.get(Kind.V) and steady:
        return sides * memory.write(asked.table, Kind.V) + _denoise(memory.with_own(Kind.V), asked, how, (Kind.A,), sides)
    return _denoise(memory, asked, how, asked.live, sides)


def check_flops(policy: Policy, check: CheckConfig, past: int | None = None) -> float:
    """Of checking one plan: imagining the outcome of its actions, or nothing, where the plan's own imagination is compared or none."""
    return plan_flops(policy, "forward", policy.config.sampling.with_steps(check.steps), past) if check.source == "forward" else 0.0


def remember_flops(policy: Policy, past: int | None = None) -> float:
    """Of writing one block (state, actions, frames) into one robot's memory."""
    memory = _Memory.of(policy, past)
    table = memory.model.relations.mode("skip").table
    kinds = [kind for kind in (Kind.S, Kind.AC, Kind.VC) if kind in memory.model.cached_kinds]
    total = 0.0
    for kind in kinds:
        total += memory.write(table, kind)
        memory = memory.with_own(kind)
    return total * (2 if policy.config.sampling.guided else 1)


# ------------------------------------------------------------------------------------------------ counting


@dataclass(frozen=True)
class _Memory:
    """What is written when block `block` is planned: kinds and blocks, as the cache would hold them."""

    model: WorldActionModel
    block: int
    written: tuple[tuple[Kind, int], ...]

    @classmethod
    def of(cls, policy: Policy, past: int | None) -> _Memory:
        model, t = policy.model, policy.config.timeline
        ends = policy.config.model.positions == "index" or policy.config.model.first_frame == "concat" or not model.relations.remembers
        block = past if past is not None else t.blocks - 1 if ends else t.history + 1
        kinds = model.cached_kinds
        first = [(kind, FIRST_BLOCK) for kind in (Kind.G, Kind.H) if kind in kinds and (kind is Kind.H or model.config.model.goal_image)]
        blocks = [(kind, b) for b in range(block + 1) for kind in (Kind.S, Kind.AC, Kind.VC) if kind in kinds and (b < block or kind is Kind.S)]
        return cls(model, block, (*first, *blocks))

    def with_own(self, kind: Kind) -> _Memory:
        """The same with a kind of the planned block."""
        return replace(self, written=tuple(dict.fromkeys((*self.written, (kind, self.block)))))

    def seen(self, table: RelationTable, kind: Kind) -> int:
        """Tokens of the memory that a query of the planned block sees."""
        reach, clock = Reach.of(self.model.config.timeline), self.model.clock
        return sum(clock.tokens(k) for k, b in self.written if table.allow(kind, self.block, k, b, reach))

    def write(self, table: RelationTable, kind: Kind) -> float:
        """Writing a segment of the planned block; registers go without their head."""
        tokens = self.model.clock.tokens(kind)
        others = replace(self, written=tuple((k, b) for k, b in self.written if (k, b) != (kind, self.block)))
        return forward_flops(self.model.config, step_work({Kind.VC if kind is Kind.V else kind: tokens}, others.seen(table, kind)))


def _denoise(memory: _Memory, mode: Mode, how: SamplingConfig, live: Sequence[Kind], sides: int) -> float:
    """All evaluations of the network for one plan."""
    video_moves = Kind.V in live and Kind.V not in mode.pinned
    steps = how.steps if video_moves or how.action_steps is None else how.action_steps
    evaluated = min(steps, how.evaluations) if how.reuse == "mask" else steps
    rows = sides if video_moves or how.action_guidance != 1 else 1
    return rows * evaluated * forward_flops(memory.model.config, _evaluation(memory, mode, live))


def _evaluation(memory: _Memory, mode: Mode, live: Sequence[Kind]) -> Work:
    """One evaluation: video before states before actions, as they stand in a plan; states have a level of their own."""
    kinds = [k for k in live if k is not Kind.A] + ([Kind.S] if memory.model.live_state and Kind.A in live else []) + [k for k in live if k is Kind.A]
    layout = Layout(tuple(memory.model.clock.segment(kind, memory.block) for kind in kinds))
    tokens, pairs = {kind: memory.model.clock.tokens(kind) for kind in kinds}, 0
    for kind in kinds:
        among = layout.span(*[other for other in kinds if mode.sees(kind, other)])
        pairs += tokens[kind] * (memory.seen(mode.table, kind) + among.stop - among.start)
    video = sum(n for kind, n in tokens.items() if kind in VIDEO_KINDS)
    action = sum(tokens.values()) - video
    states = tokens.get(Kind.S, 0)
    return Work(video, action, pairs, action_levels=1 + (states > 0), predicted=tokens.get(Kind.V, 0), acted=tokens.get(Kind.A, 0), states=states)
