"""`wam bench data`: every side reads the same windows, in turns; the claims and the refusals."""

import json
import sys
from pathlib import Path

import lerobot_fixture as fixture
import numpy as np
import pytest

from wam.cli import main
from wam.config import DataConfig, TimelineConfig
from wam.evaluation.bench.data import DataOptions, Rate, bench_data
from wam.evaluation.bench.data_make import SHAPES, film
from wam.evaluation.bench.data_sides import DECORD, LEROBOT, OURS, SIDES, Case, LeRobot, RawFrames, Taken, interleave, lerobot_request
from wam.evaluation.bench.timing import Times


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    root = fixture.write_dataset(tmp_path_factory.mktemp("bench") / "set", (30, 26, 40))
    return Case.of("set", DataConfig(root=str(root)), TimelineConfig(blocks=2), 8, 4, 1)


def test_every_side_reads_the_frames_of_the_window_and_lerobot_is_asked_for_the_same(case: Case) -> None:
    raw, request = RawFrames(case), lerobot_request(case)
    starts = {0: 0, 1: 30, 2: 56}  # an episode's first row in the whole dataset
    for batch, rows in zip(case.batches, request["batches"], strict=True):
        for window, row in zip(batch, rows, strict=True):
            sample = case.plain[window]
            assert np.abs(sample["frames"].astype(int) - raw[window]).max() <= 2
            assert row == starts[sample["episode"]] + sample["start"]
            shown = [fixture.read_stamp(frame) for frame in sample["frames"]]
            last = starts[sample["episode"]] + (30, 26, 40)[sample["episode"]] - 1
            asked = [min(row + round(fixture.FPS * seconds), last) for seconds in request["delta_timestamps"][fixture.CAMERA]]
            assert shown == asked
    assert len(request["delta_timestamps"]["action"]) == 16 and len(request["delta_timestamps"]["observation.state"]) == 2


def test_turns_alternate_after_a_round_to_warm_up() -> None:
    order: list[str] = []

    class Noted:
        def __init__(self, name: str):
            self.name = name

        def take(self, workers: int, least: float) -> Taken:
            order.append(f"{self.name}{workers}")
            return Taken(1.0, 1.0, 1)

        def close(self) -> None: ...

    taken = list(interleave({"a": Noted("a"), "b": Noted("b")}, (0, 2), 2, 0.0))
    assert " ".join(order) == "a0 b0 a0 b0 b0 a0 a2 b2 a2 b2 b2 a2" and [name for name, *_ in taken] == list("abba" * 2)


def test_rates_are_by_the_clock_on_the_wall() -> None:
    rate = Rate("set", 0, OURS, 10, 130, Times((1000.0, 500.0, 2000.0), (100.0, 50.0, 200.0)))
    assert rate.per_second(rate.samples) == (10.0, 5.0, 20.0)
    assert rate.cells()[3:7] == ("10", "130", "5 to 20", "10") and rate.to_dict()["frames_per_second"]["median"] == 130


def test_a_quick_run_without_lerobot_says_how_to_get_it(case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bench.json"
    assert main(["bench", "data", "--data", case.data.root, "--quick", "--workers", "0", "--json", str(path), "--markdown"]) == 0
    out, found = capsys.readouterr().out, json.loads(path.read_text())
    assert "pip install lerobot==0.4.4" in out and f"`wam bench data --data {case.data.root} --workers 0 --quick`" in out
    rates = {rate["side"]: rate for rate in found["rates"]}
    assert set(rates) == {*SIDES, LEROBOT} and "wall_ms" not in rates[LEROBOT]
    assert all(rates[side]["samples_per_second"]["median"] > 0 and rates[side]["frames"] == 13 * rates[side]["samples"] for side in SIDES)
    assert [(row["ours"]["what"], row["theirs"]["what"], row["limit"]) for row in found["comparisons"]] == [(OURS, DECORD, 1.25)]


def test_a_python_without_lerobot_is_refused_with_the_remedy(case: Case, tmp_path: Path) -> None:
    for python, said in ((Path(sys.executable), "pip install lerobot==0.4.4"), (Path("/bin/true"), "ended with 0")):
        if python.is_file():
            with pytest.raises(ValueError, match=said):
                LeRobot(case, python)
    for wrong, said in (({"lerobot_python": tmp_path / "none"}, "there is no such file"), ({"shapes": ("1x1",)}, "expected some of 64x64, 180x320"), ({"workers": ()}, "expected numbers of processes"), ({"repeats": 0}, "at least 1")):
        with pytest.raises(ValueError, match=said):
            bench_data(DataOptions(**wrong))  # type: ignore[arg-type]


def test_films_move_and_have_grain() -> None:
    frames = film(np.random.default_rng(0), 6, 32, 48).astype(int)
    assert frames.shape == (6, 32, 48, 3) and np.abs(np.diff(frames, axis=0)).mean() > 1 and frames.std() > 20
    assert set(SHAPES) == {"64x64", "180x320"}
