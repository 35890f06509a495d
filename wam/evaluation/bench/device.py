"""The stages of a chunk and of training on one device, against its own matmul rate.

    prefill S | Ac | Vc      what commit and observe write into the memory
    denoise                  a plan of 16 solver steps, of which 16, 8, 4 or 1 are evaluated; with guidance every row has two sides
    step                     one evaluation: eager, compiled block by block, as a CUDA graph
    training                 forward, backward and AdamW at the largest batch that fits

Every function runs on a CPU too, at a small size.  What does not fit or cannot run there becomes a row that says why.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from wam.config import Config, LoraConfig, SamplingConfig
from wam.evaluation.bench.compare import Bench, TrainingStep, sampling_call
from wam.evaluation.bench.rows import Stage
from wam.evaluation.bench.subject import Inputs, Memory, build_model, remember
from wam.evaluation.bench.timing import Call, Times, measure
from wam.model.compiled import compile_blocks, uncompile_blocks
from wam.model.flops import Work, forward_flops, seen_pairs, step_work, window_work
from wam.model.lora import apply_lora
from wam.model.wam import WorldActionModel
from wam.relations import Reach
from wam.timeline import Kind

MODE = "joint_mutual"  # video and actions see each other: one attention over all
STEPS, EVALUATIONS, GUIDANCE = 16, (16, 8, 4, 1), 5.0
ADAPTERS = LoraConfig(rank=4, alpha=4.0)
CANNOT = (RuntimeError, ImportError)  # out of memory, no compiler, a capture that is not allowed


def matmul_rate(bench: Bench, size: int) -> Stage:
    """The machine's matmul rate: a product of two square matrices, FLOP a second."""
    a, b = (torch.randn(size, size, device=bench.device, dtype=bench.dtype) for _ in range(2))
    times = measure(lambda: torch.mm(a, b), max(10, bench.repeats), bench.device, warmups=3)
    flops = 2 * size**3
    return Stage("matmul", f"{size} x {size} x {size}, {_name(bench.dtype)}", times, flops, flops / (times.minimum * 1e-3))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ------------------------------------------------------------------------------------------------ inference


@dataclass(frozen=True)
class Chunk:
    """A model with a full memory, with or without guidance's other side."""

    model: WorldActionModel
    inputs: Inputs
    memory: Memory
    size: str
    bench: Bench
    rate: float

    @property
    def rows(self) -> int:
        """Rows of the cache."""
        return int(self.memory.cache.batch)

    def cached(self, mode: str, kind: Kind) -> int:
        """Tokens of the memory that a kind sees."""
        visible: Tensor = self.memory.cache.visible(self.model.relations.mode(mode).table, kind, [self.memory.block] * self.rows)
        return int(visible[0].sum())

    def step_flops(self) -> int:
        """Of one evaluation, all rows."""
        tokens = {kind: self.model.clock.tokens(kind) for kind in (Kind.V, Kind.A)}
        return self.rows * forward_flops(self.model.config, step_work(tokens, self.cached(MODE, Kind.V)))

    def stage(self, name: str, setting: str, call: Call, flops: int) -> Stage:
        """Measure one stage; what cannot run says why."""
        return _stage(name, f"{self.size}, {setting}", call, flops, self.bench, self.rate)


@torch.no_grad()
def bench_chunk(config: Config, size: str, bench: Bench, rate: float) -> list[Stage]:
    """Every stage of a chunk of one size; the memories without and with guidance's other side are there one after the other."""
    out: list[Stage] = []
    try:
        model = build_model(config, bench.device, bench.dtype)
        inputs = Inputs.of(model)
        for rows in (1, 2):
            chunk = Chunk(model, inputs, remember(inputs, rows, past=config.timeline.history), size, bench, rate)
            out += _prefills(chunk) if rows == 1 else []
            out += [_denoise(chunk, evaluations) for evaluations in EVALUATIONS]
            out += _forms(chunk) if rows == 1 else []
            del chunk
    except torch.OutOfMemoryError as error:
        out.append(Stage("the rest of a chunk", size, None, note=_why(error)))
    return out


def _prefills(chunk: Chunk) -> list[Stage]:
    model, memory, out = chunk.model, chunk.memory, []
    table = model.relations.mode("skip").table
    for kind in (Kind.S, Kind.AC, Kind.VC):
        value = chunk.inputs.segment(kind, chunk.rows)
        scratch = memory.cache.select(list(range(chunk.rows)))

        def call(kind: Kind = kind, value: Tensor = value, scratch: object = scratch) -> object:
            return model.prefill(scratch, table, kind, value, [memory.block] * chunk.rows, memory.conditions, memory.embodiment_B)  # type: ignore[arg-type]

        tokens = model.clock.tokens(kind)
        flops = forward_flops(model.config, step_work({kind: tokens}, chunk.cached("skip", kind)))
        out.append(chunk.stage(f"prefill {kind.label}", f"{tokens} tokens", call, flops))
    return out


def _denoise(chunk: Chunk, evaluations: int) -> Stage:
    guided = chunk.rows == 2
    how = SamplingConfig(solver="unipc", steps=STEPS, reuse="mask", evaluations=evaluations, guidance=GUIDANCE if guided else 1.0)
    call = sampling_call(chunk.model, chunk.inputs, chunk.memory, MODE, how)
    setting = f"{evaluations} of {STEPS} steps evaluated, {'with' if guided else 'without'} guidance"
    return chunk.stage("denoise", setting, call, evaluations * chunk.step_flops())


