"""Training windows as a map-style torch dataset: files (`lerobot`), time (`windows`), pixels (`video`) and units (`normalize`) meet here.

Everything small is read and normalised once, as one row per control step; a window is then a few gathers.  Frames are kept too
(`cache="memory"`: decoded up front, file by file, so a broken video is found before training and not in hour three), or decoded
whenever a window is asked for (`cache="none"`).

    row          0 1 2 ... | 0 1 2 ...  | 0 1 ...         all episodes of the split, one after the other
    frames       uint8 (rows, H, W, 3), or decoded on demand
    state, action, executed   float32, normalised; `executed` with the statistics of `action`, whose units it shares

Letters: F frames in a window (1 + 4kN), N blocks, A actions a block, B batch.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from wam.config import DataConfig, TimelineConfig
from wam.data.lerobot import DatasetError, LeRobotDataset, Split
from wam.data.normalize import Normalizer
from wam.data.video import VideoDecoder, check_whole, resize_frames
from wam.data.windows import window_indices, window_table

CHUNK = 128  # frames decoded at a time: bounds the memory that frames take before they are resized


class Sample(TypedDict):
    """One window.  Where a mask is true, the index lies beyond the episode and its last row stands in."""

    frames: np.ndarray  # (F, H, W, 3) uint8
    frames_is_pad: np.ndarray  # (F,) bool
    state: np.ndarray  # (N, state_dim) float32, normalised
    state_is_pad: np.ndarray  # (N,) bool
    action: np.ndarray  # (N * A, action_dim) float32, normalised: what the policy should do
    executed: np.ndarray  # (N * A, action_dim) float32, normalised as actions: what the robot did
    action_is_pad: np.ndarray  # (N * A,) bool
    instruction: str
    embodiment: str  # whose states and actions these are
    has_video: bool  # frames are real: video may be supervised
    has_action: bool  # states and actions are real: actions may be supervised
    episode: int  # index in the LeRobot dataset
    start: int  # first row


class Batch(TypedDict):
    """Windows side by side: `Sample` as tensors, with B in front."""

    frames: Tensor  # (B, F, H, W, 3) uint8
    frames_is_pad: Tensor  # (B, F) bool
    state: Tensor  # (B, N, state_dim)
    state_is_pad: Tensor  # (B, N) bool
    action: Tensor  # (B, N * A, action_dim)
    executed: Tensor  # (B, N * A, action_dim)
    action_is_pad: Tensor  # (B, N * A) bool
    instruction: list[str]
    embodiment: list[str]
    has_video: Tensor  # (B,) bool
    has_action: Tensor  # (B,) bool
    episode: Tensor  # (B,) int64
    start: Tensor  # (B,) int64


@dataclass(frozen=True)
class EpisodeView:
    """A whole episode, in physical units, for evaluation.

    Attributes:
        frames: (length, H, W, 3) uint8.
        state, action, executed: (length, d) float32.
    """

    frames: np.ndarray
    state: np.ndarray
    action: np.ndarray
    executed: np.ndarray
    instruction: str


class WindowDataset(Dataset[Sample]):
    """All windows of a split.

    Frames of another size are resized (`wam.data.video.resize_frames`).  Episodes without room for one block are left out.

    Args:
        normalizer: with keys "state" and "action"; None leaves physical units.
        image_size: (height, width) of the frames that come out; None keeps the camera's.

    Attributes:
        lerobot: the dataset in its files.
        fps: control steps a second.
        episodes: indices of the episodes that have windows.
        too_short: indices of those that were left out.
        decoder: with its counts; in a loader's workers each has its own.

    Raises:
        FileNotFoundError: no dataset, or files of it are missing.
        ValueError: unknown columns or cameras, sizes that do not fit, an empty split, episodes that are all too short.
        VideoError: a video that is missing, damaged or too short (with `cache="none"`, too short shows on access).
    """

    def __init__(
        self, data: DataConfig, timeline: TimelineConfig, split: Split, normalizer: Normalizer | None = None, image_size: tuple[int, int] | None = None
    ):
        self.data, self.timeline = data, timeline
        self.lerobot = LeRobotDataset(data.root, data.language)
        self.fps = self.lerobot.fps
        self.camera = data.cameras[0]
        height, width = self.lerobot.camera(self.camera).shape[:2]
        self.image_size = (height, width) if image_size is None else (image_size[0], image_size[1])
        chosen = _episodes_of(self.lerobot, data, split)
        lengths = [self.lerobot.episodes[e].length for e in chosen]
        try:
            self.table = window_table(lengths, timeline)
        except ValueError as error:
            raise DatasetError(f"{data.root}, {split} episodes: {error}") from error
        self.too_short = [chosen[p] for p in self.table.too_short]
        self.episodes = [e for e in chosen if e not in set(self.too_short)]
        self.table = window_table([self.lerobot.episodes[e].length for e in self.episodes], timeline)
        self.offsets = np.concatenate([[0], np.cumsum([self.lerobot.episodes[e].length for e in self.episodes])])
        columns = {"state": data.state, "action": data.action, "executed": data.executed_action or data.action}
        self._physical = {name: _rows(self.lerobot, self.episodes, column) for name, column in columns.items()}
        _check_same_width(data, self._physical["action"], self._physical["executed"])
        self.normalizer = normalizer
        self.decoder = VideoDecoder()
        self.frames = self._decode_all(split) if data.cache == "memory" else None
        if self.frames is None:
            for path in sorted({self.lerobot.episodes[e].videos[self.camera].path for e in self.episodes}):
                check_whole(path)

    @property
    def normalizer(self) -> Normalizer | None:
        """What states and actions are normalised with; setting it normalises all rows anew."""
        return self._normalizer

    @normalizer.setter
    def normalizer(self, normalizer: Normalizer | None) -> None:
        self._normalizer = normalizer
        self._rows = {name: _normal(normalizer, "state" if name == "state" else "action", rows) for name, rows in self._physical.items()}

    @property
    def instructions(self) -> list[str]:
        """What the episodes of this split are asked to do, each once, sorted."""
        return sorted({text for e in self.episodes for text in self.lerobot.episodes[e].tasks})

    @property
    def source(self) -> dict[str, Any]:
        """Where the data comes from, for a checkpoint to say: directory, amounts, and what its maker wrote about itself."""
        rows = int(self.offsets[-1])
        return {"root": str(self.data.root), "episodes": len(self.episodes), "frames": rows, "fps": self.fps, "recorded": self.lerobot.info.get("wam")}

    def fit_normalizer(self) -> Normalizer:
        """Statistics of this split's states and actions (labels), with the method of `data.normalization`."""
        return Normalizer.fit({name: self._physical[name] for name in ("state", "action")}, self.data.normalization)

    def mean_action(self) -> np.ndarray:
        """The mean label (action_dim,), normalised where the dataset is: the best guess of a policy that sees nothing."""
        return self._rows["action"].mean(axis=0, dtype=np.float64).astype(np.float32)

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Sample:
        position, start = self.table.locate(index)
        episode = self.episodes[position]
        rows = window_indices(self.lerobot.episodes[episode].length, start, self.timeline)
        offset = self.offsets[position]
        return Sample(
            frames=self._frames(position, rows.frames),
            frames_is_pad=rows.frames_is_pad,
            state=self._rows["state"][offset + rows.state],
            state_is_pad=rows.state_is_pad,
            action=self._rows["action"][offset + rows.action],
            executed=self._rows["executed"][offset + rows.action],
            action_is_pad=rows.action_is_pad,
            instruction=self.lerobot.instruction(episode, start),
            embodiment=self.data.embodiment,
            has_video=True,
            has_action=True,
            episode=episode,
            start=start,
        )

    def episode(self, index: int) -> EpisodeView:
        """A whole episode by its index in the LeRobot dataset, in physical units.

        Raises:
            ValueError: it is not one of this split's.
        """
        if index not in self.episodes:
            raise ValueError(
                f"episode {index} is not in this split, which has {len(self.episodes)}: {self.episodes[:8]}{'...' if len(self.episodes) > 8 else ''}"
            )
        position = self.episodes.index(index)
        action = self.lerobot.read(index, self.data.action).astype(np.float32)
        executed = action if self.data.executed_action is None else self.lerobot.read(index, self.data.executed_action).astype(np.float32)
        frames = self._frames(position, np.arange(self.lerobot.episodes[index].length))
        return EpisodeView(frames, self.lerobot.read(index, self.data.state).astype(np.float32), action, executed, self.lerobot.episodes[index].instruction)

    def _frames(self, position: int, rows: np.ndarray) -> np.ndarray:
        if self.frames is not None:
            return self.frames[self.offsets[position] + rows]
        span = self.lerobot.episodes[self.episodes[position]].videos[self.camera]
        return resize_frames(self.decoder.read_frames(span.path, span.first_frame + rows), self.image_size)

    def _decode_all(self, split: Split) -> np.ndarray:
        """Every frame of the split, each file read once from front to back."""
        total = int(self.offsets[-1])
        shape = (total, *self.image_size, 3)
        _check_memory(shape)
        frames = np.empty(shape, np.uint8)
        by_file: dict[Path, list[int]] = defaultdict(list)
        for position, episode in enumerate(self.episodes):
            by_file[self.lerobot.episodes[episode].videos[self.camera].path].append(position)
        with tqdm(total=total, unit="frame", desc=f"decoding {split}", disable=None, leave=False) as bar:
            for path, positions in by_file.items():
                spans = [self.lerobot.episodes[self.episodes[p]].videos[self.camera] for p in positions]
                for span, position in sorted(zip(spans, positions, strict=True), key=lambda pair: pair[0].first_frame):
                    first, length = int(self.offsets[position]), int(self.offsets[position + 1] - self.offsets[position])
                    for at in range(0, length, CHUNK):
                        rows = np.arange(at, min(at + CHUNK, length))
                        frames[first + rows] = resize_frames(self.decoder.read_frames(path, span.first_frame + rows), self.image_size)
                        bar.update(len(rows))
        return frames


