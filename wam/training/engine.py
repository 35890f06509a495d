"""What lies between a loss and the weights: one process, or many that act as one.

The loop knows one interface and never how many processes there are, nor who holds which weights:

    forward(batch, drawn, last)   errors of this process's samples     trained_tensors(), optimizer_state(), load()
    backward(loss)                gradients, shared after the last     whole tensors by name: other processes, other shards
    step(largest) -> norm         clip, update, forget                 showing(ema)   the model with its average, whole
    sum(tensor)                   over all processes                   norms          of each part's gradient, after a step

    single     one process                                      ddp        every process holds everything
    deepspeed  ZeRO 1, 2 or 3, with offload, by a JSON file      fsdp2      weights, gradients and optimiser state in shards

What engines have in common is told in *fragments*: of every float32 parameter that trains, the piece that this process updates.  The
optimiser's state and the EMA are fragments of the same shape, so what is gathered, saved, averaged and restored needs no knowledge
of an engine beyond `fragments`, `whole`, `piece` and `publish`.

A step whose gradient norm is not finite, or too large, changes nothing: whoever called decides what that means.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from wam.config import Config
from wam.model.lora import has_lora, trainable
from wam.training.groups import make_optimizer
from wam.training.launch import Launch, join, read_launch

if TYPE_CHECKING:
    from wam.training.ema import Ema
    from wam.training.objective import Drawn, Errors

SLOTS = ("step", "exp_avg", "exp_avg_sq")  # what AdamW remembers of a parameter


class Engine:
    """One process: everything is whole, and here.

    Attributes:
        rank, world: this process among all, from 0; and how many there are.
        device: where this process computes.
        model, optimizer: as prepared; learning rates are set in `optimizer.param_groups`.
        trained: the parameters that train, by name.
        norms: the norm of each part's gradient at the last step, before clipping.
    """

    kind = "single"

    def __init__(self, launch: Launch):
        self.device, self.rank, self.world = launch.device, launch.rank, launch.world
        self.norms: dict[str, Tensor] = {}
        self._fragments: dict[str, Tensor] = {}
        self.optimizer: torch.optim.Optimizer

    @staticmethod
    def of(config: Config) -> Engine:
        """The engine that a config and a launcher ask for; meets the other processes.

        Raises:
            ValueError: a batch that the processes cannot share, several processes for an engine of one, or a launcher that wants another engine.
            ImportError: an engine whose package is not installed; names the extra.
        """
        launch = read_launch(os.environ)
        check_batch(config, launch.world)
        kind = choose(config, launch)
        if kind != "single":
            join(launch, timedelta(minutes=config.training.engine.timeout_minutes + 1))  # the watch, which knows who is late, speaks first
        if kind == "ddp":
            from wam.training.engine_ddp import DdpEngine

            return DdpEngine(launch)
        if kind == "fsdp2":
            from wam.training.engine_fsdp import FsdpEngine

            return FsdpEngine(launch, config.training.engine.offload)
        if kind == "deepspeed":
            from wam.training.engine_deepspeed import DeepSpeedEngine

            return DeepSpeedEngine(launch, config.training.engine.deepspeed or launch.deepspeed)
        return Engine(launch)

    @property
    def is_main(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    @property
    def build_device(self) -> torch.device:
        """Where a model is built before `prepare`: on the device, or on the host where the device may not hold all of it."""
        return self.device

    def prepare(self, model: nn.Module, supervised: nn.Module, config: Config) -> None:
        """Take over a model and the module that computes its errors (`wam.training.objective.Supervised`), and make the optimiser."""
        self.model, self.clip = model, config.training.grad_clip
        self.supervised: Any = supervised
        self.optimizer = make_optimizer(config, model)
        self.trained: dict[str, Any] = trainable(model)

    # ------------------------------------------------------------------------------------------ a step

    def forward(self, batch: dict[str, Any], drawn: Drawn, last: bool = True) -> Errors:
        """Errors of a micro-batch; gradients are shared between processes after the `last` one of a step."""
        return self.supervised(batch, drawn)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of this process's part of the loss; the whole loss is the sum of all processes' and micro-batches' parts."""
        loss.backward()

    def step(self, largest: float = math.inf) -> Tensor:
        """Clip the gradients, update the weights and forget the gradients; returns the norm before clipping.

        Where the norm is not finite or above `largest`, the gradients are forgotten and nothing is updated.
        """
        gradients = self._gradients()
        square = self._squares(gradients)
        self.norms = {part: value.sqrt() for part, value in square.items()}
        norm = torch.stack(list(square.values())).sum().sqrt()
        if bool(torch.isfinite(norm)) and float(norm) <= largest:
            torch._foreach_mul_([g for group in gradients.values() for g in group], (self.clip / (norm + 1e-6)).clamp(max=1.0))
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def sum(self, tensor: Tensor) -> Tensor:
        """A tensor summed over all processes; wherever it was."""
        return tensor

    def close(self) -> None:
        """Leave the other processes."""

    def _gradients(self) -> dict[str, list[Tensor]]:
        """Gradients that this process holds, by part; zeros where nothing supervised was reached, as for every engine."""
        out: dict[str, list[Tensor]] = {}
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
                out.setdefault(group["part"], []).append(self._local(p.grad))
        return out

    def _squares(self, gradients: dict[str, list[Tensor]]) -> dict[str, Tensor]:
        """Squared norms by part."""
        return {part: torch.stack(torch._foreach_norm(tensors)).square().sum() for part, tensors in gradients.items()}

    def _local(self, tensor: Tensor) -> Tensor:
        """What of a parameter or gradient is in this process."""
        return tensor

    # ------------------------------------------------------------------------------------------ fragments

    def fragments(self) -> dict[str, Tensor]:
        """By name, the piece of every float32 parameter that this process updates; writing into them is followed by `publish`."""
        if not self._fragments:
            self._fragments = {name: self._fragment(p) for name, p in self.trained.items()}
        return self._fragments

    def _fragment(self, parameter: Any) -> Tensor:
        return self._local(parameter.detach())

    def slots(self, name: str) -> dict[str, Tensor]:
        """What the optimiser remembers of a parameter, in fragments; made where there is nothing yet."""
        parameter = self.trained[name]
        if not self.optimizer.state[parameter]:
            self.optimizer.state[parameter] = empty_slots(parameter.detach())
        return {slot: self._local(value) for slot, value in self.optimizer.state[parameter].items()}

    def whole(self, name: str, fragment: Tensor) -> Tensor:
        """A whole tensor from the fragments of all processes, which call this together."""
        return fragment

    def piece(self, name: str, whole: Tensor) -> Tensor:
        """This process's fragment of a whole tensor."""
        return whole

    def publish(self) -> None:
        """Let the weights that compute follow the fragments."""

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        """The model's weights are whole here, and its methods may be called one by one.  All processes enter and leave together."""
        yield

    @contextlib.contextmanager
    def showing(self, ema: Ema) -> Iterator[None]:
        """As `gathered`, with the averaged weights in place of the trained ones."""
        self._exchange(ema)
        try:
            with self.gathered():
                yield
        finally:
            self._exchange(ema)

    @torch.no_grad()
    def _exchange(self, ema: Ema) -> None:
        if not ema.decay:
            return
        for name, fragment in self.fragments().items():
            own = fragment.clone()
            fragment.copy_(ema.shadow[name])
            ema.shadow[name].copy_(own)
        self.publish()

    # ------------------------------------------------------------------------------------------ whole tensors, by name

    def trained_tensors(self) -> Mapping[str, Tensor]:
        """The parameters that train, whole, float32, by name; each is gathered when it is asked for, by all processes together."""
        return Gathered(self, self.fragments())

    def optimizer_state(self) -> Mapping[str, Tensor]:
        """What the optimiser remembers, whole, as `<slot>.<parameter>`; gathered likewise.  Empty before the first step."""
        if not any(self.optimizer.state.values()):
            return {}
        return Gathered(self, {f"{slot}.{name}": value for name in self.trained for slot, value in self.slots(name).items()})

    def weights(self, ema: Ema) -> dict[str, Tensor]:
        """What a policy is saved with, whole, on the host, by name: averages, and what does not train and is no adapter's base.

        All processes call this together; it is there on the main one, and empty elsewhere.
        """
        averages, out, lora = ema.state() or self.trained_tensors(), {}, has_lora(self.model)
        for name, parameter in self.model.named_parameters():
            if name not in averages and lora and name.startswith("backbone."):
                continue
            whole = averages[name] if name in averages else self.whole_parameter(parameter)
            if self.is_main:
                out[name] = whole.detach().cpu()
        return out

    def whole_parameter(self, parameter: nn.Parameter) -> Tensor:
        """A parameter as it computes, whole; all processes call this together."""
        return parameter.detach()

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]) -> None:
        """Put back what `trained_tensors` and `optimizer_state` gave, from any engine and any number of processes."""
        for name, fragment in self.fragments().items():
            fragment.copy_(self.piece(name, tensors[name].to(self.device)))
            if f"{SLOTS[0]}.{name}" in optimizer:
                for slot, value in self.slots(name).items():
                    given = optimizer[f"{slot}.{name}"].to(self.device)
                    value.copy_(given if slot == "step" else self.piece(name, given))
        self.publish()


