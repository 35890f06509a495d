"""Several sessions as one, for one call: robots that came at different times share a forward pass.

    sessions   a (block 3)   b (block 7)   c (block 5)              each with its own cache, generator, clock
    joined     row 0         row 1         row 2                    one `Session` of three rows, each at its own block
    ...        commit, observe or plan, as on any session
    split      what changed goes back into a, b and c

`run` does this for lists of calls: those of the same kind that stand at the same place from the end go together.  A joined session must
be in one phase (nothing observed; the first block; a later one), because a session does other things in each.

The cache is not copied: a joined one reads from and writes to its parts.  Rows see different slots of their rings, so each row's own are
gathered; where all see equally many, as robots do that have run for a while, attention needs no mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wam.codec.linear import EncoderStream as LinearStream
from wam.config import SamplingConfig
from wam.inference.session import BY_ROW, Plan, Session
from wam.model.backbone import Context
from wam.model.cache import KVCache, Prefix, Write
from wam.model.conditions import Conditions
from wam.model.rotary import Rotary

Rows = list[tuple[int, int]]  # per row: which part, and the row in it


# ------------------------------------------------------------------------------------------------ calls


@dataclass(frozen=True)
class Reset:
    """Forget what was observed."""


@dataclass(frozen=True)
class Observe:
    """`Session.observe`: frames uint8 (B, n, H, W, 3), state (B, d) or None."""

    frames: np.ndarray
    state: np.ndarray | None


@dataclass(frozen=True)
class Commit:
    """`Session.commit`: actions (B, A, d)."""

    actions: np.ndarray


@dataclass(frozen=True)
class Go:
    """`Session.imagine`: go on as if these latents (B, C, k, h, w) had been observed, or, with None, without the block's frames."""

    latents: Tensor | None


@dataclass(frozen=True)
class Back:
    """`Session.back`: forget what was imagined; the session stands before the frames of the block where that began (an `Observe` comes back by itself)."""


PlanWith = Callable[[Session, str, SamplingConfig, np.ndarray | None, np.ndarray | None], Plan]


@dataclass(frozen=True)
class Think:
    """`Session.plan` in a mode.

    Attributes:
        committed: first actions of the block that are decided already (B, n, d).
        promised: what an earlier plan had for the block's first steps (B, m, d), for a `plan_with` that looks at it.
        actions: for `forward`, the actions whose outcome is imagined (B, A, d).
        plan_with: makes the plan in place of `Session.plan`: called with (session, mode, sampling, committed, promised).
        seeds: a seed for each row, from which the noise is drawn aside; None: the session's own generators go on.
    """

    mode: str
    sampling: SamplingConfig
    committed: np.ndarray | None = None
    promised: np.ndarray | None = None
    actions: np.ndarray | None = None
    plan_with: PlanWith | None = None
    seeds: tuple[int, ...] | None = None


Call = Reset | Observe | Commit | Go | Back | Think


def run(sessions: Sequence[Session], calls: Sequence[Sequence[Call]]) -> list[Plan | None]:
    """Each session's calls, in order; returns the last plan of each.

    Calls of one kind at the same distance from the end go through one forward pass where the sessions' phases agree.

    Raises:
        ValueError: as the call of the session does; sessions are then in no defined state.
    """
    plans: list[Plan | None] = [None] * len(sessions)
    rounds = max((len(c) for c in calls), default=0)
    for left in range(rounds, 0, -1):
        groups: dict[Any, list[int]] = {}
        for i, mine in enumerate(calls):
            if len(mine) >= left:
                if isinstance(mine[-left], Observe):
                    sessions[i].back()  # before it is asked what it has in common with others
                groups.setdefault(_group(sessions[i], mine[-left], i), []).append(i)
        for members in groups.values():
            for i, plan in zip(members, _together([sessions[i] for i in members], [calls[i][-left] for i in members]), strict=True):
                plans[i] = plan or plans[i]
    return plans


def _group(session: Session, call: Call, number: int) -> Any:
    """What must agree for calls to go together."""
    if isinstance(call, (Reset, Back)):
        return ("alone", number)
    phase = min(session.block, 1), session.dims.name, session.state is None, session.origin is None, session.first is None, session.goal is None, session.target is None, session.acted is None
    shapes = tuple(session.conditions.text_UTE.shape[1:]), session.conditions.first_frame_BCFHW is None
    if isinstance(call, Observe):
        alone = number if session.begins_anew else None
        return "observe", phase, shapes, call.state is None, alone
    if isinstance(call, Commit):
        return "commit", phase, shapes
    if isinstance(call, Go):
        return "go", phase, shapes, call.latents is None
    given = tuple(None if x is None else x.shape[1] for x in (call.committed, call.promised, call.actions))
    return "plan", phase, shapes, call.mode, call.sampling, given, call.plan_with, call.seeds is None


