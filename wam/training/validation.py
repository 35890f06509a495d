"""Validation on held-out episodes: the losses of every mode, and how far sampled actions are from the expert's.

The open-loop action error drives the cached path that a robot uses, block after block with the recorded past, and stands beside
two policies that know nothing: *hold* repeats the last executed action, *mean* always does the average one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from wam.config import SamplingConfig
from wam.model.actions import channels_of, pad_states
from wam.model.sampling import Held, Noise, Situation, sample
from wam.timeline import Kind
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
            total = sum(float(getattr(x, f"{part}_part").sum_B.sum()) for x in losses)
            count = sum(float(getattr(x, f"{part}_part").count_B.sum()) for x in losses)
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
    model, config, robot = objective.model, objective.config, objective.robot
    t, mode, size = config.timeline, model.relations.mode("skip"), len(batch["state"])
    k, A = t.latents_per_block, t.actions_per_block
    latents = objective.codec.encode(batch["frames"].to(model.device))
    state, executed = pad_states(config.model, batch["state"].to(model.device)), objective.actions_of(batch, "executed")
    embodiment = torch.full((size,), model.embodiment_index(robot.name), device=model.device)
    conditions = model.prepare(objective.conditions_of(batch, state, embodiment))
    cache, before = model.new_cache(size), t.first_frame == "before"
    out = []
    for block in range(t.blocks):

        def write(kind: Kind, value: Tensor, block: int = block) -> None:
            model.prefill(cache, mode.table, kind, value, [block] * size, conditions, embodiment)

        if block == 0 and before:
            write(Kind.H, latents[:, :, :1])
        if Kind.S in model.cached_kinds:
            write(Kind.S, state[:, block : block + 1])
        noise = Noise(torch.randn(size, A, config.model.actions, generator=generator).to(model.device), latents[:, :, 1 : 1 + k])
        live = state[:, block : block + 1] if model.live_state else None
        held = Held(action=(torch.zeros_like(noise.action_BTA), torch.arange(A, device=model.device).expand(size, -1) < t.lead)) if block == 0 and t.lead else Held()
        action = sample(model, mode, Situation(cache, [block] * size, conditions, embodiment, live, held), noise, SamplingConfig()).action_BTA
        assert action is not None
        out.append(action[..., channels_of(robot)].cpu())
        write(Kind.VC, latents[:, :, list(model.clock.frames(block))])  # first: in some tables executed actions see the video they led to
        write(Kind.AC, executed[:, block * A : (block + 1) * A])
    return torch.cat(out, dim=1)
