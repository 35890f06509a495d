"""States and actions to numbers around [-1, 1], and back.

    normal = clip((x - center) / scale)          x = normal * scale + center

| method   | center, scale                                  | clip |
|----------|------------------------------------------------|------|
| quantile | maps the 1st and 99th percentile to -1 and 1   | 1.5  |
| min_max  | maps the least and the greatest to -1 and 1    | 1.5  |
| mean_std | zero mean, unit standard deviation             | none |
| none     | 0, 1: numbers pass through as they are         | none |

Parts of a vector may have methods of their own (an arm by percentiles, a rotation as it is): method and clip are then kept by dimension.
Every robot has statistics of its own; a file holds one robot's, or several by name.  Percentiles are exact, over every training row (LeRobot's stored ones are envelopes over episodes).  The clip is stored with the
statistics: wide enough to keep what lies a quarter of the range outside the percentiles, narrow enough that one broken reading
cannot throw the network off.  Undoing never clips.  A dimension that (nearly) does not move is only centred, and listed; one whose
percentiles coincide although it does move, such as a gripper that is used once in 200 steps, takes its least and greatest instead.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from torch import Tensor

from wam.config_robot import STATISTICS
from wam.files import write_json_atomic

Method = Literal["quantile", "mean_std", "min_max", "none"]
Array = TypeVar("Array", np.ndarray, Tensor)

VERSION, BY_DIMENSION = 1, 2  # of what `to_dict` writes: one method and clip for all; or some dimensions have their own
CLIP: dict[Method, float | None] = {"quantile": 1.5, "min_max": 1.5, "mean_std": None, "none": None}
SMALLEST_RANGE = 1e-4  # of a dimension that counts as moving, in its own units


@dataclass(frozen=True)
class Statistics:
    """Of one key, a number per dimension.

    Attributes:
        constant: dimensions that do not move, and are only centred.
        methods, clips: by dimension, where they are not the normaliser's; empty: they are.
    """

    center: tuple[float, ...]
    scale: tuple[float, ...]
    constant: tuple[int, ...]
    methods: tuple[Method, ...] = ()
    clips: tuple[float | None, ...] = ()


@dataclass(frozen=True)
class Normalizer:
    """Immutable; numpy arrays and torch tensors alike, over the last dimension.  See the module's docstring."""

    method: Method
    clip: float | None
    keys: Mapping[str, Statistics]

    @classmethod
    def fit(cls, arrays: Mapping[str, np.ndarray], method: Method = "quantile", clip: float | Literal["default"] | None = "default") -> Normalizer:
        """Statistics of the training rows, (n, d) for each key.

        Raises:
            ValueError: an unknown method, no rows, or numbers that are not finite (key and dimension are named).
        """
        _known(method)
        return cls(method, CLIP[method] if clip == "default" else clip, {key: statistics(key, rows, method) for key, rows in arrays.items()})

    @classmethod
    def of_parts(cls, keys: Mapping[str, Sequence[tuple[Statistics, Method]]], method: Method) -> Normalizer:
        """From statistics of parts that lie side by side, each with its method; `method` is the one where nothing else is said."""
        _known(method)
        return cls(method, CLIP[method], {key: _joined(parts, method) for key, parts in keys.items()})

    def dim(self, key: str) -> int:
        """Number of dimensions of a key."""
        return len(self._of(key).center)

    def normalize(self, key: str, x: Array) -> Array:
        """(..., d) in physical units to normalised, clipped numbers of the same dtype (integers become float32).

        Raises:
            ValueError: unknown key or another number of dimensions.
        """
        x = _floating(x)
        center, scale = self._parameters(key, x)
        normal = (x - center) / scale
        clips = self._of(key).clips
        if clips:
            limit = [math.inf if clip is None else clip for clip in clips]
            most = x.new_tensor(limit) if isinstance(x, Tensor) else np.asarray(limit, x.dtype)
            return normal.clip(-most, most)
        return normal if self.clip is None else normal.clip(-self.clip, self.clip)

    def unnormalize(self, key: str, x: Array) -> Array:
        """(..., d) normalised to physical units.

        Raises:
            ValueError: unknown key or another number of dimensions.
        """
        x = _floating(x)
        center, scale = self._parameters(key, x)
        return x * scale + center

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, for JSON."""
        keys: dict[str, dict[str, Any]] = {key: {"center": list(s.center), "scale": list(s.scale), "constant": list(s.constant)} for key, s in self.keys.items()}
        for key, s in self.keys.items():
            keys[key] |= {"methods": list(s.methods), "clips": list(s.clips)} if s.methods else {}
        version = BY_DIMENSION if any(s.methods for s in self.keys.values()) else VERSION
        return {"version": version, "method": self.method, "clip": self.clip, "keys": keys}

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> Normalizer:
        """What `to_dict` gave.

        Raises:
            ValueError: another version, or missing or misshapen entries.
        """
        if tree.get("version") not in (VERSION, BY_DIMENSION):
            raise ValueError(f"normalisation statistics of version {tree.get('version')!r}; this version reads {VERSION} and {BY_DIMENSION}")
        try:
            keys = {
                key: Statistics(tuple(s["center"]), tuple(s["scale"]), tuple(s["constant"]), tuple(s.get("methods", ())), tuple(s.get("clips", ())))
                for key, s in tree["keys"].items()
            }
            normalizer = cls(tree["method"], tree["clip"], keys)
        except (KeyError, TypeError) as error:
            raise ValueError(f"normalisation statistics lack or garble {error}; expected what Normalizer.to_dict writes") from error
        for key, s in keys.items():
            if len(s.center) != len(s.scale) or not all(value > 0 for value in s.scale):
                raise ValueError(f"normalisation statistics of {key!r}: {len(s.center)} centers, {len(s.scale)} scales; expected as many, and positive scales")
            if s.methods and not len(s.methods) == len(s.clips) == len(s.center):
                raise ValueError(f"normalisation statistics of {key!r}: {len(s.methods)} methods, {len(s.clips)} clips; expected one of each for {len(s.center)} dimensions")
        return normalizer

    def save(self, path: str | Path) -> None:
        """Write JSON in one step."""
        write_json_atomic(Path(path), self.to_dict())

    @classmethod
    def load(cls, path: str | Path, embodiment: str | None = None) -> Normalizer:
        """Read what `save` wrote, or one robot's of a file that has several.

        Raises:
            FileNotFoundError: no such file.
            ValueError: it holds something else, or not this robot.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no normalisation statistics {path}; they are written by training, beside the checkpoint's weights")
        try:
            return normalizer_for(json.loads(path.read_text()), embodiment)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def _of(self, key: str) -> Statistics:
        if key not in self.keys:
            raise ValueError(f"no normalisation statistics for {key!r}; there are {', '.join(sorted(self.keys)) or 'none'}")
        return self.keys[key]

    def _parameters(self, key: str, x: Array) -> tuple[Array, Array]:
        stats = self._of(key)
        if x.ndim < 1 or x.shape[-1] != len(stats.center):
            raise ValueError(f"{key} has shape {tuple(x.shape)}; its statistics have {len(stats.center)} dimensions, so expected (..., {len(stats.center)})")
        if isinstance(x, Tensor):
            return x.new_tensor(stats.center), x.new_tensor(stats.scale)
        return np.asarray(stats.center, x.dtype), np.asarray(stats.scale, x.dtype)


