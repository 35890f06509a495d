"""Reading LeRobot datasets: what is in the files, and nothing about windows, training or pixels.

A dataset is a list of `Episode`s: how long each is, which rows of which parquet file hold it, which frames of which mp4, and what
it was asked to do.  A format version is one function that makes that list (`_READERS`); everything after it is the same for all:

    meta/info.json  ->  lerobot_v2 | lerobot_v3  ->  [Episode, ...]  ->  read(episode, key) -> (length, d) array
    meta/modality.json  ->  further keys for slices, cameras and annotations       words(episode) -> instruction of every row

Files are checked against each other when they are read.  What does not agree is refused by name: a dataset that was cut short by
a full disk must not train a policy quietly.  Columns are small: each is loaded once, when first asked for, and kept.
"""

from __future__ import annotations

import difflib
import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from wam.data.language import Span, Words, first_written
from wam.data.lerobot_files import DatasetError, Episode, Feature, MetadataReader, VideoSpan, episode_rows, is_count, read_column, read_json, read_texts
from wam.data.lerobot_modality import Modality, read_embodiment, read_modality
from wam.data.lerobot_stats import Stats, read_stats
from wam.data.lerobot_v2 import read_v2
from wam.data.lerobot_v3 import read_v3

__all__ = ["DatasetError", "Episode", "Feature", "LeRobotDataset", "Modality", "Span", "Split", "VideoSpan", "Words"]

Split = Literal["train", "validation"]
TASKS = "task_index"  # the column of LeRobot's own language: an index into the tasks
_READERS: dict[str, MetadataReader] = {"v2.0": read_v2, "v2.1": read_v2, "v3.0": read_v3}