def collate(samples: list[Sample]) -> Batch:
    """Windows to a batch of tensors; instructions become a list."""

    def stack(key: str) -> Tensor:
        return torch.from_numpy(np.stack([sample[key] for sample in samples]))  # type: ignore[literal-required]

    return Batch(
        frames=stack("frames"),
        frames_is_pad=stack("frames_is_pad"),
        state=stack("state"),
        state_is_pad=stack("state_is_pad"),
        action=stack("action"),
        executed=stack("executed"),
        action_is_pad=stack("action_is_pad"),
        instruction=[sample["instruction"] for sample in samples],
        embodiment=[sample["embodiment"] for sample in samples],
        has_video=torch.tensor([sample["has_video"] for sample in samples]),
        has_action=torch.tensor([sample["has_action"] for sample in samples]),
        episode=torch.tensor([sample["episode"] for sample in samples]),
        start=torch.tensor([sample["start"] for sample in samples]),
    )


def _episodes_of(source: LeRobotDataset, data: DataConfig, split: Split) -> list[int]:
    parts = source.split(data.validation_fraction)
    if split not in parts:
        raise ValueError(f"unknown split {split!r}; expected 'train' or 'validation'")
    if not parts[split]:
        raise DatasetError(
            f"{data.root} has no {split} episodes: {len(source.episodes)} episodes of {len(source.tasks)} tasks, data.validation_fraction {data.validation_fraction}; "
            "record at least two episodes of a task and hold out a fraction above 0"
        )
    return parts[split]


