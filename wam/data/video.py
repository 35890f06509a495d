"""Frames out of video files, by index.

PyAV reads by default: it knows where each packet of an mp4 lies, gives the decoder those that lead to the frames asked for and nothing
else, and refuses what its decoder reports as damaged.  decord and torchcodec can stand in its place, or before it; what the first cannot
read is read by the next, and that is counted.  All number frames in the order they are shown and return the same pixels up to rounding.

    packets    K p K p K p K p K p        K: a key frame, from which decoding can begin
    asked          ^       ^              decoded: K p . . K p, at two places of the file; nothing is sought, nothing is read twice

A file that was cut short is refused before a decoder sees it: decoders may repeat the last frame, or wait for ever.
Readers are state: they live in a `VideoDecoder`, a few at a time, and never cross into another process.
"""

from __future__ import annotations

import gc
import mmap
import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, Literal, Protocol

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter

Backend = Literal["decord", "pyav", "torchcodec"]
CHECKED = 64  # frames held at a time while a file is looked at
DENSE = 3  # decord: where at least one frame in three is asked for, reading on is faster than seeking each


class VideoError(ValueError):
    """A video that cannot give the frames asked for; the message names the file, what was asked, what was found and the remedy."""


class Reader(Protocol):
    """An open file."""

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Frames (n, H, W, 3) at indices that rise strictly."""


@dataclass
class DecodeCounts:
    """What a decoder did in its process.

    Attributes:
        decord, pyav, torchcodec: frames read with each.
        fallbacks: why the backend before the one that is used did not read a file, by path.
    """

    decord: int = 0
    pyav: int = 0
    torchcodec: int = 0
    fallbacks: dict[str, str] = field(default_factory=dict)


class VideoDecoder:
    """Reads frames with the first backend that can; keeps a few files open.

    Args:
        backends: in order of preference.
        open_files: how many files stay open; the least recently used is closed.
    """

    def __init__(self, backends: Sequence[Backend] = ("pyav",), open_files: int = 8):
        if not backends or not set(backends) <= set(OPENERS) or len(set(backends)) < len(backends):
            raise ValueError(f"video backends are {list(backends)}; expected some of {', '.join(OPENERS)}, each once")
        self.backends = tuple(backends)
        self.open_files = open_files
        self.counts = DecodeCounts()
        self._readers: OrderedDict[Path, tuple[Backend, Reader]] = OrderedDict()
        self._process = os.getpid()
        self._inherited: list[Any] = []

    def read_frames(self, path: str | Path, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Frames at `indices` (any order, repeats allowed), uint8 (n, H, W, 3).

        Raises:
            VideoError: a missing, damaged or truncated file, or frames beyond its end; a backend that is not installed, if it is the last.
        """
        path, asked = Path(path), np.asarray(indices, dtype=np.int64)
        if asked.ndim != 1 or len(asked) == 0 or asked.min() < 0:
            raise VideoError(f"{path}: asked for the frames {asked.tolist()}; expected a list of indices from 0")
        self._forget_the_parents()
        rising, back = np.unique(asked, return_inverse=True)
        backend, frames = self._read(path, rising)
        setattr(self.counts, backend, getattr(self.counts, backend) + len(rising))
        return frames if len(rising) == len(asked) and np.array_equal(rising, asked) else frames[back]

    def _read(self, path: Path, rising: np.ndarray) -> tuple[Backend, np.ndarray]:
        """Frames from the backend that has the file open, or else from the first of those after it that gives them."""
        if path in self._readers:
            self._readers.move_to_end(path)
        else:
            check_whole(path)
        untried = self.backends if path not in self._readers else self.backends[self.backends.index(self._readers[path][0]) :]
        failures: dict[Backend, Exception] = {}
        for backend in untried:
            try:
                _, reader = self._readers[path] if path in self._readers else self._keep(path, backend, OPENERS[backend](path))
                return backend, reader.read(rising)
            except Exception as error:  # decord raises its own errors and plain ones; the next backend gives the frames, or the reason
                self._readers.pop(path, None)
                failures[backend] = error
                if backend != self.backends[-1]:
                    self.counts.fallbacks[str(path)] = _first_line(error)
        backend = "pyav" if "pyav" in failures else self.backends[-1]  # PyAV says best what is wrong with a file
        raise _as_video_error(path, rising, backend, failures[backend]) from failures[backend]

    def _keep(self, path: Path, backend: Backend, reader: Reader) -> tuple[Backend, Reader]:
        _keep_what_forks_inherit()
        self._readers[path] = (backend, reader)
        while len(self._readers) > self.open_files:
            self._readers.popitem(last=False)
        return backend, reader

    def _forget_the_parents(self) -> None:
        """After a fork the parent's readers are unusable here: their threads do not exist, and closing them would wait for those."""
        if os.getpid() != self._process:
            self._inherited.append(self._readers)
            self._readers, self._process, self.counts = OrderedDict(), os.getpid(), DecodeCounts()

    def __getstate__(self) -> dict[str, Any]:
        return {"backends": self.backends, "open_files": self.open_files}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]


