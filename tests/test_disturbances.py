"""Disturbances: drawn the same for everyone, real in the simulator, never a gift; and what is said about recovery."""

import hashlib
import importlib.util
import os
import subprocess
import sys
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest

from wam.config_disturbances import DISTURBANCES, DisturbanceConfig
from wam.config_tree import ConfigError
from wam.evaluation.disturb_pixels import occluder, relighter, shifter
from wam.evaluation.disturbances import Disturbed, able, draw, extra_delay
from wam.evaluation.environments import Event, Observation, StepResult, make_env
from wam.evaluation.metaworld_tasks import INSTRUCTIONS
from wam.evaluation.paraphrases import PARAPHRASES, paraphrase
from wam.evaluation.recovery import compare_recovery, kaplan_meier_median, recovery, recovery_table
from wam.evaluation.statistics import mcnemar, wilson

simulator = pytest.mark.skipif(importlib.util.find_spec("metaworld") is None, reason="needs pip install 'wam[sim]'")
AT_10 = dict(begins=(0.1, 0.1))  # of 100 control steps


class Counter:
    """A world that counts: its picture and its state are the control step, and it keeps what it was sent."""

    state_dim, action_dim, control_hz, image_size, max_steps = 1, 2, 20, 20, 100
    cameras = ("camera",)
    action_low, action_high = np.array([-1, 0], np.float32), np.array([1, 100], np.float32)
    hold = np.array([0, np.nan], np.float32)
    state_noise = np.array([0.5], np.float32)

    def __init__(self, instruction: str = "count to a hundred") -> None:
        self.instruction, self.steps, self.sent = instruction, 0, list[np.ndarray]()

    def reset(self, seed: int) -> Observation:
        self.steps, self.sent = 0, []
        return Observation(self.render()[None], np.zeros(1, np.float32))

    def run(self, actions: np.ndarray, frame_stride: int) -> StepResult:
        frames, states = [], []
        for count, action in enumerate(actions, start=1):
            self.sent.append(action)
            self.steps += 1
            states.append([self.steps])
            if count % frame_stride == 0:
                frames.append(self.render())
        n, done = len(states), self.steps >= self.max_steps
        shaped = np.asarray(frames, np.uint8).reshape(len(frames), 20, 20, 3)
        return StepResult(shaped, np.asarray(states, np.float32), np.zeros(n, np.float32), np.zeros(n, np.bool_), done)

    def render(self) -> np.ndarray:
        return np.full((20, 20, 3), self.steps, np.uint8)

    def close(self) -> None:
        pass


def run_all(kind: str, stretches: tuple[int, ...], stride: int = 2, **settings: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray, tuple[Event, ...]]:
    """Frames, states, what the robot did, and events of the first `sum(stretches)` steps."""
    world = Counter()
    env = Disturbed(world, DisturbanceConfig((kind,), **{**AT_10, **settings}))
    env.reset(3)
    results = [env.run(np.full((n, 2), 0.25), stride) for n in stretches]
    frames, states = (np.concatenate([getattr(r, name) for r in results]) for name in ("frames", "states"))
    return frames, states, np.stack(world.sent), tuple(e for r in results for e in r.events)


# ------------------------------------------------------------------------------------------------ what is drawn


def test_a_draw_is_a_function_of_seeds_and_config() -> None:
    config = DisturbanceConfig(("occlusion", "latency", "arm_pushed"), seed=7)
    drawn = [draw(config, seed) for seed in range(300)]
    assert drawn == [draw(DisturbanceConfig(("arm_pushed", "occlusion", "latency"), seed=7, strength=2.0), seed) for seed in range(300)]
    assert drawn != [draw(DisturbanceConfig(config.kinds, seed=8), seed) for seed in range(300)]
    counts = [sum(d.kind == kind for d in drawn) for kind in config.kinds]
    assert sum(counts) == 300 and min(counts) > 75, "each kind about as often as the others"
    half = [draw(DisturbanceConfig(config.kinds, seed=7, share=0.5), seed).kind for seed in range(300)]
    assert 120 < half.count(None) < 180
    assert all(kind in (None, other.kind) for kind, other in zip(half, drawn, strict=True)), "fewer episodes, not other disturbances"
    assert all(10 <= d.begins(config, 500) <= 60 for d in drawn)


