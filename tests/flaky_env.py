"""An environment that fails on demand: what it does is in the seed and in the actions, so that it can be told from another process."""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np

from wam.evaluation.environments import Observation, StepResult

RAISES_AT_RESET, DIES_AT_RESET = 901, 902  # seeds
RAISES, DIES, HANGS, IS_BLIND, LOSES_A_FRAME, PAINTS_IN_FLOATS = 0.1, 0.2, 0.3, 0.4, 0.5, 0.6  # first number of an action


class Flaky:
    """Counts: state is (seed, steps), a frame's colour the steps; a step takes `seconds`."""

    state_dim, action_dim, control_hz, image_size, cameras = 2, 3, 10, 4, ("front",)
    action_low, action_high = np.full(3, -1, np.float32), np.full(3, 1, np.float32)
    hold = np.array([0, 0, np.nan], np.float32)
    instruction = "count"

    def __init__(self, max_steps: int = 12, seconds: float = 0.0, camera: str = "front", image_size: int = 4, fails: bool = False) -> None:
        if fails:
            raise OSError("no such robot")
        self.max_steps, self.seconds, self.steps, self.seed = max_steps, seconds, 0, -1

    def reset(self, seed: int) -> Observation:
        self.seed, self.steps = seed, 0
        if seed == RAISES_AT_RESET:
            raise RuntimeError("the table is not there")
        if seed == DIES_AT_RESET:
            os._exit(3)
        return Observation(self.render()[None], self.state(), rest=np.zeros(3, np.float32))

    def state(self) -> np.ndarray:
        return np.array([self.seed, self.steps], np.float32)

    def run(self, actions: np.ndarray, frame_stride: int) -> StepResult:
        states, frames = [], []
        for action in actions:
            what = round(float(action[0]), 3)
            if what == RAISES:
                raise RuntimeError("the arm is stuck")
            if what == DIES:
                os._exit(7)
            if what == HANGS:
                time.sleep(60)
            time.sleep(self.seconds)
            self.steps += 1
            states.append(self.state() * (np.nan if what == IS_BLIND else 1))
            if len(states) % frame_stride == 0 and what != LOSES_A_FRAME:
                frames.append(self.render() / (255 if what == PAINTS_IN_FLOATS else 1) if what == PAINTS_IN_FLOATS else self.render())
            if self.steps >= self.max_steps:
                break
        n = len(states)
        won = np.arange(n) == (n - 1 if self.steps >= self.max_steps and self.seed % 2 == 0 else -1)
        shown: Any = np.asarray(frames).reshape(len(frames), 4, 4, 3) if frames else np.zeros((0, 4, 4, 3), np.uint8)
        return StepResult(shown, np.stack(states), np.ones(n, np.float32), won, self.steps >= self.max_steps)

    def render(self) -> np.ndarray:
        return np.full((4, 4, 3), self.steps, np.uint8)

    def close(self) -> None:
        pass
