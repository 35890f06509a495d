"""From a plan to a reply: the deadline, the gate, and what a client is told about it.

    plan -> committed actions as they were decided -> in time? -> gate -> memory: what was sent -> reply
"""

from __future__ import annotations

import time
import uuid
from typing import Any

import numpy as np
import torch

from wam.inference.gate import MAX_HISTORY, Gate, GateRefusal, Passed
from wam.inference.session import Plan
from wam.pretrained import Policy
from wam.serving.contract import Contract
from wam.serving.errors import ServingError
from wam.serving.job import Job
from wam.serving.memory import Sent
from wam.serving.metrics import Metrics


def in_time(job: Job, metrics: Metrics) -> None:
    """Check a job's deadline.

    Raises:
        ServingError: it has passed.
    """
    if job.late_s > 0:
        metrics.missed.inc()
        raise ServingError("deadline_expired", f"the plan's deadline passed {job.late_s * 1e3:.0f} ms ago", "hold; ask again from a new observation")


def let_through(job: Job, plan: Plan, gate: Gate, metrics: Metrics) -> Passed:
    """What may be sent of a plan; the memory then knows that it was.

    Raises:
        ServingError: nothing; where the gate stops the robot, its entry is stopped.
    """
    entry, memory = job.entry, job.entry.memory
    assert plan.actions is not None and memory.now is not None
    now, actions = memory.now, plan.actions[0]
    if job.committed is not None:
        actions[: job.committed.shape[1]] = job.committed[0]  # as they were decided: the network's copy is rounded, and clipped to its range
    before = [a for a in (memory.executed.get(now - i) for i in range(MAX_HISTORY, 0, -1)) if a is not None]
    promised = [a for a in (memory.planned(now + i) for i in range(min(gate.config.blend, len(actions)))) if a is not None]
    in_time(job, metrics)
    try:
        passed = gate(actions, np.stack(before) if before else None, np.stack(promised) if promised else None, time.monotonic() - job.arrival)
        if passed.cut is not None and job.request.dialect == "openpi":
            raise ServingError("gate_refused", f"{passed.cut.told}, and openpi's clients take whole plans only", "hold; ask again from another observation")
    except GateRefusal as refusal:
        metrics.gate.labels(refusal.cut.reason).inc(len(actions))
        if refusal.stops:
            entry.stopped = str(refusal)
            raise ServingError("stopped", str(refusal), "look at the robot, then reset the session") from None
        raise ServingError("gate_refused", str(refusal), "hold; ask again from another observation") from None
    for reason, count in passed.interventions.items():
        metrics.gate.labels(reason).inc(count)
    memory.plans.append(Sent(now, passed.actions))
    entry.plans += 1
    return passed


def reply_to(job: Job, plan: Plan, passed: Passed, started: float, size: int, contract: Contract) -> dict[str, Any]:
    """The reply, but for what is decoded.

    Args:
        started: when its batch was begun (`time.monotonic`).
        size: robots of the batch.
    """
    memory, hz, done, session = job.entry.memory, contract.control_hz, time.monotonic(), job.entry.session
    assert session is not None
    steps = (memory.now or 0) / hz
    start = job.request.timestamp if job.request.timestamp is not None else steps if memory.clock == "steps" else (memory.origin or 0.0) + steps
    return {
        "actions": passed.actions,
        "server_timing": {"infer_ms": (done - started) * 1e3, "queue_ms": (started - job.arrival - job.decode_s) * 1e3, "decode_ms": job.decode_s * 1e3, "batch": size},
        "policy_timing": {"infer_ms": sum(plan.timings.values()), **{name.replace(" ", "_") + "_ms": spent for name, spent in plan.timings.items()}},
        "plan": {
            "id": uuid.uuid4().hex,
            "clock": memory.clock,
            "step": memory.now,
            "valid_from": float(start),
            "valid_until": float(start) + len(passed.actions) / hz,
            "control_dt": 1 / hz,
            "cut": None if passed.cut is None else {"step": passed.cut.step, "reason": passed.cut.reason, "message": passed.cut.told},
            "interventions": dict(passed.interventions),
            "memory_blocks": session.block,
            **({"checkpoint": contract.about["checkpoint"]} if "checkpoint" in contract.about else {}),
        },
        **({} if job.surprise is None else {"surprise": job.surprise}),
    }


def pictures_of(policy: Policy, plan: Plan, contract: Contract) -> dict[str, Any]:
    """What a plan imagined, for the wire: uint8 frames (F, H, W, 3), the first `frame_dt` after the plan's start."""
    assert plan.imagined is not None
    with torch.no_grad():
        frames = policy.codec.decode(plan.imagined, first=False)[0].cpu().numpy()
    return {"frames": frames, "frame_dt": contract.frame_stride / contract.control_hz}
