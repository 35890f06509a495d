"""Whether an environment is the robot that a checkpoint was trained for, told side by side.

A policy's contract with its robot lies in the checkpoint: which cameras it sees and how large, how many numbers a state and an action
have, and how many control steps make a second.  Where an environment differs in one of them, a person needs to see both at once:

    what            | checkpoint       | environment
    control rate    | 80 a second      | 10 a second      <- differs
"""

from __future__ import annotations

from typing import Any

from wam.data.views import Canvas
from wam.evaluation.vector import VectorEnv
from wam.pretrained import Policy

Row = tuple[str, str, str, bool]  # what, the checkpoint's, the environment's, whether they differ


def camera_settings(policy: Policy) -> dict[str, Any]:
    """What an environment must be asked to draw for a policy: `camera`, one name or several, and `image_size` of each."""
    cameras = tuple(_short(name) for name in policy.config.data.cameras)
    high, wide = Canvas.of(policy.config.data, policy.config.codec.image_size).cell
    return {"camera": cameras[0] if len(cameras) == 1 else cameras, "image_size": high if high == wide else (high, wide)}


def disagreement(policy: Policy, env: VectorEnv) -> str | None:
    """What keeps a policy from driving in an environment, as a table of both sides; None: nothing does.

    An instruction that is in none of the training data is shown, and does not keep it from driving.
    """
    rows = _compared(policy, env)
    if not any(differs for *_, differs in rows):
        return None
    table = [("what", "checkpoint", "environment", "")] + [(what, ours, theirs, "<- differs" if differs else "") for what, ours, theirs, differs in rows]
    widths = [max(len(row[i]) for row in table) for i in range(3)]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, [*widths, 0], strict=True)).rstrip(" |") for row in table]
    body = "\n".join(f"    {line}" for line in lines)
    return f"{env.name} is not the robot that the checkpoint was trained for:\n{body}\nuse an environment of that robot, or a checkpoint trained on this one"


def _compared(policy: Policy, env: VectorEnv) -> list[Row]:
    embodiment = policy.config.data.embodiment
    dims = next(e for e in policy.config.model.embodiments if e.name == embodiment)
    seen = Canvas.of(policy.config.data, policy.config.codec.image_size)
    ours, theirs = tuple(_short(name) for name in policy.config.data.cameras), tuple(getattr(env, "cameras", ()))
    drawn = (env.image_size, env.image_size) if isinstance(env.image_size, int) else tuple(env.image_size)
    tasks = sorted(policy.meta.get("tasks") or [])
    known = "any" if not tasks else "; ".join(tasks[:3]) + (f"; {len(tasks) - 3} more" if len(tasks) > 3 else "")
    return [
        ("robot", embodiment, env.name, False),
        ("cameras", ", ".join(ours), ", ".join(theirs) or "not named", bool(theirs) and ours != theirs),
        ("picture of each", _size(seen.cell), _size(drawn), seen.cell != drawn),
        ("state", f"{dims.raw_state_dim} numbers", f"{env.state_dim} numbers", dims.raw_state_dim != env.state_dim),
        ("action", f"{dims.raw_action_dim} numbers", f"{env.action_dim} numbers", dims.raw_action_dim != env.action_dim),
        ("control rate", f"{policy.control_hz:g} a second", f"{env.control_hz:g} a second", policy.control_hz != env.control_hz),
        ("instruction", known, env.instruction or "none", False),
    ]


def _size(size: tuple[int, ...]) -> str:
    return f"{size[0]} x {size[1]}"


def _short(camera: str) -> str:
    return camera.rsplit(".", 1)[-1]
