"""Disturbances of pictures, for any camera: something in front of it, a shift of the view, another light.

All take and give uint8 pictures (H, W, 3) and are pure functions of what was drawn for the episode.  A simulator that can turn its
camera or dim its lamps does that instead (`wam.evaluation.metaworld_stage`); a shift of pixels has no parallax and shows no new border.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from wam.evaluation.environments import Frames

Picture = Callable[[Frames], Frames]


def occluder(share: float, generator: np.random.Generator) -> Picture:
    """A plain rectangle that covers `share` of the picture (0..1, at most 0.9), somewhere, in a dull colour."""
    share = min(share, 0.9)
    height = min(1.0, np.sqrt(share) * generator.uniform(0.8, 1.25))
    height = max(height, share)
    width = min(1.0, share / height)
    top, left = generator.uniform(0, 1 - height), generator.uniform(0, 1 - width)
    colour = generator.integers(40, 140, 3).astype(np.uint8)

    def cover(frame: Frames) -> Frames:
        rows, columns = frame.shape[:2]
        covered = frame.copy()
        covered[round(top * rows) : round((top + height) * rows), round(left * columns) : round((left + width) * columns)] = colour
        return covered

    return cover


def shifter(share: float, generator: np.random.Generator) -> Picture:
    """The view moved by `share` of the picture's width in a drawn direction; the border repeats its last pixels."""
    angle = generator.uniform(0, 2 * np.pi)

    def shift(frame: Frames) -> Frames:
        rows, columns = frame.shape[:2]
        down, right = round(share * columns * np.sin(angle)), round(share * columns * np.cos(angle))
        taken = np.clip(np.arange(rows) - down, 0, rows - 1)[:, None], np.clip(np.arange(columns) - right, 0, columns - 1)[None]
        return frame[taken]

    return shift


def light_gains(change: float, generator: np.random.Generator) -> np.ndarray:
    """Gains of red, green and blue (3,): darker or brighter by `change`, and tinted by up to half of it."""
    brightness = 1 + change * generator.choice([-1.0, 1.0])
    return np.clip(brightness * (1 + generator.uniform(-change / 2, change / 2, 3)), 0.1, None)


def relighter(change: float, generator: np.random.Generator) -> Picture:
    """Another light: every channel times its gain, see `light_gains`."""
    gains = light_gains(change, generator)
    return lambda frame: np.clip(np.rint(frame * gains), 0, 255).astype(np.uint8)
