"""A recorded dataset in which it can be seen what will come of an episode: a bright bar succeeds, a dark one fails."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from tiny import SMALL

from wam.config import Config, load_config
from wam.data.recording import EpisodeBuffer, Recording, RecordingFormat

CAMERA, STEPS = "observation.images.front", 30
FORM = RecordingFormat(20, {CAMERA: (32, 48)}, ("x", "y", "z", "gripper"), ("dx", "dy", "dz", "grip"), "toy", 2)


def toy_frame(place: float, good: bool) -> np.ndarray:
    """(32, 48, 3) uint8: grey, with a bar at a place in 0..1."""
    frame = np.full((32, 48, 3), 60, np.uint8)
    frame[:, int(place * 40) : int(place * 40) + 6] = 200 if good else 20
    return frame


def toy_episode(rng: np.random.Generator, good: bool) -> EpisodeBuffer:
    """Random actions and states, and a bar that drifts."""
    buffer, place = EpisodeBuffer(FORM, "push the bar"), rng.uniform(0.2, 0.6)
    buffer.begin({CAMERA: toy_frame(place, good)}, rng.normal(size=4))
    for step in range(STEPS):
        seen = {CAMERA: toy_frame(place + 0.01 * step, good)} if step % 2 else None
        buffer.add(rng.uniform(-1, 1, 4), rng.normal(size=4), seen, success=good and step == STEPS - 1)
    return buffer


def record_toy(root: Path, episodes: int) -> Recording:
    """Every other episode succeeds at its last step."""
    recording, rng = Recording(root, FORM), np.random.default_rng(0)
    for i in range(episodes):
        recording.add(f"episode-{i:03d}", toy_episode(rng, i % 2 == 0), "failed" if i % 2 else "success", {"seed": i, "environment": "toy/bar"})
    recording.assemble()
    return recording


def toy_config(root: Path, *overrides: str) -> Config:
    """A run of seconds on it."""
    data = (f"data.root={root}", f"data.cameras=[{CAMERA}]", "data.executed_action=action.executed", "data.validation_fraction=0.33", "codec.fit_frames=100")
    quick = ("timeline.blocks=2", "training.batch_size=8", "training.warmup_steps=5", "training.log_every=12", "training.validate_every=12", "training.precision=fp32")
    return load_config(None, (*SMALL, *data, *quick, "training.modes={skip: 1}", "training.learning_rate=3e-3", "training.validation_samples=1", "training.validation_batches=2", *overrides))
