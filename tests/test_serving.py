"""The server on real sockets: dialects, sessions, batching, refusals, time, the gate, security, what it tells of itself."""

import asyncio
import http.client
import json
import logging
import shutil
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from serving_tools import BLOCKS, MODE, Running, Talk, episode, make_worker, observation, policy, serving
from tiny import TASKS
from websockets.exceptions import ConnectionClosed, InvalidStatus

from wam.inference.gate import GateConfig, GroupLimits
from wam.inference.session import Session
from wam.serving.memory import TimeRules
from wam.serving.options import ServeOptions, read_key
from wam.serving.wire import Limits, pack

CLOSE = dict(rtol=1e-3, atol=1e-4)
KEY = "k" * 24


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving(rate=1e4, burst=1000) as running:
        yield running


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "wam.serving")


def alone(robot: int, blocks: int = BLOCKS) -> list[np.ndarray]:
    """What a plain session plans for a robot that executes what it is told."""
    session, plans = Session(policy(), [TASKS[robot]], "metaworld", [100 + robot]), []
    for block in range(blocks):
        if block:
            session.commit(plans[-1][None])
        session.observe(*episode(robot).at(block))
        plans.append(session.plan(MODE).actions[0])
    return plans


def get(running: Running, path: str, **headers: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", running.server.port, timeout=10)
    connection.request("GET", path, headers=headers)
    response = connection.getresponse()
    return response.status, response.read().decode()


# ------------------------------------------------------------------------------------------------ plans


def test_a_robot_gets_what_a_session_in_process_plans(server: Running) -> None:
    expected = alone(0)
    with Talk(server.url) as talk:
        assert talk.metadata["action_horizon"] == 8 and talk.metadata["image_resolution"] == [32, 48]
        for block in range(BLOCKS):
            reply = talk.ask(observation(0, block))
            assert np.array_equal(reply["actions"], expected[block]) and reply["actions"].dtype == np.float32
            plan = reply["plan"]
            assert plan["valid_from"] == block / 10 and plan["valid_until"] == pytest.approx(block / 10 + 0.1) and plan["memory_blocks"] == block
            assert [key for key, value in reply.items() if isinstance(value, np.ndarray)] == ["actions"], "openpi's broker slices every array of a reply"
            assert ("prev_total_ms" in reply["server_timing"]) == (block > 0)


def test_interleaved_sessions_on_one_connection_and_a_session_on_two(server: Running) -> None:
    expected = [alone(0), alone(1)]
    with Talk(server.url) as first, Talk(server.url) as second:
        for block in range(BLOCKS):
            for robot in (0, 1):
                talk = (first, second)[(block + robot) % 2]
                reply = talk.ask(observation(robot, block, session_id=f"interleaved-{robot}"))
                assert np.array_equal(reply["actions"], expected[robot][block]) and reply["session_id"] == f"interleaved-{robot}"


def test_roboarena(server: Running) -> None:
    """No timestamps: each request comes after the whole plan; the reply is the array alone, and a reset is answered in text."""
    expected = alone(2)
    with Talk(server.url) as talk:
        for _ in range(2):
            for block in range(2):
                message = observation(2, block, endpoint="infer", session_id="arena")
                del message["timestamp"]
                reply = talk.ask(message)
                assert isinstance(reply, np.ndarray) and np.array_equal(reply, expected[block])
            assert talk.ask({"endpoint": "reset", "session_id": "arena"}) == "reset successful"


def test_what_waits_together_is_planned_together_and_as_if_alone() -> None:
    """Three robots whose messages arrive while the model is held up by the first batch, at different blocks."""
    expected = [alone(r) for r in range(3)]
    worker = make_worker(wait_s=0.2)
    with serving(worker) as running:
        talks = [Talk(running.url) for _ in range(3)]
        sizes = []
        for tick in range(BLOCKS + 2):
            here = [r for r in range(3) if 0 <= tick - r < BLOCKS]
            for r in here:
                talks[r].send(observation(r, tick - r))
            for r in here:
                reply = talks[r].receive()
                np.testing.assert_allclose(reply["actions"], expected[r][tick - r], **CLOSE)
                sizes.append(reply["server_timing"]["batch"])
        assert max(sizes) == 3
        for talk in talks:
            talk.socket.close()


def test_observations_without_plans_and_planning_ahead(server: Running) -> None:
    """Frames come one by one; a plan is asked for with what is left of the one before held as committed."""
    with Talk(server.url) as talk:
        first = talk.ask(observation(0, 0, endpoint="plan", request_id="a"))
        assert first["request_id"] == "a"
        seen, state = episode(0).at(1)
        for i, frame in enumerate(seen[0][:2]):
            reply = talk.ask({"endpoint": "observe", "observation/corner4": frame, "observation/state": state[0], "timestamp": 2 * (i + 1) / 80})
            assert reply["status"] == "observed" and reply["step"] == 2 * (i + 1)
        again = talk.ask({"endpoint": "plan", "observation/corner4": seen[0][1], "observation/state": state[0], "timestamp": 4 / 80, "commit_steps": 3})
        np.testing.assert_allclose(again["actions"][:3], first["actions"][4:7], atol=1e-5)
        assert not np.allclose(again["actions"][3], first["actions"][7])
        error = talk.error({"endpoint": "plan", "observation/corner4": seen[0][1], "observation/state": state[0], "timestamp": 11 / 80, "commit_steps": 3})
        assert error["code"] == "bad_value" and "fewer actions left" in error["message"]


# ------------------------------------------------------------------------------------------------ refusals


def test_refusals_leave_the_session_as_it_was(server: Running) -> None:
    expected = alone(0, 2)
    with Talk(server.url) as talk:
        assert np.array_equal(talk.ask(observation(0, 0))["actions"], expected[0])
        for message, code in (
            ({**observation(0, 1), "observation/state": np.full(4, np.nan, np.float32)}, "not_finite"),
            (observation(0, 1, mode="joit"), "unknown_mode"),
            (observation(0, 1, embodiment="yam"), "unknown_embodiment"),
            ({"prompt": "x"}, "missing_key"),
            (b"\x00garbage", "bad_message"),
            ("text", "bad_message"),
            (observation(0, 1, timestamp=-1.0), "stale_observation"),
            (observation(0, 1, deadline_ms=0), "deadline_expired"),
        ):
            error = talk.error(message)
            assert error["code"] == code and error["remedy"] and "Traceback" not in json.dumps(error)
        assert np.array_equal(talk.ask(observation(0, 1))["actions"], expected[1])
        assert talk.error({**observation(0, 2), "endpoint": "plan", "timestamp": 0.0, "request_id": 9})["code"] == "stale_observation"
    with Talk(server.url) as talk:
        message = observation(0, 0)
        del message["prompt"]
        assert talk.error(message)["code"] == "missing_key"


def test_a_bug_of_ours_is_told_as_a_number_and_costs_one_robot_only(caplog: pytest.LogCaptureFixture) -> None:
    """A session that fails in a batch: the other robot is planned for all the same."""
    worker = make_worker(wait_s=0.5)
    caplog.set_level(logging.CRITICAL, "wam.serving.worker")
    with serving(worker) as running, Talk(running.url) as good, Talk(running.url) as bad:
        for talk, robot in ((good, 0), (bad, 1)):
            talk.ask(observation(robot, 0, session_id=f"bug-{robot}"))
        broken = running.server.store.entries["session bug-1"]
        assert broken.session is not None
        broken.session.generators = [None]  # type: ignore[list-item]
        expected = alone(0)[1]
        good.send(observation(0, 1, session_id="bug-0"))
        bad.send(observation(1, 1, session_id="bug-1"))
        reply = good.receive()
        assert reply["actions"].shape == expected.shape and bad.receive()["actions"].shape == expected.shape
        good_again = good.ask(observation(0, 2, session_id="bug-0"))
        assert good_again["plan"]["memory_blocks"] >= 1
        worker._think = None  # type: ignore[assignment]
        error = good.error(observation(0, 3, session_id="bug-0"))
        assert error["code"] == "internal_error" and "number" in error["message"] and "NoneType" not in json.dumps(error)


def test_late_plans_are_not_sent_and_pings_are_answered_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = make_worker()
    with serving(worker) as running, Talk(running.url) as talk:
        talk.ask(observation(0, 0))
        plan, release = Session.plan, threading.Event()

        def slow(self: Session, *args: Any, **more: Any) -> Any:
            release.wait(5)
            return plan(self, *args, **more)

        monkeypatch.setattr(Session, "plan", slow)
        talk.send(observation(0, 1, deadline_ms=50))
        start = time.monotonic()
        assert talk.socket.ping().wait(2), "a ping is answered while the model works"
        assert get(running, "/healthz") == (200, "OK\n") and time.monotonic() - start < 2
        time.sleep(0.1)
        release.set()
        assert talk.receive()["error"]["code"] == "deadline_expired"
        assert "wam_deadline_misses_total 1.0" in get(running, "/metrics")[1]
        monkeypatch.undo()
        assert "actions" in talk.ask(observation(0, 2))


def test_the_gate_stands_between_model_and_wire() -> None:
    limits = GroupLimits("all", 0, 4, low=(-1e-3,), high=(1e-3,))
    for otherwise, codes in (("raise", ["gate_refused", "gate_refused"]), ("stop", ["stopped", "stopped"])):
        with serving(make_worker(GateConfig((limits,), otherwise))) as running, Talk(running.url) as talk:
            assert [talk.error(observation(0, block))["code"] for block in range(2)] == codes
            assert talk.ask({"endpoint": "reset_session"})["status"] == "reset"
            assert 'wam_gate_actions_total{reason="position"}' in get(running, "/metrics")[1]
    speed = float(np.sort(np.abs(np.diff(alone(0)[0], axis=0)).max(axis=1))[-2] * 80 * 1.001)
    with serving(make_worker(GateConfig((GroupLimits("all", 0, 4, velocity=speed),)))) as running, Talk(running.url) as talk:
        reply = talk.ask(observation(0, 0, endpoint="plan"))
        cut = reply["plan"]["cut"]
        assert cut["reason"] == "velocity" and len(reply["actions"]) == cut["step"] and np.array_equal(reply["actions"], alone(0)[0][: cut["step"]])
        assert reply["plan"]["valid_until"] == pytest.approx(cut["step"] / 80)
        talk.ask({"endpoint": "reset_session"})
        assert talk.error(observation(0, 0))["code"] == "gate_refused", "openpi's clients take whole plans"


# ------------------------------------------------------------------------------------------------ sessions


def test_sessions_are_restored_reset_expired_and_evicted() -> None:
    expected = [alone(0), alone(1)]
    with serving(max_sessions=2, spare_s=3600.0, idle_s=7200.0) as running:
        with Talk(running.url) as talk:
            talk.ask(observation(0, 0, session_id="a"))
        with Talk(running.url) as talk:
            assert np.array_equal(talk.ask(observation(0, 1, session_id="a"))["actions"], expected[0][1]), "restored on another connection"
            talk.ask(observation(1, 0, session_id="b"))
            assert talk.error(observation(1, 0, session_id="c"))["code"] == "too_many_sessions"
            assert talk.error(observation(1, 0))["code"] == "too_many_sessions"
            running.server.store.spare_s = 0.0
            assert np.array_equal(talk.ask(observation(1, 1, session_id="b"))["actions"], expected[1][1])
            assert np.array_equal(talk.ask(observation(0, 0, session_id="c"))["actions"], expected[0][0]), "a, unused for longest, made room"
            assert set(running.server.store.entries) == {"session b", "session c"}
            assert np.array_equal(talk.ask(observation(1, 2, session_id="b"))["actions"], expected[1][2])
            assert talk.ask({"endpoint": "reset", "session_id": "b"}) == "reset successful"
            assert np.array_equal(talk.ask(observation(1, 0, session_id="b"))["actions"], expected[1][0])
        assert running.server.store.expire(time.monotonic() + 7201) == ["session c", "session b"]
        with Talk(running.url) as talk:
            talk.ask(observation(0, 0))
            assert len(running.server.store.entries) == 1
        until = time.monotonic() + 5
        while running.server.store.entries and time.monotonic() < until:
            time.sleep(0.01)
        assert not running.server.store.entries, "without a session_id it ends with its connection"


def test_a_client_that_dies_or_does_not_read_disturbs_nobody(server: Running) -> None:
    expected = alone(0)
    dead, deaf = Talk(server.url), Talk(server.url)
    with Talk(server.url) as talk:
        for block in range(BLOCKS):
            if block == 1:
                dead.send(observation(1, 0, session_id="dead"))
                dead.socket.socket.close()  # as a kill -9 does: no goodbye
            for _ in range(3):
                deaf.send(observation(2, 0))
            np.testing.assert_allclose(talk.ask(observation(0, block))["actions"], expected[block], **CLOSE)
    deaf.socket.socket.close()


# ------------------------------------------------------------------------------------------------ who may come, and how much


def test_without_the_key_there_is_nothing_but_health(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "wam.serving")
    with serving(api_key=KEY) as running:
        for header in (None, "Api-Key " + "x" * 24, "Api-Key ", KEY, f"Basic {KEY}", "Api-Key \u00e9"):
            with pytest.raises(InvalidStatus) as refused:
                Talk(running.url, additional_headers={} if header is None else {"Authorization": header})
            assert refused.value.response.status_code == 401
        for scheme in ("Api-Key", "Bearer"):
            with Talk(running.url, additional_headers={"Authorization": f"{scheme} {KEY}"}) as talk:
                assert "actions" in talk.ask(observation(0, 0))
        assert get(running, "/healthz")[0] == 200 and get(running, "/readyz")[0] == 200 and get(running, "/metrics")[0] == 401
        assert get(running, "/metrics", Authorization=f"Api-Key {KEY}")[0] == 200
    assert KEY not in caplog.text and KEY not in repr(running.options)
    with pytest.raises(ValueError, match="anyone could move the robot; give it an API key"):
        ServeOptions(host="0.0.0.0")
    with pytest.raises(ValueError, match="at least 16"):
        ServeOptions(api_key="short")


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
def test_tls(tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", key, "-out", cert, "-days", "1", "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"], check=True, capture_output=True)
    with serving(certificate=cert, private_key=key) as running:
        trusting = ssl.create_default_context(cafile=str(cert))
        with Talk(running.url.replace("ws:", "wss:"), ssl=trusting) as talk:
            assert "actions" in talk.ask(observation(0, 0))
        with pytest.raises(ssl.SSLCertVerificationError):
            Talk(running.url.replace("ws:", "wss:"))
    key.write_text("no key")
    with pytest.raises(ValueError, match="are no certificate and private key"):
        ServeOptions(certificate=cert, private_key=key).tls()


def test_a_key_file_is_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text(f"{KEY}\n")
    path.chmod(0o600)
    assert read_key(path) == KEY
    path.chmod(0o644)
    with pytest.raises(ValueError, match="can be read by others; chmod 600"):
        read_key(path)


def test_browsers_and_crowds_are_kept_out() -> None:
    with serving(max_connections=1, rate=0.001, burst=2, limits=Limits(message_bytes=20_000)) as running:
        with pytest.raises(InvalidStatus):
            Talk(running.url, origin="http://evil.example")
        with Talk(running.url) as talk:
            with pytest.raises(InvalidStatus) as full:
                Talk(running.url)
            assert full.value.response.status_code == 503
            assert [talk.error({"prompt": "x"})["code"] for _ in range(3)] == ["missing_key", "missing_key", "rate_limited"]
            talk.send(b"\0" * 20_001)
            with pytest.raises(ConnectionClosed) as closed:
                talk.receive()
            assert closed.value.rcvd is not None and closed.value.rcvd.code == 1009


def test_what_it_tells_of_itself(server: Running) -> None:
    with Talk(server.url) as talk:
        talk.ask(observation(0, 0))
        talk.error({})
        text = get(server, "/metrics")[1]
    for line in ('wam_stage_seconds_bucket{le="0.01",stage="denoise"}', 'wam_errors_total{code="missing_key"}', "wam_sessions ", "wam_queue_length 0.0", "wam_ready 1.0", "wam_batch_size_count", "wam_deadline_misses_total"):
        assert line in text, line
    assert get(server, "/nothing")[0] == 426 or get(server, "/nothing")[0] == 400


def test_it_is_ready_once_it_has_planned_and_stops_when_what_is_asked_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    worker, warm = make_worker(), threading.Event()
    warm_up = worker.warm_up
    monkeypatch.setattr(worker, "warm_up", lambda *loaded: (warm.wait(10), warm_up(*loaded)))
    running = Running(worker, ServeOptions(port=0, grace_s=5.0))
    running._thread.start()
    until = time.monotonic() + 10
    while time.monotonic() < until and not (hasattr(running, "server") and running.server.server is not None):
        time.sleep(0.01)
    assert get(running, "/readyz")[0] == 503 and get(running, "/healthz")[0] == 200
    talks: list[Talk] = []
    early = threading.Thread(target=lambda: talks.append(Talk(running.url)))
    early.start()
    warm.set()
    early.join(10)
    assert get(running, "/readyz")[0] == 200
    plan, begun = Session.plan, threading.Event()

    def slow(self: Session, *args: Any, **more: Any) -> Any:
        begun.set()
        time.sleep(0.3)
        return plan(self, *args, **more)

    monkeypatch.setattr(Session, "plan", slow)
    talks[0].send(observation(0, 0))
    assert begun.wait(5)
    running.loop.call_soon_threadsafe(running.stopping.set)
    assert "actions" in talks[0].receive(), "what is in flight is finished"
    with pytest.raises(ConnectionClosed):
        talks[0].receive()
    running._thread.join(10)
    assert not running._thread.is_alive() and running.error is None


def test_a_model_that_cannot_plan_never_becomes_ready(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "wam.serving.worker")
    worker = make_worker()
    monkeypatch.setattr(worker, "warm_up", lambda *loaded: (_ for _ in ()).throw(torch.OutOfMemoryError("no room")))
    with pytest.raises(RuntimeError, match="could not be warmed up: no room"):
        Running(worker, ServeOptions(port=0)).start()


def test_clients_clocks_and_rules_reach_the_memory() -> None:
    """Clients without timestamps that execute half of each plan; a block is told once two of their messages came."""
    with serving(times=TimeRules(clock="steps", execute=4, tolerance=1.0)) as running, Talk(running.url) as talk:
        steps = []
        for _ in range(3):
            message = observation(0, 0)
            del message["timestamp"]
            steps.append(talk.ask(message)["plan"]["step"])
        assert steps == [0, 4, 8]


def test_messages_are_read_off_the_event_loop(server: Running) -> None:
    """A message of many megabytes is decoded while others are answered."""
    big = pack({"junk": [np.zeros(4 << 20, np.uint8) for _ in range(6)]})
    with Talk(server.url) as heavy, Talk(server.url) as light:
        heavy.send(big)
        assert light.socket.ping().wait(5)
        assert heavy.receive()["error"]["code"] == "missing_key"
    assert asyncio.run_coroutine_threadsafe(asyncio.sleep(0, "alive"), server.loop).result(5) == "alive"
