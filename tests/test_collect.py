"""The collector: the same dataset for the same settings, however it came about; and its actions really do what they say."""

import errno
import hashlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from wam.config import CollectConfig, load_config
from wam.evaluation import collect as collecting
from wam.evaluation.collect import STAGING, collect, exploration_noise
from wam.evaluation.environments import make_env

ROOT = Path(__file__).resolve().parents[1]
SAMPLE = ROOT / "data/metaworld_sample"
simulator = pytest.mark.skipif(importlib.util.find_spec("metaworld") is None, reason="needs pip install 'wam[sim]'")
SMALL = {"tasks": ("drawer-open-v3", "reach-v3"), "episodes_per_task": 2, "image_size": 32}


def contents(root: Path) -> dict[str, str]:
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("collect") / "small"
    collect(CollectConfig(**SMALL, workers=2), root)
    return root


@simulator
def test_killed_and_continued_equals_uninterrupted_with_other_workers(dataset: Path, tmp_path: Path) -> None:
    root = tmp_path / "again"
    code = f"""
if __name__ == "__main__":
    from pathlib import Path
    from wam.config import CollectConfig
    from wam.evaluation.collect import collect
    collect(CollectConfig(**{SMALL!r}, workers=1), Path({str(root)!r}))
"""
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": str(ROOT)})
    while not list(root.glob(f"{STAGING}/*/*.npz")) and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = list(root.glob(f"{STAGING}/*/*.npz"))
    assert kept and not (root / "meta/info.json").exists(), "the process was to be killed in the middle"
    times = {path: path.stat().st_mtime_ns for path in kept}

    staged = []
    assemble = collecting._assemble
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collecting, "_assemble", lambda *args: (staged.extend(path.stat().st_mtime_ns == times[path] for path in kept), assemble(*args)))
        collect(CollectConfig(**SMALL, workers=1), root)
    assert staged and all(staged), "finished episodes are kept, not made again"
    assert contents(root) == contents(dataset)
    assert not (root / STAGING).exists()


@simulator
def test_a_finished_dataset_is_left_alone_and_other_settings_are_refused(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in dataset.rglob("*")}
    collect(CollectConfig(**SMALL, workers=1), dataset)
    assert {path: path.stat().st_mtime_ns for path in dataset.rglob("*")} == before
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"episodes_per_task 2, now 3.*delete"):
        collect(CollectConfig(**{**SMALL, "episodes_per_task": 3}), dataset)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"notes\.txt"):
        collect(CollectConfig(**SMALL), tmp_path)


@simulator
def test_wrong_settings_are_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nearest: drawer-open-v3"):
        collect(CollectConfig(tasks=("drawer-opn-v3",)), tmp_path / "a")
    with pytest.raises(ValueError, match="not a demonstration seed"):
        collect(CollectConfig(seed=9_990), tmp_path / "a")
    assert not (tmp_path / "a").exists()
    with pytest.raises(RuntimeError, match=r"solved 0 of 15 attempts.*max_steps \(4\)"):
        collect(CollectConfig(episodes_per_task=1, max_steps=4), tmp_path / "b")
    with pytest.raises(ValueError, match=r"corner9.*cameras:"):
        collect(CollectConfig(camera="corner9", workers=1), tmp_path / "c")


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_what_is_finished_is_kept_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail(config: CollectConfig, staging: Path) -> None:
        (staging / "drawer-open-v3").mkdir()
        (staging / "drawer-open-v3/000000.npz").touch()
        raise error

    monkeypatch.setattr(collecting, "_gather", fail)
    with pytest.raises(type(error), match=r"1 finished episodes are kept in .*the same command goes on"):
        collect(CollectConfig(), tmp_path)


def test_noise_is_correlated_and_its_strength_is_the_episodes_own() -> None:
    config = CollectConfig(action_noise=0.2)
    noise = [exploration_noise(config, "drawer-open-v3", seed, 4000) for seed in range(12)]
    strengths = [n[:, :3].std() for n in noise]
    assert max(strengths) < 0.23 and max(strengths) > 2 * min(strengths), "uniform in 0..0.2"
    assert not noise[0][:, 3].any(), "the gripper's opening is left alone"
    assert np.corrcoef(noise[0][1:, 0], noise[0][:-1, 0])[0, 1] == pytest.approx(0.9, abs=0.03)
    assert np.array_equal(noise[0], exploration_noise(config, "drawer-open-v3", 0, 4000))


def test_demonstrators_keep_a_pace_of_their_own() -> None:
    config = CollectConfig(slowest_pace=0.4, action_noise=0, max_steps=200)
    paces = [collecting.pace_of(config, "reach-v3", seed) for seed in range(200)]
    assert 0.4 <= min(paces) < 0.43 and 0.97 < max(paces) <= 1 and collecting.pace_of(CollectConfig(), "reach-v3", 3) == 1
    env = make_env("metaworld/reach-v3")
    env.reset(3)
    begin = env.expert_action()
    labels, executed, _ = collecting._attempt(env, config, 3)
    env.close()
    assert np.allclose(labels[0][:3], paces[3] * begin[:3]) and labels[0][3] == begin[3], "its way is slower, its fingers are not"
    assert np.array_equal(labels, executed)


def test_the_sample_is_what_its_config_says() -> None:
    info = json.loads((SAMPLE / "meta/info.json").read_text())
    config = load_config(ROOT / "configs/metaworld_sample.yaml")
    assert json.loads(json.dumps(collecting._settings(config.collect))) == info["wam"]["collect"]
    assert info["total_episodes"] == 12 and info["fps"] == 80
    assert sum(path.stat().st_size for path in SAMPLE.rglob("*") if path.is_file()) < 2_000_000
    rows = pd.concat(pd.read_parquet(path) for path in sorted(SAMPLE.glob("data/*/*.parquet")))
    for _, episode in rows.groupby("episode_index"):
        first = int(np.argmax(episode["next.success"]))
        assert len(episode) == first + 1 + config.collect.steps_after_success and episode["next.done"].tolist() == [False] * (len(episode) - 1) + [True]
        assert np.abs(np.stack(episode["action"])).max() <= 1 and not np.array_equal(np.stack(episode["action"]), np.stack(episode["action.executed"]))


@simulator
def test_replaying_the_sample_succeeds_as_often_as_the_expert_did() -> None:
    rows = pd.concat(pd.read_parquet(path) for path in sorted(SAMPLE.glob("data/*/*.parquet")))
    episodes = pd.concat(pd.read_parquet(path) for path in sorted(SAMPLE.glob("meta/episodes/*/*.parquet")))
    for name, group in episodes.groupby("environment"):
        env = make_env(str(name), image_size=64)
        for record in group.to_dict("records"):
            episode = rows[rows["episode_index"] == record["episode_index"]]
            env.reset(record["seed"])
            result = env.run(np.stack(episode["action.executed"]), 10_000)
            assert result.success[-1], f"the replay of {name}, seed {record['seed']}, failed"
            recorded = np.stack(episode["observation.state"])[1 : len(result.states) + 1]
            np.testing.assert_allclose(result.states, recorded, atol=1e-4)
