"""A robot, or a simulator of yours, that lets itself be evaluated: `wam rollout --env remote/ws://host:8700` drives it over a socket.

    evaluation                          robot
    reset (seed)            ->          put the scene right, then   frames, state, rest
    run (actions, stride)   ->          step, step, step, ...       states, rewards, success; a frame after every `stride`-th step
    look                    ->                                      frames

The robot keeps its own time: `step` returns when its control step is over.  Nothing moves that was not sent: a number that is not finite
or lies outside the limits is refused before the first step of its stretch, and when the connection ends, or nothing is heard for
`idle_s`, the robot is told to hold.  One evaluation at a time.  See docs/environments.md for the messages.
"""

from __future__ import annotations

import hmac
import http
import threading
from typing import Any

import numpy as np
from websockets.exceptions import ConnectionClosed
from websockets.sync.server import ServerConnection, serve

from wam_client.wire import pack, unpack

PROTOCOL, VERSION = "wam-robot", 1


class Robot:
    """Your robot: replace what these methods do."""

    def metadata(self) -> dict[str, Any]:
        """What an evaluation must know.

        name, instruction   text
        cameras             {name: (height, width)}
        state_dim           numbers of the state
        action_low, action_high   limits (d,), inclusive
        hold                (d,) what keeps it still: NaN where the last command is repeated, else a number
        control_hz, max_steps     steps a second, steps of an episode
        """
        raise NotImplementedError("say what your robot is")

    def reset(self, seed: int) -> np.ndarray | None:
        """Begin an episode: return the command that keeps the robot where it is now, or None if there is none.

        A simulator draws its scene from the seed; at a real robot somebody puts the scene right, and the seed says which scene.
        """
        raise NotImplementedError("put the scene right")

    def step(self, action: np.ndarray) -> tuple[float, bool]:
        """One control step: execute, wait until it is over, and say the reward and whether the task is now solved."""
        raise NotImplementedError("send the action to your controller")

    def state(self) -> np.ndarray:
        """The state as it is now (d,)."""
        raise NotImplementedError("read your joints")

    def look(self) -> dict[str, np.ndarray]:
        """Pictures as they are now, uint8 (height, width, 3) in red, green, blue, by camera."""
        raise NotImplementedError("read your cameras")

    def hold(self) -> None:
        """Keep still."""
        raise NotImplementedError("hold your robot")


