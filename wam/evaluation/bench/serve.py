"""`wam bench serve`: the policy server beside itself without batching, and beside openpi's loop around the same policy.

    round 1   ours  alone  openpi        each in a process of its own, all the time; who is asked takes turns, every second round
    round 2   openpi  alone  ours        backwards, so a machine that others use too slows all of them alike
    ...

For each mode and number of robots: latencies of a plan (p50, p95, p99), plans a second, and what the server's process computed for one.
`overhead` is what one robot with three cameras waits for a policy that answers at once, without what that policy takes by itself (the median
of laying the pictures on its canvas): decoding, memory and gate `within the server`; with packing, the wire and unpacking, `there and back`.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from wam.evaluation.bench.report import Output, Report, deliver, facts
from wam.evaluation.bench.rows import Comparison, Row, Stage
from wam.evaluation.bench.serve_load import Load, load
from wam.evaluation.bench.serve_sides import CAMERAS, PICTURE, ServerProcess, Side
from wam.evaluation.bench.timing import Times

OURS, ALONE, OPENPI = "wam serve", "without batching", "openpi's loop"
TWICE, NO_SLOWER = 0.5, 1.05  # of milliseconds a plan; no slower means 1, with a margin for noise
OVERHEAD_MS = 3.0  # at p95
COUNTS = (1, 4, 16)
MODES = ("skip", "joint")


@dataclass(frozen=True, kw_only=True)
class ServeBenchOptions(Output):
    """As the command line says.

    Attributes:
        sessions: numbers of robots.
        seconds: that each side is asked for at a time, at least.
        repeats: rounds.  With 3 of 5 s a row of the demo's policy has 130 plans or more, so its p99 is near the slowest but one; the rows take 7 minutes.
    """

    checkpoint: Path
    modes: tuple[str, ...] = MODES
    device: str = "cpu"
    sessions: tuple[int, ...] = COUNTS
    seconds: float = 5.0
    repeats: int = 3
    quick: bool = False


def bench_serve(options: ServeBenchOptions) -> Report:
    """Measure, print, and write what is asked for.

    Raises:
        FileNotFoundError: no checkpoint there.
        BenchError: a server that does not run or gives no plans; with `check`, a limit that does not hold, after everything was printed and written.
    """
    if not options.checkpoint.is_dir():
        raise FileNotFoundError(f"no checkpoint {options.checkpoint}; `wam train` writes one")
    if options.quick:
        options = replace(options, sessions=(1, 2), seconds=0.2, repeats=2)
    parts = options.repeats * (len(options.modes) * len(options.sessions) * 3 + 2)
    with tqdm(total=parts, desc="bench", bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed} gone, {remaining} to go{postfix}") as progress:
        rows = [*_throughput(options, progress), *_overhead(options, progress)]
    about = facts(options.command, torch.device("cpu"), torch.float32, options.repeats)
    about |= {"clock": f"wall time, {options.threads} thread{'s' if options.threads > 1 else ''} of torch in a server", "load_average": os.getloadavg()}
    report = Report(tuple(rows), about)
    deliver(report, options)
    print(f"load of the machine at the end: {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors, this bench included")
    return report


# ------------------------------------------------------------------------------------------------ throughput


def _throughput(options: ServeBenchOptions, progress: tqdm) -> list[Row]:
    common: dict[str, Any] = {"checkpoint": options.checkpoint, "device": options.device, "threads": options.threads}
    sides = (Side(OURS, **common), Side(ALONE, max_batch=1, **common), Side(OPENPI, loop="openpi", **common))
    taken: dict[tuple[str, int, str], list[Load]] = {}
    with ExitStack() as stack:
        running = {side.name: stack.enter_context(ServerProcess(side)) for side in sides}
        for number in range(options.repeats):
            for mode in options.modes:
                for sessions in options.sessions:
                    for name in list(running)[:: 1 if number % 2 == 0 else -1]:
                        server = running[name]
                        progress.set_postfix_str(f"{mode}, robots: {sessions}, {name}")
                        taken.setdefault((mode, sessions, name), []).append(asyncio.run(load(server.url, sessions, mode, options.seconds, server.cpu_s)))
                        progress.update()
    return [row for mode in options.modes for sessions in options.sessions for row in _rows(mode, sessions, {name: taken[mode, sessions, name] for name in running}, options)]


def _rows(mode: str, sessions: int, loads: dict[str, list[Load]], options: ServeBenchOptions) -> list[Row]:
    """Each side's latencies, and the two comparisons: milliseconds that pass for each plan, round by round."""
    at = f"{mode}, robots: {sessions}"
    out: list[Row] = [_stage(f"a plan, {name}", at, rounds) for name, rounds in loads.items()]
    ours = Times(tuple(each.ms_a_plan for each in loads[OURS]))
    for other in (ALONE, OPENPI):
        limit = TWICE if other == OPENPI and mode == "skip" and sessions >= 16 else NO_SLOWER
        out.append(Comparison("time for each plan", at, OURS, other, ours, Times(tuple(each.ms_a_plan for each in loads[other])), limit))
    return out


