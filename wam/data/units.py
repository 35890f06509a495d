"""What a robot's columns mean: raw physical numbers to the numbers that the network sees, and back.

    files --rows--> raw columns --encode--> network units --normalise--> network          network --unnormalise--> --decode--> commands
                    (what a robot             relative to the state at the block's
                     reports and takes)       start, where the robot's config says so

A dataset, a session and a check use one and the same `Units`, so that training and driving cannot part.
Statistics are those of the network units: of relative actions over every pair (row, offset within a block) inside an episode.

Letters: A actions a block, d raw dimensions, D network dimensions (before padding to the widest robot).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from wam.config import DataConfig, EmbodimentConfig, TimelineConfig
from wam.data.lerobot import LeRobotDataset
from wam.data.normalize import Method, Normalizer

Rows = Mapping[str, np.ndarray]  # "state", "action", "executed": (length, d) float32, raw


@dataclass(frozen=True)
class Units:
    """One robot's units; immutable.

    Attributes:
        robot: sizes and groups.
        columns: of "state", "action" and "executed", in the dataset.
        normalization: how statistics are taken where nothing else is said.
    """

    robot: EmbodimentConfig
    columns: Mapping[str, str]
    normalization: Method

    @classmethod
    def of(cls, robot: EmbodimentConfig, data: DataConfig) -> Units:
        """The units of a robot in a dataset."""
        columns = {"state": data.state, "action": data.action, "executed": data.executed_action or data.action}
        return cls(robot, columns, data.normalization)

    @property
    def state_dim(self) -> int:
        """Numbers of a state that the network sees, before padding."""
        return self.robot.state_dim

    @property
    def action_dim(self) -> int:
        """Numbers of an action that the network sees, before padding."""
        return self.robot.action_dim

    @property
    def relative(self) -> bool:
        """Whether actions depend on the state at their block's start."""
        return any(i >= 0 for i in self.robot.relative_to)

    def rows(self, source: LeRobotDataset, episode: int) -> dict[str, np.ndarray]:
        """The raw columns of an episode: "state", "action" and "executed", (length, d) float32 each."""
        return {name: source.read(episode, column).astype(np.float32) for name, column in self.columns.items()}

    def encode_state(self, state: np.ndarray) -> np.ndarray:
        """Raw states (..., d) in network units (..., D)."""
        return state

    def encode_actions(self, actions: np.ndarray, origin_state: np.ndarray | None = None, is_pad: np.ndarray | None = None) -> np.ndarray:
        """Raw actions (..., A, d) in network units (..., A, D).

        Args:
            origin_state: (..., d_state) raw: the state at each block's start; needed where actions are `relative`.
            is_pad: (..., A): beyond the episode; relative actions are then no motion, absolute ones stay as they are.
        """
        return actions

    def decode_actions(self, actions: np.ndarray, origin_state: np.ndarray | None = None) -> np.ndarray:
        """Actions in network units (..., A, D) as raw commands (..., A, d): the inverse of `encode_actions`."""
        return actions

    def fit(self, episodes: Iterable[Rows], timeline: TimelineConfig) -> Normalizer:
        """Statistics of "state" and "action" in network units.

        Args:
            episodes: raw rows, as `rows` gives them; an episode whose windows stay inside language spans can be given span by span.
        """
        parts = list(episodes)
        return Normalizer.fit({name: np.concatenate([part[name] for part in parts]) for name in ("state", "action")}, self.normalization)
