"""A session on disk: a robot that was stopped, or whose server was, goes on as if nothing had happened.

    session.safetensors    every tensor it holds (cache, conditions, encoder, what waits), and in the header what they are
    the header             a tree of names; the policy's fingerprint; the robot; the noise generators' states

What is read is data: tensors, numbers and names of the few classes listed here.  A session of another policy is refused.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from wam.config import to_dict
from wam.files import atomic_path
from wam.inference.session import Session
from wam.model.backbone import Context
from wam.model.conditions import Conditions
from wam.pretrained import Policy

FORMAT = "wam-session-1"
STATE = ("instructions", "conditions", "goal", "target", "embodiment_B", "block", "committed", "state", "origin", "first", "acted", "newest")
CACHE = ("keys", "values", "kinds_BS", "blocks_BS", "positions_BS4")
CLASSES: dict[str, type] = {"Conditions": Conditions, "Context": Context}


def save_session(session: Session, path: Path) -> None:
    """Write a session into one file, atomically.

    Raises:
        ValueError: it stands in an imagined future; `observe` first, or go `back`.
    """
    if session.before is not None:
        raise ValueError("this session stands in an imagined future, which is not saved; observe what came, or call back(), before save_session()")
    tensors: dict[str, Tensor] = {}
    stream = {name: value for name, value in vars(session.stream).items() if name != "codec"}
    tree = {
        "session": _plant({name: getattr(session, name) for name in STATE}, "session", tensors),
        "cache": _plant({name: getattr(session.cache, name) for name in CACHE}, "cache", tensors),
        "stream": _plant(stream, "stream", tensors),
        "generators": _plant([g.get_state() for g in session.generators], "generators", tensors),
    }
    about = {"format": FORMAT, "policy": fingerprint(session.policy), "embodiment": session.dims.name, "tree": json.dumps(tree)}
    with atomic_path(path) as temporary:
        temporary.write_bytes(to_bytes({name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}, about))


def load_session(policy: Policy, path: Path) -> Session:
    """A session that goes on where `save_session` left one, on this policy's device.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not a saved session, or one of another policy.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no saved session {path}")
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
    except Exception as error:  # the reader's own types are not public
        raise ValueError(f"{path} cannot be read as a saved session ({error}); save it again") from error
    if about.get("format") != FORMAT:
        raise ValueError(f"{path} is a {about.get('format', 'file without a format')}; expected {FORMAT}, as save_session writes")
    if about["policy"] != fingerprint(policy):
        raise ValueError(f"{path} is the memory of another policy, and says nothing to this one; open a new session")
    tree = json.loads(about["tree"])
    device = policy.model.device
    values = _grow(tree["session"], tensors, device)
    states = _grow(tree["generators"], tensors, torch.device("cpu"))
    session = Session(policy, ["a session that is restored"] * len(states), about["embodiment"], [0] * len(states), prepared=values["instructions"])
    for name, value in values.items():
        setattr(session, name, value)
    for name, value in _grow(tree["cache"], tensors, device).items():
        own = getattr(session.cache, name)
        setattr(session.cache, name, value if isinstance(own, list) else value.to(own.device))
    for name, value in _grow(tree["stream"], tensors, device).items():
        setattr(session.stream, name, value)
    for generator, state in zip(session.generators, states, strict=True):
        generator.set_state(state)
    return session


def fingerprint(policy: Policy) -> str:
    """Of a policy's settings and weights: a few numbers of each tensor, which any training changes."""
    digest = hashlib.sha256(json.dumps(to_dict(policy.config), sort_keys=True, default=str).encode())
    for name, weight in policy.model.state_dict().items():
        flat = weight.detach().flatten()
        digest.update(name.encode() + flat[:: max(1, len(flat) // 64)].float().cpu().numpy().tobytes())
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------ trees


def _plant(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """A tree of names, numbers and the classes above; its tensors go into `tensors`."""
    if isinstance(value, (Tensor, np.ndarray)):
        tensors[name] = torch.from_numpy(value) if isinstance(value, np.ndarray) else value
        return {"array" if isinstance(value, np.ndarray) else "tensor": name}
    if isinstance(value, (list, tuple)):
        return {type(value).__name__: [_plant(item, f"{name}.{i}", tensors) for i, item in enumerate(value)]}
    if isinstance(value, dict):
        return {"dict": {key: _plant(item, f"{name}.{key}", tensors) for key, item in value.items()}}
    if type(value).__name__ in CLASSES:
        own = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return {"class": type(value).__name__, **_plant(own, name, tensors)}
    assert value is None or isinstance(value, (bool, int, float, str)), f"{name} is a {type(value).__name__}, which is not saved"
    return {"value": value}


def _grow(node: Any, tensors: dict[str, Tensor], device: torch.device) -> Any:
    """What a tree stands for."""
    if "tensor" in node:
        return tensors[node["tensor"]].to(device)
    if "array" in node:
        return tensors[node["array"]].numpy()
    if "list" in node or "tuple" in node:
        items = [_grow(item, tensors, device) for item in node.get("list", node.get("tuple"))]
        return items if "list" in node else tuple(items)
    if "dict" in node:
        grown = {key: _grow(item, tensors, device) for key, item in node["dict"].items()}
        return CLASSES[node["class"]](**grown) if "class" in node else grown
    return node["value"]
