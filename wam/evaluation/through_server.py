"""Closed-loop evaluation through a policy server: the same episodes as in this process, with a wire between.

    environment  -- frames, states, what was executed -->  observe      one session_id a row, one connection each,
                 -- what is decided already ----------->  plan         so that plans which are due together share a forward pass
                 <-- actions --------------------------   through the gate, into the queue: as `wam.inference.executor` does

Each frame is sent with its time, its state and the actions before it, so the server's memory is that of a rollout in its own process, and
with the same seeds so are the outcomes.  No checkpoint is read here: what is needed of one the server tells as one connects.  What the
wire does not carry (planners, goal images, checks of what was imagined) is refused, not left out.  A connection that breaks ends the
evaluation: what came of an episode without its plans would say nothing about the policy.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast
from uuid import uuid4

import numpy as np

from wam.config import CheckConfig, ExecutionConfig, PlannerConfig, RolloutConfig, SamplingConfig
from wam.evaluation.environments import Floats, Frames
from wam.evaluation.episodes import Driver
from wam.evaluation.results import RESULTS, episodes_identity, is_complete, now, open_results
from wam.evaluation.rollout import Run, drive_mode, first_plan, kept_of
from wam.evaluation.vector import VectorEnv
from wam.files import write_json_atomic
from wam.inference.adapt import Adaptive
from wam.inference.executor import LATENCIES, Executor
from wam.inference.gate import Gate, GateConfig, read_gate
from wam.inference.memory import PolicySpan, StepMemory
from wam.inference.robot import Loop, Made, Robot, Way
from wam.inference.session import Plan, Session
from wam.pretrained import Policy

log = logging.getLogger(__name__)

TIMES = ("synchronous", "asynchronous", "naive")  # `guided` and `ahead` reach into the sampling and the memory
NEEDED = ("embodiment", "cameras", "camera_size", "state_dim", "action_dim", "action_groups", "action_horizon", "block_actions", "control_hz", "frame_stride", "context_blocks", "modes")
BUSY_S, TRIES = 0.1, 100  # a server that takes no more messages this second is asked again
TIMEOUT_S = 60.0  # of a reply


class ServerRefused(RuntimeError):
    """A policy server gave no plan, and the episode cannot go on without."""


class _Elsewhere:
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


def _ask(call: Callable[[], Any]) -> Any:
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
        _ask(client.reset)
        memory = StepMemory(self.span)
        memory.begin(frame, state)
        rest = np.full_like(hold, np.nan) if rest is None else rest
        nothing = np.zeros((0, self.served.told["action_dim"]), np.float32)
        session = cast(Session, _Elsewhere())
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
            plan = _ask(lambda: robot.client.plan(seen, prompt=robot.instruction, executed=executed, **more))
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
            _ask(partial(robot.client.observe, seen, **({} if executed is None else {"executed": executed})))
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


@dataclass(frozen=True)
class ServedDriver(Driver):
    """A driver without a policy of its own.

    Attributes:
        steps: solver steps; None: the server's.
    """

    served: Served | None = None
    steps: int | None = None

    @property
    def stride(self) -> int:
        """See `Driver.stride`."""
        assert self.served is not None
        return int(self.served.told["frame_stride"])

    @property
    def imagines_aside(self) -> bool:
        """No: nothing is asked beside the plans."""
        return False

    def executor(self, gate: Gate, watch: Callable[[Made], None]) -> Executor:
        """See `Driver.executor`."""
        assert self.served is not None
        return ServedExecutor(self.served, self.loop, self.steps, gate, watch)


# ------------------------------------------------------------------------------------------------ evaluation


def rollout_through_server(config: RolloutConfig, output: Path) -> dict[str, Any]:
    """`wam.evaluation.rollout.rollout` with the plans of `config.server`.

    Raises:
        ValueError: settings, environment and what is served do not fit, or results of another run in `output`.
        ServerRefused: the server gives no plans.
        ImportError: wam-client is not installed.
        EnvironmentCrash, KeyboardInterrupt: as `rollout`.
    """
    assert config.server is not None
    served = Served.connect(config.server, config.key_file)
    try:
        check_settings(served, config)
        path = Path(output) / RESULTS
        results = open_results(path, identity(served, config))
        todo = [mode for mode in config.modes if not is_complete(results["modes"].get(mode), config)]
        if not todo and results["finished"]:
            log.info("%s already holds these episodes, of the same policy with the same settings; nothing to do", path)
            return results
        results |= {"finished": None}
        with open_environment(served, config) as env:
            check_environment(served, env)
            run = Run(config, env, lambda mode: driver_of(served, mode, config), None, lambda seeds: {}, results, path)
            for mode in todo:
                drive_mode(run, mode)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(kept_of(results, path)) from None
    finally:
        served.close()
    results["finished"] = now()
    write_json_atomic(path, results)
    return results


def dry_run_through_server(config: RolloutConfig) -> str:
    """`wam.evaluation.rollout.dry_run` with the plans of `config.server`.

    Raises:
        ValueError, ServerRefused, ImportError, EnvironmentCrash: as `rollout_through_server`.
    """
    config = replace(config, batch=1, execution=ExecutionConfig())
    assert config.server is not None
    served = Served.connect(config.server, config.key_file)
    try:
        check_settings(served, config)
        with open_environment(served, config) as env:
            check_environment(served, env)
            return "\n".join(line for mode in config.modes for line in first_plan(driver_of(served, mode, config), env, config.seed))
    finally:
        served.close()


def identity(served: Served, config: RolloutConfig) -> dict[str, Any]:
    """What decides an episode's outcome, as far as the server tells it."""
    told = served.told
    steps = "the server's" if config.steps is None else config.steps
    policy_is = {"checkpoint_sha256": told.get("checkpoint"), "server": f"{told.get('server')}, protocol {told.get('protocol_version')}", "sampling": {"steps": steps}}
    return policy_is | {"control_hz": told["control_hz"]} | episodes_identity(config, replan_of(served, config))


