"""Fast-WAM's cases: one block, a narrow expert, and three ways for actions to see video.

    train/*                     a window with its clean copy, under the variant's mask; the objective's own reduction; gradients by released name
    infer_action_{n}steps/*     first frame into the cache, then actions (base), video and actions (joint), or video and then actions (idm)
    infer_joint_{n}steps/*      the same with the video wanted too

The release predicts a velocity for the given first frame as well; the head reads it off the first frame's tokens (H).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from wam.convert import fast_wam
from wam.convert.keys import KeyMap
from wam.evaluation.conformance.build import build, gradient_norms, outside
from wam.evaluation.conformance.case import Case
from wam.evaluation.conformance.stages import Plan, Stage, group
from wam.flow import TIMESTEPS, add_noise, velocity_target
from wam.model.conditions import Conditions
from wam.model.sampling import Noise, Sample, Situation, Step, sample
from wam.model.wam import Hidden, Window, WorldActionModel
from wam.relations import Mode, Reach, dense_masks
from wam.timeline import FIRST_BLOCK, Kind
from wam.training.noise import level_weights
from wam.training.objective import Losses, action_errors, latent_padding, video_errors

NAME = "fast_wam"
MASK = "first_frame_causal"  # the first frame sees itself, other frames see all
MODES = {"base": "skip", "joint": "joint", "idm": "imagine"}


@dataclass(frozen=True)
class Setup:
    """A case with its network."""

    case: Case
    model: WorldActionModel
    keys: KeyMap
    mode: Mode


def recognises(spec: dict[str, Any]) -> bool:
    """Is this a case of Fast-WAM?"""
    return isinstance(spec.get("config"), dict) and "action_dit_config" in spec["config"]


def prepare(case: Case) -> Plan:
    """The network of a case, and its stages.

    Raises:
        ValueError: a variant or sizes that this network does not have, or weights that do not fit.
    """
    variant = case.field(str, "config", "variant")
    if variant not in MODES:
        raise ValueError(f"{case.path}: config.variant is {variant!r}; expected one of {', '.join(MODES)}")
    mask = case.spec["config"]["video_dit_config"].get("video_attention_mask_mode", MASK)
    if mask != MASK:
        raise ValueError(f"{case.path}: config.video_dit_config.video_attention_mask_mode is {mask!r}; only {MASK!r} is known here, which every release has")
    frames, h, w = (case.field(int, "axes", axis) for axis in ("T", "h", "w"))
    video = ("config", "video_dit_config")
    above = {
        **outside(case.field(int, *video, "in_dim"), (h, w), case.field(int, *video, "text_dim"), case.field(int, "axes", "L")),
        "timeline": {"latents_per_block": frames - 1, "actions_per_block": case.field(int, "axes", "Ta"), "frame_stride": None},
        "noise": {name: {"shift": case.field(float, "config", f"{name}_scheduler", "train_shift")} for name in ("video", "action")},
        "sampling": {f"{name}_shift": case.field(float, "config", f"{name}_scheduler", "infer_shift") for name in ("video", "action")},
        "model": {"eps": _eps(case)},
        "training": {f"{name}_weight": case.field(float, "config", "loss", f"lambda_{name}") for name in ("video", "action")},
    }
    shapes = {name: tuple(weight.shape) for name, weight in case.weights.items()}
    config = fast_wam.model_config(shapes, variant, case.field(int, *video, "attn_head_dim"), above)
    model, unused = build(config, case.weights, fast_wam.KEYS, str(case.path))
    setup = Setup(case, model, fast_wam.KEYS, model.relations.mode(MODES[variant]))
    return Plan(NAME, tuple(_stages(setup)), unused)


def _eps(case: Case) -> float:
    """Of both experts' norms.

    Raises:
        ValueError: the two have different ones.
    """
    video, action = (case.field(float, "config", part, "eps") for part in ("video_dit_config", "action_dit_config"))
    if video != action:
        raise ValueError(f"{case.path}: config.video_dit_config.eps is {video} and config.action_dit_config.eps is {action}; only one eps for both experts is known here")
    return video


def _stages(setup: Setup) -> list[Stage]:
    def key(name: str) -> str | None:
        found = re.match(r"train/|infer_(?:action|joint)_\d+steps/", name)
        return found.group() if found else None

    stages = []
    for prefix, names in group(setup.case.outputs, key).items():
        parts = re.match(r"infer_(action|joint)_(\d+)steps/", prefix)
        run = partial(_infer, setup, prefix, parts[1] == "joint", int(parts[2])) if parts else partial(_train, setup)
        stages.append(Stage(names, run))
    return stages


# ------------------------------------------------------------------------------------------------ training


def _conditions(setup: Setup, text: Tensor, state_BS: Tensor) -> Conditions:
    """Each row's text, and its state behind it."""
    rows = torch.arange(len(text))
    conditions = setup.model.embed_text(text, rows)
    if setup.model.state_encoder is None:
        return conditions
    return setup.model.with_state(conditions, state_BS, torch.zeros(len(text), dtype=torch.int64))


