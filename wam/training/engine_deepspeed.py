"""DeepSpeed's ZeRO, by a JSON file: what is in shards depends on the stage.

    stage   optimiser state, float32 masters, EMA   gradients   weights       with offload
    1       1 / world                               whole       whole
    2       1 / world                               1 / world   whole         optimiser state waits in the host's memory
    3       1 / world                               1 / world   1 / world     weights too

What the config of a run says (batch, accumulation, clipping, optimiser, precision) is filled in here, and refused in the file where it
would say something else: products are computed in bfloat16 by autocast, so weights, gradients and their sums stay float32.
No compiled operator of DeepSpeed is needed.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from wam.config import Config
from wam.training.engine import empty_slots
from wam.training.engine_ddp import ManyEngine
from wam.training.launch import Launch

if TYPE_CHECKING:
    from wam.training.objective import Drawn, Errors

OURS = {"optimizer": "training.learning_rate, betas and groups", "scheduler": "training.warmup_steps", "bf16": "training.precision", "fp16": "training.precision", "torch_autocast": "training.precision"}


class DeepSpeedEngine(ManyEngine):
    """ZeRO 1, 2 or 3."""

    kind = "deepspeed"

    def __init__(self, launch: Launch, path: str | None):
        super().__init__(launch)
        assert path is not None
        self.tree = read_json(Path(path))
        self.stage: int = self.tree["zero_optimization"]["stage"]
        self.deepspeed = _import(self.device)
        self.largest, self._norm, self._last = math.inf, torch.zeros(()), True

    @property
    def build_device(self) -> torch.device:
        """The host, where weights are in shards."""
        return torch.device("cpu") if self.stage == 3 else self.device

    def prepare(self, model: Any, supervised: nn.Module, config: Config) -> None:
        """Hand the module and the optimiser to DeepSpeed, and see that it took them."""
        super().prepare(model, supervised, config)
        warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)  # of DeepSpeed's own calls
        self.deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)
        engine, *_ = self.deepspeed.initialize(model=supervised, optimizer=self.optimizer, config=filled(self.tree, config, self.world), dist_init_required=False)
        if not isinstance(engine, self.deepspeed.DeepSpeedEngine) or engine.zero_optimization_stage() != self.stage or engine.dp_world_size != self.world:
            raise RuntimeError(f"DeepSpeed did not become what training.engine asks for: {type(engine).__name__}, expected ZeRO stage {self.stage} over {self.world} processes; start with torchrun, or report this with the version of deepspeed")
        self.supervised: Any = engine
        self.zero: Any = engine.optimizer
        self.optimizer = self.zero.optimizer
        if self.stage == 3:
            self.deepspeed.zero.register_external_parameter(model, model.backbone.scale_shift_table)  # the heads', read outside of its own module's forward
            self._norms_of_groups = self.zero._get_norm_groups
            self.zero._get_norm_groups = lambda: self._judged([self.zero.sub_group_to_group_id[i] for i in range(len(self.zero.fp16_groups))], self._norms_of_groups())
        else:
            self._group_of = {id(p): i for i, group in enumerate(self.zero.bit16_groups) for p in group}
            self.zero.scaled_global_norm = lambda norm_type=2: self._judged(range(len(self.zero.bit16_groups)), self._group_norms())[0]

    # ------------------------------------------------------------------------------------------ a step

    def forward(self, batch: dict[str, Any], drawn: Drawn, last: bool = True) -> Errors:
        """Errors of a micro-batch."""
        self._last = last
        return self.supervised(batch, drawn)

    def backward(self, loss: Tensor) -> None:
        """DeepSpeed averages over processes; the loss is a sum over them."""
        self.supervised.backward(loss * self.world, scale_wrt_gas=False)
        if not self._last:
            self.supervised.step()  # which counts micro-batches

    def step(self, largest: float = math.inf) -> Tensor:
        """Clip, update and forget, or leave the weights as they are: DeepSpeed does so where a norm is not finite, and is told so of one above `largest`."""
        self.largest = largest
        self.supervised.step()
        return self._norm

    def _group_norms(self) -> list[Tensor]:
        """Of the optimiser's groups, before clipping (stages 1 and 2)."""
        z = self.zero
        if z.cpu_offload:
            return [z.complete_grad_norm_calculation_for_cpu_offload(z.params_in_partition[i]) for i in range(len(z.bit16_groups))]
        return [z.get_grad_norm_direct(z.averaged_gradients[i], z.params_in_partition[i]) for i in range(len(z.bit16_groups))]

    def _judged(self, groups: Any, norms: list[Any]) -> list[Tensor]:
        """Take note of the norms; in place of ones that are too large, what DeepSpeed leaves a step out for.  One number for stages 1 and 2."""
        values = [torch.as_tensor(n, dtype=torch.float32, device=self.device) for n in norms]
        values = [torch.where(n.isfinite() & (n >= 0), n, math.inf) for n in values]  # DeepSpeed's -1
        parts: dict[str, list[Tensor]] = {}
        for group, norm in zip(groups, values, strict=True):
            parts.setdefault(self.optimizer.param_groups[group]["part"], []).append(norm)
        self.norms = {part: torch.stack(of).square().sum().sqrt() for part, of in parts.items()}
        self._norm = torch.stack(values).square().sum().sqrt()
        if not float(self._norm) <= self.largest:
            values = [torch.full_like(n, math.inf) for n in values]
        return values if self.stage == 3 else [torch.stack(values).square().sum().sqrt()]

    # ------------------------------------------------------------------------------------------ fragments

    def _fragment(self, parameter: Any) -> Tensor:
        """A piece of the float32 masters."""
        return self._cut(parameter, self._flat(parameter))

    def slots(self, name: str) -> dict[str, Tensor]:
        """Pieces of the optimiser's state, which holds one flat tensor for many parameters."""
        p = self.trained[name]
        flat = self._flat(p)
        if not self.optimizer.state[flat]:
            self.optimizer.state[flat] = empty_slots(flat.detach())
        return {slot: value if slot == "step" else self._cut(p, value) for slot, value in self.optimizer.state[flat].items()}

    def _flat(self, p: Any) -> Tensor:
        """The flat float32 tensor that holds this process's piece of a parameter."""
        if self.stage == 3:
            return self.zero.fp32_partitioned_groups_flat[self.zero.grad_position[self.zero.get_param_id(p)][0]]
        return self.zero.single_partition_of_fp32_groups[self._group_of[id(p)]]

    def _cut(self, p: Any, flat: Tensor) -> Tensor:
        """A parameter's stretch of its flat tensor, or of one of the same shape that goes with it."""
        flat = flat.detach()
        if self.stage == 3:
            _, start, count = self.zero.grad_position[self.zero.get_param_id(p)]
            return flat.narrow(0, int(start), int(count))
        mapping = p._hp_mapping
        return flat[:0] if mapping is None else flat.narrow(0, mapping.hp_fragment_address.start, mapping.hp_fragment_address.numel)

    def whole(self, name: str, fragment: Tensor) -> Tensor:
        """A whole tensor from the pieces of all processes."""
        p = self.trained[name]
        if self.stage == 3:
            return self.zero._fp32_state_allgather(p, fragment.to(self.device))
        out = torch.zeros(p.numel(), dtype=torch.float32, device=self.device)
        if p._hp_mapping is not None:
            out.narrow(0, p._hp_mapping.lp_fragment_address.start, p._hp_mapping.lp_fragment_address.numel).copy_(fragment)
        dist.all_reduce(out)
        return out.view(p.shape)

    def whole_parameter(self, parameter: Any) -> Tensor:
        """A parameter as it computes, whole."""
        if self.stage != 3:
            return parameter.detach()
        with self.deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()

    def piece(self, name: str, whole: Tensor) -> Tensor:
        """This process's piece of a whole tensor."""
        p = self.trained[name]
        flat = whole.flatten()
        if self.stage == 3:
            count = int(self.zero.grad_position[self.zero.get_param_id(p)][2])
            return nn.functional.pad(flat, (0, count * self.world - len(flat))).narrow(0, count * self.rank, count)
        mapping = p._hp_mapping
        return flat[:0] if mapping is None else flat.narrow(0, mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel)

    @torch.no_grad()
    def publish(self) -> None:
        """Masters to the weights that compute."""
        z = self.zero
        if self.stage != 3:
            z.update_lp_params()
            return
        z._partition_all_parameters()
        for group in range(len(z.fp16_groups)):
            z._reassign_or_swap_out_partitioned_parameters(group)
        if z.persistent_parameters:
            z.persistent_parameters[0].all_gather(z.persistent_parameters)

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        """Whole weights, and for as long none of the hooks that let them go after use."""
        if self.stage != 3:
            yield
            return
        from deepspeed.runtime.zero.stage3 import unwrap_model_for_generation

        with unwrap_model_for_generation(self.supervised):
            yield


