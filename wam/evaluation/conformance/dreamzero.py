"""DreamZero's cases: video and actions denoised together over blocks, each seeing the other, from a cache of clean video.

    train/*, objective/*                  a window of all blocks, the noisy first frame predicted too; losses, gradients by released name
    infer_{mask}/*, infer/*               block by block against the cache, on the training window's own noisy inputs
    sample/{mask}_{full|skip}{n}/chunk{c} a plan: UniPC, guidance on video, every step evaluated or n of them
    img_emb/*, clip{width}/*              the image branch; the latter with weights that are drawn again by the case's recipe

Mask `trainmask` is the training table; `released` also lets the state see its whole surroundings, as the release's cached inference does.
Its cache holds the last `local_attn_size` latent frames and lets the first one go like any other; in training nothing is forgotten.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from wam.config import Config, RelationsConfig, SamplingConfig
from wam.convert import dreamzero
from wam.evaluation.conformance.build import build, gradient_norms, outside
from wam.evaluation.conformance.case import Case
from wam.evaluation.conformance.recipe import wide_clip
from wam.evaluation.conformance.stages import Plan, Stage, group
from wam.flow import TIMESTEPS, add_noise, level_table, velocity_target
from wam.model.cache import KVCache
from wam.model.conditions import Conditions
from wam.model.sampling import Noise, Situation, Step, sample
from wam.model.wam import Noisy, Window, WorldActionModel
from wam.relations import Mode, Reach, Relations, dense_masks
from wam.solvers import PUBLISHED, make_grid
from wam.timeline import FIRST_BLOCK, Kind
from wam.training.noise import level_weights
from wam.training.objective import Losses, action_errors, video_errors

NAME = "dreamzero"
MODE = "joint_mutual"
RELEASED = {"S->H": "all", "S->Vc": "<", "S->V": "=", "S->A": "="}  # what the release's cached inference opens to the state
INFER = r"infer_(released|trainmask)/"
SAMPLE = r"sample/(released|trainmask)_(full|skip)(\d+)/chunk(\d+)/"
STEPS = 16  # of the release


@dataclass(frozen=True)
class Setup:
    """A case with its network; `clip` is what the image branch is given."""

    case: Case
    model: WorldActionModel
    clip: Tensor

    def mode(self, mask: str) -> Mode:
        """The table in training, or of the release's cached inference."""
        cells = self.model.config.relations.cells | (RELEASED if mask == "released" else {})
        return Relations(RelationsConfig(cells)).mode(MODE)

    @property
    def window(self) -> int | None:
        """Latent frames that the release's cache holds; None: all."""
        frames = int(self.case.spec.get("local_attn_size", -1))
        return frames if frames > 0 else None

    @property
    def table(self) -> Tensor:
        """(entries,) float32: timesteps of the training table."""
        levels = self.model.config.noise.video
        return TIMESTEPS * level_table(levels.shift, levels.table or 1000)


def recognises(spec: dict[str, Any]) -> bool:
    """Is this a case of DreamZero?"""
    return isinstance(spec.get("config"), dict) and "num_frame_per_block" in spec["config"]


def prepare(case: Case) -> Plan:
    """The network of a case, and its stages.

    Raises:
        ValueError: sizes that this network does not have, or weights that do not fit.
    """
    config = _config(case, {name: tuple(weight.shape) for name, weight in case.weights.items()})
    model, unused = build(config, case.weights, dreamzero.KEYS, str(case.path))
    setup = Setup(case, model, case.input("clip_feature"))

    def key(name: str) -> str | None:
        found = re.match(rf"train/|objective/|img_emb/|infer/|{INFER}|{SAMPLE}|sample/timesteps$|clip\d+/", name)
        return "infer_trainmask/" if found and found.group() == "infer/" else found and found.group()

    return Plan(NAME, tuple(Stage(names, partial(_stage, setup, prefix)) for prefix, names in group(case.outputs, key).items()), unused)


def _config(case: Case, shapes: dict[str, tuple[int, ...]]) -> Config:
    settings = case.field(dict, "config")
    channels, size = case.field(int, "axes", "C"), (case.field(int, "axes", "H"), case.field(int, "axes", "W"))
    blocks, frames = case.field(int, "axes", "N_blocks"), case.field(int, "axes", "F")
    if frames != 1 + blocks * case.field(int, "config", "num_frame_per_block"):
        raise ValueError(f"{case.path}: axes.F is {frames}; expected 1 + N_blocks x num_frame_per_block: a first frame and {blocks} blocks")
    around = outside(channels, size, case.field(int, "config", "text_dim"), case.field(int, "config", "text_len"))
    states = case.field(int, "config", "num_state_per_block")
    timeline = {"blocks": blocks, "history": blocks, "frame_stride": None, "states_per_block": states}
    return dreamzero.model_config(shapes, settings, {**around, "image": {"kind": "none"}, "timeline": timeline}, str(case.path))


def _stage(setup: Setup, prefix: str) -> dict[str, Tensor]:
    """The outputs under one prefix."""
    if infer := re.match(INFER, prefix):
        return _infer(setup, infer[1])
    if plan := re.match(SAMPLE, prefix):
        return _sample(setup, prefix, plan[1], plan[2] == "full", int(plan[3]), int(plan[4]))
    if prefix == "sample/timesteps":
        steps = setup.case.outputs[prefix].shape[0]
        return {prefix: make_grid("unipc", steps, setup.model.config.noise.video.shift).timesteps}
    if prefix == "img_emb/":
        image = _conditions(setup).video.image_BMD
        return {} if image is None else {"img_emb/clip_tokens": image}
    return {"train/": _train, "objective/": _objective}.get(prefix, partial(_wide, width=int(re.sub(r"\D", "", prefix) or 0)))(setup)


# ------------------------------------------------------------------------------------------------ training


def _conditions(setup: Setup, names: tuple[str, ...] = ("text_context",)) -> Conditions:
    """Text, image and first frame; with two texts, rows are two halves."""
    model, times = setup.model, len(names)
    text = torch.cat([setup.case.input(name) for name in names])
    conditions = model.embed_text(text, torch.arange(len(text)))
    conditions = model.with_image(conditions, torch.cat([setup.clip] * times))
    return conditions.with_first_frame(torch.cat([setup.case.input("y")] * times)) if model.config.model.first_frame == "concat" else conditions


def _robot(rows: int) -> Tensor:
    return torch.zeros(rows, dtype=torch.int64)


def _window(setup: Setup, noisy: Tensor, noisy_actions: Tensor, t_BF: Tensor, t_BT: Tensor) -> Window:
    given = setup.case.input
    clean = given("clean_latents")
    return Window(clean, noisy, given("actions"), noisy_actions, torch.zeros(clean.shape[0], clean.shape[2]), t_BF, t_BT, _robot(len(clean)), given("state"))


def _forward(setup: Setup, window: Window) -> tuple[Tensor, Tensor]:
    model = setup.model
    layout = model.training_layout(model.config.timeline.blocks)
    mask = dense_masks([setup.mode("trainmask").table], layout, Reach.of(model.config.timeline)).unsqueeze(1)
    video, action = model(window, _conditions(setup), mask)
    return video, action


@torch.no_grad()
def _train(setup: Setup) -> dict[str, Tensor]:
    """The training forward on the stored noisy inputs."""
    given = setup.case.input
    video, action = _forward(setup, _window(setup, given("noisy_latents"), given("noisy_actions"), given("t_frame"), given("t_action")))
    return {"train/video_velocity": video, "train/action_velocity": action}


