"""A recording planned again: the same checkpoint plans the same from the same pictures, others do not, and another robot's is refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serving_tools import BLOCKS, Talk, episode, make_worker, observation, policy, serving
from tiny import tiny_model

from wam.cli import main
from wam.inference.gate import Gate, GateConfig, GroupLimits
from wam.pretrained import save_pretrained
from wam.serving import replay as module
from wam.serving.contract import Contract
from wam.serving.recorder import Recorder
from wam.serving.replay import numbers, replay, table
from wam.serving.served import FOLDER

A = 8


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two robots; one commits to actions, plans in another mode once, and inside a block."""
    root, worker = tmp_path_factory.mktemp("recording"), make_worker()
    with serving(worker, recorder=Recorder(root, worker.contract, worker.metrics)) as running, Talk(running.url) as talk:
        for block in range(BLOCKS):
            talk.ask(observation(0, block, session_id="r0"))
            more: dict[str, Any] = {"commit_steps": 0, "mode": "joint"} if block == 1 else {}
            talk.ask(observation(1, block, session_id="r1", **more))
            if block == 2:
                assert talk.ask(observation(1, block, session_id="r1", commit_steps=3))["plan"]["step"] == 2 * A
    return root


def _gate(config: GateConfig = GateConfig()) -> Gate:  # noqa: B008
    return Gate(config, 4, 80.0)


def _exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures as the cameras saw them, not as a video has them."""
    rows = module._rows

    def exact(dataset: Any, index: int, decoder: Any) -> tuple[np.ndarray, np.ndarray]:
        frames, executed = rows(dataset, index, decoder)
        robot = 0 if dataset.instruction(index, 0) == observation(0, 0)["prompt"] else 1
        seen = np.concatenate([episode(robot).at(block)[0][0] for block in range(BLOCKS)])
        return np.stack([seen[row // 2] for row in range(len(frames))]), executed

    monkeypatch.setattr(module, "_rows", exact)


def test_the_same_checkpoint_plans_the_same_from_the_same_pictures(recording: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lossy = replay(recording, policy(), Contract.of(policy()), _gate())
    _exact(monkeypatch)
    same = replay(recording, policy(), Contract.of(policy()), _gate())
    assert [len(e.plans) for e in same.episodes] == [len(e.plans) for e in lossy.episodes] and sorted(len(e.plans) for e in same.episodes) == [BLOCKS, BLOCKS + 1]
    for plan in same.plans:
        np.testing.assert_allclose(plan.now, plan.then, atol=1e-5)
        assert plan.blocks[0] == plan.blocks[1] and plan.verdict_now == plan.verdict_then == "passed"
    last = same.episodes[0].plans[-1]
    assert np.isnan(last.done).all() and np.isfinite(same.episodes[0].plans[0].done).all(), "nobody knows what was executed after the last observation"
    other = replay(recording, replace(policy(), model=tiny_model(policy().config, seed=1)), Contract.of(policy()), _gate())
    apart = [numbers(r)["planned_then"]["all"] for r in (same, lossy, other)]
    assert apart[0] < 1e-5 < apart[1] < apart[2]
    assert numbers(same)["executed"]["all"] == pytest.approx(numbers(same)["then_against_executed"]["all"], abs=1e-5)


def test_modes_steps_and_the_gate_are_heeded(recording: Path) -> None:
    (recording / FOLDER / ".last.0a1b2c.npz").write_bytes(b"half of a file, whose process was killed")
    contract, strict = Contract.of(policy()), _gate(GateConfig(groups=(GroupLimits("all", 0, 4, low=(-1e-3,), high=(1e-3,)),), slack=0))
    told = numbers(replay(recording, policy(), contract, strict, mode="joint", steps=1, most=1))
    assert told["episodes"] == 1 and told["gate"]["then"] == {"passed": told["plans"]} and told["gate"]["now"] == {"position": told["plans"]}
    assert f"{told['plans']} plans of 1 episodes" in table(told) and "position" in table(told)
    with pytest.raises(ValueError, match="--mode is 'imagine2'"):
        replay(recording, policy(), contract, strict, mode="imagine2")


def test_the_command(recording: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_pretrained(policy(), tmp_path / "policy")
    flags = ["--checkpoint", str(tmp_path / "policy"), "--device", "cpu", "--json", str(tmp_path / "r.json"), "--picture", str(tmp_path / "r.png")]
    assert main(["replay", str(recording), *flags]) == 0
    assert "now - then" in capsys.readouterr().out and json.loads((tmp_path / "r.json").read_text())["plans"] == 2 * BLOCKS + 1
    assert (tmp_path / "r.png").stat().st_size > 10_000
    assert main(["replay", str(tmp_path), *flags]) == 2 and "holds no plans" in capsys.readouterr().err


def test_another_robots_checkpoint_is_refused_with_both_sides(recording: Path) -> None:
    contract = Contract.of(policy())
    with pytest.raises(ValueError, match="another robot") as refused:
        replay(recording, policy(), replace(contract, control_hz=10.0, frame_stride=4), _gate())
    assert "80 a second" in str(refused.value) and "10 a second" in str(refused.value) and str(refused.value).count("<- differs") == 2
