"""What deploys the server names flags that it has, and says how its key is kept."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from wam.cli import parse

DEPLOY = Path(__file__).resolve().parents[1] / "deploy"


def test_the_commands_that_are_started_are_the_servers_own() -> None:
    docker = (DEPLOY / "Dockerfile").read_text()
    entry = json.loads(re.search(r"^ENTRYPOINT (\[.*\])$", docker, re.M).group(1))  # type: ignore[union-attr]
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    unit = re.search(r"^ExecStart=(.*)$", (DEPLOY / "wam-serve.service").read_text(), re.M).group(1).split()  # type: ignore[union-attr]
    for command in (*([*entry, *service["command"]] for service in services.values()), unit):
        args = parse(command[1:])
        assert args.command == "serve" and args.api_key_file and args.gate and Path(args.checkpoint).is_absolute()
        assert args.host == ("0.0.0.0" if command[0] == "wam" else "127.0.0.1"), "only inside a container is every address open"


def test_ports_and_times_agree() -> None:
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    docker, unit = (DEPLOY / "Dockerfile").read_text(), (DEPLOY / "wam-serve.service").read_text()
    assert set(services) == {"gpu", "cpu"} and all(service["ports"] == ["127.0.0.1:8000:8000"] and service["read_only"] for service in services.values())
    grace = parse(["serve", "--checkpoint", "c"]).grace
    assert all(int(s["stop_grace_period"].rstrip("s")) > grace for s in services.values()) and int(re.search(r"TimeoutStopSec=(\d+)", unit).group(1)) > grace  # type: ignore[union-attr]
    assert "EXPOSE 8000" in docker and "/readyz" in docker and re.search(r"^USER wam$", docker, re.M)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    text = (DEPLOY / "wam-serve.service").read_text()
    unit = tmp_path / "wam-serve.service"
    unit.write_text(text.replace("/opt/wam/venv/bin/wam", "/bin/true").replace("User=wam\n", ""))
    done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False)
    assert "wam-serve.service" not in done.stderr, done.stderr
    unit.write_text(unit.read_text().replace("[Service]", "[Service]\nStaysUp=yes"))
    assert "StaysUp" in subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False).stderr, "it does look"
