"""Several cameras on one canvas, and pictures that differ from the recorded ones: the same in training and at inference.

    single      width         height    grid        t (DreamZero, DROID)      separate
    +-----+     +---+---+     +-----+   +---+---+     +-------+  the first as wide     [0] [1] [2]
    |  0  |     | 0 | 1 |     |  0  |   | 0 | 1 |     |   0   |  as the canvas: its
    |     |     |   |   |     +-----+   +---+---+     +---+---+  columns twice         each for itself,
    +-----+     +---+---+     |  1  |   | 2 | 3 |     | 1 | 2 |                        with a view index
                              +-----+   +---+---+     +---+---+

Separate cameras come to the network side by side, as in `width`; there the codec encodes each by itself, columns are counted anew in
each, and an index tells them apart (`codec.views`).

Every camera is resized to its cell, or to the cell and a margin where a crop follows: cropping is then a cut, at a place that is drawn
once for a window and lies alike in all of its frames and cameras.  Without augmentation the middle is cut.  Colours change by one
matrix and offset, which brightness, contrast, saturation and hue are all parts of.

Letters: V cameras, F frames, H, W of the canvas, h, w of a cell.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from wam.config_data import AugmentConfig, DataConfig, Layout, grid_of
from wam.data.video import resize_frames

LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # grey of red, green and blue (BT.601)
YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]], np.float32)
GREY = 127.5  # what contrast turns about


@dataclass(frozen=True)
class Look:
    """How the pictures of one window differ from the recorded ones.

    Attributes:
        at: where the crop lies in its margin, from 0 (top, left) to 1.
        colours: (3, 4) float32: a matrix on red, green and blue, and an offset; None leaves them.
        dropped: the camera that is black, or None.
    """

    at: tuple[float, float] = (0.5, 0.5)
    colours: np.ndarray | None = None
    dropped: int | None = None


PLAIN = Look()


def draw_look(augment: AugmentConfig, cameras: int, rng: np.random.Generator) -> Look:
    """A look at random; what is drawn does not depend on which parts are used."""
    draws = rng.random(8)
    brightness, contrast, saturation = (1 + strength * (2 * u - 1) for strength, u in zip((augment.brightness, augment.contrast, augment.saturation), draws[2:5], strict=True))
    angle = augment.hue * (2 * draws[5] - 1) * 2 * np.pi
    changed = augment.brightness or augment.contrast or augment.saturation or augment.hue
    colours = colour_matrix(brightness, contrast, saturation, angle) if changed else None
    dropped = 1 + int(draws[7] * (cameras - 1)) if cameras > 1 and draws[6] < augment.view_dropout else None
    return Look((float(draws[0]), float(draws[1])), colours, dropped)


def colour_matrix(brightness: float, contrast: float, saturation: float, angle: float) -> np.ndarray:
    """(3, 4): scale by `brightness`, spread about grey by `contrast`, mix with the pixel's grey by `saturation`, turn the hue by `angle` (radians, red towards green)."""
    turn = np.array([[1, 0, 0], [0, np.cos(angle), np.sin(angle)], [0, -np.sin(angle), np.cos(angle)]], np.float32)
    hue = np.linalg.inv(YIQ) @ turn @ YIQ if angle else np.eye(3)
    mix = saturation * np.eye(3) + (1 - saturation) * LUMA[None, :]
    matrix = contrast * brightness * (hue @ mix)
    return np.concatenate([matrix, np.full((3, 1), (1 - contrast) * GREY)], axis=1).astype(np.float32)


