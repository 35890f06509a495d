"""`wam compare`: budgets that are equal, changes that are told, tests that claim no more than they may, phases that are kept, a page that stands alone.

Training, timing, imagining and the page are real, in small, on the committed sample; episodes are made up, because a policy of one update
succeeds at nothing.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_report import Reader
from tiny import SMALL

from wam.commands.compare import _taken
from wam.config import ConfigError, DisturbanceConfig, RolloutConfig
from wam.evaluation import baselines, environments
from wam.evaluation import rollout as rollout_module
from wam.evaluation.compare import claims as claims_module
from wam.evaluation.compare import page as page_module
from wam.evaluation.compare.analysis import front
from wam.evaluation.compare.claims import answer, claims, limits, must_differ, slower, speeds
from wam.evaluation.compare.page import write_report
from wam.evaluation.compare.plan import Plan, describe, make_plan
from wam.evaluation.compare.run import Diary, run
from wam.evaluation.compare.settings import QUICK, load_compare
from wam.evaluation.statistics import mcnemar, wilson
from wam.training import loop

SAMPLE = Path(__file__).parents[1] / "data" / "metaworld_sample"
CONFIGS = Path(__file__).parents[1] / "configs"
RATE = 1e11
EVIL = '<script>alert("x")</script>'
DATA = (f"data.root={SAMPLE}", "data.executed_action=action.executed", "codec.image_size=[64, 64]", "codec.fit_frames=200", "timeline.blocks=2")
SHORT = ("training.batch_size=4", "training.warmup_steps=1", "training.validation_batches=1", "training.validation_samples=2", "training.precision=fp32", "training.log_every=1")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A comparison of two variants and a closed loop of its own, over a tiny shared config."""
    (tmp_path / "shared.yaml").write_text("robot: metaworld\n")
    overrides = [*(o for o in SMALL if "blocks" not in o and "image_size" not in o), *DATA, *SHORT, "rollout.episodes=12", "imagine.clips=1", "imagine.blocks=1", "imagine.steps=1", "sampling.steps=1"]
    tree = {
        "config": "shared.yaml",
        "overrides": overrides,
        "collect": False,
        "budget": {"steps": 2},
        "variants": ["all", "vla"],
        "disturbances": {"kinds": ["arm_pushed"]},
        "extras": {"guessing twice": {"variant": "all", "mode": "skip", "overrides": ["rollout.planner.kind=best_of_n"], "about": "two candidates"}},
        "latency_plans": 2,
    }
    path = tmp_path / "compare.yaml"
    path.write_text(json.dumps(tree))
    return path


def planned(file: Path, *overrides: str, **taken: Path) -> Plan:
    settings, own = load_compare(file, overrides)
    return make_plan(file, settings, own, taken, RATE)


# ------------------------------------------------------------------------------------------------ what is planned


def test_every_variant_spends_the_same_operations(file: Path) -> None:
    names = "compare.variants=[all, vla, fast_wam, dreamzero, imagine]"
    variants = planned(file, names, "compare.budget.steps=300").variants
    spent = [v.flops for v in variants]
    assert all(abs(flops - spent[0]) <= v.cost.needed / 2 for v, flops in zip(variants, spent, strict=True))
    assert len({v.steps for v in variants}) == 5, "variants need different numbers of tokens"
    assert {v.name for v in variants if v.cost.computed > v.cost.needed} == {"vla"}, "only vla carries video that nobody looks at"
    assert {v.steps for v in planned(file, names, "compare.budget.equal=steps").variants} == {2}
    clocked = planned(file, names, "compare.budget.equal=minutes", "compare.budget.minutes=3").variants
    assert all(v.steps is None and v.config.training.max_minutes == 3 for v in clocked)


def test_the_committed_comparison_is_planned_also_in_small() -> None:
    for extra in ((), QUICK):
        settings, own = load_compare(CONFIGS / "compare_tiny.yaml", extra)
        plan = make_plan(CONFIGS / "compare_tiny.yaml", settings, own, {}, RATE)
        text = describe(plan)
        assert f"{len(plan.rows) * 2 * plan.config.rollout.episodes} episodes" in text and all(p.name in text for p in plan.phases)
        assert len({v.config.training.seed for v in plan.variants}) == len({v.config.data for v in plan.variants}) == len({v.config.model for v in plan.variants}) == 1
        assert plan.rollout(plan.reference, "calm").disturbances.kinds == () != plan.rollout(plan.reference, "disturbed").disturbances.kinds


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("compare.variants=[all, fastwam]", r"compare.variants names 'fastwam'; use one of all, vla, fast_wam"),
        ("compare.reference=all/inverse", r"compare.reference is 'all/inverse'; name one of the rows all/skip, all/joint"),
        ("compare.more={mine: {modes: [skipp]}}", None),
        ("compare.budget.steps=0", r"budget.steps is 0; it must be at least 1"),
        ("compare.extras={x: {variant: all, mode: skip, overrides: [training.steps=3]}}", r"a row changes rollout.key=value and nothing else"),
        ("compare.extras={x: {variant: other, mode: skip, overrides: []}}", r"extras.x.variant is 'other'; use one of all, vla"),
        ("compare.extras={all/skip: {variant: all, mode: skip, overrides: []}}", r"extras.all/skip has the name of a variant or of another row"),
        ("compare.budgt.steps=3", r"unknown key 'budgt'; did you mean 'budget'"),
        ("rollout.episodes=0", r"rollout.episodes is 0"),
    ],
)
def test_mistakes_are_told_before_anything_is_computed(file: Path, override: str, message: str | None) -> None:
    if message is None:
        with pytest.raises(ValueError, match=r"unknown mode 'skipp'; did you mean 'skip'"):
            planned(file, override, "compare.variants=[all, mine]")
        return
    with pytest.raises(ConfigError, match=re.escape(message) if "(" in message else message):
        planned(file, override)


