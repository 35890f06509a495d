"""Which windows a step trains on: a pure function of (seed, step), so that a resumed run goes on as if it had never stopped.

    epoch 0          | epoch 1          | ...       each a permutation of all windows, from a counter-based generator
    [ b0 ][ b1 ][ b2 |   ][ b3 ][ b4 ][ ...         batches are cut from the endless row; none is dropped at an epoch's end

A window of a step is a `Draw`: its index, epoch and seed, of which everything random in the sample is a function.
Number of workers and processes, restarts and what else draws random numbers do not matter.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from wam.data.dataset import Draw, collate


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

    def draws(self, step: int) -> list[Draw]:
        """The windows of a step with what they are drawn by: the epoch that each belongs to."""
        epochs = (step * self.batch_size + np.arange(self.batch_size)) // self.n
        return [Draw(window, epoch, self.seed) for window, epoch in zip(self.indices(step).tolist(), epochs.tolist(), strict=True)]

    def _permutation(self, epoch: int) -> np.ndarray:
        if self._kept[0] != epoch:
            self._kept = (epoch, np.random.Generator(np.random.Philox(key=self.seed, counter=[0, 0, 0, epoch])).permutation(self.n))
        return self._kept[1]


class _Steps(Sampler[list[Draw]]):
    """A process's part of a sampler's batches from a step on, without end."""

    def __init__(self, sampler: WindowSampler, start: int, rows: slice):
        self.sampler, self.start, self.rows = sampler, start, rows

    def __iter__(self) -> Iterator[list[Draw]]:
        step = self.start
        while True:
            yield self.sampler.draws(step)[self.rows]
            step += 1


def rows_of_rank(batch_size: int, rank: int, world: int) -> slice:
    """The rows of a global batch that a process has: side by side, as many for each.

    Raises:
        ValueError: the batch cannot be divided, or there is no such process.
    """
    if world < 1 or not 0 <= rank < world:
        raise ValueError(f"process {rank} of {world}; expected 0..{max(0, world - 1)}")
    if batch_size % world:
        raise ValueError(f"a batch of {batch_size} cannot be divided among {world} processes; use a multiple of {world} as training.batch_size")
    each = batch_size // world
    return slice(rank * each, (rank + 1) * each)


def make_loader(dataset: Dataset[Any], sampler: WindowSampler, workers: int = 0, start_step: int = 0, rank: int = 0, world: int = 1) -> DataLoader[Any]:
    """Batches (`wam.data.dataset.Batch`) from `start_step` on, without end; the same for any number of workers.

    Of several processes each has its rows of the global batch, which is the same for any number of them.
    The loader has its own random generator: making one takes nothing from torch's global stream.

    Args:
        dataset: takes a `Draw`.

    Raises:
        ValueError: a batch that cannot be divided among the processes.
    """
    return DataLoader(
        dataset,
        batch_sampler=_Steps(sampler, start_step, rows_of_rank(sampler.batch_size, rank, world)),
        num_workers=workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator().manual_seed(sampler.seed),
    )
