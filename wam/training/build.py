"""What a run is made of, from its config: windows of the dataset, a codec, a text encoder and a model.

    config.data -> windows, normalised      config.codec -> codec, fitted where it is the linear one
    config.text -> embeddings, ahead        config.model -> weights: new, on a pretrained backbone, or adapters on a frozen one

Everything here is a function of the config and its seed, so every process of a run builds the same.
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import ConcatDataset, Dataset

from wam.codec.codec import Codec, make_codec
from wam.codec.linear import LinearCodec
from wam.config import Config
from wam.data.dataset import Sample
from wam.data.fitted import codec_path, fit_settings, read_fitted
from wam.data.latents import use_latents
from wam.data.mixture import TrainingData
from wam.model.loading import model_from_backbone, new_names
from wam.model.lora import apply_lora, base_identity, base_name, has_lora, is_adapter
from wam.model.wam import WorldActionModel
from wam.text.cache import CachedText
from wam.text.text import Text, make_text, prompts

log = logging.getLogger(__name__)


def build_model(config: Config, device: str, text: Text | None = None) -> WorldActionModel:
    """The model that training starts from: new, or on a pretrained backbone; with adapters, that is frozen.

    A frozen backbone is kept in the type it computes in; whatever trains is float32.
    """
    pretrained, lora = config.model.pretrained, config.model.lora
    if pretrained is None:
        return WorldActionModel(config, text=text).to(device)
    frozen = torch.bfloat16 if lora is not None and computes_in_bf16(config, torch.device(device)) else torch.float32
    model = model_from_backbone(lambda c, backbone: WorldActionModel(c, backbone, text), pretrained, config, frozen, device, torch.float32)
    if lora is not None:
        apply_lora(model, lora, config.training.seed, also=new_names(model.backbone, pretrained))
    return model


def text_for(config: Config, data: TrainingData) -> Text | None:
    """A pretrained text encoder, with the data's instructions embedded beforehand where they are kept on disk; None for the embedded one."""
    if config.text.kind == "bytes":
        return None
    text = make_text(config.text)
    if isinstance(text, CachedText):
        text.precompute(texts_of(config, data))
        text.release()
    return text


def texts_of(config: Config, data: TrainingData) -> list[str]:
    """Every text that a run embeds: each dataset's instructions as its robot is told them, and nothing, where instructions are dropped."""
    told = [text for part in [*data.parts.values(), *data.held_out.values()] for text in prompts(part.instructions, config.template(part.data.embodiment))]
    return list(dict.fromkeys([*told, *([""] if config.training.text_dropout else [])]))


def codec_for(config: Config, data: TrainingData) -> Codec:
    """The codec of a run; where its windows were encoded beforehand (`data.latents`), samples have the latents from here on.

    Raises:
        LatentError: what was encoded is of other settings, not whole, or not there.
    """
    directory = next((d.latents for d in config.sources if d.latents is not None), None)
    if directory is None:
        return fit_codec(config, data)
    codec = make_codec(config.codec)
    if isinstance(codec, LinearCodec):
        settings = fit_settings(config, data, Path(directory))
        codec = read_fitted(codec_path(Path(directory), settings), codec, settings)
    for windows in [*data.parts.values(), *data.held_out.values()]:
        use_latents(windows, config.codec, codec, needs_pixels(config))
    return codec


def needs_pixels(config: Config) -> bool:
    """Whether the network sees frames beside their latents."""
    return config.image.kind != "none" or config.model.first_frame == "concat" or config.model.goal_image


def fit_codec(config: Config, data: TrainingData) -> Codec:
    """The pretrained codec, or the linear one of all datasets with pictures, fitted on groups of frames as they occur in windows.

    Raises:
        ValueError: there are no pictures to fit it on.
    """
    codec = make_codec(config.codec)
    if not isinstance(codec, LinearCodec):
        return codec
    rng = np.random.default_rng(config.training.seed)
    stride = config.timeline.temporal_stride
    wanted = max(1, config.codec.fit_frames // stride // config.timeline.blocks)
    pictured = [part for part in data.parts.values() if part.data.contents != "action"]
    if not pictured:
        raise ValueError("no dataset of this run has pictures (data.contents is action), so there is nothing to fit the linear codec on; add one that has, or name a pretrained codec: codec.kind=wan")
    seen: Dataset[Sample] = ConcatDataset(pictured)
    chosen = rng.choice(len(seen), size=min(wanted, len(seen)), replace=False)  # type: ignore[arg-type]
    clips = [torch.as_tensor(seen[int(i)]["frames"])[1:].unflatten(0, (-1, stride)) for i in chosen]
    codec.fit(torch.cat(clips))
    return codec


def adapted_identity(model: WorldActionModel) -> str | None:
    """A hash of the weights that a model's adapters belong to, which training does not change; None without adapters."""
    if not has_lora(model):
        return None
    trained = [base_name(name) for name, p in model.backbone.named_parameters() if p.requires_grad and not is_adapter(name)]
    return base_identity(model, trained)


def computes_in_bf16(config: Config, device: torch.device) -> bool:
    """bf16 matrix products where the machine has them (`auto`), or as asked."""
    if config.training.precision != "auto":
        return config.training.precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags
