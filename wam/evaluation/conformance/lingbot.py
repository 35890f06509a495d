"""LingBot-VA's cases: chunk by chunk, video first, then the actions that lead there, from a cache of what was observed and done.

    single/*                    one call of each stream without a cache, at any frame
    chunk{c}/*                  plan: video from noise, imagined video into the cache, actions from noise; then the real ones in its place
    cache/after_{stage}_chunk{c}/*   the released pool of slots at that moment, seen in our cache (`slots`)

Rows are the instruction and, with guidance of video or of actions, the negative one.  The release runs actions for both even where they
are not guided, so outputs of "both contexts" come from calls for both; the plan itself is `sample`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from wam.config import SamplingConfig
from wam.convert import lingbot_va
from wam.evaluation.conformance.build import build, outside
from wam.evaluation.conformance.case import Case
from wam.evaluation.conformance.slots import Pool, Segment, Update, pool_view, slot_view
from wam.evaluation.conformance.stages import Plan, Stage, group
from wam.model.cache import KVCache
from wam.model.conditions import Conditions
from wam.model.rotary import Rotary
from wam.model.sampling import Held, Noise, Situation, sample
from wam.model.wam import Hidden, Noisy, WorldActionModel
from wam.relations import Mode
from wam.solvers import make_grid
from wam.timeline import Kind

NAME = "lingbot_va"
SCALES = ("guidance_scale", "action_guidance_scale")  # above 1, the stream is guided
STREAMS = {Kind.VC: "video", Kind.AC: "action"}


def recognises(spec: dict[str, Any]) -> bool:
    """Is this a case of LingBot-VA?"""
    return isinstance(spec.get("job"), dict) and "attn_window" in spec["job"]


def prepare(case: Case) -> Plan:
    """The network of a case, and its stages.

    Raises:
        ValueError: sizes or a job that this network does not have, or weights that do not fit.
    """
    stages = []

    def key(name: str) -> str | None:
        found = re.match(r"single/|chunk\d+/|cache/after_(infer|observe)_chunk\d+/", name)
        return None if found is None else "single" if name.startswith("single/") else "chunks"

    unused: tuple[str, ...] = ()
    for kind, names in group(case.outputs, key).items():
        if kind == "single":
            frames = case.input("single/video_latents").shape[2]
            model, unused = _network(case, frames)
            stages.append(Stage(names, lambda model=model: _single(case, model)))  # type: ignore[misc]
        else:
            model, unused = _network(case, case.field(int, "job", "frame_chunk_size"))
            stages.append(Stage(names, lambda model=model, names=names: _Rollout(case, model).run(names)))  # type: ignore[misc]
    return Plan(NAME, tuple(stages), unused)


def _network(case: Case, frames: int) -> tuple[WorldActionModel, tuple[str, ...]]:
    """The network with blocks of `frames` latent frames: a call without a cache may be of another length than a chunk."""
    released, per_frame = case.field(dict, "config"), case.field(int, "job", "action_per_frame")
    channels = case.field(list, "job", "used_action_channel_ids")
    size = (case.field(int, "job", "latent_height"), case.field(int, "job", "latent_width"))
    above = {
        **outside(case.field(int, "config", "in_channels"), size, case.field(int, "config", "text_dim"), case.field(int, "job", "text_len")),
        "timeline": {"latents_per_block": frames, "actions_per_block": frames * per_frame, "frame_stride": None, "history": lingbot_va.history(case.field(int, "job", "attn_window"))},
        "data": {"embodiment": "robot"},
        "model": {"embodiments": [{"name": "robot", "state_dim": 1, "action_dim": len(channels), "action_channels": channels}]},
        "noise": {"video": {"shift": case.field(float, "job", "snr_shift")}, "action": {"shift": case.field(float, "job", "action_snr_shift")}},
    }
    config = lingbot_va.model_config(released, above)
    return build(config, case.weights, lingbot_va.keys(config.codec.channels, config.model.patch), str(case.path))


# ------------------------------------------------------------------------------------------------ the release's layouts


def _actions_in(x_BCFn1: Tensor) -> Tensor:
    """(B, channels, frames, n, 1) to (B, A, channels)."""
    return x_BCFn1.squeeze(-1).flatten(2).transpose(1, 2)


def _actions_out(x_BAC: Tensor, frames: int) -> Tensor:
    """The other way."""
    return x_BAC.transpose(1, 2).unflatten(2, (frames, -1)).unsqueeze(-1)


def _video_tokens(x_BCFHW: Tensor, patch: tuple[int, int, int]) -> Tensor:
    """Latents as the head puts them out: (B, tokens x patch, C), a token's patch in row-major order."""
    _, p, q = patch
    x = x_BCFHW.unflatten(4, (-1, q)).unflatten(3, (-1, p))  # B C F h p w q
    return x.permute(0, 2, 3, 5, 4, 6, 1).flatten(1, 5)


