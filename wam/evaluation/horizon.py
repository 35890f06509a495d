"""How imagined video fades: error over moving pixels by how far ahead it was imagined, beside two predictors that know nothing of the scene.

    imagine.json  modes.<mode>.horizon  ->  left: PSNR over seconds     right: SSIM over seconds     one line a mode, dashed and dotted baselines

The codec's own error is the ceiling: what is imagined is decoded, and cannot be sharper than the real frames are after encoding.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wam.figures import FAINT, LINE, MODE_STYLES, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FIGURE = "horizon.png"
BASELINES = (("static", "first frame copied", (0, (5, 2))), ("mean_motion", "mean motion of the dataset", (0, (1, 1.6))), ("codec", "the real frames through the codec", (0, (7, 2, 1, 2))))
PANELS = (("psnr_db", "PSNR over moving pixels, dB"), ("moving_ssim", "SSIM over moving pixels"))


def curves_of(results: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    """The points of each mode's curve, as far as the file holds any (it may be older, or made by hand)."""
    modes = results.get("modes")
    found = {mode: entry.get("horizon") for mode, entry in modes.items() if isinstance(entry, dict)} if isinstance(modes, dict) else {}
    known: dict[str, list[Mapping[str, Any]]] = {mode: [p for p in points if isinstance(p, dict) and "seconds" in p] for mode, points in found.items() if isinstance(points, list)}
    return {mode: points for mode, points in known.items() if points}


def draw_horizon(results: Mapping[str, Any], path: Path) -> None:
    """Draw what `imagine.json` holds.

    Raises:
        ValueError: it holds no curve by horizon.
    """
    curves = curves_of(results)
    if not curves:
        raise ValueError("imagine.json holds no error by horizon; `wam imagine` writes it")
    with new_figure(path, 9.6, 3.5) as figure:
        for axes, (key, label) in zip(figure.subplots(1, 2), PANELS, strict=True):
            _panel(axes, curves, key)
            axes.set_ylabel(label)
        block = results.get("block_seconds")
        if block:
            for axes in figure.axes:
                last = max(point["seconds"] for curve in curves.values() for point in curve)
                for border in range(1, round(last / block) + 1):
                    axes.axvline(border * block, color=LINE, linewidth=0.7, zorder=0)
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=5, fontsize=8.5)


def _panel(axes: Axes, curves: Mapping[str, Any], key: str) -> None:
    for mode, curve in curves.items():
        color, marker = MODE_STYLES.get(mode, (FAINT, "o"))
        points = [(point["seconds"], point[key]) for point in curve if point.get(key) is not None]
        axes.plot(*zip(*points, strict=True), color=color, marker=marker, markersize=4, linewidth=1.6, label=mode) if points else None
    curve = next(iter(curves.values()))
    for prefix, name, dashes in BASELINES:
        points = [(point["seconds"], point[f"{prefix}_{key}"]) for point in curve if point.get(f"{prefix}_{key}") is not None]
        if points:
            axes.plot(*zip(*points, strict=True), color=FAINT, linestyle=dashes, linewidth=1.4, label=name)
    axes.set_xlabel("seconds imagined ahead; a vertical line ends a block")
    axes.set_xlim(left=0)
    axes.grid(axis="y")
