"""The report of `wam check`: one HTML file with what was found, and the pictures and curves that only a person can judge.

    Evidence, findings  ->  headline, findings, contact sheet, motion, dimensions, what was checked  ->  page (wam.evaluation.page)

It asks for nothing from outside, like every report here.
"""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from wam.config import Config
from wam.data.check.evidence import Clip, Evidence
from wam.data.check.findings import LEVELS, Finding
from wam.data.check.run import CHECKS, check_dataset
from wam.data.check.timing import Lag, measure_lag, speed
from wam.data.units import Units
from wam.evaluation.page import Child, Html, absent, facts, page, section, tag
from wam.evaluation.report import drawing
from wam.figures import FAINT, KIND_COLORS, new_figure
from wam.files import write_json_atomic, write_text_atomic
from wam.pictures import beside
from wam.timeline import Kind

if TYPE_CHECKING:
    from matplotlib.axes import Axes

REPORT, FINDINGS = "report.html", "findings.json"
SHOWN = 32  # dimensions of a column that are drawn
COLORS = {"error": "var(--bad)", "warning": "#e69f00", "info": "var(--accent)"}


def check(root: Path, config: Config, output: Path, episodes: int = 16, checkpoint: Path | None = None) -> int:
    """`wam check`: look, print what was found, write the report and `findings.json` into `output`; returns how many errors there are.

    Raises:
        FileNotFoundError: no dataset, or no checkpoint where one is named.
    """
    if checkpoint is not None and not checkpoint.is_dir():
        raise FileNotFoundError(f"no checkpoint directory {checkpoint}; give one written by `wam train`, or leave --checkpoint out")
    evidence, findings = check_dataset(root, config, episodes, checkpoint)
    for finding in findings:
        print(finding)
    write_json_atomic(output / FINDINGS, [asdict(finding) for finding in findings])
    report = write_check_report(root, config, evidence, findings, output / REPORT)
    counts = Counter(finding.level for finding in findings)
    print(f"{counts['error']} errors, {counts['warning']} warnings, {counts['info']} for you to judge; wrote {report}")
    return counts["error"]


def write_check_report(root: Path, config: Config, evidence: Evidence | None, findings: Sequence[Finding], path: Path) -> Path:
    """Write the report to `path`, and return it.

    Args:
        evidence: None where the dataset could not be opened: then there are only findings.
    """
    sections: list[Child] = [_headline(root, evidence, findings), _findings(findings)]
    if evidence is not None:
        sections += [_contact_sheet(evidence), _motion(evidence), _dimensions(evidence)]
    write_text_atomic(path, page(f"{root.name}: dataset check", [*sections, _about(config)]))
    return path


# ------------------------------------------------------------------------------------------------ words


def _headline(root: Path, evidence: Evidence | None, findings: Sequence[Finding]) -> Html:
    tiles = [(str(sum(f.level == level for f in findings)), f"{level}s" if level != "info" else "for a person to judge") for level in LEVELS]
    if evidence is not None:
        dataset = evidence.dataset
        rows = sum(episode.length for episode in dataset.episodes)
        tiles.append((f"{len(dataset.episodes):,}", f"episodes, {rows:,} rows at {dataset.fps:g} a second ({rows / dataset.fps / 60:.1f} min)"))
    links = (("findings", "findings"), ("cameras", "cameras"), ("motion", "motion"), ("dimensions", "dimensions"), ("about", "what was checked"))
    return tag(
        "header",
        tag("p", "Dataset check", class_="eyebrow"),
        tag("h1", root.name),
        tag("ul", [tag("li", tag("b", value), tag("span", text)) for value, text in tiles], class_="tiles"),
        tag(
            "nav",
            [tag("a", text, href=f"#{anchor}") for anchor, text in links if evidence is not None or anchor in ("findings", "about")],
            aria_label="Sections",
        ),
    )


