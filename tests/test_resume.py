"""A run that was killed, at any moment and also while it saved, ends where one ends that was not: to the bit, on one process and on two."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from survival import die_at, finish, losses, newest_state, quick_config, run_training, same, start

from wam.cli import main
from wam.training.checkpoints import state_folder, states
from wam.training.loop import train
from wam.training.state import PREVIOUS, differences, require_state

ROOT = Path(__file__).parents[1]
STEPS = ("training.steps=5", "training.save_every=1", "training.validate_every=2", "training.keep={last: 2, best: 1}", "training.modes={skip: 1}")


def _policies_equal(a: Path, b: Path) -> bool:
    whole, other = (safetensors.torch.load_file(path / "model.safetensors") for path in (a, b))
    return whole.keys() == other.keys() and all((whole[k] == other[k]).all() for k in whole)


def test_killed_at_random_and_while_it_saves_on_one_process(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert finish(start(run_training, whole, STEPS)) == [0]
    draw, killed = random.Random(0), 0
    for _ in range(5):  # at a call that touches the disk: about 60 of them make a save
        killed += finish(start(run_training, parts, STEPS, die_at, draw.randint(20, 90))) == [-signal.SIGKILL]
    processes = start(run_training, parts, STEPS)  # and at a time
    time.sleep(draw.uniform(0.5, 3))
    processes[0].kill()
    finish(processes)
    assert finish(start(run_training, parts, STEPS)) == [0]
    assert killed >= 4 and states(parts) == states(whole)
    assert same(newest_state(whole), newest_state(parts)) and losses(whole) == losses(parts)
    for name in ("checkpoint", "best"):
        assert _policies_equal(whole / name, parts / name)
    assert not [path for path in (*parts.glob(".*"), *(parts / "state").glob("*")) if not (path / "manifest.json").exists()], "debris"


@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3"])
def test_killed_while_it_saves_on_two_processes_then_another_number_goes_on(tmp_path: Path, engine: str) -> None:
    if engine != "ddp":
        pytest.importorskip("deepspeed")
    kind = () if engine == "ddp" else ("training.engine.kind=deepspeed", f"training.engine.deepspeed={ROOT / 'configs' / 'deepspeed' / f'{engine}.json'}")
    overrides = ("training.steps=3", "training.save_every=1", "training.validate_every=9", "training.modes={skip: 1}", "data.validation_fraction=0", *kind)
    whole, parts, one = tmp_path / "whole", tmp_path / "parts", tmp_path / "one"
    assert finish(start(run_training, whole, overrides, world=2)) == [0, 0]
    codes = finish(start(run_training, parts, (*overrides, "training.engine.timeout_minutes=2"), die_at, 90, world=2))
    assert codes[0] == -signal.SIGKILL and codes[1] not in (0, None), codes  # the other one does not hang
    assert len(states(parts)) > 0 and states(parts)[-1] < 3
    step = states(parts)[-1]
    shutil.copytree(state_folder(parts, step), state_folder(one, step))
    assert finish(start(run_training, parts, overrides, world=2)) == [0, 0]
    assert same(newest_state(whole), newest_state(parts)) and losses(whole) == losses(parts)
    single = [x for x in overrides if not x.startswith("training.engine")]
    train(quick_config(*single), one)  # one process goes on from the state of two, over the same samples
    told, other = losses(one), losses(whole)
    assert told.keys() == set(range(step + 1, 4))
    for at, values in told.items():
        assert values.keys() == other[at].keys() and all(abs(values[k] - other[at][k]) < 1e-5 * max(1, abs(values[k])) for k in values)
    a, b = newest_state(whole), newest_state(one)
    assert all(torch.allclose(a[k], b[k], atol=2e-5) for k in a if k.startswith(("model.", "ema.")))


def test_a_request_to_stop_finishes_the_step_and_saves_it(tmp_path: Path) -> None:
    config = quick_config("training.steps=400", "training.save_every=1000", "training.validate_every=1000")

    def ask() -> None:
        while not (tmp_path / "log.jsonl").exists() or len((tmp_path / "log.jsonl").read_text().splitlines()) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=ask)
    thread.start()
    with pytest.raises(KeyboardInterrupt, match=r"stopped after step \d+, which is saved; run the same command again"):
        train(config, tmp_path)
    thread.join()
    assert states(tmp_path) == [max(losses(tmp_path))] and signal.getsignal(signal.SIGTERM) is before


def test_the_clock_of_max_minutes_goes_on(tmp_path: Path) -> None:
    train(quick_config("training.steps=1", "training.max_minutes=30"), tmp_path)
    manifest = state_folder(tmp_path, 1) / "manifest.json"
    told = json.loads(manifest.read_text())
    assert 0 < told["elapsed_seconds"] < 600 and told["schedule"]["learning_rate"] > 0 and told["data"]["samples"] == 4
    manifest.write_text(json.dumps({**told, "elapsed_seconds": 0.9 * 1800}))
    train(quick_config("training.steps=2", "training.max_minutes=30"), tmp_path)
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert 0.9 < next(r["progress"] for r in records if r["step"] == 2 and "progress" in r) < 0.95


def test_starting_over_puts_the_old_run_aside_and_nothing_is_overwritten(tmp_path: Path) -> None:
    config = quick_config("training.steps=1")
    train(config, tmp_path)
    old = (tmp_path / "checkpoint" / "model.safetensors").read_bytes()
    train(config, tmp_path, resume=False)
    aside = tmp_path / PREVIOUS / "001"
    assert states(aside) == states(tmp_path) == [1] and (aside / "checkpoint" / "model.safetensors").read_bytes() == old and (aside / "log.jsonl").exists()
    os.rename(tmp_path / "state", tmp_path / "moved")
    with pytest.raises(ValueError, match=r"has a policy in checkpoint/ but no state/ to go on from"):
        train(config, tmp_path)
    (tmp_path / "training_state.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"of an earlier version .* training.finetune_from="):
        train(config, tmp_path)


def test_resuming_and_finetuning_exclude_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--resume", "--output", str(tmp_path)]) == 2 and "no state to go on from" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match="no state to go on from"):
        require_state(tmp_path, quick_config())
    with pytest.raises(ValueError, match=r"--resume and training.finetune_from=x exclude each other: .* model.pretrained"):
        require_state(tmp_path, quick_config("training.finetune_from=x"))


def test_what_makes_it_another_run_and_what_does_not() -> None:
    default = {"a": 1, "new": 5}
    assert differences({"a": 1}, {"a": 2, "new": 5}, default) == {"a": (1, 2)}
    assert differences({"a": 1}, {"a": 1, "new": 6}, default) == {"new": (5, 6)}  # a key that the older version did not have counts as its default
