"""The fate of every tensor: a conversion is planned on names and shapes, checked as a whole, and only then written, tensor by tensor.

    source names -> plan: each tensor has exactly one use, each place is filled exactly once, shapes fit     (no numbers are read)
                 -> write: read one, reshape, write one                                                       (memory holds one shard)
                 -> conversion.json, and a table by component

Anything missing, unexpected or of another shape ends the conversion before a file is written.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch

from wam.convert.keys import KeyMap
from wam.files import write_json_atomic
from wam.shards import SHARD_BYTES, ShardWriter, TensorSource

REPORT = "conversion.json"
FATES = ("copied", "renamed", "reshaped", "transposed", "split", "merged", "unused", "referenced")
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Component:
    """A part of a release that becomes a part of what is written.

    Attributes:
        name: for people, e.g. "text_encoder".
        keys: released names to names in the written file.
        targets: every tensor that is expected in it, with its shape.
        folder: where it is written, below the destination ("": at its top).
        stem: name of the weights' file.
        config: written beside the weights as config.json.
        referenced: where this part is read from instead (a folder or Hub id); it is then checked like the others, and not written.
        prefix: put before every name in the written file.
    """

    name: str
    keys: KeyMap
    targets: Mapping[str, Shape]
    folder: str = ""
    stem: str = "model"
    config: Mapping[str, Any] | None = None
    referenced: str | None = None
    prefix: str = ""


@dataclass(frozen=True)
class Fate:
    """What became of one tensor of the release."""

    source: str
    component: str
    fate: str  # one of FATES
    targets: tuple[str, ...]
    shape: Shape
    dtype: str
    note: str = ""


@dataclass
class Report:
    """All there is to say about a conversion.

    Attributes:
        origins: of every written tensor, the released one it comes from, by component.
        notes: what else was decided, for people.
        base_sha256: of a LoRA checkpoint, the identity of the base it was merged onto.
    """

    format: str
    source: str
    fates: list[Fate] = field(default_factory=list)
    origins: dict[str, dict[str, str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    base_sha256: str | None = None

    def count(self, component: str | None = None, fate: str | None = None) -> int:
        """Number of released tensors, of one component or with one fate."""
        return sum((component is None or f.component == component) and (fate is None or f.fate == fate) for f in self.fates)

    def add(self, fates: Iterable[Fate]) -> None:
        """Take in the fates of one source's tensors."""
        for fate in fates:
            self.fates.append(fate)
            if fate.fate != "referenced":
                self.origins.setdefault(fate.component, {}).update(dict.fromkeys(fate.targets, fate.source))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        components = list(dict.fromkeys(f.component for f in self.fates))
        summary = {name: {fate: n for fate in FATES if (n := self.count(name, fate))} for name in components}
        return {"format": self.format, "source": self.source, "tensors": len(self.fates), "summary": summary, "notes": self.notes, "origins": self.origins, "fates": [asdict(f) for f in self.fates]}

    def save(self, directory: Path) -> None:
        """Write conversion.json."""
        write_json_atomic(directory / REPORT, self.to_dict())

    def table(self) -> str:
        """One line a component: tensors, numbers, fates."""
        shown = [fate for fate in FATES if self.count(fate=fate)]
        components = list(dict.fromkeys(f.component for f in self.fates))
        rows = [["component", "tensors", "parameters", *shown]]
        for name in components:
            size = sum(prod(f.shape) for f in self.fates if f.component == name)
            rows.append([name, str(self.count(name)), f"{size:,}", *(str(self.count(name, fate) or "-") for fate in shown)])
        rows.append(["all", str(len(self.fates)), f"{sum(prod(f.shape) for f in self.fates):,}", *(str(self.count(fate=fate)) for fate in shown)])
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))) for row in rows]
        unused = [f"unused: {f.source}: {f.note}" for f in self.fates if f.fate == "unused"]
        more = [f"unused: and {len(unused) - 5} more, listed in {REPORT}"] if len(unused) > 5 else []
        return "\n".join([*lines, *unused[:5], *more, *self.notes])


