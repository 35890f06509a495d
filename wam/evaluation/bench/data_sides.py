"""What `wam bench data` measures: several ways to the same windows of the same files.

    ours, decoding          this reader, frames decoded whenever a window is asked for (data.cache=none)
    ours, in memory         this reader, all frames decoded beforehand (data.cache=memory)
    ours, cached latents    this reader, windows encoded beforehand (data.latents; a linear codec, whose latents are as large as any)
    raw decord              the same frames in the same order, and nothing else: no states, no actions, no instruction
    LeRobot                 its own dataset class over the same windows, in another environment (`lerobot_side`)

A side is a row of `SIDES`: what it is called, and how it is made ready for a case.  All but LeRobot's go through the same torch loader,
which collates batches into tensors; workers are started, and files opened, before the clock is.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from wam.codec.linear import LinearCodec
from wam.config import CodecConfig, DataConfig, TimelineConfig
from wam.data.dataset import WindowDataset, collate
from wam.data.latents import cache_of, encode_shard, shards_of, use_latents, write_shard
from wam.data.sampler import WindowSampler
from wam.data.windows import window_indices
from wam.evaluation.bench import lerobot_side

SCRIPT = Path(lerobot_side.__file__)
PATIENCE = 600  # seconds that another process may take for one answer
SAME = 3.0  # largest difference between the means of the same frame, of 255: decoders round, and convert colours a little differently
LEROBOT_REMEDY = "not measured: `python3.11 -m venv lerobot`, `lerobot/bin/pip install lerobot==0.4.4`, then --lerobot-python lerobot/bin/python"


@dataclass(frozen=True)
class Taken:
    """Seconds of some whole rounds; `cpu` is this process's alone, so it says all only without workers."""

    wall: float
    cpu: float
    rounds: int


class Side(Protocol):
    """One way to the windows."""

    def take(self, workers: int, least: float) -> Taken:
        """Whole rounds over all batches, until `least` seconds are gone."""

    def close(self) -> None:
        """End its processes."""


