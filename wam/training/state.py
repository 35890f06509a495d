"""Training state on disk: enough to go on as if nothing had happened, and nothing that is unpickled.

One safetensors file holds the weights that train, their EMA and the optimiser's moments, and the step in its metadata, so it is either
whole or absent.
Random numbers need no state: every draw is a function of the seed and the step.
"""

from __future__ import annotations

from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from wam.files import atomic_path
from wam.model.lora import trainable

FORMAT = "wam-training-1"
STATE = "training_state.safetensors"


class Ema:
    """Exponential moving average of a model's trainable parameters, with a warm-up so that early weights are forgotten.

    With a decay of 0 it is the parameters themselves, and takes no memory.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.shadow = {name: p.detach().clone() if decay else p.detach() for name, p in trainable(model).items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Move towards the model's parameters after optimiser step number `step` (from 1)."""
        if not self.decay:
            return
        decay = min(self.decay, step / (step + 10))
        names, values = zip(*trainable(model).items(), strict=True)
        torch._foreach_lerp_([self.shadow[n] for n in names], list(values), 1 - decay)


def save_state(path: Path, step: int, model: nn.Module, ema: Ema, optimizer: torch.optim.Optimizer, fingerprint: str, elapsed: float) -> None:
    """Write the state after `step` steps, atomically."""
    trained = trainable(model)
    names = {id(p): name for name, p in trained.items()}
    tensors = {f"model.{n}": p.detach() for n, p in trained.items()} | ({f"ema.{n}": p for n, p in ema.shadow.items()} if ema.decay else {})
    for parameter, slots in optimizer.state.items():
        for slot, value in slots.items():
            tensors[f"optimizer.{slot}.{names[id(parameter)]}"] = torch.as_tensor(value)
    metadata = {"format": FORMAT, "step": str(step), "config": fingerprint, "elapsed": repr(elapsed)}
    with atomic_path(path) as temporary:
        safetensors.torch.save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary, metadata=metadata)


def load_state(path: Path, model: nn.Module, ema: Ema, optimizer: torch.optim.Optimizer, fingerprint: str) -> tuple[int, float]:
    """Restore a state; returns the number of steps done and the seconds they took.

    Raises:
        ValueError: a damaged file, another format, or a state of a run with another config.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:
        raise ValueError(f"{path} cannot be read ({error}); delete it to start the run over, or restore it from a copy") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} has format {metadata.get('format')!r}; this version reads {FORMAT!r}")
    if metadata.get("config") != fingerprint:
        raise ValueError(f"{path} belongs to a run with another config (model, data, noise or training section); use another --output, or --fresh to start over")
    with torch.no_grad():
        for name, parameter in trainable(model).items():
            parameter.copy_(tensors[f"model.{name}"])
            if ema.decay:
                ema.shadow[name].copy_(tensors[f"ema.{name}"])
            slots = {slot: tensors[key] for slot in ("step", "exp_avg", "exp_avg_sq") if (key := f"optimizer.{slot}.{name}") in tensors}
            if slots:
                optimizer.state[parameter] = _placed(slots, parameter)
    return int(metadata["step"]), float(metadata["elapsed"])


def _placed(slots: dict[str, Tensor], parameter: nn.Parameter) -> dict[str, Tensor]:
    return {name: value if name == "step" else value.to(parameter.device) for name, value in slots.items()}
