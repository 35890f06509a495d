"""The report of a run: one HTML file that shows what was measured, how, and what it looks like.

It is written from files alone, so it can be written again at any time and on any machine.  Only `results.json` must be there; every
other piece that is missing or unreadable is named on the page, in the place where it would be.

    run directory  ->  read_run (wam.evaluation.run_files)  ->  one function a section  ->  page (wam.evaluation.page)
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from wam.config import TimelineConfig, from_dict
from wam.evaluation.consistency import sentences
from wam.evaluation.horizon import curves_of, draw_horizon
from wam.evaluation.page import NOTHING, Child, Html, absent, data_uri, facts, join, page, section, table, tag
from wam.evaluation.plots import draw_learning_curves, draw_mask, draw_timeline
from wam.evaluation.run_files import Run, media_groups, read_run
from wam.evaluation.statistics import mcnemar
from wam.figures import FAINT, INK, LINE, MODE_STYLES, PAPER
from wam.files import write_text_atomic
from wam.relations import MODES
from wam.relations_text import RELATION_WORDS

REPORT = "report.html"
BASELINES = {"expert": "scripted expert", "hold_still": "hold still", "random": "random actions", "replay": "nearest demonstration, replayed"}
_THEMED = {INK: "currentColor", FAINT: "var(--faint)", LINE: "var(--line)", PAPER: "var(--paper)"}


def write_report(run: Path) -> Path:
    """Write `run/report.html` from what the run directory holds; returns its path.

    Raises:
        FileNotFoundError: there is no `run/results.json`.
        ValueError: `run/results.json` is not what `wam demo` writes.
    """
    data = read_run(run)
    sections = [
        _headline(data),
        _about(data),
        _success(data),
        _modes(data),
        _training(data),
        _rollouts(data),
        _seeds(data),
        _imagination(data),
        _provenance(data),
    ]
    write_text_atomic(run / REPORT, page(f"{data.task}: WAM report", sections))
    return run / REPORT


# ------------------------------------------------------------------------------------------------ numbers


def _number(value: Any, digits: int = 0, unit: str = "") -> str:
    """A number with its unit, or a dash where there is none."""
    return f"{value:,.{digits}f}{unit}" if isinstance(value, (int, float)) and not isinstance(value, bool) else NOTHING


def _count(entry: Mapping[str, Any]) -> str:
    return f"{entry['successes']}/{entry['episodes']}" if {"successes", "episodes"} <= entry.keys() else NOTHING


def _rate(entry: Mapping[str, Any]) -> float:
    return entry["successes"] / entry["episodes"] if entry.get("episodes") and "successes" in entry else -1.0


def _interval(entry: Mapping[str, Any]) -> str:
    low, high = entry.get("wilson_low"), entry.get("wilson_high")
    return NOTHING if low is None or high is None else f"{100 * low:.0f}{NOTHING}{100 * high:.0f}%"


def _duration(seconds: Any) -> str:
    if not isinstance(seconds, (int, float)):
        return NOTHING
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _interval_bar(entry: Mapping[str, Any]) -> str:
    low, high, rate = entry.get("wilson_low"), entry.get("wilson_high"), 100 * _rate(entry)
    if low is None or high is None:
        return NOTHING
    span = tag("i", style=f"left:{100 * low:.1f}%;width:{100 * (high - low):.1f}%")
    mark = tag("b", style=f"left:{rate:.1f}%") if rate >= 0 else None
    return tag(
        "span", tag("span", _interval(entry), class_="range"), tag("span", span, mark, class_="bar", title=f"{_count(entry)}, 95% interval {_interval(entry)}")
    )


def _swatch(mode: str) -> Html | None:
    return tag("i", class_="swatch", style=f"background:{MODE_STYLES[mode][0]}") if mode in MODE_STYLES else None


# ------------------------------------------------------------------------------------------------ figures


def drawing(draw: Callable[[Path], None], label: str, class_: str = "plot") -> Html:
    """A figure as inline SVG in the page's own colours, or why there is none."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "figure.svg"
        try:
            draw(path)
        except (ImportError, FileNotFoundError, ValueError) as error:
            return absent(f"No {label}: {error}")
        return tag("div", _inline_svg(path.read_text(), re.sub(r"\W+", "-", label)), class_=class_, role="img", aria_label=label)


