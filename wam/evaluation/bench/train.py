"""`wam bench train`: where the time of a training step goes, and what each process holds, engine by engine.

    single                                    one process, the whole batch
    alone                                     as many processes as below, each a run of its own on its share of the batch: nobody waits for anybody
    ddp | zero1 | zero2 | zero3 | fsdp2       the same processes as one run; a step's excess over `alone` is what talking costs (communication)

What is held after a backward pass is compared with arithmetic: P trained parameters of 4 bytes, over N processes,

              weights   masters   gradients   moments   average
    single    4P        -         4P          8P        4P
    ddp       4P        -         4P          8P        4P
    zero1     4P        4P / N    4P / N      8P / N    4P / N       (while the backward pass runs, gradients are whole)
    zero2     4P        4P / N    4P / N      8P / N    4P / N
    zero3     4P / N    4P / N    4P / N      8P / N    4P / N
    fsdp2     4P / N    -         4P / N      8P / N    4P / N

and frozen weights beside.  Processes talk through gloo on a CPU and nccl on GPUs.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from wam.config import Config, to_dict
from wam.config_training import EngineConfig
from wam.evaluation.bench.report import BenchError, Output, Report, Table, deliver, facts
from wam.files import write_json_atomic

MANY = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
ENGINES = ("single", *MANY)
PHASES = ("data", "forward", "backward", "update")
KINDS = ("weights", "masters", "gradients", "moments", "average")
SHARDED = {  # what of it each process holds only its share
    "zero1": {"masters", "gradients", "moments", "average"},
    "zero2": {"masters", "gradients", "moments", "average"},
    "zero3": set(KINDS),
    "fsdp2": set(KINDS),
}
TOLERANCE = 0.05  # padding, and buckets that are a little larger than what is in them
BUCKET = 500_000  # elements of ZeRO's buckets: shipped files have more, which would be all there is to see of a small model
STEP_HEAD = ("engine", "processes", "samples a process", "data ms", "forward ms", "backward ms", "update ms", "step ms", "communication ms", "samples/s")
MEMORY_HEAD = ("engine", "what", "MB in each process", "by arithmetic", "ratio", "holds")


@dataclass(frozen=True)
class TrainOptions(Output):
    """As the command line says.

    Attributes:
        config: what is trained; `training.batch_size` is the whole batch of a step.
        engines: of `ENGINES`.
        processes: of the engines that take several.
        steps: that are timed, after two that are not.
    """

    config: Config
    engines: tuple[str, ...] = ENGINES
    processes: int = 2
    steps: int = 9


@dataclass(frozen=True)
class Measured:
    """One engine: what its processes found.

    Attributes:
        seconds: by phase, of every timed step, the slowest process's.
        held: bytes by kind, in each process.
    """

    engine: str
    processes: int
    samples: int
    parameters: int
    seconds: dict[str, list[float]]
    held: dict[str, list[int]]
    resident: list[int]

    @property
    def step(self) -> float:
        """Median seconds of a step."""
        return statistics.median(map(sum, zip(*self.seconds.values(), strict=True)))

    def phase(self, name: str) -> float:
        """Median seconds of a phase."""
        return statistics.median(self.seconds[name])


@dataclass(frozen=True)
class MemoryRow:
    """Bytes of one kind in each process, against the arithmetic."""

    engine: str
    kind: str
    held: list[int]
    expected: float

    @property
    def holds(self) -> bool:
        """Whether no process holds more, or all together less, than the arithmetic says."""
        slack = TOLERANCE * self.expected
        return max(self.held) <= self.expected + slack and sum(self.held) / len(self.held) >= self.expected - slack

    def cells(self) -> tuple[str, ...]:
        """For a table."""
        ratio = f"{max(self.held) / self.expected:.2f}" if self.expected else "-"
        return (self.engine, self.kind, ", ".join(f"{h / 1e6:.2f}" for h in self.held), f"{self.expected / 1e6:.2f}", ratio, "yes" if self.holds else "NO")


@dataclass(frozen=True)
class TrainReport(Report):
    """Steps and memory of every engine."""

    measured: tuple[Measured, ...] = ()

    @property
    def memory(self) -> list[MemoryRow]:
        """Every engine's kinds of memory."""
        return [MemoryRow(m.engine, kind, m.held[kind], expected_bytes(m.engine, kind, m.parameters, m.processes)) for m in self.measured if m.engine != "alone" for kind in KINDS]

    @property
    def failed(self) -> list[Any]:
        """Memory that is not what the arithmetic says."""
        return [row for row in self.memory if not row.holds]

    def summary(self) -> str:
        """The last line."""
        return f"{len(self.memory) - len(self.failed)} of {len(self.memory)} kinds of memory are what arithmetic says"

    def communication(self, measured: Measured) -> float | None:
        """Seconds that a step takes longer than the same processes' that do not talk; None of those themselves."""
        alone = next((m for m in self.measured if m.engine == "alone"), None)
        return None if alone is None or measured.processes == 1 or measured is alone else measured.step - alone.step

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        steps = [{**vars(m), "step_seconds": m.step, "communication_seconds": self.communication(m)} for m in self.measured]
        memory = [{**vars(row), "holds": row.holds} for row in self.memory]
        return {**self.facts, "holds": not self.failed, "steps": steps, "memory": memory}

    def tables(self) -> list[Table]:
        """Steps, then memory."""
        return [[STEP_HEAD, *map(self._cells, self.measured)], [MEMORY_HEAD, *(row.cells() for row in self.memory)]]

    def _cells(self, m: Measured) -> tuple[str, ...]:
        talk = self.communication(m)
        phases = [f"{1e3 * m.phase(name):.3g}" for name in PHASES]
        samples = m.samples * m.processes / m.step
        return (m.engine, str(m.processes), str(m.samples), *phases, f"{1e3 * m.step:.3g}", "-" if talk is None else f"{1e3 * talk:.3g}", f"{samples:.3g}")

    def heading(self) -> str:
        """Where and how, in a line or two."""
        f, machine = self.facts, self.facts["machine"]
        versions = ", ".join(f"{name} {version}" for name, version in f["versions"].items())
        parameters = self.measured[0].parameters / 1e6 if self.measured else 0.0
        return f"`{f['command']}`, {f['date']}: {machine['name']}, {machine['threads']} torch thread{'s' if machine['threads'] > 1 else ''} a process; {parameters:.2f} M parameters, {f['batch']} samples a step; medians of {f['repeats']} steps, the slowest process; {versions}."