def test_checkpoints_that_are_taken(file: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"--checkpoint all=.*there is no .*config.yaml; name a folder that `wam train` wrote"):
        planned(file, all=tmp_path)
    with pytest.raises(ValueError, match=r"expected NAME=DIR"):
        _taken(["runs/demo"])
    with pytest.raises(ValueError, match=r"names 'a' twice"):
        _taken(["a=x", "a=y"])


# ------------------------------------------------------------------------------------------------ what may be claimed


def outcomes(reference: str, other: str) -> dict[str, Any]:
    """Rows from texts of 1 (success), 0 (failure) and x (crash), one letter a seed."""
    read = {"1": True, "0": False, "x": None}
    return {name: {"calm": {seed: read[c] for seed, c in enumerate(text)}} for name, text in (("all/skip", reference), ("all/imagine", other))}


def test_a_difference_is_claimed_only_after_correction() -> None:
    (clear,) = claims(outcomes("0" * 20 + "1" * 10, "1" * 20 + "1" * 10), "all/skip")
    assert clear.shows and clear.only_a == 20 and "all/imagine succeeds more often" in clear.says and "on the same 30 seeds" in clear.says
    (close,) = claims(outcomes("0" * 4 + "1" * 26, "1" * 4 + "1" * 26), "all/skip")
    assert not close.shows and close.needed and f"about {close.needed} seeds" in close.says and "They differ in 4 of 30 episodes" in close.says
    (few,) = claims(outcomes("000", "111"), "all/skip")
    assert not few.shows and "so 3 episodes could not have shown one" in few.says
    alone = outcomes("0" * 7, "1" * 7)
    assert claims(alone, "all/skip")[0].shows, "six that differ one way are enough for one comparison"
    crowd = alone | {f"x{i}": alone["all/skip"] for i in range(9)}
    assert not any(c.shows for c in claims(crowd, "all/skip")), "and not for ten"
    assert all(c.tests == 10 and c.must_differ == must_differ(10) for c in claims(crowd, "all/skip"))


def test_fewest_that_must_differ() -> None:
    for tests in (1, 10, 14):
        k = must_differ(tests)
        assert tests * mcnemar([True] * k, [False] * k) < 0.05 <= tests * mcnemar([True] * (k - 1), [False] * (k - 1))


def test_crashes_say_nothing_about_a_policy() -> None:
    (claim,) = claims(outcomes("0x10", "01x0"), "all/skip")
    assert (claim.episodes, claim.left_out) == (2, 2) and "2 seeds are left out" in claim.says
    with pytest.raises(ValueError, match=r"the seeds are not the same"):
        claims(outcomes("00", "1"), "all/skip")


def test_the_question_is_asked_pair_by_pair() -> None:
    rows = {name: outcomes("0101", "1")["all/skip"] for name in ("all/skip", "vla/action_only", "fast_wam/skip", "imagine/imagine")}
    found = claims(rows, "all/skip")
    asked = [(c.a, c.b) for c in found if c.family == "questions"]
    assert asked == [("fast_wam/skip", "vla/action_only"), ("imagine/imagine", "fast_wam/skip")]
    assert {c.tests for c in found if c.family == "questions"} == {2} and {c.tests for c in found if c.family == "reference"} == {3}
    assert set(asked) <= {(a, b) for a, b, _ in claims_module.QUESTIONS}


