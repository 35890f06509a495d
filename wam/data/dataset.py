"""Training windows as a map-style torch dataset: files (`lerobot`), time (`windows`), pixels (`frames`, `views`) and units (`units`, `normalize`) meet here.

Everything small is read and normalised once, as one row per control step; a window is then a few gathers.  Actions that are relative
to their block's start are encoded window by window.  Frames are kept too (`cache="memory"`), or decoded when asked for (`cache="none"`).

    row          0 1 2 ... | 0 1 2 ...  | 0 1 ...         all episodes of the split, one after the other
    frames       uint8, by camera                         -> one canvas
    state, action, executed   float32, normalised; `executed` with the statistics of `action`, whose units it shares

Letters: F frames in a window (1 + 4kN), N blocks, A actions a block, B batch.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NotRequired, Protocol, TypedDict, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from wam.config import DataConfig, EmbodimentConfig, TimelineConfig
from wam.config_data import AugmentConfig, grid_of
from wam.data.frames import DecodedFrames, Frames, KeptFrames
from wam.data.lerobot import DatasetError, LeRobotDataset, Split
from wam.data.normalize import Normalizer
from wam.data.outcomes import steps_to_success, success_row
from wam.data.rates import at_control_rate, kinds_of, pace_of
from wam.data.units import Units
from wam.data.video import VideoDecoder, VideoError
from wam.data.views import PLAIN, Canvas, Look, draw_look
from wam.data.windows import Place, Rules, WindowIndices, WindowTable, block_ends, control_grids, rows_at, rows_in_force, window_indices, window_table

log = logging.getLogger(__name__)
ROWS = ("state", "action", "executed")
ARRAYS = ("frames", "frames_is_pad", "state_is_pad", "action_is_pad", "outcome", "latents")
MEAN_OF = 4096  # windows that the mean of relative actions is taken over
OPEN_FILES = 16  # of each camera, in each process
SHOWN = 8  # episodes and reasons that a message names


class Sample(TypedDict):
    """One window.  Where a mask is true, the index lies beyond the episode (or its instruction) and the last row stands in."""

    frames: NotRequired[np.ndarray]  # (F, H, W, 3) uint8, or (V, F, H, W, 3) of V separate cameras; absent where only latents are needed
    frames_is_pad: np.ndarray  # (F,) bool
    state: np.ndarray  # (N, state_dim) float32, normalised
    state_is_pad: np.ndarray  # (N,) bool
    action: np.ndarray  # (N * A, action_dim) float32, normalised: what the policy should do
    executed: np.ndarray  # (N * A, action_dim) float32, normalised as actions: what the robot did
    action_is_pad: np.ndarray  # (N * A,) bool
    outcome: np.ndarray  # (N,) float32: control steps from each block's end to success; inf: it never comes, -1: not known
    instruction: str
    embodiment: str  # whose states and actions these are
    has_video: bool  # frames are real: video may be supervised
    has_action: bool  # states and actions are real: actions may be supervised
    episode: int  # index in the LeRobot dataset
    start: int  # first row
    latents: NotRequired[np.ndarray]  # (C, F, h, w): encoded frames, where they come from a cache


class Batch(TypedDict):
    """Windows side by side: `Sample` as tensors, with B in front."""

    frames: NotRequired[Tensor]  # (B, F, H, W, 3) uint8, or (B, V, F, H, W, 3)
    frames_is_pad: Tensor  # (B, F) bool
    state: Tensor  # (B, N, state_dim)
    state_is_pad: Tensor  # (B, N) bool
    action: Tensor  # (B, N * A, action_dim)
    executed: Tensor  # (B, N * A, action_dim)
    action_is_pad: Tensor  # (B, N * A) bool
    outcome: Tensor  # (B, N)
    instruction: list[str]
    embodiment: list[str]
    has_video: Tensor  # (B,) bool
    has_action: Tensor  # (B,) bool
    episode: Tensor  # (B,) int64
    start: Tensor  # (B,) int64
    latents: NotRequired[Tensor]  # (B, C, F, h, w)


@dataclass(frozen=True)
class EpisodeView:
    """A whole episode on the model's clock, in physical units, for evaluation.

    Attributes:
        frames: (steps, H, W, 3) uint8.
        state, action, executed: (steps, d) float32.
    """

    frames: np.ndarray
    state: np.ndarray
    action: np.ndarray
    executed: np.ndarray
    instruction: str


class Draw(NamedTuple):
    """A window as training sees it: what is drawn for it is a function of these three numbers."""

    index: int  # type: ignore[assignment]  # a tuple's own `index` is not missed
    epoch: int
    seed: int


class Latents(Protocol):
    """Windows that were encoded beforehand (`wam.data.latents`).

    Attributes:
        pixels: whether frames are needed all the same.
    """

    pixels: bool

    def read(self, index: int, rows: np.ndarray) -> np.ndarray:
        """(C, F, h, w) float32 of window `index`, which is made of the frames at `rows` of its episode."""


class WindowDataset(Dataset[Sample]):
    """All windows of a split.

    `dataset[i]` is window i as it was recorded; `dataset[Draw(i, epoch, seed)]` as that epoch trains on it (`data.augment`, `data.wording`).
    Frames of another size are resized (`wam.data.video.resize_frames`).  Episodes without room for one block are left out.

    Args:
        normalizer: with keys "state" and "action"; None leaves the network's units as they are.
        image_size: (height, width) of the frames that come out; None keeps the camera's.
        robot: whose states and actions these are; None takes the columns as they are.

    Attributes:
        lerobot: the dataset in its files.
        fps: control steps a second.
        episodes: indices of the episodes that have windows.
        too_short: indices of those that were left out for being short.
        broken: why others were left out, by index (`data.broken`).
        decoder: with its counts; in a loader's workers each has its own.
        pictures: frames by camera; None where `data.contents` is action.
        canvas: where cameras go.
        outcomes: by index, the row at which success is first seen; inf: never, NaN: not known.
        latents: encoded windows, which samples then have; frames they have where those ask for pixels.

    Raises:
        FileNotFoundError: no dataset, or files of it are missing.
        ValueError: unknown columns or cameras, sizes and rates that do not fit, an empty split, episodes that are all too short.
        VideoError: a video that is missing, damaged or too short (with `cache="none"`, too short shows on access).
    """

    def __init__(
        self,
        data: DataConfig,
        timeline: TimelineConfig,
        split: Split,
        normalizer: Normalizer | None = None,
        image_size: tuple[int, int] | None = None,
        robot: EmbodimentConfig | None = None,
    ):
        self.data, self.timeline, self.split = data, timeline, split
        self.lerobot = LeRobotDataset(data.root, data.language)
        self.pace = pace_of(self.lerobot.fps, data, timeline)
        self.fps = self.lerobot.fps if data.control_hz is None else data.control_hz
        self.canvas = _canvas(self.lerobot, data, image_size)
        self.image_size = self.canvas.size
        self.units = _units(self.lerobot, data, robot)
        self.kinds = kinds_of(self.units, data, self.pace)
        self.rules = Rules(self.pace, math.lcm(data.start_stride, self._fresh_every()), data.short)
        self.decoder = VideoDecoder(("pyav",) if data.decoder == "auto" else (data.decoder,), OPEN_FILES * len(data.cameras))
        self.latents: Latents | None = None
        self.broken: dict[int, str] = {}
        chosen = _episodes_of(self.lerobot, data, split)
        found = self._table_of(chosen)
        self.too_short = [chosen[p] for p in found.too_short]
        self._report_short(found, chosen)
        self.episodes = sorted(set(chosen) - set(self.too_short))
        self.pictures = self._open_frames()
        rows = {e: self._read_rows(e) for e in self.episodes} if data.contents != "video" else {}
        self._leave_out_broken(len(chosen))
        self.table = self._table_of(self.episodes)
        self._positions = {e: p for p, e in enumerate(self.episodes)}
        self.offsets = np.concatenate([[0], np.cumsum([self.lerobot.episodes[e].length for e in self.episodes])])
        self.outcomes = {e: success_row(self.lerobot, e, data.outcome) for e in self.episodes}
        if data.imitate == "successes" and not any(math.isfinite(row) for row in self.outcomes.values()):
            raise DatasetError(f"{data.root}: data.imitate is 'successes', but no {split} episode is known to have succeeded; set data.outcome=success where all have, or data.imitate=all")
        self._raw = {name: np.concatenate([rows[e][name] for e in self.episodes]) for name in ROWS} if rows else {}
        self.normalizer = normalizer

    @property
    def normalizer(self) -> Normalizer | None:
        """What states and actions are normalised with; setting it normalises all rows anew."""
        return self._normalizer

    @normalizer.setter
    def normalizer(self, normalizer: Normalizer | None) -> None:
        self._normalizer = normalizer
        self._rows: dict[str, np.ndarray] = {}
        if not self._raw:
            return
        self._rows = {"state": self._normal("state", self.units.encode_state(self._raw["state"]))}
        if not self.units.relative:  # else they depend on where a block begins
            self._rows |= {name: self._normal("action", self.units.encode_actions(self._raw[name])) for name in ("action", "executed")}

    @property
    def instructions(self) -> list[str]:
        """What the episodes of this split are asked to do, in every wording that is used, each once, sorted."""
        texts = {text for e in self.episodes for text in self.lerobot.episodes[e].tasks}
        if self.data.wording == "any":
            texts |= {text for e in self.episodes for column in self.lerobot.language for text in self.lerobot.words(e, column).texts if text.strip()}
        return sorted(texts)

    @property
    def source(self) -> dict[str, Any]:
        """Where the data comes from, for a checkpoint to say: directory, amounts, and what its maker wrote about itself."""
        rows = int(self.offsets[-1])
        said = {"root": str(self.data.root), "episodes": len(self.episodes), "frames": rows, "fps": self.lerobot.fps, "recorded": self.lerobot.info.get("wam")}
        return said | ({"broken": len(self.broken)} if self.broken else {})

    def fit_normalizer(self, also: Sequence[WindowDataset] = ()) -> Normalizer:
        """Statistics of this split's states and actions (labels), in the network's units and on the model's clock; over further datasets of the robot too.

        Raises:
            ValueError: the dataset has no states and actions (data.contents is video), or they are not finite.
        """
        if not self._raw:
            raise DatasetError(f"{self.data.root} has video alone (data.contents), so no statistics of states and actions; take those of a dataset of the robot that has them")
        return self.units.fit([rows for data in (self, *also) for rows in data._on_the_clock()], self.timeline)

    def mean_action(self) -> np.ndarray:
        """The mean label (action_dim,), normalised where the dataset is: the best guess of a policy that sees nothing."""
        if not self._raw:
            return np.zeros(self.units.action_dim, np.float32)
        if "action" in self._rows:
            return self._rows["action"].mean(axis=0, dtype=np.float64).astype(np.float32)
        some = np.linspace(0, len(self) - 1, min(len(self), MEAN_OF)).round().astype(int)
        blocks = [self._actions("action", self.table.place(i), self.rows(i)) for i in some.tolist()]
        return np.concatenate([block[: self.timeline.actions_per_block] for block in blocks]).mean(axis=0, dtype=np.float64).astype(np.float32)

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int | Draw) -> Sample:
        if isinstance(index, Draw):
            return self.sample(*index)
        return self._sample(index, PLAIN, None)

    def sample(self, index: int, epoch: int, seed: int) -> Sample:
        """Window `index` as an epoch trains on it: a pure function of its arguments, whatever was asked for before, in whichever process.

        Raises:
            IndexError: there is no such window.
        """
        if self.split != "train" or (self.data.augment == AugmentConfig() and self.data.wording == "first"):
            return self._sample(index, PLAIN, None)
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch, index])))
        look = draw_look(self.data.augment, len(self.data.cameras), rng)
        return self._sample(index, look, float(rng.random()) if self.data.wording == "any" else None)

    def rows(self, index: int) -> WindowIndices:
        """The rows of its episode that window `index` is made of."""
        place = self.table.place(index)
        return window_indices(place.stop, place.start, self.timeline, self.pace)

    def episode(self, index: int) -> EpisodeView:
        """A whole episode by its index in the LeRobot dataset, in physical units.

        Raises:
            ValueError: it is not one of this split's.
        """
        if index not in self._positions:
            raise ValueError(
                f"episode {index} is not in this split, which has {len(self.episodes)}: {self.episodes[:8]}{'...' if len(self.episodes) > 8 else ''}"
            )
        raw, meta = self._rows_of(index), self.lerobot.episodes[index]
        steps = np.arange(int(meta.length / self.pace) + 1)
        steps = steps[rows_at(steps, self.pace) < meta.length]
        states, actions = rows_at(steps, self.pace), rows_in_force(steps, self.pace)
        frames = self._canvas_at(self._positions[index], states)
        return EpisodeView(frames, raw["state"][states], raw["action"][actions], raw["executed"][actions], meta.instruction)

    def _rows_of(self, episode: int) -> dict[str, np.ndarray]:
        """Raw rows of an episode: "state", and "action" and "executed" as a control step that begins there has them."""
        position = self._positions[episode]
        return {name: values[self.offsets[position] : self.offsets[position + 1]] for name, values in self._raw.items()}

    # -------------------------------------------------------------------------------------------- one window

    def _sample(self, index: int, look: Look, wording: float | None) -> Sample:
        place, rows = self.table.place(index), self.rows(index)
        episode, contents = self.episodes[place.position], self.data.contents
        sample = Sample(
            frames_is_pad=rows.frames_is_pad | (contents == "action"),
            state=self._states(place, rows),
            state_is_pad=rows.state_is_pad | (contents == "video"),
            action=self._actions("action", place, rows),
            executed=self._actions("executed", place, rows),
            action_is_pad=rows.action_is_pad | (contents == "video") | self._not_imitated(episode),
            outcome=self._outcome(episode, place),
            instruction=self._instruction(episode, place.start, wording),
            embodiment=self.data.embodiment,
            has_video=contents != "action",
            has_action=contents != "video",
            episode=episode,
            start=place.start,
        )
        if self.latents is not None:
            sample["latents"] = self.latents.read(index, rows.frames)
        if self.latents is None or self.latents.pixels:
            sample["frames"] = self._canvas_at(place.position, rows.frames, look)
        return sample

    def _outcome(self, episode: int, place: Place) -> np.ndarray:
        """(N,): steps to success of a window's blocks; of several instructions, the last one's alone is the episode's."""
        ends, whole = block_ends(place.start, self.timeline, self.pace), place.stop == self.lerobot.episodes[episode].length
        return steps_to_success(self.outcomes[episode] if whole else math.nan, ends, place.stop, self.pace)

    def _not_imitated(self, episode: int) -> bool:
        return self.data.imitate == "successes" and not math.isfinite(self.outcomes[episode])

    def _fresh_every(self) -> int:
        """Rows between two frames that were really seen, at which windows begin.

        Raises:
            DatasetError: windows would be made of frames that were not.
        """
        every, rows = self.lerobot.frame_every, self.timeline.stride * self.pace
        if every > 1 and rows % every:
            raise DatasetError(f"{self.data.root} was recorded with a frame every {every} rows, but timeline.frame_stride {self.timeline.stride} asks for one every {rows:g}; use a multiple of {every}")
        return every

    def _canvas_at(self, position: int, rows: np.ndarray, look: Look = PLAIN) -> np.ndarray:
        """The canvas (F, H, W, 3) uint8 at rows of the episode at a position of `episodes`; black where there are no cameras."""
        if self.pictures is None:
            return np.zeros(self.canvas.shape(len(rows)), np.uint8)
        return self.canvas.place(self.pictures.read(self.episodes[position], rows), look)

    def _states(self, place: Place, rows: WindowIndices) -> np.ndarray:
        """(N, state_dim): normalised; zeros where there are none."""
        if not self._rows:
            return np.zeros((self.timeline.blocks, self.units.state_dim), np.float32)
        return self._rows["state"][self.offsets[place.position] + rows.state]

    def _actions(self, name: str, place: Place, rows: WindowIndices) -> np.ndarray:
        """(N * A, action_dim): normalised, where they are relative to the state at their block's start; zeros where there are none."""
        offset = self.offsets[place.position]
        if not self._rows:
            return np.zeros((len(rows.action), self.units.action_dim), np.float32)
        if name in self._rows:
            return self._rows[name][offset + rows.action]
        blocks = (self.timeline.blocks, self.timeline.actions_per_block)
        raw = self._raw[name][offset + rows.action].reshape(*blocks, -1)
        encoded = self.units.encode_actions(raw, self._raw["state"][offset + rows.state], rows.action_is_pad.reshape(blocks))
        return self._normal("action", encoded.reshape(blocks[0] * blocks[1], -1))

    def _instruction(self, episode: int, row: int, wording: float | None) -> str:
        if wording is None:
            return self.lerobot.instruction(episode, row)
        texts = self.lerobot.alternatives(episode, row)
        return texts[int(wording * len(texts))]

    def _normal(self, key: str, values: np.ndarray) -> np.ndarray:
        return values if self._normalizer is None else self._normalizer.normalize(key, values)

    # -------------------------------------------------------------------------------------------- all of them

    def _spans(self, episode: int) -> list[tuple[int, int]]:
        if self.data.spans == "episode":
            return [(0, self.lerobot.episodes[episode].length)]
        return [(span.start, span.stop) for span in self.lerobot.spans(episode)]

    def _table_of(self, episodes: list[int]) -> WindowTable:
        try:
            return window_table([self._spans(e) for e in episodes], self.timeline, self.rules, episodes)
        except ValueError as error:
            raise DatasetError(f"{self.data.root}, {self.split} episodes: {error}") from error

    def _report_short(self, table: WindowTable, episodes: list[int]) -> None:
        """Say which spans have no room for a block, where that is more than episodes left out (`too_short`)."""
        short, padded = table.short_spans, self.data.short == "pad"
        if short and (padded or self.data.spans == "language"):
            some = ", ".join(f"rows {place.start}..{place.stop - 1} of episode {episodes[place.position]}" for place in short[:SHOWN])
            log.warning("%d of %d spans of %s, %s, have no room for a block and are %s: %s%s", len(short), len(table.places), self.data.root, self.split, "padded" if padded else "left out", some, ", ..." if len(short) > SHOWN else "")

    def _open_frames(self) -> Frames | None:
        """The frames of `episodes`; those that cannot be seen are `broken` where that is allowed."""
        if self.data.contents == "action":
            return None
        frames, skip = DecodedFrames(self.lerobot, self.data.cameras, self.canvas.stored, self.decoder), self.data.broken == "skip"
        on_demand = self.data.cache == "none" or self.data.latents is not None
        if skip or on_demand:
            broken = frames.broken(self.episodes, closely=skip and on_demand)
            if broken and not skip:
                raise VideoError(next(iter(broken.values())))
            self.broken |= broken
        if on_demand:
            return frames
        return KeptFrames(frames, [e for e in self.episodes if e not in self.broken], self.split, self.broken if skip else None)

    def _read_rows(self, episode: int) -> dict[str, np.ndarray]:
        """Raw rows of an episode, actions on the model's clock; none where they are broken and that is allowed."""
        if episode in self.broken:
            return {}
        try:
            rows = self.units.rows(self.lerobot, episode)
        except (DatasetError, OSError) as error:
            if self.data.broken == "refuse":
                raise
            self.broken[episode] = str(error)
            return {}
        return {name: values if name == "state" else at_control_rate(values, self.kinds, self.pace) for name, values in rows.items()}

    def _leave_out_broken(self, of: int) -> None:
        """Say which episodes are broken, and refuse where they are too many."""
        if not self.broken:
            return
        self.broken = dict(sorted(self.broken.items()))
        reasons = Counter(self.broken.values())
        some = "\n".join(f"  {count} x {reason}" for reason, count in reasons.most_common(SHOWN))
        said = f"{len(self.broken)} of {of} {self.split} episodes of {self.data.root} are broken ({', '.join(map(str, list(self.broken)[:SHOWN]))}{', ...' if len(self.broken) > SHOWN else ''})"
        if len(self.broken) > self.data.max_broken * of or len(self.broken) == len(self.episodes):
            raise DatasetError(f"{said}, more than data.max_broken {self.data.max_broken:g} of them; copy or record them again, or raise data.max_broken:\n{some}")
        log.warning("%s and left out:\n%s", said, some)
        self.episodes = [e for e in self.episodes if e not in self.broken]

    def _on_the_clock(self) -> Iterator[dict[str, np.ndarray]]:
        """Raw states and actions of every span, a row for each control step; once for each row that the clock may start at."""
        for episode in self.episodes:
            raw = self._rows_of(episode)
            for first, stop in self._spans(episode):
                for states, actions in control_grids(first, stop, self.pace):
                    yield {"state": raw["state"][states], "action": raw["action"][actions]}


