"""A new robot from a released policy: a tiny DreamZero is converted, fitted to two YAM arms with adapters or whole, from the shipped config, and drives them."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from lerobot_fixture import CAMERA, write_dataset
from released import IMAGE, write_release

from wam.config import load_config
from wam.convert import convert
from wam.convert.options import Options
from wam.data.lerobot import LeRobotDataset
from wam.data.units import Units
from wam.inference.session import Session
from wam.pretrained import ADAPTER, BACKBONE, from_pretrained, weights_sha256
from wam.training.loop import train

CONFIG = Path(__file__).parents[1] / "configs" / "wan21_14b_yam.yaml"
LENGTHS = (40, 36, 44)
GROUPS = {"left_joint_pos": (0, 6), "left_gripper_pos": (6, 7), "right_joint_pos": (7, 13), "right_gripper_pos": (13, 14)}
VIEWS = ("top_camera-images-rgb", "right_camera-images-rgb", "left_camera-images-rgb")


def write_play_data(root: Path) -> Path:
    """Two arms of seven numbers each that follow their commands, three cameras, and GR00T's names for all of it."""
    write_dataset(root, LENGTHS, episodes_per_file=3)
    info_path, episodes_path = root / "meta/info.json", root / "meta/episodes/chunk-000/file-000.parquet"
    info, episodes = json.loads(info_path.read_text()), pd.read_parquet(episodes_path)
    cameras = {f"observation.images.{view}": info["features"][CAMERA] for view in VIEWS}
    arms = {"dtype": "float32", "shape": [14]}
    info["features"] |= {"observation.state": arms, "action": arms, "annotation.task": {"dtype": "int64", "shape": [1]}, **cameras}
    info_path.write_text(json.dumps(info))
    for camera in cameras:
        (root / "videos" / camera).symlink_to(root / "videos" / CAMERA)
        episodes = episodes.assign(**{name.replace(CAMERA, camera): episodes[name] for name in episodes if CAMERA in name})
    episodes.to_parquet(episodes_path)
    for path in root.glob("data/*/*.parquet"):
        rows = pd.read_parquet(path)
        t = np.concatenate([np.arange(LENGTHS[e]) + 50 * e for e in dict.fromkeys(rows.episode_index)])[:, None]
        state, action = (np.sin(0.1 * (t + ahead) + np.arange(14)).astype(np.float32) for ahead in (0, 2))
        rows.assign(**{"observation.state": list(state), "action": list(action), "annotation.task": rows.task_index}).to_parquet(path)
    slices = {name: {"start": start, "end": end} for name, (start, end) in GROUPS.items()}
    modality = {"state": slices, "action": slices, "video": {view: {"original_key": f"observation.images.{view}"} for view in VIEWS}, "annotation": {"task": {}}}
    (root / "meta/modality.json").write_text(json.dumps(modality))
    return root


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a converted policy and play data."""
    root = tmp_path_factory.mktemp("lab")
    convert("dreamzero", write_release(root / "release"), root / "agibot", Options(image_size=IMAGE["14b"]))
    write_play_data(root / "play")
    return root


def overrides(lab: Path, output: Path) -> list[str]:
    """The shipped config at the stand-in's size: every other setting is as it is shipped."""
    policy, here = load_config(lab / "agibot/config.yaml"), str(lab / "agibot")
    sizes = {f"model.{name}": getattr(policy.model, name) for name in ("layers", "heads", "head_dim", "ffn_dim", "freq_dim", "image_dim", "mlp_hidden")}
    places = {f"{part}.pretrained": here for part in ("codec", "text", "image", "model")} | {"training.finetune_from": here, "data.root": str(lab / "play"), "output": str(output)}
    rest = {
        "codec.image_size": list(IMAGE["14b"]),
        "codec.channels": policy.codec.channels,
        "text.width": policy.text.width,
        "text.cache": str(output.parent / "text"),
        "data.validation_fraction": 0.3,
        "data.control_hz": 10,
        "training.steps": 3,
        "training.batch_size": 2,
        "training.warmup_steps": 1,
        "training.validate_every": 3,
        "training.validation_batches": 1,
        "training.validation_samples": 2,
    }
    return [f"{name}={json.dumps(value)}" for name, value in (sizes | places | rest).items()]


@pytest.mark.parametrize("adapters", [True, False])
def test_a_released_policy_learns_a_new_robot(adapters: bool, lab: Path, tmp_path: Path) -> None:
    changes = [] if adapters else ["model.lora=null", "model.pretrained=null"]
    config = load_config(CONFIG, [*overrides(lab, tmp_path / "run"), *changes])
    before = weights_sha256(lab / "agibot")
    folder = train(config, tmp_path / "run")
    assert weights_sha256(lab / "agibot") == before and (folder / ADAPTER).is_dir() == adapters
    report = json.loads((tmp_path / "run/finetuned_from.json").read_text())
    assert not [name for name in report["dropped"] if "robot" not in name] and report["taken"] > 100

    released, policy = (from_pretrained(path, dtype=torch.float32) for path in (lab / "agibot", folder))
    moved = {name for name, value in released.model.state_dict().items() if not torch.equal(value, policy.model.state_dict()[name])}
    adapted = {name for name in moved if name.startswith(BACKBONE)}
    assert adapted and adapted != moved, "the backbone moves, and so do encoders and decoders"
    if adapters:
        assert all(name.endswith(".weight") and ("attn" in name or "ffn" in name) for name in adapted), "of the backbone, only what has adapters"

    robot = policy.config.model.embodiment("yam")
    rows = Units.of(robot, policy.config.data).rows(LeRobotDataset(lab / "play"), 0)
    session = Session(policy, ["open the drawer"], "yam", [3])
    session.observe(np.full((1, 1, *IMAGE["14b"], 3), 90, np.uint8), rows["state"][:1])
    plan = session.plan("joint_mutual")
    assert plan.actions is not None and plan.actions.shape == (1, 24, 14) and np.isfinite(plan.actions).all()


def test_adapters_belong_to_the_policy_they_start_from(lab: Path, tmp_path: Path) -> None:
    other = write_release(tmp_path / "release")
    convert("dreamzero", other, tmp_path / "other", Options(image_size=IMAGE["14b"]))
    config = load_config(CONFIG, [*overrides(lab, tmp_path / "run"), f"model.pretrained={tmp_path / 'other'}"])
    with pytest.raises(ValueError, match=r"exclude each other.*set model.pretrained="):
        train(config, tmp_path / "run")
