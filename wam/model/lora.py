"""Low-rank adapters on the backbone, through peft; all that is not the backbone trains in full.

    blocks.N.attn1.to_q   (frozen)  ->  blocks.N.attn1.to_q.base_layer            the same weights, frozen
                                        blocks.N.attn1.to_q.lora_A / lora_B       trained: W x + alpha / rank * B A x

`B` starts at zero, so adapting begins with the backbone as it is.  Adapters belong to the weights they were trained on: a hash of those
is saved beside them, and on any other weights they are refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from wam.config import LoraConfig
from wam.files import atomic_path, write_json_atomic
from wam.shards import identity

FORMAT = "wam-adapter-1"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
NAME = "default"  # peft's name for an only adapter
_ADAPTER = (".lora_A.", ".lora_B.")


def apply_lora(model: Any, config: LoraConfig, seed: int = 0, also: Iterable[str] = ()) -> None:
    """Put adapters on the backbone's linear layers, in place: the backbone's own weights freeze, adapters and everything else train.

    Args:
        model: a `WorldActionModel`, or anything with a `backbone`.
        also: names of the backbone's that train in full as well: parts that its pretrained weights did not have.

    Raises:
        ModuleNotFoundError: peft is not installed; names the extra.
        ValueError: a target that no linear layer of the backbone is called (named), or adapters that are there already.
    """
    try:
        from peft import LoraConfig as PeftConfig
        from peft import inject_adapter_in_model
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("model.lora needs peft: pip install 'wam[lora]', or set model.lora=null to train the whole model") from error
    backbone = model.backbone
    if has_lora(model):
        raise ValueError("the backbone has adapters already; merge them first (merge_lora)")
    linear = [name for name, module in backbone.named_modules() if isinstance(module, nn.Linear)]
    for target in config.targets:
        if not any(name == target or name.endswith(f".{target}") for name in linear):
            known = sorted({".".join(name.split(".")[-2:]) if name.split(".")[-1].isdigit() else name.split(".")[-1] for name in linear if name.startswith("blocks.")})
            raise ValueError(f"model.lora.targets names {target!r}, but no linear layer of the backbone is called that; there are {', '.join(known)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapters = PeftConfig(r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=list(config.targets), bias="none")
        inject_adapter_in_model(adapters, backbone)
    trained = set(also)
    for name, parameter in backbone.named_parameters():
        if is_adapter(name):
            parameter.data = parameter.data.float()  # small and trained: in float32 also where what it adapts is bfloat16
        parameter.requires_grad_(is_adapter(name) or base_name(name) in trained)


def has_lora(model: Any) -> bool:
    """Whether the backbone has adapters."""
    return any(is_adapter(name) for name, _ in model.backbone.named_parameters())


def is_adapter(name: str) -> bool:
    """Whether a parameter belongs to an adapter."""
    return any(part in name for part in _ADAPTER)


def base_name(name: str) -> str:
    """A parameter's name without adapters."""
    return name.replace(".base_layer.", ".")


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@torch.no_grad()
def merge_lora(model: Any) -> None:
    """Add the adapters to the weights they adapt, in float32, and take them out, in place; names are the plain backbone's again."""
    from peft.tuners.lora import LoraLayer

    backbone = model.backbone
    adapted = [(name, module) for name, module in backbone.named_modules() if isinstance(module, LoraLayer)]
    for name, module in adapted:
        base = module.get_base_layer()
        delta = module.lora_B[NAME].weight.float() @ module.lora_A[NAME].weight.float()
        base.weight.data = (base.weight.float() + module.scaling[NAME] * delta).to(base.weight.dtype)
        path, _, last = name.rpartition(".")
        setattr(backbone.get_submodule(path), last, base)
    if hasattr(backbone, "peft_config"):
        del backbone.peft_config
    backbone.requires_grad_(True)


