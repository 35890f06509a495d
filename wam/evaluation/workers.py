"""Worker processes that answer requests over a pipe: the one way this package uses several cores.

Workers are spawned, not forked (OpenGL and threads do not survive a fork), run single-threaded, never see Ctrl-C (their parent decides),
and end by themselves when their parent is gone.  What goes wrong inside one comes back as text; a worker that dies is reported, never
waited for.

    parent    send r1, r2, r3 ........ busy with other things ........ receive a1, a2, a3
    worker         r1 --> r2 --> r3 --> (idle)                         requests are answered in their order, and an answer that the
    its sender        a1 ....a2 ....a3                                 parent does not take yet never keeps the next from being worked on
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing import connection, resource_tracker
from types import TracebackType
from typing import Any

from wam.evaluation.gl import choose_backend

Handler = Callable[[Any], Any]
_SINGLE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "LP_NUM_THREADS"), "1")


class WorkerError(RuntimeError):
    """A request failed inside a worker, or the worker died.

    `error` is the exception itself where there is one; `text` its traceback; `died` says that the process is gone.
    """

    def __init__(self, text: str, error: BaseException | None = None, died: bool = False) -> None:
        super().__init__(text)
        self.text, self.error, self.died = text, error, died


class Worker:
    """One process answering one request after another."""

    def __init__(self, make_handler: Callable[..., Handler], arguments: Sequence[Any] = (), variables: Mapping[str, str] | None = None) -> None:
        """Start the process; `make_handler(*arguments)` is called inside it, so it must be importable by name.

        Args:
            variables: of the operating system, for libraries that read them when they are imported; default: how MuJoCo renders.
        """
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self._begun, self._answered = context.RawValue("Q", 0), 0
        self._process = context.Process(target=_serve, args=(theirs, self._begun, make_handler, tuple(arguments)), daemon=True)
        chosen = {"MUJOCO_GL": choose_backend()} if variables is None else variables
        with _environment({**_SINGLE_THREAD, **chosen}), _interrupts_held_back():
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
            raise WorkerError(self._obituary(), died=True) from error

    def receive(self) -> Any:
        """Wait for the answer to a request.

        Raises:
            WorkerError: the request failed, or the process died over it.
        """
        try:
            fine, value, text = self.connection.recv()
        except (EOFError, OSError) as error:
            raise WorkerError(self._obituary(), died=True) from error
        self._answered += 1
        if not fine:
            raise WorkerError(text, value)
        return value

    @property
    def unheard(self) -> int:
        """Requests that were begun and whose answers were not received: the last of them is what the process is, or was, busy with."""
        return int(self._begun.value) - self._answered

    def kill(self) -> None:
        """End the process at once, whatever it does."""
        self._process.kill()
        self._process.join()
        self.connection.close()

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

    def __init__(self, count: int, make_handler: Callable[..., Handler], arguments: Sequence[Any] = (), variables: Mapping[str, str] | None = None) -> None:
        """Start `count` processes, each with its own handler; see `Worker`."""
        self._make = lambda: Worker(make_handler, arguments, variables)
        self._workers = [self._make() for _ in range(count)]

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._workers)

    def __getitem__(self, index: int) -> Worker:
        return self._workers[index]

    def replace(self, index: int) -> Worker:
        """Kill a worker and start another in its place."""
        self._workers[index].kill()
        self._workers[index] = self._make()
        return self._workers[index]

    def ready(self, among: Sequence[Worker], timeout: float | None = None) -> list[Worker]:
        """Wait until at least one of some busy workers has answered (or died), or `timeout` seconds; return those."""
        answered = connection.wait([worker.connection for worker in among], timeout)
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


def _serve(pipe: Any, begun: Any, make_handler: Callable[..., Handler], arguments: tuple[Any, ...]) -> None:
    """A worker's life: make the handler with the first request, answer until the parent hangs up."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers: queue.SimpleQueue[tuple[bool, Any, str]] = queue.SimpleQueue()
    threading.Thread(target=_send_answers, args=(pipe, answers), daemon=True).start()
    handler: Handler | None = None
    while True:
        try:
            request = pipe.recv()
        except (EOFError, OSError):
            return
        begun.value += 1
        try:
            handler = handler or make_handler(*arguments)
            answers.put((True, handler(request), ""))
        except Exception as error:
            answers.put((False, error, traceback.format_exc()))


def _send_answers(pipe: Any, answers: queue.SimpleQueue[tuple[bool, Any, str]]) -> None:
    """Hand over answers as the parent takes them, until it hangs up."""
    while True:
        fine, value, text = answers.get()
        try:
            pipe.send((fine, value, text))
        except OSError:
            return
        except Exception:  # what cannot be pickled: its text still can
            pipe.send((False, None, text or traceback.format_exc()))