@cache
def _keep_what_forks_inherit() -> None:
    """From now on a forked process never collects its parent's garbage: a reader in it would wait for threads that exist there alone."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=gc.freeze)


class DecordReader:
    """A file open in decord."""

    def __init__(self, path: Path):
        import decord

        decord.logging.set_level(decord.logging.QUIET)  # what is wrong with a file is said once, by an error
        self.path = path
        self.video = decord.VideoReader(str(path), num_threads=1)

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Frames at rising indices, uint8 (n, H, W, 3)."""
        if indices[-1] >= len(self.video):
            raise _too_short(self.path, int(indices[-1]), len(self.video))
        first, span = int(indices[0]), int(indices[-1] - indices[0]) + 1
        if span <= DENSE * len(indices):
            return self.video.get_batch(list(range(first, first + span))).asnumpy()[indices - first]
        return self.video.get_batch(indices.tolist()).asnumpy()


class PacketReader:
    """An mp4 open in PyAV, packet by packet: where each lies in the file is read once, and the decoder is given what it needs.

        fed        packets from the last key frame that leads to a frame, in the order of the file (decode order)
        position   of the packet that comes next; reading on from there starts no new run
        shown      the last frame that came out of this run; None where nothing is under way

    A decoder may keep frames back (B-frames, AV1): then packets beyond the frame are fed until it comes, and at the end it is drained.

    Raises:
        VideoError: it cannot be opened, or has packets without timestamps.
        NotPackets: a packet is not a run of the file's bytes, or the decoder's settings change on the way.
    """

    LOOKAHEAD = 40  # packets fed beyond the one of a frame before the decoder is drained; codecs reorder at most 16

    def __init__(self, path: Path):
        self.path = path
        container, stream, packets = _demux(path)
        with container, path.open("rb") as file:
            if path.stat().st_size == 0 or "mp4" not in container.format.name:
                raise NotPackets
            self.bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            if any(p.pos is None or p.has_sidedata("new_extradata") or self.bytes[p.pos : p.pos + p.size] != bytes(p) for p in packets):
                raise NotPackets
            self.time_base = stream.time_base
            self.codec = av.CodecContext.create(stream.codec_context.name, "r")
            self.codec.extradata, self.codec.thread_count = stream.codec_context.extradata, 1
        self.places = [(p.pos, p.pos + p.size, p.pts, p.dts) for p in packets]
        frames = sorted((p.pts, i) for i, p in enumerate(packets) if not p.is_discard)
        self.packet = [i for _, i in frames]  # of each frame, in the order they are shown
        self.number = {time: n for n, (time, _) in enumerate(frames)}
        self.keys = [i for i, p in enumerate(packets) if p.is_keyframe]
        self.colours = VideoReformatter()  # one for all frames: making it costs far more than using it
        self.position, self.shown = 0, None  # type: int, int | None

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Frames at rising indices, uint8 (n, H, W, 3)."""
        if indices[-1] >= len(self.packet):
            raise _too_short(self.path, int(indices[-1]), len(self.packet))
        wanted, found = set(indices.tolist()), {}  # type: set[int], dict[int, np.ndarray]
        for index in indices.tolist():
            if index not in found:
                try:
                    self._run_to(index, wanted, found)
                except av.error.FFmpegError as error:
                    self.shown = None
                    raise _damaged(self.path, index, _first_line(error)) from error
        return np.stack([found[index] for index in indices.tolist()])

    def _run_to(self, index: int, wanted: set[int], found: dict[int, np.ndarray]) -> None:
        """Decode until frame `index` is there; other frames that are wanted are kept on the way."""
        target, first = self.packet[index], self._key(index)
        if self.shown is None or index <= self.shown or first > self.position:
            self.codec.flush_buffers()
            self.position, self.shown, self.sought = first, -1, self.number.get(self.places[first][2], 0)
        while index not in found and self.position < min(target + self.LOOKAHEAD, len(self.places)):
            self._keep(self.codec.decode(self._packet(self.position)), index, wanted, found)
            self.position += 1
        if index not in found:
            self._keep(self.codec.decode(None), index, wanted, found)
            self.shown = None
        if index not in found:
            raise VideoError(f"{self.path}: asked for frame {index} of {len(self.packet)}, but the decoder does not give it; the file is damaged: copy or record it again")

    def _keep(self, frames: Sequence[Any], index: int, wanted: set[int], found: dict[int, np.ndarray]) -> None:
        for frame in frames:
            number = self.number.get(frame.pts, -1)
            if number < self.sought:  # shown before the key frame: it may lack what it refers to
                continue
            if frame.is_corrupt:
                self.shown = None
                raise _damaged(self.path, index, "a frame is incomplete")
            if number in wanted:
                found[number] = self.colours.reformat(frame, format="rgb24", threads=1).to_ndarray()
            self.shown = number

    def _packet(self, i: int) -> Any:
        start, stop, pts, dts = self.places[i]
        packet = av.Packet(self.bytes[start:stop])
        packet.pts, packet.dts, packet.time_base = pts, dts, self.time_base
        return packet

    def _key(self, index: int) -> int:
        """The last key packet from which a frame is still to come: before it in the file, and shown no later."""
        time = self.places[self.packet[index]][2]
        for key in reversed(self.keys[: bisect_right(self.keys, self.packet[index])]):
            if self.places[key][2] <= time:
                return key
        raise VideoError(f"{self.path}: no key frame leads to frame {index} of {len(self.packet)}; convert the file")


class NotPackets(Exception):
    """A file that has to be read through its demuxer."""


def open_pyav(path: Path) -> Reader:
    """A file in PyAV: packet by packet where that can be, else through the demuxer."""
    try:
        return PacketReader(path)
    except NotPackets:
        return PyavReader(path)


def _demux(path: Path) -> tuple[Any, Any, list[Any]]:
    """A file and its first video stream, with all packets of it; nothing is decoded."""
    try:
        container = av.open(str(path))
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        packets: list[Any] = [p for p in container.demux(stream) if p.size]
    except (av.error.FFmpegError, IndexError) as error:
        raise VideoError(f"{path}: cannot be opened as a video ({_first_line(error)}); copy or record it again") from error
    if not packets or any(p.pts is None for p in packets):
        raise VideoError(f"{path}: {len(packets)} packets, some or all without a timestamp; convert it to mp4")
    return container, stream, packets


class PyavReader:
    """A file open in PyAV, with the presentation time of every frame, from the packets (nothing is decoded for that).

    Frame i is the i-th in order of presentation time, whatever the rate or the first timestamp.  Reading on from where the last
    call ended does not seek.  A frame whose decoder reports damage is refused, as is what builds on it; decord conceals some damage.
    """

    def __init__(self, path: Path):
        self.path = path
        self.container, self.stream, packets = _demux(path)
        packets = [p for p in packets if not p.is_discard]
        times = sorted(p.pts for p in packets)
        self.number = {time: i for i, time in enumerate(times)}
        keys = sorted((self.number[p.pts], p.pts if p.dts is None else p.dts) for p in packets if p.is_keyframe)
        self.keys, self.key_times = [number for number, _ in keys], [time for _, time in keys]  # frames, and when they are decoded
        self.colours = VideoReformatter()  # one for all frames: making it costs far more than using it
        self.frames: Iterator[av.VideoFrame] = iter(())
        self.next = len(times)  # the frame that comes next; none before the first seek
        self.sought = 0  # the key frame of the last seek; what is shown before it may lack what it refers to

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Frames at rising indices, uint8 (n, H, W, 3)."""
        if indices[-1] >= len(self.number):
            raise _too_short(self.path, int(indices[-1]), len(self.number))
        return np.stack([self._frame(int(i)) for i in indices])

    def _frame(self, index: int) -> np.ndarray:
        key = bisect_right(self.keys, index) - 1
        if self.next > index or (key >= 0 and self.keys[key] > self.next):  # behind us, or a key frame is nearer than we are
            self._seek(index)
        while (frame := self._take(index)) is not None:
            number = self.number.get(frame.pts, -1)
            self.next = max(self.next, number + 1)
            if number == index:
                return self.colours.reformat(frame, format="rgb24", threads=1).to_ndarray()
        raise VideoError(
            f"{self.path}: asked for frame {index}, but decoding ended before it, after frame {self.next - 1} of {len(self.number)}; the file is damaged: copy or record it again"
        )

    def _seek(self, index: int) -> None:
        """Go to the last key frame from which `index` is still to come; demuxers differ in what they seek by."""
        for key in range(bisect_right(self.keys, index) - 1, -1, -1):
            self.sought = self.keys[key]
            self.container.seek(self.key_times[key], stream=self.stream)
            self.frames = self.container.decode(self.stream)
            first = self._take(index)
            number = -1 if first is None else self.number.get(first.pts, -1)
            if first is not None and 0 <= number <= index:
                self.frames, self.next = chain([first], self.frames), number
                return
        raise VideoError(f"{self.path}: no key frame leads to frame {index} of {len(self.number)}; convert the file")

    def _take(self, index: int) -> av.VideoFrame | None:
        """The next decoded frame, on the way to `index`; None at the end of the file."""
        try:
            frame = next(self.frames, None)
        except av.error.FFmpegError as error:
            raise _damaged(self.path, index, _first_line(error)) from error
        if frame is not None and frame.is_corrupt and self.number.get(frame.pts, -1) >= self.sought:
            raise _damaged(self.path, index, "a frame is incomplete")
        return frame


