"""`wam bench loop` on the fake robot: every row is there, both ways drive the same episodes, and a difference is found."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_robot import FakeVector, fake_policy

from wam.cli import main
from wam.evaluation import rollout as rollout_module
from wam.evaluation.bench.loop import Alike, LoopOptions, _alike, _episodes, _Robots
from wam.evaluation.episodes import Episode
from wam.pretrained import save_pretrained


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("policy")
    save_pretrained(fake_policy(), directory)
    return directory


def test_every_row_is_measured_and_all_episodes_end_alike(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(rollout_module, "VectorEnv", FakeVector)
    assert main(["bench", "loop", "--checkpoint", str(checkpoint), "--env", "fake", "--modes", "skip", "--quick", "--json", str(tmp_path / "loop.json")]) == 0
    report, printed = json.loads((tmp_path / "loop.json").read_text()), capsys.readouterr().out
    names = [row["row"] for row in report["stages"]]
    assert {"encode", "prefill", "commit", "denoise", "observation to actions", "observe and plan", "simulate", "render", "episodes"} <= set(names)
    assert [(row["row"], row["times"], row["limit"], row["holds"]) for row in report["counts"]] == [("episodes that end alike", 2, 2, True)] * 2
    assert [row["setting"] for row in report["comparisons"]] == ["skip, robots: 2", "skip, episodes: 2", "skip, episodes: 2"]
    whole = next(row for row in report["stages"] if row["row"] == "episodes")
    assert whole["spent_s"].keys() == {"begin", "wait"} and whole["episodes_per_minute"] == pytest.approx(120 / whole["seconds"])
    assert "milliseconds of wall time" in printed and "episodes a minute; plan" in printed


def test_episodes_that_end_otherwise_are_counted_and_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    first = Episode(1, True, 30, 4, 0, outcome="success")
    assert _alike(first, replace(first, latency_ms_max=3.0)) and not _alike(first, replace(first, length=31)) and not _alike(first, replace(first, outcome="failed"))
    assert Alike("x", "y", 2, 2).holds and not Alike("x", "y", 1, 2).holds

    class Moody(FakeVector):
        """Several robots at once tire sooner."""

        def __init__(self, name: str, n: int, workers: int = 2, max_steps: int = 40, **settings: Any) -> None:
            super().__init__(name, n, workers, max_steps - 8 * (n > 1), **settings)

    monkeypatch.setattr(rollout_module, "VectorEnv", Moody)
    options = LoopOptions(checkpoint=Path(), env="fake", robots=2, steps=24, repeats=2)
    alike = [row for row in _episodes(fake_policy(), "skip", options) if isinstance(row, Alike)]
    assert [row.holds for row in alike] == [False, False] and all(row.times < row.limit == 2 for row in alike)


def test_robots_that_came_at_different_times_share_passes_or_go_one_by_one() -> None:
    policy = fake_policy()
    sides = [_Robots.of(policy, "skip", 2) for _ in range(2)]
    assert len({session.block for session in sides[0].sessions}) == 2
    sides[0].together()
    sides[1].apart()
    assert [s.block for s in sides[0].sessions] == [s.block for s in sides[1].sessions]


def test_a_loop_without_a_policy_is_refused(capsys: pytest.CaptureFixture) -> None:
    assert main(["bench", "loop"]) != 0
    assert "--checkpoint" in capsys.readouterr().err
