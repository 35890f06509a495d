"""Requests: three dialects, told apart message by message, one meaning.

    endpoint             dialect     reply to a plan                                     reply to a reset       an error
    (absent)             openpi      map: actions, server_timing, policy_timing, ...     -                      text (JSON)
    infer, reset         RoboArena   the actions alone, a packed array                   text, its own words    text (JSON)
    plan, observe,       wam         as openpi's, with request_id; observe: what the     map                    map: error
      reset_session                  session holds

openpi's and RoboArena's clients take every text frame for an error and raise, so a robot that gets one holds.  All dialects may carry
the optional keys: session_id, timestamp, frame_times, executed, committed, commit_steps, gap, deadline_ms, mode, steps, seed, embodiment,
goal/CAMERA, want; a reset may carry outcome.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from wam.serving.contract import Contract
from wam.serving.errors import ServingError
from wam.serving.wire import Limits, pack, unpack

Dialect = Literal["openpi", "roboarena", "wam"]
Kind = Literal["plan", "observe", "reset"]
Outcome = Literal["success", "failed"]
ENDPOINTS: dict[str, tuple[Dialect, Kind]] = {
    "infer": ("roboarena", "plan"),
    "reset": ("roboarena", "reset"),
    "plan": ("wam", "plan"),
    "observe": ("wam", "observe"),
    "reset_session": ("wam", "reset"),
}
RESET_DONE = "reset successful"  # RoboArena's words
MAX_FRAMES, MAX_STEPS, MAX_ID, MAX_SECONDS = 64, 128, 128, 1e12


@dataclass(frozen=True)
class Request:
    """What one message asks for.

    Attributes:
        frames: uint8 (T, H, W, 3) as the policy sees them, oldest first; None: none were sent.
        state: (d,), at the newest frame.
        timestamp: seconds on the client's own clock, of the newest frame.
        frame_times: seconds, of each frame (T,).
        executed: actions since the observation before (n, d).
        committed: the plan's first actions, decided already (n, d).
        commit_steps: likewise, the first n of what is left of the plan before.
        gap: something else than planned was done since the observation before, and nobody knows what.
        deadline_s: after its arrival the plan is of no use.
        steps: solver steps.
        goal: a picture of what is to come about, uint8 (H, W, 3), as the policy sees it.
        want_imagined: the reply is to hold what the plan imagined, as pictures.
        outcome: with a reset: what came of the episode.
    """

    dialect: Dialect
    kind: Kind
    session_id: str | None = None
    prompt: str | None = None
    frames: np.ndarray | None = None
    state: np.ndarray | None = None
    timestamp: float | None = None
    frame_times: np.ndarray | None = None
    executed: np.ndarray | None = None
    committed: np.ndarray | None = None
    commit_steps: int = 0
    gap: bool = False
    deadline_s: float | None = None
    mode: str | None = None
    steps: int | None = None
    seed: int | None = None
    goal: np.ndarray | None = None
    want_imagined: bool = False
    outcome: Outcome | None = None
    request_id: str | int | None = None


def dialect_of(message: Any) -> tuple[Dialect, Kind]:
    """Who speaks, and what is asked.

    Raises:
        ServingError: the message is no map, or names an endpoint that is none.
    """
    if not isinstance(message, Mapping):
        raise ServingError("bad_message", "the message is no map", "send one map from names to values")
    endpoint = message.get("endpoint")
    if endpoint is None:
        return "openpi", "plan"
    if not isinstance(endpoint, str) or endpoint not in ENDPOINTS:
        raise ServingError("unknown_endpoint", f"endpoint is {str(endpoint)[:40]!r}", f"send one of {', '.join(ENDPOINTS)}, or none (openpi)")
    return ENDPOINTS[endpoint]


def parse(message: Mapping[str, Any], contract: Contract) -> Request:
    """A message as a request; pictures are laid on the policy's canvas.

    Raises:
        ServingError: something is missing, or not what the policy takes.
    """
    dialect, kind = dialect_of(message)
    session_id, request_id = _name(message, "session_id"), _request_id(message)
    if kind == "reset":
        return Request(dialect, kind, session_id, outcome=_outcome(message), request_id=request_id)
    robot = message.get("embodiment")
    if robot is not None and not (isinstance(robot, str) and robot == contract.robot.name):
        raise ServingError("unknown_embodiment", f"embodiment is {str(robot)[:40]!r}, and this server plans for {contract.robot.name!r}", "connect to a server of your robot's policy")
    frames = contract.frames(message)
    if len(frames) > MAX_FRAMES:
        raise ServingError("too_large", f"{len(frames)} frames in one message", f"send up to {MAX_FRAMES}, the newest last")
    times = message.get("frame_times")
    return Request(
        dialect,
        kind,
        session_id,
        prompt=contract.prompt(message),
        frames=frames,
        state=contract.state(message),
        timestamp=_number(message, "timestamp", -MAX_SECONDS, MAX_SECONDS),
        frame_times=None if times is None else _times(times, len(frames)),
        executed=None if message.get("executed") is None else contract.actions("executed", message["executed"], 64 * contract.horizon),
        committed=None if message.get("committed") is None else contract.actions("committed", message["committed"], contract.horizon),
        commit_steps=int(_whole(message, "commit_steps", 0, contract.horizon) or 0),
        gap=_truth(message, "gap"),
        deadline_s=_seconds(_number(message, "deadline_ms", 0, 3.6e6)),
        mode=_mode(message, contract),
        steps=_whole(message, "steps", 1, MAX_STEPS),
        seed=_whole(message, "seed", 0, 2**63 - 1),
        goal=contract.goal(message),
        want_imagined=_wants(message),
        request_id=request_id,
    )


@dataclass(frozen=True)
class Heard:
    """What a message's bytes say, or why they say nothing; and in which words the answer is to be."""

    dialect: Dialect
    request_id: str | int | None
    said: Request | ServingError


