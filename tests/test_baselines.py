"""Baselines: their episodes by seed, crashes apart, replay of what was recorded, and LeRobot's policies through a pipe."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import flaky_env as flaky
import numpy as np
import pytest

from wam.evaluation.baseline_runs import BaselineRun, run, table
from wam.evaluation.baselines import Outcome, available, baseline_row, play, run_baselines, still
from wam.evaluation.environments import Observation
from wam.evaluation.lerobot_policies import LeRobotPolicy, train_lerobot
from wam.evaluation.replay import Recordings, read_recordings

NAME = "python/flaky_env:Flaky"
SAMPLE = Path(__file__).resolve().parents[1] / "data/metaworld_sample"


def test_episodes_are_kept_and_crashes_counted_apart(capsys: pytest.CaptureFixture[str]) -> None:
    rows = run_baselines(NAME, 4, 900, workers=1, max_steps=5)  # of these seeds 901 raises, 902 kills its process
    assert list(rows) == ["hold_still", "random"] and "cannot play expert; left out" in "".join(capsys.readouterr())
    for row in rows.values():
        assert (row["successes"], row["episodes"], row["crashed"], row["mean_max_reward"]) == (1, 2, 2, 1.0)
        assert [(e["seed"], e["success"], e["length"], bool(e["crashed"])) for e in row["episode_results"]] == [
            (900, True, 5, False),
            (901, False, 0, True),
            (902, False, 0, True),
            (903, False, 5, False),
        ]
        assert "the table is not there" in row["episode_results"][1]["crashed"] and "exit code 3" in row["episode_results"][2]["crashed"]
    with pytest.raises(RuntimeError, match=r"(?s)crashed under baseline 'random' in all 1 episodes.*the table is not there"):
        baseline_row(NAME, "random", [Outcome(901, False, 0, crashed="the table is not there")])
    with pytest.raises(ValueError, match=r"cannot play expert, replay; it can: hold_still, random"):
        run_baselines(NAME, 1, 1, names=["expert", "replay"])


def test_holding_still_is_no_guess() -> None:
    env = flaky.Flaky()
    first = env.reset(1)
    assert still(env, None) is None and "hold_still" not in available(env, None, None), "its last number repeats a command, and none was sent"
    command = still(env, first)
    assert command is not None and command.tolist() == [0, 0, 0]
    far = Observation(first.frames, first.state, rest=np.array([9, 9, 5], np.float32))
    command = still(env, far)
    assert command is not None and command.tolist() == [0, 0, 1], "zero where hold says so, else the command at rest, inside the box"


def test_a_recording_is_replayed_from_the_nearest_start() -> None:
    pytest.importorskip("av")
    recordings = read_recordings(SAMPLE, "metaworld/door-open-v3")
    assert recordings.episodes == (6, 7, 8) and recordings.seeds == (0, 1, 2) and recordings.pictures is not None
    start = Observation(recordings.pictures[2:3], recordings.states[2])
    assert recordings.nearest(1, start) == 1, "the same seed is the same start"
    assert recordings.nearest(20_000, start) == 2, "of a seed that was not recorded, what looks the same"
    with pytest.raises(ValueError, match="state has 2 numbers, the recorded ones 4"):
        recordings.nearest(20_000, Observation(start.frames, np.zeros(2, np.float32)))
    with pytest.raises(ValueError, match=r"the environment's pictures are \(2, 2, 3\)"):
        recordings.nearest(20_000, Observation(np.zeros((1, 2, 2, 3), np.uint8), start.state))
    with pytest.raises(ValueError, match=r"no episode of metaworld/reach-v3; it has those of: metaworld/button"):
        read_recordings(SAMPLE, "metaworld/reach-v3")


def test_replay_sends_what_was_recorded_and_then_holds() -> None:
    class Listening(flaky.Flaky):
        heard: list[list[float]] = []

        def run(self, actions: np.ndarray, frame_stride: int) -> Any:
            self.heard += actions.tolist()
            return super().run(actions, frame_stride)

    actions = np.arange(6, dtype=np.float32).reshape(2, 3) / 8
    recordings = Recordings((4, 9), (None, None), None, np.array([[50, 0], [3, 0]], np.float32), (np.ones((1, 3), np.float32), actions))
    env = Listening(max_steps=4)
    outcome = play(env, "replay", 3, recordings)
    assert outcome.replayed == 9 and outcome.length == 4 and env.heard == [*actions.tolist(), [0, 0, 0], [0, 0, 0]]


# ------------------------------------------------------------------------------------------------ LeRobot

FAKE = '''
import json, types
class Config:
    type, device, pretrained_backbone_weights = "act", "cuda", "IMAGENET"
    input_features = {"observation.images.front": types.SimpleNamespace(shape=(3, 4, 4)), "observation.state": types.SimpleNamespace(shape=(2,))}
    output_features = {"action": types.SimpleNamespace(shape=(3,))}
class PreTrainedConfig:
    @staticmethod
    def from_pretrained(folder):
        config = Config()
        if "broken" in json.load(open(folder + "/config.json")): raise OSError("weights are missing")
        return config
class Policy:
    resets = 0
    @classmethod
    def from_pretrained(cls, folder, config):
        assert config.device == "cpu" and config.pretrained_backbone_weights is None
        return cls()
    def eval(self): pass
    def reset(self): Policy.resets += 1; self.calls = 0
    def select_action(self, batch):
        import torch
        image, state = batch["observation.images.front"], batch["observation.state"]
        assert image.shape[1:] == (3, 4, 4) and image.dtype == torch.float32 and image.max() <= 1 and batch["task"] == ["count"] * len(state)
        assert torch.allclose(image[:, 0, 0, 0] * 255, state[:, 1]) and Policy.resets == 1, "picture and state are of one moment"
        out = torch.zeros(len(state), 3); out[:, 2] = 7; out[state[:, 0] == 13, 0] = 0.1
        return out
def make_pre_post_processors(config, pretrained_path, preprocessor_overrides):
    assert preprocessor_overrides == {"device_processor": {"device": "cpu"}}
    return (lambda batch: batch), (lambda actions: actions)
def get_policy_class(kind): return Policy
'''
TRAINER = '''
import json, pathlib, sys
told = dict(word[2:].split("=", 1) for word in sys.argv[1:])
if told["policy.type"] != "act": sys.exit("no such policy")
folder = pathlib.Path(told["output_dir"]) / "checkpoints/last/pretrained_model"
folder.mkdir(parents=True)
(folder / "config.json").write_text("{}")
(folder / "train_config.json").write_text(json.dumps({"steps": int(told["steps"]), "told": told}))
'''


@pytest.fixture
def lerobot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An interpreter with a LeRobot that has the parts that are used, and a policy folder."""
    place = tmp_path / "site"
    for package, content in {"": "", "configs": "", "policies": "", "scripts": ""}.items():
        (place / "lerobot" / package).mkdir(parents=True, exist_ok=True)
        (place / "lerobot" / package / "__init__.py").write_text(content)
    (place / "lerobot/configs/policies.py").write_text(FAKE)
    (place / "lerobot/policies/factory.py").write_text("from lerobot.configs.policies import get_policy_class, make_pre_post_processors")
    (place / "lerobot/scripts/lerobot_train.py").write_text(TRAINER)
    (place / "lerobot-0.4.4.dist-info").mkdir()
    (place / "lerobot-0.4.4.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: lerobot\nVersion: 0.4.4\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(place), str(Path(__file__).parent)]))
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy/config.json").write_text("{}")
    return tmp_path / "policy"


def test_what_lerobot_cannot_do_is_told(lerobot: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no LeRobot policy"):
        LeRobotPolicy(Path(sys.executable), tmp_path)
    with pytest.raises(RuntimeError, match=r"cannot be started .*--lerobot-python"):
        LeRobotPolicy(tmp_path / "python", lerobot)
    (lerobot / "config.json").write_text('{"broken": 1}')
    with pytest.raises(RuntimeError, match=r"cannot load .*OSError: weights are missing"):
        LeRobotPolicy(Path(sys.executable), lerobot)
    with pytest.raises(RuntimeError, match=r"exit code 1: no such policy"):
        train_lerobot(Path(sys.executable), "vqbet", SAMPLE, tmp_path / "out", 5)
    with pytest.raises(ValueError, match="needs --dataset and --lerobot-python"):
        BaselineRun(NAME, train=("act",))


def test_a_command_trains_drives_and_goes_on(lerobot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = BaselineRun(NAME, 4, 11, 6, names=("hold_still",), train=("act",), dataset=SAMPLE, train_steps=7, lerobot_python=Path(sys.executable), train_options=("--policy.chunk_size=8",))
    out = tmp_path / "out"
    results = run(config, out)
    rows = results["baselines"]
    assert list(rows) == ["hold_still", "act"] and results == json.loads((out / "baselines.json").read_text())
    told = json.loads((out / "lerobot_act/checkpoints/last/pretrained_model/train_config.json").read_text())["told"]
    assert told["dataset.root"] == str(SAMPLE) and told["policy.chunk_size"] == "8" and rows["act"]["training"]["steps"] == 7
    assert [(e["seed"], e["success"], e["length"], bool(e["crashed"])) for e in rows["act"]["episode_results"]] == [
        (11, False, 6, False),
        (12, True, 6, False),
        (13, False, 0, True),
        (14, True, 6, False),
    ], "the same episodes; what the policy sends is clipped to the box"
    assert (rows["act"]["successes"], rows["act"]["episodes"], rows["act"]["crashed"]) == (2, 3, 1) and rows["act"]["versions"]["lerobot"] == "0.4.4"
    assert "hold_still" in table(results) and "2/3" in table(results) and "1 crashed" in table(results)
    monkeypatch.setattr("wam.evaluation.baseline_runs.run_baselines", None)  # nothing is driven again
    assert run(config, out)["baselines"] == results["baselines"]
    with pytest.raises(ValueError, match=r"holds other episodes .*seed 11, now 12"):
        run(BaselineRun(NAME, 4, 12, 6), out)
