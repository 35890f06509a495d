"""Whatever stands in a dataset's metadata, reading it gives one clear error that names the dataset, or the rows; never anything else.

Every run tries the same random changes: a value of a JSON file becomes another, a column of a table becomes another or is gone, lines
and rows are dropped, doubled or turned round, files are cut.  Values that leave the dataset whole are read, and the rows must be the
right ones.

Files of bytes (mp4, parquet) are damaged at random in a process of its own with a time limit: decoders have been known to wait for ever.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lerobot_fixture as fixture
import numpy as np
import pandas as pd
import pytest

from wam.data.lerobot import DatasetError, LeRobotDataset
from wam.data.video import OPENERS, PacketReader, VideoDecoder, VideoError
from wam.data.writer import LeRobotWriter

LENGTHS = (8, 7, 6, 5)
JUNK: list[Any] = [None, -1, 0, 1.5, "x", "", [], {}, True, float("inf"), float("nan"), 10**20, [None], "{x}", [[1]], {"dtype": None}]
CHANGES = 40  # of each file


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("fuzz")
    v3 = fixture.write_dataset(base / "v3.0", LENGTHS)
    named = fixture.write_flavour(v3, base / "v2.1", "v2.1", modality=True, language="annotation index")
    return {"v3.0": v3, "v2.0": fixture.write_flavour(v3, base / "v2.0", "v2.0"), "v2.1": named}


def places(value: Any, at: tuple = ()) -> Iterator[tuple]:
    """The path to every value inside a value."""
    yield at
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inside:
        yield from places(part, (*at, key))


def changed(value: Any, at: tuple, new: Any) -> Any:
    if not at:
        return new
    copy = value.copy()
    copy[at[0]] = changed(value[at[0]], at[1:], new)
    return copy


def use(root: Path) -> None:
    """Read everything; the rows that come out must be those that were written."""
    dataset = LeRobotDataset(root)
    for episode in dataset.episodes:
        for key, wanted in fixture.columns(episode.index, LENGTHS[episode.index]).items():
            rows = dataset.read(episode.index, key)
            assert rows.dtype.kind != "f" or rows.shape != wanted.shape or np.allclose(rows, wanted, atol=1e-3)
        assert dataset.spans(episode.index)[-1].stop == episode.length
    dataset.split(0.3)
    dataset.frames_needed(fixture.CAMERA)
    dataset.stats()


def refuses_or_reads(root: Path) -> bool:
    """Whether it was refused."""
    try:
        use(root)
    except (DatasetError, FileNotFoundError) as error:
        assert str(root) in str(error) and len(str(error)) > len(str(root)) + 20
        return True
    return False


@pytest.mark.parametrize("version", ["v2.0", "v2.1", "v3.0"])
def test_json_files(roots: dict[str, Path], tmp_path: Path, version: str) -> None:
    root, rng, refused = Path(shutil.copytree(roots[version], tmp_path / "copy")), np.random.default_rng(0), 0
    for path in sorted((root / "meta").glob("*.json")):
        text = path.read_text()
        content = json.loads(text)
        where = list(places(content))
        for _ in range(CHANGES):
            path.write_text(json.dumps(changed(content, where[rng.integers(len(where))], JUNK[rng.integers(len(JUNK))])))
            refused += refuses_or_reads(root)
        path.write_text(text)
    assert refused > CHANGES / 4
    for path in sorted((root / "meta").glob("*.jsonl")):
        data, lines = path.read_bytes(), path.read_text().splitlines()
        where = list(places(json.loads(lines[1])))
        for _ in range(CHANGES):
            line = json.dumps(changed(json.loads(lines[1]), where[rng.integers(len(where))], JUNK[rng.integers(len(JUNK))]))
            path.write_text("\n".join([lines[0], line, *lines[2:]]))
            refuses_or_reads(root)
        for other in (data[:-3], b"\xff\xfe" + data, b"", data + data):
            path.write_bytes(other)
            assert refuses_or_reads(root)
        path.write_text("\n".join(lines[::-1]))
        assert not refuses_or_reads(root), "the order of lines says nothing"
        path.write_bytes(data)
    use(root)


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_tables(roots: dict[str, Path], tmp_path: Path, version: str) -> None:
    root = Path(shutil.copytree(roots[version], tmp_path / "copy"))
    for path in sorted(root.rglob("*.parquet"))[:3]:
        data, table = path.read_bytes(), pd.read_parquet(path)
        for column in sorted(set(table.columns) - set(fixture.columns(0, 1))):  # other numbers in those are other data
            for value in (None, -1, 10**9, 1.5, "x", [1, 2]):
                table.assign(**{column: [value] * len(table)}).to_parquet(path)
                refuses_or_reads(root)
            table.drop(columns=column).to_parquet(path)
            refuses_or_reads(root)
        for rows in (table.iloc[:-1], table.iloc[:0], pd.concat([table, table])):
            rows.to_parquet(path)
            assert refuses_or_reads(root), f"{path.name} with {len(rows)} rows"
        for kept in (0, 3, len(data) // 2, len(data) - 1):
            path.write_bytes(data[:kept])
            assert refuses_or_reads(root)
        path.write_bytes(data)
    use(root)


# ------------------------------------------------------------------------------------------------ rows out of order


def test_rows_in_another_order_are_told_whatever_frame_index_says(roots: dict[str, Path], tmp_path: Path) -> None:
    root = Path(shutil.copytree(roots["v3.0"], tmp_path / "copy"))
    path = root / "data/chunk-000/file-000.parquet"
    table = pd.read_parquet(path)
    order = np.arange(len(table))
    order[[2, 3]] = order[[3, 2]]
    for kept in (["frame_index"], ["frame_index", "index"], ["frame_index", "timestamp"]):
        table.iloc[order].assign(**{name: table[name].to_numpy() for name in kept}).to_parquet(path)
        assert refuses_or_reads(root), f"rows 2 and 3 changed places, all but their {kept}"
    table.iloc[order].sort_values("frame_index", kind="stable").sort_values("episode_index", kind="stable").to_parquet(path)
    assert not refuses_or_reads(root), "the order as it was"
    table.assign(action=[row.astype(np.float64) for row in table["action"]]).to_parquet(path)
    assert not refuses_or_reads(root), "the same numbers in another type"


# ------------------------------------------------------------------------------------------------ bytes

CASES = 80  # of each kind of file
LONG = 400  # seconds for all of them; they take five


def damaged(data: bytes, rng: np.random.Generator, where: range) -> tuple[bytes, range]:
    """Bytes with one piece changed, and where: a bit, a byte, a run of zeros, or two runs that change places."""
    out, at, size = bytearray(data), int(rng.integers(where.start, where.stop)), int(rng.integers(2, 64))
    kind = rng.integers(4)
    if kind == 0:
        out[at] ^= 1 << int(rng.integers(8))
    elif kind == 1:
        out[at] = int(rng.integers(256))
    elif kind == 2:
        out[at : at + size] = bytes(len(out[at : at + size]))
    else:
        out[at : at + size] = out[at : at + size][::-1]
    return bytes(out[: len(data)]), range(at, at + (size if kind > 1 else 1))


def fuzz_video(folder: Path) -> dict[str, int]:
    """Damage an mp4 everywhere: refused by name, or as many frames as before; those whose packets are whole are the same."""
    path, seen = folder / "file-000.mp4", {"refused": 0, "same": 0, "other pixels": 0}
    fixture.write_video(path, list(range(30)))
    data, frames, rng = path.read_bytes(), VideoDecoder().read_frames(path, range(30)), np.random.default_rng(0)
    reader = OPENERS["pyav"](path)
    assert isinstance(reader, PacketReader)
    packets = [range(start, stop) for start, stop, *_ in reader.places]
    for case in range(CASES):
        within = range(packets[0].start, packets[-1].stop) if case % 2 else range(len(data))
        broken, changed_at = damaged(data, rng, within)
        path.write_bytes(broken)
        for asked in (np.arange(30), rng.permutation(30)[:7]):
            try:
                found = VideoDecoder().read_frames(path, asked)
            except VideoError as error:
                assert str(path) in str(error) and ";" in str(error)
                seen["refused"] += 1
                continue
            assert found.shape == frames[asked].shape
            differ = (found != frames[asked]).any(axis=(1, 2, 3))
            seen["other pixels" if differ.any() else "same"] += 1
            if case % 2:  # a key frame is every second: damage reaches no further than the frames that build on it
                hit = {n for n in range(30) for p in (packets[n], packets[n - n % 2]) if max(p.start, changed_at.start) < min(p.stop, changed_at.stop)}
                assert set(asked[differ].tolist()) <= hit, (case, asked[differ], hit)
    return seen


def fuzz_parquet(folder: Path) -> dict[str, int]:
    """Damage the rows that our writer wrote: refused by name, or the same rows; never others."""
    root, seen, rng = folder / "set", {"refused": 0, "same": 0}, np.random.default_rng(1)
    features = {key: {"dtype": "float32", "shape": [4], "names": None} for key in fixture.columns(0, 1)}
    writer = LeRobotWriter(root, fixture.FPS, features)
    for episode, length in enumerate(LENGTHS):
        writer.add_episode(fixture.columns(episode, length), {}, fixture.TASKS[episode % 2])
    writer.finalize()
    for path in [root / "data/chunk-000/file-000.parquet", root / "meta/episodes/chunk-000/file-000.parquet", root / "meta/tasks.parquet"]:
        data = path.read_bytes()
        for _ in range(CASES // 2):
            path.write_bytes(damaged(data, rng, range(len(data)))[0])
            try:
                dataset = LeRobotDataset(root)
                rows = [dataset.read(e, key) for e in range(len(LENGTHS)) for key in features]
                texts = [dataset.instruction(e, 0) for e in range(len(LENGTHS))]
            except (DatasetError, FileNotFoundError) as error:
                assert str(root) in str(error) and ";" in str(error), error
                seen["refused"] += 1
                continue
            wanted = [fixture.columns(e, length)[key] for e, length in enumerate(LENGTHS) for key in features]
            assert all(np.array_equal(a, b) for a, b in zip(rows, wanted, strict=True)), path
            assert texts == [fixture.TASKS[e % 2] for e in range(len(LENGTHS))], path
            seen["same"] += 1
        path.write_bytes(data)
    return seen


@pytest.mark.parametrize("kind", ["video", "parquet"])
def test_random_bytes(kind: str, tmp_path: Path) -> None:
    run = subprocess.run([sys.executable, __file__, kind, str(tmp_path)], capture_output=True, text=True, timeout=LONG, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    seen = json.loads(run.stdout.splitlines()[-1])
    assert seen["refused"] > 20 and seen["same"] > 5
    assert seen.get("other pixels", 0) < CASES  # an mp4 has no checksums: a changed bit can be another picture


if __name__ == "__main__":
    print(json.dumps({"video": fuzz_video, "parquet": fuzz_parquet}[sys.argv[1]](Path(sys.argv[2]))))
