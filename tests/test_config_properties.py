"""Every field of every section can be wrong: each is either a config that survives writing and reading, or one clear refusal.

The fields are found by walking the dataclasses, so a new one is tested as soon as it exists.  A refusal is a ConfigError whose text
names the section and the field and holds a remedy behind a semicolon; nothing else may be raised.
"""

import dataclasses
import datetime
import inspect
import math
import re
import tempfile
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from wam.config import Config, ConfigError, from_dict, load_config, save_config, to_dict
from wam.config_tree import LARGEST


def tried(times: int) -> settings:
    """The same examples in every run, however slow the machine is."""
    return settings(max_examples=times, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


NUMBERS = [0, 1, -1, 3, 1000, 2**63, 10**400, 0.0, 0.5, 1.5, -0.5, 1e308, math.inf, -math.inf, math.nan]
TEXTS = ["", "x", "nan", "1e999", "1e-3", "a\0b", "\ud800", "zażółć 機器人 🤖", "x" * 500, "{instruction}"]
OTHERS = [None, True, [], {}, [None], {"x": 1}, {1: 2}, b"bytes", {1, 2}, datetime.date(2026, 1, 1), [0, 0, 0], [math.nan, 1], ["", ""]]
JUNK = [*NUMBERS, *TEXTS, *OTHERS]
STRANGE = st.one_of(
    st.sampled_from(JUNK),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.recursive(st.sampled_from([*NUMBERS, *TEXTS[:8], None, True]), lambda inside: st.lists(inside, max_size=4) | st.dictionaries(st.text(max_size=3), inside, max_size=3), max_leaves=5),
)


# ------------------------------------------------------------------------------------------------ every field


def sections(kind: Any) -> list[Any]:
    """The dataclasses in a type: `A`, `A | None`, `tuple[A, ...]`."""
    return [kind] if dataclasses.is_dataclass(kind) else [found for part in typing.get_args(kind) for found in sections(part)]


def walk(cls: Any, at: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], Any, Any]]:
    """The path to every field, its type, and the class it was written down in; a section among several is the first of them."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        path, kind = (*at, field.name), hints[field.name]
        yield path, kind, next(c for c in cls.__mro__ if field.name in inspect.get_annotations(c))
        for section in sections(kind):
            yield from walk(section, (*path, 0) if typing.get_origin(kind) is tuple else path)


FIELDS = [(path, kind) for path, kind, _ in walk(Config)]
ONCE = list({(owner, path[-1]): (path, kind) for path, kind, owner in reversed(list(walk(Config)))}.values())  # of a section that stands in several places, the first


def placed(tree: Any, path: tuple[str | int, ...], value: Any, cls: Any) -> Any:
    """A plain tree with a value at a path, what leads there made where it is absent."""
    if not path:
        return value
    if isinstance(path[0], int):
        return [placed((tree or [None])[0], path[1:], value, cls), *(tree or [None])[1:]]
    inside = sections(typing.get_type_hints(cls)[path[0]])
    return {**(tree or {}), path[0]: placed((tree or {}).get(path[0]), path[1:], value, inside[0] if inside else None)}


def context(path: tuple[str | int, ...]) -> dict[str, Any]:
    """What a field needs around it to be right."""
    return {"model": {"pretrained": "some/wan"}} if path[:2] == ("model", "lora") else {}


def dotted(path: tuple[str | int, ...]) -> str:
    return ".".join(map(str, path)).replace(".0", "")


def is_named(path: tuple[str | int, ...], text: str) -> bool:
    """Whether a message says which field it is about: all names of the path, in their order."""
    text = re.sub(r"\[\d+\]", "", text)
    return re.search(r".*?\b".join(re.escape(str(name)) for name in path if name != 0), text, re.DOTALL) is not None


def plain(value: Any) -> Iterator[Any]:
    """Every value inside a tree."""
    parts = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    yield value
    for part in parts:
        yield from plain(part)


def outcome(path: tuple[str | int, ...], value: Any) -> str | None:
    """What a config says to a value: None where it takes it, after it was written and read."""
    tree = placed(context(path), path, value, Config)
    try:
        config = from_dict(Config, tree)
    except ConfigError as error:
        text = str(error)
        assert is_named(path, text), f"{dotted(path)} = {value!r:.80} is refused without its name: {text}"
        assert ";" in text and text.split(";", 1)[1].strip(), f"{dotted(path)} = {value!r:.80} is refused without a remedy: {text}"
        return text
    numbers = [part for part in plain(value) if isinstance(part, (int, float))]
    assert all(math.isfinite(number) and abs(number) <= max(LARGEST, 1.8e308) for number in numbers), f"{dotted(path)} = {value!r:.80} was taken"
    assert yaml.safe_load(yaml.safe_dump(tree)) == tree, f"{dotted(path)} = {value!r:.80} does not survive YAML"
    section = getattr(config, str(path[0]))
    assert not dataclasses.is_dataclass(section) or from_dict(type(section), to_dict(section), str(path[0])) == section
    return None


def test_every_field_takes_a_value_or_says_why_not() -> None:
    for path, _ in ONCE:
        said = [outcome(path, value) for value in JUNK]
        assert any(said), f"{dotted(path)} takes anything at all"


def base(kind: Any) -> tuple[Any, ...]:
    """The types that a type is made of."""
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        return tuple(found for part in typing.get_args(kind) for found in base(part))
    return (origin or kind,)


def test_what_is_refused_by_type() -> None:
    """A value of a type that is not the field's never gets in: the walk above would not notice a field that takes everything of one kind."""
    wrong = {int: ["x", 1.5, True, [1]], float: ["x", True, [1.0]], str: [1, 1.5, True, ["x"]], bool: [1, 0, "yes", 0.0], tuple: ["x", 1, {"x": 1}], dict: ["x", 1, ["x"]], Literal: ["no such thing", 17]}
    for path, kind in ONCE:
        known = base(kind)
        for value in wrong.get(next(k for k in known if k is not type(None)), []):
            assert outcome(path, value), f"{dotted(path)} takes {value!r}"
        if type(None) not in known:
            assert outcome(path, None), f"{dotted(path)} takes null"


