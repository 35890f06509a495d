"""The robot's side: the same bytes as the server's, plans by time, holding and stopping, a fake server, the official openpi client."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import wam_client.wire as client_wire
from serving_tools import BLOCKS, MODE, Running, episode, observation, policy, serving
from tiny import TASKS
from wam_client import ChunkBroker, Observation, Plan, PolicyClient, PolicyError, ReplanningBroker, Watchdog
from wam_client.fake import FakePolicy, FakeServer

from wam.inference.session import Session
from wam.serving import wire

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving() as running:
        yield running


def _seen(block: int, at: float | None = None) -> Observation:
    frames, state = episode(0).at(block)
    return Observation(block / 10 if at is None else at, {"corner4": frames[0, -1]}, state[0])


def test_both_sides_write_and_read_the_same_bytes() -> None:
    for value in (observation(0, 1), {"a": np.float32(1.5), "b": [1, None, "x", True], "c": np.zeros((0, 3))}, np.arange(3)):
        assert client_wire.pack(value) == wire.pack(value)
        assert str(client_wire.unpack(wire.pack(value))) == str(wire.unpack(client_wire.pack(value)))
    for wrong in (np.array(["a"]), object()):
        with pytest.raises(TypeError, match="cannot be sent"):
            client_wire.pack(wrong)


def test_a_chunk_broker_is_a_session_in_process(server: Running) -> None:
    """Control step by control step, with a camera that shows each moment: the broker sends the frames that the model was trained on."""
    session, expected = Session(policy(), TASKS[:1], "metaworld", [0]), []
    for block in range(BLOCKS):
        if block:
            session.commit(expected[-1][None])
        session.observe(*episode(0).at(block))
        expected.append(session.plan(MODE).actions[0])
    stills = [episode(0).frames[0, 0], *episode(0).frames[0, 1:]]
    with PolicyClient(server.url, TASKS[0]) as client:
        broker, done = ChunkBroker(client), []
        for step in range(8 * BLOCKS):
            state = episode(0).states[0, step // 8]
            done.append(broker.step(Observation(123.0, {"corner4": stills[step // 2]}, state)))
        np.testing.assert_allclose(np.stack(done), np.concatenate(expected), rtol=1e-5, atol=1e-6)
        broker.reset()
        assert np.array_equal(broker.step(_seen(0)), done[0])


def test_errors_say_what_to_do_and_the_connection_comes_back(server: Running) -> None:
    with PolicyClient(server.url, timeout=5) as client:
        assert client.metadata["action_horizon"] == 8
        with pytest.raises(PolicyError, match="missing_key: the prompt is missing; send an instruction"):
            client.plan(_seen(0))
        with pytest.raises(PolicyError) as late:
            client.plan(_seen(0, 1.0), TASKS[0], deadline_ms=0)
        assert late.value.code == "deadline_expired" and late.value.retry
        assert client.observe(_seen(0, 1.0))["status"] == "observed"
        client._socket.socket.close()
        with pytest.raises(PolicyError) as lost:
            client.plan(_seen(1, 1.1), TASKS[0])
        assert lost.value.code == "connection_lost" and lost.value.retry
        assert client.plan(_seen(1, 1.1), TASKS[0]).valid_from == 1.1
    with pytest.raises(PolicyError, match="unreachable"):
        PolicyClient("ws://127.0.0.1:9", connect_for=0.2)


def test_a_plan_is_executed_by_the_clock() -> None:
    plan = Plan(np.arange(4)[:, None], 10.0, 0.5)
    assert [plan.action(t) for t in (9.9, 12.0, 99.0)] == [None] * 3 and plan.valid_until == 12.0
    assert [int(plan.action(t)[0]) for t in (10.0, 10.49, 10.5, 11.99)] == [0, 0, 1, 3] and plan.left(11.0) == 2


def test_a_watchdog_holds_and_then_stops_until_a_reset() -> None:
    now = [0.0]
    dog = Watchdog(0.1, 0.5, lambda: now[0])
    states = [dog.state()]
    dog.feed()
    for t in (0.1, 0.11, 0.5, 0.51):
        now[0] = t
        states.append(dog.state())
    dog.feed()
    assert [*states, dog.state()] == ["hold", "fresh", "hold", "hold", "stop", "stop"]
    dog.reset()
    dog.feed()
    assert dog.state() == "fresh"
    with pytest.raises(ValueError, match="0 < hold_s < stop_s"):
        Watchdog(1, 1)


def _look(client: PolicyClient, t: float) -> Observation:
    return Observation(t, {"front": np.zeros((8, 8, 3), np.uint8)}, np.zeros(8, np.float32))


class Held(FakePolicy):
    """Plans that come when the test says so."""

    def __init__(self) -> None:
        super().__init__(horizon=16, control_hz=50)
        self.may = threading.Event()
        self.messages: list[dict] = []

    def _reply(self, message: dict) -> object:
        self.messages.append(message)
        assert self.may.wait(10)
        return super()._reply(message)


def test_replanning_goes_on_while_plans_are_made_and_moves_on_from_what_was_decided() -> None:
    """A plan is asked for every 8 steps and comes 3 steps later; what is executed is the motion that every plan is a part of."""
    held = Held()
    with FakeServer(held) as fake, PolicyClient(fake.url, "go") as client:
        broker, actions = ReplanningBroker(client, delay_steps=4, watchdog=Watchdog(60, 120)), []
        for step in range(60):
            held.may.clear() if step % 8 == 0 else None
            actions.append(broker.step(_look(client, step / 50)))
            if step % 8 == 3:
                held.may.set()
                broker.join(10)
        held.may.set()
        broker.join(10)
        assert all(a is None for a in actions[:4]), "a step never waits, and nothing is made up"
        for step, action in enumerate(actions[4:], 4):
            np.testing.assert_allclose(action, 0.02 * np.sin(step / 50 + np.arange(8)), atol=1e-6)
        assert broker.error is None
    plans = [m for m in held.messages if m["endpoint"] == "plan"]
    assert [round(50 * m["timestamp"]) for m in plans] == [0, 8, 16, 24, 32, 40, 48, 56]
    for earlier, later in zip(plans[1:], plans[2:], strict=False):
        begin, now = round(50 * earlier["timestamp"]), round(50 * later["timestamp"])
        np.testing.assert_array_equal(later["executed"], np.stack(actions[begin:now]))
        np.testing.assert_array_equal(later["committed"], np.stack(actions[now : now + 4]))
        np.testing.assert_allclose(50 * later["frame_times"], range(begin + 1, now + 1))
        assert later["observation/front"].shape == (8, 8, 8, 3)
    assert plans[1]["gap"] is True and "executed" not in plans[1], "at first it held"


def test_without_fresh_plans_a_robot_holds_and_then_stops() -> None:
    with FakeServer(FakePolicy(horizon=4, control_hz=100, fail=0.0)) as fake, PolicyClient(fake.url, "go") as client:
        broker = ReplanningBroker(client, watchdog=Watchdog(0.3, 0.6))
        assert broker.step(_look(client, 0.0)) is None and broker.state == "hold", "nothing is made up before the first plan"
        broker.join(5)
        assert broker.step(_look(client, 0.01)) is not None and broker.state == "fresh"
        broker.join(5)
        fake.policy.fail = 1.0
        assert broker.step(_look(client, 9.0)) is None, "a plan whose time is over is not executed"
        broker.join(5)
        assert broker.error is not None and broker.error.code == "internal_error"
        time.sleep(0.65)
        assert broker.state == "stop" and broker.step(_look(client, 9.01)) is None
        requests = fake.policy.requests
        assert broker.step(_look(client, 9.02)) is None and fake.policy.requests == requests, "after a stop nothing is asked for"
        fake.policy.fail = 0.0
        broker.reset()
        broker.step(_look(client, 10.0))
        broker.join(5)
        assert broker.step(_look(client, 10.0)) is not None


def test_the_fake_server_is_as_strict_as_the_real_one() -> None:
    with FakeServer() as fake, PolicyClient(fake.url) as client:
        for seen, prompt, code in ((Observation(0, {}, np.zeros(8)), "go", "missing_key"), (_look(client, 0), None, "missing_key"), (Observation(0, {"front": np.zeros((8, 8, 3))}, np.zeros(8)), "go", "wrong_shape")):
            with pytest.raises(PolicyError) as error:
                client.plan(seen, prompt)
            assert error.value.code == code
        assert client.plan(_look(client, 0), "go").actions.shape == (16, 8)
    assert threading.active_count() < 20


def test_the_example_runs_dry() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "packages/wam-client/examples/arm.py"), "--dry-run", "--seconds", "1.5"],
        env={**os.environ, "PYTHONPATH": str(ROOT / "packages/wam-client")}, capture_output=True, text=True, timeout=60, check=False,
    )
    assert done.returncode == 0 and "actions" in done.stdout and not done.stdout.startswith("stopped"), done.stdout + done.stderr


OPENPI = """
import sys
import numpy as np
from openpi_client.action_chunk_broker import ActionChunkBroker
from openpi_client.websocket_client_policy import WebsocketClientPolicy

