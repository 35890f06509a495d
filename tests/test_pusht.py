"""Gymnasium's environments, PushT and LIBERO as environments of ours."""

from __future__ import annotations

import sys
import types
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from wam.evaluation import libero
from wam.evaluation.environments import make_env, package_versions
from wam.evaluation.gymnasium_env import found, hold_of, padded
from wam.evaluation.sizes import checked_observation, checked_result, sizes_of

needs_gym = pytest.mark.skipif(find_spec("gymnasium") is None, reason="needs pip install 'wam[gym]'")
needs_pusht = pytest.mark.skipif(find_spec("gym_pusht") is None, reason="needs pip install 'wam[pusht]'")


# ------------------------------------------------------------------------------------------------ any gymnasium environment

if find_spec("gymnasium"):
    import gymnasium as gym

    class Cart(gym.Env[Any, Any]):
        """A cart on a rail; sees itself in a nested observation, and draws in floats if asked."""

        metadata = {"render_fps": 20, "render_modes": []}

        def __init__(self, floats: bool = False, says: str = "solved") -> None:
            self.observation_space = gym.spaces.Dict({"cart": gym.spaces.Dict({"x": gym.spaces.Box(-9, 9, ())})})
            self.action_space = gym.spaces.Box(np.float32(-1), np.float32(1), (1,))
            self.floats, self.says, self.x = floats, says, 0.0

        def look(self) -> dict[str, Any]:
            picture = np.zeros((4, 8, 3), np.uint8)
            picture[:, int(np.clip(self.x + 4, 0, 7)), 0] = 255  # red
            return {"view": picture / np.float32(255) if self.floats else picture, "cart": {"x": np.float32(self.x)}, "fast": np.zeros(2)}

        def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
            super().reset(seed=seed)
            self.x = float(self.np_random.integers(-3, 1))
            return self.look(), {}

        def step(self, action: Any) -> Any:
            self.x += float(action[0])
            return self.look(), self.x, False, False, {self.says: self.x >= 3}

    gym.register("Cart-v0", entry_point=Cart, max_episode_steps=6, disable_env_checker=True, order_enforce=False)

CART = "gym/Cart-v0?pixels=view&state=[cart.x, fast]&success=solved"


@needs_gym
def test_a_gymnasium_environment_is_driven_by_what_its_name_says() -> None:
    env = make_env(CART + "&hold=zero&rest=[0]&instruction=go right", camera="side", image_size=8)
    sizes = sizes_of(env)
    assert (env.state_dim, env.action_dim, env.control_hz, env.max_steps, env.cameras, env.instruction) == (3, 1, 20, 6, ("side",), "go right")
    one, two = env.reset(3), env.reset(3)
    assert np.array_equal(one.state, two.state) and one.rest is not None and one.rest.tolist() == [0] and env.hold.tolist() == [0]
    assert checked_observation(one, sizes).frames.shape == (1, 8, 8, 3), "stretched"
    start = float(one.state[0])
    result = checked_result(env.run(np.full((9, 1), 5.0), 2), 9, 2, sizes)  # clipped to 1
    steps = int(3 - start)
    assert result.success.tolist() == [False] * (steps - 1) + [True] and result.done and len(result.frames) == steps // 2 and result.states[-1, 0] == 3
    with pytest.raises(ValueError, match="is over"):
        env.run(np.zeros((1, 1)), 1)
    env.reset(3)
    timed = env.run(np.zeros((9, 1)), 1)
    assert len(timed.states) == 6 and timed.done and not timed.success.any()
    assert len(make_env(CART, max_steps=40).run.__self__.reset(1).frames) == 1 and make_env(CART, max_steps=40).max_steps == 40  # type: ignore[attr-defined]


