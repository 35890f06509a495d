"""Frames to H.264, one file an episode, and many such files to one without encoding again.

LeRobot v3.0 keeps many episodes in one mp4.  Encoding each episode by itself lets several processes do it and keeps what is finished;
joining copies packets.  A keyframe every second frame makes random access cheap; no B-frames, so that packets are in display order and
an episode's first frame is a keyframe.  The rate factor is low because the images are small: at 64 x 64 a frame takes about 0.7 kB at
42 dB of luma, and what limits the quality is the halved resolution of colour.  x264's "macroblock tree" looks further ahead than a
keyframe lasts, and makes one encoding in a hundred come out differently; without it, the same frames give the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt

from wam.files import atomic_path

CODEC, PIXEL_FORMAT = "h264", "yuv420p"
_OPTIONS = {"crf": "16", "g": "2", "bf": "0", "preset": "medium", "threads": "1", "x264-params": "mbtree=0:rc-lookahead=0"}


def encode_video(frames: npt.NDArray[np.uint8], path: Path, fps: int) -> None:
    """Write frames (T, H, W, 3) as an mp4, atomically.

    Raises:
        ValueError: not uint8 RGB, no frames, or an odd height or width.
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or len(frames) == 0:
        raise ValueError(f"video frames are {frames.dtype} of shape {frames.shape}; expected uint8 (T, H, W, 3) with T >= 1")
    _, height, width, _ = frames.shape
    if height % 2 or width % 2:
        raise ValueError(f"video frames are {height} x {width}; H.264 with 4:2:0 colour needs even sizes")
    with atomic_path(path) as temporary, av.open(str(temporary), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options=_OPTIONS)
        stream.width, stream.height, stream.pix_fmt = width, height, PIXEL_FORMAT
        stream.time_base = Fraction(1, fps)
        for index, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def join_videos(paths: Sequence[Path], path: Path, fps: int) -> None:
    """Copy the frames of several files made by `encode_video` into one, in order, atomically."""
    with atomic_path(path) as temporary, av.open(str(temporary), "w", options={"movflags": "faststart"}) as joined:
        stream, count = None, 0
        for part in paths:
            with av.open(str(part)) as source:
                stream = stream or joined.add_stream_from_template(source.streams.video[0])
                for packet in source.demux(video=0):
                    if packet.size == 0:  # the end of the file
                        continue
                    packet.stream, packet.time_base = stream, Fraction(1, fps)
                    packet.pts = packet.dts = count
                    packet.duration = 1
                    joined.mux(packet)
                    count += 1
