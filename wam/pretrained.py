"""A policy on disk: everything that is needed to drive a robot, and nothing that runs code.

    config.yaml          the resolved config of the run, cells of the relation table included
    config.json          format, versions, training step
    model.safetensors    weights (EMA), with a linear codec and an embedded text encoder; in shards and an index where they are large
    normalizer.json      statistics, method and clipping of states and actions: one robot's, or each robot's by name
    adapter/             adapters, where only those and the new parts were trained; the backbone is then where `model.pretrained` says
    vae/, text_encoder/ and tokenizer/, image_encoder/      pretrained parts in diffusers' layout, where they were copied here;
                         otherwise they are where `codec.pretrained`, `text.pretrained` and `image.pretrained` say

A policy is portable because the contract between model and robot (sizes, rates, normalisation) lies beside the weights.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

import wam
from wam.codec.clip_image import ClipImage
from wam.codec.codec import DTYPES, IMAGE_ENCODER, Codec, make_codec, make_image
from wam.codec.linear import LinearCodec
from wam.codec.wan import WanCodec
from wam.config import Config, load_config, save_config
from wam.config_robot import STATISTICS
from wam.config_runtime import AS_STORED, RuntimeConfig
from wam.files import write_json_atomic
from wam.model.compiled import compile_blocks, is_compiled
from wam.model.loading import local_folder, model_from_backbone
from wam.model.lora import apply_lora, base_dtype, base_identity, base_name, has_lora, is_adapter, load_adapter, merge_lora, save_adapter, trainable
from wam.model.wam import WorldActionModel
from wam.shards import SHARD_BYTES, ShardReader, ShardWriter, build_empty, load_into
from wam.text.cache import CachedText
from wam.text.text import TEXT_ENCODER, TOKENIZER, OutsideText, Text, make_text

FORMAT = "wam-policy-2"
CONFIG, META, WEIGHTS, NORMALIZER, ADAPTER = "config.yaml", "config.json", "model.safetensors", "normalizer.json", "adapter"
STEM = "model"
MODEL, CODEC = "model.", "codec."  # what the names of their tensors begin with
BACKBONE = "backbone."


@dataclass
class Policy:
    """A model with what it needs around it.

    Attributes:
        normalizer: as a plain dictionary; `wam.data.normalize.normalizer_for` reads a robot's statistics from it.
        meta: what else the checkpoint says about itself: step, control rate, task names.
        image: embeds the first frame, where the model takes image embeddings.
    """

    config: Config
    model: WorldActionModel
    codec: Codec
    normalizer: dict[str, Any]
    meta: dict[str, Any]
    image: ClipImage | None = None

    @property
    def control_hz(self) -> float:
        """Control steps a second, as in the training data."""
        return float(self.meta["control_hz"])


# ------------------------------------------------------------------------------------------------ writing


def save_pretrained(policy: Policy, directory: Path, weights: dict[str, Tensor] | None = None, max_bytes: float = SHARD_BYTES, base: str | None = None) -> None:
    """Write a policy, weights last.  Of a model with adapters, those and the parts that are not the backbone's; `merge_lora` it first for all of it.

    Args:
        weights: replaces the model's own (an EMA, say); of a model with adapters, what trains.
        max_bytes: largest file of weights.
        base: hash of the weights that adapters belong to (`base_identity`), where it is known; else it is computed.

    Raises:
        ValueError: adapters on a backbone that no `model.pretrained` names: they could not be loaded again.
    """
    directory.mkdir(parents=True, exist_ok=True)
    save_config(policy.config, directory / CONFIG)
    write_json_atomic(directory / NORMALIZER, policy.normalizer)
    text = {"text_space": policy.model.text.space} if isinstance(policy.model.text, CachedText) else {}
    write_json_atomic(directory / META, {"format": FORMAT, "wam_version": wam.__version__, "torch_version": torch.__version__, **policy.meta, **text})
    tensors = weights or _weights(policy.model)
    if has_lora(policy.model):
        tensors = _save_adapter(policy, directory, tensors, base)
    named = {f"{MODEL}{k}": v for k, v in tensors.items()}
    if isinstance(policy.codec, LinearCodec):
        named |= {f"{CODEC}{k}": v for k, v in policy.codec.state_dict().items()}
    with ShardWriter(directory, STEM, max_bytes, {"format": FORMAT}) as writer:
        for name, tensor in named.items():
            writer.add(name, tensor)


def save_components(policy: Policy, directory: Path) -> None:
    """Copy a policy's pretrained parts into its folder, in diffusers' layout, so that it needs nothing from elsewhere.

    Raises:
        ValueError: the text encoder is not at hand, only embeddings that were made with it.
    """
    if isinstance(policy.codec, WanCodec):
        policy.codec.save_pretrained(directory)
    if policy.image is not None:
        policy.image.encoder.save_pretrained(directory / IMAGE_ENCODER)
    text = policy.model.text
    if isinstance(text, (CachedText, OutsideText)):
        encoder: Any = text.encoder
        if encoder is None:
            raise ValueError("the text encoder is not loaded: all embeddings so far came from text.cache; load the policy with text.cache=null to copy it")
        encoder.encoder.save_pretrained(directory / TEXT_ENCODER)
        encoder.tokenizer.save_pretrained(directory / TOKENIZER)


def _save_adapter(policy: Policy, directory: Path, tensors: dict[str, Tensor], base: str | None) -> dict[str, Tensor]:
    """Write the adapters; returns what is left to write: all that trained and is no adapter."""
    lora, pretrained = policy.config.model.lora, policy.config.model.pretrained
    if lora is None or pretrained is None:
        raise ValueError(f"the model has adapters, but the config says model.lora {lora} and model.pretrained {pretrained}, so that they could not be loaded again; merge them first (merge_lora)")
    trained = set(trainable(policy.model))
    tensors = {name: tensor for name, tensor in tensors.items() if name in trained or not name.startswith(BACKBONE)}
    adapters = {name.removeprefix(BACKBONE): tensor for name, tensor in tensors.items() if is_adapter(name)}
    rest = {base_name(name): tensor for name, tensor in tensors.items() if not is_adapter(name)}
    base = base or base_identity(policy.model, _of_backbone(rest))
    save_adapter(directory / ADAPTER, adapters, lora, base, pretrained, policy.model.backbone.dtype)
    return rest


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """State of a model, tied tensors once (the text encoder names its embedding twice)."""
    seen: set[int] = set()
    out = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            out[name] = tensor.detach()
    return out


def _of_backbone(names: Any) -> list[str]:
    return [name.removeprefix(BACKBONE) for name in names if name.startswith(BACKBONE)]


# ------------------------------------------------------------------------------------------------ reading


def from_pretrained(path_or_repo: str | Path, device: str = "cpu", dtype: torch.dtype | None = None) -> Policy:
    """Load a policy for inference, tensor by tensor; adapters are merged into their backbone.

    Args:
        path_or_repo: a checkpoint's folder, or a Hub id.
        dtype: of the model's weights; default: as stored, or the backbone's where other parts were kept more exactly; under adapters, as the
            backbone was held in training.

    Raises:
        FileNotFoundError: not a checkpoint directory, or a pretrained part that cannot be had; says which file is missing.
        ValueError: another format, a damaged weights file, tensors that do not match the config, or adapters of another base (named).
    """
    directory = _checkpoint(path_or_repo)
    meta = _read_json(directory / META, ("format", "control_hz"))
    _check_format(directory, meta)
    normalizer = _read_json(directory / NORMALIZER, ())
    if STATISTICS not in normalizer:
        normalizer = _read_json(directory / NORMALIZER, ("version", "method", "clip", "keys"))
    config = load_config(directory / CONFIG)
    try:
        reader = ShardReader(directory, STEM)
    except ValueError as error:
        raise ValueError(f"{directory / WEIGHTS} cannot be read ({error}); the file is damaged or incomplete: copy or train it again") from error
    text = None if config.text.kind == "bytes" else make_text(config.text, directory, meta.get("text_space"))
    with reader:
        if (directory / ADAPTER).is_dir():
            model, config = _on_its_base(directory, config, reader, text, device, dtype or base_dtype(directory / ADAPTER))
        else:
            model = build_empty(lambda: WorldActionModel(config, text=text))
            _load(model, reader, MODEL, directory, device, dtype or _stored_dtype(reader))
        codec = make_codec(config.codec, directory)
        if isinstance(codec, LinearCodec):
            _load(codec, reader, CODEC, directory, device, None)
    image = make_image(config, directory)
    model.to(device).eval().requires_grad_(False)
    return Policy(config, model, codec.to(device), normalizer, meta, None if image is None else image.to(device))


def load_policy(path_or_repo: str | Path, runtime: RuntimeConfig = AS_STORED) -> Policy:
    """A policy on the device, in the type and compiled as asked.

    Raises:
        FileNotFoundError, ValueError: as `from_pretrained`, or a device that this machine does not have.
    """
    dtype = None if runtime.dtype == "stored" else DTYPES[runtime.dtype]
    policy = from_pretrained(path_or_repo, device_of(runtime.device), dtype)
    if runtime.compile:
        compile_blocks(policy.model)
    return policy


def device_of(name: str) -> str:
    """A device's name as torch knows it; `auto` is a GPU where there is one.

    Raises:
        ValueError: no device's name, or one that is not there.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"runtime.device is {name!r}, which is no device; use auto, cpu, cuda, or cuda:N for one of several") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"runtime.device is {name!r}, but torch {torch.__version__} finds {torch.cuda.device_count()} GPUs here; use cpu, or install a build for this machine's driver")
    return name


