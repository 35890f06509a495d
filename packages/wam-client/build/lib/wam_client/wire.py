"""msgpack with numpy arrays, as openpi's clients and servers write it; no pickle.

    array    {b"__ndarray__": True, b"data": bytes, b"dtype": "<f4", b"shape": (2, 8)}
    scalar   {b"__npgeneric__": True, b"data": 1.5, b"dtype": "<f4"}
"""

from __future__ import annotations

from typing import Any

import msgpack
import numpy as np

NUMBERS = "biuf"


def pack(value: Any) -> bytes:
    """Maps, lists, text, numbers and arrays of numbers, as bytes.

    Raises:
        TypeError: something else.
    """
    return msgpack.packb(value, default=_encode)


def unpack(data: bytes) -> Any:
    """The value of a message; its arrays are read-only.

    Raises:
        ValueError: it is no message.
    """
    return msgpack.unpackb(data, object_hook=_decode)


def _encode(value: Any) -> Any:
    if isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind not in NUMBERS:
        raise TypeError(f"an array of {value.dtype} cannot be sent; send numbers")
    if isinstance(value, np.ndarray):
        return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}
    if isinstance(value, np.generic):
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
    raise TypeError(f"a {type(value).__name__} cannot be sent")


def _decode(value: Any) -> Any:
    if b"__ndarray__" in value:
        dtype = np.dtype(value[b"dtype"])
        if dtype.kind not in NUMBERS:
            raise ValueError(f"a message holds an array of {dtype}")
        return np.ndarray(value[b"shape"], dtype, value[b"data"])
    if b"__npgeneric__" in value:
        return value[b"data"]
    return value
