"""`wam bench serve` on a tiny policy: every row is measured, openpi's loop answers as ours does, and a soak sees what goes wrong."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from fake_robot import fake_policy

from wam.cli import main
from wam.evaluation.bench.report import BenchError
from wam.evaluation.bench.rows import Comparison
from wam.evaluation.bench.serve import OPENPI, OURS, _rows
from wam.evaluation.bench.serve import ServeBenchOptions as Options
from wam.evaluation.bench.serve_load import Load, Robot, hello
from wam.evaluation.bench.serve_sides import ServerProcess, Side
from wam.evaluation.bench.serve_soak import GROWTH, Pace, Soak, growth
from wam.pretrained import save_pretrained


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("policy")
    save_pretrained(fake_policy(), directory)
    return directory


def test_every_row_is_measured(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["bench", "serve", "--checkpoint", str(checkpoint), "--modes", "skip", "--quick", "--json", str(tmp_path / "serve.json")]) == 0
    report, printed = json.loads((tmp_path / "serve.json").read_text()), capsys.readouterr()
    stages = {(row["row"], row["setting"]): row for row in report["stages"]}
    for robots in (1, 2):
        for side in ("wam serve", "without batching", "openpi's loop"):
            row = stages[f"a plan, {side}", f"skip, robots: {robots}"]
            assert row["plans"] >= 2 * 3 * robots and 0 < row["p50_ms"] <= row["p95_ms"] <= row["p99_ms"] and row["plans_per_second"] > 0
            assert row["mean_batch"] == 1 or (side == "wam serve" and robots == 2)
    assert stages["a plan, wam serve", "skip, robots: 2"]["mean_batch"] > 1, "robots that ask at once share a forward pass"
    assert stages["round trip without a policy, wam serve", "3 cameras of 180x320"]["plans"] >= 6
    assert [row["setting"] for row in report["comparisons"]] == [*["skip, robots: 1"] * 2, *["skip, robots: 2"] * 2, *["3 cameras of 180x320"] * 2]
    assert stages["the bare policy", "3 cameras of 180x320"]["wall_ms"]["median"] > 0
    assert "load of the machine" in printed.out and "100%" in printed.err, "how far it is was shown"


def test_openpis_loop_gives_the_same_plans(checkpoint: Path) -> None:
    """Both sides do the same work: the same robot gets the same actions."""

    async def plans(url: str) -> list[np.ndarray]:
        socket, told = await hello(url)
        robot = Robot(socket, told, "skip", 7, (32, 32), int(told["frames_per_block"]))
        replies = [await robot.ask() for _ in range(5)]  # beyond the length of the memory
        await socket.close()
        return [reply["actions"] for reply in replies]

    with ServerProcess(Side("ours", checkpoint)) as ours, ServerProcess(Side("theirs", checkpoint, loop="openpi")) as theirs:
        both = [asyncio.run(plans(server.url)) for server in (ours, theirs)]
    for mine, other in zip(*both, strict=True):
        assert np.array_equal(mine, other)
    assert not np.array_equal(both[0][0], both[0][1])


def test_sixteen_robots_in_skip_must_be_twice_as_fast_and_nothing_slower() -> None:
    loads = {OURS: [Load([10.0] * 10, 1.0, 0.5, [1])], "without batching": [Load([10.0] * 10, 1.0, 0.5, [1])], OPENPI: [Load([10.0] * 10, 1.9, 0.5, [1])]}
    options = Options(checkpoint=Path())

    def holds(mode: str, robots: int) -> list[bool]:
        return [row.holds for row in _rows(mode, robots, loads, options) if isinstance(row, Comparison)]

    assert holds("skip", 4) == [True, True] and holds("joint", 16) == [True, True] and holds("skip", 16) == [True, False]
    loads[OPENPI] = [Load([10.0] * 10, 0.9, 0.5, [1])]
    assert holds("skip", 1) == [True, False]


def test_a_server_that_does_not_start_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="the server of nothing does not run: FileNotFoundError"):
        ServerProcess(Side("nothing", tmp_path))


def test_a_short_soak_accounts_for_every_request(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["bench", "serve", "--checkpoint", str(checkpoint), "--soak", "0.05", "--json", str(tmp_path / "soak.json")]) == 0, capsys.readouterr().out
    told = json.loads((tmp_path / "soak.json").read_text())
    requests = told["requests"]
    assert requests["answered"] > 10 and requests["asked"] == sum(requests.get(how, 0) for how in ("answered", "refused", "abandoned"))
    assert told["left"] == told["internal"] == 0 and len(told["memory"]) > 10 and not told["problems"]


def test_a_soak_can_be_held_to_a_rate() -> None:
    async def asked(rate: float | None, seconds: float) -> int:
        begun, count = time.monotonic(), 0
        pace = Pace(rate, random.Random(0))
        while time.monotonic() < begun + seconds and count < 10_000:
            await pace.turn(2, begun + seconds)
            count += 2
        return count

    assert 20 <= asyncio.run(asked(100.0, 0.5)) <= 80 and asyncio.run(asked(None, 0.5)) == 10_000
    assert main(["bench", "serve", "--checkpoint", ".", "--soak", "1", "--rate", "0"]) != 0


def test_what_a_soak_must_not_find() -> None:
    rng = np.random.default_rng(0)
    seconds = np.arange(3600.0)
    steady = [(t, 500 + noise) for t, noise in zip(seconds, rng.normal(size=3600), strict=True)]
    warming = [(t, mib - 200 * np.exp(-t / 60)) for t, mib in steady]
    leaking = [(t, mib + 2 * GROWTH * t / 3600) for t, mib in steady]
    for samples, holds in ((steady, True), (warming, True), (leaking, False), (leaking[:1000], True)):  # the last grew by a few MiB in all
        grown = growth(samples)
        assert grown is not None and grown.holds is holds and grown.low < grown.slope < grown.high
    assert abs(growth(leaking).slope - 2 * GROWTH) < 2 and growth(steady[:60]) is None  # type: ignore[union-attr]
    good = Soak(Counter(asked=3, answered=1, refused=1, abandoned=1), memory=steady)
    assert not good.problems()
    good.requests["asked"] += 1
    assert "1 requests were lost" in good.problems()[0]
    bad = Soak(Counter(asked=1, answered=1), memory=leaking, left=2, internal=1, alive=False)
    assert len(bad.problems()) == 4 and "memory grows by" in bad.text()
