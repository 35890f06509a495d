"""State folders are whole or do not count, stay by rule, and a full disk leaves what was there."""

from __future__ import annotations

import errno
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from torch import Tensor

from wam.config_training import KeepConfig
from wam.shards import ShardWriter
from wam.training import checkpoints
from wam.training.checkpoints import BEST, MANIFEST, Checkpoints, kept, read_manifest, read_part, recover, replacing, state_folder, states, verify

Usage = namedtuple("Usage", "total used free")


class Alone:
    """One process."""

    is_main = True

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor


def _parts(step: int) -> list:
    return [("model", [("a", torch.full((4,), float(step))), ("b", torch.ones(2, 3))]), ("optimizer", [("step.a", torch.tensor(float(step)))])]


def _saved(output: Path, *steps: int, keep: KeepConfig | None = None, values: dict[int, float] | None = None) -> Checkpoints:
    kept_here = Checkpoints(output, keep or KeepConfig(), "val/error", Alone())
    for step in steps:
        if values and step in values:
            kept_here.validated(step, {"val/error": values[step]}, lambda step=step: lambda folder: (folder / "weights").write_text(str(step)))
        kept_here.save(step, _parts(step), {"processes": 1}, 100)
    return kept_here


def test_which_states_stay() -> None:
    values = {100: 5.0, 200: 1.0, 300: None, 400: 3.0, 500: 2.0, 600: 4.0}
    assert kept(values, KeepConfig(last=2, best=0)) == {500, 600}
    assert kept(values, KeepConfig(last=1, every=300, best=0)) == {300, 600}
    assert kept(values, KeepConfig(last=1, best=2)) == {200, 500, 600}
    assert kept({}, KeepConfig()) == set()


def test_states_stay_on_disk_by_rule_and_the_best_policy_beside_them(tmp_path: Path) -> None:
    last = _saved(tmp_path, 1, 2, 3, 4, 5, keep=KeepConfig(last=1, every=4), values={1: 3.0, 2: 1.0, 4: 2.0})
    assert states(tmp_path) == [2, 4, 5]  # the best, a multiple, the newest
    assert (tmp_path / BEST / "weights").read_text() == "2" and last.best == {"metric": "val/error", "step": 2, "value": 1.0}
    assert read_manifest(state_folder(tmp_path, 5))["best"]["step"] == 2 and read_manifest(state_folder(tmp_path, 4))["values"] == {"val/error": 2.0}
    with read_part(state_folder(tmp_path, 4), "model") as reader:
        assert reader.get("a").tolist() == [4.0] * 4


def test_the_best_is_the_highest_where_the_config_says_so(tmp_path: Path) -> None:
    saved = Checkpoints(tmp_path, KeepConfig(last=1), "val/psnr/forward", Alone(), highest=True)
    for step, value in ((1, 20.0), (2, 25.0), (3, 22.0), (4, 21.0)):
        assert saved.validated(step, {"val/psnr/forward": value}, lambda: lambda folder: None) == (step <= 2)
        saved.save(step, _parts(step), {"processes": 1}, 100)
    assert saved.best is not None and saved.best["step"] == 2 and states(tmp_path) == [2, 4]


def test_a_metric_that_validation_does_not_have_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved = Checkpoints(tmp_path, KeepConfig(), "val/eror", Alone())
    for step in (1, 2):
        assert not saved.validated(step, {"val/error": 1.0}, lambda: pytest.fail("nothing is the best"))
    assert len(caplog.records) == 1 and "training.best is 'val/eror'" in caplog.text and "it has val/error" in caplog.text
    assert saved.best is None and not (tmp_path / BEST).exists()


def test_what_a_killed_run_left_does_not_count_and_goes(tmp_path: Path) -> None:
    _saved(tmp_path, 1, 2)
    (state_folder(tmp_path, 2) / MANIFEST).unlink()  # killed while it wrote, or while it deleted
    shutil.copytree(state_folder(tmp_path, 2), state_folder(tmp_path, 7))
    assert states(tmp_path) == [1]
    _saved(tmp_path, 3)
    assert sorted(path.name for path in (tmp_path / "state").iterdir()) == ["step-00000001", "step-00000003"]


