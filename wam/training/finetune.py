"""A new run that starts from a policy's weights (`training.finetune_from`): step 0, a fresh optimiser, another dataset or robot.

    weights          by name; of encoders and decoders that robots have of their own, the rows of robots with the same name
    codec            the policy's: a linear one is taken over, not fitted anew, for latents of another one mean nothing to the weights
    statistics       the new dataset's; where a robot of the same name moves in other ranges, that is said
    sizes            must be the policy's; what cannot be taken is an error that names it

    model.pretrained     a Wan backbone alone: encoders, decoders and experts are new
    finetune_from        a whole policy; with adapters (model.lora), `model.pretrained` names the same folder: its backbone stays, frozen, as their base
    resuming             this run's own weights, optimiser and step

What was taken, what is new and what was left behind is logged and written to `finetuned_from.json`.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wam.codec.codec import Codec
from wam.codec.linear import LinearCodec
from wam.config import Config, ModelConfig, load_config
from wam.data.normalize import Normalizer, robots_of
from wam.files import write_json_atomic
from wam.model.actions import EmbodimentLinear
from wam.model.lora import has_lora
from wam.model.wam import WorldActionModel
from wam.pretrained import ADAPTER, BACKBONE, CODEC, CONFIG, META, MODEL, NORMALIZER, STEM, from_pretrained
from wam.shards import MemorySource, ShardReader, TensorSource
from wam.training.state import config_tree, differences, take_codec

log = logging.getLogger(__name__)
REPORT = "finetuned_from.json"
FAR = 2.0  # ranges that differ by more than this are told


@dataclass(frozen=True)
class Report:
    """What became of a policy in a new run.

    Attributes:
        taken: tensors that were filled.
        new, dropped: what the policy did not have, and what of it is not used: robots and tensors.
        changed: settings that differ, as `name: was -> now`.
        statistics: dimensions that move in another range now.
    """

    folder: str
    step: int
    taken: int
    new: list[str]
    dropped: list[str]
    changed: list[str]
    statistics: list[str]

    def told(self) -> str:
        """In a few lines, for people."""
        lines = [f"starting from {self.folder} (step {self.step}): {self.taken} tensors taken"]
        for what, items in (("new", self.new), ("not used", self.dropped), ("settings", self.changed), ("statistics", self.statistics)):
            if items:
                lines.append(f"  {what}: {', '.join(items[:8])}{f' and {len(items) - 8} more' if len(items) > 8 else ''}")
        return "\n".join(lines)


def begin_from(config: Config, output: Path, is_main: bool, going_on: bool, model: WorldActionModel, codec: Codec, normalizer: Normalizer | None) -> None:
    """Do what `training.finetune_from` asks for, in a new run; one that goes on reads only what is frozen there, which its own state does not hold.

    Raises:
        FileNotFoundError, ValueError: as `start_from`.
    """
    origin = config.training.finetune_from
    if origin is None or (going_on and not _frozen(model)):
        return
    assert normalizer is not None
    report = start_from(Path(origin), config, model, codec, normalizer)
    if is_main and not going_on:
        write_report(report, output)


def start_from(folder: Path, config: Config, model: WorldActionModel, codec: Codec, normalizer: Normalizer) -> Report:
    """Fill a new model and codec, in place, from a policy's folder, tensor by tensor.

    Raises:
        FileNotFoundError: no policy there.
        ValueError: a codec of another kind or size, a text encoder of another kind, a tensor of another size, or no tensor in common (named).
    """
    source, old, step = _open(folder, config)
    _check_alike(folder, old, config)
    taken, new, dropped = _fill(model, source, _rows(folder, old.model, config.model), folder)
    robots, before = ([e.name for e in c.model.embodiments] for c in (config, old))
    if config.model.embodiment_weights == "own":
        new = [*(f"robot {name}" for name in robots if name not in before and old.model.embodiment_weights == "own"), *new]
        dropped = [*(f"robot {name}" for name in before if name not in robots), *dropped]
    if isinstance(codec, LinearCodec):
        take_codec(codec, {name.removeprefix(CODEC): source.get(name) for name in source.names() if name.startswith(CODEC)}, config, str(folder))
    changed = [f"{name}: {was} -> {now}" for name, (was, now) in differences(config_tree(old), config_tree(config), {}).items() if name.split(".")[0] in ("timeline", "model", "relations", "noise") and not name.startswith("model.embodiments")]
    return Report(str(folder), step, taken, new, dropped, changed, _statistics(folder, normalizer, config.data.embodiment))


def write_report(report: Report, output: Path) -> None:
    """Log a report and put it beside the run."""
    log.info("%s", report.told())
    write_json_atomic(output / REPORT, asdict(report))


def _open(folder: Path, config: Config) -> tuple[TensorSource, Config, int]:
    for name in (CONFIG, META, NORMALIZER):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"training.finetune_from is {folder}, which is no policy: {name} is missing; give a checkpoint directory that `wam train` or `wam convert` wrote")
    pretrained = config.model.pretrained
    if pretrained is not None and Path(pretrained).resolve() != folder.resolve():
        raise ValueError(
            f"training.finetune_from={folder} and model.pretrained={pretrained} exclude each other: the first starts from a whole policy, the second from a backbone alone; "
            f"set {f'model.pretrained={folder}, so that adapters (model.lora) are trained on the backbone of that policy' if config.model.lora else 'model.pretrained=null'}, or finetune_from=null"
        )
    step = int(json.loads((folder / META).read_text()).get("step", 0))
    if (folder / ADAPTER).is_dir():  # merged into their backbone, which takes the whole policy
        policy = from_pretrained(folder, dtype=torch.float32)
        tensors = {f"{MODEL}{name}": value for name, value in policy.model.state_dict().items()}
        extra = policy.codec.state_dict() if isinstance(policy.codec, LinearCodec) else {}
        return MemorySource(tensors | {f"{CODEC}{name}": value for name, value in extra.items()}), policy.config, step
    return ShardReader(folder, STEM), load_config(folder / CONFIG), step


def _check_alike(folder: Path, old: Config, new: Config) -> None:
    """What the weights take for granted."""
    for name in ("codec.kind", "codec.patch", "codec.channels", "text.kind", *(("codec.image_size",) if new.codec.kind == "linear" else ())):
        section, key = name.split(".")
        was, now = getattr(getattr(old, section), key), getattr(getattr(new, section), key)
        if was != now:
            raise ValueError(f"training.finetune_from={folder} has {name} {_yaml(was)}, this run {_yaml(now)}: its weights read what that makes; set {name}={_yaml(was)}")
    for section in ("codec", "text"):
        was, now = getattr(old, section).pretrained, getattr(new, section).pretrained
        if was != now:
            log.warning("%s.pretrained was %s when %s was trained and is %s now; it must be the same weights", section, was, folder, now)


@torch.no_grad()
def _fill(model: WorldActionModel, source: TensorSource, rows: list[tuple[int, int]], folder: Path) -> tuple[int, list[str], list[str]]:
    target, kept = dict(model.state_dict(keep_vars=True)), 0
    own = {f"{name}.{which}" for name, module in model.named_modules() if isinstance(module, EmbodimentLinear) for which in ("weight", "bias")}
    stored = {name.removeprefix(MODEL): name for name in source.names() if name.startswith(MODEL)}
    if has_lora(model):  # on the policy's own backbone, which is in place
        kept = sum(name.startswith(BACKBONE) for name in stored)
        target, stored = ({name: x for name, x in names.items() if not name.startswith(BACKBONE)} for names in (target, stored))
    if not target.keys() & stored.keys():
        raise ValueError(f"training.finetune_from={folder} has no tensor of this model; it holds {', '.join(list(stored)[:3])}, ...")
    for name in (name for name in target if name in stored):
        value, parameter = source.get(stored[name]), target[name]
        if value.shape[1:] != parameter.shape[1:] or (name not in own and value.shape != parameter.shape):
            raise ValueError(_other_size(folder, name, value, parameter, name in own))
        if name in own:
            for before, after in rows:
                parameter[after].copy_(value[before])
        else:
            parameter.copy_(value)
    seen = {id(target[name]) for name in target.keys() & stored.keys()}
    new = [name for name, tensor in target.items() if id(tensor) not in seen]
    return kept + len(target.keys() & stored.keys()), new, sorted(stored.keys() - target.keys())


def _rows(folder: Path, old: ModelConfig, new: ModelConfig) -> list[tuple[int, int]]:
    """Which of the policy's sets of encoders and decoders goes where: by the robots' names; what all share goes to every robot."""
    names = [e.name for e in old.embodiments]
    if old.embodiment_weights == "shared":
        return [(0, row) for row in range(1 if new.embodiment_weights == "shared" else len(new.embodiments))]
    if new.embodiment_weights == "shared":
        raise ValueError(f"training.finetune_from={folder} has encoders and decoders for each robot, and model.embodiment_weights is 'shared'; set it to 'own'")
    return [(names.index(e.name), row) for row, e in enumerate(new.embodiments) if e.name in names]


def _other_size(folder: Path, name: str, value: Tensor, parameter: nn.Parameter | Tensor, own: bool) -> str:
    remedy = "model.state_width and model.action_width (or other widths)" if own else "sizes (model, codec, text)"
    return f"training.finetune_from={folder}: tensor {name!r} has shape {list(value.shape)}, this model's has {list(parameter.shape)}; give the {remedy} of {folder / CONFIG}"


def _statistics(folder: Path, normalizer: Normalizer, robot: str) -> list[str]:
    """Dimensions whose range is another one than the policy's weights know."""
    known = robots_of(folder / NORMALIZER)
    if known and robot not in known:
        return [f"none of {robot!r} before; there are those of {', '.join(known)}"]
    old, out = Normalizer.load(folder / NORMALIZER, robot), []
    for key, now in normalizer.keys.items():
        was = old.keys.get(key)
        if was is None or len(was.center) != len(now.center):
            out.append(f"{key}: {len(now.center)} dimensions, {'none' if was is None else len(was.center)} before")
            continue
        for i, (a, b) in enumerate(zip(was.scale, now.scale, strict=True)):
            shift = abs(was.center[i] - now.center[i]) / a
            if max(a, b) / min(a, b) > FAR or shift > FAR / 2:
                out.append(f"{key} dimension {i}: {was.center[i]:.3g} +- {a:.3g} before, {now.center[i]:.3g} +- {b:.3g} now")
    return out


def _yaml(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _frozen(model: nn.Module) -> bool:
    """Whether parts of a model do not train, so that they are not in its state."""
    return any(not parameter.requires_grad for parameter in model.parameters())
