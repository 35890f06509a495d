"""Checks of time: whether pictures and rows belong together, at which rate, and whether an episode holds a window.

When a robot moves, its picture changes.  So the energy of motion in the frames and the speed of the state, row by row, rise and fall
together; where one has to be shifted against the other to agree, the dataset has them out of step.

    energy[i] = mean |frame[i + 1] - frame[i]|        speed[i] = |state[i + 1] - state[i]|, every dimension in its own deviation

Compared are their logarithms, less a running mean: what holds up slowly (a door that swings, an arm near the camera) would shift the
peak of the plain correlation by many rows, and on the sample it does; sudden starts and stops do not.

Actions are not used for it: they lead what they cause by the robot's own delay, which is no mistake.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np

from wam.data.check.evidence import TIMESTAMP, Evidence, read_json
from wam.data.check.findings import Finding, Level, some
from wam.data.normalize import SMALLEST_RANGE
from wam.data.windows import block_rows, rows_at

MOST_LAG = 0.6  # seconds in which a shift is looked for, at most a quarter of the shortest episode
AGREES, GAIN = 0.2, 0.05  # least correlation at the best shift, and how much better than no shift it must be
WINDOW, LEAST_WINDOW = 0.2, 9  # of the running mean: seconds, and rows where these are fewer
MOST_FILES = 2000  # videos whose index is looked at; of more, about as many evenly over all
MOST_EPISODES = 2 / 3  # share of the episodes that must be better off with the shift


@dataclass(frozen=True)
class Lag:
    """How frames and rows agree when they are shifted.

    Attributes:
        lags: in rows; positive: the picture moves later than the state.
        correlation: (lags,) mean over episodes.
        better: share of the episodes that agree better at the best shift than at none.
    """

    lags: np.ndarray
    correlation: np.ndarray
    better: float

    @property
    def best(self) -> int:
        """The shift with the highest correlation, the smaller of equal ones."""
        return int(self.lags[np.lexsort((np.abs(self.lags), -self.correlation.round(6)))[0]])

    @property
    def sure(self) -> bool:
        """Whether the best shift is more than chance."""
        peak, none = self.correlation.max(), self.correlation[np.flatnonzero(self.lags == 0)[0]]
        return bool(peak >= AGREES and (self.best == 0 or (peak - none >= GAIN and self.better >= MOST_EPISODES)))


def speed(rows: np.ndarray, deviation: np.ndarray) -> np.ndarray:
    """(rows - 1,) how fast a state moves, every dimension in its own deviation; what does not move counts nothing."""
    moves = deviation >= SMALLEST_RANGE
    return np.asarray(np.linalg.norm(np.diff(rows[:, moves], axis=0) / deviation[moves], axis=1))


def measure_lag(evidence: Evidence, camera: str) -> Lag | None:
    """The shift between a camera and the states; None where there is nothing to compare."""
    clips = evidence.clips.get(camera, [])
    if not evidence.state or not clips:
        return None
    deviation = np.concatenate(evidence.state).std(0)
    pairs = [(clip.energy, speed(evidence.state[clip.episode], deviation)) for clip in clips]
    window = max(round(WINDOW * evidence.dataset.fps), LEAST_WINDOW) | 1
    pairs = [(_sudden(e, window), _sudden(s, window)) for e, s in pairs if len(e) >= 2 * window and e.std() > 0 and s.std() > 0]
    if not pairs:
        return None
    most = min(round(MOST_LAG * evidence.dataset.fps), min(len(e) for e, _ in pairs) // 4)
    lags = np.arange(-most, most + 1)
    table = np.array([[_correlation(s, e, int(lag)) for lag in lags] for e, s in pairs])  # (episodes, lags)
    mean = table.mean(0)
    return Lag(lags, mean, float((table[:, mean.argmax()] > table[:, most]).mean()))


def _sudden(values: np.ndarray, window: int) -> np.ndarray:
    """The logarithm (from a tenth of the mean up, below which there is only noise), less its running mean."""
    logs = np.log(values + 0.1 * values.mean())
    padded = np.pad(logs, window // 2, mode="edge")
    return np.asarray(logs - np.convolve(padded, np.ones(window) / window, mode="valid"))


def _correlation(speed_: np.ndarray, energy: np.ndarray, lag: int) -> float:
    rows = np.arange(max(0, -lag), min(len(speed_), len(speed_) - lag))
    a, b = speed_[rows], energy[rows + lag]
    return float(np.corrcoef(a, b)[0, 1]) if a.std() > 0 and b.std() > 0 else 0.0


def in_step(evidence: Evidence) -> list[Finding]:
    """Frames and rows that are shifted against each other."""
    found = []
    for camera in evidence.config.data.cameras:
        lag = measure_lag(evidence, camera)
        if lag is None:
            continue
        if not lag.sure:
            found.append(
                Finding(
                    "info",
                    "in_step",
                    camera,
                    f"motion in the picture and of the state agree at {lag.correlation.max():.2f} at best",
                    f"at least {AGREES}, clearly at one shift",
                    "nothing can be said about a shift; look at the plot",
                )
            )
        elif abs(lag.best) > 1:
            seconds, none = lag.best / evidence.dataset.fps, lag.correlation[np.flatnonzero(lag.lags == 0)[0]]
            late = "the picture moves after the state" if lag.best > 0 else "the picture moves before the state"
            found.append(
                Finding(
                    "error",
                    "in_step",
                    camera,
                    f"{late}: they agree best when shifted by {lag.best:+d} rows ({seconds:+.3f} s; correlation {lag.correlation.max():.2f}, unshifted {none:.2f})",
                    "at most one row",
                    "find the delay of camera or recorder and shift the rows by it",
                )
            )
    return found


def rates(evidence: Evidence) -> list[Finding]:
    """Rows a second: what the dataset says, its timestamps, its videos, and the checkpoint that training goes on from."""
    return [*_timestamp_rates(evidence), *_video_rates(evidence), *_model_rates(evidence)]


def _timestamp_rates(evidence: Evidence) -> list[Finding]:
    """Whether rows are as far apart as the dataset says."""
    fps, found = evidence.dataset.fps, list[Finding]()
    steps = [np.diff(rows[:, 0]) for rows in evidence.rows.get(TIMESTAMP, []) if len(rows) > 1]
    if steps:
        gaps = np.concatenate(steps)
        median = float(np.median(gaps))
        uneven = float((np.abs(gaps * fps - 1) > 0.5).mean())
        if not 0.99 < median * fps < 1.01:
            real = f"{1 / median:.4g} rows a second" if median > 0 else "no time between rows"
            found.append(
                Finding(
                    "error",
                    "rates",
                    "timestamp",
                    f"{real} ({median:.4g} s apart)",
                    f"fps = {fps:g} of meta/info.json",
                    "correct fps, or record with the rate it says",
                )
            )
        elif uneven > 0.01:
            found.append(
                Finding(
                    "warning",
                    "rates",
                    "timestamp",
                    f"{uneven:.1%} of the steps are more than half a step off",
                    f"even steps of {1 / fps:.4g} s",
                    "resample the recording: the model has one clock",
                )
            )
    return found


def _video_rates(evidence: Evidence) -> list[Finding]:
    """Whether videos have a frame for every row, at the dataset's rate."""
    fps, found = evidence.dataset.fps, list[Finding]()
    files = sorted({path: count for camera in evidence.clips for path, count in evidence.dataset.frames_needed(camera).items()}.items())
    for path, needed in files[:: max(1, len(files) // MOST_FILES)]:
        rate, frames = _video_rate(path) if path.is_file() else (None, 0)
        if frames > needed:  # fewer are an error of reading
            found.append(
                Finding(
                    "warning",
                    "rates",
                    str(path),
                    f"{frames} frames",
                    f"{needed}: one for every row of the episodes in it",
                    "see whether the file belongs to other episodes, or copy or record them again",
                )
            )
        if rate is not None and abs(rate / fps - 1) > 0.01:
            found.append(
                Finding(
                    "error",
                    "rates",
                    str(path),
                    f"{rate:.4g} frames a second",
                    f"fps = {fps:g} of meta/info.json: a frame for every row",
                    "encode the videos at the dataset's rate, or correct fps",
                )
            )
    return found


def _model_rates(evidence: Evidence) -> list[Finding]:
    """How long blocks and windows are in seconds, and whether a checkpoint was trained at this rate."""
    fps, found = evidence.dataset.fps, list[Finding]()
    clock = evidence.config.data.control_hz or fps  # control steps a second of the model
    meta = None
    if evidence.checkpoint is not None:
        from wam.pretrained import META  # takes seconds: only where there is a checkpoint

        meta = read_json(evidence.checkpoint / META)
    if meta and meta.get("control_hz") and abs(float(meta["control_hz"]) / clock - 1) > 0.01:
        found.append(
            Finding(
                "error",
                "rates",
                str(evidence.checkpoint),
                f"trained at {float(meta['control_hz']):g} control steps a second",
                f"{'the dataset' if clock == fps else 'data.control_hz'}'s {clock:g}",
                f"set data.control_hz={float(meta['control_hz']):g}, or start from another checkpoint",
            )
        )
    t = evidence.config.timeline
    if t.frame_stride is not None:
        found.append(
            Finding(
                "info",
                "rates",
                "timeline",
                f"a block of {t.actions_per_block} control steps lasts {t.actions_per_block / clock:.3g} s with frames {t.frame_stride / clock:.3g} s apart, a window {t.blocks * t.actions_per_block / clock:.3g} s",
                "the pace you meant",
                "change timeline.frame_stride and actions_per_block for another",
            )
        )
    return found


def _video_rate(path: Path) -> tuple[float | None, int]:
    """Frames a second and frames, as the file's index says; None and 0 where it does not, or cannot be read, which reading it reports."""
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            return (float(stream.average_rate) if stream.average_rate else None), stream.frames
    except (av.error.FFmpegError, IndexError):
        return None, 0


def windows(evidence: Evidence) -> list[Finding]:
    """Episodes in which no window, or no whole one, fits."""
    t, lengths = evidence.config.timeline, [episode.length for episode in evidence.dataset.episodes]
    pace = evidence.dataset.fps / (evidence.config.data.control_hz or evidence.dataset.fps)
    block, window = block_rows(t, pace), int(rows_at(t.blocks * t.actions_per_block, pace))
    none = [i for i, length in enumerate(lengths) if length <= block]
    padded = [i for i, length in enumerate(lengths) if block < length <= window]
    found = []
    if none:
        level: Level = "error" if len(none) == len(lengths) else "warning"
        found.append(
            _short(level, none, lengths, f"shorter than a block ({block} + 1 rows) and never seen", f"at least {block + 1} rows")
        )
    if padded:
        found.append(_short("info", padded, lengths, "shorter than a window, which is padded", f"more than {window} rows"))
    return found


def _short(level: Level, episodes: Sequence[int], lengths: Sequence[int], words: str, expected: str) -> Finding:
    shortest = min(lengths[i] for i in episodes)
    return Finding(
        level,
        "windows",
        f"episodes {some(episodes)}",
        f"{len(episodes)} of {len(lengths)} episodes are {words}; the shortest has {shortest} rows",
        expected,
        "use a smaller timeline.actions_per_block or fewer blocks, or record longer episodes",
    )
