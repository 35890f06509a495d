"""Environments as a policy sees them: pictures cut and placed as those it was trained on.

    environment draws (H, W)  ->  `wam.data.views.Canvas` of the checkpoint's config  ->  the session

Where training cut pictures at random (`data.augment.crop`), the middle is seen here, as in validation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from wam.data.views import Canvas
from wam.evaluation.environments import StepResult
from wam.evaluation.vector import Observations, VectorEnv


def seen_through(canvas: Canvas, env: VectorEnv) -> VectorEnv:
    """An environment as a policy with this canvas sees it: itself, unless pictures are cut.

    Raises:
        ValueError: the policy sees several cameras, the environment shows one.
    """
    if canvas.cameras != 1:
        env.close()
        raise ValueError(
            f"the checkpoint sees {canvas.cameras} cameras on one canvas ({canvas.layout}), and {env.name} shows one; "
            "drive your robot through `wam.inference.session.Session`, with pictures from `wam.data.views.compose`"
        )
    return env if canvas.crop == 1 else cast(VectorEnv, _Seen(canvas, env))


class _Seen:
    """A `VectorEnv` whose pictures go through a canvas of one camera; everything else is its own."""

    def __init__(self, canvas: Canvas, env: VectorEnv):
        self.canvas, self.env = canvas, env

    def __getattr__(self, name: str) -> Any:
        return getattr(self.env, name)

    def __enter__(self) -> _Seen:
        self.env.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.env.__exit__(*error)

    def reset(self, seeds: Sequence[int]) -> Observations:
        """See `VectorEnv.reset`."""
        first = self.env.reset(seeds)
        return replace(first, frames=self._look(first.frames))

    def run(self, actions: npt.NDArray[Any], rows: Sequence[int], frame_stride: int) -> list[StepResult]:
        """See `VectorEnv.run`."""
        return [replace(result, frames=self._look(result.frames)) for result in self.env.run(actions, rows, frame_stride)]

    def _look(self, frames: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        flat = frames.reshape(-1, *frames.shape[-3:])
        return self.canvas.compose([flat]).reshape(*frames.shape[:-3], *self.canvas.size, 3) if len(flat) else frames
