"""Names for parts of a dataset, as GR00T and DreamZero write them beside LeRobot's own files.

    meta/modality.json    {"state":      {"arm": {"start": 0, "end": 7}},                    state.arm       = observation.state[0:7]
                           "action":     {"grip": {"start": 7, "end": 8, "absolute": true}}, action.grip     = action[7:8]
                           "video":      {"top": {"original_key": "observation.images.a"}},  video.top       = that camera
                           "annotation": {"human.task": {}}}                                 annotation.human.task
    meta/embodiment.json  {"embodiment_tag": "my_arm"}

The names can be used wherever a column or a camera is asked for.  A name that points nowhere, or that is also a column, is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wam.config_tree import show
from wam.data.lerobot_files import DatasetError, Feature, is_count, read_json

DEFAULT_COLUMNS = {"state": "observation.state", "action": "action", "video": "observation.images.{name}", "annotation": "annotation.{name}"}


@dataclass(frozen=True)
class Group:
    """A slice of a vector: dimensions `start` to `stop` (exclusive) of `column`.

    Attributes:
        absolute: false where the numbers are relative to a state; as the file says, nothing is converted.
        rotation: "quaternion", "rotation_6d", ...; None where it is none.
    """

    column: str
    start: int
    stop: int
    absolute: bool = True
    rotation: str | None = None


@dataclass(frozen=True)
class Modality:
    """Names by what they stand for; keys carry their section, as "state.arm"."""

    groups: dict[str, Group] = field(default_factory=dict)
    videos: dict[str, str] = field(default_factory=dict)
    annotations: dict[str, str] = field(default_factory=dict)


def read_modality(root: Path, features: dict[str, Feature]) -> Modality:
    """meta/modality.json against the features of info.json; empty where there is no such file.

    Raises:
        DatasetError: damaged, or it names what is not there.
    """
    path, modality = root / "meta/modality.json", Modality()
    if not path.is_file():
        return modality
    content = read_json(path)
    if not isinstance(content, dict) or not set(content) <= set(DEFAULT_COLUMNS):
        found = ", ".join(content) if isinstance(content, dict) else type(content).__name__
        raise DatasetError(f"{path} holds {found}; expected an object with sections among {', '.join(DEFAULT_COLUMNS)}")
    for section, entries in content.items():
        if not isinstance(entries, dict):
            raise DatasetError(f"{path}: {section} is {show(entries)}; expected an object of names")
        for name, entry in entries.items():
            key = f"{section}.{name}"
            if not isinstance(entry, dict):
                raise DatasetError(f"{path}: {key} is {show(entry)}; expected an object, such as {{}} or one with start and end")
            said = entry.get("original_key")
            column = DEFAULT_COLUMNS[section].format(name=name) if said is None else said
            if not isinstance(column, str) or column not in features:
                raise DatasetError(f"{path}: {key} stands for {show(column)}, which meta/info.json does not list; correct its original_key")
            if key in features and key != column:
                raise DatasetError(f"{path}: {key} is {column!r} here, and a column of its own in meta/info.json; give the group another name")
            _READ[section](path, modality, key, entry, column, features[column])
    return modality


def read_embodiment(root: Path) -> str | None:
    """The tag in meta/embodiment.json; None where there is no such file.

    Raises:
        DatasetError: damaged, or no tag in it.
    """
    path = root / "meta/embodiment.json"
    if not path.is_file():
        return None
    content = read_json(path)
    tag = content.get("embodiment_tag") if isinstance(content, dict) else None
    if not isinstance(tag, str) or not tag:
        raise DatasetError(f"{path} holds {show(content)}; expected {{'embodiment_tag': NAME}}")
    return tag


def _read_group(path: Path, modality: Modality, key: str, entry: dict[str, Any], column: str, feature: Feature) -> None:
    if feature.dtype in ("video", "image", "string") or len(feature.shape) != 1:
        raise DatasetError(f"{path}: {key} stands for {column!r}, which is {feature.dtype} of shape {feature.shape}; expected a vector of numbers")
    start, stop, width = entry.get("start"), entry.get("end"), feature.shape[0]
    if not is_count(start) or not is_count(stop) or not 0 <= start < stop <= width:
        raise DatasetError(f"{path}: {key} is the slice {show(start)}..{show(stop)} of {column!r}, which has {width} dimensions; expected 0 <= start < end <= {width}")
    if key == column and (start, stop) != (0, width):
        raise DatasetError(
            f"{path}: {key} is the slice {start}..{stop} here, and a column of {width} dimensions in meta/info.json; give the group another name"
        )
    absolute = entry.get("absolute", True)
    if not isinstance(absolute, bool):
        raise DatasetError(f"{path}: absolute of {key} is {show(absolute)}; expected true or false")
    modality.groups[key] = Group(column, start, stop, absolute, entry.get("rotation_type"))


def _read_video(path: Path, modality: Modality, key: str, entry: dict[str, Any], column: str, feature: Feature) -> None:
    if feature.dtype != "video":
        raise DatasetError(f"{path}: {key} stands for {column!r}, which is {feature.dtype} of shape {feature.shape}; expected a camera, of dtype video")
    modality.videos[key] = column


def _read_annotation(path: Path, modality: Modality, key: str, entry: dict[str, Any], column: str, feature: Feature) -> None:
    if feature.dtype != "string" and not feature.dtype.startswith("int"):
        raise DatasetError(f"{path}: {key} stands for {column!r}, which is {feature.dtype}; expected task indices (int64) or instructions (string)")
    modality.annotations[key] = column


_READ: dict[str, Callable[[Path, Modality, str, dict[str, Any], str, Feature], None]] = {
    "state": _read_group, "action": _read_group, "video": _read_video, "annotation": _read_annotation,
}  # fmt: skip
