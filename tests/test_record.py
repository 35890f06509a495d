"""Recorded episodes: row by row what was seen, sent and done; whole or not there; read by our reader with what came of them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from tiny import tiny_config
from toy import CAMERA, FORM, STEPS, record_toy, toy_config, toy_episode, toy_frame

from wam.data import recording as module
from wam.data.check.run import check_dataset
from wam.data.dataset import WindowDataset, collate
from wam.data.lerobot import DatasetError, LeRobotDataset
from wam.data.outcomes import UNKNOWN, steps_to_success
from wam.data.recording import EpisodeBuffer, Recording, RecordingFormat
from wam.evaluation.environments import StepResult
from wam.evaluation.episodes import Episode
from wam.evaluation.record import Record

SAMPLE = Path(__file__).parents[1] / "data" / "metaworld_sample"
PERFECT = {CAMERA: toy_frame(0.5, good=True)}


def _windows(root: Path, *overrides: str, split: str = "train") -> WindowDataset:
    config = toy_config(root, *overrides)
    return WindowDataset(config.data, config.timeline, split)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------ the core


def test_rows_hold_what_was_seen_then_sent_then_came_of_it(tmp_path: Path) -> None:
    rng, buffer = np.random.default_rng(0), EpisodeBuffer(FORM, "push the bar")
    states, actions, done = (rng.normal(size=(8, 4)).astype(np.float32) for _ in range(3))
    seen = [np.full((32, 48, 3), 20 * i, np.uint8) for i in range(5)]  # after steps 0, 2, 4, 6, 8
    buffer.begin({CAMERA: seen[0]}, states[0])
    for i in range(7):
        buffer.add(actions[i], states[i + 1], {CAMERA: seen[(i + 1) // 2]} if i % 2 else None, executed=done[i], success=i == 6)
    recording = Recording(tmp_path, FORM)
    assert recording.add("one", buffer, "success", {"seed": 3}) and not recording.add("one", buffer, "failed"), "a name is there once"
    assert not recording.add("empty", EpisodeBuffer(FORM, "nothing was done"), "crashed")
    assert recording.assemble({"versions": {"wam": "0"}}) and not recording.assemble(), "nothing new"
    dataset = LeRobotDataset(tmp_path)
    assert (len(dataset.episodes), dataset.episodes[0].length, dataset.instruction(0, 0)) == (1, 7, "push the bar")
    for key, expected in ((module.STATE, states[:7]), (module.ACTION, actions[:7]), (module.EXECUTED, done[:7])):
        assert np.array_equal(dataset.read(0, key), expected)
    assert dataset.read(0, "next.success")[:, 0].tolist() == [False] * 6 + [True] == dataset.read(0, "next.done")[:, 0].tolist()
    assert dataset.info["wam"]["recording"] == {"frame_every": 2, "outcomes": {"success": 1, "failed": 0, "stopped": 0, "crashed": 0}, "episodes": ["one"]}
    shown = buffer.video(CAMERA)[:, 0, 0, 0].tolist()
    assert shown == [0, 0, 20, 20, 40, 40, 60], "a frame is held until the next is seen"


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda b: b.add(np.zeros(4), np.zeros(4), PERFECT), "step 1 of an episode has a frame, but one is due every 2"),
        (lambda b: (b.add(np.zeros(4), np.zeros(4)), b.add(np.zeros(4), np.zeros(4))), "step 2 of an episode has no frame"),
        (lambda b: b.add(np.zeros(3), np.zeros(4)), r"action to record has shape \(3,\); this recording has 4 dimensions: dx, dy"),
        (lambda b: b.add(np.zeros(4), np.zeros((1, 4))), r"state to record has shape \(1, 4\)"),
        (lambda b: b.begin({CAMERA: np.zeros((48, 32, 3), np.uint8)}, np.zeros(4)), "frames to record are"),
        (lambda b: b.begin({"other": PERFECT[CAMERA]}, np.zeros(4)), "frames to record are"),
    ],
)
def test_what_does_not_fit_is_refused(call: Any, says: str) -> None:
    buffer = EpisodeBuffer(FORM, "push the bar")
    buffer.begin(PERFECT, np.zeros(4))
    with pytest.raises(ValueError, match=says):
        call(buffer)


def test_a_recording_goes_on_and_holds_no_half_episode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng, root = np.random.default_rng(1), tmp_path / "rec"
    recording = Recording(root, FORM)
    recording.add("a", toy_episode(rng, good=True), "success")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module.np, "savez_compressed", full)
        with pytest.raises(OSError, match="No space left"):
            recording.add("b", toy_episode(rng, good=False), "failed")
    assert recording.names == ["a"] and not list(root.glob(".recording/*.tmp*"))
    with monkeypatch.context() as patch:
        patch.setattr(module.LeRobotWriter, "finalize", full)
        with pytest.raises(OSError, match="No space left"):
            recording.assemble()
    assert not (root / "meta").exists()
    again = Recording(root, FORM)
    assert again.assemble() and len(LeRobotDataset(root).episodes) == 1
    again.add("b", toy_episode(rng, good=False), "failed")
    assert len(LeRobotDataset(root).episodes) == 1, "until it is assembled"
    assert again.assemble() and [e.length for e in LeRobotDataset(root).episodes] == [STEPS, STEPS] and not (root / module.ASSEMBLING).exists()
    bad = toy_episode(rng, good=False)
    bad._states[3][:] = np.nan
    with pytest.raises(ValueError, match=r"episode c: observation.state is not finite in row 3; it was not recorded"):
        again.add("c", bad, "failed")
    with pytest.raises(ValueError, match=r"recording of something else .fps 20, now 30"):
        Recording(root, RecordingFormat(30, FORM.cameras, FORM.state_names, FORM.action_names, "toy", 2))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    with pytest.raises(FileExistsError, match=r"not empty \(notes.txt\)"):
        Recording(tmp_path / "other", FORM)


# ------------------------------------------------------------------------------------------------ windows of it


def test_windows_say_what_came_of_them(tmp_path: Path) -> None:
    record_toy(tmp_path, 6)
    windows = _windows(tmp_path)
    for i in range(len(windows)):
        sample = windows[i]
        assert sample["start"] % 2 == 0, "a window begins where a frame was seen"
        ends = sample["start"] + np.array([8, 16])
        left = np.full(2, np.inf) if sample["episode"] % 2 else STEPS - ends
        assert np.array_equal(sample["outcome"], np.where(ends < STEPS, left, UNKNOWN).astype(np.float32))
    assert collate([windows[0], windows[1]])["outcome"].shape == (2, 2)
    assert {s["start"] for s in (windows[i] for i in range(len(windows)))} == set(range(0, STEPS - 8, 2))
    with pytest.raises(DatasetError, match=r"with a frame every 2 rows, but .* asks for one every 1"):
        _windows(tmp_path, "timeline.frame_stride=1", "timeline.actions_per_block=4")


def test_outcomes_by_hand() -> None:
    ends = np.array([8, 16, 24])
    assert steps_to_success(20.0, ends, 24, 2.0).tolist() == [6, 2, UNKNOWN] and (steps_to_success(np.nan, ends, 30, 1.0) == UNKNOWN).all()
    assert np.isinf(steps_to_success(np.inf, ends, 30, 1.0)).all() and steps_to_success(10.0, ends, 30, 1.0).tolist() == [2, 0, 0]


def test_cut_off_episodes_say_nothing_and_failures_need_not_be_imitated(tmp_path: Path) -> None:
    rng, recording = np.random.default_rng(0), Recording(tmp_path, FORM)
    for name, outcome in (("a", "success"), ("b", "failed"), ("c", "stopped"), ("d", "crashed")):
        recording.add(name, toy_episode(rng, outcome == "success"), outcome)  # type: ignore[arg-type]
    recording.assemble()
    whole, some = (_windows(tmp_path, "data.validation_fraction=0", *more) for more in ((), ("data.imitate=successes",)))
    found = list(whole.outcomes.values())
    assert found[:2] == [STEPS, np.inf] and np.isnan(found[2:]).all()
    for episode in range(4):
        index = next(i for i in range(len(whole)) if whole[i]["episode"] == episode)
        assert bool(some[index]["action_is_pad"].all()) == (episode > 0) and not whole[index]["action_is_pad"][:8].any()
        assert np.array_equal(some[index]["executed"], whole[index]["executed"]), "what was done is seen all the same"
    assert set(_windows(tmp_path, "data.outcome=success", "data.validation_fraction=0").outcomes.values()) == {STEPS - 1}
    assert np.isnan(list(_windows(tmp_path, "data.outcome=unknown", "data.validation_fraction=0").outcomes.values())).all()
    with pytest.raises(DatasetError, match="no train episode is known to have succeeded"):
        _windows(tmp_path, "data.outcome=unknown", "data.imitate=successes", "data.validation_fraction=0")


def test_demonstrations_count_as_successes() -> None:
    windows = WindowDataset(tiny_config(f"data.root={SAMPLE}").data, tiny_config().timeline, "train")
    assert len(windows.outcomes) > 1 and all(0 < row < windows.lerobot.episodes[e].length for e, row in windows.outcomes.items())


def test_the_check_finds_no_error(tmp_path: Path) -> None:
    """Real episodes, recorded again with every second frame."""
    config = tiny_config("codec.image_size=[64, 64]", f"data.root={SAMPLE}", "data.executed_action=action.executed")
    windows = WindowDataset(config.data, config.timeline, "train")
    camera = config.data.cameras[0]
    form = RecordingFormat(80, {camera: (64, 64)}, ("x", "y", "z", "open"), ("dx", "dy", "dz", "grip"), "sawyer", 2)
    recording = Recording(tmp_path, form)
    for index in windows.episodes[:3]:
        seen, buffer = windows.episode(index), EpisodeBuffer(form, windows.lerobot.instruction(index, 0))
        buffer.begin({camera: seen.frames[0]}, seen.state[0])
        for i in range(len(seen.state) - 1):
            buffer.add(seen.action[i], seen.state[i + 1], {camera: seen.frames[i + 1]} if i % 2 else None, seen.executed[i])
        recording.add(f"{index}", buffer, "success")
    recording.assemble()
    _, findings = check_dataset(tmp_path, dataclasses.replace(config, data=dataclasses.replace(config.data, root=str(tmp_path))), 3)
    assert not [f for f in findings if f.level == "error"], findings
    assert not [f for f in findings if f.check == "in_step"], "held frames do not hide that picture and state move together"


# ------------------------------------------------------------------------------------------------ a wave


def test_a_wave_becomes_episodes(tmp_path: Path) -> None:
    """Two robots, the second of which fails after one stretch; the same wave again adds nothing."""
    recording, rng = Recording(tmp_path, FORM), np.random.default_rng(0)
    sent, states = rng.uniform(-1, 1, (2, 12, 4)).astype(np.float32), rng.normal(size=(2, 13, 4)).astype(np.float32)
    frames = np.stack([toy_frame(0.05 * i, good=True) for i in range(7)])

    def result(row: int, a: int, b: int, done: bool) -> StepResult:
        success = np.zeros(b - a, np.bool_)
        success[-1] = done and row == 0
        return StepResult(frames[a // 2 + 1 : b // 2 + 1], states[row, a + 1 : b + 1], np.zeros(b - a, np.float32), success, done)

    for again in (False, True):
        record = Record(recording, [7, 8], "metaworld/drawer-open-v3", "skip", "0123456789abcdef")
        for row in (0, 1):
            record.began(row, "open the drawer", frames[0], states[row, 0])
            record.acted(row, sent[row, :8])
        record.ran([0, 1], [result(0, 0, 8, False), result(1, 0, 8, True)])
        record.acted(0, sent[0, 8:])  # the episode ends one step before the stretch does
        record.ran([0], [result(0, 8, 11, True)])
        record.save([Episode(7, True, 11, 2, 0, "success"), Episode(8, False, 8, 1, 0, "failed")])
        assert record.kept == (0 if again else 2)
    assert recording.names == [f"0123456789ab-metaworld-drawer-open-v3-skip-00000{seed}" for seed in (7, 8)]
    recording.assemble()
    dataset = LeRobotDataset(tmp_path)
    assert [e.length for e in dataset.episodes] == [11, 8]
    for row, episode in enumerate(dataset.episodes):
        assert np.array_equal(dataset.read(row, module.ACTION), sent[row, : episode.length])
        assert np.array_equal(dataset.read(row, module.STATE), states[row, : episode.length])
    assert dataset.info["wam"]["seeds"] == {"drawer-open-v3": {"accepted": [7, 8], "rejected": []}}
    table = json.loads(pd.read_parquet(tmp_path / "meta/episodes/chunk-000/file-000.parquet")[["seed", "outcome", "policy", "mode"]].to_json(orient="records"))
    assert table[0] == {"seed": 7, "outcome": "success", "policy": "0123456789abcdef", "mode": "skip"} and table[1]["outcome"] == "failed"