def _together(sessions: list[Session], calls: list[Call]) -> list[Plan | None]:
    if len(sessions) == 1:
        return [_apply(sessions[0], calls[0])]
    if isinstance(calls[0], Go):
        for session in sessions:
            session.set_aside()
    joined = Joined(sessions)
    plan = _apply(joined, _stacked(calls))
    joined.split()
    return [None] * len(sessions) if plan is None else [*joined.plans(plan)]


def _apply(session: Session, call: Call) -> Plan | None:
    if isinstance(call, Think):
        with _noise_from(session, call.seeds):
            if call.plan_with is not None:
                return call.plan_with(session, call.mode, call.sampling, call.committed, call.promised)
            return session.plan(call.mode, call.sampling, actions=call.actions, committed=call.committed)
    if isinstance(call, Observe):
        session.observe(call.frames, call.state)
    elif isinstance(call, Commit):
        session.commit(call.actions)
    elif isinstance(call, Go):
        session.imagine(call.latents)
    elif isinstance(call, Back):
        session.back()
    else:
        session.reset()
    return None


@contextmanager
def _noise_from(session: Session, seeds: tuple[int, ...] | None) -> Iterator[None]:
    """A plan's noise from these seeds, the session's own generators left as they are."""
    own = session.generators
    if seeds is not None:
        session.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    yield
    session.generators = own


def _stacked(calls: list[Call]) -> Call:
    """Calls of one kind as one."""
    first = calls[0]
    if isinstance(first, Observe):
        return Observe(np.concatenate([c.frames for c in calls if isinstance(c, Observe)]), _rows_of([c.state for c in calls if isinstance(c, Observe)]))
    if isinstance(first, Commit):
        return Commit(np.concatenate([c.actions for c in calls if isinstance(c, Commit)]))
    if isinstance(first, Go):
        return Go(_cat([c.latents for c in calls if isinstance(c, Go)]))
    assert isinstance(first, Think)
    thoughts = [c for c in calls if isinstance(c, Think)]
    stacked: dict[str, Any] = {name: _rows_of([getattr(c, name) for c in thoughts]) for name in ("committed", "promised", "actions")}
    seeds = None if first.seeds is None else tuple(seed for c in thoughts for seed in c.seeds or ())
    return replace(first, seeds=seeds, **stacked)


def _rows_of(arrays: list[np.ndarray | None]) -> np.ndarray | None:
    there = [a for a in arrays if a is not None]
    return np.concatenate(there) if there else None


# ------------------------------------------------------------------------------------------------ sessions


class Joined(Session):
    """One session with the rows of several, for as long as they are in step; `split` gives back what changed."""

    def __init__(self, sessions: Sequence[Session]):
        """Join sessions of one policy, robot and phase."""
        first = sessions[0]
        self.__dict__.update(first.__dict__)
        self.parts = list(sessions)
        self.generators = [g for s in sessions for g in s.generators]
        self.timings = {}
        self._base = [b for _ in range(self._sides) for s in sessions for b in [s.block] * s.batch]
        self._began = first.block
        rows = [(i, row + side * s.batch) for side in range(self._sides) for i, s in enumerate(sessions) for row in range(s.batch)]
        self.committed = all(s.committed for s in sessions)
        self.cache = JoinedCache([s.cache for s in sessions], rows)
        self.embodiment_B = torch.cat([s.embodiment_B for s in sessions])
        self.conditions = self._given = join_conditions([s.conditions for s in sessions], rows)
        self.stream = _JoinedStream([s.stream for s in sessions], [s.batch for s in sessions])
        for name in BY_ROW:
            setattr(self, name, _cat([getattr(s, name) for s in sessions]))
        self.origin = _rows_of([s.origin for s in sessions])

    @property
    def members(self) -> list[Session]:
        """See `Session.members`: those that were joined, in the order of their rows."""
        return self.parts

    @property
    def _blocks(self) -> list[int]:
        return [b + self.block - self._began for b in self._base]

    def split(self) -> None:
        """Give every part what has become of its rows."""
        assert isinstance(self.cache, JoinedCache)
        self.cache.give_back()
        start, moved = 0, self.block - self._began
        for part in self.parts:
            mine = slice(start, start + part.batch)
            start = mine.stop
            part.block, part.committed = part.block + moved, self.committed
            part.state, part.first, part.acted, part.newest = (None if x is None else x[mine] for x in (self.state, self.first, self.acted, self.newest))
            part.origin = None if self.origin is None else self.origin[mine]
            if self.conditions is not self._given:
                part.conditions = own_conditions(self.conditions, [row + side * self.batch for side in range(self._sides) for row in range(mine.start, mine.stop)])
            for stage, spent in self.timings.items():
                part.timings[stage] = part.timings.get(stage, 0.0) + spent
        self.timings = {}

    def plans(self, plan: Plan) -> list[Plan]:
        """Each part's share of a plan; its timings are the whole's, which is what each waited for."""
        out, start = [], 0
        for part in self.parts:
            mine = slice(start, start + part.batch)
            start = mine.stop
            timings, part.timings = {**part.timings}, {}
            for stage, spent in plan.timings.items():
                timings[stage] = timings.get(stage, 0.0) + spent
            out.append(replace(plan, actions=None if plan.actions is None else plan.actions[mine], imagined=None if plan.imagined is None else plan.imagined[mine], timings=timings))
        return out