def test_numbers_below_zero() -> None:
    """No field's number may be negative but the mean of a level's logit; a field that should take them says so here."""
    for path, kind in ONCE:
        if {int, float} & set(base(kind)) and path[-1] != "mean":
            assert outcome(path, -1), f"{dotted(path)} takes -1"


@tried(500)
@given(st.sampled_from([path for path, _ in FIELDS]), STRANGE)
def test_any_field_any_value(path: tuple[str | int, ...], value: Any) -> None:
    outcome(path, value)


@tried(100)
@given(st.lists(st.tuples(st.sampled_from([path for path, kind in FIELDS if not sections(kind)]), STRANGE), min_size=2, max_size=4))
def test_several_fields_at_once(changes: list[tuple[tuple[str | int, ...], Any]]) -> None:
    tree = to_dict(Config())
    for path, value in changes:
        tree = placed(tree, path, value, Config)
    try:
        config = from_dict(Config, tree)
    except ConfigError as error:
        assert any(is_named(path, str(error)) for path, _ in changes) and ";" in str(error)
        return
    assert from_dict(Config, to_dict(config)) == config


@pytest.mark.parametrize("at", [(), *(path for path, kind in FIELDS if sections(kind))], ids=lambda at: dotted(at) or "config")
def test_unknown_keys_of_every_section(at: tuple[str | int, ...]) -> None:
    kind = dict(FIELDS).get(at)
    at = (*at, 0) if typing.get_origin(kind) is tuple else at
    for key in ("no_such_key", "", 3, None, "\ud800", "x" * 3000):
        with pytest.raises(ConfigError, match=r"unknown key .*; ") as caught:
            from_dict(Config, placed(to_dict(Config()), at, {key: 1}, Config) if at else {key: 1})
        assert is_named(at, str(caught.value)) and len(str(caught.value)) < 2500


# ------------------------------------------------------------------------------------------------ files and overrides


BROKEN_YAML = ["2020-99-99", "!!int x", "!!bool x", "!!timestamp x", "0x_", "!!binary \xff", "[" * 1000, "{a: " * 1000, "&a [*a]", "*nowhere", "!!python/object:os.system x", "9" * 5000, "\t- x: [", "? [a]\n: b"]


@tried(150)
@given(st.sampled_from([".".join(map(str, path)) for path, _ in FIELDS] + ["", ".", "a.b.c", "=", "training..steps"]), st.text(max_size=12))
def test_overrides_of_any_text(key: str, text: str) -> None:
    try:
        load_config(None, [f"{key}={text}"])
    except ConfigError as error:
        assert ";" in str(error)


def test_what_is_not_yaml(tmp_path: Path) -> None:
    for number, text in enumerate(BROKEN_YAML):
        path = tmp_path / f"{number}.yaml"
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        with pytest.raises(ConfigError, match=";"):
            load_config(path)


@tried(80)
@given(st.binary(max_size=60))
def test_files_of_any_bytes(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "some.yaml"
        path.write_bytes(content)
        try:
            config = load_config(path)
        except ConfigError as error:
            assert ";" in str(error)
        else:
            save_config(config, path)
            assert load_config(path) == config
