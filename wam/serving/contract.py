"""What a policy takes and gives, as clients see it: cameras, states, actions, and the clock.

A robot's client names its cameras and joints in its own way; what the policy was trained on has other names.  A name is found by the
rules below or by a mapping that is given, and never by guessing: what cannot be found is missing, and a missing state is no state of
zeros.

    camera   observation.images.corner4   is found as   itself, observation/corner4, corner4, images["corner4"];
                                                        where it is the only one, also observation/image and image
    state    (whole)                      is found as   observation/state, observation.state, state
             groups joint_position, ...   are found as  observation/joint_position, state.joint_position, joint_position
    prompt                                is found as   prompt, task, instruction
    goal (where the policy takes one)     is found as   goal/corner4, ...; where it is the only camera, also goal/image
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

import wam
from wam.config_robot import EmbodimentConfig
from wam.data.views import Canvas
from wam.pretrained import Policy
from wam.relations import acting_modes
from wam.serving.errors import ServingError

PROTOCOL_VERSION = 1
ActionSpace = Literal["joint_position", "joint_velocity", "cartesian_position", "cartesian_velocity"]
SPACES: tuple[ActionSpace, ...] = ("joint_position", "joint_velocity", "cartesian_position", "cartesian_velocity")
WHOLE_STATE = ("observation/state", "observation.state", "state")
PROMPT = ("prompt", "task", "instruction")
ONLY_CAMERA = ("observation/image", "observation.image", "image")
GOAL = "goal/"
EXTERIOR = "exterior_image_"
MAX_SIDE = 4096


@dataclass(frozen=True)
class Contract:
    """What one robot's clients send and get.

    Attributes:
        robot: sizes and groups.
        cameras: keys of the dataset, in the canvas's order.
        keys: the client's name of a camera or a state group, where the rules do not find it.
        needs_state: whether there is no plan without a state.
        control_hz: control steps a second.
        horizon: actions of a plan.
        lead: of these, those missing from a first plan (the first frame lies inside its block).
    """

    robot: EmbodimentConfig
    cameras: tuple[str, ...]
    canvas: Canvas
    needs_state: bool
    control_hz: float
    horizon: int
    lead: int
    frame_stride: int
    frames_per_block: int
    blocks: int
    modes: tuple[str, ...]
    keys: Mapping[str, str] = field(default_factory=dict)
    action_space: ActionSpace = "joint_position"
    takes_goal: bool = False
    about: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, policy: Policy, embodiment: str | None = None, keys: Mapping[str, str] | None = None, action_space: ActionSpace = "joint_position", about: Mapping[str, Any] | None = None) -> Contract:
        """The contract of a checkpoint.

        Raises:
            ValueError: an embodiment that the policy does not know, or a mapping of something that it does not take.
        """
        config, t = policy.config, policy.config.timeline
        name = embodiment or config.data.embodiment
        policy.model.embodiment_index(name)
        robot = config.model.embodiment(name)
        modes = acting_modes(config)
        if not modes:
            raise ValueError("this policy was trained for no mode that plans actions from what was observed; `wam relations` lists the modes")
        relative = any(g.relative_to for g in robot.action_groups) or any(i >= 0 for i in robot.relative_to)
        out = cls(
            robot=robot,
            cameras=config.data.cameras,
            canvas=Canvas.of(config.data, config.codec.image_size),
            needs_state=config.model.state != "none" or relative,
            control_hz=policy.control_hz,
            horizon=t.actions_per_block,
            lead=t.lead,
            frame_stride=t.stride,
            frames_per_block=t.frames_per_block,
            blocks=t.blocks,
            modes=modes,
            keys=dict(keys or {}),
            action_space=action_space,
            takes_goal=config.model.goal_image,
            about=dict(about or {}),
        )
        known = [*out.cameras, *(short(c) for c in out.cameras), *(g.name for g in robot.state_groups), "state", "prompt"]
        strange = next((key for key in out.keys if key not in known), None)
        if strange is not None:
            raise ValueError(f"a client's name was given for {strange!r}, which the policy does not take; it takes {', '.join(known)}")
        return out

    @property
    def shortest_plan(self) -> int:
        """Actions that every plan has before the gate: a first block whose first frame lies inside it has fewer than others."""
        return self.horizon - self.lead or self.horizon

    # ------------------------------------------------------------------------------------------ what clients are told

    def metadata(self) -> dict[str, Any]:
        """What a client gets as it connects: a superset of openpi's and RoboArena's."""
        exterior = [c for c in self.cameras if "wrist" not in c]
        return {
            "protocol": "wam",
            "protocol_version": PROTOCOL_VERSION,
            "server": f"wam {wam.__version__}",
            "embodiment": self.robot.name,
            "cameras": [short(camera) for camera in self.cameras],
            "state_dim": self.robot.raw_state_dim,
            "state_groups": {g.name: g.size for g in self.robot.state_groups},
            "action_dim": self.robot.raw_action_dim,
            "action_groups": {g.name: g.size for g in self.robot.action_groups},
            "action_horizon": self.shortest_plan,
            "block_actions": self.horizon,
            "control_hz": self.control_hz,
            "frame_stride": self.frame_stride,
            "frames_per_block": self.frames_per_block,
            "context_blocks": self.blocks,
            "needs_state": self.needs_state,
            "takes_goal": self.takes_goal,
            "modes": list(self.modes),
            "camera_size": list(self.canvas.cell),
            # what RoboArena's clients read
            "image_resolution": list(self.canvas.stored),
            "needs_wrist_camera": len(exterior) < len(self.cameras),
            "n_external_cameras": min(len(exterior), 2),
            "needs_stereo_camera": False,
            "needs_session_id": True,
            "action_space": self.action_space,
            **self.about,
        }

    # ------------------------------------------------------------------------------------------ what clients send

    def frames(self, message: Mapping[str, Any]) -> np.ndarray:
        """What the cameras saw as the policy sees it, uint8 (T, H, W, 3).

        Raises:
            ServingError: a camera is missing, or its picture is none.
        """
        views = [self._picture(message, camera) for camera in self.cameras]
        counts = {name: len(view) for name, view in zip(self.cameras, views, strict=True)}
        if len(set(counts.values())) > 1:
            raise ServingError("wrong_shape", f"cameras have different numbers of frames ({', '.join(f'{short(c)}: {n}' for c, n in counts.items())})", "send as many from every camera")
        seen = self.canvas.compose(views)
        return seen if seen.flags.owndata else seen.copy()  # frames are kept, and a view would keep the whole message

    def state(self, message: Mapping[str, Any]) -> np.ndarray | None:
        """The state (d,), float32, raw units; None where the policy needs none and none was sent.

        Raises:
            ServingError: it is missing, or of another size, or not finite.
        """
        given = self.keys.get("state")
        whole = next((message[key] for key in ((given,) if given else WHOLE_STATE) if message.get(key) is not None), None)
        if whole is not None and not isinstance(whole, dict):
            return numbers("state", whole, self.robot.raw_state_dim)
        groups = self.robot.state_groups
        found = {g.name: self._group(message, g.name) for g in groups}
        missing = [name for name, value in found.items() if value is None]
        if not groups or missing:
            if not self.needs_state and len(missing) == len(groups):
                return None
            wanted = " and ".join(f"observation/{name}" for name in missing) or WHOLE_STATE[0]
            raise ServingError("missing_key", f"the state is missing: {wanted} ({self.robot.raw_state_dim} numbers in all)", "send it with every observation; nothing is put in its place")
        return np.concatenate([numbers(f"state group {g.name}", found[g.name], g.size) for g in groups])

    def prompt(self, message: Mapping[str, Any]) -> str | None:
        """The instruction, where there is one.

        Raises:
            ServingError: it is no text, or empty.
        """
        given = self.keys.get("prompt")
        text = next((message[key] for key in ((given,) if given else PROMPT) if message.get(key) is not None), None)
        if text is None:
            return None
        if not isinstance(text, str) or not text.strip():
            raise ServingError("wrong_type", f"the prompt is {_kind(text)}", "send an instruction as text, such as 'open the drawer'")
        return text

    def goal(self, message: Mapping[str, Any]) -> np.ndarray | None:
        """A picture of what is to come about, as the policy sees it, uint8 (H, W, 3); None where none was sent.

        Raises:
            ServingError: the policy takes none, or a camera's is missing or no picture.
        """
        if not any(key.startswith(GOAL) for key in message):
            return None
        if not self.takes_goal:
            raise ServingError("bad_value", "a goal image was sent, and this policy takes none", "leave goal/... out, or serve a checkpoint trained with model.goal_image")
        views = []
        for camera in self.cameras:
            names = [GOAL + short(camera), *([GOAL + "image"] if len(self.cameras) == 1 else [])]
            key = next((name for name in names if message.get(name) is not None), None)
            if key is None:
                raise ServingError("missing_key", f"the goal of camera {short(camera)!r} is missing", f"send it as {names[0]}, uint8 (height, width, 3)")
            picture = _picture(key, message[key])
            if len(picture) != 1:
                raise ServingError("wrong_shape", f"{key} has {len(picture)} frames", "send one picture, (height, width, 3)")
            views.append(picture)
        return np.array(self.canvas.compose(views)[0])

    def actions(self, name: str, value: Any, most: int) -> np.ndarray:
        """Actions (n, d) that a client sends, n up to `most`.

        Raises:
            ServingError: another shape, or not finite.
        """
        d = self.robot.raw_action_dim
        array = _floats(name, value)
        if array.ndim != 2 or array.shape[1] != d or len(array) > most:
            raise ServingError("wrong_shape", f"{name} has shape {array.shape}", f"send (n, {d}) actions, up to {most} of them")
        return array

    def _group(self, message: Mapping[str, Any], name: str) -> Any:
        given = self.keys.get(name)
        inner = message.get("state")
        for key in (given,) if given else (f"observation/{name}", f"state.{name}", f"observation.{name}", name):
            if message.get(key) is not None:
                return message[key]
        return inner.get(name) if isinstance(inner, dict) else None

    def _picture(self, message: Mapping[str, Any], camera: str) -> np.ndarray:
        for key in self._names(message, camera):
            if message.get(key) is not None:
                return _picture(key, message[key])
        inner = message.get("images")
        if isinstance(inner, dict) and inner.get(short(camera)) is not None:
            return _picture(f"images[{short(camera)!r}]", inner[short(camera)])
        raise ServingError("missing_key", f"the picture of camera {short(camera)!r} is missing", f"send it as observation/{short(camera)}, uint8 (height, width, 3)")

    def _names(self, message: Mapping[str, Any], camera: str) -> tuple[str, ...]:
        name = short(camera)
        given = self.keys.get(camera) or self.keys.get(name)
        if given:
            return (given,)
        if name.startswith(EXTERIOR) and f"observation/{EXTERIOR}0_left" in message:  # RoboArena counts exterior cameras from 0, DROID from 1
            number, _, side = name.removeprefix(EXTERIOR).partition("_")
            return (f"observation/{EXTERIOR}{int(number) - 1}_{side}",) if number.isdigit() else ()
        return (camera, f"observation/{name}", f"observation.images.{name}", name, *(ONLY_CAMERA if len(self.cameras) == 1 else ()))


def short(camera: str) -> str:
    """A camera's own name, without where the dataset keeps it."""
    return camera.rsplit(".", 1)[-1]