@dataclass(frozen=True)
class Case:
    """Windows of a dataset that every side reads, in batches.

    Attributes:
        data: which columns and cameras; `cache` is each side's own.
        batches: indices of windows.
    """

    name: str
    data: DataConfig
    timeline: TimelineConfig
    batches: tuple[tuple[int, ...], ...]
    threads: int

    @classmethod
    def of(cls, name: str, data: DataConfig, timeline: TimelineConfig, windows: int, batch: int, threads: int, seed: int = 0) -> Case:
        """`windows` random windows of all episodes, in whole batches."""
        data = replace(data, cache="none", validation_fraction=0.0)
        sampler = WindowSampler(len(WindowDataset(data, timeline, "train")), batch, seed)
        return cls(name, data, timeline, tuple(tuple(sampler.indices(step).tolist()) for step in range(max(1, windows // batch))), threads)

    @cached_property
    def plain(self) -> WindowDataset:
        """The windows, decoded when asked for."""
        return WindowDataset(self.data, self.timeline, "train")

    @property
    def samples(self) -> int:
        """Windows in a round."""
        return sum(map(len, self.batches))

    @property
    def frames(self) -> int:
        """Frames in a round, of all cameras."""
        return self.samples * self.timeline.frames * len(self.data.cameras)

    def place(self, window: int) -> tuple[int, int]:
        """Episode and first row of a window."""
        position, start = self.plain.table.locate(window)
        return self.plain.episodes[position], start


# ------------------------------------------------------------------------------------------------ in this process


@dataclass(frozen=True)
class Loaded:
    """A torch dataset behind loaders, one for each number of workers, which stay."""

    dataset: Dataset[Any]
    case: Case
    collate: Callable[[list[Any]], Any]
    loaders: dict[int, DataLoader[Any]]
    folder: tempfile.TemporaryDirectory[str] | None = None

    def take(self, workers: int, least: float) -> Taken:
        """Whole rounds over all batches, until `least` seconds are gone."""
        if workers not in self.loaders:
            batches = [list(batch) for batch in self.case.batches]
            self.loaders[workers] = DataLoader(self.dataset, batch_sampler=batches, num_workers=workers, collate_fn=self.collate, persistent_workers=workers > 0)
            lerobot_side.rounds(self.loaders[workers], 0)
        return Taken(**lerobot_side.rounds(self.loaders[workers], least))

    def close(self) -> None:
        """End the workers."""
        self.loaders.clear()
        if self.folder is not None:
            self.folder.cleanup()


def decoding(case: Case) -> Side:
    """This reader, decoding."""
    return Loaded(case.plain, case, collate, {})


def in_memory(case: Case) -> Side:
    """This reader, with all frames in memory."""
    return Loaded(WindowDataset(replace(case.data, cache="memory"), case.timeline, "train"), case, collate, {})


def latents(case: Case) -> Side:
    """This reader, from windows encoded beforehand into a folder that stays as long as the side does."""
    folder = tempfile.TemporaryDirectory(prefix="wam-bench-latents-")
    data = replace(case.data, latents=folder.name, layout="single" if len(case.data.cameras) == 1 else "width")  # a codec sees one picture
    height, width = (8 * (size // 8) for size in WindowDataset(data, case.timeline, "train").image_size)
    config = CodecConfig(image_size=(height, width))
    windows = WindowDataset(data, case.timeline, "train", image_size=(height, width))
    codec = LinearCodec(config)
    first = np.stack([windows.canvas.place(windows.pictures.read(*_frames_of(windows, window))) for window in case.batches[0]])  # type: ignore[union-attr]
    codec.fit(torch.from_numpy(first[:, : case.timeline.temporal_stride]))
    cache = cache_of(windows, folder.name, config, codec)
    cache.begin()
    for shard in shards_of(windows, cache.per_shard):
        write_shard(cache.folder / shard.name, cache.key, *encode_shard(windows, shard, codec, "cpu", 8))
    cache.finish(len(windows))
    use_latents(windows, config, codec, pixels=False)
    return Loaded(windows, case, collate, {}, folder)


def _frames_of(windows: WindowDataset, window: int) -> tuple[int, np.ndarray]:
    return windows.episodes[windows.table.locate(window)[0]], windows.rows(window).frames


class RawFrames(Dataset[np.ndarray]):
    """The frames of a window by decord alone, uint8 (cameras x F, H, W, 3); files stay open, in each process its own."""

    def __init__(self, case: Case):
        self.spans: dict[int, list[tuple[str, list[int]]]] = {}
        lerobot = case.plain.lerobot
        for window in {w for batch in case.batches for w in batch}:
            episode, start = case.place(window)
            rows = window_indices(lerobot.episodes[episode].length, start, case.timeline).frames
            spans = [lerobot.episodes[episode].videos[camera] for camera in case.data.cameras]
            self.spans[window] = [(str(span.path), (span.first_frame + rows).tolist()) for span in spans]
        self.open: dict[tuple[int, str], Any] = {}

    def __getitem__(self, window: int) -> np.ndarray:
        return np.concatenate([self._reader(path).get_batch(frames).asnumpy() for path, frames in self.spans[window]])

    def _reader(self, path: str) -> Any:
        import decord

        key = (os.getpid(), path)
        if key not in self.open:
            self.open[key] = decord.VideoReader(path, num_threads=1)
        return self.open[key]


def raw_decord(case: Case) -> Side:
    """decord alone.

    Raises:
        ImportError: it is not there.
    """
    import decord  # noqa: F401  (said before anything is measured)

    return Loaded(RawFrames(case), case, lambda samples: torch.from_numpy(np.stack(samples)), {})


# ------------------------------------------------------------------------------------------------ LeRobot


class LeRobot:
    """LeRobot's own dataset in a process of another environment, which is asked to read in turns.

    Raises:
        ValueError: it cannot be started, has no lerobot, cannot read the dataset, or shows other frames and actions than we do.
    """

    def __init__(self, case: Case, python: Path):
        self.folder = tempfile.TemporaryDirectory(prefix="wam-bench-")
        request = Path(self.folder.name) / "request.json"
        request.write_text(json.dumps(lerobot_request(case)))
        self.errors = (Path(self.folder.name) / "errors").open("w+")
        environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
        environment |= {"OMP_NUM_THREADS": str(case.threads)}
        try:
            self.process = subprocess.Popen(
                [str(python), str(SCRIPT), str(request)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True, env=environment
            )
        except OSError as error:
            raise ValueError(f"--lerobot-python is {python}, which cannot be run ({error.strerror}); give the python of an environment that has lerobot, e.g. lerobot/bin/python") from error
        self.lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()
        hello = self._answer()
        self.versions: dict[str, str] = hello["versions"]
        self._compare(case, hello)

    def take(self, workers: int, least: float) -> Taken:
        """Whole rounds over all batches, until `least` seconds are gone."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # then its answer, or its end, says why
            self.process.stdin.write(json.dumps({"workers": workers, "least": least}) + "\n")
            self.process.stdin.flush()
        return Taken(**self._answer())

    def close(self) -> None:
        """End it."""
        with contextlib.suppress(BrokenPipeError):
            self.process.communicate(timeout=10)
        self.process.kill()
        self.errors.close()
        self.folder.cleanup()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put("")

    def _answer(self) -> dict[str, Any]:
        try:
            line = self.lines.get(timeout=PATIENCE)
        except queue.Empty:
            self.process.kill()
            raise ValueError(f"LeRobot's side did not answer for {PATIENCE} s; try fewer windows, or --quick") from None
        if not line:
            self.errors.seek(0)
            said = (self.errors.read().strip().splitlines() or ["nothing"])[-1]
            raise ValueError(f"LeRobot's side ended with {self.process.wait()} and said: {said}; run it in an environment that has lerobot==0.4.4")
        answer = json.loads(line)
        if "error" in answer:
            raise ValueError(answer["error"])
        return answer

    @staticmethod
    def _compare(case: Case, hello: dict[str, Any]) -> None:
        """The first window must be the same on both sides."""
        episode, start = case.place(case.batches[0][0])
        lerobot = case.plain.lerobot
        rows = window_indices(lerobot.episodes[episode].length, start, case.timeline)
        for camera in case.data.cameras:
            span = lerobot.episodes[episode].videos[camera]
            ours = case.plain.decoder.read_frames(span.path, span.first_frame + rows.frames).mean(axis=(1, 2, 3))
            apart = float(np.abs(ours - np.array(hello["means"][camera])).max())
            if apart > SAME:
                raise ValueError(f"LeRobot shows other frames of {camera} in the window at row {start} of episode {episode}: their means differ by {apart:.1f} of 255; compare with `wam check {case.data.root}`")
        action = lerobot.read(episode, case.data.action)[rows.action]
        if not np.allclose(action, np.array(hello["action"]), atol=1e-6):
            raise ValueError(f"LeRobot has other actions in the window at row {start} of episode {episode}; compare with `wam check {case.data.root}`")


def lerobot_request(case: Case) -> dict[str, Any]:
    """What `lerobot_side` is asked: our windows as LeRobot's rows and seconds."""
    t, lerobot = case.timeline, case.plain.lerobot
    firsts = np.cumsum([0, *(episode.length for episode in lerobot.episodes)])
    seconds = {"frames": t.stride * np.arange(t.frames), "state": t.actions_per_block * np.arange(t.blocks), "action": np.arange(t.blocks * t.actions_per_block)}
    times = {name: (rows / lerobot.fps).tolist() for name, rows in seconds.items()}
    rows = [[int(firsts[episode]) + start for episode, start in map(case.place, batch)] for batch in case.batches]
    return {
        "root": str(Path(case.data.root).resolve()),
        "threads": case.threads,
        "cameras": list(case.data.cameras),
        "state": case.data.state,
        "action": case.data.action,
        "delta_timestamps": dict.fromkeys(case.data.cameras, times["frames"]) | {case.data.state: times["state"], case.data.action: times["action"]},
        "batches": rows,
    }


# ------------------------------------------------------------------------------------------------ all of them


OURS, MEMORY, LATENTS, DECORD, LEROBOT = "ours, decoding", "ours, in memory", "ours, cached latents", "raw decord", "LeRobot"
SIDES: dict[str, Callable[[Case], Side]] = {OURS: decoding, MEMORY: in_memory, LATENTS: latents, DECORD: raw_decord}


def interleave(sides: dict[str, Side], workers: Sequence[int], repeats: int, least: float) -> Iterator[tuple[str, int, Taken]]:
    """All sides in turns, `repeats` times, every second round backwards; for each number of workers."""
    for count in workers:
        for side in sides.values():  # starts workers, opens files
            side.take(count, 0)
        for number in range(repeats):
            for name in list(sides)[:: 1 if number % 2 == 0 else -1]:
                yield name, count, sides[name].take(count, least)
