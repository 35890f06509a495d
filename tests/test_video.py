"""Frames come out by index, the same from every decoder, H.264 and AV1; damaged files are refused by name."""

import gc
import importlib
import os
import pickle
import signal
import sys
import time
from pathlib import Path

import av
import lerobot_fixture as fixture
import numpy as np
import pytest
from PIL import Image

from wam.data.video import OPENERS, PacketReader, PyavReader, VideoDecoder, VideoError, broken_files, resize_frames

LENGTH = 60


FORMATS = [("libx264", 2, 0), ("libx264", 2, 1), ("libx264", 12, 3), ("libx264", 250, 2), ("libsvtav1", 2, 0), ("libsvtav1", 30, 0)]


@pytest.fixture(scope="module", params=FORMATS, ids=lambda p: f"{p[0]}-gop{p[1]}-b{p[2]}")
def video(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    codec, gop, b_frames = request.param
    if codec not in av.codecs_available:
        pytest.skip(f"this build of PyAV has no encoder {codec}")
    path = tmp_path_factory.mktemp("video") / f"{codec}.mp4"
    fixture.write_video(path, list(range(LENGTH)), codec=codec, gop=gop, b_frames=b_frames)
    return path


def skip_unless_it_reads(backend: str, path: Path) -> None:
    """torchcodec is optional, and published builds of decord have no AV1 decoder; anything else must work."""
    if backend == "torchcodec":
        try:
            importlib.import_module("torchcodec.decoders")
        except (ImportError, OSError, RuntimeError) as error:
            pytest.skip(f"torchcodec cannot be loaded here: {str(error).splitlines()[0]}")
    if backend == "decord" and "av1" in path.name:
        try:
            OPENERS["decord"](path)
        except Exception as error:
            pytest.skip(f"this build of decord does not open AV1: {str(error).splitlines()[0]}")


@pytest.mark.parametrize("backend", OPENERS)
def test_frames_by_index(video: Path, backend: str) -> None:
    skip_unless_it_reads(backend, video)
    decoder = VideoDecoder((backend,))
    rng = np.random.default_rng(0)
    for asked in ([0], [LENGTH - 1], [7, 7, 3], range(LENGTH), [LENGTH - 2, LENGTH - 1, LENGTH - 1], *(rng.integers(0, LENGTH, 9) for _ in range(12))):
        frames = decoder.read_frames(video, list(asked))
        assert frames.dtype == np.uint8 and frames.shape[1:] == (64, 64, 3)
        assert [fixture.read_stamp(frame) for frame in frames] == list(asked)
    assert not decoder.counts.fallbacks and {name for name in OPENERS if getattr(decoder.counts, name)} == {backend}


def test_packets_give_what_the_demuxer_gives(video: Path) -> None:
    """One reader over many calls, in any order: reading on, jumping back, runs and single frames."""
    packets, demuxer, rng = OPENERS["pyav"](video), PyavReader(video), np.random.default_rng(1)
    assert isinstance(packets, PacketReader)
    for _ in range(40):
        first, stride, count = int(rng.integers(0, LENGTH - 12)), int(rng.integers(1, 5)), int(rng.integers(1, 4))
        asked = first + stride * np.arange(count)
        assert np.array_equal(packets.read(asked), demuxer.read(asked)), asked
    other = video.with_suffix(".mkv")
    if not other.exists():
        fixture.write_video(other, list(range(10)))
    assert isinstance(OPENERS["pyav"](other), PyavReader)


@pytest.mark.parametrize("backend", ["decord", "torchcodec"])
def test_all_decoders_give_the_same_pixels(video: Path, backend: str) -> None:
    skip_unless_it_reads(backend, video)
    for asked in (list(range(LENGTH)), [3, 4, 31, 58]):
        frames = [VideoDecoder((name,)).read_frames(video, asked).astype(int) for name in (backend, "pyav")]
        assert np.abs(frames[0] - frames[1]).max() <= 2


def test_backends_are_tried_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.mp4"
    fixture.write_video(path, list(range(12)))
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)  # what an import finds where it is not installed
    decoder = VideoDecoder(("torchcodec", "decord", "pyav"))
    assert fixture.read_stamp(decoder.read_frames(path, [7])[0]) == fixture.read_stamp(decoder.read_frames(path, [7])[0]) == 7
    assert (decoder.counts.torchcodec, decoder.counts.decord, decoder.counts.pyav) == (0, 2, 0)
    with pytest.raises(VideoError, match=r"file.mp4: torchcodec cannot be loaded .* pip install 'wam\[torchcodec\]'"):
        VideoDecoder(("torchcodec",)).read_frames(path, [0])
    with pytest.raises(VideoError, match=r"asked for frame 12, but the file has 12 frames"):
        VideoDecoder(("pyav", "torchcodec")).read_frames(path, [12])
    for backends in ((), ("opencv",), ("pyav", "pyav")):
        with pytest.raises(ValueError, match="expected some of decord, pyav, torchcodec, each once"):
            VideoDecoder(backends)


def test_broken_files_name_themselves(tmp_path: Path) -> None:
    paths = [tmp_path / f"{name}.mp4" for name in ("whole", "cut", "short", "gone")]
    for path in paths[:3]:
        fixture.write_video(path, list(range(10)))
    fixture.truncate(paths[1])
    broken = broken_files({path: 11 if path.stem == "short" else 10 for path in paths}, VideoDecoder())
    assert list(broken) == paths[1:]
    for path, reason in zip(paths[1:], ("the file is truncated", "asked for frame 10, but the file has 10", "no video file"), strict=True):
        assert reason in broken[path] and str(path) in broken[path]


def test_av1_falls_back_to_pyav_and_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "av1.mp4"
    fixture.write_video(path, list(range(12)), codec="libsvtav1")
    decoder = VideoDecoder(("decord", "pyav"))
    assert [fixture.read_stamp(f) for f in decoder.read_frames(path, [9, 2, 11])] == [9, 2, 11]
    assert (decoder.counts.decord, decoder.counts.pyav, list(decoder.counts.fallbacks)) == (0, 3, [str(path)])


@pytest.mark.parametrize("faststart", [False, True])
@pytest.mark.parametrize("backends", [("decord", "pyav"), ("pyav",)])
def test_truncated_files_are_refused(tmp_path: Path, faststart: bool, backends: tuple) -> None:
    path = tmp_path / "file-000.mp4"
    fixture.write_video(path, list(range(40)), faststart=faststart)
    VideoDecoder(backends).read_frames(path, [0, 39])
    fixture.truncate(path)
    with pytest.raises(VideoError, match=r"file-000.mp4: the file is truncated .* copy or record it again"):
        VideoDecoder(backends).read_frames(path, [0])


def test_damaged_missing_and_short_files(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match=r"no video file .*nowhere.mp4"):
        VideoDecoder().read_frames(tmp_path / "nowhere.mp4", [0])
    noise = tmp_path / "noise.mkv"
    noise.write_bytes(b"not a video" * 50)
    with pytest.raises(VideoError, match=r"noise.mkv: cannot be opened"):
        VideoDecoder().read_frames(noise, [0])
    empty = tmp_path / "empty.mp4"
    empty.write_bytes(b"")
    with pytest.raises(VideoError, match=r"empty.mp4: there is no index in the file \(0 bytes\)"):
        VideoDecoder().read_frames(empty, [0])
    short = tmp_path / "short.mp4"
    fixture.write_video(short, list(range(10)))
    for backends in (("decord", "pyav"), ("decord",), ("pyav",)):
        with pytest.raises(VideoError, match=r"short.mp4: asked for frame 10, but the file has 10 frames"):
            VideoDecoder(backends).read_frames(short, [3, 10])
        with pytest.raises(VideoError, match="indices from 0"):
            VideoDecoder(backends).read_frames(short, [-1])


