"""A robot that nobody has registered: a YAML card, a dataset of its own columns, two training steps, and commands it can execute."""

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from lerobot_fixture import CAMERA, write_dataset
from tiny import SMALL

from wam.cli import main
from wam.config import Config, ConfigError, from_dict, load_config, save_config
from wam.data.check.run import check_dataset
from wam.data.dataset import collate
from wam.data.lerobot import LeRobotDataset
from wam.data.mixture import training_data
from wam.data.rotations import from_matrix, to_matrix
from wam.data.units import Units
from wam.inference.session import Session
from wam.pretrained import from_pretrained
from wam.robots import RobotCard, describe, known_cards, read_card
from wam.training.loop import train

ROOT = Path(__file__).resolve().parents[1]
WRIST = "observation.images.wrist"
LENGTHS = (30, 26, 28)
QUICK = ("training.steps=2", "training.batch_size=2", "training.warmup_steps=1", "training.validate_every=2", "training.validation_batches=1", "training.validation_samples=1", "training.modes={skip: 1, joint: 1}", "codec.fit_frames=64", "timeline.blocks=2")
CARD = """
embodiment: two_arms
description: two arms made of nothing
control_hz: 10
cameras: [observation.images.corner4, observation.images.wrist]
layout: width
state: observation.arms
action: action.arms
state_groups:
  - { name: left_place, size: 3 }
  - { name: left_turn, size: 4, start: 3, rotation: quaternion, network_rotation: rotation_6d }
  - { name: left_grip, size: 1, start: 7, gripper: true }
  - { name: right_joints, size: 6, start: 8 }
action_groups:
  - { name: left_place, size: 3, relative_to: left_place }
  - { name: left_turn, size: 3, start: 3, rotation: euler, network_rotation: rotation_6d, relative_to: left_turn, normalization: none }
  - { name: left_grip, size: 1, start: 6, gripper: true, normalization: min_max }
  - { name: right_joints, size: 6, start: 7, relative_to: right_joints }
template: "Two arms {instruction:lower}."
"""


def arms(episode: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """States (length, 14) and commanded actions (length, 13) of an episode: the command is where the robot is three steps later."""
    t = np.arange(length + 3)[:, None]
    place = np.sin(0.1 * t + np.arange(3) + episode)
    turn = to_matrix(np.concatenate([0.1 * t + episode, np.sin(0.05 * t), 0.02 * t], axis=1), "euler")
    grip = (np.sin(0.2 * t) > 0).astype(float)
    joints = np.cos(0.1 * t + np.arange(6) + episode)
    quaternion = from_matrix(turn, "quaternion") * np.where(t % 2, 1, -1)  # either sign, as drivers have it
    state = np.concatenate([place, quaternion, grip, joints], axis=1)[:length]
    action = np.concatenate([place, from_matrix(turn, "euler"), grip, joints], axis=1)[3:]
    return state.astype(np.float32), action.astype(np.float32)


def write_arms(root: Path) -> Path:
    """A dataset of two arms with two cameras."""
    write_dataset(root, LENGTHS, episodes_per_file=3)
    info_path, episodes_path = root / "meta/info.json", root / "meta/episodes/chunk-000/file-000.parquet"
    info, episodes = json.loads(info_path.read_text()), pd.read_parquet(episodes_path)
    info["features"] |= {"observation.arms": {"dtype": "float32", "shape": [14]}, "action.arms": {"dtype": "float32", "shape": [13]}, WRIST: info["features"][CAMERA]}
    info_path.write_text(json.dumps(info))
    (root / "videos" / WRIST).symlink_to(root / "videos" / CAMERA)
    episodes.assign(**{name.replace(CAMERA, WRIST): episodes[name] for name in episodes if CAMERA in name}).to_parquet(episodes_path)
    for path in root.glob("data/*/*.parquet"):
        rows = pd.read_parquet(path)
        numbers = dict.fromkeys(rows.episode_index)
        states, actions = zip(*(arms(e, LENGTHS[e]) for e in numbers), strict=True)
        rows.assign(**{"observation.arms": list(np.concatenate(states)), "action.arms": list(np.concatenate(actions))}).to_parquet(path)
    return root


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the card and its dataset."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data/robots").mkdir(parents=True)
    (tmp_path / "data/robots/two_arms.yaml").write_text(CARD)
    (tmp_path / "run.yaml").write_text("robot: two_arms\ndata: {root: data/arms, cache: none, validation_fraction: 0.3}\n")
    return tmp_path


