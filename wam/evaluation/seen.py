"""Environments as a policy sees them: pictures cut and placed as those it was trained on.

    environment draws (H, W), or (H, V W) for V cameras  ->  `wam.data.views.Canvas` of the checkpoint's config  ->  the session

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
    """An environment as a policy with this canvas sees it: itself, unless pictures are cut or several cameras are placed on a canvas.

    Raises:
        ValueError: the policy sees another number of cameras than the environment shows.
    """
    shown = len(getattr(env, "cameras", ("the only one",)))
    if canvas.cameras != shown:
        env.close()
        raise ValueError(
            f"the checkpoint sees {canvas.cameras} cameras on one canvas ({canvas.layout}), and {env.name} shows {'one' if shown == 1 else shown}; "
            "drive your robot through `wam.inference.session.Session`, with pictures from `wam.data.views.compose`"
        )
    return env if canvas.crop == 1 and shown == 1 else cast(VectorEnv, _Seen(canvas, env))


def look(canvas: Canvas, frames: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """What a policy with this canvas sees of pictures: (..., h, V w, 3) of V cameras side by side, to (..., H, W, 3)."""
    flat = frames.reshape(-1, *frames.shape[-3:])
    seen = canvas.compose(np.split(flat, canvas.cameras, axis=2)) if len(flat) else np.zeros((0, *canvas.size, 3), np.uint8)
    return seen.reshape(*frames.shape[:-3], *canvas.size, 3)


class _Seen:
    """A `VectorEnv` whose pictures go through a canvas; everything else is its own."""

    def __init__(self, canvas: Canvas, env: VectorEnv):
        self.canvas, self.env = canvas, env

    def __getattr__(self, name: str) -> Any:
        return getattr(self.env, name)

    def __enter__(self) -> _Seen:
        self.env.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.env.__exit__(*error)

    def reset(self, seeds: Sequence[int], rows: Sequence[int] | None = None) -> Observations:
        """See `VectorEnv.reset`."""
        first = self.env.reset(seeds) if rows is None else self.env.reset(seeds, rows)
        return replace(first, frames=look(self.canvas, first.frames))

    def run(self, actions: npt.NDArray[Any], rows: Sequence[int], frame_stride: int) -> list[StepResult]:
        """See `VectorEnv.run`."""
        return [replace(result, frames=look(self.canvas, result.frames)) for result in self.env.run(actions, rows, frame_stride)]

    def foresee(self, actions: npt.NDArray[Any], rows: Sequence[int], frame_stride: int) -> npt.NDArray[np.uint8]:
        """See `VectorEnv.foresee`."""
        return look(self.canvas, self.env.foresee(actions, rows, frame_stride))

    def collect(self, rows: Sequence[int] | None = None) -> dict[int, StepResult]:
        """See `VectorEnv.collect`."""
        return {row: replace(result, frames=look(self.canvas, result.frames)) for row, result in self.env.collect(rows).items()}
