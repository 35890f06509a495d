"""Trees of plain dictionaries to typed, checked dataclasses, and back.

What a config holds is `wam.config`; here is how any of it is read: unknown keys are refused with the nearest right name, wrong types
with the expected one, and what stands in a file lies over what a preset says.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import re
import reprlib
import types
import typing
from typing import Any, Literal, TypeVar

import yaml

T = TypeVar("T")
LARGEST = 2**63 - 1  # of whole numbers: what a seed or a size can be anywhere further on


class ConfigError(ValueError):
    """A config that cannot be used; the message names the key, the value, what was expected and the remedy."""


def require(condition: bool, problem: str, remedy: str) -> None:
    """Refuse a config unless `condition` holds.

    Raises:
        ConfigError: "problem; remedy".
    """
    if not condition:
        raise ConfigError(f"{problem}; {remedy}")


class _Loader(yaml.SafeLoader):
    """As SafeLoader, but a key that is said twice is refused: YAML takes the last, silently."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                require((key.tag, key.value) not in seen, f"line {key.start_mark.line + 1} says {show(key.value)} a second time", "leave one of them")
                seen.add((key.tag, key.value))
        return node


def read_yaml(text: str, what: str) -> Any:
    """YAML to plain values.

    Raises:
        ConfigError: "`what` is not valid YAML", for whatever the parser makes of it: of dates, numbers and nesting that are none, it raises errors of many kinds.
    """
    try:
        return yaml.load(text, _Loader)  # a SafeLoader
    except ConfigError as error:
        raise ConfigError(f"{what}: {error}") from error
    except Exception as error:
        said = str(error).strip() or type(error).__name__
        raise ConfigError(f"{what} is not valid YAML: {said}; quote texts that hold : # [ {{ ! or begin with a digit") from error


def show(value: Any) -> str:
    """A value for a message, shortened where it is long or deep."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 120
    return short.repr(value)


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    """The types of a section's fields; working them out is most of what reading a config takes."""
    return typing.get_type_hints(cls)


def overlay(cls: Any, below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`above` over `below`: sections are merged key by key, everything else (lists, tables of modes or cells) is replaced whole."""
    hints = _hints(cls)
    out = dict(below)
    for key, value in above.items():
        kind = hints.get(key)
        section = next((k for k in (kind, *typing.get_args(kind)) if dataclasses.is_dataclass(k)), None) if typing.get_origin(kind) is not tuple else None
        both = isinstance(value, dict) and isinstance(out.get(key), dict)
        out[key] = overlay(section, out[key], value) if section is not None and both else value
    return out


def to_dict(value: Any) -> Any:
    """Dataclasses to plain dictionaries and lists, as YAML and JSON write them."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, (tuple, list)):
        return [to_dict(v) for v in value]
    if isinstance(value, dict):
        return {k: to_dict(v) for k, v in value.items()}
    return value


def from_dict(cls: type[T], tree: Any, where: str = "") -> T:
    """Build a config dataclass from a plain dictionary, refusing unknown keys and wrong types.

    Raises:
        ConfigError: with the full key, the value, and the nearest right name or the expected type.
    """
    if not isinstance(tree, dict):
        raise ConfigError(f"{where or 'the config'} is {show(tree)}; expected a section with keys {names(cls)}")
    hints = _hints(typing.cast(typing.Any, cls))
    known = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    values = {}
    for key, value in tree.items():
        full = f"{where}.{key}" if where else str(key)
        if key not in known:
            raise ConfigError(f"unknown key {show(full)}; {_nearest(str(key), known, where)}")
        values[key] = _convert(hints[key], value, full)
    missing = [f.name for f in dataclasses.fields(cls) if f.name not in values and f.default is f.default_factory is dataclasses.MISSING]  # type: ignore[arg-type]
    if missing:
        raise ConfigError(f"{where or 'the config'} lacks {', '.join(missing)}; expected a section with keys {names(cls)}")
    try:
        return cls(**values)
    except ConfigError as error:
        if str(error).startswith(re.sub(r"\[\d+\]", "", where)):
            raise
        raise ConfigError(f"{where}: {error}") from error  # a section that stands in several places does not know where it is


def _convert(kind: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _convert(next(a for a in args if a is not type(None)), value, where)
    if origin is Literal:
        if value not in args:
            raise ConfigError(f"{where} is {show(value)}; expected one of {', '.join(map(repr, args))}{_did_you_mean(show(value), [str(a) for a in args])}")
        return value
    if origin is tuple:
        return _convert_tuple(args, value, where)
    if origin is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{where} is {show(value)}; expected a mapping")
        return {_convert(args[0], k, where): _convert(args[1], v, f"{where}.{k}") for k, v in value.items()}
    if dataclasses.is_dataclass(kind):
        return from_dict(typing.cast(type, kind), value, where)
    if kind is float:
        return _number(value, where)
    if kind is int and isinstance(value, int) and abs(value) > LARGEST:
        raise ConfigError(f"{where} is {show(value)}; expected a whole number of at most {LARGEST}")
    if kind is str and isinstance(value, str) and ("\0" in value or any("\ud800" <= c <= "\udfff" for c in value)):
        raise ConfigError(f"{where} is {show(value)}; expected a text without the character 0 and without halves of characters")
    if isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    raise ConfigError(f"{where} is {show(value)} ({type(value).__name__}); expected {kind.__name__}")


def _number(value: Any, where: str) -> float:
    """A finite number; YAML 1.1 reads 1e-3 as text."""
    try:
        number = float(value) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else None
    except (ValueError, OverflowError):
        number = None
    if number is None:
        raise ConfigError(f"{where} is {show(value)} ({type(value).__name__}); expected float")
    if not math.isfinite(number):
        raise ConfigError(f"{where} is {number}; expected a finite number")
    return number


def _convert_tuple(args: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise ConfigError(f"{where} is {show(value)}; expected a list, e.g. [{show(value)}]")
    if args[-1] is Ellipsis:
        return tuple(_convert(args[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if len(value) != len(args):
        raise ConfigError(f"{where} has {len(value)} entries; expected {len(args)}")
    return tuple(_convert(a, v, f"{where}[{i}]") for i, (a, v) in enumerate(zip(args, value, strict=True)))


def names(cls: Any) -> str:
    """The keys of a section, for messages."""
    return ", ".join(f.name for f in dataclasses.fields(cls))


def _nearest(key: str, known: set[str], where: str) -> str:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    prefix = f"{where}." if where else ""
    if near:
        return f"did you mean {prefix + near[0]!r}?"
    return f"{where or 'the config'} has the keys {', '.join(sorted(known))}"


def _did_you_mean(value: str, known: list[str]) -> str:
    near = difflib.get_close_matches(value, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""
