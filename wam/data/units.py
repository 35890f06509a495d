"""What a robot's columns mean: raw physical numbers to the numbers that the network sees, and back.

    files --rows--> raw columns --encode--> network units --normalise--> network          network --unnormalise--> --decode--> commands
                    groups side by side,      relative to the state at the block's start where a group says so,
                    as the robot reports      rotations in the form that the network sees (vectors are subtracted,
                    and takes them            rotations composed: R_state^-1 R_action, in the frame of the state)

A dataset, a session and a check use one and the same `Units`, so that training and driving cannot part.
Statistics are those of the network's units: of relative actions over every pair (row, offset within a block) inside an episode, and exact.
Beyond an episode's end an absolute action stays where it is, a relative one is no motion (as in DreamZero); both are masked.

Letters: A actions a block, d raw dimensions, D network dimensions (before padding to the widest robot).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from wam.config import DataConfig, EmbodimentConfig, GroupConfig, TimelineConfig
from wam.config_robot import overlap
from wam.data.lerobot import DatasetError, LeRobotDataset
from wam.data.normalize import Method, Normalizer, Statistics, statistics
from wam.data.rotations import from_matrix, to_matrix

Rows = Mapping[str, np.ndarray]  # "state", "action", "executed": (length, d) float32, raw


@dataclass(frozen=True)
class Part:
    """A group, or a whole column, with where it lies.

    Attributes:
        column, start: in the dataset; `executed` is the column of what was really done.
        raw, seen: its dimensions in the raw vector and in the network's.
        origin: dimensions of the raw state that it is relative to, -1 for those that are not; empty: absolute.
        form, seen_as, origin_form: of rotations; "none" for other numbers.
    """

    name: str
    column: str
    executed: str
    start: int
    raw: slice
    seen: slice
    origin: tuple[int, ...] = ()
    form: str = "none"
    seen_as: str = "none"
    origin_form: str = "none"
    method: Method = "quantile"

    @property
    def relative(self) -> bool:
        """Whether it depends on the state at the block's start."""
        return any(i >= 0 for i in self.origin)

    @property
    def stop(self) -> int:
        """Where it ends in its column, exclusive."""
        return self.start + self.raw.stop - self.raw.start

    def encode(self, x: np.ndarray, state: np.ndarray | None, is_pad: np.ndarray | None) -> np.ndarray:
        """Raw (..., A, n), raw states (..., d) and padding (..., A) to the network's units."""
        if self.form == "none":
            return x if state is None else _where_real(is_pad, x - self._start_of(state), self._relative_dims)
        matrix = to_matrix(x, self.form)
        if state is not None:
            matrix = np.swapaxes(self._turn_of(state), -1, -2) @ matrix
            if is_pad is not None:
                matrix = np.where(is_pad[..., None, None], np.eye(3), matrix)
        return from_matrix(matrix, self.seen_as).astype(x.dtype)

    def decode(self, x: np.ndarray, state: np.ndarray | None) -> np.ndarray:
        """The network's units (..., A, n) back to raw numbers."""
        if self.form == "none":
            return x if state is None else x + self._start_of(state)
        matrix = to_matrix(x, self.seen_as)
        return from_matrix(matrix if state is None else self._turn_of(state) @ matrix, self.form).astype(x.dtype)

    @cached_property
    def _relative_dims(self) -> np.ndarray:
        return np.asarray(self.origin) >= 0

    def _start_of(self, state: np.ndarray) -> np.ndarray:
        """(..., 1, n): what is subtracted."""
        return np.where(self._relative_dims, state[..., self.origin], 0)[..., None, :].astype(state.dtype)

    def _turn_of(self, state: np.ndarray) -> np.ndarray:
        """(..., 1, 3, 3): the rotation at the block's start."""
        return to_matrix(state[..., self.origin], self.origin_form)[..., None, :, :]


