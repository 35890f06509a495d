"""A policy on disk: everything that is needed to drive a robot, and nothing that runs code.

    config.yaml          the resolved config of the run
    config.json          format, versions, training step
    model.safetensors    weights (EMA), codec and text encoder included
    normalizer.json      statistics, method and clipping of states and actions

A policy is portable because the contract between model and robot (sizes, rates, normalisation) lies beside the weights.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

import wam
from wam.codec.linear import LinearCodec
from wam.config import Config, load_config, save_config
from wam.files import atomic_path, write_json_atomic
from wam.model.wam import WorldActionModel

FORMAT = "wam-policy-1"
CONFIG, META, WEIGHTS, NORMALIZER = "config.yaml", "config.json", "model.safetensors", "normalizer.json"


@dataclass
class Policy:
    """A model with what it needs around it.

    Attributes:
        normalizer: as a plain dictionary (`wam.data.normalize.Normalizer.from_dict` reads it).
        meta: what else the checkpoint says about itself: step, control rate, task names.
    """

    config: Config
    model: WorldActionModel
    codec: LinearCodec
    normalizer: dict[str, Any]
    meta: dict[str, Any]

    @property
    def control_hz(self) -> float:
        """Control steps a second, as in the training data."""
        return float(self.meta["control_hz"])


def save_pretrained(policy: Policy, directory: Path, weights: dict[str, Tensor] | None = None) -> None:
    """Write a policy; `weights` replaces the model's own (an EMA, say).  Each file is written in one step, weights last."""
    directory.mkdir(parents=True, exist_ok=True)
    save_config(policy.config, directory / CONFIG)
    write_json_atomic(directory / NORMALIZER, policy.normalizer)
    write_json_atomic(directory / META, {"format": FORMAT, "wam_version": wam.__version__, "torch_version": torch.__version__, **policy.meta})
    tensors = {f"model.{k}": v for k, v in (weights or _weights(policy.model)).items()}
    tensors |= {f"codec.{k}": v for k, v in policy.codec.state_dict().items()}
    with atomic_path(directory / WEIGHTS) as temporary:
        safetensors.torch.save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary, metadata={"format": FORMAT})


def from_pretrained(directory: str | Path, device: str = "cpu") -> Policy:
    """Load a policy for inference.

    Raises:
        FileNotFoundError: not a checkpoint directory; says which file is missing.
        ValueError: another format, a truncated weights file, or tensors that do not match the config (named).
    """
    directory = Path(directory)
    for name in (META, CONFIG, WEIGHTS, NORMALIZER):
        if not (directory / name).is_file():
            raise FileNotFoundError(f"{directory} is not a checkpoint: {name} is missing; give the directory that `wam train` wrote, e.g. runs/demo/train/checkpoint")
    meta = _read_json(directory / META, ("format", "control_hz"))
    if meta["format"] != FORMAT:
        raise ValueError(f"{directory / META} has format {meta['format']!r}; this version reads {FORMAT!r}")
    normalizer = _read_json(directory / NORMALIZER, ("version", "method", "clip", "keys"))
    config = load_config(directory / CONFIG)
    try:
        tensors = safetensors.torch.load_file(directory / WEIGHTS, device=device)
    except Exception as error:
        raise ValueError(f"{directory / WEIGHTS} cannot be read ({error}); the file is damaged or incomplete: copy or train it again") from error
    model, codec = WorldActionModel(config).to(device), LinearCodec(config.codec).to(device)
    _load(model, _part(tensors, "model."), directory)
    _load(codec, _part(tensors, "codec."), directory)
    model.eval().requires_grad_(False)
    return Policy(config, model, codec, normalizer, meta)


def _read_json(path: Path, needed: tuple[str, ...]) -> dict[str, Any]:
    """A JSON object with at least the keys that are needed."""
    try:
        tree = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); the file is damaged or incomplete: copy the checkpoint again") from error
    missing = [key for key in needed if key not in tree] if isinstance(tree, dict) else list(needed)
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}; the file is damaged or not a checkpoint's: copy the checkpoint again")
    return tree


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """State of a model, tied tensors once (the text encoder names its embedding twice)."""
    seen: set[int] = set()
    out = {}
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() in seen and tensor.numel():
            continue
        seen.add(tensor.data_ptr())
        out[name] = tensor
    return out


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _load(module: nn.Module, tensors: dict[str, Tensor], directory: Path) -> None:
    own, tied = _weights(module), set(module.state_dict())
    missing = sorted(set(own) - set(tensors))
    unexpected = sorted(set(tensors) - tied)
    shapes = [f"{k}: checkpoint {tuple(tensors[k].shape)}, config {tuple(own[k].shape)}" for k in own if k in tensors and tensors[k].shape != own[k].shape]
    if missing or unexpected or shapes:
        parts = [f"missing {missing[:3]}" if missing else "", f"unexpected {unexpected[:3]}" if unexpected else "", f"sizes differ: {'; '.join(shapes[:3])}" if shapes else ""]
        raise ValueError(f"{directory / WEIGHTS} does not match {directory / CONFIG}: {', '.join(p for p in parts if p)}")
    module.load_state_dict(tensors, strict=False)