def test_a_card_and_a_dataset_make_a_policy(lab: Path) -> None:
    dataset = LeRobotDataset(write_arms(lab / "data/arms"))
    config = load_config("run.yaml", (*SMALL, *QUICK))
    robot = config.model.embodiment("two_arms")
    assert (robot.raw_state_dim, robot.state_dim, robot.raw_action_dim, robot.action_dim) == (14, 16, 13, 16)
    policy = from_pretrained(train(config, lab / "run"))
    assert policy.config.model.embodiments == (robot,) and policy.config.text.template == "Two arms {instruction:lower}."
    units, session = Units.of(robot, config.data), Session(policy, ["Open the drawer"], "two_arms", [3])
    rows = units.rows(dataset, 0)
    session.observe(np.full((1, 1, 32, 48, 3), 90, np.uint8), rows["state"][:1])
    plan = session.plan("skip")
    assert plan.actions is not None and plan.actions.shape == (1, 8, 13) and np.isfinite(plan.actions).all()
    far = units.encode_actions(plan.actions, rows["state"][:1])
    clip = 1.5 * np.array([session.normalizer.keys["action"].scale[i] for i in range(3)])
    assert (np.abs(far[0, :, :3]) < 4 * clip).all(), "commands are near where the arm is"
    session.commit(rows["action"][None, :8])
    session.observe(np.full((1, 4, 32, 48, 3), 90, np.uint8), rows["state"][8:9])
    assert session.plan("joint").actions is not None

    before = units.decode_actions(units.encode_actions(rows["action"][None, :8], rows["state"][:1]), rows["state"][:1])[0]
    np.testing.assert_allclose(before[:, [*range(3), *range(6, 13)]], rows["action"][:8, [*range(3), *range(6, 13)]], atol=1e-5)
    np.testing.assert_allclose(to_matrix(before[:, 3:6], "euler"), to_matrix(rows["action"][:8, 3:6], "euler"), atol=1e-5)


def test_two_robots_of_different_widths_in_one_run(lab: Path) -> None:
    write_arms(lab / "data/arms")
    (lab / "data/robots/plain.yaml").write_text("{embodiment: plain, cameras: [observation.images.corner4], state_dim: 4, action_dim: 4, normalization: mean_std}")
    config = load_config("run.yaml", (*SMALL, *QUICK, "data.validation_fraction=0", "mixture=[{}, {robot: plain}]"))
    data = training_data(config)
    arms, plain = data.parts.values()
    assert data.normalizers["plain"].method == "mean_std" and data.normalizers["two_arms"].method == "quantile"
    batch = collate([arms[0], plain[0]])
    assert batch["action"].shape == (2, 16, 16) and not batch["action"][1, :, 4:].any() and batch["embodiment"] == ["two_arms", "plain"]
    policy = from_pretrained(train(config, lab / "run"))
    for robot, sizes in (("two_arms", (14, 13)), ("plain", (4, 4))):
        session = Session(policy, ["Open the drawer"], robot, [3])
        assert session.normalizer == data.normalizers[robot]
        session.observe(np.full((1, 1, 32, 48, 3), 90, np.uint8), np.full((1, sizes[0]), 0.5, np.float32))
        assert session.plan("skip").actions.shape == (1, 8, sizes[1])


def test_check_reads_the_columns_of_a_card(lab: Path) -> None:
    write_arms(lab / "data/arms")

    def found() -> dict[str, str]:
        _, findings = check_dataset(lab / "data/arms", load_config("run.yaml"), episodes=1)
        return {f"{f.level} {f.check}": f"{f.where}: {f.found}" for f in findings}

    said = found()
    assert [key for key in said if key.startswith("error")] == ["error order"], "the wrist camera is a copy; quaternions of either sign are one rotation to a group that says so"
    assert said["info gripper"].startswith("action.arms[6] and observation.arms[7]: at 1 the state grows")
    wrong = CARD.replace("size: 6, start: 8", "size: 6, start: 9").replace(", rotation: quaternion, network_rotation: rotation_6d }", " }").replace(", relative_to: left_turn", "")
    (lab / "data/robots/two_arms.yaml").write_text(wrong)
    said = found()
    assert "jumps from q to -q" in said["error quaternions"]
    assert said["error slices"] == "state group 'right_joints': dimensions 9..14 of observation.arms"


# ------------------------------------------------------------------------------------------------ cards


