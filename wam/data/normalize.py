"""States and actions to numbers around [-1, 1], and back.

    normal = clip((x - center) / scale)          x = normal * scale + center

| method   | center, scale                                  | clip |
|----------|------------------------------------------------|------|
| quantile | maps the 1st and 99th percentile to -1 and 1   | 1.5  |
| min_max  | maps the least and the greatest to -1 and 1    | 1.5  |
| mean_std | zero mean, unit standard deviation             | none |

Percentiles are exact, over every training row (LeRobot's stored ones are envelopes over episodes).  The clip is stored with the
statistics: wide enough to keep what lies a quarter of the range outside the percentiles, narrow enough that one broken reading
cannot throw the network off.  Undoing never clips.  A dimension that (nearly) does not move is only centred, and listed; one whose
percentiles coincide although it does move, such as a gripper that is used once in 200 steps, takes its least and greatest instead.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from torch import Tensor

from wam.files import write_json_atomic

Method = Literal["quantile", "mean_std", "min_max"]
Array = TypeVar("Array", np.ndarray, Tensor)

VERSION = 1
CLIP: dict[Method, float | None] = {"quantile": 1.5, "min_max": 1.5, "mean_std": None}
SMALLEST_RANGE = 1e-4  # of a dimension that counts as moving, in its own units


@dataclass(frozen=True)
class Statistics:
    """Of one key, a number per dimension.

    Attributes:
        constant: dimensions that do not move, and are only centred.
    """

    center: tuple[float, ...]
    scale: tuple[float, ...]
    constant: tuple[int, ...]


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
        if method not in CLIP:
            raise ValueError(f"unknown normalisation {method!r}; expected one of {', '.join(CLIP)}")
        return cls(method, CLIP[method] if clip == "default" else clip, {key: _statistics(key, rows, method) for key, rows in arrays.items()})

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
        keys = {key: {"center": list(s.center), "scale": list(s.scale), "constant": list(s.constant)} for key, s in self.keys.items()}
        return {"version": VERSION, "method": self.method, "clip": self.clip, "keys": keys}

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> Normalizer:
        """What `to_dict` gave.

        Raises:
            ValueError: another version, or missing or misshapen entries.
        """
        if tree.get("version") != VERSION:
            raise ValueError(f"normalisation statistics of version {tree.get('version')!r}; this version reads {VERSION}")
        try:
            keys = {key: Statistics(tuple(s["center"]), tuple(s["scale"]), tuple(s["constant"])) for key, s in tree["keys"].items()}
            normalizer = cls(tree["method"], tree["clip"], keys)
        except (KeyError, TypeError) as error:
            raise ValueError(f"normalisation statistics lack or garble {error}; expected what Normalizer.to_dict writes") from error
        for key, s in keys.items():
            if len(s.center) != len(s.scale) or not all(value > 0 for value in s.scale):
                raise ValueError(f"normalisation statistics of {key!r}: {len(s.center)} centers, {len(s.scale)} scales; expected as many, and positive scales")
        return normalizer

    def save(self, path: str | Path) -> None:
        """Write JSON in one step."""
        write_json_atomic(Path(path), self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> Normalizer:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: it holds something else.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no normalisation statistics {path}; they are written by training, beside the checkpoint's weights")
        try:
            return cls.from_dict(json.loads(path.read_text()))
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


def _floating(x: Array) -> Array:
    if isinstance(x, Tensor):
        return x if x.is_floating_point() else x.float()
    return x if np.issubdtype(x.dtype, np.floating) else x.astype(np.float32)


def _statistics(key: str, rows: np.ndarray, method: Method) -> Statistics:
    rows = np.asarray(rows, dtype=np.float64)
    if rows.ndim != 2 or len(rows) == 0:
        raise ValueError(f"{key} has shape {rows.shape}; expected (rows, dimensions) with at least one row")
    broken = np.flatnonzero(~np.isfinite(rows).all(axis=0))
    if len(broken):
        row = int(np.flatnonzero(~np.isfinite(rows[:, broken[0]]))[0])
        raise ValueError(
            f"{key} is not finite in dimension {broken[0]} (first at training row {row}: {rows[row, broken[0]]}); repair or leave out that episode"
        )
    least, greatest = rows.min(axis=0), rows.max(axis=0)
    constant = greatest - least < SMALLEST_RANGE
    if method == "mean_std":
        center, scale = rows.mean(axis=0), rows.std(axis=0)
        constant |= scale < SMALLEST_RANGE
    else:
        low, high = np.quantile(rows, (0.01, 0.99), axis=0) if method == "quantile" else (least, greatest)
        collapsed = high - low < SMALLEST_RANGE
        low, high = np.where(collapsed, least, low), np.where(collapsed, greatest, high)
        center, scale = (low + high) / 2, (high - low) / 2
    scale = np.where(constant, 1.0, scale)
    return Statistics(tuple(center.tolist()), tuple(scale.tolist()), tuple(np.flatnonzero(constant).tolist()))
