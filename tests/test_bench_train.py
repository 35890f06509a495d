"""The bench of training: what processes hold is what arithmetic says, in real processes; and what cannot be measured says why."""

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TextIO

import pytest
import survival
from tiny import SMALL

from wam.cli import main
from wam.config import Config, load_config
from wam.evaluation.bench import train_worker
from wam.evaluation.bench.report import BenchError
from wam.evaluation.bench.train import ENGINES, KINDS, PHASES, Measured, MemoryRow, TrainOptions, TrainReport, bench_train, expected_bytes

SAMPLE = Path(__file__).parents[1] / "data" / "metaworld_sample"


def _config(*overrides: str) -> Config:
    data = (f"data.root={SAMPLE}", "data.executed_action=action.executed", "codec.image_size=[64, 64]", "codec.fit_frames=100", "timeline.blocks=2", "training.batch_size=4")
    return load_config(None, (*SMALL, *data, "model.heads=4", "model.ffn_dim=256", "training.precision=fp32", *overrides))


def test_arithmetic_of_each_engine() -> None:
    """In bytes a parameter, on each of four processes."""
    table = {"single": 20, "ddp": 20, "zero1": 4 + (4 + 4 + 8 + 4) / 4, "zero2": 4 + (4 + 4 + 8 + 4) / 4, "zero3": (4 + 4 + 4 + 8 + 4) / 4, "fsdp2": (4 + 4 + 8 + 4) / 4}
    assert {engine: sum(expected_bytes(engine, kind, 1, 4) for kind in KINDS) for engine in ENGINES} == table
    assert MemoryRow("ddp", "weights", [100, 104], 100.0).holds and not MemoryRow("ddp", "weights", [100, 106], 100.0).holds and not MemoryRow("ddp", "weights", [90, 91], 100.0).holds
    assert MemoryRow("ddp", "masters", [0, 0], 0.0).holds and not MemoryRow("ddp", "masters", [0, 1], 0.0).holds


def test_communication_is_what_a_step_takes_longer_than_without() -> None:
    def measured(engine: str, processes: int, backward: float) -> Measured:
        seconds = {phase: [0.1, 0.1, 0.1] for phase in PHASES} | {"backward": [backward] * 3}
        return Measured(engine, processes, 2, 10, seconds, {kind: [0] * processes for kind in KINDS}, [0] * processes)

    rows = (measured("single", 1, 0.9), measured("alone", 2, 0.3), measured("ddp", 2, 0.5))
    report = TrainReport((), {}, rows)
    assert [report.communication(row) for row in rows] == [None, None, pytest.approx(0.2)]
    assert report.tables()[0][3][-2:] == ("200", "5") and {row.engine for row in report.memory} == {"single", "ddp"}


class Forked:
    """In place of a process that is started anew, one that is forked and has imported everything; it is asked the same, with the same environment."""

    def __init__(self, command: Sequence[str], env: dict[str, str], stdout: TextIO, **_: Any) -> None:
        assert list(command[1:3]) == ["-m", train_worker.__name__]
        (self.process,) = survival.start(answer, command[3], env, stdout.name)
        self.kill, self.wait = self.process.kill, self.process.join

    def poll(self) -> int | None:
        return self.process.exitcode


def answer(request: str, environment: dict[str, str], log: str) -> None:
    """What `python -m wam.evaluation.bench.train_worker REQUEST` does."""
    os.environ.update(environment)
    for number in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), number)
    train_worker.main(Path(request))


def test_processes_hold_what_arithmetic_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("wam.evaluation.bench.train.subprocess", SimpleNamespace(Popen=Forked, STDOUT=subprocess.STDOUT))
    path = tmp_path / "bench.json"
    report = bench_train(TrainOptions(_config(), ("single", "zero2"), steps=2, check=True, json=path, markdown=True))
    found = json.loads(path.read_text())
    assert found["holds"] and [row["engine"] for row in found["steps"]] == ["single", "alone", "zero2"] and len(found["memory"]) == 2 * len(KINDS)
    for row in found["steps"]:
        assert row["samples"] * row["processes"] == 4 and all(len(row["seconds"][phase]) == 2 and min(row["seconds"][phase]) > 0 for phase in PHASES)
    assert next(m for m in report.measured if m.engine == "zero2").held["moments"][0] * 2 == pytest.approx(report.measured[0].held["moments"][0], rel=0.05)
    out = capsys.readouterr().out
    assert "| engine | processes |" in out and "| zero2 | moments |" in out and "10 of 10 kinds of memory" in out


def test_a_process_that_fails_says_why() -> None:
    with pytest.raises(BenchError, match=r"(?s)engine 'single': a process ended with 1:.*no dataset"):
        bench_train(TrainOptions(_config("data.root=/nowhere/at/all"), ("single",)))


def test_mistakes_are_told_before_anything_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["bench", "train", "--config", str(Path(__file__).parents[1] / "configs" / "metaworld_tiny.yaml")]
    for argv, said in ((["--engines", "zero4"], "--engines has zero4; expected some of single, ddp, zero1"), (["--processes", "3"], "cannot be shared by 3 processes"), (["--repeats", "0"], "--repeats is 0")):
        assert main([*given, *argv]) == 2
        assert said in capsys.readouterr().err
    assert main(["bench", "model", "training.steps=3"]) == 2 and "reads no config" in capsys.readouterr().err
