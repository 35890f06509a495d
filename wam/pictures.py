"""Pictures: how far two videos are apart, and how they are put side by side for a person.

PSNR is measured where things move.  The mask is defined once, from the real clip alone: a pixel moves if, in any frame, any of its
channels differs from the clip's first frame by more than 20 of 255.  It is the same for every frame of the clip, for the imagined
video and for the baseline that copies the first frame, so no method chooses where it is judged.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from wam.files import atomic_path

MOVING = 20
MASK = f"pixels whose colour differs from the clip's first frame by more than {MOVING}/255 in any channel, in any frame of the real clip"


def moving_mask(real_FHWC: np.ndarray) -> np.ndarray:
    """Bool (H, W): the pixels of a uint8 clip that move; see the module's docstring."""
    difference = np.abs(real_FHWC.astype(np.int16) - real_FHWC[:1].astype(np.int16))
    return (difference.max(axis=-1) > MOVING).any(axis=0)


def psnr(video_FHWC: np.ndarray, real_FHWC: np.ndarray, mask_HW: np.ndarray | None = None) -> float:
    """Peak signal-to-noise ratio in dB of uint8 clips, over all frames and the masked pixels.

    Raises:
        ValueError: shapes differ, or the mask is empty.
    """
    if video_FHWC.shape != real_FHWC.shape:
        raise ValueError(f"clips have shapes {video_FHWC.shape} and {real_FHWC.shape}; they must be the same")
    error = ((video_FHWC.astype(np.float64) - real_FHWC.astype(np.float64)) / 255) ** 2
    if mask_HW is not None:
        if not mask_HW.any():
            raise ValueError("nothing moves in this clip; PSNR over moving pixels is not defined")
        error = error[:, mask_HW]
    return float(-10 * np.log10(max(error.mean(), 1e-10)))


def ssim(video_FHWC: np.ndarray, real_FHWC: np.ndarray) -> float:
    """Mean structural similarity of uint8 clips (Wang et al. 2004: Gaussian window of 11 pixels, sigma 1.5), on luma."""
    luma = torch.tensor([0.299, 0.587, 0.114])
    a, b = (torch.from_numpy(x.astype(np.float32) / 255) @ luma for x in (video_FHWC, real_FHWC))
    offsets = torch.arange(11) - 5
    line = torch.exp(-(offsets**2) / (2 * 1.5**2))
    window = (line[:, None] * line[None, :] / line.sum() ** 2)[None, None]

    def blur(x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x.unsqueeze(1), window).squeeze(1)

    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b, cov = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2, blur(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    return float((((2 * mean_a * mean_b + c1) * (2 * cov + c2)) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))).mean())


def beside(videos: list[np.ndarray], gap: int = 4) -> np.ndarray:
    """Clips (F, H, W, 3) side by side, with a white gap."""
    frames, height = videos[0].shape[:2]
    bar = np.full((frames, height, gap, 3), 255, np.uint8)
    parts = [part for video in videos for part in (video, bar)][:-1]
    return np.concatenate(parts, axis=2)


def enlarge(video: np.ndarray, factor: int) -> np.ndarray:
    """Nearest-neighbour enlargement of frames (..., H, W, 3)."""
    return video.repeat(factor, axis=-3).repeat(factor, axis=-2)


def strip(rows: list[np.ndarray], columns: int = 8, factor: int = 3) -> np.ndarray:
    """One image (H, W, 3): `columns` frames of each clip, spread evenly over time, one clip a row."""
    lines = []
    for video in rows:
        chosen = np.linspace(0, len(video) - 1, columns).round().astype(int)
        line = beside([enlarge(video[i : i + 1], factor) for i in chosen])[0]
        lines += [line, np.full((4, line.shape[1], 3), 255, np.uint8)]
    return np.concatenate(lines[:-1])


def film(clips: Sequence[Sequence[tuple[str, np.ndarray]]], columns: int = 9, height: int = 96) -> np.ndarray:
    """One image (H, W, 3) of several clips, each a few named rows of frames (F, H, W, 3) of the same times: the name to the left, `columns` frames evenly spread."""
    from PIL import Image, ImageDraw

    blocks = []
    for clip in clips:
        for name, video in clip:
            factor = max(1, height // video.shape[1])
            chosen = np.unique(np.linspace(0, len(video) - 1, min(columns, len(video))).round().astype(int))
            line = beside([enlarge(video[i : i + 1], factor) for i in chosen])[0]
            label = Image.new("RGB", (84, line.shape[0]), "white")
            ImageDraw.Draw(label).text((6, line.shape[0] // 2 - 6), name, fill="#24292f")
            blocks += [np.concatenate([np.asarray(label), line], axis=1), np.full((3, 84 + line.shape[1], 3), 255, np.uint8)]
        blocks.append(np.full((9, blocks[-1].shape[1], 3), 255, np.uint8))
    return np.concatenate(blocks[:-1])


def write_png(image: np.ndarray, path: Path) -> None:
    """Write a uint8 image (H, W, 3) as PNG, atomically."""
    from PIL import Image

    with atomic_path(path) as temporary:
        Image.fromarray(image).save(temporary, format="PNG")


def write_mp4(video_FHWC: np.ndarray, path: Path, fps: int) -> None:
    """Write uint8 frames as H.264 that browsers play, atomically; odd sizes are padded by a pixel."""
    import av

    frames, height, width = video_FHWC.shape[:3]
    padded = np.pad(video_FHWC, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    with atomic_path(path) as temporary, av.open(str(temporary), "w", format="mp4", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "20", "preset": "veryfast"})
        stream.height, stream.width, stream.pix_fmt = padded.shape[1], padded.shape[2], "yuv420p"
        for index in range(frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(padded[index]), format="rgb24")))
        container.mux(stream.encode())
