"""Encoded windows on disk: what a frozen codec makes of a dataset is computed once, and read at every step.

    LATENTS/files.json                                hashes of video files, so that each is read through once
    LATENTS/<dataset>-<key>/manifest.json             what was encoded, with which codec, into what: `key` is a hash of these settings
    LATENTS/<dataset>-<key>/episode-000012-000.safetensors
        latents  (windows, C, F, h, w) float32        every window of the episode, about 100 MB a file
        rows     (windows, frames) int32              which frames a window is made of
        crc      (windows,) int64                     CRC-32 of each window's latents

A causal codec encodes a window's first frame alone, so latents belong to a window and not to a frame: two windows that overlap share
none.  Files appear whole or not at all and are mapped into memory; a window is checked when it is read, which costs as much for one
from a file of 100 MB as for the file's share of a page.  Settings that differ make another folder; a dataset that is opened with
settings that no folder has is refused, with the settings that differ from the nearest.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from wam.codec.codec import Codec
from wam.config import CodecConfig
from wam.config_tree import show
from wam.data.dataset import WindowDataset
from wam.data.lerobot import LeRobotDataset
from wam.data.windows import WindowTable
from wam.files import atomic_path, write_json_atomic

log = logging.getLogger(__name__)

FORMAT = "wam-latents-1"
MANIFEST, FILES = "manifest.json", "files.json"
SHARD_BYTES = 100_000_000
OLD = 3600  # seconds after which a file that was never finished is nobody's
OPEN_SHARDS = 64  # files that a reader keeps mapped
AGAIN = "run `wam cache` again, which makes what is missing or damaged and keeps the rest"
Settings = dict[str, Any]


class LatentError(ValueError):
    """A cache that cannot be used; the message names the file or the setting, and the remedy."""


# ------------------------------------------------------------------------------------------------ what a cache is of


def settings_of(windows: WindowDataset, codec: Settings, content: str) -> Settings:
    """All that decides a dataset's latents, readable; the same for its training and its held-out windows.

    Args:
        codec: `codec_identity`.
        content: `content_of`.
    """
    d, t = windows.data, windows.timeline
    return {
        "format": FORMAT,
        "content": content,
        "codec": codec,
        "pictures": {"cameras": list(d.cameras), "layout": d.layout, "image_size": list(windows.image_size), "decoders": list(windows.decoder.backends)},
        "windows": {
            **{"frames": t.frames, "frame_stride": t.stride, "temporal_stride": t.temporal_stride, "actions_per_block": t.actions_per_block},
            **{"control_hz": d.control_hz or windows.fps, "spans": d.spans, "start_stride": d.start_stride, "short": d.short},
        },
    }


def codec_identity(config: CodecConfig, codec: Codec) -> Settings:
    """A codec by what it computes: its kind, its sizes, the type it computes in and a hash of its weights."""
    digest = hashlib.sha256()
    module = cast(nn.Module, codec)
    for name, tensor in sorted([*module.named_parameters(), *module.named_buffers()]):
        plain = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {plain.dtype} {tuple(plain.shape)}".encode())
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
    return {"kind": config.kind, "channels": codec.channels, "patch": codec.patch, "views": config.views, "dtype": config.dtype, "weights": digest.hexdigest()}


def content_of(source: LeRobotDataset, cameras: Sequence[str], directory: Path) -> str:
    """A hash of a dataset's pictures: every byte of its videos, and which frames of them each episode shows.

    Rows of states and actions are no part of it: a dataset with better labels has the same pictures.  Files whose size and time
    of change are those noted in `directory` are not read again.
    """
    spans = [[episode.videos[camera] for camera in cameras] for episode in source.episodes]
    hashes = _hash_files(sorted({span.path for row in spans for span in row}), directory / FILES)
    rows = [[e.index, e.length, [[hashes[span.path], span.first_frame] for span in row]] for e, row in zip(source.episodes, spans, strict=True)]
    return _digest(rows)


def key_of(settings: Settings) -> str:
    """The hash that names a cache's folder."""
    return _digest(settings)[:16]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _hash_files(paths: list[Path], noted: Path) -> dict[Path, str]:
    known: dict[str, Any] = _read_json(noted) if noted.is_file() else {}
    stamps: dict[Path, list[int]] = {}
    for path in paths:
        stat = path.stat() if path.is_file() else None  # a missing file is the reader's to judge; here it is other content
        stamps[path] = [stat.st_size, stat.st_mtime_ns] if stat else [0, 0]
    fresh = [path for path in paths if not _is_noted(known.get(str(path.resolve())), stamps[path])]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for path, digest in zip(fresh, pool.map(_hash_file, fresh), strict=True):
            known[str(path.resolve())] = [*stamps[path], digest]
    if fresh and noted.parent.is_dir() and os.access(noted.parent, os.W_OK):
        write_json_atomic(noted, known)
    return {path: known[str(path.resolve())][2] for path in paths}