def _objective(setup: Setup) -> dict[str, Tensor]:
    """From the drawn table indices to losses and gradients."""
    given, model, t = setup.case.input, setup.model, setup.model.config.timeline
    index_BF = given("timestep_id_raw").long()
    first_of_block = index_BF[:, 1 :: t.latents_per_block]
    index_BF = torch.cat([index_BF[:, :1], first_of_block.repeat_interleave(t.latents_per_block, dim=1)], dim=1)
    t_BF, t_BT = setup.table[index_BF], setup.table[first_of_block.repeat_interleave(t.actions_per_block, dim=1)]
    noisy = add_noise(given("clean_latents"), given("noise_video"), t_BF[:, None, :, None, None] / TIMESTEPS)
    noisy_actions = add_noise(given("actions"), given("noise_action"), t_BT[..., None] / TIMESTEPS)
    window = _window(setup, noisy, noisy_actions, t_BF, t_BT)
    video, action = _forward(setup, window)
    losses = _losses(setup, window, video, action)
    loss = losses.video() + losses.action()
    return {
        "objective/timestep_frame": t_BF,
        "objective/timestep_action": t_BT,
        "objective/noisy_latents": noisy,
        "objective/noisy_actions": noisy_actions,
        "objective/video_velocity": video,
        "objective/action_velocity": action,
        "objective/loss": loss.reshape(1),
        "objective/dynamics_loss": losses.video().reshape(1),
        "objective/action_loss": losses.action().reshape(1),
        "objective/grad_l2": gradient_norms(model, sorted(setup.case.weights), dreamzero.KEYS, loss),
    }


def _losses(setup: Setup, window: Window, video: Tensor, action: Tensor) -> Losses:
    given, config = setup.case.input, setup.model.config
    weights = (level_weights(config.noise.video, window.video_t_BF / TIMESTEPS), level_weights(config.noise.action, window.action_t_BT / TIMESTEPS))
    seen = given("action_mask") * given("has_real_action").view(-1, 1, 1)
    return Losses(
        [MODE] * len(video),
        video_errors(video, velocity_target(given("clean_latents"), given("noise_video")), weights[0], torch.ones_like(weights[0])),
        action_errors(action, velocity_target(given("actions"), given("noise_action")), weights[1], seen),
        config.training.reduction,
    )


# ------------------------------------------------------------------------------------------------ inference


def _block(x: Tensor, block: int, size: int, axis: int, offset: int = 0) -> Tensor:
    return x.narrow(axis, offset + block * size, size)


@torch.no_grad()
def _infer(setup: Setup, mask: str) -> dict[str, Tensor]:
    """Block by block: noisy tokens against the cache, then the block's clean video into it."""
    given, model, t = setup.case.input, setup.model, setup.model.config.timeline
    k, A, table = t.latents_per_block, t.actions_per_block, setup.mode(mask).table
    clean, state = given("clean_latents"), given("state")
    batch, states = len(clean), t.states_per_block
    conditions, cache, robot = model.prepare(_conditions(setup)), model.new_cache(batch), _robot(batch)
    model.prefill(cache, table, Kind.H, clean[:, :, :1], [FIRST_BLOCK] * batch, conditions, robot)
    out: dict[str, Tensor] = {}
    videos, actions = [], []
    for block in range(t.blocks):
        if block > 0:
            _forget(setup, cache, block - 1)
            model.prefill(cache, table, Kind.VC, _block(clean, block - 1, k, 2, 1), [block - 1] * batch, conditions, robot)
        if block == t.blocks - 1:
            out |= _cached(cache, table, block)
        _forget(setup, cache, block)
        noisy = Noisy(
            _block(given("noisy_latents"), block, k, 2, 1),
            _block(given("t_frame"), block, k, 1, 1),
            _block(given("noisy_actions"), block, A, 1),
            _block(given("t_action"), block, A, 1),
            _block(state, block, states, 1),
        )
        view = model.view(cache, table, (Kind.V, Kind.A), [block] * batch)
        video, action = model.denoise(view, noisy, conditions, robot)
        assert video is not None and action is not None
        videos.append(video)
        actions.append(action)
    return out | {f"infer_{mask}/video_velocity": torch.cat(videos, dim=2), f"infer_{mask}/action_velocity": torch.cat(actions, dim=1)}


