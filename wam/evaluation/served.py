"""A policy server as an executor uses it: what it tells, and plans over the wire in place of a session.

    saw     every frame but the newest  -> observe    with its time, its state and the actions executed before it
    due     the newest, what is decided -> plan       all robots that are due at once, each on a connection of its own
            the reply's actions         -> the gate, the queue: `wam.inference.executor`

So the server's memory holds what a session in this process would, also of moments at which no plan was asked for.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast
from uuid import uuid4

import numpy as np

from wam.evaluation.environments import Floats, Frames
from wam.inference.adapt import Adaptive
from wam.inference.executor import LATENCIES, Executor
from wam.inference.gate import Gate
from wam.inference.memory import PolicySpan, StepMemory
from wam.inference.robot import Loop, Made, Robot, Way
from wam.inference.session import Plan, Session

TIMES = ("synchronous", "asynchronous", "naive", "unaligned")  # `guided` and `ahead` reach into the sampling and the memory
NEEDED = ("embodiment", "cameras", "camera_size", "state_dim", "action_dim", "action_groups", "action_horizon", "block_actions", "control_hz", "frame_stride", "context_blocks", "modes")
BUSY_S, TRIES = 0.1, 100  # a server that takes no more messages this second is asked again
TIMEOUT_S = 60.0  # of a reply


class ServerRefused(RuntimeError):
    """A policy server gave no plan, and the episode cannot go on without."""


class Elsewhere:
    """Stands where a policy or a session would be: these are the server's."""

    def __getattr__(self, name: str) -> Any:
        raise ValueError(f"plans come from a server, so there is no policy here, and {name!r} is not known; evaluate with --checkpoint for it")


# ------------------------------------------------------------------------------------------------ the server


@dataclass
class Served:
    """A policy server: what it tells of its policy, and a connection for each row."""

    url: str
    key: str | None
    told: dict[str, Any]
    clients: list[Any]
    name: str

    @classmethod
    def connect(cls, url: str, key_file: str | None = None) -> Served:
        """Connect once, and learn what is served.

        Raises:
            ImportError: wam-client is not installed.
            ServerRefused: there is no wam policy server, or it does not let this client in.
        """
        from wam.serving.options import read_key

        out = cls(url, None if key_file is None else read_key(Path(key_file)), {}, [], f"evaluation {uuid4().hex[:12]}")
        out.told = out.client(0).metadata
        missing = [name for name in NEEDED if name not in out.told]
        if missing:
            raise ServerRefused(f"{url} does not tell {', '.join(missing)}; use a wam policy server of this version (wam serve)")
        return out

    def client(self, row: int) -> Any:
        """The connection of a row, made when it is first asked for."""
        client_class, error_class = _client_package()
        while len(self.clients) <= row:
            try:
                client = client_class(self.url, session_id=f"{self.name} row {len(self.clients)}", api_key=self.key, timeout=TIMEOUT_S, connect_for=10.0)
            except error_class as error:
                raise ServerRefused(f"{self.url}: {error}") from error
            self.clients.append(client)
        return self.clients[row]

    def close(self) -> None:
        """Say goodbye."""
        for client in self.clients:
            client.close()

    def span(self) -> PolicySpan:
        """Its window in control steps."""
        t = self.told
        return PolicySpan(t["context_blocks"], t["block_actions"], t["block_actions"] - t["action_horizon"], t["frame_stride"], bool(t.get("needs_state")))


def _client_package() -> tuple[Any, Any]:
    try:
        from wam_client import PolicyClient, PolicyError
    except ImportError as error:
        raise ImportError(f"evaluating through a server needs the robots' client ({error}); pip install packages/wam-client") from error
    return PolicyClient, PolicyError


def answer_of(call: Callable[[], Any]) -> Any:
    """A call of the client, made again while the server has no room for the message.

    Raises:
        ServerRefused: there is no answer to go on with.
    """
    _, error_class = _client_package()
    for _ in range(TRIES):
        try:
            return call()
        except error_class as error:
            if error.code != "rate_limited":
                raise ServerRefused(str(error)) from error
        time.sleep(BUSY_S)
    raise ServerRefused(f"the server took no message for {TRIES * BUSY_S:.0f} s; start it with a larger --rate")


# ------------------------------------------------------------------------------------------------ planning


@dataclass
class ServedRobot(Robot):
    """A robot whose memory and session are on the server.

    Attributes:
        seed: of its noise.
        told: control step that the server knows of; None: nothing yet.
    """

    client: Any = None
    instruction: str = ""
    seed: int = 0
    told: int | None = None


