"""What the files of every LeRobot version share: an episode, a feature, and reading JSON, JSON lines and parquet with care.

    lerobot_v2, lerobot_v3  ->  ({task index: text}, [Episode, ...])  ->  LeRobotDataset

What cannot be read, or contradicts itself, is refused by name: the error says which file, what was found, what was expected and how
to mend it.  Nothing is repaired here, and nothing is made up for what is missing.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq


class DatasetError(ValueError):
    """A dataset that cannot be read or contradicts itself; the message names the file, what was found and the remedy."""


@dataclass(frozen=True)
class Feature:
    """A column, or a camera where `dtype` is "video"."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class VideoSpan:
    """Where an episode lies in an mp4, which may hold several episodes.

    Attributes:
        from_timestamp, to_timestamp: seconds in the file.
        first_frame: index in the file of the frame of the episode's first row.
    """

    path: Path
    from_timestamp: float
    to_timestamp: float
    first_frame: int


@dataclass(frozen=True)
class Episode:
    """One recording: `length` rows of `data_file`, and a span of an mp4 for each camera.

    Attributes:
        tasks: the instructions, at least one in a dataset that was read; which holds when, `LeRobotDataset.words` says.
    """

    index: int
    length: int
    tasks: tuple[str, ...]
    data_file: Path
    videos: dict[str, VideoSpan]

    @property
    def instruction(self) -> str:
        """The first instruction."""
        return self.tasks[0]


Metadata = tuple[dict[int, str], list[Episode]]
MetadataReader = Callable[[Path, dict[str, Any], dict[str, Feature]], Metadata]  # (root, info.json, features)


def cameras_of(features: dict[str, Feature]) -> list[str]:
    """The keys of the features that are videos."""
    return [key for key, feature in features.items() if feature.dtype == "video"]


def read_json(path: Path) -> Any:
    """A JSON file.

    Raises:
        FileNotFoundError: no such file.
        DatasetError: it is not JSON.
    """
    _require_file(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{path} is not valid JSON ({error}); copy or record the dataset again") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; of a key that stands in it twice, JSON would take the last, silently."""
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} stands in an object twice")
    return content


def read_json_lines(path: Path, keys: Iterable[str]) -> list[dict[str, Any]]:
    """The objects of a .jsonl file, one a line; each must have `keys`.  Empty lines are passed over.

    Raises:
        FileNotFoundError: no such file.
        DatasetError: a line that is not an object with these keys; says which.
    """
    _require_file(path)
    rows: list[dict[str, Any]] = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except ValueError as error:
        raise DatasetError(f"{path} is not a text file ({error}); copy or record the dataset again") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DatasetError(f"{path}, line {number} of {len(lines)} is not valid JSON ({error}); copy or record the dataset again") from error
        missing = [key for key in keys if key not in row] if isinstance(row, dict) else list(keys)
        if missing:
            raise DatasetError(f"{path}, line {number} of {len(lines)} lacks {', '.join(missing)}; expected an object with {', '.join(keys)}")
        rows.append(row)
    return rows


def read_table(path: Path, columns: Iterable[str] | None = None) -> pa.Table:
    """A parquet file, or those of `columns` that it has.

    Raises:
        FileNotFoundError: no such file.
        DatasetError: it is damaged.
    """
    _require_file(path)
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:  # where the writer left checksums
            return file.read(columns=None if columns is None else [name for name in file.schema_arrow.names if name in set(columns)])
    except (pa.ArrowException, OSError) as error:
        raise DatasetError(
            f"{path} cannot be read as parquet ({error}); it is damaged or incomplete ({path.stat().st_size} bytes): copy or record it again"
        ) from error


def read_column(path: Path, key: str, feature: Feature) -> np.ndarray:
    """A numeric column, (rows, *shape) in the feature's dtype; scalars as (rows, 1)."""
    column = _column(path, key)
    rows = len(column)
    column = column.storage if isinstance(column, pa.ExtensionArray) else column
    while pa.types.is_list(column.type) or pa.types.is_large_list(column.type) or pa.types.is_fixed_size_list(column.type):
        if column.null_count:
            break
        column = column.flatten()
    size = math.prod(feature.shape)
    if column.null_count or len(column) != rows * size:
        raise DatasetError(
            f"{path}: column {key!r} holds {len(column)} numbers ({column.null_count} missing) in {rows} rows; its shape {feature.shape} asks for {rows * size}"
        )
    try:
        if np.dtype(feature.dtype).kind not in "biuf":
            raise TypeError(f"{feature.dtype} is no type of numbers")
        array = column.to_numpy(zero_copy_only=False).astype(feature.dtype, copy=False).reshape(rows, *feature.shape)
    except (TypeError, ValueError) as error:
        raise DatasetError(
            f"{path}: column {key!r} holds {column.type}, meta/info.json says {feature.dtype}; correct the dtype there, or record again"
        ) from error
    return array if array.ndim > 1 else array[:, None]