def runtime_of(policy: Policy) -> dict[str, Any]:
    """How a policy computes, for results: its device's name, the type of its weights, whether its blocks are compiled."""
    device = policy.model.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"device": name, "dtype": str(policy.model.backbone.dtype).removeprefix("torch."), "compile": is_compiled(policy.model)}


def _checkpoint(path_or_repo: str | Path) -> Path:
    directory = Path(path_or_repo)
    if not directory.exists() and str(path_or_repo).count("/") == 1 and not directory.parent.exists():
        directory = local_folder(path_or_repo)
    for name in (META, CONFIG, WEIGHTS, NORMALIZER):
        index = name == WEIGHTS and any(directory.glob(f"{STEM}-*.safetensors"))  # weights in several files
        name = f"{name}.index.json" if index else name
        if not (directory / name).is_file():
            raise FileNotFoundError(f"{directory} is not a checkpoint: {name} is missing; give the directory that `wam train` wrote, e.g. runs/demo/train/checkpoint")
    return directory


def _check_format(directory: Path, meta: dict[str, Any]) -> None:
    if meta["format"] == "wam-policy-1":
        raise ValueError(
            f"{directory / META} has format 'wam-policy-1', of wam {meta.get('wam_version', 'before 0.2')}, whose noise settings and positions mean something else here; "
            f"this version reads {FORMAT!r}: train it again, or use it with that version"
        )
    if meta["format"] != FORMAT:
        raise ValueError(f"{directory / META} has format {meta['format']!r}; this version reads {FORMAT!r}")