@torch.no_grad()
def base_identity(model: Any, trained: Iterable[str] = ()) -> str:
    """A hash of the backbone's own weights, adapted or not, as bfloat16 holds them: the same whichever type they were loaded in.

    Args:
        trained: names of the backbone's that are not part of the base.
    """
    left_out = set(trained)
    named = ((base_name(name), parameter) for name, parameter in model.backbone.named_parameters() if not is_adapter(name))
    return identity((name, parameter.to(torch.bfloat16)) for name, parameter in named if name not in left_out)


# ------------------------------------------------------------------------------------------------ on disk


def save_adapter(directory: Path, tensors: dict[str, Tensor], config: LoraConfig, base: str, pretrained: str | None, dtype: torch.dtype = torch.float32) -> None:
    """Write adapters (backbone's names to tensors) with the hash of the weights they belong to, and the type those were held in; weights last."""
    described = {
        **{"format": FORMAT, "peft_type": "LORA", "r": config.rank, "lora_alpha": config.alpha, "lora_dropout": config.dropout},
        **{"target_modules": list(config.targets), "base_model_name_or_path": pretrained, "base_sha256": base},
        "base_dtype": str(dtype).removeprefix("torch."),
    }
    write_json_atomic(directory / CONFIG, described)
    with atomic_path(directory / WEIGHTS) as temporary:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary, metadata={"format": "pt"})


def base_dtype(directory: Path) -> torch.dtype:
    """The type that an adapter's base was held in when it was trained.

    Raises:
        FileNotFoundError, ValueError: as `read_adapter`.
    """
    described, _ = read_adapter(directory)
    return torch.bfloat16 if described.get("base_dtype") == "bfloat16" else torch.float32


def read_adapter(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What an adapter's folder holds: its description and its tensors.

    Raises:
        FileNotFoundError: a file is missing (named).
        ValueError: a file that is damaged, or of another format.
    """
    for name in (CONFIG, WEIGHTS):
        if not (directory / name).is_file():
            raise FileNotFoundError(f"{directory} is no adapter: {name} is missing; copy the checkpoint again")
    try:
        described = json.loads((directory / CONFIG).read_text())
        tensors = load_file(directory / WEIGHTS)
    except Exception as error:
        raise ValueError(f"the adapter in {directory} cannot be read ({error}); it is damaged or incomplete: copy the checkpoint again") from error
    if not isinstance(described, dict) or described.get("format") != FORMAT or "base_sha256" not in described:
        raise ValueError(f"{directory / CONFIG} is not of format {FORMAT!r}; this version reads the adapters it writes, and merges others with `wam convert`")
    return described, tensors


@torch.no_grad()
def load_adapter(model: Any, directory: Path, trained: Iterable[str] = ()) -> None:
    """Fill a model's adapters (`apply_lora` put them there) from a folder.

    Raises:
        FileNotFoundError, ValueError: as `read_adapter`; or adapters of another base (expected and found hash) or of other layers or ranks.
    """
    described, tensors = read_adapter(directory)
    found = base_identity(model, trained)
    if found != described["base_sha256"]:
        raise ValueError(
            f"the adapter in {directory} was trained on other weights than this backbone's: expected sha256 {described['base_sha256']}, found {found}; "
            f"load it on the base it belongs to ({described.get('base_model_name_or_path')})"
        )
    own = {name: p for name, p in model.backbone.named_parameters() if is_adapter(name)}
    missing, unexpected = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    shapes = [f"{n} {tuple(tensors[n].shape)}, expected {tuple(own[n].shape)}" for n in own if n in tensors and tensors[n].shape != own[n].shape]
    if missing or unexpected or shapes:
        raise ValueError(f"the adapter in {directory} does not fit model.lora: missing {missing[:2]}, unexpected {unexpected[:2]}, other sizes {shapes[:2]}; its rank and targets are {described['r']} and {described['target_modules']}")
    for name, parameter in own.items():
        parameter.copy_(tensors[name])