policy = WebsocketClientPolicy("127.0.0.1", int(sys.argv[1]))
frame = np.random.default_rng(0).integers(0, 255, (32, 48, 3), dtype=np.uint8)
seen = {"observation/image": frame, "observation/state": np.zeros(4, np.float32), "prompt": "open the drawer"}
horizon = policy.get_server_metadata()["action_horizon"]
broker = ActionChunkBroker(policy, horizon)
steps = [broker.infer(seen)["actions"] for _ in range(2 * horizon)]
assert all(a.shape == (4,) and a.dtype == np.float32 for a in steps)
try:
    policy.infer({"prompt": "nothing to see"})
except RuntimeError as error:
    assert "missing_key" in str(error), error
else:
    raise AssertionError("an error is to be raised")
assert "actions" in policy.infer(seen)
print("fine", horizon, float(np.abs(np.stack(steps)).sum()))
"""


@pytest.mark.skipif("OPENPI_PYTHON" not in os.environ, reason="set OPENPI_PYTHON to the python of an environment with openpi-client (it pins numpy<2): python -m venv env && env/bin/pip install openpi-client typing_extensions")
def test_openpis_own_client_works_unchanged(server: Running) -> None:
    done = subprocess.run([os.environ["OPENPI_PYTHON"], "-c", OPENPI, str(server.server.port)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0 and done.stdout.startswith("fine 8 "), done.stdout + done.stderr
