"""Closed-loop evaluation on a small fake robot: each episode as if alone, memories that agree, nothing sent that is not finite, runs that go on.

The robot's state moves by a tenth of its action, and its image shows the state as grey bars; an episode's seed places it and says
where it wants to go.  The policy's weights are random, which is all these tests need.
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
from tiny import tiny_config, tiny_model

from wam.codec.linear import LinearCodec
from wam.config import RolloutConfig, SamplingConfig
from wam.data.normalize import Normalizer
from wam.evaluation import baselines, suite
from wam.evaluation import rollout as rollout_module
from wam.evaluation.environments import Observation, StepResult
from wam.evaluation.episodes import Driver, Gate, Memory, Stream, Watcher
from wam.evaluation.rollout import Film, check_environment, check_settings, rollout
from wam.evaluation.vector import Observations
from wam.inference.session import Plan, Session
from wam.pretrained import Policy, save_pretrained

SIDE = 32
TINY = ("codec.image_size=[32, 32]", "timeline.blocks=3")


class FakeRobot:
    """An environment; see the module's docstring."""

    state_dim = action_dim = 4
    action_low, action_high = np.full(4, -1, np.float32), np.full(4, 1, np.float32)
    control_hz, image_size, instruction = 80, SIDE, "go there"

    def __init__(self, max_steps: int = 40) -> None:
        self.max_steps = max_steps

    def reset(self, seed: int) -> Observation:
        self.seed, self.steps = seed, 0
        self.state = np.random.default_rng(seed).uniform(-0.5, 0.5, 4).astype(np.float32)
        return Observation(self.render()[None], self.state.copy())

    def render(self) -> np.ndarray:
        bars = ((self.state + 2) * 60).clip(0, 255).astype(np.uint8)
        return np.broadcast_to(bars.repeat(SIDE // 4)[None, :, None], (SIDE, SIDE, 3)).copy()

    def run(self, actions: np.ndarray, frame_stride: int) -> StepResult:
        assert np.isfinite(actions).all() and (np.abs(actions) <= 1).all()
        frames, states = [], []
        for count, action in enumerate(actions, start=1):
            self.state = (self.state + 0.1 * action).astype(np.float32)
            self.steps += 1
            states.append(self.state.copy())
            if count % frame_stride == 0:
                frames.append(self.render())
            success = self.seed % 2 == 0 and self.steps >= 10 + self.seed % 5  # even seeds succeed, at different times
            if success or self.steps >= self.max_steps:
                break
        n = len(states)
        reached = np.zeros(n, np.bool_)
        reached[-1] = success
        shaped = np.asarray(frames, np.uint8).reshape(len(frames), SIDE, SIDE, 3)
        return StepResult(shaped, np.stack(states), np.zeros(n, np.float32), reached, bool(success or self.steps >= self.max_steps))

    def close(self) -> None:
        pass


class FakeVector:
    """`VectorEnv` of fake robots, in this process."""

    made = 0

    def __init__(self, name: str, n: int, workers: int = 2, max_steps: int = 40, **settings: Any) -> None:
        type(self).made += 1
        self.name, self.n = name, n
        self.robots = [FakeRobot(max_steps) for _ in range(n)]
        for field in ("state_dim", "action_dim", "action_low", "action_high", "control_hz", "image_size", "instruction", "max_steps"):
            setattr(self, field, getattr(self.robots[0], field))

    def reset(self, seeds: Sequence[int]) -> Observations:
        first = [robot.reset(seed) for robot, seed in zip(self.robots, seeds, strict=False)]
        return Observations(np.stack([o.frames for o in first]), np.stack([o.state for o in first]))

    def run(self, actions: np.ndarray, rows: Sequence[int], frame_stride: int) -> list[StepResult]:
        return [self.robots[row].run(actions[i], frame_stride) for i, row in enumerate(rows)]

    def __enter__(self) -> FakeVector:
        return self

    def __exit__(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small are not faster on several threads, and much slower where cores are busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def policy() -> Policy:
    config = tiny_config(*TINY)
    codec = LinearCodec(config.codec)
    codec.fit(torch.from_numpy(np.random.default_rng(0).integers(0, 255, (8, 4, SIDE, SIDE, 3), dtype=np.uint8)))
    spread = np.linspace(-1, 1, 100)[:, None].repeat(4, axis=1)
    normalizer = Normalizer.fit({"state": 2 * spread, "action": 0.2 * spread}).to_dict()
    return Policy(config, tiny_model(config), codec, normalizer, {"control_hz": 80, "tasks": ["go there"]})


@pytest.fixture(scope="module")
def checkpoint(policy: Policy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("policy")
    save_pretrained(policy, directory)
    return directory


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeVector]:
    monkeypatch.setattr(rollout_module, "VectorEnv", FakeVector)
    monkeypatch.setattr(rollout_module, "choose_backend", lambda: "none")
    monkeypatch.setattr(rollout_module, "LATENCY_CHUNKS", 3)
    FakeVector.made = 0
    return FakeVector


def settings(**changes: Any) -> RolloutConfig:
    return RolloutConfig(**{"env": "fake/robot", "modes": ("skip",), "episodes": 5, "batch": 3, "steps": 2, "max_steps": 24, "videos": 0, **changes})


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


def blocks_of(policy: Policy, count: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Executed actions, frames and states of a few blocks of two rows."""
    t, rng = policy.config.timeline, np.random.default_rng(1)
    for _ in range(count):
        yield (
            rng.uniform(-0.2, 0.2, (2, t.actions_per_block, 4)).astype(np.float32),
            rng.integers(0, 255, (2, t.frames_per_block, SIDE, SIDE, 3), dtype=np.uint8),
            rng.uniform(-1, 1, (2, t.actions_per_block, 4)).astype(np.float32),
        )


def new_memory(kind: type[Stream] | type[Memory], policy: Policy) -> Stream | Memory:
    rng = np.random.default_rng(0)
    first = Observations(rng.integers(0, 255, (2, 1, SIDE, SIDE, 3), dtype=np.uint8), rng.uniform(-1, 1, (2, 4)).astype(np.float32))
    return kind(Session(policy, ["go there"] * 2, "metaworld", [1, 2]), first)


def planned(memory: Stream | Memory) -> np.ndarray:
    actions = memory.session.plan("joint", SamplingConfig(steps=2)).actions
    assert actions is not None
    return actions


def test_streaming_equals_laying_the_window_anew_while_it_holds_everything(policy: Policy) -> None:
    stream, memory = new_memory(Stream, policy), new_memory(Memory, policy)
    np.testing.assert_allclose(planned(memory), planned(stream), atol=1e-5)
    for number, block in enumerate(blocks_of(policy, policy.config.timeline.blocks), start=1):
        stream.advance(*block)
        memory.advance(*block)
        if number < policy.config.timeline.blocks:
            np.testing.assert_allclose(planned(memory), planned(stream), atol=1e-5)
    assert memory.session.block == policy.config.timeline.blocks - 1, "a plan is the last block of a training window, and no later"
    assert np.abs(planned(memory) - planned(stream)).max() > 1e-5, "now the stream remembers more"


def test_a_window_laid_in_the_middle_of_a_block_ends_at_the_present(policy: Policy) -> None:
    """After 2 blocks and 4 steps in stretches of 4, the session is what it would be for a robot that began 4 steps later."""
    executed, frames, states = (np.concatenate(part, axis=1) for part in zip(*blocks_of(policy, 3), strict=True))
    stride = policy.config.timeline.frame_stride
    memory = new_memory(Memory, policy)
    for begin in range(0, 20, 4):
        end = begin + 4
        memory.advance(executed[:, begin:end], frames[:, begin // stride : end // stride], states[:, begin:end])
    late = Session(policy, ["go there"] * 2, "metaworld", [1, 2])
    late.observe(frames[:, 1:2], states[:, 3])  # at step 4
    for begin in (4, 12):
        late.commit(executed[:, begin : begin + 8])
        late.observe(frames[:, begin // stride : begin // stride + 4], states[:, begin + 7])
    expected = late.plan("joint", SamplingConfig(steps=2)).actions
    np.testing.assert_allclose(planned(memory), expected, atol=1e-5)


def test_the_gate_clips_counts_and_refuses() -> None:
    gate = Gate(np.full(2, -1, np.float32), np.full(2, 1, np.float32))
    sent, outside = gate(np.array([[[0.5, 1.01], [3.0, 0.0]]], np.float32))
    assert sent.tolist() == [[[0.5, 1.0], [1.0, 0.0]]] and outside.tolist() == [[False, True]]
    with pytest.raises(ValueError, match="row 0 holds nan at action 1, dimension 0; nothing was sent"):
        gate(np.array([[[0, 0], [np.nan, 0]]], np.float32))


def test_a_plan_that_is_not_finite_stops_the_evaluation(policy: Policy) -> None:
    broken = json.loads(json.dumps(policy.normalizer))
    broken["keys"]["action"]["center"][2] = float("nan")
    driver = Driver(dataclasses.replace(policy, normalizer=broken), "skip", SamplingConfig(steps=1), 8, 0)
    with pytest.raises(ValueError, match=r"mode 'skip' at control step 0 .*seeds \[20001\].*nan at action 0, dimension 2"):
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
    assert len(suite.tasks_of("metaworld/mt10")) == 10 and suite.tasks_of("fake/one") == ("fake/one",)
    monkeypatch.setattr(suite, "tasks_of", lambda env: ("fake/one", "fake/two"))
    results = suite.rollout_suite(checkpoint, settings(env="metaworld/mt10"), tmp_path)
    mode = results["modes"]["skip"]
    assert {env: (row["successes"], row["episodes"]) for env, row in mode["tasks"].items()} == {"fake/one": (3, 5), "fake/two": (3, 5)}
    assert mode["mean"] == pytest.approx(0.6) and 0 < mode["mean_low"] < 0.6 < mode["mean_high"] < 1
    assert json.loads((tmp_path / "suite.json").read_text()) == results and json.loads((tmp_path / "two" / "rollout.json").read_text())["env"] == "fake/two"
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
    """Row 2 stands second in the batch when row 1 is over; of 4 imagined frames, the 3 that came in time are shown."""
    film, rng = Film(Driver(policy, "joint", SamplingConfig(steps=1), 8, 0), [1, 3, 5], [2], control_hz=80), np.random.default_rng(0)
    latents = torch.randn(2, policy.config.codec.channels, 1, *policy.model.latent_size)
    frames = rng.integers(0, 255, (3, SIDE, SIDE, 3), dtype=np.uint8)
    result = StepResult(frames, np.zeros((6, 4), np.float32), np.zeros(6, np.float32), np.zeros(6, np.bool_), False)
    session: Any = None  # not asked when a plan holds imagined latents
    for _ in range(2):
        film.planned(session, [0, 2], Plan(None, latents, {}), np.zeros((2, 8, 4), np.float32), 1.0)
        film.ran([0, 2], [result, result])
    expected = policy.codec.decode(latents, first=False).numpy()[1, :3]
    np.testing.assert_array_equal(film.clips(2)["imagined"], np.concatenate([expected, expected]))
    np.testing.assert_array_equal(film.clips(2)["real"], np.concatenate([frames, frames]))


def test_an_interrupted_run_goes_on(checkpoint: Path, fake: type[FakeVector], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = rollout(checkpoint, settings(), tmp_path / "whole")
    waves = []
    drive = Driver.drive

    def interrupted(self: Driver, env: Any, seeds: Sequence[int], watchers: Sequence[Watcher] = ()) -> Any:
        waves.append(list(seeds))
        if len(waves) == 2:
            raise KeyboardInterrupt
        return drive(self, env, seeds, watchers)

    monkeypatch.setattr(Driver, "drive", interrupted)
    with pytest.raises(KeyboardInterrupt, match="3 finished episodes are kept"):
        rollout(checkpoint, settings(), tmp_path / "two")
    half = json.loads((tmp_path / "two/rollout.json").read_text())
    assert half["finished"] is None and half["modes"]["skip"]["episodes"] == 3
    again = rollout(checkpoint, settings(), tmp_path / "two")
    assert waves[:3] == [[20000, 20001, 20002], [20003, 20004], [20003, 20004]]
    assert again["finished"] and again["modes"]["skip"]["episode_results"] == whole["modes"]["skip"]["episode_results"]
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
        ({"replan": 9}, "rollout.replan is 9, but a plan of this checkpoint holds 8 control steps"),
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
        ("state_dim", 7, "fake has 7 state dimensions, but the checkpoint's embodiment 'metaworld' has 4"),
        ("action_dim", 3, "fake has 3 action dimensions, but the checkpoint's embodiment 'metaworld' has 4"),
        ("image_size", 64, "images of 64x64, but the checkpoint's codec takes 32x32"),
        ("control_hz", 20, "20 control steps a second, but the checkpoint was trained at 80"),
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
    assert baselines.play(robot, "expert", 1)
    assert not baselines.play(robot, "hold_still", 1) and np.array_equal(robot.state, np.random.default_rng(1).uniform(-0.5, 0.5, 4).astype(np.float32))
    assert not baselines.play(robot, "random", 1)


@pytest.mark.skipif(importlib.util.find_spec("metaworld") is None, reason="needs pip install 'wam[sim]'")
def test_baselines_in_a_simulator() -> None:
    rows = baselines.run_baselines("metaworld/reach-v3", episodes=2, seed=20000, workers=1, max_steps=100)
    assert list(rows) == ["expert", "hold_still", "random"]
    assert rows["expert"]["successes"] == 2 and rows["hold_still"]["successes"] == 0 and rows["expert"]["episodes"] == 2
    assert 0 < rows["expert"]["wilson_low"] < rows["expert"]["wilson_high"] == 1