def hear(data: bytes, limits: Limits, contract: Contract) -> Heard:
    """Bytes as a request, in one go: all that takes time is done on the thread that calls this."""
    dialect: Dialect = "openpi"
    request_id = None
    try:
        message = unpack(data, limits)
        dialect, _ = dialect_of(message)
        given = message.get("request_id")
        request_id = given if type(given) is int or (isinstance(given, str) and len(given) <= MAX_ID) else None
        return Heard(dialect, request_id, parse(message, contract))
    except ServingError as error:
        return Heard(dialect, request_id, error)


# ------------------------------------------------------------------------------------------------ values


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1e3


def _number(message: Mapping[str, Any], name: str, low: float, high: float) -> float | None:
    value = message.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ServingError("wrong_type", f"{name} is a {type(value).__name__}", "send a number")
    if not math.isfinite(value):
        raise ServingError("not_finite", f"{name} is {value}", "send a finite number")
    if not low <= value <= high:
        raise ServingError("bad_value", f"{name} is {value:g}", f"send {low:g} to {high:g}")
    return float(value)


def _whole(message: Mapping[str, Any], name: str, low: int, high: int) -> int | None:
    value = message.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise ServingError("wrong_type", f"{name} is a {type(value).__name__}", "send a whole number")
    if not low <= value <= high:
        raise ServingError("bad_value", f"{name} is {value}", f"send {low} to {high}")
    return value


def _truth(message: Mapping[str, Any], name: str) -> bool:
    value = message.get(name)
    if value is not None and not isinstance(value, bool):
        raise ServingError("wrong_type", f"{name} is a {type(value).__name__}", "send true or false")
    return bool(value)


def _name(message: Mapping[str, Any], name: str) -> str | None:
    value = message.get(name)
    if value is None:
        return None
    if not isinstance(value, str) or not 0 < len(value) <= MAX_ID:
        raise ServingError("wrong_type", f"{name} is {'text of another length' if isinstance(value, str) else f'a {type(value).__name__}'}", f"send text of 1 to {MAX_ID} characters")
    return value


def _request_id(message: Mapping[str, Any]) -> str | int | None:
    value = message.get("request_id")
    return value if type(value) is int and abs(value) < 2**63 else _name(message, "request_id")


def _mode(message: Mapping[str, Any], contract: Contract) -> str | None:
    mode = message.get("mode")
    if mode is not None and not (isinstance(mode, str) and mode in contract.modes):
        raise ServingError("unknown_mode", f"mode is {str(mode)[:40]!r}", f"ask for one that this policy acts in: {', '.join(contract.modes)}")
    return mode


def _wants(message: Mapping[str, Any]) -> bool:
    value = message.get("want")
    if value is not None and not (isinstance(value, str) and value == "imagined"):
        raise ServingError("bad_value", f"want is {str(value)[:40]!r}", "send imagined, or nothing")
    return value is not None


def _outcome(message: Mapping[str, Any]) -> Outcome | None:
    value = message.get("outcome")
    if isinstance(value, str) and value in ("success", "failed"):
        return "success" if value == "success" else "failed"
    if value is not None:
        raise ServingError("bad_value", f"outcome is {str(value)[:40]!r}", "send success or failed, or nothing")
    return None


def _times(value: Any, count: int) -> np.ndarray:
    listed = isinstance(value, list) and all(type(x) in (int, float) for x in value)
    times = np.asarray(value, np.float64) if listed or (isinstance(value, np.ndarray) and value.dtype.kind in "iuf") else None
    if times is None or times.shape != (count,):
        raise ServingError("wrong_shape", "frame_times is not one number for each frame", f"send {count} seconds, rising")
    if not np.isfinite(times).all():
        raise ServingError("not_finite", "frame_times holds numbers that are not finite", "send seconds")
    if (np.diff(times) <= 0).any() or np.abs(times).max(initial=0) > MAX_SECONDS:
        raise ServingError("bad_value", "frame_times do not rise", "send the oldest frame first")
    return times


# ------------------------------------------------------------------------------------------------ replies


def plan_reply(dialect: Dialect, reply: dict[str, Any]) -> bytes:
    """A plan in the words of a dialect; `reply` holds "actions"."""
    return pack(reply["actions"] if dialect == "roboarena" else reply)


def done_reply(dialect: Dialect, reply: dict[str, Any]) -> bytes | str:
    """What answers a reset, or an observation."""
    return RESET_DONE if dialect == "roboarena" else pack(reply)


def error_reply(dialect: Dialect, error: ServingError, request_id: str | int | None = None) -> bytes | str:
    """A refusal: a map for those who know it, text for those who take text for an error."""
    told: dict[str, Any] = {"error": error.to_dict()}
    if dialect == "wam":
        return pack({**told, "request_id": request_id} if request_id is not None else told)
    return json.dumps(told, ensure_ascii=False)
