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

from wam.codec.codec import Codec, make_codec
from wam.codec.linear import LinearCodec
from wam.config import Config
from wam.data.dataset import WindowDataset
from wam.model.loading import model_from_backbone, new_names
from wam.model.lora import apply_lora, base_identity, base_name, has_lora, is_adapter
from wam.model.wam import WorldActionModel
from wam.text.cache import CachedText
from wam.text.text import Text, make_text, prompts

log = logging.getLogger(__name__)


def datasets(config: Config) -> tuple[WindowDataset, WindowDataset | None]:
    """Training windows and held-out windows (None where nothing is held out), normalised by the training rows' statistics."""
    robot = config.model.embodiment(config.data.embodiment)
    data = WindowDataset(config.data, config.timeline, "train", image_size=config.codec.image_size, robot=robot)
    _report_left_out(data, "training")
    normalizer = data.fit_normalizer()
    data.normalizer = normalizer
    if config.data.validation_fraction == 0:
        return data, None
    held_out = WindowDataset(config.data, config.timeline, "validation", normalizer, image_size=config.codec.image_size, robot=robot)
    _report_left_out(held_out, "validation")
    return data, held_out


def _report_left_out(data: WindowDataset, split: str) -> None:
    if data.too_short:
        some = ", ".join(map(str, data.too_short[:8])) + (", ..." if len(data.too_short) > 8 else "")
        a, count = data.timeline.actions_per_block, len(data.too_short)
        log.warning("%d of %d %s episodes are left out (%s): shorter than one block, %d + 1 rows", count, count + len(data.episodes), split, some, a)


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


def text_for(config: Config, data: WindowDataset) -> Text | None:
    """A pretrained text encoder, with a dataset's instructions embedded beforehand where they are kept on disk; None for the embedded one."""
    if config.text.kind == "bytes":
        return None
    text = make_text(config.text)
    if isinstance(text, CachedText):
        text.precompute([*prompts(data.instructions, config.template(config.data.embodiment)), *([""] if config.training.text_dropout else [])])
        text.release()
    return text


def fit_codec(config: Config, data: WindowDataset) -> Codec:
    """The pretrained codec, or the linear one of a dataset, fitted on groups of frames as they occur in windows."""
    codec = make_codec(config.codec)
    if not isinstance(codec, LinearCodec):
        return codec
    rng = np.random.default_rng(config.training.seed)
    stride = config.timeline.temporal_stride
    wanted = max(1, config.codec.fit_frames // stride // config.timeline.blocks)
    chosen = rng.choice(len(data), size=min(wanted, len(data)), replace=False)
    clips = [torch.as_tensor(data[int(i)]["frames"])[1:].unflatten(0, (-1, stride)) for i in chosen]
    codec.fit(torch.cat(clips))
    return codec


def adapted_identity(model: WorldActionModel) -> str | None:
    """A hash of the weights that a model's adapters belong to, which training does not change; None without adapters."""
    if not has_lora(model):
        return None
    trained = [base_name(name) for name, p in model.backbone.named_parameters() if p.requires_grad and not is_adapter(name)]
    return base_identity(model, trained)


def compile_blocks(model: WorldActionModel) -> None:
    """Compile every repeated block when it is first called: one block is compiled and its code serves all, for every layout of tokens there is."""
    for block in [*model.backbone.blocks, *(model.expert.blocks if model.expert is not None else ())]:
        block.compile()


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
