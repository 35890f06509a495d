"""Robot cards: all that is to be said about a robot, in one YAML file.

    robot: droid              in a config    data/robots/droid.yaml, here or in this clone
    robot: lab/my_arm.yaml                   any file

    defaults  <  preset  <  card (data, text.template, model.embodiments)  <  the config's own words  <  command line

A card is laid under a config as a preset is, and only when a config is read: what is resolved and saved with the weights holds what the
card said, so a checkpoint needs no card.  An entry of a mixture may name a card of its own; its robot joins the model's embodiments.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from wam.config_data import DataConfig, Layout, grid_of
from wam.config_robot import EmbodimentConfig, GroupConfig, overlap
from wam.config_tree import ConfigError, from_dict, overlay, read_yaml, require, show, to_dict

CARDS = Path("data/robots")  # beside the working directory; a clone's own are found from anywhere
ROBOT = "robot"  # the key that names a card, in a config and in an entry of its mixture
Tree = dict[str, Any]


@dataclass(frozen=True)
class RobotCard:
    """What a card can say.  Columns and cameras are those of the datasets that this robot records, by key or by a name of meta/modality.json."""

    embodiment: str  # the name that weights and statistics are kept under
    description: str = ""
    control_hz: float | None = None  # control steps a second; a dataset of another rate is resampled.  null: the dataset's
    cameras: tuple[str, ...] = ()
    layout: Layout = "single"  # how several cameras share a canvas
    state: str = "observation.state"
    action: str = "action"
    executed_action: str | None = None
    state_groups: tuple[GroupConfig, ...] = ()
    action_groups: tuple[GroupConfig, ...] = ()
    state_dim: int | None = None  # without groups: how many numbers a state has
    action_dim: int | None = None  # likewise
    normalization: Literal["quantile", "mean_std", "min_max"] = "quantile"
    language: tuple[str, ...] = ()  # columns of instructions; empty: the dataset's tasks
    wording: Literal["first", "any"] = "first"
    template: str | None = None  # the text that an instruction is put into; null: text.template

    def __post_init__(self) -> None:
        require(bool(self.embodiment.strip()), f"the card's embodiment is {self.embodiment!r}", "give the robot a name")
        require(len(self.cameras) > 0, f"the card of {self.embodiment!r} lists no cameras", "name at least one, such as observation.images.front")
        for what in ("state", "action"):
            groups, size = getattr(self, f"{what}_groups"), getattr(self, f"{what}_dim")
            require(bool(groups) or size is not None, f"the card of {self.embodiment!r} has no {what}_groups and no {what}_dim", "say one of them")
            require(not groups or size is None, f"the card of {self.embodiment!r} has {what}_groups and {what}_dim {size}", "leave the size out: the groups add up to it")
        assert self.robot.name and DataConfig(**self._data()), "its groups are checked together, and its cameras with their layout"
        self._check_columns()

    @property
    def robot(self) -> EmbodimentConfig:
        """The robot as a model's config has it."""
        sizes = {what: getattr(self, f"{what}_dim") or sum(g.network_size for g in getattr(self, f"{what}_groups")) for what in ("state", "action")}
        return EmbodimentConfig(self.embodiment, sizes["state"], sizes["action"], state_groups=self.state_groups, action_groups=self.action_groups, template=self.template)

    def data(self) -> Tree:
        """What it says of the section `data`, or of an entry of a mixture."""
        return {name: to_dict(value) for name, value in self._data().items()}

    def tree(self) -> Tree:
        """What it says, as a partial config: the template is the text's, which a config can say otherwise, and not the robot's own."""
        text = {} if self.template is None else {"text": {"template": self.template}}
        return {"data": self.data(), "model": {"embodiments": [to_dict(replace(self.robot, template=None))]}, **text}

    def _data(self) -> Tree:
        same = ("embodiment", "control_hz", "cameras", "layout", "state", "action", "executed_action", "normalization", "language", "wording")
        return {name: getattr(self, name) for name in same}

    def _check_columns(self) -> None:
        """No number of a column is two groups': one of them would have a wrong start, size or column."""
        done = self.executed_action or self.action
        asked = [(g.column or self.action, g.start, g.start + g.size, g.name) for g in self.action_groups]
        executed = [(g.executed or g.column or done, g.start, g.start + g.size, g.name) for g in self.action_groups]
        state = [(g.column or self.state, g.start, g.start + g.size, g.name) for g in self.state_groups]
        for what, places in (("state", state), ("action", asked), ("action", executed)):
            both = overlap(places)
            require(both is None, f"the card of {self.embodiment!r}: {what} {both}", "correct the start, size or column of one of them")


# ------------------------------------------------------------------------------------------------ finding and reading


def known_cards() -> dict[str, Path]:
    """The cards that have a name: those of the working directory before this clone's own."""
    folders = (Path(__file__).resolve().parents[1] / CARDS, CARDS)
    return dict(sorted({path.stem: path for folder in folders for path in folder.glob("*.yaml")}.items()))


