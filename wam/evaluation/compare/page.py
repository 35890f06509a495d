"""The report of a comparison: one HTML file for a reader who has not seen the code.

    compare.json  ->  question, answers drawn  ->  table  ->  success against milliseconds  ->  what is supported  ->  disturbances,
                      seeds, videos, imagination, training  ->  how it was made

It is written from what the run directory holds, so it can be written again anywhere; it asks for nothing from outside (`wam.evaluation.page`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from wam.evaluation.compare.claims import QUESTIONS
from wam.evaluation.compare.imagined import FOLDER as IMAGINED
from wam.evaluation.compare.imagined import strip_path
from wam.evaluation.compare.pareto import EXTRA, TITLES, draw_pareto
from wam.evaluation.compare.parts import STYLE, count, flops, interval, lanes, number, rate_bar, swatch
from wam.evaluation.compare.plan import duration
from wam.evaluation.compare.run import RESULTS
from wam.evaluation.page import NOTHING, Child, Html, absent, data_uri, facts, page, section, table, tag
from wam.evaluation.plots import draw_learning_curves, draw_mask
from wam.evaluation.report import BASELINES, drawing
from wam.evaluation.run_files import choose_media
from wam.files import write_text_atomic

REPORT = "report.html"
SECTIONS = (
    ("question", "The question"),
    ("variants", "What was compared"),
    ("results", "Results"),
    ("pareto", "Success against milliseconds"),
    ("supported", "What these numbers support, and what they do not"),
    ("disturbances", "Disturbances"),
    ("seeds", "Which seeds fail"),
    ("videos", "The robot at work"),
    ("imagination", "What is imagined"),
    ("made", "How this was made"),
)
SEVERAL = "all"  # the variant that knows every mode
Tree = dict[str, Any]


def write_report(output: Path) -> Path:
    """Write `report.html` from `compare.json` and what lies beside it; returns its path.

    Raises:
        FileNotFoundError: there is no `compare.json`.
    """
    if not (output / RESULTS).is_file():
        raise FileNotFoundError(f"no {output / RESULTS}; `wam compare --output {output}` writes it")
    data: Tree = json.loads((output / RESULTS).read_text())
    draw: dict[str, Callable[[Tree, Path], Child]] = {
        "question": _question,
        "variants": _variants,
        "results": _results,
        "pareto": _pareto,
        "supported": _supported,
        "disturbances": _disturbances,
        "seeds": _seeds,
        "videos": _videos,
        "imagination": _imagination,
        "made": _made,
    }
    body = [_headline(data), *(section(anchor, title, draw[anchor](data, output)) for anchor, title in SECTIONS)]
    write_text_atomic(output / REPORT, page(f"{_task(data)}: where should prediction live?", body, STYLE))
    return output / REPORT


def _task(data: Tree) -> str:
    return str(data["env"].rsplit("/", 1)[-1])


def _name(data: Tree, row: str) -> Html:
    """A row with its colour."""
    own = data["rows"].get(row)
    return tag("span", swatch(own["mode"], EXTRA[0] if own["extra"] else None) if own else None, row)


# ------------------------------------------------------------------------------------------------ the question


def _headline(data: Tree) -> Html:
    rows = data["rows"]
    tiles = []
    for condition in data["conditions"]:
        best = max(rows.values(), key=lambda row: row[condition]["successes"] / max(1, row[condition]["episodes"]))
        rate = best[condition]["successes"]
        names = [name for name, row in rows.items() if row[condition]["successes"] == rate]
        told = names[0] if len(names) == 1 else f"{len(names)} of {len(rows)} rows alike"
        tiles.append((count(best[condition]), f"most successes {TITLES[condition]}: {told}; 95% interval {interval(best[condition])}"))
    fastest = min(rows, key=lambda name: rows[name]["latency"]["p50"])
    slowest = max(rows, key=lambda name: rows[name]["latency"]["p50"])
    tiles.append((f"{number(rows[fastest]['latency']['p50'])}{NOTHING}{number(rows[slowest]['latency']['p50'])} ms", f"a plan, from {fastest} to {slowest}"))
    return tag(
        "header",
        tag("p", f"wam compare \u00b7 {_task(data)} \u00b7 {data['made'][:10]}", class_="eyebrow"),
        tag("h1", "Where should prediction live?"),
        tag("ul", [tag("li", tag("b", big), tag("span", small)) for big, small in tiles], class_="tiles"),
        tag("p", data["answer"], class_="verdict"),
        tag("nav", [tag("a", title, href=f"#{anchor}") for anchor, title in SECTIONS], aria_label="Sections"),
    )


def _question(data: Tree, output: Path) -> Child:
    text = (
        "A robot policy can be asked for more than actions: it can also predict the video that its camera will see. "
        "Such a world action model has to put that prediction somewhere, and every place costs something else: nothing at all, training time, or milliseconds before each movement. "
        "The same network answers in every way below; what differs is which tokens may attend to which, and what is predicted when."
    )
    reading = "In a mask, rows attend to columns. H is the first frame, S the state, Vc and Ac what was seen and done, V and A the video and actions that are predicted; blue is video, orange is actions. Where no video is predicted, V stands for nothing, and nobody looks at it."
    cards = [_answer(name, variant) for name, variant in data["variants"].items()] + [_loop(name, row) for name, row in data["rows"].items() if row["extra"]]
    return (tag("p", text), tag("p", reading, class_="note"), tag("div", cards, class_="cards"))


def _loop(name: str, row: Tree) -> Html:
    """A row with a closed loop of its own."""
    about = f"{row['about'][:1].upper()}{row['about'][1:]}{'.' if row['about'] else ''}"
    told = tag("div", [tag("code", override) for override in row["overrides"]], class_="changes")
    return tag("article", tag("h3", swatch(row["mode"], EXTRA[0]), name), tag("p", about), tag("p", f"The weights of {row['variant']} in mode {row['mode']}, in a closed loop with", class_="note"), told)


def _answer(name: str, variant: Tree) -> Html:
    modes = variant["modes"]
    shown = modes[0] if len(modes) == 1 else None
    several = f"Driven in {len(modes)} modes: {', '.join(modes)}." if shown is None else None
    picture = drawing(partial(draw_mask, shown), f"mask of {name}", class_="mask") if shown else tag("div", [tag("div", tag("span", swatch(m), m), lanes(m)) for m in modes])
    return tag("article", tag("h3", swatch(shown) if shown else None, name), tag("p", variant["about"]), lanes(shown) if shown else tag("p", several, class_="note"), picture)


def _variants(data: Tree, output: Path) -> Child:
    budget, first = data["budget"], next(iter(data["variants"]))
    how = {
        "flops": f"Each variant may spend as many floating-point operations on training as {first} does; one that needs fewer a window sees more windows. Counted is what a variant needs; what the program computes beyond that costs it minutes.",
        "steps": f"Each variant has {budget['steps']} updates.",
        "minutes": f"Each variant has {budget['minutes']:g} minutes by the clock.",
    }[budget["equal"]]
    head = ("variant", "updates", "operations", "computed", "minutes", "what it changes")
    rows: list[Sequence[Child]] = [
        (
            name,
            number(v["steps"]),
            flops(v["flops"]),
            flops(v["flops_computed"]),
            number(v["training_minutes"], 1),
            tag("div", _changes(v), class_="changes"),
        )
        for name, v in data["variants"].items()
    ]
    t = data["config"]["training"]
    sizes = sorted({v["parameters"] for v in data["variants"].values()})
    same = (
        f"The same for all: demonstrations and the order in which windows are drawn (seed {t['seed']}), batches of {t['batch_size']} windows, learning rate and schedule, network "
        f"({' or '.join(f'{size / 1e6:.2f} M' for size in sizes)} parameters with codec and text encoder), "
        "memory of what was seen and done, solver steps when acting, episodes and their disturbances (same seeds)."
    )
    errors = [(name, [f"{mode} {number(error, 3)}  " for mode, error in v["error"].items()]) for name, v in data["variants"].items() if v["error"]]
    more = tag("details", tag("summary", "Errors of sampled actions on held-out windows, and learning curves"), tag("dl", [(tag("dt", n), tag("dd", e)) for n, e in errors]), _curves(data, output)) if errors else None
    return (tag("p", how), table("Operations are those that a variant needs, computed those of everything that went through the network; minutes are of the training steps alone; what a variant changes is worked out from the configs that were trained.", head, [rows]), tag("p", same), more)


def _changes(variant: Tree) -> Child:
    if variant["taken"]:
        told: list[Child] = [tag("code", f"taken from {variant['taken']}")]
    else:
        told = [] if variant["changes"] else ["nothing: the shared config"]
    return [*told, *(tag("code", f"{name}: {_short(own)} (shared: {_short(shared)})") for name, (shared, own) in variant["changes"].items())]


def _short(value: Any) -> str:
    return ", ".join(f"{k} {v:g}" for k, v in value.items()) if isinstance(value, dict) else str(value)


def _curves(data: Tree, output: Path) -> Child:
    logs = {name: output / "train" / name / "log.jsonl" for name in data["variants"]}
    return [(tag("h3", name), drawing(partial(draw_learning_curves, log), f"learning curves of {name}")) for name, log in logs.items() if log.is_file()]


# ------------------------------------------------------------------------------------------------ results


def _results(data: Tree, output: Path) -> Child:
    conditions = data["conditions"]
    head = ("row", *(TITLES[c] for c in conditions), "recovered", "ms, p50 / p95", "steps/s", "operations/s", "imagined, dB")
    rows: list[Sequence[Child]] = [_result(data, name, row) for name, row in data["rows"].items()]
    floor: list[Sequence[Child]] = [
        (BASELINES.get(name, name), rate_bar(entry), *([NOTHING] if len(conditions) > 1 else []), *([NOTHING] * 5)) for name, entry in data["baselines"].items()
    ]
    caption = (
        "Rows are variant/mode. Success: episodes of those driven, with the 95% Wilson interval (band; the axis is 0 to 100%). Recovered: of the episodes in which the disturbance really happened, those that succeed after it. "
        "Ms: milliseconds from an observation to a plan, for one robot, rows timed in turns. Steps/s: control steps a second that a robot reaches which stands still while it plans. Operations/s: of plans and checks, in simulated time. "
        "Imagined: how much closer (PSNR, moving pixels) the imagined video is to what followed than the frame it started from. Below the line, policies that need no model."
    )
    apart = [name for name, row in data["rows"].items() if not row["timed_apart"]]
    note = tag("p", f"{', '.join(apart)}: timed in the closed loop, not in turns with the others, so small differences of latency to them say nothing.", class_="note") if apart else None
    return (table(caption, head, [rows, floor]), note)


def _result(data: Tree, name: str, row: Tree) -> Sequence[Child]:
    recovery = row["recovery"]
    recovered = f"{recovery['recovered']}/{recovery['disturbed']}" if recovery else NOTHING
    imagined = row["imagination"]
    latency = row["latency"]
    return (
        _name(data, name),
        *(rate_bar(row[c]) for c in data["conditions"]),
        recovered,
        f"{number(latency['p50'])} / {number(latency['p95'])}",
        number(row["waiting_hz"], 1),
        flops(row["calm"]["flops_a_second"]),
        f"{imagined['gain_db']:+.1f}" if imagined else NOTHING,
    )


def _pareto(data: Tree, output: Path) -> Child:
    rows = data["rows"]
    picture = drawing(partial(draw_pareto, rows, data["front"], SEVERAL), "success against milliseconds")
    caption = (
        "Every row's rate of success with its 95% interval, against the median latency of a plan; the line to the right ends at the 95th percentile. "
        f"Filled: the variant {SEVERAL!r}, in its modes; hollow: variants trained for one thing. The dashed line joins the rows that no other row beats in both, of those that were timed in turns; "
        "rows whose intervals overlap may trade places on it when driven again."
    )
    told = [f"{TITLES[c].capitalize()}: {', '.join(data['front'][c])}." for c in data["conditions"]]
    return (tag("figure", picture, tag("figcaption", caption)), tag("p", "On the front, fastest first. ", " ".join(told)))


def _supported(data: Tree, output: Path) -> Child:
    shown = [c for c in data["claims"] if c["shows"]]
    open_ = [c for c in data["claims"] if not c["shows"]]
    fast = [s for s in data["speeds"] if s["shows"]]
    among = sum(c["family"] == "reference" for c in data["claims"])
    intro = (
        "Rows are compared on the same seeds, which is fairer than comparing rates: what counts are the episodes that one row solves and the other does not (McNemar's exact test). "
        f"Every row is tested against {data['reference']} ({among} comparisons), and a few pairs ask the question directly; both lists were fixed before anything was driven, "
        "and p-values are corrected for the length of their list (Holm). A difference counts below 0.05."
    )
    return (
        tag("p", intro),
        tag("h3", "Supported"),
        tag("ul", [_claim(c) for c in shown], [tag("li", s["says"]) for s in fast], class_="said") if shown or fast else tag("p", "No comparison of success shows a difference, and no latency differs."),
        tag("h3", "Not supported"),
        tag("ul", [tag("li", text) for text in data["limits"]], class_="said"),
        tag("details", tag("summary", f"{len(open_)} comparisons that do not show a difference, and what they would take"), tag("ul", [_claim(c) for c in open_], [tag("li", s["says"]) for s in data["speeds"] if not s["shows"]], class_="said"), open=len(shown) == 0)
        if open_
        else None,
        _asked(data),
    )


def _claim(claim: Tree) -> Html:
    return tag("li", f"{TITLES[claim['condition']].capitalize()}. ", claim["says"])


def _asked(data: Tree) -> Child:
    """The direct questions as a table: a row a pair, a cell a condition."""
    mine = [c for c in data["claims"] if c["family"] == "questions"]
    if not mine:
        return None
    rows: list[Sequence[Child]] = []
    for a, b, question in QUESTIONS:
        own = {c["condition"]: c for c in mine if (c["a"], c["b"]) == (a, b)}
        if own:
            cells = [f"{100 * c['difference']:+.0f} ({100 * c['low']:+.0f} to {100 * c['high']:+.0f}), p = {c['p_holm']:.2g}" if (c := own.get(condition)) else NOTHING for condition in data["conditions"]]
            rows.append((tag("div", question, tag("br"), tag("small", f"{a} minus {b}"), class_="changes"), *cells))
    caption = "Differences of success in percentage points with their 95% interval (Newcombe), and corrected p."
    return (tag("h3", "The question, pair by pair"), table(caption, ("pair", *(TITLES[c] for c in data["conditions"])), [rows]))


# ------------------------------------------------------------------------------------------------ episodes


def _disturbances(data: Tree, output: Path) -> Child:
    d = data["disturbances"]
    if not d["kinds"]:
        return absent("Nothing was disturbed: the comparison names no disturbances.kinds")
    rows = data["rows"]
    kinds = list(dict.fromkeys(kind for row in rows.values() for kind in row["recovery"]["kinds"]))
    head = ("row", "recovered", "95% interval", "of those it wins undisturbed", "seconds to recover", "not struck", *(kind.replace("_", " ") for kind in kinds))
    body: list[Sequence[Child]] = []
    for name, row in rows.items():
        r = row["recovery"]
        low, high = r["wilson_low"], r["wilson_high"]
        span = NOTHING if low is None else f"{100 * low:.0f}{NOTHING}{100 * high:.0f}%"
        winnable = r["paired"]["recovered_of_winnable"]
        by_kind = [f"{r['kinds'][kind]['recovered']}/{r['kinds'][kind]['disturbed']}" if kind in r["kinds"] else NOTHING for kind in kinds]
        body.append((_name(data, name), f"{r['recovered']}/{r['disturbed']}", span, count(winnable), number(r["seconds_km"], 1), number(r["undisturbed"]), *by_kind))
    caption = (
        f"One of {', '.join(d['kinds'])} in each episode (strength {d['strength']:g}), drawn from the episode's seed and so the same for every row. "
        "Recovered: episodes that succeed after it happened, of those in which it did; episodes that were won, or over, before are not struck and say nothing. What a row does decides whether it is struck, so rows are compared by success on all seeds (above). "
        "Seconds to recover: median, with episodes that never recover counted as watched to their end (Kaplan and Meier); none where more than half do not."
    )
    return table(caption, head, [body])


def _seeds(data: Tree, output: Path) -> Child:
    text = "Each square is an episode, in the order of seeds: filled green succeeds, \u00d7 fails. Point at one for its seed, its length, and what was done to it."
    parts: list[Child] = [tag("p", text)]
    for condition in data["conditions"]:
        rows = []
        for name, row in data["rows"].items():
            own = row[condition]
            label = tag("span", _name(data, name), " ", tag("small", count(own)))
            rows.append((label, tag("ol", [_square(e) for e in own["episodes_by_seed"]], class_="strip", aria_label=f"{name}, {TITLES[condition]}: {own['successes']} of {own['episodes']} succeed")))
        parts += [tag("h3", TITLES[condition].capitalize()), tag("div", rows, class_="strips")]
    return parts


def _square(e: Tree) -> Html:
    crashed = e.get("outcome") == "crashed"
    what = "crashed simulator, not counted" if crashed else "success" if e["success"] else "failure"
    done = f"; {', '.join(kind.replace('_', ' ') for kind in e['kinds'])}" if e["kinds"] else ""
    sign = "?" if crashed else None if e["success"] else "\u00d7"
    return tag("li", sign, class_="ok" if e["success"] else "no", title=f"seed {e['seed']}: {what} after {e['length']} steps{done}")


def _videos(data: Tree, output: Path) -> Child:
    groups = {(name, condition): _stems(output, name, row, condition) for condition in data["conditions"] for name, row in data["rows"].items()}
    there = {key: stems for key, stems in groups.items() if stems}
    if not there:
        return absent("No videos: rollout.videos is 0, or drive/ holds none")
    chosen = choose_media(list(there.values()), 9_000_000)
    text = "Left, what the camera saw; right, where a row imagines, what it expected the camera to see at that moment, when it planned."
    parts: list[Child] = [tag("p", text)]
    for condition in data["conditions"]:
        clips = [_clip(data, name, row_condition, stem, chosen) for (name, row_condition), stems in there.items() if row_condition == condition for stem in stems[:1]]
        parts += [tag("h3", TITLES[condition].capitalize()), tag("div", clips, class_="clips")]
    return parts


def _stems(output: Path, name: str, row: Tree, condition: str) -> list[Path]:
    folder = output / "drive" / (name if row["extra"] else row["variant"]) / condition / "videos"
    return sorted(path.with_suffix("") for path in folder.glob(f"{row['mode']}_[0-9]*.mp4")) if folder.is_dir() else []


def _clip(data: Tree, name: str, condition: str, stem: Path, chosen: frozenset[Path]) -> Child:
    video, seed = stem.with_suffix(".mp4"), stem.name.rsplit("_", 1)[-1]
    episode = next((e for e in data["rows"][name][condition]["episodes_by_seed"] if str(e["seed"]) == seed), None)
    ended = "" if episode is None else f"{'success' if episode['success'] else 'failure'} after {episode['length']} steps" + (f", {', '.join(episode['kinds'])}".replace("_", " ") if episode["kinds"] else "")
    caption = tag("figcaption", _name(data, name), f", seed {seed}: {ended}")
    if video not in chosen:
        return tag("figure", absent("left out to keep this file small"), caption)
    return tag("figure", tag("video", src=data_uri(video), controls=True, loop=True, muted=True, playsinline=True, preload="metadata", aria_label=f"{name}, {condition}, seed {seed}"), caption)


def _imagination(data: Tree, output: Path) -> Child:
    measured = data["imagination"]
    if not measured:
        return absent("No row imagines")
    head = ("row", "PSNR, dB", "PSNR of copying, dB", "gain, dB", "SSIM", "SSIM of copying", "clips")
    rows: list[Sequence[Child]] = [
        (_name(data, name), *(number(e[key], 2) for key in ("psnr_db", "static_psnr_db", "gain_db")), *(number(e[key], 3) for key in ("ssim", "static_ssim")), number(e["clips"])) for name, e in measured.items()
    ]
    caption = (
        f"Video imagined from one frame on, {data['imagined']['blocks']} blocks with nothing observed in between, against what was recorded on held-out episodes. A row acts on its own planned actions in imagination, so a gap is also one of behaviour; "
        f"/forward is given the recorded actions. Copying repeats the first frame. PSNR over {data['imagined']['mask']}; SSIM over whole frames."
    )
    folder = output / IMAGINED
    strips = []
    for index, (episode, start) in enumerate(data["imagined"]["clips"]):
        shown = [(name, path) for name in ("real", *measured) if (path := strip_path(folder, name, index)).is_file()]
        stills = [(_name(data, name) if name in data["rows"] else tag("span", name), tag("img", src=data_uri(path), alt=f"{name}, episode {episode} from step {start}", class_="still")) for name, path in shown]
        strips.append((tag("h3", f"Episode {episode} from step {start}"), tag("div", stills, class_="stills")))
    return (table(caption, head, [rows]), strips)


# ------------------------------------------------------------------------------------------------ how it was made


def _made(data: Tree, output: Path) -> Child:
    seconds = data["seconds"]
    rows: list[Sequence[Child]] = [(name, duration(s)) for name, s in seconds.items() if s]
    r, i = data["config"]["rollout"], data["config"]["imagine"]
    seeds = {
        "training": data["config"]["training"]["seed"],
        "episodes": f"{r['seed']} to {r['seed'] + r['episodes'] - 1}",
        "disturbances": data["disturbances"]["seed"],
        "imagined clips": i["seed"],
    }
    return (
        tag("h3", "Command"),
        tag("pre", data["command"]),
        tag("p", "The plan it printed before anything was computed:", class_="note"),
        tag("pre", data["plan"]),
        table(f"Wall time of each phase, over all attempts; {duration(sum(seconds.values()))} in all.", ("phase", "wall time"), [rows]),
        tag("div", [tag("div", tag("h3", title), facts(tree)) for title, tree in (("Seeds", seeds), ("Machine", data["machine"]), ("Versions", data["versions"]))], class_="pair"),
        tag("details", tag("summary", "Shared config, resolved"), tag("pre", yaml.safe_dump(data["config"], sort_keys=False))),
    )
