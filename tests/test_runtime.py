"""How a policy computes: on which device, in which type, and compiled; what it plans stays the same."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import random_window, tiny_policy, tiny_preset
from torch._dynamo.utils import counters

from wam.cli import main
from wam.config_runtime import RuntimeConfig
from wam.inference.batch import Commit, Observe, Think, run
from wam.inference.gate import Gate, GateConfig
from wam.inference.session import Session
from wam.model.compiled import compile_blocks, is_compiled, uncompile_blocks
from wam.pretrained import Policy, device_of, from_pretrained, load_policy, runtime_of, save_pretrained
from wam.serving.contract import Contract
from wam.serving.metrics import Metrics
from wam.serving.worker import Worker, WorkerOptions

EAGER = "eager"  # dynamo's own part, in which code is found again or made anew, without a compiler behind it


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    """Pieces of code that were made so far."""
    return int(counters["stats"]["unique_graphs"])


def drive(policy: Policy, mode: str, robots: int = 1, blocks: int = 3) -> list[np.ndarray]:
    """The plans of robots that share passes."""
    t, size = policy.config.timeline, policy.config.codec.image_size
    sessions, calls, plans = [Session(policy, ["open the drawer"], policy.config.data.embodiment, [i]) for i in range(robots)], [], []
    d, rng = sessions[0].dims, np.random.default_rng(0)
    for _ in range(blocks):
        calls.append(Observe(rng.integers(0, 256, (1, sessions[0].frames_due, *size, 3), dtype=np.uint8), rng.normal(size=(1, d.raw_state_dim)).astype(np.float32)))
        made = run(sessions, [[*calls, Think(mode, policy.config.sampling)]] * robots)
        plans += [plan.actions for plan in made if plan is not None and plan.actions is not None]
        calls: list[Any] = [Commit(rng.uniform(-1, 1, (1, t.actions_per_block, d.raw_action_dim)).astype(np.float32))]
    return plans


@pytest.mark.parametrize("expert", [None, 24])
def test_compiled_blocks_plan_the_same_and_one_serves_all_layers(expert: int | None) -> None:
    made = {}
    for layers in (2, 3):
        policy = tiny_policy(tiny_preset("all", expert, f"model.layers={layers}"))
        expected = drive(policy, "joint", blocks=1)
        compile_blocks(policy.model, EAGER)
        assert is_compiled(policy.model)
        np.testing.assert_allclose(drive(policy, "joint", blocks=1)[0], expected[0], atol=1e-4)
        made[layers] = graphs()
        uncompile_blocks(policy.model)
        counters.clear()
        assert not is_compiled(policy.model)
    assert 0 < made[2] == made[3]


def test_a_warm_server_compiles_nothing_while_robots_wait() -> None:
    policy = tiny_policy(tiny_preset("all", None, "timeline.blocks=3"))
    compile_blocks(policy.model, EAGER)
    contract = Contract.of(policy)
    worker = Worker(policy, contract, Gate(GateConfig(), contract.robot.raw_action_dim, contract.control_hz), WorkerOptions("skip", max_batch=8), Metrics())
    worker.warm_up(policy, contract)
    warm = graphs()
    assert warm > 0
    for robots in (1, 2, 5, 8):
        drive(policy, "skip", robots, policy.config.timeline.history + 3)
    assert graphs() == warm


def test_training_compiles_attention_with_the_block() -> None:
    """Only what depends on memories is left out: a teacher-forced forward pass is one piece a layout."""
    policy = tiny_policy(tiny_preset("all"))
    model, window = policy.model, random_window(policy.model, 2, 2)
    conditions = model.encode_text(["open the drawer", "close the door"])
    expected = model.forward_train(window, conditions, None)
    compile_blocks(model, EAGER)
    found = model.forward_train(window, conditions, None)
    assert graphs() == 1 and not counters["graph_break"]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_a_policy_is_loaded_as_asked(tmp_path: Path) -> None:
    save_pretrained(tiny_policy(tiny_preset("all")), tmp_path)
    stored, half = load_policy(tmp_path), load_policy(tmp_path, RuntimeConfig(device="cpu", dtype="bfloat16"))
    assert runtime_of(half) == {"device": "cpu", "dtype": "bfloat16", "compile": False}
    assert runtime_of(load_policy(tmp_path, RuntimeConfig(compile=True)))["compile"]
    assert runtime_of(from_pretrained(tmp_path)) == {"device": "cpu", "dtype": "float32", "compile": False}
    if not torch.cuda.is_available():
        assert runtime_of(stored)["device"] == "cpu"
        for one, other in zip(drive(half, "skip"), drive(stored, "skip"), strict=True):
            assert 0 < np.abs(one - other).max() < 0.2, "rounded, and the same plan"


def test_a_device_that_is_not_there_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_pretrained(tiny_policy(tiny_preset("all")), tmp_path)
    with pytest.raises(ValueError, match=r"runtime.device is 'gpu7', which is no device; use auto, cpu, cuda"):
        device_of("gpu7")
    for command in ("evaluate", "imagine", "calibrate", "serve"):
        assert main([command, "--checkpoint", str(tmp_path), "--device", "cuda:97"]) == 2
        said = capsys.readouterr().err
        assert "runtime.device is 'cuda:97'" in said and "use cpu" in said and "Traceback" not in said
