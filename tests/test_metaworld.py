"""The simulator as an evaluation sees it: seeds decide, images are upright, actions are checked, crashes are no failures of a policy."""

import hashlib
import importlib.util
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from wam.config_disturbances import DisturbanceConfig
from wam.evaluation import gl
from wam.evaluation.environments import Environment, StepResult, make_env
from wam.evaluation.metaworld_tasks import INSTRUCTIONS
from wam.evaluation.seeds import DEMONSTRATION, SPLITS, TEST, require_disjoint, require_split, split_of
from wam.evaluation.vector import VectorEnv

TASK = "metaworld/drawer-open-v3"
simulator = pytest.mark.skipif(importlib.util.find_spec("metaworld") is None, reason="needs pip install 'wam[sim]'")


@pytest.fixture(scope="module")
def env() -> Environment:
    return make_env(TASK)


def episode_hash(env: Environment, seed: int) -> str:
    """Everything that 24 steps of fixed actions show, in one number."""
    first = env.reset(seed)
    result = env.run(np.random.default_rng(0).uniform(-1, 1, (24, 4)), 8)
    return hashlib.sha256(b"".join(a.tobytes() for a in (first.frames, first.state, result.frames, result.states, result.rewards))).hexdigest()


@simulator
def test_a_seed_decides_the_episode(env: Environment) -> None:
    fresh = episode_hash(env, 5)
    assert episode_hash(env, 6) != fresh
    env.reset(7)
    env.run(np.ones((3, 4)), 1)  # an episode that is left in the middle
    assert episode_hash(env, 5) == fresh
    assert episode_hash(make_env(TASK), 5) == fresh
    code = f"import sys; sys.path.insert(0, 'tests'); from test_metaworld import *; print(episode_hash(make_env({TASK!r}), 5))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": "."})
    assert other.stdout.strip() == fresh
    assert not other.stderr, "PyOpenGL should have nothing to complain about when the process ends"


@simulator
@pytest.mark.parametrize("task", ["drawer-open-v3", "reach-v3", "door-open-v3", "window-close-v3", "assembly-v3"])
def test_seeds_place_objects_and_the_expert_sees_where(task: str) -> None:
    env = make_env(f"metaworld/{task}", image_size=32)
    placed = []
    for seed in (0, 1):
        env.reset(seed)
        placed.append(env._full_observation()[4:].copy())
        for _ in range(env.max_steps):
            _, _, success = env.step(env.expert_action())
            if success:
                break
        assert success, f"the expert of {task} fails in the episode of seed {seed}"
    assert np.abs(placed[0] - placed[1]).max() > 1e-3


@simulator
def test_the_image_is_upright() -> None:
    env = make_env(TASK, image_size=128)

    def finger_row() -> float:
        image = env.render().astype(int)
        cyan = (image[..., 0] < 90) & (image[..., 1] > 130) & (image[..., 2] > 130)  # the pad of one finger
        assert cyan.any()
        return float(np.nonzero(cyan)[0].mean())

    env.reset(0)
    low, height = finger_row(), env.state()[2]
    env.run(np.tile([0, 0, 1, -1], (20, 1)), 20)
    assert env.state()[2] > height + 0.05, "the gripper rose in the world"
    assert finger_row() < low - 5, "so it must rise in the image, where rows count downwards"


@simulator
def test_a_stretch_ends_with_the_episode(env: Environment) -> None:
    first = env.reset(0)
    assert first.frames.shape == (1, 64, 64, 3) and first.frames.dtype == np.uint8 and first.state.shape == (4,)
    stretch = env.run(np.zeros((7, 4)), 2)
    assert stretch.frames.shape == (3, 64, 64, 3) and stretch.states.shape == (7, 4) and not stretch.done
    actions = []
    env.reset(0)
    while True:
        actions.append(env.expert_action())
        if env.step(actions[-1])[2]:
            break
    env.reset(0)
    result = env.run(np.stack([*actions, *actions]), 10)
    assert result.done and len(result.states) == len(actions) and result.success.tolist() == [False] * (len(actions) - 1) + [True]
    assert len(result.frames) == len(actions) // 10
    with pytest.raises(ValueError, match="is over"):
        env.run(np.zeros((1, 4)), 1)
    short = make_env(TASK, max_steps=3)
    short.reset(0)
    timeout = short.run(np.zeros((8, 4)), 1)
    assert timeout.done and len(timeout.states) == 3 and not timeout.success.any()


@simulator
def test_actions_are_clipped_and_checked(env: Environment) -> None:
    env.reset(3)
    beyond = env.run(np.full((4, 4), 9.0), 4)
    env.reset(3)
    assert np.array_equal(beyond.frames, env.run(np.ones((4, 4)), 4).frames)
    with pytest.raises(ValueError, match=r"nan.*finite"):
        env.run(np.full((2, 4), np.nan), 1)
    with pytest.raises(ValueError, match=r"\(2, 3\).*expected \(2, 4\)"):
        env.run(np.zeros((2, 3)), 1)


@simulator
def test_wrong_names_are_answered_with_the_right_ones() -> None:
    with pytest.raises(ValueError, match="nearest: drawer-open-v3"):
        make_env("metaworld/drawer-opn")
    with pytest.raises(ValueError, match="did you mean 'metaworld'"):
        make_env("metawrld/drawer-open-v3")
    with pytest.raises(ValueError, match="cameras: topview, corner"):
        make_env(TASK, camera="corner9")
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS
    from metaworld.policies import ENV_POLICY_MAP

    assert set(INSTRUCTIONS) == set(ALL_V3_ENVIRONMENTS) == set(ENV_POLICY_MAP)
    assert len(set(INSTRUCTIONS.values())) == 50, "two tasks with one instruction could not be told apart"


