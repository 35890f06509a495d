"""Windows of any timeline, at any pair of rates, in any spans: compared with a second computation that shares nothing with the first.

The first rounds products of floats.  The second looks for rows by their time, in fractions of a second, one by one:

    rows       at  r / fps                a frame or state at time t: the row nearest to it, of two equally near the later
    steps      at  start / fps + j / hz   an action at time t: the last row at or before it

and decides what is padding by whether that row lies in the span.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import lerobot_fixture as fixture
import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tiny import tiny_config

from wam.config import ConfigError, DataConfig, TimelineConfig
from wam.data.dataset import WindowDataset
from wam.data.lerobot import DatasetError
from wam.data.rates import MOST_PACE, at_control_rate, pace_of
from wam.data.windows import Place, Rules, Short, WindowIndices, block_rows, control_grids, rows_held, window_indices, window_table

RATES = [Fraction(n) for n in (3, 5, 8, 10, 12, 15, 20, 24, 25, 30, 50, 60)] + [Fraction(2997, 100), Fraction(5, 2)]
Spans = list[list[tuple[int, int]]]


def tried(times: int) -> settings:
    """The same examples in every run, however slow the machine is."""
    return settings(max_examples=times, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


@st.composite
def timelines(draw: st.DrawFn) -> TimelineConfig:
    fold, latents, stride, inside = draw(st.sampled_from([1, 2, 4])), draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.booleans())
    return TimelineConfig(
        blocks=draw(st.integers(1, 4)), latents_per_block=latents, actions_per_block=fold * latents * stride, frame_stride=stride, temporal_stride=fold, first_frame="inside" if inside else "before"
    )  # fmt: skip


@st.composite
def spans(draw: st.DrawFn) -> Spans:
    """Episodes, each cut into one to four spans."""
    lengths = draw(st.lists(st.lists(st.integers(1, 70), min_size=1, max_size=4), min_size=1, max_size=4))
    edges = [np.concatenate([[0], np.cumsum(parts)]).tolist() for parts in lengths]
    return [list(zip(edge[:-1], edge[1:], strict=True)) for edge in edges]


@st.composite
def clocks(draw: st.DrawFn, timeline: TimelineConfig) -> tuple[Fraction, Fraction]:
    """Rates of a dataset and of a model whose frames do not repeat."""
    fps, hz = draw(st.sampled_from(RATES)), draw(st.sampled_from(RATES))
    assume(timeline.stride * fps / hz >= 1)
    return fps, hz


# ------------------------------------------------------------------------------------------------ the second computation


def nearest(time: Fraction, fps: Fraction) -> int:
    """The row nearest to a time, found by walking."""
    row = 0
    while abs((row + 1) / fps - time) <= abs(row / fps - time):
        row += 1
    return row


def in_force(time: Fraction, fps: Fraction) -> int:
    """The last row at or before a time, which may be before all rows."""
    row = 0
    while (row + 1) / fps <= time:
        row += 1
    while row / fps > time:
        row -= 1
    return row


def naive_table(spans: Spans, timeline: TimelineConfig, fps: Fraction, hz: Fraction, every: int, short: Short) -> tuple[list[Place], list[int], list[Place]]:
    """All windows, episodes without any, and spans without room."""
    found: list[Place] = []
    none: list[int] = []
    narrow: list[Place] = []
    block = nearest(timeline.actions_per_block / hz, fps)
    for position, parts in enumerate(spans):
        before = len(found)
        for first, stop in parts:
            starts = [row for row in range(first, stop) if row + block in range(first, stop)][::every]
            if not starts:
                narrow.append(Place(position, first, stop))
                starts = [first] if short == "pad" else []
            found += [Place(position, start, stop) for start in starts]
        none += [position] if len(found) == before else []
    return found, none, narrow


def naive_window(place: Place, timeline: TimelineConfig, fps: Fraction, hz: Fraction) -> WindowIndices:
    """One window, step by step."""
    a, lead, held, last = timeline.actions_per_block, timeline.lead, max(1, round(fps / hz)), place.stop - 1
    frames = [place.start + nearest(i * timeline.stride / hz, fps) for i in range(timeline.frames)]
    states = [place.start + nearest(max(0, b * a - lead) / hz, fps) for b in range(timeline.blocks)]
    actions = [place.start + in_force((i - lead) / hz, fps) for i in range(timeline.blocks * a)]
    inside = [i >= lead and all(row in range(place.start, place.stop) for row in range(actions[i], actions[i] + held)) for i in range(len(actions))]
    return WindowIndices(
        np.array([row if row < place.stop else last for row in frames]),
        np.array([row not in range(place.start, place.stop) for row in frames]),
        np.array([row if row < place.stop else last for row in states]),
        np.array([row not in range(place.start, place.stop) for row in states]),
        np.array([sorted((0, row, last))[1] for row in actions]),
        ~np.array(inside),
    )


# ------------------------------------------------------------------------------------------------ agreement


@tried(150)
@given(data=st.data(), timeline=timelines(), spans=spans(), every=st.integers(1, 6), short=st.sampled_from(["skip", "pad", "refuse"]))
def test_tables_are_what_walking_finds(data: st.DataObject, timeline: TimelineConfig, spans: Spans, every: int, short: Short) -> None:
    fps, hz = data.draw(clocks(timeline))
    rules = Rules(pace_of(float(fps), DataConfig(control_hz=float(hz)), timeline), every, short)
    wanted, none, narrow = naive_table(spans, timeline, fps, hz, every, short)
    if not wanted or (short == "refuse" and narrow):
        first = narrow[0]
        with pytest.raises(ValueError, match=rf"first of them rows {first.start}..{first.stop - 1} of episode {40 + first.position}: .*; set data.short" if short == "refuse" else "no window fits: .*; use a smaller"):
            window_table(spans, timeline, rules, [40 + position for position in range(len(spans))])
        return
    table = window_table(spans, timeline, rules)
    assert [table.place(i) for i in range(len(table))] == wanted
    assert list(table.too_short) == none and list(table.short_spans) == narrow
    for index in (-1, len(table)):
        with pytest.raises(IndexError):
            table.place(index)


@tried(120)
@given(data=st.data(), timeline=timelines(), spans=spans())
def test_windows_are_what_walking_finds(data: st.DataObject, timeline: TimelineConfig, spans: Spans) -> None:
    fps, hz = data.draw(clocks(timeline))
    pace = pace_of(float(fps), DataConfig(control_hz=float(hz)), timeline)
    table = window_table(spans, timeline, Rules(pace, short="pad"))
    narrow = set(table.short_spans)
    for index in data.draw(st.lists(st.integers(0, len(table) - 1), min_size=1, max_size=4)):
        place = table.place(index)
        found, wanted = window_indices(place.stop, place.start, timeline, pace), naive_window(place, timeline, fps, hz)
        for name, value in vars(wanted).items():
            np.testing.assert_array_equal(getattr(found, name), value, err_msg=f"{name} of {place} at {fps} to {hz}")
        _holds(found, place, timeline, fps / hz, whole=Place(place.position, place.start, place.stop) not in narrow)


def _holds(window: WindowIndices, place: Place, timeline: TimelineConfig, pace: Fraction, whole: bool) -> None:
    """What must be so of every window, however it was found."""
    a, lead = timeline.actions_per_block, timeline.lead
    for rows, pad in ((window.frames, window.frames_is_pad), (window.state, window.state_is_pad), (window.action, window.action_is_pad)):
        real = rows[~pad]
        assert ((place.start <= real) & (real < place.stop)).all(), "what is not padding lies in the span, behind the start"
        assert ((rows >= 0) & (rows < place.stop)).all() and (np.diff(rows) >= 0).all()
    assert not window.frames_is_pad[0] and not window.state_is_pad[0] and window.action_is_pad[:lead].all()
    assert (np.diff(window.frames[~window.frames_is_pad]) >= 1).all(), "no frame is shown twice"
    half, steps = max(Fraction(1, 2), pace / 2), timeline.stride * np.arange(timeline.frames)  # half a row or half a control step, in rows
    for row, pad, step in zip(window.frames.tolist(), window.frames_is_pad.tolist(), steps.tolist(), strict=True):
        assert pad or abs(row - place.start - step * pace) <= half
    for block in range(1, timeline.blocks):
        assert window.state[block] == window.frames[(block * a - lead) // timeline.stride], "a block's state is seen in the frame that begins it"
    if whole:
        assert not window.frames_is_pad[: (a - lead) // timeline.stride + 1].any() and not window.action_is_pad[lead:a].any(), "the first block is whole"


@tried(80)
@given(first=st.integers(0, 20), length=st.integers(1, 40), fps=st.sampled_from(RATES), hz=st.sampled_from(RATES))
def test_grids_are_what_walking_finds(first: int, length: int, fps: Fraction, hz: Fraction) -> None:
    stop, pace = first + length, pace_of(float(fps), DataConfig(control_hz=float(hz)), TimelineConfig(actions_per_block=400, frame_stride=100))
    held, wanted = max(1, round(fps / hz)), []
    for start in range(first, min(stop, first + held)):
        steps = [(start + nearest(j / hz, fps), start + in_force(j / hz, fps)) for j in range(math.ceil(length * hz / fps) + 2)]
        wanted.append([(state, action) for state, action in steps if state in range(first, stop) and action + held - 1 in range(first, stop)])
    found = [list(zip(states.tolist(), actions.tolist(), strict=True)) for states, actions in control_grids(first, stop, pace)]
    assert found == [grid for grid in wanted if grid]


# ------------------------------------------------------------------------------------------------ rates


@tried(200)
@given(fps=st.floats(min_value=0, exclude_min=True, allow_infinity=False), hz=st.floats(min_value=0, exclude_min=True, allow_infinity=False), steps=st.sampled_from([1, 2, 1000, 2**40, 2**61]))
def test_any_two_rates_give_a_pace_or_one_error(fps: float, hz: float, steps: int) -> None:
    """Numbers that no clock has end in an error that names both, and never in rows that have run over."""
    timeline = TimelineConfig(actions_per_block=4 * steps, frame_stride=steps)
    try:
        pace = pace_of(fps, DataConfig(control_hz=hz), timeline)
    except (DatasetError, ConfigError) as error:
        assert "data.control_hz" in str(error) and ";" in str(error)
        assert not 1 / MOST_PACE <= fps / hz <= MOST_PACE or timeline.stride * fps / hz < 1
        return
    assert math.isclose(pace, fps / hz, rel_tol=1e-5) and rows_held(pace) >= 1 and block_rows(timeline, pace) >= 1
    if block_rows(timeline, pace) > 50:
        with pytest.raises(ValueError, match="no window fits"):
            window_table([[(0, 50)]], timeline, Rules(pace))


@tried(80)
@given(length=st.integers(1, 30), ratio=st.integers(1, 6), slower=st.booleans(), seed=st.integers(0, 1000))
def test_what_steps_ask_for_adds_up_to_what_rows_did(length: int, ratio: int, slower: bool, seed: int) -> None:
    """Whole steps of displacements go as far as their rows; velocities are the rows' mean; targets stay what they are."""
    actions = np.random.default_rng(seed).normal(size=(length, 3)).astype(np.float32)
    pace = float(ratio) if slower else 1 / ratio
    got = at_control_rate(actions, ("target", "delta", "velocity"), pace)
    np.testing.assert_array_equal(got[:, 0], actions[:, 0])
    for row in range(length - rows_held(pace) + 1):
        rows = actions[row : row + ratio] if slower else actions[row : row + 1]
        steps = 1 if slower else ratio
        np.testing.assert_allclose(steps * got[row, 1], sum(float(x) for x in rows[:, 1]), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(got[row, 2], sum(float(x) for x in rows[:, 2]) / len(rows), rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------ on files

LENGTHS = (40, 23, 31)
CUTS = ((0, 17, 40), (0, 23), (0, 4, 20, 31))  # where instructions change


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset in which instructions take turns inside an episode."""
    root = fixture.write_dataset(tmp_path_factory.mktemp("windows") / "tiny", LENGTHS, episodes_per_file=3)
    for path in sorted(root.glob("data/*/*.parquet")):
        rows = pd.read_parquet(path)
        rows["task_index"] = [sum(frame >= cut for cut in CUTS[episode][1:]) % 2 for episode, frame in zip(rows.episode_index, rows.frame_index, strict=True)]
        rows.to_parquet(path)
    fixture.edit_episodes(root, tasks=[list(fixture.TASKS)] * len(LENGTHS))
    return root


@tried(30)
@given(data=st.data(), timeline=timelines(), hz=st.sampled_from([None, *RATES]), every=st.integers(1, 9), short=st.sampled_from(["skip", "pad"]), by=st.sampled_from(["episode", "language"]))
def test_samples_are_the_rows_that_walking_finds(root: Path, data: st.DataObject, timeline: TimelineConfig, hz: Fraction | None, every: int, short: Short, by: str) -> None:
    """From the files: every number and every picture of a sample is that of the row it should be, and its instruction holds there."""
    fps, clock = Fraction(fixture.FPS), hz or Fraction(fixture.FPS)
    assume(timeline.stride * fps / clock >= 1)
    spans = [list(zip(cuts[:-1], cuts[1:], strict=True)) if by == "language" else [(0, cuts[-1])] for cuts in CUTS]
    wanted, none, _ = naive_table(spans, timeline, fps, clock, every, short)
    assume(wanted)
    config = DataConfig(root=str(root), control_hz=None if hz is None else float(hz), executed_action="action.executed", action_kinds=("target",), start_stride=every, short=short, spans=by, validation_fraction=0, cache="none")  # type: ignore[arg-type]
    dataset = WindowDataset(config, timeline, "train")
    assert len(dataset) == len(wanted) and dataset.too_short == none
    for index in data.draw(st.lists(st.integers(0, len(wanted) - 1), min_size=1, max_size=3)):
        place, sample = wanted[index], dataset[index]
        window, rows = naive_window(place, timeline, fps, clock), fixture.columns(place.position, LENGTHS[place.position])
        assert (sample["episode"], sample["start"]) == (place.position, place.start)
        assert sample["instruction"] == fixture.TASKS[sum(place.start >= cut for cut in CUTS[place.position][1:]) % 2]
        np.testing.assert_array_equal(sample["state"], rows["observation.state"][window.state])
        np.testing.assert_array_equal(sample["action"], rows["action"][window.action])
        np.testing.assert_array_equal(sample["executed"], rows["action.executed"][window.action])
        assert [fixture.read_stamp(frame) for frame in sample["frames"]] == _numbers(place.position, window.frames)
        for name in ("frames_is_pad", "state_is_pad", "action_is_pad"):
            np.testing.assert_array_equal(sample[name], getattr(window, name))


def _numbers(episode: int, rows: Sequence[int] | np.ndarray) -> list[int]:
    """What frames show: their number in a file that holds all episodes one after the other."""
    return [sum(LENGTHS[:episode]) + int(row) for row in rows]


def test_the_sample_timeline_is_among_them() -> None:
    """The usual config is a case of what is drawn above."""
    timeline = tiny_config().timeline
    place = Place(0, 3, 60)
    wanted = naive_window(place, timeline, Fraction(30), Fraction(10))
    assert wanted.frames[:3].tolist() == [3, 9, 15] and window_indices(60, 3, timeline, 3.0).frames[:3].tolist() == [3, 9, 15]