def test_the_answer_and_its_limits() -> None:
    assert "no row differs significantly from all/skip; differences of up to" in answer(claims(outcomes("0101", "0111"), "all/skip"), "all/skip")
    assert "on 30 seeds: all/imagine succeeds more often than all/skip" in answer(claims(outcomes("0" * 30, "1" * 30), "all/skip"), "all/skip")
    facts = {"env": "metaworld/x", "trained": ["all", "vla"], "seed": 0, "taken": ["vla"]}
    texts = " ".join(limits([], {"calm": {"a": (50, 50), "b": (49, 50)}, "disturbed": {"a": (1, 50), "b": (0, 50)}}, facts))
    for text in ("2 variants was trained once (seed 0)", "number of tasks is 1", "Undisturbed episodes are at their ceiling", "at least 98%", "Disturbed episodes are at their floor", "vla was not trained here"):
        assert text in texts, text
    calmer = " ".join(limits([], {"calm": {"a": (40, 50), "b": (20, 50)}}, {**facts, "trained": ["all"], "taken": []}))
    assert "ceiling" not in calmer and "floor" not in calmer and "once" not in calmer


def test_slower_is_told_with_an_interval() -> None:
    ratio, low, high = slower([20.0, 22, 21, 20, 23], [10.0, 11, 10, 12, 10])
    assert ratio == 2.1 and 1 < low <= ratio <= high
    ratio, low, high = slower([10.0, 14, 9, 12, 11], [11.0, 9, 14, 10, 12])
    assert low < 1 < high
    twice, once = [20.0 + i % 3 for i in range(12)], [10.0 + i % 2 for i in range(12)]
    (told,) = speeds({"all/skip": once, "all/imagine": twice}, "all/skip")
    assert told["shows"] and "12 plans each" in told["says"]
    (told,) = speeds({"all/skip": once[:5], "all/imagine": twice[:5]}, "all/skip")
    assert not told["shows"] and "does not show a difference" in told["says"], "five rounds are too few for any claim"
    with pytest.raises(ValueError, match=r"2 and 1 plans"):
        slower([1, 2], [1])


def test_the_front_is_what_no_other_beats() -> None:
    points = {"fast": (10.0, 0.5), "good": (30.0, 0.9), "beaten": (30.0, 0.8), "slow": (90.0, 0.9), "same": (10.0, 0.5)}
    assert front(points) == ["fast", "same", "good"]


# ------------------------------------------------------------------------------------------------ phases, and the page


