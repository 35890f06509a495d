"""Where and how a policy computes when it plans or imagines; nothing of it changes what the policy is."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Literal, get_args

from wam.config_tree import require as _require

RuntimeDtype = Literal["stored", "float32", "bfloat16"]


@dataclass(frozen=True)
class RuntimeConfig:
    """Device, type of the weights, compiler."""

    device: str = "auto"  # cpu, cuda, cuda:1, ...; auto: a GPU where there is one
    dtype: RuntimeDtype = "stored"  # of the model's weights, which it computes in; stored: as in the checkpoint
    compile: bool = False  # the repeated blocks, with torch.compile: the first plan of each kind then takes up to minutes, the others less than before

    def __post_init__(self) -> None:
        _require(self.device.strip() != "", "runtime.device is empty", "name one, e.g. cpu or cuda, or leave it at auto")


AS_STORED = RuntimeConfig()


def add_runtime(parser: argparse.ArgumentParser) -> None:
    """`--device`, `--dtype` and `--compile`: how the policy computes."""
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, ... (default: a GPU where there is one)")
    parser.add_argument(
        "--dtype",
        metavar="NAME",
        choices=get_args(RuntimeDtype),
        help="stored, float32 or bfloat16: of the model's weights, in which it computes (default: as stored)",
    )
    parser.add_argument(
        "--compile", action="store_true", default=None, help="compile the model's blocks: the first plan of each kind then takes long, the others less"
    )


def runtime_of_flags(args: argparse.Namespace) -> RuntimeConfig:
    """What `add_runtime` added, by itself."""
    return RuntimeConfig(**{key: value for key in ("device", "dtype", "compile") if (value := getattr(args, key)) is not None})
