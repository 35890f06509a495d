"""What every converter writes beside weights: the folder of a policy, as `wam.pretrained` reads it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import wam
from wam.config import Config, save_config
from wam.convert.report import Report
from wam.data.normalize import Normalizer
from wam.files import write_json_atomic
from wam.pretrained import CONFIG, FORMAT, META, NORMALIZER
from wam.text.text import TOKENIZER


def write_policy(dst: Path, config: Config, normalizer: Normalizer, meta: Mapping[str, Any], report: Report) -> None:
    """Settings, statistics, what else is known (`control_hz` above all), and the report; the weights are there already."""
    save_config(config, dst / CONFIG)
    write_json_atomic(dst / NORMALIZER, normalizer.to_dict())
    versions = {"format": FORMAT, "wam_version": wam.__version__, "torch_version": torch.__version__, "step": 0}
    write_json_atomic(dst / META, {**versions, "converted_from": {"format": report.format, "source": report.source}, **meta})
    report.save(dst)


def copy_tokenizer(src: Path, dst: Path, named: str | None, report: Report) -> None:
    """The text encoder's tokenizer: the one that is named, or the release's own; a note where it has none (DreamZero takes google/umt5-xxl's).

    Args:
        named: folder or Hub id.
    """
    if named is not None:
        from transformers import AutoTokenizer

        AutoTokenizer.from_pretrained(named).save_pretrained(dst / TOKENIZER)
    elif (src / TOKENIZER).is_dir():
        shutil.copytree(src / TOKENIZER, dst / TOKENIZER, dirs_exist_ok=True)
    else:
        report.notes.append(f"the release has no tokenizer: put google/umt5-xxl's files into {dst / TOKENIZER}, or convert with --tokenizer google/umt5-xxl")
