"""Figures: the stream on its clock, who attends to whom, and how training went.

Every figure is drawn from what the program itself uses (`TimelineConfig`, the relation table, `log.jsonl`), so a figure cannot
disagree with the code.  Colours and style are those of `wam.figures`.

    TimelineConfig  -> draw_timeline           RelationTable -> mask_picture -> draw_masks           log.jsonl -> draw_learning_curves
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from wam.config import Config, TimelineConfig
from wam.figures import FAINT, INK, KIND_COLORS, KIND_NAMES, LINE, MODE_STYLES, PAPER, loss_axis, new_figure, read_log, series, smooth
from wam.relations import Mode, Reach, Relations, RelationTable, trained_modes
from wam.relations_text import Span, present_kinds, spans_of
from wam.timeline import Kind

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DEMO_MODES = ("skip", "joint", "joint_mutual", "imagine", "forward")


# ------------------------------------------------------------------------------------------------ timeline


def draw_timeline(config: TimelineConfig, path: Path) -> None:
    """Two blocks of the stream on one clock: pixel frames, latents, states and actions.

    The right edge of a frame is the control step at which it is seen; an action lasts from its left edge to its right.
    """
    blocks = 2
    stride, steps = config.stride, config.actions_per_block
    frames, latents = blocks * config.frames_per_block, blocks * config.latents_per_block
    wide = stride * config.temporal_stride
    with new_figure(path, 9.6, 2.75) as figure:
        axes = figure.add_subplot()
        _boxes(axes, 3, [(-stride, stride, "$p_{0}$"), *((j * stride, stride, f"$p_{{{j + 1}}}$") for j in range(frames))], PAPER, "pixel frames")
        _boxes(axes, 2, [(-stride, stride, "H")], KIND_COLORS[Kind.H], "")
        _boxes(axes, 2, [(j * wide, wide, f"$z_{{{j + 1}}}$") for j in range(latents)], KIND_COLORS[Kind.VC], "latent frames")
        _boxes(axes, 1, [(b * steps, min(stride, steps), f"$S_{{{b}}}$") for b in range(blocks)], KIND_COLORS[Kind.S], "state")
        _boxes(axes, 0, [(a, 1, f"$a_{{{a}}}$") for a in range(blocks * steps)], KIND_COLORS[Kind.AC], "actions")
        for b in range(blocks + 1):
            axes.axvline(b * steps, color=FAINT, linewidth=0.9, linestyle=(0, (4, 3)), zorder=0)
        for b in range(blocks):
            axes.text((b + 0.5) * steps, 3.62, f"block {b}", ha="center", va="bottom", fontsize=10, fontweight="bold")
        axes.text(-0.5 * stride, 3.62, "start", ha="center", va="bottom", fontsize=9, color=FAINT)
        _clock_axis(axes, -stride, blocks * steps)


def _boxes(axes: Axes, row: float, boxes: Sequence[tuple[float, float, str]], color: str, name: str) -> None:
    """A row of labelled boxes (left, width, label); labels are thinned to first and last where they would touch."""
    from matplotlib.patches import FancyBboxPatch

    gap, height = 0.1, 0.62
    crowded = len(boxes) > 20
    for index, (left, width, label) in enumerate(boxes):
        plain = color == PAPER
        box = FancyBboxPatch(
            (left + gap / 2, row - height / 2),
            width - gap,
            height,
            boxstyle="round,pad=0,rounding_size=0.1",
            facecolor=color,
            edgecolor=FAINT if plain else "none",
            linewidth=0.9,
        )
        axes.add_patch(box)
        if not crowded or index in (0, len(boxes) - 1):
            axes.text(left + width / 2, row, label, ha="center", va="center", fontsize=9, color=INK if plain else "#10151a")
    if name:
        axes.text(-0.012, row, name, transform=axes.get_yaxis_transform(), ha="right", va="center", fontsize=10)


def _clock_axis(axes: Axes, left: float, right: float) -> None:
    axes.set_xlim(left - 0.15, right + 0.15)
    axes.set_ylim(-0.55, 4.05)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    every = max(1, round(right / 16))
    axes.set_xticks(range(0, int(right) + 1, every))
    axes.set_xlabel("clock, in control steps")


# ------------------------------------------------------------------------------------------------ masks


_DRAWN_TOKENS = {kind: 1 if kind is Kind.S else 4 for kind in Kind}  # of a segment: 2 x 2 patches, one state, four actions
_NO_GOAL = frozenset(Kind) - {Kind.G}


@dataclass(frozen=True)
class MaskPicture:
    """What a mask's figure shows.

    Attributes:
        name: of the mode.
        note: a line below it: its weight, and what is held at a level.
        spans: segments of a small training window, in order: its rows and columns.
        seen_SS: (S, S) True where the row's tokens may attend to the column's.
        opened_SS: (S, S) True where the mode opens what the base table keeps shut.
    """

    name: str
    note: str
    spans: tuple[Span, ...]
    seen_SS: npt.NDArray[np.bool_]
    opened_SS: npt.NDArray[np.bool_]


def mask_picture(mode: str | Mode, config: Config | None = None, kinds: Collection[Kind] = _NO_GOAL) -> MaskPicture:
    """The attention of two blocks (or of one, where a config has one) in a mode, under a config's table and reach."""
    config = config or Config()
    relations = Relations.of(config)
    mode = relations.mode(mode) if isinstance(mode, str) else mode
    spans = tuple(spans_of(config, mode, kinds, min(2, config.timeline.blocks)))
    kinds_S, blocks_S = torch.tensor([int(s.kind) for s in spans]), torch.tensor([s.block for s in spans])
    tokens, reach = (kinds_S, blocks_S, kinds_S, blocks_S), Reach.of(config.timeline)
    seen = mode.table.mask(*tokens, reach).numpy()
    weight = config.training.modes.get(mode.name, 0) / sum(config.training.modes.values())
    held = [f"{kind.label} held at $\\sigma$ = {level:g}" for kind, level in mode.pinned.items()]
    note = "   ".join([*([f"{weight:.0%} of samples"] if 0 < weight < 1 else []), *held])
    return MaskPicture(mode.name, note, spans, seen, seen & ~RelationTable(relations.base).mask(*tokens, reach).numpy())


