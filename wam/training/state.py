"""What a run is made of at one moment: enough to go on as if nothing had happened, and nothing that is unpickled.

    weights that train + their EMA + the optimiser's moments      tensors by name (`wam.training.checkpoints` says how they lie on disk)
    step, seconds, config, data position, skipped steps, best     the manifest

Windows, modes and noise are functions of the seed and the step, so a position in the data is a number; generators are kept all the same,
for what may draw from them.  A run goes on from its own state unless it is told to start over, which puts the old one aside.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from wam.codec.codec import Codec
from wam.codec.linear import LinearCodec
from wam.config import Config, to_dict
from wam.model.lora import trainable
from wam.relations import best_figure
from wam.shards import ShardReader
from wam.training.checkpoints import BEST, STATES, Parts, Together, read_manifest, read_part, recover, state_folder, states, verify
from wam.training.ema import Ema

log = logging.getLogger(__name__)
OLD_STATE = "training_state.safetensors"  # of earlier versions: one file, with a hash in place of a config that could be compared
PREVIOUS = "previous"
CHECKPOINT = "checkpoint"
WRITTEN = (STATES, OLD_STATE, CHECKPOINT, BEST, "skipped", "validation", "log.jsonl", "tensorboard", "wandb_run.txt", "curves.png", "config.yaml", "finetuned_from.json")  # what a run leaves in its folder
SECTIONS = ("data", "timeline", "codec", "text", "image", "model", "relations", "noise", "training")
MAY_CHANGE = (  # what does not change which run it is: how long it runs, how it is spread over machines, what it says and keeps
    *(f"training.{name}" for name in ("steps", "max_minutes", "log_every", "validate_every", "validation_batches", "validation_samples", "save_every")),
    *(f"training.{name}" for name in ("keep", "best", "best_is", "wandb", "guards", "finetune_from", "engine", "accumulate", "compile", "bucket")),
    *("data.workers", "data.cache", "data.latents", "text.cache"),
)


class Trained(Together, Protocol):
    """What a state asks of an engine (`wam.training.engine`)."""

    @property
    def rank(self) -> int: ...
    @property
    def world(self) -> int: ...
    def trained_tensors(self) -> Mapping[str, Tensor]: ...
    def optimizer_state(self) -> Mapping[str, Tensor]: ...
    def load(self, tensors: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]) -> None: ...


# ------------------------------------------------------------------------------------------------ saving


def parts_of(engine: Trained, ema: Ema, codec: Codec) -> Parts:
    """The files of a state and what is in them, gathered tensor by tensor as they are asked for."""
    yield "model", engine.trained_tensors().items()
    yield "ema", ema.state().items()
    yield "optimizer", engine.optimizer_state().items()
    yield "codec", _fitted(codec).items()
    yield "random", _generators(engine).items()


def bytes_of(model: nn.Module, ema: Ema) -> int:
    """How much a state takes on disk: float32 weights, two moments, and the EMA."""
    sizes = [getattr(p, "ds_numel", p.numel()) for p in trainable(model).values()]  # whole, also where ZeRO-3 has cut it up
    return 4 * sum(sizes) * (4 if ema.decay else 3)


def _fitted(codec: Codec) -> Mapping[str, Tensor]:
    """What a codec was fitted to; nothing of a pretrained one, which is where the config says."""
    return codec.state_dict() if isinstance(codec, LinearCodec) else {}


def _generators(engine: Trained) -> dict[str, Tensor]:
    """States of torch's generators, a row for each process."""
    own = {"cpu": torch.get_rng_state()} | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})
    out = {}
    for name, state in own.items():
        rows = torch.zeros(engine.world, len(state), dtype=torch.int32)
        rows[engine.rank] = state.int()
        out[name] = engine.sum(rows).to("cpu", torch.uint8)
    return out


# ------------------------------------------------------------------------------------------------ going on


@dataclass(frozen=True)
class Position:
    """Where a run stands.

    Attributes:
        step, elapsed: steps done, and the seconds they took.
        guards: what `wam.training.guards` remembers.
        best: the best step so far, as `Checkpoints` remembers it.
    """

    step: int = 0
    elapsed: float = 0.0
    guards: Mapping[str, Any] = field(default_factory=dict)
    best: dict[str, Any] | None = None


