"""LeRobot's side: keys and pictures, robots that share a policy, training windows; and LeRobot itself, where there is an interpreter with it."""

import dataclasses
import importlib
import json
import os
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lerobot_fixture import CAMERA, write_dataset
from tiny import TASKS, tiny_config, tiny_episode, tiny_policy, tiny_preset

from wam.data.dataset import WindowDataset
from wam.data.units import Units
from wam.data.views import Canvas
from wam.inference.gate import Gate, GateConfig, GateRefusal, GroupLimits
from wam.inference.session import Session
from wam.pretrained import Policy, save_pretrained

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "packages" / "lerobot_policy_wam"
sys.path.insert(0, str(PACKAGE))

names, robots, windows = (importlib.import_module(f"lerobot_policy_wam.{part}") for part in ("names", "robots", "windows"))
CORNER, WRIST = "observation.images.corner4", "observation.images.wrist"
MODE = "joint"


@cache
def policy() -> Policy:
    """80 Hz, blocks of 8 actions and 4 frames, so a frame every 2 control steps."""
    return tiny_policy(tiny_preset("all", None, "timeline.blocks=3", "sampling.steps=2"))


def test_lerobot_finds_the_package_by_its_name() -> None:
    project = tomllib.loads((PACKAGE / "pyproject.toml").read_text())["project"]
    assert project["name"] == "lerobot_policy_wam" and (PACKAGE / project["name"] / "__init__.py").is_file()
    if importlib.util.find_spec("lerobot") is None:
        with pytest.raises(ImportError, match="WAMPolicy needs LeRobot"):
            _ = importlib.import_module("lerobot_policy_wam").WAMPolicy


# ------------------------------------------------------------------------------------------------ observations


@pytest.mark.parametrize(
    ("cameras", "given", "present", "found"),
    [
        ((CORNER,), {}, (CORNER, WRIST), [CORNER]),
        ((CORNER,), {}, ("observation.image", "observation.state", "task"), ["observation.image"]),  # the only one, in both
        ((CORNER, WRIST), {"wrist": "observation.images.hand"}, (CORNER, "observation.images.hand"), [CORNER, "observation.images.hand"]),
        (("video.front",), {}, ("observation.images.front", WRIST), ["observation.images.front"]),
    ],
)
def test_a_camera_is_found_by_name_or_by_what_is_given(cameras: tuple[str, ...], given: dict[str, str], present: tuple[str, ...], found: list[str]) -> None:
    assert list(names.camera_keys(cameras, given, present).values()) == found


def test_a_camera_that_is_not_there_is_named_with_a_remedy() -> None:
    with pytest.raises(ValueError, match=r"'wrist' is missing: .*observation.images.corner4, observation.images.top.*--policy.cameras='\{wrist: "):
        names.camera_keys((CORNER, WRIST), {}, (CORNER, "observation.images.top"))
    with pytest.raises(ValueError, match=r"camera 'corner4' is missing: .*\(observation.image, observation.images.top\)"):
        names.camera_keys((CORNER,), {}, ("observation.image", "observation.images.top"))  # which of the two is not guessed
    with pytest.raises(ValueError, match="'front', which is no camera of this policy"):
        names.camera_keys((CORNER,), {"front": CORNER}, (CORNER,))


def test_pictures_come_back_to_the_byte_and_others_are_refused() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (2, 5, 6, 3), dtype=np.uint8)
    chw = torch.from_numpy(picture).permute(0, 3, 1, 2)
    assert np.array_equal(names.pixels("x", chw.float() / 255), picture) and np.array_equal(names.pixels("x", chw), picture)
    for wrong, said in ((chw.float() / 127.5 - 1, "IDENTITY"), (chw.float(), "expected 0..1"), (chw.permute(0, 2, 3, 1), "height, width")):
        with pytest.raises(ValueError, match=said):
            names.pixels("x", wrong)


