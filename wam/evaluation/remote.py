"""A robot, or a simulator in another place, as an environment: `remote/ws://host:port`, driven over a websocket.

    RobotServer (packages/wam-client, beside the robot)   <- reset, run, look ->   RemoteEnv (here, beside the policy)

What the robot is, it says as the connection begins: cameras, sizes, limits, rate, instruction.  Messages are msgpack with arrays and
without pickle, within the policy server's limits (`wam.serving.wire`).  A stretch of actions is sent whole and the robot keeps its own
time, so the network's delay lies between stretches, where a policy thinks anyway.  A connection that breaks, a robot that answers too
late, or one that reports an error, ends the episode as a crash of the environment; the next episode connects again.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from wam.evaluation.environments import Frames, Observation, StepResult
from wam.evaluation.gymnasium_env import Fit, fitted
from wam.serving.errors import ServingError
from wam.serving.wire import pack, unpack

PROTOCOL, VERSION = "wam-robot", 1
TOLD = ("cameras", "state_dim", "action_low", "action_high", "hold", "control_hz", "max_steps", "instruction")


class RemoteEnv:
    """One robot at an address."""

    def __init__(
        self,
        url: str,
        camera: str | Sequence[str] | None = None,
        image_size: int | Sequence[int] | None = None,
        max_steps: int | None = None,
        fit: Fit = "stretch",
        timeout_s: float = 120.0,
        key_file: str | None = None,
    ) -> None:
        """Connect and learn what is there.

        Args:
            url: ws:// or wss://.
            camera: one or several of the robot's, in the order in which they are wanted; default: all.
            image_size: of each; default: the robot's own, which must then be the same for all.
            max_steps: control steps before an episode counts as failed; default: the robot's.
            fit: how a picture of another size is made to fit: not at all, stretched, or padded with black.
            timeout_s: for a reply; a stretch takes as long as the robot needs for it.
            key_file: file with the key that the robot asks for.

        Raises:
            RuntimeError: nobody answers there, or not a robot.
            ValueError: no such camera, or cameras of several sizes.
        """
        self.url, self._timeout, self._fit = url, timeout_s, fit
        self._key = Path(key_file).expanduser().read_text().strip() if key_file else None
        self._socket: Any = None
        self._count = 0
        try:
            self._learn(self._connect(), camera, image_size, max_steps)
        except BaseException:  # or the robot would wait for an evaluation that never comes
            self.close()
            raise
        self.steps, self._over = 0, True

    def _learn(self, told: dict[str, Any], camera: str | Sequence[str] | None, image_size: int | Sequence[int] | None, max_steps: int | None) -> None:
        url, missing = self.url, [name for name in TOLD if name not in told]
        if missing:
            raise RuntimeError(f"the robot at {url} does not say {', '.join(missing)}")
        self.cameras = tuple(told["cameras"]) if camera is None else (camera,) if isinstance(camera, str) else tuple(camera)
        unknown = [name for name in self.cameras if name not in told["cameras"]]
        if unknown or not self.cameras:
            raise ValueError(f"the robot at {url} has no camera {', '.join(map(repr, unknown))}; cameras: {', '.join(told['cameras'])}")
        self.image_size = _one_size(url, image_size, [tuple(told["cameras"][name]) for name in self.cameras])
        self.state_dim, self.action_dim = int(told["state_dim"]), len(told["action_low"])
        self.action_low, self.action_high, self.hold = (np.array(told[name], np.float32) for name in ("action_low", "action_high", "hold"))
        self.control_hz, self.instruction = int(told["control_hz"]), str(told["instruction"])
        self.max_steps = int(told["max_steps"]) if max_steps is None else int(max_steps)

    def reset(self, seed: int) -> Observation:
        """Start an episode; what the seed means is the robot's affair."""
        self.steps, self._over = 0, True
        reply = self._ask({"call": "reset", "seed": int(seed)})
        self._over = False
        rest = reply.get("rest")
        return Observation(self._beside(reply["images"])[None], np.array(reply["state"], np.float32), rest=None if rest is None else np.array(rest, np.float32))

    def run(self, actions: npt.NDArray[Any], frame_stride: int) -> StepResult:
        """Execute actions (m, Da), clipped to the robot's limits, until they or the episode end.

        Raises:
            ValueError: an episode that is over.
            RuntimeError: the robot, or the way to it, failed.
        """
        if self._over:
            raise ValueError(f"the episode of the robot at {self.url} is over (or none was begun); call reset(seed) first")
        sent = np.clip(np.asarray(actions, np.float32), self.action_low, self.action_high)
        reply = self._ask({"call": "run", "actions": sent, "frame_stride": int(frame_stride), "max_steps": self.max_steps})
        states, frames = np.array(reply["states"], np.float32), reply["frames"]
        self.steps += len(states)
        self._over = bool(reply["done"])
        counts = {name: len(frames.get(name, ())) for name in self.cameras}
        shown = max(counts.values())
        if min(counts.values()) < shown:
            raise RuntimeError(f"cameras of the robot at {self.url} gave different counts of frames ({counts}); one is late or missing")
        high, wide = self.image_size
        return StepResult(
            frames=np.stack([self._beside({name: frames[name][i] for name in self.cameras}) for i in range(shown)])
            if shown
            else np.zeros((0, high, wide * len(self.cameras), 3), np.uint8),
            states=states,
            rewards=np.array(reply["rewards"], np.float32),
            success=np.array(reply["success"], np.bool_),
            done=self._over,
        )

    def render(self) -> Frames:
        """The pictures as they are now, side by side, (H, V W, 3)."""
        return self._beside(self._ask({"call": "look"})["images"])

    def close(self) -> None:
        """Hang up; the robot holds."""
        socket, self._socket = self._socket, None
        if socket is not None:
            socket.close()

    # -------------------------------------------------------------------------------------------- the wire

    def _beside(self, images: dict[str, Any]) -> Frames:
        """Cameras side by side, each at the size asked for."""
        views = []
        for name in self.cameras:
            picture = np.asarray(images[name]) if name in images else None
            if picture is None or picture.ndim != 3 or picture.shape[-1] != 3 or picture.dtype != np.uint8:
                got = "nothing" if picture is None else f"{picture.dtype} of shape {picture.shape}"
                raise RuntimeError(f"the robot's camera {name!r} gave {got}; expected uint8 (height, width, 3) in red, green, blue")
            views.append(fitted(picture, self.image_size, self._fit, f"camera {name!r} of the robot at {self.url}"))
        return np.concatenate(views, axis=1)

    def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        """One call and its reply.

        Raises:
            RuntimeError: no connection, no reply in time, an error at the robot, or a reply to something else.
        """
        from websockets.exceptions import WebSocketException

        if self._socket is None:
            self._connect()
        self._count += 1
        try:
            self._socket.send(pack({**message, "id": self._count}))
            reply = unpack(self._socket.recv(timeout=self._timeout))
        except (OSError, WebSocketException, ValueError, ServingError) as error:  # TimeoutError is an OSError
            self.close()  # the reply may still come, and must not be taken for another's
            raise RuntimeError(f"the robot at {self.url} did not answer {message['call']!r} ({type(error).__name__}: {error})") from error
        if not isinstance(reply, dict) or reply.get("id") != self._count:
            self.close()
            raise RuntimeError(f"the robot at {self.url} did not answer what it was asked: {str(reply)[:200]}")
        if "error" in reply:
            raise RuntimeError(f"the robot at {self.url} reports: {reply['error']}")
        return reply

    def _connect(self) -> dict[str, Any]:
        from websockets.exceptions import WebSocketException
        from websockets.sync.client import connect

        headers = {"Authorization": f"Api-Key {self._key}"} if self._key else {}
        try:
            self._socket = connect(self.url, compression=None, max_size=None, additional_headers=headers, open_timeout=self._timeout).__enter__()
            told = unpack(self._socket.recv(timeout=self._timeout))
        except (OSError, WebSocketException, ValueError, ServingError) as error:
            self.close()
            raise RuntimeError(f"no robot answers at {self.url} ({type(error).__name__}: {error}); start its RobotServer (packages/wam-client)") from error
        if not isinstance(told, dict) or told.get("protocol") != PROTOCOL or told.get("version") != VERSION:
            said = told.get("error", "not a robot of this protocol") if isinstance(told, dict) else "not a robot of this protocol"
            self.close()
            raise RuntimeError(f"the robot at {self.url} cannot be driven: {said}")
        return told


def _one_size(url: str, asked: int | Sequence[int] | None, own: list[tuple[int, ...]]) -> tuple[int, int]:
    if asked is not None:
        return (asked, asked) if isinstance(asked, int) else (int(asked[0]), int(asked[1]))
    if len(set(own)) != 1:
        raise ValueError(f"the robot at {url} has cameras of several sizes ({', '.join(map(str, own))}); say image_size")
    return int(own[0][0]), int(own[0][1])