class LeRobotDataset:
    """A dataset in a directory; metadata is read at once, columns when asked for.

    Args:
        root: its directory, or `hf:OWNER/NAME` (`hf:OWNER/NAME@REVISION`) for one on the Hugging Face Hub, which is downloaded.
        language: the columns that say what is asked: "task_index", columns of strings, `annotation.*`; of several, the first that says
            something at a row.  Empty: the tasks of the episode table, and where there are none, the dataset's column of instructions.

    Attributes:
        fps: control steps (and frames) a second.
        features: columns and cameras by key.
        modality: further names, from meta/modality.json: they can be read like columns and cameras.
        embodiment: the tag in meta/embodiment.json, or None.
        tasks: instructions by task index.
        episodes: in order of their index.
        language: the columns that say what is asked.

    Raises:
        FileNotFoundError: no dataset there; says what is missing.
        DatasetError: another version, damaged files, or files that contradict each other.
    """

    def __init__(self, root: str | Path, language: Sequence[str] = ()):
        self.root = _locate(root)
        self.info = _read_info(self.root)
        self.fps = float(self.info["fps"])
        self.features = {key: _feature(self.root, key, value) for key, value in self.info["features"].items()}
        self.modality = read_modality(self.root, self.features)
        self.embodiment = read_embodiment(self.root)
        self.tasks, self.episodes = _READERS[self.info["codebase_version"]](self.root, self.info, self.features)
        self._check_totals()
        self._columns: dict[tuple[Path, str], np.ndarray] = {}
        self._texts: dict[tuple[Path, str], list[str]] = {}
        self._rows: dict[Path, dict[int, slice]] = {}
        self._words: dict[tuple[int, str | None], Words] = {}
        single = tuple(self.tasks.values()) if len(self.tasks) == 1 else ()
        self._listed = [e.tasks or single for e in self.episodes]  # by the episode table, whatever `language` says
        self.episodes = [
            replace(e, tasks=listed, videos=e.videos | {name: e.videos[key] for name, key in self.modality.videos.items()})
            for e, listed in zip(self.episodes, self._listed, strict=True)
        ]
        self.language = self._choose_language(tuple(language))
        if self.language != (TASKS,):
            self.episodes = [replace(e, tasks=self.words(e.index).texts) for e in self.episodes]

    def feature(self, key: str) -> Feature:
        """A feature by key, or by a name of meta/modality.json.

        Raises:
            ValueError: there is none; the nearest name is given.
        """
        if key in self.features:
            return self.features[key]
        if key in self.modality.groups:
            group = self.modality.groups[key]
            return Feature(self.features[group.column].dtype, (group.stop - group.start,))
        names = self.modality.videos | self.modality.annotations
        if key in names:
            return self.features[names[key]]
        known = [*self.features, *self.modality.groups, *names]
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(sorted(known))}"
        raise DatasetError(f"{self.root} has no feature {key!r}; {hint}")

    @property
    def frame_every(self) -> int:
        """Rows between two frames that were really seen, as a recording of a robot that acts more often than it looks says (`wam.data.recording`): in between, the last one is held."""
        return int(((self.info.get("wam") or {}).get("recording") or {}).get("frame_every", 1))

    def camera(self, key: str) -> Feature:
        """A feature that is a video.

        Raises:
            ValueError: no such feature, or it is not a video; the cameras are listed.
        """
        feature = self.feature(key)
        if feature.dtype != "video":
            cameras = ", ".join(k for k, f in self.features.items() if f.dtype == "video") or "none"
            raise DatasetError(f"feature {key!r} of {self.root} has dtype {feature.dtype!r}; a camera has dtype 'video' (videos in this dataset: {cameras})")
        return feature

    def read(self, episode: int, key: str) -> np.ndarray:
        """A column of an episode, (length, *shape) in the feature's dtype; scalars as (length, 1).

        Raises:
            ValueError: unknown key or a key that is not a numeric column.
            DatasetError: the file is damaged, or its rows disagree with the metadata.
        """
        feature = self.feature(key)
        if feature.dtype in ("video", "image", "string"):
            raise DatasetError(f"feature {key!r} of {self.root} has dtype {feature.dtype!r}; only numeric columns can be read as arrays")
        if key in self.modality.groups:
            group = self.modality.groups[key]
            return self.read(episode, group.column)[:, group.start : group.stop]
        key = self.modality.annotations.get(key, key)
        meta = self.episodes[episode]
        rows = self._rows_of(meta)
        stored = (meta.data_file, key)
        if stored not in self._columns:
            self._columns[stored] = read_column(meta.data_file, key, feature)
        return self._columns[stored][rows]

    def instruction(self, episode: int, row: int) -> str:
        """What the robot is asked to do at a row of an episode."""
        return self.words(episode).at(row)

    def words(self, episode: int, key: str | None = None) -> Words:
        """The instructions of an episode and which holds at each row; `key` asks for one column instead of `language`.

        Raises:
            ValueError: no such column, or one that holds no language.
            DatasetError: rows without an instruction, or with a task that the dataset does not list.
        """
        if (episode, key) not in self._words:
            columns = [self._words_in(self.episodes[episode], name) for name in (self.language if key is None else (key,))]
            words = columns[0] if key is not None else first_written(columns)
            if isinstance(words, int):
                raise DatasetError(
                    f"{self.episodes[episode].data_file}: row {words} of episode {episode} has no instruction in {', '.join(self.language)}; "
                    "leave the episode out, or name another column as language"
                )
            self._words[episode, key] = words
        return self._words[episode, key]

    def spans(self, episode: int, key: str | None = None) -> list[Span]:
        """Runs of rows under one instruction, in order; together they are the episode.  Raises as `words`."""
        return self.words(episode, key).spans()

    def alternatives(self, episode: int, row: int) -> tuple[str, ...]:
        """Every wording of the instruction at a row: what the columns of `language` say, each once, empty ones left out."""
        texts = [self.words(episode, name).at(row) for name in self.language]
        return tuple(dict.fromkeys(text for text in texts if text.strip()))

    def stats(self) -> Stats:
        """What the dataset says about its columns, by feature and then "min", "max", "mean", "std", "count"; empty where it says nothing.

        Raises:
            DatasetError: damaged statistics, or of other episodes than these.
        """
        return read_stats(self.root, self.info["codebase_version"], len(self.episodes))

    def frames_needed(self, camera: str) -> dict[Path, int]:
        """How many frames each video of a camera must have, by file: up to the last one that an episode shows."""
        self.camera(camera)
        needed: dict[Path, int] = defaultdict(int)
        for episode in self.episodes:
            span = episode.videos[camera]
            needed[span.path] = max(needed[span.path], span.first_frame + episode.length)
        return dict(needed)

    def split(self, validation_fraction: float) -> dict[Split, list[int]]:
        """Episode indices for training and validation: the last part of each task's episodes is held out.

        Where the fraction is positive, a task with two episodes or more gives at least one to each side.  Episodes that info.json
        lists as `discarded_episode_indices` are in neither.
        """
        discarded = set(self.info.get("discarded_episode_indices") or ())
        by_task: dict[str, list[int]] = defaultdict(list)
        for episode in self.episodes:
            if episode.index not in discarded:
                by_task[episode.instruction].append(episode.index)
        parts: dict[Split, list[int]] = {"train": [], "validation": []}
        for indices in by_task.values():
            held = 0
            if validation_fraction > 0 and len(indices) >= 2:
                held = min(max(1, math.floor(validation_fraction * len(indices) + 0.5)), len(indices) - 1)
            parts["train"] += indices[: len(indices) - held]
            parts["validation"] += indices[len(indices) - held :]
        return {name: sorted(indices) for name, indices in parts.items()}

    def _rows_of(self, episode: Episode) -> slice:
        path = episode.data_file
        if path not in self._rows:
            self._rows[path] = episode_rows(path)
        rows = self._rows[path].get(episode.index)
        found = 0 if rows is None else rows.stop - rows.start
        if rows is None or found != episode.length:
            raise DatasetError(
                f"{path} has {found} rows of episode {episode.index}, but the episode table says {episode.length}; "
                "the recording was cut short or the files are of different datasets: record or copy the dataset again"
            )
        return rows

    def _words_in(self, episode: Episode, key: str) -> Words:
        """The instructions in one column."""
        listed = self._listed[episode.index]
        if key == TASKS and _in_words(listed) and (len(listed) == 1 or TASKS not in self.features):
            return Words(listed[:1], np.zeros(episode.length, np.int64))
        feature = self.feature(key)
        if feature.dtype == "string":
            column = self.modality.annotations.get(key, key)
            rows, stored = self._rows_of(episode), (episode.data_file, column)
            if stored not in self._texts:
                self._texts[stored] = read_texts(*stored)
            return Words.of(self._texts[stored][rows])
        if not feature.dtype.startswith("int") or math.prod(feature.shape) != 1:
            raise DatasetError(f"feature {key!r} of {self.root} is {feature.dtype} of shape {feature.shape}; language is a task index (int64) or a string")
        numbers = self.read(episode.index, key)[:, 0].tolist()
        unknown = next((number for number in numbers if number not in self.tasks), None)
        if unknown is not None:
            raise DatasetError(
                f"{episode.data_file}: {key} of episode {episode.index} is {unknown}, and the dataset lists {len(self.tasks)} tasks without it; "
                "the files are of different datasets: record or copy the dataset again"
            )
        words = Words.of([self.tasks[number] for number in numbers])
        if key == TASKS and _in_words(listed) and not set(words.texts) <= set(listed):
            raise DatasetError(
                f"{episode.data_file}: the rows of episode {episode.index} have the tasks {list(words.texts)}, the episode table says {list(listed)}; "
                "the files are of different datasets: record or copy the dataset again"
            )
        return words

    def _choose_language(self, asked: tuple[str, ...]) -> tuple[str, ...]:
        """The columns to take instructions from."""
        if asked:
            for key in asked:
                self.feature(key)
            return asked
        silent = [number for number, listed in enumerate(self._listed) if not _in_words(listed)]
        if not silent:
            return (TASKS,)
        columns = list(self.modality.annotations) or [key for key, feature in self.features.items() if _may_be_language(key, feature)]
        families = {re.sub(r"_\d+$", "", key) for key in columns}  # language_instruction, language_instruction_2: two wordings of the same
        if len(families) == 1:
            return tuple(columns)
        if columns:
            raise DatasetError(f"{self.root}: the episodes list no tasks, and {', '.join(columns)} may hold the instructions; say which with `language`")
        raise DatasetError(
            f"{self.root}: episode {silent[0]} has no instruction (its tasks are {list(self._listed[silent[0]])!r}); "
            "give every episode a task in words, in the tasks and the episodes of meta/, or record a column of instructions"
        )

    def _check_totals(self) -> None:
        found = {"total_episodes": len(self.episodes), "total_frames": sum(e.length for e in self.episodes)}
        for name, count in found.items():
            if self.info.get(name) != count:
                raise DatasetError(
                    f"{self.root / 'meta/info.json'} says {name} = {self.info.get(name)}, but the episode table adds up to {count}; "
                    "the recording was cut short or the files are of different datasets: record or copy the dataset again"
                )
        discarded = self.info.get("discarded_episode_indices") or []
        if not isinstance(discarded, list) or not all(is_count(e) and e < len(self.episodes) for e in discarded):
            raise DatasetError(f"{self.root / 'meta/info.json'}: discarded_episode_indices is {discarded!r}; expected episodes of 0..{len(self.episodes) - 1}")