def collate(samples: list[Sample]) -> Batch:
    """Windows to a batch of tensors; instructions and robots become lists.  Robots of other widths are padded with zeros to the widest."""
    rows = cast(list[dict[str, Any]], samples)
    batch: dict[str, Any] = {key: _stack([row[key] for row in rows]) for key in ARRAYS if all(key in row for row in rows)}
    batch |= {key: _stack(_padded([row[key] for row in rows])) for key in ROWS}
    batch |= {key: [row[key] for row in rows] for key in ("instruction", "embodiment")}
    batch |= {key: torch.tensor([row[key] for row in rows]) for key in ("has_video", "has_action", "episode", "start")}
    return cast(Batch, batch)


def _stack(arrays: list[np.ndarray]) -> Tensor:
    """One copy: in a loader's worker straight into the memory that it shares with the trainer."""
    first = torch.from_numpy(np.asarray(arrays[0]))
    shape = (len(arrays), *first.shape)
    out = torch.empty(shape, dtype=first.dtype)
    if get_worker_info() is not None:
        storage = torch.UntypedStorage._new_shared(out.nbytes, device="cpu")
        out = torch.empty(0, dtype=first.dtype).set_(storage).view(shape)
    np.stack(arrays, out=out.numpy())
    return out


def _padded(arrays: list[np.ndarray]) -> list[np.ndarray]:
    """(n, d) each, to the widest d."""
    widest = max(array.shape[-1] for array in arrays)
    return [array if array.shape[-1] == widest else np.pad(array, ((0, 0), (0, widest - array.shape[-1]))) for array in arrays]


