"""Closed-loop evaluation on a small fake robot: each episode as if alone, memories that agree, nothing sent that is not finite, runs that go on.

The robot is `fake_robot`'s, the policy's weights are random, which is all these tests need.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from fake_robot import SIDE, FakeRobot, FakeVector, fake_policy

from wam.config import RolloutConfig, SamplingConfig
from wam.evaluation import baselines, delays, suite
from wam.evaluation import results as results_module
from wam.evaluation import rollout as rollout_module
from wam.evaluation.environments import StepResult
from wam.evaluation.episodes import Driver, Episode, Watcher, box_gate
from wam.evaluation.film import Film
from wam.evaluation.rollout import check_environment, check_settings, rollout
from wam.inference.gate import Gate, GateRefusal
from wam.inference.session import Plan, Session
from wam.pretrained import Policy, save_pretrained


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small are not faster on several threads, and much slower where cores are busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def policy() -> Policy:
    return fake_policy()


@pytest.fixture(scope="module")
def checkpoint(policy: Policy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("policy")
    save_pretrained(policy, directory)
    return directory


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeVector]:
    monkeypatch.setattr(rollout_module, "VectorEnv", FakeVector)
    monkeypatch.setattr(results_module, "choose_backend", lambda: "none")
    monkeypatch.setattr(rollout_module, "LATENCY_CHUNKS", 3)
    FakeVector.made = 0
    return FakeVector


def settings(**changes: Any) -> RolloutConfig:
    return RolloutConfig(**{"env": "python/robot", "modes": ("skip",), "episodes": 5, "batch": 3, "steps": 2, "max_steps": 24, "videos": 0, **changes})


def without(policy: Policy, **meta: Any) -> Policy:
    return dataclasses.replace(policy, meta={**policy.meta, **meta})


class Recorder(Watcher):
    """What was sent to each episode."""

    def __init__(self, seeds: Sequence[int]) -> None:
        self.seeds, self.sent = seeds, {seed: [] for seed in seeds}

    def planned(self, session: Session, rows: Sequence[int], plan: Plan, sent: np.ndarray, milliseconds: float) -> None:
        for i, row in enumerate(rows):
            self.sent[self.seeds[row]].append(sent[i])


# ------------------------------------------------------------------------------------------------ driving


@pytest.mark.parametrize(("mode", "replan"), [("skip", 8), ("joint", 8), ("imagine", 4)])
def test_side_by_side_equals_one_by_one(policy: Policy, mode: str, replan: int) -> None:
    driver, seeds = Driver(policy, mode, SamplingConfig(steps=2), replan, 7), [20000, 20001, 20002]
    together = Recorder(seeds)
    episodes = driver.drive(FakeVector("fake", 3), seeds, [together])
    for seed, episode in zip(seeds, episodes, strict=True):
        alone = Recorder([seed])
        assert driver.drive(FakeVector("fake", 1), [seed], [alone]) == [episode]
        np.testing.assert_allclose(np.stack(alone.sent[seed]), np.stack(together.sent[seed]), atol=1e-4)
    assert [episode.success for episode in episodes] == [True, False, True]
    assert episodes[1].length == 40 and episodes[1].chunks == 40 // replan
    other = Recorder([20001])
    dataclasses.replace(driver, noise_seed=8).drive(FakeVector("fake", 1), [20001], [other])
    assert np.abs(other.sent[20001][0] - together.sent[20001][0]).max() > 1e-3, "the noise does matter"


def test_what_lies_outside_the_box_is_moved_and_counted_and_more_is_refused() -> None:
    gate = Gate(box_gate(np.full(2, -1, np.float32), np.full(2, 1, np.float32)), 2, 80.0)
    passed = gate(np.array([[0.5, 1.01], [2.5, 0.0]], np.float32))
    assert passed.actions.tolist() == [[0.5, 1.0], [1.0, 0.0]] and passed.interventions == {"clipped": 1}, "an overshoot of half a percent is not counted"
    with pytest.raises(GateRefusal, match="outside of"):
        gate(np.array([[3.5, 0]], np.float32))


def test_a_plan_that_is_not_finite_stops_the_evaluation(policy: Policy) -> None:
    broken = json.loads(json.dumps(policy.normalizer))
    broken["keys"]["action"]["center"][2] = float("nan")
    driver = Driver(dataclasses.replace(policy, normalizer=broken), "skip", SamplingConfig(steps=1), 8, 0)
    with pytest.raises(ValueError, match=r"mode 'skip', episodes of seeds \[20001\]: at control step 0: the plan holds nan at action 0, dimension 2"):
        driver.drive(FakeVector("fake", 1), [20001])


# ------------------------------------------------------------------------------------------------ the command


def test_rollout_writes_what_a_reader_needs(checkpoint: Path, fake: type[FakeVector], tmp_path: Path) -> None:
    results = rollout(checkpoint, settings(modes=("skip", "joint"), seed=20000, videos=1), tmp_path)
    assert results == json.loads((tmp_path / "rollout.json").read_text())
    assert results["finished"] and results["replan"] == 8 and results["seeds"] == {"first": 20000, "last": 20004, "test": True}
    assert len(results["checkpoint_sha256"]) == 64 and {"wam", "python", "torch", "diffusers"} <= set(results["versions"])
    for mode in ("skip", "joint"):
        row = results["modes"][mode]
        assert (row["successes"], row["episodes"]) == (3, 5) and round(row["wilson_low"], 3) == 0.231 and round(row["wilson_high"], 3) == 0.882
        assert [e["seed"] for e in row["episode_results"]] == list(range(20000, 20005))
        assert [e["length"] for e in row["episode_results"]] == [10, 24, 12, 24, 14] and row["mean_length"] == 12
        assert row["latency_batch"] == 1 and row["latency_chunks"] >= 3 and row["latency_ms_p95"] >= row["latency_ms_p50"] > 0
        assert set(row["latency_ms"]) == {"encode", "prefill", "denoise", "post", "commit"}
        with av.open(str(tmp_path / "videos" / f"{mode}_20000.mp4")) as video:
            frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
        assert len(frames) == 10 // 2 + 20, "the frames that came, and the last one held for a second"
        assert frames[0].shape[1] == 2 * 4 * SIDE + 4, "real and imagined, side by side"
        assert (tmp_path / "videos" / f"{mode}_20000.png").is_file() and not (tmp_path / "videos" / f"{mode}_20001.mp4").exists()


def test_a_suite_is_its_tasks_and_a_table(checkpoint: Path, fake: type[FakeVector], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(suite.tasks_of("metaworld/mt10")) == 10 and suite.tasks_of("python/one") == ("python/one",)
    monkeypatch.setattr(suite, "tasks_of", lambda env: ("python/one", "python/two"))
    results = suite.rollout_suite(checkpoint, settings(env="metaworld/mt10"), tmp_path)
    mode = results["modes"]["skip"]
    assert {env: (row["successes"], row["episodes"]) for env, row in mode["tasks"].items()} == {"python/one": (3, 5), "python/two": (3, 5)}
    assert mode["mean"] == pytest.approx(0.6) and 0 < mode["mean_low"] < 0.6 < mode["mean_high"] < 1
    assert json.loads((tmp_path / "suite.json").read_text()) == results and json.loads((tmp_path / "two" / "rollout.json").read_text())["env"] == "python/two"
    assert "| one | 3/5 (23-88 %) |" in (tmp_path / "suite.md").read_text()
    made = fake.made
    assert suite.rollout_suite(checkpoint, settings(env="metaworld/mt10"), tmp_path) == results and fake.made == made, "what is finished is not driven again"


def test_filming_changes_nothing(policy: Policy) -> None:
    driver, seeds, sent = Driver(policy, "skip", SamplingConfig(steps=2), 4, 7), [20001, 20003], []
    for filmed in ([], [1]):
        record, film = Recorder(seeds), Film(driver, seeds, filmed, control_hz=80)
        driver.drive(FakeVector("fake", 2), seeds, [film, record])
        sent.append([np.stack(record.sent[seed]) for seed in seeds])
    np.testing.assert_array_equal(sent[0], sent[1])
    assert film.clips(1)["real"].shape == film.clips(1)["imagined"].shape == (20, SIDE, SIDE, 3)


def test_imagined_frames_lie_beside_those_that_came(policy: Policy) -> None:
    """A plan from step 0 on, and one from step 4 on that replaces the rest of it; frames come every other step."""
    film, rng = Film(Driver(policy, "joint", SamplingConfig(steps=1), 8, 0), [1, 3, 5], [2], control_hz=80), np.random.default_rng(0)
    latents = torch.randn(2, policy.config.codec.channels, 1, *policy.model.latent_size)
    frames = rng.integers(0, 255, (2, SIDE, SIDE, 3), dtype=np.uint8)
    result = StepResult(frames, np.zeros((4, 4), np.float32), np.zeros(4, np.float32), np.zeros(4, np.bool_), False)
    session: Any = None  # not asked when a plan holds imagined latents
    for i in range(2):
        film.planned(session, [0], Plan(None, latents[:1], {}), np.zeros((1, 8, 4), np.float32), 1.0)
        film.placed(0, 4 * i)
        film.planned(session, [2], Plan(None, latents[i : i + 1], {}), np.zeros((1, 8, 4), np.float32), 1.0)
        film.placed(2, 4 * i)
        film.ran([0, 2], [result, result])
    decoded = policy.codec.decode(latents, first=False).numpy()
    np.testing.assert_array_equal(film.clips(2)["imagined"], np.concatenate([decoded[0, :2], decoded[1, :2]]))
    np.testing.assert_array_equal(film.clips(2)["real"], np.concatenate([frames, frames]))


def _episodes(results: dict[str, Any]) -> list[Episode]:
    return [Episode(**entry) for entry in results["modes"]["skip"]["episode_results"]]


def test_the_goals_environment_is_given_back_also_after_an_error(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    class Goals:
        closed = 0

        def __call__(self, seeds: Sequence[int]) -> np.ndarray:
            return np.zeros((len(seeds), SIDE, SIDE, 3), np.uint8)

        def close(self) -> None:
            self.closed += 1

    images = Goals()
    monkeypatch.setattr(rollout_module, "_goal_images", lambda policy, config: images)
    with rollout_module._goals_of(policy, RolloutConfig()) as goals:
        assert list(goals([7, 8])) == [7, 8] and not images.closed
    with pytest.raises(RuntimeError, match="a simulator"), rollout_module._goals_of(policy, RolloutConfig()):
        raise RuntimeError("a simulator")
    assert images.closed == 2


def test_an_interrupted_run_goes_on(checkpoint: Path, fake: type[FakeVector], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = rollout(checkpoint, settings(), tmp_path / "whole")
    waves = []
    drive = Driver.drive

    def interrupted(self: Driver, env: Any, seeds: Sequence[int], *more: Any) -> Any:
        waves.append(list(seeds))
        if len(waves) == 2:
            raise KeyboardInterrupt
        return drive(self, env, seeds, *more)

    monkeypatch.setattr(Driver, "drive", interrupted)
    with pytest.raises(KeyboardInterrupt, match="3 finished episodes are kept"):
        rollout(checkpoint, settings(), tmp_path / "two")
    half = json.loads((tmp_path / "two/rollout.json").read_text())
    assert half["finished"] is None and half["modes"]["skip"]["episodes"] == 3
    again = rollout(checkpoint, settings(), tmp_path / "two")
    assert waves[:3] == [[20000, 20001, 20002], [20003, 20004], [20003, 20004]]
    assert again["finished"] and _episodes(again) == _episodes(whole)
    made = fake.made
    assert rollout(checkpoint, settings(), tmp_path / "two") == again and fake.made == made, "nothing is left to do"
    assert set(rollout(checkpoint, settings(modes=("joint",)), tmp_path / "two")["modes"]) == {"skip", "joint"}, "another mode joins"
    with pytest.raises(ValueError, match=r"another run \(sampling\.steps 2, now 3\); choose another --output"):
        rollout(checkpoint, settings(steps=3), tmp_path / "two")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modes": ("skp",)}, "unknown mode 'skp'; did you mean 'skip'"),
        ({"modes": ("forward",)}, "'forward'.* cannot drive; modes that can: skip, skip_registers, joint, joint_mutual, imagine, action_only"),
        ({"replan": 9}, "rollout.replan is 9, but frames come every 2 control steps and a plan of this checkpoint holds 8"),
        ({"replan": 3}, "rollout.replan is 3, but frames come every 2 control steps.*use one of 2, 4, 6, 8"),
    ],
)
def test_settings_that_do_not_fit_are_refused(policy: Policy, changes: dict[str, Any], message: str) -> None:
    check_settings(policy, settings())
    with pytest.raises(ValueError, match=message):
        check_settings(policy, settings(**changes))


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("state_dim", 7, "state +. 4 numbers +. 7 numbers +. <- differs"),
        ("action_dim", 3, "action +. 4 numbers +. 3 numbers +. <- differs"),
        ("image_size", 64, "picture of each +. 32 x 32 +. 64 x 64 +. <- differs"),
        ("control_hz", 20, "control rate +. 80 a second +. 20 a second +. <- differs"),
    ],
)
def test_another_robot_is_refused(policy: Policy, attribute: str, value: int, message: str) -> None:
    env: Any = FakeVector("fake", 1)
    check_environment(policy, env)
    setattr(env, attribute, value)
    with pytest.raises(ValueError, match=message):
        check_environment(policy, env)


def test_what_makes_a_result_mean_less_is_said(policy: Policy, caplog: pytest.LogCaptureFixture) -> None:
    def said(policy: Policy, **changes: Any) -> str:
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="wam"):
            check_settings(policy, settings(**changes))
            check_environment(policy, FakeVector("fake", 1))  # type: ignore[arg-type]
        return caplog.text

    assert not said(policy)
    assert not said(policy, modes=("action_only",)), "skip trains it"
    training = dataclasses.replace(policy.config.training, modes={"skip": 1.0})
    skipper = dataclasses.replace(policy, config=dataclasses.replace(policy.config, training=training))
    assert "mode 'imagine' is not what this model was trained for (preset 'all', modes skip), so its output means little; choose skip or action_only" in said(skipper, modes=("imagine",))
    assert "seeds 9998..10002 overlap the demonstration and validation seeds" in said(policy, seed=9998)
    recorded = {"recorded": {"seeds": {"go": {"accepted": [20003, 3], "rejected": [20001]}}}}
    assert "1 of the 5 seeds were demonstrations this checkpoint was trained on (first: [20003])" in said(without(policy, source=recorded))
    assert "asks for 'go there', but the checkpoint was trained on: stay here" in said(without(policy, tasks=["stay here"]))


# ------------------------------------------------------------------------------------------------ baselines


class Clever(FakeRobot):
    """Succeeds when its first number exceeds a third; its expert knows."""

    def run(self, actions: np.ndarray, frame_stride: int) -> StepResult:
        result = super().run(actions, frame_stride)
        assert len(result.frames) == 0, "baselines need no images"
        won = np.array([bool(self.state[0] > 1.5)])
        return dataclasses.replace(result, success=won, done=bool(won[0]) or self.steps >= self.max_steps)

    def expert_action(self) -> np.ndarray:
        return np.array([1, 0, 0, 0], np.float32)


def test_baselines_play_without_images() -> None:
    robot = Clever()
    assert baselines.available(robot) == ["expert", "hold_still", "random"] and baselines.available(FakeRobot()) == ["hold_still", "random"]
    assert baselines.play(robot, "expert", 1).success
    assert not baselines.play(robot, "hold_still", 1).success and np.array_equal(robot.state, np.random.default_rng(1).uniform(-0.5, 0.5, 4).astype(np.float32))
    assert not baselines.play(robot, "random", 1).success


@pytest.mark.skipif(importlib.util.find_spec("metaworld") is None, reason="needs pip install 'wam[sim]'")
def test_baselines_in_a_simulator() -> None:
    rows = baselines.run_baselines("metaworld/reach-v3", episodes=2, seed=20000, workers=1, max_steps=100)
    assert list(rows) == ["expert", "hold_still", "random"]
    assert rows["expert"]["successes"] == 2 and rows["hold_still"]["successes"] == 0 and rows["expert"]["episodes"] == 2
    assert 0 < rows["expert"]["wilson_low"] < rows["expert"]["wilson_high"] == 1


# ------------------------------------------------------------------------------------------------ delays


def test_success_against_delay_for_several_ways_of_meeting_time(checkpoint: Path, fake: type[FakeVector], tmp_path: Path) -> None:
    config = settings(seed=20000, modes=("skip",))
    found = delays.rollout_delays(checkpoint, config, ("synchronous", "asynchronous"), (4,), tmp_path)
    assert found == json.loads((tmp_path / "delays.json").read_text()) and (tmp_path / "delays.png").is_file()
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["asynchronous-4", "synchronous-0", "synchronous-4"], "without delay all ways are one"
    still, moving = (found["curves"][name]["points"] for name in ("synchronous", "asynchronous"))
    assert still[0] == moving[0] and [point["delay_ms"] for point in still] == [0, 50] and still[0]["control_hz_reached"] == 80
    assert still[1]["control_hz_reached"] < moving[1]["control_hz_reached"] < 80, "one stands still before each plan, the other before the first"
    text = (tmp_path / "delays.md").read_text()
    assert "| 4 steps, 50 ms | 3/5 (23-88 %)" in text and "synchronous: " in text
    with pytest.raises(ValueError, match="compared in one mode"):
        delays.rollout_delays(checkpoint, settings(modes=("skip", "joint")), ("naive",), (4,), tmp_path / "two")
