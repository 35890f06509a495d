"""The training loop.

    dataset -> windows -> objective (noise, network, losses) -> optimiser -> EMA -> logs, validation, checkpoints

A step is a function of the weights, the seed and the step's number: which windows, which modes, which noise.  So a run that is
stopped and started again ends at the same weights, to the bit, as one that never stopped.  The exception is `max_minutes`, which
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
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wam.codec.clip_image import ClipImage
from wam.codec.codec import Codec, make_image
from wam.config import Config, save_config
from wam.data.dataset import WindowDataset, collate
from wam.data.sampler import WindowSampler, make_loader
from wam.model.lora import trainable
from wam.model.wam import WorldActionModel
from wam.pretrained import Policy, save_pretrained
from wam.relations import Relations
from wam.training.build import build_model, computes_in_bf16, datasets, fit_codec, text_for
from wam.training.checkpoints import Checkpoints
from wam.training.engine import Engine
from wam.training.groups import make_optimizer
from wam.training.guards import Guard, Unstable, diagnosis, save_evidence
from wam.training.meters import Meters
from wam.training.objective import Losses, Objective
from wam.training.state import CHECKPOINT, Ema, Position, bytes_of, facts_of, load_state, parts_of, prepare_folder
from wam.training.validation import validate

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
    data, held_out = datasets(config)
    engine = Engine.of(config)
    prepare_folder(output, engine, not resume)
    codec = fit_codec(config, data).to(engine.device)
    image = make_image(config)
    model = build_model(config, str(engine.device), text_for(config, data))
    optimizer = make_optimizer(config, model)
    engine.prepare(model, optimizer, config.training.grad_clip)
    ema = Ema(model, config.training.ema_decay)
    position = load_state(output, config, engine, ema, len(data)) or Position()
    if engine.is_main:
        save_config(config, output / "config.yaml")
    run = _Run(config, output, data, held_out, engine, model, codec, optimizer, ema, position, None if image is None else image.to(engine.device))
    return run.go(position.step, position.elapsed)


class _Run:
    """One call of `train`: what the loop touches, and its steps."""

    def __init__(self, config: Config, output: Path, data: WindowDataset, held_out: WindowDataset | None, engine: Engine, model: WorldActionModel, codec: Codec, optimizer: torch.optim.Optimizer, ema: Ema, position: Position, image: ClipImage | None = None):
        self.config, self.output, self.data, self.held_out, self.engine = config, output, data, held_out, engine
        self.model, self.codec, self.optimizer, self.ema = model, codec, optimizer, ema
        self.image = image
        self.guard = Guard(config.training.guards, position.guards)
        self.checkpoints = Checkpoints(output, config.training.keep, config.training.best, engine, position.best)
        self.objective = Objective(config, model, codec, image)
        self.sampler = WindowSampler(len(data), config.training.batch_size, config.training.seed)
        self.autocast = torch.autocast(model.device.type, torch.bfloat16, enabled=computes_in_bf16(config, model.device))

    def go(self, step: int, elapsed: float) -> Path:
        """Train from `step` to the end; returns the checkpoint's directory."""
        t = self.config.training
        begun, saved = time.monotonic() - elapsed, step or None
        meters = Meters(self.output, t.steps, step)
        loader = iter(make_loader(self.data, self.sampler, self.config.data.workers, step))
        self.model.train()
        warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")  # bf16 queries meet float32 norm weights: meant
        try:
            while (progress := self._progress(step, begun)) < 1:
                losses, shown = self._step(next(loader), step, progress)
                step += 1
                meters.step(shown)
                if step % t.log_every == 0:
                    meters.record(step, self._log(losses, shown, meters.rate(step, t.batch_size), progress))
                if step % t.validate_every == 0:
                    meters.record(step, self._validate(step))
                if step % t.save_every == 0:
                    self._save(step, time.monotonic() - begun, progress)
                    saved = step
            if step % t.validate_every:
                meters.record(step, self._validate(step))
        finally:
            meters.close()
        if saved != step:
            self._save(step, time.monotonic() - begun, progress)
        return self.output / CHECKPOINT

    def _progress(self, step: int, begun: float) -> float:
        t = self.config.training
        by_clock = 0.0 if t.max_minutes is None else (time.monotonic() - begun) / (60 * t.max_minutes)
        return max(step / t.steps, by_clock)

    def _step(self, batch: dict[str, Any], step: int, progress: float) -> tuple[Losses, dict[str, float]]:
        t = self.config.training
        rate = t.learning_rate * min(1.0, (step + 1) / t.warmup_steps) * 0.5 * (1 + math.cos(math.pi * progress))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        generator = torch.Generator().manual_seed(_draw_seed(t.seed, step))
        torch.manual_seed(_draw_seed(t.seed + 1, step))  # what adapters drop
        with self.autocast:
            losses = self.objective(batch, generator)
        video, action = losses.video(), losses.action()
        loss = t.video_weight * video + t.action_weight * action
        self.engine.backward(loss)
        total = float(loss.detach())
        norm = float(self.engine.step(self.guard.largest_norm() if total <= self.guard.largest_loss() else -math.inf))
        if (reason := self.guard.judge(total, norm)) is not None:
            self._skip(step, reason, batch, losses)
            return losses, {}
        self.guard.accept(total, norm)
        self.ema.update(self.model, step + 1)
        return losses, {"video": float(video.detach()), "action": float(action.detach())}

    def _skip(self, step: int, reason: str, batch: dict[str, Any], losses: Losses) -> None:
        """Nothing was updated: put the batch on disk, and stop where that happens too often."""
        log.warning("step %d is left out: %s", step, reason)
        save_evidence(self.output, step, self.engine.rank, reason, batch, losses, {})
        if self.guard.skip(step):
            self.engine.sum(torch.zeros(()))  # every process has written its part
            raise Unstable(diagnosis(self.output, self.guard.skipped, self.guard.config, self.optimizer.param_groups[0]["lr"]))

    def _log(self, losses: Losses, shown: dict[str, float], rate: float, progress: float) -> dict[str, float]:
        lr = self.optimizer.param_groups[0]["lr"]
        return {**{f"train/{k}": v for k, v in shown.items()}, **{f"train/{k}": v for k, v in losses.by_mode().items()}, "samples_per_second": rate, "learning_rate": lr, "progress": progress}

    def _validate(self, step: int) -> dict[str, float]:
        values = self._validation()
        self.checkpoints.validated(step, values, self._write_policy(step))
        return values

    def _validation(self) -> dict[str, float]:
        if self.held_out is None or len(self.held_out) == 0:
            return {}
        count = min(len(self.held_out), self.config.training.validation_batches * self.config.training.batch_size)
        chosen = np.linspace(0, len(self.held_out) - 1, count).round().astype(int)
        samples = [self.held_out[int(i)] for i in chosen]
        size = self.config.training.batch_size
        batches: list[Any] = [collate(samples[i : i + size]) for i in range(0, len(samples), size)]
        own = {n: p.detach().clone() for n, p in trainable(self.model).items()} if self.ema.decay else {}
        _assign(self.model, self.ema.shadow if own else {})
        try:
            with self.autocast:
                return validate(self.objective, batches, self._mean_action(), self.config.training.seed)
        finally:
            _assign(self.model, own)

    def _mean_action(self) -> Tensor:
        return torch.as_tensor(self.data.mean_action())

    def _write_policy(self, step: int) -> Callable[[Path], None]:
        """What writes the policy of this moment into a folder."""
        normalizer = self.data.normalizer
        assert normalizer is not None
        meta = {"step": step, "control_hz": self.data.fps, "tasks": self.data.instructions, "source": self.data.source}
        policy = Policy(self.config, self.model, self.codec, normalizer.to_dict(), meta, self.image)
        return lambda folder: save_pretrained(policy, folder, weights=self.ema.shadow)

    def _save(self, step: int, elapsed: float, progress: float) -> None:
        position = Position(step, elapsed, self.guard.to_dict(), self.checkpoints.best)
        facts = facts_of(self.config, position, self.engine, len(self.data), self.optimizer.param_groups[0]["lr"], progress)
        self.checkpoints.save(step, parts_of(self.engine, self.ema), facts, bytes_of(self.model, self.ema), (CHECKPOINT, self._write_policy(step)))


@torch.no_grad()
def _assign(model: WorldActionModel, values: dict[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        if name in values:
            parameter.copy_(values[name])


def _draw_seed(seed: int, step: int) -> int:
    return int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0] >> 1)
