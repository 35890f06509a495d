"""LeRobot's observations as a policy sees them: which key is which camera, pictures as uint8, states side by side.

    LeRobot                                                     wam
    observation.image(s.<name>)  float (B, [T], 3, H, W), 0..1  ->  canvas uint8 (B, [T], h, w, 3): resized, laid out, as in training
    observation.state, ...       float (B, [T], d)              ->  the robot's raw vector float32 (B, [T], d)
    task                         text, or one a row             ->  instructions

A camera is found by the name it had in training, or by a mapping that is given; a single camera is also found where the observation
holds a single picture.  What cannot be found is an error that names it: no picture and no state is ever put in its place.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from wam.data.units import Part
from wam.data.views import Canvas

IMAGE, IMAGES, STATE, ACTION, TASK, PAD = "observation.image", "observation.images.", "observation.state", "action", "task", "_is_pad"
BEYOND = 1e-3  # how far outside of 0..1 a picture may be: resizing overshoots a little


def short(camera: str) -> str:
    """A camera's own name, without where the dataset keeps it."""
    return camera.rsplit(".", 1)[-1]


def pictures_in(keys: Iterable[str]) -> list[str]:
    """The keys of pictures among those of an observation."""
    return sorted(key for key in keys if (key == IMAGE or key.startswith((IMAGES, f"{IMAGE}."))) and not key.endswith(PAD))


def camera_keys(cameras: Sequence[str], given: Mapping[str, str], present: Iterable[str]) -> dict[str, str]:
    """The observation's key of every camera, in the cameras' order.

    Args:
        cameras: as the policy was trained, `data.cameras`.
        given: by a camera's key or own name, the observation's key.
        present: all keys of the observation.

    Raises:
        ValueError: a camera that is not there, or a mapping of one that the policy does not have; says what is there.
    """
    strange = [name for name in given if name not in cameras and name not in map(short, cameras)]
    if strange:
        raise ValueError(f"--policy.cameras names {strange[0]!r}, which is no camera of this policy; it has {', '.join(cameras)}")
    there = set(present)
    pictures = pictures_in(there)
    out = {}
    for camera in cameras:
        named = given.get(camera) or given.get(short(camera))
        candidates = [named] if named else [camera, f"{IMAGES}{short(camera)}", *(pictures if len(cameras) == len(pictures) == 1 else ())]
        found = next((key for key in candidates if key in there), None)
        if found is None:
            wanted = f"{named!r}, which --policy.cameras gives for it," if named else f"{camera!r}"
            raise ValueError(
                f"the picture of camera {short(camera)!r} is missing: {wanted} is not among the observation's pictures ({', '.join(pictures) or 'none'}); "
                f"say which it is: --policy.cameras='{{{short(camera)}: {pictures[0] if pictures else IMAGE}}}'"
            )
        out[camera] = found
    return out


def pixels(name: str, picture: Tensor) -> np.ndarray:
    """Pictures (..., 3, H, W), float 0..1 or uint8, as uint8 (..., H, W, 3).

    Raises:
        ValueError: another shape, or numbers that are no such picture.
    """
    if picture.ndim < 3 or picture.shape[-3] != 3:
        raise ValueError(f"{name} has shape {tuple(picture.shape)}; expected (..., 3, height, width), as LeRobot gives pictures")
    if picture.dtype != torch.uint8:
        if not picture.is_floating_point():
            raise ValueError(f"{name} is {picture.dtype}; expected uint8, or floating point from 0 to 1")
        low, high = (float(x) for x in picture.aminmax())
        if not (low >= -BEYOND and high <= 1 + BEYOND):
            raise ValueError(f"{name} lies in {low:g}..{high:g}; expected 0..1: pictures must reach the policy as they are, so leave normalization_mapping at IDENTITY and dataset.use_imagenet_stats out of it")
        picture = (picture.float() * 255).round_().clamp_(0, 255).to(torch.uint8)
    return np.ascontiguousarray(picture.movedim(-3, -1).cpu().numpy())


def frames_of(batch: Mapping[str, Any], keys: Mapping[str, str], canvas: Canvas) -> np.ndarray:
    """What the cameras saw as the policy sees it, uint8 (B, H, W, 3), or (B, T, H, W, 3) of pictures with a time axis."""
    views = [pixels(key, batch[key]) for key in keys.values()]
    lead = views[0].shape[:-3]
    if any(view.shape[:-3] != lead for view in views):
        raise ValueError(f"cameras have pictures of different numbers: {', '.join(f'{key}: {view.shape[:-3]}' for key, view in zip(keys.values(), views, strict=True))}")
    flat = canvas.compose([view.reshape(-1, *view.shape[-3:]) for view in views])
    return flat.reshape(*lead, *flat.shape[1:])


def vector_of(batch: Mapping[str, Any], what: str, parts: Sequence[Part], whole: str, size: int) -> np.ndarray | None:
    """A robot's raw vector float32 (..., size) from the columns of its parts, or else from the column `whole`; None where neither is there.

    Raises:
        ValueError: a column of another size, some columns without the others, or numbers that are not finite.
    """
    columns = list(dict.fromkeys(part.column for part in parts))
    there = [column for column in columns if batch.get(column) is not None]
    if len(there) == len(columns):
        out = _joined(batch, what, parts, size)
    elif there and columns != [whole]:
        raise ValueError(f"the {what} is made of {', '.join(columns)}, and {', '.join(c for c in columns if c not in there)} is missing from the observation")
    elif batch.get(whole) is not None:
        out = _numbers(batch[whole])
        if out.shape[-1] != size:
            raise ValueError(f"{whole} has {out.shape[-1]} numbers, and this policy's robot has {size} of a {what}; it is another robot, or another choice of columns than in training ({', '.join(columns)})")
    else:
        return None
    if not np.isfinite(out).all():
        raise ValueError(f"the {what} holds numbers that are not finite; check the robot's sensors")
    return out


def _joined(batch: Mapping[str, Any], what: str, parts: Sequence[Part], size: int) -> np.ndarray:
    arrays = {part.column: _numbers(batch[part.column]) for part in parts}
    for part in parts:
        have = arrays[part.column].shape[-1]
        if have < part.stop or (len(parts) == 1 and have != size):
            raise ValueError(f"{part.column} has {have} numbers, and this policy's robot has {size} of a {what}, {part.name!r} from {part.start} to {part.stop} of it; it is another robot than in training")
    return np.concatenate([arrays[part.column][..., part.start : part.stop] for part in parts], axis=-1)


def _numbers(value: Any) -> np.ndarray:
    return np.asarray(torch.as_tensor(value).detach().cpu().float().numpy())


def tasks_of(batch: Mapping[str, Any], rows: int, instead: str | None = None) -> list[str]:
    """An instruction a row.

    Args:
        instead: is told to every robot, whatever the observation says.

    Raises:
        ValueError: there is none, or not one a row.
    """
    task = batch.get(TASK) if instead is None else instead
    texts = [task] * rows if isinstance(task, str) else task
    if not isinstance(texts, (list, tuple)) or len(texts) != rows or not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError(f"the observation's task is {task!r}; expected an instruction for each of {rows} rows: give the environment a task_description, or --policy.task='open the drawer'")
    return list(texts)
