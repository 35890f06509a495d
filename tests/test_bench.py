"""The benchmark itself: FLOPs equal those that torch counts, both sides are fair, and a run writes what it says; no claim about speed is made here."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from wam.cli import main
from wam.evaluation.bench.compare import TrainingStep, box, fork
from wam.evaluation.bench.counts import count_recomputation
from wam.evaluation.bench.run import Options, bench_model
from wam.evaluation.bench.subject import Inputs, build_model, diffusers_twin, remember, size_config
from wam.evaluation.bench.timing import Times, alternate, increase
from wam.model.flops import forward_flops, seen_pairs, step_work, window_work
from wam.model.wam import WorldActionModel
from wam.relations import Reach
from wam.shards import build_empty
from wam.timeline import Kind

CPU = torch.device("cpu")


def _counted(call: Callable[[], object]) -> int:
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # the fused kernel of CPUs is not counted
        call()
    return counter.get_total_flops()


def _model(*overrides: str, size: str = "64") -> WorldActionModel:
    return build_model(size_config(size, *overrides), CPU, torch.float32)


@pytest.mark.parametrize("size", ["tiny", "64"])
@pytest.mark.parametrize("expert", ["null", "24"])
def test_flops_of_inference_are_those_that_torch_counts(size: str, expert: str) -> None:
    model = _model(f"model.expert_width={expert}", size=size)
    inputs, table = Inputs.of(model), model.relations.mode("joint_mutual").table
    memory, noisy = remember(inputs, 1, past=1), inputs.noisy(1)
    view = model.view(memory.cache, table, (Kind.V, Kind.A), [memory.block])
    work = step_work({kind: model.clock.tokens(kind) for kind in (Kind.V, Kind.A)}, view.groups[0].prefix.seen)
    assert _counted(lambda: model.denoise(view, noisy, memory.conditions, memory.embodiment_B)) == forward_flops(model.config, work)
    for kind in (Kind.S, Kind.AC, Kind.VC):
        cached = int(memory.cache.visible(table, kind, [2]).sum())
        call = lambda kind=kind: model.prefill(memory.cache.select([0]), table, kind, inputs.segment(kind, 1), [2], memory.conditions, memory.embodiment_B)  # noqa: E731
        assert _counted(call) == forward_flops(model.config, step_work({kind: model.clock.tokens(kind)}, cached))


def test_flops_of_training_are_those_that_torch_counts_under_a_dense_mask() -> None:
    """Torch counts every score of the parts; the formula is given the same number of pairs, and those that are needed are fewer."""
    model = _model()
    step = TrainingStep.of(model, 1)
    mask = step.masks()([0])
    parts = sum(m[0].numel() for m in mask.masks.values())  # type: ignore[union-attr]
    window, text, rows = step.inputs.window(1), step.inputs.text(), torch.zeros(1, dtype=torch.int64)
    found = _counted(lambda: model(window, model.embed_text(text, rows), mask, step.layout))
    assert found == forward_flops(model.config, window_work(model.config, step.layout, parts))
    dense = step.modes[0].table.dense(step.layout, Reach.of(model.config.timeline))
    assert seen_pairs(step.modes[0], step.layout, Reach.of(model.config.timeline)) == int(dense.sum()) < parts


def test_both_sides_hold_the_same_parameters() -> None:
    model = _model()
    ours, theirs = dict(model.backbone.named_parameters()), dict(diffusers_twin(model).named_parameters())
    assert ours.keys() == theirs.keys() and all(ours[name] is theirs[name] for name in ours)
    assert all(bool(p.isfinite().all()) and not p.is_meta for p in model.parameters())


def test_released_sizes_build_without_memory() -> None:
    """They are the published ones: backbones of 16.4, 5.0 and 1.4 billion parameters."""
    for size, billions in (("14b", 16.4), ("5b", 5.0), ("1.3b", 1.4)):
        model = build_empty(lambda size=size: WorldActionModel(size_config(size)))  # type: ignore[misc]
        assert sum(p.numel() for p in model.backbone.parameters()) / 1e9 == pytest.approx(billions, abs=0.06)
    assert size_config("14b").model.width == 5120


@pytest.mark.parametrize("tokens", [1, 13, 144, 927, 1021, 3 * 1031])
def test_a_box_holds_nearly_as_many_tokens(tokens: int) -> None:
    frames, rows, columns = box(tokens)
    assert 0.99 * tokens <= frames * rows * columns <= tokens and max(rows, columns) <= 1024


def test_sides_take_turns_and_every_second_round_runs_backwards() -> None:
    order: list[str] = []
    times = alternate({name: lambda name=name: order.append(name) for name in "ab"}, 3, CPU, warmups=1)  # type: ignore[misc]
    assert "".join(order) == "ab" + "ab" + "ba" + "ab"
    assert all(len(t.wall) == len(t.cpu) == 3 for t in times.values())


def test_process_time_decides_where_there_is_one() -> None:
    busy = Times(wall=(9.0, 1.0, 5.0), cpu=(2.0, 4.0, 3.0))
    assert (busy.median, busy.minimum) == (3.0, 2.0)
    assert (Times(busy.wall).median, Times(busy.wall).minimum) == (5.0, 1.0)
    assert increase(busy, Times((1.0, 1.0, 1.0), (1.0, 2.0, 2.5))).cpu == (1.0, 2.0, 0.5)


def test_what_depends_on_the_instruction_or_the_first_frame_is_computed_once() -> None:
    counts = count_recomputation()
    assert len(counts) == 7 and all(row.times == 1 for row in counts)


def test_a_fork_of_a_session_leaves_it_as_it_was() -> None:
    import numpy as np

    from wam.config import SamplingConfig
    from wam.evaluation.bench.compare import INSTRUCTION, drive, make_policy
    from wam.inference.session import Session

    model = _model()
    session = Session(make_policy(model), [INSTRUCTION], "metaworld", [0])
    drive(session, "joint", SamplingConfig(steps=1), np.random.default_rng(0))
    before = session.cache.keys[0].clone()
    drive(fork(session), "joint", SamplingConfig(steps=1), np.random.default_rng(1))
    assert session.block == 0 and torch.equal(session.cache.keys[0], before)


def test_a_quick_run_writes_every_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bench.json"
    assert main(["bench", "model", "--sizes", "64,tiny", "--quick", "--markdown", "--json", str(path)]) == 0
    out, found = capsys.readouterr().out, json.loads(path.read_text())
    assert "wam bench model --sizes 64,tiny --quick" in found["command"] and {"torch", "diffusers"} <= found["versions"].keys()
    assert found["machine"]["threads"] == 1 and "| training step |" in out
    rows = [row["row"] for row in found["comparisons"]]
    assert {"training step", "cached step", "growth with history", "session", "skip against joint, 10 steps"} <= set(rows) and rows.count("training step") == 4
    for row in found["comparisons"]:
        assert row["limit"] > 0 and len(row["ours"]["wall_ms"]["all"]) == len(row["theirs"]["cpu_ms"]["all"]) == 2
    stages = [row["row"] for row in found["stages"]]
    assert stages.count("denoise") == 8 and {"prefill S", "prefill Ac", "prefill Vc", "step, eager", "training step", "matmul"} <= set(stages)
    assert all(row["wall_ms"]["median"] > 0 for row in found["stages"])


def test_mistakes_are_told_before_anything_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    for argv, said in ((["--sizes", "300"], "unknown size '300'"), (["--device", "tpu"], "expected one of cpu, cuda"), (["--dtype", "int8"], "expected one of float32"), (["--threads", "0"], "at least 1")):
        assert main(["bench", "model", *argv]) == 2
        assert said in capsys.readouterr().err
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="sees no GPU"):
            bench_model(Options(device="cuda"))
