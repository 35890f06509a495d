"""Several datasets in one run: whose turn it is, what of a sample is looked at, and that mixing changes nothing but the mix."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_codec, tiny_model

from wam.config import Config, load_config
from wam.data.dataset import collate
from wam.data.mixture import MixtureDataset, MixtureSampler, Quotas, TrainingData, training_data
from wam.data.normalize import normalizer_for
from wam.data.sampler import WindowSampler, make_loader
from wam.evaluation.rollout import demonstration_seeds
from wam.pretrained import from_pretrained
from wam.training import loop
from wam.training.build import fit_codec
from wam.training.caches import cache
from wam.training.draws import Draws
from wam.training.loop import train
from wam.training.objective import Objective, take_rows
from wam.training.state import config_tree, differences

SAMPLE = Path(__file__).resolve().parents[1] / "data/metaworld_sample"


def test_quotas_follow_weights_and_add_up() -> None:
    for weights in ((1.0, 1.0), (3.0, 1.0, 0.5), (1000.0, 1.0), (0.3, 0.3, 0.4)):
        quotas = Quotas(weights, seed=1)
        shares = np.array(weights) / sum(weights)
        row = np.concatenate([quotas.order(cycle) for cycle in range(6)])
        for cycle in range(7):
            count = np.bincount(row[: cycle * quotas.cycle], minlength=len(weights))
            np.testing.assert_array_equal(count, quotas.before(cycle))
            assert np.abs(count - shares * cycle * quotas.cycle).max() <= 1, "within one sample of its share, however long the run"
        assert np.bincount(quotas.order(0), minlength=len(weights)).min() >= 1
        assert not np.array_equal(quotas.order(0), quotas.order(1))


def test_order_is_a_function_of_seed_and_place() -> None:
    sizes, weights = (7, 20, 3), (1.0, 2.0, 1.0)
    sampler = MixtureSampler(sizes, weights, 5, seed=3)
    row = np.concatenate([sampler.indices(step) for step in range(200)])
    for step in (150, 0, 77):
        np.testing.assert_array_equal(MixtureSampler(sizes, weights, 5, seed=3).indices(step), row[5 * step : 5 * step + 5])
    np.testing.assert_array_equal(MixtureSampler(sizes, weights, 25, seed=3).indices(3), row[75:100])  # batches are cut from one row
    assert not np.array_equal(MixtureSampler(sizes, weights, 5, seed=4).indices(0), row[:5])
    starts = (0, 7, 27)
    for part, (size, start) in enumerate(zip(sizes, starts, strict=True)):
        own = row[(row >= start) & (row < start + size)] - start
        for epoch in range(len(own) // size):
            assert sorted(own[epoch * size : (epoch + 1) * size]) == list(range(size)), "every window once in each of a dataset's epochs"
        assert len(own) / size == pytest.approx(sampler.passes(200)[part])
    epochs = [draw.epoch for step in range(200) for draw in sampler.draws(step) if draw.index >= 27]
    assert epochs == sorted(epochs) and epochs[-1] == (len(epochs) - 1) // 3
    with pytest.raises(ValueError, match="expected at least"):
        MixtureSampler(sizes, weights, 0, 0)


# ------------------------------------------------------------------------------------------------ samples


def example(*overrides: str) -> Config:
    quick = ("model.layers=2", "training.steps=2", "training.batch_size=6", "training.precision=fp32", "training.validation_batches=1", "training.validation_samples=2", "data.cache=none")
    return load_config(SAMPLE.parents[1] / "configs/mixture_example.yaml", (*quick, f"data.root={SAMPLE}", *overrides))


@pytest.fixture(scope="module")
def data() -> TrainingData:
    return training_data(example("data.cache=memory"))


def test_each_sample_says_what_of_it_is_real(data: TrainingData) -> None:
    paired, video, action = data.parts.values()
    assert list(data.parts) == ["metaworld_sample/paired", "metaworld_sample/video", "metaworld_sample/action"]
    assert isinstance(data.windows, MixtureDataset) and len(data.windows) == len(paired) + len(video) + len(action) == 2 * len(paired) + len(action)
    assert data.windows.locate(len(paired) + 3) == (video, 3) and data.windows.locate(2 * len(paired)) == (action, 0)
    with pytest.raises(IndexError, match=r"window .* of"):
        data.windows[len(data.windows)]
    batch = collate([data.windows[i] for i in (5, len(paired) + 5, 2 * len(paired))])
    assert batch["embodiment"] == ["metaworld", "human", "metaworld"]
    assert batch["has_video"].tolist() == [True, True, False] and batch["has_action"].tolist() == [True, False, True]
    assert torch.equal(batch["frames"][0], batch["frames"][1]) and not batch["frames"][2].any() and batch["frames_is_pad"][2].all()
    assert not batch["action"][1].any() and batch["action_is_pad"][1].all() and not batch["action_is_pad"][2].all()
    assert video.pictures is not None and action.pictures is None, "what is left out is not opened"
    assert data.normalizers.keys() == {"metaworld"} and data.control_hz == 80
    assert normalizer_for(data.normalizer, "metaworld") == data.normalizers["metaworld"] == paired.normalizer
    assert data.normalizers["metaworld"] == paired.fit_normalizer([action])


def test_draws_are_of_the_dataset_whose_turn_it_is(data: TrainingData) -> None:
    sampler = data.sampler(8, seed=0)
    rows = [data.windows[draw] for step in range(8) for draw in sampler.draws(step)]
    seen = [(bool(row["has_video"]), bool(row["has_action"])) for row in rows]
    assert [seen.count(kind) for kind in ((True, True), (True, False), (False, True))] == pytest.approx([32, 16, 16], abs=8)
    single = training_data(example("data.cache=none", "mixture=[]"))
    assert not isinstance(single.windows, MixtureDataset) and isinstance(single.sampler(8, 0), WindowSampler)
    assert single.normalizer == single.normalizers["metaworld"].to_dict(), "of a single dataset as ever"


def test_the_table_of_a_run(data: TrainingData) -> None:
    lines = data.table(steps=100, batch_size=16).splitlines()
    assert lines[0].split() == ["dataset", "robot", "learnt", "episodes", "windows", "hours", "weight", "share", "passes", "held", "out"]
    assert "video, action" in lines[1] and "50.0%" in lines[1] and f"{800 / len(data.parts['metaworld_sample/paired']):.2f}" in lines[1]
    assert "human" in lines[2] and "25.0%" in lines[3]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("mixture=[{}, {normalization: min_max}]",), r"datasets of 'metaworld' differ in data.normalization \(min_max, quantile\)"),
        (("mixture=[{}, {control_hz: 40}]", "data.action_kinds=[target]"), r"differ in control steps a second \(40.0, 80.0\)"),
        (("mixture=[{latents: a}, {}]",), "has latents and .* has none; set data.latents, which holds for every entry"),
        (("mixture=[{}, {embodiment: human}]",), r"mixture\[1\].embodiment is 'human', but model.embodiments has metaworld"),
    ],
)
def test_datasets_that_do_not_fit_together(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        training_data(example(*overrides))


# ------------------------------------------------------------------------------------------------ losses


def batch_of(data: TrainingData, kinds: str) -> Any:
    """A batch of windows of the paired (p), video (v) and action (a) datasets."""
    parts = dict(zip("pva", data.parts.values(), strict=True))
    return collate([parts[kind][7 * i] for i, kind in enumerate(kinds)])


def of_actions(name: str) -> bool:
    return name.startswith(("action", "state_encoder", "expert."))


def of_video(name: str) -> bool:
    return name.startswith(("backbone.patch_embedding", "backbone.proj_out", "backbone.scale_shift_table"))


@pytest.mark.parametrize("expert", [None, 48])
@pytest.mark.parametrize("state", ["token", "context"])
def test_what_a_sample_lacks_has_no_gradient_and_changes_no_other_loss(data: TrainingData, expert: int | None, state: str) -> None:
    """Batches of 1 and of 3: nothing reaches the parameters of what is absent, and the other samples' losses stay as they are."""
    config = example(f"model.expert_width={expert or 'null'}", f"model.state={state}", "training.state_dropout=0")
    model = tiny_model(config)
    objective, alone = Objective(config, model.requires_grad_(True), tiny_codec(config.codec)), {}
    for kinds in ("v", "vvv", "a", "aaa"):
        losses = objective(batch_of(data, kinds), Draws.at(1, 2, range(len(kinds))))
        present, absent = (losses.video(), losses.action()) if "v" in kinds else (losses.action(), losses.video())
        model.zero_grad()
        (losses.video() + losses.action()).backward()
        touched = {name for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}
        other, own = (of_actions, of_video) if "v" in kinds else (of_video, of_actions)
        assert float(present.detach()) > 0 and float(absent.detach()) == 0 and not any(map(other, touched)) and any(map(own, touched)), kinds
        if "a" in kinds and expert:
            assert not any(name.startswith("backbone.blocks") for name in touched), "video's blocks are not touched by actions alone"
    whole = objective(batch_of(data, "pva"), Draws.at(1, 2, range(3)))
    for row, kind in enumerate("pva"):
        one = batch_of(data, "pva")
        one = take_rows(one, slice(row, row + 1))
        alone[kind] = objective(one, Draws.at(1, 2, [row]))
        torch.testing.assert_close(alone[kind].video_part.sum_B[0], whole.video_part.sum_B[row], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(alone[kind].action_part.sum_B[0], whole.action_part.sum_B[row], rtol=1e-4, atol=1e-5)
    for part in ("video_part", "action_part"):
        both = [getattr(alone[kind], part) for kind in ("pv" if part == "video_part" else "pa")]
        expected = sum(float(p.sum_B.detach().sum()) for p in both) / sum(float(p.count_B.sum()) for p in both)
        assert float(getattr(whole, part).mean("supervised").detach()) == pytest.approx(expected, rel=1e-4), "what is absent is not in the denominator"
        totals = [float(p.total_B.sum()) for p in both]
        assert float(getattr(whole, part).denominator("all")) == sum(totals), "nor where padding counts"


@pytest.mark.parametrize(
    ("modes", "video", "action"),
    [
        ("{skip: 1, joint_mutual: 1, forward: 1, inverse: 1, video: 1, action_only: 1}", {"skip", "video"}, {"skip", "action_only", "forward"}),
        ("{joint: 1, imagine: 1}", {"joint", "imagine"}, {"joint", "imagine"}),  # none for actions alone: then any that predicts them, without the video
        ("{forward: 1, inverse: 1}", {"forward"}, {"forward"}),  # its video looks at actions, its actions at nothing they lack
    ],
)
def test_modes_that_fit_what_a_sample_has(data: TrainingData, modes: str, video: set[str], action: set[str]) -> None:
    config = example(f"training.modes={modes}")
    objective = Objective(config, tiny_model(config), tiny_codec(config.codec))
    for kind, expected in (("v", video), ("a", action)):
        batch = batch_of(data, kind * 3)
        drawn = {objective.modes[i].name for step in range(30) for i in objective.draw(batch, Draws.at(0, step, range(3))).modes}
        assert drawn == expected


def test_the_example_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "draw_at_end", lambda output: None)
    config = example(f"data.latents={tmp_path / 'latents'}", "training.modes={skip: 1, forward: 1}")
    assert cache(config, 1).made == 12, "one cache for a dataset that is there twice"
    checkpoint = train(config, tmp_path / "run")
    policy = from_pretrained(checkpoint)
    assert normalizer_for(policy.normalizer, "metaworld").dim("action") == 4 and policy.control_hz == 80
    assert [entry["contents"] for entry in policy.meta["source"]["mixture"]] == ["paired", "video", "action"]
    assert demonstration_seeds(policy) == {0, 1, 2}, "episodes that were trained on are known, in every dataset"
    figures = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert any(name.startswith("val/metaworld_sample/video/") for record in figures for name in record)


