"""`wam paired`: files in, counts and sentences out; what is not the same episodes is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from wam.cli import main
from wam.evaluation.paired import compare_runs, text
from wam.evaluation.statistics import hierarchical_paired_bootstrap, mcnemar

A = [True] * 34 + [False] * 16
B = [True] * 20 + [False] * 14 + [True] * 2 + [False] * 14


def mode_of(won: Sequence[bool], crashed: Sequence[int] = ()) -> dict[str, Any]:
    rows = [{"seed": 20000 + i, "success": w, "outcome": "crashed" if i in crashed else "success" if w else "failed"} for i, w in enumerate(won)]
    return {"successes": sum(won), "episodes": len(won), "episode_results": rows}


def write(folder: Path, modes: Mapping[str, Mapping[str, Any]], **settings: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    content = {"format": "wam-rollout-1", "env": "fake/one", "max_steps": 500, "control_hz": 80, "replan": 8, "started": str(folder), "modes": modes, **settings}
    (folder / "rollout.json").write_text(json.dumps(content))
    return folder / "rollout.json"


def test_two_runs_of_one_mode(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = write(tmp_path / "surprise" / "rollout", {"skip": mode_of(A), "joint": mode_of(A)}, check={"source": "plan"})
    b = write(tmp_path / "blind" / "rollout", {"skip": mode_of(B)}, check={"source": "none"})
    assert main(["paired", str(a), str(b.parent), "--json", str(tmp_path / "out.json")]) == 0
    said, figures = capsys.readouterr().out, json.loads((tmp_path / "out.json").read_text())
    [comparison] = figures["comparisons"]
    entry = comparison["tasks"]["fake/one"]
    assert [entry[key] for key in ("episodes", "successes_a", "successes_b", "both", "only_a", "only_b", "neither")] == [50, 34, 22, 20, 14, 2, 14]
    assert entry["p"] == entry["p_corrected"] == pytest.approx(mcnemar(A, B)) and entry["difference"] == pytest.approx(0.24)
    assert entry["low"] < entry["difference"] < entry["high"] and entry["bootstrap_low"] < entry["difference"] < entry["bootstrap_high"]
    assert "surprise/rollout skip" not in said and "surprise/rollout/rollout.json" not in said, "only what differs in the paths"
    assert "surprise skip 34/50 (54-79 %) against blind skip 22/50 (31-58 %) on the same 50 seeds: +24.0 points (" in said
    assert "surprise skip succeeds more often." in said and "check.source: plan, none" in said and "started" not in said


def test_two_modes_of_one_run_and_several_at_once(tmp_path: Path) -> None:
    one = write(tmp_path, {"skip": mode_of(A), "joint": mode_of(B)}, baselines={"random": mode_of([False] * 50), "expert": {"successes": 50, "episodes": 50}})
    [comparison] = compare_runs(one, modes=["joint", "skip"])["comparisons"]
    assert (comparison["a"], comparison["b"]) == ("joint", "skip") and comparison["tasks"]["fake/one"]["difference"] == pytest.approx(-0.24)
    assert compare_runs(one, modes=["skip", "random"])["comparisons"][0]["tasks"]["fake/one"]["successes_b"] == 0
    other = write(tmp_path / "other", {"skip": mode_of(B), "joint": mode_of(A)})
    results = compare_runs(one, other, labels=("new", "old"))
    first, second = (c["tasks"]["fake/one"] for c in results["comparisons"])
    assert first["p_corrected"] == second["p_corrected"] == pytest.approx(2 * mcnemar(A, B)) and "corrected for several comparisons" in first["claim"]
    assert "new joint" in text(results) and "(of 2)" in text(results)


def test_success_may_have_to_come_in_time(tmp_path: Path) -> None:
    quick, slow = ({**mode_of(A), "episode_results": [{**row, "length": steps} for row in mode_of(A)["episode_results"]]} for steps in (200, 201))
    a, b = write(tmp_path / "a", {"skip": quick}), write(tmp_path / "b", {"skip": slow})
    counts = {within: compare_runs(a, b, within=within)["comparisons"][0]["tasks"]["fake/one"] for within in (None, 200, 201)}
    assert [(e["successes_a"], e["successes_b"]) for e in counts.values()] == [(34, 34), (34, 0), (34, 34)]
    assert text(compare_runs(a, b, within=200)).startswith("Success within 200 control steps.")
    with pytest.raises(ValueError, match=r"driven for 500 control steps.*within 501 is not known"):
        compare_runs(a, b, within=501)


def test_an_episode_whose_simulator_crashed_is_nobodys_failure(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", {"skip": mode_of(A, crashed=[49, 3])}), write(tmp_path / "b", {"skip": mode_of(B, crashed=[3])})
    entry = compare_runs(a, b)["comparisons"][0]["tasks"]["fake/one"]
    assert (entry["episodes"], entry["successes_a"], entry["successes_b"], entry["crashed_left_out"]) == (48, 33, 21, 2)
    assert entry["claim"].endswith("2 seeds are left out because a simulator crashed.")


def suite(folder: Path, tasks: Mapping[str, Sequence[bool]]) -> Path:
    for task, won in tasks.items():
        write(folder / task, {"skip": mode_of(won)}, env=f"fake/{task}")
    (folder / "suite.json").write_text(json.dumps({"format": "wam-suite-1", "suite": "fake/all", "modes": {"skip": {"tasks": {f"fake/{t}": {} for t in tasks}}}}))
    return folder


def test_a_suite_is_compared_by_task_and_over_tasks(tmp_path: Path) -> None:
    a, b = suite(tmp_path / "a", {"one": A, "two": A, "three": B}), suite(tmp_path / "b", {"one": B, "two": A, "three": B})
    results = compare_runs(a, b)
    [comparison] = results["comparisons"]
    over, tasks = comparison["over_tasks"], comparison["tasks"]
    assert [entry["difference"] for entry in tasks.values()] == pytest.approx([0.24, 0, 0]) and tasks["fake/one"]["p_corrected"] == pytest.approx(3 * mcnemar(A, B))
    assert over["difference"] == pytest.approx(0.08) and over["p"] == pytest.approx(mcnemar(A + A + B, B + A + B))
    assert (over["low"], over["high"]) == hierarchical_paired_bootstrap([(A, B), (A, A), (B, B)]) and over["low"] <= 0
    assert over["claim"].endswith("a skip succeeds more often on these tasks; that it would on others like them is not shown, because tasks differ too much.")
    assert "mean over tasks" in text(results) and text(results).count("seeds:") == 1 and "one: a skip 34/50" in text(results), "one task shows it by itself"

    few = compare_runs(suite(tmp_path / "c", {"one": A[30:40], "two": A[:10]}), suite(tmp_path / "d", {"one": B[30:40], "two": A[:10]}))
    over = few["comparisons"][0]["over_tasks"]
    assert over["episodes_needed"] > over["episodes"] == 20 and f"about {-(-over['episodes_needed'] // 2)} seeds of each task would show it" in over["claim"]
    assert "No task shows a difference by itself (p corrected for 2 tasks)." in text(few)


@pytest.mark.parametrize(
    ("change", "modes", "message"),
    [
        ({"env": "fake/two"}, [], "the environments differ: fake/one against fake/two"),
        ({"max_steps": 300}, [], "fake/one: max_steps is 500 in one and 300 in the other"),
        ({"modes": {"skip": mode_of(A[:49])}}, [], r"fake/one, a skip and b skip: the seeds are not the same: only the first drove 20049"),
        ({"modes": {"joint": mode_of(A)}}, [], "no mode in common: skip against joint"),
        ({"modes": {"skip": mode_of([])}}, ["skip"], "'skip' was not driven in the second run"),
        ({}, ["skp"], "mode 'skp' was not driven in the first run .in every task.; driven: skip"),
        ({}, ["skip", "skip", "skip"], "name one mode, or one of each run"),
        ({"modes": {"skip": {"episode_results": [{"seed": 1, "success": True}] * 2}}}, [], "seed 1 twice"),
        ({"modes": None}, [], "holds no modes"),
    ],
)
def test_what_is_not_the_same_episodes_is_refused(tmp_path: Path, change: dict[str, Any], modes: list[str], message: str) -> None:
    a = write(tmp_path / "a", {"skip": mode_of(A)})
    compare_runs(a, write(tmp_path / "b", {"skip": mode_of(B)}))
    with pytest.raises(ValueError, match=message):
        compare_runs(a, write(tmp_path / "b", **{"modes": {"skip": mode_of(B)}, **change}), modes)


def test_missing_files_say_what_is_expected(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds neither rollout"):
        compare_runs(tmp_path)
    (tmp_path / "rollout.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        compare_runs(tmp_path)
    with pytest.raises(ValueError, match="name two modes of one run"):
        compare_runs(write(tmp_path / "a", {"skip": mode_of(A)}))
