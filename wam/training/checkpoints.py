"""Folders that a run can be continued from: each is whole, or does not count.

    output/state/step-00000400/          an older one, kept by rule (`training.keep`)
    output/state/step-00000500/
        model.safetensors                what trains, whole tensors by name; in shards of 2 GB where it is large, as are the others
        ema.safetensors                  its moving average
        optimizer.safetensors            moments, `<slot>.<name>`
        random.safetensors               generators, a row for each process
        manifest.json                    written last: step, clock, config, and size and checksum of every file
    output/checkpoint/, output/best/     policies: the newest one, and the best one of all validations

A folder without a manifest is one that a killed run did not finish; it is passed over and deleted at the next save.  A folder that is
deleted loses its manifest first.  Tensors are whole and named, not pieces of a process, so that a run goes on with another number of
processes or another sharding; only the main process writes, and holds one shard at a time.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

import wam
from wam.config_training import KeepConfig
from wam.files import is_disk_full, write_json_atomic
from wam.shards import ShardReader, ShardWriter

log = logging.getLogger(__name__)
FORMAT = "wam-training-2"
STATES, MANIFEST, BEST = "state", "manifest.json", "best"
SHARD_BYTES = 2_000_000_000
SLACK = 1_000_000  # headers, manifest and the policy's small files
Parts = Iterable[tuple[str, Iterable[tuple[str, Tensor]]]]  # name of a file, and what is in it


class Together(Protocol):
    """What saving asks of the processes that train together."""

    @property
    def is_main(self) -> bool: ...
    def sum(self, tensor: Tensor) -> Tensor: ...


# ------------------------------------------------------------------------------------------------ what is there


def state_folder(output: Path, step: int) -> Path:
    """Where the state after `step` steps lies."""
    return output / STATES / f"step-{step:08d}"


def states(output: Path) -> list[int]:
    """Steps of the states that are whole, in order."""
    found = (re.fullmatch(r"step-(\d{8,})", path.name) for path in (output / STATES).glob("step-*") if (path / MANIFEST).is_file())
    return sorted(int(match[1]) for match in found if match)


def read_manifest(folder: Path) -> dict[str, Any]:
    """What a state says about itself.

    Raises:
        ValueError: a damaged manifest, or one of another format.
    """
    try:
        tree = json.loads((folder / MANIFEST).read_text())
        found = tree["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / MANIFEST} cannot be read ({type(error).__name__}: {error}); {_remedy(folder)}") from error
    if found != FORMAT:
        raise ValueError(f"{folder / MANIFEST} has format {found!r}; this version reads {FORMAT!r}: go on with the version that wrote it, or start over with --fresh")
    return tree


def verify(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Compare every file's size and checksum with the manifest's.

    Raises:
        ValueError: a file that is missing, cut short or changed (named, with expected and found).
    """
    for name, expected in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{path} is missing; {_remedy(folder)}")
        if path.stat().st_size != expected["bytes"]:
            raise ValueError(f"{path} is damaged: expected {expected['bytes']:,} bytes, found {path.stat().st_size:,}; {_remedy(folder)}")
        if (found := _sha256(path)) != expected["sha256"]:
            raise ValueError(f"{path} is damaged: expected sha256 {expected['sha256']}, found {found}; {_remedy(folder)}")


def read_part(folder: Path, part: str) -> ShardReader:
    """One of a state's files; tensors are read when they are asked for."""
    return ShardReader(folder, part)


def _remedy(folder: Path) -> str:
    older = [step for step in states(folder.parent.parent) if state_folder(folder.parent.parent, step) != folder]
    go_on = f"delete {folder} to go on from step {older[-1]}" if older else f"delete {folder} to start the run over"
    return f"{go_on}, or restore it from a copy"


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# ------------------------------------------------------------------------------------------------ what stays


def kept(values: Mapping[int, float | None], keep: KeepConfig) -> set[int]:
    """Steps of the states that stay: the newest, every n-th, and the best (lowest values; None: not validated)."""
    steps = sorted(values)
    best = sorted((value, step) for step, value in values.items() if value is not None)
    return {*steps[-keep.last :], *(s for s in steps if keep.every and s % keep.every == 0), *(step for _, step in best[: keep.best])}


