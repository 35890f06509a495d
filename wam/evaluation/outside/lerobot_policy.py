"""LeRobot's side of a comparison: one of its policies, asked for actions from the interpreter that has LeRobot.

A script that needs lerobot and numpy and nothing of this project, started as `PYTHON lerobot_policy.py FOLDER DEVICE`.  It says in a
line of JSON what the policy takes; then, to every request on its standard input (a line of JSON and the bytes of the arrays that it
announces), it answers with a line and the bytes of an array of actions.

    request   {"reset": true, "task": "open the drawer", "arrays": [{"key": "observation.state", "dtype": "float32", "shape": [5, 4]}, ...]} bytes
    answer    {"shape": [5, 4]} bytes                      or {"error": "..."}

A policy is used as LeRobot's own evaluation uses it: its preprocessor, `select_action` for the whole batch, its postprocessor.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np


def load(folder: Path, device: str) -> tuple[Any, Any, Any, Any]:
    """Config, policy, preprocessor and postprocessor of a folder that LeRobot's training wrote."""
    os.environ.update({"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"})
    from lerobot.configs.policies import PreTrainedConfig
    from lerobot.policies.factory import get_policy_class, make_pre_post_processors

    config = PreTrainedConfig.from_pretrained(str(folder))
    config.device = device
    if hasattr(config, "pretrained_backbone_weights"):
        config.pretrained_backbone_weights = None  # they are in the folder, and need not be fetched first
    policy = get_policy_class(config.type).from_pretrained(str(folder), config=config)
    before, after = make_pre_post_processors(config, pretrained_path=str(folder), preprocessor_overrides={"device_processor": {"device": device}})
    policy.eval()

    import torch

    torch.set_num_threads(1)  # beside simulators
    return config, policy, before, after


def describe(config: Any) -> dict[str, Any]:
    """What a policy takes and gives."""
    inputs = {key: list(feature.shape) for key, feature in config.input_features.items()}
    actions = config.output_features["action"].shape[0]
    versions = {name: importlib.metadata.version(name) for name in ("lerobot", "torch", "numpy")}
    return {"type": config.type, "inputs": inputs, "action_dim": int(actions), "versions": versions}


def act(policy: Any, before: Any, after: Any, request: dict[str, Any], arrays: dict[str, np.ndarray]) -> np.ndarray:
    """Actions (n, d) for n robots: pictures uint8 (n, H, W, 3), states (n, Ds)."""
    import torch

    if request["reset"]:
        policy.reset()
    seen: dict[str, Any] = {}
    for key, array in arrays.items():
        values = torch.from_numpy(array.copy())
        seen[key] = values.permute(0, 3, 1, 2).contiguous().float() / 255 if array.dtype == np.uint8 else values.float()
    seen["task"] = [request["task"]] * len(next(iter(arrays.values())))
    with torch.inference_mode():
        chosen = after(policy.select_action(before(seen)))
    return np.ascontiguousarray(chosen.to("cpu").numpy(), np.float32)


def say(stream: BinaryIO, answer: dict[str, Any], data: bytes = b"") -> None:
    """One line of JSON, and bytes."""
    stream.write(json.dumps(answer).encode() + b"\n" + data)
    stream.flush()


def main() -> None:
    """Answer until there is nobody to ask."""
    stream, questions = sys.stdout.buffer, sys.stdin.buffer
    sys.stdout = sys.stderr  # what libraries print is no answer
    try:
        config, policy, before, after = load(Path(sys.argv[1]), sys.argv[2])
        say(stream, describe(config))
    except Exception as error:  # whatever LeRobot raises is told on the other side
        traceback.print_exc()
        say(stream, {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"})
        return
    for line in iter(questions.readline, b""):
        request = json.loads(line)
        arrays = {}
        for part in request["arrays"]:
            dtype = np.dtype(part["dtype"])
            data = questions.read(int(np.prod(part["shape"])) * dtype.itemsize)
            arrays[part["key"]] = np.frombuffer(data, dtype).reshape(part["shape"])
        try:
            actions = act(policy, before, after, request, arrays)
        except Exception as error:
            traceback.print_exc()
            say(stream, {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"})
            return
        say(stream, {"shape": list(actions.shape)}, actions.tobytes())


if __name__ == "__main__":
    main()