@dataclass(frozen=True)
class Units:
    """One robot's units; immutable.

    Attributes:
        robot: sizes and groups.
        state, action: the parts of the two vectors, in order.
        normalization: how statistics are taken where a group says nothing else.
    """

    robot: EmbodimentConfig
    state: tuple[Part, ...]
    action: tuple[Part, ...]
    normalization: Method = "quantile"

    @classmethod
    def of(cls, robot: EmbodimentConfig, data: DataConfig) -> Units:
        """The units of a robot in a dataset."""
        state = _parts(robot, "state", (data.state, data.state), data.normalization)
        action = _parts(robot, "action", (data.action, data.executed_action or data.action), data.normalization)
        return cls(robot, state, action, data.normalization)

    @property
    def state_dim(self) -> int:
        """D of a state: what the network sees, before padding."""
        return self.robot.state_dim

    @property
    def action_dim(self) -> int:
        """D of an action: what the network sees, before padding."""
        return self.robot.action_dim

    @property
    def relative(self) -> bool:
        """Whether actions depend on the state at their block's start."""
        return any(part.relative for part in self.action)

    # -------------------------------------------------------------------------------------------- rows of a dataset

    def check(self, source: LeRobotDataset) -> None:
        """Compare groups with a dataset's columns, before anything is read.

        Raises:
            DatasetError: a column that is not there or no vector, or of another size; a group that reaches beyond its column.
        """
        for what, parts in (("state", self.state), ("action", self.action)):
            for part in parts:
                for column in dict.fromkeys((part.column, part.executed)):
                    self._check_part(source, what, part, column)
            for column in ("column", "executed"):
                both = overlap(_place(source, part, getattr(part, column)) for part in parts)
                if both is not None:
                    raise DatasetError(f"{source.root}: {what} {both}, by its names in meta/modality.json; correct the column, start or size of one of them, in the robot's card or there")

    def rows(self, source: LeRobotDataset, episode: int) -> dict[str, np.ndarray]:
        """The raw columns of an episode: "state", "action" and "executed", (length, d) float32 each.

        Raises:
            DatasetError: as `check`; numbers that are not finite (file, column, episode, row and dimension are named).
        """
        wanted = {"state": [(p, p.column) for p in self.state], "action": [(p, p.column) for p in self.action], "executed": [(p, p.executed) for p in self.action]}
        return {name: np.concatenate([_read(source, episode, part, column) for part, column in parts], axis=1) for name, parts in wanted.items()}

    def _check_part(self, source: LeRobotDataset, what: str, part: Part, column: str) -> None:
        shape, size = source.feature(column).shape, part.raw.stop - part.raw.start
        if len(shape) > 1:
            raise DatasetError(f"feature {column!r} of {source.root} has shape {shape}; a state or action is a vector, (dimensions,)")
        found, groups = math.prod(shape), getattr(self.robot, f"{what}_groups")
        if not groups and found != size:
            raise DatasetError(
                f"{source.root}: {column!r} has {found} dimensions, but model.embodiments gives {self.robot.name!r} {what}_dim {size}; "
                f"set {what}_dim to {found}, or name another column in data"
            )
        if part.start + size > found:
            raise DatasetError(
                f"{source.root}: {column!r} has {found} dimensions, but {what} group {part.name!r} of {self.robot.name!r} is {part.start}..{part.start + size - 1} of it; "
                "correct the group's column, start or size"
            )
        said = source.modality.groups.get(column)
        if part.relative and said is not None and not said.absolute:
            raise DatasetError(f"{source.root}: {column!r} is recorded relative already (absolute: false in meta/modality.json), but group {part.name!r} has relative_to; leave it out")

    # -------------------------------------------------------------------------------------------- there and back

    def encode_state(self, state: np.ndarray) -> np.ndarray:
        """Raw states (..., d) in network units (..., D)."""
        _check_width("a state", state, self.robot.raw_state_dim)
        return np.concatenate([part.encode(state[..., part.raw], None, None) for part in self.state], axis=-1)

    def encode_actions(self, actions: np.ndarray, origin_state: np.ndarray | None = None, is_pad: np.ndarray | None = None) -> np.ndarray:
        """Raw actions (..., A, d) in network units (..., A, D).

        Args:
            origin_state: (..., d_state) raw: the state at each block's start; needed where actions are `relative`.
            is_pad: (..., A): beyond the episode; relative actions are then no motion, absolute ones stay as they are.

        Raises:
            ValueError: other sizes, no state although actions are relative, or numbers that are no rotation.
        """
        _check_width("an action", actions, self.robot.raw_action_dim)
        origin = self._origin(origin_state)
        return np.concatenate([part.encode(actions[..., part.raw], origin if part.relative else None, is_pad) for part in self.action], axis=-1)

    def decode_actions(self, actions: np.ndarray, origin_state: np.ndarray | None = None) -> np.ndarray:
        """Actions in network units (..., A, D) as raw commands (..., A, d): the inverse of `encode_actions`.  Raises as that does."""
        _check_width("an action of the network", actions, self.robot.action_dim)
        origin = self._origin(origin_state)
        return np.concatenate([part.decode(actions[..., part.seen], origin if part.relative else None) for part in self.action], axis=-1)

    def no_motion(self) -> np.ndarray:
        """(D,) float32: a relative action that stays at its block's start; NaN in absolute dimensions, where staying is another number each time."""
        still = np.full(self.action_dim, np.nan, np.float32)
        for part in self.action:
            if part.form != "none":
                still[part.seen] = from_matrix(np.eye(3), part.seen_as) if part.relative else np.nan
            elif part.relative:
                still[part.seen] = np.where(np.asarray(part.origin) >= 0, 0, np.nan)
        return still

    def _origin(self, state: np.ndarray | None) -> np.ndarray | None:
        if not self.relative:
            return None
        if state is None:
            raise ValueError(f"actions of {self.robot.name!r} are relative to the state at the block's start, which was not observed; call observe(frames, state) with a state")
        _check_width("the state at the block's start", state, self.robot.raw_state_dim)
        return state

    # -------------------------------------------------------------------------------------------- statistics

    def fit(self, episodes: Iterable[Rows], timeline: TimelineConfig) -> Normalizer:
        """Statistics of "state" and "action" in network units.

        A relative part takes actions_per_block times as many numbers as there are rows, in float32, while it is looked at.

        Args:
            episodes: raw rows, as `rows` gives them; an episode whose windows stay inside language spans can be given span by span.

        Raises:
            ValueError: no rows, or numbers that are not finite.
        """
        whole = list(episodes)
        if not whole:
            raise ValueError("there are no episodes to take statistics of states and actions from")
        keys = {what: [(self._of(part, what, self.all_rows(what, part, whole, timeline)), part.method) for part in getattr(self, what)] for what in ("state", "action")}
        return Normalizer.of_parts(keys, self.normalization)

    def all_rows(self, what: str, part: Part, episodes: Sequence[Rows], timeline: TimelineConfig) -> np.ndarray:
        """(n, D) all that a part of a state or an action can be in network units, over episodes."""
        if what == "state":
            return np.concatenate([part.encode(e["state"][:, part.raw], None, None) for e in episodes])
        return np.concatenate([_seen(part, e, timeline.actions_per_block) for e in episodes])

    def _of(self, part: Part, what: str, rows: np.ndarray) -> Statistics:
        key = what if part.name == what else f"{what} group {part.name!r} of {self.robot.name!r}"
        return statistics(key, rows, part.method)