def _findings(findings: Sequence[Finding]) -> Html:
    if not findings:
        return section("findings", "Findings", tag("p", "None."))
    head = ("", "check", "where", "found", "expected", "remedy")
    left = "white-space:normal;text-align:left;vertical-align:top"
    rows = []
    for finding in findings:
        mark = tag("span", tag("i", class_="swatch", style=f"background:{COLORS[finding.level]}"), finding.level, style="white-space:nowrap")
        cells = zip(head[1:], (finding.check, finding.where, finding.found, finding.expected, finding.remedy), strict=True)
        written = [tag("td", tag("span", text, style="overflow-wrap:anywhere" if name == "where" else None), data_label=name, style=left) for name, text in cells]
        rows.append(tag("tr", tag("th", mark, scope="row", style="vertical-align:top"), written))
    header = tag("thead", tag("tr", [tag("th", name, scope="col", style="text-align:left") for name in head]))
    caption = tag("caption", "Errors train a policy that cannot work, warnings one that may. Nothing was changed.")
    return section("findings", "Findings", tag("div", tag("table", caption, header, tag("tbody", rows)), class_="wide"))


def _about(config: Config) -> Html:
    robot = config.model.embodiment(config.data.embodiment)
    units = Units.of(robot, config.data)
    state, action = (", ".join(dict.fromkeys(part.column for part in parts)) for parts in (units.state, units.action))
    text = f"States in {state} ({robot.raw_state_dim}), actions in {action} ({robot.raw_action_dim}), cameras {', '.join(config.data.cameras)}, robot {robot.name}."
    return section(
        "about", "What was checked", tag("p", text), tag("p", "Where a check finds nothing, this holds:"), facts({check.name: check.about for check in CHECKS})
    )


# ------------------------------------------------------------------------------------------------ pictures


def _contact_sheet(evidence: Evidence) -> Html:
    if not evidence.clips:
        return section("cameras", "Cameras", absent("No frame could be read; see the findings"))
    text = "First, middle and last frame of episodes spread over the dataset, as the files hold them. Are they the right way up? Is each camera what its name says?"
    sheets = [(tag("h3", camera), tag("div", [_strip(evidence, clip) for clip in clips], class_="clips")) for camera, clips in evidence.clips.items()]
    return section("cameras", "Cameras", tag("p", text), sheets)


def _strip(evidence: Evidence, clip: Clip) -> Html:
    episode = evidence.dataset.episodes[clip.episode]
    image = beside([still[None] for still in clip.stills])[0]
    caption = f"episode {clip.episode}, {episode.length} rows: {episode.instruction}"
    return tag("figure", tag("img", src=_png(image), alt=caption, class_="still", style="width:100%"), tag("figcaption", caption))