def draw_mask(mode: str, path: Path) -> None:
    """The attention mask of one mode: rows attend to columns, coloured by what the column is; what the mode opens is outlined."""
    with new_figure(path, 3.6, 3.75) as figure:
        _mask_axes(figure.add_subplot(), mask_picture(mode))


def draw_masks(modes: Sequence[str], path: Path) -> None:
    """The masks of several modes of the default table, with a key to the colours in the cell after the last."""
    _draw_pictures([replace(mask_picture(mode), note="") for mode in modes], path)


def draw_relations(config: Config, path: Path) -> None:
    """Who attends to whom under a config or preset: one mask for each mode that it trains."""
    modes = [Relations.of(config).mode(name) for name in trained_modes(config)]
    kinds = present_kinds(config, modes)
    _draw_pictures([mask_picture(mode, config, kinds) for mode in modes], path, config.preset)


def _draw_pictures(pictures: Sequence[MaskPicture], path: Path, title: str = "") -> None:
    """Masks in rows of at most three, the key after the last."""
    columns = min(3, len(pictures) + 1)
    rows = len(pictures) // columns + 1
    head, height = (0.5 if title else 0.0), 3.75 * rows
    with new_figure(path, 3.4 * columns, height + head) as figure:
        if title:
            figure.text(0.02, 1 - 0.1 / (height + head), title, fontsize=15, fontweight="bold", color=FAINT, va="top")
            figure.set_layout_engine("constrained", rect=(0, 0, 1, height / (height + head)))
        grid = figure.subplots(rows, columns, squeeze=False).flatten()
        for axes, picture in zip(grid, pictures, strict=False):
            _mask_axes(axes, picture)
            axes.set_title(picture.name, fontsize=12, fontweight="bold", pad=8)
            axes.set_xlabel(picture.note, fontsize=9)
        for axes in grid[len(pictures) :]:
            axes.axis("off")
        _kind_key(grid[len(pictures)], {s.kind for p in pictures for s in p.spans}, any(p.opened_SS.any() for p in pictures))


def _mask_axes(axes: Axes, picture: MaskPicture) -> None:
    from matplotlib.patches import Rectangle

    sizes = [max(_DRAWN_TOKENS[s.kind], 2.4) for s in picture.spans]  # one state token is too thin for its label
    edges = np.concatenate([[0], np.cumsum(sizes)])
    gap = 0.003 * edges[-1]
    for row, (top, bottom) in enumerate(pairwise(edges)):
        for column, (left, right) in enumerate(pairwise(edges)):
            seen, opened = picture.seen_SS[row, column], picture.opened_SS[row, column]
            color = KIND_COLORS[picture.spans[column].kind] if seen else LINE
            alpha = 0.45 if not seen else 1.0 if opened else 0.62
            box = (left + gap, top + gap), right - left - 2 * gap, bottom - top - 2 * gap
            axes.add_patch(Rectangle(*box, facecolor=color, alpha=alpha, linewidth=0))
            if opened:
                axes.add_patch(Rectangle(*box, fill=False, edgecolor=INK, linewidth=1.6))
    _mask_labels(axes, picture.spans, (edges[:-1] + edges[1:]) / 2, float(edges[-1]))


