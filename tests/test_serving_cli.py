"""`wam serve`: settings are checked before anything is loaded; a checkpoint is served until a signal."""

import json
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from serving_tools import Talk, observation, policy
from tiny import tiny_model

from wam.cli import main
from wam.data.lerobot import LeRobotDataset
from wam.pretrained import save_pretrained
from wam.serving import logs


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--host", "0.0.0.0"], "anyone could move the robot; give it an API key (--api-key-file)"),
        (["--port", "70000"], "the port is 70000"),
        (["--cert", "cert.pem"], "give both (--cert, --key)"),
        (["--frame-offsets=-1,-2,0"], "expected rising control steps that end with 0"),
        (["--name", "corner4"], "expected OURS=THEIRS"),
        (["--max-message", "0"], "--max-message is 0"),
        (["--execute", "0"], "execute is 0"),
        (["--api-key-file", "/nowhere/key"], "/nowhere/key: No such file"),
        (["--rate", "nan"], "rate is nan"),
        (["--checkpoint", "another"], "two checkpoints are given; name one"),
        ([], "no-checkpoint-here"),
    ],
)
def test_wrong_settings_are_one_line(flags: list[str], told: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "set_up", lambda form: None)  # for a process of its own
    assert main(["serve", str(tmp_path / "no-checkpoint-here"), *flags]) == 2
    assert told in capsys.readouterr().err


def test_a_checkpoint_is_served_loaded_anew_and_recorded_until_a_signal(tmp_path: Path) -> None:
    save_pretrained(policy(), tmp_path / "checkpoint")
    (tmp_path / "limits.yaml").write_text("otherwise: raise\ngroups: {all: {low: -1000, high: 1000}}\n")
    command = [sys.executable, "-m", "wam.cli", "serve", "--checkpoint", str(tmp_path / "checkpoint"), "--port", "0", "--log", "json", "--gate", str(tmp_path / "limits.yaml"), "--device", "cpu", "--record", str(tmp_path / "kept")]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        line = server.stdout.readline()
        found = re.fullmatch(r"serving metaworld in mode '\w+' on (ws://127\.0\.0\.1:\d+); Ctrl-C stops\n", line)
        assert found, line or (server.kill(), server.communicate())[1]
        with Talk(found[1]) as talk:
            old = talk.ask(observation(0, 0))
            assert talk.metadata["preset"] == "all" and old["actions"].shape == (8, 4) and old["plan"]["checkpoint"] == talk.metadata["checkpoint"]
            save_pretrained(replace(policy(), model=tiny_model(policy().config, seed=1)), tmp_path / "checkpoint")
            server.send_signal(signal.SIGHUP)
            until = time.monotonic() + 60
            while (new := talk.ask(observation(0, 1)))["plan"]["checkpoint"] == old["plan"]["checkpoint"]:
                assert time.monotonic() < until, "the weights were never taken up"
                time.sleep(0.05)
            assert new["plan"]["memory_blocks"] == 1
        server.send_signal(signal.SIGTERM)
        _, errors = server.communicate(timeout=30)
    finally:
        server.kill()
    assert server.returncode == 0, errors
    events = [json.loads(line) for line in errors.splitlines() if line.startswith("{")]
    named = [e["event"] for e in events if e["event"] not in ("message", "plan")]
    assert named == ["listening", "ready", "connected", "reloading", "reloaded", "disconnected", "stopped"]
    assert [e.length for e in LeRobotDataset(tmp_path / "kept").episodes] == [8]
