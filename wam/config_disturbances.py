"""What goes wrong in an episode on purpose: drawn from the episode's seed, so every policy and every mode meets the same."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from wam.config_tree import require as _require

DISTURBANCES = {  # kind -> what is done; `wam.evaluation.disturbances` has sizes and times
    "object_moved": "the object is taken away and placed anew, beside where it began",
    "gripper_opened": "the fingers open by themselves, after they have closed at the object",
    "arm_pushed": "the arm is pushed aside, away from the goal",
    "camera_shifted": "the camera is turned a little, and stays so",
    "light_changed": "light and colours change, and stay so",
    "occlusion": "something covers a part of the picture for a while",
    "state_noise": "the state is measured with noise",
    "action_noise": "the robot executes commands with noise",
    "frames_dropped": "the camera hangs for a while: frames that come are the last one again",
    "latency": "plans take longer, by some control steps",
    "paraphrase": "the instruction is said in other words",
}


@dataclass(frozen=True)
class DisturbanceConfig:
    """Disturbances of an evaluation."""

    kinds: tuple[str, ...] = ()  # e.g. [object_moved, arm_pushed]; one of them is drawn per episode.  Empty: none
    strength: float = 1.0  # of each kind's usual size
    seed: int = 0  # with an episode's seed, decides what happens and when
    share: float = 1.0  # of the episodes in which something happens
    undisturbed: str | None = None  # rollout.json of the same policy on the same seeds without disturbances: gives success at first attempt, and what disturbances cost
    begins: tuple[float, float] = (0.02, 0.12)  # kinds that begin at a drawn step do so in this part of an episode's `max_steps`

    def __post_init__(self) -> None:
        for kind in self.kinds:
            near = ", ".join(difflib.get_close_matches(kind, DISTURBANCES, n=1)) or ", ".join(DISTURBANCES)
            _require(kind in DISTURBANCES, f"disturbances.kinds names {kind!r}", f"there is no such disturbance; nearest: {near}")
        _require(len(set(self.kinds)) == len(self.kinds), f"disturbances.kinds is {list(self.kinds)}", "name each kind once")
        _require(self.strength > 0, f"disturbances.strength is {self.strength}", "it must be above 0; for none leave disturbances.kinds empty")
        _require(self.seed >= 0, f"disturbances.seed is {self.seed}", "it must be at least 0")
        _require(0 < self.share <= 1, f"disturbances.share is {self.share}", "it is a part of the episodes, above 0 and at most 1")
        low, high = self.begins
        _require(0 <= low <= high <= 1, f"disturbances.begins is {list(self.begins)}", "it is [earliest, latest] as parts of an episode, e.g. [0.02, 0.12]")
