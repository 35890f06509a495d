"""`wam bench data`: how fast windows are read, side by side with LeRobot's own reader and with bare decord, on the same files.

    dataset x workers  ->  every side reads the same windows in turns  ->  rates (samples/s, frames/s), and claims as ratios

Without workers the process time decides (others on the machine hardly touch it), with workers the time that passed.  Datasets are made
on the spot (`data_make`) or given; LeRobot's environment is given, since it does not fit into ours.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from wam.config import DataConfig, TimelineConfig
from wam.data.lerobot import LeRobotDataset
from wam.evaluation.bench.data_make import SHAPES, make_dataset
from wam.evaluation.bench.data_sides import DECORD, LATENTS, LEROBOT, LEROBOT_REMEDY, MEMORY, OURS, SIDES, Case, LeRobot, Side, Taken, interleave
from wam.evaluation.bench.report import Output, Report, Table, deliver, facts
from wam.evaluation.bench.rows import Comparison, Row
from wam.evaluation.bench.timing import Times

RATES = ("dataset", "workers", "side", "samples/s", "frames/s", "slowest to fastest", "CPU ms a sample", "note")
CLAIMS = (  # ours, theirs, the largest ratio of times: twice as many samples as LeRobot (encoded, ten times), and four fifths of decord's frames
    (OURS, LEROBOT, 1 / 2),
    (OURS, DECORD, 1 / 0.8),
    (MEMORY, LEROBOT, 1 / 2),
    (LATENTS, LEROBOT, 1 / 10),
)
LEAST = 0.3  # seconds that a side reads in one turn


@dataclass(frozen=True)
class DataOptions(Output):
    """As the command line says.

    Attributes:
        data: datasets that are there; windows are those of the first shape.
        shapes: datasets that are made.
        make: where to; None: a folder that is removed again.
        workers: loader processes, each number by itself.
    """

    data: tuple[Path, ...] = ()
    shapes: tuple[str, ...] = ()
    make: Path | None = None
    lerobot_python: Path | None = None
    workers: tuple[int, ...] = (0, 2)
    batch: int = 8
    repeats: int = 5
    quick: bool = False


@dataclass(frozen=True)
class Rate:
    """How fast one side read a dataset; without times, `note` says why it did not.

    Attributes:
        samples, frames: in one round.
        times: milliseconds of a round, one for each turn.
    """

    dataset: str
    workers: int
    side: str
    samples: int
    frames: int
    times: Times | None
    note: str = ""

    def per_second(self, amount: int) -> tuple[float, float, float]:
        """Median, slowest and fastest, by the clock on the wall."""
        assert self.times is not None
        wall = self.times.wall
        return tuple(1e3 * amount / ms for ms in (statistics.median(wall), max(wall), min(wall)))  # type: ignore[return-value]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        out: dict[str, Any] = {"dataset": self.dataset, "workers": self.workers, "side": self.side, "samples": self.samples, "frames": self.frames, "note": self.note}
        if self.times is None:
            return out
        rates = {f"{name}_per_second": dict(zip(("median", "slowest", "fastest"), self.per_second(n), strict=True)) for name, n in (("samples", self.samples), ("frames", self.frames))}
        return {**out, **rates, **self.times.to_dict()}

    def cells(self) -> tuple[str, ...]:
        """For a table."""
        if self.times is None:
            return (self.dataset, str(self.workers), self.side, "-", "-", "-", "-", self.note)
        (median, slowest, fastest), frames = self.per_second(self.samples), self.per_second(self.frames)[0]
        cpu = f"{statistics.median(self.times.cpu) / self.samples:.3g}" if self.times.cpu else "-"
        return (self.dataset, str(self.workers), self.side, f"{median:.4g}", f"{frames:.4g}", f"{slowest:.4g} to {fastest:.4g}", cpu, self.note)


@dataclass(frozen=True)
class DataReport(Report):
    """A report that has rates before its comparisons."""

    rates: tuple[Rate, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**super().to_dict(), "rates": [rate.to_dict() for rate in self.rates]}

    def tables(self) -> list[Table]:
        """Rates, then claims."""
        return [[RATES, *(rate.cells() for rate in self.rates)], *super().tables()]

    def heading(self) -> str:
        """Where and how, in a line or two."""
        f, machine = self.facts, self.facts["machine"]
        versions = ", ".join(f"{name} {version}" for name, version in f["versions"].items())
        theirs = ", ".join(f"{name} {version}" for name, version in f["lerobot"].items()) or "no LeRobot"
        return (
            f"`{f['command']}`, {f['date']}: {machine['name']}, {machine['threads']} torch thread{'s' if machine['threads'] > 1 else ''} a process, batches of {f['batch']}; medians of {f['repeats']} turns; "
            f"claims by process time without workers (minima in brackets), by the clock with; {versions}; LeRobot's side: {theirs}."
        )


def bench_data(options: DataOptions) -> DataReport:
    """Measure, print, and write what is asked for.

    Raises:
        ValueError: an unknown shape, a number below 1, a dataset or a python that cannot be used; before anything is measured where that can be known.
        BenchError: with `check`, a claim that does not hold; after everything was printed and written.
    """
    _check(options)
    scratch = None if options.make is not None else Path(tempfile.mkdtemp(prefix="wam-bench-data-"))
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        report = _report(options, options.make or scratch or Path())
    finally:
        torch.set_num_threads(before)
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
    deliver(report, options)
    return report


def _check(options: DataOptions) -> None:
    unknown = [name for name in options.shapes if name not in SHAPES]
    if unknown:
        raise ValueError(f"unknown dataset {unknown[0]!r} to make; expected some of {', '.join(SHAPES)}")
    if min(options.repeats, options.batch, options.threads) < 1:
        raise ValueError(f"--repeats is {options.repeats}, --batch {options.batch} and --threads {options.threads}; each must be at least 1")
    if not options.workers or min(options.workers) < 0:
        raise ValueError(f"--workers is {','.join(map(str, options.workers))!r}; expected numbers of processes such as 0,2 (0: read in this one)")
    if options.lerobot_python is not None and not options.lerobot_python.is_file():
        raise ValueError(f"--lerobot-python is {options.lerobot_python}, and there is no such file; give the python of an environment that has lerobot, e.g. lerobot/bin/python")


def _report(options: DataOptions, folder: Path) -> DataReport:
    shapes = options.shapes or (() if options.data else tuple(SHAPES))
    quick = {"episodes": 2, "length": 120, "windows": options.batch} if options.quick else {}
    made = {name: replace(SHAPES[name], **quick) for name in shapes}  # type: ignore[arg-type]
    cases = [_case(options, str(path), path, TimelineConfig(), SHAPES["64x64"].windows) for path in options.data]
    cases += [_case(options, name, make_dataset(folder / f"{name}{'-quick' if options.quick else ''}", shape), shape.timeline, shape.windows, shape.start_stride) for name, shape in made.items()]
    rates: list[Rate] = []
    versions: dict[str, str] = {}
    for case in cases:
        sides, absent = _sides(case, options)
        try:
            rates += _rates(case, sides, options) + [Rate(case.name, workers, side, 0, 0, None, why) for workers in options.workers for side, why in absent.items()]
            versions |= getattr(sides.get(LEROBOT), "versions", {})
        finally:
            for side in sides.values():
                side.close()
    about = facts(options.command, torch.device("cpu"), torch.float32, 2 if options.quick else options.repeats) | {"batch": options.batch, "lerobot": versions}
    return DataReport(tuple(_claims(rates)), about, tuple(rates))


def _case(options: DataOptions, name: str, root: Path, timeline: TimelineConfig, windows: int, start_stride: int = 1) -> Case:
    """All cameras of a dataset; its state and action by LeRobot's names."""
    lerobot = LeRobotDataset(root)
    cameras = tuple(key for key, feature in lerobot.features.items() if feature.dtype == "video")
    if not cameras:
        raise ValueError(f"{root} has no videos to read; give a dataset with a camera")
    data = DataConfig(root=str(root), cameras=cameras, layout="single" if len(cameras) == 1 else "separate", start_stride=start_stride)
    return Case.of(name, data, timeline, options.batch if options.quick else windows, options.batch, options.threads)