def _delete(folder: Path) -> None:
    (folder / MANIFEST).unlink(missing_ok=True)  # first: what is half gone no longer counts
    shutil.rmtree(folder)


def _clean(output: Path) -> None:
    """Delete what a killed run did not finish."""
    whole = {state_folder(output, step) for step in states(output)}
    for path in (output / STATES).glob("*"):
        if path.is_dir() and path not in whole:
            shutil.rmtree(path)


# ------------------------------------------------------------------------------------------------ whole folders


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Yield an empty folder that takes the place of `folder` when the block ends well; otherwise nothing is changed."""
    new, old = _beside(folder)
    recover(folder)
    new.mkdir(parents=True)
    try:
        yield new
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    for file in new.rglob("*"):
        if file.is_file():
            _sync(file)
    if folder.exists():
        folder.replace(old)
    new.replace(folder)  # killed before this line, `recover` puts the old one back
    _sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def recover(folder: Path) -> None:
    """Undo a replacement that was killed halfway."""
    new, old = _beside(folder)
    if old.exists() and not folder.exists():
        old.replace(folder)
    for path in (new, old):
        if path.exists():
            shutil.rmtree(path)


def _beside(folder: Path) -> tuple[Path, Path]:
    return folder.with_name(f".{folder.name}.new"), folder.with_name(f".{folder.name}.old")


def _sync(path: Path) -> None:
    """Have it on the disk, not only in memory: a machine that loses power keeps what a manifest names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def size_of(folder: Path) -> int:
    """Bytes of a folder's files; 0 where there is none."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0


# ------------------------------------------------------------------------------------------------ saving


@dataclass
class Checkpoints:
    """Writes a run's states and policies, and remembers which step was the best.

    Attributes:
        metric: the validation figure that decides; None: no best is kept.
        best: {"metric", "step", "value"} of the best step so far.
        values: what the last validation gave, and at which step.
        highest: whether a higher figure is better, not a lower one.
    """

    output: Path
    keep: KeepConfig
    metric: str | None
    together: Together
    best: dict[str, Any] | None = None
    values: tuple[int, dict[str, float]] = (-1, {})
    warned: set[str] = field(default_factory=set)
    highest: bool = False

    def _rank(self, value: float | None) -> float | None:
        """A figure as a number of which less is better."""
        return -value if self.highest and value is not None else value

    def validated(self, step: int, values: Mapping[str, float], policy: Callable[[], Callable[[Path], None]]) -> bool:
        """Take note of a validation; where it is the best so far, best/ is written: every process calls `policy()`, the main one what it gives.

        The same answer on every process.
        """
        finite = {name: float(value) for name, value in values.items() if math.isfinite(value)}
        self.values = (step, finite)
        if self.metric is None or not values:
            return False
        value, rank = finite.get(self.metric), self._rank(finite.get(self.metric))
        if rank is None:
            self._warn_absent(values)
        best = self._rank(self.best["value"]) if self.best else None
        better = rank is not None and (best is None or rank < best)
        if self._any(self.together.is_main and better):  # one process decides: figures may differ in their last bit
            self.best = {"metric": self.metric, "step": step, "value": value}
            write = policy()
            self._guarded(step, size_of(self.output / BEST), lambda: self._policy(BEST, write))
            return True
        return False

    def save(self, step: int, parts: Parts, facts: Mapping[str, Any], expected: int, policy: tuple[str, Callable[[Path], None]] | None = None) -> None:
        """Write the policy and then the state after `step` steps; every process calls this.

        Args:
            parts: files and their tensors; every process goes through all of them, since gathering takes all, and the main one writes.
            facts: what else the manifest says (JSON).
            expected: bytes of the state.
            policy: name of its folder in `output`, and what writes it.

        Raises:
            OSError: the disk is full or not to be written; what was whole before still is.
        """

        def write() -> None:
            folder = self._begin(step, expected + (size_of(self.output / policy[0]) if policy else 0))
            if policy:
                self._policy(*policy)
            _write_parts(folder, tensors)
            self._finish(folder, step, facts)

        tensors = ((part, name, tensor) for part, pairs in parts for name, tensor in pairs)
        self._guarded(step, expected, write, tensors)

    def _begin(self, step: int, needed: int) -> Path:
        _clean(self.output)
        self._make_room(step, needed + SLACK)
        folder = state_folder(self.output, step)
        if folder.exists():
            _delete(folder)
        folder.mkdir(parents=True)
        return folder

    def _make_room(self, step: int, needed: int) -> None:
        """Where space is short, delete beforehand what this save would delete afterwards; refuse where that is not enough."""
        self.output.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.output).free
        leaving = [] if free >= needed else [state_folder(self.output, old) for old in self._leaving([*states(self.output), step])]
        if free + sum(map(size_of, leaving)) < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(state_folder(self.output, step)))
        for folder in leaving:
            _delete(folder)

    def _leaving(self, steps: list[int]) -> set[int]:
        """What no rule keeps, given these steps; never the newest state that is whole."""
        there = states(self.output)
        values: dict[int, float | None] = dict.fromkeys(steps)
        if self.metric is not None and self.keep.best:
            values |= {step: self._rank(read_manifest(state_folder(self.output, step)).get("values", {}).get(self.metric)) for step in there}
        return set(there[:-1]) - kept(values, self.keep)

    def _finish(self, folder: Path, step: int, facts: Mapping[str, Any]) -> None:
        files = {}
        for path in sorted(folder.iterdir()):
            _sync(path)
            files[path.name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        values = self.values[1] if self.values[0] == step else {}
        versions = {"wam_version": wam.__version__, "torch_version": torch.__version__}
        write_json_atomic(folder / MANIFEST, {"format": FORMAT, **versions, "step": step, **facts, "values": values, "best": self.best, "files": files})
        for path in (folder, folder.parent):
            _sync(path)
        for old in self._leaving(states(self.output)):
            _delete(state_folder(self.output, old))

    def _policy(self, name: str, write: Callable[[Path], None]) -> None:
        with replacing(self.output / name) as folder:
            write(folder)

    def _guarded(self, step: int, needed: int, write: Callable[[], None], tensors: Iterable[Any] = ()) -> None:
        """Write on the main process; what it could not write is an error on every one, and none waits for another for ever."""
        error: Exception | None = None
        if self.together.is_main:
            try:
                write()
            except Exception as caught:
                error = caught
                if step not in states(self.output):
                    shutil.rmtree(state_folder(self.output, step), ignore_errors=True)
        for _ in tensors:  # what is left of them: gathering takes every process
            pass
        if self._any(error is not None):
            raise self._named(error, step, needed) from error

    def _any(self, here: bool) -> bool:
        return bool(self.together.sum(torch.tensor(float(here))) > 0)

    def _named(self, error: Exception | None, step: int, needed: int) -> Exception:
        if error is None:
            return RuntimeError(f"the main process could not write the state of step {step}; its own message says why")
        if not is_disk_full(error):
            return error
        free, whole = shutil.disk_usage(self.output).free, states(self.output)
        rest = f"the state of step {whole[-1]} is whole: the same command goes on from there" if whole else "no state was written yet: the same command starts over"
        text = f"the disk is full: step {step} needs {needed:,} bytes, {free:,} are free; free some space, or keep fewer states (training.keep); {rest}"
        return OSError(errno.ENOSPC, text, str(self.output))

    def _warn_absent(self, values: Mapping[str, float]) -> None:
        if self.metric not in self.warned:
            self.warned.add(str(self.metric))
            log.warning("training.best is %r, which this validation does not have as a finite number, so no best step is kept; it has %s", self.metric, ", ".join(values))


def _write_parts(folder: Path, tensors: Iterable[tuple[str, str, Tensor]]) -> None:
    """Stream (file, name, tensor), in the order of the files."""
    for part, entries in groupby(tensors, key=itemgetter(0)):
        with ShardWriter(folder, part, SHARD_BYTES, {"format": FORMAT}) as writer:
            for _, name, tensor in entries:
                writer.add(name, tensor)
