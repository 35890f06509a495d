"""Pictures: how far two videos are apart, and how they are put side by side for a person.

PSNR, SSIM and LPIPS are measured where things move.  The mask is defined once, from the real clip alone: a pixel moves if, in any frame,
any of its channels differs from the clip's first frame by more than 20 of 255.  It is the same for every frame of the clip, for the
imagined video and for the baselines, so no method chooses where it is judged.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
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


_WINDOW = 11  # pixels of SSIM's window


def ssim(video_FHWC: np.ndarray, real_FHWC: np.ndarray, mask_HW: np.ndarray | None = None) -> float:
    """Mean structural similarity of uint8 clips (Wang et al. 2004: Gaussian window of 11 pixels, sigma 1.5), on luma.

    Args:
        mask_HW: only windows whose middle lies in it count.

    Raises:
        ValueError: no window has its middle in the mask.
    """
    luma = torch.tensor([0.299, 0.587, 0.114])
    a, b = (torch.from_numpy(x.astype(np.float32) / 255) @ luma for x in (video_FHWC, real_FHWC))
    offsets = torch.arange(_WINDOW) - _WINDOW // 2
    line = torch.exp(-(offsets**2) / (2 * 1.5**2))
    window = (line[:, None] * line[None, :] / line.sum() ** 2)[None, None]

    def blur(x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x.unsqueeze(1), window).squeeze(1)

    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b, cov = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2, blur(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    similar = ((2 * mean_a * mean_b + c1) * (2 * cov + c2)) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return float((similar if mask_HW is None else similar[:, _middles(mask_HW)]).mean())


def has_windows(mask_HW: np.ndarray) -> bool:
    """Whether any window of SSIM has its middle in the mask: not where all that moves is at the picture's very edge."""
    edge = _WINDOW // 2
    return bool(mask_HW[edge:-edge, edge:-edge].any())


def _middles(mask_HW: np.ndarray) -> torch.Tensor:
    if not has_windows(mask_HW):
        raise ValueError(f"nothing moves further than {_WINDOW // 2} pixels from the edge of this clip; SSIM over moving pixels is not defined")
    edge = _WINDOW // 2
    return torch.from_numpy(mask_HW[edge:-edge, edge:-edge].copy())


Lpips = Callable[[np.ndarray, np.ndarray, np.ndarray], float]


def lpips_is_missing() -> str | None:
    """Why LPIPS cannot be measured here, and what to do about it; None where it can."""
    if importlib.util.find_spec("lpips") is None or importlib.util.find_spec("torchvision") is None:
        return "LPIPS needs the packages lpips and torchvision, which are not installed; run: pip install lpips torchvision"
    try:
        from torchvision.models import AlexNet_Weights
    except (ImportError, RuntimeError) as error:
        return f"LPIPS needs torchvision, which does not load here ({error}); install the build that fits torch {torch.__version__}"
    weights = Path(torch.hub.get_dir()) / "checkpoints" / Path(AlexNet_Weights.IMAGENET1K_V1.url).name
    if not weights.is_file():
        return f"LPIPS needs AlexNet's weights, and {weights} is not there; with a network, run once: python -c 'import lpips; lpips.LPIPS()', or copy the file there"
    return None


def load_lpips() -> Lpips:
    """LPIPS (Zhang et al. 2018, AlexNet, version 0.1): a function of two uint8 clips (F, H, W, 3) and a mask (H, W), to the mean distance over it; 0 is the same.

    Raises:
        RuntimeError: it cannot be measured here; says what to install or download.
    """
    missing = lpips_is_missing()
    if missing:
        raise RuntimeError(missing)
    import lpips

    network = lpips.LPIPS(net="alex", spatial=True, verbose=False).eval()

    def distance(video_FHWC: np.ndarray, real_FHWC: np.ndarray, mask_HW: np.ndarray) -> float:
        with torch.no_grad():
            a, b = (torch.from_numpy(x.astype(np.float32) / 127.5 - 1).permute(0, 3, 1, 2) for x in (video_FHWC, real_FHWC))
            return float(network(a, b)[:, 0, torch.from_numpy(mask_HW)].mean())

    return distance


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
