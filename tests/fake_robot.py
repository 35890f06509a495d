"""A robot without a simulator: its state moves by a tenth of its action, its image shows the state as grey bars.

An episode's seed places it; even seeds succeed, at different times, and odd ones never do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tiny import tiny_config, tiny_model

from wam.codec.linear import LinearCodec
from wam.data.normalize import Normalizer
from wam.evaluation.environments import Observation, StepResult
from wam.evaluation.vector import Observations
from wam.pretrained import Policy

SIDE = 32
TINY = ("codec.image_size=[32, 32]", "timeline.blocks=3")


class FakeRobot:
    """An environment; see the module's docstring."""

    state_dim = action_dim = 4
    action_low, action_high = np.full(4, -1, np.float32), np.full(4, 1, np.float32)
    hold = np.zeros(4, np.float32)
    control_hz, image_size, instruction, cameras = 80, SIDE, "go there", ("corner4",)

    def __init__(self, max_steps: int = 40) -> None:
        self.max_steps = max_steps

    def reset(self, seed: int) -> Observation:
        self.seed, self.steps = seed, 0
        self.state = np.random.default_rng(seed).uniform(-0.5, 0.5, 4).astype(np.float32)
        return Observation(self.render()[None], self.state.copy())

    def render(self) -> np.ndarray:
        bars = ((self.state + 2) * 60).clip(0, 255).astype(np.uint8)
        return np.broadcast_to(bars.repeat(SIDE // 4)[None, :, None], (SIDE, SIDE, 3)).copy()

    def run(self, actions: np.ndarray, frame_stride: int) -> StepResult:
        assert np.isfinite(actions).all() and (np.abs(actions) <= 1).all()
        frames, states = [], []
        for count, action in enumerate(actions, start=1):
            self.state = (self.state + 0.1 * action).astype(np.float32)
            self.steps += 1
            states.append(self.state.copy())
            if count % frame_stride == 0:
                frames.append(self.render())
            success = self.seed % 2 == 0 and self.steps >= 10 + self.seed % 5
            if success or self.steps >= self.max_steps:
                break
        n = len(states)
        reached = np.zeros(n, np.bool_)
        reached[-1] = success
        shaped = np.asarray(frames, np.uint8).reshape(len(frames), SIDE, SIDE, 3)
        return StepResult(shaped, np.stack(states), np.zeros(n, np.float32), reached, bool(success or self.steps >= self.max_steps))

    def close(self) -> None:
        pass


class FakeVector:
    """`VectorEnv` of fake robots, in this process."""

    made = 0
    robot: type[FakeRobot] = FakeRobot

    def __init__(self, name: str, n: int, workers: int = 2, max_steps: int = 40, **settings: Any) -> None:
        type(self).made += 1
        self.name, self.n = name, n
        self.robots = [self.robot(max_steps) for _ in range(n)]
        self.answers: dict[int, StepResult] = {}
        for field in ("state_dim", "action_dim", "action_low", "action_high", "hold", "control_hz", "image_size", "instruction", "max_steps", "cameras"):
            setattr(self, field, getattr(self.robots[0], field))

    def reset(self, seeds: Sequence[int]) -> Observations:
        first = [robot.reset(seed) for robot, seed in zip(self.robots, seeds, strict=False)]
        return Observations(np.stack([o.frames for o in first]), np.stack([o.state for o in first]))

    def submit(self, actions: np.ndarray, rows: Sequence[int], frame_stride: int) -> None:
        self.answers |= {row: self.robots[row].run(actions[i], frame_stride) for i, row in enumerate(rows)}

    def collect(self, rows: Sequence[int] | None = None) -> dict[int, StepResult]:
        wanted = list(self.answers) if rows is None else rows
        return {row: self.answers.pop(row) for row in wanted}

    def __enter__(self) -> FakeVector:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def fake_policy(*overrides: str) -> Policy:
    """A policy of random weights for these robots."""
    config = tiny_config(*TINY, *overrides)
    codec = LinearCodec(config.codec)
    codec.fit(torch.from_numpy(np.random.default_rng(0).integers(0, 255, (8, 4, SIDE, SIDE, 3), dtype=np.uint8)))
    spread = np.linspace(-1, 1, 100)[:, None].repeat(4, axis=1)
    normalizer = Normalizer.fit({"state": 2 * spread, "action": 0.2 * spread}).to_dict()
    return Policy(config, tiny_model(config), codec, normalizer, {"control_hz": 80, "tasks": ["go there"]})
