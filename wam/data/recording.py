"""Recording robots as they run, successes and failures alike, into a LeRobot dataset that training reads.

    observe -> act -> ...        EpisodeBuffer     row i: what was seen at control step i, what was then sent and what was done of it
    episode over                 Recording.add     root/.recording/NAME.mp4 of each camera, then NAME.npz: an episode is there when that is
    now and then, at the end     assemble          root/meta, data, videos: all episodes so far as one dataset (v3.0), replaced as a whole

Episodes are staged apart, so a recording that is interrupted, by a crash too, goes on with the same command and holds no half episode; nor
does it ever hold a name twice.  Staged files stay, since more may come; delete `.recording` to close a recording for good.

A robot that is looked at less often than it acts has no frame of its own at some rows: they hold the one before, `frame_every` in
info.json says so, and windows begin only where a frame was really seen.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from wam.data.outcomes import DONE, SUCCESS
from wam.data.writer import LeRobotWriter
from wam.data.writer_stats import pixel_histogram
from wam.data.writer_video import encode_video
from wam.files import atomic_path, write_json_atomic

STAGING, ASSEMBLING, SETTINGS = ".recording", ".assembling", "settings.json"
STATE, ACTION, EXECUTED = "observation.state", "action", "action.executed"
PARTS = ("data", "videos", "meta")  # of a dataset; meta last, for with it the dataset is there
Outcome = Literal["success", "failed", "stopped", "crashed"]
Facts = Mapping[str, int | float | str]


@dataclass(frozen=True)
class RecordingFormat:
    """What all episodes of a recording have in common.

    Attributes:
        fps: control steps a second.
        cameras: (height, width) by the feature's name, e.g. observation.images.front.
        state_names, action_names: one for each dimension.
        frame_every: control steps between two frames that are really seen.
    """

    fps: int
    cameras: Mapping[str, tuple[int, int]]
    state_names: tuple[str, ...]
    action_names: tuple[str, ...]
    robot_type: str | None = None
    frame_every: int = 1

    @property
    def features(self) -> dict[str, dict[str, Any]]:
        """LeRobot's."""
        videos = {key: {"dtype": "video", "shape": [*size, 3], "names": ["height", "width", "channels"]} for key, size in self.cameras.items()}
        vectors = {STATE: self.state_names, ACTION: self.action_names, EXECUTED: self.action_names}
        flags = {name: {"dtype": "bool", "shape": [1], "names": None} for name in (SUCCESS, DONE)}
        return {**videos, **{key: {"dtype": "float32", "shape": [len(names)], "names": list(names)} for key, names in vectors.items()}, **flags}