def read_card(robot: str) -> RobotCard:
    """A card by its name or path.

    Raises:
        ConfigError: there is none (the nearest is named), or it says what a card cannot say.
    """
    path = find_card(robot)
    try:
        tree = read_yaml(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}; write it as UTF-8 text") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} holds {type(tree).__name__}; a robot card holds keys such as embodiment, cameras, state_groups, action_groups")
    try:
        return from_dict(RobotCard, tree)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def find_card(robot: str) -> Path:
    """Where a card lies.

    Raises:
        ConfigError: nowhere; the known ones are listed.
    """
    cards = known_cards()
    if robot in cards:
        return cards[robot]
    path = Path(robot)
    with contextlib.suppress(OSError):  # a name longer than names can be
        if path.suffix in (".yaml", ".yml") and path.is_file():
            return path
    near = get_close_matches(robot, cards, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ConfigError(f"robot is {show(robot)}, and there is no such card; {hint}give a path to one, or a name of {CARDS}/: {', '.join(cards) or 'there are none'}")


# ------------------------------------------------------------------------------------------------ laying under a config


def lay_cards(below: Tree, above: Tree, config: type) -> Tree:
    """A config's words over its cards over a preset; afterwards no card is named any more.

    Args:
        below: a preset's tree.
        above: the config's own, which may name cards under `robot`, and in entries of `mixture`.
        config: the class that the tree is of.

    Raises:
        ConfigError: a card that is not there or cannot be used.
    """
    above = dict(above)
    cards = [_named(above.pop(ROBOT, None))]
    entries = above.get("mixture")
    if isinstance(entries, list):
        above["mixture"], others = _lay_entries(entries)
        cards += others
    found = [card for card in cards if card is not None]
    if cards[0] is not None:
        below = overlay(config, below, cards[0].tree())
    if found:
        below = overlay(config, below, {"model": {"embodiments": _embodiments(found, cards[0])}})
    return overlay(config, below, above)


def _lay_entries(entries: list[Any]) -> tuple[list[Any], list[RobotCard | None]]:
    laid, cards = [], []
    for entry in entries:
        card = _named(entry.get(ROBOT)) if isinstance(entry, dict) else None
        cards.append(card)
        own = {k: v for k, v in entry.items() if k != ROBOT} if isinstance(entry, dict) else entry
        laid.append(own if card is None else overlay(DataConfig, card.data(), own))
    return laid, cards


def _named(robot: Any) -> RobotCard | None:
    require(robot is None or isinstance(robot, str), f"robot is {robot!r}", f"name a card of {CARDS}/, or give a path to one")
    return None if robot is None else read_card(robot)


def _embodiments(cards: list[RobotCard], first: RobotCard | None) -> list[Tree]:
    """Each robot once; the template of the config's own card is `text.template`, the others' is theirs."""
    robots: dict[str, EmbodimentConfig] = {}
    for card in cards:
        known = robots.setdefault(card.embodiment, card.robot)
        require(known == card.robot, f"two cards call their robot {card.embodiment!r} and differ", "give one of them another embodiment")
    own = None if first is None else first.embodiment
    return [to_dict(replace(robot, template=None) if name == own else robot) for name, robot in robots.items()]


# ------------------------------------------------------------------------------------------------ showing


def describe(name: str, card: RobotCard) -> str:
    """What a card resolves to: canvas, groups and sizes as text."""
    robot, rate = card.robot, "the dataset's rate" if card.control_hz is None else f"{card.control_hz:g} control steps a second"
    lines = [f"{name}: {card.description or robot.name}", "", f"embodiment  {robot.name}, {rate}", f"cameras     {len(card.cameras)} on a canvas, layout {card.layout}", ""]
    lines += [f"    {line}" for line in _canvas(card)] + [""]
    for what, groups, raw, seen in (
        ("state", card.state_groups, robot.raw_state_dim, robot.state_dim),
        ("action", card.action_groups, robot.raw_action_dim, robot.action_dim),
    ):
        lines += [f"{what:<12}{raw} numbers, {seen} for the network", "", *_table(what, groups, card), ""]
    lines += [f"normalised  {card.normalization}", f"language    {', '.join(card.language) or 'the tasks of the dataset'}" + (", any of them" if card.wording == "any" else "")]
    return "\n".join([*lines, f"template    {card.template or 'text.template of the config'}"])


def _table(what: str, groups: tuple[GroupConfig, ...], card: RobotCard) -> list[str]:
    column = card.state if what == "state" else card.action
    rows = [("group", "column", "raw", "network", "relative to", "rotation", "normalised")]
    raw = seen = 0
    for g in groups:
        turned = g.rotation if g.seen_as == g.rotation else f"{g.rotation} -> {g.seen_as}"
        where = f"{g.column or column}[{g.start}:{g.start + g.size}]"
        places = _span(raw, g.size), _span(seen, g.network_size)
        rows.append((g.name + (" (gripper)" if g.gripper else ""), where, *places, g.relative_to or "-", "-" if turned == "none" else turned, g.normalization or card.normalization))
        raw, seen = raw + g.size, seen + g.network_size
    if not groups:
        return [f"    the whole of {column}, as it is"]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    out = ["    " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [out[0], "    " + "  ".join("-" * width for width in widths), *out[1:]]


def _span(start: int, size: int) -> str:
    return f"{start}" if size == 1 else f"{start}..{start + size - 1}"


def _canvas(card: RobotCard) -> list[str]:
    """The canvas drawn: cameras in their cells."""
    rows, columns = grid_of(card.layout, len(card.cameras))
    names = [camera.rpartition(".")[2] for camera in card.cameras]
    if card.layout == "separate":
        return [f"[{i}] {name}" for i, name in enumerate(names)]
    width = max(map(len, names)) + 2
    cells = [[names[0]], names[1:]] if card.layout == "t" else [[*names, *["(black)"] * (rows * columns - len(names))][r * columns : (r + 1) * columns] for r in range(rows)]
    full = columns * width + columns - 1
    edge = "+" + "+".join("-" * width for _ in range(columns)) + "+"
    lines = [edge]
    for row in cells:
        wide = width if len(row) == columns else full
        lines += ["|" + "|".join(name.center(wide) for name in row) + "|", edge]
    return lines