def _canvas(source: LeRobotDataset, data: DataConfig, image_size: tuple[int, int] | None) -> Canvas:
    """The config's canvas; without a size, that of the first camera in every cell."""
    if data.contents == "action":
        return Canvas.of(data, image_size) if image_size else Canvas(data.layout, len(data.cameras), grid_of(data.layout, len(data.cameras)))
    shapes = [source.camera(camera).shape for camera in data.cameras]  # unknown cameras are named here
    if image_size is not None:
        return Canvas.of(data, image_size)
    height, width = shapes[0][:2]
    rows, columns = grid_of(data.layout, len(data.cameras))
    return Canvas(data.layout, len(data.cameras), (rows * height, columns * width), data.augment.crop)


def _units(source: LeRobotDataset, data: DataConfig, robot: EmbodimentConfig | None) -> Units:
    """The robot's units; without one, the columns as they are.  They are compared with the columns, where those are read."""
    if robot is None and data.contents == "video":
        robot = EmbodimentConfig(data.embodiment, 1, 1)
    if robot is None:
        vectors = [source.feature(column) for column in (data.state, data.action, data.executed_action or data.action)]
        state, action, executed = (math.prod(feature.shape) for feature in vectors)
        if action != executed and all(len(feature.shape) == 1 for feature in vectors):
            raise ValueError(
                f"data.executed_action {data.executed_action!r} has {executed} dimensions, data.action {data.action!r} has {action}; they are the same quantity, asked and done"
            )
        robot = EmbodimentConfig(data.embodiment, state, action)
    units = Units.of(robot, data)
    if data.contents != "video":
        units.check(source)
    return units


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
