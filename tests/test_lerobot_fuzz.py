"""Whatever stands in a dataset's metadata, reading it gives one clear error that names the dataset, or the rows; never anything else.

Every run tries the same random changes: a value of a JSON file becomes another, a column of a table becomes another or is gone, lines
and rows are dropped, doubled or turned round, files are cut.  Values that leave the dataset whole are read, and the rows must be the
right ones.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lerobot_fixture as fixture
import numpy as np
import pandas as pd
import pytest

from wam.data.lerobot import DatasetError, LeRobotDataset

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