def _locate(root: str | Path) -> Path:
    """The directory of a dataset; one on the Hub is downloaded, or found where it was before."""
    if not str(root).startswith("hf:"):
        return Path(root)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    name, _, revision = str(root).removeprefix("hf:").strip("/").partition("@")
    try:
        return Path(snapshot_download(name, repo_type="dataset", revision=revision or None))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise DatasetError(
            f"{root} cannot be fetched from the Hugging Face Hub ({str(error).strip().splitlines()[0]}); "
            "check the name (hf:OWNER/NAME), the network and `hf auth login`, or give a directory"
        ) from error


def _read_info(root: Path) -> dict[str, Any]:
    path = root / "meta/info.json"
    if not root.is_dir():
        raise FileNotFoundError(f"no dataset directory {root}; record one with `wam collect`, or set data.root")
    if not path.is_file():
        raise FileNotFoundError(f"{root} is not a LeRobot dataset: meta/info.json is missing; give the directory that holds meta/, data/ and videos/")
    info = read_json(path)
    missing = [key for key in ("codebase_version", "fps", "features", "data_path") if key not in info] if isinstance(info, dict) else ["every key"]
    if missing:
        raise DatasetError(f"{path} lacks {', '.join(missing)}; a LeRobot dataset has codebase_version, fps, features and data_path")
    if not isinstance(info["codebase_version"], str) or info["codebase_version"] not in _READERS:
        raise DatasetError(
            f"{root} is a LeRobot dataset of version {info['codebase_version']!r}; this version of wam reads {', '.join(_READERS)}: "
            "convert it with the tools of the LeRobot release that wrote it"
        )
    if not isinstance(info["fps"], (int, float)) or not (math.isfinite(info["fps"]) and info["fps"] > 0):
        raise DatasetError(f"{path} says fps = {info['fps']!r}; expected a positive number")
    if not isinstance(info["features"], dict):
        raise DatasetError(f"{path}: features is {info['features']!r}; expected an object of columns and cameras")
    return info


def _feature(root: Path, key: str, value: Any) -> Feature:
    try:
        return Feature(str(value["dtype"]), tuple(int(n) for n in value["shape"]))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise DatasetError(f"{root / 'meta/info.json'}: feature {key!r} is {value!r}; expected a dtype and a shape") from error


def _in_words(tasks: tuple[str, ...]) -> bool:
    return bool(tasks) and all(isinstance(text, str) and text.strip() for text in tasks)


def _may_be_language(key: str, feature: Feature) -> bool:
    """Whether a column is language by its name: the habits of published datasets."""
    if key.startswith("annotation."):
        return feature.dtype == "string" or feature.dtype.startswith("int")
    return feature.dtype == "string" and re.fullmatch(r"(language_)?instruction(_\d+)?|task|language", key) is not None