def _inline_svg(svg: str, prefix: str) -> Html:
    """An SVG file as an element: no addresses of standards, ids of its own, and colours that follow light and dark."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r'(\sid="|href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    for color, themed in _THEMED.items():
        svg = svg.replace(color, themed)
    return Html(svg)


# ------------------------------------------------------------------------------------------------ sections


def _headline(data: Run) -> Html:
    modes, expert = data.entries("modes"), data.entries("baselines").get("expert", {})
    best = max(modes, key=lambda m: _rate(modes[m]), default=None)
    tiles = []
    if best is not None:
        equal = [name for name in modes if name != best and _rate(modes[name]) == _rate(modes[best])]
        among = f"best of {len(modes)} modes on the same seeds" if len(modes) > 1 else "the only mode driven"
        among += f", as {' and '.join(equal)}" if equal else ""
        tiles.append((f"{best} {_count(modes[best])}", f"{among}; 95% interval {_interval(modes[best])}"))
    if "skip" in modes and best != "skip":
        tiles.append((f"skip {_count(modes['skip'])}", f"without imagining; 95% interval {_interval(modes['skip'])}"))
    if expert:
        tiles.append((f"expert {_count(expert)}", "the scripted policy it learnt from"))
    tiles.append((_duration(data.section("wall_seconds").get("total")), "wall time, from collection to this page"))
    links = (
        ("modes", "modes"),
        ("masks", "masks"),
        ("training", "training"),
        ("rollouts", "rollouts"),
        ("seeds", "seeds"),
        ("imagination", "imagination"),
        ("run", "what was run"),
    )
    return tag(
        "header",
        tag("p", "World action model, closed loop", class_="eyebrow"),
        tag("h1", data.task),
        tag("ul", [tag("li", tag("b", value), tag("span", text)) for value, text in tiles], class_="tiles"),
        None if modes else absent("No mode was driven: results.json has no modes; `wam rollout` drives them"),
        tag("nav", [tag("a", text, href=f"#{anchor}") for anchor, text in links], aria_label="Sections"),
    )


def _about(data: Run) -> Html:
    tree = data.section("config").get("timeline")
    timeline = absent("No picture of the timeline: results.json has no config.timeline")
    if tree is not None:
        timeline = drawing(lambda path: draw_timeline(from_dict(TimelineConfig, tree, "timeline"), path), "picture of the timeline")
    text = (
        "A world action model is one network that predicts the video a robot will see and the actions that lead there. "
        "An episode is one stream of tokens on one clock, and a small table says which tokens may attend to which: every mode below is the same weights under another table. "
        "The robot acts in closed loop: it observes, plans a block of actions, executes them, and what the camera then saw replaces what was imagined."
    )
    caption = "Two blocks of the stream. A frame's right edge is the control step at which it is seen; the first frame is a latent of its own."
    return section("about", "What this is", tag("p", text), tag("figure", timeline, tag("figcaption", caption)))


def _success(data: Run) -> Html:
    modes, baselines = data.entries("modes"), data.entries("baselines")
    if not modes and not baselines:
        return section("modes", "Success in closed loop", absent("results.json has neither modes nor baselines; `wam rollout` measures them"))
    rows: list[Sequence[Child]] = []
    for name, entry in modes.items():
        latency = f"{_number(entry.get('latency_ms_p50'))} / {_number(entry.get('latency_ms_p95'))}"
        rows.append(([_swatch(name), name], f"{_count(entry)}", _interval_bar(entry), latency, _number(entry.get("mean_length"), 1)))
    sanity: list[Sequence[Child]] = [
        (BASELINES.get(name, name), _count(entry), _interval_bar(entry), NOTHING, _number(entry.get("mean_length"), 1)) for name, entry in baselines.items()
    ]
    caption = (
        "Episodes that succeed, of those driven, with the 95% Wilson interval (band) around the rate (mark; the axis is 0 to 100%). "
        f"Latency is the time from an observation to a plan, for one robot{_plans(modes)}; half, and 95%, of plans take less. Length is that of episodes that succeed. "
        "Below the line, policies that need no model: the expert is the ceiling, holding still and random actions are the floor, and a replayed demonstration shows how far memory alone goes."
    )
    head = ("mode", "success", "95% interval", "latency p50 / p95, ms", "mean length, steps")
    missing = None if baselines else absent("No sanity rows: results.json has no baselines (expert, hold still, random)")
    return section("modes", "Success in closed loop", table(caption, head, [group for group in (rows, sanity) if group]), missing, _stages(modes))


def _plans(modes: Mapping[str, Any]) -> str:
    counts = [entry["latency_chunks"] for entry in modes.values() if isinstance(entry.get("latency_chunks"), int)]
    return f" (at least {min(counts)} plans a mode)" if counts else ""


def _stages(modes: Mapping[str, Any]) -> Html | None:
    """Where a plan's time goes."""
    staged = {name: entry["latency_ms"] for name, entry in modes.items() if isinstance(entry.get("latency_ms"), dict)}
    stages = list(dict.fromkeys(stage for entry in staged.values() for stage in entry))
    if not stages:
        return None
    rows = [([_swatch(name), name], *(_stage(entry.get(stage)) for stage in stages)) for name, entry in staged.items()]
    return tag("details", tag("summary", "Where a plan's time goes"), table("Milliseconds of each stage of a plan, p50 / p95.", ("mode", *stages), [rows]))