def change_colours(frames: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """uint8 (F, h, w, 3) through a matrix and offset (3, 4), rounded and clipped; the same bits on any number of threads."""
    out = np.empty_like(frames)
    for before, after in zip(frames, out, strict=True):  # a frame stays in the processor's cache
        parts = before.astype(np.float32)
        for channel, (red, green, blue, offset) in enumerate(colours):
            total = parts[..., 0] * red
            total += parts[..., 1] * green
            total += parts[..., 2] * blue
            total += offset + np.float32(0.5)
            after[..., channel] = np.clip(total, 0, 255, out=total)
    return out


@dataclass(frozen=True)
class Canvas:
    """Where cameras go.

    Attributes:
        size: (H, W) of what comes out; of each camera where they stay separate.
        crop: side of a picture that is kept.

    Raises:
        ValueError: the canvas cannot be divided evenly.
    """

    layout: Layout
    cameras: int
    size: tuple[int, int]
    crop: float = 1.0

    def __post_init__(self) -> None:
        for axis, size, parts in zip(("high", "wide"), self.size, grid_of(self.layout, self.cameras), strict=True):
            if size % parts:
                raise ValueError(f"a canvas of layout {self.layout!r} with {self.cameras} cameras is {size} {axis}, which {parts} cells do not divide; use codec.image_size with a multiple of {parts}")

    @classmethod
    def of(cls, data: DataConfig, size: tuple[int, int]) -> Canvas:
        """The canvas that a config's network takes: separate cameras lie side by side."""
        return cls("width" if data.layout == "separate" else data.layout, len(data.cameras), (size[0], size[1]), data.augment.crop)

    @property
    def cell(self) -> tuple[int, int]:
        """(h, w) of a camera on the canvas."""
        rows, columns = grid_of(self.layout, self.cameras)
        return self.size[0] // rows, self.size[1] // columns

    @property
    def stored(self) -> tuple[int, int]:
        """(h, w) that a camera is resized to: its cell, and the margin for the crop."""
        return round(self.cell[0] / self.crop), round(self.cell[1] / self.crop)

    def shape(self, frames: int) -> tuple[int, ...]:
        """Of what comes out: (F, H, W, 3), or (V, F, H, W, 3) where cameras stay separate."""
        return (self.cameras,) * (self.layout == "separate") + (frames, *self.size, 3)

    def place(self, views: Sequence[np.ndarray], look: Look = PLAIN) -> np.ndarray:
        """Cameras' frames, uint8 (F, *stored, 3) each, as one canvas of `shape`."""
        if self.layout == "single":
            return self._seen(views[0], look)
        out = np.zeros(self.shape(len(views[0])), np.uint8)
        for camera, frames in enumerate(views):
            if camera != look.dropped:
                self._put(out, camera, self._seen(frames, look))
        return out

    def compose(self, frames: Mapping[str, np.ndarray] | Sequence[np.ndarray]) -> np.ndarray:
        """Pictures of cameras in the order of data.cameras, uint8 (F, any, any, 3) each, as a policy sees them.

        Raises:
            ValueError: another number of cameras, or arrays that are not pictures.
        """
        views = list(frames.values()) if isinstance(frames, Mapping) else list(frames)
        if len(views) != self.cameras:
            raise ValueError(f"{len(views)} cameras for a canvas of {self.cameras}; give one picture of each, in the order of data.cameras")
        for view in views:
            if view.ndim != 4 or view.shape[-1] != 3 or view.dtype != np.uint8 or len(view) != len(views[0]):
                raise ValueError(f"a camera's frames have shape {view.shape} and type {view.dtype}; expected uint8 (F, H, W, 3), with as many frames from every camera")
        return self.place([resize_frames(view, self.stored) for view in views])

    def _seen(self, frames: np.ndarray, look: Look) -> np.ndarray:
        """(F, *stored, 3) to (F, *cell, 3): cut out, and coloured."""
        (h, w), (high, wide) = self.cell, self.stored
        top, left = (min(int(at * (room + 1)), room) for at, room in zip(look.at, (high - h, wide - w), strict=True))
        cut = frames[:, top : top + h, left : left + w]
        return cut if look.colours is None else change_colours(cut, look.colours)

    def _put(self, out: np.ndarray, camera: int, frames: np.ndarray) -> None:
        """A camera's frames (F, *cell, 3) into the canvas."""
        if self.layout == "separate":
            out[camera] = frames
        elif self.layout == "t" and camera == 0:
            pairs = out[:, : self.cell[0]].reshape(*frames.shape[:3], 2, 3)  # a view: every column twice
            for twice in range(2):
                for colour in range(3):  # bytes a stride apart, which numpy copies eight times as fast as pixels
                    pairs[..., twice, colour] = frames[..., colour]
        else:
            number = camera + (self.layout == "t")  # the cell after the first row's two
            row, column = divmod(number, grid_of(self.layout, self.cameras)[1])
            h, w = self.cell
            out[:, row * h : (row + 1) * h, column * w : (column + 1) * w] = frames


def compose(frames_by_camera: Mapping[str, np.ndarray], layout: Layout, size: tuple[int, int], crop: float = 1.0) -> np.ndarray:
    """Pictures of several cameras as the canvas a policy was trained on; see `Canvas.compose`.

    Args:
        frames_by_camera: uint8 (F, any, any, 3) each, in the order of data.cameras.
        size: (H, W) of the canvas.
        crop: data.augment.crop of the training config.
    """
    return Canvas(layout, len(frames_by_camera), size, crop).compose(frames_by_camera)