@needs_gym
def test_what_cannot_be_known_must_be_said() -> None:
    for name, said in (
        ("gym/Cart-v0?pixels=camera&state=none", "nothing at 'camera' in its observation; there is: view, cart, fast"),
        ("gym/Cart-v0?pixels=view&state=cart.y", "nothing at 'cart.y'.*there is: x"),
        ("gym/CartPole-v1", "takes actions of Discrete"),
        ("gym/Crt-v7", "cannot make 'Crt-v7'"),
        (CART + "&hold=never", "it is zero, last, or 1 numbers"),
        (CART + "&control_hz=0", "say control_hz="),
        (CART + "&make.floats=true", "draws in float32; .*Say scale=255"),
    ):
        with pytest.raises(ValueError, match=said):
            make_env(name).reset(0)
    env = make_env("gym/Cart-v0?pixels=view&state=none")
    env.reset(0)
    with pytest.raises(ValueError, match=r"does not say 'is_success' in info \(it says solved\)"):
        env.run(np.zeros((1, 1)), 1)
    plain, floats, swapped = (make_env(CART + more).reset(5).frames for more in ("", "&make.floats=true&scale=255", "&bgr=true"))
    assert np.array_equal(plain, floats) and np.array_equal(plain[..., ::-1], swapped) and plain[..., 0].any()
    by_reward = make_env("gym/Cart-v0?pixels=view&state=none&reward_threshold=-9")
    by_reward.reset(0)
    assert by_reward.run(np.zeros((3, 1)), 1).success.tolist() == [True]


def test_keys_pictures_and_holding() -> None:
    assert found({"a": {"b": 1}}, "a.b", "t") == 1 and found(5, ".", "t") == 5
    wide = np.full((2, 4, 3), 200, np.uint8)
    out = padded(wide, (8, 8))
    assert (out[2:6] == 200).all() and not out[:2].any() and not out[6:].any(), "as wide as it goes, bars above and below"
    assert np.isnan(hold_of("last", 2)).all() and np.isnan(hold_of([0, None], 2)[1])
    with pytest.raises(ValueError, match="3 numbers, an action has 2"):
        hold_of([0, 0, 0], 2)


# ------------------------------------------------------------------------------------------------ PushT


@needs_pusht
def test_pusht_is_the_packages_own() -> None:
    ours = make_env("pusht")
    whole = make_env("gym/gym_pusht:gym_pusht/PushT-v0?pixels=pixels&state=agent_pos&make.obs_type=pixels_agent_pos&rest=agent_pos")
    assert (ours.control_hz, ours.max_steps, ours.state_dim) == (10, 300, 2) and ours.action_high.tolist() == [512, 512] and np.isnan(ours.hold).all()
    places = np.random.default_rng(0).uniform(50, 450, (20, 2)).astype(np.float32)
    one, other = ours.reset(100_003), whole.reset(100_003)
    assert np.array_equal(one.frames, other.frames) and np.array_equal(one.state, other.state) and np.array_equal(one.state, one.rest)
    first, second = ours.run(places, 4), whole.run(places, 4)
    for name in ("frames", "states", "rewards", "success"):
        assert np.array_equal(getattr(first, name), getattr(second, name)), name
    assert first.frames.shape == (5, 96, 96, 3) and 0 <= first.rewards.max() <= 1
    assert not np.array_equal(ours.reset(100_004).state, one.state) and np.array_equal(ours.reset(100_003).frames, one.frames)
    assert package_versions("pusht")["gym-pusht"] == "0.1.8", "another version has other initial states"


@needs_pusht
def test_pusht_succeeds_when_the_outline_is_covered() -> None:
    env: Any = make_env("pusht?max_steps=2")
    env.reset(1)
    table = env._env.unwrapped
    table.block.angle, table.agent.position = table.goal_pose[2], (50, 50)
    table.block.position = tuple(table.goal_pose[:2])  # turning moves it
    covered = env.coverage()
    result = env.run(np.array([[50, 50]]), 1)
    assert covered > 0.95 and result.success.all() and result.done and result.rewards[0] == 1
    env.reset(1)
    assert env.coverage() < 0.95 and not env.run(np.array([[50, 50]] * 3), 1).success.any()
    with pytest.raises(ValueError, match="write pusht, not pusht/x"):
        make_env("pusht/x")


# ------------------------------------------------------------------------------------------------ LIBERO