def _is_noted(entry: Any, stamp: list[int]) -> bool:
    """Whether an entry of files.json is the hash of a file with this size and time of change."""
    return isinstance(entry, list) and len(entry) == 3 and entry[:2] == stamp and isinstance(entry[2], str)


def _hash_file(path: Path) -> str:
    if not path.is_file():
        return "missing"
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# ------------------------------------------------------------------------------------------------ shards


@dataclass(frozen=True)
class Shard:
    """Windows `first` to `stop` (exclusive) of a window table, all of the episode at one position.

    Attributes:
        episode: its index in the LeRobot dataset.
        part: number of this file among the episode's.
    """

    position: int
    episode: int
    part: int
    first: int
    stop: int

    @property
    def name(self) -> str:
        """Its file."""
        return shard_name(self.episode, self.part)


def shard_name(episode: int, part: int) -> str:
    """The file that holds a part of an episode's windows."""
    return f"episode-{episode:06d}-{part:03d}.safetensors"


def first_windows(table: WindowTable, episodes: int) -> np.ndarray:
    """(episodes + 1,) where each position's windows begin in a table, and where the last one's end."""
    counts = np.diff(np.concatenate([[0], table.ends]))
    return np.concatenate([[0], np.cumsum(np.bincount(table.places[:, 0], counts, episodes))]).astype(np.int64)


def shards_of(windows: WindowDataset, per_shard: int) -> list[Shard]:
    """The files that hold a dataset's windows."""
    edges, found = first_windows(windows.table, len(windows.episodes)), []
    for position, episode in enumerate(windows.episodes):
        first, stop = int(edges[position]), int(edges[position + 1])
        found += [Shard(position, episode, part, at, min(at + per_shard, stop)) for part, at in enumerate(range(first, stop, per_shard))]
    return found


def write_shard(path: Path, key: str, latents_WCFHW: Tensor, rows_WF: np.ndarray) -> None:
    """Write a file of windows in one step."""
    latents = latents_WCFHW.contiguous()
    tensors = {"rows": torch.from_numpy(rows_WF.astype(np.int32)), "crc": torch.tensor([_crc(window) for window in latents.numpy()])}
    metadata = {"format": FORMAT, "key": key, "shard": path.name, "crc": str(_table_crc(tensors))}
    with atomic_path(path) as temporary:
        save_file({"latents": latents, **tensors}, temporary, metadata=metadata)


class ShardReader:
    """One mapped file; its tables are checked when it is opened, a window's latents when they are read."""

    def __init__(self, path: Path, key: str):
        """Open a file.

        Raises:
            LatentError: it is missing, cut short, altered, or another cache's.
        """
        self.path = path
        try:
            self._file = safe_open(path, framework="numpy")
            metadata = self._file.metadata() or {}
            self.rows, self.crc = (self._file.get_tensor(name) for name in ("rows", "crc"))
            self._latents = self._file.get_slice("latents")
            self.shape, kind = tuple(self._latents.get_shape()), self._latents.get_dtype()
        except FileNotFoundError as error:
            raise LatentError(f"{path} is missing; {AGAIN}") from error
        except (SafetensorError, OSError) as error:
            raise LatentError(f"{path} is damaged ({error}); {AGAIN}") from error
        expected = {"format": FORMAT, "key": key, "shard": path.name, "crc": str(_table_crc({"rows": self.rows, "crc": self.crc}))}
        wrong = [name for name, value in expected.items() if metadata.get(name) != value]
        if wrong or kind != "F32" or not (self.rows.ndim, self.crc.ndim, len(self.shape)) == (2, 1, 5) or not len(self.rows) == len(self.crc) == self.shape[0]:
            raise LatentError(f"{path} is damaged or of another cache: its {wrong[0] if wrong else 'number or kind of windows'} does not fit; {AGAIN}")

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, window: int) -> np.ndarray:
        """The latents (C, F, h, w) of a window.

        Raises:
            LatentError: they are not what was written.
        """
        latents: np.ndarray = self._latents[window : window + 1][0]
        if _crc(latents) != self.crc[window]:
            raise LatentError(f"{self.path} is damaged: the checksum of window {window} does not hold; {AGAIN}")
        return latents


def is_sound(path: Path, key: str, windows: int) -> bool:
    """Whether a file holds so many windows, every one as it was written; what is not is logged, unless it is absent."""
    if not path.is_file():
        return False
    try:
        reader = ShardReader(path, key)
        for window in range(len(reader)):
            reader.read(window)
        return len(reader) == windows
    except LatentError as error:
        log.warning("%s", str(error).replace(AGAIN, "it is made again"))
        return False


def _crc(latents: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(latents).data)