def _stage(name: str, at: str, rounds: Sequence[Load]) -> Stage:
    """Latencies of all rounds together, and the rates."""
    every = sum(rounds[1:], rounds[0])
    p50, p95, p99 = np.percentile(every.latencies, (50, 95, 99))
    count = len(every.latencies)
    rate, cpu, batch = count / every.seconds, every.cpu_s / count * 1e3, float(np.mean(every.batches))
    told: dict[str, Any] = {"p50_ms": p50, "p95_ms": p95, "p99_ms": p99, "plans_per_second": rate, "cpu_ms_per_plan": cpu, "mean_batch": batch, "plans": count}
    note = f"p95 {p95:.3g}, p99 {p99:.3g}; {rate:.3g} plans/s; computed {cpu:.3g} ms for each; batch {batch:.2g}"
    return Stage(name, at, Times((float(p50),)), note=note, facts={key: float(value) for key, value in told.items()})


# ------------------------------------------------------------------------------------------------ overhead


def _overhead(options: ServeBenchOptions, progress: tqdm) -> list[Row]:
    """Round trips to a policy that answers at once, of one robot with three cameras, less what that policy takes by itself."""
    common: dict[str, Any] = {"checkpoint": options.checkpoint, "threads": options.threads, "instant": True}
    sides = (Side(OURS, **common), Side(OPENPI, loop="openpi", **common))
    taken: dict[str, list[Load]] = {side.name: [] for side in sides}
    with ExitStack() as stack:
        running = {side.name: stack.enter_context(ServerProcess(side)) for side in sides}
        for number in range(options.repeats):
            for name in list(running)[:: 1 if number % 2 == 0 else -1]:
                server = running[name]
                progress.set_postfix_str(f"overhead, {name}")
                taken[name].append(asyncio.run(load(server.url, 1, options.modes[0], options.seconds / 2, server.cpu_s, PICTURE, frames=1)))
                progress.update()
    at = f"{len(CAMERAS)} cameras of {PICTURE[0]}x{PICTURE[1]}"
    out: list[Row] = [_stage(f"round trip without a policy, {name}", at, rounds) for name, rounds in taken.items()]
    bare = Times(tuple(float(np.median(each.policy)) for each in taken[OPENPI]))
    out.append(Stage("the bare policy", at, bare, note="the pictures on its canvas, in openpi's loop"))
    within, whole = ([float(np.percentile(getattr(each, what), 95)) - bare.median for each in taken[OURS]] for what in ("within", "latencies"))
    allowed = Times((OVERHEAD_MS,))
    return [*out, *(Comparison(f"overhead at p95, {name}", at, OURS, "allowed", Times(tuple(p95)), allowed, 1.0) for name, p95 in (("within the server", within), ("there and back", whole)))]
