"""A robot on a socket is driven as it would be here, and holds when nobody is there."""

from __future__ import annotations

import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from wam.evaluation.environments import make_env
from wam.evaluation.sizes import checked_observation, checked_result, sizes_of
from wam.evaluation.vector import VectorEnv

if not (find_spec("websockets") and find_spec("msgpack")):
    pytest.skip("needs pip install 'wam[serve]'", allow_module_level=True)

from wam_client.robot import Robot, RobotServer


class Slider(Robot):
    """Two numbers that actions are added to; two cameras of different sizes."""

    def __init__(self, left: tuple[int, int] = (4, 6)) -> None:
        self.left = left
        self.at, self.held, self.sent, self.broken, self.seeds = np.zeros(2), 0, [], "", []

    def metadata(self) -> dict[str, Any]:
        return {
            "name": "slider",
            "instruction": "slide",
            "cameras": {"left": self.left, "right": (8, 6)},
            "state_dim": 2,
            "action_low": [-1, -1],
            "action_high": [1, 1],
            "hold": [0, np.nan],
            "control_hz": 10,
            "max_steps": 6,
        }

    def reset(self, seed: int) -> np.ndarray | None:
        self.at = np.array([seed, 0.0])
        self.seeds.append(seed)
        return np.zeros(2)

    def step(self, action: np.ndarray) -> tuple[float, bool]:
        if self.broken == "arm":
            raise OSError("the controller does not answer")
        self.sent.append(action.copy())
        self.at = self.at + action
        return float(self.at[1]), bool(self.at[1] >= 3)

    def state(self) -> np.ndarray:
        return self.at

    def look(self) -> dict[str, np.ndarray]:
        value = int(10 * self.at[1])
        seen = {"left": np.full((*self.left, 3), value, np.uint8), "right": np.full((8, 6, 3), value + 1, np.uint8)}
        if self.broken == "camera":
            seen["right"] = seen["right"] / np.float32(255)
        return {name: picture for name, picture in seen.items() if self.broken != name}

    def hold(self) -> None:
        self.held += 1


@pytest.fixture
def robot() -> Iterator[tuple[Slider, RobotServer]]:
    slider = Slider()
    with RobotServer(slider, port=0) as server:
        yield slider, server


def wait_for(condition: Any) -> None:
    until = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < until, "it never came"
        time.sleep(0.01)


def test_a_remote_robot_is_an_environment(robot: tuple[Slider, RobotServer]) -> None:
    slider, server = robot
    env: Any = make_env(f"remote/{server.url}", image_size=8)
    sizes = sizes_of(env)
    assert (env.cameras, env.control_hz, env.max_steps, env.instruction, env.state_dim, env.action_dim) == (("left", "right"), 10, 6, "slide", 2, 2)
    assert env.hold[0] == 0 and np.isnan(env.hold[1])
    first = checked_observation(env.reset(7), sizes)
    assert slider.seeds == [7] and first.state.tolist() == [7, 0] and first.frames.shape == (1, 8, 16, 3) and first.rest is not None
    assert (first.frames[0, :, :8] == 0).all() and (first.frames[0, :, 8:] == 1).all(), "side by side"
    result = checked_result(env.run(np.full((4, 2), 0.5), 2), 4, 2, sizes)
    assert result.states[:, 1].tolist() == [0.5, 1, 1.5, 2] and not result.done and result.frames[:, 0, 0, 0].tolist() == [10, 20]
    held = slider.held
    result = checked_result(env.run(np.full((4, 2), 7.0), 2), 4, 2, sizes)  # clipped to 1
    assert result.success.tolist() == [True] and result.done and slider.held == held + 1 and slider.sent[-1].tolist() == [1, 1]
    with pytest.raises(ValueError, match="is over"):
        env.run(np.zeros((1, 2)), 1)
    right = make_env_after(env, f"remote/{server.url}?camera=right")
    assert right.image_size == (8, 6) and right.reset(1).frames.shape == (1, 8, 6, 3)
    right.close()
    wait_for(lambda: slider.held > held + 1)


def make_env_after(env: Any, name: str, **settings: Any) -> Any:
    """Another evaluation, once the one before has hung up."""
    env.close()
    until = time.monotonic() + 5
    while True:
        try:
            return make_env(name, **settings)
        except RuntimeError as error:
            assert "another evaluation" in str(error) and time.monotonic() < until


def test_what_goes_wrong_at_a_robot_is_a_crash() -> None:
    slider = Slider(left=(8, 6))
    server = RobotServer(slider, port=0)
    name = f"remote/{server.url}"
    with VectorEnv(name, 1, workers=1, timeout_s=60) as many:
        with pytest.raises(RuntimeError, match="another evaluation"):
            make_env(name)
        many.reset([1])
        for broken, said in (("arm", "reports: OSError: the controller does not answer"), ("left", "{'left': 0, 'right': 2}); one is late or missing"), ("camera", "gave float32 of shape")):
            slider.broken, held = broken, slider.held
            result = many.run(np.zeros((1, 4, 2)), [0], 2)[0]
            assert result.done and said in str(result.crashed), broken
            slider.broken = ""
            wait_for(lambda held=held: slider.held > held)  # it hung up: the environment is made anew
            wait_for(lambda: not many.reset([2]).crashed)
        assert many.run(np.zeros((1, 4, 2)), [0], 2)[0].crashed is None
        server.close()
        assert "did not answer 'run'" in str(many.run(np.zeros((1, 2, 2)), [0], 2)[0].crashed)
        assert "no robot answers" in many.reset([3]).crashed[0]


def test_nothing_moves_that_is_not_sent(robot: tuple[Slider, RobotServer]) -> None:
    slider, server = robot
    env: Any = make_env(f"remote/{server.url}", image_size=8)
    env.reset(1)
    for bad, said in ((np.full((2, 2), np.nan, np.float32), "not finite, or outside"), (np.full((2, 2), 1.5, np.float32), "outside the robot's limits"), (np.zeros((2, 3), np.float32), r"expected \(steps, 2\)")):
        held = slider.held
        with pytest.raises(RuntimeError, match=said):
            env._ask({"call": "run", "actions": bad, "frame_stride": 1, "max_steps": 6})
        assert not slider.sent and slider.held == held + 1
    with pytest.raises(RuntimeError, match="no call 'dance'; calls: reset, run, look"):
        env._ask({"call": "dance"})
    server.idle_s = 0.05  # from the next request on
    env.render()
    wait_for(lambda: slider.held >= 8)


def test_who_may_drive_a_robot(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="without an api_key would let anybody"):
        RobotServer(Slider(), host="0.0.0.0", port=0)
    (tmp_path / "key").write_text("open sesame\n")
    with RobotServer(Slider(), port=0, api_key="open sesame") as server:
        with pytest.raises(RuntimeError, match=r"no robot answers.*401"):
            make_env(f"remote/{server.url}", image_size=8)
        env = make_env(f"remote/{server.url}?key_file={tmp_path}/key", image_size=8)
        assert env.reset(3).state.tolist() == [3, 0]
        env.close()
        for settings, said in (({}, r"cameras of several sizes \(\(4, 6\), \(8, 6\)\); say image_size"), ({"camera": "top"}, "no camera 'top'; cameras: left, right")):
            with pytest.raises(ValueError, match=said):
                make_env_after(env, f"remote/{server.url}?key_file={tmp_path}/key", **settings)
    with pytest.raises(RuntimeError, match="start its RobotServer"):
        make_env(f"remote/{server.url}")
