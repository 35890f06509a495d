"""A session: one robot's memory, or that of a batch of robots.

    session = Session(policy, ["open the drawer"], embodiment="metaworld", seeds=[7])
    session.observe(first_frame, state)              # H and S0
    plan = session.plan("skip")                      # actions of the coming block
    session.commit(executed)                         # what was really sent, at once
    session.observe(frames, state)                   # the block's 4k frames and the next state
    plan = session.plan("joint")                     # any mode, any time, from the same memory

Observations arrive in physical units and uint8 pixels; plans leave in physical units.  The cache holds what was really observed and
executed; what a plan imagined never stays in it.  Rows are independent: a batch gives each row what it would get alone.

A block that runs is still to be seen when the next one is planned ahead; what was imagined of it goes when its frames come:

    session.commit(decided)                          # the whole block, before it is executed
    session.imagine(latents)                         # as if these had been seen; None: without its frames
    plan = session.plan("skip")                      # the block after it
    session.observe(frames, state)                   # what really came: the memory is as if nothing had been imagined

What depends on the instruction alone is computed when the session opens, what depends on the first frame when that is seen.  A model
that cannot go on for ever (positions counted from the first frame, a first frame joined to the channels, or a table that sees nothing of
earlier blocks) starts again from the newest frame when a window's blocks are full, as DreamZero does.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from wam.codec.first_frame import first_frame_condition
from wam.config import SamplingConfig
from wam.data.normalize import normalizer_for
from wam.data.units import Units
from wam.model.actions import channels_of, pad_actions, pad_states
from wam.model.conditions import Conditions
from wam.model.sampling import Held, Noise, Pull, Sample, Situation, sample
from wam.pretrained import Policy
from wam.relations import untrained_mode_warning
from wam.text.text import prompts
from wam.timeline import FIRST_BLOCK, Kind

log = logging.getLogger(__name__)

BY_ROW = ("state", "first", "goal", "target", "acted", "newest")  # a tensor each with a row per robot, or None
_REMEMBERED = ("cache", "conditions", "block", "committed", "state", "origin", "first", "acted", "newest")  # what observing and imagining change


def memory_lasts(policy: Policy) -> int | None:
    """Blocks until a session's memory starts again from the newest frame; None: never."""
    m = policy.config.model
    ends = m.positions == "index" or m.first_frame == "concat" or not policy.model.relations.remembers
    return policy.config.timeline.blocks if ends else None


@dataclass(frozen=True)
class Plan:
    """What a session intends.

    Attributes:
        actions: (B, A, raw_action_dim) float32, physical units, absolute wherever the robot takes them so; None for modes that predict video only.
        imagined: latents (B, C, k, h, w) of the coming block, or None for modes that predict actions only.
        timings: milliseconds per stage of this plan, the observation it rests on included.
    """

    actions: np.ndarray | None
    imagined: Tensor | None
    timings: dict[str, float]


