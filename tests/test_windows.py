"""Windows against the definition, written as plain loops."""

import pytest

from wam.config import TimelineConfig
from wam.data.windows import count_starts, whole, window_indices, window_table

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
