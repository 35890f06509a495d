"""How plans meet time in a closed loop: what the robot does while the next plan is made.

    synchronous    plan ....| act act act | plan ....| act act act          the robot holds while a plan is made
    asynchronous   act act act act act act                                  the next plan is made meanwhile; what is decided already is held clean in it
                       plan ....| plan ....|
    guided         as asynchronous, by guidance (real-time chunking), for checkpoints that were not trained with a prefix
    naive          as asynchronous, but the plan knows nothing of what is executed meanwhile: chunks are switched where they meet
    unaligned      as naive, and a plan is executed from its first action on when it comes, though it was made for the moment at which it was asked for
    ahead          the block after this one is planned while this one runs, all of which is decided

Time is counted in control steps, so a simulation is the same on every machine; `realtime` counts what plans really took.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from wam.config_tree import require as _require

TimeMode = Literal["synchronous", "asynchronous", "guided", "naive", "unaligned", "ahead"]


@dataclass(frozen=True)
class ExecutionConfig:
    """How plans meet time."""

    time: TimeMode = "synchronous"
    delay: int = 0  # control steps that the world moves on while a plan is made
    realtime: bool = False  # in place of `delay`: as many as each plan really took on this machine; one robot at a time
    missing_frames: Literal["left_out", "forward"] = "forward"  # `ahead`: frames that have not come are left out, or imagined from the decided actions
    forward_steps: int = 2  # `ahead`: solver steps of imagining them
    guidance: float = 5.0  # `guided`: largest weight of the guidance (Black et al. 2025, real-time chunking)
    gradient: Literal["network", "identity"] = "network"  # `guided`: guidance goes back through the network, or pulls as if its answer stayed (harder, and free)
    budget_ms: float | None = None  # chooses mode and solver steps from measured stage times: the best of `rollout.modes` that fits

    def __post_init__(self) -> None:
        _require(self.delay >= 0, f"execution.delay is {self.delay}", "it is a number of control steps, at least 0")
        _require(self.forward_steps >= 1, f"execution.forward_steps is {self.forward_steps}", "it must be at least 1")
        _require(self.guidance > 0, f"execution.guidance is {self.guidance}", "it must be above 0; use time=naive for none")
        _require(self.budget_ms is None or self.budget_ms > 0, f"execution.budget_ms is {self.budget_ms}", "it is a number of milliseconds above 0, or null for none")
        _require(not (self.realtime and self.delay), f"execution.realtime is on and execution.delay is {self.delay}", "use one of the two")