def test_the_driver_is_told_the_delay_by_the_step() -> None:
    late = extra_delay(DisturbanceConfig(("latency",), strength=2.0, **AT_10), 0, control_hz=80, max_steps=100)
    assert [late(step) for step in (0, 9, 10, 99)] == [0, 0, 16, 16]
    assert extra_delay(DisturbanceConfig(("occlusion",), **AT_10), 0, 80, 100)(50) == 0
    assert run_all("latency", (20,))[3] == (Event("latency", 10, 0.1, "s", 100),)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (dict(kinds=("objct_moved",)), "nearest: object_moved"),
        (dict(kinds=("latency", "latency")), "once"),
        (dict(strength=0.0), "above 0"),
        (dict(share=1.5), "at most 1"),
        (dict(begins=(0.5, 0.2)), "earliest, latest"),
    ],
)
def test_wrong_settings_say_what_is_right(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        DisturbanceConfig(**settings)


def test_what_an_environment_cannot_do_is_refused_with_what_it_can() -> None:
    world = Counter(instruction="")
    world.state_noise = None  # type: ignore[assignment]
    with pytest.raises(
        ValueError, match=r"cannot meet the disturbances object_moved, state_noise, paraphrase; it can meet camera_shifted, light_changed, occlusion"
    ):
        Disturbed(world, DisturbanceConfig(("object_moved", "occlusion", "state_noise", "paraphrase")))
    assert set(able(Counter())) == set(DISTURBANCES) - {"object_moved", "gripper_opened", "arm_pushed"}


# ------------------------------------------------------------------------------------------------ for any environment


@pytest.mark.parametrize("kind", ["frames_dropped", "occlusion", "state_noise", "action_noise", "camera_shifted"])
def test_stretches_do_not_matter(kind: str) -> None:
    whole, parts = run_all(kind, (40,)), run_all(kind, (2, 8, 10, 2, 18))
    assert all(np.array_equal(a, b) for a, b in zip(whole[:3], parts[:3], strict=True)) and whole[3] == parts[3]
    assert whole[3][0].step == 10 and whole[3][0].kind == kind
    assert kind != "camera_shifted" or (whole[3][0].size, whole[3][0].unit) == (0.08, "of the picture's width"), "no camera was turned here"


def test_a_hanging_camera_repeats_its_last_picture() -> None:
    frames, states, _, events = run_all("frames_dropped", (30,), stride=2)
    # steps 10..19 are in force (half a second at 20 a second); the picture after step 10 is the last before them
    assert frames[:, 0, 0, 0].tolist() == [2, 4, 6, 8, 10] + [10] * 5 + [22, 24, 26, 28, 30]
    assert states[:, 0].tolist() == list(range(1, 31)), "only pictures hang"
    assert events == (Event("frames_dropped", 10, 0.5, "s", 10),)


def test_noise_begins_when_it_should_and_touches_nothing_else() -> None:
    frames, states, sent, _ = run_all("state_noise", (100,))
    error = states[:, 0] - np.arange(1, 101)
    assert not error[:10].any() and 0.35 < error[10:].std() < 0.65, "the environment's usual deviation is 0.5"
    assert (sent == 0.25).all() and frames[:, 0, 0, 0].tolist() == list(range(2, 101, 2))
    _, states, sent, _ = run_all("action_noise", (100,))
    assert (sent[:10] == 0.25).all() and states[:, 0].tolist() == list(range(1, 101))
    assert 0.15 < sent[10:, 0].std() < 0.4, "0.3 of a displacement's half range"
    assert (sent[:, 1] >= 0).all() and 0.4 < sent[10:, 1].std() < 1.5, "a place is disturbed by a tenth of that, and stays in its range"


def test_pictures_change_as_much_as_they_should() -> None:
    image = np.random.default_rng(0).integers(60, 200, (40, 50, 3)).astype(np.uint8)
    covered = [(occluder(0.2, np.random.default_rng(seed))(image) != image).any(-1).mean() for seed in range(20)]
    assert min(covered) > 0.15 and max(covered) < 0.25 and len(set(covered)) > 5
    moved = shifter(0.1, np.random.default_rng(1))(image)
    found = [(dy, dx) for dy in range(-5, 6) for dx in range(-5, 6) if np.array_equal(moved[10:30, 10:40], image[10 - dy : 30 - dy, 10 - dx : 40 - dx])]
    assert len(found) == 1 and 4.2 <= np.hypot(*found[0]) <= 5.8
    brightness = [relighter(0.35, np.random.default_rng(seed))(image).mean() / image.mean() for seed in range(20)]
    assert min(brightness) < 0.8 and max(brightness) > 1.15


def test_other_words_for_every_task() -> None:
    assert set(PARAPHRASES) == set(INSTRUCTIONS.values())
    words = [sentence for said in PARAPHRASES.values() for sentence in said]
    assert len(set(words)) == len(words) and not set(words) & set(PARAPHRASES), "no two tasks can be confused"
    env = Disturbed(Counter(), DisturbanceConfig(("paraphrase",)))
    first = env.reset(1)
    assert env.instruction == first.instruction != "count to a hundred" and "count to a hundred" in env.instruction
    assert [(e.kind, e.step) for e in first.events] == [("paraphrase", 0)] and env.run(np.zeros((1, 2)), 1).events == ()
    assert {paraphrase("Count.", np.random.default_rng(seed)) for seed in range(40)} == {
        "please count",
        "Count, please",
        "could you count",
        "your task: count",
        "now count",
    }
    with pytest.raises(ValueError, match="no instruction"):
        paraphrase("", np.random.default_rng(0))


# ------------------------------------------------------------------------------------------------ in the simulator


def disturbed(task: str, kind: str, **settings: Any) -> Any:
    return make_env(f"metaworld/{task}", disturbances=DisturbanceConfig((kind,), **settings), image_size=32)


def until_struck(env: Any, seed: int, limit: int = 150) -> Event:
    """Drive the expert until something has happened."""
    env.reset(seed)
    for _ in range(limit):
        result = env.run(env.expert_action()[None], 2)
        if result.events:
            return result.events[0]
        assert not result.done, "over before anything happened"
    raise AssertionError("nothing happened")


def physical_hash() -> str:
    """What came of disturbed episodes, in one number."""
    digest = hashlib.sha256()
    for kind in ("object_moved", "gripper_opened", "arm_pushed", "camera_shifted"):
        env = disturbed("basketball-v3", kind)
        event = until_struck(env, 5)
        result = env.run(np.tile(env.expert_action(), (8, 1)), 4)
        digest.update(repr(asdict(event)).encode() + result.frames.tobytes() + result.states.tobytes())
    return digest.hexdigest()


@simulator
def test_the_same_seed_is_the_same_disturbed_episode_in_any_process() -> None:
    code = "import sys; sys.path.insert(0, 'tests'); from test_disturbances import *; print(physical_hash())"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": "."})
    assert other.stdout.strip() == physical_hash()


@simulator
@pytest.mark.parametrize("kind", ["object_moved", "camera_shifted", "light_changed"])
def test_the_next_episode_is_as_if_nothing_had_been(kind: str) -> None:
    env = disturbed("drawer-open-v3", kind)
    first = env.reset(1)
    until_struck(env, 0)
    assert not np.array_equal(env.render(), make_env("metaworld/drawer-open-v3", image_size=32).reset(1).frames[0])
    again = env.reset(1)
    assert np.array_equal(first.frames, again.frames) and np.array_equal(first.state, again.state)


@simulator
@pytest.mark.parametrize("task", ["push-v3", "reach-v3", "assembly-v3"])
def test_an_object_is_moved_within_the_tasks_own_range(task: str) -> None:
    env = disturbed(task, "object_moved")
    inner = env._env
    event = until_struck(env, 0)
    place, space = inner._last_rand_vec, inner._random_reset_space
    assert (place >= space.low).all() and (place <= space.high).all() and 0.03 < event.size <= 0.0801 and event.lasts == 0
    env.reset(0)
    before = inner._last_rand_vec.copy()
    assert np.linalg.norm(place - before) == pytest.approx(event.size)


@simulator
def test_the_hand_stays_and_the_drawer_comes_to_lie_elsewhere() -> None:
    env = make_env("metaworld/drawer-open-v3", image_size=32)
    env.reset(0)
    hand, drawer = env._env.get_endeff_pos().copy(), env._env._get_pos_objects().copy()
    goal = env._env._target_pos.copy()
    moved = env.stage.move_object(0.08, np.random.default_rng(0), -1.0)
    assert np.array_equal(env._env.get_endeff_pos(), hand)
    shift = env._env._get_pos_objects() - drawer
    assert np.linalg.norm(shift) == pytest.approx(moved) and np.allclose(env._env._target_pos - goal, shift)
    # around a hand that is in the way of every place, nothing is moved, and nothing has changed
    env.stage._overlap = iter([0.0] + [-1.0] * 99).__next__
    state, place = env._env.data.qpos.copy(), env._env.model.body("drawer").pos.copy()
    assert env.stage.move_object(0.08, np.random.default_rng(0), -1.0) is None
    assert np.array_equal(env._env.data.qpos, state) and np.array_equal(env._env.model.body("drawer").pos, place)


@simulator
def test_the_arm_is_pushed_and_not_towards_the_goal() -> None:
    env, plain = disturbed("push-v3", "arm_pushed"), make_env("metaworld/push-v3", image_size=32)
    event = until_struck(env, 0)
    plain.reset(0)
    for _ in range(event.step + 1):
        plain.run(plain.expert_action()[None], 2)
    for _ in range(20):  # both stand still from now on
        env.run(np.zeros((1, 4)), 2)
        plain.run(np.zeros((1, 4)), 2)
    displaced = env._env.get_endeff_pos() - plain._env.get_endeff_pos()
    assert 0.04 < np.linalg.norm(displaced) <= 0.11 and event.lasts == 10
    assert displaced @ (plain._env._target_pos - plain._env._get_pos_objects()) < 0.001


@simulator
def test_fingers_open_while_they_are_told_to_close() -> None:
    env = disturbed("basketball-v3", "gripper_opened")
    event = until_struck(env, 0)
    closed = env.state()[3]
    opening = env.run(np.tile([0, 0, 0, 1.0], (event.lasts + 20, 1)), 99).states[:, 3].tolist()
    assert max(opening) > closed + 0.2 and opening[-1] < max(opening) - 0.2, "opened, and closed again afterwards"


@simulator
def test_no_success_is_given_away() -> None:
    """The handle of handle-pull rises by itself when it is let go at the right moment; that does not happen."""
    env = make_env("metaworld/handle-pull-v3", image_size=32)
    env.reset(101)
    for _ in range(47):
        env.run(env.expert_action()[None], 2)
    state = env._env.data.qpos.copy()
    assert not env.stage.wins_nothing(20, 1.0)
    assert np.array_equal(env._env.data.qpos, state) and not env._over
    still = env.run(np.array([[0, 0, 0, -1.0]] * 20 + [[0, 0, 0, 1.0]] * 60), 2)
    assert still.success.any(), "and it would have been won, by standing still with fingers open"
    env.reset(101)
    assert env.stage.wins_nothing(20, 1.0)


@simulator
def test_events_and_words_arrive_from_workers() -> None:
    from wam.evaluation.vector import VectorEnv

    config = DisturbanceConfig(("paraphrase", "occlusion"), begins=(0.02, 0.02))
    kinds = {draw(config, seed).kind: seed for seed in range(8)}
    with VectorEnv("metaworld/drawer-open-v3", 2, workers=1, image_size=32, disturbances=config) as many:
        first = many.reset([kinds["paraphrase"], kinds["occlusion"]])
        assert first.instructions[0] in PARAPHRASES["open the drawer"] and first.instructions[1] == "open the drawer"
        assert [e.kind for e in first.events[0]] == ["paraphrase"] and first.events[1] == ()
        results = many.run(np.zeros((2, 12, 4)), [0, 1], 4)
    assert results[0].events == () and [(e.kind, e.step) for e in results[1].events] == [("occlusion", 10)]


# ------------------------------------------------------------------------------------------------ recovery


def episode(seed: int, success: bool, length: int, step: int | None = None, kind: str = "arm_pushed", **more: Any) -> dict[str, Any]:
    events = [] if step is None else [asdict(Event(kind, step, 0.1, "m", 10))]
    return {"seed": seed, "success": success, "length": length, "events": events, **more}


def test_kaplan_meier_median() -> None:
    # Freireich et al. (1963), remission under 6-MP: the published median is 23 weeks
    weeks = [6, 6, 6, 6, 7, 9, 10, 10, 11, 13, 16, 17, 19, 20, 22, 23, 25, 32, 32, 34, 35]
    relapsed = [True, True, True, False, True, False, True, False, False, True, True, False, False, False, True, True, False, False, False, False, False]
    assert kaplan_meier_median(weeks, relapsed) == 23
    assert kaplan_meier_median([1, 2, 3, 4], [True] * 4) == 2 and kaplan_meier_median([5, 5, 9], [True, False, False]) is None
    assert kaplan_meier_median([], []) is None
    with pytest.raises(ValueError, match="2 times and 1 outcomes"):
        kaplan_meier_median([1, 2], [True])


def test_who_recovers() -> None:
    met = [episode(0, True, 60, 20), episode(1, True, 100, 20), episode(2, False, 500, 100), episode(3, True, 30), episode(4, True, 50, 10, "occlusion")]
    met.append(episode(5, False, 7, 3, outcome="crashed"))
    without = [episode(seed, seed != 1, 40) for seed in range(6)]
    report = recovery(met, 80, without)
    assert (report["episodes"], report["crashed"], report["disturbed"], report["recovered"], report["undisturbed"]) == (5, 1, 4, 3, 1)
    assert (report["wilson_low"], report["wilson_high"]) == wilson(3, 4)
    assert report["steps_km"] == 40 and report["steps_p50"] == 40 and report["seconds_km"] == 0.5 and report["censored"] == 1
    pushed = report["kinds"]["arm_pushed"]
    assert (pushed["disturbed"], pushed["recovered"], pushed["steps_km"], pushed["steps_p50"]) == (3, 2, 80, 60), (
        "the median with the slow one counted is later"
    )
    paired = report["paired"]
    assert (paired["first_attempt"]["successes"], paired["disturbed"]["successes"], paired["lost"], paired["gained"]) == (4, 4, 1, 1)
    assert paired["recovered_of_winnable"]["successes"] == 2 and paired["recovered_of_winnable"]["episodes"] == 3 and paired["seconds_longer_p50"] == 15 / 80
    told = recovery_table(report)
    assert "3/4 (30-95 %)" in told and "0.50, 1 censored" in told and "crashed: 1" in told
    assert recovery([episode(0, True, 9)], 80)["steps_km"] is None and recovery([episode(0, True, 9)], 80)["paired"] is None
    with pytest.raises(ValueError, match="2 episodes of 1 seeds"):
        recovery([met[0], met[0]], 80)
    with pytest.raises(ValueError, match=r"1 seeds were driven by only one of the two \(first: \[5\]\)"):
        recovery(met, 80, without[:5])


def test_two_ways_of_driving_are_compared_on_the_same_disturbances() -> None:
    wise = [episode(seed, True, 90, 20) for seed in range(8)] + [episode(8, True, 15)]
    blind = [episode(seed, seed < 2, 90, 20) for seed in range(8)] + [episode(8, False, 90, 20)]
    result = compare_recovery(wise, blind)
    assert result["struck"] == {"episodes": 8, "a": 8, "b": 2, "only_a": 6, "only_b": 0, "p": mcnemar([True] * 8, [True] * 2 + [False] * 6)}
    assert result["all"]["episodes"] == 9 and result["all"]["only_a"] == 7 and result["all"]["p"] < 0.05
    assert result["kinds"] == {"arm_pushed": result["struck"]}
    blind[0] = episode(0, True, 90, 20, "occlusion")
    with pytest.raises(ValueError, match="seed 0 met arm_pushed in one and occlusion in the other"):
        compare_recovery(wise, blind)
