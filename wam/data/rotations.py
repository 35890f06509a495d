"""Rotations in the forms that robots and datasets write them, through one: the 3 x 3 matrix that turns a vector.

    quaternion        (x, y, z, w)     as ROS, MuJoCo's Python wrappers and scipy have it; either sign is read, w >= 0 is written
    quaternion_wxyz   (w, x, y, z)     the same, the other way round (MuJoCo's own, diffusion policies)
    euler             (roll, pitch, yaw)   about the fixed axes x, y, z in turn: R = Rz(yaw) Ry(pitch) Rx(roll); radians
    axis_angle        axis x angle     angle in 0..pi
    rotation_6d       the first two rows of R (Zhou et al. 2019, in the order of GR00T and UMI): no jumps, what a network learns best

All is computed in float64 and returned in the dtype that came in.  A network's output need not be a rotation: quaternions are brought to
length one, rotation_6d is orthonormalised, and what has no direction at all is refused rather than made up.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

SHORTEST = 1e-6  # a quaternion or row shorter than this has no direction
GIMBAL = 1e-9  # cosine of the pitch below which roll and yaw turn about the same axis


def to_matrix(x: np.ndarray, form: str) -> np.ndarray:
    """Rotations (..., n) to matrices (..., 3, 3), float64.

    Raises:
        ValueError: an unknown form, another number of dimensions, or numbers that are no rotation.
    """
    if form not in _READ:
        raise ValueError(f"unknown rotation {form!r}; expected one of {', '.join(_READ)}")
    size, read, _ = _READ[form]
    if x.shape[-1:] != (size,):
        raise ValueError(f"rotations of shape {x.shape}; {form} has {size} numbers, so expected (..., {size})")
    return read(np.asarray(x, np.float64))


def from_matrix(matrix: np.ndarray, form: str) -> np.ndarray:
    """Matrices (..., 3, 3) to rotations (..., n), float64; of several answers always the same one."""
    if form not in _READ:
        raise ValueError(f"unknown rotation {form!r}; expected one of {', '.join(_READ)}")
    return _READ[form][2](matrix)


def convert(x: np.ndarray, form: str, to: str) -> np.ndarray:
    """Rotations (..., n) in another form (or in the same one, made canonical), in x's dtype."""
    return from_matrix(to_matrix(x, form), to).astype(x.dtype)


def _unit(x: np.ndarray, what: str) -> np.ndarray:
    length = np.linalg.norm(x, axis=-1, keepdims=True)
    if length.size and not length.min() > SHORTEST:
        raise ValueError(f"{what} has the length {length.min():g}, so it is no rotation; check the column, its slice and the order of its numbers")
    return x / length


def _from_xyzw(q: np.ndarray) -> np.ndarray:
    x, y, z, w = np.moveaxis(_unit(q, "a quaternion"), -1, 0)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    return np.stack([np.stack(row, axis=-1) for row in rows], axis=-2)


def _to_xyzw(m: np.ndarray) -> np.ndarray:
    """Of four equal formulas the one that divides by the largest number (Shepperd 1978); then the sign with w > 0, or the first non-zero of x, y, z > 0."""
    xx, yy, zz = m[..., 0, 0], m[..., 1, 1], m[..., 2, 2]
    xy, xz, yz = m[..., 0, 1] + m[..., 1, 0], m[..., 0, 2] + m[..., 2, 0], m[..., 1, 2] + m[..., 2, 1]
    wx, wy, wz = m[..., 2, 1] - m[..., 1, 2], m[..., 0, 2] - m[..., 2, 0], m[..., 1, 0] - m[..., 0, 1]
    outer = np.stack(  # row i is 4 q_i q, for q = (x, y, z, w)
        [
            np.stack([1 + xx - yy - zz, xy, xz, wx], axis=-1),
            np.stack([xy, 1 - xx + yy - zz, yz, wy], axis=-1),
            np.stack([xz, yz, 1 - xx - yy + zz, wz], axis=-1),
            np.stack([wx, wy, wz, 1 + xx + yy + zz], axis=-1),
        ],
        axis=-2,
    )
    largest = np.diagonal(outer, axis1=-2, axis2=-1).argmax(-1)
    q = np.take_along_axis(outer, largest[..., None, None], axis=-2)[..., 0, :]
    q = q / np.linalg.norm(q, axis=-1, keepdims=True)
    deciding = np.where(np.abs(q) > 1e-12, q, 0)[..., [3, 0, 1, 2]]
    first = np.take_along_axis(deciding, (deciding != 0).argmax(-1)[..., None], axis=-1)
    return q * np.where(first < 0, -1.0, 1.0)


def _from_euler(angles: np.ndarray) -> np.ndarray:
    (cr, cp, cy), (sr, sp, sy) = np.moveaxis(np.cos(angles), -1, 0), np.moveaxis(np.sin(angles), -1, 0)
    rows = [
        [cy * cp, cy * sp * sr - sy * cr, cy * sp * cr + sy * sr],
        [sy * cp, sy * sp * sr + cy * cr, sy * sp * cr - cy * sr],
        [-sp, cp * sr, cp * cr],
    ]
    return np.stack([np.stack(row, axis=-1) for row in rows], axis=-2)


def _to_euler(m: np.ndarray) -> np.ndarray:
    """Pitch in -pi/2..pi/2; where it is one of these, yaw is 0."""
    cos_pitch = np.hypot(m[..., 0, 0], m[..., 1, 0])
    locked = cos_pitch < GIMBAL
    roll = np.where(locked, np.arctan2(-m[..., 1, 2], m[..., 1, 1]), np.arctan2(m[..., 2, 1], m[..., 2, 2]))
    yaw = np.where(locked, 0.0, np.arctan2(m[..., 1, 0], m[..., 0, 0]))
    return np.stack([roll, np.arctan2(-m[..., 2, 0], cos_pitch), yaw], axis=-1)


def _from_axis_angle(v: np.ndarray) -> np.ndarray:
    half = np.linalg.norm(v, axis=-1, keepdims=True) / 2
    return _from_xyzw(np.concatenate([v / 2 * np.sinc(half / np.pi), np.cos(half)], axis=-1))


def _to_axis_angle(m: np.ndarray) -> np.ndarray:
    q = _to_xyzw(m)
    sine = np.linalg.norm(q[..., :3], axis=-1, keepdims=True)
    angle = 2 * np.arctan2(sine, q[..., 3:])
    return q[..., :3] * np.where(sine < 1e-9, 2.0, angle / np.maximum(sine, 1e-9))


def _from_6d(x: np.ndarray) -> np.ndarray:
    first = _unit(x[..., :3], "the first row of a rotation_6d")
    second = x[..., 3:] - (first * x[..., 3:]).sum(-1, keepdims=True) * first
    second = _unit(second, "the second row of a rotation_6d, across the first,")
    return np.stack([first, second, np.cross(first, second)], axis=-2)


def _to_6d(m: np.ndarray) -> np.ndarray:
    return m[..., :2, :].reshape(*m.shape[:-2], 6)


Turn = Callable[[np.ndarray], np.ndarray]
_READ: dict[str, tuple[int, Turn, Turn]] = {
    "quaternion": (4, _from_xyzw, _to_xyzw),
    "quaternion_wxyz": (4, lambda q: _from_xyzw(np.roll(q, -1, axis=-1)), lambda m: np.roll(_to_xyzw(m), 1, axis=-1)),
    "euler": (3, _from_euler, _to_euler),
    "axis_angle": (3, _from_axis_angle, _to_axis_angle),
    "rotation_6d": (6, _from_6d, _to_6d),
}
