"""Bad input ends a command with one line that names what, where and the remedy, and exit code 2; nothing half-made is left behind.

Everything runs through `main`, on copies of the committed sample that are broken the way disks, networks and hands break them.
"""

import errno
import importlib.util
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import yaml
from tiny import SMALL, tiny_config, tiny_model

from wam.cli import main, run_main
from wam.codec.linear import LinearCodec
from wam.data.mixture import training_data
from wam.data.normalize import Normalizer
from wam.evaluation import gl
from wam.evaluation.workers import Worker, _interrupts_held_back
from wam.files import atomic_path, writing
from wam.pretrained import Policy, save_pretrained

SAMPLE = Path(__file__).resolve().parents[1] / "data/metaworld_sample"
VIDEO = "videos/observation.images.corner4/chunk-000/file-000.mp4"
ROWS, EPISODES, INFO = "data/chunk-000/file-000.parquet", "meta/episodes/chunk-000/file-000.parquet", "meta/info.json"
QUICK = (*SMALL, "codec.fit_frames=100", "training.batch_size=2", "training.validation_batches=1", "training.validation_samples=2", "timeline.blocks=2")

Refused = Callable[..., str]


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refused:
    """`refused("train", ...)` runs a command that must fail, in an empty directory, and returns its one line; nothing may be written to `out`."""
    (tmp_path / "config.yaml").write_text("")
    monkeypatch.chdir(tmp_path)

    def run(*argv: str) -> str:
        assert main(argv) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line]
        assert len(lines) == 1 and lines[0].startswith("wam: error: ")
        assert not Path("out").exists()
        return lines[0].removeprefix("wam: error: ")

    return run


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return Path(shutil.copytree(SAMPLE, tmp_path / "dataset"))


@pytest.fixture(scope="module")
def policy() -> Policy:
    config = tiny_config("codec.image_size=[48, 48]", "data.executed_action=action.executed")
    normalizer = Normalizer.fit({key: np.random.default_rng(0).normal(size=(50, 4)) for key in ("state", "action")})
    return Policy(config, tiny_model(config), LinearCodec(config.codec), normalizer.to_dict(), {"control_hz": 80})


@pytest.fixture
def checkpoint(policy: Policy, tmp_path: Path) -> Path:
    save_pretrained(policy, tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.fixture
def backend_unknown() -> Iterator[None]:
    gl.choose_backend.cache_clear()
    yield
    gl.choose_backend.cache_clear()


# ------------------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("codec.patch=0", "codec.patch is 0; it must be at least 1"),
        ("codec.image_size=[0, 64]", "codec.image_size height is 0"),
        ("text.heads=0", "text.heads is 0; it must be at least 1"),
        ("model.layers=0", "model.layers is 0"),
        ("model.freq_dim=15", "model.freq_dim is 15; sines and cosines need an even number"),
        ("model.patch=[1, 0, 2]", "model.patch is [1, 0, 2]"),
        ("model.patch=[2, 2, 2]", "model.patch is [2, 2, 2]"),
        ("model.embodiments=[{name: metaworld, action_dim: 0}]", "action_dim of 'metaworld' is 0"),
        ("data.embodiment=franka", "data.embodiment is 'franka', but model.embodiments has metaworld"),
        ("training.learning_rate=-1", "training.learning_rate is -1.0"),
        ("training.learning_rate=.nan", "training.learning_rate is nan"),
        ("training.warmup_steps=0", "training.warmup_steps is 0"),
        ("training.max_minutes=0", "training.max_minutes is 0.0; expected minutes above 0"),
        ("training.betas=[0.9, 1.5]", "training.betas is [0.9, 1.5]"),
        ("training.seed=-1", "training.seed is -1"),
        ("training.modes={skip: .inf}", "training.modes.skip is inf; expected a finite number"),
        ("training.modes={skp: 1}", "unknown mode 'skp'; did you mean 'skip'?"),
        ("rollout.replan=3", "use a multiple of 2"),
        ("training.steps.x=3", "steps is"),
    ],
)
def test_settings_that_cannot_work(override: str, message: str, refused: Refused) -> None:
    assert message in refused("train", "--config", "config.yaml", "training.steps=7", override, "--output", "out")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"- a\n", "broken.yaml holds a list; expected sections with the keys preset, collect, data"),
        (b"text\n", "broken.yaml holds a str"),
        (b"\xff\xfe\x00", "broken.yaml is not valid YAML"),
    ],
)
def test_config_files_that_are_none(text: bytes, message: str, refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "broken.yaml").write_bytes(text)
    assert message in refused("train", "--config", "broken.yaml", "training.steps=3", "--output", "out")