def _seen(part: Part, rows: Rows, actions: int) -> np.ndarray:
    """All that a part of an action can be, in network units: each row once where it is absolute, else with every block's start up to A - 1 rows before."""
    x = rows["action"][:, part.raw]
    if not part.relative:
        return part.encode(x, None, None)
    length = len(x)
    pairs = [part.encode(x[offset:, None], rows["state"][: length - offset], None)[:, 0] for offset in range(min(actions, length))]
    return np.concatenate(pairs)


def _parts(robot: EmbodimentConfig, what: str, columns: tuple[str, str], method: Method) -> tuple[Part, ...]:
    groups: tuple[GroupConfig, ...] = getattr(robot, f"{what}_groups")
    if not groups:
        size = getattr(robot, f"{what}_dim")
        origin = robot.relative_to if what == "action" and any(i >= 0 for i in robot.relative_to) else ()
        return (Part(what, *columns, 0, slice(0, size), slice(0, size), origin, method=method),)
    starts = dict(zip((g.name for g in robot.state_groups), np.cumsum([0, *(g.size for g in robot.state_groups)]).tolist(), strict=False))
    parts, raw, seen = [], 0, 0
    for g in groups:
        column = g.column or columns[0]
        executed = g.executed or (column if g.column else columns[1])
        origin, form = (), "none"
        if g.relative_to is not None:
            state = robot.state_group(g.relative_to)
            origin, form = tuple(range(starts[state.name], starts[state.name] + state.size)), state.rotation
        where = slice(raw, raw + g.size), slice(seen, seen + g.network_size)
        parts.append(Part(g.name, column, executed, g.start, *where, origin, g.rotation, g.seen_as, form, g.normalization or method))
        raw, seen = raw + g.size, seen + g.network_size
    return tuple(parts)


def _place(source: LeRobotDataset, part: Part, column: str) -> tuple[str, int, int, str]:
    """A part in a column of the files, whatever meta/modality.json calls it: (column, first, stop, name)."""
    named = source.modality.groups.get(column)
    real, shift = (column, 0) if named is None else (named.column, named.start)
    return real, shift + part.start, shift + part.stop, part.name


def _read(source: LeRobotDataset, episode: int, part: Part, column: str) -> np.ndarray:
    rows = source.read(episode, column)[:, part.start : part.stop].astype(np.float32)
    if not np.isfinite(rows).all():
        row, dimension = np.argwhere(~np.isfinite(rows))[0]
        raise DatasetError(
            f"{source.episodes[episode].data_file}: {column} of episode {episode} is {rows[row, dimension]} at row {row}, dimension {part.start + dimension}; "
            "repair the episode, or record it again"
        )
    return rows


def _where_real(is_pad: np.ndarray | None, x: np.ndarray, relative: np.ndarray) -> np.ndarray:
    """Zero in relative dimensions where it is padding."""
    return x if is_pad is None else np.where(is_pad[..., None] & relative, 0, x).astype(x.dtype)


def _check_width(what: str, x: np.ndarray, width: int) -> None:
    if x.ndim < 1 or x.shape[-1] != width:
        raise ValueError(f"{what} has shape {x.shape}; expected (..., {width})")
