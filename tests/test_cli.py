"""The command line: help that teaches, settings that arrive, errors in one line with the right exit code."""

import dataclasses
import errno
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from wam.cli import COMMANDS, main, parse, run_main
from wam.config import Config, ConfigError, ImagineConfig, RolloutConfig, load_config
from wam.config_check import CalibrateConfig, TrialConfig
from wam.evaluation.compare.settings import CompareConfig

ROOT = Path(__file__).resolve().parents[1]
NAMES = [command.name for command in COMMANDS]
Calls = list[tuple[Any, ...]]
OWN_SECTIONS: dict[str, type[Any]] = {"calibrate": CalibrateConfig, "compare": CompareConfig, "surprise": TrialConfig}  # of commands whose settings are no part of a run's


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Calls]:
    """`stub("wam.training.loop", "train", result)` stands in for what a handler imports, and returns the list of its calls."""

    def install(module: str, function: str, result: Any = None) -> Calls:
        calls: Calls = []
        fake = ModuleType(module)
        setattr(fake, function, lambda *args: calls.append(args) or result)
        monkeypatch.setitem(sys.modules, module, fake)
        return calls

    return install


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "config.yaml"
    path.write_text("training: {steps: 7}\noutput: runs/from_config\n")
    return str(path)


def stops(*argv: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert isinstance(caught.value.code, int)
    return caught.value.code


# ------------------------------------------------------------------------------------------------ help


def test_help_lists_every_command_on_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    assert stops("--help") == 0
    lines = capsys.readouterr().out.splitlines()
    for command in COMMANDS:
        assert any(line.split() == [command.name, *command.summary.split()] for line in lines), command.name


@pytest.mark.parametrize("name", NAMES)
def test_each_help_teaches(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert stops(name, "--help") == 0
    text = capsys.readouterr().out
    assert f"\nexamples:\n  wam {name}" in text and "\nwrites" in text and "--debug" in text


@pytest.mark.parametrize("name", NAMES)
def test_examples_in_help_work(name: str) -> None:
    about = next(command.about for command in COMMANDS if command.name == name)
    examples = [line.split("   ")[0] for line in about.splitlines() if line.startswith("  wam ")]
    assert examples
    for example in examples:
        args = parse(shlex.split(example)[1:])
        assert args.command == name
        overrides = [o for o in getattr(args, "overrides", []) if o.partition(".")[0] not in OWN_SECTIONS]
        load_config(None, overrides)  # every key exists
        for section, settings in OWN_SECTIONS.items():
            known = {field.name for field in dataclasses.fields(settings)}
            assert all(o.partition("=")[0].split(".")[1] in known for o in getattr(args, "overrides", []) if o.startswith(f"{section}.")), example


def test_help_needs_no_torch() -> None:
    code = "import sys, wam.cli; wam.cli.build_parser().format_help(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_top_level_scripts_are_the_same_commands() -> None:
    for name in ("train", "rollout"):
        done = subprocess.run([sys.executable, f"{name}.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
        assert f"usage: wam {name}" in done.stdout


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trian"], "invalid choice: 'trian'"),
        ([], "required: COMMAND"),
        (["imagine"], "required: --checkpoint"),
        (["train", "--stepz", "3"], "unrecognized arguments: --stepz"),
        (["report", "runs/demo", "training.steps=3"], "unrecognized arguments: training.steps=3"),
        (["collect", "--tasks", ","], "expected at least one name"),
    ],
)
def test_wrong_command_lines(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert stops(*argv) == 2
    assert message in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ settings arrive


def test_collect(stub: Callable[..., Calls], config: str) -> None:
    calls = stub("wam.evaluation.collect", "collect")
    assert main(["collect", "--config", config, "--tasks", "a,b", "--episodes", "3", "--workers", "1", "--output", "data/x", "collect.seed=9"]) == 0
    [(section, root)] = calls
    assert (section.tasks, section.episodes_per_task, section.workers, section.seed, root) == (("a", "b"), 3, 1, 9, Path("data/x"))


def test_train(stub: Callable[..., Calls], config: str, capsys: pytest.CaptureFixture[str]) -> None:
    calls = stub("wam.training.loop", "train", Path("runs/x/checkpoint"))
    assert main(["train", "--config", config]) == 0
    assert main(["train", "training.batch_size=2", "--config", config, "training.seed=5", "--output", "123", "--fresh", "training.log_every=1"]) == 0
    (first, output, resume), (second, chosen, again) = calls
    assert isinstance(first, Config) and (first.training.steps, output, resume) == (7, Path("runs/from_config"), True)
    assert (second.training.batch_size, second.training.seed, second.training.log_every) == (2, 5, 1)
    assert (second.output, chosen, again) == ("123", Path("123"), False)
    assert "wrote runs/x/checkpoint" in capsys.readouterr().out


def test_rollout(stub: Callable[..., Calls]) -> None:
    calls = stub("wam.evaluation.rollout", "rollout", {"modes": {}})
    flags = ["--env", "metaworld/door-open-v3", "--mode", "joint,skip", "--episodes", "5", "--seed", "20005", "--replan", "12", "--steps", "8"]
    assert main(["rollout", "--checkpoint", "runs/a/checkpoint"]) == 0
    assert main(["rollout", "--checkpoint", "runs/a/checkpoint", *flags, "--output", "out", "rollout.videos=0"]) == 0
    expected = RolloutConfig(env="metaworld/door-open-v3", modes=("joint", "skip"), episodes=5, seed=20005, replan=12, steps=8, videos=0)
    assert calls == [
        (Path("runs/a/checkpoint"), RolloutConfig(), Path("runs/a/rollout-drawer-open-v3")),
        (Path("runs/a/checkpoint"), expected, Path("out")),
    ]


def test_plans_come_from_a_checkpoint_or_from_a_server(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["rollout"], ["evaluate", "--checkpoint", "c", "--server", "ws://127.0.0.1:1"]):
        assert main(argv) == 2 and "give one of --checkpoint DIR and --server ws://host:port" in capsys.readouterr().err


def test_imagine(stub: Callable[..., Calls]) -> None:
    calls = stub("wam.evaluation.imagination", "imagine", {})
    assert main(["imagine", "--checkpoint", "c/k", "--clips", "2", "--blocks", "8", "--dataset", "data/x", "imagine.seed=1"]) == 0
    assert calls == [(Path("c/k"), ImagineConfig(clips=2, blocks=8, seed=1), Path("c/imagine"), "data/x")]


def test_demo_and_report(stub: Callable[..., Calls], config: str) -> None:
    demos, reports = stub("wam.evaluation.demo", "demo", Path("r")), stub("wam.evaluation.report", "write_report", Path("r"))
    assert main(["demo", "--config", config, "--task", "door-open-v3", "training.steps=2"]) == 0
    assert main(["report", "runs/demo"]) == 0
    [(demo_config, task, output)] = demos
    assert (demo_config.training.steps, task, output) == (2, "door-open-v3", None) and reports == [(Path("runs/demo"),)]


def test_relations(stub: Callable[..., Calls], capsys: pytest.CaptureFixture[str]) -> None:
    from wam.presets import PRESETS
    from wam.relations import MODES
    from wam.relations_text import describe

    assert main(["relations"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(MODES)
    assert main(["relations", "--mode", "joint"]) == 0
    assert capsys.readouterr().out.strip() == describe("joint").strip()
    assert main(["relations", "--mode", "all"]) == 0
    text = capsys.readouterr().out
    assert all(describe(name) in text for name in MODES)
    for preset in PRESETS:
        assert main(["relations", "--preset", preset, "--tokens"]) == 0
        assert f"preset {preset}" in capsys.readouterr().out

    masks = stub("wam.evaluation.plots", "draw_mask")
    assert main(["relations", "--mode", "joint", "--png", "joint.png"]) == 0
    assert masks == [("joint", Path("joint.png"))]
    presets = stub("wam.evaluation.plots", "draw_relations")
    assert main(["relations", "--preset", "uwm", "--png", "uwm.png"]) == 0
    assert [(config.preset, path) for config, path in presets] == [("uwm", Path("uwm.png"))]
    assert main(["relations", "--png", "joint.png"]) == 2
    assert main(["relations", "--tokens"]) == 2
    assert main(["relations", "--mode", "joynt"]) == 2
    assert "did you mean 'joint'" in capsys.readouterr().err
    assert main(["relations", "--preset", "dreamzer"]) == 2
    assert "did you mean 'dreamzero'" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ errors


def test_settings_are_checked_before_anything_heavy_is_imported(config: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("wam.training.loop", "wam.evaluation.rollout"):
        monkeypatch.setitem(sys.modules, module, None)  # importing it raises ImportError
    assert main(["train", "--config", config, "training.step=3"]) == 2
    assert capsys.readouterr().err == "wam: error: unknown key 'training.step'; did you mean 'training.steps'?\n"
    assert main(["rollout", "--checkpoint", "c", "rollout.episods=3"]) == 2
    assert capsys.readouterr().err == "wam: error: unknown key 'rollout.episods'; did you mean 'rollout.episodes'?\n"
    assert main(["rollout", "--checkpoint", "c", "model.layers=3"]) == 2
    assert "this command takes rollout.key=value; everything else comes from the checkpoint" in capsys.readouterr().err
    assert main(["rollout", "--checkpoint", "c", "rollout.modes=[skip"]) == 2
    assert "not valid YAML" in capsys.readouterr().err
    assert main(["train", "--config", "nowhere/x.yaml"]) == 2
    assert capsys.readouterr().err == "wam: error: no config file nowhere/x.yaml; configs in nowhere/: none\n"
    assert main(["train", "--config", config]) == 2
    assert "wam.training.loop" in capsys.readouterr().err


def raising(error: BaseException) -> Callable[[], None]:
    def handler() -> None:
        raise error

    return handler


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ConfigError("steps is 0; it must be at least 1"), 2, "wam: error: steps is 0; it must be at least 1"),
        (FileNotFoundError("no dataset at data/x; run `wam collect`"), 2, "wam: error: no dataset at data/x; run `wam collect`"),
        (PermissionError(errno.EACCES, "Permission denied", "/data"), 2, "wam: error: /data: Permission denied"),
        (RuntimeError("first\n  second"), 2, "wam: error: first second"),
        (ImportError("tensorboard is missing; pip install 'wam[train]'"), 2, "wam: error: tensorboard is missing; pip install 'wam[train]'"),
        (ValueError(), 2, "wam: error: ValueError"),
        (OSError(errno.ENOSPC, "No space left on device", "runs/a"), 2, "wam: error: disk is full: runs/a; free some space and run the same command again"),
        (Exception("I/O error: No space left on device (os error 28)"), 2, "wam: error: disk is full: "),
        (KeyboardInterrupt(), 130, "wam: interrupted; run the same command again to go on"),
        (KeyboardInterrupt("interrupted; 12 episodes are kept"), 130, "wam: interrupted; 12 episodes are kept"),
    ],
)
def test_errors_are_one_line(error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(raising(error)) == code
    captured = capsys.readouterr()
    assert captured.err.startswith(line) and captured.err.count("\n") == 1 and not captured.out

    assert run_main(raising(error), debug=True) == code
    err = capsys.readouterr().err
    assert err.startswith("Traceback") and line in err


def test_bugs_keep_their_traceback() -> None:
    with pytest.raises(KeyError):
        run_main(raising(KeyError("bug")))
    assert run_main(lambda: None) == 0


def test_debug_flag(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--config", config, "--debug", "training.steps=0"]) == 2
    assert "Traceback" in capsys.readouterr().err