def _mask_labels(axes: Axes, spans: Sequence[Span], centres: npt.NDArray[np.float64], end: float) -> None:
    names = [s.kind.label if s.kind in (Kind.H, Kind.G) else f"{s.kind.label}$_{{{s.block}}}$" for s in spans]
    axes.set_xlim(0, end)
    axes.set_ylim(end, 0)
    axes.set_aspect("equal")
    axes.xaxis.tick_top()
    axes.set_xticks(centres, names, color=INK, fontsize=8.5)
    axes.set_yticks(centres, names, color=INK, fontsize=8.5)
    axes.tick_params(length=0, pad=2)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _kind_key(axes: Axes, kinds: Collection[Kind], opens: bool) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(facecolor=KIND_COLORS[k], alpha=0.62, label=KIND_NAMES[k]) for k in Kind if k in kinds]
    handles += [Patch(facecolor=LINE, alpha=0.45, label="not seen")]
    handles += [Patch(facecolor=PAPER, edgecolor=INK, linewidth=1.6, label="opened by the mode")] if opens else []
    axes.legend(
        handles=handles, loc="center", fontsize=10, labelspacing=0.75, handlelength=1.4, handleheight=1.3, title="rows attend to columns\n", title_fontsize=11
    )


# ------------------------------------------------------------------------------------------------ learning curves


def draw_learning_curves(log: Path, path: Path) -> None:
    """Video loss, action loss and open-loop action error over the steps of a training log.

    Raises:
        FileNotFoundError: there is no log.
        ValueError: the log holds no losses yet.
    """
    records = read_log(log)
    if not any(key.startswith(("train/", "val/")) for record in records for key in record):
        raise ValueError(f"{log} holds {len(records)} records and no losses; train for at least training.log_every steps")
    with new_figure(path, 10.2, 3.5) as figure:
        panels = figure.subplots(1, 3)
        for axes, part, kind in ((panels[0], "video", Kind.V), (panels[1], "action", Kind.A)):
            axes.set_title(f"{part} loss")
            _loss_curves(axes, records, part, KIND_COLORS[kind])
        panels[2].set_title("action error, open loop")
        _error_curves(panels[2], records)
        for axes in panels:
            loss_axis(axes)
        _shared_legend(figure, panels)


def _shared_legend(figure: Figure, panels: Sequence[Axes]) -> None:
    """One legend for the two loss panels: the training curves, then each mode once."""
    named = {label: handle for axes in panels[:2] for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    labels = sorted(named, key=lambda label: not label.startswith("training"))
    if labels:
        figure.legend([named[label] for label in labels], labels, loc="outside lower left", ncols=4, fontsize=8, handlelength=1.8, columnspacing=1.4)


def _loss_curves(axes: Axes, records: Sequence[dict[str, float]], part: str, color: str) -> None:
    steps, values = series(records, f"train/{part}")
    if len(steps):
        axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
        axes.plot(steps, smooth(values), color=color, linewidth=1.8, label=f"training, {part} (smoothed)")
    for mode, (tone, marker) in MODE_STYLES.items():
        steps, values = series(records, f"val/{mode}/{part}")
        if len(steps):
            axes.plot(steps, values, color=tone, marker=marker, markersize=4.5, linewidth=1.1, label=f"validation, {mode}")


def _error_curves(axes: Axes, records: Sequence[dict[str, float]]) -> None:
    rows = (
        ("skip", "this model (skip)", MODE_STYLES["skip"][0], "-"),
        ("hold", "repeat the last action", FAINT, "--"),
        ("mean", "the average action", FAINT, ":"),
    )
    found = False
    for key, label, color, line in rows:
        steps, values = series(records, f"val/action_mse/{key}")
        if len(steps):
            found = True
            axes.plot(
                steps, values, color=color, linestyle=line, linewidth=1.6, marker="o" if key == "skip" or len(steps) == 1 else None, markersize=4.5, label=label
            )
    if found:
        axes.legend(fontsize=8, loc="best")
    else:
        axes.text(0.5, 0.5, "no held-out episodes", transform=axes.transAxes, ha="center", color=FAINT)


def draw_readme_images(directory: Path) -> list[Path]:
    """`timeline.png` and `masks.png` for the README; returns their paths."""
    draw_timeline(TimelineConfig(), directory / "timeline.png")
    draw_masks(DEMO_MODES, directory / "masks.png")
    return [directory / "timeline.png", directory / "masks.png"]