class RobotServer:
    """Offers one robot on a port; use as a context manager."""

    def __init__(self, robot: Robot, host: str = "127.0.0.1", port: int = 8700, api_key: str | None = None, idle_s: float = 60.0, ssl: Any = None):
        """Listen.

        Args:
            api_key: what an evaluation must show; needed beyond loopback.
            idle_s: seconds without a request after which the robot is told to hold.
            ssl: an ssl.SSLContext, for wss://.

        Raises:
            ValueError: an address that others can reach, without a key.
        """
        if host not in ("127.0.0.1", "::1", "localhost") and not api_key:
            raise ValueError("listening on " + host + " without an api_key would let anybody move the robot")
        self.robot, self.idle_s, self._key = robot, idle_s, api_key
        self._taken, self._steps, self._limits = threading.Lock(), 0, (np.zeros(0), np.zeros(0))
        self._server = serve(self._serve, host, port, process_request=self._admit, compression=None, max_size=1 << 25, ssl=ssl)
        self.port = int(self._server.socket.getsockname()[1])
        self.url = ("ws" if ssl is None else "wss") + "://" + (host if ":" not in host else "[" + host + "]") + ":" + str(self.port)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def __enter__(self) -> RobotServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop listening, and hold."""
        self._server.shutdown()
        self._thread.join(5)
        self.robot.hold()

    # ------------------------------------------------------------------------------------------ connections

    def _admit(self, connection: ServerConnection, request: Any) -> Any:
        """Refuse a stranger before there is a connection."""
        given = request.headers.get("Authorization", "").partition(" ")[2]
        if self._key is None or hmac.compare_digest(given.strip().encode(), self._key.encode()):
            return None
        return connection.respond(http.HTTPStatus.UNAUTHORIZED, "wrong or missing key\n")

    def _serve(self, connection: ServerConnection) -> None:
        if not self._taken.acquire(blocking=False):
            connection.send(pack({"error": "this robot is being driven by another evaluation"}))
            return
        try:
            told = self._metadata()
            connection.send(pack(told))
            while True:
                try:
                    data = connection.recv(timeout=self.idle_s)
                except TimeoutError:
                    self.robot.hold()
                    continue
                connection.send(self._answer(data, told))
        except ConnectionClosed:
            return
        finally:
            self.robot.hold()
            self._taken.release()

    def _metadata(self) -> dict[str, Any]:
        told = dict(self.robot.metadata(), protocol=PROTOCOL, version=VERSION)
        for name in ("action_low", "action_high", "hold"):
            told[name] = np.asarray(told[name], np.float32)
        self._limits = told["action_low"], told["action_high"]
        return told

    def _answer(self, data: Any, told: dict[str, Any]) -> bytes:
        """The reply to one message; what goes wrong is told, and the robot holds."""
        number = None
        try:
            message = unpack(data) if isinstance(data, bytes) else None
            if not isinstance(message, dict):
                raise ValueError("a message is a map, packed as docs/environments.md says")
            number = message.get("id")
            calls = {"reset": self._reset, "run": self._run, "look": self._look}
            if message.get("call") not in calls:
                raise ValueError("there is no call " + repr(message.get("call")) + "; calls: " + ", ".join(calls))
            return pack(dict(calls[message["call"]](message, told), id=number))
        except Exception as error:  # of the robot's own code too: the other side counts it as a crash of the environment
            self.robot.hold()
            return pack({"id": number, "error": type(error).__name__ + ": " + str(error)})

    # ------------------------------------------------------------------------------------------ calls

    def _reset(self, message: dict[str, Any], told: dict[str, Any]) -> dict[str, Any]:
        rest = self.robot.reset(int(message["seed"]))
        self._steps = 0
        out = {"images": self.robot.look(), "state": np.asarray(self.robot.state(), np.float32)}
        return out if rest is None else dict(out, rest=np.asarray(rest, np.float32))

    def _look(self, message: dict[str, Any], told: dict[str, Any]) -> dict[str, Any]:
        return {"images": self.robot.look()}

    def _run(self, message: dict[str, Any], told: dict[str, Any]) -> dict[str, Any]:
        actions, stride = np.asarray(message["actions"], np.float32), int(message["frame_stride"])
        low, high = self._limits
        if actions.ndim != 2 or actions.shape[1:] != low.shape or not len(actions) or stride < 1:
            raise ValueError("actions have shape " + str(actions.shape) + "; expected (steps, " + str(len(low)) + ")")
        if not np.isfinite(actions).all() or (actions < low).any() or (actions > high).any():
            raise ValueError("actions are not finite, or outside the robot's limits; nothing was sent to it")
        states, rewards, flags = [], [], []
        frames: dict[str, list[np.ndarray]] = {name: [] for name in told["cameras"]}
        for count, action in enumerate(actions, start=1):
            reward, success = self.robot.step(action)
            self._steps += 1
            states.append(np.asarray(self.robot.state(), np.float32))
            rewards.append(float(reward))
            flags.append(bool(success))
            if count % stride == 0:
                for name, picture in self.robot.look().items():
                    frames[name].append(picture)
            if success or self._steps >= int(message["max_steps"]):
                break
        done = flags[-1] or self._steps >= int(message["max_steps"])
        if done:
            self.robot.hold()
        shown = {name: np.stack(pictures) for name, pictures in frames.items() if pictures}
        return {"frames": shown, "states": np.stack(states), "rewards": np.asarray(rewards, np.float32), "success": np.asarray(flags), "done": bool(done)}
