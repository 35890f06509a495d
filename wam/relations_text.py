"""The relation table for people: who attends to whom, as text.

    describe          one mode: its whole table
    describe_config   a config or preset: its kinds, its base table, its modes with their weights and cells, what else its weights can do
    picture           every token segment against every other, over two blocks
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from wam.config import Config
from wam.relations import (
    BASE,
    NONE,
    VALUE_ROW,
    Cells,
    LeakError,
    Mode,
    Reach,
    Relations,
    RelationTable,
    get_mode,
    trained_modes,
    trained_valuations,
    untrained_mode_warning,
)
from wam.timeline import FIRST_BLOCK, Kind

RELATION_WORDS = {"": "never", "<": "of earlier blocks", "=": "of its own block", "<=": "up to its own block", "all": "always"}


def describe(mode: str | Mode) -> str:
    """A mode as text: its table (opened cells marked `*`) and what it is for."""
    mode = get_mode(mode) if isinstance(mode, str) else mode
    predicts = ", ".join(k.label for k in Kind if k in mode.predicts)
    held = "".join(f"; {kind.label} is held at level {level:g}" for kind, level in mode.pinned.items())
    kinds = [kind for kind in Kind if kind is not Kind.R or kind in mode.predicts]
    return f"{mode.name}: {mode.about}\npredicts {predicts}{held}; rows attend to columns; * is opened by the mode\n\n" + _table(mode.table.cells, mode.opened, kinds)


def _table(cells: Cells, marked: Collection[tuple[Kind, Kind]], kinds: Sequence[Kind]) -> str:
    rows = ["      " + "".join(f"{k.label:>6}" for k in kinds)]
    for q in kinds:
        shown = [(cells.get((q, k), NONE) or ".") + ("*" if (q, k) in marked else "") for k in kinds]
        rows.append(f"{q.label:<6}" + "".join(f"{cell:>6}" for cell in shown))
    return "\n".join(rows)


def present_kinds(config: Config, modes: Sequence[Mode]) -> tuple[Kind, ...]:
    """The kinds of token that a config's modes use: what is predicted or live, and all that these can see."""
    absent = set()
    if config.timeline.first_frame == "inside":
        absent.add(Kind.H)
    if config.model.state != "token":
        absent.add(Kind.S)
    if not config.model.goal_image:
        absent.add(Kind.G)
    found = {kind for mode in modes for kind in (*mode.live, *mode.predicts)}
    while True:
        seen = {k for mode in modes for q in found for k in Kind if mode.table.relation(q, k) != NONE} - absent
        if seen <= found:
            return tuple(sorted(found))
        found |= seen


def describe_config(config: Config) -> str:
    """Who attends to whom under a config: base table, modes with weights and opened cells, and what other modes would mean.

    Raises:
        LeakError: a mode that is trained leaks.
    """
    relations = Relations.of(config)
    modes = [relations.mode(name) for name in trained_modes(config)]
    valuations = [relations.valuation(name) for name in trained_valuations(config)]
    kinds = present_kinds(config, [*modes, *valuations])
    changed = {pair for pair in relations.base if relations.base[pair] != {**BASE, **VALUE_ROW}.get(pair, NONE)}
    parts = [
        f"preset {config.preset}",
        "\n".join(_setting_lines(config, relations)),
        f"base table: rows attend to columns{'; * differs from the default' if any(q in kinds and k in kinds for q, k in changed) else ''}\n\n"
        + _table(relations.base, changed, kinds),
        "modes in training\n" + "\n".join(_mode_lines(config, modes)),
    ]
    if valuations:
        parts.append("values in training, beside every mode\n" + "\n".join(_valuation_lines(config, valuations)))
    others = [line for name in relations.modes if (line := _other_line(config, relations, name, [m.name for m in modes]))]
    return "\n\n".join([*parts, *(["other modes\n" + "\n".join(others)] if others else [])])


