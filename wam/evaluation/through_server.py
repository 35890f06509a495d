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
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from wam.config import CheckConfig, ExecutionConfig, PlannerConfig, RolloutConfig, SamplingConfig
from wam.config_runtime import RuntimeConfig
from wam.evaluation.episodes import Driver
from wam.evaluation.results import RESULTS, episodes_identity, is_complete, now, open_results
from wam.evaluation.rollout import Run, drive_mode, first_plan, kept_of
from wam.evaluation.served import Elsewhere, Served, ServedExecutor, check_loop
from wam.evaluation.vector import VectorEnv
from wam.files import write_json_atomic
from wam.inference.executor import Executor
from wam.inference.gate import Gate, GateConfig, read_gate
from wam.inference.planner import Simulate
from wam.inference.robot import Loop, Made
from wam.pretrained import Policy

log = logging.getLogger(__name__)


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

    def executor(self, gate: Gate, watch: Callable[[Made], None], simulate: Simulate) -> Executor:
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
    policy, given = cast(Policy, Elsewhere()), {"execution": config.execution, "disturbances": config.disturbances, "gate": gate, "overlap": config.overlap}
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
        ("rollout.runtime", config.runtime != RuntimeConfig()),
    ]
    for name, asked in wanted:
        if asked:
            raise ValueError(f"{name} needs the policy in this process, and plans come from {served.url}; leave it out, or evaluate with --checkpoint (a server records by itself: wam serve --record)")
    for mode in config.modes:
        if mode not in served.told["modes"]:
            raise ValueError(f"mode {mode!r} is not served at {served.url}; modes: {', '.join(served.told['modes'])} (--mode)")
        check_loop(served, Loop(mode, SamplingConfig(), replan_of(served, config), config.execution))


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
