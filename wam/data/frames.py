"""Frames of episodes, by camera: decoded when they are asked for, or decoded up front and kept.

    decoding    a window's frames in one call a camera, from files that stay open
    keeping     uint8 (rows, h, w, 3) a camera, each file read once from front to back, so a broken one is found before training

Both give every camera at the size that the canvas stores, so the same window is the same either way.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from tqdm import tqdm

from wam.data.lerobot import LeRobotDataset
from wam.data.video import VideoDecoder, VideoError, check_whole, resize_frames

CHUNK = 128  # frames decoded at a time: bounds the memory that frames take before they are resized


class Frames(Protocol):
    """Frames by episode and row."""

    def read(self, episode: int, rows: np.ndarray) -> list[np.ndarray]:
        """Of every camera, uint8 (len(rows), h, w, 3).

        Raises:
            VideoError: a file cannot give them; it is named.
        """


@dataclass(frozen=True)
class DecodedFrames:
    """Frames decoded when they are asked for.

    Attributes:
        size: (h, w) that cameras are resized to.
    """

    source: LeRobotDataset
    cameras: tuple[str, ...]
    size: tuple[int, int]
    decoder: VideoDecoder

    def read(self, episode: int, rows: np.ndarray) -> list[np.ndarray]:
        """See `Frames.read`."""
        spans = [self.source.episodes[episode].videos[camera] for camera in self.cameras]
        return [resize_frames(self.decoder.read_frames(span.path, span.first_frame + rows), self.size) for span in spans]

    def broken(self, episodes: Sequence[int], closely: bool) -> dict[int, str]:
        """Why episodes cannot be seen: their files are missing, cut short, or (`closely`: their first and last frames are decoded) unreadable."""
        found: dict[int, str] = {}
        reasons: dict[Path, str | None] = {}
        for episode in episodes:
            meta = self.source.episodes[episode]
            paths = [meta.videos[camera].path for camera in self.cameras]
            for path in paths:
                if path not in reasons:
                    reasons[path] = _reason(path)
            why = next((reasons[path] for path in paths if reasons[path]), None)
            if why is None and closely:
                try:
                    self.read(episode, np.unique([0, meta.length - 1]))
                except VideoError as error:
                    why = str(error)
            if why is not None:
                found[episode] = why
        return found


class KeptFrames:
    """Frames decoded beforehand.

    Args:
        name: of the split, for the progress bar.
        failures: where not None, episodes that cannot be decoded are put here with the reason, instead of raising.

    Raises:
        VideoError: a file cannot give its frames; it is named.
        ValueError: there is not enough memory.
    """

    def __init__(self, frames: DecodedFrames, episodes: Sequence[int], name: str, failures: dict[int, str] | None = None):
        lengths = [frames.source.episodes[episode].length for episode in episodes]
        starts = np.concatenate([[0], np.cumsum(lengths)]).tolist()
        self.starts = dict(zip(episodes, starts[:-1], strict=True))
        shape = (starts[-1], *frames.size, 3)
        _check_memory(shape, len(frames.cameras))
        self.kept = [np.empty(shape, np.uint8) for _ in frames.cameras]
        with tqdm(total=starts[-1], unit="frame", desc=f"decoding {name}", disable=None, leave=False) as bar:
            for episode in _in_file_order(frames, episodes):
                try:
                    self._decode(frames, episode, bar)
                except VideoError as error:
                    if failures is None:
                        raise
                    failures[episode] = str(error)

    def read(self, episode: int, rows: np.ndarray) -> list[np.ndarray]:
        """See `Frames.read`."""
        where = self.starts[episode] + rows
        return [frames[where] for frames in self.kept]

    def _decode(self, frames: DecodedFrames, episode: int, bar: tqdm) -> None:
        length, first = frames.source.episodes[episode].length, self.starts[episode]
        for at in range(0, length, CHUNK):
            rows = np.arange(at, min(at + CHUNK, length))
            for kept, decoded in zip(self.kept, frames.read(episode, rows), strict=True):
                kept[first + rows[0] : first + rows[-1] + 1] = decoded
            bar.update(len(rows))


def _in_file_order(frames: DecodedFrames, episodes: Sequence[int]) -> list[int]:
    """Episodes as they lie in the files of the first camera, so that each file is read from front to back."""
    by_file: dict[Path, list[tuple[int, int]]] = defaultdict(list)
    for episode in episodes:
        span = frames.source.episodes[episode].videos[frames.cameras[0]]
        by_file[span.path].append((span.first_frame, episode))
    return [episode for spans in by_file.values() for _, episode in sorted(spans)]


def _reason(path: Path) -> str | None:
    try:
        check_whole(path)
    except VideoError as error:
        return str(error)
    return None


def _check_memory(shape: tuple[int, ...], cameras: int) -> None:
    """Refuse to fill the machine: Linux says what is available, elsewhere the user is trusted."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        return
    fields = dict(line.split(":") for line in meminfo.read_text().splitlines() if ":" in line)
    available, need = int(fields.get("MemAvailable", "0 kB").split()[0]) * 1024, int(np.prod(shape, dtype=np.int64)) * cameras
    if 0 < available < need:
        raise ValueError(
            f"data.cache=memory needs {need / 1e9:.1f} GB for {shape[0]} frames of {shape[1]}x{shape[2]} from {cameras} camera{'s' * (cameras > 1)}, and {available / 1e9:.1f} GB are available; set data.cache=none, or use smaller images"
        )
