"""The page that watches a server: what it shows, to whom, and that it costs the robots nothing."""

import http.client
import json
import re
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from urllib.parse import urlencode

import numpy as np
import pytest
import torch
from browser import Browser, chromium
from serving_tools import BLOCKS, Running, Talk, observation, policy, serving
from test_serving import alone

from wam.serving import live as live_module
from wam.serving.events import Event, Observed, Planned
from wam.serving.live import REPLY_BYTES, RING_BYTES, Live, picture
from wam.serving.page import page

KEY = "k" * 24
ROBOT = "session arm"


def get(running: Running, path: str, **headers: str) -> tuple[int, str, dict[str, str]]:
    connection = http.client.HTTPConnection("127.0.0.1", running.server.port, timeout=10)
    connection.request("GET", path, headers=headers)
    response = connection.getresponse()
    return response.status, response.read().decode(), dict(response.getheaders())


class Watcher:
    """What the page's script does, without a browser."""

    def __init__(self, running: Running, robot: str = ROBOT, name: str = "w"):
        self.running, self.robot, self.name = running, robot, name
        self.after, self.run = 0, ""
        self.events: list[dict[str, Any]] = []
        self.state: dict[str, Any] = {}

    def ask(self) -> list[dict[str, Any]]:
        """The events since the last question."""
        status, text, _ = get(self.running, "/live?" + urlencode({"watcher": self.name, "robot": self.robot, "after": self.after, "run": self.run}), **{"X-Wam-Live": "1"})
        assert status == 200, text
        self.state = json.loads(text)
        self.after, self.run = self.state["cursor"], self.state["run"]
        self.events += self.state["events"]
        return self.state["events"]

    def until(self, found: Callable[[list[dict[str, Any]]], bool]) -> list[dict[str, Any]]:
        """Ask until the events so far are as wanted."""
        end = time.monotonic() + 20
        while not found(self.events):
            assert time.monotonic() < end, [e["type"] for e in self.events]
            self.ask()
        return self.events