def numbers(name: str, value: Any, size: int) -> np.ndarray:
    """A vector of `size` finite numbers, float32.

    Raises:
        ServingError: it is none.
    """
    array = _floats(name, value)
    if array.shape != (size,) and not (array.ndim == 0 and size == 1):
        raise ServingError("wrong_shape", f"{name} has shape {array.shape}", f"send {size} number{'s' * (size != 1)}, shape ({size},)")
    return array.reshape(size)


def _floats(name: str, value: Any) -> np.ndarray:
    if isinstance(value, list) and all(type(x) in (int, float) for x in value):
        value = np.asarray(value, np.float64)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = np.float64(value)
    if not isinstance(value, (np.ndarray, np.floating)) or value.dtype.kind not in "iuf":
        raise ServingError("wrong_type", f"{name} is {_kind(value)}", "send an array of numbers, float32")
    with np.errstate(over="ignore"):
        array = np.asarray(value, np.float32)
    if not np.isfinite(array).all():
        raise ServingError("not_finite", f"{name} holds numbers that are not finite", "check the robot's sensors")
    return array


def _picture(key: str, value: Any) -> np.ndarray:
    """uint8 (T, H, W, 3) of one picture or several, whichever way their axes lie."""
    if not isinstance(value, np.ndarray) or value.dtype != np.uint8:
        raise ServingError("wrong_type", f"{key} is {_kind(value)}", "send uint8 pixels, 0 to 255")
    if value.ndim not in (3, 4):
        raise ServingError("wrong_shape", f"{key} has shape {value.shape}", "send (height, width, 3), or (frames, height, width, 3)")
    frames = value if value.ndim == 4 else value[None]
    if frames.shape[-1] != 3 and frames.shape[1] == 3:
        frames = frames.transpose(0, 2, 3, 1)
    if frames.shape[-1] != 3 or not all(1 <= n <= MAX_SIDE for n in frames.shape[:3]):
        raise ServingError("wrong_shape", f"{key} has shape {value.shape}", f"send (height, width, 3), or (frames, height, width, 3), sides up to {MAX_SIDE}")
    return frames if frames.flags.writeable else frames.copy()  # a view of the message is read-only, which torch warns of


def _kind(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"an array of {value.dtype}"
    return f"text {value[:40]!r}" if isinstance(value, str) else "nothing" if value is None else f"a {type(value).__name__}"
