"""Frames come out by index, the same from both decoders; damaged files are refused by name."""

import pickle
from pathlib import Path

import lerobot_fixture as fixture
import numpy as np
import pytest
from PIL import Image

from wam.data.video import VideoDecoder, VideoError, resize_frames

LENGTH = 60


@pytest.fixture(scope="module", params=[(2, 0), (2, 1), (12, 3), (250, 2)], ids=lambda p: f"gop{p[0]}-b{p[1]}")
def video(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    gop, b_frames = request.param
    path = tmp_path_factory.mktemp("video") / "file-000.mp4"
    fixture.write_video(path, list(range(LENGTH)), gop=gop, b_frames=b_frames)
    return path


@pytest.mark.parametrize("backend", ["decord", "pyav"])
def test_frames_by_index(video: Path, backend: str) -> None:
    decoder = VideoDecoder((backend,))
    rng = np.random.default_rng(0)
    for asked in ([0], [LENGTH - 1], [7, 7, 3], range(LENGTH), [LENGTH - 2, LENGTH - 1, LENGTH - 1], *(rng.integers(0, LENGTH, 9) for _ in range(12))):
        frames = decoder.read_frames(video, list(asked))
        assert frames.dtype == np.uint8 and frames.shape[1:] == (64, 64, 3)
        assert [fixture.read_stamp(frame) for frame in frames] == list(asked)
    assert not decoder.counts.fallbacks and (decoder.counts.decord > 0) == (backend == "decord")


def test_both_decoders_give_the_same_pixels(video: Path) -> None:
    frames = [VideoDecoder((backend,)).read_frames(video, range(LENGTH)).astype(int) for backend in ("decord", "pyav")]
    assert np.abs(frames[0] - frames[1]).max() <= 2


def test_av1_falls_back_to_pyav_and_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "av1.mp4"
    fixture.write_video(path, list(range(12)), codec="libsvtav1")
    decoder = VideoDecoder()
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
