"""Weights, gradients, optimiser state and EMA in shards (torch's FSDP2, `fully_shard`): each process holds 1 / world of all of them.

Every repeated block is gathered when its forward or backward pass runs and let go afterwards; what is left over (embeddings, heads,
encoders) is gathered once a step.  Shards are of whole float32 parameters and stay that way: bfloat16 is what products are computed in.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from wam.config import Config
from wam.training.engine_ddp import ManyEngine
from wam.training.launch import Launch

if TYPE_CHECKING:
    from wam.training.objective import Drawn, Errors


class FsdpEngine(ManyEngine):
    """A shard of everything in each process."""

    kind = "fsdp2"

    def __init__(self, launch: Launch, offload: bool):
        super().__init__(launch)
        self.mesh = init_device_mesh(self.device.type, (self.world,))
        self.policy = CPUOffloadPolicy(pin_memory=self.device.type == "cuda") if offload else OffloadPolicy()

    @property
    def build_device(self) -> torch.device:
        """The host: the device holds shards."""
        return torch.device("cpu")

    def prepare(self, model: Any, supervised: nn.Module, config: Config) -> None:
        """Shard block by block, then the rest."""
        for module in [*model.backbone.blocks, *(model.expert.blocks if model.expert is not None else ())]:
            self._shard(module)
        self._shard(supervised)
        super().prepare(model, supervised, config)

    def _shard(self, module: nn.Module) -> None:
        fully_shard(module, mesh=self.mesh, offload_policy=self.policy)

    def forward(self, batch: dict[str, Any], drawn: Drawn, last: bool = True) -> Errors:
        """Errors of a micro-batch; gradients are scattered after the `last` one."""
        self.supervised.set_requires_gradient_sync(last)
        return self.supervised(batch, drawn)

    def backward(self, loss: Tensor) -> None:
        """FSDP averages over processes; the loss is a sum over them."""
        (loss * self.world).backward()

    def _squares(self, gradients: dict[str, list[Tensor]]) -> dict[str, Tensor]:
        local = torch.stack(list(super()._squares(gradients).values()))
        return dict(zip(gradients, self.sum(local).unbind(), strict=True))

    def _local(self, tensor: Tensor) -> Tensor:
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor

    def whole(self, name: str, fragment: Tensor) -> Tensor:
        """A whole tensor from the shards of all processes."""
        like: Any = self.trained[name]
        shards = DTensor.from_local(fragment.to(self.device), self.mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride())
        return shards.full_tensor()

    def whole_parameter(self, parameter: Any) -> Tensor:
        """A parameter as it computes, whole."""
        own = parameter.detach()
        return own.full_tensor() if isinstance(own, DTensor) else own

    def piece(self, name: str, whole: Tensor) -> Tensor:
        """This process's shard of a whole tensor."""
        like: Any = self.trained[name]
        return distribute_tensor(whole, self.mesh, like.placements, src_data_rank=None).to_local()

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        """Gather every block and the rest, and keep them until the end."""
        modules = [m for m in self.supervised.modules() if isinstance(m, FSDPModule)]
        for module in modules:
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        try:
            yield
        finally:
            for module in modules:
                module.reshard()
                module.set_reshard_after_forward(module is not self.supervised, recurse=False)
