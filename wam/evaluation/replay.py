"""Recorded episodes to be replayed: whose start is most like the one at hand, and what the robot did then.

    first observation of an episode  ->  the recorded start that is nearest to it  ->  its actions, open loop, then the robot holds

Where a dataset says which seed of which environment an episode was recorded with (as `wam collect` does), the same seed is the same start.
Else starts are compared by what the robot sees and feels: mean squared difference of the first picture, and of the state, each in units of
its spread over the recorded starts.  This is nearest neighbour imitation with k = 1, blind after its first look.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from wam.evaluation.environments import Floats, Frames, Observation

EXECUTED, ACTION, STATE = "action.executed", "action", "observation.state"


@dataclass(frozen=True)
class Recordings:
    """Starts and actions of E recorded episodes.

    Attributes:
        episodes: their numbers in the dataset.
        seeds: that they were recorded with in this environment; None where the dataset does not say.
        pictures: (E, h, w, 3) uint8, first frames; None where the dataset has no camera.
        states: (E, Ds), first states.
        actions: of each, (length, Da): what was really executed, where that is recorded beside the label.
    """

    episodes: tuple[int, ...]
    seeds: tuple[int | None, ...]
    pictures: Frames | None
    states: Floats
    actions: tuple[Floats, ...]

    def nearest(self, seed: int, first: Observation) -> int:
        """Which recording starts most like this episode: a position in `episodes`.

        Raises:
            ValueError: states or pictures that cannot be compared with the recorded ones.
        """
        if seed in self.seeds:
            return self.seeds.index(seed)
        if first.state.shape != self.states.shape[1:]:
            raise ValueError(f"the environment's state has {len(first.state)} numbers, the recorded ones {self.states.shape[1]}; replay a dataset of this robot")
        distance = _spread_apart(self.states, first.state)
        if self.pictures is not None:
            if first.frames[0].shape != self.pictures.shape[1:]:
                raise ValueError(f"the environment's pictures are {first.frames[0].shape}, the recorded ones {self.pictures.shape[1:]}; say the same camera and image_size")
            distance = distance + _spread_apart(self.pictures, first.frames[0])
        return int(np.argmin(distance))


def _spread_apart(recorded: npt.NDArray[Any], now: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """(E,) mean squared differences, in units of the variance over the recorded starts; where nothing varies, nothing tells them apart."""
    flat = recorded.reshape(len(recorded), -1).astype(np.float64)
    spread = float(flat.var(axis=0).mean())
    if spread == 0:
        return np.zeros(len(recorded))
    differences: npt.NDArray[np.float64] = ((flat - now.reshape(1, -1)) ** 2).mean(axis=1) / spread
    return differences


def read_recordings(root: Path, env_name: str) -> Recordings:
    """The recordings of a dataset that were made in an environment, or all where the dataset does not say where they were made.

    Raises:
        FileNotFoundError, ValueError: no dataset there, or none of its episodes is of this environment.
    """
    from wam.data.lerobot import LeRobotDataset
    from wam.data.video import VideoDecoder

    source = LeRobotDataset(root)
    made = _made(source.root, len(source.episodes))
    bare = env_name.partition("?")[0]
    chosen = [i for i, (environment, _) in enumerate(made) if environment in (None, bare)]
    if not chosen:
        raise ValueError(f"{root} has no episode of {bare}; it has those of: {', '.join(sorted({str(e) for e, _ in made}))}")
    column = EXECUTED if EXECUTED in source.features else ACTION
    cameras = [key for key, feature in source.features.items() if feature.dtype == "video"]
    pictures = None
    if cameras:
        decoder = VideoDecoder()
        spans = [source.episodes[i].videos[cameras[0]] for i in chosen]
        pictures = np.concatenate([decoder.read_frames(span.path, np.array([span.first_frame])) for span in spans])
    return Recordings(
        episodes=tuple(chosen),
        seeds=tuple(seed if environment is not None else None for environment, seed in (made[i] for i in chosen)),
        pictures=pictures,
        states=np.stack([source.read(i, STATE)[0] for i in chosen]).astype(np.float32),
        actions=tuple(source.read(i, column).astype(np.float32) for i in chosen),
    )


def _made(root: Path, episodes: int) -> list[tuple[str | None, int | None]]:
    """Of each episode, the environment and seed it was recorded with, where the episode table says so."""
    import pandas as pd  # takes as long to import as everything else that a simulator's worker needs

    tables = [pd.read_parquet(path) for path in sorted((root / "meta/episodes").glob("*/*.parquet"))]
    if not tables or not {"seed", "environment"} <= set(tables[0].columns):
        return [(None, None)] * episodes
    whole = pd.concat(tables).sort_values("episode_index")
    return [(str(environment), int(seed)) for environment, seed in zip(whole["environment"], whole["seed"], strict=True)]
