"""`wam bench model`: how fast the network is, against diffusers' own, against itself, and against the machine.

    widths (256, 512, 1024)      claims, each as two sides in turns (`compare`), and counts of what a session computes once (`counts`)
    1.3b, 5b, 14b                the claims against diffusers, every stage of a chunk, and training, as shares of the matmul rate (`device`)

A job is a row or a few; jobs are weighted by what they compute, so the progress bar's estimate means something.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from tqdm import tqdm

from wam.config import Config
from wam.evaluation.bench.compare import Bench, compare_chunks, compare_skip, compare_step, compare_training
from wam.evaluation.bench.counts import count_recomputation
from wam.evaluation.bench.device import bench_chunk, bench_training, matmul_rate
from wam.evaluation.bench.report import Output, Report, deliver, facts
from wam.evaluation.bench.rows import Row, Stage
from wam.evaluation.bench.subject import NAMED, size_config
from wam.model.attention import Backend

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SIZES = {"cpu": ("256", "512", "1024"), "cuda": ("1.3b", "5b", "14b")}
QUICK = Bench(torch.device("cpu"), torch.float32, repeats=2, chunks=(2, 4), history=3)
DEEP = "model.layers=6"  # the default depth, for modes: what a step computes once (levels, action encoder) would weigh too much in two layers
ROBOTS = (1, 4)  # plans side by side: for one, products of 24 rows wait for weights from memory
EXPERT_FROM = 1024  # the width from which an expert of a third is measured too


@dataclass(frozen=True)
class Options(Output):
    """As the command line says.

    Attributes:
        sizes: widths and names; empty: what the device is for.
        dtype: default: float32 on a CPU, bfloat16 on a GPU.
        quick: few repeats and short sessions, to see that all runs.
    """

    device: str = "cpu"
    sizes: tuple[str, ...] = ()
    dtype: str | None = None
    repeats: int = 9
    quick: bool = False


@dataclass(frozen=True)
class Job:
    """Some rows, and about how much it takes to measure them."""

    name: str
    cost: float
    rows: Callable[[], Sequence[Row]]


def bench_model(options: Options) -> Report:
    """Measure, print, and write what is asked for.

    Raises:
        ValueError: an unknown size, device or dtype, or a GPU where there is none; before anything is measured.
        BenchError: with `check`, a limit that does not hold; after everything was printed and written.
    """
    bench, sizes = _bench(options), options.sizes or SIZES[options.device]
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        rows = _measure(_jobs(sizes, bench, options.quick))
        report = Report(tuple(rows), facts(options.command, bench.device, bench.dtype, bench.repeats))
    finally:
        torch.set_num_threads(before)
    deliver(report, options)
    return report


def _bench(options: Options) -> Bench:
    if options.device not in SIZES:
        raise ValueError(f"--device is {options.device!r}; expected one of {', '.join(SIZES)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device is 'cuda', but torch sees no GPU here; install a CUDA build of torch, or use --device cpu")
    name = options.dtype or ("bfloat16" if options.device == "cuda" else "float32")
    if name not in DTYPES:
        raise ValueError(f"--dtype is {name!r}; expected one of {', '.join(DTYPES)}")
    if options.threads < 1 or options.repeats < 1:
        raise ValueError(f"--threads is {options.threads} and --repeats is {options.repeats}; each must be at least 1")
    bench = QUICK if options.quick else Bench(QUICK.device, QUICK.dtype, options.repeats)
    return replace(bench, device=torch.device(options.device), dtype=DTYPES[name])


def _measure(jobs: Sequence[Job]) -> list[Row]:
    rows: list[Row] = []
    total = sum(job.cost for job in jobs)
    shares = [max(1, round(1000 * job.cost / total)) for job in jobs]
    with tqdm(total=sum(shares), desc="bench", bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed} gone, {remaining} to go{postfix}") as progress:
        for job, share in zip(jobs, shares, strict=True):
            progress.set_postfix_str(job.name)
            rows += job.rows()
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            progress.update(share)
    return rows


# ------------------------------------------------------------------------------------------------ what is measured


def _jobs(sizes: Sequence[str], bench: Bench, quick: bool) -> list[Job]:
    """Every job; sizes are read, and refused, before the first is measured."""
    jobs, smallest, configs = [], True, [(size, size_config(size)) for size in sizes]
    for size, config in configs:
        cost = config.model.layers * config.model.width**2 * config.timeline.latents_per_block * config.codec.image_size[0] * config.codec.image_size[1] / config.codec.patch**2 / 1e9
        jobs += _against_diffusers(config, size, cost, bench)
        if size in NAMED:
            jobs += _stages(config, size, cost, bench, quick)
            continue
        deep = size_config(size, DEEP)
        for robots in ROBOTS:
            jobs.append(Job(f"skip, {size}, {robots}", 60 * robots * cost, lambda c=deep, s=size, r=robots: [compare_skip(c, s, 1 / 4, bench, robots=r)]))  # type: ignore[misc]
        if config.model.width >= EXPERT_FROM:
            with_expert = size_config(size, DEEP, f"model.expert_width={_third(config.model.width)}")
            jobs.append(Job(f"skip with an expert, {size}", 54 * cost, lambda c=with_expert, s=size: [compare_skip(c, s, 1 / 10, bench)]))  # type: ignore[misc]
        if smallest:
            smallest = False
            jobs.append(Job(f"session, {size}", 30 * cost, lambda c=config, s=size: [compare_chunks(c, s, bench)]))  # type: ignore[misc]
            jobs.append(Job("counts", cost, count_recomputation))
    return jobs


def _third(width: int) -> int:
    """A third, rounded up to a multiple of 8."""
    return -(-width // 24) * 8


def _against_diffusers(config: Config, size: str, cost: float, bench: Bench) -> list[Job]:
    bench = replace(bench, history=min(bench.history, config.timeline.history)) if size in NAMED else bench  # more than that fills a GPU
    checkpointed = replace(config, model=replace(config.model, gradient_checkpointing=True))
    jobs = [Job(f"{name}, {size}", 40 * cost, lambda c=c: _fits("training step", size, lambda: [compare_training(c, size, bench)])) for name, c in (("training", config), ("checkpointed training", checkpointed))]  # type: ignore[misc]
    return [*jobs, Job(f"cached step, {size}", 8 * cost, lambda: _fits("cached step", size, lambda: compare_step(config, size, bench)))]


def _stages(config: Config, size: str, cost: float, bench: Bench, quick: bool) -> list[Job]:
    """The machine's rate in the same minute, every stage of a chunk, and training with either kind of mask."""
    rates: list[Stage] = []

    def chunk() -> list[Stage]:
        rates.append(matmul_rate(bench, 8192 if bench.device.type == "cuda" else 512))
        return [*rates, *bench_chunk(config, size, bench, rates[0].rate)]

    def train(attention: Backend) -> list[Stage]:
        m = replace(config.model, gradient_checkpointing=True, attention=attention)
        return [bench_training(replace(config, model=m), size, bench, rates[0].rate, largest=2 if quick else 1024)]

    kinds: tuple[Backend, ...] = ("auto", "flex") if bench.device.type == "cuda" else ("auto",)
    return [Job(f"stages, {size}", 60 * cost, chunk), *(Job(f"training, attention {kind}, {size}", 80 * cost, lambda kind=kind: train(kind)) for kind in kinds)]  # type: ignore[misc]


def _fits(name: str, size: str, measure: Callable[[], Sequence[Row]]) -> Sequence[Row]:
    """The rows, or one that says that they do not fit in the device's memory."""
    try:
        return measure()
    except torch.OutOfMemoryError:
        return [Stage(name, size, None, note="does not fit in the device's memory")]
