"""Worker processes that answer requests over a pipe: the one way this package uses several cores.

Workers are spawned, not forked (OpenGL and threads do not survive a fork), run single-threaded, never see Ctrl-C (their parent decides),
and end by themselves when their parent is gone.  What goes wrong inside one comes back as text; a worker that dies is reported, never
waited for.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import connection, resource_tracker
from types import TracebackType
from typing import Any

from wam.evaluation.gl import choose_backend

Handler = Callable[[Any], Any]
_SINGLE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "LP_NUM_THREADS"), "1")


class WorkerError(RuntimeError):
    """A request failed inside a worker, or the worker died.

    `error` is the exception itself where there is one; `text` its traceback.
    """

    def __init__(self, text: str, error: BaseException | None = None) -> None:
        super().__init__(text)
        self.text, self.error = text, error


class Worker:
    """One process answering one request at a time."""

    def __init__(self, make_handler: Callable[..., Handler], arguments: Sequence[Any] = ()) -> None:
        """Start the process; `make_handler(*arguments)` is called inside it, so it must be importable by name."""
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make_handler, tuple(arguments)), daemon=True)
        with _environment({**_SINGLE_THREAD, "MUJOCO_GL": choose_backend()}), _interrupts_held_back():
            self._process.start()
        theirs.close()

    def send(self, request: Any) -> None:
        """Hand over a request.

        Raises:
            WorkerError: the process is gone.
        """
        try:
            self.connection.send(request)
        except OSError as error:
            raise WorkerError(self._obituary()) from error

    def receive(self) -> Any:
        """Wait for the answer to a request.

        Raises:
            WorkerError: the request failed, or the process died over it.
        """
        try:
            fine, value, text = self.connection.recv()
        except (EOFError, OSError) as error:
            raise WorkerError(self._obituary()) from error
        if not fine:
            raise WorkerError(text, value)
        return value

    def close(self, patience: float = 10.0) -> None:
        """End the process: after the request in progress, if it takes no longer than `patience` seconds."""
        self.connection.close()
        self._process.join(patience)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _obituary(self) -> str:
        self._process.join(1.0)
        return f"the worker process ended with exit code {self._process.exitcode}, without a traceback"


class Workers:
    """Several workers, closed together; use as a context manager."""

    def __init__(self, count: int, make_handler: Callable[..., Handler], arguments: Sequence[Any] = ()) -> None:
        """Start `count` processes, each with its own handler."""
        self._workers = [Worker(make_handler, arguments) for _ in range(count)]

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._workers)

    def __getitem__(self, index: int) -> Worker:
        return self._workers[index]

    def ready(self, among: Sequence[Worker]) -> list[Worker]:
        """Wait until at least one of some busy workers has answered (or died); return those."""
        answered = connection.wait([worker.connection for worker in among])
        return [worker for worker in among if worker.connection in answered]

    def close(self) -> None:
        """End all processes."""
        for worker in self._workers:
            worker.connection.close()
        for worker in self._workers:
            worker.close()


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Environment variables that a process started inside the block inherits; libraries read them before our code runs there."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Ctrl-C takes effect when the block ends; a process started inside never sees it, not even while it imports what it needs."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "pthread_sigmask"):  # Ctrl-C goes elsewhere; Windows
        yield
        return
    resource_tracker.ensure_running()  # or the first process would start it, which lets signals through again
    came: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, _: came.append(number))  # the mask below does not bind other threads
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # inherited
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, handler)
    if came:
        raise KeyboardInterrupt


def _serve(pipe: Any, make_handler: Callable[..., Handler], arguments: tuple[Any, ...]) -> None:
    """A worker's life: make the handler with the first request, answer until the parent hangs up."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    handler: Handler | None = None
    while True:
        try:
            request = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            handler = handler or make_handler(*arguments)
            answer = (True, handler(request), "")
        except Exception as error:
            answer = (False, error, traceback.format_exc())
        try:
            pipe.send(answer)
        except OSError:
            return
        except Exception:  # an exception that cannot be pickled: its text still can
            pipe.send((False, None, answer[2] or traceback.format_exc()))
