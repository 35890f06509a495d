"""The claims about speed, each as two sides in turns: this network against diffusers' own, and its modes against each other.

    training      forward and backward of a window of L tokens      |  diffusers' model over L tokens, full attention
    step          one cached step of a block's noisy tokens         |  diffusers' forward over as many tokens alone
    growth        what a longer history adds to a step              |  what as many more keys add to a bare attention call
    session       the 50th chunk: observe, plan, commit             |  the 5th
    skip          actions alone, 10 steps                           |  video and actions, 10 steps

Both sides of the first two hold the same weights.  diffusers' side gets as many tokens as there are factors for (its sequences are boxes).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from wam.codec.linear import LinearCodec
from wam.config import Config, SamplingConfig
from wam.data.normalize import Normalizer
from wam.evaluation.bench.rows import Comparison
from wam.evaluation.bench.subject import Inputs, Memory, build_model, diffusers_twin, remember, with_timeline
from wam.evaluation.bench.timing import alternate, increase
from wam.inference.session import Session
from wam.model.attention import attention
from wam.model.sampling import Noise, Situation, sample
from wam.model.wam import TrainingMask, WorldActionModel
from wam.model.window_mask import window_mask
from wam.pretrained import Policy
from wam.relations import Mode, Reach, block_mask
from wam.timeline import Kind, Layout
from wam.training.noise import draw_modes
from wam.training.objective import needed

LONGEST_AXIS = 1024  # of diffusers' rotary table
INSTRUCTION = "open the drawer"


@dataclass(frozen=True)
class Bench:
    """How measurements are made.

    Attributes:
        repeats: rounds of two sides in turns.
        chunks: of a session, the early and the late one that are compared.
    """

    device: torch.device
    dtype: torch.dtype
    repeats: int = 9
    chunks: tuple[int, int] = (5, 50)
    history: int = 16


# ------------------------------------------------------------------------------------------------ against diffusers


def box(tokens: int) -> tuple[int, int, int]:
    """Frames, rows and columns of a box of at most `tokens` tokens, as many as possible, no axis longer than diffusers' rotary table."""
    for count in range(tokens, 0, -1):
        rows = next(r for r in range(int(count**0.5), 0, -1) if count % r == 0)
        if count // rows <= LONGEST_AXIS:
            return 1, rows, count // rows
    raise AssertionError("one token always fits")


def diffusers_call(twin: WanTransformer3DModel, inputs: Inputs, tokens: int, batch: int = 1) -> Callable[[], Tensor]:
    """diffusers' forward over a box of about `tokens` tokens, with the model's own text and image."""
    frames, rows, columns = box(tokens)
    dtype = twin.patch_embedding.weight.dtype
    _, p_h, p_w = twin.config.patch_size
    latents = inputs.normal(batch, twin.config.in_channels, frames, rows * p_h, columns * p_w).to(dtype)
    text = inputs.text().expand(batch, -1, -1).to(dtype)
    image = inputs.image(batch).to(dtype) if twin.config.image_dim is not None else None
    timestep = torch.full((batch,), 500.0, device=latents.device)
    return lambda: twin(latents, timestep, text, encoder_hidden_states_image=image, return_dict=False)[0]


@dataclass(frozen=True)
class TrainingStep:
    """Forward and backward as the objective runs them: the layout that its modes need, one mode drawn for each sample."""

    model: WorldActionModel
    layout: Layout
    modes: list[Mode]
    batch: int
    inputs: Inputs

    @staticmethod
    def of(model: WorldActionModel, batch: int) -> TrainingStep:
        """A step of `batch` windows."""
        config = model.config
        modes = [model.relations.mode(name) for name in config.training.modes]
        layout = needed(model.training_layout(config.timeline.blocks), modes, Reach.of(config.timeline))
        return TrainingStep(model, layout, modes, batch, Inputs.of(model))

    @property
    def tokens(self) -> int:
        """L: of one window."""
        return len(self.layout)

    def call(self) -> Callable[[], None]:
        """The step; every call draws its samples' modes anew."""
        model, batch = self.model, self.batch
        window, text, generator = self.inputs.window(batch), self.inputs.text(), torch.Generator().manual_seed(0)
        given = self.inputs.conditions(batch)
        image = self.inputs.image(batch) if model.config.model.image_dim is not None else None
        masks = self.masks()

        def step() -> None:
            model.zero_grad(set_to_none=True)
            conditions = model.embed_text(text, given.rows_B)
            conditions = conditions if image is None else model.with_image(conditions, image)
            conditions = replace(conditions, first_frame_BCFHW=given.first_frame_BCFHW)
            video, action = model(window, conditions, masks(draw_modes(model.config.training.modes, batch, generator)), self.layout)
            (video.float().square().mean() + action.float().square().mean()).backward()

        return step

    def masks(self) -> Callable[[list[int]], TrainingMask]:
        """From the drawn modes to a mask, as `wam.training.objective` does it."""
        config, device = self.model.config, self.model.device
        reach = Reach.of(config.timeline)
        if config.model.attention == "flex":
            return lambda chosen: block_mask([self.modes[i].table for i in chosen], self.layout, reach, None, device)
        dense = torch.stack([m.table.dense(self.layout, reach) for m in self.modes]).to(device)
        parts = window_mask(dense, self.layout)
        assert parts is not None
        return lambda chosen: parts.select(torch.tensor(chosen, device=device))


