"""A first frame joined to the channels, as Wan's image-to-video form (and so DreamZero's 14B) takes it.

    latent frame    0               1 .. F-1
    mask            1 1 1 1         0 0 0 0          one channel per pixel frame of a latent
    latents         of the frame    of what follows when nothing does: grey, encoded causally after it
"""

from __future__ import annotations

import torch
from torch import Tensor

from wam.codec.codec import Codec

MASK_CHANNELS = 4
GREY = 127.5  # 0 once pixels are scaled to -1..1


def first_frame_condition(codec: Codec, frame_B1HWC: Tensor, latents: int) -> Tensor:
    """Mask and latents (B, 4 + C, latents, h, w) of a first frame, uint8 (B, 1, H, W, 3), for a window of `latents` latent frames."""
    batch, _, height, width, _ = frame_B1HWC.shape
    grey = torch.full((batch, codec.temporal_stride * (latents - 1), height, width, 3), GREY, device=frame_B1HWC.device)
    video = codec.encode_pixels(torch.cat([frame_B1HWC.float(), grey], dim=1))
    mask = video.new_zeros(batch, MASK_CHANNELS, *video.shape[2:])
    mask[:, :, 0] = 1
    return torch.cat([mask, video], dim=1)