class Gathered(Mapping[str, Tensor]):
    """Whole tensors, each gathered when it is asked for; `<slot>.<parameter>` is gathered as the parameter is."""

    def __init__(self, engine: Engine, fragments: dict[str, Tensor]):
        self.engine, self._fragments = engine, fragments

    def __getitem__(self, name: str) -> Tensor:
        slot, _, parameter = name.partition(".")
        fragment = self._fragments[name]
        return fragment.clone() if slot == "step" else self.engine.whole(parameter if slot in SLOTS else name, fragment)

    def __iter__(self) -> Iterator[str]:
        return iter(self._fragments)

    def __len__(self) -> int:
        return len(self._fragments)


def empty_slots(like: Tensor) -> dict[str, Tensor]:
    """AdamW's state of a tensor before its first step, as its fused form keeps it."""
    return {"step": torch.zeros((), dtype=torch.float32, device=like.device), "exp_avg": torch.zeros_like(like), "exp_avg_sq": torch.zeros_like(like)}


def choose(config: Config, launch: Launch) -> str:
    """Which engine: the config's, or else the launcher's, or else what the number of processes asks for.

    Raises:
        ValueError: they contradict one another.
    """
    e = config.training.engine
    kind = e.kind
    if kind == "auto":
        kind = launch.kind or ("deepspeed" if e.deepspeed else "ddp" if launch.world > 1 else "single")  # type: ignore[assignment]
    elif launch.kind is not None and launch.kind != kind:
        raise ValueError(f"training.engine.kind is {kind!r}, but accelerate was configured for {launch.kind!r}; set training.engine.kind=auto, or launch with another configs/accelerate/*.yaml")
    if kind == "single" and launch.world > 1:
        raise ValueError(f"training.engine.kind is 'single', but {launch.world} processes were started; start one, or set it to auto, ddp, deepspeed or fsdp2")
    if kind == "deepspeed" and e.deepspeed is None and launch.deepspeed is None:
        raise ValueError("training.engine.kind is 'deepspeed', but nothing names a DeepSpeed JSON; set training.engine.deepspeed=configs/deepspeed/zero2.json")
    return kind


def check_batch(config: Config, world: int) -> None:
    """Refuse a batch that processes and micro-batches cannot share.

    Raises:
        ValueError: with the arithmetic.
    """
    t = config.training
    parts = world * t.accumulate
    if t.batch_size % parts:
        below, above = t.batch_size // parts * parts, -(-t.batch_size // parts) * parts
        raise ValueError(
            f"training.batch_size {t.batch_size} is the whole batch of a step, which {world} process{'es' if world > 1 else ''} x {t.accumulate} micro-batches (training.accumulate) cannot share: "
            f"{t.batch_size} / ({world} x {t.accumulate}) is not whole; use {f'{below} or ' if below else ''}{above}"
        )