def _cat(tensors: list[Tensor | None]) -> Tensor | None:
    there = [t for t in tensors if t is not None]
    assert not there or len(there) == len(tensors), "sessions in one phase have the same parts"
    return torch.cat(there) if there else None


@dataclass
class _JoinedStream:
    """Encoders side by side."""

    parts: list[Any]
    rows: list[int]

    def encode(self, frames_BFHWC: Tensor) -> Tensor:
        """Each part's next frames, to latents (B, C, F', h, w)."""
        if all(isinstance(part, LinearStream) and part.started == self.parts[0].started for part in self.parts):
            latents = self.parts[0].encode(frames_BFHWC)  # remembers nothing of them but that they began
            for part in self.parts:
                part.started = True
            return latents
        return torch.cat([part.encode(frames) for part, frames in zip(self.parts, frames_BFHWC.split(self.rows), strict=True)])

    def select(self, rows: Sequence[int]) -> _JoinedStream:
        """Rows of a joined session are never dropped: it lives for one call."""
        raise AssertionError("select on the sessions, not on what joins them")


# ------------------------------------------------------------------------------------------------ caches


class JoinedCache(KVCache):
    """Rows of several caches: its own bookkeeping, copied back by `give_back`; keys and values stay where they are."""

    def __init__(self, parts: Sequence[KVCache], rows: Rows):
        """A view of `rows`, in this order."""
        self.__dict__.update(parts[0].__dict__)
        self.parts, self.rows = list(parts), rows
        starts = np.cumsum([0, *(p.batch for p in parts)])
        order = torch.tensor([int(starts[part]) + row for part, row in rows])
        self.kinds_BS = torch.cat([p.kinds_BS for p in parts])[order]
        self.blocks_BS = torch.cat([p.blocks_BS for p in parts])[order]
        self.positions_BS4 = torch.cat([p.positions_BS4 for p in parts])[order]

    def give_back(self) -> None:
        """Tell the parts what their slots hold now."""
        for row, (part, own) in enumerate(self.rows):
            p = self.parts[part]
            p.kinds_BS[own], p.blocks_BS[own], p.positions_BS4[own] = self.kinds_BS[row], self.blocks_BS[row], self.positions_BS4[row]

    def writer(self, layer: int, index_BT: Tensor) -> Write:
        """What stores unrotated keys and values of one layer in claimed slots, which lie side by side in each row."""
        where = [(self.parts[part], own, slice(start, start + index_BT.shape[1])) for (part, own), start in zip(self.rows, index_BT[:, 0].tolist(), strict=True)]
        keys, values = [p.keys[layer][own, slots] for p, own, slots in where], [p.values[layer][own, slots] for p, own, slots in where]

        def write(k_BTHD: Tensor, v_BTHD: Tensor) -> None:
            for mine, given in ((keys, k_BTHD), (values, v_BTHD)):
                for row, x in zip(mine, given, strict=True):
                    row.copy_(x)

        return write

    def read(self, visible_BS: Tensor, own: int) -> Prefix:
        """Gather each row's visible slots, in their order; rows that see fewer than others are masked."""
        count_B = visible_BS.sum(dim=1)
        seen = int(count_B.max())
        index_BS = (~visible_BS).long().argsort(dim=1, stable=True)[:, :seen]
        device = self.keys[0].device
        positions = self.positions_BS4.gather(1, index_BS.unsqueeze(-1).expand(-1, -1, 4))
        rotary = Rotary.at(positions, self.keys[0].shape[-1], device)
        on_device = list(index_BS.to(device))

        def gathered(layer: int, name: str) -> Tensor:
            return torch.stack([getattr(self.parts[part], name)[layer][row].index_select(0, index) for (part, row), index in zip(self.rows, on_device, strict=True)])

        def room(values: Tensor) -> Tensor:
            batch, _, heads, head_dim = values.shape
            out = values.new_empty(batch, heads, seen + own, head_dim).transpose(1, 2)
            out[:, :seen] = values
            return out

        layers = range(len(self.keys))
        keys = tuple(room(rotary.rotate(gathered(layer, "keys"))) for layer in layers)
        values = tuple(room(gathered(layer, "values")) for layer in layers)
        chosen = torch.arange(seen).unsqueeze(0) < count_B.unsqueeze(1)
        mask = None if bool(chosen.all()) else chosen[:, None, None, :].to(device)
        return Prefix(keys, values, seen, mask)

    def head(self, rows: int) -> JoinedCache:
        """The first rows, sharing this cache's memory and bookkeeping."""
        out = object.__new__(JoinedCache)
        out.__dict__.update(self.__dict__)
        out.rows = self.rows[:rows]
        out.kinds_BS, out.blocks_BS, out.positions_BS4 = self.kinds_BS[:rows], self.blocks_BS[:rows], self.positions_BS4[:rows]
        return out

    def select(self, rows: list[int]) -> KVCache:
        """A joined cache lives for one call, and its rows are never dropped."""
        raise AssertionError("select on the sessions, not on what joins them")


