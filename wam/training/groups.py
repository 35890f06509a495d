"""The parts of a model that may be trained apart: who has which learning rate, weight decay and warm-up, and who is frozen.

    backbone   the video transformer's own weights           expert   blocks of states and actions
    adapters   LoRA on it                                    new      encoders, decoders, a goal's mark
    text       the embedded text encoder                     value    the value token and its head

Each part falls into two groups of the optimiser: matrices, which decay, and biases, norms and tables, which do not.  The rate of a
group at a step is `learning_rate x rate x warm-up x cosine`; it is set, never accumulated, so it is a function of the step.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from wam.config import Config
from wam.config_training import GroupConfig, TrainingConfig
from wam.model.lora import is_adapter, trainable

_STARTS = {"text.": "text", "expert.": "expert", "backbone.": "backbone", "value_head.": "value"}


def part_of(name: str) -> str:
    """The part that a parameter belongs to, by its name."""
    if is_adapter(name):
        return "adapters"
    return next((part for start, part in _STARTS.items() if name.startswith(start)), "new")


def freeze(config: Config, model: nn.Module) -> None:
    """Stop the gradients of the parts that are frozen.

    Raises:
        ValueError: nothing is left to train.
    """
    groups = config.training.groups
    for name, parameter in model.named_parameters():
        if getattr(groups, part_of(name)).freeze:
            parameter.requires_grad_(False)
    if not trainable(model):
        raise ValueError("training.groups freezes every part that this model has, so there is nothing to train; set freeze=false for one of them")


def make_optimizer(config: Config, model: nn.Module) -> torch.optim.Optimizer:
    """AdamW over what trains; no decay on biases, norms, and tables."""
    t = config.training
    members: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in trainable(model).items():
        decays = len(_shape(parameter)) >= 2 and "table" not in name and "bias" not in name
        members.setdefault((part_of(name), decays), []).append(parameter)
    groups: list[dict[str, Any]] = []
    for (part, decays), parameters in sorted(members.items(), key=lambda item: (item[0][0], not item[0][1])):
        own: GroupConfig = getattr(t.groups, part)
        decay = t.weight_decay if own.weight_decay is None else own.weight_decay
        groups.append({"params": parameters, "part": part, "name": part if decays else f"{part} without decay", "weight_decay": decay if decays else 0.0})
    return torch.optim.AdamW(groups, lr=t.learning_rate, betas=t.betas, fused=True)


def _shape(parameter: nn.Parameter) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))  # whole, also where ZeRO-3 has cut it up


def rate_of(config: TrainingConfig, part: str, step: int, progress: float) -> float:
    """The learning rate of a part at `step` (from 0), where `progress` of the run (0..1) is done."""
    own: GroupConfig = getattr(config.groups, part)
    warmup = min(1.0, (step + 1) / (own.warmup_steps or config.warmup_steps))
    return config.learning_rate * own.rate * warmup * 0.5 * (1 + math.cos(math.pi * progress))


def set_rates(config: TrainingConfig, optimizer: torch.optim.Optimizer, step: int, progress: float) -> dict[str, float]:
    """Give every group its rate; returns them by part."""
    rates = {}
    for group in optimizer.param_groups:
        rates[group["part"]] = group["lr"] = rate_of(config, group["part"], step, progress)
    return rates