def compare_training(config: Config, size: str, bench: Bench) -> Comparison:
    """Forward and backward over a training window."""
    model = build_model(config, bench.device, bench.dtype).train()
    step, twin = TrainingStep.of(model, batch=1), diffusers_twin(model)
    forward = diffusers_call(twin, step.inputs, step.tokens)

    def theirs() -> None:
        twin.zero_grad(set_to_none=True)
        forward().float().square().mean().backward()

    times = alternate({"ours": step.call(), "theirs": theirs}, bench.repeats, bench.device)
    model.zero_grad(set_to_none=True)
    checkpointed = "with" if config.model.gradient_checkpointing else "without"
    setting = f"{size}, {step.tokens} tokens, {checkpointed} gradient checkpointing"
    return Comparison("training step", setting, "forward and backward of a window", "diffusers, full attention", times["ours"], times["theirs"], 1.15)


@torch.no_grad()
def compare_step(config: Config, size: str, bench: Bench) -> list[Comparison]:
    """One cached denoising step at short and at long history, against diffusers' forward and against bare attention."""
    model = build_model(with_timeline(config, history=bench.history), bench.device, bench.dtype)
    inputs, mode = Inputs.of(model), model.relations.mode("joint_mutual")
    short, short_keys = _step(model, inputs, mode, past=0)
    long, long_keys = _step(model, inputs, mode, past=bench.history)
    tokens = model.clock.tokens(Kind.V) + model.clock.tokens(Kind.A)
    calls = {
        "short": short,
        "theirs": diffusers_call(diffusers_twin(model), inputs, tokens),
        "long": long,
        "short keys": _bare_attention(model, inputs, tokens, short_keys),
        "long keys": _bare_attention(model, inputs, tokens, long_keys),
    }
    times = alternate(calls, bench.repeats, bench.device, warmups=2)
    where = f"{size}, {tokens} tokens"
    grown, attended = (increase(times[f"long{what}"], times[f"short{what}"]) for what in ("", " keys"))
    return [
        Comparison("cached step", f"{where}, {short_keys - tokens} cached", "a denoising step", "diffusers over the block's tokens", times["short"], times["theirs"], 1.15),
        Comparison("growth with history", f"{where}, {short_keys - tokens} to {long_keys - tokens} cached", "what it adds to a step", "what it adds to attention", grown, attended, 1.15),
    ]


def _step(model: WorldActionModel, inputs: Inputs, mode: Mode, past: int) -> tuple[Callable[[], object], int]:
    """A denoising step after `past` blocks, and how many keys its queries have."""
    memory, noisy = remember(inputs, 1, past), inputs.noisy(1)
    view = model.view(memory.cache, mode.table, (Kind.V, Kind.A), [memory.block])
    (group,) = view.groups
    return lambda: model.denoise(view, noisy, memory.conditions, memory.embodiment_B), group.prefix.seen + len(view.layout)


def _bare_attention(model: WorldActionModel, inputs: Inputs, queries: int, keys: int) -> Callable[[], None]:
    """Attention of every layer and nothing else, over tensors of its own in each layer, as a cache has them."""
    c = model.backbone.config

    def normal(tokens: int) -> Tensor:
        return inputs.normal(1, tokens, c.num_attention_heads, c.attention_head_dim).to(model.backbone.dtype)

    layers = [(normal(queries), normal(keys), normal(keys)) for _ in range(c.num_layers)]

    def call() -> None:
        for q, k, v in layers:
            attention(q, k, v, None, model.config.model.attention)

    return call


# ------------------------------------------------------------------------------------------------ modes against each other