# ------------------------------------------------------------------------------------------------ conditions


def join_conditions(parts: Sequence[Conditions], rows: Rows) -> Conditions:
    """Conditions of `rows`; instructions that several parts share (the same tensors) are held once."""
    texts: dict[tuple[int, int, int], int] = {}
    distinct: list[Conditions] = []
    first_of: list[int] = []
    held = 0
    for part in parts:
        key = id(part.text_UTE), id(part.video.text_keys_values), id(part.action and part.action.text_keys_values)
        if key not in texts:
            texts[key] = held
            held += len(part.text_UTE)
            distinct.append(part)
        first_of.append(texts[key])
    starts = np.cumsum([0, *(len(p.rows_B) for p in parts)])
    device = parts[0].rows_B.device
    order = torch.tensor([int(starts[part]) + row for part, row in rows], device=device)
    rows_B = torch.cat([part.rows_B + first for part, first in zip(parts, first_of, strict=True)])[order]
    frames = _cat([p.first_frame_BCFHW for p in parts])
    action = [p.action for p in parts if p.action is not None]
    return Conditions(
        _joined([p.text_UTE for p in distinct]),
        rows_B,
        _join_contexts([p.video for p in distinct], [p.video for p in parts], rows_B, order),
        _join_contexts([p.action for p in distinct if p.action is not None], action, rows_B, order) if action else None,
        None if frames is None else frames[order],
    )


def _join_contexts(distinct: list[Context], parts: list[Context], rows_B: Tensor, order: Tensor) -> Context:
    """What tokens cross-attend to: texts of the distinct parts, images of every row."""
    text, image = _cat([c.text_UTD for c in distinct]), _cat([c.image_BMD for c in parts])
    text_kv = _join_layers([c.text_keys_values for c in distinct])
    image_kv = _join_layers([c.image_keys_values for c in parts])
    return Context(rows_B, text, text_kv, None if image is None else image[order], None if image_kv is None else tuple((k[order], v[order]) for k, v in image_kv))


def _join_layers(parts: list[Any]) -> Any:
    """Keys and values (k, v) per layer, side by side over the parts."""
    if any(p is None for p in parts):
        return None
    return parts[0] if len(parts) == 1 else tuple((torch.cat([k for k, _ in layer]), torch.cat([v for _, v in layer])) for layer in zip(*parts, strict=True))


def _joined(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def own_conditions(conditions: Conditions, rows: list[int]) -> Conditions:
    """Conditions of some rows, with none of the others' instructions."""
    device = conditions.rows_B.device
    index = torch.tensor(rows, device=device)
    used, rows_B = conditions.rows_B[index].unique(return_inverse=True)

    def narrow(context: Context) -> Context:
        mine = context.select(index)
        kv = None if mine.text_keys_values is None else tuple((k[used], v[used]) for k, v in mine.text_keys_values)
        return replace(mine, rows_B=rows_B, text_UTD=None if mine.text_UTD is None else mine.text_UTD[used], text_keys_values=kv)

    frames = None if conditions.first_frame_BCFHW is None else conditions.first_frame_BCFHW[index]
    return Conditions(conditions.text_UTE[used], rows_B, narrow(conditions.video), None if conditions.action is None else narrow(conditions.action), frames)
