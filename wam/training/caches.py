"""`wam cache`: latents and text embeddings of everything a config trains on, written once, by as many processes as one likes.

    config -> windows of every dataset -> shards still to make -> workers: decode, encode, write -> manifest
           -> codec (the linear one is fitted, and kept beside the latents)
           -> instructions -> text.cache

A shard is the unit of work and of survival: what is on disk and sound is kept, so a build that was killed goes on where it was, and a
second run over a finished cache reads and verifies all of it.  Workers are those of a data loader: on one thread each, gone with their
parent, and an error of theirs is this process's.  On GPUs they take turns over the devices.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info
from tqdm import tqdm

from wam.codec.codec import Codec
from wam.config import Config
from wam.data.dataset import WindowDataset
from wam.data.latents import Cache, Shard, cache_of, encode_shard, is_sound, shards_of, write_shard

log = logging.getLogger(__name__)
BATCH = 8  # windows that go through the codec at a time


@dataclass(frozen=True)
class Made:
    """What a build came to, of all its datasets together.

    Attributes:
        frames: that went through the codec; a frame counts in each window it is in.
        made, kept: files that were written, and those that were there and sound.
    """

    windows: int
    frames: int
    made: int
    kept: int
    bytes: int
    seconds: float

    def __str__(self) -> str:
        rate = f"{self.frames / self.seconds:,.0f} frames/s" if self.made else "all verified"
        return f"{self.windows:,} windows of {self.bytes / max(self.windows, 1) / 1e6:.3f} MB, {self.bytes / 1e9:.3f} GB in {self.made + self.kept} files ({self.kept} were there); {rate}"


class _Shards(Dataset[tuple[int, bool]]):
    """Shards to make: asking for one makes it, and tells its windows and whether there was anything to do."""

    def __init__(self, datasets: list[WindowDataset], caches: list[Cache], codec: Codec):
        self.datasets, self.caches, self.codec = datasets, caches, codec
        self.tasks: list[tuple[int, Shard]] = [(i, shard) for i, windows in enumerate(datasets) for shard in shards_of(windows, caches[i].per_shard)]

    def __len__(self) -> int:
        return len(self.tasks)

    def __getitem__(self, index: int) -> tuple[int, bool]:
        number, shard = self.tasks[index]
        cache, count = self.caches[number], shard.stop - shard.first
        path = cache.folder / shard.name
        if is_sound(path, cache.key, count):
            return count, False
        device = _device()
        latents, rows = encode_shard(self.datasets[number], shard, self.codec.to(device), device, BATCH)
        write_shard(path, cache.key, latents, rows)
        return count, True


def build_latents(datasets: list[WindowDataset], config: Config, codec: Codec, directory: Path, workers: int) -> Made:
    """Write the latents of all windows of these datasets below `directory`; held-out windows may be among the datasets.

    Raises:
        VideoError, LatentError: a video that cannot be read; a manifest that is damaged.
        RuntimeError: a worker died (out of memory, most likely); what is finished is kept.
    """
    directory.mkdir(parents=True, exist_ok=True)
    caches = [cache_of(windows, directory, config.codec, codec) for windows in datasets]
    folders = {cache.folder: cache for cache in caches}
    for cache in folders.values():
        cache.begin()
    shards, begun = _Shards(datasets, caches, codec.to("cpu")), time.monotonic()
    loader = DataLoader(shards, batch_size=None, num_workers=workers, multiprocessing_context="spawn" if workers and torch.cuda.is_available() else None)
    count, made, encoded = 0, 0, 0
    with tqdm(total=sum(map(len, datasets)), unit="window", desc="encoding", disable=None) as bar:
        for windows, new in loader:
            count, made, encoded = count + windows, made + new, encoded + new * windows
            bar.update(windows)
    for folder, cache in folders.items():
        cache.finish(sum(len(windows) for windows, of in zip(datasets, caches, strict=True) if of.folder == folder))
    size = sum(path.stat().st_size for folder in folders for path in folder.glob("*.safetensors"))
    return Made(count, encoded * config.timeline.frames, made, len(shards) - made, size, time.monotonic() - begun)


def _device() -> str:
    """Where this process encodes."""
    info, devices = get_worker_info(), torch.cuda.device_count()
    return f"cuda:{(info.id if info else 0) % devices}" if devices else "cpu"
