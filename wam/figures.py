"""How every figure looks, and what curves are read from; the rooms above draw with it.

A colour means the same everywhere: blue is video, orange is action, green is state; clean is the lighter of two.  All are from Okabe
and Ito's palette, which people with any colour vision tell apart.  The suffix of a figure's path chooses PNG or SVG.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from wam.files import atomic_path
from wam.timeline import Kind

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, FAINT, LINE, PAPER = "#24292f", "#6e7781", "#d5dbe1", "#ffffff"  # the report replaces these by its own, light or dark
KIND_COLORS = {Kind.H: "#7d8590", Kind.S: "#009e73", Kind.VC: "#56b4e9", Kind.V: "#0072b2", Kind.AC: "#e69f00", Kind.A: "#d55e00", Kind.G: "#cc79a7", Kind.R: "#882255"}
KIND_NAMES = {
    Kind.H: "H  first frame",
    Kind.S: "S  state",
    Kind.VC: "Vc  video, seen",
    Kind.V: "V  video, noisy",
    Kind.AC: "Ac  actions, executed",
    Kind.A: "A  actions, noisy",
    Kind.G: "G  goal image",
    Kind.R: "R  value",
}
MODE_STYLES = {  # colour and marker: told apart without colour too
    "skip": ("#9467bd", "o"),
    "skip_registers": ("#4b4b8f", "h"),
    "joint": ("#c9970c", "s"),
    "joint_mutual": ("#cc6677", "D"),
    "imagine": ("#1b9e8f", "^"),
    "forward": ("#5b8fd6", "v"),
    "inverse": ("#a0703c", "P"),
    "video": ("#7f8c3b", "X"),
    "action_only": ("#8a8f98", "*"),
}
_DPI = 160
_STYLE: Any = {  # the stubs of matplotlib 3.11 want a literal type of all its keys
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "svg.hashsalt": "wam",  # the same file from the same data
    "figure.facecolor": PAPER,
    "savefig.facecolor": PAPER,
    "axes.facecolor": PAPER,
    "axes.edgecolor": LINE,
    "axes.labelcolor": FAINT,
    "axes.titlecolor": INK,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": FAINT,
    "ytick.labelcolor": FAINT,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.labelcolor": INK,
}


@contextmanager
def new_figure(path: Path, width: float, height: float) -> Iterator[Figure]:
    """A figure of `width` x `height` inches that is written to `path` when the block ends."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("figures need matplotlib, which is not installed; run: pip install 'wam[train]'") from error
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        with atomic_path(path) as temporary:
            figure.savefig(temporary, dpi=_DPI)


# ------------------------------------------------------------------------------------------------ curves


def read_log(path: Path) -> list[dict[str, float]]:
    """The records of a `log.jsonl`; a last line cut off by a crash is left out.

    Raises:
        FileNotFoundError: there is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no training log {path}; `wam train` writes it")
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


def series(records: Sequence[dict[str, float]], key: str) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Steps and values of one key."""
    pairs = np.array([(r["step"], r[key]) for r in records if key in r], dtype=np.float64).reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1]


def smooth(values: npt.NDArray[np.float64], decay: float = 0.9) -> npt.NDArray[np.float64]:
    """Running mean that forgets with `decay`, without the bias of its start (Adam's correction, Kingma and Ba 2015, section 3)."""
    mean, out = 0.0, np.empty_like(values)
    for index, value in enumerate(values):
        mean = decay * mean + (1 - decay) * value
        out[index] = mean / (1 - decay ** (index + 1))
    return out


def loss_axis(axes: Axes) -> None:
    """A logarithmic axis with plain numbers."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

    axes.set_xlabel("step")
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    if axes.lines:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.tick_params(axis="y", which="minor", length=0)
