"""The training loop.

    dataset -> windows -> objective (noise, network, losses) -> optimiser -> EMA -> logs, validation, checkpoints

A step is a function of the weights, the seed and the step's number: which windows, which modes, which noise.  How many processes share
it, and in how many micro-batches, does not matter: `training.batch_size` counts the samples of all of them, a sample draws by its row in
that whole batch, and losses are divided by what is supervised in the whole of it.  So a run that is stopped and started again ends at
the same weights, to the bit, as one that never stopped.  The exception is `max_minutes`, which
ends a run by the clock; what it measures is kept in the state as well.

    output/state/step-.../              to go on from            output/checkpoint/   the policy (EMA); best/: of the best validation
    output/log.jsonl, tensorboard/      curves                   output/config.yaml   the resolved config
    output/skipped/step-.../            batches that were left out
"""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wam.codec.codec import make_image
from wam.config import Config, save_config
from wam.data.mixture import TrainingData, training_data
from wam.data.sampler import make_loader
from wam.model.compiled import compile_blocks
from wam.pretrained import Policy, save_pretrained
from wam.relations import Relations, best_figure
from wam.training.build import adapted_identity, build_model, codec_for, computes_in_bf16, text_for
from wam.training.checkpoints import Checkpoints
from wam.training.curves import draw_at_end
from wam.training.draws import Draws
from wam.training.ema import Ema
from wam.training.engine import Engine
from wam.training.finetune import begin_from
from wam.training.groups import freeze, set_rates
from wam.training.guards import Guard, Unstable, diagnosis, save_evidence
from wam.training.meters import Meters
from wam.training.objective import Drawn, Losses, Objective, Supervised, take_rows
from wam.training.state import CHECKPOINT, Position, bytes_of, facts_of, load_state, newest_step, parts_of, prepare_folder
from wam.training.validation import HeldOut, still_of, validate
from wam.training.watch import Watch, stop_requests, watching

log = logging.getLogger(__name__)


def train(config: Config, output: Path, resume: bool = True) -> Path:
    """Train a policy into `output`; goes on from the state that is there, or, where `resume` is false, puts that run aside.  Returns the checkpoint's directory.

    Raises:
        Unstable: too many steps had to be left out; the message says what their batches have in common.
        ValueError: a mode that is unknown or leaks, a dataset that does not fit the config, or a run with another config in `output`.
    """
    relations = Relations.of(config)
    for mode in config.training.modes:
        relations.mode(mode)  # an unknown one, and one that leaks in this table, shows before anything is read
    torch.manual_seed(config.training.seed)
    data = training_data(config)
    engine = Engine.of(config)
    if engine.is_main:
        log.info("trained on:\n%s", data.table(config.training.steps, config.training.batch_size))
    with watching(engine, config.training.engine.timeout_minutes * 60) as watch:
        checkpoint = _train(config, output, resume, data, engine, watch)
    engine.close()
    return checkpoint


def _train(config: Config, output: Path, resume: bool, data: TrainingData, engine: Engine, watch: Watch) -> Path:
    prepare_folder(output, engine, not resume)
    going_on = newest_step(output, engine)
    if engine.is_main and going_on is not None:
        log.info("going on from step %d of %s", going_on, output)
    codec, image = codec_for(config, data).to(engine.device), make_image(config)
    model = build_model(config, str(engine.build_device), text_for(config, data))
    freeze(config, model)
    begin_from(config, output, engine.is_main, going_on is not None, model, codec, data.normalizers.get(config.data.embodiment))
    base = adapted_identity(model)
    if config.training.compile:
        compile_blocks(model)
    objective = Objective(config, model, codec, None if image is None else image.to(engine.device), engine.device)
    autocast = torch.autocast(engine.device.type, torch.bfloat16, enabled=computes_in_bf16(config, engine.device))
    engine.prepare(model, Supervised(objective, autocast), config)
    ema = Ema(engine, config.training.ema_decay)
    position = Position() if going_on is None else load_state(output, going_on, config, engine, ema, codec, len(data))
    if engine.is_main:
        save_config(config, output / "config.yaml")
    return _Run(config, output, data, engine, objective, autocast, ema, base, position, watch).go(position.step, position.elapsed)