class FakeLibero:
    """What hf-libero 0.1.4 offers of what is used here; keeps what it was told."""

    def __init__(self, **told: Any) -> None:
        self.told, self.log, self.t = told, [], 0

    def seed(self, seed: int) -> None:
        self.log.append(("seed", seed))

    def reset(self) -> dict[str, Any]:
        self.log.append(("reset", None))
        return {}

    def set_init_state(self, state: np.ndarray) -> dict[str, Any]:
        self.t = 0
        self.log.append(("init", float(state[0])))
        return self.look()

    def look(self) -> dict[str, Any]:
        corner = np.zeros((256, 256, 3), np.uint8)
        corner[-64:, -64:] = 10 + self.t  # bottom right as it is drawn: top left, upright
        half_turn = np.array([1, 0, 0, 0]) if self.t % 2 else np.array([0, 0, np.sin(np.pi / 8), np.cos(np.pi / 8)])
        return {
            "agentview_image": corner,
            "robot0_eye_in_hand_image": np.full((256, 256, 3), 99, np.uint8),
            "robot0_eef_pos": np.array([1, 2, 3.0]),
            "robot0_eef_quat": half_turn,
            "robot0_gripper_qpos": np.array([0.04, -0.04]),
        }

    def step(self, action: list[float]) -> tuple[dict[str, Any], float, bool, dict[str, Any]]:
        self.t += 1
        self.log.append(("step", action))
        return self.look(), float(self.t == 14), self.t == 14, {}

    def close(self) -> None:
        self.log.append(("close", None))


@pytest.fixture
def fake_libero(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    task = types.SimpleNamespace(language="open the drawer", problem_folder="libero_goal", bddl_file="open.bddl")
    states = np.arange(50)[:, None] * np.ones(3)
    suite = types.SimpleNamespace(get_task_names=lambda: ["open_the_drawer", "push"], get_task=lambda i: task, get_task_init_states=lambda i: states)
    modules = {
        "libero": {},
        "libero.libero": {"benchmark": types.SimpleNamespace(get_benchmark_dict=lambda: {"libero_goal": lambda: suite}), "get_libero_path": lambda what: f"/x/{what}"},
        "libero.libero.envs": {"OffScreenRenderEnv": FakeLibero},
    }
    for name, content in modules.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setenv("LIBERO_CONFIG_PATH", str(tmp_path))
    (tmp_path / "config.yaml").write_text("{}")


def test_libero_follows_the_protocol(fake_libero: None) -> None:
    env: Any = libero.LiberoEnv("libero_goal/0", camera=("image", "wrist_image"))
    sizes = sizes_of(env)
    assert env.max_steps == 300 and env.instruction == "open the drawer" and env._env.told["bddl_file_name"] == "/x/bddl_files/libero_goal/open.bddl"
    first = checked_observation(env.reset(20_003), sizes)
    log = env._env.log
    assert log[:3] == [("seed", 7), ("reset", None), ("init", 3.0)] and log[3:] == [("step", [0, 0, 0, 0, 0, 0, -1])] * 10
    assert first.frames.shape == (1, 224, 448, 3) and (first.frames[0, :50, :50] == 20).all() and not first.frames[0, 60:, 60:224].any(), "turned, not mirrored"
    assert (first.frames[0, :, 224:] == 99).all() and first.rest is not None and first.rest[-1] == -1
    np.testing.assert_allclose(first.state, [1, 2, 3, 0, 0, np.pi / 4, 0.04, -0.04], rtol=1e-6)
    result = checked_result(env.run(np.full((8, 7), 3.0), 2), 8, 2, sizes)
    assert len(result.states) == 4 and result.done and result.success.tolist() == [False] * 3 + [True] and log[-1] == ("step", [1.0] * 7)
    np.testing.assert_allclose(result.states[0, 3:6], [np.pi, 0, 0], rtol=1e-6)
    assert np.isnan(env.hold[-1]) and not env.hold[:-1].any()


def test_libero_says_what_is_wrong(fake_libero: None, tmp_path: Path) -> None:
    for task, camera, said in (("libero_gaol/0", "image", "has no suite 'libero_gaol'"), ("libero_goal/7", "image", r"no task '7'; give a number, 0\.\.1"), ("libero_goal/0", "top", "no camera 'top'")):
        with pytest.raises(ValueError, match=said):
            libero.LiberoEnv(task, camera=camera)
    assert libero.LiberoEnv("libero_goal/push", max_steps=9).max_steps == 9
    (tmp_path / "config.yaml").unlink()
    with pytest.raises(RuntimeError, match="never set up"):
        libero.LiberoEnv("libero_goal/0")