class ServedExecutor(Executor):
    """An executor whose plans come from a server; when plans are due, what robots do meanwhile and the gate are `Executor`'s own.

    Args:
        steps: solver steps; None: the server's.
    """

    def __init__(self, served: Served, loop: Loop, steps: int | None, gate: Gate, watch: Callable[[Made], None]):
        """Check that the loop fits what is served.

        Raises:
            ValueError: it does not.
        """
        check_loop(served, loop)
        self.served, self.loop, self.steps, self.gate, self.watch = served, loop, steps, gate, watch
        self.span = served.span()
        self.stride, self.horizon = self.span.frame_stride, self.span.horizon
        self.planner = self.checker = None
        self._took: deque[int] = deque(maxlen=LATENCIES)
        self._begun = 0

    def begin(
        self,
        instruction: str,
        seed: int,
        frame: Frames,
        state: Floats | None,
        hold: Floats,
        rest: Floats | None = None,
        goal: Frames | None = None,
        target: Frames | None = None,
        extra_delay: Callable[[int], int] = lambda step: 0,
    ) -> ServedRobot:
        """See `Executor.begin`; the server forgets the row's episode before."""
        if goal is not None or target is not None:
            raise ValueError("goal images are not sent to a server; evaluate with --checkpoint for them")
        client = self.served.client(self._begun)
        self._begun += 1
        answer_of(client.reset)
        memory = StepMemory(self.span)
        memory.begin(frame, state)
        rest = np.full_like(hold, np.nan) if rest is None else rest
        nothing = np.zeros((0, self.served.told["action_dim"]), np.float32)
        session = cast(Session, Elsewhere())
        return ServedRobot(session, memory, hold, rest, Adaptive(self.loop.check), extra_delay, nothing, client=client, instruction=instruction, seed=seed)

    def saw(self, robot: Robot, frames: Frames, states: Floats, executed: Floats) -> None:
        """See `Executor.saw`; all frames but the newest, which may go with a plan, are sent as they come."""
        super().saw(robot, frames, states, executed)
        self._tell(cast(ServedRobot, robot))

    def _ask(self, robots: list[Robot]) -> None:
        """Plan for robots that are due: each asks by itself, all at once."""
        with ThreadPoolExecutor(len(robots)) as pool:
            replies = list(pool.map(lambda robot: self._reply(cast(ServedRobot, robot)), robots))
        for robot, (reply, elapsed) in zip(robots, replies, strict=True):
            robot.startled = False
            if reply is None:
                continue
            robot.tally.plans += 1
            robot.tally.modes[self.loop.mode] += 1
            robot.tally.latency_ms.append(elapsed)
            robot.tally.gate.update({f"server: {reason}": count for reason, count in reply.reply["plan"]["interventions"].items()})
            plan = Plan(np.array(reply.actions)[None], None, _timings(reply.reply))
            way = Way(self.loop.mode, self.loop.sampling, searches=False)
            robot.pending = pending = self._pending(robot, way, plan, None, elapsed)
            self.watch(Made(robot, plan, elapsed, pending.ready if pending.origin is None else pending.origin))

    def _reply(self, robot: ServedRobot) -> tuple[Any, float]:
        """The server's plan and its milliseconds; None where its gate let nothing through, and the robot holds."""
        _, error_class = _client_package()
        begun = time.perf_counter()
        overlaps = self.loop.execution.time == "asynchronous"
        count = min(self.expected_delay(robot), len(robot.queue), self.served.told["action_horizon"] - 1) if overlaps else 0
        more: dict[str, Any] = {"mode": self.loop.mode, "seed": robot.seed, "committed": robot.queue[:count] if count else None}
        if self.steps is not None:
            more["steps"] = self.steps
        seen, executed = self._seen(robot, robot.now)
        try:
            plan = answer_of(lambda: robot.client.plan(seen, prompt=robot.instruction, executed=executed, **more))
        except ServerRefused as refused:
            if not isinstance(refused.__cause__, error_class) or refused.__cause__.code not in ("gate_refused", "stopped"):
                raise
            robot.tally.refused += 1
            robot.next_plan = robot.now + self.stride
            robot.stopped = str(refused) if refused.__cause__.code == "stopped" else None
            robot.told = robot.now
            return None, (time.perf_counter() - begun) * 1e3
        robot.told = robot.now
        return plan, (time.perf_counter() - begun) * 1e3

    def _tell(self, robot: ServedRobot) -> None:
        """Send what came since the server was last told, up to the frame before the newest."""
        assert robot.told is not None, "a robot's first observation goes with its first plan"
        for step in range(robot.told + self.stride, robot.now, self.stride):
            seen, executed = self._seen(robot, step)
            answer_of(partial(robot.client.observe, seen, **({} if executed is None else {"executed": executed})))
            robot.told = step

    def _seen(self, robot: ServedRobot, step: int) -> tuple[Any, Floats | None]:
        """What was seen at a control step, and what was executed since the server was last told (n, d)."""
        from wam_client import Observation

        frame = robot.memory.frame(step)
        state = next((state for at, state in reversed(robot.memory.states) if at == step), None)
        assert frame is not None
        views = np.split(frame, len(self.served.told["cameras"]), axis=1)
        images = {name: np.ascontiguousarray(view) for name, view in zip(self.served.told["cameras"], views, strict=True)}
        executed = [] if robot.told is None else [robot.memory.executed[i] for i in range(robot.told, step)]
        return Observation(step / self.served.told["control_hz"], images, state), np.stack(executed) if executed else None


def _timings(reply: Mapping[str, Any]) -> dict[str, float]:
    """Milliseconds by stage, as a plan of this process has them; decoding and waiting beside them."""
    own = {name.removesuffix("_ms").replace("_", " "): float(value) for name, value in reply["policy_timing"].items() if name != "infer_ms"}
    return own | {"decode": float(reply["server_timing"]["decode_ms"]), "queue": float(reply["server_timing"]["queue_ms"])}


def check_loop(served: Served, loop: Loop) -> None:
    """Check that plans, delays and frames of a loop fit what is served.

    Raises:
        ValueError: what does not fit, and what does.
    """
    horizon, stride, execution = int(served.told["block_actions"]), int(served.told["frame_stride"]), loop.execution
    if execution.time not in TIMES:
        raise ValueError(f"execution.time is {execution.time!r}, which a server's protocol has no words for; through a server: {', '.join(TIMES)}")
    if not 1 <= loop.replan <= horizon or loop.replan % stride:
        allowed = ", ".join(str(n) for n in range(stride, horizon + 1, stride))
        raise ValueError(f"rollout.replan is {loop.replan}, but frames come every {stride} control steps and a plan of this server holds {horizon}; use one of {allowed}")
    if execution.time != "synchronous" and execution.delay >= horizon:
        raise ValueError(f"execution.delay is {execution.delay}, and a plan holds {horizon} control steps: it would be over before it comes; use less")