# ------------------------------------------------------------------------------------------------ the JSON file


def read_json(path: Path) -> dict[str, Any]:
    """A DeepSpeed config.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not JSON, without ZeRO, or with a section that a run's own config decides (named).
    """
    if not path.is_file():
        raise FileNotFoundError(f"training.engine.deepspeed: no file {path}; there are zero1, zero2, zero3, zero2_offload and zero3_offload.json in configs/deepspeed")
    try:
        tree = json.loads(path.read_text())
        stage = tree["zero_optimization"]["stage"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no DeepSpeed config with zero_optimization.stage ({type(error).__name__}: {error}); start from configs/deepspeed/zero2.json") from error
    if stage not in (1, 2, 3):
        raise ValueError(f"{path} has zero_optimization.stage {stage!r}; expected 1, 2 or 3, or training.engine.kind=ddp for none")
    for section, own in OURS.items():
        if tree.get(section) and tree[section] != "auto" and (not isinstance(tree[section], dict) or tree[section].get("enabled", True) not in (False, "auto")):
            raise ValueError(f"{path} has a section {section!r}, which this run takes from {own}; delete it there")
    return tree


def filled(tree: dict[str, Any], config: Config, world: int) -> dict[str, Any]:
    """The file with what the run's config says.

    Raises:
        ValueError: the file says something else.
    """
    t = config.training
    ours = {
        "train_batch_size": t.batch_size,
        "train_micro_batch_size_per_gpu": t.batch_size // world // t.accumulate,
        "gradient_accumulation_steps": t.accumulate,
        "gradient_clipping": t.grad_clip,
    }
    for name, value in ours.items():
        if tree.get(name, "auto") not in ("auto", value):
            raise ValueError(f"training.engine.deepspeed: the file says {name} {tree[name]!r}, and this run's config {value!r}; write \"auto\" there")
    rest = {k: v for k, v in tree.items() if k not in OURS and v != "auto"}
    return {**rest, **ours, "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}


def _import(device: torch.device) -> Any:
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when it is imported; else it looks for other devices
    try:
        import deepspeed
    except ImportError as error:
        raise ImportError("training.engine asks for DeepSpeed, which is not installed; install the deepspeed extra: pip install 'wam[deepspeed]'") from error
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else the first run on a CPU compiles for minutes
    found = deepspeed.accelerator.get_accelerator()._name
    if found != device.type:
        raise RuntimeError(f"DeepSpeed computes on {found!r}, this run on {device.type!r}; set DS_ACCELERATOR={device.type} before starting")
    return deepspeed
