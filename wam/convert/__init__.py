"""Released checkpoints to ours: one module per format, each with

    convert(src: Path, dst: Path, options: Options) -> Report

which plans on names and shapes, refuses what is missing, unexpected or of another size, and then streams tensor by tensor into `dst`:
a policy folder (`config.yaml`, `config.json`, `model.safetensors` or its shards, `normalizer.json`, and the frozen parts in diffusers'
layout), or for Wan itself a folder in diffusers' layout.  It writes `conversion.json`, the fate of every tensor, and returns it.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from wam.convert.options import Options
from wam.convert.report import Report

FORMATS = {"dreamzero": "wam.convert.dreamzero", "fast-wam": "wam.convert.fast_wam", "lingbot-va": "wam.convert.lingbot_va", "wan": "wam.convert.wan"}


def convert(format: str, src: str | Path, dst: str | Path, options: Options | None = None) -> Report:
    """Convert one released checkpoint.

    Raises:
        FileNotFoundError: nothing there, or a file of it is missing (named).
        ValueError: an unknown format, or a checkpoint that cannot be converted; names the tensor or field, expected and found.
    """
    if format not in FORMATS:
        raise ValueError(f"unknown format {format!r}; expected one of {', '.join(FORMATS)}")
    src, dst = Path(src), Path(dst)
    if not src.exists():
        raise FileNotFoundError(f"no checkpoint {src}; give the folder that was downloaded")
    if dst.exists() and src.resolve() == dst.resolve():
        raise ValueError(f"source and destination are both {src}; give another destination")
    report: Report = import_module(FORMATS[format]).convert(src, dst, options or Options())
    return report
