"""Validation on held-out episodes: the losses of every mode, and how far sampled actions are from the expert's.

The open-loop action error drives the cached path that a robot uses, block after block with the recorded past, and stands beside
two policies that know nothing: *hold* repeats the last executed action, *mean* always does the average one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from wam.model.sampling import Noise, Situation, Solver, sample
from wam.model.wam import WorldActionModel
from wam.relations import get_mode
from wam.timeline import FIRST_BLOCK, Kind
from wam.training.objective import Objective


@torch.no_grad()
def validate(objective: Objective, batches: list[dict[str, Any]], mean_action: Tensor, seed: int) -> dict[str, float]:
    """Per-mode losses `val/<mode>/<video|action>` and action errors `val/action_mse/<policy>` (normalised units)."""
    if not batches:
        return {}
    model = objective.model
    model.eval()
    out: dict[str, float] = {}
    for mode in objective.config.training.modes:
        generator = torch.Generator().manual_seed(seed)
        losses = [objective(batch, generator, mode) for batch in batches]
        for part in ("video", "action"):
            total = sum(float(getattr(x, f"{part}_sum_B").sum()) for x in losses)
            count = sum(float(getattr(x, f"{part}_count_B").sum()) for x in losses)
            if count:
                out[f"val/{mode}/{part}"] = total / count
    out |= _action_error(objective, batches, mean_action, seed)
    model.train()
    return out


def _action_error(objective: Objective, batches: list[dict[str, Any]], mean_action: Tensor, seed: int) -> dict[str, float]:
    sums = {"skip": 0.0, "hold": 0.0, "mean": 0.0}
    count = 0.0
    generator = torch.Generator().manual_seed(seed)
    steps = objective.config.timeline.actions_per_block
    for batch in batches:
        sampled = _open_loop(objective, batch, generator)
        target, executed = batch["action"], batch["executed"]
        seen = (~batch["action_is_pad"]).float()
        seen[:, :steps] = 0  # block 0 has no past action to hold
        held = executed.unflatten(1, (-1, steps))[:, :-1, -1:].expand(-1, -1, steps, -1).flatten(1, 2)
        held = torch.cat([torch.zeros_like(target[:, :steps]), held], dim=1)
        guesses = {"skip": sampled, "hold": held, "mean": mean_action.expand_as(target)}
        for name, guess in guesses.items():
            sums[name] += float(((guess - target).square().mean(-1) * seen).sum())
        count += float(seen.sum())
    return {f"val/action_mse/{name}": total / max(count, 1.0) for name, total in sums.items()}


def _open_loop(objective: Objective, batch: dict[str, Any], generator: torch.Generator) -> Tensor:
    """Actions (B, N A, .) sampled in mode `skip`, each block from the recorded past."""
    model: WorldActionModel = objective.model
    t, mode = objective.config.timeline, get_mode("skip")
    latents = objective.codec.encode(batch["frames"].to(model.device))
    state, executed = batch["state"].to(model.device), batch["executed"].to(model.device)
    size = len(state)
    embodiment = torch.full((size,), model.embodiment_index(objective.config.data.embodiment), device=model.device)
    context = model.backbone.prepare_context(model.encode_text(batch["instruction"]))
    cache = model.new_cache(size)

    def write(kind: Kind, value: Tensor, block: int) -> None:
        model.prefill(cache, mode.table, kind, value, [block] * size, context, embodiment)

    write(Kind.H, latents[:, :, :1], FIRST_BLOCK)
    out = []
    for block in range(t.blocks):
        acts, frames = slice(block * t.actions_per_block, (block + 1) * t.actions_per_block), slice(1 + block * t.latents_per_block, 1 + (block + 1) * t.latents_per_block)
        write(Kind.S, state[:, block : block + 1], block)
        noise = Noise(torch.randn(size, t.actions_per_block, executed.shape[-1], generator=generator).to(model.device), latents[:, :, 1:2])
        action = sample(model, mode, Situation(cache, [block] * size, context, embodiment), noise, Solver()).action_BTA
        assert action is not None
        out.append(action.cpu())
        write(Kind.AC, executed[:, acts], block)
        write(Kind.VC, latents[:, :, frames], block)
    return torch.cat(out, dim=1)