def test_an_empty_section_can_be_filled(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("training:\n")
    assert "no dataset directory nowhere" in refused("train", "--config", "empty.yaml", "training.steps=3", "data.root=nowhere", "--output", "out")


# ------------------------------------------------------------------------------------------------ simulator


@pytest.mark.parametrize("command", [("collect", "--config", "config.yaml"), ("demo", "--config", "config.yaml")])
def test_no_simulator(command: tuple[str, ...], refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "metaworld", None)  # importing it raises ImportError
    assert refused(*command, "--output", "out") == "the simulator's metaworld cannot be imported; pip install 'wam[sim]'"


@pytest.mark.usefixtures("backend_unknown")
def test_no_simulator_to_roll_out_in(refused: Refused, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gl, "_is_installed", lambda name: name != "mujoco")
    assert "mujoco cannot be imported; pip install 'wam[sim]'" in refused("rollout", "--checkpoint", str(checkpoint), "--mode", "skip", "--output", "out")


@pytest.mark.usefixtures("backend_unknown")
@pytest.mark.parametrize("command", [("collect", "--config", "config.yaml"), ("demo", "--config", "config.yaml")])
def test_nothing_draws(command: tuple[str, ...], refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gl, "_is_installed", lambda name: True)
    monkeypatch.setattr(gl, "probe", lambda backend: "no such library")
    monkeypatch.setattr(gl.platform, "system", lambda: "Linux")
    monkeypatch.delitem(sys.modules, "mujoco", raising=False)
    monkeypatch.delitem(sys.modules, "wam.evaluation.metaworld", raising=False)
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    line = refused(*command, "--output", "out")
    assert "egl: no such library; osmesa: no such library" in line and "apt-get install libegl1 libgl1-mesa-dri" in line


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rollout.modes=[joit]", "unknown mode 'joit'"),
        ("training.modes={skp: 1}", "unknown mode 'skp'"),
        ("collect.camera=corner2", "set data.cameras=[observation.images.corner2]"),
        ("codec.image_size=[64, 48]", "the simulator's images are square"),
    ],
)
def test_a_demo_is_refused_before_its_first_phase(override: str, message: str, refused: Refused) -> None:
    assert message in refused("demo", "--config", "config.yaml", override, "--output", "out")


# ------------------------------------------------------------------------------------------------ datasets


def cut(path: Path, size: int) -> None:
    os.truncate(path, size)


def rename_the_field(path: Path) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), "data_path": "data/{chunk}.parquet"}))


