"""One interface for every codec, and the codec that a config names.

    frames   p0 | p1 p2 p3 p4 | p5 p6 p7 p8 | ...        1 + 4k frames
    latents  z0 | z1          | z2          | ...        1 + k latent frames

`linear` is fitted on the dataset and is saved with the model's weights; `wan` is pretrained, frozen, and lies in a folder of its own
in diffusers' layout.  What follows never changes what was encoded, so a stream equals one shot.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from wam.codec.clip_image import ClipImage
from wam.codec.linear import LinearCodec
from wam.codec.wan import WanCodec
from wam.config import CodecConfig, Config

VAE, IMAGE_ENCODER = "vae", "image_encoder"  # subfolders, as diffusers' pipelines name them
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class EncoderStream(Protocol):
    """Encodes a batch of videos as their frames arrive; equal to encoding them in one shot."""

    def encode(self, frames_BFHWC: Tensor) -> Tensor:
        """The next uint8 frames, 1 + 4k at first and 4k later, to latents (B, C, F', h, w)."""
        ...

    def select(self, rows: Sequence[int]) -> EncoderStream:
        """A stream that goes on with some rows of the batch, in the given order."""
        ...


class DecoderStream(Protocol):
    """Decodes latents as they arrive; equal to decoding them in one shot."""

    def decode(self, latents_BCFHW: Tensor) -> Tensor:
        """The next latents (B, C, F', h, w) to uint8 frames (B, F, H, W, 3)."""
        ...

    def select(self, rows: Sequence[int]) -> DecoderStream:
        """A stream that goes on with some rows of the batch, in the given order."""
        ...


class Codec(Protocol):
    """What a policy, a session and the training loop ask of a codec; an `nn.Module`.

    Attributes:
        temporal_stride: frames folded into a latent frame (4).
        channels: C, latent channels.
        patch: pixels a latent is wide and high.
    """

    temporal_stride: int
    channels: int
    patch: int

    def encode(self, frames_BFHWC: Tensor, first: bool = True) -> Tensor:
        """uint8 frames (B, F, H, W, 3) to float32 latents (B, C, F', h, w); `first`: they begin with a clip's first frame."""
        ...

    def encode_pixels(self, pixels_BFHWC: Tensor) -> Tensor:
        """`encode` of a clip from its first frame, whose pixels need not be whole numbers (float, 0..255)."""
        ...

    def decode(self, latents_BCFHW: Tensor, first: bool = True) -> Tensor:
        """Latents (B, C, F', h, w) to uint8 frames (B, F, H, W, 3); `first`: the first latent holds one frame."""
        ...

    def stream(self) -> EncoderStream:
        """A new encoder for frames that arrive over time."""
        ...

    def stream_decoder(self) -> DecoderStream:
        """A new decoder for latents that arrive over time."""
        ...

    def to(self, device: torch.device | str) -> Self:
        """Move to a device."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """Weights."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Weights and statistics by name."""
        ...


def make_codec(config: CodecConfig, folder: Path | None = None) -> Codec:
    """The codec a config names: an empty linear one, or the pretrained one of `folder` (a checkpoint's) or else of `codec.pretrained`.

    Raises:
        FileNotFoundError: there are no weights, or nothing says where they are.
        ValueError: the weights have another latent space than the config says; names the field.
    """
    if config.kind == "linear":
        return LinearCodec(config)
    codec = WanCodec.from_pretrained(component(folder, VAE, config.pretrained, "codec.pretrained"), subfolder=VAE, dtype=DTYPES[config.dtype], views=config.views)
    for name, of in (("channels", "z_dim"), ("patch", "spatial stride")):
        found, expected = getattr(codec, name), getattr(config, name)
        if found != expected:
            raise ValueError(f"codec.{name} is {expected}, but the VAE's {of} is {found}; set codec.{name}={found}, or name another VAE in codec.pretrained")
    return codec


def make_image(config: Config, folder: Path | None = None) -> ClipImage | None:
    """The image encoder a config names, from `folder` (a checkpoint's) or else from `image.pretrained`; None where the model takes no image embeddings.

    Raises:
        FileNotFoundError: there are no weights, or nothing says where they are.
        ValueError: the model takes image embeddings and `image.kind` is none, or they are of another width.
    """
    c, width = config.image, config.model.image_dim
    if width is None:
        return None
    if c.kind == "none":
        raise ValueError(f"the model takes image embeddings (model.image_dim {width}), but image.kind is 'none'; set image.kind=clip and image.pretrained")
    image = ClipImage.from_pretrained(component(folder, IMAGE_ENCODER, c.pretrained, "image.pretrained"), subfolder=IMAGE_ENCODER, framing=c.framing, dtype=DTYPES[c.dtype])
    if image.width != width:
        raise ValueError(f"model.image_dim is {width}, but the image encoder's tokens have {image.width} numbers; set model.image_dim={image.width}, or name another encoder in image.pretrained")
    return image


def component(folder: Path | None, subfolder: str, pretrained: str | None, field: str) -> str:
    """Where a pretrained component lies: in the checkpoint's folder if it was copied there, or else where the config says.

    Raises:
        FileNotFoundError: neither.
    """
    if folder is not None and (folder / subfolder).is_dir():
        return str(folder)
    if pretrained is None:
        where = f"{folder} holds no {subfolder}/" if folder is not None else f"{field} is null"
        raise FileNotFoundError(f"nothing says where the {subfolder} is: {where}; set {field} to a folder in diffusers' layout or a Hub id, e.g. Wan-AI/Wan2.1-T2V-1.3B-Diffusers")
    return pretrained
