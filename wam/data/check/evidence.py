"""What the checks look at, read once: every row of the columns that matter, and the frames of some episodes, made small.

    files  ->  gather  ->  Evidence: rows of state, action, executed, timestamps of every episode
                                     of some episodes and each camera: first, middle and last frame, and how much the picture moves

A file or column that cannot be read becomes a finding, and the checks go on with what there is.  Columns are small and read whole;
frames are not, so episodes are chosen evenly over the dataset (a mistake in recording rarely keeps to one of them).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from wam.config import Config, GroupConfig
from wam.data.check.findings import Finding
from wam.data.lerobot import LeRobotDataset
from wam.data.units import Part, Units
from wam.data.video import VideoDecoder, resize_frames

THUMBNAIL = 128  # longest side of a frame that is shown
GREY = 32  # side of the frames in which motion is measured: noise and compression average out
CHUNK = 64  # frames decoded at a time
TIMESTAMP = "timestamp"


@dataclass(frozen=True)
class Clip:
    """An episode through one camera.

    Attributes:
        shape: (H, W) of the file.
        stills: (3, h, w, 3) uint8, the first, middle and last frame, small.
        picture: (GREY, GREY) float32, the mean of its frames in grey, 0..255.
        energy: (rows - 1,) mean absolute change of grey from row i to row i + 1.
    """

    episode: int
    shape: tuple[int, int]
    stills: np.ndarray
    picture: np.ndarray
    energy: np.ndarray


@dataclass(frozen=True)
class Evidence:
    """Everything that the checks see.

    Attributes:
        rows: by column, one (length, d) float64 array an episode, in order; a column that could not be read is absent.
        clips: by camera.
        problems: what could not be read.
        checkpoint: a policy folder that training goes on from, where there is one.
    """

    dataset: LeRobotDataset
    config: Config
    rows: dict[str, list[np.ndarray]]
    clips: dict[str, list[Clip]]
    problems: list[Finding] = field(default_factory=list)
    checkpoint: Path | None = None

    @cached_property
    def units(self) -> Units:
        """What the columns mean to the config's robot."""
        return Units.of(self.config.model.embodiment(self.config.data.embodiment), self.config.data)

    @cached_property
    def state(self) -> list[np.ndarray]:
        """States of every episode, group by group where the robot has groups; empty where they cannot be read."""
        return self._joined(self.units.robot.state_groups, self.units.state)

    @cached_property
    def action(self) -> list[np.ndarray]:
        """Labels of every episode, likewise."""
        return self._joined(self.units.robot.action_groups, self.units.action)

    def _joined(self, groups: tuple[GroupConfig, ...], parts: tuple[Part, ...]) -> list[np.ndarray]:
        if not groups:
            return self.rows.get(parts[0].column, [])
        if any(part.column not in self.rows or self.rows[part.column][0].shape[1] < part.stop for part in parts):
            return []
        return [np.concatenate(own, axis=1) for own in zip(*([x[:, part.start : part.stop] for x in self.rows[part.column]] for part in parts), strict=True)]

    def numbers(self) -> dict[str, np.ndarray]:
        """(rows, d) of every column of states and actions, all episodes one after the other."""
        return {key: np.concatenate(rows) for key, rows in self.rows.items() if key != TIMESTAMP}

    def part_of(self, what: str, dimension: int) -> tuple[Part, str]:
        """The group that a dimension of `state` or `action` belongs to, and the dimension's name: of the column where it lies, and of the group."""
        parts: tuple[Part, ...] = getattr(self.units, what)
        part = next((p for p in parts if dimension < p.raw.stop), parts[-1])
        return part, self.name(part.column, part.start + dimension - part.raw.start)

    def name(self, key: str, dimension: int) -> str:
        """`action[3] (gripper)`, where the dataset names its dimensions."""
        names = dimension_names(self.dataset.info, key)
        return f"{key}[{dimension}]" + (f" ({names[dimension]})" if dimension < len(names) else "")


def dimension_names(info: dict[str, Any], key: str) -> list[str]:
    """Names that `meta/info.json` gives a column's dimensions; LeRobot has written lists, and lists under a key."""
    names = info["features"].get(key, {}).get("names")
    while isinstance(names, dict) and len(names) == 1:
        names = next(iter(names.values()))
    return [str(name) for name in names] if isinstance(names, list) else []


def gather(dataset: LeRobotDataset, config: Config, episodes: int = 16, checkpoint: Path | None = None) -> Evidence:
    """Read what the checks need: all rows, and the frames of about `episodes` episodes."""
    problems: list[Finding] = []
    data = config.data
    units = Units.of(config.model.embodiment(data.embodiment), data)
    keys = dict.fromkeys(key for part in (*units.state, *units.action) for key in (part.column, part.executed))
    rows = {key: found for key in keys if (found := _rows(dataset, key, problems))}
    if TIMESTAMP in dataset.features and (times := _rows(dataset, TIMESTAMP, problems)):
        rows[TIMESTAMP] = times
    chosen = sorted(set(np.linspace(0, len(dataset.episodes) - 1, min(episodes, len(dataset.episodes))).round().astype(int).tolist()))
    clips = {camera: seen for camera in data.cameras if (seen := _clips(dataset, camera, chosen, problems))}
    return Evidence(dataset, config, rows, clips, problems, checkpoint)


def read_json(path: Path) -> Any:
    """A JSON file, or None where there is none.

    Raises:
        ValueError: it is not JSON (named).
    """
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error})") from error


def _rows(dataset: LeRobotDataset, key: str, problems: list[Finding]) -> list[np.ndarray]:
    try:
        found = [dataset.read(episode.index, key).astype(np.float64) for episode in dataset.episodes]
        if found and found[0].ndim != 2:
            raise ValueError(f"it has shape {dataset.feature(key).shape} a row")
        return found
    except (ValueError, OSError) as error:
        problems.append(
            Finding(
                "error",
                "files",
                key,
                str(error),
                "a column with a vector in every row of every episode",
                "name another column in data, or record or copy the dataset again",
            )
        )
        return []


def _clips(dataset: LeRobotDataset, camera: str, episodes: Sequence[int], problems: list[Finding]) -> list[Clip]:
    decoder, clips = VideoDecoder(), []
    try:
        dataset.camera(camera)
    except ValueError as error:
        problems.append(Finding("error", "files", camera, str(error), "a camera of the dataset", "name its cameras in data.cameras"))
        return []
    for episode in tqdm(episodes, desc=f"looking through {camera.rpartition('.')[2]}", unit="episode", disable=None, leave=False):
        try:
            clips.append(_clip(dataset, decoder, camera, episode))
        except (ValueError, OSError) as error:
            problems.append(
                Finding(
                    "error", "files", f"{camera}, episode {episode}", str(error), "a frame for every row", "record or copy the episode again, or leave it out"
                )
            )
    return clips


def _clip(dataset: LeRobotDataset, decoder: VideoDecoder, camera: str, index: int) -> Clip:
    episode = dataset.episodes[index]
    span, length = episode.videos[camera], episode.length
    shown = {0, length // 2, length - 1}
    grey, shape = np.empty((length, GREY, GREY), np.float32), (0, 0)
    stills: dict[int, np.ndarray] = {}
    for at in range(0, length, CHUNK):
        numbers = np.arange(at, min(at + CHUNK, length))
        frames = decoder.read_frames(span.path, span.first_frame + numbers)
        shape = (frames.shape[1], frames.shape[2])
        grey[numbers] = resize_frames(frames, (GREY, GREY)).mean(-1)
        stills |= {row: _thumbnail(frames[row - at]) for row in shown & set(numbers.tolist())}
    energy, every = np.abs(np.diff(grey, axis=0)).mean((1, 2)), dataset.frame_every
    if every > 1:  # a held frame does not move, the next one moves for both
        energy = np.convolve(energy, np.full(every, 1 / every, energy.dtype), "same")[: length - 1]
    return Clip(index, shape, np.stack([stills[row] for row in (0, length // 2, length - 1)]), grey.mean(0), energy)


def _thumbnail(frame: np.ndarray) -> np.ndarray:
    """A frame, at most THUMBNAIL wide and high, in its own proportions."""
    height, width = frame.shape[:2]
    scale = min(1.0, THUMBNAIL / max(height, width))
    return resize_frames(frame[None], (max(1, round(height * scale)), max(1, round(width * scale))))[0]