def poison(path: Path, column: str) -> None:
    """A NaN in row 150, which is row 52 of episode 1."""
    table = pq.read_table(path)
    values = np.array(table.column(column).to_pylist(), np.float32)
    values[150, 2] = np.nan
    column_of_lists = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])
    pq.write_table(table.set_column(table.column_names.index(column), column, column_of_lists), path)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        (VIDEO, partial(cut, size=400_000), "the file is truncated or damaged"),
        (VIDEO, os.unlink, "no video file"),
        (ROWS, partial(cut, size=5_000), "damaged or incomplete (5000 bytes): copy or record it again"),
        (EPISODES, partial(cut, size=500), "damaged or incomplete (500 bytes)"),
        (INFO, os.unlink, "meta/info.json is missing"),
        (INFO, partial(cut, size=30), "is not valid JSON"),
        (INFO, rename_the_field, "data_path 'data/{chunk}.parquet' does not take chunk_index, file_index"),
        (ROWS, partial(poison, column="action"), "action of episode 1 is nan at row 52, dimension 2"),
        (ROWS, partial(poison, column="action.executed"), "action.executed of episode 1 is nan at row 52, dimension 2"),
    ],
)
def test_damaged_datasets(name: str, damage: Callable[[Path], None], message: str, refused: Refused, dataset: Path) -> None:
    damage(dataset / name)
    line = refused("train", "--config", "config.yaml", *QUICK, f"data.root={dataset}", "data.executed_action=action.executed", "--output", "out")
    assert message in line and str(dataset) in line and Path(name).name in line


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "model.embodiments=[{name: metaworld, state_dim: 7}]",
            "'observation.state' has 4 dimensions, but model.embodiments gives 'metaworld' state_dim 7; set state_dim to 4",
        ),
        ("model.embodiments=[{name: metaworld, action_dim: 2}]", "'action' has 4 dimensions, but model.embodiments gives 'metaworld' action_dim 2"),
    ],
)
def test_sizes_of_another_robot(override: str, message: str, refused: Refused) -> None:
    assert message in refused("train", "--config", "config.yaml", *QUICK, f"data.root={SAMPLE}", override, "--output", "out")


def long_blocks(k: int) -> tuple[str, ...]:
    return (*QUICK, f"data.root={SAMPLE}", "timeline.blocks=1", f"timeline.latents_per_block={k}", f"timeline.actions_per_block={8 * k}")


def test_short_episodes_are_left_out_and_reported(caplog: pytest.LogCaptureFixture) -> None:
    """Episodes 3, 4 and 5 have 83, 73 and 78 rows; 5 is held out, of a split whose others are long enough."""
    with caplog.at_level(logging.WARNING, "wam.data.mixture"):
        data = training_data(tiny_config(*long_blocks(10)))
    assert [windows.too_short for windows in (data.parts["metaworld_sample"], data.held_out["metaworld_sample"])] == [[4], [5]]
    assert "1 of 8 training episodes are left out (4): shorter than one block, 80 + 1 rows" in caplog.text
    assert "1 of 4 validation episodes are left out (5)" in caplog.text


def test_only_short_episodes(refused: Refused) -> None:
    line = refused("train", "--config", "config.yaml", *long_blocks(50), "--output", "out")
    assert f"{SAMPLE}, train episodes: no window fits" in line and "400 + 1 = 401 rows, but the longest of 8 episodes has 128 rows" in line


# ------------------------------------------------------------------------------------------------ checkpoints


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("config.json", os.unlink, "is not a checkpoint: config.json is missing"),
        ("config.yaml", os.unlink, "is not a checkpoint: config.yaml is missing"),
        ("normalizer.json", os.unlink, "is not a checkpoint: normalizer.json is missing"),
        ("model.safetensors", os.unlink, "is not a checkpoint: model.safetensors is missing"),
        ("model.safetensors", partial(cut, size=30_000), "model.safetensors cannot be read"),
        ("config.json", partial(cut, size=9), "config.json is not valid JSON"),
        ("config.json", partial(change, old="control_hz", new="hz"), "config.json lacks control_hz"),
        ("normalizer.json", partial(cut, size=9), "normalizer.json is not valid JSON"),
        ("normalizer.json", partial(change, old='"keys"', new='"kees"'), "normalizer.json lacks keys"),
        ("config.yaml", partial(change, old="layers: 2", new="layers: 3"), "model.safetensors does not match"),
        ("config.yaml", partial(change, old="action_dim: 4", new="action_dim: 7"), "tensor 'action_decoder.out.bias' has shape [1, 4], expected [1, 7]"),
        ("config.yaml", partial(change, old="embodiment: metaworld", new="embodiment: franka"), "data.embodiment is 'franka'"),
    ],
)
@pytest.mark.parametrize("command", ["rollout", "imagine"])
def test_damaged_checkpoints(command: str, name: str, damage: Callable[[Path], None], message: str, refused: Refused, checkpoint: Path) -> None:
    damage(checkpoint / name)
    assert message in refused(command, "--checkpoint", str(checkpoint), "--output", "out")


