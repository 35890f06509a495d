"""A session: one robot's memory, or that of a batch of robots.

    session = Session(policy, ["open the drawer"], embodiment="metaworld", seeds=[7])
    session.observe(first_frame, state)              # H and S0
    plan = session.plan("skip")                      # actions of the coming block
    session.commit(executed)                         # what was really sent, at once
    session.observe(frames, state)                   # the block's 4k frames and the next state
    plan = session.plan("joint")                     # any mode, any time, from the same memory

Observations arrive in physical units and uint8 pixels; plans leave in physical units.  The cache holds what was really observed
and executed; what a plan imagined never stays in it.  Rows are independent: a batch gives each row what it would get alone.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from wam.data.normalize import Normalizer
from wam.model.sampling import Noise, Sample, Situation, Solver, sample
from wam.pretrained import Policy
from wam.relations import get_mode
from wam.timeline import FIRST_BLOCK, Kind


@dataclass(frozen=True)
class Plan:
    """What a session intends.

    Attributes:
        actions: (B, A, action_dim) float32, physical units; None for modes that predict video only.
        imagined: latents (B, C, k, h, w) of the coming block, or None for modes that predict actions only.
        timings: milliseconds per stage of this plan, the observation it rests on included.
    """

    actions: np.ndarray | None
    imagined: Tensor | None
    timings: dict[str, float]


class Session:
    """See the module's docstring.  All rows advance together; drop the finished ones with `select`."""

    def __init__(self, policy: Policy, instructions: Sequence[str], embodiment: str, seeds: Sequence[int]):
        if len(instructions) != len(seeds):
            raise ValueError(f"{len(instructions)} instructions and {len(seeds)} seeds; give one of each per row")
        self.policy = policy
        self.model = policy.model
        self.normalizer = Normalizer.from_dict(policy.normalizer)
        index = self.model.embodiment_index(embodiment)
        self.embodiment_B = torch.full((len(seeds),), index, device=self.model.device)
        self.dims = next(e for e in policy.config.model.embodiments if e.name == embodiment)
        self.generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
        self.timings: dict[str, float] = {}
        with torch.no_grad(), self._timed("text"):
            self.context = self.model.backbone.prepare_context(self.model.encode_text(list(instructions)))
        self.reset()

    @property
    def batch(self) -> int:
        """B: rows."""
        return len(self.generators)

    def reset(self) -> None:
        """Forget everything observed; keep the instruction."""
        self.cache = self.model.new_cache(self.batch)
        self.stream = self.policy.codec.stream()
        self.block = FIRST_BLOCK
        self.committed = True

    def observe(self, frames: np.ndarray, state: np.ndarray | None) -> Tensor:
        """Take in what was seen since the last call, and the state now; returns its latents (B, C, F, h, w).

        Args:
            frames: uint8 (B, n, H, W, 3): one frame at first, later the 4k frames of the block, `frame_stride` steps apart.
            state: (B, state_dim), physical units; None where it is not known (the model may then only imagine video well).

        Raises:
            ValueError: wrong shapes, non-finite states, or a block whose executed actions were never committed.
        """
        self._check_observation(frames, state)
        kind = Kind.H if self.block == FIRST_BLOCK else Kind.VC
        with torch.no_grad():
            with self._timed("encode"):
                latents = self.stream.encode(torch.from_numpy(np.ascontiguousarray(frames)).to(self.model.device))
            with self._timed("prefill"):
                self._advance(kind, latents, state)
        return latents

    def plan(self, mode: str, solver: Solver | None = None, actions: np.ndarray | None = None) -> Plan:
        """Plan the coming block.

        Args:
            mode: a mode of `wam.relations`.
            actions: for `forward`, the actions (B, A, action_dim) whose outcome is imagined, physical units.

        Raises:
            ValueError: unknown mode, missing or misshapen actions, or nothing observed yet.
        """
        if self.block == FIRST_BLOCK:
            raise ValueError("nothing has been observed yet; call observe(first_frame, state) before plan()")
        given = None if actions is None else self._normal_actions(actions)
        with self._timed("denoise"):
            out = sample(self.model, get_mode(mode), self._situation(), self._noise(), solver or Solver(), given)
        with self._timed("post"):
            plan_actions = None if out.action_BTA is None else self._physical(out)
        timings, self.timings = self.timings, {}
        return Plan(plan_actions, out.video_BCFHW, timings)

    def commit(self, actions: np.ndarray) -> None:
        """Write the block's actions, as really sent (B, A, action_dim), into the memory; frames need not have arrived."""
        if self.block == FIRST_BLOCK:
            raise ValueError("nothing has been observed yet; call observe(first_frame, state) before commit()")
        with torch.no_grad(), self._timed("commit"):
            self._prefill(Kind.AC, self._normal_actions(actions))
        self.committed = True

    def imagine(self, latents: Tensor) -> None:
        """Go on as if `latents` (B, C, k, h, w) had been observed: open-loop rollouts feed plans back this way.

        The state that would go with them is not known, and is left out.
        """
        with torch.no_grad():
            self._advance(Kind.VC, latents, None)

    def select(self, rows: Sequence[int]) -> None:
        """Keep only some rows, in the given order."""
        index = torch.tensor(list(rows), dtype=torch.int64)
        self.cache = self.cache.select(list(rows))
        self.context = self.context.select(index.to(self.model.device))
        self.embodiment_B = self.embodiment_B[index.to(self.model.device)]
        self.generators = [self.generators[r] for r in rows]

    # ------------------------------------------------------------------------------------------ inside

    def _situation(self) -> Situation:
        return Situation(self.cache, [self.block] * self.batch, self.context, self.embodiment_B)

    def _advance(self, kind: Kind, latents: Tensor, state: np.ndarray | None) -> None:
        """Write a block's frames, and the state at the start of the next."""
        self._prefill(kind, latents)
        self.block += 1
        self.committed = False
        if state is not None:
            normal = self.normalizer.normalize("state", state.astype(np.float32))
            self._prefill(Kind.S, torch.from_numpy(normal).to(self.model.device).unsqueeze(1))

    def _prefill(self, kind: Kind, value: Tensor) -> None:
        self.model.prefill(self.cache, get_mode("skip").table, kind, value, [self.block] * self.batch, self.context, self.embodiment_B)

    def _noise(self) -> Noise:
        t, c = self.policy.config.timeline, self.policy.config.codec
        width = max(e.action_dim for e in self.policy.config.model.embodiments)
        height_width = self.model.latent_size
        action = torch.stack([torch.randn(t.actions_per_block, width, generator=g) for g in self.generators])
        video = torch.stack([torch.randn(c.channels, t.latents_per_block, *height_width, generator=g) for g in self.generators])
        return Noise(action.to(self.model.device), video.to(self.model.device))

    def _physical(self, out: Sample) -> np.ndarray:
        assert out.action_BTA is not None
        return self.normalizer.unnormalize("action", out.action_BTA[..., : self.dims.action_dim].float().cpu().numpy())

    def _normal_actions(self, actions: np.ndarray) -> Tensor:
        expected = (self.batch, self.policy.config.timeline.actions_per_block, self.dims.action_dim)
        if actions.shape != expected:
            raise ValueError(f"actions have shape {actions.shape}; expected (rows, actions_per_block, action_dim) = {expected}")
        if not np.isfinite(actions).all():
            raise ValueError("actions hold non-finite numbers; nothing was written to the session's memory")
        normal = self.normalizer.normalize("action", actions.astype(np.float32))
        return torch.from_numpy(normal).to(self.model.device)

    def _check_observation(self, frames: np.ndarray, state: np.ndarray | None) -> None:
        if not self.committed:
            raise ValueError("the actions of this block were not committed; call commit(executed) before observe(frames, state)")
        count = 1 if self.block == FIRST_BLOCK else self.policy.config.timeline.frames_per_block
        expected = (self.batch, count, *self.policy.config.codec.image_size, 3)
        if frames.shape != expected or frames.dtype != np.uint8:
            raise ValueError(f"frames are {frames.dtype} {frames.shape}; expected uint8 (rows, frames, height, width, 3) = {expected}")
        if state is None:
            return
        if state.shape != (self.batch, self.dims.state_dim):
            raise ValueError(f"state has shape {state.shape}; expected (rows, state_dim) = {(self.batch, self.dims.state_dim)}")
        if not np.isfinite(state).all():
            raise ValueError("the state holds non-finite numbers; check the robot's sensors")

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()
        self.timings[stage] = self.timings.get(stage, 0.0) + (time.perf_counter() - start) * 1e3