def of(events: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [event for event in events if event["type"] == kind]


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving(rate=1e4, burst=1000) as running:
        yield running


# ------------------------------------------------------------------------------------------------ what is told


def test_frames_actions_and_what_was_imagined_beside_what_came(server: Running) -> None:
    watcher = Watcher(server)
    watcher.ask()
    with Talk(server.url) as talk:
        for block in range(3):
            reply = talk.ask(observation(0, block, session_id="arm", mode="joint"))
            watcher.until(lambda events, n=block + 1: len(of(events, "imagined")) >= n)  # type: ignore[misc]
            time.sleep(live_module.IMAGINED_S)
    events = watcher.until(lambda events: len(of(events, "came")) >= 4)
    plans, actions, seen, imagined, came = (of(events, kind) for kind in ("plan", "actions", "seen", "imagined", "came"))
    assert [p["step"] for p in plans] == [0, 8, 16] and all(p["total"] >= p["stages"]["denoise"] > 0 and p["batch"] == 1 for p in plans)
    np.testing.assert_allclose(actions[-1]["passed"], reply["actions"], rtol=1e-4)
    np.testing.assert_allclose(seen[1]["executed"], actions[0]["passed"])
    assert imagined[0]["steps"] == [2, 4, 6, 8] and imagined[0]["source"] == "joint/2" and len(imagined[0]["pictures"]) == 4
    assert [(c["plan"], c["index"]) for c in came[:4]] == [(imagined[0]["plan"], i) for i in range(4)]
    frames = observation(0, 1)["observation/corner4"]
    assert [c["picture"] for c in came[:4]] == [picture(frame) for frame in frames], "what came is what was sent"
    robot = next(r for r in watcher.state["robots"] if r["key"] == ROBOT)
    assert robot["plans"] == 3 and robot["step"] == 16 and watcher.state["counts"]["batch"]["+Inf"] >= 3


def test_others_robots_are_told_as_numbers_alone(server: Running) -> None:
    watcher = Watcher(server, robot="session another")
    watcher.ask()
    with Talk(server.url) as talk:
        talk.ask(observation(0, 0, session_id="arm-2", mode="joint"))
        assert talk.error(observation(0, 1, session_id="arm-2", deadline_ms=0))["code"] == "deadline_expired"
    events = watcher.until(lambda events: bool(of(events, "refused")))
    assert {e["type"] for e in events} == {"plan", "refused"} and "picture" not in json.dumps(events)
    assert watcher.state["counts"]["errors"]["deadline_expired"] >= 1


def test_nothing_is_gathered_while_nobody_watches() -> None:
    with serving() as running, Talk(running.url) as talk:
        live = running.server.live
        assert live is not None
        talk.ask(observation(0, 0, mode="joint"))
        assert live.last == 0 and not running.worker.watchers and live._thread is None
        Watcher(running).ask()
        assert running.worker.watchers == [live] and live.watched
        talk.ask(observation(0, 1, mode="joint"))
        drain(live)
        assert live.last > 0
        live._until, count = 0.0, live.last  # as if its last question had been long ago
        talk.ask(observation(0, 2, mode="joint"))
        running.loop.call_soon_threadsafe(running.server.hear)
        talk.ask(observation(0, 3, mode="joint"))
        drain(live)
        assert live.last == count and not running.worker.watchers


def test_what_skip_leads_to_is_imagined_only_when_asked_and_changes_no_plan() -> None:
    expected = alone(0)
    for asked in (False, True):
        with serving(watch_imagined=asked) as running, Talk(running.url) as talk:
            watcher = Watcher(running)
            watcher.ask()
            for block in range(BLOCKS):
                reply = talk.ask(observation(0, block, session_id="arm"))
                assert np.array_equal(reply["actions"], expected[block])
                if asked and block == 0:
                    watcher.until(lambda events: bool(of(events, "imagined")))
            events = watcher.until(lambda events: len(of(events, "plan")) == BLOCKS)
            assert {e["source"] for e in of(events, "imagined")} == ({"forward/2"} if asked else set())


# ------------------------------------------------------------------------------------------------ bounds


def seen(key: str, step: int, frame: np.ndarray) -> Observed:
    return Observed(key, step, step - 1, (float(step),), frame[None], None, np.zeros((1, 4), np.float32), np.zeros((1, 4), np.float32), "x", "client", None)


def planned(key: str, step: int, plan: str) -> Planned:
    config, nothing = policy().config, np.zeros((8, 4), np.float32)
    latents = torch.zeros(config.codec.channels, config.timeline.latents_per_block, *policy().model.latent_size)
    timing = {"server_timing": {"decode_ms": 1.0, "queue_ms": 1.0, "infer_ms": 1.0, "batch": 1}, "policy_timing": {"infer_ms": 1.0, "denoise_ms": 1.0}}
    about = {"plan": {"id": plan, "interventions": {}, "cut": None, "memory_blocks": 1}, **timing}
    return Planned(key=key, step=step, mode="joint", steps=2, seed=0, committed=0, made=nothing, passed=nothing, imagined=latents, goal=None, about=about)


def drain(live: Live) -> None:
    """Until everything that was told is dealt with."""
    end, calm = time.monotonic() + 20, 0
    while calm < 5:
        assert time.monotonic() < end
        last = live.last
        time.sleep(0.02)
        calm = calm + 1 if live._queue.empty() and live.last == last else 0


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A flood: what there is no room for is dropped and counted, the oldest leave the ring, a reply holds the newest that fit."""
    monkeypatch.setattr(live_module, "FRAME_S", 0.0)
    live = Live(policy, lambda: False)
    live.attend("w", "r")
    frame = np.random.default_rng(0).integers(0, 256, (live_module.LONG_SIDE, live_module.LONG_SIDE, 3), np.uint8)
    size = len(picture(frame))
    for step in range(4 * live_module.MOST_QUEUED):
        live(seen("r", step, frame))
    assert live.dropped > 0 and live._queue.qsize() <= live_module.MOST_QUEUED
    while live.last * size < 2 * RING_BYTES:
        drain(live)
        for step in range(live_module.MOST_QUEUED):
            live(seen("r", step, frame))
    drain(live)
    assert RING_BYTES - 2 * size < live.held <= RING_BYTES
    reply = live._reply("r", 1, {"robots": []})
    told = json.loads(reply)
    assert len(reply) < REPLY_BYTES + 1000 and told["events"][-1]["n"] == told["cursor"] == live.last and told["missed"] > 0
    assert len(live._reply("another", 0, {})) < 1000
    live.close()


def test_imagined_pictures_wait_for_the_model_to_rest_and_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_module, "REST_S", 0.02)
    monkeypatch.setattr(live_module, "IMAGINED_S", 0.0)
    busy = [True]
    live = Live(policy, lambda: busy[0])
    live.attend("w", "r")
    live(planned("r", 0, "first"))
    end = time.monotonic() + 10
    while live.unseen == 0:
        assert time.monotonic() < end
        time.sleep(0.01)
    busy[0] = False
    live(planned("r", 8, "second"))
    while not of(json.loads(live._reply("r", 0, {}))["events"], "imagined"):
        assert time.monotonic() < end
        time.sleep(0.01)
    assert [e["plan"] for e in of(json.loads(live._reply("r", 0, {}))["events"], "imagined")] == ["second"] and live.unseen == 1
    live.close()


def test_what_cannot_be_shown_does_not_end_the_rest(caplog: pytest.LogCaptureFixture) -> None:
    live = Live(policy, lambda: False)
    live.attend("w", "r")
    broken: Event = replace(planned("r", 0, "x"), imagined=torch.zeros(2))
    live(broken)
    live(seen("r", 8, np.zeros((32, 48, 3), np.uint8)))
    drain(live)
    assert "could not be shown" in caplog.text and of(json.loads(live._reply("r", 0, {}))["events"], "seen")
    live.close()


def test_a_watcher_that_never_reads_is_dropped(server: Running) -> None:
    """It holds up nobody, and a few seconds later nothing is left of it."""
    live = server.server.live
    assert live is not None
    big = json.dumps({"n": 1, "type": "noise", "x": "x" * (REPLY_BYTES - 1000)}).encode()
    with live._lock:
        live.last += 1
        live._ring.append((live.last, "greedy", big))
        live._held += len(big)
    assert server.server.server is not None
    idle = len(server.server.server.handler_tasks)
    deaf = []
    for i in range(3):
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", server.server.port))
        client.sendall(f"GET /live?watcher=deaf{i}&robot=greedy&after=0 HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Wam-Live: 1\r\n\r\n".encode())
        deaf.append(client)
    time.sleep(0.5)
    with Talk(server.url) as talk:
        assert talk.ask(observation(1, 0))["actions"].shape == (8, 4)
    end = time.monotonic() + 15
    while len(server.server.server.handler_tasks) > idle:
        assert time.monotonic() < end, "connections of watchers that do not read stay for ever"
        time.sleep(0.05)
    for client in deaf:
        client.close()


def test_watchers_and_their_questions_are_counted(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_module, "MOST_WATCHERS", 0)
    path = "/live?watcher=one-more&robot=&after=0"
    status, text, _ = get(server, path, **{"X-Wam-Live": "1"})
    assert status == 503 and "close one" in text
    for strange in ("/live", "/live?watcher=a&after=x", "/live?watcher=" + "a" * 300, "/live?watcher=a&after=-1"):
        assert get(server, strange, **{"X-Wam-Live": "1"})[0] == 400


# ------------------------------------------------------------------------------------------------ who may see


def test_without_the_key_nothing_is_shown() -> None:
    with serving(api_key=KEY) as running:
        with Talk(running.url, additional_headers={"Authorization": f"Api-Key {KEY}"}) as talk:
            talk.ask(observation(0, 0, session_id="secret-arm"))
        path = "/live?watcher=w&robot=&after=0"
        for header in ({}, {"Authorization": "Api-Key " + "x" * 24}, {"Authorization": KEY}):
            status, text, _ = get(running, path, **{"X-Wam-Live": "1", **header})
            assert status == 401 and "secret-arm" not in text
        status, text, _ = get(running, path, **{"X-Wam-Live": "1", "Authorization": f"Api-Key {KEY}"})
        assert status == 200 and "secret-arm" in text and KEY not in text
        status, text, _ = get(running, "/")
        assert status == 200 and text.encode() == page()[0], "the page is the same for everybody, and holds nothing of the server"


def test_pages_from_elsewhere_may_not_ask(server: Running) -> None:
    path, mine = "/live?watcher=w&robot=&after=0", {"X-Wam-Live": "1"}
    assert get(server, path, **mine)[0] == 200
    assert get(server, path, **mine, Host=f"localhost:{server.server.port}")[0] == 200
    for headers in (
        {},  # what a page from elsewhere can send without being let
        {**mine, "Origin": "http://evil.example"},
        {**mine, "Sec-Fetch-Site": "cross-site"},
        {**mine, "Sec-Fetch-Site": "same-site"},
        {**mine, "Host": f"evil.example:{server.server.port}"},  # its name was pointed at this machine
    ):
        status, text, told = get(server, path, **headers)
        assert status == 403 and "robots" not in text and "Access-Control-Allow-Origin" not in told


def test_the_page_is_one_file_that_may_ask_its_server_alone(server: Running) -> None:
    status, text, headers = get(server, "/")
    assert status == 200 and headers["Content-Type"].startswith("text/html") and headers["X-Content-Type-Options"] == "nosniff"
    rules = dict(part.strip().split(" ", 1) for part in headers["Content-Security-Policy"].split(";"))
    assert rules["default-src"] == "'none'" and rules["connect-src"] == "'self'" and rules["img-src"] == "data:" and "unsafe" not in str(rules)
    assert rules["frame-ancestors"] == rules["form-action"] == rules["base-uri"] == "'none'"
    assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)", text) and "innerHTML" not in text and " style=" not in text and " onclick" not in text
    with serving(page=False) as running:
        assert get(running, "/")[0] == 426 and get(running, "/live?watcher=w", **{"X-Wam-Live": "1"})[0] == 426


# ------------------------------------------------------------------------------------------------ a browser


@pytest.mark.skipif(chromium() is None, reason="there is no Chromium on this machine")
def test_in_a_browser() -> None:
    """A key, a wrong one first; frames, imagined and came, curves; names are text; pause; another robot by the keyboard; nobody else is asked."""
    rude = "<img src=x onerror=document.title='owned'>"
    with serving(api_key=KEY, rate=1e4, burst=1000) as running, Talk(running.url, additional_headers={"Authorization": f"Api-Key {KEY}"}) as talk, Browser(900, 700) as browser:
        base = f"http://127.0.0.1:{running.server.port}/"
        browser.open(base)
        browser.until("!document.querySelector('#login').hidden")
        assert browser.run("document.querySelector('#all').hidden") and "arm" not in browser.run("document.body.innerText")
        enter = "document.querySelector('#key').value = '{}'; document.querySelector('#login button').click(); 1"
        browser.run(enter.format("wrong-key-wrong-key"))
        browser.until("document.querySelector('#wrong').textContent.includes('not the key')")
        assert browser.run("document.querySelector('#all').hidden")
        browser.run(enter.format(KEY))
        browser.until("document.querySelector('#status').dataset.state === 'live' && !document.querySelector('#all').hidden")
        assert browser.run("localStorage.length + sessionStorage.length + document.cookie.length") == 0 and KEY not in browser.run("document.documentElement.outerHTML")

        talk.ask(observation(0, 0, session_id="arm", mode="joint"))
        browser.until("document.querySelector('#robots button[aria-current=true] b')?.textContent === 'arm'")
        talk.ask({**observation(1, 0, session_id="an arm", mode="joint"), "prompt": rude})
        for block in range(1, 4):
            time.sleep(live_module.IMAGINED_S)
            talk.ask(observation(0, block, session_id="arm", mode="joint"))
        pair = "[...document.querySelectorAll('#pairs .pair')].find(p => p.querySelectorAll('img.dreamt').length === 4 && p.querySelectorAll('img.real').length === 4)"
        browser.until(f"!!{pair}")
        assert browser.run(f"(p => p.querySelector('img.dreamt').src !== p.querySelector('img.real').src && p.querySelector('img.real').naturalWidth)({pair})") == 48
        browser.until("document.querySelector('#camera').naturalWidth === 48 && document.querySelectorAll('#actions .chart path.done[d]').length === 4")
        assert browser.run("document.querySelectorAll('#stages tbody tr').length") > 4 and browser.run("document.querySelectorAll('#bars rect').length") > 4
        assert rude in browser.run("document.querySelector('#robots').innerText") and browser.run("document.title") == "wam serve"

        browser.run("document.querySelector('#robots button[aria-current=true]').focus()")
        browser.press("ArrowUp")
        browser.until("document.activeElement.textContent.startsWith('an arm') && document.activeElement.getAttribute('aria-current') === 'true'")
        browser.run("document.activeElement.blur()")
        browser.press(" ")
        assert browser.until("document.querySelector('#status').dataset.state") == "paused"
        time.sleep(0.3)
        count = len(browser.asked)
        talk.ask(observation(0, 0, session_id="unseen"))
        time.sleep(0.5)
        assert "unseen" not in browser.run("document.body.innerText") and len(browser.asked) == count
        browser.press(" ")
        browser.until("document.body.innerText.includes('unseen')")

        browser.size(380, 700)
        assert browser.run("document.documentElement.scrollWidth <= innerWidth"), "something is wider than a telephone"
        assert all(address.startswith(base) for address in browser.asked), browser.asked
        assert not [p for p in browser.problems if "401" not in p], browser.problems
        assert browser.run("fetch('http://localhost:9/').then(() => 'asked', () => 'refused')") == "refused"
        assert any("Content Security Policy" in p for p in browser.problems), "the browser refused it, not the network"
