"""Goals, what plans imagine, and what came of it, over the wire: each is what a session in process would have."""

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from serving_tools import Talk, episode, observation, policy, serving
from tiny import TASKS, tiny_policy, tiny_preset
from wam_client import Observation, PolicyClient, PolicyError

from wam.config import CheckConfig
from wam.inference.check import LEVELS, Checker, Floors, Horizon, Source, SurpriseScale
from wam.inference.gate import Gate, GateConfig
from wam.inference.outcome import newest, outcome
from wam.inference.session import Session
from wam.pretrained import Policy
from wam.serving.contract import Contract
from wam.serving.errors import ServingError
from wam.serving.metrics import Metrics
from wam.serving.surprise import Surprises
from wam.serving.worker import Worker, WorkerOptions


def _worker(of: Policy, scale: SurpriseScale | None = None, **options: Any) -> Worker:
    contract = Contract.of(of)
    return Worker(of, contract, Gate(GateConfig(), contract.robot.raw_action_dim, contract.control_hz), WorkerOptions(**{"mode": "skip", **options}), Metrics(), scale)


# ------------------------------------------------------------------------------------------------ goals


@cache
def _with_goals() -> Policy:
    return tiny_policy(tiny_preset("all", None, "timeline.blocks=3", "sampling.steps=2", "model.goal_image=true"))


def test_a_goal_is_the_sessions_until_another_one_comes() -> None:
    goals, of = episode(0).goals, _with_goals()
    other = 255 - goals
    with serving(_worker(of)) as running, Talk(running.url) as talk:
        assert talk.metadata["takes_goal"] is True
        first = talk.ask(observation(0, 0, **{"goal/corner4": goals[0]}))["actions"]
        second = talk.ask(observation(0, 1))
        session = Session(of, [TASKS[0]], "metaworld", [100], goals)
        session.observe(*episode(0).at(0))
        assert np.array_equal(first, session.plan("skip").actions[0])
        session.commit(first[None])
        session.observe(*episode(0).at(1))
        assert np.array_equal(second["actions"], session.plan("skip").actions[0]) and second["plan"]["memory_blocks"] == 1
        assert not np.array_equal(talk.ask(observation(0, 1, **{"goal/image": other[0]}))["actions"], second["actions"]), "another goal, from the same memory"
        without = observation(0, 0, session_id="no words", **{"goal/corner4": goals[0]})
        del without["prompt"]
        assert talk.ask(without)["actions"].shape == (8, 4), "a goal stands for an instruction"


@pytest.mark.parametrize(
    ("goal", "code"),
    [
        ({"goal/corner4": np.zeros((8, 8, 3), np.float32)}, "wrong_type"),
        ({"goal/corner4": np.zeros((2, 8, 8, 3), np.uint8)}, "wrong_shape"),
        ({"goal/elsewhere": np.zeros((8, 8, 3), np.uint8)}, "missing_key"),
    ],
)
def test_what_is_no_goal(goal: dict[str, Any], code: str) -> None:
    for of, expected in ((_with_goals(), code), (policy(), "bad_value")):
        with pytest.raises(ServingError) as refused:
            Contract.of(of).goal(goal)
        assert refused.value.code == expected
    assert Contract.of(policy()).goal(observation(0, 0)) is None


# ------------------------------------------------------------------------------------------------ what plans imagine


def test_what_a_plan_imagines_comes_as_pictures_where_it_is_wanted() -> None:
    with serving(_worker(policy())) as running, Talk(running.url) as talk:
        reply = talk.ask(observation(0, 0, mode="joint", want="imagined"))
        session = Session(policy(), [TASKS[0]], "metaworld", [100])
        session.observe(*episode(0).at(0))
        imagined = session.plan("joint").imagined
        assert imagined is not None
        frames = reply["imagined"]["frames"]
        assert frames.shape == (4, 32, 48, 3) and np.array_equal(frames, policy().codec.decode(imagined, first=False)[0].numpy())
        assert reply["imagined"]["frame_dt"] == 2 / 80
        talk.send(observation(0, 0, mode="joint", want="imagined"))
        raw = talk.socket.recv(20)
        begins = b"\xa8imagined\x82\xa6frames\x84\xc4\x0b__ndarray__\xc3\xc4\x04data\xc5" + (4 * 32 * 48 * 3).to_bytes(2, "big")
        assert isinstance(raw, bytes) and raw.count(begins) == 1 and b"\xa8frame_dt\xcb" in raw, "byte for byte as docs/serving.md has it"
        assert "imagined" not in talk.ask(observation(0, 1, mode="joint"))
        assert talk.error(observation(0, 2, want="imagined"))["code"] == "bad_value", "skip imagines nothing"
        assert talk.error(observation(0, 2, want="dreams"))["code"] == "bad_value"