# ------------------------------------------------------------------------------------------------ one call without a cache


@torch.no_grad()
def _single(case: Case, model: WorldActionModel) -> dict[str, Tensor]:
    """Both streams, each alone, at an absolute frame."""
    given = case.input
    video, action = given("single/video_latents"), _actions_in(given("single/actions"))
    rows, frames = torch.arange(len(video)), video.shape[2]
    conditions, robot = model.embed_text(given("single/text"), rows), torch.zeros(len(video), dtype=torch.int64)
    action_t_BT = given("single/action_timesteps").repeat_interleave(action.shape[1] // frames, dim=1)
    parts = {Kind.V: Noisy(video_BCFHW=video, video_t_BF=given("single/video_timesteps")), Kind.A: Noisy(action_BTA=action, action_t_BT=action_t_BT)}
    out: dict[str, Tensor] = {}
    for stream, (kind, noisy) in enumerate(parts.items()):
        view = model.view(model.new_cache(len(video)), model.relations.mode("imagine").table, (kind,), [0] * len(video))
        positions = view.layout.positions_L4.clone()
        positions[:, 0] += float(given("single/frame_start")) - model.clock.frames(0)[0]
        view = replace(view, rotary=Rotary.at(positions, model.config.model.head_dim, model.device))
        name = ("video", "action")[stream]
        velocity = next(v for v in model.denoise(view, noisy, conditions, robot) if v is not None)
        out[f"single/{name}_tokens_out"] = _video_tokens(velocity, model.config.model.patch) if kind is Kind.V else velocity
        out[f"single/{name}_velocity"] = velocity if kind is Kind.V else _actions_out(velocity, frames)
        out[f"single/{name}_grid_id"] = torch.cat([positions[:, :3].T, torch.full((1, len(positions)), float(stream))]).float()
    return out


# ------------------------------------------------------------------------------------------------ chunks


def _both_contexts(case: Case) -> bool:
    """Did the release run the negative instruction too?  Its calls say so; without any in the case, its rule does: with guidance of either stream."""
    calls = [tensor.shape[0] for name, tensor in case.outputs.items() if re.match(r"chunk\d+/.*tokens_out", name)]
    return calls[0] == 2 if calls else max(case.field(float, "job", scale) for scale in SCALES) > 1


class _Rollout:
    """One episode: our cache on one side, the release's slots on the other."""

    def __init__(self, case: Case, model: WorldActionModel):
        self.case, self.model, self.mode = case, model, model.relations.mode("imagine")
        job = case.spec["job"]
        if job.get("video_exec_step", -1) != -1:
            raise ValueError(f"job.video_exec_step is {job['video_exec_step']}; only -1 is known here, video that is denoised to the end: of any other, the case does not say where its video stops and at which level it is cached")
        self.guided = _both_contexts(case)
        scales = [max(1.0, case.field(float, "job", scale)) if self.guided else 1.0 for scale in SCALES]
        self.how = SamplingConfig(steps=job["num_inference_steps"], action_steps=job["action_num_inference_steps"], guidance=scales[0], action_guidance=scales[1])
        texts = [case.input("text_emb"), *([case.input("text_emb_neg")] if self.guided else [])]
        self.rows = len(texts)
        self.robot = torch.zeros(self.rows, dtype=torch.int64)
        self.conditions: Conditions = model.prepare(model.embed_text(torch.cat(texts), torch.arange(self.rows)))
        self.cache: KVCache = model.new_cache(self.rows)
        self.tokens = {Kind.VC: model.clock.tokens(Kind.VC), Kind.AC: model.clock.tokens(Kind.AC)}
        self.pool = Pool(job["attn_window"] // 2 * sum(self.tokens.values()))
        self.predicted: list[Segment] = []
        self.out: dict[str, Tensor] = {}

    @torch.no_grad()
    def run(self, names: tuple[str, ...]) -> dict[str, Tensor]:
        """All chunks that the names speak of, in order."""
        chunks = 1 + max(int(found[1]) for name in names if (found := re.search(r"chunk(\d+)/", name)))
        for chunk in range(chunks):
            self._infer(chunk)
            self._view(f"after_infer_chunk{chunk}", names)
            if f"chunk{chunk}/observed_latents" in self.case.inputs:
                self._observe(chunk)
                self._view(f"after_observe_chunk{chunk}", names)
        return self.out

    def _held(self, chunk: int) -> Held:
        """Of the first chunk, the first frame is given, and the actions that would lead to it are zero."""
        if chunk > 0:
            return Held()
        t, c = self.model.config.timeline, self.model.config.codec.channels
        video = torch.zeros(1, c, t.latents_per_block, *self.model.latent_size)
        video[:, :, :1] = self.case.input("init_latent")
        mask_F, mask_T = torch.arange(t.latents_per_block)[None] < 1, torch.arange(t.actions_per_block)[None] < t.lead
        return Held((video, mask_F), (torch.zeros(1, t.actions_per_block, self.model.config.model.actions), mask_T))

    def _infer(self, chunk: int) -> None:
        """The plan of a chunk, and what the release writes of it as predicted."""
        model, name, given = self.model, f"chunk{chunk}", self.case.input
        held = self._held(chunk)
        noise = Noise(_actions_in(given(f"{name}/noise_action")), given(f"{name}/noise_video"))
        start_V, t_V = self._first(Kind.V, noise.video_BCFHW, held.video, 2, name)
        first = self._call(chunk, Kind.V, Noisy(video_BCFHW=start_V, video_t_BF=t_V))
        memory = self.cache.select(list(range(self.rows)))  # a plan leaves nothing of what it imagined; the release's writes follow below
        at = Situation(memory, [chunk] * self.rows, self.conditions, self.robot, held=held, guided=self.guided)
        plan = sample(model, self.mode, at, noise, self.how)
        assert plan.video_BCFHW is not None and plan.action_BTA is not None
        last = self._write(chunk, Kind.VC, plan.video_BCFHW, "predicted", self.how.steps)
        start_A, t_A = self._first(Kind.A, noise.action_BTA, held.action, 1, name)
        keep = model.action_channels(self.robot)
        first_A = self._call(chunk, Kind.A, Noisy(action_BTA=start_A if keep is None else start_A * keep, action_t_BT=t_A))
        last_A = self._write(chunk, Kind.AC, plan.action_BTA, "predicted", self.how.action_steps or self.how.steps)
        frames = model.config.timeline.latents_per_block
        self.out |= {f"{name}/video": plan.video_BCFHW, f"{name}/action": _actions_out(plan.action_BTA, frames)}
        self.out |= {f"{name}/video_tokens_out_first": first, f"{name}/video_tokens_out_last": last, f"{name}/action_tokens_out_first": first_A, f"{name}/action_tokens_out_last": last_A}

    def _first(self, kind: Kind, noise: Tensor, held: tuple[Tensor, Tensor] | None, axis: int, name: str) -> tuple[Tensor, Tensor]:
        """Where a stream starts, for every row, with its first timesteps; notes the timesteps of all its calls."""
        video, t = kind is Kind.V, self.model.config.timeline
        steps = self.how.steps if video else self.how.action_steps or self.how.steps
        shift = (self.model.config.noise.video if video else self.model.config.noise.action).shift
        grid = make_grid(self.how.solver, steps, shift).timesteps
        t_KF = torch.cat([grid, torch.zeros(1)])[:, None].repeat(1, t.latents_per_block)
        x = noise
        if held is not None:
            values, mask = held
            shape = [1] * noise.ndim
            shape[axis] = mask.shape[1]
            x = torch.where(mask.view(shape), values, noise)
            t_KF = torch.where(mask.unflatten(1, (t.latents_per_block, -1))[..., 0], 0.0, t_KF)
        self.out[f"{name}/{'video' if video else 'action'}_timesteps"] = t_KF
        per_token = t_KF[:1].repeat_interleave(noise.shape[axis] // t.latents_per_block, dim=1)
        return torch.cat([x] * self.rows), per_token.expand(self.rows, -1)

    def _call(self, chunk: int, kind: Kind, noisy: Noisy) -> Tensor:
        """One denoising call for every row, as tokens."""
        view = self.model.view(self.cache, self._mode(kind).table, (kind,), [chunk] * self.rows)
        velocity = next(v for v in self.model.denoise(view, noisy, self.conditions, self.robot) if v is not None)
        return _video_tokens(velocity, self.model.config.model.patch) if kind is Kind.V else velocity

    def _mode(self, kind: Kind) -> Mode:
        return self.model.relations.mode("video") if kind is Kind.V else self.mode

    def _observe(self, chunk: int) -> None:
        """What was really seen and done takes the place of what was predicted."""
        seen, done = self.case.input(f"chunk{chunk}/observed_latents"), self.case.input(f"chunk{chunk}/executed_actions")
        if chunk == 0:
            seen = torch.cat([self.case.input("init_latent"), seen], dim=2)
        for kind, block in self.predicted:
            self.cache.drop(kind, [block] * self.rows)
        self.predicted = []
        self.pool.free_predicted()
        self.out[f"chunk{chunk}/observe_video_tokens_out"] = self._write(chunk, Kind.VC, seen, "real", 0)
        self.out[f"chunk{chunk}/observe_action_tokens_out"] = self._write(chunk, Kind.AC, _actions_in(done), "real", 0)

    def _write(self, chunk: int, kind: Kind, value: Tensor, update: Update, calls: int) -> Tensor:
        """A segment at level 0 into both caches, for every row; `calls` denoising calls went before.  Returns the head's tokens."""
        for _ in range(calls):
            self.pool.call((kind, chunk), self.tokens[kind], "drop")
        self.pool.call((kind, chunk), self.tokens[kind], update)
        if update == "predicted":
            self.predicted.append((kind, chunk))
        value = torch.cat([value] * self.rows)
        hidden = self.model.prefill(self.cache, self.mode.table, kind, value, [chunk] * self.rows, self.conditions, self.robot)
        return self._head(kind, hidden, value)

    def _head(self, kind: Kind, hidden: Hidden, value: Tensor) -> Tensor:
        tokens = slice(0, self.tokens[kind])
        if kind is Kind.AC:
            return self.model.action_velocity(hidden, tokens, self.robot)
        velocity = self.model.video_velocity(hidden, tokens, value, torch.zeros(self.rows, value.shape[2]))
        return _video_tokens(velocity, self.model.config.model.patch)

    # -------------------------------------------------------------------------------------- the released view of the cache

    def _view(self, stage: str, names: tuple[str, ...]) -> None:
        """Slots of the first layer, and keys and values of the last, from what our cache holds."""
        held: dict[Segment, Tensor] = {}
        for kind in STREAMS:
            blocks = self.cache.blocks_BS[0][self.cache.kinds_BS[0] == int(kind)]
            for block in sorted({int(b) for b in blocks if b >= 0}):
                held[(kind, block)] = ((self.cache.kinds_BS[0] == int(kind)) & (self.cache.blocks_BS[0] == block)).nonzero().flatten()
        if any(name.startswith(f"cache/{stage}/") for name in names):
            self.out |= {f"cache/{stage}/{name}": x for name, x in slot_view(self.pool, {s: len(i) for s, i in held.items()}).items()}
        rotary = Rotary.at(self.cache.positions_BS4, self.model.config.model.head_dim, self.model.device)
        tensors: dict[str, Callable[[], Tensor]] = {"last_layer_k": lambda: rotary.rotate(self.cache.keys[-1]), "last_layer_v": lambda: self.cache.values[-1]}
        for name, read in tensors.items():
            full = f"cache/{stage}/{name}"
            if full in names:
                x = read()
                self.out[full] = pool_view(self.pool, {segment: x[:, index] for segment, index in held.items()}, tuple(self.case.outputs[full].shape))
