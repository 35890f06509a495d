"""Another checkpoint takes over: connections and memories stay, every plan is wholly of one of the two, and another robot's is refused."""

import http.client
import json
import time
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
from serving_tools import MODE, Running, Talk, episode, make_worker, observation, policy, serving
from tiny import TASKS, tiny_model

from wam.inference.session import Session
from wam.pretrained import Policy
from wam.serving.contract import Contract
from wam.serving.reload import Loaded, differences


@cache
def other() -> Policy:
    """The same robot's, other weights."""
    return replace(policy(), model=tiny_model(policy().config, seed=1))


def _loaded(checkpoint: Policy) -> Loaded:
    return Loaded(checkpoint, Contract.of(checkpoint, about={"checkpoint": "old" if checkpoint is policy() else "new"}), None)


def _ask(running: Running, method: str, **headers: str) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", running.server.port, timeout=10)
    connection.request(method, "/reload", headers=headers)
    response = connection.getresponse()
    body = response.read().decode()
    return response.status, json.loads(body) if body.startswith("{") else body


def get(running: Running, path: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", running.server.port, timeout=10)
    connection.request("GET", path)
    response = connection.getresponse()
    return response.status, response.read().decode()


def _until(running: Running, state: str) -> dict[str, Any]:
    until = time.monotonic() + 20
    while time.monotonic() < until:
        told = _ask(running, "GET")[1]
        if told["state"] != "loading":
            assert told["state"] == state, told
            return told
        time.sleep(0.01)
    raise AssertionError("it did not come to an end")


def _told(checkpoint: Policy, executed: list[np.ndarray], lived: bool = False) -> np.ndarray:
    """What a session plans that is told all that a robot saw and did, with this checkpoint: a new one, or one that planned each block."""
    session = Session(checkpoint, [TASKS[0]], "metaworld", [100])
    session.observe(*episode(0).at(0))
    for block, actions in enumerate(executed):
        if lived:
            session.plan(MODE)  # draws noise
        session.commit(actions[None])
        session.observe(*episode(0).at(block + 1))
    return session.plan(MODE).actions[0]


def test_plans_before_are_the_old_weights_and_after_the_new_ones_on_one_connection() -> None:
    with serving(make_worker(contract=_loaded(policy()).contract), load=lambda: _loaded(other())) as running, Talk(running.url) as talk:
        before = [talk.ask(observation(0, block))["actions"] for block in range(2)]
        assert np.array_equal(before[1], _told(policy(), before[:1], lived=True))
        assert _ask(running, "POST")[0] == 202
        assert _until(running, "loaded")["checkpoint"] == {"checkpoint": "new"}
        after = talk.ask(observation(0, 2))
        assert np.array_equal(after["actions"], _told(other(), before)) and after["plan"]["memory_blocks"] == 2, "told anew from what the robot saw and did"
        assert not np.array_equal(after["actions"], _told(policy(), before, lived=True)) and after["plan"]["checkpoint"] == "new"
        with Talk(running.url) as newcomer:
            assert newcomer.metadata["checkpoint"] == "new"
        text = running.worker.metrics.text().decode()
        assert 'wam_reloads_total{result="loaded"} 1.0' in text and "wam_reloading 0.0" in text and "wam_ready 1.0" in text


def test_what_does_not_fit_or_cannot_be_read_is_refused_and_the_old_one_stays() -> None:
    wide = replace(_loaded(other()), contract=replace(Contract.of(other()), frame_stride=4, horizon=16))

    def broken() -> Loaded:
        raise RuntimeError("/secret/place is damaged")

    for load, state, says in ((lambda: wide, "refused", "horizon is 8, and would be 16"), (broken, "failed", "the server's log says more")):
        with serving(load=load) as running, Talk(running.url) as talk:
            first = talk.ask(observation(0, 0))["actions"]
            assert _ask(running, "POST")[0] == 202
            told = _until(running, state)
            assert says in told["why"] and "secret" not in told["why"]
            assert np.array_equal(talk.ask(observation(0, 1))["actions"], _told(policy(), [first], lived=True))
            assert f'wam_reloads_total{{result="{state}"}} 1.0' in running.worker.metrics.text().decode()
    assert differences(Contract.of(policy()), Contract.of(other()), MODE) == []
    assert "acts in" in differences(Contract.of(policy()), replace(Contract.of(other()), modes=("joint",)), MODE)[0]


def test_reloading_needs_the_key_comes_from_no_browser_and_one_at_a_time() -> None:
    key = {"Authorization": "Api-Key " + "k" * 24}
    hold = {"now": True}

    def slow() -> Loaded:
        while hold["now"]:
            time.sleep(0.005)
        return _loaded(other())

    with serving(load=slow, api_key="k" * 24) as running, Talk(running.url, additional_headers=key) as talk:
        assert _ask(running, "POST")[0] == 401 and _ask(running, "POST", Origin="http://evil", **key)[0] == 403
        assert _ask(running, "GET", **key)[1]["state"] == "running", "asking begins nothing"
        assert _ask(running, "POST", **key)[0] == 202 and _ask(running, "POST", **key)[0] == 409
        assert np.array_equal(talk.ask(observation(0, 0))["actions"], _told(policy(), [])), "plans go on meanwhile"
        assert get(running, "/readyz") == (200, "ready, and loading another checkpoint\n")
        assert "wam_reloading 1.0" in running.worker.metrics.text().decode(), "and a server that loads can stop"
    hold["now"] = False
    with serving() as running:
        assert _ask(running, "POST")[0] == 503

