"""A run that was killed, at any moment and also while it saved, ends where one ends that was not: to the bit, on one process and on two."""

from __future__ import annotations

import random
import time
from pathlib import Path

import safetensors.torch
from survival import die_at, finish, losses, newest_state, run_training, same, start

from wam.training.checkpoints import states

STEPS = ("training.steps=6", "training.save_every=1", "training.validate_every=2", "training.keep={last: 2, best: 1}")


def _policies_equal(a: Path, b: Path) -> bool:
    whole, other = (safetensors.torch.load_file(path / "model.safetensors") for path in (a, b))
    return whole.keys() == other.keys() and all((whole[k] == other[k]).all() for k in whole)


def test_killed_at_random_and_while_it_saves_on_one_process(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert finish(start(run_training, whole, STEPS)) == [0]
    draw, killed = random.Random(0), 0
    for _ in range(7):  # at a call that touches the disk: about 60 of them make a save
        killed += finish(start(run_training, parts, STEPS, die_at, draw.randint(20, 90))) == [-9]
    for _ in range(2):  # and at a time
        processes = start(run_training, parts, STEPS)
        time.sleep(draw.uniform(0.5, 3))
        processes[0].kill()
        killed += finish(processes) == [-9]
    assert finish(start(run_training, parts, STEPS)) == [0]
    assert killed >= 5 and states(parts) == states(whole)
    assert same(newest_state(whole), newest_state(parts)) and losses(whole) == losses(parts)
    for name in ("checkpoint", "best"):
        assert _policies_equal(whole / name, parts / name)
    assert not [path for path in (*parts.glob(".*"), *(parts / "state").glob("*")) if not (path / "manifest.json").exists()], "debris"