def test_this_projects_client_sends_goals_and_gets_pictures() -> None:
    goals, frames = episode(0).goals, episode(0).at(0)
    with serving(_worker(_with_goals())) as running, PolicyClient(running.url, TASKS[0]) as client:
        seen = Observation(0.0, {"corner4": frames[0][0, -1]}, frames[1][0])
        plan = client.plan(seen, goal={"corner4": goals[0]}, mode="joint", want="imagined", seed=100)
        assert plan.imagined is not None and plan.imagined.shape == (4, 32, 48, 3) and plan.surprise is None
        session = Session(_with_goals(), [TASKS[0]], "metaworld", [100], goals)
        session.observe(*frames)
        assert np.array_equal(plan.actions, session.plan("joint").actions[0])
        client.reset("failed")
        with pytest.raises(PolicyError, match="outcome is 'so so'"):
            client.reset("so so")


# ------------------------------------------------------------------------------------------------ what came of it


def _scale(*sources: str) -> SurpriseScale:
    usual = tuple(0.1 * (1 + i) for i in range(len(LEVELS)))
    return SurpriseScale("0" * 64, dict.fromkeys(sources, Source(Floors(0.0, 0.0), (Horizon(9, 0, usual, usual),), usual, usual)), {})


@pytest.mark.parametrize(("source", "name"), [("plan", "joint/2"), ("forward", "forward/1")])
def test_surprise_is_what_the_check_makes_of_the_same_pictures(source: Any, name: str) -> None:
    scale = _scale(name)
    with serving(_worker(policy(), scale, mode="joint", check=source)) as running, Talk(running.url) as talk:
        first = talk.ask(observation(0, 0))
        assert "surprise" not in first
        told = talk.ask(observation(0, 1))["surprise"]
        gone = [talk.ask(observation(0, 2, gap=True)), talk.ask(observation(0, 3))]
        text = running.worker.metrics.text().decode()
    session = Session(policy(), [TASKS[0]], "metaworld", [100])
    session.observe(*episode(0).at(0))
    plan = session.plan("joint")
    aside = outcome(session, [0], plan.actions, replace(policy().config.sampling, steps=1), [1])
    session.commit(first["actions"][None])
    came = session.observe(*episode(0).at(1))
    checker = Checker(policy(), CheckConfig(source=source, then="nothing"), scale)
    imagined = plan.imagined if source == "plan" else aside
    assert imagined is not None
    expected = checker.compare(imagined[0], came[0], newest(policy(), episode(0).at(0)[0][:, -1])[0], *(("joint", 2) if source == "plan" else ("forward", 1)))
    assert told["value"] == pytest.approx(expected.value, rel=1e-4) and told["surprised"] == expected.surprised and told["source"] == name and told["plan"] == first["plan"]["id"]
    assert "surprise" not in gone[0] and "surprise" in gone[1], "what nobody knows the actions of is not compared"
    assert "wam_surprise_count 2.0" in text


def test_a_check_that_cannot_be_made_is_refused_and_auto_makes_what_it_can() -> None:
    assert Surprises.of(policy(), None, "auto", "joint", 2) is None and Surprises.of(policy(), _scale("joint/2"), "auto", "skip", 2) is None
    assert Surprises.of(policy(), _scale("joint/2"), "auto", "joint", 2) is not None and Surprises.of(policy(), _scale("joint/2"), "none", "joint", 2) is None
    for scale, source, mode, says in ((None, "plan", "joint", "run `wam calibrate"), (_scale("joint/2"), "plan", "skip", "imagine no video"), (_scale("joint/2"), "forward", "skip", "not calibrated for 'forward/1'")):
        with pytest.raises(ValueError, match=says):
            Surprises.of(policy(), scale, source, mode, 2)