def _on_its_base(directory: Path, config: Config, reader: ShardReader, text: Text | None, device: str, dtype: torch.dtype) -> tuple[WorldActionModel, Config]:
    """A backbone from where the config says, with the checkpoint's adapters merged into it, and the parts that were trained in full."""
    if config.model.lora is None or config.model.pretrained is None:
        raise ValueError(f"{directory} holds adapters, but {CONFIG} says model.lora {config.model.lora} and model.pretrained {config.model.pretrained}; name the backbone they were trained on")
    model = model_from_backbone(lambda c, backbone: WorldActionModel(c, backbone, text), config.model.pretrained, config, dtype, device)
    full = _of_backbone(name.removeprefix(MODEL) for name in reader.names())
    apply_lora(model, config.model.lora, also=full)
    load_adapter(model, directory / ADAPTER, trained=full)
    merge_lora(model)
    base = [f"{BACKBONE}{name}" for name in model.backbone.state_dict() if name not in set(full)]
    _load(model, reader, MODEL, directory, device, dtype, ignore=base)
    return model, replace(config, model=replace(config.model, lora=None))


def _load(module: Any, reader: ShardReader, prefix: str, directory: Path, device: str, dtype: torch.dtype | None, ignore: Any = ()) -> None:
    def rename(name: str) -> str | None:
        return name.removeprefix(prefix) if name.startswith(prefix) else None

    try:
        load_into(cast(nn.Module, module), reader, rename, dtype, device, what="the checkpoint", ignore=ignore)
    except ValueError as error:
        raise ValueError(f"{directory / WEIGHTS} does not match {directory / CONFIG}: {error}") from error


def _stored_dtype(reader: ShardReader) -> torch.dtype | None:
    """None where all weights are of one type, which is then kept; the backbone's where other parts are of another."""
    dtypes = {name: reader.dtype(name) for name in reader.names() if name.startswith(MODEL)}
    floating = {dtype for dtype in dtypes.values() if dtype.is_floating_point}
    return dtypes.get(f"{MODEL}{BACKBONE}patch_embedding.weight") if len(floating) > 1 else None


def weights_sha256(directory: Path) -> str:
    """A hash of every file of weights of a checkpoint; of a single one, its own."""
    files = [*sorted(directory.glob(f"{STEM}*.safetensors")), *sorted((directory / ADAPTER).glob("*.safetensors"))]
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while part := stream.read(1 << 24):
                digest.update(part)
    return digest.hexdigest()


def _read_json(path: Path, needed: tuple[str, ...]) -> dict[str, Any]:
    """A JSON object with at least the keys that are needed."""
    try:
        tree = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); the file is damaged or incomplete: copy the checkpoint again") from error
    missing = [key for key in needed if key not in tree] if isinstance(tree, dict) else list(needed)
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}; the file is damaged or not a checkpoint's: copy the checkpoint again")
    return tree
