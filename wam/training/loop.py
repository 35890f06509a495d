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
from wam.codec.codec import Codec, make_codec, make_image
from wam.codec.linear import LinearCodec
from wam.config import Config, save_config, to_dict
from wam.data.dataset import WindowDataset, collate
from wam.data.lerobot import LeRobotDataset
from wam.data.sampler import WindowSampler, make_loader
from wam.files import write_json_atomic
from wam.model.loading import model_from_backbone, new_names
from wam.model.lora import apply_lora, trainable
from wam.model.wam import WorldActionModel
from wam.pretrained import Policy, save_pretrained
from wam.relations import Relations
from wam.text.cache import CachedText
from wam.text.text import Text, make_text, prompts
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
    device = "cuda" if torch.cuda.is_available() else "cpu"
    codec = fit_codec(config, data).to(device)
    image = make_image(config)
    model = build_model(config, device, text_for(config, data))
    optimizer = _optimizer(config, model)
    ema = Ema(model, config.training.ema_decay)
    fingerprint = _fingerprint(config)
    step, elapsed = 0, 0.0
    if resume and (output / STATE).is_file():
        step, elapsed = load_state(output / STATE, model, ema, optimizer, fingerprint)
    save_config(config, output / "config.yaml")
    run = _Run(config, output, data, held_out, model, codec, optimizer, ema, fingerprint, None if image is None else image.to(device))
    return run.go(step, elapsed)


def datasets(config: Config) -> tuple[WindowDataset, WindowDataset | None]:
    """Training windows and held-out windows (None where nothing is held out), normalised by the training rows' statistics."""
    _check_sizes(config)
    data = WindowDataset(config.data, config.timeline, "train", image_size=config.codec.image_size)
    _report_left_out(data, "training")
    normalizer = data.fit_normalizer()
    data.normalizer = normalizer
    if config.data.validation_fraction == 0:
        return data, None
    held_out = WindowDataset(config.data, config.timeline, "validation", normalizer, image_size=config.codec.image_size)
    _report_left_out(held_out, "validation")
    return data, held_out


def _check_sizes(config: Config) -> None:
    """Compare the robot's sizes with the dataset's columns, before frames are decoded."""
    robots, data = config.model.embodiments, LeRobotDataset(config.data.root)
    robot = next(e for e in robots if e.name == config.data.embodiment)
    if robot.relative_to:
        raise ValueError(f"model.embodiments: actions of {robot.name!r} are relative to the state (relative_to), which the dataset reader does not compute; write them relative into the dataset, or train on absolute ones with relative_to=[]")
    for what, column, size in (("state_dim", config.data.state, robot.state_dim), ("action_dim", config.data.action, robot.action_dim)):
        found = math.prod(data.feature(column).shape)
        if found != size:
            raise ValueError(
                f"{config.data.root}: {column!r} has {found} dimensions, but model.embodiments gives {robot.name!r} {what} {size}; set {what} to {found}, or name another column in data"
            )
        widest = max(getattr(e, what) for e in robots)
        if widest != size:
            raise ValueError(f"model.embodiments has {what} {size} for {robot.name!r} and {widest} for another; this version trains robots of one size: list only those")


def _report_left_out(data: WindowDataset, split: str) -> None:
    if data.too_short:
        some = ", ".join(map(str, data.too_short[:8])) + (", ..." if len(data.too_short) > 8 else "")
        a, count = data.timeline.actions_per_block, len(data.too_short)
        log.warning("%d of %d %s episodes are left out (%s): shorter than one block, %d + 1 rows", count, count + len(data.episodes), split, some, a)


def build_model(config: Config, device: str, text: Text | None = None) -> WorldActionModel:
    """The model that training starts from: new, or on a pretrained backbone; with adapters, that is frozen.

    A frozen backbone is kept in the type it computes in; whatever trains is float32.
    """
    pretrained, lora = config.model.pretrained, config.model.lora
    if pretrained is None:
        return WorldActionModel(config, text=text).to(device)
    frozen = torch.bfloat16 if lora is not None and _bf16(config, torch.device(device)) else torch.float32
    model = model_from_backbone(lambda c, backbone: WorldActionModel(c, backbone, text), pretrained, config, frozen, device, torch.float32)
    if lora is not None:
        apply_lora(model, lora, config.training.seed, also=new_names(model.backbone, pretrained))
    return model


def text_for(config: Config, data: WindowDataset) -> Text | None:
    """A pretrained text encoder, with a dataset's instructions embedded beforehand where they are kept on disk; None for the embedded one."""
    if config.text.kind == "bytes":
        return None
    text = make_text(config.text)
    if isinstance(text, CachedText):
        text.precompute([*prompts(data.instructions, config.text.template), *([""] if config.training.text_dropout else [])])
        text.release()
    return text


def fit_codec(config: Config, data: WindowDataset) -> Codec:
    """The pretrained codec, or the linear one of a dataset, fitted on groups of frames as they occur in windows."""
    codec = make_codec(config.codec)
    if not isinstance(codec, LinearCodec):
        return codec
    rng = np.random.default_rng(config.training.seed)
    stride = config.timeline.temporal_stride
    wanted = max(1, config.codec.fit_frames // stride // config.timeline.blocks)
    chosen = rng.choice(len(data), size=min(wanted, len(data)), replace=False)
    clips = [torch.as_tensor(data[int(i)]["frames"])[1:].unflatten(0, (-1, stride)) for i in chosen]
    codec.fit(torch.cat(clips))
    return codec


class _Run:
    """One call of `train`: what the loop touches, and its steps."""

    def __init__(self, config: Config, output: Path, data: WindowDataset, held_out: WindowDataset | None, model: WorldActionModel, codec: Codec, optimizer: torch.optim.Optimizer, ema: Ema, fingerprint: str, image: ClipImage | None = None):
        self.config, self.output, self.data, self.held_out = config, output, data, held_out
        self.model, self.codec, self.optimizer, self.ema, self.fingerprint = model, codec, optimizer, ema, fingerprint
        self.image = image
        self.objective = Objective(config, model, codec, image)
        self.sampler = WindowSampler(len(data), config.training.batch_size, config.training.seed)
        self.autocast = torch.autocast(model.device.type, torch.bfloat16, enabled=_bf16(config, model.device))

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
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), t.grad_clip, foreach=True)
        self._refuse_non_finite("gradient's norm", norm, losses, batch, step)  # before it spoils the weights, and a checkpoint with them
        self.optimizer.step()
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


def _optimizer(config: Config, model: WorldActionModel) -> torch.optim.Optimizer:
    """AdamW; no decay on biases, norms, and tables."""
    t = config.training
    trained = trainable(model).items()
    decayed = [p for n, p in trained if p.ndim >= 2 and "table" not in n and "bias" not in n]
    plain = [p for n, p in trained if not (p.ndim >= 2 and "table" not in n and "bias" not in n)]
    groups = [{"params": decayed, "weight_decay": t.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=t.learning_rate, betas=t.betas, fused=True)


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


def _bf16(config: Config, device: torch.device) -> bool:
    """bf16 matrix products where the machine has them (`auto`), or as asked."""
    if config.training.precision != "auto":
        return config.training.precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags
