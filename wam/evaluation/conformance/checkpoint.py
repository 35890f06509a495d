"""The tensors of a full-size checkpoint by name and shape: does every one of them find its place, and is none lacking?

    {"action_head.model.patch_embedding.weight": [5120, 36, 1, 2, 2], ...}     2146 of DreamZero's 14B, 1828 of its 5B

A row is a component: how many tensors it has, and how many numbers, in the release and in our own modules.  Nothing is allocated.
"""

from __future__ import annotations

from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wam.convert.dreamzero import KEYS, MODEL, PARTS, model_config
from wam.convert.report import Component, plan, shapes
from wam.evaluation.conformance.case import Case
from wam.evaluation.conformance.stages import Plan, Stage
from wam.model.wam import WorldActionModel
from wam.shards import MemorySource, build_empty

NAME = "checkpoint"
PREFIXES = {"model": MODEL, **{name: prefix for name, (prefix, _) in PARTS.items()}}


def recognises(spec: dict[str, Any]) -> bool:
    """Is this a list of a DreamZero checkpoint's tensors?"""
    return any(name.startswith(MODEL) for name in spec) and all(isinstance(shape, list) and all(isinstance(n, int) for n in shape) for shape in spec.values())


def load(path: Path, spec: dict[str, Any]) -> Case:
    """The list as a case without weights; tensors of no known component are an output that nobody computes."""
    sizes: dict[str, list[int]] = {}
    for name, shape in spec.items():
        component = next((key for key, prefix in PREFIXES.items() if name.startswith(prefix)), name)
        sizes.setdefault(component, []).append(prod(shape))
    outputs = {name: torch.tensor([len(numbers), sum(numbers)], dtype=torch.float64) for name, numbers in sizes.items()}
    return Case(path, {"case": path.stem, "outputs": dict.fromkeys(outputs), "tensors": spec}, {}, {}, outputs)


def prepare(case: Case) -> Plan:
    """A stage for each component."""
    return Plan(NAME, tuple(Stage((name,), partial(_place, case, name)) for name in case.outputs if name in PREFIXES))


def _place(case: Case, name: str) -> dict[str, Tensor]:
    """Tensors and numbers of one component, counted on our side, once each of its tensors is known to have its place."""
    listed = {key: torch.empty(shape, device="meta") for key, shape in case.spec["tensors"].items() if key.startswith(PREFIXES[name])}
    source = MemorySource(listed)
    if name == "model":
        config = model_config({key.removeprefix(MODEL): tuple(x.shape) for key, x in listed.items()}, {}, where=str(case.path))
        component = Component(name, KEYS.within(MODEL), shapes(build_empty(lambda: WorldActionModel(config))))
    else:
        component = PARTS[name][1](source, PREFIXES[name], str(case.path))
    unused = [fate for fate in plan(source, [component], str(case.path)) if fate.fate == "unused"]
    origins = {component.keys.source_of(target) for target in component.targets}
    numbers = sum(prod(shape) for shape in component.targets.values()) + sum(prod(fate.shape) for fate in unused)
    return {name: torch.tensor([len(origins) + len(unused), numbers], dtype=torch.float64)}