@dataclass
class EpisodeBuffer:
    """One episode while it goes on; what `begin` and `add` are told is copied.

    Attributes:
        task: the instruction.
    """

    form: RecordingFormat
    task: str
    _frames: dict[str, list[np.ndarray]] = field(default_factory=dict)
    _states: list[np.ndarray] = field(default_factory=list)
    _actions: list[np.ndarray] = field(default_factory=list)
    _executed: list[np.ndarray] = field(default_factory=list)
    _success: list[bool] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self._actions)

    def begin(self, frames: Mapping[str, np.ndarray], state: np.ndarray) -> None:
        """What is seen before the first action: (H, W, 3) uint8 of every camera, and the state.

        Raises:
            ValueError: other cameras or sizes than the recording's.
        """
        self._check(frames)
        self._frames = {key: [frames[key].copy()] for key in self.form.cameras}
        self._states = [self._vector(state, self.form.state_names, "state")]

    def add(self, action: np.ndarray, state: np.ndarray, frames: Mapping[str, np.ndarray] | None = None, executed: np.ndarray | None = None, success: bool = False) -> None:
        """One control step: what was sent, and what was seen after it.

        Args:
            frames: None where no frame is due (see `frame_every`): the last one is held.
            executed: what the robot really did, where that is known to differ from what it was sent.

        Raises:
            ValueError: sizes that do not fit, or a frame that is missing where one is due.
        """
        assert self._states, "begin() comes before add()"
        due = (len(self) + 1) % self.form.frame_every == 0
        if due and frames is None:
            raise ValueError(f"control step {len(self) + 1} of an episode has no frame, but one is due every {self.form.frame_every} steps")
        if frames is not None and not due:
            raise ValueError(f"control step {len(self) + 1} of an episode has a frame, but one is due every {self.form.frame_every} steps")
        if frames is not None:
            self._check(frames)
        sent = self._vector(action, self.form.action_names, "action")
        done = sent if executed is None else self._vector(executed, self.form.action_names, "executed action")
        self._actions.append(sent)
        self._executed.append(done)
        self._success.append(bool(success))
        self._states.append(self._vector(state, self.form.state_names, "state"))
        for key, seen in self._frames.items():
            seen.append(seen[-1] if frames is None else frames[key].copy())

    def rows(self, outcome: Outcome) -> dict[str, np.ndarray]:
        """The columns (T, ...) of an episode that is over; one that was cut off (stopped, crashed) has no `next.done`, for nobody knows what would have come."""
        done = np.zeros(len(self), np.bool_)
        done[-1] = outcome in ("success", "failed")
        vectors = {STATE: self._states[:-1], ACTION: self._actions, EXECUTED: self._executed}
        return {**{key: np.stack(values) for key, values in vectors.items()}, SUCCESS: np.array(self._success, np.bool_), DONE: done}

    def video(self, camera: str) -> np.ndarray:
        """(T, H, W, 3) uint8: what was seen before each action."""
        return np.stack(self._frames[camera][:-1])

    def _check(self, frames: Mapping[str, np.ndarray]) -> None:
        found = {key: (frame.shape, str(frame.dtype)) for key, frame in frames.items()}
        wanted = {key: ((*size, 3), "uint8") for key, size in self.form.cameras.items()}
        if found != wanted:
            raise ValueError(f"frames to record are {found}; this recording has {wanted}")

    @staticmethod
    def _vector(values: np.ndarray, names: Sequence[str], what: str) -> np.ndarray:
        out = np.array(values, np.float32)
        if out.shape != (len(names),):
            raise ValueError(f"a {what} to record has shape {out.shape}; this recording has {len(names)} dimensions: {', '.join(names)}")
        return out


