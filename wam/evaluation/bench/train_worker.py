"""One process of `wam bench train`, started as `python -m wam.evaluation.bench.train_worker REQUEST.json`: some steps, timed and weighed.

    data | draw, forward | backward | update, average         every step, each with the device waited for

What a process holds is read off the tensors themselves, by storage, so views and buckets count once:

    weights     what the model computes with             masters    float32 copies that are updated, where those are apart
    moments     of AdamW                                 average    the EMA
    gradients   as the backward pass leaves them: parameters' own, ZeRO's shares (its stage 1 has them whole only while that pass runs)
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wam.codec.codec import make_image
from wam.config import Config, from_dict
from wam.data.mixture import training_data
from wam.data.sampler import make_loader
from wam.files import write_json_atomic
from wam.training.build import build_model, codec_for, computes_in_bf16, text_for
from wam.training.draws import Draws
from wam.training.ema import Ema
from wam.training.engine import Engine
from wam.training.groups import freeze, set_rates
from wam.training.objective import Objective, Supervised

PHASES = ("data", "forward", "backward", "update")
Bytes = dict[int, int]  # a storage's address to its size


class Step:
    """A training step in phases, as the loop makes it."""

    def __init__(self, config: Config):
        self.config = config
        self.data = training_data(config)
        self.engine = Engine.of(config)
        codec, image = codec_for(config, self.data).to(self.engine.device), make_image(config)
        model = build_model(config, str(self.engine.build_device), text_for(config, self.data))
        freeze(config, model)
        self.objective = Objective(config, model, codec, None if image is None else image.to(self.engine.device), self.engine.device)
        autocast = torch.autocast(self.engine.device.type, torch.bfloat16, enabled=computes_in_bf16(config, self.engine.device))
        self.parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self.model, self.number = model, 0
        model.train()
        self.engine.prepare(model, Supervised(self.objective, autocast), config)
        self.ema = Ema(self.engine, config.training.ema_decay)
        sampler = self.data.sampler(config.training.batch_size, config.training.seed)
        self.loader = iter(make_loader(self.data.windows, sampler, config.data.workers, 0, self.engine.rank, self.engine.world))

    def make(self) -> tuple[dict[str, float], int]:
        """One step: seconds by phase, and the bytes of gradients."""
        t, engine = self.config.training, self.engine
        set_rates(t, engine.optimizer, self.number, 0.0)
        engine.sum(torch.zeros(()))  # all begin together
        times, clock = {}, _Clock(engine.device)
        batch: Any = next(self.loader)
        times["data"] = clock.lap()
        each = t.batch_size // engine.world
        drawn = self.objective.draw(batch, Draws.at(t.seed, self.number, range(engine.rank * each, (engine.rank + 1) * each)))
        denominator = engine.sum(torch.stack([part.denominator(t.reduction).double() for part in drawn.counts()])).clamp_min(1).float().to(engine.device)
        losses = self.objective.assemble(drawn, engine.forward(batch, drawn))
        share = torch.stack([part.total(t.reduction) for part in losses.parts]) / denominator
        times["forward"] = clock.lap()
        engine.backward(share.sum())
        times["backward"] = clock.lap()
        gradients = self.gradients()
        clock.lap()
        engine.step()
        self.ema.update(self.number + 1)
        times["update"] = clock.lap()
        self.number += 1
        return times, gradients

    def gradients(self) -> int:
        """Bytes of gradients that are there now, by their elements: ZeRO keeps one that lies across two shares whole on both."""
        found = [local(p.grad) for p in self.model.parameters() if p.grad is not None]
        zero = getattr(self.engine, "zero", None)
        for shares in (getattr(zero, "averaged_gradients", None) or {}).values():
            found += [share for share in shares or () if isinstance(share, Tensor)]
        buffer = getattr(zero, "grad_partitions_flat_buffer", None)  # stage 3 keeps it
        return sum(g.numel() * g.element_size() for g in (found if buffer is None else [buffer]))

    def held(self) -> dict[str, int]:
        """Bytes of what this process keeps between steps."""
        weights = storages(piece for p in self.model.parameters() for piece in _pieces(p))
        fragments = self.engine.fragments()
        out = {"weights": weights, "masters": storages(fragments.values()), "average": storages(self.ema.shadow.values())}
        out["moments"] = storages(value for name in fragments for slot, value in self.engine.slots(name).items() if slot != "step")
        seen: set[int] = set()
        sizes = {}
        for name, found in out.items():  # a storage counts where it is met first: one engine's masters are its weights
            sizes[name] = sum(size for address, size in found.items() if address not in seen)
            seen |= found.keys()
        return sizes


class _Clock:
    """Seconds since the last lap, the device waited for."""

    def __init__(self, device: torch.device):
        self.device, self.mark = device, 0.0
        self.lap()

    def lap(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        before, self.mark = self.mark, time.perf_counter()
        return self.mark - before


def _pieces(parameter: Any) -> list[Tensor]:
    """What of a parameter is in this process: itself, its shard, or ZeRO-3's."""
    if hasattr(parameter, "ds_tensor"):
        return [parameter.ds_tensor.detach(), parameter.detach()]
    return [local(parameter.detach())]


def local(tensor: Any) -> Tensor:
    """What of a tensor is in this process."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def storages(tensors: Iterable[Tensor]) -> Bytes:
    """The storages that tensors lie in."""
    found = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.nbytes():
            found[storage.data_ptr()] = storage.nbytes()
    return found


def main(path: Path) -> None:
    """Do what a request asks for, and write what was found beside it."""
    request = json.loads(path.read_text())
    torch.set_num_threads(request["threads"])
    step = Step(from_dict(Config, request["config"]))
    made = [step.make() for _ in range(request["warmups"] + request["steps"])]
    timed = made[request["warmups"] :]
    held = {**step.held(), "gradients": max(gradients for _, gradients in timed)}
    engine = step.engine
    number = int(os.environ.get("RANK", request.get("number", 0)))
    facts = {"seconds": {phase: [times[phase] for times, _ in timed] for phase in PHASES}, "bytes": held, "parameters": step.parameters}
    facts |= {"peak_resident_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, "world": engine.world, "device": engine.device.type}
    write_json_atomic(path.with_name(f"{path.stem}-{number}.json"), facts)
    engine.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