def facts_of(config: Config, position: Position, engine: Trained, windows: int, learning_rate: float, progress: float) -> dict[str, Any]:
    """What a manifest says beside versions, files and validation."""
    t, tree = config.training, config_tree(config)
    return {
        "elapsed_seconds": position.elapsed,
        "config_sha256": hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest(),
        "config": tree,
        "data": {"windows": windows, "samples": position.step * t.batch_size, "epoch": position.step * t.batch_size / windows, "seed": t.seed},
        "schedule": {"learning_rate": learning_rate, "progress": progress, "steps": t.steps, "max_minutes": t.max_minutes},
        "processes": engine.world,
        "guards": dict(position.guards),
        "finetuned_from": t.finetune_from,
    }


def load_state(output: Path, step: int, config: Config, engine: Trained, ema: Ema, codec: Codec, windows: int) -> Position:
    """Restore the state of a step, in place.  Every process calls this.

    Raises:
        ValueError: a damaged state, or one of another format or of a run with another config or dataset.
    """
    folder = state_folder(output, step)
    manifest = _checked(folder, config, engine, windows)
    with read_part(folder, "model") as model, read_part(folder, "optimizer") as optimizer:
        engine.load(Stored(model), Stored(optimizer))
    if ema.decay:
        with read_part(folder, "ema") as averages:
            ema.load(Stored(averages))
    if isinstance(codec, LinearCodec):
        with read_part(folder, "codec") as fitted:
            take_codec(codec, Stored(fitted), config, str(folder))
    if manifest["processes"] == engine.world:
        with read_part(folder, "random") as rows:
            _set_generators(Stored(rows), engine.rank)
    best = manifest["best"]
    return Position(step, float(manifest["elapsed_seconds"]), manifest["guards"], best if best and best["metric"] == best_figure(config) else None)


def take_codec(codec: LinearCodec, tensors: Mapping[str, Tensor], config: Config, where: str) -> None:
    """Put a fitted codec in the place of another, in place.

    Raises:
        ValueError: latents that were encoded beforehand, with a codec that is not this one.
    """
    values = {name: tensors[name] for name in codec.state_dict()}
    latents = next((d.latents for d in config.sources if d.latents is not None), None)
    if latents is not None and any(not torch.equal(value.cpu(), values[name].cpu()) for name, value in codec.state_dict().items()):
        raise ValueError(f"the latents in {latents} were encoded with another linear codec than that of {where}, which its weights read; set data.latents=null")
    codec.load_state_dict(values)


