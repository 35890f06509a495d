"""What keeps one bad batch from ruining a run: it is put on disk, its step is left out, and too many of them end the run with a diagnosis.

    loss not finite, or > explode_factor x its running median    ->  no update: weights, EMA and optimiser stay as they are
    gradient norm likewise                                       ->  the same, on every process, since both numbers are everyone's
    more than max_skipped of the last `window` steps             ->  `Unstable`: which episodes, dimensions and modes recur, and what to do

    output/skipped/step-00000123/rank-00000.json           why; per sample its episode, start, mode, levels and errors; the largest values
                                 rank-00000.safetensors    the batch's tensors, with the level of every token (of the first `SAVED` steps)

Medians and counts are part of the state, so a run that was killed leaves out the same steps as one that was not.
"""

from __future__ import annotations

import json
import logging
import math
import statistics
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from wam.config_training import GuardsConfig
from wam.files import atomic_path, write_json_atomic

log = logging.getLogger(__name__)
SKIPPED = "skipped"
SAVED = 20  # steps whose batches are kept as tensors; of later ones only the description
ENOUGH = 20  # numbers that a median needs to be worth something
LARGE = 50.0  # a normalised value that no sound statistics give
NORMALISED = ("state", "action", "executed")


class Unstable(RuntimeError):
    """Too many steps had a loss or gradient that is not finite, or exploded; the message is the diagnosis."""


class Guard:
    """Judges a step's loss and gradient norm by those of the steps before.

    Args:
        remembered: what `to_dict` gave, of the run that goes on.
    """

    def __init__(self, config: GuardsConfig, remembered: Mapping[str, Any] | None = None):
        remembered = remembered or {}
        self.config = config
        self.losses: deque[float] = deque(remembered.get("losses", ()), maxlen=config.window)
        self.norms: deque[float] = deque(remembered.get("norms", ()), maxlen=config.window)
        self.skipped: list[int] = list(remembered.get("skipped", ()))
        self.total: int = remembered.get("total", len(self.skipped))

    def to_dict(self) -> dict[str, Any]:
        """What has to be remembered, for JSON."""
        return {"losses": list(self.losses), "norms": list(self.norms), "skipped": self.skipped, "total": self.total}

    def largest_loss(self) -> float:
        """The greatest loss that is accepted now."""
        return self._largest(self.losses)

    def largest_norm(self) -> float:
        """The greatest gradient norm that is accepted now."""
        return self._largest(self.norms)

    def judge(self, loss: float, norm: float) -> str | None:
        """Why a step must be left out; None where it may count."""
        for what, value, largest, past in (("loss", loss, self.largest_loss(), self.losses), ("gradient's norm", norm, self.largest_norm(), self.norms)):
            if not math.isfinite(value):
                return f"the {what} is {value}"
            if value > largest:
                return f"the {what} is {value:.4g}, {value / statistics.median(past):.0f} times the median of the last {len(past)} steps"
        return None

    def accept(self, loss: float, norm: float) -> None:
        """Take note of a step that counted."""
        self.losses.append(loss)
        self.norms.append(norm)

    def skip(self, step: int) -> bool:
        """Take note of a step that is left out; whether it is one too many."""
        self.skipped = [s for s in self.skipped if s > step - self.config.window] + [step]
        self.total += 1
        return len(self.skipped) > self.config.max_skipped

    def _largest(self, past: deque[float]) -> float:
        if self.config.explode_factor is None or len(past) < min(ENOUGH, self.config.window):
            return math.inf
        return self.config.explode_factor * statistics.median(past) or math.inf  # a median of 0: steps that supervise nothing


# ------------------------------------------------------------------------------------------------ evidence


def save_evidence(output: Path, step: int, rank: int, reason: str, batch: Mapping[str, Any], losses: Any, norms: Mapping[str, float]) -> Path:
    """Write a batch whose step is left out, and what is known of it; returns the folder.

    Args:
        losses: `wam.training.objective.Losses` of this process's samples.
        norms: gradient norms, by group.
    """
    folder = output / SKIPPED / f"step-{step:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"rank-{rank:05d}.safetensors"
    described = {"step": step, "rank": rank, "reason": reason, "samples": _samples(batch, losses), "largest": _largest_values(batch), "gradient_norms": {k: _plain(v) for k, v in norms.items()}}
    if len(list(path.parent.parent.glob(f"*/{path.name}"))) < SAVED:
        levels = {f"{part}_levels": getattr(losses, f"{part}_part").sigma_BU for part in ("video", "action")}
        tensors = {name: value.detach().cpu().contiguous() for name, value in {**batch, **levels}.items() if isinstance(value, Tensor)}
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, metadata={"format": "pt"})
    write_json_atomic(path.with_suffix(".json"), described)
    return folder