def compare_skip(config: Config, size: str, limit: float, bench: Bench, steps: int = 10, robots: int = 1) -> Comparison:
    """Actions alone against video and actions, on the same memory, for one robot or several side by side."""
    model = build_model(config, bench.device, bench.dtype)
    inputs = Inputs.of(model)
    memory = remember(inputs, robots, past=min(2, config.timeline.history))

    def call(mode: str) -> Callable[[], object]:
        return sampling_call(model, inputs, memory, mode, SamplingConfig(steps=steps))

    times = alternate({name: call(name) for name in ("skip", "joint")}, bench.repeats, bench.device)
    expert = f", expert of {config.model.expert_width}" if config.model.expert_width else ""
    setting = f"{size}{expert}, {robots} robot{'s' * (robots > 1)}, {config.model.layers} layers, {config.timeline.latents_per_block} frames of {model.clock.patches} patches, {config.timeline.actions_per_block} actions"
    return Comparison(f"skip against joint, {steps} steps", setting, "skip", "joint", times["skip"], times["joint"], limit)


def sampling_call(model: WorldActionModel, inputs: Inputs, memory: Memory, mode: str, how: SamplingConfig) -> Callable[[], object]:
    """A plan's sampling from the same noise every time; the memory is left as it was.  Two rows with guidance are one robot."""
    guided = how.guidance != 1
    t, rows = model.config.timeline, memory.cache.batch
    noise = Noise(inputs.normal(rows // (1 + guided), t.actions_per_block, model.config.model.actions), inputs.video(rows // (1 + guided), t.latents_per_block))
    at = Situation(memory.cache, [memory.block] * rows, memory.conditions, memory.embodiment_B, guided=guided)
    return lambda: sample(model, model.relations.mode(mode), at, noise, how)


# ------------------------------------------------------------------------------------------------ sessions


def make_policy(model: WorldActionModel) -> Policy:
    """A policy around a model: a linear codec fitted on noise, and statistics of noise."""
    config, generator = model.config, np.random.default_rng(0)
    codec = LinearCodec(config.codec)
    codec.fit(torch.from_numpy(generator.integers(0, 256, (32, 4, *config.codec.image_size, 3), dtype=np.uint8)))
    robot = config.model.embodiments[0]
    arrays = {"state": generator.normal(size=(64, robot.state_dim)), "action": generator.normal(size=(64, robot.action_dim))}
    normalizer = Normalizer.fit({name: x.astype(np.float32) for name, x in arrays.items()})
    return Policy(config, model, codec.to(model.device), normalizer.to_dict(), {"control_hz": 10})


def drive(session: Session, mode: str, how: SamplingConfig, generator: np.random.Generator) -> None:
    """One chunk: observe, plan, commit."""
    t, robot = session.config.timeline, session.dims
    first = session.block < 0
    frames = generator.integers(0, 256, (session.batch, 1 if first else t.frames_per_block, *session.config.codec.image_size, 3), dtype=np.uint8)
    session.observe(frames, generator.normal(size=(session.batch, robot.raw_state_dim)).astype(np.float32))
    actions = session.plan(mode, how).actions
    assert actions is not None
    session.commit(actions)


def compare_chunks(config: Config, size: str, bench: Bench) -> Comparison:
    """A late chunk of a session against an early one, each from the same moment every time."""
    early, late = bench.chunks
    model = build_model(config, bench.device, bench.dtype)
    how, generator = SamplingConfig(steps=4), np.random.default_rng(0)
    session = Session(make_policy(model), [INSTRUCTION], config.data.embodiment, [0])
    sides = {}
    for chunk in range(1, late + 1):
        if chunk in (early, late):
            sides[chunk] = fork(session)
        if chunk < late:
            drive(session, "joint", replace(how, steps=1), generator)

    def call(chunk: int) -> Callable[[], None]:
        return lambda: drive(fork(sides[chunk]), "joint", how, generator)

    times = alternate({"late": call(late), "early": call(early)}, bench.repeats, bench.device)
    setting = f"{size}, joint with {how.steps} steps, observe, plan and commit"
    return Comparison("session", setting, f"chunk {late}", f"chunk {early}", times["late"], times["early"], 1.1)


def fork(session: Session) -> Session:
    """A session that goes on from here by itself."""
    rows = list(range(session.batch))
    other = copy.copy(session)
    other.cache, other.stream, other.generators, other.timings = session.cache.select(rows), session.stream.select(rows), [*session.generators], {}
    return other
