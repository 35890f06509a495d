"""Planning: candidates on one memory equal copies of it, rows are independent, and what is chosen is what the score says."""

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_session
import torch
from tiny import SMALL, tiny_config, tiny_policy

from wam.cli import main
from wam.codec.linear import LinearCodec
from wam.config import Config, ConfigError, PlannerConfig, SamplingConfig, load_config
from wam.data.normalize import Normalizer
from wam.evaluation.bench.planner import PlannerOptions, bench_planner
from wam.evaluation.environments import Observation, StepResult
from wam.evaluation.goals import GoalImages, solved_frame
from wam.inference.batch import Think, run
from wam.inference.candidates import Candidates, imagining
from wam.inference.planner import Planner, search_flops
from wam.inference.scores import agreement_scores, goal_scores, last_pictures, moving_patches
from wam.inference.session import Plan, Session
from wam.inference.value import value_of
from wam.model.sampling import Noise, Sample, Situation, sample
from wam.model.shared import SharedCache, attend_shared
from wam.model.wam import WorldActionModel
from wam.pretrained import Policy
from wam.training.objective import Objective

N, ROWS = 4, [0, 1]
BEST, BY_GOAL = PlannerConfig("best_of_n", N), PlannerConfig("best_of_n", N, "goal")
CEM = PlannerConfig("cem", N, "goal", elites=2)
FROM_ZERO = replace(CEM, prior="gaussian")


@cache
def _policy() -> Policy:
    return tiny_policy(tiny_config())


def _session(policy: Policy, rows: Sequence[int], targets: bool = True, blocks: int = 1) -> Session:
    """A robot a row that has seen its first frame, and perhaps blocks behind it."""
    episode = test_session._episode(policy.config).rows(list(rows))
    session = Session(policy, ["open the drawer"] * len(rows), "metaworld", [100 + r for r in rows], targets=episode.goals if targets else None)
    for block in range(blocks):
        if block:
            session.commit(episode.done(block - 1))
        session.observe(*episode.at(block))
    return session


# ------------------------------------------------------------------------------------------------ one memory


def test_attention_over_a_shared_past_is_that_over_copies_of_it_also_masked_and_written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(6, 5, 2, 8, generator=generator) for _ in range(3))
    past_k, past_v = (torch.randn(2, 7, 2, 8, generator=generator) for _ in range(2))
    mask = torch.rand(2, 1, 1, 7, generator=generator) < 0.6
    for seen in (None, mask):
        keys, values = (torch.cat([past.repeat_interleave(3, 0), own], dim=1).transpose(1, 2) for past, own in ((past_k, k), (past_v, v)))
        whole = None if seen is None else torch.cat([seen.repeat_interleave(3, 0), torch.ones(6, 1, 1, 5, dtype=torch.bool)], dim=-1)
        copied = torch.nn.functional.scaled_dot_product_attention(q.transpose(1, 2), keys, values, whole).transpose(1, 2)
        torch.testing.assert_close(attend_shared(q, k, v, past_k, past_v, seen), copied, rtol=1e-5, atol=1e-6)
        monkeypatch.setattr("wam.model.shared.LARGEST", 64)  # in several parts
        with torch.enable_grad():
            torch.testing.assert_close(attend_shared(q.requires_grad_(), k, v, past_k, past_v, seen), copied, rtol=1e-5, atol=1e-6)
        q = q.detach()


