"""What a run says of itself equals what is counted another way: losses over steps and processes, FLOPs, rates, and where records go."""

import json
import sys
import types
from pathlib import Path

import pytest
import torch
from tiny import tiny_config, tiny_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from wam.evaluation.bench.compare import TrainingStep
from wam.evaluation.bench.subject import build_model, size_config
from wam.model.flops import training_flops
from wam.relations import Reach
from wam.training import rates
from wam.training.engine import Engine
from wam.training.launch import Launch
from wam.training.meters import LOG, Counts, Meters, Writers
from wam.training.objective import Losses, Part
from wam.training.rates import device_rate, published_rate
from wam.training.tally import BINS, Tally

CPU = torch.device("cpu")


class Pair(Engine):
    """Process 0 of two: a sum adds what process 1 said before."""

    def __init__(self, other: list[torch.Tensor]):
        super().__init__(Launch(0, 2))
        self.other = other

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor + self.other.pop(0)


class Listening(Engine):
    """Process 1 of two: remembers what it gives to a sum."""

    def __init__(self) -> None:
        super().__init__(Launch(1, 2))
        self.said: list[torch.Tensor] = []

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        self.said.append(tensor.clone())
        return tensor


def _part(size: int, tokens: int, generator: torch.Generator) -> Part:
    """Random errors of `tokens` frames or actions, about half of them supervised; the last sample has none."""
    error, sigma = (torch.rand(size, tokens, generator=generator) for _ in range(2))
    seen = (torch.rand(size, tokens, generator=generator) < 0.5).float()
    seen[-1] = 0
    return Part((error * seen).sum(1), seen.sum(1), torch.full((size,), float(tokens)), error * seen, seen, sigma)


def _losses(seed: int, modes: list[str], reduction: str = "supervised") -> Losses:
    generator = torch.Generator().manual_seed(seed)
    return Losses(modes, _part(len(modes), 6, generator), _part(len(modes), 8, generator), reduction, (frozenset({0}),) * len(modes))


def _joined(parts: list[Losses]) -> Losses:
    return Losses.cat(parts)


@pytest.mark.parametrize("reduction", ["supervised", "sample", "all"])
def test_a_tally_over_steps_and_processes_is_the_loss_of_all_of_it_at_once(reduction: str) -> None:
    steps = [_losses(seed, ["skip", "joint", "skip", "video"], reduction) for seed in range(4)]
    whole = _joined(steps)
    second, first, listening = Tally(["skip", "joint", "video"], CPU, reduction), Tally(["skip", "joint", "video"], CPU, reduction), Listening()
    for tally, own in ((second, steps[2:]), (first, steps[:2])):
        for losses in own:
            tally.add(losses)
            tally.add_norm(2.0)
    first.add_norm(float("nan"))  # of a step that was left out
    second.take(listening)
    found = first.take(Pair(listening.said))
    assert found["train/video"] == pytest.approx(float(whole.video())) and found["train/action"] == pytest.approx(float(whole.action()))
    assert {k: v for k, v in found.items() if k.startswith("train/") and k.count("/") == 2} == pytest.approx({f"train/{k}": v for k, v in whole.by_mode().items()})
    assert found["grad_norm"] == pytest.approx(2.0)
    part = whole.action_part
    assert part.sigma_BU is not None and part.error_BU is not None and part.weight_BU is not None
    inside = (part.sigma_BU >= 0.3) & (part.sigma_BU < 0.4)
    assert found["level/action/0.35"] == pytest.approx(float(part.error_BU[inside].sum() / part.weight_BU[inside].sum()), rel=1e-5)
    assert sum(k.startswith("level/video/") for k in found) <= BINS and first.take(Engine(Launch())) == {}, "a record begins a new one"


def test_flops_of_a_step_are_those_that_torch_counts_forward_and_backward() -> None:
    """Under a dense mask torch counts every score; ours counts the pairs that see each other, so it may only be less, by those."""
    model = build_model(size_config("64", "model.layers=3"), CPU, torch.float32).train()
    step = TrainingStep.of(model, 1)
    reach = Reach.of(model.config.timeline)
    by_mode, instruction = training_flops(model.config, step.layout, step.modes, reach)
    window, text, rows = step.inputs.window(1), step.inputs.text(), torch.zeros(1, dtype=torch.int64)
    mode = step.modes[0]
    dense = mode.table.dense(step.layout, reach)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        video, action = model(window, model.embed_text(text, rows), dense[None, None], step.layout)
        (video.square().sum() + action.square().sum()).backward()
    unseen = 3 * 4 * model.config.model.layers * model.config.model.width * int((~dense).sum())
    assert by_mode[mode.name] + instruction + unseen == pytest.approx(counter.get_total_flops(), rel=0.03), "a first layer needs no gradient of its input"
    assert instruction < by_mode[mode.name] / 4
    frozen = tiny_config("model.lora={rank: 2}", "model.pretrained=x")
    assert training_flops(frozen, tiny_model(tiny_config()).training_layout(4), step.modes[:1], reach)[0][mode.name] * 3 == 2 * training_flops(tiny_config(), tiny_model(tiny_config()).training_layout(4), step.modes[:1], reach)[0][mode.name]


def test_a_rate_is_measured_once_and_published_ones_are_known_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, rate in (("NVIDIA H100 80GB HBM3", 9.89e14), ("NVIDIA H100 PCIe", 7.56e14), ("NVIDIA A100-SXM4-80GB", 3.12e14), ("NVIDIA H200", 9.89e14), ("NVIDIA L40S", 3.62e14), ("NVIDIA Foo 9000", None)):
        assert published_rate(name) == rate, name
    path = tmp_path / "device_rate.json"
    first = device_rate(CPU, torch.float32, path)
    assert 1e8 < first.measured < 1e14 and first.published is None and first.threads == torch.get_num_threads()
    monkeypatch.setattr(rates, "_measure", lambda *_: 1.0)
    assert device_rate(CPU, torch.float32, path) == first
    assert device_rate(CPU, torch.bfloat16, path).measured == 1.0, "another type is measured again"
    path.write_text("{")
    assert device_rate(CPU, torch.float32, path).measured == 1.0


