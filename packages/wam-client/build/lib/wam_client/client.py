"""A connection to a policy server: observations in, plans out, and errors that say what to do.

A plan's actions are for control steps from the moment of the observation it rests on: action i is for `valid_from + i * control_dt`, on
the clock of the observations' timestamps.  Which one a robot should execute now is thus a matter of the time alone.
"""

from __future__ import annotations

import json
import threading
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from websockets.exceptions import ConnectionClosed, WebSocketException
from websockets.sync.client import connect

from wam_client.wire import pack, unpack

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 5.0
HOPELESS = (401, 403, 404)  # answers to a handshake that trying again does not change


class PolicyError(Exception):
    """The server, or the way to it, has no plan; hold."""

    def __init__(self, code: str, message: str, remedy: str = "hold", retry: bool = False):
        super().__init__(f"{code}: {message}; {remedy}")
        self.code, self.message, self.remedy, self.retry = code, message, remedy, retry


@dataclass(frozen=True)
class Observation:
    """What a robot sees at a moment.

    Attributes:
        time: seconds, on any clock that only rises, such as time.monotonic().
        images: uint8 (height, width, 3) by the camera's name, in red, green, blue.
        state: (d,), or by group.
    """

    time: float
    images: dict[str, np.ndarray]
    state: Any = None

    def message(self) -> dict[str, Any]:
        """As it is sent."""
        out: dict[str, Any] = {"observation/" + name: np.asarray(image) for name, image in self.images.items()}
        if isinstance(self.state, dict):
            out.update({"observation/" + name: np.asarray(value, np.float32) for name, value in self.state.items()})
        elif self.state is not None:
            out["observation/state"] = np.asarray(self.state, np.float32)
        out["timestamp"] = float(self.time)
        return out


@dataclass(frozen=True)
class Plan:
    """Actions (n, d) for control steps from `valid_from` on."""

    actions: np.ndarray
    valid_from: float
    control_dt: float
    reply: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def imagined(self) -> np.ndarray | None:
        """Pictures that the plan imagines, uint8 (frames, height, width, 3), where they were asked for."""
        told = self.reply.get("imagined")
        return None if told is None else np.array(told["frames"])

    @property
    def surprise(self) -> dict[str, Any] | None:
        """How far what came of the plan before was from what it imagined, where the server compares them."""
        return self.reply.get("surprise")

    @property
    def valid_until(self) -> float:
        """When the last action is over."""
        return self.valid_from + len(self.actions) * self.control_dt

    def index(self, now: float) -> int:
        """Which action is for this moment; below 0 or beyond the last: none."""
        return int(np.floor((now - self.valid_from) / self.control_dt + 1e-6))

    def action(self, now: float) -> np.ndarray | None:
        """The action for this moment, or None: the plan is stale, or not yet valid."""
        i = self.index(now)
        return self.actions[i] if 0 <= i < len(self.actions) else None

    def left(self, now: float) -> int:
        """Actions that are still to be executed."""
        return max(0, len(self.actions) - max(0, self.index(now)))


