"""Windows against the definition, written as plain loops; spans, strides, other rates, and lengths in seconds."""

import numpy as np
import pytest

from wam.config import ConfigError, DataConfig, EmbodimentConfig, GroupConfig, TimelineConfig, load_config
from wam.data.lerobot import DatasetError
from wam.data.rates import at_control_rate, kinds_of, pace_of
from wam.data.units import Units
from wam.data.windows import Rules, control_grids, count_starts, rows_in_force, whole, window_indices, window_table

TIMELINES = [
    TimelineConfig(),
    TimelineConfig(blocks=1, latents_per_block=2, actions_per_block=8, frame_stride=1),
    TimelineConfig(blocks=2, latents_per_block=2, actions_per_block=24, frame_stride=3),
    TimelineConfig(blocks=4, latents_per_block=1, actions_per_block=4, frame_stride=1),
]


@pytest.mark.parametrize("timeline", TIMELINES, ids=str)
def test_windows_are_what_they_are_defined_to_be(timeline: TimelineConfig) -> None:
    a, n, stride = timeline.actions_per_block, timeline.blocks, timeline.frame_stride
    for length in range(1, a * n + a + 5):
        valid = [start for start in range(length) if start + a <= length - 1]  # the frame that ends the first block exists
        assert count_starts(length, timeline) == len(valid)
        for start in valid:
            w = window_indices(length, start, timeline)
            for rows, pad, wanted in (
                (w.frames, w.frames_is_pad, [start + j * stride for j in range(1 + n * a // stride)]),
                (w.state, w.state_is_pad, [start + b * a for b in range(n)]),
                (w.action, w.action_is_pad, [start + i for i in range(n * a)]),
            ):
                assert rows.tolist() == [min(row, length - 1) for row in wanted]
                assert pad.tolist() == [row >= length for row in wanted]
            assert len(w.frames) == timeline.frames
            assert not w.frames_is_pad[: timeline.frames_per_block + 1].any() and not w.state_is_pad[0] and not w.action_is_pad[:a].any(), (
                "the first block is whole"
            )
            if start + n * a <= length - 1:
                assert not (w.frames_is_pad.any() or w.state_is_pad.any() or w.action_is_pad.any())
            assert w.frames[timeline.frames_per_block] == w.state[0] + a, "a block's last frame is seen at the next block's state"
        for start in (-1, length):
            with pytest.raises(ValueError, match=f"no window starts at row {start} of a span that ends before row {length}"):
                window_indices(length, start, timeline)


def test_table_lists_every_window_once_and_skips_short_episodes() -> None:
    timeline = TimelineConfig()
    lengths = [8, 9, 30, 3, 12]
    table = window_table(whole(lengths), timeline)
    assert table.too_short == (0, 3)
    assert [table.locate(i) for i in range(len(table))] == [(e, s) for e, length in enumerate(lengths) for s in range(max(0, length - 8))]
    for index in (-1, len(table)):
        with pytest.raises(IndexError):
            table.locate(index)


@pytest.mark.parametrize(("lengths", "found"), [([8, 3], "longest of 2 episodes has 8 rows"), ([], "there are no episodes")])
def test_no_window_at_all_is_an_error_with_the_sum(lengths: list, found: str) -> None:
    with pytest.raises(ValueError, match=rf"actions_per_block 8 \+ 1 = 9 rows, but .*{found}"):
        window_table(whole(lengths), TimelineConfig())


# ------------------------------------------------------------------------------------------------ spans, strides, rates


def test_windows_stay_inside_their_span_and_start_at_strides() -> None:
    timeline = TimelineConfig()  # one block is 8 rows and one more
    spans = [[(0, 20), (20, 26), (26, 40)], [(0, 9)], [(0, 4), (4, 8)]]
    table = window_table(spans, timeline, Rules(start_stride=5))
    assert [table.place(i) for i in range(len(table))] == [(0, 0, 20), (0, 5, 20), (0, 10, 20), (0, 26, 40), (0, 31, 40), (1, 0, 9)]
    assert table.too_short == (2,) and table.short_spans == ((0, 20, 26), (2, 0, 4), (2, 4, 8))
    for place in map(table.place, range(len(table))):
        w = window_indices(place.stop, place.start, timeline)
        for rows in (w.frames, w.state, w.action):
            assert place.start <= rows.min() and rows.max() < place.stop, "no window reaches into another instruction"
        assert w.frames_is_pad.tolist() == [row >= place.stop for row in place.start + 2 * np.arange(timeline.frames)]


def test_short_spans_are_skipped_padded_or_refused() -> None:
    timeline, spans = TimelineConfig(), [[(0, 3), (3, 13)], [(0, 1)]]
    padded = window_table(spans, timeline, Rules(short="pad"))
    assert [padded.place(i) for i in range(len(padded))] == [(0, 0, 3), (0, 3, 13), (0, 4, 13), (1, 0, 1)] and padded.too_short == ()
    w = window_indices(3, 0, timeline)
    assert w.frames_is_pad.tolist() == [False] * 2 + [True] * 11 and w.action_is_pad.sum() == 24 - 3 and w.state_is_pad.tolist() == [False, True, True]
    assert len(window_table(spans, timeline, Rules(short="skip"))) == 2
    with pytest.raises(ValueError, match=r"2 of 3 spans are too short, the first of them rows 0..2 of episode 7: .* 8 \+ 1 = 9 rows; set data.short=skip or pad"):
        window_table(spans, timeline, Rules(short="refuse"), numbers=[7, 8])


@pytest.mark.parametrize("pace", [0.5, 1.0, 1.4, 2.5, 3.0])
def test_another_rate_is_the_nearest_row_in_time(pace: float) -> None:
    timeline, start, length = TimelineConfig(blocks=2), 4, 60
    table = window_table(whole([length]), timeline, Rules(pace=pace))
    assert len(table) == sum(start + 8 * pace < length - 0.5 for start in range(length)), "the frame that ends the first block exists"
    for first in (start, len(table) - 1):
        w = window_indices(length, first, timeline, pace)
        times = first + pace * np.arange(17)  # of control steps, in rows
        for rows, pad, wanted in ((w.frames, w.frames_is_pad, times[::2]), (w.state, w.state_is_pad, times[:16:8])):
            real = ~pad
            assert (np.abs(rows - wanted)[real] <= 0.5 + 1e-6).all() and (pad == (wanted + 0.5 + 1e-9 >= length)).all()
        real = ~w.action_is_pad
        assert ((w.action - times[:16])[real] <= 1e-6).all() and ((times[:16] - w.action)[real] < 1).all(), "an action is the one in force"
        assert not w.action_is_pad[:8].any() and not w.frames_is_pad[:5].any(), "the first block is whole"


def test_grids_of_the_clock_hold_every_row_once_where_rates_divide() -> None:
    grids = control_grids(2, 15, 3.0)
    assert all((states == actions).all() for states, actions in grids)
    assert sorted(np.concatenate([actions for _, actions in grids])) == list(range(2, 13)), "rows 13 and 14 begin steps that end beyond the span"
    assert [states.tolist() for states, _ in control_grids(0, 4, 1.0)] == [[0, 1, 2, 3]]


# ------------------------------------------------------------------------------------------------ actions of another rate


def test_targets_are_sampled_displacements_summed_velocities_averaged() -> None:
    actions = np.random.default_rng(0).normal(size=(12, 3)).astype(np.float32)
    slower = at_control_rate(actions, ("target", "delta", "velocity"), 3.0)
    for row in range(10):
        np.testing.assert_allclose(slower[row], [actions[row, 0], actions[row : row + 3, 1].sum(), actions[row : row + 3, 2].mean()], rtol=1e-5)
    faster = at_control_rate(actions, ("target", "delta", "velocity"), 0.5)
    np.testing.assert_allclose(faster, actions * [1, 0.5, 1], rtol=1e-6)
    steps = rows_in_force(np.arange(24), 0.5)
    np.testing.assert_allclose(faster[steps, 1].sum(), actions[:, 1].sum(), rtol=1e-5, err_msg="all steps together go as far as all rows")


@pytest.mark.parametrize(
    ("changes", "groups", "message"),
    [
        ({"control_hz": 5.0}, {}, r"has 2 rows a control step .* data.action_kinds lists 0; say of all, or of each of the 4"),
        ({"control_hz": 4.0, "action_kinds": ("delta",)}, {}, "a displacement cannot be cut at a fraction of a row"),
        ({"control_hz": 5.0, "action_kinds": ("delta",)}, {"rotation": "quaternion"}, "is a rotation as quaternion, whose numbers do not add up"),
        ({"control_hz": 60.0, "action_kinds": ("target",)}, {}, r"10 frames a second, but data.control_hz 60 / timeline.frame_stride 2 = 30 .* frame_stride of 6"),
    ],
)
def test_rates_that_would_be_wrong_are_refused(changes: dict, groups: dict, message: str) -> None:
    data, timeline = DataConfig(**changes), TimelineConfig()
    robot = EmbodimentConfig(action_groups=(GroupConfig("hand", 4, **groups),) if groups else ())
    with pytest.raises(DatasetError, match=message):
        kinds_of(Units.of(robot, data), data, pace_of(10.0, data, timeline))
    card = EmbodimentConfig(action_groups=(GroupConfig("hand", 3, kind="delta"), GroupConfig("grip", 1)))
    assert kinds_of(Units.of(card, DataConfig()), DataConfig(), 2.0) == ("delta", "delta", "delta", "target"), "a robot's groups say it once for all its datasets"
    assert pace_of(10.0, DataConfig(control_hz=2.5), timeline) == 4.0 and pace_of(10.0, DataConfig(), timeline) == 1.0
    assert pace_of(29.97, DataConfig(control_hz=9.99), timeline) == 3.0


# ------------------------------------------------------------------------------------------------ seconds


def test_lengths_in_seconds_become_steps() -> None:
    seconds = load_config(None, ["data.control_hz=15", "timeline.actions_per_block=1.6 s", "timeline.frame_stride=200 ms", "timeline.latents_per_block=2"])
    steps = load_config(None, ["data.control_hz=15", "timeline.actions_per_block=24", "timeline.frame_stride=3", "timeline.latents_per_block=2"])
    assert seconds == steps and seconds.timeline.actions_per_block == 24
    with pytest.raises(ConfigError, match=r"actions_per_block is '1.5 s' x data.control_hz 15 = 22.5 control steps; use 1.46667 s \(22\) or 1.53333 s \(23\)"):
        load_config(None, ["data.control_hz=15", "timeline.actions_per_block=1.5 s"])
    with pytest.raises(ConfigError, match=r"actions_per_block is '1.6 s', and data.control_hz is None; set data.control_hz"):
        load_config(None, ["timeline.actions_per_block=1.6 s"])
    with pytest.raises(ConfigError, match="actions_per_block is 'soon'"):
        load_config(None, ["data.control_hz=15", "timeline.actions_per_block=soon"])
