"""What tests of stopping and going on share: the newest state of a run, and runs in processes of their own that are killed at a chosen moment.

Processes are forked from a clean server that has imported everything, so starting one costs no import.  To be killed "while it saves"
is to be killed at the n-th of the calls that touch the disk: every file and every rename is such a moment.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import pathlib
import shutil
import signal
import socket
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from tiny import SMALL
from torch import Tensor

from wam.config import Config, load_config
from wam.shards import ShardWriter
from wam.training.checkpoints import read_manifest, read_part, state_folder, states

SAMPLE = Path(__file__).parents[1] / "data" / "metaworld_sample"
QUICK = (
    *SMALL,
    *(f"data.root={SAMPLE}", "data.executed_action=action.executed", "codec.image_size=[64, 64]", "codec.fit_frames=200", "timeline.blocks=2"),
    *("training.batch_size=4", "training.warmup_steps=1", "training.validation_batches=1", "training.validation_samples=4", "training.precision=fp32", "training.log_every=1"),
)


def quick_config(*overrides: str) -> Config:
    """A run on the committed sample of a second or two."""
    return load_config(None, (*QUICK, *overrides))


def newest_state(output: Path) -> dict[str, Tensor]:
    """Every tensor of a run's newest state, as `<file>.<name>`."""
    folder = state_folder(output, states(output)[-1])
    parts = {name.partition(".")[0].partition("-")[0] for name in read_manifest(folder)["files"]}
    out = {}
    for part in sorted(parts):
        with read_part(folder, part) as reader:
            out |= {f"{part}.{name}": reader.get(name) for name in reader.names()}
    return out


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Equal to the bit."""
    return a.keys() == b.keys() and len(a) > 100 and all(torch.equal(a[k], b[k]) for k in a)


def losses(output: Path) -> dict[int, Any]:
    """The training losses that a run's log has, by step; each step once."""
    records = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    found = [(r["step"], {k: v for k, v in r.items() if k.startswith("train/")}) for r in records if any(k.startswith("train/") for k in r)]
    assert len(dict(found)) == len(found), "a step is in the log twice"
    return dict(found)


# ------------------------------------------------------------------------------------------------ processes


def start(target: Callable[..., None], *args: Any, world: int = 1) -> list[BaseProcess]:
    """Run `target(*args)` in `world` processes that a launcher would have started."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["survival", "wam.training.loop", "wam.training.engine_ddp", "deepspeed"])
    port = _free_port()
    processes = [context.Process(target=_entry, args=(rank, world, port, target, args), daemon=True) for rank in range(world)]
    with mock.patch.dict(os.environ, DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES=""):  # of the server, when it starts and imports DeepSpeed
        for process in processes:
            process.start()
    return processes


def finish(processes: list[BaseProcess], timeout: float = 300) -> list[int | None]:
    """Wait for processes to end by themselves; their exit codes (-9: killed).  What still runs then is killed: None."""
    end = time.monotonic() + timeout
    for process in processes:
        process.join(max(0.1, end - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    return codes


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _entry(rank: int, world: int, port: int, target: Callable[..., None], args: tuple[Any, ...]) -> None:
    from wam.training import loop

    torch.set_num_threads(1)
    loop.draw_at_end = lambda output: None  # as in conftest.py
    if world > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    target(*args)


def run_training(output: Path, overrides: tuple[str, ...], hook: Callable[..., None] | None = None, *args: Any) -> None:
    """Train in this process; `hook(*args)` sets up what shall go wrong.  What is printed goes to a file per process."""
    from wam.training.loop import train

    log = output.with_name(f"{output.name}-{os.environ.get('RANK', '0')}.txt").open("a")
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    if hook is not None:
        hook(*args)
    try:
        train(quick_config(*overrides), output)
    except Exception as error:
        print(f"{type(error).__name__}: {error}", file=log, flush=True)
        raise SystemExit(2) from error


def said(output: Path, rank: int) -> str:
    """What a process printed."""
    return output.with_name(f"{output.name}-{rank}.txt").read_text()


# ------------------------------------------------------------------------------------------------ dying


def die_at(touch: int, rank: int = 0) -> None:
    """Make this process, if it has that rank, kill itself at its `touch`-th call that changes the disk."""
    if int(os.environ.get("RANK", "0")) != rank:
        return
    count = 0

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == touch:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return call

    for owner, name in ((os, "fsync"), (pathlib.Path, "replace"), (pathlib.Path, "unlink"), (pathlib.Path, "mkdir"), (shutil, "rmtree"), (ShardWriter, "_flush")):
        setattr(owner, name, counted(getattr(owner, name)))