def replan_of(served: Served, config: RolloutConfig) -> int:
    """Control steps executed of each plan."""
    return int(served.told["block_actions"]) if config.replan is None else config.replan


def driver_of(served: Served, mode: str, config: RolloutConfig) -> ServedDriver:
    """The driver that a rollout's settings ask for."""
    groups = [(name, int(size)) for name, size in served.told["action_groups"].items()]
    gate: GateConfig | None = None if config.gate is None else read_gate(Path(config.gate), groups, int(served.told["action_dim"]))
    policy, given = cast(Policy, _Elsewhere()), {"execution": config.execution, "disturbances": config.disturbances, "gate": gate, "overlap": config.overlap}
    return ServedDriver(policy, mode, SamplingConfig(), replan_of(served, config), config.seed, served=served, steps=config.steps, **given)  # type: ignore[arg-type]


def check_settings(served: Served, config: RolloutConfig) -> None:
    """Check what can be checked before a simulator is started.

    Raises:
        ValueError: a setting that cannot be had through a server, or that does not fit what is served.
    """
    wanted: list[tuple[str, bool]] = [
        ("rollout.check.source", config.check != CheckConfig()),
        ("rollout.planner", config.planner != PlannerConfig()),
        ("rollout.agreement", config.agreement),
        ("rollout.record", config.record is not None),
        ("rollout.execution.budget_ms", config.execution.budget_ms is not None),
    ]
    for name, asked in wanted:
        if asked:
            raise ValueError(f"{name} needs the policy in this process, and plans come from {served.url}; leave it out, or evaluate with --checkpoint (a server records by itself: wam serve --record)")
    for mode in config.modes:
        if mode not in served.told["modes"]:
            raise ValueError(f"mode {mode!r} is not served at {served.url}; modes: {', '.join(served.told['modes'])} (--mode)")
        check_loop(served, Loop(mode, SamplingConfig(), replan_of(served, config), config.execution))


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


def open_environment(served: Served, config: RolloutConfig) -> VectorEnv:
    """The environment, drawn as large as the policy sees each camera; the server lays the pictures on its canvas."""
    cameras, (high, wide) = tuple(served.told["cameras"]), served.told["camera_size"]
    settings: dict[str, Any] = {"camera": cameras[0] if len(cameras) == 1 else cameras, "image_size": high if high == wide else (high, wide)}
    rows = 1 if config.execution.realtime else min(config.batch, config.episodes)
    return VectorEnv(config.env, rows, config.workers, max_steps=config.max_steps, disturbances=config.disturbances, **settings)


def check_environment(served: Served, env: VectorEnv) -> None:
    """Check that an environment is the robot that is served.

    Raises:
        ValueError: cameras, sizes or control rates that differ.
    """
    told = served.told
    compared = [
        ("cameras", ", ".join(told["cameras"]), ", ".join(getattr(env, "cameras", told["cameras"]))),
        ("state", f"{told['state_dim']} numbers", f"{env.state_dim} numbers"),
        ("action", f"{told['action_dim']} numbers", f"{env.action_dim} numbers"),
        ("control rate", f"{told['control_hz']:g} a second", f"{env.control_hz:g} a second"),
    ]
    differs = [f"{what}: {ours} served, {theirs} in the environment" for what, ours, theirs in compared if ours != theirs]
    if differs:
        raise ValueError(f"{env.name} is not the robot that {served.url} serves: {'; '.join(differs)}; use an environment of that robot, or serve a checkpoint trained on this one")
