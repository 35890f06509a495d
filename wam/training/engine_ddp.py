"""Several processes that each hold everything: gradients are averaged, updates are the same everywhere (torch's DistributedDataParallel)."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from wam.config import Config
from wam.training.engine import Engine

if TYPE_CHECKING:
    from wam.training.objective import Drawn, Errors


class ManyEngine(Engine):
    """What engines of several processes share: sums."""

    def sum(self, tensor: Tensor) -> Tensor:
        """A tensor summed over all processes; returned where it was."""
        out = tensor.detach().to(self.device, copy=True)
        dist.all_reduce(out)
        return out.to(tensor.device)

    def close(self) -> None:
        """Leave the other processes."""
        if dist.is_initialized():
            dist.destroy_process_group()


class DdpEngine(ManyEngine):
    """Everything is everywhere."""

    kind = "ddp"

    def prepare(self, model: nn.Module, supervised: nn.Module, config: Config) -> None:
        """Wrap the module; which parameters a batch reaches depends on its modes, so DDP looks."""
        super().prepare(model, supervised, config)
        new = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters  # what broadcast_buffers is called from torch 2.13 on
        without_buffers: dict[str, Any] = {"forward_sync_buffers" if new else "broadcast_buffers": False}
        self.supervised: Any = DistributedDataParallel(supervised, find_unused_parameters=True, gradient_as_bucket_view=True, **without_buffers)

    def forward(self, batch: dict[str, Any], drawn: Drawn, last: bool = True) -> Errors:
        """Errors of a micro-batch; only the `last` one's backward pass waits for the others."""
        if last or not torch.is_grad_enabled():
            return self.supervised(batch, drawn)
        with self.supervised.no_sync():
            return self.supervised(batch, drawn)

    def backward(self, loss: Tensor) -> None:
        """DDP averages over processes; the loss is a sum over them."""
        (loss * self.world).backward()