def test_a_vector_is_taken_from_its_columns_or_refused() -> None:
    groups = [{"name": "arm", "size": 3, "column": "observation.arm"}, {"name": "hand", "size": 1, "column": "observation.hand", "start": 1}]
    robot = {"name": "metaworld", "state_groups": groups, "action_dim": 4}
    units = Units.of(*(lambda c: (c.model.embodiment("metaworld"), c.data))(tiny_config(f"model.embodiments={json.dumps([robot])}")))
    arm, hand = torch.arange(6.0).view(2, 3), torch.arange(4.0).view(2, 2)
    seen = names.vector_of({"observation.arm": arm, "observation.hand": hand}, "state", units.state, "observation.state", 4)
    assert seen.tolist() == [[0, 1, 2, 1], [3, 4, 5, 3]]
    assert names.vector_of({"observation.state": torch.ones(2, 4)}, "state", units.state, "observation.state", 4).shape == (2, 4)
    assert names.vector_of({}, "state", units.state, "observation.state", 4) is None
    for batch, said in (
        ({"observation.arm": arm}, "observation.hand is missing"),
        ({"observation.state": torch.ones(2, 7)}, "has 7 numbers, and this policy's robot has 4"),
        ({"observation.state": torch.full((2, 4), torch.nan)}, "not finite"),
    ):
        with pytest.raises(ValueError, match=said):
            names.vector_of(batch, "state", units.state, "observation.state", 4)


def test_every_robot_is_told_what_to_do() -> None:
    assert names.tasks_of({"task": ["a", "b"]}, 2) == ["a", "b"] and names.tasks_of({"task": ["a", "b"]}, 2, "c") == ["c", "c"] and names.tasks_of({"task": "a"}, 1) == ["a"]
    for wrong in ({}, {"task": ["a", ""]}, {"task": ["a"]}):
        with pytest.raises(ValueError, match=r"--policy\.task"):
            names.tasks_of(wrong, 2)


# ------------------------------------------------------------------------------------------------ robots


def make_robots(execute: int = 8, gate: GateConfig | None = None, seed: int = 0) -> Any:
    settings = robots.Settings("metaworld", MODE, policy().config.sampling, execute, seed)
    return robots.Robots(policy(), settings, Gate(gate or GateConfig(), 4, 80.0))