def _samples(batch: Mapping[str, Any], losses: Any) -> list[dict[str, Any]]:
    """Of each sample, whatever names it, its mode, and its mean errors and noise levels."""
    size = len(losses.modes)
    names = {k: v for k, v in batch.items() if (isinstance(v, list) and len(v) == size) or (isinstance(v, Tensor) and v.shape == (size,) and not v.is_floating_point())}
    figures: dict[str, list[float]] = {}
    for part in ("video", "action"):
        of = getattr(losses, f"{part}_part")
        figures[f"{part}_error"] = (of.sum_B / of.count_B.clamp_min(1)).detach().float().cpu().tolist()
        if of.sigma_BU is not None:
            figures[f"{part}_level"] = of.sigma_BU.detach().float().mean(1).cpu().tolist()
    rows = []
    for i in range(size):
        named = {k: v[i] if isinstance(v, list) else v[i].item() for k, v in names.items()}
        rows.append({**named, "mode": losses.modes[i], **{name: _plain(values[i]) for name, values in figures.items()}})
    return rows


def _largest_values(batch: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The largest normalised number of every key, with its sample and dimension; one that is not finite is the largest of all."""
    out = []
    for key in NORMALISED:
        value = batch.get(key)
        if isinstance(value, Tensor) and value.numel():
            size = torch.nan_to_num(value.detach().float().abs(), nan=math.inf)
            row, *_, dimension = torch.unravel_index(size.argmax(), size.shape)
            out.append({"key": key, "value": _plain(float(value.flatten()[size.argmax()])), "sample": int(row), "dimension": int(dimension)})
    return out


def _plain(value: float) -> float | str:
    """A number for JSON, which has no words for those that are not finite."""
    return value if math.isfinite(value) else str(value)


# ------------------------------------------------------------------------------------------------ diagnosis


def diagnosis(output: Path, steps: Iterable[int], config: GuardsConfig, rate: float) -> str:
    """What the batches of the steps that were left out have in common, and what to do about it.

    Args:
        rate: the learning rate now.
    """
    entries = [json.loads(path.read_text()) for step in steps for path in sorted((output / SKIPPED / f"step-{step:08d}").glob("rank-*.json"))]
    by_step = {entry["step"]: _kind(entry["reason"]) for entry in entries}
    rows = [row for entry in entries for row in entry["samples"]]
    suspects, broken = [row for row in rows if _broken(row)], True
    if not suspects:
        suspects, broken = rows, False
    told = [f"{len(by_step)} of the last {config.window} steps were left out (training.guards.max_skipped is {config.max_skipped}): {', '.join(f'{n} x {kind}' for kind, n in Counter(by_step.values()).items())}"]
    recurring = [f"{key} {value} {times} times" for key in ("embodiment", "episode", "mode") for value, times in _recurring(key, suspects)]
    if recurring:
        told.append(f"among their {len(suspects)} {'broken ' if broken else ''}samples: {', '.join(recurring)}")
    size, largest = max(((_size(v["value"]), _where(v, entry)) for entry in entries for v in entry["largest"]), default=(0.0, ""))
    told += [f"largest normalised value: {largest}"] if largest else []
    norms = {name: max(_size(entry["gradient_norms"].get(name, 0)) for entry in entries) for name in entries[0]["gradient_norms"]} if entries else {}
    told += [f"gradient norms by part, at their largest: {', '.join(f'{name} {value:.3g}' for name, value in norms.items())}"] if norms else []
    return f"{'; '.join(told)}. {_advice(size > LARGE, suspects, rate)} The batches are in {output / SKIPPED}"


def _kind(reason: str) -> str:
    return reason.partition(",")[0].rpartition(" is ")[0] + (" exploded" if "," in reason else " is not finite")


def _broken(row: Mapping[str, Any]) -> bool:
    return any(isinstance(row[f"{part}_error"], str) for part in ("video", "action"))


def _size(value: float | str) -> float:
    """How large a number from JSON is; one that is not finite is the largest of all."""
    return abs(float(value)) if not isinstance(value, str) else math.inf


def _where(value: Mapping[str, Any], entry: Mapping[str, Any]) -> str:
    row = entry["samples"][value["sample"]]
    return f"{value['key']} dimension {value['dimension']} is {value['value'] if isinstance(value['value'], str) else round(value['value'], 2)} in episode {row.get('episode')}, row {row.get('start')}"


def _recurring(key: str, rows: list[dict[str, Any]]) -> list[tuple[str, int]]:
    """The commonest value of a key, where it is in more samples than an even share; whose robot it is only where there are several."""
    values = Counter(str(row[key]) for row in rows if key in row)
    if len(values) <= (key == "embodiment"):
        return []
    value, times = values.most_common(1)[0]
    return [(value, times)] if times > 1 and (len(values) == 1 or times * len(values) > len(rows)) else []


def _advice(large: bool, suspects: list[dict[str, Any]], rate: float) -> str:
    episodes = Counter(row.get("episode") for row in suspects)
    episode, times = episodes.most_common(1)[0] if episodes else (None, 0)
    if large:
        return "That reading, or that dimension's statistics, are wrong: `wam check` shows which; repair it, or take the episode out of the dataset."
    if times > 1 and times > len(suspects) / 2:
        return f"Look at episode {episode} (`wam check`), and take it out of the dataset if it is broken."
    return f"No sample stands out, so look at the optimisation: lower training.learning_rate (now {rate:.2g}), raise training.warmup_steps, or try training.precision=fp32; to go on from an older state, delete the newer ones."