def plan(source: TensorSource, components: Sequence[Component], where: str) -> list[Fate]:
    """Every tensor's fate, checked, without reading a number.

    Raises:
        ValueError: a tensor that is unexpected, missing, used twice or of another shape; named, with expected and found.
    """
    fates, filled = [], {component.name: {} for component in components}  # type: ignore[var-annotated]
    strangers = []
    for name in source.names():
        fate = _fate(source, name, components, filled, where)
        if fate is None:
            strangers.append(name)
        else:
            fates.append(fate)
    if strangers:
        more = f" and {len(strangers) - 1} more" if len(strangers) > 1 else ""
        raise ValueError(f"{where}: unexpected tensor {strangers[0]!r} {list(source.shape(strangers[0]))}{more}; expected only those of {', '.join(c.name for c in components)}: is this another model or another release?")
    for component in components:
        missing = [target for target in component.targets if target not in filled[component.name]]
        if missing:
            origin = component.keys.source_of(missing[0])
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise ValueError(f"{where}: tensor {origin!r} is missing{more}; expected it with {prod(component.targets[missing[0]]):,} numbers for {component.name} {missing[0]!r} {list(component.targets[missing[0]])}: the checkpoint is incomplete or of another model")
    return fates


def _fate(source: TensorSource, name: str, components: Sequence[Component], filled: dict[str, dict[str, str]], where: str) -> Fate | None:
    shape, dtype = source.shape(name), str(source.dtype(name)).removeprefix("torch.")
    for component in components:
        found = component.keys.apply(name, torch.empty(shape, device="meta"))
        if not found:
            reason = component.keys.unused(name)
            if reason is not None:
                return Fate(name, component.name, "unused", (), shape, dtype, reason)
            continue
        for target, tensor in found.items():
            _check(component, target, tuple(tensor.shape), name, shape, filled[component.name], where)
        ops = component.keys.targets(name)
        kind = "copied" if ops[0][1].fate == "renamed" and ops[0][0] == name else ops[0][1].fate
        if component.referenced:
            return Fate(name, component.name, "referenced", tuple(found), shape, dtype, f"left out; {component.referenced} is read instead")
        return Fate(name, component.name, kind, tuple(component.prefix + target for target in found), shape, dtype)
    return None


def _check(component: Component, target: str, shape: Shape, name: str, released: Shape, filled: dict[str, str], where: str) -> None:
    expected = component.targets.get(target)
    if expected is None:
        raise ValueError(f"{where}: unexpected tensor {name!r} {list(released)}; {component.name} of this size has no {target!r}: the config and the weights are of different models")
    if expected != shape:
        raise ValueError(f"{where}: tensor {name!r} has shape {list(released)}; expected one that makes {list(expected)} for {component.name} {target!r}, found {list(shape)}: the checkpoint is of another size than its config says")
    if target in filled:
        raise ValueError(f"{where}: tensors {filled[target]!r} and {name!r} both become {target!r}; expected one of them")
    filled[target] = name


def write(source: TensorSource, components: Sequence[Component], destination: Path, max_bytes: float = SHARD_BYTES) -> None:
    """Write what `plan` has checked: each component's weights, then its config."""
    for component in components:
        if component.referenced:
            continue
        folder = destination / component.folder
        with ShardWriter(folder, component.stem, max_bytes) as writer:
            for name in source.names():
                if component.keys.targets(name):
                    for target, tensor in component.keys.apply(name, source.get(name)).items():
                        writer.add(component.prefix + target, tensor)
        if component.config is not None:
            write_json_atomic(folder / "config.json", dict(component.config))


def shapes(module: torch.nn.Module) -> dict[str, Shape]:
    """Names and shapes of a module's tensors, tied ones once."""
    seen: set[int] = set()
    out = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            out[name] = tuple(tensor.shape)
    return out


