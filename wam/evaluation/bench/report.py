"""What was measured, for people and for files: a table, the same table in Markdown, and JSON with every number.

The machine is described by what speed depends on (processor, threads, device, versions), not by its name.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from wam import __version__
from wam.evaluation.bench.rows import Comparison, Count, Row, Stage
from wam.evaluation.bench.timing import Times
from wam.files import write_json_atomic

PACKAGES = ("torch", "diffusers", "transformers", "numpy")
COMPARISONS = ("what", "at", "ours", "theirs", "ratio", "of minima", "limit", "holds")
STAGES = ("stage", "at", "median ms", "minimum ms", "TFLOP", "of matmul rate", "note")
COUNTS = ("computed", "in", "times", "limit", "holds")
Table = list[tuple[str, ...]]


class BenchError(RuntimeError):
    """Some limit does not hold, or a measurement failed."""


@dataclass(frozen=True, kw_only=True)
class Output:
    """What every bench is told besides what it measures.

    Attributes:
        threads: of torch, in every process; one makes process time mean the most.
        check: fail where a limit does not hold.
        json: where every number goes.
        markdown: print tables for a document.
        command: what was typed, for the report to say.
    """

    threads: int = 1
    check: bool = False
    json: Path | None = None
    markdown: bool = False
    command: str = "wam bench"


@dataclass(frozen=True)
class Report:
    """All rows of a run, and where and how they were measured."""

    rows: tuple[Row, ...]
    facts: dict[str, Any]

    @property
    def failed(self) -> list[Comparison | Count]:
        """Rows whose limit does not hold."""
        return [row for row in self.rows if not isinstance(row, Stage) and not row.holds]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        groups = {"comparisons": Comparison, "counts": Count, "stages": Stage}
        return {**self.facts, "holds": not self.failed, **{name: [r.to_dict() for r in self.rows if isinstance(r, kind)] for name, kind in groups.items()}}

    def tables(self) -> list[Table]:
        """One table for each kind of row there is, its head first."""
        found: list[Table] = [
            [COMPARISONS, *(_comparison(r) for r in self.rows if isinstance(r, Comparison))],
            [COUNTS, *(_count(r) for r in self.rows if isinstance(r, Count))],
            [STAGES, *(_stage(r) for r in self.rows if isinstance(r, Stage))],
        ]
        return [table for table in found if len(table) > 1]

    def summary(self) -> str:
        """The last line."""
        limited = [row for row in self.rows if not isinstance(row, Stage)]
        failed = self.failed
        return f"{len(limited) - len(failed)} of {len(limited)} limits hold" + (f"; not: {', '.join(f'{row.name} ({row.setting})' for row in failed)}" if failed else "")

    def text(self) -> str:
        """For a terminal."""
        return "\n\n".join([self.heading(), *(_plain(table) for table in self.tables())])

    def markdown(self) -> str:
        """For a document."""
        return "\n\n".join([self.heading(), *(_markdown(table) for table in self.tables())])

    def heading(self) -> str:
        """Where and how, in a line or two."""
        f, machine = self.facts, self.facts["machine"]
        versions = ", ".join(f"{name} {version}" for name, version in f["versions"].items())
        clock = f["clock"] if "clock" in f else "wall time" if machine["device"] == "cuda" else f"process time, {machine['threads']} thread{'s' if machine['threads'] > 1 else ''}"
        return f"`{f['command']}`, {f['date']}: {machine['name']}, {f['dtype']}; milliseconds of {clock}, medians of {f['repeats']} (minima in brackets); {versions}."


def facts(command: str, device: torch.device, dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    """Where and how a run is measured."""
    versions = {"wam": __version__, "python": platform.python_version(), **{name: importlib.metadata.version(name) for name in PACKAGES}}
    return {
        "command": command,
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "machine": machine(device),
        "dtype": str(dtype).removeprefix("torch."),
        "repeats": repeats,
        "versions": versions,
    }


def machine(device: torch.device) -> dict[str, Any]:
    """What speed depends on."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cpu = {"processor": _processor(), "cores": cores, "threads": torch.get_num_threads(), "instructions": torch.backends.cpu.get_cpu_capability()}
    out = {"device": device.type, **cpu, "name": f"{cpu['processor']}, {cores} cores, {cpu['instructions']}"}
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        out |= {"name": gpu.name, "memory_bytes": gpu.total_memory, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return out


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.is_file() else None
    return found.group(1).strip() if found else platform.machine()


# ------------------------------------------------------------------------------------------------ cells


def _comparison(row: Comparison) -> tuple[str, ...]:
    minima = row.ours_ms.minimum / row.theirs_ms.minimum
    return (row.name, row.setting, f"{row.ours}: {_ms(row.ours_ms)}", f"{row.theirs}: {_ms(row.theirs_ms)}", f"{row.ratio:.2f}", f"{minima:.2f}", f"{row.limit:g}", _holds(row.holds))


def _count(row: Count) -> tuple[str, ...]:
    return (row.name, row.setting, str(row.times), str(row.limit), _holds(row.holds))


def _stage(row: Stage) -> tuple[str, ...]:
    if row.ms is None:
        return (row.name, row.setting, "-", "-", "-", "-", row.note)
    share = "-" if row.share is None or row.name == "matmul" else f"{100 * row.share:.0f}%"
    note = row.note or (f"{row.rate / 1e12:.3g} TFLOP/s" if row.name == "matmul" else "")
    return (row.name, row.setting, _number(row.ms.median), _number(row.ms.minimum), f"{row.flops / 1e12:.3g}" if row.flops else "-", share, note)


def _ms(times: Times) -> str:
    return f"{_number(times.median)} ({_number(times.minimum)})"


def _number(value: float) -> str:
    """Three digits, or whole ones."""
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def _holds(holds: bool) -> str:
    return "yes" if holds else "NO"


def _plain(table: Table) -> str:
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table)


def _markdown(table: Table) -> str:
    head, *rows = (f"| {' | '.join(row)} |" for row in table)
    return "\n".join([head, "|" + "---|" * len(table[0]), *rows])


def deliver(report: Report, output: Output) -> None:
    """Print a report, and write it where that is asked for.

    Raises:
        BenchError: with `check`, a limit that does not hold; after everything was printed and written.
    """
    print(report.markdown() if output.markdown else report.text())
    print(f"\n{report.summary()}")
    if output.json is not None:
        write_json_atomic(output.json, report.to_dict())
        print(f"wrote {output.json}")
    if output.check and report.failed:
        raise BenchError(report.summary())
