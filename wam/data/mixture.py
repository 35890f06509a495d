"""Several datasets as one: paired episodes of robots, video of anyone, actions without pictures, in one run and in one batch.

    place       0 1 2 3 4 5 6 7 | 8 ...                  samples of the whole run, in order: step 3 of batch 4 takes places 12..15
    dataset     a b a a c a b a | b ...                  in every cycle each dataset has its quota, by weight, in an order drawn anew
    window      a's 0th, b's 0th, a's 1st, ...           a dataset's own row of permutations: each window once in each of its epochs

Which window stands at a place is computed from the place, the seed and the sizes: quotas are differences of rounded sums, so a dataset's
share after any number of cycles is its weight's to within one sample, and no count has to be kept.  Workers, ranks and restarts do not matter.

Every robot has statistics of its own, over all its paired and action-only datasets.  What a dataset does not hold is absent and marked:
`has_video` and `has_action` say what of a sample may be looked at and learnt from.
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from wam.config import Config, DataConfig
from wam.data.dataset import Draw, Sample, WindowDataset
from wam.data.lerobot import DatasetError, Split
from wam.data.normalize import Normalizer, by_embodiment
from wam.data.sampler import WindowSampler

log = logging.getLogger(__name__)
CYCLE = 256  # places over which quotas hold, at least; more where a weight is so small that its quota would be below two


class MixtureDataset(Dataset[Sample]):
    """Windows of several datasets, one after the other.

    Attributes:
        parts: the datasets, by name.
    """

    def __init__(self, parts: dict[str, WindowDataset]):
        self.parts = parts
        self._parts = list(parts.values())
        self._ends = np.cumsum([len(part) for part in self._parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int | Draw) -> Sample:
        if isinstance(index, Draw):
            part, window = self.locate(index.index)
            return part[index._replace(index=window)]
        part, window = self.locate(index)
        return part[window]

    def locate(self, index: int) -> tuple[WindowDataset, int]:
        """The dataset that a window is of, and its index there.

        Raises:
            IndexError: there is no such window.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        part = int(np.searchsorted(self._ends, index, side="right"))
        return self._parts[part], index - (int(self._ends[part - 1]) if part else 0)

    @property
    def instructions(self) -> list[str]:
        """What is asked in any of the datasets, each once, sorted."""
        return sorted({text for part in self._parts for text in part.instructions})

    @property
    def source(self) -> dict[str, Any]:
        """Where the data comes from, for a checkpoint to say."""
        return {"mixture": [{**part.source, "name": name, "contents": part.data.contents, "weight": part.data.weight} for name, part in self.parts.items()]}


# ------------------------------------------------------------------------------------------------ order


@dataclass(frozen=True)
class Quotas:
    """Which dataset each place of a run takes from.

    Attributes:
        weights: of the datasets, any positive numbers.
        seed: of the order within cycles.
    """

    weights: tuple[float, ...]
    seed: int

    @property
    def cycle(self) -> int:
        """Places in a cycle."""
        return max(CYCLE, math.ceil(2 * sum(self.weights) / min(self.weights)))

    def before(self, cycle: int) -> np.ndarray:
        """(datasets,) how many places each has before a cycle: differences of rounded running sums, so they add up."""
        shares = np.cumsum(self.weights) / sum(self.weights)
        shares[-1] = 1.0
        return np.diff(np.floor(shares * (cycle * self.cycle) + 0.5).astype(np.int64), prepend=0)

    def order(self, cycle: int) -> np.ndarray:
        """(places of a cycle,) the dataset of each."""
        counts = self.before(cycle + 1) - self.before(cycle)
        rng = np.random.Generator(np.random.Philox(key=self.seed, counter=[0, 1, 0, cycle]))
        return rng.permutation(np.repeat(np.arange(len(counts)), counts))


