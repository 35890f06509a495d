"""The value token: who sees it and what it sees, that training and inference say the same, and what trains it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_objective import _batch, _objective, _touched
from tiny import TASKS, random_window, tiny_config, tiny_episode, tiny_model, tiny_policy, tiny_preset, window_of
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from toy import record_toy, toy_config, toy_frame

from wam.data.outcomes import UNKNOWN
from wam.inference.session import Session
from wam.inference.value import value_of
from wam.model.flops import forward_flops, window_work
from wam.model.value import value_errors, value_target
from wam.model.wam import WorldActionModel
from wam.model.window_mask import window_mask
from wam.pretrained import from_pretrained
from wam.relations import LeakError, Reach, Relations
from wam.relations_text import describe, describe_config
from wam.timeline import Kind
from wam.training.draws import Draws
from wam.training.loop import train
from wam.training.validation import auroc

VALUE, EXPERTS, BATCHES = "model.value=success", [None, 32], [1, 3]


# ------------------------------------------------------------------------------------------------ the table


def test_a_value_sees_the_past_and_what_it_is_asked_of_and_nobody_sees_it() -> None:
    relations = Relations.of(tiny_config(VALUE))
    for name in relations.modes:
        for valuation in relations.valuations:
            table = relations.valued(name, valuation).table
            blocks = {b: {k.label for k in Kind if table.allow(Kind.R, 1, k, b)} for b in range(3)}
            assert blocks[1] - {"H", "G"} == {"S", "R", {"action": "Ac", "outcome": "Vc"}[valuation]}
            assert blocks[0] - {"H", "G"} == {"S", "Vc", "Ac"} and blocks[2] <= {"H", "G"}
            assert not any(table.allow(k, 1, Kind.R, b) for k in Kind for b in (0, 1, 2) if (k, b) != (Kind.R, 1))
    with pytest.raises(ValueError, match=r"no value head; train one with model\.value=success"):
        Relations.of(tiny_config()).valuation("action")
    with pytest.raises(ValueError, match="unknown valuation 'actions'; valuations: action, outcome"):
        relations.valuation("actions")


def test_valuations_that_leak_are_refused() -> None:
    """Executed actions that see their own video would show it to a value of the action; a value of the outcome may know them."""
    relations = Relations.of(tiny_preset("lingbot_va", None, VALUE))
    with pytest.raises(LeakError, match=r"leaks into R: R\[1\] -> Ac\[1\] -> Vc\[1\]"):
        relations.valuation("action")
    relations.valued("imagine", "outcome")
    for cell in ("R->V", "R->A", "V->R", "A->R", "Vc->R"):
        with pytest.raises(LeakError):
            Relations.of(tiny_config(VALUE, f'relations.cells={{{cell}: "="}}')).valued("joint", "outcome")
    with pytest.raises(ValueError, match="state_level is 'action'"):
        tiny_preset("dreamzero", None, VALUE)


def test_it_is_described() -> None:
    config = tiny_config(VALUE)
    assert describe(Relations.of(config).valuation("action")).split("\n")[-1].split() == ["R", "all", "<=", "<", ".", "<=*", ".", "all", "="] and " R" not in describe("joint").split("\n\n")[1]
    text = describe_config(config)
    assert "R sees Ac up to its own block" in text and "R sees Vc up to its own block" in text and "R sees" not in describe_config(tiny_config())


# ------------------------------------------------------------------------------------------------ training and inference


@pytest.mark.parametrize("expert", EXPERTS)
@pytest.mark.parametrize(("preset", "overrides"), [("all", ()), ("all", ("timeline.history=1", "model.goal_image=true")), ("fast_wam", ()), ("lingbot_va", ("training.valuations={outcome: 1}",)), ("all", ("sampling.guidance=2", "training.text_dropout=0.1"))])
def test_a_candidate_is_valued_as_in_training(preset: str, overrides: tuple[str, ...], expert: int | None) -> None:
    """Every block, from a session's memory shared by two candidates of which one is the real one, equals the window's own values; and the memory stays as it is."""
    config = tiny_preset(preset, expert, VALUE, *overrides)
    policy, t = tiny_policy(config), config.timeline
    episode, model = tiny_episode(config, 2, t.blocks), policy.model
    window, layout = window_of(policy, episode, t.blocks), model.training_layout(t.blocks)
    session = Session(policy, TASKS[:2], "metaworld", [0, 1], episode.goals if config.model.goal_image else None)
    conditions = model.encode_text(TASKS[:2])
    valuations = [v for v, weight in config.training.valuations.items() if weight]
    if config.model.state == "context":
        conditions = model.with_state(conditions, window.state_BNS[:, 0], window.embodiment_B)  # type: ignore[index]
    trained = {}
    for name in valuations:
        mask = model.relations.valued("skip" if preset != "lingbot_va" else "imagine", name).table.dense(layout, Reach.of(t))
        trained[name] = torch.sigmoid(model(window, conditions, mask[None, None].expand(2, -1, -1, -1), layout)[2])
    for block in range(episode.first_block, t.blocks):
        session.observe(*episode.at(block))
        before = [x.clone() for x in (session.cache.kinds_BS, session.cache.blocks_BS, *session.cache.keys)]
        if "action" in valuations:
            real = episode.done(block)
            found = value_of(session, np.stack([-real, real], axis=1))
            torch.testing.assert_close(found[:, 1], trained["action"][:, block], rtol=1e-4, atol=1e-5)
            assert not torch.allclose(found[:, 0], found[:, 1], atol=1e-6)
        frames = [f - model.clock.frames(0)[0] for f in model.clock.frames(block)]
        latents = window.clean_BCFHW[:, :, [f + (t.first_frame == "before") for f in frames]]
        found = value_of(session, latents=torch.stack([latents, -latents], dim=1))
        torch.testing.assert_close(found[:, 0], trained["outcome"][:, block], rtol=1e-4, atol=1e-5)
        assert all(torch.equal(a, b) for a, b in zip(before, (session.cache.kinds_BS, session.cache.blocks_BS, *session.cache.keys), strict=True))
        session.commit(episode.done(block))


@pytest.mark.parametrize("expert", EXPERTS)
def test_a_window_in_parts_says_the_same_and_its_work_is_counted(expert: int | None) -> None:
    config = tiny_preset("all", expert, VALUE)
    model, layout = tiny_model(config), tiny_model(config).training_layout(4)
    dense = model.relations.valued("joint_mutual", "outcome").table.dense(layout, Reach.of(config.timeline))[None]
    parts, window = window_mask(dense, layout), random_window(model, 1, 4)
    assert parts is not None
    a, b = (model(window, model.encode_text(TASKS[:1]), mask, layout) for mask in (parts, dense[:, None]))
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
    assert a[2].shape == (1, 4) and len(model.forward_train(window, model.encode_text(TASKS[:1]), parts, layout)) == 2
    text, rows = torch.zeros(1, config.text.max_tokens, config.text.width), torch.zeros(1, dtype=torch.int64)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(window, model.embed_text(text, rows), dense[:, None], layout)
    assert counter.get_total_flops() == forward_flops(config, window_work(config, layout, len(layout) ** 2))


def test_what_cannot_be_valued_is_refused() -> None:
    config = tiny_config(VALUE)
    policy, episode = tiny_policy(config), tiny_episode(config, 1, 2)
    session = Session(policy, TASKS[:1], "metaworld", [0])
    candidates = np.zeros((1, 2, 8, 4), np.float32)
    with pytest.raises(ValueError, match="nothing has been observed"):
        value_of(session, candidates)
    session.observe(*episode.at(0))
    with pytest.raises(ValueError, match="one of the two"):
        value_of(session)
    with pytest.raises(ValueError, match=r"shape \(1, 2, 7, 4\); expected .* \(1, N, 8, 4\)"):
        value_of(session, candidates[:, :, 1:])
    with pytest.raises(ValueError, match="non-finite"):
        value_of(session, candidates * np.nan)
    with pytest.raises(ValueError, match=r"outcomes have shape \(1, 6, 1, 4, 6\)"):
        value_of(session, latents=torch.zeros(1, 6, 1, 4, 6))
    session.commit(candidates[:, 0])
    with pytest.raises(ValueError, match="committed already"):
        value_of(session, candidates)
    blind = Session(tiny_policy(tiny_config()), TASKS[:1], "metaworld", [0])
    blind.observe(*episode.at(0))
    with pytest.raises(ValueError, match="no value head"):
        value_of(blind, candidates)


# ------------------------------------------------------------------------------------------------ the objective


def test_targets_by_hand() -> None:
    steps = torch.tensor([0.0, 50.0, torch.inf])
    found = {value: value_target(tiny_config(f"model.value={value}", "model.value_horizon=100").model, steps) for value in ("success", "progress")}
    assert torch.allclose(found["success"], torch.tensor([1, np.exp(-0.5), 0]).float())
    assert torch.allclose(found["progress"], torch.tensor([1, 0.5, 0]))
    bare = value_target(tiny_config(VALUE, "model.value_horizon=null").model, steps)
    assert torch.equal(bare, torch.tensor([1.0, 1, 0]))
    with pytest.raises(ValueError, match="value_horizon is null"):
        tiny_config("model.value=progress", "model.value_horizon=null")
    target = torch.tensor([0.0, 0.3, 1.0])
    assert torch.allclose(value_errors(torch.logit(target, eps=1e-7), target), torch.zeros(3), atol=1e-5)
    assert float(value_errors(torch.zeros(1), torch.ones(1))) == pytest.approx(np.log(2))


def _valued_batch(config: Any, size: int, known: list[bool]) -> dict[str, Any]:
    steps = torch.arange(size * config.timeline.blocks).view(size, -1).float()
    steps[:, -1] = torch.inf
    return {**_batch(config, size), "outcome": torch.where(torch.tensor(known)[:, None], steps, UNKNOWN)}


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("expert", EXPERTS)
def test_a_sample_without_an_outcome_trains_no_value_and_rescales_no_other(expert: int | None, batch: int) -> None:
    config = tiny_preset("all", expert, VALUE, "training.modes={skip: 1, imagine: 1}")
    objective = _objective(config)
    losses = objective(_valued_batch(config, batch, [False] * batch), torch.Generator().manual_seed(0))
    assert losses.value_part is not None and float(losses.value_part.count_B.sum()) == 0 == float(losses.value().detach())
    (losses.value() + 0 * losses.video()).backward()
    assert not _touched(objective.model.value_head) and not _touched(objective.model.backbone)
    if batch == 1:
        return
    whole, part = (objective(_valued_batch(config, batch, known), torch.Generator().manual_seed(0)) for known in ([True] * 3, [True, False, True]))
    assert part.value_part is not None and whole.value_part is not None
    kept = [0, 2]
    torch.testing.assert_close(part.value_part.sum_B[kept], whole.value_part.sum_B[kept], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(part.value(), whole.value_part.sum_B[kept].sum() / whole.value_part.count_B[kept].sum(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(part.video(), whole.video())
    objective.model.zero_grad()
    part.value().backward()
    assert _touched(objective.model.value_head) and not _touched(objective.model.action_decoder)


@pytest.mark.parametrize("expert", EXPERTS)
def test_a_value_head_changes_nothing_of_video_and_actions(expert: int | None) -> None:
    """The same numbers are drawn, the other parameters are the same, and so are the losses, in every mode; without it there is no parameter, token or loss of it."""
    plain, valued = (tiny_preset("all", expert, "training.modes={skip: 1, joint_mutual: 1, imagine: 1, forward: 1}", *more) for more in ((), (VALUE,)))
    torch.manual_seed(0)
    models = [WorldActionModel(config) for config in (plain, valued)]
    own = {name for name, _ in models[1].named_parameters()} - {name for name, _ in models[0].named_parameters()}
    assert own and all(name.startswith("value_head.") for name in own)
    a, b = _objective(plain), _objective(valued)
    b.model.load_state_dict(a.model.state_dict(), strict=False)
    inputs = _valued_batch(valued, 3, [True] * 3)
    without, beside = (objective(inputs, Draws.at(0, 3, range(3))) for objective in (a, b))
    assert without.modes == beside.modes and without.value_part is None and len(without.parts) == 2
    for part in ("video_part", "action_part"):
        torch.testing.assert_close(getattr(beside, part).sum_B, getattr(without, part).sum_B, rtol=1e-4, atol=1e-5)
        assert torch.equal(getattr(beside, part).count_B, getattr(without, part).count_B)
    assert {s.kind for s in b.layout.segments} - {s.kind for s in a.layout.segments} == {Kind.R} == {s.kind for s in b.layout.segments if s.kind is Kind.R}


def test_values_are_asked_of_what_a_sample_has() -> None:
    config = tiny_config(VALUE)
    objective = _objective(config)
    batch = {**_valued_batch(config, 3, [True] * 3), "has_video": torch.tensor([True, False, True]), "has_action": torch.tensor([True, True, False])}
    for seed in range(4):
        drawn = objective.draw(batch, torch.Generator().manual_seed(seed))
        assert drawn.valuations is not None and [objective.valuations[v] for v in drawn.valuations][1:] == ["action", "outcome"]
        assert drawn.value_seen_BN is not None and bool(drawn.value_seen_BN.all())
    wrong = objective.valued(batch, drawn, [0, 1, 0])
    assert wrong.value_seen_BN is not None and wrong.value_seen_BN.any(1).tolist() == [True, False, False]


# ------------------------------------------------------------------------------------------------ from the data to validation


def test_auroc_by_hand() -> None:
    assert auroc(torch.tensor([2.0, 0, 0]), torch.tensor([0.0, 0, 3])) == 1 and auroc(torch.tensor([1.0, 1]), torch.tensor([1.0, 1])) == 0.5
    negatives, positives = [0, 1, 1, 2], [1, 2, 0]
    pairs = [(p > n) + 0.5 * (p == n) for p in positives for n in negatives]
    assert auroc(*(torch.bincount(torch.tensor(x), minlength=3).double() for x in (negatives, positives))) == pytest.approx(np.mean(pairs))


def test_a_value_is_learnt_from_recorded_successes_and_failures(tmp_path: Path) -> None:
    """Episodes that will succeed show a bright bar, those that will not a dark one: held-out ones are told apart, and a session's memory says the same."""
    record_toy(tmp_path / "data", 16)
    train(toy_config(tmp_path / "data", VALUE, "model.value_horizon=50", "training.steps=24"), tmp_path / "run")
    records = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    first, last = (next(r for r in order if "val/value_error/action" in r) for order in (records, records[::-1]))
    for valuation in ("action", "outcome"):
        assert last[f"val/value_auroc/{valuation}"] > 0.9 and last[f"val/value_error/{valuation}"] < first[f"val/value_error/{valuation}"]
    policy = from_pretrained(tmp_path / "run" / "checkpoint")
    session = Session(policy, ["push the bar"] * 2, "metaworld", [0, 1])
    frames = np.stack([toy_frame(0.5, good=True), toy_frame(0.5, good=False)])[:, None]
    session.observe(frames, np.zeros((2, 4), np.float32))
    good, bad = value_of(session, np.zeros((2, 1, 8, 4), np.float32))[:, 0].tolist()
    assert good > bad + 0.03
