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
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info
from tqdm import tqdm

from wam.codec.codec import Codec, make_codec
from wam.codec.linear import LinearCodec
from wam.config import Config, DataConfig
from wam.data.dataset import WindowDataset
from wam.data.fitted import codec_path, fit_settings, read_fitted, save_fitted
from wam.data.latents import Cache, Shard, cache_of, encode_shard, is_sound, shards_of, write_shard
from wam.data.mixture import TrainingData, training_data
from wam.training.build import fit_codec, text_for

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
        tasks = {caches[i].folder / shard.name: (i, shard) for i, windows in enumerate(datasets) for shard in shards_of(windows, caches[i].per_shard)}
        self.tasks: list[tuple[int, Shard]] = list(tasks.values())  # a dataset that is in a mixture twice has its windows once
        self.windows = sum(shard.stop - shard.first for _, shard in self.tasks)

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


def cache(config: Config, workers: int | None = None) -> Made:
    """Encode everything a config trains on and holds out, and embed its instructions where `text.cache` says so.

    Args:
        workers: processes; default: one a core, or four a GPU.

    Raises:
        ValueError: `data.latents` is null, or the data does not fit the config.
    """
    directory = next((d.latents for d in config.sources if d.latents is not None), None)
    if directory is None:
        raise ValueError("data.latents is null, so nothing says where encoded windows belong; set it in the config, or give --output DIR")
    read = replace(config, data=_from_frames(config.data), mixture=tuple(map(_from_frames, config.mixture)))
    data = training_data(read)
    log.info("encoding:\n%s", data.table(config.training.steps, config.training.batch_size))
    seen = [windows for windows in [*data.parts.values(), *data.held_out.values()] if windows.data.contents != "action"]
    made = build_latents(seen, config, _codec(read, data, Path(directory)), Path(directory), workers or _usual_workers())
    text_for(config, data)
    return made


def _from_frames(data: DataConfig) -> DataConfig:
    """The dataset as it is read before there are latents, nothing kept in memory."""
    return replace(data, latents=None, cache="none")


def _codec(config: Config, data: TrainingData, directory: Path) -> Codec:
    """The pretrained codec; or the linear one, which is fitted unless it was before."""
    codec = make_codec(config.codec)
    if not isinstance(codec, LinearCodec):
        return codec
    directory.mkdir(parents=True, exist_ok=True)
    settings = fit_settings(config, data, directory)
    path = codec_path(directory, settings)
    if not path.is_file():
        fitted = fit_codec(config, data)
        assert isinstance(fitted, LinearCodec)
        save_fitted(path, fitted, settings)
    return read_fitted(path, codec, settings)


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
    workers = 0 if workers == 1 else min(workers, len(shards))
    loader = DataLoader(shards, batch_size=None, num_workers=workers, multiprocessing_context="spawn" if workers and torch.cuda.is_available() else None)
    count, made, encoded = 0, 0, 0
    with tqdm(total=shards.windows, unit="window", desc="encoding", disable=None) as bar:
        for windows, new in loader:
            count, made, encoded = count + windows, made + new, encoded + new * windows
            bar.update(windows)
    for folder, cache in folders.items():
        cache.finish(sum(shard.stop - shard.first for number, shard in shards.tasks if caches[number].folder == folder))
    size = sum(cache.bytes for cache in folders.values())
    return Made(count, encoded * config.timeline.frames, made, len(shards) - made, size, time.monotonic() - begun)


def _usual_workers() -> int:
    return 4 * torch.cuda.device_count() or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def _device() -> str:
    """Where this process encodes."""
    info, devices = get_worker_info(), torch.cuda.device_count()
    return f"cuda:{(info.id if info else 0) % devices}" if devices else "cpu"
