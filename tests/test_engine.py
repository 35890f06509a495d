"""Engines: one process and two train the same, whatever is in shards; what two processes draw; parts of a model with their own rates.

Two processes meet through gloo on this machine.  Each run goes through the loop's own step, and then back: its state is put into the same
engine again, and the step that follows must be the same to the bit.
"""

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import survival
import torch
from tiny import tiny_config

from wam.config import ConfigError, load_config
from wam.training.engine import Engine, check_batch, choose
from wam.training.engine_deepspeed import filled, read_json
from wam.training.groups import freeze, make_optimizer, part_of, rate_of
from wam.training.launch import Launch, read_launch

ROOT = Path(__file__).parents[1]
JSONS = ROOT / "configs" / "deepspeed"
STEPS = 20
WHOLE = ("single", "deepspeed", "fsdp2")  # engines whose model has to be gathered to be validated, and the one they are compared with
QUICK = ("codec.image_size=[32, 48]", f"training.steps={STEPS}", "training.batch_size=8", "training.validation_batches=1", "training.validation_samples=2", "sampling.steps=1")
DRAWS = ("training.text_dropout=0.2", "noise.history_probability=0.3", "noise.prefix=0.3")


def observe(output: str, overrides: tuple[str, ...]) -> None:
    """Train through the loop's own steps; write the losses, the average and a validation, and whether a restored state repeats a step."""
    from wam.training import loop

    log = os.open(f"{output}-{os.environ.get('RANK', '0')}.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)

    def go(run: Any, step: int, *_: Any) -> Path:
        batches = iter(loop.make_loader(run.data.windows, run.sampler, 0, step, run.engine.rank, run.engine.world))
        run.model.train()
        losses = [_step(run, next(batches), n) for n in range(STEPS)]
        average = {name: value.clone() for name, value in run.engine.weights(run.ema).items()}
        figures = run._validation(STEPS) if run.engine.kind in WHOLE else {}
        state = [{k: v.clone() for k, v in tensors.items()} for tensors in (run.engine.trained_tensors(), run.engine.optimizer_state())]
        batch = next(batches)
        after = []
        for _ in range(2):
            run.engine.load(*state)
            _step(run, batch, STEPS - 1)
            after.append({k: v.clone() for k, v in run.engine.trained_tensors().items()})
        exact = all(torch.equal(after[0][k], after[1][k]) and not torch.equal(after[0][k], state[0][k]) for k in after[0] if "to_q.weight" in k or k == "action_decoder.out.weight")
        if run.engine.is_main:
            torch.save({"losses": losses, "average": average, "figures": figures, "exact": exact, "kind": run.engine.kind}, output)
        return Path(output)

    loop._Run.go = go
    loop.train(survival.quick_config(*QUICK, *DRAWS, *overrides), Path(f"{output}-run"))


def _step(run: Any, batch: dict[str, Any], step: int) -> float:
    """One step; the whole batch's loss, which the guard remembers."""
    _, norm = run._step(batch, step, step / STEPS)
    assert norm is not None
    return run.guard.losses[-1]


RUNS: dict[str, tuple[int, tuple[str, ...]]] = {
    "single": (1, ()),
    "accumulate": (1, ("training.accumulate=2",)),
    "ddp": (2, ("training.accumulate=2",)),
    "zero2": (2, (f"training.engine.deepspeed={JSONS / 'zero2.json'}",)),
    "zero3": (2, (f"training.engine.deepspeed={JSONS / 'zero3.json'}",)),
    "fsdp2": (2, ("training.engine.kind=fsdp2", "training.accumulate=2")),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What each engine came to."""
    folder, out = tmp_path_factory.mktemp("engines"), {}
    for name, (world, overrides) in RUNS.items():
        path = folder / name
        codes = survival.finish(survival.start(observe, str(path), overrides, world=world), timeout=300)
        assert codes == [0] * world, f"{name}: {codes}\n" + "\n".join(Path(f"{path}-{r}.txt").read_text()[-3000:] for r in range(world))
        out[name] = torch.load(path, weights_only=True)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in RUNS if n != "single"])
def test_two_processes_and_micro_batches_train_as_one(name: str, runs: dict[str, dict[str, Any]]) -> None:
    """Over 20 steps: the same loss curve, the same average of the weights, the same validation; and a state that repeats a step to the bit."""
    one, many = runs["single"], runs[name]
    assert many["kind"] == {"accumulate": "single", "zero2": "deepspeed", "zero3": "deepspeed"}.get(name, name)
    assert len(set(one["losses"])) == STEPS
    assert max(abs(a - b) for a, b in zip(one["losses"], many["losses"], strict=True)) < 1e-5
    assert one["average"].keys() == many["average"].keys() and len(one["average"]) > 80
    assert all(torch.allclose(one["average"][k], many["average"][k], rtol=0, atol=1e-5) for k in one["average"])
    assert len(one["figures"]) > 5 and many["figures"].keys() == (one["figures"].keys() if many["kind"] in WHOLE else set())
    assert all(math.isclose(one["figures"][k], value, rel_tol=1e-3, abs_tol=1e-3) for k, value in many["figures"].items())
    assert many["exact"]


# ------------------------------------------------------------------------------------------------ who is asked for


def test_a_batch_that_cannot_be_shared_is_refused_with_the_arithmetic() -> None:
    config = load_config(None, ("training.batch_size=12", "training.accumulate=2"))
    check_batch(config, 3)
    with pytest.raises(ValueError, match=r"12 is the whole batch .* 4 processes x 2 micro-batches .* 12 / \(4 x 2\) is not whole; use 8 or 16"):
        check_batch(config, 4)


def test_the_launcher_says_which_process_this_is() -> None:
    assert read_launch({}) == Launch()
    environment = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}
    assert read_launch(environment) == Launch(3, 4, 1)
    accelerate = {**environment, "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": "zero2.json"}
    assert read_launch(accelerate) == Launch(3, 4, 1, "deepspeed", "zero2.json")
    with pytest.raises(ValueError, match=r"'RANK': '3', 'WORLD_SIZE': '4', 'LOCAL_RANK': None"):
        read_launch({"RANK": "3", "WORLD_SIZE": "4"})


@pytest.mark.parametrize(
    ("override", "launch", "expected"),
    [
        ("auto", Launch(), "single"),
        ("auto", Launch(0, 2), "ddp"),
        ("auto", Launch(0, 2, kind="fsdp2"), "fsdp2"),
        ("auto", Launch(0, 2, kind="deepspeed", deepspeed="x.json"), "deepspeed"),
        ("fsdp2", Launch(0, 2), "fsdp2"),
        ("single", Launch(0, 2), "2 processes were started"),
        ("ddp", Launch(0, 2, kind="fsdp2"), "accelerate was configured for 'fsdp2'"),
        ("deepspeed", Launch(0, 2), "nothing names a DeepSpeed JSON"),
    ],
)
def test_which_engine(override: str, launch: Launch, expected: str) -> None:
    config = tiny_config(f"training.engine.kind={override}")
    if " " in expected:
        with pytest.raises(ValueError, match=expected):
            choose(config, launch)
    else:
        assert choose(config, launch) == expected


def test_a_named_file_is_deepspeed_and_contradictions_are_refused() -> None:
    assert choose(tiny_config("training.engine.deepspeed=x.json"), Launch()) == "deepspeed"
    for override in ("training.engine={kind: ddp, deepspeed: x.json}", "training.engine={kind: ddp, offload: true}"):
        with pytest.raises(ConfigError, match=r"training\.engine"):
            tiny_config(override)


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"])
def test_deepspeed_files_take_a_runs_numbers(name: str, tmp_path: Path) -> None:
    tree, config = read_json(JSONS / f"{name}.json"), tiny_config("training.batch_size=24", "training.accumulate=3", "training.grad_clip=0.5")
    found = filled(tree, config, 4)
    assert [found[k] for k in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")] == [24, 2, 3, 0.5]
    assert "auto" not in found.values() and found["zero_optimization"]["stage"] == int(name[4])
    with pytest.raises(ValueError, match="says train_batch_size 16, and this run's config 24"):
        filled({**tree, "train_batch_size": 16}, config, 4)
    for section, message in (({"bf16": {"enabled": True}}, "training.precision"), ({"optimizer": {"type": "Adam"}}, "training.learning_rate")):
        (tmp_path / "own.json").write_text(json.dumps({**tree, **section}))
        with pytest.raises(ValueError, match=message):
            read_json(tmp_path / "own.json")
    with pytest.raises(FileNotFoundError, match="configs/deepspeed"):
        read_json(tmp_path / "none.json")


# ------------------------------------------------------------------------------------------------ parts


def test_parts_have_their_own_rate_decay_and_warm_up() -> None:
    config = tiny_config("model.expert_width=32", "training.warmup_steps=10", "training.groups={backbone: {rate: 0.1, warmup_steps: 100}, new: {weight_decay: 0.5}, text: {freeze: true}}")
    t = config.training
    assert [part_of(n) for n in ("backbone.blocks.0.ffn.x", "backbone.blocks.0.attn1.to_q.lora_A.default.weight", "expert.blocks.0.x", "text.encoder.x", "action_decoder.table", "goal_embedding")] == ["backbone", "adapters", "expert", "text", "new", "new"]
    assert rate_of(t, "backbone", 9, 0) == pytest.approx(t.learning_rate * 0.1 * 0.1) and rate_of(t, "new", 9, 0) == t.learning_rate
    assert rate_of(t, "new", 500, 0.5) == pytest.approx(t.learning_rate / 2)

    model = new_model(config)
    freeze(config, model)
    optimizer = make_optimizer(config, model)
    by_name = {g["name"]: g for g in optimizer.param_groups}
    assert set(by_name) == {f"{part}{decay}" for part in ("backbone", "expert", "new") for decay in ("", " without decay")}
    assert by_name["new"]["weight_decay"] == 0.5 and by_name["backbone"]["weight_decay"] == t.weight_decay and by_name["new without decay"]["weight_decay"] == 0
    owned = [p for g in optimizer.param_groups for p in g["params"]]
    assert len(owned) == len({id(p) for p in owned}) == sum(p.requires_grad for p in model.parameters())
    assert not any(p.requires_grad for p in model.text.parameters())


def test_a_model_of_frozen_parts_only_is_refused() -> None:
    config = tiny_config("training.groups={backbone: {freeze: true}, new: {freeze: true}, text: {freeze: true}}")
    with pytest.raises(ValueError, match="nothing to train"):
        freeze(config, new_model(config))


def new_model(config: Any) -> Any:
    from wam.model.wam import WorldActionModel

    return WorldActionModel(config)


def test_a_step_that_is_too_large_changes_nothing() -> None:
    """And what nothing supervised reached has a gradient of zero, on every engine: it decays, and moves no further."""
    config = tiny_config("training.weight_decay=0.5", "training.learning_rate=0.1")
    engine, model = Engine(Launch()), new_model(config)
    engine.prepare(model, model, config)
    weight, other = model.action_decoder.out.bias, model.backbone.proj_out.weight
    torch.nn.init.ones_(other)
    (weight * 3).sum().backward()
    assert float(engine.step(largest=1.0)) == pytest.approx(3 * weight.numel() ** 0.5) and not weight.any() and bool((other == 1).all())
    assert weight.grad is None, "gradients of a step that is left out are gone"
    weight.sum().backward()
    engine.step()
    assert bool((weight < 0).all()) and torch.allclose(other, torch.full_like(other, 1 - 0.1 * 0.5))
    assert float(engine.norms["new"]) == pytest.approx(weight.numel() ** 0.5) and float(engine.norms["backbone"]) == 0