def _rows(source: LeRobotDataset, episodes: list[int], key: str) -> np.ndarray:
    feature = source.feature(key)
    if len(feature.shape) > 1:
        raise DatasetError(f"feature {key!r} of {source.root} has shape {feature.shape}; a state or action is a vector, (dimensions,)")
    parts = [source.read(e, key).astype(np.float32) for e in episodes]
    for episode, rows in zip(episodes, parts, strict=True):
        if not np.isfinite(rows).all():
            row, dimension = np.argwhere(~np.isfinite(rows))[0]
            raise DatasetError(
                f"{source.episodes[episode].data_file}: {key} of episode {episode} is {rows[row, dimension]} at row {row}, dimension {dimension}; repair the episode, or record it again"
            )
    return np.concatenate(parts)


def _normal(normalizer: Normalizer | None, key: str, rows: np.ndarray) -> np.ndarray:
    return rows if normalizer is None else normalizer.normalize(key, rows)


def _check_same_width(data: DataConfig, action: np.ndarray, executed: np.ndarray) -> None:
    if action.shape != executed.shape:
        raise ValueError(
            f"data.executed_action {data.executed_action!r} has {executed.shape[-1]} dimensions, data.action {data.action!r} has {action.shape[-1]}; they are the same quantity, asked and done"
        )


def _check_memory(shape: tuple[int, ...]) -> None:
    """Refuse to fill the machine: Linux says what is available, elsewhere the user is trusted."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        return
    fields = dict(line.split(":") for line in meminfo.read_text().splitlines() if ":" in line)
    available, need = int(fields.get("MemAvailable", "0 kB").split()[0]) * 1024, int(np.prod(shape, dtype=np.int64))
    if 0 < available < need:
        raise ValueError(
            f"data.cache=memory needs {need / 1e9:.1f} GB for {shape[0]} frames of {shape[1]}x{shape[2]}, and {available / 1e9:.1f} GB are available; set data.cache=none, or use smaller images"
        )