# ------------------------------------------------------------------------------------------------ training goes wrong


def train(*overrides: str) -> int:
    return main(["train", "--config", "config.yaml", *QUICK, f"data.root={SAMPLE}", "training.validate_every=99", "--output", "run", *overrides])


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.yaml").write_text("")
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("workplace")
def test_losses_that_are_no_numbers_end_a_run_with_a_diagnosis(capsys: pytest.CaptureFixture[str]) -> None:
    assert train("training.steps=9", "training.warmup_steps=1", "training.learning_rate=1e30", "training.guards={max_skipped: 2}") == 2
    told = capsys.readouterr().err
    assert "3 of the last 100 steps were left out (training.guards.max_skipped is 2)" in told and "The batches are in run/skipped" in told
    batch = json.loads(Path("run/skipped/step-00000001/rank-00000.json").read_text())
    assert batch["step"] == 1 and len(batch["samples"]) == 2 and {"episode", "start", "mode"} <= set(batch["samples"][0])


@pytest.mark.usefixtures("workplace")
def test_the_robot_that_is_named_is_the_one_that_is_trained() -> None:
    assert train("training.steps=2", "model.embodiments=[{name: arm}, {name: metaworld}]") == 0
    out = safetensors.torch.load_file("run/checkpoint/model.safetensors")["model.action_decoder.out.weight"]  # starts at zero
    assert bool((out[0] == 0).all()) and bool((out[1] != 0).any())
    assert yaml.safe_load(Path("run/checkpoint/config.yaml").read_text())["data"]["embodiment"] == "metaworld"


# ------------------------------------------------------------------------------------------------ full disks, crashes, Ctrl-C


def test_a_full_disk_is_named_by_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.safetensors"

    def save() -> None:
        with atomic_path(path):
            raise Exception("I/O error: No space left on device (os error 28)")  # as safetensors does

    assert run_main(save) == 2
    assert capsys.readouterr().err == f"wam: error: disk is full: {path}; free some space and run the same command again, finished work is kept\n"
    assert not list(tmp_path.iterdir())
    with pytest.raises(OSError, match="No space left") as full, writing(Path("/dev/full")), open("/dev/full", "w") as file:
        file.write("x" * 100_000)
    assert full.value.filename == "/dev/full"
    with pytest.raises(ValueError, match="untouched"), writing(path):
        raise ValueError("untouched")


def raise_(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.ENOSPC, "the disk is full; 3 episodes are kept", "data/x"), "data/x: the disk is full; 3 episodes are kept"),
        (
            RuntimeError("crashed in the episode of seed 3:\nTraceback (most recent call last):\n  File x\n\nRuntimeError: diverged\n"),
            "crashed in the episode of seed 3: RuntimeError: diverged (--debug shows where)",
        ),
    ],
)
def test_one_line_says_what_matters(error: Exception, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(partial(raise_, error)) == 2
    assert capsys.readouterr().err == f"wam: error: {line}\n"


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C is heard: a shell that runs tests in the background has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_interrupts_wait_until_a_worker_is_started() -> None:
    blocked = "import signal; print(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []))"
    inside = ""
    with pytest.raises(KeyboardInterrupt), _interrupts_held_back():
        os.kill(os.getpid(), signal.SIGINT)
        inside = subprocess.run([sys.executable, "-c", blocked], capture_output=True, text=True, check=True).stdout
    assert inside == "True\n" and signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    with pytest.raises(KeyboardInterrupt):  # the handler is back
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)  # another thread may be the one that the signal reaches first


@pytest.mark.skipif(importlib.util.find_spec("mujoco") is None, reason="needs pip install 'wam[sim]'")
def test_workers_never_see_an_interrupt() -> None:
    worker = Worker(partial, (signal.pthread_sigmask, signal.SIG_BLOCK))
    try:
        worker.send(())
        assert signal.SIGINT in worker.receive()
    finally:
        worker.close()