def _window(setup: Setup) -> tuple[Window, dict[str, Tensor]]:
    """The noised window, and the outputs that say what it holds."""
    given = setup.case.input
    latents, actions = given("train/latents"), given("train/actions")
    batch, frames, steps = len(latents), latents.shape[2], actions.shape[1]

    def noised(noise: Tensor, t_B: Tensor) -> tuple[Tensor, Tensor]:
        t_BF = t_B[:, None].repeat(1, frames)
        t_BF[:, 0] = 0.0  # the first frame is given
        return add_noise(latents, noise, t_BF[:, None, :, None, None] / TIMESTEPS), t_BF

    noisy, t_BF = noised(given("train/noise_video"), given("train/timestep_video"))
    clean, clean_t_BF = latents, torch.zeros(batch, frames)
    if "train/timestep_video_cond" in setup.case.inputs:
        clean, clean_t_BF = noised(given("train/noise_video_cond"), given("train/timestep_video_cond"))
    action_t_BT = given("train/timestep_action")[:, None].repeat(1, steps)
    noisy_actions = add_noise(actions, given("train/noise_action"), action_t_BT[..., None] / TIMESTEPS)
    window = Window(clean, noisy[:, :, 1:], actions, noisy_actions, clean_t_BF, t_BF[:, 1:], action_t_BT, torch.zeros(batch, dtype=torch.int64))
    return window, {"train/noisy_latents": noisy, "train/noisy_actions": noisy_actions, "train/cond_latents": clean}


def _train(setup: Setup) -> dict[str, Tensor]:
    """Forward, objective and gradients of the training window."""
    case, model, given = setup.case, setup.model, setup.case.input
    window, out = _window(setup)
    conditions = _conditions(setup, given("train/context"), given("train/proprio")[:, 0] if model.state_encoder is not None else given("train/actions")[:, 0])
    layout = model.training_layout(1)
    mask = dense_masks([setup.mode.table], layout, Reach.of(model.config.timeline)).unsqueeze(1)
    video, action = model(window, conditions, mask)
    losses = _losses(setup, window, video, action)
    loss = model.config.training.video_weight * losses.video() + model.config.training.action_weight * losses.action()
    with torch.no_grad():
        first = _first_velocity(model, model.hidden_train(window, conditions, mask, layout), out["train/noisy_latents"][:, :, :1], layout.span(Kind.H))
    return out | {
        "train/context_with_proprio": conditions.text_UTE[conditions.rows_B],
        "train/video_velocity": torch.cat([first, video], dim=2),
        "train/action_velocity": action,
        "train/loss": loss.reshape(1),
        "train/loss_video": losses.video().reshape(1),
        "train/loss_action": losses.action().reshape(1),
        "train/grad_l2": gradient_norms(model, sorted(case.weights), setup.keys, loss),
    }