@pytest.mark.parametrize(("damage", "message"), [("cut", "expected .* bytes, found 10"), ("changed", "expected sha256"), ("gone", "is missing"), ("manifest", "cannot be read")])
def test_damage_is_named_with_what_to_delete(tmp_path: Path, damage: str, message: str) -> None:
    _saved(tmp_path, 1, 2)
    folder = state_folder(tmp_path, 2)
    verify(folder, read_manifest(folder))
    path = folder / ("manifest.json" if damage == "manifest" else "model.safetensors")
    whole = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]) if damage == "changed" else whole[:10])
    with pytest.raises(ValueError, match=rf"{message}.*; delete {folder} to go on from step 1, or restore it"):
        verify(folder, read_manifest(folder))


def test_a_full_disk_leaves_the_state_before_and_says_how_much_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _saved(tmp_path, 1)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    flush, calls = ShardWriter._flush, []

    def full(writer: ShardWriter) -> None:
        calls.append(writer.name)
        if writer.name == "optimizer":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        flush(writer)

    monkeypatch.setattr(ShardWriter, "_flush", full)
    with pytest.raises(OSError, match=r"the disk is full: step 2 needs 100 bytes, [\d,]+ are free; .*; the state of step 1 is whole") as caught:
        _saved(tmp_path, 2)
    assert caught.value.errno == errno.ENOSPC and calls == ["model", "optimizer"]
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_space_is_estimated_before_writing_and_made_by_what_the_rule_would_delete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _saved(tmp_path, 1, 2, keep=KeepConfig(last=2))

    monkeypatch.setattr(checkpoints, "SLACK", 0)
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda path: Usage(3, 0, 90))
    _saved(tmp_path, 3, keep=KeepConfig(last=2))
    assert states(tmp_path) == [2, 3]
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda path: Usage(3, 0, 7))
    monkeypatch.setattr(ShardWriter, "_flush", lambda writer: pytest.fail("nothing may be written"))
    saved = Checkpoints(tmp_path, KeepConfig(last=2), None, Alone())
    with pytest.raises(OSError, match=r"needs 1,000,000 bytes, 7 are free"):
        saved.save(4, _parts(4), {}, 1_000_000)
    assert states(tmp_path) == [2, 3]  # nothing is deleted in vain


def test_every_process_learns_that_the_main_one_could_not_write(tmp_path: Path) -> None:
    class Second(Alone):
        is_main = False

        def sum(self, tensor: Tensor) -> Tensor:
            return tensor + 1  # the main one's flag

    gathered = []
    parts = (("model", ((name, torch.ones(1)) for name in ("a", "b") if not gathered.append(name))) for _ in range(1))
    with pytest.raises(RuntimeError, match="the main process could not write the state of step 5"):
        Checkpoints(tmp_path, KeepConfig(), None, Second()).save(5, parts, {}, 100)
    assert gathered == ["a", "b"] and not (tmp_path / "state").exists()  # it took its part in gathering, and wrote nothing


def test_a_policy_is_replaced_whole(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    for text in ("old", "new"):
        with replacing(folder) as inside:
            (inside / "weights").write_text(text)
        assert (folder / "weights").read_text() == text
    with pytest.raises(OSError, match="full"), replacing(folder) as inside:
        raise OSError("full")
    assert (folder / "weights").read_text() == "new" and os.listdir(tmp_path) == ["checkpoint"]
    folder.rename(tmp_path / ".checkpoint.old")  # killed between the two renames
    shutil.copytree(tmp_path / ".checkpoint.old", tmp_path / ".checkpoint.new")
    recover(folder)
    assert (folder / "weights").read_text() == "new" and os.listdir(tmp_path) == ["checkpoint"]