class Recording:
    """Episodes in a directory; see the module's docstring."""

    def __init__(self, root: Path, form: RecordingFormat):
        """Begin a recording, or go on with one.

        Raises:
            FileExistsError: the directory holds something that is no recording.
            ValueError: a recording of another robot, rate or camera (named).
        """
        self.root, self.form, self.staging = Path(root), form, Path(root) / STAGING
        settings = json.loads(json.dumps(asdict(form)))
        path = self.staging / SETTINGS
        if path.is_file():
            earlier = json.loads(path.read_text())
            differences = [f"{name} {earlier.get(name)!r}, now {value!r}" for name, value in settings.items() if earlier.get(name) != value]
            if differences:
                raise ValueError(f"{root} holds a recording of something else ({'; '.join(differences)}); choose another directory")
            return
        foreign = sorted(p.name for p in self.root.iterdir() if p.name != STAGING) if self.root.is_dir() else []
        if foreign:
            raise FileExistsError(f"{root} is not empty ({', '.join(foreign[:5])}) and no recording that can go on; choose another directory")
        write_json_atomic(path, settings)

    @property
    def names(self) -> list[str]:
        """Episodes that are whole, in order of their names."""
        return sorted(path.stem for path in self.staging.glob("[!.]*.npz"))  # what begins with a dot is being written, or was when its process was killed

    def has(self, name: str) -> bool:
        """Whether an episode is there."""
        return (self.staging / f"{name}.npz").is_file()

    def add(self, name: str, episode: EpisodeBuffer, outcome: Outcome, facts: Facts | None = None) -> bool:
        """Keep an episode that is over, unless one of its name is there; one without any step is none.  Returns whether it was kept.

        Args:
            name: without slashes, e.g. of policy, mode and seed.
            facts: further columns of the table of episodes, e.g. the seed.

        Raises:
            ValueError: a name that is none, or numbers that are not finite.
            OSError: the disk is full; the episode is then not there.
        """
        if not name or "/" in name or name.startswith("."):
            raise ValueError(f"an episode cannot be called {name!r}; use letters, digits, - and _")
        if self.has(name) or len(episode) == 0:
            return False
        rows = episode.rows(outcome)
        for key, values in rows.items():
            if not np.isfinite(values).all():
                raise ValueError(f"episode {name}: {key} is not finite in row {int(np.argwhere(~np.isfinite(values))[0][0])}; it was not recorded")
        histograms = {}
        for camera in self.form.cameras:
            frames = episode.video(camera)
            encode_video(frames, self._video(name, camera), self.form.fps)
            histograms[f"histogram/{camera}"] = pixel_histogram(frames)
        told = json.dumps({"task": episode.task, "facts": {"name": name, "outcome": outcome, **(facts or {})}})
        with atomic_path(self.staging / f"{name}.npz") as temporary:  # last: with it the episode is there
            arrays: dict[str, Any] = {**rows, **histograms, "told": np.array(told)}
            np.savez_compressed(temporary, **arrays)
        return True

    def assemble(self, about: Mapping[str, Any] | None = None) -> bool:
        """Make all episodes so far one dataset, in the place of the one before; returns whether there was anything to do.

        Between the two the directory is for a moment no dataset; if the process dies just then, the next call makes it again.

        Args:
            about: what else info.json says under `wam`, e.g. versions.

        Raises:
            OSError: the disk is full; episodes are kept.
        """
        names, info = self.names, self.root / "meta/info.json"
        if not names or (info.is_file() and json.loads(info.read_text())["wam"]["recording"]["episodes"] == names):
            return False
        told = [self._told(name) for name in names]
        made = self.root / ASSEMBLING
        shutil.rmtree(made, ignore_errors=True)
        writer = LeRobotWriter(made, self.form.fps, self.form.features, self.form.robot_type, {**(about or {}), **self._provenance(names, told)})
        columns = [name for name, feature in self.form.features.items() if feature["dtype"] != "video"]
        facts = dict.fromkeys(key for entry in told for key in entry["facts"])
        for name, entry in zip(names, told, strict=True):
            with np.load(self.staging / f"{name}.npz") as stored:
                videos = {camera: (self._video(name, camera), stored[f"histogram/{camera}"]) for camera in self.form.cameras}
                writer.add_episode({key: stored[key] for key in columns}, videos, entry["task"], {**facts, **entry["facts"]})  # type: ignore[dict-item]
        writer.finalize()
        info.unlink(missing_ok=True)  # from here until `meta` is back there is no dataset
        for part in PARTS:
            shutil.rmtree(self.root / part, ignore_errors=True)
            if (made / part).is_dir():
                (made / part).rename(self.root / part)
        shutil.rmtree(made)
        return True

    def _told(self, name: str) -> dict[str, Any]:
        with np.load(self.staging / f"{name}.npz") as stored:
            out: dict[str, Any] = json.loads(str(stored["told"]))
        return out

    def _provenance(self, names: Sequence[str], told: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """What a reader must know: how often frames were seen, what came of the episodes, and by environment their seeds, so that none of them is evaluated on."""
        facts = [entry["facts"] for entry in told]
        counts = {outcome: sum(f["outcome"] == outcome for f in facts) for outcome in ("success", "failed", "stopped", "crashed")}
        seeds: dict[str, dict[str, list[int]]] = {}
        for f in facts:
            if "seed" in f and "environment" in f:
                seeds.setdefault(f["environment"].rpartition("/")[2], {"accepted": [], "rejected": []})["accepted"].append(int(f["seed"]))
        seeds = {task: {kind: sorted(set(values)) for kind, values in of.items()} for task, of in seeds.items()}
        return {"recording": {"frame_every": self.form.frame_every, "outcomes": counts, "episodes": list(names)}, "seeds": seeds}

    def _video(self, name: str, camera: str) -> Path:
        return self.staging / f"{name}.{camera}.mp4"
