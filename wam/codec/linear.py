"""The embedded codec: a linear, causal video codec that is fitted on a dataset in seconds and saved with the checkpoint.

A patch of 4 consecutive frames is projected on its principal components; the first frame of a clip, which stands alone in its
latent, is taken as a patch that does not move.  The mean is kept per place in the image, so that a still background costs nothing.

    frames   p0 | p1 p2 p3 p4 | p5 p6 p7 p8 | ...        1 + 4k frames
    latents  z0 | z1          | z2          | ...        1 + k latent frames, `patch` times smaller

Same interface and causality as `AutoencoderKLWan`: what follows never changes what was encoded, so a stream equals one shot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from wam.config import CodecConfig


@dataclass
class EncoderStream:
    """Encodes a video as its frames arrive; equal to encoding it in one shot."""

    codec: LinearCodec
    started: bool = False

    def encode(self, frames_BFHWC: Tensor) -> Tensor:
        """The next uint8 frames, 1 + 4k at first and 4k later, to latents (B, C, F', h, w).

        Raises:
            ValueError: another number of frames.
        """
        latents = self.codec.encode(frames_BFHWC, first=not self.started)
        self.started = True
        return latents

    def select(self, rows: Sequence[int]) -> EncoderStream:
        """A stream that goes on with some rows of the batch; a linear codec remembers nothing of them but that they began."""
        return EncoderStream(self.codec, self.started)


@dataclass
class DecoderStream:
    """Decodes latents as they arrive: the first to one frame, every later one to four; equal to decoding them in one shot."""

    codec: LinearCodec
    started: bool = False

    def decode(self, latents_BCFHW: Tensor) -> Tensor:
        """The next latents (B, C, F', h, w), any number of them, to uint8 frames (B, F, H, W, 3)."""
        frames = self.codec.decode(latents_BCFHW, first=not self.started)
        self.started = True
        return frames

    def select(self, rows: Sequence[int]) -> DecoderStream:
        """A stream that goes on with some rows of the batch, as of an encoder."""
        return DecoderStream(self.codec, self.started)


class LinearCodec(nn.Module):
    """Principal components of (4, patch, patch) RGB blocks; latents have unit variance, per channel or (less whitened) on average."""

    temporal_stride = 4
    mean: Tensor  # (rows, columns, features)
    basis: Tensor  # (channels, features)
    scale: Tensor  # (channels,)

    def __init__(self, config: CodecConfig):
        super().__init__()
        self.config = config
        self.channels, self.patch = config.channels, config.patch
        height, width = config.image_size
        self.grid = (height // config.patch, width // config.patch)
        features = 3 * self.temporal_stride * config.patch**2
        self.register_buffer("mean", torch.zeros(*self.grid, features))
        self.register_buffer("basis", torch.zeros(config.channels, features))
        self.register_buffer("scale", torch.zeros(config.channels))

    @torch.no_grad()
    def fit(self, clips_BFHWC: Tensor) -> None:
        """Fit mean and components on uint8 clips (B, 4, H, W, 3), each a group of 4 consecutive frames.

        Raises:
            ValueError: fewer clips than channels.
        """
        if len(clips_BFHWC) * self.grid[0] * self.grid[1] < self.config.channels:
            raise ValueError(f"{len(clips_BFHWC)} clips are too few to fit {self.config.channels} codec channels")
        x = self._patches(clips_BFHWC)
        still = self._patches(clips_BFHWC[:, -1:].expand(-1, self.temporal_stride, -1, -1, -1))
        self.mean.copy_(x.mean(dim=(0, 1)))
        centred = torch.cat([x - self.mean, still - self.mean]).flatten(0, -2)
        covariance = (centred.T @ centred / len(centred)).double()
        variances, vectors = torch.linalg.eigh(covariance)
        top = variances.argsort(descending=True)[: self.config.channels]
        basis = vectors[:, top].T
        sign = torch.sign(basis.gather(1, basis.abs().argmax(dim=1, keepdim=True)))
        self.basis.copy_(basis * sign)
        deviation = variances[top].clamp_min(1e-12).sqrt()
        scale = deviation**self.config.whitening
        self.scale.copy_(scale * (deviation / scale).square().mean().sqrt())

    @torch.no_grad()
    def encode(self, frames_BFHWC: Tensor, first: bool = True) -> Tensor:
        """uint8 frames (B, F, H, W, 3) to latents (B, C, F', h, w); `first`: they begin with a clip's first frame.

        Raises:
            ValueError: frames of another size, or a number of frames that is not 1 + 4k (4k when not `first`).
        """
        self._check(frames_BFHWC, first)
        if first:
            frames_BFHWC = torch.cat([frames_BFHWC[:, :1].expand(-1, self.temporal_stride - 1, -1, -1, -1), frames_BFHWC], dim=1)
        x = self._patches(frames_BFHWC) - self.mean
        z = torch.matmul(x, self.basis.T) / self.scale
        return z.permute(0, 4, 1, 2, 3).contiguous()

    def encode_pixels(self, pixels_BFHWC: Tensor) -> Tensor:
        """`encode` of a clip from its first frame, whose pixels need not be whole numbers (float, 0..255)."""
        return self.encode(pixels_BFHWC)

    @torch.no_grad()
    def decode(self, latents_BCFHW: Tensor, first: bool = True) -> Tensor:
        """Latents (B, C, F', h, w) to uint8 frames (B, F, H, W, 3); `first`: the first latent holds one frame."""
        z = latents_BCFHW.permute(0, 2, 3, 4, 1).float() * self.scale
        x = torch.matmul(z, self.basis) + self.mean
        batch, groups, rows, columns, _ = x.shape
        p, t = self.config.patch, self.temporal_stride
        x = x.view(batch, groups, rows, columns, t, 3, p, p).permute(0, 1, 4, 2, 6, 3, 7, 5)
        frames = x.reshape(batch, groups * t, rows * p, columns * p, 3)
        frames = ((frames + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        return frames[:, t - 1 :] if first else frames

    def stream(self) -> EncoderStream:
        """A new encoder for frames that arrive over time."""
        return EncoderStream(self)

    def stream_decoder(self) -> DecoderStream:
        """A new decoder for latents that arrive over time."""
        return DecoderStream(self)

    def _patches(self, frames_BFHWC: Tensor) -> Tensor:
        """uint8 (B, 4g, H, W, 3) to float (B, g, rows, columns, features) in [-1, 1]."""
        batch, frames = frames_BFHWC.shape[:2]
        p, t, (rows, columns) = self.config.patch, self.temporal_stride, self.grid
        x = frames_BFHWC.view(batch, frames // t, t, rows, p, columns, p, 3).permute(0, 1, 3, 5, 2, 7, 4, 6)
        return x.reshape(batch, frames // t, rows, columns, -1).float() / 127.5 - 1

    def _check(self, frames_BFHWC: Tensor, first: bool) -> None:
        size, count = tuple(frames_BFHWC.shape[2:4]), frames_BFHWC.shape[1]
        if size != tuple(self.config.image_size):
            raise ValueError(f"frames are {size[0]}x{size[1]}, but this codec encodes {self.config.image_size[0]}x{self.config.image_size[1]}; resize the camera image or set codec.image_size")
        over = count % self.temporal_stride
        if over != (1 if first else 0):
            raise ValueError(f"{count} frames do not fit: expected {'1 + 4k' if first else '4k'} ({count} = {'1 + ' if first else ''}4 x {count // 4} + {over - (1 if first else 0)})")
