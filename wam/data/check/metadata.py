"""Checks of what stands beside the data: instructions, statistics, and the weights that adapters belong to."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from wam.data.check.evidence import Evidence, read_json
from wam.data.check.findings import Finding, Level, some
from wam.data.lerobot import TASKS, Episode
from wam.data.normalize import SMALLEST_RANGE, Normalizer

STATS = "meta/stats.json"
PLACEHOLDERS = frozenset(
    {
        "",
        "task",
        "default",
        "default task",
        "dummy",
        "test",
        "todo",
        "none",
        "null",
        "nan",
        "na",
        "n a",
        "unknown",
        "instruction",
        "no instruction",
        "placeholder",
        "language",
        "text",
        "demo",
        "episode",
        "pick",
    }
    | {"do the task", "perform the task", "do something", "your task description", "lorem ipsum"}
)
MEAN, SPREAD, QUANTILE = 0.1, 0.1, 0.1  # of the deviation or range: how far stored statistics may be off
OUTSIDE = 0.05  # share of numbers that a checkpoint's normaliser may clip


def language(evidence: Evidence) -> list[Finding]:
    """Instructions that are missing at some rows, or say nothing."""
    texts: dict[int, tuple[str, ...]] = {}
    unread, other = [], []
    for episode in evidence.dataset.episodes:
        try:
            texts[episode.index] = evidence.dataset.words(episode.index).texts
            if not _column_agrees(evidence, episode):
                other.append(episode.index)
        except (ValueError, OSError) as error:
            unread.append((episode.index, str(error)))
    found = []
    if unread:
        words = f"no instruction can be read in the episodes {some(e for e, _ in unread)}: {unread[0][1]}"
        found.append(Finding("error", "language", "tasks", words, "an instruction at every row", "write them, or leave these episodes out"))
    if other:
        words = f"the column {TASKS} says otherwise than the episode table in the episodes {some(other)}"
        found.append(
            Finding("error", "language", TASKS, words, "one instruction", "correct one of them: training here takes the table's, LeRobot the column's")
        )
    said = {text for those in texts.values() for text in those}
    empty = {text for text in said if _says_nothing(text)}
    if empty:
        level: Level = "error" if empty == said else "warning"
        whose = "every episode" if empty == said else f"the episodes {some(e for e, those in texts.items() if empty & set(those))}"
        words = f"the instruction of {whose} is {' or '.join(map(repr, sorted(empty)))}"
        found.append(Finding(level, "language", "tasks", words, "what the robot should do, in words", "write instructions in meta/tasks and meta/episodes"))
    elif len(said) == 1:
        words = f"one instruction for all episodes: {next(iter(said))!r}"
        found.append(Finding("info", "language", "tasks", words, "an instruction for each task", "fine for one task; the policy will not listen to another"))
    return found


def _column_agrees(evidence: Evidence, episode: Episode) -> bool:
    """Whether the rows' task index leads to the instructions that the episode table lists; true where there is no such column, or language is elsewhere."""
    dataset = evidence.dataset
    if TASKS not in dataset.features or dataset.language != (TASKS,):
        return True
    numbers = np.unique(dataset.read(episode.index, TASKS)).tolist()
    return {dataset.tasks.get(int(number)) for number in numbers} <= set(episode.tasks)


def _says_nothing(text: str) -> bool:
    plain = " ".join(re.sub(r"[^\w]+|_", " ", text.lower()).split())
    return re.sub(r"\s*\d+$", "", plain) in PLACEHOLDERS or not re.search(r"[^\W\d_]{2}", text)


def statistics(evidence: Evidence) -> list[Finding]:
    """`meta/stats.json`, and the normaliser of a checkpoint that training goes on from, against the rows themselves."""
    found: list[Finding] = []
    path = evidence.dataset.root / STATS
    try:
        stored = read_json(path)
    except ValueError as error:
        return [Finding("error", "statistics", STATS, str(error), "JSON", "write it again, or delete it: training here computes its own")]
    if stored is None:
        found.append(Finding("info", "statistics", STATS, "there is none", "stored statistics", "training here computes its own; other programs may need it"))
    for key, rows in evidence.numbers().items():
        rows = rows[np.isfinite(rows).all(1)]
        if len(rows) and isinstance(stored, dict) and isinstance(stored.get(key), dict):
            found += _compare(key, stored[key], rows, evidence)
    return found + _normalizer(evidence)


def _compare(key: str, stored: dict[str, Any], rows: np.ndarray, evidence: Evidence) -> list[Finding]:
    """One finding a column: which statistics are off, and the first of them with its numbers."""
    deviation, span = np.maximum(rows.std(0), SMALLEST_RANGE), np.maximum(np.ptp(rows, axis=0), SMALLEST_RANGE)
    real = {"mean": (rows.mean(0), MEAN * deviation), "std": (rows.std(0), SPREAD * deviation)}
    real |= {"min": (rows.min(0), 0.01 * span), "max": (rows.max(0), 0.01 * span)}
    real |= {name: (np.quantile(rows, q, axis=0), QUANTILE * span) for name, q in (("q01", 0.01), ("q99", 0.99))}
    off: dict[str, str] = {}
    for name, (value, tolerance) in real.items():
        if name not in stored:
            continue
        said = _vector(stored[name])
        if said.shape != value.shape:
            return [
                Finding(
                    "error",
                    "statistics",
                    f"{STATS}, {key}",
                    f"{name} has {said.size} numbers",
                    f"{value.size}",
                    "compute the statistics again: these are of other columns",
                )
            ]
        bad = np.flatnonzero(~(np.abs(said - value) <= tolerance))
        if len(bad):
            d = int(bad[0])
            off[name] = f"{evidence.name(key, d)} has the {name} {said[d]:.5g} where the rows have {value[d]:.5g}"
    if not off:
        return []
    level: Level = "warning" if off.keys() <= {"q01", "q99"} else "error"  # LeRobot stores the least and greatest of the episodes' own percentiles
    words = f"{', '.join(off)} {'is' if len(off) == 1 else 'are'} not the data's: {next(iter(off.values()))}"
    return [
        Finding(
            level, "statistics", f"{STATS}, {key}", words, "statistics over all rows", "compute them again; training here does not read them, other programs do"
        )
    ]


