"""Random numbers of training, row by row: a row's are a function of (seed, step, its place in the whole batch), and of nothing else.

    (seed, step, row)  --Philox-->  the row's key  --Philox-->  uniform number 0, 1, 2, ...
                                                    `-> a generator on the device, for the noise itself

So eight rows on one process and four on each of two draw the same, and so does a run that is stopped and started again.  Philox is a
counter-based generator (Salmon et al., Parallel random numbers: as easy as 1, 2, 3, 2011): any number of any row is computed from its
place, so all rows are drawn at once and there is no state to keep.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_KEY_STEPS = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)
PAGE = 128  # uniform numbers of a row that are made at a time: most of what a sample needs


def philox(key: tuple[np.ndarray, np.ndarray], counter: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Philox 4x32 with 10 rounds: two words of a key and four of a counter (uint64 holding 32 bits, broadcast) to four random words."""
    k0, k1 = key
    c0, c1, c2, c3 = counter
    for _ in range(10):
        p0, p1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (p1 >> _HALF) ^ c1 ^ k0, p1 & _LOW, (p0 >> _HALF) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + _KEY_STEPS[0]) & _LOW, (k1 + _KEY_STEPS[1]) & _LOW
    return [c0, c1, c2, c3]


class Draws:
    """Random numbers for the rows of a batch, taken in the order in which they are asked for.

    Args:
        keys_B: uint64 (B,), a key per row.
    """

    def __init__(self, keys_B: np.ndarray):
        self.keys_B = keys_B
        self._pages, self._asked = 0, 0
        self._page = torch.empty(len(keys_B), 0)

    @classmethod
    def at(cls, seed: int, step: int, rows: Sequence[int] | np.ndarray) -> Draws:
        """The numbers of some rows of the whole batch of a step."""
        row = np.asarray(rows, np.uint64)
        words = [np.uint64(x & 0xFFFFFFFF) for x in (seed, seed >> 32, step, step >> 32)]
        low, high, *_ = philox((words[0] + np.zeros_like(row), words[1] + np.zeros_like(row)), (words[2] + np.zeros_like(row), words[3] + np.zeros_like(row), row & _LOW, row >> _HALF))
        return cls(low | (high << _HALF))

    @classmethod
    def of(cls, random: Draws | torch.Generator, batch: int) -> Draws:
        """Draws as they are; or of `batch` rows whose keys come from a generator."""
        if isinstance(random, Draws):
            assert len(random) == batch, f"draws for {len(random)} rows, a batch of {batch}"
            return random
        keys = torch.randint(2**63 - 1, (batch,), generator=random, device=random.device)
        return cls(keys.cpu().numpy().astype(np.uint64))

    def __len__(self) -> int:
        return len(self.keys_B)

    def uniform(self, count: int) -> Tensor:
        """The next `count` numbers of every row, float32 (B, count) in [0, 1)."""
        while self._page.shape[1] < count:
            self._page = torch.cat([self._page, self._next_page()], dim=1)
        out, self._page = self._page[:, :count], self._page[:, count:]
        return out

    def _next_page(self) -> Tensor:
        places = np.arange(self._pages * PAGE // 4, (self._pages + 1) * PAGE // 4, dtype=np.uint64)
        self._pages += 1
        keys, zero = self.keys_B[:, None], np.zeros((len(self), PAGE // 4), np.uint64)
        words = np.stack(philox((keys & _LOW, keys >> _HALF), (places + zero, zero, zero, zero)), axis=-1)
        return torch.from_numpy((words.reshape(len(self), PAGE) >> np.uint64(8)).astype(np.float32) * np.float32(2**-24))

    def beta(self, alpha: float, beta: float, count: int) -> Tensor:
        """Beta(alpha, beta) numbers, float32 (B, count): by the inverse of its distribution where one of them is 1, else row by row."""
        if alpha == 1 or beta == 1:
            u = self.uniform(count).double()
            return (u ** (1 / alpha) if beta == 1 else 1 - (1 - u) ** (1 / beta)).float()
        self._asked += 1
        rows = [np.random.Generator(np.random.Philox(key=int(key) + (self._asked << 64))).beta(alpha, beta, count) for key in self.keys_B]
        return torch.from_numpy(np.stack(rows).astype(np.float32))

    def normals(self, shapes: Sequence[Sequence[int]], device: torch.device) -> list[Tensor]:
        """Normal numbers in several shapes, float32 (B, *shape) each, drawn where they are needed.

        A row has a generator of its own on the device, so CPU and GPU differ in what they draw, and so may two kinds of GPU.
        """
        self._asked += 1
        sizes = [math.prod(shape) for shape in shapes]
        out = torch.empty(len(self), sum(sizes), device=device)
        generator = torch.Generator(device)
        for row, key in enumerate(self.keys_B):
            generator.manual_seed((int(key) + self._asked) & 0x7FFFFFFFFFFFFFFF)
            torch.randn(out.shape[1], generator=generator, device=device, out=out[row])
        ends = np.cumsum([0, *sizes]).tolist()
        return [out[:, start:end].unflatten(1, tuple(shape)) for (start, end), shape in zip(pairwise(ends), shapes, strict=True)]
