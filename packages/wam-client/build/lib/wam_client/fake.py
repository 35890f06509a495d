"""A policy server without a model: for developing a robot's code where there is no GPU, and for testing it.

It speaks the protocol of `wam serve` (plan, observe, reset_session, and openpi's and RoboArena's), checks what it is sent as strictly,
and plans small smooth motions about the state it is told, or about zero.  `--delay` and `--fail` show a robot's code bad days.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from typing import Any

import numpy as np
from websockets.exceptions import ConnectionClosed
from websockets.sync.server import ServerConnection, serve

from wam_client.wire import pack, unpack


class FakePolicy:
    """Sine waves in place of plans."""

    def __init__(self, cameras: tuple[str, ...] = ("front",), state_dim: int = 8, action_dim: int = 8, horizon: int = 16, control_hz: float = 20.0, delay_s: float = 0.0, fail: float = 0.0, seed: int = 0):
        """A policy.

        Args:
            delay_s: how long a plan takes.
            fail: part of the plans that are refused.
        """
        self.cameras, self.state_dim, self.action_dim, self.horizon, self.control_hz = cameras, state_dim, action_dim, horizon, control_hz
        self.delay_s, self.fail, self._random = delay_s, fail, np.random.default_rng(seed)
        self.requests = 0

    def metadata(self) -> dict[str, Any]:
        """What a client is told as it connects."""
        told = dict(protocol="wam", protocol_version=1, server="wam-fake-policy", embodiment="fake", cameras=list(self.cameras))
        told.update(state_dim=self.state_dim, action_dim=self.action_dim, action_horizon=self.horizon, control_hz=self.control_hz, frame_stride=1, needs_state=True)
        told.update(image_resolution=[224, 224], needs_wrist_camera=False, n_external_cameras=len(self.cameras), needs_stereo_camera=False, needs_session_id=True, action_space="joint_position")
        return told

    def answer(self, data: Any) -> Any:
        """The reply to one frame."""
        message: dict[str, Any] = {}
        try:
            message = unpack(data) if isinstance(data, bytes) else {}
            if not isinstance(message, dict) or not message:
                raise _Refused("bad_message", "the message is no map", "send binary frames of msgpack")
            return self._reply(message)
        except _Refused as refused:
            told: dict[str, Any] = {"error": {"code": refused.args[0], "message": refused.args[1], "remedy": refused.args[2], "retry": refused.args[0] == "internal_error"}}
            modern = isinstance(message, dict) and message.get("endpoint") in ("plan", "observe", "reset_session")
            return pack(dict(told, request_id=message.get("request_id"))) if modern else json.dumps(told)
        except (ValueError, TypeError, KeyError):
            return json.dumps({"error": {"code": "bad_message", "message": "the message is not msgpack", "remedy": "pack it as docs/serving.md says", "retry": False}})

    def _reply(self, message: dict[str, Any]) -> Any:
        endpoint = message.get("endpoint")
        named: dict[str, Any] = {key: message[key] for key in ("request_id", "session_id") if key in message}
        if endpoint == "reset":
            return "reset successful"
        if endpoint == "reset_session":
            return pack(dict(named, status="reset"))
        state = self._check(message)
        if endpoint == "observe":
            return pack(dict(named, status="observed"))
        self.requests += 1
        time.sleep(self.delay_s)
        if self._random.random() < self.fail:
            raise _Refused("internal_error", "this fake policy fails now and then", "hold")
        t0 = float(message.get("timestamp", 0.0))
        t = t0 + np.arange(self.horizon)[:, None] / self.control_hz
        origin = np.resize(state, self.action_dim)
        actions = (origin + 0.02 * np.sin(t + np.arange(self.action_dim))).astype(np.float32)
        committed = message.get("committed")
        if committed is not None:
            actions[: len(committed)] = committed
        if endpoint == "infer":
            return pack(actions)
        about = {"valid_from": t0, "valid_until": t0 + self.horizon / self.control_hz, "control_dt": 1 / self.control_hz, "cut": None}
        return pack(dict(named, actions=actions, plan=about, server_timing={"infer_ms": self.delay_s * 1e3}, policy_timing={"infer_ms": self.delay_s * 1e3}))

    def _check(self, message: dict[str, Any]) -> np.ndarray:
        """The state, once everything that is needed is there."""
        for camera in self.cameras:
            image = message.get("observation/" + camera)
            if image is None:
                raise _Refused("missing_key", f"the picture of camera {camera!r} is missing", f"send it as observation/{camera}, uint8 (height, width, 3)")
            if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim not in (3, 4) or image.shape[-1] != 3:
                raise _Refused("wrong_shape", f"observation/{camera} is no picture", "send uint8 (height, width, 3)")
        state = message.get("observation/state")
        if state is None:
            raise _Refused("missing_key", "the state is missing", f"send observation/state, ({self.state_dim},)")
        if not isinstance(state, np.ndarray) or state.shape != (self.state_dim,) or not np.isfinite(state).all():
            raise _Refused("wrong_shape", "observation/state is no state", f"send ({self.state_dim},) finite numbers")
        if message.get("endpoint") != "observe" and not message.get("prompt"):
            raise _Refused("missing_key", "the prompt is missing", "send an instruction")
        return state


class _Refused(Exception):
    """Code, message and remedy."""


class FakeServer:
    """A fake policy on a socket, in a thread; `with FakeServer(policy) as server: server.url`."""

    def __init__(self, policy: FakePolicy | None = None, host: str = "127.0.0.1", port: int = 0):
        self.policy = policy or FakePolicy()
        self._server = serve(self._talk, host, port, compression=None, max_size=None)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    @property
    def url(self) -> str:
        """Where it listens."""
        host, port = self._server.socket.getsockname()[:2]
        return f"ws://{host}:{port}"

    def _talk(self, socket: ServerConnection) -> None:
        socket.send(pack(self.policy.metadata()))
        try:
            while True:
                socket.send(self.policy.answer(socket.recv()))
        except ConnectionClosed:
            return

    def __enter__(self) -> FakeServer:
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._server.shutdown()
        self._thread.join(5)


def main() -> None:
    """`wam-fake-policy`."""
    parser = argparse.ArgumentParser(prog="wam-fake-policy", description="A policy server without a model, for developing a robot's code.")
    parser.add_argument("--host", default="127.0.0.1", help="address (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="port (default: 8000)")
    parser.add_argument("--cameras", default="front", help="names, with commas between (default: front)")
    parser.add_argument("--state-dim", type=int, default=8)
    parser.add_argument("--action-dim", type=int, default=8)
    parser.add_argument("--horizon", type=int, default=16, help="actions of a plan (default: 16)")
    parser.add_argument("--control-hz", type=float, default=20.0)
    parser.add_argument("--delay", type=float, default=0.1, help="seconds that a plan takes (default: 0.1)")
    parser.add_argument("--fail", type=float, default=0.0, help="part of the plans that are refused (default: 0)")
    a = parser.parse_args()
    policy = FakePolicy(tuple(a.cameras.split(",")), a.state_dim, a.action_dim, a.horizon, a.control_hz, a.delay, a.fail)
    with FakeServer(policy, a.host, a.port) as server:
        print(f"listening on {server.url}; Ctrl-C stops", flush=True)
        try:
            while True:
                time.sleep(1)
        except KeyboardInterrupt:
            return


if __name__ == "__main__":
    main()