def _setting_lines(config: Config, relations: Relations) -> list[str]:
    t, m = config.timeline, config.model
    first = "H, alone before block 0" if t.first_frame == "before" else "the first latent of block 0, given"
    units = "blocks" if t.history_unit == "block" else "segments (a block's video and its actions count as one each)"
    history = f"{t.history} {units} back{', and the first frame always' if t.sink else ''}" if relations.remembers else "none: every plan starts from one observation"
    coupling = f"an expert of width {m.expert_width} with shared attention" if m.expert_width else "the video's own blocks"
    state = {"token": "a token of its own", "context": "a token of the text", "none": "not seen"}[m.state]
    lines = [
        f"  first frame  {first}{'; a noisy copy of it (V[-1]) is predicted too' if config.training.predict_first_frame else ''}",
        f"  history      {history}",
        f"  actions      through {coupling}",
        f"  state        {state}",
    ]
    if relations.copies == "single":
        lines.append("  conditions   the noisy tokens themselves, held at level 0 (given) or 1 (absent)")
    return lines


def _mode_lines(config: Config, modes: Sequence[Mode]) -> list[str]:
    total = sum(config.training.modes.values())
    lines = []
    for mode in modes:
        opened = ", ".join(f"{q.label} sees {k.label} {RELATION_WORDS[mode.table.relation(q, k)]}" for q, k in mode.opened) or "opens nothing"
        held = "".join(f"; {kind.label} held at level {level:g}" for kind, level in mode.pinned.items())
        lines.append(f"  {mode.name:<16}{config.training.modes[mode.name] / total:>5.0%}  {opened}{held}")
    return lines


def _valuation_lines(config: Config, valuations: Sequence[Mode]) -> list[str]:
    weights = config.training.valuations
    shares = [weights[name] / sum(weights.values()) for name in trained_valuations(config)]
    return [f"  {mode.name:<24}{share:>5.0%}  {', '.join(f'R sees {k.label} {RELATION_WORDS[mode.table.relation(q, k)]}' for q, k in mode.opened)}" for mode, share in zip(valuations, shares, strict=True)]


def _other_line(config: Config, relations: Relations, name: str, trained: Sequence[str]) -> str | None:
    if name in trained:
        return None
    try:
        warning = untrained_mode_warning(config, name)
    except LeakError as error:
        return f"  {name:<16}refused: {str(error).split(': ', 1)[1].split(', and ')[0]} leaks"
    return f"  {name:<16}{'not trained' if warning else 'works: training shows the same rows'}"


# ------------------------------------------------------------------------------------------------ segments against segments


@dataclass(frozen=True)
class Span:
    """A run of tokens of one kind in one block, as pictures show it."""

    kind: Kind
    block: int

    @property
    def label(self) -> str:
        """`H`, `V0`, `A1`; the noisy first frame is `V-1`."""
        return self.kind.label if self.kind in (Kind.H, Kind.G) else f"{self.kind.label}{self.block}"


def spans_of(config: Config, mode: Mode, kinds: Collection[Kind], blocks: int = 2) -> list[Span]:
    """The segments of a small training window, kind after kind."""
    found = []
    for kind in (Kind.G, Kind.H, Kind.VC, Kind.V, Kind.S, Kind.AC, Kind.A, Kind.R):
        if kind not in kinds or (kind is Kind.R and kind not in mode.predicts):
            continue
        if kind in (Kind.H, Kind.G):
            found.append(Span(kind, FIRST_BLOCK))
            continue
        first = FIRST_BLOCK if kind is Kind.V and config.training.predict_first_frame and Kind.V in mode.predicts else 0
        found += [Span(kind, block) for block in range(first, blocks)]
    return found


def picture(table: RelationTable, spans: Sequence[Span], reach: Reach) -> str:
    """Rows attend to columns: `#` where they do."""
    width = max(len(s.label) for s in spans) + 1
    rows = [" " * width + "".join(f"{s.label:>{width}}" for s in spans)]
    for q in spans:
        marks = ["#" if table.allow(q.kind, q.block, k.kind, k.block, reach) else "." for k in spans]
        rows.append(f"{q.label:<{width}}" + "".join(f"{mark:>{width}}" for mark in marks))
    return "\n".join(rows)


def pictures(config: Config) -> str:
    """`picture` of every mode that a config trains."""
    relations = Relations.of(config)
    modes = [relations.mode(name) for name in trained_modes(config)] + [relations.valuation(name) for name in trained_valuations(config)]
    kinds, reach, blocks = present_kinds(config, modes), Reach.of(config.timeline), min(2, config.timeline.blocks)
    return "\n\n".join(f"{m.name}\n{picture(m.table, spans_of(config, m, kinds, blocks), reach)}" for m in modes)
