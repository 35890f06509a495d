"""LeRobot's training batches as the objective takes them: which rows LeRobot is to read, and what becomes of them.

    N = 2 blocks of A = 8 actions, a frame every 2 control steps; offsets count from the sampled row, as LeRobot's delta indices do

    observation    0   2   4   6   8   10  12  14  16        frames; states are those at 0 and 8, as their blocks begin
    action         0 1 2 3 4 5 6 7 | 8 9 10 11 12 13 14 15   as labels, and as what was executed: LeRobot reads one column of actions

LeRobot clamps what lies beyond an episode to its last row and marks it (`<key>_is_pad`), as `wam.data.windows` does; what is marked is not
supervised.  States and actions come in the robot's units and leave normalised with the policy's own statistics.

Letters: B batch, T observations, N blocks, A actions a block, d raw dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from wam.config import Config, TimelineConfig
from wam.data.normalize import Normalizer
from wam.data.units import Units
from wam.data.views import Canvas

from lerobot_policy_wam.names import ACTION, PAD, STATE, camera_keys, frames_of, tasks_of, vector_of


@dataclass(frozen=True)
class Offsets:
    """Rows of a window, counted from its first.

    Attributes:
        observation: sorted; what LeRobot reads of pictures and states.
        frames, states: where among these the window's frames (1 + 4kN) and states (N) are.
        action: (N * A); below 0 for those that would lead to a first frame inside block 0.
    """

    observation: tuple[int, ...]
    frames: tuple[int, ...]
    states: tuple[int, ...]
    action: tuple[int, ...]

    @classmethod
    def of(cls, t: TimelineConfig) -> Offsets:
        """The rows of a timeline's window."""
        frames = [t.stride * i for i in range(t.frames)]
        states = [max(t.actions_per_block * block - t.lead, 0) for block in range(t.blocks)]
        both = sorted({*frames, *states})
        return cls(tuple(both), tuple(both.index(i) for i in frames), tuple(both.index(i) for i in states), tuple(i - t.lead for i in range(t.blocks * t.actions_per_block)))


def check_trainable(config: Config, fps: float, control_hz: float | None = None) -> list[str]:
    """What of a config LeRobot's reader cannot give; returns what is trained otherwise than by `wam train`, to be said.

    Args:
        fps: rows a second of the dataset.
        control_hz: control steps a second of a policy that is trained further.

    Raises:
        ValueError: what cannot be trained so.
    """
    units = Units.of(config.model.embodiment(config.data.embodiment), config.data)
    wanted = control_hz or config.data.control_hz or fps
    if abs(wanted - fps) > 1e-6 * fps:
        raise ValueError(f"the dataset has {fps:g} rows a second, and the policy {wanted:g} control steps; lerobot-train does not resample: train with `wam train` (data.control_hz), or on a dataset of {wanted:g} Hz")
    strange = sorted({part.column for part in units.action} - {ACTION})
    if strange:
        raise ValueError(f"actions are in column {strange[0]!r}; lerobot-train reads windows of column {ACTION!r} alone: train with `wam train`")
    if config.timeline.states_per_block != 1:
        raise ValueError(f"timeline.states_per_block is {config.timeline.states_per_block}; this plugin trains models of one state a block: train with `wam train`")
    said = []
    if any(part.executed != part.column for part in units.action):
        said.append(f"what was executed ({units.action[0].executed}) is taken to be the label ({ACTION}), as LeRobot reads windows of that column alone")
    if config.data.augment.view_dropout or config.data.augment.crop < 1 or any(getattr(config.data.augment, name) for name in ("brightness", "contrast", "saturation", "hue")):
        said.append("pictures are not augmented by data.augment; LeRobot's own transforms are --dataset.image_transforms")
    return said