def drive(these: Any, rows: list[int], steps: int, episode: Any) -> np.ndarray:
    """Actions (rows, steps, d): every control step shows the frame that was newest then."""
    out = []
    for step in range(steps):
        these.see(episode.frames[rows, (step + 1) // 2], episode.states[rows, step // 8], [TASKS[row] for row in rows])
        out.append(these.act())
    return np.stack(out, axis=1)


@pytest.fixture(scope="module")
def episode() -> Any:
    return tiny_episode(policy().config, 3, 4)


def test_steps_are_the_session_and_robots_do_not_see_each_other(episode: Any) -> None:
    these = make_robots()
    together = drive(these, [0, 1, 2], 24, episode)
    for row in range(3):
        session, blocks = Session(policy(), [TASKS[row]], "metaworld", [robots._seed_of(0, 0, row)]), []
        for block in range(3):
            if block:
                session.commit(blocks[-1][None])
            frames, state = episode.rows([row]).at(block)
            session.observe(frames, state)
            plan = session.plan(MODE)
            blocks.append(plan.actions[0])
        np.testing.assert_allclose(together[row], np.concatenate(blocks), rtol=1e-4, atol=1e-5)
        if row == 0:
            np.testing.assert_allclose(these.imagined, plan.imagined, rtol=1e-3, atol=1e-4)
    other = dataclasses.replace(episode, frames=np.concatenate([episode.frames[:1], 255 - episode.frames[1:]]))
    np.testing.assert_allclose(drive(make_robots(), [0, 1, 2], 12, other)[0], together[0, :12], rtol=1e-4, atol=1e-5)
    assert np.abs(drive(make_robots(seed=1), [0, 1, 2], 1, episode) - together[:, :1]).min() > 1e-3


def test_a_plan_may_be_left_early_and_begins_anywhere(episode: Any) -> None:
    """3 actions of each plan: at step 9 whole blocks end now, told anew from frames of steps 1, 3, ..., 9."""
    actions = drive(make_robots(execute=3), [0], 12, episode)
    memory = Session(policy(), [TASKS[0]], "metaworld", [robots._seed_of(0, 0, 0)])
    for step in (0, 3, 6):
        memory.reset()
        memory.observe(episode.frames[[0], (step + 1) // 2][:, None], episode.states[[0], step // 8])
        plan = memory.plan(MODE)
        np.testing.assert_allclose(actions[0, step : step + 3], plan.actions[0, :3], rtol=1e-4, atol=1e-5)
    memory.reset()
    memory.observe(episode.frames[[0], 1][:, None], episode.states[[0], 0])
    memory.commit(actions[:, 1:9])
    memory.observe(episode.frames[[0]][:, [(step + 1) // 2 for step in (3, 5, 7, 9)]], episode.states[[0], 1])
    np.testing.assert_allclose(actions[0, 9:12], memory.plan(MODE).actions[0, :3], rtol=1e-4, atol=1e-5)


def test_episodes_begin_anew_and_mistakes_are_told(episode: Any) -> None:
    these = make_robots()
    first = drive(these, [0, 1], 4, episode)
    with pytest.raises(ValueError, match="has 1 rows, and the episode began with 2"):
        these.see(episode.frames[[0], 2], episode.states[[0], 0], [TASKS[0]])
    with pytest.raises(ValueError, match="state is missing"):
        these.see(episode.frames[[0, 1], 2], None, TASKS[:2])
    these.reset()
    again = drive(these, [0, 1, 2], 4, episode)  # other noise, another number of robots
    assert np.abs(again[:2] - first).max() > 1e-3
    these.see(episode.frames[:, 2], episode.states[:, 0], TASKS)
    with pytest.raises(ValueError, match="two observations without an action"):
        these.see(episode.frames[:, 2], episode.states[:, 0], TASKS)


def test_the_gate_cuts_plans_and_nothing_is_made_up(episode: Any) -> None:
    free = drive(make_robots(), [0], 8, episode)[0]
    late = int(np.abs(free).max(axis=1).argmax())
    assert late > 0, "the largest action must not be the first for this test"
    limit = float(np.sort(np.abs(free).max(axis=1))[-2:].mean())
    tight = GateConfig((GroupLimits("all", 0, 4, low=(-limit,), high=(limit,)),), slack=0.0)
    cut = make_robots(gate=tight)
    cut.see(episode.frames[[0], 0], episode.states[[0], 0], TASKS[:1])
    cut.act()
    assert len(cut.rows[0].queue) == late - 1  # what comes before the first action that breaks the limit
    none = make_robots(gate=GateConfig((GroupLimits("all", 0, 4, low=(50.0,), high=(51.0,)),)))
    none.see(episode.frames[[0], 0], episode.states[[0], 0], TASKS[:1])
    with pytest.raises(GateRefusal, match="outside of"):
        none.act()


# ------------------------------------------------------------------------------------------------ training windows


def lerobot_batch(data: WindowDataset, index: int, offsets: Any) -> dict[str, Any]:
    """What `LeRobotDataset` gives for a row: clamped rows, and where they lay beyond the episode."""
    place = data.table.place(index)
    whole, last = data.episode(data.episodes[place.position]), place.stop - 1
    seen, acted = (np.array([place.start + i for i in indices]) for indices in (offsets.observation, offsets.action))
    frames = torch.from_numpy(whole.frames[np.clip(seen, 0, last)]).permute(0, 3, 1, 2).float() / 255
    return {
        CAMERA: frames[None],
        "observation.state": torch.from_numpy(whole.state[np.clip(seen, 0, last)])[None],
        "action": torch.from_numpy(whole.action[np.clip(acted, 0, last)])[None],
        f"{CAMERA}_is_pad": torch.from_numpy((seen < 0) | (seen > last))[None],
        "observation.state_is_pad": torch.from_numpy((seen < 0) | (seen > last))[None],
        "action_is_pad": torch.from_numpy((acted < 0) | (acted > last))[None],
        "task": [whole.instruction],
        "timestamp": torch.zeros(1),
    }


@pytest.mark.parametrize("overrides", [(), ("timeline.first_frame=inside", "timeline.latents_per_block=2", "timeline.actions_per_block=16")])
def test_lerobots_windows_are_ours(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    config = tiny_config(f"data.root={write_dataset(tmp_path / 'data')}", "data.executed_action=null", "data.validation_fraction=0", "codec.image_size=[64, 64]", "timeline.blocks=3", *overrides)
    robot = config.model.embodiment("metaworld")
    data = WindowDataset(config.data, config.timeline, "train", image_size=(64, 64), robot=robot)
    data.normalizer = data.fit_normalizer()
    offsets, make = windows.Offsets.of(config.timeline), windows.Windows(config, "metaworld", data.normalizer, {})
    for index in (0, len(data) // 2, len(data) - 1):
        ours, theirs = data[index], make(lerobot_batch(data, index, offsets))
        for key in ("frames", "frames_is_pad", "state_is_pad", "action_is_pad"):
            assert np.array_equal(theirs[key][0], ours[key]), key
        real = ~ours["action_is_pad"]
        np.testing.assert_allclose(theirs["state"][0], ours["state"], atol=1e-6)
        for key in ("action", "executed"):
            np.testing.assert_allclose(theirs[key][0][real], ours[key][real], atol=1e-6)
        assert theirs["instruction"] == [ours["instruction"]]
    with pytest.raises(ValueError, match="delta_indices"):
        make({**lerobot_batch(data, 0, offsets), "action": torch.zeros(1, 5, 4)})


def test_what_lerobots_reader_cannot_give_is_refused() -> None:
    config = tiny_config("data.executed_action=action.executed")
    assert "taken to be the label" in windows.check_trainable(config, 80.0)[0] and not windows.check_trainable(tiny_config("data.executed_action=null"), 80.0)
    with pytest.raises(ValueError, match="30 rows a second, and the policy 80"):
        windows.check_trainable(config, 30.0, 80.0)
    with pytest.raises(ValueError, match=r"column 'action\.wanted'"):
        windows.check_trainable(tiny_config("data.action=action.wanted"), 80.0)


def test_the_canvas_is_the_training_one() -> None:
    config = tiny_config(f"data.cameras=[{CORNER}, {WRIST}]", "data.layout=width", "codec.image_size=[32, 48]")
    left, right = (torch.full((2, 3, 32, 24), value / 255) for value in (10, 200))
    seen = names.frames_of({CORNER: left, WRIST: right}, names.camera_keys((CORNER, WRIST), {}, (CORNER, WRIST)), Canvas.of(config.data, (32, 48)))
    assert seen.shape == (2, 32, 48, 3) and (seen[:, :, :24] == 10).all() and (seen[:, :, 24:] == 200).all()


# ------------------------------------------------------------------------------------------------ LeRobot itself


@pytest.mark.skipif("LEROBOT_PYTHON" not in os.environ, reason="set LEROBOT_PYTHON to the python of an environment with lerobot, wam and this plugin (docs/lerobot.md)")
def test_lerobot_drives_trains_and_goes_on(tmp_path: Path) -> None:
    """`lerobot-eval` (two rows that end apart, three episodes), `lerobot-train`, and what it saved, resumed and loaded again."""
    tiny = policy()
    save_pretrained(dataclasses.replace(tiny, meta={"control_hz": 10}), tmp_path / "checkpoint")
    write_dataset(tmp_path / "data")
    command = [os.environ["LEROBOT_PYTHON"], str(ROOT / "tests" / "outside_lerobot.py"), *(str(tmp_path / name) for name in ("checkpoint", "data", "out"))]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.strip().splitlines()[-1])
    assert told["overall"]["n_episodes"] == 3 and told["overall"]["pc_success"] == 100 and told["steps"] > 3 * 5 and told["same"]
    for plan in (told["plan"], told["after"]):
        assert plan["shape"] == [2, 8, 4] and plan["apart"] < 1e-4 and plan["held"] == 0
        assert plan["film"] == [8, 32, 48, 3, "torch.uint8"]
    assert all(3e-5 < moved < 3e-4 for moved in told["moved"]) and told["codec"] == 0  # AdamW moves by the rate: warm-up from 0 by 0.003 / 50 a step, and resuming goes on with it
    remedies = ("modes that can", "use --policy.mode=joint", "use 1 to 8", "leave all at IDENTITY", "--policy.embodiment", "--policy.cameras", "the folder that `wam train` wrote", "give --policy.checkpoint")
    for said, remedy in zip(told["refused"], remedies, strict=True):
        assert remedy in said, said
