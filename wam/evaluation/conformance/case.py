"""A conformance case: what a released system computed, and all that is needed to compute it again.

A case is a pair of files.  The JSON says what everything is; nothing in it is taken on trust where the tensors can answer:

    NAME.json          configuration, axes, conventions in words; name and shape of every input and output; hash and counts of
    NAME.safetensors   weights/<released key>   inputs/<name>   outputs/<name>      float32

A pair that does not fit together is refused before anything is computed.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch
from torch import Tensor

FORMAT = "golden-v1"
PARTS = ("weights", "inputs", "outputs")
T = TypeVar("T")


@dataclass(frozen=True)
class Case:
    """One case, checked.

    Attributes:
        spec: the JSON.
        weights: by released key.
        inputs, outputs: by the names that `spec` gives them.
    """

    path: Path
    spec: dict[str, Any]
    weights: dict[str, Tensor]
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]

    @property
    def name(self) -> str:
        """The case's own name."""
        return str(self.spec["case"])

    def field(self, kind: type[T], *keys: str) -> T:
        """A field of the JSON, e.g. `field(int, "axes", "B")`.

        Raises:
            ValueError: it is not there, or of another type; names the field.
        """
        node: Any = self.spec
        where = ".".join(keys)
        for key in keys:
            if not isinstance(node, dict) or key not in node:
                raise ValueError(f"{self.path} has no field {where}; a case of this system needs it")
            node = node[key]
        if kind is float and isinstance(node, int) and not isinstance(node, bool):
            node = float(node)
        if not isinstance(node, kind) or (kind is int and isinstance(node, bool)):
            raise ValueError(f"{self.path}: field {where} is {node!r}; expected {kind.__name__}")
        return node

    def input(self, name: str) -> Tensor:
        """An input.

        Raises:
            ValueError: the case does not hold it.
        """
        if name not in self.inputs:
            raise ValueError(f"{self.path} holds no input {name!r}, which its outputs call for; inputs: {', '.join(sorted(self.inputs))}")
        return self.inputs[name]


def load_case(path: Path) -> Case:
    """Read and check a pair.

    Raises:
        FileNotFoundError: one of the two files is missing.
        ValueError: not a case, damaged, or files that do not belong together; names what differs.
    """
    spec = _checked(read_json(path), path)
    file = path.with_suffix(".safetensors")
    if not file.is_file():
        raise FileNotFoundError(f"{path} has no tensors: {file} is missing; a case is a pair of files with one name")
    data = file.read_bytes()
    expected, found = spec["safetensors_sha256"], hashlib.sha256(data).hexdigest()
    if found != expected:
        size = spec.get("safetensors_bytes", len(data))
        lengths = f"it has {len(data)} bytes, expected {size}" if size != len(data) else "its length is right"
        raise ValueError(f"{file} is not the file that {path.name} describes: sha256 {found[:12]}..., expected {str(expected)[:12]}... ({lengths}); copy the pair again")
    try:
        tensors = safetensors.torch.load(data)
    except Exception as error:
        raise ValueError(f"{file} cannot be read ({error}); copy the pair again") from error
    parts = {part: {k.removeprefix(f"{part}/"): v for k, v in tensors.items() if k.startswith(f"{part}/")} for part in PARTS}
    case = Case(path, spec, **parts)
    _check(case, len(tensors))
    return case


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        FileNotFoundError: no such file; names those there are.
        ValueError: not JSON, or not an object.
    """
    if not path.is_file():
        near = ", ".join(sorted(str(p) for p in path.parent.glob("*.json"))) if path.parent.is_dir() else ""
        raise FileNotFoundError(f"no case {path}; JSON files in {path.parent}/: {near or 'none'}")
    try:
        spec = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); copy the pair again") from error
    if not isinstance(spec, dict):
        raise ValueError(f"{path} is not a conformance case: it holds a {type(spec).__name__}; give the JSON of a case")
    return spec


def _checked(spec: dict[str, Any], path: Path) -> dict[str, Any]:
    if "format" not in spec:
        raise ValueError(f"{path} is not a conformance case: it has no field 'format'; give the JSON of a case")
    if spec["format"] != FORMAT:
        raise ValueError(f"{path} has format {spec['format']!r}; this version reads {FORMAT!r}")
    missing = [key for key in ("case", "config", "inputs", "outputs", "tensor_count", "safetensors_sha256") if key not in spec]
    if missing:
        raise ValueError(f"{path} is not a conformance case, or damaged: it has no field {', '.join(missing)}; give the JSON that lies beside a .safetensors of the same name")
    return spec


def _check(case: Case, total: int) -> None:
    """Counts, names, shapes and types of every tensor."""
    for part in PARTS:
        count, found = case.field(int, "tensor_count", part), len(getattr(case, part))
        if count != found:
            raise ValueError(f"{case.path} says {count} {part}, but its safetensors holds {found}; copy the pair again")
    if total != sum(len(getattr(case, part)) for part in PARTS):
        raise ValueError(f"{case.path}: the safetensors holds tensors that are none of {', '.join(PARTS)}; this is not a case of format {FORMAT!r}")
    for part in ("inputs", "outputs"):
        tensors, described = getattr(case, part), case.field(dict, part)
        odd = sorted(set(tensors) ^ set(described))
        if odd:
            side = "describes it, the safetensors lacks it" if odd[0] in described else "does not describe it, the safetensors holds it"
            raise ValueError(f"{case.path}: {part}/{odd[0]}: the JSON {side}; copy the pair again")
        for name, tensor in tensors.items():
            shape = list(described[name].get("shape", ()))
            if shape != list(tensor.shape):
                raise ValueError(f"{case.path}: {part}/{name} has shape {list(tensor.shape)}, described as {shape}; copy the pair again")
    for part in PARTS:
        for name, tensor in getattr(case, part).items():
            if tensor.dtype != torch.float32:
                raise ValueError(f"{case.path}: {part}/{name} is {tensor.dtype}; cases are float32 throughout")