def _sides(case: Case, options: DataOptions) -> tuple[dict[str, Side], dict[str, str]]:
    """What can be measured, and why the rest cannot."""
    sides: dict[str, Side] = {}
    absent: dict[str, str] = {}
    makers: dict[str, Callable[[Case], Side]] = dict(SIDES)
    if options.lerobot_python is None:
        absent[LEROBOT] = LEROBOT_REMEDY
    else:
        makers[LEROBOT] = lambda case: LeRobot(case, options.lerobot_python)  # type: ignore[arg-type]
    for name, make in makers.items():
        try:
            sides[name] = make(case)
        except ImportError as error:
            absent[name] = f"not measured: {error}; pip install {error.name}"
    return sides, absent


def _rates(case: Case, sides: dict[str, Side], options: DataOptions) -> list[Rate]:
    taken: dict[tuple[str, int], list[Taken]] = {}
    for side, workers, one in interleave(sides, options.workers, 2 if options.quick else options.repeats, 0 if options.quick else LEAST):
        taken.setdefault((side, workers), []).append(one)
    return [Rate(case.name, workers, side, case.samples, case.frames, _times(turns, workers)) for (side, workers), turns in sorted(taken.items(), key=lambda item: item[0][1])]


def _times(turns: Sequence[Taken], workers: int) -> Times:
    """Milliseconds of a round."""
    wall, cpu = (tuple(1e3 * getattr(turn, clock) / turn.rounds for turn in turns) for clock in ("wall", "cpu"))
    return Times(wall, () if workers else cpu)


def _claims(rates: Sequence[Rate]) -> list[Row]:
    """What should hold, of the sides that were measured."""
    by = {(rate.dataset, rate.workers, rate.side): rate.times for rate in rates if rate.times is not None}
    rows: list[Row] = []
    for dataset, workers in dict.fromkeys((rate.dataset, rate.workers) for rate in rates):
        for ours, theirs, limit in CLAIMS:
            one, other = by.get((dataset, workers, ours)), by.get((dataset, workers, theirs))
            if one is not None and other is not None:
                rows.append(Comparison("reading windows", f"{dataset}, {workers} workers", ours, theirs, one, other, limit))
    return rows
