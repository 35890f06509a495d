"""The pretrained codec: Wan's causal video VAE (`diffusers.AutoencoderKLWan`), encoding and decoding as frames arrive.

Two latent spaces have released weights.  Which one a VAE has is read off its own config; nothing here depends on it.

    Wan 2.1    16 channels,  8x8 pixels a latent
    Wan 2.2    48 channels, 16x16 pixels a latent (pixels are folded 2x2 first, shortcuts average and repeat: `is_residual`)

    frames   p0 | p1 p2 p3 p4 | p5 p6 p7 p8 | ...        1 + 4k frames
    latents  z0 | z1          | z2          | ...        1 + k latent frames

A latent depends on every frame before it, through the last inputs that each causal convolution remembers.  diffusers keeps them on
the module and forgets them at the end of a call, so it cannot go on with a video.  Here a stream owns them: two streams never meet,
a stream equals one shot, and the VAE holds no state.  One shot is a stream with a single call, so there is one way of computing.

Of several views side by side (`views`), each goes through the VAE by itself, as a row of the batch: nothing of one bleeds into the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, patchify, unpatchify
from torch import Tensor, nn

# What one half of the VAE remembers: for each causal convolution None (nothing yet), its last inputs, or diffusers' mark that the
# first latent has passed and later ones give two frames.
Memory = list[Any]


@dataclass
class EncoderStream:
    """Encodes videos (a batch of them in step) as their frames arrive; equal to encoding them in one shot."""

    codec: WanCodec
    memory: Memory = field(repr=False)
    shape: tuple[int, int, int] | None = None  # batch, height, width, fixed by the first call

    def encode(self, frames_BFHWC: Tensor) -> Tensor:
        """The next uint8 frames, 1 + 4k at first and 4k later, to float32 latents (B, C, F', h, w).

        Raises:
            ValueError: frames that are not uint8, another number of frames, an image that the codec's stride does not divide, or
                another batch or image size than the stream began with.
        """
        first = self.shape is None
        frames_BFHWC = self.codec.apart(frames_BFHWC, 3)
        _check_frames(frames_BFHWC, first, self.codec.patch)
        batch, count, height, width, _ = frames_BFHWC.shape
        shape = _same_shape(self.shape, (batch, height, width), "frames")
        stride = self.codec.temporal_stride
        sizes = [1] * first + [stride] * (count // stride)
        memory = list(self.memory)  # kept only if every part succeeds: out of memory halfway leaves the stream where it was
        latents = [self.codec.encode_part(part, memory) for part in frames_BFHWC.split(sizes, dim=1)]
        self.memory, self.shape = memory, shape
        return self.codec.together(torch.cat(latents, dim=2), 4)

    def select(self, rows: Sequence[int]) -> EncoderStream:
        """A stream of its own that goes on with some rows of the batch, in the given order."""
        rows = self.codec.rows_of(rows)
        return EncoderStream(self.codec, _rows(self.memory, rows), self.shape and (len(rows), *self.shape[1:]))


@dataclass
class DecoderStream:
    """Decodes latents as they arrive: the first to one frame, every later one to four; equal to decoding them in one shot."""

    codec: WanCodec
    memory: Memory = field(repr=False)
    shape: tuple[int, int, int] | None = None  # batch, latent height, latent width, fixed by the first call

    def decode(self, latents_BCFHW: Tensor) -> Tensor:
        """The next latents (B, C, F', h, w), any number of them, to uint8 frames (B, F, H, W, 3).

        Raises:
            ValueError: no latents, another number of channels, or another batch or size than the stream began with.
        """
        first = self.shape is None
        _check_latents(latents_BCFHW, self.codec.channels)
        latents_BCFHW = self.codec.apart(latents_BCFHW, 4)
        batch, _, _, height, width = latents_BCFHW.shape
        shape = _same_shape(self.shape, (batch, height, width), "latents")
        memory = list(self.memory)
        frames = [self.codec.decode_part(part, memory, first and i == 0) for i, part in enumerate(latents_BCFHW.split(1, dim=2))]
        self.memory, self.shape = memory, shape
        return self.codec.together(torch.cat(frames, dim=1), 3)

    def select(self, rows: Sequence[int]) -> DecoderStream:
        """A stream of its own that goes on with some rows of the batch, in the given order."""
        rows = self.codec.rows_of(rows)
        return DecoderStream(self.codec, _rows(self.memory, rows), self.shape and (len(rows), *self.shape[1:]))


class WanCodec(nn.Module):
    """A frozen Wan VAE with standardised latents: the mode of the posterior, minus the mean and over the deviation of each channel.

    Attributes:
        channels: C, latent channels (16 or 48 for the released VAEs).
        patch: pixels a latent is wide and high (8 or 16).
    """

    temporal_stride = 4
    mean: Tensor
    std: Tensor

    def __init__(self, vae: AutoencoderKLWan, views: int = 1):
        """Wrap a VAE, which is frozen, for pictures of `views` cameras side by side.

        Raises:
            ValueError: a VAE that does not fold 4 frames into a latent, or whose statistics do not fit its channels.
        """
        super().__init__()
        self.vae, self.views = vae.eval().requires_grad_(False), views
        config = vae.config
        self.channels: int = config.z_dim
        self.patch: int = 2 ** (len(config.dim_mult) - 1) * (config.patch_size or 1)
        stride = 2 ** sum(config.temperal_downsample)
        if stride != self.temporal_stride:
            raise ValueError(f"the VAE folds {stride} frames into a latent (temperal_downsample {config.temperal_downsample}); expected {self.temporal_stride}, as in every released Wan VAE")
        for name in ("latents_mean", "latents_std"):
            if len(config[name]) != self.channels:
                raise ValueError(f"the VAE's {name} has {len(config[name])} entries for z_dim {self.channels}; its config.json is not that of its weights")
        shape = (1, self.channels, 1, 1, 1)
        self.register_buffer("mean", torch.tensor(config.latents_mean).view(shape), persistent=False)  # saved in the VAE's own config
        self.register_buffer("std", torch.tensor(config.latents_std).view(shape), persistent=False)

    @classmethod
    def from_pretrained(cls, path_or_repo: str | Path, subfolder: str | None = "vae", dtype: torch.dtype = torch.float32, views: int = 1) -> WanCodec:
        """Load a VAE from a folder in diffusers' layout (`vae/config.json`, `vae/diffusion_pytorch_model.safetensors`) or a repository's name.

        Wan's VAE is meant to run in float32; bfloat16 is faster and visibly less exact.

        Raises:
            FileNotFoundError: there is no VAE.
            ValueError: weights are missing from it, or it is not usable here (see the constructor).
        """
        try:
            vae, loaded = AutoencoderKLWan.from_pretrained(str(path_or_repo), subfolder=subfolder, torch_dtype=dtype, output_loading_info=True)
        except OSError as error:
            raise FileNotFoundError(f"no Wan VAE in {path_or_repo} (subfolder {subfolder!r}): {error}; give a folder in diffusers' layout, e.g. a download of Wan-AI/Wan2.1-T2V-1.3B-Diffusers") from error
        if loaded["missing_keys"]:
            raise ValueError(f"the VAE in {path_or_repo} lacks {len(loaded['missing_keys'])} weights, e.g. {sorted(loaded['missing_keys'])[:3]}; download it again")
        return cls(vae, views)

    def save_pretrained(self, directory: str | Path, subfolder: str | None = "vae") -> None:
        """Write the VAE in diffusers' layout, so that `from_pretrained` and diffusers' pipelines read it."""
        self.vae.save_pretrained(str(Path(directory) / (subfolder or "")))

    def stream(self) -> EncoderStream:
        """A new encoder for frames that arrive over time."""
        return EncoderStream(self, _forgotten(self.vae.encoder))

    def stream_decoder(self) -> DecoderStream:
        """A new decoder for latents that arrive over time."""
        return DecoderStream(self, _forgotten(self.vae.decoder))

    def encode(self, frames_BFHWC: Tensor, first: bool = True) -> Tensor:
        """uint8 frames (B, F, H, W, 3) to float32 latents (B, C, F', h, w); `first`: they begin with a clip's first frame.

        When not `first`, what came before is unknown and is taken as the first of these frames standing still, as DreamZero encodes
        observations.  A `stream` knows what came before and is exact.

        Raises:
            ValueError: as `EncoderStream.encode`.
        """
        if first:
            return self.stream().encode(frames_BFHWC)
        _check_frames(self.apart(frames_BFHWC, 3), first, self.patch)
        return self.stream().encode(torch.cat([frames_BFHWC[:, :1], frames_BFHWC], dim=1))[:, :, 1:]

    def encode_pixels(self, pixels_BFHWC: Tensor) -> Tensor:
        """`encode` of a clip from its first frame, whose pixels need not be whole numbers (float, 0..255)."""
        pixels_BFHWC, memory = self.apart(pixels_BFHWC, 3), _forgotten(self.vae.encoder)
        sizes = [1] + [self.temporal_stride] * ((pixels_BFHWC.shape[1] - 1) // self.temporal_stride)
        return self.together(torch.cat([self.encode_part(part, memory) for part in pixels_BFHWC.split(sizes, dim=1)], dim=2), 4)

    def decode(self, latents_BCFHW: Tensor, first: bool = True) -> Tensor:
        """Latents (B, C, F', h, w) to uint8 frames (B, F, H, W, 3); `first`: the first latent holds one frame.

        When not `first`, every latent gives 4 frames and what came before is taken as the first latent; a `stream_decoder` is exact.

        Raises:
            ValueError: as `DecoderStream.decode`.
        """
        if first:
            return self.stream_decoder().decode(latents_BCFHW)
        _check_latents(latents_BCFHW, self.channels)
        return self.stream_decoder().decode(torch.cat([latents_BCFHW[:, :, :1], latents_BCFHW], dim=2))[:, 1:]

    def apart(self, x: Tensor, width: int) -> Tensor:
        """Views side by side along the dimension `width`, (B, ...), as rows of the batch, (B V, ...)."""
        if self.views == 1 or x.ndim != 5 or x.shape[width] % self.views:
            return x  # what is misshapen is refused by the checks that follow
        return torch.stack(x.chunk(self.views, dim=width), dim=1).flatten(0, 1)

    def together(self, x: Tensor, width: int) -> Tensor:
        """What `apart` took apart."""
        return x if self.views == 1 else torch.cat(x.unflatten(0, (-1, self.views)).unbind(1), dim=width)

    def rows_of(self, rows: Sequence[int]) -> list[int]:
        """Where the views of some rows of the batch are."""
        return [row * self.views + view for row in rows for view in range(self.views)]

    @torch.no_grad()
    def encode_part(self, frames_BFHWC: Tensor, memory: Memory) -> Tensor:
        """The first frame, or the next 4, to one latent (B, C, 1, h, w); replaces the entries of `memory`."""
        x = frames_BFHWC.to(self.mean.device).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
        x = patchify(x.to(self.vae.dtype), self.vae.config.patch_size or 1)
        moments = self.vae.quant_conv(self.vae.encoder(x, feat_cache=memory, feat_idx=[0]))
        mode = moments[:, : self.channels]  # of a diagonal Gaussian; the other half is its log variance
        return (mode.float() - self.mean) / self.std

    @torch.no_grad()
    def decode_part(self, latent_BC1HW: Tensor, memory: Memory, first: bool) -> Tensor:
        """One latent to its frames, (B, 1, H, W, 3) if it is a clip's first and (B, 4, H, W, 3) else; replaces the entries of `memory`."""
        z = latent_BC1HW.to(self.mean.device).float() * self.std + self.mean
        x = self.vae.post_quant_conv(z.to(self.vae.dtype))
        x = self.vae.decoder(x, feat_cache=memory, feat_idx=[0], first_chunk=first)
        x = unpatchify(x, self.vae.config.patch_size or 1).float()
        return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 4, 1)


def _forgotten(half: nn.Module) -> Memory:
    """The memory of an encoder or decoder before its first frame."""
    return [None] * sum(isinstance(module, WanCausalConv3d) for module in half.modules())


def _rows(memory: Memory, rows: Sequence[int]) -> Memory:
    return [entry[list(rows)] if isinstance(entry, Tensor) else entry for entry in memory]


def _same_shape(old: tuple[int, int, int] | None, new: tuple[int, int, int], what: str) -> tuple[int, int, int]:
    if old not in (None, new):
        raise ValueError(f"the stream holds {what} of batch, height, width {old}, but {new} came; open a stream for each video size, and use select() to drop rows")
    return new


def _check_frames(frames: Tensor, first: bool, patch: int) -> None:
    if frames.dtype != torch.uint8 or frames.ndim != 5 or frames.shape[-1] != 3:
        raise ValueError(f"frames are {frames.dtype} {tuple(frames.shape)}; expected uint8 (0..255) of shape (B, F, H, W, 3)")
    count, begins, stride = frames.shape[1], int(first), WanCodec.temporal_stride
    groups, over = divmod(max(count - begins, 0), stride)
    if over or count < (1 if first else stride):
        sum_ = f"{count} = {'1 + ' if first else ''}{stride} x {groups} + {over}" if count else "there are none"
        raise ValueError(f"{count} frames do not fit: expected {'1 + 4k at the start of a clip' if first else '4k, k >= 1, after the start of a clip'} ({sum_}); wait for more frames or leave some out")
    for side, size in zip(("high", "wide"), frames.shape[2:4], strict=True):
        if size % patch or not size:
            near = f"{size - size % patch} or {size + patch - size % patch}" if size > patch else str(patch)
            raise ValueError(f"frames are {size} pixels {side}, which the codec's stride {patch} does not divide ({size} = {size // patch} x {patch} + {size % patch}); resize or crop to {near}")


def _check_latents(latents: Tensor, channels: int) -> None:
    if latents.ndim != 5 or latents.shape[1] != channels or not latents.shape[2]:
        raise ValueError(f"latents have the shape {tuple(latents.shape)}; expected (B, {channels}, F', h, w) with at least one latent frame")
