"""Which windows a step trains on: a pure function of (seed, step), so that a resumed run goes on as if it had never stopped.

    epoch 0          | epoch 1          | ...       each a permutation of all windows, from a counter-based generator
    [ b0 ][ b1 ][ b2 |   ][ b3 ][ b4 ][ ...         batches are cut from the endless row; none is dropped at an epoch's end

Number of workers, restarts and what else draws random numbers do not matter.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from wam.data.dataset import WindowDataset, collate


class WindowSampler:
    """Batches of window indices by step.

    Raises:
        ValueError: no windows, an empty batch, or a negative seed.
    """

    def __init__(self, n: int, batch_size: int, seed: int):
        for name, value, least in (("n", n, 1), ("batch_size", batch_size, 1), ("seed", seed, 0)):
            if value < least:
                raise ValueError(f"WindowSampler: {name} is {value}; expected at least {least}")
        self.n, self.batch_size, self.seed = n, batch_size, seed
        self._kept: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))  # the permutation last asked for: a saving, not a state

    def epoch(self, step: int) -> float:
        """Passes over the data before this step."""
        return step * self.batch_size / self.n

    def indices(self, step: int) -> np.ndarray:
        """The windows of a step, (batch_size,) int64."""
        places = step * self.batch_size + np.arange(self.batch_size)
        epochs = places // self.n
        return np.concatenate([self._permutation(int(e))[places[epochs == e] % self.n] for e in np.unique(epochs)])

    def _permutation(self, epoch: int) -> np.ndarray:
        if self._kept[0] != epoch:
            self._kept = (epoch, np.random.Generator(np.random.Philox(key=self.seed, counter=[0, 0, 0, epoch])).permutation(self.n))
        return self._kept[1]


class _Steps(Sampler[list[int]]):
    """A sampler's batches from a step on, without end."""

    def __init__(self, sampler: WindowSampler, start: int):
        self.sampler, self.start = sampler, start

    def __iter__(self) -> Iterator[list[int]]:
        step = self.start
        while True:
            yield self.sampler.indices(step).tolist()
            step += 1


def make_loader(dataset: WindowDataset, sampler: WindowSampler, workers: int = 0, start_step: int = 0) -> DataLoader[Any]:
    """Batches (`wam.data.dataset.Batch`) from `start_step` on, without end; the same for any number of workers.

    The loader has its own random generator: making one takes nothing from torch's global stream.
    """
    return DataLoader(
        dataset,
        batch_sampler=_Steps(sampler, start_step),
        num_workers=workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator().manual_seed(sampler.seed),
    )