class _Bar:
    def set_postfix_str(self, *_: object, **__: object) -> None: ...
    def update(self, *_: object) -> None: ...
    def close(self) -> None: ...


@pytest.mark.parametrize(("small", "sizes"), [(1e11, [128, 1024]), (1e8, [128])])
def test_a_product_that_would_take_seconds_is_not_timed_at_full_size(small: float, sizes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def product(device: torch.device, dtype: torch.dtype, size: int, repeats: int) -> float:
        asked.append(size)
        return small

    monkeypatch.setattr(rates, "_best_product", product)
    assert rates._measure(CPU, torch.bfloat16) == small and asked == sizes


def test_a_summary_adds_up_processes_and_tells_apart_what_is_no_training(tmp_path: Path) -> None:
    config = tiny_config("training.modes={skip: 1}", "training.batch_size=8")
    rate = rates.Rate("cpu", "torch.float32", 1, measured=1e9, published=2e9)

    def meters(engine: Engine) -> Meters:
        made = Meters(config, engine, None, rate, 40, Writers(), Tally(["skip"], CPU), _Bar())  # type: ignore[arg-type]
        made.work[frozenset({0})] = (50, {"skip": 10**7}, 10**6)
        with made.waiting():
            pass
        made.batch(_losses(0, ["skip"] * 4), ["open it", "close it", "open it", "open it"])
        made.advance(0.5, 1.0)
        made.apart["validation"] = 0.0
        return made

    listening = Listening()
    other = meters(listening)
    other.counts = Counts(1, 4, 200, 42 * 10**6, seconds=3.0, waited=1.0)
    other.summary(1, 0.5, {"new": 0.1}, {})
    mine = meters(Pair(listening.said))
    assert (mine.counts.samples, mine.counts.tokens, mine.counts.flops) == (4, 200, 4 * 10**7 + 2 * 10**6)
    mine.counts.seconds, mine.counts.waited = 1.0, 0.0
    found = mine.summary(10, 0.5, {"new": 0.1, "text": 0.2}, {"new": torch.tensor(3.0)})
    assert found["samples_per_second"] == pytest.approx(8 / 2.0, rel=0.05) and found["tokens_per_second"] == pytest.approx(400 / 2.0, rel=0.05)
    assert found["share/data"] == pytest.approx(0.25, rel=0.05) and found["mfu"] == pytest.approx(84e6 / 2.0 / 2e9, rel=0.05) and found["mfu_published"] == pytest.approx(found["mfu"] / 2)
    assert found["learning_rate/text"] == 0.2 and found["grad_norm/new"] == 3.0 and found["epoch"] == 2.0 and found["peak_memory_gb"] > 0.05
    assert mine.counts == Counts() and "share/validation" in found and found["skipped_steps"] == 0


def test_a_step_that_was_left_out_counts_as_work_and_not_as_a_loss() -> None:
    meters = Meters(tiny_config("training.modes={skip: 1}"), Engine(Launch()), None, None, 40, Writers(), Tally(["skip"], CPU), _Bar())  # type: ignore[arg-type]
    meters.work[frozenset({0})] = (50, {"skip": 10}, 1)
    with meters.waiting():
        pass
    meters.batch(_losses(0, ["skip"] * 4), ["a"] * 4, counts=False)
    meters.advance(0.1, None)
    found = meters.summary(1, 0.1, {"new": 0.1}, {})
    assert found["skipped_steps"] == 1 and "train/video" not in found and found["samples_per_second"] > 0 and "mfu" not in found


def test_records_after_the_step_that_goes_on_are_dropped(tmp_path: Path) -> None:
    first = Writers.of(tiny_config(), tmp_path, 0)
    for step in (1, 2, 3):
        first.write(step, {"train/video": 1.0 / step})
    first.write(3, {})
    first.close()
    with (tmp_path / LOG).open("a") as log:
        log.write('{"step": 4, "cut of')
    again = Writers.of(tiny_config(), tmp_path, 2)
    again.write(3, {"train/video": 7.0})
    again.close()
    assert [(r["step"], r["train/video"]) for r in map(json.loads, (tmp_path / LOG).read_text().splitlines())] == [(1, 1.0), (2, 0.5), (3, 7.0)]
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_wandb_is_asked_only_when_asked_for_and_named_when_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config("training.wandb=robots")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match=r"training\.wandb is 'robots'.*pip install wandb"):
        Writers.of(config, tmp_path, 0)
    assert not (tmp_path / LOG).exists() and Writers.of(tiny_config(), tmp_path, 0).wandb is None

    calls: list[tuple] = []
    run = types.SimpleNamespace(id="abc", log=lambda values, step: calls.append((values, step)), finish=lambda: calls.append(("finish",)))
    fake = types.SimpleNamespace(init=lambda **given: calls.append((given["project"], given["id"], given["config"]["training"]["wandb"])) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for start in (0, 5, 0):  # a new run, the same one going on, and starting over
        writers = Writers.of(config, tmp_path, start)
        writers.write(6, {"x": 1.0})
        writers.close()
    assert [c for c in calls if c[0] == "robots"] == [("robots", None, "robots"), ("robots", "abc", "robots"), ("robots", None, "robots")]
    assert ({"x": 1.0}, 6) in calls and ("finish",) in calls