@dataclass(frozen=True)
class Windows:
    """Turns batches into the objective's.

    Attributes:
        given: keys of cameras, by camera, where they are not found by name.
        task: instead of the dataset's, or None.
    """

    config: Config
    embodiment: str
    normalizer: Normalizer
    given: Mapping[str, str]
    task: str | None = None

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """A batch of `LeRobotDataset` with this policy's delta indices, as `wam.data.dataset.Batch`.

        Raises:
            ValueError: cameras, states or actions that are missing, or of another size or length.
        """
        t, robot = self.config.timeline, self.config.model.embodiment(self.embodiment)
        offsets, units = Offsets.of(t), Units.of(robot, self.config.data)
        keys = camera_keys(self.config.data.cameras, self.given, batch)
        frames = frames_of(batch, keys, Canvas.of(self.config.data, self.config.codec.image_size))
        if frames.ndim != 5 or frames.shape[1] != len(offsets.observation):
            raise ValueError(f"pictures have {frames.shape[1] if frames.ndim == 5 else 1} moments, and this policy trains on {len(offsets.observation)}; the dataset must be read with the policy's observation_delta_indices")
        rows = len(frames)
        camera = next(iter(keys.values()))
        seen_pad = _padding(batch, camera, (rows, len(offsets.observation)))
        raw_state = vector_of(batch, "state", units.state, STATE, robot.raw_state_dim)
        raw_action = vector_of(batch, "action", units.action, ACTION, robot.raw_action_dim)
        if raw_action is None or raw_action.shape[:2] != (rows, len(offsets.action)):
            raise ValueError(f"actions have shape {None if raw_action is None else raw_action.shape}; expected (batch, {len(offsets.action)}, {robot.raw_action_dim}), read with the policy's action_delta_indices")
        action_pad = _padding(batch, ACTION, raw_action.shape[:2])
        action_pad[:, : t.lead] = True
        state, at_blocks = self._states(raw_state, rows, offsets, units, len(offsets.observation))
        action = self._actions(raw_action, at_blocks, action_pad, units)
        return {
            "frames": torch.from_numpy(frames[:, list(offsets.frames)]),
            "frames_is_pad": torch.from_numpy(seen_pad[:, list(offsets.frames)]),
            "state": torch.from_numpy(state),
            "state_is_pad": torch.from_numpy(seen_pad[:, list(offsets.states)]),
            "action": torch.from_numpy(action),
            "executed": torch.from_numpy(action),
            "action_is_pad": torch.from_numpy(action_pad),
            "instruction": tasks_of(batch, rows, self.task),
            "embodiment": [self.embodiment] * rows,
        }

    def _states(self, raw: np.ndarray | None, rows: int, offsets: Offsets, units: Units, moments: int) -> tuple[np.ndarray, np.ndarray | None]:
        """(B, N, D) normalised and (B, N, d) raw; zeros and None where the model takes none."""
        if raw is None:
            if self.config.model.state != "none" or units.relative:
                raise ValueError(f"the state is missing from the batch ({STATE}), and this policy needs one")
            return np.zeros((rows, len(offsets.states), units.state_dim), np.float32), None
        if raw.shape[:2] != (rows, moments):
            raise ValueError(f"states have shape {raw.shape}; expected (batch, {moments}, {raw.shape[-1]}), read with the policy's observation_delta_indices")
        at_blocks = raw[:, list(offsets.states)]
        return self.normalizer.normalize("state", units.encode_state(at_blocks)), at_blocks

    def _actions(self, raw: np.ndarray, at_blocks: np.ndarray | None, is_pad: np.ndarray, units: Units) -> np.ndarray:
        """(B, N * A, D), relative to the state at their block's start where they are, and normalised."""
        t, rows = self.config.timeline, len(raw)
        blocks = raw.reshape(rows, t.blocks, t.actions_per_block, -1)
        encoded = units.encode_actions(blocks, at_blocks if units.relative else None, is_pad.reshape(blocks.shape[:3]))
        return self.normalizer.normalize("action", encoded.reshape(rows, t.blocks * t.actions_per_block, -1))


def _padding(batch: Mapping[str, Any], key: str, shape: tuple[int, ...]) -> np.ndarray:
    given = batch.get(f"{key}{PAD}")
    return np.zeros(shape, bool) if given is None else np.array(torch.as_tensor(given).cpu().numpy(), bool)
