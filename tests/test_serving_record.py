"""Recording a server: rows and frames as our own reader takes them, plans beside them, and what becomes of gaps, drops and crashes."""

import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from serving_tools import BLOCKS, Talk, episode, make_worker, observation, policy, serving

from wam.data import recording as rows
from wam.data.check.run import check_dataset
from wam.data.dataset import WindowDataset
from wam.data.lerobot import LeRobotDataset
from wam.inference.gate import GateConfig, GroupLimits
from wam.serving import recorder as module
from wam.serving.events import Ended, Observed
from wam.serving.metrics import Metrics
from wam.serving.recorder import Recorder
from wam.serving.served import FOLDER, Served, read_served

A = 8


def _read(root: Path) -> tuple[LeRobotDataset, dict[str, Served]]:
    return LeRobotDataset(root), {path.stem: read_served(path) for path in sorted((root / FOLDER).glob("*.npz"))}


def test_what_robots_saw_and_did_becomes_a_dataset(tmp_path: Path) -> None:
    """Two robots, one of them told a new instruction and one refused; every session is an episode, what came last ends it."""
    worker = make_worker()
    sent: dict[int, list[np.ndarray]] = {0: [], 1: []}
    with serving(worker, recorder=Recorder(tmp_path, worker.contract, worker.metrics)) as running, Talk(running.url) as talk:
        for block in range(BLOCKS):
            for robot in (0, 1):
                sent[robot].append(talk.ask(observation(robot, block, session_id=f"r{robot}"))["actions"])
        assert talk.error({**observation(0, 0, session_id="r0"), "timestamp": -1.0})["code"] == "stale_observation"
        assert talk.ask({"endpoint": "reset_session", "session_id": "r0", "outcome": "success"})["status"] == "reset"
        assert "wam_recording_queue_bytes" in running.worker.metrics.text().decode()
    dataset, served = _read(tmp_path)
    assert [e.length for e in dataset.episodes] == [A * (BLOCKS - 1)] * 2
    names = dataset.info["wam"]["recording"]["episodes"]
    for index, name in enumerate(names):
        robot, told = int(served[name].told["session"][-1]), served[name].told
        _, state = episode(robot).at(2)
        assert dataset.instruction(index, 0) == told["prompt"] == observation(robot, 0)["prompt"]
        for key in (rows.ACTION, rows.EXECUTED):
            np.testing.assert_array_equal(dataset.read(index, key), np.concatenate(sent[robot][: BLOCKS - 1]))
        np.testing.assert_array_equal(dataset.read(index, rows.STATE)[2 * A], state[0])
        np.testing.assert_array_equal(served[name].passed, sent[robot])
        assert told["outcome"] == ("success" if robot == 0 else "stopped") and told["held"] == [] and len(served[name].tail) == 1
        assert [e["code"] for e in told["errors"]] == (["stale_observation"] if robot == 0 else [])
        assert dataset.read(index, "next.done")[-1] == dataset.read(index, "next.success")[-1] == (robot == 0)
    config = policy().config
    data = replace(config.data, root=str(tmp_path), executed_action=rows.EXECUTED, validation_fraction=0.0)
    assert len(WindowDataset(data, config.timeline, "train")) > 0, "what failed today is training data tomorrow"
    _, findings = check_dataset(tmp_path, replace(config, data=data))
    assert not [finding for finding in findings if finding.level == "error"], findings


def test_frames_that_were_not_sent_are_held_and_named_and_a_gap_ends_an_episode(tmp_path: Path) -> None:
    worker = make_worker(gate=GateConfig(groups=(GroupLimits("all", 0, 4, low=(-9.0,), high=(9.0,)),)))
    with serving(worker, recorder=Recorder(tmp_path, worker.contract, worker.metrics)) as running, Talk(running.url) as talk:
        for block in range(2):
            talk.ask(observation(0, block, "one", session_id="r"))
        talk.ask(observation(0, 2, session_id="r", gap=True))
        talk.ask(observation(0, 3, session_id="r"))
    dataset, served = _read(tmp_path)
    assert [e.length for e in dataset.episodes] == [A, A], "the block with the gap is in neither"
    first, second = (served[name].told for name in dataset.info["wam"]["recording"]["episodes"])
    assert first["held"] == [2, 4, 6] and first["why"] == "nobody knows what was executed" and second["held"] == []


def _observed(key: str, step: int, before: int | None, known: bool = True) -> Observed:
    count = 0 if before is None else step - before
    actions = np.full((count, 4), 0.5 if known else np.nan, np.float32)
    return Observed(key, step, before, (float(step),), np.full((1, 32, 48, 3), step, np.uint8), np.zeros(4, np.float32), actions, actions, "go", "client", None)


def _recorder(root: Path, **more: int) -> tuple[Recorder, Metrics]:
    metrics = Metrics()
    return Recorder(root, make_worker().contract, metrics, **more), metrics


def test_a_full_queue_drops_and_counts_and_the_episode_ends_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "QUEUE_EVENTS", 3)
    recorder, metrics = _recorder(tmp_path)
    held = recorder._take
    ready = {"now": False}

    def slow(event: object, broken: bool) -> None:
        while not ready["now"]:
            time.sleep(0.005)
        held(event, broken)  # type: ignore[arg-type]

    monkeypatch.setattr(recorder, "_take", slow)
    begun = time.monotonic()
    for step in range(0, 12, 2):
        recorder(_observed("r", step, step - 2 if step else None))
    assert time.monotonic() - begun < 1, "nothing waits for the disk"
    ready["now"] = True
    while recorder._events:
        time.sleep(0.005)
    recorder(_observed("r", 12, 10))
    recorder(_observed("r", 14, 12))
    assert recorder.close(20)
    assert metrics.registry.get_sample_value("wam_recording_dropped_total", {"what": "event"}) in (2, 3)
    assert sum(e.length for e in _read(tmp_path)[0].episodes) < 14 and len(_read(tmp_path)[0].episodes) == 2


def test_long_episodes_are_cut_and_go_on_and_the_same_directory_too(tmp_path: Path) -> None:
    for count in (1, 2):
        recorder, metrics = _recorder(tmp_path, episode_bytes=20 * 3 * 32 * 48)
        for step in range(0, 50, 2):
            recorder(_observed("r", step, step - 2 if step else None))
        recorder(Ended("r", "reset", "failed"))
        assert recorder.close(20)
        lengths = [e.length for e in _read(tmp_path)[0].episodes]
        assert sum(lengths) == 48 * count and max(lengths) == 20 and len(lengths) == 3 * count
        assert metrics.registry.get_sample_value("wam_recording_episodes_total") == 3
    assert json.loads((tmp_path / "meta/info.json").read_text())["wam"]["recording"]["outcomes"]["failed"] == 2


def test_a_crash_loses_the_episode_in_progress_alone(tmp_path: Path) -> None:
    recorder, _ = _recorder(tmp_path)
    for key in ("whole", "cut"):
        for step in range(0, 10, 2):
            recorder(_observed(key, step, step - 2 if step else None))
    recorder(Ended("whole", "reset"))
    while not recorder.recording.names:
        time.sleep(0.005)
    (tmp_path / rows.STAGING / ".cut.0a1b2c.npz").write_bytes(b"half of a file, whose process was killed")
    again, _ = _recorder(tmp_path)  # as the next server finds it; the first never closed
    assert again.close(20)
    assert [e.length for e in _read(tmp_path)[0].episodes] == [8]


def test_a_rate_that_no_dataset_has_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"control rate is 12\.5 a second"):
        Recorder(tmp_path, replace(make_worker().contract, control_hz=12.5), Metrics())
