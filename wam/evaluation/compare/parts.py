"""Small pieces of the page: numbers with their units, intervals as bars, the five answers as lanes.

    training   [ seen ] [ video ] [ actions ]        what the network is asked for
    acting     [ seen ] ------->  [ actions ]        what it computes before the robot moves
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from wam.evaluation.page import NOTHING, Child, Html, tag
from wam.figures import MODE_STYLES

LANES: dict[str, tuple[Sequence[str], Sequence[str]]] = {  # mode: what training predicts, what acting computes; + is side by side
    "action_only": (("seen", "actions"), ("seen", "actions")),
    "skip": (("seen", "video", "+", "actions"), ("seen", "actions")),
    "joint": (("seen", "video", "+", "actions"), ("seen", "video", "+", "actions")),
    "joint_mutual": (("seen", "video", "+", "actions"), ("seen", "video", "+", "actions")),
    "imagine": (("seen", "video", "actions"), ("seen", "video", "actions")),
    "forward": (("seen", "actions", "video"), ()),
}
STYLE = """
.lane { display: flex; align-items: center; gap: .3rem; margin: .3rem 0; font-size: .8rem; }
.lane > small { width: 3.6rem; color: var(--faint); }
.lane b { font-weight: 600; padding: .05rem .5rem; border-radius: .8rem; border: 1.5px solid var(--line); }
.lane b.video { background: #0072b2; border-color: #0072b2; color: #fff; }
.lane b.actions { background: #d55e00; border-color: #d55e00; color: #fff; }
.lane i { color: var(--faint); font-style: normal; }
#results table, #disturbances table { font-size: .92rem; }
#results thead th, #disturbances thead th { white-space: normal; vertical-align: bottom; }
#disturbances td, #disturbances th { padding-left: .35rem; padding-right: .35rem; }
#results .bar { width: 6.2rem; }
#results .range { min-width: 3rem; margin-right: .4rem; }
#results td, #results th { padding-left: .35rem; padding-right: .35rem; }
.said { margin: .6rem 0; padding: .1rem 0 .1rem 1.1rem; max-width: 50rem; }
.said li { margin: .45rem 0; }
.said small { color: var(--faint); }
.verdict { font-size: 1.08rem; border-left: 4px solid var(--accent); padding: .2rem 0 .2rem 1rem; max-width: 50rem; margin: 1rem 0; }
td.wrap, .changes { white-space: normal; text-align: left; }
.changes { min-width: 15rem; font-size: .85rem; overflow-wrap: anywhere; }
.changes code { display: block; background: none; padding: 0; }
.stills { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: .35rem .9rem; align-items: center; }
.stills > span { font-size: .9rem; }
@media (max-width: 40rem) { .stills { grid-template-columns: minmax(0, 1fr); gap: .1rem; } .stills > img { margin-bottom: .5rem; } .changes { min-width: 0; text-align: right; } }
"""


def number(value: Any, digits: int = 0, unit: str = "") -> str:
    """A number with its unit, or a dash where there is none."""
    return f"{value:,.{digits}f}{unit}" if isinstance(value, (int, float)) and not isinstance(value, bool) else NOTHING


def count(entry: Mapping[str, Any]) -> str:
    """Successes of episodes."""
    return f"{entry['successes']}/{entry['episodes']}"


def interval(entry: Mapping[str, Any]) -> str:
    """The 95% interval of a rate."""
    return f"{100 * entry['wilson_low']:.0f}{NOTHING}{100 * entry['wilson_high']:.0f}%"


def rate_bar(entry: Mapping[str, Any]) -> Html:
    """Successes of episodes, and their interval as a band around the rate."""
    low, high, rate = 100 * entry["wilson_low"], 100 * entry["wilson_high"], 100 * entry["successes"] / max(1, entry["episodes"])
    band = tag("i", style=f"left:{low:.1f}%;width:{high - low:.1f}%")
    return tag("span", tag("span", count(entry), class_="range"), tag("span", band, tag("b", style=f"left:{rate:.1f}%"), class_="bar", title=f"{count(entry)}, 95% interval {interval(entry)}"))


def swatch(mode: str, color: str | None = None) -> Html:
    """The mode's colour."""
    return tag("i", class_="swatch", style=f"background:{color or MODE_STYLES[mode][0]}")


def flops(value: Any, unit: str = "FLOP") -> str:
    """Operations with a fitting prefix."""
    if not isinstance(value, (int, float)):
        return NOTHING
    for size, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= size:
            return f"{value / size:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"


def lanes(mode: str) -> Html:
    """What the network predicts in training, and what it computes when the robot acts."""
    return tag("div", [_lane(name, steps) for name, steps in zip(("training", "acting"), LANES[mode], strict=True) if steps])


def _lane(name: str, steps: Sequence[str]) -> Html:
    chips: list[Child] = [tag("small", name)]
    for i, step in enumerate(steps):
        if step == "+":
            chips.append(tag("i", "+"))
            continue
        if i and steps[i - 1] != "+":
            chips.append(tag("i", "\u2192"))
        chips.append(tag("b", step, class_=step))
    return tag("div", chips, class_="lane")