@pytest.mark.parametrize(("name", "expert"), [("all", None), ("guided imagination", 32), ("live states", None), ("a single copy", None), ("first frame on the channels", None), ("goal", 32)])
def test_a_shared_memory_is_as_good_as_a_copy_for_each_candidate(name: str, expert: int | None) -> None:
    policy, mode = test_session._policy(name, expert), test_session.SETTINGS[name][1]
    session = test_session._new(policy, ROWS)
    blocks = list(test_session._blocks(policy.config))
    for block in blocks[:-1]:
        test_session._step(session, ROWS, block, mode)
    test_session._observe(session, ROWS, blocks[-1])
    rows = [row for row in range(len(session.embodiment_B)) for _ in range(N)]
    index, at, relations = torch.tensor(rows), session._situation(None), session.model.relations
    state = None if at.state_BnS is None else at.state_BnS[index]
    candidates = Candidates.open(session, N, session._held(None))

    def copied(what: str, noise: Noise, how: SamplingConfig, given: torch.Tensor | None = None) -> Sample:
        copies = Situation(session.cache.select(rows), [session.block] * len(rows), session.conditions.select(index), session.embodiment_B[index], state, candidates.at.held, session.guided)
        return sample(session.model, relations.mode(what), copies, noise, how, given)

    before, how = [k.clone() for k in session.cache.keys], policy.config.sampling
    expected, drawn = copied(mode, candidates.noise, how), candidates.draw(mode, how)
    for ours, theirs in ((drawn.action_BTA, expected.action_BTA), (drawn.video_BCFHW, expected.video_BCFHW)):
        assert (ours is None) == (theirs is None)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert drawn.action_BTA is not None
    few, from_noise = imagining(how, 2), replace(candidates.noise, video_BCFHW=candidates.outcome_noise.repeat_interleave(N, 0))
    outcomes = candidates.imagine(drawn.action_BTA.unflatten(0, (-1, N)), few)
    torch.testing.assert_close(outcomes.flatten(0, 1), copied("forward", from_noise, few, drawn.action_BTA).video_BCFHW, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(before, session.cache.keys, strict=True)), "what candidates write stays theirs"


def test_the_memory_of_the_past_does_not_grow_with_candidates() -> None:
    """Bytes: one read of the past a row for any number of candidates, for drawing and imagining alike; each candidate adds its own block."""
    held = {}
    for count in (2, 16):
        session = _session(_policy(), ROWS, blocks=2)
        candidates = Candidates.open(session, count, session._held(None))
        cache = candidates.at.cache
        assert isinstance(cache, SharedCache)
        drawn = candidates.draw("skip", SamplingConfig(steps=1))
        assert drawn.action_BTA is not None
        held[count] = cache.bytes_held()
        candidates.imagine(drawn.action_BTA.unflatten(0, (-1, count)), SamplingConfig(steps=1))
        assert cache.bytes_held() == held[count], "the same read serves both, and what candidates did is dropped"
        assert len(cache._reads) == 1 and len(cache.keys[0]) == len(ROWS)
    m, seen = _policy().config.model, sum(session.model.clock.tokens(kind) for kind, _ in _seen(session))
    assert held[2] == held[16] == 2 * 4 * m.layers * m.width * len(ROWS) * seen


def _seen(session: Session) -> set[tuple[Any, int]]:
    kinds, blocks = session.cache.kinds_BS[0], session.cache.blocks_BS[0]
    by_number = {int(kind): kind for kind in session.model.cached_kinds}
    return {(by_number[int(k)], int(b)) for k, b in zip(kinds, blocks, strict=True) if b >= -1}


# ------------------------------------------------------------------------------------------------ rows


def test_with_one_candidate_the_planner_is_the_session() -> None:
    ours, plain = _session(_policy(), ROWS), _session(_policy(), ROWS)
    how = _policy().config.sampling
    plan, expected = Planner(_policy(), replace(BEST, candidates=1)).plan(ours, "skip", how), plain.plan("skip", how)
    np.testing.assert_array_equal(plan.actions, expected.actions)
    assert plan.imagined is None
    assert all(torch.equal(a.get_state(), b.get_state()) for a, b in zip(ours.generators, plain.generators, strict=True))
    first = Planner(_policy(), BEST).search(_session(_policy(), ROWS), "skip", how).actions_BNTA[:, 0]
    np.testing.assert_allclose(_session(_policy(), ROWS)._physical(Sample(first)), expected.actions, atol=1e-5)  # the first of several is the session's own, too