@pytest.mark.parametrize("codec", ["libx264", "libsvtav1"])
def test_damage_anywhere_is_noticed_or_harmless(tmp_path: Path, codec: str) -> None:
    path, damaged, noticed, wrong = tmp_path / "file.mp4", tmp_path / "damaged.mp4", 0, 0
    fixture.write_video(path, list(range(24)), codec=codec, gop=6)
    data, wanted = path.read_bytes(), VideoDecoder(("pyav",)).read_frames(path, range(24))
    for seed in range(80):
        rng, copy = np.random.default_rng(seed), bytearray(data)
        at = int(rng.integers(len(data)))
        copy[at : at + 4] = rng.bytes(len(copy[at : at + 4]))
        damaged.write_bytes(copy)
        broken = broken_files({damaged: 24}, VideoDecoder(("pyav",)), "all")
        noticed += len(broken)
        if not broken:
            wrong += any(not np.array_equal(VideoDecoder(("pyav",)).read_frames(damaged, asked), wanted[asked]) for asked in ([0, 5, 6, 23], list(range(24))))
        try:
            assert VideoDecoder().read_frames(damaged, [0, 23]).shape == (2, 64, 64, 3)
        except VideoError as error:
            assert str(damaged) in str(error)
    assert 20 < noticed < 80 and wrong <= 4, "changed bits can be a valid stream of other pixels, which nothing notices, but seldom"


def test_few_files_stay_open_and_decoders_travel(tmp_path: Path) -> None:
    decoder = VideoDecoder(open_files=2)
    for number in range(4):
        fixture.write_video(tmp_path / f"{number}.mp4", [number, number + 100])
        assert fixture.read_stamp(decoder.read_frames(tmp_path / f"{number}.mp4", [1])[0]) == number + 100
    assert len(decoder._readers) == 2
    copy = pickle.loads(pickle.dumps(decoder))
    assert fixture.read_stamp(copy.read_frames(tmp_path / "0.mp4", [0])[0]) == 0


def test_resize() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (2, 96, 128, 3), dtype=np.uint8)
    assert resize_frames(frames, (96, 128)) is frames
    assert resize_frames(frames, (48, 64)).shape == (2, 48, 64, 3)
    flat = np.full((1, 96, 96, 3), 77, np.uint8)
    assert (resize_frames(flat, (64, 64)) == 77).all()
    wanted = np.asarray(Image.fromarray(frames[0]).resize((50, 40), Image.Resampling.BILINEAR))
    assert np.abs(resize_frames(frames, (40, 50))[0].astype(int) - wanted).max() <= 1, "as Pillow does it"


def test_bytes_damaged_in_the_middle_are_noticed(tmp_path: Path) -> None:
    path = tmp_path / "scratched.mp4"
    fixture.write_video(path, list(range(60)), gop=12, b_frames=2)
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 400] = np.random.default_rng(0).bytes(400)
    path.write_bytes(data)
    for backends in (("decord", "pyav"), ("pyav",)):
        with pytest.raises(VideoError, match=r"scratched.mp4: decoding failed on the way to frame \d+"):
            VideoDecoder(backends).read_frames(path, range(60))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")
def test_a_fork_never_frees_what_its_parent_opened(tmp_path: Path) -> None:
    """A reader's threads exist in the parent alone: a child whose garbage collector met one would wait for them for ever."""
    path = tmp_path / "video.mp4"
    fixture.write_video(path, list(range(40)))
    decoders = [VideoDecoder(("decord",)) for _ in range(12)]  # each would hang in about one case of three
    for decoder in decoders:
        decoder.read_frames(path, [0, 5])
    decoders.append(decoders)  # type: ignore[arg-type]
    gc.disable()
    try:
        del decoder, decoders
        child = os.fork()
        if child == 0:
            gc.collect()
            os._exit(0)
    finally:
        gc.enable()
    until = time.monotonic() + 30
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < until:
        time.sleep(0.01)
    if ended == (0, 0):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert ended == (child, 0)
