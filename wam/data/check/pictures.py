"""Checks of cameras: pictures that are black, frozen, turned, swapped or the same twice.

No program can say which way up a camera should be, so a person must look at the contact sheet, and is told so.  What can be told is an
episode that differs from the rest: every episode's mean picture is compared with the median over the others, as it is, turned, mirrored,
and with that of the other cameras.
"""

from __future__ import annotations

from collections import defaultdict
from itertools import combinations

import numpy as np

from wam.data.check.evidence import Clip, Evidence
from wam.data.check.findings import Finding, some

DARK, STILL = 4.0, 0.02  # of 255: mean brightness of a black picture, change of grey that a frozen one keeps below in nine rows of ten
MARGIN, GOOD = 0.2, 0.5  # how much better (in correlation) another explanation must be than the plain one, and how good in itself
SAME = 0.999  # correlation of two cameras that show the same
TURNS = {"upside down": lambda x: x[::-1], "turned by half": lambda x: x[::-1, ::-1], "mirrored": lambda x: x[:, ::-1]}


def look(evidence: Evidence) -> list[Finding]:
    """Asks a person to look at the contact sheet."""
    if not evidence.clips:
        return []
    return [
        Finding(
            "info",
            "look",
            ", ".join(evidence.clips),
            f"{sum(map(len, evidence.clips.values()))} episodes on the contact sheet",
            "the right way up, every camera under its own name and in the order of data.cameras",
            "look at them: no program can tell",
        )
    ]


def pictures(evidence: Evidence) -> list[Finding]:
    """Sizes that differ from the metadata; black and frozen pictures."""
    found = []
    for camera, clips in evidence.clips.items():
        declared = _declared(evidence, camera)
        sizes = sorted({clip.shape for clip in clips})
        if declared and sizes != [declared]:
            found.append(
                Finding(
                    "warning",
                    "pictures",
                    camera,
                    f"frames of {', '.join(f'{h}x{w}' for h, w in sizes)}",
                    f"{declared[0]}x{declared[1]} as meta/info.json says",
                    "correct its shape, or encode the videos again",
                )
            )
        black = [clip.episode for clip in clips if clip.picture.mean() < DARK and clip.picture.std() < DARK]
        frozen = [
            clip.episode
            for clip in clips
            if clip.episode not in black and len(clip.energy) and np.quantile(clip.energy, 0.9) < STILL and _moves(evidence, clip)
        ]
        for episodes, words in ((black, "black"), (frozen, "one and the same frame although the state moves")):
            if episodes:
                found.append(
                    Finding(
                        "error",
                        "pictures",
                        camera,
                        f"the episodes {some(episodes)} are {words}",
                        "a picture that moves",
                        "leave these episodes out, or record them again",
                    )
                )
    return found


def _declared(evidence: Evidence, camera: str) -> tuple[int, int] | None:
    """(H, W) that the metadata gives; frames are written as (H, W, 3), by some as (3, H, W)."""
    shape = evidence.dataset.camera(camera).shape
    if len(shape) != 3:
        return None
    return (shape[1], shape[2]) if shape[0] in (1, 3) else (shape[0], shape[1])


def _moves(evidence: Evidence, clip: Clip) -> bool:
    """Whether the state changes in most rows: a robot that waits is no broken camera."""
    return bool(evidence.state) and bool((np.abs(np.diff(evidence.state[clip.episode], axis=0)).max(1) > 1e-5).mean() > 0.5)


def turned(evidence: Evidence) -> list[Finding]:
    """Episodes that fit the rest of their camera better upside down, turned or mirrored."""
    found = []
    for camera, clips in evidence.clips.items():
        odd: dict[str, list[int]] = defaultdict(list)
        for clip in clips:
            rest = _rest(clips, clip.episode)
            if rest is None:
                continue
            upright = _alike(clip.picture, rest)
            scores = {name: _alike(np.ascontiguousarray(turn(clip.picture)), rest) for name, turn in TURNS.items()}
            name = max(scores, key=lambda n: scores[n])
            if scores[name] > max(GOOD, upright + MARGIN):
                odd[name].append(clip.episode)
        for name, episodes in odd.items():
            found.append(
                Finding(
                    "warning",
                    "turned",
                    camera,
                    f"the episodes {some(episodes)} look {name} beside the rest",
                    "one way up",
                    "look at the contact sheet, and turn them when they are converted",
                )
            )
    return found


def order(evidence: Evidence) -> list[Finding]:
    """Two cameras that show the same, and episodes in which two cameras have changed places."""
    found = []
    for a, b in combinations(evidence.clips, 2):
        first, second = ({clip.episode: clip for clip in evidence.clips[c]} for c in (a, b))
        both = sorted(first.keys() & second.keys())
        same = [e for e in both if _alike(first[e].picture, second[e].picture) > SAME]
        if both and len(same) == len(both):
            found.append(
                Finding(
                    "error",
                    "order",
                    f"{a} and {b}",
                    "the same pictures in every episode",
                    "two views",
                    "one of them is a copy: correct the conversion, or name one camera only",
                )
            )
            continue
        swapped = [e for e in both if _swapped(evidence, a, b, first[e], second[e])]
        if swapped:
            found.append(
                Finding(
                    "warning",
                    "order",
                    f"{a} and {b}",
                    f"have changed places in the episodes {some(swapped)}",
                    "the same camera under the same name",
                    "look at the contact sheet, and swap them back",
                )
            )
    return found


def _swapped(evidence: Evidence, a: str, b: str, first: Clip, second: Clip) -> bool:
    rest_a, rest_b = _rest(evidence.clips[a], first.episode), _rest(evidence.clips[b], second.episode)
    if rest_a is None or rest_b is None:
        return False
    crossed = _alike(first.picture, rest_b), _alike(second.picture, rest_a)
    plain = _alike(first.picture, rest_a), _alike(second.picture, rest_b)
    return all(c > max(GOOD, p + MARGIN) for c, p in zip(crossed, plain, strict=True))


def _rest(clips: list[Clip], episode: int) -> np.ndarray | None:
    """The median picture of the other episodes: one odd one cannot change it.  None with fewer than three."""
    others = [clip.picture for clip in clips if clip.episode != episode]
    return np.median(others, axis=0) if len(others) >= 3 else None


def _alike(a: np.ndarray, b: np.ndarray) -> float:
    """Correlation of two pictures, whatever their brightness and contrast."""
    if a.std() < 1 or b.std() < 1:
        return 0.0
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])