class _Run:
    """One call of `train`: what the loop touches, and its steps."""

    def __init__(self, config: Config, output: Path, data: TrainingData, engine: Engine, objective: Objective, autocast: torch.autocast, ema: Ema, base: str | None, position: Position, watch: Watch):
        self.config, self.output, self.data, self.engine = config, output, data, engine
        self.objective, self.autocast, self.ema, self.watch = objective, autocast, ema, watch
        self.model, self.codec, self.image = objective.model, objective.codec, objective.image
        self.rates, self.base = dict[str, float](), base
        self.guard = Guard(config.training.guards, position.guards)
        self.checkpoints = Checkpoints(output, config.training.keep, best_figure(config), engine, position.best, highest=config.training.best_is == "highest")
        self.sampler = data.sampler(config.training.batch_size, config.training.seed)

    def go(self, step: int, elapsed: float) -> Path:
        """Train from `step` to the end; returns the checkpoint's directory.

        Raises:
            KeyboardInterrupt: Ctrl-C or SIGTERM; what was done is saved.
        """
        with stop_requests() as asked:
            return self._go(step, elapsed, asked)

    def _go(self, step: int, elapsed: float, asked: Callable[[], bool]) -> Path:
        t = self.config.training
        begun, saved = time.monotonic() - elapsed, step or None
        self.watch.at("start", step)
        meters = Meters.of(self.config, self.output, self.engine, self.objective, len(self.data), step)
        loader = iter(make_loader(self.data.windows, self.sampler, self.config.data.workers, step, self.engine.rank, self.engine.world))
        self.model.train()
        warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")  # bf16 queries meet float32 norm weights: meant
        try:
            while (progress := self._progress(step, begun)) < 1 and not self._anyone(asked()):
                self.watch.at("data", step)
                with meters.waiting():
                    batch = next(loader)
                losses, norm = self._step(batch, step, progress)
                step += 1
                meters.batch(losses, batch["instruction"], counts=norm is not None)
                meters.advance(progress, norm)
                if step % t.log_every == 0:
                    meters.record(step, meters.summary(step, progress, self.rates, self.engine.norms if norm is not None else {}))
                if step % t.validate_every == 0:
                    with meters.aside("validation"):
                        meters.record(step, self._validate(step))
                if step % t.save_every == 0:
                    with meters.aside("saving"):
                        self._save(step, time.monotonic() - begun, progress)
                    saved = step
            if step % t.validate_every and progress >= 1:
                meters.record(step, self._validate(step))
        finally:
            meters.close()
        if self.engine.is_main and progress >= 1:
            draw_at_end(self.output)
        if saved != step:
            self._save(step, time.monotonic() - begun, progress)
        if progress < 1:
            raise KeyboardInterrupt(f"stopped after step {step}, which is saved; run the same command again to go on")
        return self.output / CHECKPOINT

    def _anyone(self, asked: bool) -> bool:
        """Whether any process was asked to stop: all then stop after the same step."""
        return bool(self.engine.sum(torch.tensor(float(asked))) > 0)

    def _progress(self, step: int, begun: float) -> float:
        """How much of the run is done, by steps or by the main process's clock: rates and the end are the same on every process."""
        t = self.config.training
        if t.max_minutes is None:
            return step / t.steps
        by_clock = (time.monotonic() - begun) / (60 * t.max_minutes) if self.engine.is_main else 0.0
        return max(step / t.steps, float(self.engine.sum(torch.tensor(by_clock, dtype=torch.float64))))

    def _step(self, batch: dict[str, Any], step: int, progress: float) -> tuple[Losses, float | None]:
        """One step; returns its errors and its gradient's norm, None where it was left out."""
        t = self.config.training
        self.rates = set_rates(t, self.engine.optimizer, step, progress)
        self.watch.at("forward and backward", step)
        parts, denominator = self._parts(batch, step)
        weights, losses = torch.tensor([t.video_weight, t.action_weight, t.value_weight][: len(denominator)], device=self.engine.device), []
        mean = torch.zeros_like(weights)
        for number, (rows, drawn) in enumerate(parts):
            torch.manual_seed(_dropout_seed(t.seed, step, self.engine.rank * len(parts) + number))
            errors = self.engine.forward(rows, drawn, last=number == len(parts) - 1)
            losses.append(self.objective.assemble(drawn, errors))
            share = torch.stack([part.total(t.reduction) for part in losses[-1].parts]) / denominator
            self.engine.backward((weights * share).sum())
            mean += share.detach()
        return self._update(batch, step, float((weights * self.engine.sum(mean)).sum()), Losses.cat(losses))

    def _update(self, batch: dict[str, Any], step: int, loss: float, losses: Losses) -> tuple[Losses, float | None]:
        """Apply the step's gradients, unless the guard is against it."""
        self.watch.at("update", step)
        norm = float(self.engine.step(self.guard.largest_norm() if loss <= self.guard.largest_loss() else -math.inf))
        if (reason := self.guard.judge(loss, norm)) is not None:
            self._skip(step, reason, batch, losses)
            return losses, None
        self.guard.accept(loss, norm)
        self.ema.update(step + 1)
        return losses, norm

    def _parts(self, batch: dict[str, Any], step: int) -> tuple[list[tuple[dict[str, Any], Drawn]], Tensor]:
        """This process's micro-batches with what is drawn for them; and what the whole batch's losses are divided by, (2,); (3,) with a value head."""
        t, engine = self.config.training, self.engine
        each = t.batch_size // engine.world
        size, parts = each // t.accumulate, []
        for first in range(0, each, size):
            rows = take_rows(batch, slice(first, first + size))
            places = range(engine.rank * each + first, engine.rank * each + first + size)
            parts.append((rows, self.objective.draw(rows, Draws.at(t.seed, step, places))))
        counts = torch.stack([torch.stack([part.denominator(t.reduction).double() for part in drawn.counts()]) for _, drawn in parts]).sum(0)
        modes = torch.stack([torch.bincount(torch.tensor(drawn.modes), minlength=len(self.objective.modes)).double() for _, drawn in parts])
        summed = engine.sum(torch.cat([counts, modes.flatten()]))  # one exchange for both
        if t.bucket:
            present = summed[len(counts) :].view(len(parts), -1) > 0
            parts = [(rows, replace(drawn, among=frozenset(row.nonzero().flatten().tolist()))) for (rows, drawn), row in zip(parts, present, strict=True)]
        return parts, summed[: len(counts)].clamp_min(1).float().to(engine.device)

    def _skip(self, step: int, reason: str, batch: dict[str, Any], losses: Losses) -> None:
        """Nothing was updated: put the batch on disk, and stop where that happens too often."""
        log.warning("step %d is left out: %s", step, reason)
        save_evidence(self.output, step, self.engine.rank, reason, batch, losses, {part: float(norm) for part, norm in self.engine.norms.items()})
        if self.guard.skip(step):
            self.engine.sum(torch.zeros(()))  # every process has written its part
            raise Unstable(diagnosis(self.output, self.guard.skipped, self.guard.config, max(self.rates.values())))

    def _validate(self, step: int) -> dict[str, float]:
        self.watch.at("validation", step)
        values = self._validation(step)
        self.checkpoints.validated(step, values, lambda: self._write_policy(step))
        return values

    def _validation(self, step: int) -> dict[str, float]:
        """Figures of the averaged weights on held-out windows."""
        parts = [HeldOut(name, windows, torch.as_tensor(self.data.mean_action(windows)), still_of(windows)) for name, windows in self.data.held_out.items()]
        if not parts:
            return {}
        with self.engine.showing(self.ema), self.autocast:
            return validate(self.objective, parts, self.engine, self.output / "validation" / f"step-{step:08d}.png")

    def _write_policy(self, step: int) -> Callable[[Path], None]:
        """What writes the policy of this moment into a folder, on the main process; all gather its weights."""
        meta = {"step": step, "control_hz": self.data.control_hz, "tasks": self.data.windows.instructions, "source": self.data.windows.source}
        policy = Policy(self.config, self.model, self.codec, self.data.normalizer, meta, self.image)
        weights = self.engine.weights(self.ema)
        return lambda folder: save_pretrained(policy, folder, weights, base=self.base)

    def _save(self, step: int, elapsed: float, progress: float) -> None:
        self.watch.at("saving", step)
        position = Position(step, elapsed, self.guard.to_dict(), self.checkpoints.best)
        facts = facts_of(self.config, position, self.engine, len(self.data), self.engine.optimizer.param_groups[0]["lr"], progress)
        self.checkpoints.save(step, parts_of(self.engine, self.ema, self.codec), facts, bytes_of(self.model, self.ema), (CHECKPOINT, self._write_policy(step)))


def _dropout_seed(seed: int, step: int, part: int) -> int:
    """Of what adapters drop: the one thing that depends on how a batch is cut into parts."""
    return int(np.random.SeedSequence([seed + 1, step, part]).generate_state(1, np.uint64)[0] >> 1)
