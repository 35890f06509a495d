"""`wam check`: the sample is sound; broken in one way, it is found in just that way."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from tiny_wan import FORMS, randomise, transformer, wan_config
from torch import nn

from wam.cli import main
from wam.config import Config, LoraConfig, load_config
from wam.data.check.findings import Finding
from wam.data.check.run import CHECKS, check_dataset
from wam.data.check.timing import measure_lag
from wam.data.normalize import Normalizer
from wam.data.video import VideoDecoder
from wam.data.writer_video import encode_video
from wam.files import write_json_atomic
from wam.model.backbone import Backbone
from wam.model.lora import apply_lora, base_identity, is_adapter, save_adapter

ROOT = Path(__file__).resolve().parents[1]
SAMPLE = ROOT / "data/metaworld_sample"
CONFIG = ROOT / "configs/metaworld_tiny.yaml"
CAMERA = "observation.images.corner4"
OTHER = "observation.images.behind"
ROWS, EPISODES = "data/chunk-000/file-000.parquet", "meta/episodes/chunk-000/file-000.parquet"
VIDEO = f"videos/{CAMERA}/chunk-000/file-000.mp4"
Broken = set[tuple[str, str]]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A copy without stored statistics, which any edit would make wrong."""
    copy = Path(shutil.copytree(SAMPLE, tmp_path / "dataset"))
    (copy / "meta/stats.json").unlink()
    return copy


def config(*overrides: str) -> Config:
    return load_config(CONFIG, overrides)


def check(root: Path, *overrides: str, checkpoint: Path | None = None) -> list[Finding]:
    return check_dataset(root, config(*overrides), checkpoint=checkpoint)[1]


def broken(findings: list[Finding]) -> Broken:
    """Levels and checks of all that is more than information."""
    return {(finding.level, finding.check) for finding in findings if finding.level != "info"}


def edit(root: Path, change: Callable[[pd.DataFrame], None], file: str = ROWS) -> None:
    frame = pd.read_parquet(root / file)
    change(frame)
    frame.to_parquet(root / file)