def _forget(setup: Setup, cache: KVCache, block: int) -> None:
    """What a block no longer sees, its own frames counted in."""
    if setup.window is not None:
        cache.forget_before(setup.model.clock.frames(block)[-1] + 1 - setup.window)


def _cached(cache: KVCache, table: Any, block: int) -> dict[str, Tensor]:
    """What noisy video of the last block sees of the cache; the same under either mask, as only clean video writes it."""
    seen = cache.read(cache.visible(table, Kind.V, [block] * cache.batch), own=0)
    layers = {"first": 0, "last": -1}
    return {f"infer/kv_cache_{name}_layer": torch.stack([seen.keys[layer], seen.values[layer]]) for name, layer in layers.items()}


@torch.no_grad()
def _sample(setup: Setup, prefix: str, mask: str, full: bool, number: int, chunk: int) -> dict[str, Tensor]:
    """The plan of one chunk, after the first frame and the clean video of the chunks before."""
    given, model, t, mode = setup.case.input, setup.model, setup.model.config.timeline, setup.mode(mask)
    start = model.clock.frames(chunk)[0]
    if setup.window is not None and start >= setup.window:
        raise ValueError(f"chunk {chunk} begins at frame {start}, by when the release, with local_attn_size {setup.window}, has begun anew from a frame that the case does not name")
    clean, state = given("clean_latents"), given("state")
    batch, states = len(clean), t.states_per_block
    rows, robot = 2 * batch, _robot(2 * batch)
    conditions, cache = model.prepare(_conditions(setup, ("text_context", "text_context_neg"))), model.new_cache(rows)
    for block in range(chunk + 1):
        frames = clean[:, :, :1] if block == 0 else _block(clean, block - 1, t.latents_per_block, 2, 1)
        model.prefill(cache, mode.table, Kind.H if block == 0 else Kind.VC, torch.cat([frames] * 2), [block - 1] * rows, conditions, robot)
    now = torch.cat([_block(state, chunk, states, 1)] * 2)
    at = Situation(cache, [chunk] * rows, conditions, robot, state_BnS=now, guided=True)
    taken: list[Step] = []
    plan = sample(model, mode, at, Noise(given("sample_noise_action"), given("sample_noise_video")), _how(setup, full, number), watch=taken.append)
    assert plan.video_BCFHW is not None and plan.action_BTA is not None
    out = {"video": plan.video_BCFHW, "action": plan.action_BTA}
    out["video_steps"] = torch.stack([x for step in taken if (x := step.sample.video_BCFHW) is not None])
    out["action_steps"] = torch.stack([x for step in taken if (x := step.sample.action_BTA) is not None])
    for step in taken:
        assert step.video_velocity is not None and step.action_velocity is not None
        out |= {f"video_velocity_step{step.index}": step.video_velocity, f"action_velocity_step{step.index}": step.action_velocity}
    return {prefix + name: tensor for name, tensor in out.items()}


def _how(setup: Setup, full: bool, number: int) -> SamplingConfig:
    """`full{n}` evaluates each of n steps, `skip{n}` n of them; the release evaluates all of its 16 where it has no mask for that number."""
    s, grid = setup.model.config.sampling, setup.case.outputs.get("sample/timesteps")
    steps = number if full else STEPS if grid is None else len(grid)
    return replace(s, steps=steps, reuse="none" if full or (steps == STEPS and number not in PUBLISHED) else "mask", evaluations=number)


# ------------------------------------------------------------------------------------------------ the image branch at another width


def _wide(setup: Setup, width: int) -> dict[str, Tensor]:
    """Training and cached inference again, with the image branch's weights and input of another width drawn by the recipe."""
    weights, clip = wide_clip(setup.case, width)
    model, _ = build(_config(setup.case, {name: tuple(weight.shape) for name, weight in weights.items()}), weights, dreamzero.KEYS, str(setup.case.path))
    wide = Setup(setup.case, model, clip)
    out = _train(wide) | _infer(wide, "released") | _infer(wide, "trainmask")
    return {f"clip{width}/{name.replace('/', '_')}": tensor for name, tensor in out.items()}