def _stage(entry: Any) -> str:
    return f"{_number(entry.get('p50'), 1)} / {_number(entry.get('p95'), 1)}" if isinstance(entry, dict) else NOTHING


def _modes(data: Run) -> Html:
    config_modes = data.section("config").get("training", {}).get("modes", {})
    used = {*data.entries("modes"), *data.entries("imagination"), *config_modes}
    known = [name for name in MODES if name in used]
    unknown = sorted(used - MODES.keys())
    cards = [_mode_card(name) for name in known]
    text = (
        "The attention of a training window of two blocks. Rows attend to columns; blue is video, orange actions, green state, grey the first frame. "
        "Vc and Ac are clean (seen, executed), V and A noisy (to be predicted). Outlined: what the mode opens beyond skip."
    )
    strange = absent(f"This version of wam has no mode {', '.join(map(repr, unknown))}, so there is no mask") if unknown else None
    empty = None if used else absent("No mode is named in results.json")
    return section("masks", "One network, one table a mode", tag("p", text), tag("div", cards, class_="cards"), strange, empty)


def _mode_card(name: str) -> Html:
    mode = MODES[name]
    opened = "; ".join(f"{q.label} sees {k.label} {RELATION_WORDS[relation]}" for (q, k), relation in mode.opened.items())
    picture = drawing(partial(draw_mask, name), f"mask of {name}", class_="mask")
    return tag(
        "article",
        tag("h3", _swatch(name), name),
        tag("p", f"{mode.about[0].upper()}{mode.about[1:]}."),
        tag("p", f"Opens: {opened or 'nothing; this is the base table'}.", class_="note"),
        picture,
    )


def _training(data: Run) -> Html:
    log = data.root / "train" / "log.jsonl"
    if not log.is_file():
        return section("training", "Training", absent("No learning curves: train/log.jsonl is not there; `wam train` writes it"))
    curves = drawing(lambda path: draw_learning_curves(log, path), "learning curves")
    caption = (
        "Flow-matching losses on the training windows and, per mode, on held-out episodes; right, the squared error of sampled actions on held-out episodes in "
        "normalised units, beside two policies that know nothing. Logarithmic axes."
    )
    return section("training", "Training", tag("figure", curves, tag("figcaption", caption)))


def _rollouts(data: Run) -> Html:
    groups = media_groups(data.root / "rollout" / "videos")
    if not groups:
        return section(
            "rollouts", "The robot at work", absent("No closed-loop videos: rollout/videos is empty or not there; `wam rollout rollout.videos=3` writes them")
        )
    text = "Real: what the camera saw. Imagined: what the model, when it planned, expected the camera to see at that moment."
    parts = [(tag("h3", _swatch(mode), mode), _clips(data, stems, partial(_rollout_caption, data, mode))) for mode, stems in groups.items()]
    return section("rollouts", "The robot at work", tag("p", text), _left_out(data, groups), parts)


def _rollout_caption(data: Run, mode: str, stem: Path) -> str:
    seed = stem.name.removeprefix(f"{mode}_")
    row = next((r for r in data.episodes.get(mode, ()) if str(r["seed"]) == seed), None)
    return f"Seed {seed}: {_outcome(row)}" if row else f"Seed {seed}"


