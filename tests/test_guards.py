"""A bad batch is put on disk and its step left out, too many end the run with a diagnosis; a process that is late or gone is named."""

from __future__ import annotations

import json
import math
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from survival import finish, newest_state, quick_config, run_training, said, start

from wam.config_training import GuardsConfig
from wam.model.wam import WorldActionModel
from wam.training.checkpoints import read_manifest, state_folder
from wam.training.guards import Guard, Unstable, diagnosis, save_evidence
from wam.training.loop import train
from wam.training.objective import Losses, Part
from wam.training.watch import EXIT_STOPPED, Beat, Watch, verdict

QUICK = ("training.save_every=1", "training.validate_every=99", "data.validation_fraction=0", "training.keep.last=9", "training.modes={skip: 1}")


# ------------------------------------------------------------------------------------------------ judging


def test_a_step_is_judged_by_the_median_of_those_before() -> None:
    guard = Guard(GuardsConfig(max_skipped=1, explode_factor=10, window=30))
    for i in range(40):
        assert guard.judge(1.0 + i / 100, 2.0) is None
        guard.accept(1.0 + i / 100, 2.0)
    assert guard.judge(12.0, 2.0) is None and guard.judge(12.0, 19.9) is None
    assert guard.judge(math.nan, math.nan) == "the loss is nan" and guard.judge(1.0, math.inf) == "the gradient's norm is inf"
    assert guard.judge(1.0, 20.1) == "the gradient's norm is 20.1, 10 times the median of the last 30 steps"
    assert "the loss is 100, " in str(guard.judge(100.0, 2.0))
    again = Guard(guard.config, json.loads(json.dumps(guard.to_dict())))
    assert again.to_dict() == guard.to_dict() and again.largest_loss() == guard.largest_loss() == 10 * 1.245
    assert not again.skip(100) and not again.skip(130) and again.skip(140) and again.total == 3  # step 100 is out of the window by then
    assert Guard(replace(guard.config, explode_factor=None), guard.to_dict()).judge(1e9, 1e9) is None
    few = Guard(guard.config)
    few.accept(1.0, 0.0)
    assert few.judge(1e9, 1e9) is None  # a median of one number says nothing


def _batch(value: float = 1.0, episode: int = 17) -> tuple[dict[str, Any], Losses]:
    action = torch.zeros(2, 8, 4)
    action[1, 5, 3] = value
    batch = {"action": action, "state": torch.zeros(2, 3, 2), "episode": torch.tensor([3, episode]), "start": torch.tensor([0, 40]), "embodiment": ["a", "a"]}
    errors = Part(torch.tensor([1.0, math.nan]), torch.ones(2), torch.ones(2))
    return batch, Losses(["skip", "joint"], errors, errors)


def test_the_diagnosis_names_what_recurs(tmp_path: Path) -> None:
    config = GuardsConfig(max_skipped=2, window=50)
    for step in (7, 9, 12):
        batch, losses = _batch(-1834.5)
        save_evidence(tmp_path, step, 0, "the loss is nan", batch, losses, {"backbone": 3.0 * step, "new": math.nan})
    text = diagnosis(tmp_path, (7, 9, 12), config, 1e-3)
    assert "3 of the last 50 steps were left out (training.guards.max_skipped is 2): 3 x the loss is not finite" in text
    assert "episode 17 3 times" in text and "mode joint 3 times" in text and "episode 3 " not in text
    assert "action dimension 3 is -1834.5 in episode 17, row 40" in text and "backbone 36" in text and "`wam check`" in text
    tensors = load_file(tmp_path / "skipped" / "step-00000009" / "rank-00000.safetensors")
    assert tensors["action"][1, 5, 3] == -1834.5
    other = tmp_path / "other"
    for step in range(3):
        batch, losses = _batch(1.0, episode=step)
        save_evidence(other, step, 0, "the gradient's norm is 9, 200 times the median of the last 30 steps", batch, losses, {})
    text = diagnosis(other, range(3), config, 1e-3)
    assert "the gradient's norm exploded" in text and "lower training.learning_rate (now 0.001)" in text and "action dimension 3 is 1.0 in episode" in text


# ------------------------------------------------------------------------------------------------ in the loop


def _break(monkeypatch: pytest.MonkeyPatch, *calls: int) -> None:
    """Make the network's actions NaN at some of its calls in training (from 0; none given: at every one)."""
    real, count = WorldActionModel.forward_train, [0]

    def broken(self: WorldActionModel, *args: Any) -> Any:
        video, action = real(self, *args)
        count[0] += 1
        return video, action * math.nan if not calls or count[0] - 1 in calls else action

    monkeypatch.setattr(WorldActionModel, "forward", broken)


def test_a_step_that_is_left_out_changes_nothing_and_the_count_survives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _break(monkeypatch, 1)
    train(quick_config("training.steps=3", *QUICK), tmp_path)
    folder = tmp_path / "skipped" / "step-00000001"
    told = json.loads((folder / "rank-00000.json").read_text())
    assert told["reason"] == "the loss is nan" and len(told["samples"]) == 4 and {"episode", "start", "mode", "action_error", "video_level"} <= set(told["samples"][0])
    tensors = load_file(folder / "rank-00000.safetensors")
    assert tensors["frames"].dtype == torch.uint8 and len(tensors["action_levels"]) == 4
    first, second, third = (_state(tmp_path, step) for step in (1, 2, 3))
    assert all(torch.equal(first[k], second[k]) for k in first if not k.startswith("random.")) and not torch.equal(first["model.action_decoder.table"], third["model.action_decoder.table"])
    assert read_manifest(state_folder(tmp_path, 3))["guards"]["skipped"] == [1]
    _break(monkeypatch)
    with pytest.raises(Unstable, match=r"3 of the last 100 steps were left out .* The batches are in"):  # one of them from before
        train(quick_config("training.steps=9", "training.guards.max_skipped=2", *QUICK), tmp_path)
    assert read_manifest(state_folder(tmp_path, 4))["guards"]["skipped"] == [1, 3]