def _vector(value: Any) -> np.ndarray:
    """A statistic as a vector; empty where it is no list of numbers."""
    try:
        return np.asarray(value, float).reshape(-1)
    except (TypeError, ValueError):
        return np.empty(0)


def _normalizer(evidence: Evidence) -> list[Finding]:
    """A policy that goes on with the normaliser of another robot clips what it does not know."""
    if evidence.checkpoint is None:
        return []
    from wam.pretrained import NORMALIZER  # takes seconds: only where there is a checkpoint

    path = evidence.checkpoint / NORMALIZER
    if not path.is_file():
        return []
    units = evidence.units
    try:
        found, normalizer = [], Normalizer.load(path, units.robot.name)
    except ValueError as error:
        return [Finding("error", "statistics", str(path), str(error), f"statistics of {units.robot.name!r}", "go on from a checkpoint of this robot, or fit new statistics")]
    for name, episodes, width in (("state", evidence.state, units.robot.raw_state_dim), ("action", evidence.action, units.robot.raw_action_dim)):
        if not episodes or name not in normalizer.keys or episodes[0].shape[1] != width:
            continue
        if getattr(units, f"{name}_dim") != normalizer.dim(name):
            found.append(
                Finding(
                    "error",
                    "statistics",
                    str(path),
                    f"{name} has {normalizer.dim(name)} dimensions",
                    f"{getattr(units, f'{name}_dim')}, as the dataset",
                    "go on from a checkpoint of this robot, or fit new statistics",
                )
            )
            continue
        limit = normalizer.clip or 5.0
        outside = _outside(evidence, name, normalizer, limit)
        bad = np.flatnonzero(outside > OUTSIDE)
        if len(bad):
            words = f"{outside[bad].max():.0%} of the rows lie beyond {limit:g} times the scale"
            found.append(
                Finding(
                    "error",
                    "statistics",
                    f"{path}, {name}[{some(bad.tolist())}]",
                    words,
                    f"at most {OUTSIDE:.0%}",
                    "these statistics belong to other data: fit new ones",
                )
            )
    return found


def _outside(evidence: Evidence, name: str, normalizer: Normalizer, limit: float) -> np.ndarray:
    """(D,) share of the rows, in network units, beyond `limit` times the scale."""
    rows: list[dict[str, np.ndarray]] = [{"state": s, "action": a} for s, a in zip(evidence.state or evidence.action, evidence.action or evidence.state, strict=True)]
    stats, shares = normalizer.keys[name], []
    for part in getattr(evidence.units, name):
        if part.relative and not evidence.state:
            shares.append(np.zeros(part.seen.stop - part.seen.start))
            continue
        seen = evidence.units.all_rows(name, part, rows, evidence.config.timeline)
        center, scale = (np.array(values)[part.seen] for values in (stats.center, stats.scale))
        shares.append((np.abs((seen - center) / scale) > limit).mean(0))
    return np.concatenate(shares)


def lora_base(evidence: Evidence) -> list[Finding]:
    """Adapters of the checkpoint that training goes on from, against the backbone that the config names."""
    if evidence.checkpoint is None:
        return []
    from wam.model.lora import read_adapter
    from wam.pretrained import ADAPTER

    folder, model = evidence.checkpoint / ADAPTER, evidence.config.model
    if not folder.is_dir():
        return []
    described, _ = read_adapter(folder)
    if model.pretrained is None:
        return [
            Finding(
                "error",
                "lora_base",
                str(folder),
                "adapters, but model.pretrained is null",
                f"the weights they were trained on ({described.get('base_model_name_or_path')})",
                "set model.pretrained to these",
            )
        ]
    found = []
    identity = _identity(model.pretrained)
    if identity is None:
        found.append(
            Finding(
                "warning",
                "lora_base",
                model.pretrained,
                "its weights are not on this machine",
                f"the weights with sha256 {described['base_sha256']}",
                "download them, and check again",
            )
        )
    elif identity != described["base_sha256"]:
        found.append(
            Finding(
                "error",
                "lora_base",
                model.pretrained,
                f"sha256 {identity}",
                f"{described['base_sha256']}, which the adapters in {folder} were trained on ({described.get('base_model_name_or_path')})",
                "set model.pretrained to that base",
            )
        )
    return found


def _identity(pretrained: str) -> str | None:
    """`wam.model.lora.base_identity` of a backbone, from its files: no model is built.  None where they are not on this machine."""
    from wam.model.loading import StoredBackbone
    from wam.shards import identity_of

    if not Path(pretrained).exists():
        return None
    stored = StoredBackbone.at(pretrained)
    return identity_of(stored.reader(), stored.own)
