"""The value token: who sees it and what it sees, that training and inference say the same, and what trains it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from test_objective import _batch, _objective, _touched
from tiny import TASKS, random_window, tiny_config, tiny_episode, tiny_model, tiny_policy, tiny_preset, window_of

from wam.inference.session import Session
from wam.inference.value import value_of
from wam.model.value import value_errors, value_target
from wam.relations import LeakError, Reach, Relations
from wam.relations_text import describe, describe_config
from wam.timeline import Kind
from wam.training.draws import Draws
from wam.training.objective import Objective

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
    with pytest.raises(ValueError, match="no value head; train one with model.value=success"):
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