def test_one_part_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Video alone trains, and its policy says that it knows no robot; actions alone give a linear codec nothing to be fitted on."""
    monkeypatch.setattr(loop, "draw_at_end", lambda output: None)
    policy = from_pretrained(train(example("mixture=[]", "data.contents=video", "training.modes={video: 1}", "training.steps=1"), tmp_path / "video"))
    with pytest.raises(ValueError, match=r"normalisation statistics by embodiment are \{\}"):
        normalizer_for(policy.normalizer, "metaworld")
    actions = example("mixture=[]", "data.contents=action", "training.modes={action_only: 1}")
    with pytest.raises(ValueError, match="nothing to fit the linear codec on; add one that has, or name a pretrained codec"):
        fit_codec(actions, training_data(actions))


def test_robots_of_other_widths_share_a_batch(data: TrainingData) -> None:
    """A robot of two dimensions beside one of four: each has its own statistics, and its losses are what they are alone."""
    robots = "[{name: metaworld}, {name: narrow, state_dim: 2, action_dim: 2, state_groups: [{name: xy, size: 2}], action_groups: [{name: dxy, size: 2}]}]"
    config = example("mixture=[{}, {embodiment: narrow}]", f"model.embodiments={robots}")
    both = training_data(config)
    assert both.normalizers.keys() == {"metaworld", "narrow"} and both.normalizers["narrow"].dim("action") == 2
    batch = collate([both.windows[9], both.windows[len(both.windows) // 2 + 9]])
    assert batch["action"].shape[-1] == 4 and torch.equal(batch["action"][1, :, :2], batch["action"][0, :, :2]) and not batch["action"][1, :, 2:].any()
    objective = Objective(config, tiny_model(config), tiny_codec(config.codec))
    losses = objective(batch, Draws.at(0, 0, range(2)), "skip")
    assert losses.action_part.count_B.tolist() == pytest.approx([float((~batch["action_is_pad"][0]).sum()), float((~batch["action_is_pad"][1]).sum()) / 2])
    alone = objective(take_rows(dict(batch), slice(1, 2)), Draws.at(0, 0, [1]), "skip")
    torch.testing.assert_close(alone.action_part.sum_B[0], losses.action_part.sum_B[1], rtol=1e-4, atol=1e-5)


def test_workers_and_restarts_do_not_matter(data: TrainingData) -> None:
    sampler = data.sampler(4, seed=1)
    runs = [list(islice(make_loader(data.windows, sampler, workers, start), 4 - start)) for workers, start in ((0, 0), (2, 0), (0, 2))]
    for run in runs[1:]:
        for batch, wanted in zip(run, runs[0][-len(run) :], strict=True):
            assert all(value == batch[key] if isinstance(value, list) else torch.equal(value, batch[key]) for key, value in wanted.items())


def test_a_run_goes_on_with_the_same_mixture() -> None:
    now = config_tree(example())
    assert not differences(config_tree(example("data.latents=x", "data.workers=2")), now, {})
    assert differences(config_tree(example("mixture=[{weight: 2}, {contents: video, weight: 0.5, embodiment: human}]")), now, {}).keys() >= {"mixture", "mixture.1.weight"}