class PolicyClient:
    """One robot's session with a server; see the module's docstring.  Calls may come from several threads: they go one at a time."""

    def __init__(
        self,
        url: str = "ws://127.0.0.1:8000",
        prompt: str | None = None,
        session_id: str | None = None,
        api_key: str | None = None,
        timeout: float = 10.0,
        connect_for: float = 60.0,
        ssl: Any = None,
    ):
        """Connect.

        Args:
            prompt: the instruction, where a call gives none.
            session_id: by which the server remembers this robot over connections; default: a new one.
            timeout: seconds to wait for a reply.
            connect_for: seconds to go on trying to connect.

        Raises:
            PolicyError: the server cannot be reached, or does not let this client in.
        """
        self.url, self.prompt, self.timeout, self.connect_for = url, prompt, timeout, connect_for
        self.session_id = session_id or uuid.uuid4().hex
        self.metadata: dict[str, Any] = {}
        self._headers = {"Authorization": "Api-Key " + api_key} if api_key else {}
        self._ssl, self._lock, self._count = ssl, threading.Lock(), 0
        self._socket: Any = None
        with self._lock:
            self._connect()

    # ------------------------------------------------------------------------------------------ what one does with it

    def observe(self, observation: Observation, executed: np.ndarray | None = None) -> dict[str, Any]:
        """Let the server see something, without asking for a plan; `executed` as in `plan`."""
        given = {} if executed is None else {"executed": executed}
        return self._ask(dict(observation.message(), endpoint="observe", **given))

    def plan(
        self,
        observation: Observation,
        prompt: str | None = None,
        committed: np.ndarray | None = None,
        executed: np.ndarray | None = None,
        deadline_ms: float | None = None,
        goal: dict[str, np.ndarray] | None = None,
        **more: Any
    ) -> Plan:
        """The plan from an observation on.

        Args:
            committed: the plan's first actions (n, d), which are decided already.
            executed: what was really executed since the observation before (n, d); default: what was planned.
            deadline_ms: after this a plan is of no use.
            goal: pictures of what is to come about, uint8 (height, width, 3) by the camera's name, where the policy takes them; they hold until others come.
            more: other keys of the protocol, such as mode or steps; want="imagined" asks for the future that the plan imagines.

        Raises:
            PolicyError: there is none; hold.
        """
        message = dict(observation.message(), endpoint="plan", **more)
        given = {"prompt": prompt or self.prompt, "committed": committed, "executed": executed, "deadline_ms": deadline_ms}
        message.update({key: value for key, value in given.items() if value is not None})
        message.update({"goal/" + name: np.asarray(image) for name, image in (goal or {}).items()})
        reply = self._ask(message)
        about = reply["plan"]
        return Plan(np.array(reply["actions"]), float(about["valid_from"]), float(about["control_dt"]), reply)

    def reset(self, outcome: str | None = None) -> None:
        """Begin anew: the server forgets what this session saw.

        Args:
            outcome: success or failed, of what was just tried; a server that records keeps it.
        """
        self._ask({"endpoint": "reset_session"} if outcome is None else {"endpoint": "reset_session", "outcome": outcome})

    def close(self) -> None:
        """Say goodbye."""
        with self._lock:
            self._drop()

    def __enter__(self) -> PolicyClient:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    # ------------------------------------------------------------------------------------------ inside

    def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        with self._lock:
            self._count += 1
            sent = dict(message, session_id=self.session_id, request_id=self._count)
            if self._socket is None:
                self._connect()
            try:
                self._socket.send(pack(sent))
                reply = self._receive(self._count)
            except TimeoutError:
                self._drop()  # the reply may still come, and must not be taken for that of another request
                raise PolicyError("timeout", f"no reply within {self.timeout:g} s", "hold; look at the server", True) from None
            except (ConnectionClosed, OSError) as error:
                self._drop()
                raise PolicyError("connection_lost", f"the connection broke ({type(error).__name__})", "hold; the next call connects again", True) from None
        if "error" in reply:
            told = reply["error"]
            raise PolicyError(str(told.get("code")), str(told.get("message")), str(told.get("remedy")), bool(told.get("retry")))
        return reply

    def _receive(self, number: int) -> dict[str, Any]:
        data = self._socket.recv(timeout=self.timeout)
        reply = json.loads(data) if isinstance(data, str) else unpack(data)
        if not isinstance(reply, dict) or ("error" not in reply and reply.get("request_id") != number):
            raise PolicyError("bad_message", "the server's reply is not to what was asked", "hold; is it a wam policy server?")
        return reply

    def _connect(self) -> None:
        """Connect, waiting longer after each failure."""
        until, pause = time.monotonic() + self.connect_for, FIRST_PAUSE_S
        while True:
            try:
                options = {"ssl": self._ssl} if self._ssl is not None else {}
                self._socket = connect(self.url, compression=None, max_size=None, additional_headers=self._headers, open_timeout=self.timeout, **options).__enter__()
                self.metadata = unpack(self._socket.recv(timeout=max(self.timeout, self.connect_for)))
                return
            except (OSError, WebSocketException) as error:  # refused, timed out, or no handshake
                self._drop()
                status = getattr(getattr(error, "response", None), "status_code", None)
                if status in HOPELESS:
                    raise PolicyError("unauthorized", f"the server answers {status}", "give the right api_key and url") from None
                if time.monotonic() + pause > until:
                    raise PolicyError("unreachable", f"{self.url} cannot be reached ({type(error).__name__})", "start the server: wam serve", True) from None
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)

    def _drop(self) -> None:
        socket, self._socket = self._socket, None
        if socket is not None:
            try:
                socket.close()
            except (OSError, WebSocketException):
                return  # it was gone already