def test_shipped_cards_are_what_they_say() -> None:
    sizes = {name: (card.embodiment, card.robot.raw_state_dim, card.robot.raw_action_dim, len(card.cameras), card.control_hz) for name, card in _shipped().items()}
    assert sizes == {
        "agibot": ("agibot", 20, 22, 3, 30), "droid": ("oxe_droid", 8, 8, 3, 15), "libero": ("libero", 8, 7, 2, 20), "metaworld": ("metaworld", 4, 4, 1, 80),
        "pusht": ("pusht", 2, 2, 1, 10), "so101": ("so101", 6, 6, 2, 30), "yam": ("yam", 14, 14, 3, 30),
    }  # fmt: skip
    relative = {name: sum(g.size for g in card.action_groups if g.relative_to) for name, card in _shipped().items()}
    assert relative == {"agibot": 20, "droid": 7, "libero": 0, "metaworld": 0, "pusht": 0, "so101": 5, "yam": 14}, "as DreamZero: joints of DROID, all of YAM, all but the base of AgiBot"


def _shipped() -> dict:
    return {name: read_card(str(path)) for name, path in known_cards().items()}


@pytest.mark.parametrize("name", ["agibot", "droid", "libero", "metaworld", "pusht", "so101", "yam"])
def test_a_card_is_a_config_and_needs_no_card_once_saved(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, card = load_config(None, [f"robot={name}"]), read_card(name)
    assert config.data.cameras == card.cameras and config.data.embodiment == card.embodiment and config.data.layout == card.layout
    assert name in describe(name, card) and all(group.name in describe(name, card) for group in (*card.state_groups, *card.action_groups))
    save_config(config, tmp_path / "config.yaml")
    monkeypatch.setattr("wam.robots.known_cards", dict)
    assert load_config(tmp_path / "config.yaml") == config


def test_words_of_a_config_lie_over_its_card() -> None:
    config = load_config(None, ["robot=so101", "data.cameras=[observation.images.top]", "data.layout=single", "text.template=do {instruction}"])
    assert config.data.cameras == ("observation.images.top",) and config.data.control_hz == 30 and config.text.template == "do {instruction}"
    assert load_config(None, ["preset=dreamzero", "robot=yam"]).model.positions == "index"
    assert load_config(None) == Config()


def test_each_entry_of_a_mixture_may_be_another_robot() -> None:
    config = load_config(None, ["robot=yam", "mixture=[{root: a}, {root: b, robot: droid, weight: 2.0}, {root: c, robot: yam}]"])
    assert [e.name for e in config.model.embodiments] == ["yam", "oxe_droid"] and (config.model.states, config.model.actions) == (14, 14)
    assert [d.embodiment for d in config.mixture] == ["yam", "oxe_droid", "yam"] and config.mixture[1].layout == "t" and config.mixture[1].weight == 2
    assert "wrist" in config.template("oxe_droid") and "top camera" in config.template("yam") == config.text.template


@pytest.mark.parametrize(
    ("robot", "message"),
    [
        ("drod", r"robot is 'drod', and there is no such card; did you mean 'droid'\?.*agibot, droid"),
        ("7", "robot is 7; name a card"),
        ("mine.yaml", r"mine\.yaml: unknown key 'camera'; did you mean 'cameras'\?"),
        ("sizes.yaml", r"sizes\.yaml: the card of 'x' has no action_groups and no action_dim"),
        ("list.yaml", r"list\.yaml holds list; a robot card holds keys"),
    ],
)
def test_cards_that_cannot_be_used(robot: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("embodiment: x\ncamera: [a]\n")
    Path("sizes.yaml").write_text(yaml.safe_dump({"embodiment": "x", "cameras": ["a"], "state_dim": 3}))
    Path("list.yaml").write_text("- a\n")
    with pytest.raises(ConfigError, match=message):
        load_config(None, [f"robot={robot}"])


def test_the_card_that_the_documentation_explains() -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/robots.md").read_text(), re.DOTALL)
    card = from_dict(RobotCard, yaml.safe_load(next(block for block in blocks if "embodiment:" in block)))
    assert (card.robot.raw_state_dim, card.robot.state_dim, card.robot.raw_action_dim, card.robot.action_dim) == (14, 16, 13, 16)


def test_wam_robots(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["robots"]) == 0
    assert "droid" in capsys.readouterr().out
    assert main(["robots", "droid"]) == 0
    shown = capsys.readouterr().out
    assert "action.joint_position[0:7]" in shown and "wrist_image_left" in shown and "15 control steps a second" in shown
    assert main(["robots", "drod"]) == 2 and "did you mean 'droid'" in capsys.readouterr().err