def _table_crc(tables: Mapping[str, Any]) -> int:
    return zlib.crc32(np.asarray(tables["crc"]).tobytes(), zlib.crc32(np.asarray(tables["rows"]).tobytes()))


# ------------------------------------------------------------------------------------------------ one dataset's cache


@dataclass(frozen=True)
class Cache:
    """A folder of shards, with what it is of.

    Attributes:
        shape: (C, F, h, w) of a window.
        per_shard: windows a file, at most.
    """

    folder: Path
    settings: Settings
    shape: tuple[int, int, int, int]
    per_shard: int

    @property
    def key(self) -> str:
        """The hash of its settings."""
        return key_of(self.settings)

    @classmethod
    def place(cls, directory: Path, root: str | Path, settings: Settings, codec: Codec) -> Cache:
        """Where the latents of a dataset belong, whether they are there or not."""
        windows, pictures = settings["windows"], settings["pictures"]
        height, width = (size // codec.patch for size in pictures["image_size"])
        shape = (codec.channels, 1 + (windows["frames"] - 1) // codec.temporal_stride, height, width)
        key = key_of(settings)
        folder = next(iter(sorted(directory.glob(f"*-{key}"))), directory / f"{Path(root).name or 'dataset'}-{key}")  # by its key, whatever a copy is called
        return cls(folder, settings, shape, max(1, SHARD_BYTES // (4 * int(np.prod(shape)))))

    def begin(self) -> None:
        """Note what is going to be made."""
        if not (self.folder / MANIFEST).is_file():
            write_json_atomic(self.folder / MANIFEST, {"settings": self.settings, "complete": False})

    def finish(self, windows: int) -> None:
        """Note that all is there; what killed writers left is cleared away."""
        for left in self.folder.glob(".episode-*"):
            if time.time() - left.stat().st_mtime > OLD:
                left.unlink(missing_ok=True)
        write_json_atomic(self.folder / MANIFEST, {"settings": self.settings, "complete": True, "windows": windows, "bytes": self.bytes, "shape": list(self.shape)})

    @property
    def bytes(self) -> int:
        """What its files take."""
        return sum(path.stat().st_size for path in self.folder.glob("episode-*.safetensors"))

    def check(self) -> None:
        """Refuse what is not there, not whole, or not of these settings.

        Raises:
            LatentError: with the settings that differ from the nearest cache in the directory, or how to go on with an interrupted one.
        """
        path = self.folder / MANIFEST
        if not path.is_file():
            raise LatentError(_what_differs(self.folder.parent, self.settings))
        lines = differences(_settings_in(path), self.settings)
        if lines:
            raise LatentError(f"{path} does not say what its folder is named after: {'; '.join(lines)}; delete the file and {AGAIN}")
        if _read_json(path).get("complete") is not True:
            raise LatentError(f"{self.folder} is not finished ({len(list(self.folder.glob('episode-*')))} files so far); {AGAIN}")


def _what_differs(directory: Path, settings: Settings) -> str:
    """Why no cache in a directory will do."""
    others = [(path, _settings_in(path)) for path in sorted(directory.glob(f"*/{MANIFEST}"))]
    if not others:
        return f"data.latents: {directory} holds no encoded windows; make them with `wam cache` and this config, or set data.latents=null"
    path, lines = min(((path, differences(found, settings)) for path, found in others), key=lambda other: len(other[1]))
    return f"data.latents: {directory} holds encoded windows of other settings. Nearest is {path.parent.name}: {'; '.join(lines)}; run `wam cache` with this config, or set data.latents=null"


def differences(there: Settings, here: Settings) -> list[str]:
    """What differs, a line for each setting."""
    found, wanted = _flat(there), _flat(here)
    return [f"{name} is {_short(found.get(name))} there and {_short(wanted.get(name))} here" for name in dict.fromkeys([*wanted, *found]) if found.get(name) != wanted.get(name)]


def _flat(tree: Settings, before: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in tree.items():
        out |= _flat(value, f"{before}{name}.") if isinstance(value, dict) else {f"{before}{name}": value}
    return out


def _settings_in(path: Path) -> Settings:
    settings = _read_json(path).get("settings")
    if not isinstance(settings, dict):
        raise LatentError(f"{path} has the settings {show(settings)}; delete its folder and {AGAIN}")
    return settings


def _short(value: Any) -> str:
    return f"{value[:8]}..." if isinstance(value, str) and len(value) == 64 else show(value)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise LatentError(f"{path} is not valid JSON ({error}); delete it and {AGAIN}") from error
    if not isinstance(tree, dict):
        raise LatentError(f"{path} holds a {type(tree).__name__}; delete it and {AGAIN}")
    return tree


# ------------------------------------------------------------------------------------------------ reading


@dataclass
class WindowLatents:
    """A cache seen through a dataset's window table: latents by window index.

    Attributes:
        pixels: whether a window's frames are needed all the same (an image encoder, a first frame on the channels, a goal image).
    """

    cache: Cache
    table: WindowTable
    episodes: list[int]
    pixels: bool = False
    _edges: np.ndarray = field(init=False, repr=False)
    _open: OrderedDict[str, ShardReader] = field(init=False, repr=False, default_factory=OrderedDict)

    def __post_init__(self) -> None:
        self._edges = first_windows(self.table, len(self.episodes))

    def read(self, index: int, rows: np.ndarray) -> np.ndarray:
        """The latents (C, F, h, w) float32 of a window, which is made of these frames of its episode.

        Raises:
            LatentError: a file that is missing, damaged, or of other frames; named, with the remedy.
        """
        position = int(np.searchsorted(self._edges, index, side="right")) - 1
        part, window = divmod(index - int(self._edges[position]), self.cache.per_shard)
        reader = self._reader(shard_name(self.episodes[position], part))
        if window >= len(reader) or not np.array_equal(reader.rows[window], rows):
            raise LatentError(f"{reader.path} does not hold the window of the frames {rows.tolist()}; {AGAIN}")
        return reader.read(window)

    def _reader(self, name: str) -> ShardReader:
        if name in self._open:
            self._open.move_to_end(name)
        else:
            self._open[name] = ShardReader(self.cache.folder / name, self.cache.key)
            if self._open[name].shape[1:] != self.cache.shape:
                raise LatentError(f"{self.cache.folder / name} holds latents of {self._open.pop(name).shape[1:]}, expected {self.cache.shape}; {AGAIN}")
            while len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)
        return self._open[name]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}  # maps stay in their process


@dataclass
class AbsentLatents:
    """Zeros, for windows without video in a batch with some that have it.

    Attributes:
        shape: (C, F, h, w).
    """

    shape: tuple[int, int, int, int]
    pixels: bool = False

    def read(self, index: int, rows: np.ndarray) -> np.ndarray:
        """The latents of a window."""
        return np.zeros(self.shape, np.float32)


def cache_of(windows: WindowDataset, directory: str | Path, config: CodecConfig, codec: Codec) -> Cache:
    """The cache that a dataset's latents belong into, whether it exists or not; hashes its videos, unless they were before."""
    content = content_of(windows.lerobot, windows.data.cameras, Path(directory))
    return Cache.place(Path(directory), windows.data.root, settings_of(windows, codec_identity(config, codec), content), codec)


def use_latents(windows: WindowDataset, config: CodecConfig, codec: Codec, pixels: bool) -> None:
    """Give a dataset the latents that `data.latents` holds of it; its samples then have them, and frames only with `pixels`.

    Raises:
        LatentError: there are none of these settings, they are not complete, or files are missing.
    """
    directory = windows.data.latents
    assert directory is not None
    if windows.data.contents == "action":
        height, width = (size // codec.patch for size in windows.image_size)
        windows.latents = AbsentLatents((codec.channels, windows.timeline.latents, height, width), pixels)
        return
    cache = cache_of(windows, directory, config, codec)
    cache.check()
    there = {path.name for path in cache.folder.iterdir()}
    absent = [shard.name for shard in shards_of(windows, cache.per_shard) if shard.name not in there]
    if absent:
        raise LatentError(f"{cache.folder} lacks {len(absent)} files, e.g. {absent[0]}; {AGAIN}")
    windows.latents = WindowLatents(cache, windows.table, windows.episodes, pixels)


# ------------------------------------------------------------------------------------------------ making


def encode_shard(windows: WindowDataset, shard: Shard, codec: Codec, device: str, batch: int) -> tuple[Tensor, np.ndarray]:
    """Latents (windows, C, F, h, w) of a shard and the rows (windows, frames) that they are made of.

    Its frames are decoded once.  A window alone goes through the codec twice over: with a batch of one, convolutions may take another
    path and end 1e-6 away from what a batch of training gives.
    """
    assert windows.pictures is not None
    rows = np.stack([windows.rows(index).frames for index in range(shard.first, shard.stop)])
    distinct, back = np.unique(rows, return_inverse=True)
    frames = torch.from_numpy(windows.canvas.place(windows.pictures.read(shard.episode, distinct)))
    parts = []
    for some in _batches(back.reshape(rows.shape), batch):
        pair = np.repeat(some, 2, axis=0) if len(some) == 1 else some
        parts.append(codec.encode(frames[torch.from_numpy(pair)].to(device)).float().cpu()[: len(some)])
    return torch.cat(parts), rows


def _batches(rows: np.ndarray, size: int) -> Iterator[np.ndarray]:
    for at in range(0, len(rows), size):
        yield rows[at : at + size]