class Stored(Mapping[str, Tensor]):
    """A file's tensors as a mapping that reads each one when it is asked for."""

    def __init__(self, reader: ShardReader):
        self.reader, self._names = reader, dict.fromkeys(reader.names())

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise ValueError(f"{self.reader.path} has no tensor {name!r}, which this model trains; the state is of another model: start over with --fresh")
        return self.reader.get(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def newest_step(output: Path, engine: Trained) -> int | None:
    """The newest state's step; None where there is none.  Every process calls this.

    Raises:
        ValueError: processes see different folders.
    """
    found = states(output)
    step = found[-1] if found else -1
    mean = float(engine.sum(torch.tensor(float(step), dtype=torch.float64))) / engine.world
    if engine.sum(torch.tensor(float(mean != step))) > 0:
        raise ValueError(f"process {engine.rank} finds {f'the state of step {step}' if found else 'no state'} in {output / STATES}, another process something else; output must be a folder that all machines share")
    return step if found else None


def _checked(folder: Path, config: Config, engine: Trained, windows: int) -> dict[str, Any]:
    """The manifest of a state that fits; the main process reads every byte once for it."""
    error: ValueError | None = None
    manifest: dict[str, Any] = {}
    try:
        manifest = read_manifest(folder)
        _check_same_run(folder, manifest, config, windows)
        if engine.is_main:
            verify(folder, manifest)
    except ValueError as caught:
        error = caught
    if engine.sum(torch.tensor(float(error is not None))) > 0:
        raise error or ValueError(f"{folder} was refused by another process, whose message says why")
    return manifest


def _check_same_run(folder: Path, manifest: Mapping[str, Any], config: Config, windows: int) -> None:
    other = differences(manifest["config"], config_tree(config), config_tree(Config()))
    if other:
        told = ", ".join(f"{name} was {was!r} and is {now!r}" for name, (was, now) in list(other.items())[:4]) + (f", and {len(other) - 4} more" if len(other) > 4 else "")
        raise ValueError(f"{folder} belongs to a run with another config: {told}; put that back, use another --output, or --fresh to start over")
    if manifest["data"]["windows"] != windows:
        raise ValueError(f"{folder} belongs to a run over {manifest['data']['windows']} windows, and {config.data.root} has {windows} now; put the dataset back as it was, use another --output, or --fresh to start over")


def _set_generators(rows: Mapping[str, Tensor], rank: int) -> None:
    torch.set_rng_state(rows["cpu"][rank].clone())
    if "cuda" in rows and torch.cuda.is_available():
        torch.cuda.set_rng_state(rows["cuda"][rank].clone())


# ------------------------------------------------------------------------------------------------ which run it is


def config_tree(config: Config) -> dict[str, Any]:
    """What must not change between the parts of a run, `section.key` to value."""
    tree = to_dict(config)
    flat: dict[str, Any] = {}
    for section in SECTIONS:
        _flatten(tree[section], section, flat)
    flat["mixture"] = len(config.mixture)
    for i, entry in enumerate(tree["mixture"]):
        _flatten(entry, f"mixture.{i}", flat)
    may_change = [*MAY_CHANGE, *(f"mixture.{i}.{name}" for i in range(len(config.mixture)) for name in ("workers", "cache", "latents"))]
    return {name: value for name, value in flat.items() if not any(name == free or name.startswith(f"{free}.") for free in may_change)}


def differences(was: Mapping[str, Any], now: Mapping[str, Any], default: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Keys with another value; one that the earlier version did not have counts as its default."""
    nothing = object()
    out = {}
    for name, value in now.items():
        before = was.get(name, default.get(name, nothing))
        if before != value:
            out[name] = (None if before is nothing else before, value)
    return out


def _flatten(tree: Any, where: str, into: dict[str, Any]) -> None:
    if isinstance(tree, dict) and tree:
        for key, value in tree.items():
            _flatten(value, f"{where}.{key}", into)
    else:
        into[where] = tree


# ------------------------------------------------------------------------------------------------ where a run begins


def prepare_folder(output: Path, engine: Together, fresh: bool) -> None:
    """Make `output` this run's; what another one left is put aside where that was asked for, and never overwritten.

    Raises:
        ValueError: a state of an earlier version, or a policy without a state to go on from.
    """
    error: Exception | None = None
    if engine.is_main:
        try:
            _prepare(output, fresh)
        except (OSError, ValueError) as caught:
            error = caught
    if engine.sum(torch.tensor(float(error is not None))) > 0:
        raise error or ValueError(f"{output} was refused by the main process, whose message says why")


def _prepare(output: Path, fresh: bool) -> None:
    for name in (CHECKPOINT, BEST):
        recover(output / name)
    if fresh:
        set_aside(output)
    if (output / OLD_STATE).exists() and not states(output):
        raise ValueError(f"{output / OLD_STATE} is of an earlier version and cannot be gone on from; start a new run from its policy with training.finetune_from={output / CHECKPOINT} and another --output, or over with --fresh, which puts the old run aside")
    if (output / CHECKPOINT).exists() and not (output / STATES).is_dir():
        raise ValueError(f"{output} has a policy in {CHECKPOINT}/ but no {STATES}/ to go on from, and training would write over it; use another --output, or --fresh, which puts it aside")
    (output / STATES).mkdir(parents=True, exist_ok=True)  # from here on what lies here is this run's, also if it is killed before its first save


def set_aside(output: Path) -> Path | None:
    """Move what a run left into `output/previous/<number>/`; None where there is nothing."""
    there = [output / name for name in WRITTEN if (output / name).exists()]
    if not there:
        return None
    taken = [int(path.name) for path in (output / PREVIOUS).glob("*") if path.name.isdigit()]
    folder = output / PREVIOUS / f"{max(taken, default=0) + 1:03d}"
    folder.mkdir(parents=True)
    for path in there:
        path.replace(folder / path.name)
    log.info("starting over: the run that was in %s is now in %s; delete it when it is no longer needed", output, folder)
    return folder


def require_state(output: Path, config: Config) -> None:
    """Refuse to go on where there is nothing to go on from: what `--resume` asks for beyond the default.

    Raises:
        FileNotFoundError: no state that is whole.
        ValueError: a config that starts from elsewhere.
    """
    origin = config.training.finetune_from
    if origin is not None:
        raise ValueError(
            f"--resume and training.finetune_from={origin} exclude each other: resuming goes on with this run's own weights, optimiser and step; finetune_from starts a new run, "
            "at step 0, from a policy's weights (and model.pretrained from those of a Wan backbone alone); a run that has a state goes on from it without --resume, so leave that out, or set finetune_from to null"
        )
    if not states(output):
        raise FileNotFoundError(f"no state to go on from in {output / STATES}; leave out --resume to start a run there, or name its folder with --output")
