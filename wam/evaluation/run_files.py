"""What a run directory holds, read without trust: only `results.json` must be there.

Every other file may be missing, cut off or made by hand, so reading gives what is there and says what is wrong with the rest.  Videos are
chosen here as well, because what fits into one page depends on all of them: every mode shows its first before any shows its second.

    run/results.json                     headline, tables, commands, versions, machine, config
    run/train/log.jsonl                  learning curves
    run/rollout/rollout.json, videos/    outcome of every seed; closed-loop clips and stills, <mode>_<seed>.mp4 and .png
    run/imagine/imagine.json, *.mp4      which pixels are judged; imagined clips and stills
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from wam.evaluation.horizon import FIGURE
from wam.relations import MODES

RESULTS = "results.json"
MEDIA_BUDGET = 10_500_000  # bytes of videos and stills once encoded as text; the page with its figures stays under 12 MB


@dataclass(frozen=True)
class Run:
    """What a run directory holds.

    Attributes:
        root: the directory.
        results: `results.json`.
        episodes: of every mode and sanity row, as `rollout.json` lists them; empty where it is not there.
        imagine: `imagine.json`, or empty.
        problems: of the optional JSON files, by name.
        embedded: videos and stills that fit into the page.
    """

    root: Path
    results: Mapping[str, Any]
    episodes: Mapping[str, Sequence[Mapping[str, Any]]]
    imagine: Mapping[str, Any]
    problems: Mapping[str, str]
    embedded: frozenset[Path]

    @property
    def task(self) -> str:
        """The task's name."""
        return str(self.results.get("task", "unnamed task"))

    def section(self, name: str) -> dict[str, Any]:
        """A section of `results.json`, empty where it is missing."""
        value = self.results.get(name)
        return value if isinstance(value, dict) else {}

    def entries(self, name: str) -> dict[str, dict[str, Any]]:
        """A section of named rows, such as `modes`."""
        return {key: row for key, row in self.section(name).items() if isinstance(row, dict)}


def read_run(run: Path, budget: int = MEDIA_BUDGET) -> Run:
    """Read a run directory; only `results.json` must be there.

    Raises:
        FileNotFoundError: there is no `results.json`.
        ValueError: it is not a JSON object.
    """
    path = run / RESULTS
    if not path.is_file():
        raise FileNotFoundError(f"no {path}; `wam demo --output {run}` writes it (`make demo` does so in runs/demo)")
    results, problem = _read_object(path)
    if problem:
        raise ValueError(f"{problem}; expected the object that `wam demo` writes, so run `wam demo --output {run}` again")
    rollout, rollout_problem = _read_object(run / "rollout" / "rollout.json")
    imagine, imagine_problem = _read_object(run / "imagine" / "imagine.json")
    problems = {name: text for name, text in (("rollout", rollout_problem), ("imagine", imagine_problem)) if text}
    media = [*media_groups(run / "rollout" / "videos").values(), *media_groups(run / "imagine").values()]
    return Run(run, results, _episode_lists(rollout) or _episode_lists(results), imagine, problems, choose_media(media, budget))


def _read_object(path: Path) -> tuple[dict[str, Any], str]:
    """A JSON object and an empty text, or an empty object and what is wrong."""
    if not path.is_file():
        return {}, f"{path.parent.name}/{path.name} is not there"
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        return {}, f"{path} is not JSON ({error})"
    return (value, "") if isinstance(value, dict) else ({}, f"{path} holds a {type(value).__name__}")


def _episode_lists(rollout: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The `episode_results` (or a list `episodes`) of every mode and baseline, in the order of their seeds."""
    found = {}
    for group in (rollout.get("modes"), rollout.get("baselines")):
        for name, entry in group.items() if isinstance(group, dict) else ():
            rows = entry.get("episode_results", entry.get("episodes")) if isinstance(entry, dict) else None
            if isinstance(rows, list) and rows and all(isinstance(r, dict) and {"seed", "success"} <= r.keys() for r in rows):
                found[name] = sorted(rows, key=lambda r: r["seed"])
    return found


def media_groups(folder: Path) -> dict[str, list[Path]]:
    """Videos, and stills without a video, by the mode their name starts with; each video stands for the still beside it."""
    groups: dict[str, list[Path]] = {}
    if not folder.is_dir():
        return groups
    stems = sorted({p.with_suffix("") for p in folder.iterdir() if p.suffix in (".mp4", ".png") and not p.name.startswith(".") and p.name != FIGURE})  # the page draws that itself
    longest_first = sorted(MODES, key=len, reverse=True)
    for stem in stems:
        mode = next((m for m in longest_first if stem.name == m or stem.name.startswith(f"{m}_")), "other")
        groups.setdefault(mode, []).append(stem)
    order = [*MODES, "other"]
    return {mode: groups[mode] for mode in order if mode in groups}


def choose_media(groups: Sequence[Sequence[Path]], budget: int) -> frozenset[Path]:
    """The files (groups hold stems) that fit into `budget` bytes as base64: the first video of every group, then the second, then stills."""
    turns = [stem for turn in zip_longest(*groups) for stem in turn if stem is not None]
    chosen = set()
    for suffix in (".mp4", ".png"):
        for path in (stem.parent / (stem.name + suffix) for stem in turns):
            size = (path.stat().st_size + 2) // 3 * 4 if path.is_file() else budget + 1
            if size <= budget:
                chosen.add(path)
                budget -= size
    return frozenset(chosen)
