"""Datasets to read in `wam bench data`: LeRobot v3.0, of sizes that robots have, with pictures that a codec has to work for.

    64x64      one camera at 80 Hz, as the Meta-World demonstrations are
    180x320    three cameras at 30 Hz, as DROID's are

A frame is a window that wanders over a texture, two boxes that move, and the noise of a sensor: a still or empty picture would decode
much faster than a robot's.  Encoded as LeRobot does by default, in H.264 (rate factor 30, a key frame every second frame), and written
by our own writer.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from tqdm import tqdm

from wam.config import TimelineConfig
from wam.data.writer import LeRobotWriter
from wam.data.writer_stats import pixel_histogram

TASK = "put the box into the drawer"
SPEED = 2.0  # pixels a frame that the camera wanders
GRAIN = 2.0  # standard deviation of a pixel's noise


@dataclass(frozen=True)
class Shape:
    """What a dataset is like.

    Attributes:
        timeline: the windows it is read in.
        windows: how many of them are a round of the benchmark.
        start_stride: rows between two of them.
    """

    height: int
    width: int
    fps: int
    cameras: tuple[str, ...]
    episodes: int
    length: int
    dimensions: int
    timeline: TimelineConfig
    windows: int
    start_stride: int = 1


SHAPES = {
    "64x64": Shape(64, 64, 80, ("observation.images.front",), 20, 100, 4, TimelineConfig(), 96),
    "180x320": Shape(
        180, 320, 30, tuple(f"observation.images.{name}" for name in ("left", "right", "wrist")), 6, 200, 8,
        TimelineConfig(blocks=4, latents_per_block=2, actions_per_block=24, frame_stride=3), 16, 8,
    ),
}  # fmt: skip


def make_dataset(root: Path, shape: Shape, seed: int = 0) -> Path:
    """Write a dataset, unless it is there; returns `root`.

    Raises:
        FileExistsError: there is something else.
    """
    if (root / "meta/info.json").is_file():
        return root
    rng = np.random.default_rng(seed)
    features = {camera: {"dtype": "video", "shape": (shape.height, shape.width, 3), "names": ["height", "width", "channels"]} for camera in shape.cameras}
    features |= {key: {"dtype": "float32", "shape": (shape.dimensions,), "names": [f"joint_{i}" for i in range(shape.dimensions)]} for key in ("observation.state", "action")}
    writer = LeRobotWriter(root, shape.fps, features, robot_type="bench")
    with tempfile.TemporaryDirectory(prefix="wam-bench-") as parts:
        for episode in tqdm(range(shape.episodes), desc=f"writing {root.name}", leave=False, disable=None):
            state = np.cumsum(rng.normal(scale=0.02, size=(shape.length + 1, shape.dimensions)), axis=0).astype(np.float32)
            videos = {}
            for camera in shape.cameras:
                frames = film(rng, shape.length, shape.height, shape.width)
                videos[camera] = (_encode(frames, Path(parts) / f"{camera}-{episode}.mp4", shape.fps), pixel_histogram(frames))
            writer.add_episode({"observation.state": state[:-1], "action": state[1:]}, videos, TASK)
        writer.finalize()
    return root


def _encode(frames: np.ndarray, path: Path, fps: int) -> Path:
    """An mp4 as LeRobot's encoder writes it (`encode_video_frames`: crf 30, g 2), without B-frames."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "30", "g": "2", "bf": "0"})
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        stream.time_base = Fraction(1, fps)
        for index, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def film(rng: np.random.Generator, length: int, height: int, width: int) -> np.ndarray:
    """Frames (length, height, width, 3) uint8: a camera that wanders over a texture, boxes, and noise."""
    reach = int(SPEED * length)
    ground = _texture(rng, height + reach, width + reach)
    path = np.clip(np.cumsum(rng.normal(scale=SPEED, size=(length, 2)), axis=0) + reach / 2, 0, reach).astype(int)
    boxes = rng.integers(0, (height, width), (2, 2)) + np.cumsum(rng.normal(scale=SPEED, size=(length, 2, 2)), axis=0)
    colours, size = rng.integers(0, 255, (2, 3)), max(4, height // 5)
    frames = np.empty((length, height, width, 3), np.uint8)
    for frame, (y, x), corners in zip(frames, path, boxes.astype(int), strict=True):
        picture = ground[y : y + height, x : x + width].copy()
        for (top, left), colour in zip(corners % (height, width), colours, strict=True):
            picture[top : top + size, left : left + size] = colour
        frame[:] = np.clip(picture + GRAIN * rng.standard_normal((height, width, 1), np.float32), 0, 255)
    return frames


def _texture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """(height, width, 3) float32 in 0..255: noise at four scales, the coarser the stronger."""
    total = torch.zeros(1, 3, height, width)
    for scale, weight in ((64, 1.0), (16, 0.5), (6, 0.3), (2, 0.15)):
        noise = torch.from_numpy(rng.uniform(-1, 1, (1, 3, height // scale + 2, width // scale + 2)).astype(np.float32))
        total += weight * torch.nn.functional.interpolate(noise, size=(height, width), mode="bilinear", align_corners=False)
    return (127.5 + 90 * total[0].permute(1, 2, 0)).clamp(0, 255).numpy()
