"""What a converted policy needs beside its weights, where a release keeps that elsewhere or says nothing of it.

    config.yaml, config.json, normalizer.json         written here
    vae/, text_encoder/, tokenizer/                   copied from beside the transformer, or read from the backbone's own repository

Statistics that a release does not bring are not made up: numbers then pass through as they are, and the report says so.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import wam
from wam.config import Config, save_config
from wam.convert.keys import KeyMap
from wam.convert.report import Component, Report, shapes
from wam.data.normalize import Normalizer, Statistics
from wam.files import write_json_atomic
from wam.model.wam import WorldActionModel
from wam.pretrained import CONFIG, FORMAT, META, MODEL, NORMALIZER
from wam.shards import build_empty

TI2V = "Wan-AI/Wan2.2-TI2V-5B-Diffusers"  # whose frozen parts Fast-WAM and LingBot-VA were trained around
FROZEN = {"vae": "codec", "text_encoder": "text"}  # folder and section of the config
TOKENIZER = "tokenizer"


def network(config: Config, keys: KeyMap) -> Component:
    """The network of a config as the only component of a release; nothing is allocated."""
    return Component("transformer", keys, shapes(build_empty(lambda: WorldActionModel(config))), prefix=MODEL)


def unscaled(dim: int) -> Statistics:
    """Numbers pass through as they are."""
    return Statistics((0.0,) * dim, (1.0,) * dim, ())


def write_policy(dst: Path, config: Config, normalizer: Normalizer, report: Report, facts: Mapping[str, Any]) -> None:
    """Settings, statistics, and the report of a conversion.

    Args:
        facts: what else is known; `control_hz` among them, None where it is not known.
    """
    if facts.get("control_hz") is None:
        report.notes.append("control steps a second are not known: say them with --control-hz before a robot or simulator is driven")
    save_config(config, dst / CONFIG)
    write_json_atomic(dst / NORMALIZER, normalizer.to_dict())
    origin = {"converted_from": {"format": report.format, "source": report.source}}
    versions = {"format": FORMAT, "wam_version": wam.__version__, "torch_version": torch.__version__, "step": 0}
    write_json_atomic(dst / META, {**versions, "tasks": [], **facts, **origin})
    report.save(dst)


def frozen_parts(beside: Path | None, reference: str | None, include: bool, report: Report) -> tuple[dict[str, dict[str, Any]], dict[str, Path]]:
    """Where VAE and text encoder come from: settings for the config, and folders to copy.

    Args:
        beside: the folder that may hold them.
        reference: where they are read from instead; default: what lies beside, or the backbone's own repository.
        include: copy what lies beside.
    """
    found = {name: beside / name for name in (*FROZEN, TOKENIZER) if beside is not None and (beside / name).is_dir()}
    whole = all(name in found for name in FROZEN)
    if include and whole and reference is None:
        report.notes.append(f"{', '.join(found)}: copied")
        return {section: {"pretrained": None} for section in FROZEN.values()}, found
    place = reference or (str(beside) if whole else TI2V)
    report.notes.append(f"{', '.join(FROZEN)}: read from {place}")
    return {section: {"pretrained": place} for section in FROZEN.values()}, {}


def copy_parts(folders: Mapping[str, Path], dst: Path) -> None:
    """Copy frozen parts into a policy's folder."""
    for name, folder in folders.items():
        shutil.copytree(folder, dst / name, dirs_exist_ok=True)