class MixtureSampler(WindowSampler):
    """Batches of window indices by step, of datasets that lie one after the other.

    Args:
        sizes, weights: windows and weight of each dataset.

    Raises:
        ValueError: no windows, an empty batch, or a negative seed.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], batch_size: int, seed: int):
        super().__init__(sum(sizes), batch_size, seed)
        self.sizes = tuple(sizes)
        self._starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        self._quotas = Quotas(tuple(weights), seed)
        self._order = lru_cache(4)(self._quotas.order)  # what was last computed: a saving, not a state
        self._row = lru_cache(2 * len(sizes))(self._permute)

    def passes(self, step: int) -> list[float]:
        """How often each dataset has been gone through before this step."""
        place = step * self.batch_size
        cycle, within = divmod(place, self._quotas.cycle)
        drawn = self._quotas.before(cycle) + np.bincount(self._order(cycle)[:within], minlength=len(self.sizes))
        return [count / size for count, size in zip(drawn.tolist(), self.sizes, strict=True)]

    def draws(self, step: int) -> list[Draw]:
        """The windows of a step, in order."""
        return [self.draw(step * self.batch_size + row) for row in range(self.batch_size)]

    def indices(self, step: int) -> np.ndarray:
        """The windows of a step, (batch_size,) int64."""
        return np.array([draw.index for draw in self.draws(step)], np.int64)

    def draw(self, place: int) -> Draw:
        """The window at a place of the run."""
        cycle, within = divmod(place, self._quotas.cycle)
        order = self._order(cycle)
        part = int(order[within])
        count = int(self._quotas.before(cycle)[part]) + int((order[:within] == part).sum())
        epoch, at = divmod(count, self.sizes[part])
        return Draw(int(self._starts[part] + self._row(part, epoch)[at]), epoch, self.seed)

    def _permute(self, part: int, epoch: int) -> np.ndarray:
        return np.random.Generator(np.random.Philox(key=self.seed, counter=[0, 0, part, epoch])).permutation(self.sizes[part])


# ------------------------------------------------------------------------------------------------ what a run trains on


@dataclass(frozen=True)
class TrainingData:
    """All the data of a run.

    Attributes:
        windows: what is trained on; takes a `Draw`.
        held_out: windows that are not, by dataset; those that hold nothing out are missing.
        normalizers: statistics by robot, of every robot with states and actions.
        robot: whose policy it is above all: `data.embodiment`.
    """

    windows: WindowDataset | MixtureDataset
    held_out: dict[str, WindowDataset]
    normalizers: dict[str, Normalizer]
    robot: str

    def __len__(self) -> int:
        return len(self.windows)

    @property
    def parts(self) -> dict[str, WindowDataset]:
        """What is trained on, by dataset."""
        return self.windows.parts if isinstance(self.windows, MixtureDataset) else {name_of(self.windows.data): self.windows}

    def sampler(self, batch_size: int, seed: int) -> WindowSampler:
        """The order of the run, as global batches."""
        if not isinstance(self.windows, MixtureDataset):
            return WindowSampler(len(self.windows), batch_size, seed)
        parts = self.parts.values()
        return MixtureSampler([len(part) for part in parts], [part.data.weight for part in parts], batch_size, seed)

    @property
    def normalizer(self) -> dict[str, Any]:
        """The statistics as a checkpoint keeps them: of one dataset its own, else by robot."""
        if isinstance(self.windows, WindowDataset) and self.normalizers:
            return self.normalizers[self.robot].to_dict()
        return by_embodiment(self.normalizers)

    @property
    def control_hz(self) -> float:
        """Control steps a second of `robot`; where it has no data, of the first dataset."""
        own = [part for part in self.parts.values() if part.data.embodiment == self.robot and part.data.contents != "video"]
        return (own or list(self.parts.values()))[0].fps

    def mean_action(self, of: WindowDataset) -> np.ndarray:
        """The mean label (action_dim,), normalised, of the robot of a dataset, over all its training windows; empty where the dataset has video alone."""
        own = [part for part in self.parts.values() if part.data.embodiment == of.data.embodiment and part.data.contents != "video"]
        if of.data.contents == "video" or not own:
            return np.zeros(0, np.float32)
        mean: np.ndarray = np.average([part.mean_action() for part in own], axis=0, weights=[len(part) for part in own])
        return mean.astype(np.float32)

    def table(self, steps: int, batch_size: int) -> str:
        """Datasets, sizes, weights and how often each is gone through in a run of so many samples."""
        total = sum(part.data.weight for part in self.parts.values())
        rows = [("dataset", "robot", "learnt", "episodes", "windows", "hours", "weight", "share", "passes", "held out")]
        for name, part in self.parts.items():
            share = part.data.weight / total
            hours = sum(part.lerobot.episodes[e].length for e in part.episodes) / part.lerobot.fps / 3600
            passes = share * steps * batch_size / len(part)
            out = f"{len(self.held_out[name].episodes)}" if name in self.held_out else "-"
            learnt = {"paired": "video, action"}.get(part.data.contents, part.data.contents)
            rows.append((name, part.data.embodiment, learnt, f"{len(part.episodes)}", f"{len(part)}", f"{hours:.3g}", f"{part.data.weight:g}", f"{share:.1%}", f"{passes:.2f}", out))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        return "\n".join("  ".join(cell.ljust(width) if i < 3 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths, strict=True))) for row in rows)


def name_of(data: DataConfig) -> str:
    """What a dataset is called: the last part of where it lies."""
    return Path(data.root).name or str(data.root)


def names_of(sources: Sequence[DataConfig]) -> list[str]:
    """A name for each dataset: where two share a place, by what is learnt from them, and else numbered."""
    plain = [name_of(d) for d in sources]
    finer = [name if plain.count(name) == 1 else f"{name}/{d.contents}" for name, d in zip(plain, sources, strict=True)]
    return [name if finer.count(name) == 1 else f"{name}/{finer[:i].count(name) + 1}" for i, name in enumerate(finer)]


def training_data(config: Config) -> TrainingData:
    """Everything a run trains on and holds out, normalised by the training rows' statistics of each robot.

    Raises:
        FileNotFoundError: no dataset, or files of it are missing.
        ValueError: a dataset that does not fit the config, or datasets that do not fit together; named.
    """
    sources = dict(zip(names_of(config.sources), config.sources, strict=True))
    _check_together(config)
    parts = {name: _windows(config, data, "train") for name, data in sources.items()}
    held_out = {name: _windows(config, data, "validation") for name, data in sources.items() if data.validation_fraction > 0}
    normalizers = fit_normalizers(list(parts.values()))
    for part in [*parts.values(), *held_out.values()]:
        if part.data.contents != "video":
            part.normalizer = normalizers[part.data.embodiment]
    windows = MixtureDataset(parts) if config.mixture else next(iter(parts.values()))
    return TrainingData(windows, held_out, normalizers, config.data.embodiment)


def fit_normalizers(parts: Sequence[WindowDataset]) -> dict[str, Normalizer]:
    """Statistics by robot, over all of its datasets that have states and actions.

    Raises:
        ValueError: datasets of one robot that are normalised differently, or run at different rates.
    """
    by_robot: dict[str, list[WindowDataset]] = defaultdict(list)
    for part in parts:
        if part.data.contents != "video":
            by_robot[part.data.embodiment].append(part)
    for robot, own in by_robot.items():
        for what, values in (("data.normalization", {p.data.normalization for p in own}), ("control steps a second", {p.fps for p in own})):
            if len(values) > 1:
                raise DatasetError(f"mixture: datasets of {robot!r} differ in {what} ({', '.join(sorted(map(str, values)))}); a robot has one: set it in each, or call one of them another embodiment")
    return {robot: own[0].fit_normalizer(own[1:]) for robot, own in by_robot.items()}


def _windows(config: Config, data: DataConfig, split: Split) -> WindowDataset:
    robot = None if data.contents == "video" else config.model.embodiment(data.embodiment)
    windows = WindowDataset(data, config.timeline, split, image_size=config.codec.image_size, robot=robot)
    if windows.too_short:
        some = ", ".join(map(str, windows.too_short[:8])) + (", ..." if len(windows.too_short) > 8 else "")
        a, count = config.timeline.actions_per_block, len(windows.too_short)
        which = "training" if split == "train" else "validation"
        log.warning("%s: %d of %d %s episodes are left out (%s): shorter than one block, %d + 1 rows", data.root, count, count + len(windows.episodes), which, some, a)
    return windows


def _check_together(config: Config) -> None:
    """Refuse encoded windows for some datasets and frames for others: a batch has one or the other."""
    seen = [d for d in config.sources if d.contents != "action"]
    with_latents = [d.root for d in seen if d.latents is not None]
    if with_latents and len(with_latents) < len(seen):
        without = next(d.root for d in seen if d.latents is None)
        raise DatasetError(f"mixture: {with_latents[0]} has latents and {without} has none; set data.latents, which holds for every entry, and run `wam cache`")
