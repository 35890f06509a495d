"""Which parameters share a learning rate and a weight decay."""

from __future__ import annotations

import torch
from torch import nn

from wam.config import Config
from wam.model.lora import trainable


def make_optimizer(config: Config, model: nn.Module) -> torch.optim.Optimizer:
    """AdamW; no decay on biases, norms, and tables."""
    t = config.training
    trained = trainable(model).items()
    decayed = [p for n, p in trained if p.ndim >= 2 and "table" not in n and "bias" not in n]
    plain = [p for n, p in trained if not (p.ndim >= 2 and "table" not in n and "bias" not in n)]
    groups = [{"params": decayed, "weight_decay": t.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=t.learning_rate, betas=t.betas, fused=True)