@pytest.mark.parametrize("config", [BEST, BY_GOAL, CEM, FROM_ZERO], ids=["agreement", "goal", "cem", "cem from zero"])
def test_rows_are_planned_for_as_if_alone_and_begin_with_what_is_committed(config: PlannerConfig) -> None:
    planner, how = Planner(_policy(), config), SamplingConfig(steps=2)
    committed = np.random.default_rng(0).uniform(-0.5, 0.5, (2, 3, 4)).astype(np.float32)
    together = planner.plan(_session(_policy(), ROWS), "joint", how, committed)
    alone = [_session(_policy(), [row]) for row in ROWS]
    plans = [planner.plan(session, "joint", how, committed[[row]]) for row, session in enumerate(alone)]
    assert together.actions is not None and together.imagined is not None
    for row, plan in enumerate(plans):
        assert plan.actions is not None and plan.imagined is not None
        np.testing.assert_allclose(together.actions[row], plan.actions[0], atol=1e-5)
        torch.testing.assert_close(together.imagined[row], plan.imagined[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(together.actions[:, :3], committed, atol=1e-5)
    assert abs(together.actions[0, 3:] - together.actions[1, 3:]).max() > 1e-3, "the rows differ, or matching them shows nothing"


def test_robots_at_different_blocks_are_planned_for_in_one_pass() -> None:
    planner, how = Planner(_policy(), BY_GOAL), SamplingConfig(steps=2)

    def sessions() -> list[Session]:
        return [_session(_policy(), [0], blocks=2), _session(_policy(), [1], blocks=3)]

    def think(session: Session, mode: str, sampling: SamplingConfig, committed: np.ndarray | None, promised: np.ndarray | None) -> Plan:
        return planner.plan(session, mode, sampling, committed)

    joined = run(sessions(), [[Think("skip", how, plan_with=think)]] * 2)
    for plan, session in zip(joined, sessions(), strict=True):
        assert plan is not None
        np.testing.assert_allclose(plan.actions, planner.plan(session, "skip", how).actions, atol=1e-5)


def test_a_simulator_may_say_what_follows() -> None:
    """Each of two robots is shown its goal after one of its candidates, and grey after the others."""
    policy, how, right = _policy(), SamplingConfig(steps=2), [2, 0]
    goals = [test_session._episode(policy.config).rows([row]).goals for row in ROWS]
    asked: list[np.ndarray] = []
    robots = [_session(policy, [0], blocks=2), _session(policy, [1], blocks=3)]

    def simulate(sessions: Sequence[Session], actions: np.ndarray) -> np.ndarray:
        assert list(sessions) == robots, "robots of a shared pass are told apart"
        asked.append(actions)
        shown = np.full((2, N, policy.config.timeline.frames_per_block, *policy.config.codec.image_size, 3), 128, np.uint8)
        for row, best in enumerate(right):
            shown[row, best] = goals[row][0]
        return shown

    planner = Planner(policy, replace(BY_GOAL, outcomes="simulated"), simulate)

    def think(session: Session, mode: str, sampling: SamplingConfig, committed: np.ndarray | None, promised: np.ndarray | None) -> Plan:
        return planner.plan(session, mode, sampling, committed)

    plans = run(robots, [[Think("skip", how, plan_with=think)]] * 2)
    for row, plan in enumerate(plans):
        assert plan is not None and plan.imagined is None
        np.testing.assert_array_equal(plan.actions[0], asked[0][row, right[row]])
    kept = _session(policy, [0], blocks=2)
    moving = np.random.default_rng(0).integers(0, 256, (1, N, policy.config.timeline.frames_per_block, *policy.config.codec.image_size, 3), dtype=np.uint8)
    found = Planner(policy, planner.config, lambda sessions, actions: moving).search(kept, "skip", how)
    kept.commit(np.zeros((1, policy.config.timeline.actions_per_block, 4), np.float32))
    assert found.outcomes is not None
    torch.testing.assert_close(found.outcomes[:, 1], kept.observe(moving[:, 1], test_session._episode(policy.config).rows([0]).at(2)[1]))
    with pytest.raises(ValueError, match="there is no simulator to run ahead"):
        Planner(policy, replace(BY_GOAL, outcomes="simulated"))
    with pytest.raises(ConfigError, match=r"set planner\.score=goal or value, which look at what follows"):
        replace(BEST, outcomes="simulated")


def test_near_copies_of_a_candidate_are_not_imagined() -> None:
    """Of three ways the densest comes first, then one of each other; their outcomes are those of imagining all."""
    session = _session(_policy(), ROWS)
    candidates = Candidates.open(session, 6, session._held(None))
    ways = torch.tensor([[0.5, -1.0, 0.51, 0.49, -1.02, 0.9], [0.9, 0.91, -0.5, 0.89, 0.1, -0.5]])
    actions, how = ways[:, :, None, None].expand(-1, -1, *candidates.noise.action_BTA.shape[1:]).contiguous(), imagining(SamplingConfig(), 2)
    few, kept = candidates.keep(actions, 3)
    assert kept[:, :, 0, 0].tolist() == [pytest.approx([0.5, -1.02, 0.9]), pytest.approx([0.9, -0.5, 0.1])]
    all_of_them = candidates.imagine(actions, how)
    torch.testing.assert_close(few.imagine(kept, how), torch.stack([all_of_them[0, [0, 4, 5]], all_of_them[1, [0, 2, 4]]]), rtol=1e-5, atol=1e-5)
    assert len(candidates.at.cache._reads) == 1, "of the past, one read serves both"  # type: ignore[attr-defined]


# ------------------------------------------------------------------------------------------------ scores


def test_agreement_takes_the_way_of_most_and_not_the_middle() -> None:
    """Five go left, three go right, one goes between them: it is the nearest to the mean, and the worst."""
    ways = torch.tensor([-1.0, -1.02, -0.98, -1.01, -0.99, 1.0, 1.01, 0.99, 0.0])
    actions = ways[:, None, None].expand(9, 4, 2)[None].contiguous()
    scores = agreement_scores(actions)[0]
    assert ways[scores.argmax()] == -1.0 and scores.argmin() == 8
    assert (actions[0] - actions[0].mean(0)).square().mean((1, 2)).argmin() == 8, "what the distance to the mean would take"
    assert agreement_scores(torch.zeros(1, 3, 4, 2)).allclose(torch.ones(1, 3))


def test_the_distance_to_a_goal_counts_where_things_move() -> None:
    newest = torch.zeros(1, 2, 3, 4)
    goal, last = newest.clone(), torch.zeros(1, 3, 2, 3, 4)
    goal[:, :, 0, 3] = 2.0
    last[0, 0, :, 0, 3] = 1.5  # nearly there
    last[0, 2, :, 0, 3] = 2.0  # there
    last[0, 0, :, 2] = 0.3  # and background, of which every imagination gets something a little wrong
    last[0, 2, :, 1] = 0.4
    assert moving_patches(last, goal, newest)[0].sum() == 1
    assert goal_scores(last, goal, newest)[0].tolist() == pytest.approx([-0.5, -2.0, 0.0])
    assert goal_scores(last, goal, newest, "l2")[0].tolist() == pytest.approx([-0.25, -4.0, 0.0])
    led = last.clone()
    led[0, 2, :, 2, 0] = 2.0  # it knocks something else over
    assert goal_scores(led, goal, newest)[0].argmax() == 0
    assert goal_scores(last, newest, newest).isfinite().all(), "the goal is what is seen: everything counts"


def test_what_is_compared_is_the_last_frame_and_not_how_it_came_to_be() -> None:
    codec, clip = _policy().codec, torch.from_numpy(np.random.default_rng(0).integers(0, 255, (2, 9, 32, 48, 3), dtype=np.uint8))
    latents = codec.encode(clip)[:, :, 1:]
    apart = last_pictures(codec, torch.stack([latents, latents[:, :, [1, 0]]], dim=1))
    still = codec.encode(codec.decode(codec.encode(clip))[:, [8, 4]].flatten(0, 1).unsqueeze(1))[:, :, 0].unflatten(0, (2, 2))
    torch.testing.assert_close(apart, still, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("asked", ["outcome", "action"])
def test_a_value_head_is_asked_of_what_it_was_trained_for(asked: str) -> None:
    """Of outcomes, which are then imagined, or of actions, for which nothing is."""
    policy = tiny_policy(tiny_config("model.value=success", "model.value_horizon=100", f"training.valuations={{{asked}: 1}}"))
    planner, session = Planner(policy, replace(BEST, score="value")), _session(policy, ROWS)
    found = planner.search(session, "skip", SamplingConfig(steps=2))
    again = _session(policy, ROWS)
    values = value_of(again, latents=found.outcomes) if asked == "outcome" else value_of(again, Planner._physical(again, found.actions_BNTA))
    assert (found.outcomes is not None) == (asked == "outcome") == planner.imagines
    torch.testing.assert_close(found.scores_BN, values, rtol=1e-4, atol=1e-5)
    assert torch.equal(found.best_B, values.argmax(dim=1)) and float(values.std()) > 0


# ------------------------------------------------------------------------------------------------ two ways


def _clip(way: float) -> np.ndarray:
    """Five frames (5, 32, 48, 3): a bright block in the middle that goes left (-1) or right (+1)."""
    frames = np.full((5, 32, 48, 3), 60, np.uint8)
    for i in range(5):
        at = round(20 + way * 3 * i)
        frames[i, 12:20, at : at + 8] = (240, 200, 40)
    return frames


@cache
def _two_ways() -> Policy:
    """A policy that goes left or right, as likely, and knows what either looks like."""
    modes = "training.modes={skip: 1, forward: 1}"
    sizes = ("timeline.blocks=1", "timeline.actions_per_block=8", "codec.channels=12", "model.video_head=sample", "training.state_dropout=0", "sampling.steps=6")
    config: Config = load_config(None, (*SMALL, *sizes, modes))
    clips, ways = np.stack([_clip(-1.0), _clip(1.0)] * 4), torch.tensor([-1.0, 1.0] * 4)
    torch.manual_seed(0)
    codec, model = LinearCodec(config.codec), WorldActionModel(config)
    codec.fit(torch.from_numpy(np.concatenate([np.stack([clips[way, start : start + 4] for way in (0, 1) for start in (0, 1)]), np.repeat(clips[:2, :1], 4, 1), np.repeat(clips[:2, 4:], 4, 1)])))
    actions = ways[:, None, None].expand(8, 8, 4).contiguous()
    batch = {
        "frames": torch.from_numpy(clips),
        "frames_is_pad": torch.zeros(8, 5, dtype=torch.bool),
        "state": torch.zeros(8, 1, 4),
        "action": actions,
        "executed": actions,
        "action_is_pad": torch.zeros(8, 8, dtype=torch.bool),
        "instruction": ["go"] * 8,
    }
    objective, optimizer = Objective(config, model, codec), torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, (STEPS - step) / (STEPS / 2))
        losses = objective(batch, torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (losses.video() + losses.action()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    normalizer = Normalizer.fit({"state": np.random.default_rng(0).normal(size=(50, 4)), "action": np.random.default_rng(0).uniform(-1, 1, (500, 4))}, "none")
    return Policy(config, model.eval().requires_grad_(False), codec, normalizer.to_dict(), {"control_hz": 80})


STEPS = 100


def _at_start(goals: np.ndarray, seed: int = 0) -> Session:
    session = Session(_two_ways(), ["go"] * len(goals), "metaworld", [seed + i for i in range(len(goals))], targets=goals)
    session.observe(np.stack([_clip(1.0)[:1]] * len(goals)), np.zeros((len(goals), 4), np.float32))
    return session


def _toward(ways: Sequence[float]) -> np.ndarray:
    """What it looks like to have gone there."""
    return np.stack([_clip(way)[4] for way in ways])


def test_a_goal_image_decides_between_two_ways() -> None:
    """The policy goes either way; told by a picture which one, and in both by what it imagines of its own candidates, it goes there."""
    ways, how = [-1.0, 1.0] * 2, _two_ways().config.sampling
    planner = Planner(_two_ways(), PlannerConfig("best_of_n", 16, "goal"))
    found = planner.search(_at_start(_toward(ways)), "skip", how)
    went = found.actions_BNTA.mean(dim=(2, 3))
    assert (went.min(1).values < -0.6).all() and (went.max(1).values > 0.6).all(), "the samples go both ways, or choosing shows nothing"
    plan = planner.plan(_at_start(_toward(ways)), "skip", how)
    assert plan.actions is not None and plan.imagined is not None
    assert np.sign(plan.actions.mean((1, 2))).tolist() == ways
    other = planner.plan(_at_start(_toward([-way for way in ways])), "skip", how)  # the same robots, the same samples, the other goal
    assert other.actions is not None and np.sign(other.actions.mean((1, 2))).tolist() == [-way for way in ways]


@pytest.mark.parametrize("prior", ["policy", "gaussian"])
def test_rounds_of_the_cross_entropy_method_come_nearer_to_the_goal(prior: Any) -> None:
    ways = [-1.0, 1.0]
    planner = Planner(_two_ways(), PlannerConfig("cem", 12, "goal", iterations=4, elites=3, prior=prior))
    found = planner.search(_at_start(_toward(ways), seed=7), "skip", _two_ways().config.sampling)
    assert (found.rounds_RB.diff(dim=0) >= 0).all() and found.rounds_RB[-1].sum() > found.rounds_RB[0].sum()
    assert torch.sign(found.actions_BNTA[:, 0].mean((1, 2))).tolist() == ways
    assert (found.best_B == 0).all() and (found.scores_BN.diff(dim=1) <= 0).all(), "the best first"


# ------------------------------------------------------------------------------------------------ refusals and costs


def test_what_cannot_be_planned_is_refused() -> None:
    policy, how = _policy(), SamplingConfig(steps=1)
    with pytest.raises(ValueError, match=r"this session has no goal image; open it with goals"):
        Planner(policy, CEM).plan(_session(policy, ROWS, targets=False), "skip", how)
    with pytest.raises(ValueError, match="mode 'video' does not plan actions"):
        Planner(policy, BEST).plan(_session(policy, ROWS), "video", how)
    with pytest.raises(ValueError, match="no trained value head"):
        Planner(policy, replace(BEST, score="value"))
    with pytest.raises(ValueError, match="nothing has been observed yet"):
        Planner(policy, BEST).plan(_session(policy, ROWS, blocks=0), "skip", how)
    unable = tiny_policy(tiny_config("training.modes={skip: 1}"))
    with pytest.raises(ValueError, match="imagines what follows from actions: mode 'forward' is not what this model was trained for"):
        Planner(unable, BY_GOAL)
    Planner(unable, BEST)  # nothing is imagined for agreement
    with pytest.raises(ConfigError, match=r"set planner\.score=goal"):
        PlannerConfig("cem")
    with pytest.raises(ConfigError, match=r"every candidate of planner\.kind=cem is imagined"):
        replace(CEM, imagined=2)
    with pytest.raises(ConfigError, match="keep fewer"):
        PlannerConfig("cem", 4, "goal", elites=4)


def test_an_instruction_may_be_absent_where_there_is_a_goal(caplog: pytest.LogCaptureFixture) -> None:
    """The absent instruction is the one that training drops to: nothing, not a template around nothing."""
    policy = tiny_policy(tiny_config("model.goal_image=true", "training.goal_image=0.5", "training.text_dropout=0.1", "text.template=do {instruction} now"))
    goals = test_session._episode(policy.config).goals[:1]
    session = Session(policy, [" "], "metaworld", [0], goals)
    assert torch.equal(session.instructions.text_UTE, policy.model.encode_text([""]).text_UTE) and not caplog.records
    assert session.target is session.goal and session.goal is not None
    with pytest.raises(ValueError, match="or a goal image where the model takes one"):
        Session(policy, [""], "metaworld", [0], targets=goals)
    untaught = tiny_policy(tiny_config("model.goal_image=true"))
    Session(untaught, [""], "metaworld", [0], goals)
    assert "never was in training (training.text_dropout is 0)" in caplog.text


def test_flops_of_a_search() -> None:
    assert search_flops(replace(BEST, candidates=8), False, 5.0, 2.0) == 40
    assert search_flops(replace(BY_GOAL, candidates=8), True, 5.0, 2.0) == 56
    assert search_flops(replace(BY_GOAL, candidates=8, imagined=3), True, 5.0, 2.0) == 46
    assert search_flops(replace(CEM, candidates=8, iterations=3), True, 5.0, 2.0) == 88
    assert search_flops(replace(FROM_ZERO, candidates=8, iterations=3), True, 5.0, 2.0) == 48


def test_the_bench_measures_candidates_beside_one(tmp_path: Path) -> None:
    out = tmp_path / "planner.json"
    main(["bench", "planner", "--quick", "--sizes", "64", "--repeats", "1", "--json", str(out)])
    report = json.loads(out.read_text())
    assert [row["row"] for row in report["comparisons"]] == ["best of 8", "best of 8, few imagined", "one memory"]
    assert report["counts"][0]["times"] == 1000, "eight candidates read as many bytes of the past as one"
    with pytest.raises(ValueError, match="unknown size '100'"):
        bench_planner(PlannerOptions(sizes=("100",)))


# ------------------------------------------------------------------------------------------------ goal images


class _Counting:
    """A world that is solved after as many of its expert's steps as the seed says; frames are as bright as steps were made."""

    max_steps = 5

    def reset(self, seed: int) -> Observation:
        self.seed, self.steps = seed, 0
        return Observation(np.zeros((1, 2, 2, 3), np.uint8), np.zeros(1, np.float32))

    def expert_action(self) -> np.ndarray:
        return np.ones(1, np.float32)

    def run(self, actions: np.ndarray, frame_stride: int) -> StepResult:
        self.steps += int(actions.sum())
        frames, success = np.full((1, 2, 2, 3), self.steps, np.uint8), np.array([self.steps == self.seed])
        return StepResult(frames, np.zeros((1, 1), np.float32), np.zeros(1, np.float32), success, bool(success[0]) or self.steps >= self.max_steps)

    def close(self) -> None:
        pass


def test_a_goal_is_the_moment_at_which_the_expert_succeeds(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    monkeypatch.setattr("wam.evaluation.goals.make_env", lambda name, **settings: _Counting())
    monkeypatch.setattr("wam.evaluation.goals.solved_frame", lambda env, seed, name: made.append(seed) or solved_frame(env, seed, name))
    goals = GoalImages("metaworld/anything")
    assert goals([3, 1, 3])[:, 0, 0, 0].tolist() == [3, 1, 3] and made == [3, 1], "drawn once a seed"
    with pytest.raises(RuntimeError, match="does not solve the episode of seed 9 in 5 control steps"):
        goals([9])
    monkeypatch.setattr("wam.evaluation.goals.make_env", lambda name, **settings: object.__new__(type("Inexpert", (), {"close": lambda self: None})))
    with pytest.raises(ValueError, match="has no scripted expert"):
        GoalImages("gym/anything")