def _png(image: np.ndarray) -> str:
    """A picture (H, W, 3) as the text of a URL."""
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(image).save(stream, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"


# ------------------------------------------------------------------------------------------------ motion


def _motion(evidence: Evidence) -> Html:
    if not evidence.state or not evidence.clips:
        return section("motion", "Motion", absent("No frames or no states; see the findings"))
    text = (
        "A robot that moves changes its picture. Left: how fast the state moves, how much the picture changes and how large the action is, in one episode, each over its own deviation. "
        "Right: how well picture and state agree when the picture is shifted; the peak belongs at 0. Actions may lead by the robot's own delay."
    )
    figures = []
    for camera in evidence.clips:
        lag = measure_lag(evidence, camera)
        picture = (
            absent(f"Nothing to compare in {camera}: neither picture nor state moves")
            if lag is None
            else drawing(partial(_draw_motion, evidence, camera, lag), f"motion of {camera}")
        )
        figures.append(tag("figure", picture, tag("figcaption", camera)))
    return section("motion", "Motion", tag("p", text), figures)


def _draw_motion(evidence: Evidence, camera: str, lag: Lag, path: Path) -> None:
    clip = max(evidence.clips[camera], key=lambda c: float(np.std(c.energy)) if len(c.energy) else 0.0)
    deviation = np.concatenate(evidence.state).std(0)
    state = speed(evidence.state[clip.episode], deviation)
    seconds = np.arange(len(state)) / evidence.dataset.fps
    with new_figure(path, 10.2, 2.9) as figure:
        curves, shifts = figure.subplots(1, 2, width_ratios=[2.6, 1])
        series = [("picture", clip.energy, KIND_COLORS[Kind.V]), ("state", state, KIND_COLORS[Kind.S])]
        if evidence.action:
            series.append(("action", _size(evidence, clip.episode), KIND_COLORS[Kind.A]))
        for name, values, color in series:
            curves.plot(seconds, values / (values.std() or 1.0), color=color, label=name, linewidth=1.2)
        curves.set(xlabel=f"seconds of episode {clip.episode}", yticks=[], title="motion")
        curves.legend(ncols=3, loc="upper right")
        shifts.plot(lag.lags, lag.correlation, color=KIND_COLORS[Kind.V], linewidth=1.4)
        shifts.axvline(0, color=FAINT, linewidth=0.8, linestyle=(0, (4, 3)))
        shifts.plot([lag.best], [lag.correlation.max()], "o", color=KIND_COLORS[Kind.A])
        shifts.set(xlabel="picture shifted by rows", title=f"agreement, best at {lag.best}")
        shifts.grid(True)


def _size(evidence: Evidence, episode: int) -> np.ndarray:
    """(rows - 1,) how large an action is or how fast it changes, whichever moves with the state: actions are speeds in one dataset, places in another."""
    every = np.concatenate(evidence.action)
    deviation, middle, rows = every.std(0), np.median(every, axis=0), evidence.action[episode]
    moves = deviation > 0
    size = np.linalg.norm((rows[:-1, moves] - middle[moves]) / deviation[moves], axis=1)
    change, state = speed(rows, deviation), speed(evidence.state[episode], np.concatenate(evidence.state).std(0))
    if min(size.std(), change.std(), state.std()) == 0:
        return size
    return max((size, change), key=lambda x: float(np.corrcoef(x, state)[0, 1]))


# ------------------------------------------------------------------------------------------------ dimensions


def _dimensions(evidence: Evidence) -> Html:
    numbers = evidence.numbers()
    if not numbers:
        return section("dimensions", "Dimensions", absent("No column could be read; see the findings"))
    text = "How often each dimension takes each value, over all rows, on a logarithmic scale. Dashed: the 1st and 99th percentile, which quantile normalisation puts at -1 and 1."
    parts = [
        tag("figure", drawing(partial(_draw_histograms, evidence, key, rows), f"histograms of {key}"), tag("figcaption", _left_out(key, rows)))
        for key, rows in numbers.items()
    ]
    return section("dimensions", "Dimensions", tag("p", text), parts)


def _left_out(key: str, rows: np.ndarray) -> str:
    return key + (f", the first {SHOWN} of {rows.shape[1]} dimensions" if rows.shape[1] > SHOWN else "")


def _draw_histograms(evidence: Evidence, key: str, rows: np.ndarray, path: Path) -> None:
    shown = min(rows.shape[1], SHOWN)
    columns = min(4, shown)
    lines = -(-shown // columns)
    with new_figure(path, 10.2, 0.4 + 1.5 * lines) as figure:
        panels = figure.subplots(lines, columns, squeeze=False).ravel()
        for d, axes in enumerate(panels):
            if d < shown:
                _histogram(axes, rows[:, d], evidence.name(key, d).removeprefix(key), KIND_COLORS[Kind.S if key in {part.column for part in evidence.units.state} else Kind.A])
            else:
                axes.set_visible(False)


def _histogram(axes: Axes, values: np.ndarray, title: str, color: str) -> None:
    finite = values[np.isfinite(values)]
    axes.set_title(title, fontsize=8)
    axes.set_yticks([])
    if not len(finite):
        return
    axes.hist(finite, bins=48, color=color, log=True)
    for quantile in np.quantile(finite, (0.01, 0.99)):
        axes.axvline(float(quantile), color=FAINT, linewidth=0.8, linestyle=(0, (4, 3)))
    axes.tick_params(labelsize=7)
    axes.tick_params(axis="y", which="both", left=False, labelleft=False)
