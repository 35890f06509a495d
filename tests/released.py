"""DreamZero's released layout in small: every name of the full-size lists, a few layers of it, each width shrunk."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from transformers import ByT5Tokenizer

from wam.shards import ShardWriter

DATA = Path(__file__).parent / "data"
LAYERS = 2
MODEL, LORA_MODEL = "action_head.model.", "action_head.model.base_model.model."
# Width at full size to width here, by component.
WIDTHS = {
    "14b": {
        "model": {5120: 48, 13824: 64, 30720: 288, 10240: 96, 4096: 16, 256: 32, 1280: 16, 1024: 12},
        "vae": {96: 4, 192: 8, 384: 16, 768: 32, 1152: 48},
    },
    "5b": {
        "model": {3072: 48, 14336: 64, 18432: 288, 6144: 96, 4096: 16, 256: 32, 1280: 16, 1024: 12},
        "vae": {160: 4, 320: 8, 640: 16, 1024: 16, 512: 8, 256: 4, 1920: 48, 3072: 48, 2048: 32},
    },
}
SHARED = {"text_encoder": {256384: 384, 4096: 16, 10240: 32, 64: 2}, "image_encoder": {1280: 16, 3840: 48, 5120: 32, 257: 5, 1024: 8}}
STATE, ACTION = 64, 32  # as released
SETTINGS = {"14b": {"model_type": "i2v", "frame_seqlen": 6}, "5b": {"model_type": "ti2v", "frame_seqlen": 6}}
IMAGE = {"14b": (32, 48), "5b": (64, 96)}  # 2 x 3 tokens
STATISTICS = {
    "state": {"joint_position": {"q01": [-1.0] * 7, "q99": [3.0] * 7}, "gripper_position": {"q01": [0.0], "q99": [1.0]}},
    "action": {"gripper_position": {"q01": [0.5], "q99": [0.5]}, "joint_position": {"q01": [-0.2] * 7, "q99": [0.2] * 7}},
}
CONF = {
    "relative_action": True,
    "relative_action_keys": ["joint_position"],
    "modality_config_oxe_droid": {
        "state": {"delta_indices": [0], "modality_keys": ["state.joint_position", "state.gripper_position"]},
        "action": {"modality_keys": ["action.joint_position", "action.gripper_position"]},
    },
    "modality_configs": {"oxe_droid": "${modality_config_oxe_droid}"},
    "transform_oxe_droid": {"transforms": [{"normalization_modes": {"state.joint_position": "q99"}}, {"action_concat_order": "${modality_config_oxe_droid.action.modality_keys}"}]},
    "transforms": {"oxe_droid": "${transform_oxe_droid}"},
}


def full_size(which: str) -> dict[str, tuple[int, ...]]:
    """Every tensor of a released checkpoint ("14b" or "5b")."""
    return {name: tuple(shape) for name, shape in json.loads((DATA / f"dreamzero_keys_{which}.json").read_text()).items()}


def tiny_shapes(which: str) -> dict[str, tuple[int, ...]]:
    """The same names with the first layers only, and small widths."""
    out = {}
    for name, shape in full_size(which).items():
        layer = re.search(r"\.(?:blocks|transformer)\.(\d+)\.", name)
        if layer is None or int(layer[1]) < LAYERS:
            component = name.split(".")[1]
            widths = WIDTHS[which].get(component) or SHARED[component]
            keep_rows = re.search(r"\.text_encoder\.blocks\.\d+\.pos_embedding|vae\.model\.(encoder\.head\.2|conv[12])\.", name) is not None
            out[name] = tuple(n if i == 0 and keep_rows else widths.get(n, n) for i, n in enumerate(shape))
    return out


def tiny_tensors(which: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Random weights under the released names."""
    generator = torch.Generator().manual_seed(seed)
    return {name: (torch.randn(shape, generator=generator) * 0.1 + ("norm" in name and name.endswith("weight"))).to(dtype) for name, shape in tiny_shapes(which).items()}


def write_tensors(folder: Path, tensors: dict[str, Tensor], max_bytes: float = 60_000) -> None:
    """A sharded model.safetensors."""
    with ShardWriter(folder, "model", max_bytes) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)


def write_settings(folder: Path, which: str, **changes: Any) -> None:
    """config.json and experiment_cfg/."""
    settings = {"num_heads": 2, "num_frame_per_block": 2, "num_action_per_block": 24, "max_chunk_size": 4, **SETTINGS[which]}
    head = {"config": {"lora_rank": 4, "lora_alpha": 4, "num_frame_per_block": 2, "diffusion_model_cfg": settings}}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "vla", "action_head_cfg": head, **changes}))
    (folder / "experiment_cfg").mkdir(exist_ok=True)
    (folder / "experiment_cfg" / "metadata.json").write_text(json.dumps({"oxe_droid": {"statistics": STATISTICS, "modalities": {}}}))
    (folder / "experiment_cfg" / "conf.yaml").write_text(yaml.safe_dump(CONF))


def write_release(folder: Path, which: str = "14b", tensors: dict[str, Tensor] | None = None) -> Path:
    """A whole tiny checkpoint, as the real ones are downloaded, and a tokenizer."""
    write_tensors(folder, tensors if tensors is not None else tiny_tensors(which))
    write_settings(folder, which)
    ByT5Tokenizer().save_pretrained(folder / "tokenizer")
    return folder


def lora_tensors(tensors: dict[str, Tensor], rank: int = 4, seed: int = 5) -> dict[str, Tensor]:
    """A LoRA checkpoint for a base: updates of every linear layer that the release trains, and heads of its own."""
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for name, tensor in tensors.items():
        short = name.removeprefix(MODEL)
        if re.search(r"\.(self_attn|cross_attn)\.[qkvo]\.weight$|\.ffn\.[02]\.weight$", name) and name.startswith(MODEL):
            layer = LORA_MODEL + short.removesuffix(".weight")
            out[f"{layer}.lora_A.default.weight"] = torch.randn(rank, tensor.shape[1], generator=generator)
            out[f"{layer}.lora_B.default.weight"] = torch.randn(tensor.shape[0], rank, generator=generator)
        elif short.startswith(("state_encoder.", "action_encoder.", "action_decoder.")):
            out[LORA_MODEL + short] = torch.randn(tensor.shape, generator=generator)
    return out