def _forms(chunk: Chunk) -> list[Stage]:
    """One evaluation: eager, compiled, as a CUDA graph."""
    model, memory, noisy = chunk.model, chunk.memory, chunk.inputs.noisy(chunk.rows)
    view = model.view(memory.cache, model.relations.mode(MODE).table, (Kind.V, Kind.A), [memory.block] * chunk.rows)

    def step() -> object:
        return model.denoise(view, noisy, memory.conditions, memory.embodiment_B)

    setting, flops = f"{sum(model.clock.tokens(k) for k in (Kind.V, Kind.A))} tokens, {chunk.cached(MODE, Kind.V)} cached", chunk.step_flops()
    out = [chunk.stage("step, eager", setting, step, flops)]
    if chunk.bench.device.type == "cuda":
        out.append(_graph_stage(chunk, "step, CUDA graph", setting, step, flops))
        with _compiled(model):
            out.append(chunk.stage("step, compiled", setting, step, flops))
            out.append(_graph_stage(chunk, "step, compiled, CUDA graph", setting, step, flops))
    return out


def _graph_stage(chunk: Chunk, name: str, setting: str, step: Call, flops: int) -> Stage:
    try:
        replay = _captured(step)
    except CANNOT as error:
        return Stage(name, f"{chunk.size}, {setting}", None, note=_why(error))
    return chunk.stage(name, setting, replay, flops)


def _captured(call: Call) -> Call:
    """The call as one CUDA graph, over the same tensors every time."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


@contextlib.contextmanager
def _compiled(model: WorldActionModel) -> Iterator[None]:
    """Blocks compiled, each in one piece where it can be."""
    compile_blocks(model)
    try:
        yield
    finally:
        uncompile_blocks(model)


# ------------------------------------------------------------------------------------------------ training


def bench_training(config: Config, size: str, bench: Bench, rate: float, largest: int = 1024) -> Stage:
    """Forward, backward and AdamW at the largest batch that fits, up to `largest`, doubling from 1."""
    adapters = _needs_adapters(config, bench)
    what = f"adapters of rank {ADAPTERS.rank} and the action parts in full" if adapters else f"all weights, AdamW in {_name(bench.dtype)}"
    name, setting = "training step", f"{size}, attention {config.model.attention}, {'with' if config.model.gradient_checkpointing else 'without'} gradient checkpointing"
    best, reason, batch = None, "", 1
    try:
        model = build_model(config, bench.device, bench.dtype).train()
        if adapters:
            apply_lora(model, ADAPTERS)
        while batch <= largest:
            best = (batch, *_train(model, batch, bench))
            batch *= 2
    except CANNOT as error:
        reason = _why(error)
    if best is None:
        return Stage(name, f"{size}, {what}", None, note=reason)
    batch, times, work = best
    flops = batch * (2 if adapters else 3) * forward_flops(config, work)
    facts = {"batch": batch, "samples_per_second": batch / (times.median * 1e-3), "ended_by": reason or f"the limit of {largest}"}
    return Stage(name, f"{setting}, batch {batch}, {what}", times, flops, rate, note=f"{facts['samples_per_second']:.3g} samples/s", facts=facts)


def _needs_adapters(config: Config, bench: Bench) -> bool:
    """Whether weights, gradients and two moments of the whole model are more than the device holds."""
    if bench.device.type != "cuda":
        return False
    m = config.model
    parameters = m.layers * (8 * m.width**2 + 2 * m.width * m.ffn_dim)
    return 4 * parameters * bench.dtype.itemsize > torch.cuda.get_device_properties(bench.device).total_memory


def _train(model: WorldActionModel, batch: int, bench: Bench) -> tuple[Times, Work]:
    """Time a training step of a batch."""
    _release(model)
    step = TrainingStep.of(model, batch)
    parameters = [p for p in model.parameters() if p.requires_grad]
    mixed = len({p.dtype for p in parameters} | {model.backbone.dtype}) > 1  # adapters in float32 on weights of 16 bits
    optimizer = torch.optim.AdamW(parameters, lr=0.0, fused=bench.device.type == "cuda")
    forward_backward = step.call()

    def call() -> None:
        with torch.autocast(bench.device.type, dtype=model.backbone.dtype, enabled=mixed):
            forward_backward()
        optimizer.step()

    times = measure(call, min(bench.repeats, 5), bench.device, warmups=2)
    reach, weights = Reach.of(model.config.timeline), model.config.training.modes
    pairs = sum(weights[m.name] * seen_pairs(m, step.layout, reach) for m in step.modes) / sum(weights.values())
    return times, window_work(model.config, step.layout, round(pairs))


def _release(model: WorldActionModel) -> None:
    """Give back what the last batch held."""
    model.zero_grad(set_to_none=True)
    gc.collect()
    if model.device.type == "cuda":
        torch.cuda.empty_cache()


# ------------------------------------------------------------------------------------------------ rows


def _stage(name: str, setting: str, call: Call, flops: int, bench: Bench, rate: float) -> Stage:
    try:
        return Stage(name, setting, measure(call, bench.repeats, bench.device, warmups=2), flops, rate)
    except CANNOT as error:
        return Stage(name, setting, None, note=_why(error))


def _why(error: BaseException) -> str:
    """One line: why a stage did not run."""
    if isinstance(error, torch.OutOfMemoryError):
        return "does not fit in the device's memory"
    return f"did not run: {type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:200]