def _outcome(row: Mapping[str, Any]) -> str:
    steps = f" {'after' if row['success'] else 'in'} {row['length']} steps" if isinstance(row.get("length"), int) else ""
    plans = f", {row['chunks']} plans" if isinstance(row.get("chunks"), int) else ""
    clipped = f", {row['interventions']} actions clipped to the robot's range" if row.get("interventions") else ""
    return f"{'success' if row['success'] else 'failure'}{steps}{plans}{clipped}"


def _clips(data: Run, stems: Iterable[Path], caption: Callable[[Path], str], class_: str = "clips") -> Html:
    """Videos side by side, then their stills: folded away, unless there is nothing else to see."""
    videos, stills = [], []
    for stem in stems:
        video, still = stem.parent / f"{stem.name}.mp4", stem.parent / f"{stem.name}.png"
        if video in data.embedded:
            movie = tag("video", src=data_uri(video), controls=True, loop=True, muted=True, playsinline=True, preload="metadata", aria_label=caption(stem))
            videos.append(tag("figure", movie, tag("figcaption", caption(stem))))
        if still in data.embedded:
            stills.append(tag("figure", tag("img", src=data_uri(still), alt=f"Stills. {caption(stem)}", class_="still"), tag("figcaption", caption(stem))))
    folded = tag("details", tag("summary", f"Stills ({len(stills)})"), stills, open=not videos) if stills else None
    return join([tag("div", videos, class_=class_) if videos else None, folded])


def _left_out(data: Run, groups: Mapping[str, Sequence[Path]]) -> Html | None:
    """How many videos are on disk but not in the page."""
    videos = [path for stems in groups.values() for stem in stems if (path := stem.parent / f"{stem.name}.mp4").is_file()]
    left = [path for path in videos if path not in data.embedded]
    if not left:
        return None
    where = left[0].parent.relative_to(data.root)
    return absent(f"{len(left)} of {len(videos)} videos were left out to keep this file under 12 MB; they are in {where}/ of the run directory")


def _seeds(data: Run) -> Html:
    if not data.episodes:
        why = data.problems.get("rollout", "rollout/rollout.json lists no episodes")
        return section("seeds", "Which seeds fail", absent(f"No outcomes by episode: {why}; `wam rollout` writes it"))
    names = [name for name in data.episodes if name not in BASELINES] + [name for name in BASELINES if name in data.episodes]
    rows = []
    for name in names:
        episodes = data.episodes[name]
        good = sum(bool(r["success"]) for r in episodes)
        label = tag("span", _swatch(name), BASELINES.get(name, name), " ", tag("small", f"{good}/{len(episodes)}"))
        rows.append((label, tag("ol", [_square(r) for r in episodes], class_="strip", aria_label=f"{name}: {good} of {len(episodes)} succeed")))
    text = "Each square is an episode, in the order of seeds: filled green succeeds, \u00d7 fails. Point at one for its seed and length."
    return section(
        "seeds",
        "Which seeds fail",
        tag("p", text),
        tag("div", rows, class_="strips"),
        tag("p", _common_failures(data), " ", _against_skip(data), class_="note"),
    )


def _square(row: Mapping[str, Any]) -> Html:
    return tag("li", None if row["success"] else "\u00d7", class_="ok" if row["success"] else "no", title=f"seed {row['seed']}: {_outcome(row)}")


def _common_failures(data: Run) -> str:
    """Seeds that no mode solves say more about the data than about the modes."""
    modes = [rows for name, rows in data.episodes.items() if name not in BASELINES]
    if len(modes) < 2:
        return ""
    shared = set.intersection(*({r["seed"] for r in rows if not r["success"]} for rows in modes))
    return f"Seeds that fail in every mode: {', '.join(map(str, sorted(shared)))}." if shared else "No seed fails in every mode."


def _against_skip(data: Run) -> str:
    """Does imagining pay?  Asked of the seeds that both drove, because they share what is hard about them."""
    outcomes = {name: {r["seed"]: bool(r["success"]) for r in rows} for name, rows in data.episodes.items() if name not in BASELINES}
    skip = outcomes.pop("skip", {})
    tests = []
    for name, other in outcomes.items():
        seeds = sorted(skip.keys() & other.keys())
        if seeds:
            tests.append(f"{name} p = {mcnemar([skip[s] for s in seeds], [other[s] for s in seeds]):.2g}")
    return f"Against skip on the same seeds (McNemar's exact test): {', '.join(tests)}." if tests else ""