def edit_column(root: Path, key: str, change: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> None:
    """`change(rows (n, d), episode (n,))` gives the new rows."""

    def put(frame: pd.DataFrame) -> None:
        rows = change(np.stack(frame[key].to_list()).astype(np.float64), frame["episode_index"].to_numpy())
        frame[key] = list(rows.astype(np.float32))

    edit(root, put)


def edit_info(root: Path, change: Callable[[dict], None]) -> None:
    info = json.loads((root / "meta/info.json").read_text())
    change(info)
    write_json_atomic(root / "meta/info.json", info)


def columns(root: Path, *keys: str) -> list[np.ndarray]:
    frame = pd.read_parquet(root / ROWS)
    return [np.stack(frame[key].to_list()) for key in keys]


def frames_of(root: Path) -> np.ndarray:
    return VideoDecoder().read_frames(root / VIDEO, range(1126))


def rows_of(root: Path, *episodes: int) -> np.ndarray:
    """Rows, and in this dataset also frames, of some episodes."""
    return np.flatnonzero(np.isin(pd.read_parquet(root / ROWS)["episode_index"].to_numpy(), episodes))


# ------------------------------------------------------------------------------------------------ the sample, and the table


def test_the_sample_is_sound() -> None:
    assert broken(check(SAMPLE)) == set()


def test_checks_have_names_of_their_own_and_say_what_they_look_for() -> None:
    assert len({c.name for c in CHECKS}) == len(CHECKS) and all(c.about for c in CHECKS)
    assert {finding.check for finding in check(SAMPLE)} <= {c.name for c in CHECKS}


# ------------------------------------------------------------------------------------------------ cameras


def test_an_episode_upside_down(root: Path) -> None:
    frames, rows = frames_of(root), rows_of(root, 4)
    frames[rows] = frames[rows, ::-1]
    encode_video(frames, root / VIDEO, 80)
    findings = check(root)
    assert broken(findings) == {("warning", "turned")}
    assert "the episodes 4 look upside down" in next(f.found for f in findings if f.check == "turned")


def test_black_and_frozen_pictures(root: Path) -> None:
    frames, black, frozen = frames_of(root), rows_of(root, 2), rows_of(root, 7)
    frames[black], frames[frozen] = 0, frames[frozen[0]]
    encode_video(frames, root / VIDEO, 80)
    findings = check(root)
    assert broken(findings) == {("error", "pictures")}
    assert [f.found.split(" are ")[0] for f in findings if f.check == "pictures"] == ["the episodes 2", "the episodes 7"]


def add_camera(root: Path, frames: np.ndarray) -> str:
    encode_video(frames, root / VIDEO.replace(CAMERA, OTHER), 80)
    edit_info(root, lambda info: info["features"].update({OTHER: info["features"][CAMERA]}))

    def put(frame: pd.DataFrame) -> None:
        for name in [n for n in frame.columns if n.startswith(f"videos/{CAMERA}/")]:
            frame[name.replace(CAMERA, OTHER)] = frame[name]

    edit(root, put, EPISODES)
    return OTHER


def two_cameras(root: Path) -> list[Finding]:
    """Checked beneath the config's own arithmetic, which may hold training to fewer cameras than a dataset has."""
    both = config()
    object.__setattr__(both, "data", dataclasses.replace(both.data))
    object.__setattr__(both.data, "cameras", (CAMERA, OTHER))
    return check_dataset(root, both)[1]


def test_cameras_that_change_places_and_that_are_the_same(root: Path) -> None:
    frames = frames_of(root)
    add_camera(root, frames)
    assert broken(two_cameras(root)) == {("error", "order")}
    other, rows = 255 - frames[:, :, ::-1], rows_of(root, 5)
    encode_video(other, root / VIDEO.replace(CAMERA, OTHER), 80)
    assert broken(two_cameras(root)) == set()
    mixed, swapped = frames.copy(), other.copy()
    mixed[rows], swapped[rows] = other[rows], frames[rows]
    encode_video(mixed, root / VIDEO, 80)
    encode_video(swapped, root / VIDEO.replace(CAMERA, OTHER), 80)
    findings = [f for f in two_cameras(root) if f.check == "order"]
    assert broken(findings) == {("warning", "order")} and "changed places in the episodes 5" in findings[0].found


def test_a_camera_that_is_not_there_and_a_size_that_is_not_so(root: Path) -> None:
    findings = check(root, "data.cameras=[observation.images.corner]")
    assert broken(findings) == {("error", "files")} and f"did you mean '{CAMERA}'?" in findings[0].found
    edit_info(root, lambda info: info["features"][CAMERA].update(shape=[48, 64, 3]))
    assert broken(check(root)) == {("warning", "pictures")}


# ------------------------------------------------------------------------------------------------ columns


def test_slices_of_another_robot(root: Path) -> None:
    findings = check(root, "model.embodiments=[{name: metaworld, state_dim: 7, action_dim: 4}]")
    assert broken(findings) == {("error", "slices")} and findings[0].where == "observation.state"


def test_a_column_that_is_not_there_and_numbers_that_are_none(root: Path) -> None:
    assert broken(check(root, "data.state=observation.stat")) == {("error", "files")}
    edit_column(root, "action", lambda rows, _: np.where(np.arange(len(rows))[:, None] == 500, np.inf, rows))
    assert ("error", "finite") in broken(check(root))


@pytest.mark.parametrize(("shift", "level"), [(0, {("error", "labels")}), (-1, {("error", "labels")}), (1, set())])
def test_labels_that_are_the_state(root: Path, shift: int, level: Broken) -> None:
    state, _ = columns(root, "observation.state", "action")

    def copy(rows: np.ndarray, episodes: np.ndarray) -> np.ndarray:
        source = np.arange(len(rows)) + shift
        inside = (source >= 0) & (source < len(rows))
        inside[inside] &= episodes[source[inside]] == episodes[inside]
        return np.where(inside[:, None], state[np.clip(source, 0, len(rows) - 1)], state)

    edit_column(root, "action", copy)
    findings = check(root, "data.executed_action=null")
    assert broken([f for f in findings if f.check == "labels"]) == level
    assert any(f.check == "labels" for f in findings)


def test_a_dimension_that_never_moves_and_one_with_heavy_tails(root: Path) -> None:
    def change(rows: np.ndarray, _: np.ndarray) -> np.ndarray:
        rows[:, 0], rows[77, 1] = 0.25, 40.0
        return rows

    edit_column(root, "action", change)
    findings = [f for f in check(root) if f.level != "info"]
    assert broken(findings) == {("warning", "ranges")}
    assert [f.where for f in findings] == ["action[0] (dx)", "action[1] (dy)"] and "40 lies" in findings[1].found


def test_clipped_actions(root: Path) -> None:
    edit_column(root, "action", lambda rows, _: np.concatenate([rows[:, :3].clip(-0.2, 0.2), rows[:, 3:]], axis=1))
    findings = [f for f in check(root) if f.level != "info"]
    assert broken(findings) == {("warning", "clipping")} and len(findings) == 3


def test_a_gripper_that_changes_its_sign(root: Path) -> None:
    def change(rows: np.ndarray, episodes: np.ndarray) -> np.ndarray:
        rows[np.isin(episodes, (6, 7)), 3] *= -1
        return rows

    edit_column(root, "action", change)
    findings = [f for f in check(root) if f.level != "info"]
    assert broken(findings) == {("error", "gripper")} and "in the episodes 6, 7 " in findings[0].found


def test_a_gripper_against_its_own_state(root: Path) -> None:
    def same_units(turned: bool) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
        return lambda rows, _: np.concatenate([rows[:, :3], np.where((rows[:, 3:] > 0) == turned, 1.0, 0.26)], axis=1)

    edit_column(root, "action", same_units(False))
    assert broken(check(root)) == set()
    edit_column(root, "action", lambda rows, _: np.concatenate([rows[:, :3], 1.26 - rows[:, 3:]], axis=1))
    assert broken(check(root)) == {("error", "gripper")}


def test_quaternions_that_flip(root: Path) -> None:
    def turn(flips: bool) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
        def change(rows: np.ndarray, episodes: np.ndarray) -> np.ndarray:
            angle = np.arange(len(rows)) / 300
            q = np.stack([np.cos(angle), np.sin(angle), 0 * angle, 0 * angle], axis=1)
            return np.where((flips & (episodes == 3) & (np.arange(len(rows)) % 20 < 10))[:, None], -q, q)

        return change

    edit_column(root, "observation.state", turn(False))
    assert not any(f.check == "quaternions" for f in check(root))
    edit_column(root, "observation.state", turn(True))
    findings = [f for f in check(root) if f.check == "quaternions"]
    assert broken(findings) == {("error", "quaternions")} and findings[0].where == "observation.state[0:4]" and "episodes 3" in findings[0].found


# ------------------------------------------------------------------------------------------------ time


@pytest.mark.parametrize("delay", [6, -6, 12])
def test_frames_and_rows_out_of_step(root: Path, delay: int) -> None:
    def late(rows: np.ndarray, episodes: np.ndarray) -> np.ndarray:
        parts = [rows[episodes == e] for e in range(12)]
        return np.concatenate([part[np.clip(np.arange(len(part)) - delay, 0, len(part) - 1)] for part in parts])

    edit_column(root, "observation.state", late)
    evidence, findings = check_dataset(root, config())
    assert broken(findings) == {("error", "in_step")}
    assert evidence is not None
    lag = measure_lag(evidence, CAMERA)
    assert lag is not None and abs(lag.best + delay) <= 1  # a state that is late makes the picture early


def test_wrong_rates(root: Path, tmp_path: Path) -> None:
    edit(root, lambda frame: frame.update(frame["timestamp"] * 2))
    assert broken(check(root)) == {("error", "rates")}
    edit(root, lambda frame: frame.update(frame["timestamp"] / 2))
    encode_video(frames_of(root), root / VIDEO, 30)
    findings = check(root)
    assert broken(findings) == {("error", "rates")} and findings[0].where.endswith(".mp4")
    encode_video(frames_of(root), root / VIDEO, 80)
    write_json_atomic(tmp_path / "policy/config.json", {"control_hz": 15.0})
    findings = check(root, checkpoint=tmp_path / "policy")
    assert broken(findings) == {("error", "rates")} and "trained at 15" in findings[0].found


def test_episodes_shorter_than_a_window(root: Path) -> None:
    longer = ("timeline.frame_stride=25", "timeline.actions_per_block=100")
    findings = check(root, *longer)
    assert broken(findings) == {("warning", "windows")} and "10 of 12 episodes" in next(f.found for f in findings if f.check == "windows")
    assert broken(check(root, "timeline.frame_stride=50", "timeline.actions_per_block=200")) == {("error", "windows")}


# ------------------------------------------------------------------------------------------------ what stands beside the data


def rename_tasks(root: Path, names: list[str]) -> None:
    """Give the four tasks, of three episodes each, other words."""
    pd.DataFrame({"task_index": range(4)}, index=names).to_parquet(root / "meta/tasks.parquet")
    edit(root, lambda frame: frame.__setitem__("tasks", [[names[e // 3]] for e in range(12)]), EPISODES)


def test_missing_language(root: Path) -> None:
    rename_tasks(root, ["Task_0", "task 1", "...", "N/A"])
    assert broken(check(root)) == {("error", "language")}
    rename_tasks(root, ["open the drawer", "press it", "open the door", "N/A"])
    findings = check(root)
    assert broken(findings) == {("warning", "language")} and "the episodes 9, 10, 11 is 'N/A'" in next(f.found for f in findings if f.check == "language")
    rename_tasks(root, ["open the drawer", "press it", "open the door", ""])
    assert broken(check(root)) == {("error", "files")}  # training cannot open it at all


def test_rows_and_episode_table_that_ask_for_different_things(root: Path) -> None:
    edit(root, lambda frame: frame.__setitem__("task_index", frame["task_index"].where(frame["episode_index"] != 8, 1)))
    findings = check(root)
    assert broken(findings) == {("error", "language")} and "in the episodes 8" in findings[0].found


def test_statistics_of_other_data(root: Path, tmp_path: Path) -> None:
    shutil.copy(SAMPLE / "meta/stats.json", root / "meta/stats.json")
    edit_column(root, "observation.state", lambda rows, _: rows * 1000)
    findings = [f for f in check(root) if f.level != "info"]
    assert broken(findings) == {("error", "statistics")} and [f.where for f in findings] == ["meta/stats.json, observation.state"]
    assert findings[0].found.startswith("mean, std, min, max, q01, q99 are not the data's: observation.state[0] (gripper_x) has the mean 0.0433")
    (root / "meta/stats.json").write_text("{")
    assert broken(check(root)) == {("error", "statistics")}
    (root / "meta/stats.json").unlink()
    state, action = columns(SAMPLE, "observation.state", "action")
    Normalizer.fit({"state": state, "action": action}).save(tmp_path / "policy/normalizer.json")
    assert broken(check(SAMPLE, checkpoint=tmp_path / "policy")) == set()
    assert broken(check(root, checkpoint=tmp_path / "policy")) == {("error", "statistics")}


def test_adapters_on_another_base(tmp_path: Path) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = Backbone(**FORMS["t2v"])
            randomise(self.backbone, 0)

    torch.manual_seed(0)
    model, lora = Model(), LoraConfig(rank=2)
    apply_lora(model, lora)
    adapters = {name: p for name, p in model.backbone.named_parameters() if is_adapter(name)}
    save_adapter(tmp_path / "policy/adapter", adapters, lora, base_identity(model), "the/right-base")
    for seed, expected in ((0, set()), (1, {("error", "lora_base")})):
        transformer("t2v", seed).save_pretrained(tmp_path / f"base{seed}/transformer")
        settings = wan_config("t2v", tmp_path / f"base{seed}")
        findings = check_dataset(SAMPLE, settings, checkpoint=tmp_path / "policy")[1]
        assert broken(findings) == expected
    assert "the/right-base" in next(f.expected for f in findings if f.check == "lora_base")
    assert broken(check(SAMPLE, checkpoint=tmp_path / "policy")) == {("error", "lora_base")}


# ------------------------------------------------------------------------------------------------ the command


def run(*argv: str) -> int:
    return main(["check", *argv, "--config", str(CONFIG), "--episodes", "3"])


def test_the_command_says_what_it_found_and_writes_a_page(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert run(str(root), "--output", str(out)) == 0
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3 and page.count("<svg") == 4 and "http" not in page.replace("http-equiv", "")
    assert "0 errors, 0 warnings" in capsys.readouterr().out
    assert run(str(root), "--output", str(out), "model.embodiments=[{name: metaworld, state_dim: 4, action_dim: 7}]") == 1
    said = json.loads((out / "findings.json").read_text())[0]
    assert (said["level"], said["check"], said["expected"]) == ("error", "slices", "action_dim = 7 of robot 'metaworld'")
    assert all(said[key] in line for key in ("where", "found") for line in capsys.readouterr().out.splitlines()[:1])


def test_the_command_where_nothing_can_be_checked(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(str(tmp_path / "nowhere"), "--output", str(tmp_path / "out")) == 2
    assert run(str(root), "--checkpoint", str(tmp_path / "nowhere"), "--output", str(tmp_path / "out")) == 2
    assert not (tmp_path / "out").exists()
    (root / VIDEO).write_bytes((root / VIDEO).read_bytes()[:5000])
    (root / ROWS).write_bytes(b"cut short")
    assert run(str(root), "--output", str(tmp_path / "out")) == 1
    assert "truncated or damaged" in (tmp_path / "out/report.html").read_text()
    (root / EPISODES).write_bytes(b"cut short")
    assert run(str(root), "--output", str(tmp_path / "out")) == 1
    assert "cannot be read as parquet" in (tmp_path / "out/report.html").read_text()
    with pytest.raises(SystemExit, match="2"):
        run(str(root), "--episodes", "0")
