"""HTML in small: elements as functions, text escaped unless it is already HTML, and the style of a report.

A report is opened from a disk, a mail or a web page years later, so it is one file that asks for nothing: styles inline, images and
videos as data URIs, no scripts.  The page says so itself (`Content-Security-Policy`), and a browser then refuses anything else.

    tag("p", "k < n", class_="note")  ->  <p class="note">k &lt; n</p>
"""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence
from pathlib import Path

from wam import __version__

MEDIA_TYPES = {".mp4": "video/mp4", ".png": "image/png", ".jpg": "image/jpeg", ".svg": "image/svg+xml"}
NOTHING = "\u2013"  # a cell without a value; left out where a row is shown as a card
_VOID = frozenset({"img", "meta", "source", "br"})


class Html(str):
    """Text that is HTML already and is not escaped again."""


Child = str | None | Iterable["Child"]


def tag(name: str, /, *children: Child, **attributes: str | bool | None) -> Html:
    """An element.  `class_` is `class`, `data_label` is `data-label`; True is an attribute without a value, None and False are none."""
    written = []
    for key, value in attributes.items():
        key = key.rstrip("_").replace("_", "-")
        if value is True:
            written.append(f" {key}")
        elif value is not None and value is not False:
            written.append(f' {key}="{html.escape(value)}"')
    opening = f"<{name}{''.join(written)}>"
    return Html(opening if name in _VOID else f"{opening}{join(children)}</{name}>")


def join(children: Child) -> Html:
    """Children one after the other: HTML as it is, other text escaped, None left out."""
    if children is None:
        return Html("")
    if isinstance(children, Html):
        return children
    if isinstance(children, str):
        return Html(html.escape(children))
    return Html("".join(join(child) for child in children))


def data_uri(path: Path) -> str:
    """A file as the text of a URL."""
    return f"data:{MEDIA_TYPES[path.suffix]};base64,{base64.b64encode(path.read_bytes()).decode()}"


def table(caption: Child, head: Sequence[str], groups: Sequence[Sequence[Sequence[Child]]]) -> Html:
    """A table with one body a group of rows; a row's first cell is its header.  On a narrow screen a row becomes a card."""
    bodies = []
    for group in groups:
        rows = [(row[0], zip(head[1:], row[1:], strict=True)) for row in group]
        bodies.append(tag("tbody", [tag("tr", tag("th", name, scope="row"), [_cell(label, cell) for label, cell in cells]) for name, cells in rows]))
    header = tag("thead", tag("tr", [tag("th", cell, scope="col") for cell in head]))
    return tag("div", tag("table", tag("caption", caption), header, bodies), class_="wide")


def _cell(label: str, value: Child) -> Html:
    return tag("td", value, data_label=label, class_="none" if value == NOTHING else None)


def facts(tree: object) -> Html:
    """A nested dictionary as a list of names and values."""
    if not isinstance(tree, dict):
        return join(NOTHING if tree is None else ", ".join(map(str, tree)) if isinstance(tree, list) else str(tree))
    return tag("dl", [(tag("dt", str(key)), tag("dd", facts(value))) for key, value in tree.items()])


def section(anchor: str, title: str, *children: Child) -> Html:
    """A section that the navigation can reach."""
    return tag("section", tag("h2", title), children, id=anchor)


def absent(text: str) -> Html:
    """A piece that is not there, said where it would be."""
    return tag("p", text, class_="absent")


def page(title: str, sections: Sequence[Child], style: str = "") -> str:
    """The whole document; `style` is what a page needs beyond that of all."""
    policy = "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{policy}">'),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("meta", name="generator", content=f"wam {__version__}"),
        tag("title", title),
        tag("style", Html(STYLE + style)),
    )
    document = tag("html", head, tag("body", tag("main", sections)), lang="en")
    return f"<!doctype html>\n{document}\n".encode("ascii", "xmlcharrefreplace").decode()  # the same bytes in any locale