def _imagination(data: Run) -> Html:
    measured, groups = data.entries("imagination"), media_groups(data.root / "imagine")
    parts: list[Child] = []
    if measured:
        head = ("mode", "PSNR, dB", "of copying", "of mean motion", "of the codec", "SSIM", "of copying", "clips \u00d7 blocks")
        rows = [
            (
                [_swatch(name), name],
                *(_number(e.get(key), 2) for key in ("psnr_db", "static_psnr_db", "mean_motion_psnr_db", "codec_psnr_db")),
                *(_number(e.get(key), 3) for key in ("ssim", "static_ssim")),
                f"{_number(e.get('clips'))} \u00d7 {_number(e.get('blocks'))}",
            )
            for name, e in measured.items()
        ]
        unknown = f"pixels that are not recorded ({data.problems.get('imagine', 'imagine/imagine.json has no mask')})"
        caption = (
            "Video imagined from one frame on, block after block with nothing observed in between, against what was recorded on held-out episodes; copying repeats the frame "
            "it started from, mean motion adds to it what training episodes change in the same time, and the codec is shown the truth, which is the ceiling. "
            f"PSNR over {data.imagine.get('mask') or unknown}; SSIM over whole frames."
        )
        parts.append(table(caption, head, [rows]))
        if curves_of(data.imagine):
            curves = drawing(lambda path: draw_horizon(data.imagine, path), "error by how far ahead")
            parts.append(tag("figure", curves, tag("figcaption", "The same by how far ahead it was imagined, over moving pixels. Higher is better.")))
        parts += [tag("p", sentence) for sentence in sentences(data.imagine)]
    else:
        parts.append(absent("No imagination was measured: results.json has no imagination; `wam imagine` measures it"))
    if groups:
        parts += [tag("h3", "Imagined clips"), _left_out(data, groups)]
        parts += [
            (tag("h3", _swatch(mode), mode) if mode != "other" else None, _clips(data, stems, _clip_caption, "clips broad")) for mode, stems in groups.items()
        ]
    else:
        parts.append(absent("No imagined clips: imagine holds no videos; `wam imagine` writes them"))
    return section("imagination", "What it imagines", parts)


def _clip_caption(stem: Path) -> str:
    """`episode0003_0040_real_forward_imagine` says what is side by side; any other name stands for itself."""
    named = re.fullmatch(r"episode(\d+)_(\d+)_(.+)", stem.name)
    return f"Episode {int(named[1])} from step {int(named[2])}: {named[3].replace('_', ' | ')}" if named else stem.name


def _provenance(data: Run) -> Html:
    wall, commands = data.section("wall_seconds"), data.results.get("commands")
    parts: list[Child] = []
    if wall:
        longest = max((v for k, v in wall.items() if k != "total"), default=1) or 1
        rows = [
            (stage, _duration(s), tag("span", tag("i", style=f"width:{100 * s / longest:.1f}%"), class_="bar share"))
            for stage, s in wall.items()
            if stage != "total"
        ]
        memory = _number(data.results.get("peak_memory_gb"), 1, " GB")
        parts.append(
            table(
                f"Wall time of each stage, {_duration(wall.get('total'))} in all. Peak memory: {memory}.",
                ("stage", "wall time", "share of the longest"),
                [rows],
            )
        )
    else:
        parts.append(absent("results.json has no wall_seconds"))
    text = "\n".join(map(str, commands)) if isinstance(commands, list) else ""
    parts.append((tag("h3", "Commands"), tag("pre", text)) if text else absent("results.json has no commands"))
    known = [(name, data.section(name)) for name in ("machine", "versions")]
    parts.append(
        tag(
            "div",
            [tag("div", tag("h3", name.capitalize()), facts(tree) if tree else absent(f"results.json has no {name}")) for name, tree in known],
            class_="pair",
        )
    )
    config = _config_text(data)
    parts.append(
        tag("details", tag("summary", "Config, resolved"), tag("pre", config))
        if config
        else absent("No config: neither results.json nor train/config.yaml holds one")
    )
    return section("run", "What was run", parts)


def _config_text(data: Run) -> str:
    tree, path = data.section("config"), data.root / "train" / "config.yaml"
    if tree:
        return yaml.safe_dump(tree, sort_keys=False)
    return path.read_text() if path.is_file() else ""
