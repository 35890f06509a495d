"""Image embeddings of the first frame, for Wan's image-to-video adapter: a CLIP vision transformer, one layer before its last.

    frame (H, W, 3)  ->  224 x 224, standardised  ->  ViT-H/14  ->  (257, 1280): one token for the image, 16 x 16 for its patches

Two ways of making a frame square are in use, and weights trained with one see other pictures with the other:

    crop       the shorter edge to 224, then the middle square; edges of wide frames are lost (diffusers' pipelines)
    stretch    the whole frame to 224 x 224, out of proportion, without smoothing (Wan's own code, and so DreamZero)

Everything runs on the device of the weights, in a batch, with no image library.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionModel

# Mean and deviation of CLIP's training images, RGB in 0..1 (OpenAI's preprocessing; OpenCLIP's ViT-H/14 shares it).
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def crop_to_square(images_BCHW: Tensor, size: int) -> Tensor:
    """The shorter edge to `size` (bicubic, smoothed), then the middle square; whole values 0..255.

    As Pillow does it: first the width, then the height, each rounded and clamped.  In one go, bicubic overshoot at hard edges would
    not be cut in between, and single pixels come out 20 grey levels apart.
    """
    height, width = images_BCHW.shape[-2:]
    short = min(height, width)
    new_height, new_width = int(size * height / short), int(size * width / short)
    for shape in ((height, new_width), (new_height, new_width)):
        images_BCHW = F.interpolate(images_BCHW, size=shape, mode="bicubic", align_corners=False, antialias=True).round().clamp(0, 255)
    top, left = (new_height - size) // 2, (new_width - size) // 2
    return images_BCHW[..., top : top + size, left : left + size]


def stretch_to_square(images_BCHW: Tensor, size: int) -> Tensor:
    """The whole image to `size` x `size` (bicubic, neither smoothed nor clamped); values about 0..255."""
    return F.interpolate(images_BCHW, size=(size, size), mode="bicubic", align_corners=False)


FRAMINGS: dict[str, Callable[[Tensor, int], Tensor]] = {"crop": crop_to_square, "stretch": stretch_to_square}


class ClipImage(nn.Module):
    """Frames to CLIP embeddings (B, tokens, width), by a frozen vision transformer.

    Attributes:
        size: pixels, edge of the square that the transformer takes (224).
        tokens: 1 + patches of that square (257).
        width: numbers a token (1280).
    """

    mean: Tensor
    std: Tensor

    def __init__(self, encoder: CLIPVisionModel, framing: str = "crop"):
        """Wrap an encoder, which is frozen.

        Args:
            framing: "crop" or "stretch", see above.

        Raises:
            ValueError: another framing.
        """
        super().__init__()
        if framing not in FRAMINGS:
            raise ValueError(f"framing is {framing!r}; expected one of {', '.join(FRAMINGS)}: how the adapter's weights were trained")
        self.encoder = encoder.eval().requires_grad_(False)
        self.framing = framing
        self.size: int = encoder.config.image_size
        self.width: int = encoder.config.hidden_size
        self.tokens: int = 1 + (self.size // encoder.config.patch_size) ** 2
        self.register_buffer("mean", torch.tensor(CLIP_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(CLIP_STD).view(3, 1, 1), persistent=False)

    @classmethod
    def from_pretrained(cls, path_or_repo: str | Path, subfolder: str = "image_encoder", framing: str = "crop", dtype: torch.dtype = torch.float32) -> ClipImage:
        """Load an encoder from a folder in diffusers' layout (`image_encoder/`) or a repository's name.

        Raises:
            FileNotFoundError: there is none.
            ValueError: weights are missing, or another framing.
        """
        try:
            encoder, loaded = CLIPVisionModel.from_pretrained(str(path_or_repo), subfolder=subfolder, dtype=dtype, output_loading_info=True)
        except OSError as error:
            raise FileNotFoundError(f"no CLIP vision encoder in {path_or_repo} (subfolder {subfolder!r}): {error}; give a folder in diffusers' layout, e.g. a download of Wan-AI/Wan2.1-I2V-14B-480P-Diffusers") from error
        if loaded["missing_keys"]:
            raise ValueError(f"the image encoder in {path_or_repo} lacks {len(loaded['missing_keys'])} weights, e.g. {sorted(loaded['missing_keys'])[:3]}; download it again")
        return cls(encoder, framing)

    @torch.no_grad()
    def forward(self, frames_BHWC: Tensor) -> Tensor:
        """Embed uint8 frames (B, H, W, 3) to float32 (B, tokens, width), the input of the transformer's last layer.

        Raises:
            ValueError: frames that are not uint8 RGB.
        """
        pixels = self.preprocess(frames_BHWC).to(self.encoder.dtype)
        embeddings: Tensor = self.encoder(pixel_values=pixels, output_hidden_states=True).hidden_states[-2]
        return embeddings.float()

    def preprocess(self, frames_BHWC: Tensor) -> Tensor:
        """uint8 frames (B, H, W, 3) to standardised float32 squares (B, 3, size, size).

        Raises:
            ValueError: frames that are not uint8 RGB.
        """
        if frames_BHWC.dtype != torch.uint8 or frames_BHWC.ndim != 4 or frames_BHWC.shape[-1] != 3:
            raise ValueError(f"frames are {frames_BHWC.dtype} {tuple(frames_BHWC.shape)}; expected uint8 (0..255) of shape (B, H, W, 3), one frame a row")
        images = frames_BHWC.to(self.mean.device).permute(0, 3, 1, 2).float()
        return (FRAMINGS[self.framing](images, self.size) / 255 - self.mean) / self.std