def expected_bytes(engine: str, kind: str, parameters: int, processes: int) -> float:
    """What a process should hold; see the module's docstring."""
    if kind == "masters" and not engine.startswith("zero"):
        return 0.0
    each = (8.0 if kind == "moments" else 4.0) * parameters
    return each / processes if kind in SHARDED.get(engine, ()) else each


def bench_train(options: TrainOptions) -> TrainReport:
    """Measure, print, and write what is asked for.

    Raises:
        ValueError: an unknown engine, or numbers that do not fit; before anything is measured.
        BenchError: a process that failed; with `check`, memory that is not what it should be, after everything was printed and written.
    """
    _check(options)
    runs = [*(["single"] if "single" in options.engines else []), *(["alone", *(e for e in options.engines if e != "single")] if set(options.engines) & set(MANY) else [])]
    with tempfile.TemporaryDirectory(prefix="wam-bench-train-") as scratch:
        measured = tuple(_measure(name, options, Path(scratch)) for name in tqdm(runs, desc="bench", unit="engine"))
    where = facts(options.command, torch.device("cuda" if torch.cuda.is_available() else "cpu"), torch.float32, options.steps)
    where["machine"] |= {"threads": options.threads}
    report = TrainReport((), {**where, "batch": options.config.training.batch_size}, measured)
    deliver(report, options)
    return report


def _check(options: TrainOptions) -> None:
    unknown = [name for name in options.engines if name not in ENGINES]
    if unknown or not options.engines:
        raise ValueError(f"--engines has {', '.join(unknown) or 'none'}; expected some of {', '.join(ENGINES)}")
    if options.steps < 1 or options.threads < 1 or options.processes < 2:
        raise ValueError(f"--repeats is {options.steps}, --threads {options.threads} and --processes {options.processes}; expected at least 1, 1 and 2")
    batch = options.config.training.batch_size
    if batch % options.processes:
        raise ValueError(f"training.batch_size {batch} cannot be shared by {options.processes} processes; use a multiple of them, or --processes of another number")


# ------------------------------------------------------------------------------------------------ processes


def _measure(name: str, options: TrainOptions, scratch: Path) -> Measured:
    """Start an engine's processes and read what they found."""
    count = 1 if name == "single" else options.processes
    folder = scratch / name
    folder.mkdir()
    config = _config(name, options, folder)
    request = {"config": to_dict(config), "threads": options.threads, "warmups": 2, "steps": options.steps}
    paths = [folder / ("request.json" if name != "alone" else f"request-{number}.json") for number in range(count)]
    for number, path in enumerate(paths):
        write_json_atomic(path, {**request, "number": number})
    _run(name, paths, joined=name in MANY, threads=options.threads)
    found = [json.loads(path.with_name(f"{path.stem}-{number}.json").read_text()) for number, path in enumerate(paths)]
    seconds = {phase: [max(step) for step in zip(*(f["seconds"][phase] for f in found), strict=True)] for phase in PHASES}
    held = {kind: [f["bytes"][kind] for f in found] for kind in KINDS}
    return Measured(name, count, options.config.training.batch_size // count, found[0]["parameters"], seconds, held, [f["peak_resident_bytes"] for f in found])


def _config(name: str, options: TrainOptions, folder: Path) -> Config:
    """The config with an engine; `alone` has its share of the batch."""
    t = options.config.training
    if name == "alone":
        return replace(options.config, training=replace(t, batch_size=t.batch_size // options.processes, engine=EngineConfig("single")))
    if not name.startswith("zero"):
        return replace(options.config, training=replace(t, engine=EngineConfig(name)))  # type: ignore[arg-type]
    path = folder / "zero.json"
    sizes = {"reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET, "stage3_prefetch_bucket_size": BUCKET, "stage3_param_persistence_threshold": 0}
    write_json_atomic(path, {"zero_optimization": {"stage": int(name[-1]), "overlap_comm": True, "contiguous_gradients": True, **sizes}, "steps_per_print": 10**9})
    return replace(options.config, training=replace(t, engine=EngineConfig("deepspeed", str(path))))


def _run(name: str, paths: Sequence[Path], joined: bool, threads: int) -> None:
    """Run the worker once for each request, as one run where they are `joined`; all end together, also where one fails."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(len(paths)), "LOCAL_WORLD_SIZE": str(len(paths))}
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", *shared)} | {"OMP_NUM_THREADS": str(threads)}
    processes = []
    for number, path in enumerate(paths):
        environment = clean | ({**shared, "RANK": str(number), "LOCAL_RANK": str(number)} if joined else {})
        environment |= {} if torch.cuda.is_available() else {"DS_ACCELERATOR": "cpu"}
        log = path.with_suffix(f".{number}.log").open("w")
        processes.append((subprocess.Popen([sys.executable, "-m", "wam.evaluation.bench.train_worker", str(path)], env=environment, stdout=log, stderr=subprocess.STDOUT), log))
    try:
        codes = _wait([process for process, _ in processes])
    finally:
        for process, log in processes:
            process.kill()
            process.wait()
            log.close()
    if any(codes):
        said = "\n".join(Path(log.name).read_text()[-2000:] for (_, log), code in zip(processes, codes, strict=True) if code)
        raise BenchError(f"engine {name!r}: a process ended with {next(c for c in codes if c)}:\n{said}")


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> list[int]:
    """Exit codes; 0 of those that still ran when another failed: they would wait for it."""
    while True:
        codes = [process.poll() for process in processes]
        if any(codes) or None not in codes:
            return [code or 0 for code in codes]
        time.sleep(0.2)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
