"""Bytes to values and back: msgpack with numpy arrays, in the encoding of openpi's clients, within limits, and without pickle.

    array    map of four, keys are bytes     {__ndarray__: true, data: bin, dtype: "<f4", shape: [2, 8]}
    scalar   map of three                    {__npgeneric__: true, data: 1.5, dtype: "<f4"}

A message comes from anywhere, so nothing is allocated on its word: an array is a view of bytes that have really arrived, and its shape
must account for each of them.  msgpack turns one byte into an object of some fifty, so containers are counted while they are decoded.
Arrays hold numbers or truth values; text, objects, records and complex numbers are refused, and so are extension types.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import msgpack
import numpy as np

from wam.serving.errors import Code, ServingError

NDARRAY, GENERIC = b"__ndarray__", b"__npgeneric__"
NUMBERS = frozenset("biuf")  # kinds of dtype that arrays may have
MEBI = 1 << 20


@dataclass(frozen=True)
class Limits:
    """What a message may be.

    Attributes:
        message_bytes, array_bytes: largest message, and largest array in it.
        containers, items: maps and lists in a message, and entries in each.
        depth: maps and lists inside one another.
        text: bytes of a string or a key.
        dimensions: of an array.
    """

    message_bytes: int = 32 * MEBI
    array_bytes: int = 16 * MEBI
    containers: int = 512
    items: int = 1024
    depth: int = 6
    text: int = 8192
    dimensions: int = 5


DEFAULT_LIMITS = Limits()


def pack(value: Any) -> bytes:
    """A value as bytes, as openpi's own packer makes them.

    Raises:
        TypeError: something that is no map, list, number, text or array of numbers.
    """
    return bytes(msgpack.packb(value, default=_encode))


def unpack(data: bytes, limits: Limits = DEFAULT_LIMITS) -> Any:
    """The value of a message; its arrays are read-only views of it.

    Raises:
        ServingError: it is no message, or one beyond `limits`.
    """
    if len(data) > limits.message_bytes:
        raise ServingError("too_large", f"the message has {len(data)} bytes, and {limits.message_bytes} are allowed", "send smaller or fewer images")
    decoder = _Decoder(limits)
    try:
        value = msgpack.unpackb(
            data,
            object_pairs_hook=decoder.pairs,
            list_hook=decoder.items,
            ext_hook=decoder.extension,
            max_str_len=limits.text,
            max_bin_len=limits.array_bytes,
            max_array_len=limits.items,
            max_map_len=limits.items,
            max_ext_len=0,
        )
    except ServingError:
        raise
    except (ValueError, RecursionError, TypeError, OverflowError) as error:  # what msgpack raises for broken, cut, too long or too deep messages
        raise ServingError("bad_message", f"the message is not msgpack within the limits ({type(error).__name__})", "send one map, packed as docs/serving.md says") from None
    _check(value, limits, 0)
    return value


def _encode(value: Any) -> Any:
    if isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind not in NUMBERS:
        raise TypeError(f"an array of {value.dtype} cannot be sent; send numbers or truth values")
    if isinstance(value, np.ndarray):
        return {NDARRAY: True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}
    if isinstance(value, np.generic):
        return {GENERIC: True, b"data": value.item(), b"dtype": value.dtype.str}
    raise TypeError(f"a {type(value).__name__} cannot be sent; send maps, lists, numbers, text and arrays")


@dataclass
class _Decoder:
    """msgpack's hooks, and how many containers they have seen of one message."""

    limits: Limits
    containers: int = 0

    def _count(self) -> None:
        self.containers += 1
        if self.containers > self.limits.containers:
            raise ServingError("too_large", f"the message holds more than {self.limits.containers} maps and lists", "send arrays instead of lists of numbers")

    def items(self, items: list[Any]) -> list[Any]:
        self._count()
        return items

    def pairs(self, pairs: list[tuple[Any, Any]]) -> Any:
        self._count()
        out = dict(pairs)
        if len(out) != len(pairs):
            raise _bad("a map names a key twice", "name each once")
        if NDARRAY in out:
            return _array(out, self.limits)
        if GENERIC in out:
            return _scalar(out)
        return out

    @staticmethod
    def extension(code: int, data: bytes) -> Any:
        raise _bad(f"the message holds an extension type ({code})", "send maps, lists, numbers, text and arrays")


def _array(parts: dict[Any, Any], limits: Limits) -> np.ndarray:
    """An array over its own bytes, once its shape accounts for them."""
    data, shape = parts.get(b"data"), parts.get(b"shape")
    dtype = _dtype(parts.get(b"dtype"), NUMBERS)
    if not isinstance(data, bytes) or not isinstance(shape, list) or len(parts) != 4:
        raise _bad("an array is not made of __ndarray__, data (bytes), dtype and shape (list)", "pack it as docs/serving.md says")
    if len(shape) > limits.dimensions or not all(type(n) is int and 0 <= n <= limits.array_bytes for n in shape):
        raise ServingError("too_large", f"an array's shape is {str(shape)[:80]}", f"send up to {limits.dimensions} dimensions, each from 0 to {limits.array_bytes}")
    if math.prod(shape) * dtype.itemsize != len(data):
        raise ServingError("wrong_shape", f"an array of shape {shape} and type {dtype} has {len(data)} bytes, not {math.prod(shape) * dtype.itemsize}", "send all of it, and no more")
    array: np.ndarray = np.ndarray(shape, dtype, data)
    return array if dtype.isnative else array.astype(dtype.newbyteorder("="))


def _scalar(parts: dict[Any, Any]) -> Any:
    """A numpy scalar as a plain number or text."""
    value, dtype = parts.get(b"data"), _dtype(parts.get(b"dtype"), NUMBERS | {"U"})
    fits = isinstance(value, str) if dtype.kind == "U" else isinstance(value, (bool, int, float))
    if not fits or len(parts) != 3:
        raise _bad("a scalar is not made of __npgeneric__, data (a number) and dtype", "pack it as docs/serving.md says")
    return value


def _dtype(name: Any, kinds: frozenset[str]) -> np.dtype:
    """A dtype by its short name, such as <f4; numpy reads far more than that, which is refused before it is asked."""
    if isinstance(name, str) and len(name) <= 8 and name[:1] in "<>|=" and name[1:2] in kinds and name[2:].isdigit() and name.isascii():
        try:
            return np.dtype(name)
        except TypeError:
            pass
    raise ServingError("wrong_type", f"an array has the type {str(name)[:40]!r}", "send uint8 images and float32 states (bool, integers and floats are taken)")


def _check(value: Any, limits: Limits, depth: int) -> None:
    """Keys are text, values are of the few kinds there are, and nothing is deeper than allowed."""
    if depth > limits.depth:
        raise ServingError("too_large", f"maps and lists are more than {limits.depth} deep", "send them flat")
    if isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise _bad(f"a key is {type(key).__name__}", "keys are text, but for those of an array")
            _check(inner, limits, depth + 1)
    elif isinstance(value, list):
        for inner in value:
            _check(inner, limits, depth + 1)
    elif not (value is None or isinstance(value, (str, bool, int, float, np.ndarray))):
        raise _bad(f"a value is {type(value).__name__}", "send maps, lists, numbers, text and arrays")


def _bad(message: str, remedy: str) -> ServingError:
    code: Code = "bad_message"
    return ServingError(code, message, remedy)
