"""Which process of a run this is: what a launcher says in the environment, and nothing else.

    plain python            one process
    torchrun, accelerate    RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT; the same on one machine and on many
    accelerate              also which engine it was configured for: ACCELERATE_USE_DEEPSPEED with a JSON, ACCELERATE_USE_FSDP

A GPU for each process where there are GPUs (nccl), else the CPU (gloo).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch

WANTED = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


@dataclass(frozen=True)
class Launch:
    """A process among those of a run.

    Attributes:
        rank, world: this process, from 0, and how many there are.
        local_rank: the same among those of this machine: which GPU it has.
        kind, deepspeed: the engine that the launcher was configured for, and its DeepSpeed JSON; None where it says nothing.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    kind: str | None = None
    deepspeed: str | None = None

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", self.local_rank) if self.world > 1 else torch.device("cuda")


def read_launch(environment: Mapping[str, str]) -> Launch:
    """What a launcher says.

    Raises:
        ValueError: some of its variables are missing or are no numbers, or there are fewer GPUs than processes on this machine.
    """
    kind = "deepspeed" if environment.get("ACCELERATE_USE_DEEPSPEED") == "true" else "fsdp2" if environment.get("ACCELERATE_USE_FSDP") == "true" else None
    file = environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    file = None if file in (None, "", "none") else file
    if "WORLD_SIZE" not in environment and "RANK" not in environment:
        return Launch(kind=kind, deepspeed=file)
    try:
        rank, world, local = (int(environment[name]) for name in WANTED)
    except (KeyError, ValueError) as error:
        found = {name: environment.get(name) for name in WANTED}
        raise ValueError(f"the environment says {found}, which names no process of a run; start with torchrun or accelerate launch, or unset these for a single process") from error
    if torch.cuda.is_available() and local >= torch.cuda.device_count():
        raise ValueError(f"process {rank} is number {local} of its machine, which has {torch.cuda.device_count()} GPUs; start as many processes on a machine as it has GPUs")
    return Launch(rank, world, local, kind, file)


def join(launch: Launch, timeout: timedelta) -> None:
    """Meet the other processes; a collective that takes longer than `timeout` is an error."""
    import torch.distributed as dist

    if dist.is_initialized():
        return
    if launch.world == 1 and "MASTER_ADDR" not in os.environ:
        dist.init_process_group("gloo" if launch.device.type == "cpu" else "nccl", store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        return
    if launch.device.type == "cuda":
        torch.cuda.set_device(launch.device)
        dist.init_process_group("nccl", timeout=timeout, device_id=launch.device)
    else:
        dist.init_process_group("gloo", timeout=timeout)
