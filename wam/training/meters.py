"""What a run says while it works: a progress bar for people, JSON lines for tools, TensorBoard (and W&B, when asked) for curves.

    waiting -> [ data ]   step -> [ forward, backward, update ]      aside -> [ validation | saving ]
               `----------- a step's time: rates are per second of it -----------'   apart, so that rates are the training's own

Losses and norms stay on the device between records (`tally`); what is known to the host anyway (samples, tokens, FLOPs, seconds) is added
up here.  At a record everything is summed over the processes at once, and the main one writes.  On a GPU the host runs ahead, so the time
it waits for data is an upper bound on what the GPU waits.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from wam.config import Config, to_dict
from wam.files import write_text_atomic, writing
from wam.model.flops import training_flops
from wam.training.build import computes_in_bf16
from wam.training.engine import Engine
from wam.training.objective import Losses, Objective
from wam.training.rates import Rate, device_rate
from wam.training.tally import Tally

LOG, RATE, WANDB_RUN = "log.jsonl", "device_rate.json", "wandb_run.txt"


@dataclass
class Counts:
    """Sums since the last record, of this process."""

    steps: int = 0
    samples: int = 0
    tokens: int = 0
    flops: int = 0
    seconds: float = 0.0
    waited: float = 0.0


@dataclass
class Meters:
    """See the module's docstring.  Every process has one; the main one shows and writes.

    Attributes:
        windows: in the dataset: an epoch.
        work: of layouts that occurred (`Objective.lay`): tokens of a window in the network, clean and noisy copy together; FLOPs of forward
            and backward of a window, by mode; and of an instruction.
    """

    config: Config
    engine: Engine
    objective: Objective
    rate: Rate | None
    windows: int
    writers: Writers
    tally: Tally
    bar: Any
    work: dict[frozenset[int], tuple[int, dict[str, int], int]] = field(default_factory=dict)
    counts: Counts = field(default_factory=Counts)
    skipped: int = 0
    shown: dict[str, float] = field(default_factory=dict)
    apart: dict[str, float] = field(default_factory=dict)  # seconds of what is not training, since the run's start
    begun: float = field(default_factory=time.perf_counter)
    origin: float | None = None  # progress at the first step of this call
    mark: float | None = None  # when the step that goes on began

    @staticmethod
    def of(config: Config, output: Path, engine: Engine, objective: Objective, windows: int, start: int) -> Meters:
        """Meters of a run that goes on from step `start`.

        Raises:
            ImportError: W&B is asked for and not installed.
        """
        t = config.training
        dtype = torch.bfloat16 if computes_in_bf16(config, engine.device) else torch.float32
        rate = device_rate(engine.device, dtype, output / RATE) if engine.is_main else None
        bar = tqdm(total=t.steps, initial=start, desc="train", disable=not engine.is_main, dynamic_ncols=True, mininterval=1.0 if sys.stderr.isatty() else 15.0, bar_format="{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]")
        tally = Tally(list(t.modes), engine.device, t.reduction, bool(objective.valuations))
        return Meters(config, engine, objective, rate, windows, Writers.of(config, output, start) if engine.is_main else Writers(), tally, bar)

    # ------------------------------------------------------------------------------------------ while a step goes on

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """The step begins; what is inside the block is waiting for data."""
        begun = time.perf_counter()
        if self.mark is None:
            self.mark = begun
        yield
        self.counts.waited += time.perf_counter() - begun

    @contextmanager
    def aside(self, what: str) -> Iterator[None]:
        """What is inside the block is no training, e.g. `validation` or `saving`; its share of the run is told."""
        begun = time.perf_counter()
        yield
        self.apart[what] = self.apart.get(what, 0.0) + time.perf_counter() - begun

    def batch(self, losses: Losses, instructions: list[str], counts: bool = True) -> None:
        """Take in a batch: its work, and where the step counts its errors."""
        self.counts.samples += len(losses.modes)
        for mode, among in zip(losses.modes, losses.among, strict=True):
            tokens, by_mode, instruction = self._work(among)
            self.counts.tokens += tokens
            self.counts.flops += by_mode[mode]
        self.counts.flops += instruction * len(set(instructions))
        if counts:
            self.tally.add(losses)

    def _work(self, among: frozenset[int]) -> tuple[int, dict[str, int], int]:
        if among not in self.work:
            laid = self.objective.lay(among)
            self.work[among] = (len(laid.layout), *training_flops(self.config, laid.layout, [self.objective.modes[i] for i in laid.modes], self.objective.reach))
        return self.work[among]

    def advance(self, progress: float, norm: torch.Tensor | float | None) -> None:
        """The step is over: the bar moves on.

        Args:
            progress: of the whole run, 0..1, by steps or by the clock.
            norm: of the gradient; None where the step was left out.
        """
        now = time.perf_counter()
        assert self.mark is not None, "a step begins with waiting()"
        self.counts.seconds, self.mark = self.counts.seconds + now - self.mark, None
        self.counts.steps += 1
        if norm is None:
            self.skipped += 1
        else:
            self.tally.add_norm(norm)
        self.origin = progress if self.origin is None else self.origin
        self.bar.set_postfix_str(self._postfix(now, progress), refresh=False)
        self.bar.update(1)

    def _postfix(self, now: float, progress: float) -> str:
        done = progress - (self.origin or 0.0)
        left = [f"{tqdm.format_interval((1 - progress) * (now - self.begun) / done)} left"] if done > 0 else []
        names = (("train/video", "video {:.4f}"), ("train/action", "action {:.4f}"), ("samples_per_second", "{:.3g} samples/s"), ("share/data", "data {:.0%}"))
        return " ".join([*left, *(form.format(self.shown[name]) for name, form in names if name in self.shown)])

    # ------------------------------------------------------------------------------------------ records

    def summary(self, step: int, progress: float, rates: dict[str, float], norms: dict[str, torch.Tensor]) -> dict[str, float]:
        """Everything since the last record, and a new beginning; all processes call it together.

        Args:
            step: steps done.
            rates: learning rate by parameter group.
            norms: gradient norm by part of the model, of this step; empty where it was left out.
        """
        begun = time.perf_counter()
        losses = self.tally.take(self.engine)  # waits for the device: its time belongs to the steps
        c, world = self.counts, self.engine.world
        memory = torch.zeros(world, dtype=torch.float64)
        memory[self.engine.rank] = peak_memory(self.engine.device)
        mine = torch.tensor([c.samples, c.tokens, c.flops, c.seconds + time.perf_counter() - begun, c.waited, *memory.tolist()], dtype=torch.float64)
        samples, tokens, flops, seconds, waited, *peaks = self.engine.sum(mine.to(self.tally.device)).tolist()
        seconds, waited = max(seconds / world, 1e-9), waited / world
        self.counts = Counts()
        out = {**losses, "samples_per_second": samples / seconds, "tokens_per_second": tokens / seconds, "steps_per_second": c.steps / seconds, "share/data": waited / seconds}
        out |= {"peak_memory_gb": max(peaks) / 1e9, "flops_per_second": flops / seconds} | self._utilisation(flops / seconds)
        out |= {f"share/{name}": spent / (time.perf_counter() - self.begun) for name, spent in self.apart.items()}
        out |= {f"learning_rate/{name}": value for name, value in rates.items()} | {f"grad_norm/{name}": value for name, value in zip(norms, torch.stack(list(norms.values())).tolist() if norms else [], strict=True)}
        out |= {"learning_rate": next(iter(rates.values())), "skipped_steps": float(self.skipped), "epoch": step * self.config.training.batch_size / self.windows, "progress": progress}
        self.shown = out
        return out

    def _utilisation(self, flops_per_second: float) -> dict[str, float]:
        """MFU against the measured rate, and against the published one where there is one."""
        if self.rate is None:
            return {}
        out = {"mfu": flops_per_second / (self.rate.measured * self.engine.world)}
        return out if self.rate.published is None else {**out, "mfu_published": flops_per_second / (self.rate.published * self.engine.world)}

    def record(self, step: int, values: dict[str, float]) -> None:
        """Write one record at `step`, on the main process."""
        self.writers.write(step, values)

    def close(self) -> None:
        """Close the bar and the files."""
        self.bar.close()
        self.writers.close()


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that tensors held on a GPU since the run's start, or that this process held of a CPU's memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


# ------------------------------------------------------------------------------------------------ where records go


@dataclass
class Writers:
    """Where records are written; without a path nowhere, as on processes other than the main one."""

    path: Path | None = None
    board: Any = None
    wandb: Any = None

    @staticmethod
    def of(config: Config, output: Path, start: int) -> Writers:
        """JSON lines and TensorBoard, and W&B where `training.wandb` names a project; records after `start` are dropped."""
        output.mkdir(parents=True, exist_ok=True)
        wandb = _wandb(config, output, start)  # first: where it is missing, nothing has happened yet
        _keep_until(output / LOG, start)
        return Writers(output / LOG, _tensorboard(output / "tensorboard", start), wandb)

    def write(self, step: int, values: dict[str, float]) -> None:
        """One record everywhere; one without values is none."""
        if self.path is None or not values:
            return
        with writing(self.path), self.path.open("a") as log:
            log.write(json.dumps({"step": step, **values}) + "\n")
        if self.board is not None:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)
        if self.wandb is not None:
            self.wandb.log(values, step=step)

    def close(self) -> None:
        """Close what is open."""
        if self.board is not None:
            self.board.close()
        if self.wandb is not None:
            self.wandb.finish()


def _keep_until(path: Path, step: int) -> None:
    """Drop records after `step`: a resumed run writes them again."""
    if path.exists():
        kept = [line for line in path.read_text().splitlines() if line.endswith("}") and json.loads(line)["step"] <= step]
        write_text_atomic(path, "".join(f"{line}\n" for line in kept))


def _tensorboard(directory: Path, start: int) -> Any:
    """A TensorBoard writer, or None where the `train` extra is not installed (the JSON lines hold the same)."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(directory), purge_step=start if start else None)


def _wandb(config: Config, output: Path, start: int) -> Any:
    """A W&B run in the project `training.wandb`: the one that this run folder began, or a new one; None where none is asked for."""
    project = config.training.wandb
    if project is None:
        return None
    try:
        import wandb
    except ImportError as error:
        raise ImportError(f"training.wandb is {project!r}, but W&B is not installed; run: pip install wandb, or set training.wandb=null") from error
    known = output / WANDB_RUN
    name = known.read_text().strip() if start and known.is_file() else None
    run = wandb.init(project=project, dir=str(output), id=name, resume="allow", config=to_dict(config))
    write_text_atomic(known, f"{run.id}\n")
    return run
