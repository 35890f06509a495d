"""The training loop.

    dataset -> windows -> objective (noise, network, losses) -> optimiser -> EMA -> logs, validation, checkpoints

A step is a function of the weights, the seed and the step's number: which windows, which modes, which noise.  So a run that is
stopped and started again ends at the same weights, to the bit, as one that never stopped.  The exception is `max_minutes`, which
ends a run by the clock; what it measures is kept in the state as well.

    output/training_state.safetensors   to go on from            output/checkpoint/   the policy (EMA), for everything else
    output/log.jsonl, tensorboard/      curves                   output/config.yaml   the resolved config
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wam.codec.clip_image import ClipImage
from wam.codec.codec import Codec, make_image
from wam.config import Config, save_config, to_dict
from wam.data.dataset import WindowDataset, collate
from wam.data.sampler import WindowSampler, make_loader
from wam.files import write_json_atomic
from wam.model.lora import trainable
from wam.model.wam import WorldActionModel
from wam.pretrained import Policy, save_pretrained
from wam.relations import Relations
from wam.training.build import build_model, computes_in_bf16, datasets, fit_codec, text_for
from wam.training.engine import Engine
from wam.training.groups import make_optimizer
from wam.training.meters import Meters
from wam.training.objective import Losses, Objective
from wam.training.state import STATE, Ema, load_state, save_state
from wam.training.validation import validate

log = logging.getLogger(__name__)
CHECKPOINT = "checkpoint"


class NonFiniteLoss(RuntimeError):
    """Training met a loss that is not a number; the batch's identity is on disk."""


def train(config: Config, output: Path, resume: bool = True) -> Path:
    """Train a policy into `output`; goes on from what is there unless `resume` is false.  Returns the checkpoint's directory.

    Raises:
        NonFiniteLoss: with the path of the file that names the batch.
        ValueError: a mode that is unknown or leaks, a dataset that does not fit the config, or a run with another config in `output`.
    """
    relations = Relations.of(config)
    for mode in config.training.modes:
        relations.mode(mode)  # an unknown one, and one that leaks in this table, shows before anything is read
    torch.manual_seed(config.training.seed)
    data, held_out = datasets(config)
    engine = Engine.of(config)
    codec = fit_codec(config, data).to(engine.device)
    image = make_image(config)
    model = build_model(config, str(engine.device), text_for(config, data))
    optimizer = make_optimizer(config, model)
    engine.prepare(model, optimizer, config.training.grad_clip)
    ema = Ema(model, config.training.ema_decay)
    fingerprint = _fingerprint(config)
    step, elapsed = 0, 0.0
    if resume and (output / STATE).is_file():
        step, elapsed = load_state(output / STATE, model, ema, optimizer, fingerprint)
    save_config(config, output / "config.yaml")
    run = _Run(config, output, data, held_out, engine, model, codec, optimizer, ema, fingerprint, None if image is None else image.to(engine.device))
    return run.go(step, elapsed)


class _Run:
    """One call of `train`: what the loop touches, and its steps."""

    def __init__(self, config: Config, output: Path, data: WindowDataset, held_out: WindowDataset | None, engine: Engine, model: WorldActionModel, codec: Codec, optimizer: torch.optim.Optimizer, ema: Ema, fingerprint: str, image: ClipImage | None = None):
        self.config, self.output, self.data, self.held_out, self.engine = config, output, data, held_out, engine
        self.model, self.codec, self.optimizer, self.ema, self.fingerprint = model, codec, optimizer, ema, fingerprint
        self.image = image
        self.objective = Objective(config, model, codec, image)
        self.sampler = WindowSampler(len(data), config.training.batch_size, config.training.seed)
        self.autocast = torch.autocast(model.device.type, torch.bfloat16, enabled=computes_in_bf16(config, model.device))

    def go(self, step: int, elapsed: float) -> Path:
        """Train from `step` to the end; returns the checkpoint's directory."""
        t = self.config.training
        begun = time.monotonic() - elapsed
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
                    meters.record(step, self._validate())
                if step % t.save_every == 0:
                    self._save(step, time.monotonic() - begun)
            meters.record(step, self._validate())
        except KeyboardInterrupt:
            self._save(step, time.monotonic() - begun)
            raise
        finally:
            meters.close()
        self._save(step, time.monotonic() - begun)
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
        self._refuse_non_finite("loss", loss, losses, batch, step)
        self.engine.backward(loss)
        self._refuse_non_finite("gradient's norm", self.engine.step(), losses, batch, step)  # nothing is updated then
        self.ema.update(self.model, step + 1)
        return losses, {"video": float(video.detach()), "action": float(action.detach())}

    def _refuse_non_finite(self, what: str, value: Tensor, losses: Losses, batch: dict[str, Any], step: int) -> None:
        if bool(torch.isfinite(value)):
            return
        path = self.output / "non_finite_batch.json"
        rows = zip(batch["episode"].tolist(), batch["start"].tolist(), losses.modes, strict=True)
        write_json_atomic(path, {"step": step, "seed": self.config.training.seed, "samples": [{"episode": e, "start": s, "mode": m} for e, s, m in rows]})
        raise NonFiniteLoss(f"the {what} is {float(value.detach())} at step {step}; the batch's episodes, starts and modes are in {path}: check those samples with their statistics, or lower training.learning_rate")

    def _log(self, losses: Losses, shown: dict[str, float], rate: float, progress: float) -> dict[str, float]:
        lr = self.optimizer.param_groups[0]["lr"]
        return {**{f"train/{k}": v for k, v in shown.items()}, **{f"train/{k}": v for k, v in losses.by_mode().items()}, "samples_per_second": rate, "learning_rate": lr, "progress": progress}

    def _validate(self) -> dict[str, float]:
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

    def _save(self, step: int, elapsed: float) -> None:
        normalizer = self.data.normalizer
        assert normalizer is not None
        meta = {"step": step, "control_hz": self.data.fps, "tasks": self.data.instructions, "source": self.data.source}
        policy = Policy(self.config, self.model, self.codec, normalizer.to_dict(), meta, self.image)
        save_pretrained(policy, self.output / CHECKPOINT, weights=self.ema.shadow)
        save_state(self.output / STATE, step, self.model, self.ema, self.optimizer, self.fingerprint, elapsed)


@torch.no_grad()
def _assign(model: WorldActionModel, values: dict[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        if name in values:
            parameter.copy_(values[name])


def _draw_seed(seed: int, step: int) -> int:
    return int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0] >> 1)


def _fingerprint(config: Config) -> str:
    """What must not change between the parts of a run; how long it runs and what it logs may."""
    tree = to_dict(config)
    relevant = {k: tree[k] for k in ("data", "timeline", "codec", "text", "image", "model", "relations", "noise", "training")}
    relevant["training"] = {k: v for k, v in relevant["training"].items() if k not in ("steps", "max_minutes", "log_every", "validate_every", "validation_batches", "save_every")}
    return hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()