STYLE = """
:root { color-scheme: light dark; --ink:#24292f; --faint:#5b646e; --line:#d5dbe1; --paper:#ffffff; --card:#f6f8fa; --good:#009e73; --bad:#d55e00; --accent:#0072b2; }
@media (prefers-color-scheme: dark) { :root { --ink:#e4e9ee; --faint:#9aa5b1; --line:#39424d; --paper:#12161b; --card:#1a2027; --good:#1fb88c; --bad:#ef7d2d; --accent:#56b4e9; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 66rem; margin: 0 auto; padding: 2.2rem 1.2rem 4rem; }
h1 { font-size: clamp(1.6rem, 5vw, 2.3rem); line-height: 1.2; margin: .1rem 0 1.2rem; overflow-wrap: anywhere; }
h2 { font-size: 1.35rem; margin: 3rem 0 .8rem; padding-top: .9rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.02rem; margin: 1.6rem 0 .4rem; }
p { margin: .5rem 0; max-width: 46rem; }
a { color: var(--accent); }
.eyebrow, .note, caption, figcaption, dt, nav { color: var(--faint); font-size: .9rem; }
.eyebrow { margin: 0; letter-spacing: .02em; }
nav { display: flex; flex-wrap: wrap; gap: .3rem 1.1rem; margin-top: 1.3rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); gap: .8rem; margin: 0; padding: 0; list-style: none; }
.tiles li { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .8rem 1rem; }
.tiles b { display: block; font-size: 1.75rem; line-height: 1.25; font-variant-numeric: tabular-nums; }
.tiles span { display: block; color: var(--faint); font-size: .9rem; }
.wide { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding: 0 0 .6rem; max-width: 46rem; }
th, td { text-align: right; padding: .42rem .7rem; vertical-align: middle; font-weight: 400; white-space: nowrap; }
th[scope=row], thead th:first-child { text-align: left; padding-left: 0; }
th[scope=row] { font-weight: 600; }
table:has(.changes) thead th:last-child { text-align: left; }
thead th { color: var(--faint); font-size: .88rem; border-bottom: 1px solid var(--ink); }
tbody tr + tr > * { border-top: 1px solid var(--line); }
tbody + tbody { border-top: 2px solid var(--ink); background: var(--card); }
tbody + tbody th[scope=row] { font-weight: 400; font-style: italic; padding-left: .4rem; }
.bar { position: relative; display: inline-block; width: 11rem; height: 1.05rem; background: var(--card); border: 1px solid var(--line); border-radius: .2rem; vertical-align: middle; }
.bar i { position: absolute; top: 28%; bottom: 28%; background: var(--accent); opacity: .5; border-radius: .1rem; min-width: 2px; }
.bar b { position: absolute; top: 0; bottom: 0; width: 3px; margin-left: -1.5px; background: var(--ink); }
.bar.share i { opacity: .8; left: 0; }
.range { display: inline-block; min-width: 5.6rem; margin-right: .7rem; }
.swatch { display: inline-block; width: .7em; height: .7em; border-radius: 50%; margin-right: .5em; }
.absent { border-left: 3px solid var(--bad); padding: .3rem .8rem; background: var(--card); color: var(--faint); max-width: none; overflow-wrap: anywhere; }
figure { margin: 1rem 0; }
figcaption { margin-top: .35rem; }
.plot { overflow-x: auto; }
.plot svg { display: block; width: 100%; height: auto; min-width: 38rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); gap: 1.6rem 1.4rem; }
.cards article { display: grid; grid-template-rows: subgrid; grid-row: span 4; row-gap: 0; }
.cards article > h3 { margin: 0 0 .15rem; }
.cards p { font-size: .92rem; margin: .15rem 0; }
.cards svg { display: block; width: 100%; height: auto; }
.clips { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr)); gap: 1rem; }
.clips figure { margin: 0; }
.clips.broad { grid-template-columns: repeat(auto-fill, minmax(min(28rem, 100%), 1fr)); }
video, .still { max-width: 100%; display: block; border-radius: .3rem; background: var(--card); }
video { width: 100%; max-height: 24rem; }
.strip { display: flex; flex-wrap: wrap; gap: 3px; list-style: none; margin: .2rem 0 0; padding: 0; }
.strip li { width: 13.5px; height: 13.5px; border-radius: 3px; font: 700 10px/10.5px system-ui, sans-serif; text-align: center; }
.strip .ok { background: var(--good); }
.strip .no { border: 1.5px solid var(--bad); color: var(--bad); }
.strips { display: grid; grid-template-columns: max-content 1fr; gap: .55rem 1rem; align-items: start; }
.strips > span { font-variant-numeric: tabular-nums; }
.strips small { color: var(--faint); }
details { margin: .7rem 0; }
summary { cursor: pointer; color: var(--accent); }
pre { background: var(--card); border: 1px solid var(--line); border-radius: .4rem; padding: .8rem 1rem; overflow-x: auto; font-size: .85rem; line-height: 1.45; }
code { font-size: .9em; background: var(--card); padding: .05em .3em; border-radius: .2em; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.2rem; margin: .3rem 0; }
dd { margin: 0; overflow-wrap: anywhere; min-width: 0; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(18rem, 1fr)); gap: .5rem 2rem; }
@media (max-width: 40rem) {
  thead { display: none; }
  table, tbody, tr, th[scope=row], td, caption { display: block; }
  tr { padding: .6rem 0; }
  th[scope=row], tbody + tbody th[scope=row] { font-size: 1.05rem; padding: 0 .4rem .2rem; }
  td { display: flex; justify-content: space-between; align-items: center; gap: 1rem; border: 0 !important; padding: .12rem .4rem; }
  td::before { content: attr(data-label); color: var(--faint); }
  td.none { display: none; }
  .bar { width: 7.5rem; }
  .strips { grid-template-columns: 1fr; gap: .15rem; }
  .strips > ol { margin-bottom: .8rem; }
}
@media print { nav, video { display: none; } }
"""
