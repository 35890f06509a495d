"""Processes that train together: which one is gone, which one is late and where it stands; and being asked to stop.

    main thread    at("data") ... at("forward and backward") ... at("update") ...     counts stages; costs nothing
    own thread     puts (count, stage, step, innermost line) into a store every other second; process 0's reads them all and judges

    gone     its entry does not change any more, though it had not said goodbye     (killed, its machine lost)
    failed   it said so; its own error is passed on
    late     it has been in one stage for `timeout` seconds, and no process is behind it

A process that waits inside a collective cannot be woken, so each thread says what is wrong, with the number of the process, and ends its
own process.  Who sees that the store is gone knows that process 0 is, which keeps it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor

from wam.training.guards import Unstable

log = logging.getLogger(__name__)
EXIT_STOPPED = 70  # of a process whose watch ended it
AGAIN = "start the run again with the same command, it goes on from its last state"
PATIENCE = 20.0  # seconds that process 0 stays for the others to read what is wrong, or to end
SILENCE = 60.0  # seconds without a sign of life after which a process counts as gone


class LostProcess(RuntimeError):
    """A collective failed because another process is gone or failed; says which, and where it stood."""


class Group(Protocol):
    """What a watch asks of an engine."""

    @property
    def rank(self) -> int: ...
    @property
    def world(self) -> int: ...
    def sum(self, tensor: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Beat:
    """What a process says about itself.

    Attributes:
        serial: grows with every beat, so that a reader needs no common clock.
        count, stage, step, seconds: how many stages it has begun; the one it is in, of which step, and for how long.
        where: the line it is at.
        state: `running`, `failed` (then `error` says why) or `done`.
    """

    serial: int
    count: int
    stage: str
    step: int
    seconds: float
    where: str
    host: str
    pid: int
    state: str = "running"
    error: str = ""

    def told(self, rank: int) -> str:
        """For people."""
        return f"process {rank} ({self.host}, pid {self.pid}) is in {self.stage!r} of step {self.step} for {self.seconds:.0f} s, at {self.where}"


def verdict(beats: Mapping[int, Beat], silent: Mapping[int, float], timeout: float, silence: float) -> str | None:
    """What is wrong, in words that name the process; None where nothing is.

    Args:
        beats: the last one of each process.
        silent: seconds since each one's last changed, by this process's clock.
        timeout: seconds that a stage may take.
        silence: seconds without a beat after which a process is gone.
    """
    running = {rank: beat for rank, beat in beats.items() if beat.state == "running"}
    for rank, beat in beats.items():
        if beat.state == "failed":
            return f"process {rank} ({beat.host}, pid {beat.pid}) stopped in {beat.stage!r} of step {beat.step}: {beat.error}"
    for rank, beat in running.items():
        if silent[rank] > silence:
            return f"process {rank} ({beat.host}, pid {beat.pid}) is gone: no sign of life for {silent[rank]:.0f} s; it was last seen in {beat.stage!r} of step {beat.step}, at {beat.where}"
    if not running:
        return None
    last = min(beat.count for beat in running.values())
    late = {rank: beat for rank, beat in running.items() if beat.count == last}
    if min(beat.seconds for beat in late.values()) <= timeout:
        return None
    told = "; ".join(beat.told(rank) for rank, beat in late.items())
    if len(late) == len(running):
        return f"no process has got on for {timeout:.0f} s (training.engine.timeout_minutes): {told}"
    return f"the other processes wait for {'processes' if len(late) > 1 else 'process'} {', '.join(map(str, late))}, which did not arrive within {timeout:.0f} s (training.engine.timeout_minutes): {told}"


class Watch:
    """One process's part of the watch; with a single process it does nothing.

    Args:
        timeout: seconds that a stage may take before the run counts as hung.
    """

    def __init__(self, group: Group, timeout: float):
        self.rank, self.world, self.timeout = group.rank, group.world, timeout
        self.pause = min(2.0, timeout / 10)
        self.silence = min(timeout, SILENCE)
        self._main = threading.get_ident()
        self._now = (0, "start", 0, time.monotonic())  # count, stage, step, since when: replaced as one, read by the thread
        self._state, self._error = "running", ""
        self._told = ""  # what was found wrong: kept, since the store may be gone when it is asked for
        self._serial = 0
        self._beats: dict[int, Beat] = {}
        self._seen: dict[int, float] = {}
        self._end = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        if self.world > 1:
            self._store = self._connect(group)
            self._exchange(everyone=False)
            group.sum(torch.zeros(()))  # every one has put its first beat
            self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)
            self._thread.start()

    def at(self, stage: str, step: int) -> None:
        """The main thread begins a stage."""
        self._now = (self._now[0] + 1, stage, step, time.monotonic())

    def explain(self, error: Exception) -> Exception:
        """What to raise for an error of this process: itself, or what was wrong with another process that caused it."""
        if self._thread is None:
            return error
        collective = isinstance(error, RuntimeError) and not isinstance(error, Unstable)  # the others' errors come as RuntimeError
        end = time.monotonic() + 6 * self.pause
        while collective and time.monotonic() < end:  # a collective fails at once when its peer is gone; that it is silent shows a little later
            self._end.wait(self.pause)
            try:
                self._exchange(everyone=True)
                found = self._told or self._verdict(4 * self.pause)
            except RuntimeError as lost:
                found = self._told or f"process 0, which keeps the watch's store, is gone ({str(lost).splitlines()[0]})"
            if found and not found.startswith(f"process {self.rank} "):
                return LostProcess(f"{found}; {AGAIN}")
        self._say("failed", f"{type(error).__name__}: {' '.join(str(error).split())[:500]}")
        return error

    def close(self) -> None:
        """Say goodbye; the process that keeps the store waits for the others to have said so too."""
        if self._thread is None:
            return
        if self._state == "running":
            self._say("done", "")
        end = time.monotonic() + PATIENCE
        while self.rank == 0 and time.monotonic() < end and not self._all_know():
            time.sleep(self.pause / 4)
        self._end.set()
        self._thread.join(10)

    def _all_know(self) -> bool:
        """Whether every other process has ended, or has read what is wrong: only then may the store go."""
        with self._lock:
            others = [self._beats.get(rank) for rank in range(1, self.world)]
        return all((beat is not None and beat.state != "running") or self._store.check([f"read/{rank}"]) for rank, beat in enumerate(others, start=1))

    # -------------------------------------------------------------------------------------------- the thread

    def _connect(self, group: Group) -> Any:
        from torch.distributed import TCPStore

        patience = timedelta(seconds=max(10.0, self.silence))
        host, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), torch.zeros((), dtype=torch.int64)
        store = None
        if self.rank == 0:
            store = TCPStore(host, 0, None, True, timeout=patience, wait_for_workers=False)
            port += store.port
        port = group.sum(port)
        return store or TCPStore(host, int(port), None, False, timeout=patience, wait_for_workers=False)

    def _watch(self) -> None:
        while not self._end.wait(self.pause):
            try:
                self._exchange(everyone=self.rank == 0)
                found = self._judge()
            except RuntimeError as error:  # the store, and with it the process that keeps it
                if self._state == "running" and not self._end.wait(4 * self.pause):
                    self._stop(self._told or f"process 0, which keeps the watch's store, is gone ({str(error).splitlines()[0]})")
                return
            self._told = found
            if found and self._state == "running" and not self._end.wait(5 * self.pause if "stopped" in found else 0):  # its own error may be on its way
                self._stop(found)

    def _judge(self) -> str:
        """What is wrong, as process 0 sees it; nothing where nothing is."""
        if self.rank:
            if not self._store.check(["verdict"]):
                return ""
            self._store.set(f"read/{self.rank}", "yes")
            return self._store.get("verdict").decode()
        found = self._verdict(self.silence) or ""
        if found and self._state != "done":
            self._told = found
            self._store.set("verdict", found)
            self._end.wait(2 * self.pause)  # the others read it before this process ends itself, and the store with it
        return found

    def _stop(self, why: str) -> None:
        print(f"wam: error: process {self.rank} stops: {why}; {AGAIN}", file=sys.stderr, flush=True)
        os._exit(EXIT_STOPPED)

    def _exchange(self, everyone: bool) -> None:
        """Put this process's beat, and read `everyone`'s."""
        with self._lock:
            count, stage, step, since = self._now
            self._serial += 1
            beat = Beat(self._serial, count, stage, step, time.monotonic() - since, self._where(), socket.gethostname(), os.getpid(), self._state, self._error)
            self._store.set(f"beat/{self.rank}", json.dumps(asdict(beat)))
            now = time.monotonic()
            for rank in range(self.world) if everyone else ():
                if rank != self.rank and self._store.check([f"beat/{rank}"]):
                    other = Beat(**json.loads(self._store.get(f"beat/{rank}")))
                    if rank not in self._beats or other.serial != self._beats[rank].serial:
                        self._seen[rank] = now
                    self._beats[rank] = other
            self._beats[self.rank], self._seen[self.rank] = beat, now

    def _verdict(self, silence: float) -> str | None:
        now = time.monotonic()
        with self._lock:
            beats = {rank: replace(beat, seconds=beat.seconds + now - self._seen[rank]) for rank, beat in self._beats.items()}
            silent = {rank: now - seen if rank != self.rank else 0.0 for rank, seen in self._seen.items()}
        return verdict(beats, silent, self.timeout, silence)

    def _say(self, state: str, error: str) -> None:
        self._state, self._error = state, error
        with contextlib.suppress(RuntimeError):  # the store may be what is gone
            self._exchange(everyone=False)

    def _where(self) -> str:
        """The innermost line of the main thread that is this project's, and what it called."""
        frame = sys._current_frames().get(self._main)
        stack = traceback.extract_stack(frame) if frame else []
        own = [entry for entry in stack if f"{os.sep}wam{os.sep}" in entry.filename]
        entries = [*own[-1:], *(stack[-1:] if own[-1:] != stack[-1:] else [])]
        return " -> ".join(f"{os.path.basename(entry.filename)}:{entry.lineno} {entry.name}" for entry in entries) or "an unknown line"


@contextlib.contextmanager
def watching(group: Group, timeout: float) -> Iterator[Watch]:
    """Watch while the block runs; an error in it that another process caused is raised as `LostProcess`."""
    watch = Watch(group, timeout)
    try:
        yield watch
    except Exception as error:
        told = watch.explain(error)
        if told is error:
            raise
        raise told from error
    finally:
        watch.close()


# ------------------------------------------------------------------------------------------------ being asked to stop


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Yield a function that says whether Ctrl-C or SIGTERM came; the step in progress is finished, so what is then saved is whole.

    A second one stops at once.  Outside the main thread, where no signals arrive, the answer is always no.
    """
    asked, owner = False, os.getpid()

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if os.getpid() != owner:  # a worker that loads data, forked from here: the run decides when it ends
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return
        if asked:
            raise KeyboardInterrupt
        asked = True
        log.warning("%s: this step is finished and saved, then the run stops; once more stops it at once", signal.Signals(number).name)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
