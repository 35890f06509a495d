"""What lies between a loss and the weights: one process, or many that act as one.

The loop knows one interface and never how many processes there are:

    engine.prepare(model, optimizer, clip)     backward(loss)      step() -> gradient norm       sum(tensor)
    engine.rank, .world, .device, .is_main     trained_tensors()   optimizer_state(), load()     whole tensors by name

A step whose gradient norm is not finite changes nothing: whoever called decides what that means.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from wam.config import Config
from wam.model.lora import trainable


class Engine:
    """One process: gradients are clipped and applied where they are.

    Attributes:
        rank, world: this process among all, from 0; and how many there are.
        device: where this process computes.
    """

    kind = "single"

    def __init__(self, device: torch.device, rank: int = 0, world: int = 1):
        self.device, self.rank, self.world = device, rank, world

    @staticmethod
    def of(config: Config) -> Engine:
        """The engine that a config asks for."""
        return Engine(torch.device("cuda" if torch.cuda.is_available() else "cpu"))

    @property
    def is_main(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer, clip: float) -> None:
        """Take over a model and its optimiser; gradients are clipped to the norm `clip`."""
        self.model, self.optimizer, self.clip = model, optimizer, clip

    def backward(self, loss: Tensor) -> None:
        """Add a loss's gradients to those of this step."""
        loss.backward()

    def step(self, largest: float = math.inf) -> Tensor:
        """Clip the gradients, update the weights and forget the gradients; returns the norm before clipping.

        Where the norm is not finite or above `largest`, the gradients are forgotten and nothing is updated.
        """
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip, foreach=True)
        if bool(torch.isfinite(norm)) and float(norm) <= largest:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def sum(self, tensor: Tensor) -> Tensor:
        """A tensor summed over all processes."""
        return tensor

    # ------------------------------------------------------------------------------------------ state, by name

    def trained_tensors(self) -> dict[str, Tensor]:
        """The parameters that train, whole, float32, by name (on the main process; elsewhere empty)."""
        return {name: p.detach() for name, p in trainable(self.model).items()}

    def optimizer_state(self) -> dict[str, Tensor]:
        """What the optimiser remembers, as `<slot>.<parameter>` (on the main process; elsewhere empty)."""
        names = {id(p): name for name, p in trainable(self.model).items()}
        return {f"{slot}.{names[id(p)]}": torch.as_tensor(value) for p, slots in self.optimizer.state.items() for slot, value in slots.items()}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]) -> None:
        """Put back what `trained_tensors` and `optimizer_state` gave."""
        for name, parameter in trainable(self.model).items():
            parameter.copy_(tensors[name])
            slots = {slot: optimizer[key] for slot in ("step", "exp_avg", "exp_avg_sq") if (key := f"{slot}.{name}") in optimizer}
            if slots:
                self.optimizer.state[parameter] = {slot: value if slot == "step" else value.to(parameter.device) for slot, value in slots.items()}