def same(one: StepResult, other: StepResult) -> bool:
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in ("frames", "states", "rewards", "success", "done"))


@simulator
def test_side_by_side_equals_one_by_one(env: Environment) -> None:
    seeds, rows = [11, 12, 13], [2, 0]
    actions = np.random.default_rng(1).uniform(-1, 1, (2, 8, 4))
    with VectorEnv(TASK, 3, workers=2) as many:
        assert (many.state_dim, many.action_dim, many.control_hz, many.instruction) == (4, 4, 80, "open the drawer")
        first = many.reset(seeds)
        results = many.run(actions, rows, 4)
        with pytest.raises(ValueError, match="not finite"):
            many.run(np.full((1, 1, 4), np.inf), [0], 1)
    for i, row in enumerate(rows):
        alone = env.reset(seeds[row])
        assert np.array_equal(alone.frames, first.frames[row]) and np.array_equal(alone.state, first.states[row])
        assert same(env.run(actions[i], 4), results[i])


@simulator
def test_running_ahead_shows_what_would_come_and_changes_nothing(env: Environment) -> None:
    generator = np.random.default_rng(2)
    before, after = generator.uniform(-1, 1, (2, 1, 8, 4))
    stretches = np.concatenate([after, generator.uniform(-1, 1, (2, 8, 4))])  # the first is what is then executed
    with VectorEnv(TASK, 3, workers=2) as many:
        many.reset([11, 12, 13])
        many.run(before, [1], 4)
        seen = many.foresee(stretches[None], [1], 4)
        ran = many.run(after, [1], 4)[0]
        os.kill(many._lane(2).worker._process.pid, signal.SIGKILL)
        assert not many.foresee(stretches[None], [2], 4).any()
        assert "exit code -9" in str(many.run(after, [2], 4)[0].crashed)
    assert seen.shape == (1, 3, 2, 64, 64, 3)
    assert np.array_equal(seen[0, 0], ran.frames)
    assert not np.array_equal(seen[0, 0], seen[0, 1])
    env.reset(12)
    env.run(before[0], 4)
    assert same(env.run(after[0], 4), ran)
    disturbed = make_env(TASK, disturbances=DisturbanceConfig(kinds=("occlusion",)))
    assert hasattr(env, "foresee") and not hasattr(disturbed, "foresee"), "what is disturbed cannot be run ahead: it would meet what was not drawn yet"


@simulator
def test_a_killed_simulator_is_no_failure_of_the_policy() -> None:
    with VectorEnv(TASK, 2, workers=2) as many:
        many.reset([8, 9])
        os.kill(many._workers[1]._process.pid, signal.SIGKILL)
        fine, lost = many.run(np.zeros((2, 4, 4)), [0, 1], 2)
        assert fine.crashed is None and len(fine.states) == 4
        assert all(part in str(lost.crashed) for part in ("drawer-open-v3", "seed 9", "exit code -9", "not a failure of the policy"))
    with pytest.raises(ValueError, match="nearest: drawer-open-v3"):
        VectorEnv("metaworld/drawer-opn", 2)


@simulator
def test_workers_end_with_their_parent() -> None:
    code = f"""
if __name__ == "__main__":
    import os
    from wam.evaluation.vector import VectorEnv
    many = VectorEnv({TASK!r}, 1, workers=1)
    print(many._workers[0]._process.pid, flush=True)
    os.kill(os.getpid(), 9)
"""
    worker = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": "."}).stdout)
    for _ in range(100):
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail(f"worker {worker} outlived its parent")


def test_the_backend_is_tried_or_the_remedy_named(monkeypatch: pytest.MonkeyPatch) -> None:
    choose = gl.choose_backend.__wrapped__  # without the cache
    assert "invalid value" in (gl.probe("nonsense") or "")
    monkeypatch.setattr(gl.platform, "system", lambda: "Linux")
    monkeypatch.setattr(gl, "require_modules", lambda *names: None)
    monkeypatch.setattr(gl, "probe", lambda backend: None if backend == "osmesa" else "no such library")
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    assert choose() == "osmesa"
    monkeypatch.setenv("MUJOCO_GL", "bogus")  # the user's own choice is tried as well, but not once more in each worker
    with pytest.raises(gl.RenderError, match=r"MUJOCO_GL=bogus: no such library.*libegl1.*unset MUJOCO_GL"):
        choose()
    with monkeypatch.context() as inside_a_worker:
        inside_a_worker.setattr(gl.multiprocessing, "parent_process", lambda: object())
        assert choose() == "bogus"
    monkeypatch.delenv("MUJOCO_GL")
    assert choose() == "osmesa"
    monkeypatch.setattr(gl, "probe", lambda backend: "no such library")
    with pytest.raises(gl.RenderError, match=r"egl: no such library.*libegl1.*libosmesa6"):
        choose()


def test_seed_ranges_keep_apart() -> None:
    assert not any(set(a) & set(b) for a in SPLITS.values() for b in SPLITS.values() if a is not b)
    assert [split_of(seed) for seed in (0, 9_999, 10_000, 20_000)] == ["demonstration", "demonstration", "validation", "test"]
    require_split(range(5), "demonstration")
    with pytest.raises(ValueError, match="seed 20000 is not a demonstration seed"):
        require_split((9_999, 20_000), "demonstration")
    with pytest.raises(ValueError, match="1 seeds are in both"):
        require_disjoint(DEMONSTRATION, [*TEST[:5], 3])
    with pytest.raises(ValueError, match="lies in no range"):
        split_of(-1)