class Simulator:
    """Stands in for `rollout`: even seeds succeed, in imagine all do; writes what `rollout` writes.  Counts its calls, and fails on demand."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, ...]] = []
        self.fails = 0

    def environment(self, name: str, disturbances: DisturbanceConfig) -> Simulator:
        if name.endswith("drawer-shut-v3"):
            raise ValueError(f"no task {name!r}")
        assert disturbances.kinds
        return self

    def close(self) -> None:
        pass

    def __call__(self, checkpoint: Path, config: RolloutConfig, output: Path) -> dict[str, Any]:
        if self.fails:
            self.fails -= 1
            raise KeyboardInterrupt
        assert (checkpoint / "model.safetensors").is_file()
        self.calls.append((*output.parts[-2:], *config.modes))
        events = [{"kind": "arm_pushed", "step": 8, "size": 1.0, "unit": "m", "lasts": 0}] if config.disturbances.kinds else []
        modes = {mode: self._mode(mode, range(config.seed, config.seed + config.episodes), events) for mode in config.modes}
        output.mkdir(parents=True)
        (output / "rollout.json").write_text(json.dumps({"control_hz": 80, "modes": modes}))
        (output / "videos").mkdir()
        for mode in config.modes:
            (output / "videos" / f"{mode}_{config.seed}.mp4").write_bytes(b"not really a video")
        return {}

    def _mode(self, mode: str, seeds: range, events: list[dict[str, Any]]) -> dict[str, Any]:
        episodes = [
            {"seed": s, "success": s % 2 == 0 or mode == "imagine", "length": 40, "chunks": 5, "interventions": 1, "outcome": "success" if s % 2 == 0 else "failed", "events": events, "flops": 1e9, "modes": {mode: 5}}
            for s in seeds
        ]
        return {"episode_results": episodes, "latency_ms_p50": 12.0, "latency_ms_p95": 15.0, "latency_chunks": 20}


@pytest.fixture
def simulator(monkeypatch: pytest.MonkeyPatch) -> Simulator:
    made = Simulator()
    monkeypatch.setattr(rollout_module, "rollout", made)
    monkeypatch.setattr(environments, "make_env", made.environment)

    def floor(env: str, episodes: int, *rest: Any, replay: Path) -> dict[str, Any]:
        low, high = wilson(0, episodes)
        return {"random": {"successes": 0, "episodes": episodes, "wilson_low": low, "wilson_high": high}}

    monkeypatch.setattr(baselines, "run_baselines", floor)
    return made


def test_a_whole_comparison_and_nothing_twice(file: Path, tmp_path: Path, simulator: Simulator, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, output = planned(file), tmp_path / "run"
    monkeypatch.setattr(loop, "draw_at_end", lambda folder: None)
    monkeypatch.setattr(page_module, "write_report", lambda folder: folder / "compare.json")  # once is enough, at the end
    trained: list[Path] = []
    real = loop.train
    monkeypatch.setattr(loop, "train", lambda config, folder: trained.append(folder) or real(config, folder))
    simulator.fails = 1
    with pytest.raises(KeyboardInterrupt):
        run(plan, output, "wam compare")
    assert [folder.name for folder in trained] == ["all", "vla"] and not (output / "report.html").exists()
    run(plan, output, "first")
    assert len(trained) == 2, "what was trained before the interruption is kept"
    assert [call[:2] for call in simulator.calls] == [(name, condition) for condition in ("calm", "disturbed") for name in ("all", "vla", "guessing twice")]
    run(plan, output, EVIL)
    assert len(simulator.calls) == 6 and len(trained) == 2

    data = json.loads((output / "compare.json").read_text())
    assert list(data["rows"]) == ["all/skip", "all/joint", "all/joint_mutual", "all/imagine", "vla/action_only", "guessing twice"]
    assert data["variants"]["vla"]["changes"].keys() == {"training.modes", "training.video_weight"} and not data["variants"]["all"]["changes"]
    assert data["variants"]["vla"]["steps"] == plan.variant("vla").steps == 4 and data["variants"]["all"]["flops"] == pytest.approx(2 * plan.variant("all").cost.needed)
    row = data["rows"]["all/imagine"]
    assert row["calm"]["successes"] == 12 and row["recovery"]["recovered"] == 12 and row["calm"]["flops_a_second"] == 2e9
    assert row["imagination"]["clips"] == 1 and data["rows"]["all/skip"]["imagination"] is None and "all/forward" in data["imagination"]
    assert data["rows"]["guessing twice"]["latency"] == {"p50": 12.0, "p95": 15.0, "plans": 20, "source": "closed loop"}
    assert all(names and "guessing twice" not in names for names in data["front"].values()), "timed at another moment: it beats nobody by milliseconds"
    assert data["rows"]["all/skip"]["latency"]["plan_flops"] < row["latency"]["plan_flops"]

    with pytest.raises(ValueError, match=r"'drive all calm' was done with other settings or weights; choose another --output"):
        run(planned(file, "rollout.episodes=13"), output, "more")
    with pytest.raises(ValueError, match=r"'train all' was done with other settings"):
        run(planned(file, "training.learning_rate=1e-4"), output, "other")
    mine = planned(file, mine=output / "train" / "all" / "checkpoint").variant("mine")
    assert mine.modes == ("skip", "joint", "imagine", "joint_mutual") and mine.steps == 2 and mine.flops == plan.variant("all").flops
    _check_page(write_report(output), data)


def _check_page(report: Path, data: dict[str, Any]) -> None:
    page = report.read_text()
    reader = Reader(page)
    assert all(address.startswith(("data:", "#")) for address in reader.addresses) and not re.search(r"https?:|url\((?!#)|@import|<script|<link", page)
    assert len(set(reader.ids)) == len(reader.ids) and {a[1:] for a in reader.addresses if a.startswith("#")} <= set(reader.ids)
    assert data["answer"] in reader.words and all(text in reader.words for text in data["limits"])
    assert all(c["says"] in reader.words for c in data["claims"])
    for text in ("Where should prediction live?", "vla/action_only", "training.video_weight: 0.0 (shared: 1.0)", "12/12", "6/12", "guessing twice: timed in the closed loop", "arm pushed", "random actions"):
        assert text in reader.words, text
    assert reader.names.count("video") == 12 and 'class="absent"' not in page
    assert "<script" not in page and EVIL in reader.words


def test_what_cannot_be_driven_is_told_before_anything_is_trained(file: Path, tmp_path: Path, simulator: Simulator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "train", lambda *_: pytest.fail("trained before the environment was looked at"))
    with pytest.raises(ValueError, match=r"no task 'metaworld/drawer-shut-v3'"):
        run(planned(file, "rollout.env=metaworld/drawer-shut-v3"), tmp_path / "run", "")


def test_a_page_needs_a_comparison(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"compare.json; `wam compare --output .*` writes it"):
        write_report(tmp_path)


def test_what_is_left_is_estimated_from_what_is_done(file: Path, tmp_path: Path) -> None:
    plan = planned(file)
    first, second = [p for p in plan.phases if p.kind == "train"]
    diary = Diary(tmp_path / "state.json", plan)
    assert diary.expected(second) == second.seconds
    diary = replace(diary, seconds={first.name: 3 * first.seconds}, done={first.name: "x"})
    assert diary.expected(second) == pytest.approx(3 * second.seconds)
    with pytest.raises(RuntimeError), diary.phase(second, {"a": 1}):
        raise RuntimeError
    assert second.name not in json.loads(diary.path.read_text())["done"], "what was interrupted is not done"