def read_texts(path: Path, key: str) -> list[str]:
    """A column of strings; a missing one is empty."""
    column = _column(path, key)
    column = column.dictionary_decode() if pa.types.is_dictionary(column.type) else column
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type) or pa.types.is_null(column.type)):
        raise DatasetError(f"{path}: column {key!r} holds {column.type}, meta/info.json says string; correct the dtype there, or record again")
    return [text or "" for text in column.to_pylist()]


def episode_rows(path: Path) -> dict[int, slice]:
    """Which rows of a data file belong to which episode; they must lie together and in order."""
    episodes = read_column(path, "episode_index", Feature("int64", (1,)))[:, 0]
    frames = read_column(path, "frame_index", Feature("int64", (1,)))[:, 0]
    counted = {name: _numbers(path, name) for name in ("index", "timestamp")}
    edges = np.flatnonzero(np.diff(episodes)) + 1
    starts, stops = np.concatenate([[0], edges]), np.concatenate([edges, [len(episodes)]])
    runs: dict[int, slice] = {}
    for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
        if start == stop:
            continue
        episode = int(episodes[start])
        if episode in runs or not np.array_equal(frames[start:stop], np.arange(stop - start)):
            raise DatasetError(
                f"{path}: the rows of episode {episode} are not in order (frame_index must count 0, 1, 2, ... within it); record the dataset again"
            )
        steps = {name: np.diff(values[start:stop]) for name, values in counted.items() if values is not None}
        if not (np.all(steps.get("index", 1) == 1) and np.all(steps.get("timestamp", 1) > 0)):
            raise DatasetError(
                f"{path}: the rows of episode {episode} are not in order (index must count up by 1 and timestamp must rise within it); record or copy the dataset again"
            )
        runs[episode] = slice(start, stop)
    return runs


def _numbers(path: Path, key: str) -> np.ndarray | None:
    """A column of numbers that a file may have, (rows,)."""
    with contextlib.suppress(pa.ArrowException, OSError):  # whoever reads its columns says what is wrong with it
        if key not in pq.read_schema(path).names:
            return None
    return read_column(path, key, Feature("float64" if key == "timestamp" else "int64", (1,)))[:, 0]


def place(root: Path, name: str, template: Any, **where: Any) -> Path:
    """A path by a template of info.json."""
    if not template:
        raise DatasetError(f"{root / 'meta/info.json'} has no {name}; add the template LeRobot writes")
    try:
        return root / template.format(**where)
    except (KeyError, IndexError, ValueError, TypeError, AttributeError) as error:
        raise DatasetError(f"{root / 'meta/info.json'}: {name} {template!r} does not take {', '.join(where)}; copy or record the dataset again") from error


def check_numbering(path: Path, numbers: list[Any]) -> None:
    """Episodes must be numbered 0, 1, 2, ... once each; `numbers` are sorted."""
    if numbers != list(range(len(numbers))):
        shown = ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")
        raise DatasetError(f"{path} lists the episodes {shown}; expected 0, 1, 2, ... once each: record or copy the dataset again")


def is_count(value: Any, least: int = 0) -> TypeGuard[int]:
    """Whether a value of a JSON file is a whole number of at least `least`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def add_task(path: Path, tasks: dict[int, str], index: Any, text: Any) -> None:
    """One more instruction from a table of tasks; it must be in words, and its index its own."""
    if not is_count(index) or not isinstance(text, str):
        raise DatasetError(f"{path}: task_index is {index!r} and task {text!r}; expected a whole number and an instruction in words")
    if index in tasks:
        raise DatasetError(f"{path}: task {index} is both {tasks[index]!r} and {text!r}; leave one")
    tasks[index] = text


def task_texts(path: Path, index: int, tasks: Any, known: dict[int, str]) -> tuple[str, ...]:
    """The instructions of an episode, as its table has them; () where it has none.  Those in words must be among the tasks of the dataset."""
    texts = [] if tasks is None else tasks
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise DatasetError(f"{path}: the tasks of episode {index} are {tasks!r}; expected a list of instructions")
    unknown = [text for text in texts if text.strip() and text not in known.values()]
    if unknown:
        raise DatasetError(
            f"{path}: episode {index} has the task {unknown[0]!r}, which meta/tasks does not list; the files are of different datasets: copy them again"
        )
    return tuple(texts)


def check_counts(path: Path, index: Any, length: Any) -> None:
    """An episode's number and length must be whole numbers, with at least one row."""
    if not is_count(index) or not is_count(length, 1):
        raise DatasetError(f"{path}: episode_index is {index!r} and length {length!r}; expected whole numbers, with at least one row")


def _column(path: Path, key: str) -> pa.Array:
    table = read_table(path, [key])
    if key not in table.column_names:
        raise DatasetError(f"{path} has no column {key!r}, which meta/info.json lists; copy or record the dataset again")
    column = table.column(key).combine_chunks()
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}, which the dataset's metadata names; copy the dataset again, with all its files")
