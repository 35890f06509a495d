"""What a recording keeps beside its rows and frames: the plans of one episode, on disk.

    DIR/served/NAME.npz     told      JSON: the robot, the checkpoint, observations, plans and errors, all in control steps of the episode
                            seen      (n, 2)          row of the dataset that shows a frame, and when it was really taken
                            tail      (m, H, W, 3)    frames behind the last row: nobody knows what was executed after them
                            states    (o, 1 + d)      step, and the state
                            made      (P, A, d)       plans before the gate; NaN behind their end
                            passed    (P, A, d)       what was sent of them
                            goals     (g, H, W, 3)    pictures that the policy was given

With the dataset's frames and `action.executed` that is all that a plan depended on, but for what a video loses of a picture.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from wam.files import atomic_path
from wam.serving.contract import Contract
from wam.serving.events import Planned

ARRAYS = ("seen", "tail_at", "tail", "states", "made", "passed", "goals")
FOLDER, FORMAT = "served", "wam-served-1"


@dataclass(frozen=True)
class Served:
    """One episode; see the module's docstring.

    Attributes:
        told: of the robot (`robot`), the checkpoint and the session; `observations`, `plans` (each with `at`, the observation it rests on), `errors`.
        tail_at: when the frames of the tail were taken.
    """

    told: Mapping[str, Any]
    seen: np.ndarray
    tail_at: np.ndarray
    tail: np.ndarray
    states: np.ndarray
    made: np.ndarray
    passed: np.ndarray
    goals: np.ndarray

    @classmethod
    def of(
        cls,
        about: Mapping[str, Any],
        contract: Contract,
        seen: Sequence[tuple[int, float]],
        tail: Sequence[tuple[float, np.ndarray]],
        states: Mapping[int, np.ndarray],
        observations: Sequence[Mapping[str, Any]],
        plans: Sequence[tuple[int, Planned]],
        errors: Sequence[Mapping[str, Any]],
    ) -> Served:
        """An episode from what was noted of it."""
        size, d = contract.canvas.size, contract.robot
        made, passed = (np.full((len(plans), contract.horizon, d.raw_action_dim), np.nan, np.float32) for _ in range(2))
        for row, (_, plan) in enumerate(plans):
            made[row, : len(plan.made)], passed[row, : len(plan.passed)] = plan.made, plan.passed
        goals = list({id(p.goal): p.goal for _, p in plans if p.goal is not None}.values())
        place = {id(goal): i for i, goal in enumerate(goals)}
        entries = [
            {"at": at, "goal": place.get(id(p.goal)), "mode": p.mode, "steps": p.steps, "seed": p.seed, "committed": p.committed, "length": len(p.made), "passed": len(p.passed), **p.about}
            for at, p in plans
        ]
        told = {"format": FORMAT, **about, "robot": robot_facts(contract), "observations": list(observations), "plans": entries, "errors": list(errors)}
        numbers = [np.concatenate([[step], state]) for step, state in sorted(states.items())]
        return cls(
            told,
            np.array(seen, np.float64).reshape(-1, 2),
            np.array([at for at, _ in tail], np.float64),
            np.stack([frame for _, frame in tail]) if tail else np.zeros((0, *size, 3), np.uint8),
            np.array(numbers, np.float64).reshape(len(numbers), 1 + d.raw_state_dim),
            made,
            passed,
            np.stack(goals) if goals else np.zeros((0, *size, 3), np.uint8),
        )


def robot_facts(contract: Contract) -> dict[str, Any]:
    """What a recording and a checkpoint must agree on, for people to read side by side."""
    return {
        "embodiment": contract.robot.name,
        "cameras": ", ".join(contract.cameras),
        "picture": f"{contract.canvas.size[0]} x {contract.canvas.size[1]}, {contract.canvas.layout}",
        "state": f"{contract.robot.raw_state_dim} numbers",
        "action": f"{contract.robot.raw_action_dim} numbers",
        "control rate": f"{contract.control_hz:g} a second",
        "frames": f"every {contract.frame_stride} control steps",
    }


def write_served(root: Path, name: str, served: Served) -> None:
    """Write an episode's plans, atomically.

    Raises:
        OSError: the disk is full.
    """
    folder = root / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Any] = {key: getattr(served, key) for key in ARRAYS}
    with atomic_path(folder / f"{name}.npz") as temporary:
        np.savez_compressed(temporary, told=np.array(json.dumps(served.told)), **arrays)


def read_served(path: Path) -> Served:
    """An episode's plans.

    Raises:
        ValueError: the file is damaged, or of another format.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            told = json.loads(str(stored["told"]))
            arrays = {key: stored[key] for key in ARRAYS}
    except Exception as error:  # zip, numpy and JSON each have errors of their own
        raise ValueError(f"{path} cannot be read as plans that `wam serve --record` kept ({error}); leave it out, or record again") from error
    if told.get("format") != FORMAT:
        raise ValueError(f"{path} has format {told.get('format')!r}, and this version reads {FORMAT!r}")
    return Served(told, **arrays)