class TorchcodecReader:
    """A file open in torchcodec, which needs the libraries of an FFmpeg on this machine; frames are numbered by a scan of the file."""

    def __init__(self, path: Path):
        try:
            from torchcodec.decoders import VideoDecoder as Decoder
        except (ImportError, OSError, RuntimeError) as error:  # it is not there, or its libraries cannot be loaded
            raise VideoError(
                f"{path}: torchcodec cannot be loaded ({_first_line(error)}); pip install 'wam[torchcodec]' and FFmpeg 4 or newer, or read with decord or pyav"
            ) from error
        self.path = path
        self.video = Decoder(str(path), dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="exact")

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Frames at rising indices, uint8 (n, H, W, 3)."""
        if indices[-1] >= len(self.video):
            raise _too_short(self.path, int(indices[-1]), len(self.video))
        return self.video.get_frames_at(indices.tolist()).data.numpy()


OPENERS: dict[Backend, Callable[[Path], Reader]] = {"decord": DecordReader, "pyav": open_pyav, "torchcodec": TorchcodecReader}


def broken_files(frames: Mapping[Path, int], decoder: VideoDecoder, look_at: Literal["ends", "all"] = "ends") -> dict[Path, str]:
    """Why files cannot be used, by path.

    Args:
        frames: how many frames each file should have, at least 1 (`LeRobotDataset.frames_needed`).
        look_at: the first and the last frame, which finds what is missing or cut short; or all, which with PyAV also finds what is damaged.
    """
    broken: dict[Path, str] = {}
    for path, count in frames.items():
        try:
            for first in [0, count - 1] if look_at == "ends" else range(0, count, CHECKED):
                decoder.read_frames(path, range(first, min(first + CHECKED, count)) if look_at == "all" else [first])
        except VideoError as error:
            broken[path] = str(error)
    return broken


def check_whole(path: Path) -> None:
    """Refuse an mp4 that is missing, empty, has no index, or ends before its last box does.  Reads a few bytes.

    Raises:
        VideoError: naming the file and what is missing.
    """
    if not path.is_file():
        raise VideoError(f"no video file {path}; copy the dataset again, with its videos/")
    size = path.stat().st_size
    if path.suffix.lower() not in (".mp4", ".mov", ".m4v"):
        return
    names, at = set(), 0
    with path.open("rb") as stream:
        while at < size:
            stream.seek(at)
            head = stream.read(16)
            length = int.from_bytes(head[:4], "big")
            length = {0: size - at, 1: int.from_bytes(head[8:16], "big")}.get(length, length)
            if len(head) < 8 or length < 8 or at + length > size:
                raise VideoError(
                    f"{path}: the file is truncated or damaged: its part {head[4:8]!r} should end at byte {at + length}, the file has {size}; copy or record it again"
                )
            names.add(head[4:8])
            at += length
    if b"moov" not in names:
        raise VideoError(f"{path}: there is no index in the file ({size} bytes), its writing was cut short; copy or record it again")


def resize_frames(frames: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 (n, H, W, 3) to (n, *size, 3), bilinear with antialiasing; each axis on its own, so another aspect ratio stretches."""
    if frames.shape[1:3] == tuple(size):
        return frames
    dense = frames.ravel().reshape(frames.shape)  # with the strides of new arrays: for others, such as of picture[None], torch takes several times as long
    pixels = torch.from_numpy(dense).permute(0, 3, 1, 2)  # as bytes: an order of magnitude faster, within a level of exact
    small = torch.nn.functional.interpolate(pixels, size=tuple(size), mode="bilinear", antialias=True, align_corners=False)
    return small.permute(0, 2, 3, 1).contiguous().numpy()


def _damaged(path: Path, index: int, why: str) -> VideoError:
    return VideoError(f"{path}: decoding failed on the way to frame {index} ({why}); the file is damaged: copy or record it again")


def _too_short(path: Path, asked: int, found: int) -> VideoError:
    return VideoError(
        f"{path}: asked for frame {asked}, but the file has {found} frames (0..{found - 1}); the video is shorter than the dataset says: copy or record it again"
    )


def _as_video_error(path: Path, indices: np.ndarray, backend: Backend, error: Exception) -> VideoError:
    if isinstance(error, VideoError):
        return error
    remedy = "copy or record the file again" if backend == "pyav" else "read it with pyav, or copy or record the file again"
    return VideoError(f"{path}: {backend} cannot decode the frames {indices[0]}..{indices[-1]} ({_first_line(error)}); {remedy}")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
