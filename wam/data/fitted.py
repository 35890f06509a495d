"""The linear codec that was fitted on a dataset, beside the latents that were made with it.

    LATENTS/codec-<key>.safetensors     its weights; `key` is a hash of what it was fitted on and how

Fitting again would give the same codec, but for the last bit on another machine, and would need frames that a node which trains from
latents may not have.  So `wam cache` keeps it, and training takes it.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from wam.codec.linear import LinearCodec
from wam.config import Config
from wam.data.latents import AGAIN, LatentError, Settings, content_of, differences, key_of, settings_of
from wam.data.mixture import TrainingData
from wam.files import atomic_path

FORMAT = "wam-codec-1"


def fit_settings(config: Config, data: TrainingData, directory: Path) -> Settings:
    """All that decides a fitted codec, readable."""
    c = config.codec
    seen = {name: part for name, part in data.parts.items() if part.data.contents != "action"}
    return {
        "format": FORMAT,
        "codec": {name: getattr(c, name) for name in ("channels", "patch", "whitening", "fit_frames")} | {"image_size": list(c.image_size)},
        "training": {"seed": config.training.seed},
        "timeline": {"blocks": config.timeline.blocks},
        "datasets": {
            name: settings_of(part, {}, content_of(part.lerobot, part.data.cameras, directory)) | {"episodes": hashlib.sha256(json.dumps(part.episodes).encode()).hexdigest()}
            for name, part in seen.items()
        },
    }


def codec_path(directory: Path, settings: Settings) -> Path:
    """Where a fitted codec lies, whether it is there or not."""
    return directory / f"codec-{key_of(settings)}.safetensors"


def save_fitted(path: Path, codec: LinearCodec, settings: Settings) -> None:
    """Write a fitted codec in one step."""
    weights = codec.cpu().state_dict()
    metadata = {"format": FORMAT, "settings": json.dumps(settings, sort_keys=True), "sha256": _hash(codec)}
    with atomic_path(path) as temporary:
        save_file(weights, temporary, metadata=metadata)


def read_fitted(path: Path, codec: LinearCodec, settings: Settings) -> LinearCodec:
    """Give an empty codec the weights of a fitted one.

    Raises:
        LatentError: there is none of these settings (those that differ from the nearest are named), or it is damaged.
    """
    if not path.is_file():
        raise LatentError(_what_differs(path.parent, settings))
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            codec.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 (not a dictionary)
    except (SafetensorError, OSError, RuntimeError) as error:
        raise LatentError(f"{path} is damaged ({error}); delete it and {AGAIN}") from error
    if metadata.get("sha256") != _hash(codec):
        raise LatentError(f"{path} is damaged: its checksum does not hold; delete it and {AGAIN}")
    return codec


def _hash(codec: LinearCodec) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(codec.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _what_differs(directory: Path, settings: Settings) -> str:
    found: list[list[str]] = []
    for path in sorted(directory.glob("codec-*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found.append(differences(json.loads((file.metadata() or {}).get("settings", "{}")), settings))
    nearest = f" The nearest was fitted with other settings: {'; '.join(sorted(found, key=len)[0])}." if found else ""
    return f"data.latents: {directory} holds no codec that was fitted for this config.{nearest} Run `wam cache` with this config, or set data.latents=null"
