"""What tests of stopping and going on share: the newest state of a run, and runs in processes of their own that are killed at a chosen moment."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from wam.training.checkpoints import read_manifest, read_part, state_folder, states


def newest_state(output: Path) -> dict[str, Tensor]:
    """Every tensor of a run's newest state, as `<file>.<name>`."""
    folder = state_folder(output, states(output)[-1])
    parts = {name.partition(".")[0].partition("-")[0] for name in read_manifest(folder)["files"]}
    out = {}
    for part in sorted(parts):
        with read_part(folder, part) as reader:
            out |= {f"{part}.{name}": reader.get(name) for name in reader.names()}
    return out


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Equal to the bit."""
    return a.keys() == b.keys() and len(a) > 100 and all(torch.equal(a[k], b[k]) for k in a)