class Session:
    """See the module's docstring.  All rows advance together; drop the finished ones with `select`."""

    def __init__(
        self, policy: Policy, instructions: Sequence[str], embodiment: str, seeds: Sequence[int], goals: np.ndarray | None = None, prepared: Conditions | None = None, targets: np.ndarray | None = None
    ):
        """Open a session.

        Args:
            goals: goal images, uint8 (B, H, W, 3), for models that take them; with one, the instruction may be empty.
            targets: pictures that planning aims at (`wam.inference.planner`), likewise, for any model: its policy does not see them; default: the goals.
            prepared: the `instructions` of an earlier session with the same texts: shared, so they are neither encoded again nor held twice.

        Raises:
            ValueError: as many instructions as seeds are needed, none of them empty where there is no goal image; an embodiment or a goal that the model does not know; a model of several states a block.
        """
        if len(instructions) != len(seeds):
            raise ValueError(f"{len(instructions)} instructions and {len(seeds)} seeds; give one of each per row")
        states = policy.config.timeline.states_per_block
        if states != 1:
            raise ValueError(f"this model takes timeline.states_per_block = {states} states a block, all but the first of which lie in a plan's future; a session needs a model with 1")
        if goals is None and not all(text.strip() for text in instructions):
            raise ValueError("the instruction is empty; every episode needs a language task, or a goal image where the model takes one")
        self.policy, self.model, self.config = policy, policy.model, policy.config
        index = self.model.embodiment_index(embodiment)
        self.dims = self.config.model.embodiment(embodiment)
        self.normalizer = normalizer_for(policy.normalizer, embodiment)
        self.units = Units.of(self.dims, self.config.data)
        self.generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
        self.timings: dict[str, float] = {}
        self.guided = self.config.sampling.guided
        self._warned: set[str] = set()
        self.embodiment_B = torch.full((self.batch * self._sides,), index, device=self.model.device)
        with torch.no_grad(), self._timed("text"):
            filled = prompts(instructions, self.config.template(embodiment))
            texts = [text if given.strip() else "" for text, given in zip(filled, instructions, strict=True)]  # an absent instruction is no template either, as in training
            negative = [self.config.sampling.negative_prompt] * len(texts) if self.guided else []
            self.instructions = prepared or self.model.prepare(self.model.encode_text([*texts, *negative]))
        if self.config.training.text_dropout == 0 and "" in texts:
            log.warning("an instruction is empty, which this model never was in training (training.text_dropout is 0), so what it does means little")
        self.goal = self._encode_goal(goals)
        self.target = self.goal if targets is None else self._encode_pictures("targets", targets)
        self.reset()

    @property
    def batch(self) -> int:
        """B: robots."""
        return len(self.generators)

    @property
    def members(self) -> list[Session]:
        """The sessions that it stands for."""
        return [self]

    @property
    def _sides(self) -> int:
        """Rows of the cache a robot: with guidance, one for the instruction and one for the negative prompt."""
        return 2 if self.guided else 1

    @property
    def _first_inside(self) -> bool:
        return self.config.timeline.first_frame == "inside"

    @property
    def _actions_see_their_video(self) -> bool:
        """Whether executed actions see the video they led to (LingBot-VA), and so are written after it."""
        return self.model.relations.mode("skip").table.allow(Kind.AC, 0, Kind.VC, 0)

    @property
    def _lasts(self) -> int | None:
        """Blocks until the memory starts again; None: for ever."""
        return memory_lasts(self.policy)

    @property
    def frames_due(self) -> int:
        """Frames that the next observation has: one at first, then a block's, without those that came with the first frame inside it."""
        t = self.config.timeline
        return 1 if self.block == FIRST_BLOCK else t.frames_per_block - (t.temporal_stride if self.block == 0 and self._first_inside else 0)

    @property
    def begins_anew(self) -> bool:
        """Whether the next observation is the first of a new memory: the blocks of a window are full, and this model cannot go on."""
        return self._lasts is not None and self.block + 1 >= self._lasts and self.block != FIRST_BLOCK

    def reset(self) -> None:
        """Forget everything observed; keep the instruction and the goal."""
        self.cache = self.model.new_cache(self.batch * self._sides)
        self.stream = self.policy.codec.stream()
        self.conditions: Conditions = self.instructions
        self.block = FIRST_BLOCK
        self.committed = True
        self.state: Tensor | None = None  # where states are not cached
        self.origin: np.ndarray | None = None  # the state that relative actions start from, physical units
        self.first: Tensor | None = None  # where the first frame is inside block 0
        self.acted: Tensor | None = None  # executed actions that wait for the frames they led to
        self.newest: Tensor | None = None  # where planning aims at a picture: the frame observed last, encoded as such pictures are, (B, C, 1, h, w)
        self.before: Session | None = None  # where imagining began

    # ------------------------------------------------------------------------------------------ the loop

    def observe(self, frames: np.ndarray, state: np.ndarray | None) -> Tensor:
        """Take in what was seen since the last call, and the state now; returns its latents (B, C, F, h, w).

        Args:
            frames: uint8 (B, n, H, W, 3): one frame at first, later the 4k frames of the block, `frame_stride` steps apart.
            state: (B, raw_state_dim), physical units; None where it is not known (the model may then only imagine video well).

        Raises:
            ValueError: wrong shapes, non-finite states, or a block whose executed actions were never committed.
        """
        self.back()
        self._check_observation(frames, state)
        if self.begins_anew:
            self.reset()
            frames = frames[:, -1:]
        with torch.no_grad():
            with self._timed("encode"):
                pixels = torch.from_numpy(np.ascontiguousarray(frames)).to(self.model.device)
                latents = self.stream.encode(pixels)
                self.newest = None if self.target is None else self.policy.codec.encode(pixels[:, -1:])
            if self.block == FIRST_BLOCK:
                with self._timed("first frame"):
                    self._begin(pixels)
            with self._timed("prefill"):
                self._advance(latents, state)
        return latents

    def plan(
        self, mode: str, sampling: SamplingConfig | None = None, actions: np.ndarray | None = None, committed: np.ndarray | None = None, future: Tensor | None = None, pull: Pull | None = None
    ) -> Plan:
        """Plan the coming block.

        Args:
            mode: a mode of `wam.relations`; one that the model was not trained for warns.
            sampling: how; default: as the checkpoint says.
            actions: for `forward`, the actions (B, A, action_dim) whose outcome is imagined, physical units.
            committed: the block's first n actions (B, n, action_dim), where they are decided already: they are held, the rest follows.
            future: for `inverse`, the block's latents (B, C, k, h, w), whose actions are asked for.
            pull: actions that the plan is drawn to (`wam.inference.guided`).

        Raises:
            ValueError: unknown mode, missing or misshapen actions, guidance that the model cannot give, or nothing observed yet.
        """
        if self.block == FIRST_BLOCK:
            raise ValueError("nothing has been observed yet; call observe(first_frame, state) before plan()")
        self._warn_if_untrained(mode)
        given = self._future(future) if future is not None else None if actions is None else self._normal_actions(actions)
        how = sampling or self.config.sampling
        with self._timed("denoise"):
            out = sample(self.model, self.model.relations.mode(mode), self._situation(committed, pull), self._noise(), how, given)
        with self._timed("post"):
            plan_actions = None if out.action_BTA is None else self._physical(out)
        timings, self.timings = self.timings, {}
        return Plan(plan_actions, out.video_BCFHW, timings)

    def commit(self, actions: np.ndarray) -> None:
        """Take in the block's actions, as really sent (B, A, action_dim); frames need not have arrived."""
        if self.block == FIRST_BLOCK:
            raise ValueError("nothing has been observed yet; call observe(first_frame, state) before commit()")
        with torch.no_grad(), self._timed("commit"):
            self.acted = self._normal_actions(actions)
            if not self._actions_see_their_video:
                self._write_actions()
        self.committed = True

    def imagine(self, latents: Tensor | None, origin: np.ndarray | None = None) -> None:
        """Go on as if `latents` (B, C, k, h, w) had been observed, or, with None, as if the block had passed with eyes shut: only its actions are known.

        Open-loop rollouts feed plans back this way, and the next block can be planned before the frames of this one have come.  The state that
        would go with them is not known, and is left out of what the model sees (where it takes the actions' noise level, the last one known stays).
        The next `observe` is of the block where imagining began.  It costs a second cache until then.

        Args:
            origin: (B, raw_state_dim): where relative actions are to start from; without it, such actions can neither be planned nor committed.

        Raises:
            ValueError: nothing observed yet, a block without its actions, a block whose first frame is inside of it and its video left out, or a
                memory that begins anew after this block, from a frame that has not come.
        """
        if self.block == FIRST_BLOCK or not self.committed:
            raise ValueError("a block can be imagined once its actions are known; call observe(first_frame, state) and commit(actions) before imagine()")
        if latents is None and self.block == 0 and self._first_inside:
            raise ValueError("block 0 of this model holds the first frame (timeline.first_frame=inside), so its frames cannot be left out; imagine them with mode 'video' or 'forward'")
        if latents is None and self.begins_anew:
            raise ValueError(f"this model's memory begins anew after {self._lasts} blocks, from a frame that has not come; nothing can be planned ahead of it")
        self.set_aside()
        given = self.first is not None and self.block == 0  # the block's first latent was observed
        with torch.no_grad():
            self._advance(latents[:, :, 1:] if latents is not None and given else latents, None)
        self.origin = None if origin is None else origin.astype(np.float32)

    def set_aside(self) -> None:
        """Note where imagining begins, for `back`, unless that is done."""
        if self.before is None:
            self.before = copy.copy(self)
            self.cache = self.cache.select(list(range(self.cache.batch)))

    def back(self) -> None:
        """Forget what was imagined: go back to where that began, where the block's actions were committed and its frames are awaited."""
        if self.before is not None:
            self.__dict__.update({name: getattr(self.before, name) for name in _REMEMBERED})
            self.before = None

    def fork(self) -> Session:
        """A session of its own that remembers the same, at the cost of a second cache; it draws its noise from the same generators."""
        out = copy.copy(self)
        out.timings, out.stream = {}, self.stream.select(range(self.batch))
        out.cache = self.cache.select(list(range(self.cache.batch)))
        out.before = None if self.before is None else self.before.fork()
        return out

    def select(self, rows: Sequence[int]) -> None:
        """Keep only some rows, in the given order."""
        chosen = list(rows)
        both = [*chosen, *(row + self.batch for row in chosen)] if self.guided else chosen
        index = torch.tensor(both, dtype=torch.int64)
        on_device = index.to(self.model.device)
        self.cache = self.cache.select(both)
        self.instructions, self.conditions = self.instructions.select(on_device), self.conditions.select(on_device)
        self.embodiment_B = self.embodiment_B[on_device]
        self.generators = [self.generators[r] for r in chosen]
        self.stream = self.stream.select(chosen)
        for name in BY_ROW:
            x = getattr(self, name)
            setattr(self, name, None if x is None else x[chosen])
        self.origin = None if self.origin is None else self.origin[chosen]
        if self.before is not None:
            self.before.select(chosen)

    # ------------------------------------------------------------------------------------------ inside

    def _situation(self, committed: np.ndarray | None, pull: Pull | None = None) -> Situation:
        state = None if self.state is None or not self.model.live_state else self._both(self.state).unsqueeze(1)
        return Situation(self.cache, self._blocks, self.conditions, self.embodiment_B, state, self._held(committed), self.guided, pull)

    @property
    def _blocks(self) -> list[int]:
        return [self.block] * (self.batch * self._sides)

    def _held(self, committed: np.ndarray | None) -> Held:
        """What of the coming block is given: a committed prefix of its actions; inside block 0, the first frame and the actions that would lead to it."""
        t, lead = self.config.timeline, self.config.timeline.lead if self.block == 0 else 0
        count = lead
        if committed is not None:
            self._check_committed(committed, t.actions_per_block - lead)
            count += committed.shape[1]
        video = action = None
        if self.first is not None and self.block == 0:
            values = torch.cat([self.first, self.first.expand(-1, -1, t.latents_per_block - 1, -1, -1)], dim=2) if t.latents_per_block > 1 else self.first
            video = (values, torch.arange(t.latents_per_block, device=values.device).expand(self.batch, -1) == 0)
        if count:
            values = torch.zeros(self.batch, t.actions_per_block, self.config.model.actions, device=self.model.device)
            if committed is not None:
                values[:, lead:count] = self._normalized(committed)
            action = (values, torch.arange(t.actions_per_block, device=values.device).expand(self.batch, -1) < count)
        return Held(video, action)

    def _check_committed(self, committed: np.ndarray, most: int) -> None:
        rows, dims = self.batch, self.dims.raw_action_dim
        if committed.ndim != 3 or committed.shape[::2] != (rows, dims) or committed.shape[1] > most:
            raise ValueError(f"committed actions have shape {committed.shape}; expected (rows, up to {most} actions, action_dim) = ({rows}, n, {dims})")
        if not np.isfinite(committed).all():
            raise ValueError("committed actions hold non-finite numbers; nothing was planned")

    def _future(self, latents: Tensor) -> Tensor:
        expected = (self.batch, self.config.codec.channels, self.config.timeline.latents_per_block, *self.model.latent_size)
        if tuple(latents.shape) != expected:
            raise ValueError(f"a future has shape {tuple(latents.shape)}; expected latents (rows, channels, latents_per_block, height, width) = {expected}")
        return latents.to(self.model.device)

    def _begin(self, pixels_B1HWC: Tensor) -> None:
        """What depends on the first frame alone: its image embeddings, and what is joined to the channels."""
        if self.policy.image is not None:
            embedded = self.policy.image(pixels_B1HWC[:, 0]).to(self.model.device)
            self.conditions = self.model.prepare(self.model.with_image(self.conditions, self._both(embedded)))
        if self.config.model.first_frame == "concat":
            condition = first_frame_condition(self.policy.codec, pixels_B1HWC, self.config.timeline.latents)
            self.conditions = self.conditions.with_first_frame(self._both(condition))
        if self.goal is not None:
            self._prefill(Kind.G, self.goal)

    def _advance(self, latents: Tensor | None, state: np.ndarray | None) -> None:
        """Write a block's frames, where they are there, and the state at the start of the next."""
        normal, self.origin = None, None if state is None else state.astype(np.float32)
        if state is not None and self.model.state_encoder is not None:
            seen = self.normalizer.normalize("state", self.units.encode_state(state.astype(np.float32)))
            normal = pad_states(self.config.model, torch.from_numpy(seen)).to(self.model.device)
        begins = self.block == FIRST_BLOCK
        if begins and normal is not None and self.config.model.state == "context":
            self.conditions = self.model.prepare(self.model.with_state(self.conditions, self._both(normal), self.embodiment_B))
        if begins and self._first_inside:
            self.first = latents
        elif begins:
            assert latents is not None
            self._prefill(Kind.H, latents)
        else:
            if latents is not None:
                self._prefill(Kind.VC, torch.cat([self.first, latents], dim=2) if self.block == 0 and self.first is not None else latents)
            self._write_actions()
        self.block += 1
        self.committed = False
        if normal is not None and self.config.model.state == "token":
            self.state = normal
            if not self.model.live_state:
                self._prefill(Kind.S, normal.unsqueeze(1))
        if begins and self.first is not None and self.config.timeline.latents_per_block == 1:
            self._skip_the_first_block()

    def _skip_the_first_block(self) -> None:
        """Block 0 is the first frame alone: nothing of it is to be planned."""
        t = self.config.timeline
        assert self.first is not None
        self._prefill(Kind.VC, self.first)
        self._prefill(Kind.AC, torch.zeros(self.batch, t.actions_per_block, self.config.model.actions, device=self.model.device))
        self.block = 1

    def _write_actions(self) -> None:
        """Write what was committed, unless that is done."""
        if self.acted is not None:
            self._prefill(Kind.AC, self.acted)
        self.acted = None

    def _prefill(self, kind: Kind, value: Tensor) -> None:
        table = self.model.relations.mode("skip").table
        self.model.prefill(self.cache, table, kind, self._both(value), self._blocks, self.conditions, self.embodiment_B)

    def _both(self, x: Tensor) -> Tensor:
        """What every robot has, for every row of the cache."""
        return torch.cat([x, x]) if self.guided else x

    def _noise(self) -> Noise:
        t, c, width = self.config.timeline, self.config.codec, self.config.model.actions
        action = torch.stack([torch.randn(t.actions_per_block, width, generator=g) for g in self.generators])
        video = torch.stack([torch.randn(c.channels, t.latents_per_block, *self.model.latent_size, generator=g) for g in self.generators])
        return Noise(action.to(self.model.device), video.to(self.model.device))

    def _warn_if_untrained(self, mode: str) -> None:
        if mode not in self._warned:
            self._warned.add(mode)
            warning = untrained_mode_warning(self.config, mode)
            if warning:
                log.warning("%s", warning)

    def _encode_goal(self, goals: np.ndarray | None) -> Tensor | None:
        if goals is None:
            return None
        if not self.config.model.goal_image:
            raise ValueError("a goal image was given, but this model takes none; train one with model.goal_image=true and training.goal_image above 0")
        return self._encode_pictures("goals", goals)

    def _encode_pictures(self, name: str, pictures: np.ndarray) -> Tensor:
        expected = (self.batch, *self.config.codec.image_size, 3)
        if pictures.shape != expected or pictures.dtype != np.uint8:
            raise ValueError(f"{name} are {pictures.dtype} {pictures.shape}; expected uint8 (rows, height, width, 3) = {expected}")
        with torch.no_grad(), self._timed("goal"):
            return self.policy.codec.encode(torch.from_numpy(np.ascontiguousarray(pictures)).to(self.model.device).unsqueeze(1))

    # ------------------------------------------------------------------------------------------ units and checks

    def _physical(self, out: Sample) -> np.ndarray:
        """Sampled actions that are the robot's to execute, in physical units."""
        assert out.action_BTA is not None
        own = out.action_BTA[:, self.config.timeline.lead if self.block == 0 else 0 :, channels_of(self.dims)]
        return self.units.decode_actions(self.normalizer.unnormalize("action", own.float().cpu().numpy()), self.origin)

    def _normalized(self, actions: np.ndarray) -> Tensor:
        """A robot's actions, relative where they are and normalised, in the padded vector."""
        normal = torch.from_numpy(self.normalizer.normalize("action", self.units.encode_actions(actions.astype(np.float32), self.origin)))
        return pad_actions(self.config.model, self.dims, normal).to(self.model.device)

    def _normal_actions(self, actions: np.ndarray) -> Tensor:
        """A block's actions, normalised and padded; in block 0, behind the zeros that lead to a first frame inside it."""
        lead = self.config.timeline.lead if self.block == 0 else 0
        expected = (self.batch, self.config.timeline.actions_per_block - lead, self.dims.raw_action_dim)
        if actions.shape != expected:
            raise ValueError(f"actions have shape {actions.shape}; expected (rows, actions_per_block, action_dim) = {expected}")
        if not np.isfinite(actions).all():
            raise ValueError("actions hold non-finite numbers; nothing was written to the session's memory")
        normal = self._normalized(actions)
        return torch.nn.functional.pad(normal, (0, 0, lead, 0))

    def _check_observation(self, frames: np.ndarray, state: np.ndarray | None) -> None:
        if not self.committed:
            raise ValueError("the actions of this block were not committed; call commit(executed) before observe(frames, state)")
        expected = (self.batch, self.frames_due, *self.config.codec.image_size, 3)
        if frames.shape != expected or frames.dtype != np.uint8:
            raise ValueError(f"frames are {frames.dtype} {frames.shape}; expected uint8 (rows, frames, height, width, 3) = {expected}")
        if state is None:
            return
        if state.shape != (self.batch, self.dims.raw_state_dim):
            raise ValueError(f"state has shape {state.shape}; expected (rows, state_dim) = {(self.batch, self.dims.raw_state_dim)}")
        if not np.isfinite(state).all():
            raise ValueError("the state holds non-finite numbers; check the robot's sensors")

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()
        self.timings[stage] = self.timings.get(stage, 0.0) + (time.perf_counter() - start) * 1e3