def by_embodiment(normalizers: Mapping[str, Normalizer]) -> dict[str, Any]:
    """Statistics of several robots by name, for JSON."""
    return {STATISTICS: {name: normalizer.to_dict() for name, normalizer in normalizers.items()}}


def robots_of(path: Path) -> list[str]:
    """Whose statistics a file has by name; empty where it has one robot's, which needs none.

    Raises:
        ValueError: it is not JSON.
    """
    tree = json.loads(path.read_text())
    robots = tree.get(STATISTICS) if isinstance(tree, dict) else None
    return list(robots) if isinstance(robots, dict) else []


def normalizer_for(tree: Mapping[str, Any], embodiment: str | None) -> Normalizer:
    """One robot's statistics: of `by_embodiment`, or of `Normalizer.to_dict`, which then holds for whoever asks.

    Args:
        embodiment: whose; None: the only one's.

    Raises:
        ValueError: there are none of that robot, or several and none was named.
    """
    robots = tree.get(STATISTICS)
    if robots is None:
        return Normalizer.from_dict(tree)
    if not isinstance(robots, dict) or not robots:
        raise ValueError(f"normalisation statistics by embodiment are {robots!r}; expected an object of names")
    if embodiment is None and len(robots) == 1:
        embodiment = next(iter(robots))
    if embodiment not in robots:
        raise ValueError(f"no normalisation statistics for the robot {embodiment!r}; there are those of {', '.join(robots)}")
    return Normalizer.from_dict(robots[embodiment])


