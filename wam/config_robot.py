"""One robot, as a model and its checkpoint know it: sizes, and what the numbers of its states and actions mean.

A state or an action vector is a row of groups, side by side:

    action    | arm: 7 joints | gripper |        raw: what the robot takes, in its units
              | arm - arm at  | gripper |        network: relative to the state at the block's start where a group says so,
              | block's start |         |                 rotations in the form that the network is to see

What is done with the numbers is `wam.data.units`; whence a dataset's columns come, a robot card says (`wam.robots`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from wam.config_tree import require

Rotation = Literal["none", "quaternion", "quaternion_wxyz", "euler", "axis_angle", "rotation_6d"]
STATISTICS = "embodiments"  # the key under which a checkpoint's normalizer.json has each robot's statistics by name
INSTRUCTION = ("{instruction}", "{instruction:lower}")  # where a template takes the instruction
ROTATION_SIZE = {"quaternion": 4, "quaternion_wxyz": 4, "euler": 3, "axis_angle": 3, "rotation_6d": 6}


@dataclass(frozen=True)
class GroupConfig:
    """A part of a state or an action that belongs together: an arm's joints, a hand's pose, a gripper."""

    name: str
    size: int  # raw numbers
    column: str | None = None  # column of the dataset, or a name of its meta/modality.json; null: data.state or data.action
    executed: str | None = None  # actions only: the column of what was really done; null: `column`, and where that is null too, data.executed_action
    start: int = 0  # where in these columns the group begins
    relative_to: str | None = None  # actions only: the state group, at the block's start, that the network sees this relative to; null: absolute
    rotation: Rotation = "none"  # the form of the raw numbers, where they are a rotation (forms: `wam.data.rotations`)
    network_rotation: Rotation | None = None  # the form that the network sees; null: as the raw numbers
    normalization: Literal["quantile", "mean_std", "min_max", "none"] | None = None  # of this group; null: data.normalization
    kind: Literal["target", "delta", "velocity"] = "target"  # actions only: how rows of another rate become a control step (`wam.data.rates`); data.action_kinds says otherwise
    gripper: bool = False  # opens and closes: `wam check` looks at its polarity

    def __post_init__(self) -> None:
        who = f"group {self.name!r}"
        require(bool(self.name.strip()), f"a group of model.embodiments has the name {self.name!r}", "give it one, such as arm")
        require(self.size >= 1, f"{who} of model.embodiments: size is {self.size}", "it must be at least 1")
        require(self.start >= 0, f"{who} of model.embodiments: start is {self.start}", "dimensions are counted from 0")
        if self.rotation == "none":
            seen = self.network_rotation in (None, "none")
            require(seen, f"{who} of model.embodiments: network_rotation is {self.network_rotation!r}, but rotation is 'none'", "say in which form the raw numbers are, or leave both out")
            return
        size = ROTATION_SIZE[self.rotation]
        require(self.size == size, f"{who} of model.embodiments: size is {self.size}, but a rotation as {self.rotation} has {size} numbers", "give position and rotation groups of their own")
        require(self.network_rotation != "none", f"{who} of model.embodiments: network_rotation is 'none', but rotation is {self.rotation!r}", "name a form, or leave network_rotation out")
        require(not self.gripper, f"{who} of model.embodiments is a gripper and a rotation", "set one of them")

    @property
    def seen_as(self) -> str:
        """The form of a rotation that the network sees."""
        return self.network_rotation or self.rotation

    @property
    def network_size(self) -> int:
        """Numbers that the network sees."""
        return ROTATION_SIZE.get(self.seen_as, self.size)


def overlap(places: Iterable[tuple[str, int, int, str]]) -> str | None:
    """Which two of some groups, (column, first, stop, name) each, take the same number of a column; None where each has its own."""
    for (column, _, stop, name), (other, start, _, second) in pairwise(sorted(places)):
        if column == other and start < stop:
            return f"groups {name!r} and {second!r} both take dimension {start} of {column!r}"
    return None


@dataclass(frozen=True)
class EmbodimentConfig:
    """One robot's sizes and groups.

    Sizes are those of what the network sees; a robot's own vectors differ where rotations change their form (`raw_state_dim`).
    """

    name: str = "metaworld"
    state_dim: int = 4
    action_dim: int = 4
    action_channels: tuple[int, ...] = ()  # which channels of a wider, shared action vector are this robot's (LingBot-VA); empty: the first
    relative_to: tuple[int, ...] = ()  # per action dimension: the state dimension at the block's start that it is a difference to, or -1; empty: as action_groups say (DreamZero)
    state_groups: tuple[GroupConfig, ...] = ()  # in order; empty: the whole column, as it is
    action_groups: tuple[GroupConfig, ...] = ()  # likewise
    template: str | None = None  # the text that this robot's instructions are put into; null: text.template

    def __post_init__(self) -> None:
        channels = self.action_channels
        require(
            not channels or (len(set(channels)) == self.action_dim and min(channels) >= 0),
            f"model.embodiments: action_channels of {self.name!r} are {list(channels)}",
            f"list action_dim = {self.action_dim} different channels, from 0",
        )
        relative = self.relative_to
        require(
            not relative or (len(relative) == self.action_dim and all(-1 <= i < self.state_dim for i in relative)),
            f"model.embodiments: relative_to of {self.name!r} is {list(relative)}",
            f"list for each of action_dim = {self.action_dim} a state dimension below {self.state_dim}, or -1",
        )
        for name in ("state_dim", "action_dim"):
            require(getattr(self, name) >= 1, f"model.embodiments: {name} of {self.name!r} is {getattr(self, name)}", "it must be at least 1")
        holds = self.template is None or any(word in self.template for word in INSTRUCTION)
        require(holds, f"model.embodiments: template of {self.name!r} is {self.template!r}", f"it must hold {' or '.join(INSTRUCTION)}")
        for what in ("state", "action"):
            self._check_groups(what)
        self._check_relative()

    @property
    def raw_state_dim(self) -> int:
        """Numbers of a state as the robot reports it."""
        return sum(g.size for g in self.state_groups) or self.state_dim

    @property
    def raw_action_dim(self) -> int:
        """Numbers of an action as the robot takes it."""
        return sum(g.size for g in self.action_groups) or self.action_dim

    def state_group(self, name: str) -> GroupConfig:
        """The state group called `name`; it exists."""
        return next(g for g in self.state_groups if g.name == name)

    def _check_groups(self, what: str) -> None:
        groups, size = getattr(self, f"{what}_groups"), getattr(self, f"{what}_dim")
        if not groups:
            return
        names = [g.name for g in groups]
        require(len(set(names)) == len(names), f"model.embodiments: {what}_groups of {self.name!r} are {', '.join(names)}", "name each once")
        found = sum(g.network_size for g in groups)
        parts = " + ".join(f"{g.name} {g.network_size}" for g in groups)
        require(found == size, f"model.embodiments: {what}_dim of {self.name!r} is {size}, but its groups add up to {parts} = {found}", f"set {what}_dim to {found}")

    def _check_relative(self) -> None:
        states = {g.name: g for g in self.state_groups}
        for group in self.state_groups:
            require(group.relative_to is None, f"model.embodiments: state group {group.name!r} of {self.name!r} has relative_to {group.relative_to!r}", "only actions are relative")
        both = self.relative_to and (self.state_groups or self.action_groups)
        require(not both, f"model.embodiments: {self.name!r} has relative_to and groups", "say in the groups what is relative, and leave relative_to out")
        for group in self.action_groups:
            if group.relative_to is None:
                continue
            who = f"model.embodiments: action group {group.name!r} of {self.name!r} is relative to {group.relative_to!r}"
            require(group.relative_to in states, f"{who}, which is none of its state groups", f"name one of {', '.join(states) or 'them (state_groups is empty)'}")
            state = states[group.relative_to]
            require((state.rotation == "none") == (group.rotation == "none"), f"{who}, of which one is a rotation and one is not", "say of both in which form they are written")
            require(group.rotation != "none" or state.size == group.size, f"{who}, which has {state.size} numbers, not {group.size}", "name a state group of the same size")
