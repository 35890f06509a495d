"""Goal images: a picture of the solved task, for the very episode that a robot is about to try.

    seed 20007    environment of its own -- reset -- scripted expert ... success -- last frame      the goal
    seed 20007    the robot's environment - reset -- policy, told the goal in place of, or beside, the instruction

The objects of an episode lie where its seed puts them, so each has a goal of its own.  It shows the robot where the expert left it, which
is a part of the goal for a model that compares pictures.  The same seed gives the same picture; each is drawn once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from wam.evaluation.environments import Environment, Frames, make_env


class GoalImages:
    """Goals by seed, of one environment; keeps what it has drawn."""

    def __init__(self, name: str, **settings: Any) -> None:
        """Make an environment for goals alone.

        Args:
            name, settings: as `make_env`; without disturbances, which a goal does not have.

        Raises:
            ValueError: an environment without a scripted expert, or as `make_env`.
        """
        self.name, self._env = name, make_env(name, **settings)
        if not hasattr(self._env, "expert_action"):
            self._env.close()
            raise ValueError(f"environment {name!r} has no scripted expert, so nobody shows what its solved task looks like; use planner.goal=language, or an environment such as metaworld/drawer-open-v3")
        self._drawn: dict[int, Frames] = {}

    def __call__(self, seeds: Sequence[int]) -> Frames:
        """Goals of episodes, uint8 (n, H, W, 3).

        Raises:
            RuntimeError: the expert does not solve the episode of a seed.
        """
        for seed in seeds:
            if seed not in self._drawn:
                self._drawn[seed] = solved_frame(self._env, seed, self.name)
        return np.stack([self._drawn[seed] for seed in seeds])

    def close(self) -> None:
        """Give back the environment; what was drawn goes too."""
        self._env.close()
        self._drawn.clear()


def solved_frame(env: Environment, seed: int, name: str = "the environment") -> Frames:
    """What an episode looks like once its scripted expert has solved it, (H, W, 3).

    Raises:
        RuntimeError: the expert does not solve it in the environment's own `max_steps`.
    """
    expert: Any = env
    env.reset(seed)
    for _ in range(env.max_steps):
        result = env.run(expert.expert_action()[None], 1)
        if bool(result.success.any()):
            return result.frames[-1] if len(result.frames) else env.render()
        if result.done:
            break
    raise RuntimeError(f"the scripted expert of {name} does not solve the episode of seed {seed} in {env.max_steps} control steps, so it has no goal image; leave this seed out, or use planner.goal=language")