def _state(output: Path, step: int) -> dict[str, torch.Tensor]:
    only = output.parent / f"{output.name}-{step}"
    (only / "state").mkdir(parents=True)
    os.symlink(state_folder(output, step), state_folder(only, step))
    return newest_state(only)


# ------------------------------------------------------------------------------------------------ other processes


def test_who_is_late_and_who_is_gone() -> None:
    def beat(count: int, stage: str, seconds: float, **more: Any) -> Beat:
        return Beat(**{**vars(SimpleNamespace(serial=1, count=count, stage=stage, step=12, seconds=seconds, where="dataset.py:9 read", host="node3", pid=77)), **more})

    waiting, quick = beat(10, "update", 700), {0: 0.0, 1: 0.5, 2: 0.5}
    beats = {0: waiting, 1: beat(9, "data", 800), 2: waiting}
    told = verdict(beats, quick, 600, 60)
    assert told is not None and "wait for process 1, which did not arrive within 600 s" in told and "process 1 (node3, pid 77) is in 'data' of step 12 for 800 s, at dataset.py:9 read" in told
    assert verdict({**beats, 1: beat(9, "data", 500)}, quick, 600, 60) is None  # late, but not yet too late
    told = verdict({0: waiting, 1: waiting, 2: waiting}, quick, 600, 60)
    assert told is not None and told.startswith("no process has got on for 600 s") and told.count("'update'") == 3
    told = verdict({0: beat(10, "update", 5), 1: beat(10, "update", 5)}, {0: 0.0, 1: 61.0}, 600, 60)
    assert told is not None and told.startswith("process 1 (node3, pid 77) is gone: no sign of life for 61 s")
    told = verdict({0: beat(10, "update", 5), 1: beat(9, "data", 5, state="failed", error="OSError: full")}, {0: 0.0, 1: 1.0}, 600, 60)
    assert told is not None and "process 1 (node3, pid 77) stopped in 'data' of step 12: OSError: full" in told
    assert verdict({0: beat(10, "update", 900), 1: beat(10, "end", 900, state="done")}, {0: 0.0, 1: 900.0}, 1000, 60) is None


def test_the_process_that_keeps_the_store_stays_until_the_others_know() -> None:
    """Also of those that it has never heard of: it may fail before their first beats are read."""
    keys: set[str] = set()
    watch = object.__new__(Watch)
    watch.world, watch._beats, watch._lock, watch._store = 3, {}, threading.Lock(), SimpleNamespace(check=lambda names: set(names) <= keys)
    assert not watch._all_know()
    keys |= {"read/1", "read/2"}
    assert watch._all_know()
    keys.remove("read/2")
    running = Beat(serial=1, count=1, stage="data", step=0, seconds=0.0, where="", host="", pid=1)
    watch._beats[2] = running
    assert not watch._all_know()
    watch._beats[2] = replace(running, state="done")
    assert watch._all_know()


def go_wrong(rank: int, how: str) -> None:
    """In one of the processes, the second update sleeps for ever, or fails, or the process is killed there."""
    from wam.training.engine import Engine

    real, count = Engine.step, [0]

    def step(self: Engine, *args: Any) -> Any:
        count[0] += 1
        if self.rank == rank and count[0] == 2:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "fails":
                raise ValueError("the bridge is out")
            time.sleep(1000)
        return real(self, *args)

    Engine.step = step  # type: ignore[method-assign]


HOW = {"hangs": 1, "killed": 1, "fails": 0}  # and in which of two processes


@pytest.fixture(scope="module")
def wrong(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[int | None]]]:
    """Runs that go wrong and how their processes ended; while one waits for the process that hangs, the others go on."""
    folder = tmp_path_factory.mktemp("wrong")

    def begin(how: str) -> list[Any]:
        minutes = 0.35 if how == "hangs" else 2
        return start(run_training, folder / how, ("training.steps=4", f"training.engine.timeout_minutes={minutes}", *QUICK), go_wrong, HOW[how], how, world=2)

    waiting = begin("hangs")
    codes = {how: finish(begin(how)) for how in HOW if how != "hangs"}
    return {how: (folder / how, codes.get(how) or finish(waiting)) for how in HOW}


@pytest.mark.parametrize("how", list(HOW))
def test_processes_that_wait_for_another_name_it_and_stop(wrong: dict[str, tuple[Path, list[int | None]]], how: str) -> None:
    rank, (output, codes) = HOW[how], wrong[how]
    told = said(output, 1 - rank)
    assert f"process {rank} (" in told and "it goes on from its last state" in told
    if how == "hangs":
        assert codes[1] == EXIT_STOPPED and codes[0] in (2, EXIT_STOPPED) and "is in 'update' of step 1" in told and "test_guards.py" in told  # the line that it is at
        assert "process 1 (" in said(output, 1)
    elif how == "killed":
        assert codes[1] == -signal.SIGKILL and codes[0] in (2, EXIT_STOPPED) and "is gone" in told and "it was last seen in " in told
    else:
        assert codes[0] == 2 and codes[1] in (2, EXIT_STOPPED) and "ValueError: the bridge is out" in told
