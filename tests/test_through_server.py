"""`wam evaluate --server`: the same outcomes as in this process, and what a server cannot do is refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_robot import FakeRobot, FakeVector, fake_policy
from serving_tools import NO_LIMITS, Running, serving

from wam.cli import main
from wam.config import CheckConfig, ExecutionConfig, PlannerConfig, RolloutConfig
from wam.evaluation import results as results_module
from wam.evaluation import rollout as in_process
from wam.evaluation import through_server
from wam.evaluation.rollout import rollout
from wam.evaluation.served import Served, ServerRefused
from wam.inference.gate import Gate, GateConfig, GroupLimits
from wam.pretrained import save_pretrained
from wam.serving.contract import Contract
from wam.serving.metrics import Metrics
from wam.serving.worker import Worker, WorkerOptions


def worker(gate: GateConfig = NO_LIMITS) -> Worker:
    policy = fake_policy()
    contract = Contract.of(policy, about={"checkpoint": "feed"})
    return Worker(policy, contract, Gate(gate, 4, contract.control_hz), WorkerOptions("skip"), Metrics())


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving(worker(), rate=1e6, burst=10**6) as running:
        yield running


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("policy")
    save_pretrained(fake_policy(), directory)
    return directory


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (in_process, through_server):
        monkeypatch.setattr(module, "VectorEnv", FakeVector)
    monkeypatch.setattr(results_module, "choose_backend", lambda: "none")
    monkeypatch.setattr(in_process, "LATENCY_CHUNKS", 2)
    monkeypatch.setattr(in_process, "LATENCY_EPISODES", 1)


def settings(**changes: Any) -> RolloutConfig:
    return RolloutConfig(**{"env": "python/robot", "modes": ("skip",), "episodes": 4, "batch": 3, "steps": 2, "max_steps": 24, "videos": 0, **changes})


def outcomes(results: dict[str, Any], mode: str = "skip") -> list[dict[str, Any]]:
    """What came of the episodes, apart from how long it took; a server does not tell its floating-point operations."""
    told = [{k: v for k, v in episode.items() if "latency" not in k and k != "flops"} for episode in results["modes"][mode]["episode_results"]]
    return [{**episode, "jump": None if episode["jump"] is None else round(episode["jump"], 3)} for episode in told]  # forward passes of another batch size round otherwise


@pytest.mark.parametrize(
    "changes",
    [
        {"modes": ("skip", "joint")},
        {"replan": 6},  # windows of the memory begin where no plan was asked for
        {"execution": ExecutionConfig(time="asynchronous", delay=4)},
    ],
    ids=["whole plans", "parts of plans", "committed prefix"],
)
def test_outcomes_are_those_of_this_process(server: Running, checkpoint: Path, tmp_path: Path, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    states: dict[str, list[Any]] = {"here": [], "there": []}
    config = settings(**changes)
    for where, source in (("here", None), ("there", server.url)):

        class Watched(FakeRobot):
            def run(self, actions: Any, frame_stride: int, seen: list[Any] = states[where]) -> Any:
                result = super().run(actions, frame_stride)
                seen.append((self.seed, self.steps, tuple(result.states[-1].round(4))))
                return result

        monkeypatch.setattr(FakeVector, "robot", Watched)
        results = rollout(None if source else checkpoint, replace(config, server=source), tmp_path / where)
        for mode in config.modes:
            assert len(outcomes(results, mode)) == 4
        states[where] += [outcomes(results, mode) for mode in config.modes]
    assert states["here"] == states["there"]
    assert results["server"].startswith("wam ") and results["checkpoint_sha256"] == "feed" and results["modes"]["skip"]["flops_per_episode"] is None
    assert {"decode", "queue", "denoise"} <= set(results["modes"]["skip"]["latency_ms"])
    with pytest.raises(ValueError, match="another run"):
        rollout(checkpoint, config, tmp_path / "there")


def test_another_seed_gives_other_plans(server: Running, tmp_path: Path) -> None:
    """The comparison above can fail."""
    results = [rollout(None, settings(server=server.url, seed=seed, episodes=1, batch=1), tmp_path / str(seed)) for seed in (20001, 20003)]
    assert outcomes(results[0]) != outcomes(results[1])


def test_what_the_servers_gate_refuses_is_held_and_counted(tmp_path: Path) -> None:
    still = GateConfig((GroupLimits("all", 0, 4, low=(2.0,) * 4, high=(3.0,) * 4),), slack=0.0)
    with serving(worker(still), rate=1e6, burst=10**6) as strict:
        (episode,) = rollout(None, settings(server=strict.url, seed=20001, episodes=1, batch=1), tmp_path)["modes"]["skip"]["episode_results"]
    assert episode["held"] == episode["length"] == 24 and episode["chunks"] == 0 and episode["refused"] == 12


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"modes": ("video",)}, "mode 'video' is not served .* skip"),
        ({"replan": 3}, "rollout.replan is 3"),
        ({"execution": ExecutionConfig(time="ahead")}, "'ahead', which a server's protocol has no words for"),
        ({"execution": ExecutionConfig(time="asynchronous", delay=8)}, "execution.delay is 8"),
        ({"check": CheckConfig(source="plan")}, "rollout.check.source needs the policy in this process"),
        ({"planner": PlannerConfig(kind="best_of_n")}, "rollout.planner needs the policy"),
        ({"record": "somewhere"}, "wam serve --record"),
    ],
)
def test_what_cannot_be_had_through_a_server_is_refused(server: Running, tmp_path: Path, changes: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        rollout(None, settings(server=server.url, **changes), tmp_path)
    assert not list(tmp_path.iterdir())


def test_another_robot_is_refused(server: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeRobot, "control_hz", 20)
    with pytest.raises(ValueError, match="control rate: 80 a second served, 20 a second in the environment"):
        rollout(None, settings(server=server.url), tmp_path)


def test_the_command(server: Running, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    words = ["evaluate", "--env", "python/robot", "--mode", "skip", "--episodes", "1", "--output", str(tmp_path), "rollout.max_steps=8", "rollout.videos=1"]
    assert main([*words, "--server", server.url, "--dry-run"]) == 0
    assert "skip, seed 20000" in capsys.readouterr().out and not list(tmp_path.iterdir())
    assert main([*words, "--server", server.url]) == 0
    assert len(json.loads((tmp_path / "rollout.json").read_text())["modes"]["skip"]["episode_results"]) == 1
    assert main(words) == 2 and "give one of --checkpoint DIR and --server" in capsys.readouterr().err


def test_a_server_that_is_not_there_or_stops_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(worker(), rate=1e6, burst=10**6) as running:
        real = FakeRobot.run

        def stopping(self: FakeRobot, actions: Any, frame_stride: int) -> Any:
            if self.steps >= 8:
                running.stop()
            return real(self, actions, frame_stride)

        monkeypatch.setattr(FakeRobot, "run", stopping)
        monkeypatch.setattr("wam_client.client.PolicyClient._connect", _once(running))
        with pytest.raises(ServerRefused, match=r"connection_lost|unreachable"):
            rollout(None, settings(server=running.url, seed=20001, episodes=1, batch=1), tmp_path)


def _once(running: Running) -> Any:
    from wam_client.client import PolicyClient, PolicyError

    real = PolicyClient._connect

    def connect(self: PolicyClient) -> None:
        if not running._thread.is_alive():
            raise PolicyError("unreachable", "the server has stopped")
        real(self)

    return connect


def test_keys_and_a_client_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key, wrong = tmp_path / "key", tmp_path / "wrong"
    for path, text in ((key, "right" * 4), (wrong, "wrong" * 4)):
        path.write_text(text)
        path.chmod(0o600)
    with serving(worker(), api_key="right" * 4) as locked:
        served = Served.connect(locked.url, str(key))
        assert served.told["cameras"] == ["corner4"] and served.told["camera_size"] == [32, 32]
        served.close()
        for given in (None, str(wrong)):
            with pytest.raises(ServerRefused, match="unauthorized"):
                Served.connect(locked.url, given)
        monkeypatch.setitem(sys.modules, "wam_client", None)
        with pytest.raises(ImportError, match="pip install packages/wam-client"):
            Served.connect(locked.url, str(key))