def _known(method: str) -> None:
    if method not in CLIP:
        raise ValueError(f"unknown normalisation {method!r}; expected one of {', '.join(CLIP)}")


def _joined(parts: Sequence[tuple[Statistics, Method]], method: Method) -> Statistics:
    """Parts side by side; methods and clips by dimension only where one differs."""
    starts = np.cumsum([0, *(len(s.center) for s, _ in parts)])
    constant = tuple(int(at) + i for at, (s, _) in zip(starts, parts, strict=False) for i in s.constant)
    center, scale = (tuple(x for s, _ in parts for x in getattr(s, name)) for name in ("center", "scale"))
    if all(own == method for _, own in parts):
        return Statistics(center, scale, constant)
    methods: tuple[Method, ...] = tuple(own for s, own in parts for _ in s.center)
    return Statistics(center, scale, constant, methods, tuple(CLIP[own] for own in methods))


def _floating(x: Array) -> Array:
    if isinstance(x, Tensor):
        return x if x.is_floating_point() else x.float()
    return x if np.issubdtype(x.dtype, np.floating) else x.astype(np.float32)


def statistics(key: str, rows: np.ndarray, method: Method) -> Statistics:
    """Of (rows, d); one dimension at a time, so that many rows cost no second copy.

    Raises:
        ValueError: no rows, or numbers that are not finite (key and dimension are named).
    """
    if rows.ndim != 2 or len(rows) == 0:
        raise ValueError(f"{key} has shape {rows.shape}; expected (rows, dimensions) with at least one row")
    found = [_of_dimension(key, i, rows[:, i].astype(np.float64), method) for i in range(rows.shape[1])]
    return Statistics(tuple(c for c, _, _ in found), tuple(s for _, s, _ in found), tuple(i for i, (_, _, still) in enumerate(found) if still))


def _of_dimension(key: str, index: int, x: np.ndarray, method: Method) -> tuple[float, float, bool]:
    """Center, scale, and whether it does not move."""
    finite = np.isfinite(x)
    if not finite.all():
        row = int(np.flatnonzero(~finite)[0])
        raise ValueError(f"{key} is not finite in dimension {index} (first at training row {row}: {x[row]}); repair or leave out that episode")
    if method == "none":
        return 0.0, 1.0, False
    least, greatest = x.min(), x.max()
    still = greatest - least < SMALLEST_RANGE
    if method == "mean_std":
        center, scale = x.mean(), x.std()
        still |= scale < SMALLEST_RANGE
    else:
        low, high = np.quantile(x, (0.01, 0.99)) if method == "quantile" else (least, greatest)
        low, high = (least, greatest) if high - low < SMALLEST_RANGE else (low, high)
        center, scale = (low + high) / 2, (high - low) / 2
    return float(center), 1.0 if still else float(scale), bool(still)
