"""PushT: a round finger pushes a T onto its outline on a table of 512 x 512, ten commands a second, each a place to go to.

Measured as Diffusion Policy does: fifty initial states from seed 100000 on, at most 300 steps, success when the T covers more than 95 % of
the outline; beside it the mean over episodes of the largest reward, which is coverage / 0.95, at most 1.  Initial states are the
package's own: gym-pusht 0.1.8 draws them otherwise than 0.1.5 and than the original code, from the same seed, so results of other
versions are other results.  The extra pins one, and `package_versions` records it.
"""

from __future__ import annotations

import numpy as np

from wam.evaluation.environments import Benchmark, Floats, Frames
from wam.evaluation.gymnasium_env import GymEnv

BENCHMARK = Benchmark(first_seed=100_000, episodes=50, max_steps=300, source="Diffusion Policy (Chi et al. 2023), PushT from images")
INSTRUCTION = "Push the T-shaped block onto the T-shaped target."  # as the published demonstrations in LeRobot's format say


class PushTEnv(GymEnv):
    """PushT as it is seen: the picture, and the finger's place as state."""

    state_noise = np.array([5, 5], np.float32)  # standard deviation of a disturbed measurement

    def __init__(self, camera: str = "image", image_size: int = 96, max_steps: int = BENCHMARK.max_steps, instruction: str = INSTRUCTION) -> None:
        """Build the table.

        Args:
            camera: what datasets call the picture.
            image_size: square; the table is drawn at 512 and made smaller, 96 in the benchmark.
            max_steps: 300 in the benchmark.
            instruction: what a policy is told.
        """
        import gym_pusht  # noqa: F401  # registers it

        super().__init__(
            "gym_pusht/PushT-v0",
            camera=camera,
            image_size=image_size,
            max_steps=max_steps,
            pixels=".",
            state=".",
            fit="exact",
            rest=".",
            instruction=instruction,
            make={"obs_type": "state", "observation_width": image_size, "observation_height": image_size},
        )

    def coverage(self) -> float:
        """Share of the outline that the T covers now, 0..1."""
        covered: np.floating = self._env.unwrapped._get_coverage()
        return float(covered)

    def _picture(self) -> Frames:
        """Drawn when it is asked for, not at every step as the package's own observations are; without the mark at the command that `render` draws."""
        drawn: Frames = self._env.unwrapped._render()
        return drawn

    def _numbers(self) -> Floats:
        return np.asarray(self._seen[:2], np.float32)  # where the finger is; where the T is, a policy must see

    def _resting(self) -> Floats:
        return self._numbers()