def _losses(setup: Setup, window: Window, video: Tensor, action: Tensor) -> Losses:
    """The objective's errors."""
    given, config = setup.case.input, setup.model.config
    frame_pad = latent_padding(given("train/image_is_pad").bool(), config)[:, 1:]
    action_seen = ~given("train/action_is_pad").bool()
    targets = (
        velocity_target(given("train/latents"), given("train/noise_video"))[:, :, 1:],
        velocity_target(given("train/actions"), given("train/noise_action")),
    )
    weights = (level_weights(config.noise.video, window.video_t_BF / TIMESTEPS), level_weights(config.noise.action, window.action_t_BT / TIMESTEPS))
    return Losses(
        [setup.mode.name] * len(video),
        video_errors(video, targets[0], weights[0], ~frame_pad),
        action_errors(action, targets[1], weights[1], action_seen.unsqueeze(2)),
        config.training.reduction,
    )


def _first_velocity(model: WorldActionModel, hidden: Hidden, latents_BC1HW: Tensor, tokens: slice) -> Tensor:
    """What the video head says of the given first frame, at level 0."""
    return model.video_velocity(hidden, tokens, latents_BC1HW, torch.zeros(len(latents_BC1HW), 1))


# ------------------------------------------------------------------------------------------------ inference


@torch.no_grad()
def _infer(setup: Setup, prefix: str, with_video: bool, steps: int) -> dict[str, Tensor]:
    """One plan from the first frame."""
    model, given, mode = setup.model, setup.case.input, setup.mode
    first = given("infer/first_frame_latents")
    rows = torch.zeros(len(first), dtype=torch.int64)
    conditions = model.prepare(_conditions(setup, given("infer/context"), given("infer/proprio") if model.state_encoder is not None else rows[:, None]))
    cache = model.new_cache(len(first))
    hidden = model.prefill(cache, mode.table, Kind.H, first, [FIRST_BLOCK] * len(first), conditions, rows)
    at = Situation(cache, [0] * len(first), conditions, rows)
    taken: list[Step] = []
    noise = Noise(given("infer/noise_action"), given("infer/noise_video")[:, :, 1:])
    plan = sample(model, mode, at, noise, model.config.sampling.with_steps(steps), with_video=with_video, watch=taken.append)
    out = _trajectory(taken, plan, first, _first_velocity(model, hidden, first, slice(0, model.clock.patches)))
    if mode.name == "imagine" and plan.video_BCFHW is not None:
        model.prefill(cache, mode.table, Kind.VC, plan.video_BCFHW, at.blocks, conditions, rows)
    seen = cache.read(cache.visible(mode.table, Kind.A, at.blocks), own=0)
    out |= {"kv_last_layer_k": seen.keys[-1].flatten(2), "kv_last_layer_v": seen.values[-1].flatten(2)}
    return {prefix + name: tensor for name, tensor in out.items()}


def _trajectory(taken: list[Step], plan: Sample, first_BC1HW: Tensor, first_velocity: Tensor) -> dict[str, Tensor]:
    """Samples and velocities of every step; the first frame is given, and stands before the video."""
    out: dict[str, Tensor] = {}
    for name, sampled, velocity, before in (
        ("action", [s.sample.action_BTA for s in taken], [s.action_velocity for s in taken], ()),
        ("video", [s.sample.video_BCFHW for s in taken], [s.video_velocity for s in taken], (first_BC1HW, first_velocity)),
    ):
        samples = [x for x in sampled if x is not None]
        velocities = [v for v in velocity if v is not None]
        if before:
            samples = [torch.cat([before[0], x], dim=2) for x in samples]
            velocities = [torch.cat([before[1], v], dim=2) for v in velocities]
        if samples:
            out |= {name: samples[-1], f"{name}_steps": torch.stack(samples)}
        out |= {f"{name}_velocity_step{i}": v for i, v in enumerate(velocities)}
    return out
