"""What commands share: their shape, their flags, and settings that come from one place, the typed configs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from wam.config import ConfigError, from_dict
from wam.config_tree import read_yaml

T = TypeVar("T")

DEFAULT_CONFIG = Path("configs/metaworld_tiny.yaml")


@dataclass(frozen=True)
class Command:
    """One `wam` command: `summary` is its line in `wam --help`, `about` its own help text."""

    name: str
    summary: str
    about: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    handler: Callable[[argparse.Namespace], int | None]


def flag_overrides(flags: dict[str, Any]) -> list[str]:
    """Flags that were given, as overrides (JSON is YAML, so text keeps its quotes)."""
    return [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in flags.items() if value is not None]


def section(cls: type[T], name: str, overrides: Sequence[str]) -> T:
    """One section by itself: defaults and `name.key=value`.  The other sections are the checkpoint's and cannot be changed here."""
    tree: dict[str, Any] = {}
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key.startswith(f"{name}."):
            raise ConfigError(f"override {override!r}: this command takes {name}.key=value; everything else comes from the checkpoint")
        node, (*parents, last) = tree, key.removeprefix(f"{name}.").split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ConfigError(f"override {override!r}: {parent} was given a value, so it has no keys; give the whole section at once, or its keys one by one")
        node[last] = read_yaml(value, f"override {override!r}: the value")
    return from_dict(cls, tree, where=name)


def names(text: str) -> list[str]:
    """`a,b` to `["a", "b"]`."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise argparse.ArgumentTypeError("expected at least one name, e.g. a or a,b")
    return names


def beside(checkpoint: Path, name: str) -> Path:
    """Default output: next to the checkpoint, so that results of two checkpoints never mix."""
    return checkpoint.parent / name


def add_config(parser: argparse.ArgumentParser) -> None:
    """`--config`, and overrides of any section."""
    parser.add_argument("--config", metavar="PATH", type=Path, default=DEFAULT_CONFIG, help=f"YAML config (default: {DEFAULT_CONFIG})")
    add_overrides(parser, "section.key=value", "change a setting, e.g. training.steps=200 timeline.blocks=4")


def add_overrides(parser: argparse.ArgumentParser, shape: str, about: str) -> None:
    """Settings as `key=value`, wherever they stand."""
    parser.add_argument("overrides", nargs="*", metavar=shape, help=about)


def add_output(parser: argparse.ArgumentParser, about: str) -> None:
    """`--output`."""
    parser.add_argument("--output", metavar="DIR", type=Path, help=about)


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """`--checkpoint`, which is needed."""
    parser.add_argument("--checkpoint", metavar="DIR", type=Path, required=True, help="a checkpoint directory written by `wam train`")


def runtime_flags(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """The flags of `wam.config_runtime.add_runtime`, as settings of a section's `runtime`."""
    return {f"{name}.runtime.{key}": getattr(args, key) for key in ("device", "dtype", "compile")}


def positive(text: str) -> int:
    """A whole number above 0."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError("expected a whole number, at least 1")
    return int(text)


def size(text: str) -> tuple[int, int]:
    """`352x640` to (352, 640)."""
    height, _, width = text.partition("x")
    if not (height.isdigit() and width.isdigit()):
        raise argparse.ArgumentTypeError("expected HEIGHTxWIDTH in pixels, e.g. 352x640")
    return int(height), int(width)
