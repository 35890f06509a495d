"""`wam serve`: settings from the command line, a policy from its folder, a server until a signal."""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wam.config_runtime import add_runtime, runtime_of_flags

SERVE = """\
Serve plans to robots over websockets. openpi's and RoboArena's clients connect unchanged; packages/wam-client is
this project's own. Every robot has a memory of its own, robots that wait at the same time share a forward pass,
and an action gate stands between the model and the wire: nothing that breaks its limits is sent, and where there
is no plan there is an error with a code, never an action that was made up.

examples:
  wam serve runs/demo/train/checkpoint
  wam serve runs/droid --port 8000 --gate limits.yaml --mode skip --steps 4
  wam serve runs/droid --host 0.0.0.0 --api-key-file key --cert cert.pem --key key.pem
  wam serve runs/droid --dtype bfloat16 --compile       how the policy computes; ready when it is compiled
  wam serve runs/droid --clock steps --execute 8        clients that execute 8 actions of each plan
  wam serve runs/mine --name corner4=observation/image   the client's own name of a camera
  wam serve runs/droid --record recordings/monday        and later: wam replay recordings/monday --checkpoint runs/next

while it runs:
  GET /healthz   it is there          GET /readyz   the model is warm          GET /metrics   Prometheus
  GET /          a page to watch it, in a browser: frames, what was imagined, actions, latencies
  SIGHUP or POST /reload: the checkpoint is loaded anew and takes over, connections and memories stay; GET /reload: how that went
  Ctrl-C or SIGTERM: plans in flight are finished, then it closes; docs/serving.md has the protocol byte by byte

a file of limits (--gate), in the robot's units and seconds:
  otherwise: hold                  hold: send what comes before the first broken limit; stop: nothing until a reset; raise
  blend: 3                         mix the first 3 actions with what the plan before had for the same steps
  max_age_s: 1.0                   a plan from an older observation is not sent
  groups:
    joint_position: {low: -2.9, high: 2.9, velocity: 1.5, jerk: 200, jump: 0.2}
    gripper_position: {low: 0, high: 1}

writes: with --record, a LeRobot dataset (v3.0) and plans beside it, else nothing; the log goes to stderr, the address to
stdout once it is ready
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `wam serve`."""
    parser.add_argument("folder", metavar="CHECKPOINT", nargs="?", help="policy folder that `wam train` or `wam convert` wrote, or a Hub id")
    parser.add_argument("--checkpoint", metavar="CHECKPOINT", help="the same, as other commands take it")
    add_runtime(parser)
    parser.add_argument("--mode", metavar="NAME", help="how actions are had, where a request does not say (default: the acting mode trained most)")
    parser.add_argument("--steps", metavar="N", type=int, help="solver steps of a plan, where a request does not say (default: the checkpoint's)")
    parser.add_argument("--embodiment", metavar="NAME", help="the robot that is served (default: the checkpoint's)")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of sessions that bring none (default: 0)")
    parser.add_argument("--name", metavar="OURS=THEIRS", action="append", default=[], help="a client's name of a camera, a state group, state or prompt; more than once")
    parser.add_argument("--action-space", metavar="NAME", default="joint_position", help="told to RoboArena's clients: joint_position, joint_velocity, cartesian_position, cartesian_velocity")
    gate = parser.add_argument_group("safety")
    gate.add_argument("--gate", metavar="FILE", type=Path, help="YAML of limits, see above (default: numbers must be finite)")
    gate.add_argument("--check", metavar="NAME", default="auto", choices=("auto", "none", "plan", "forward"), help="compare what came with what was imagined, after wam calibrate: plan, its own; forward, of its actions; auto: plan where it imagines (default)")
    gate.add_argument("--check-steps", metavar="N", type=int, default=1, help="solver steps of forward (default: 1)")
    parser.add_argument("--record", metavar="DIR", type=Path, help="keep what robots saw and did as a LeRobot dataset, an episode a session")
    net = parser.add_argument_group("network")
    net.add_argument("--host", metavar="ADDRESS", default="127.0.0.1", help="where to listen; any but loopback needs a key (default: 127.0.0.1)")
    net.add_argument("--port", metavar="N", type=int, default=8000, help="0: any that is free (default: 8000)")
    net.add_argument("--api-key-file", metavar="FILE", type=Path, help="a file with the key that clients must send, readable by its owner alone")
    net.add_argument("--cert", metavar="FILE", type=Path, help="TLS certificate (PEM), with --key")
    net.add_argument("--key", metavar="FILE", type=Path, help="its private key (PEM)")
    limits = parser.add_argument_group("limits")
    limits.add_argument("--max-sessions", metavar="N", type=int, default=32, help="robots that are remembered (default: 32)")
    limits.add_argument("--max-connections", metavar="N", type=int, default=64, help="clients at once (default: 64)")
    limits.add_argument("--idle", metavar="SECONDS", type=float, default=600.0, help="a session unused for longer is forgotten (default: 600)")
    limits.add_argument("--rate", metavar="N", type=float, default=100.0, help="messages a second of a connection (default: 100)")
    limits.add_argument("--max-message", metavar="MIB", type=float, default=32.0, help="largest message (default: 32)")
    limits.add_argument("--max-batch", metavar="N", type=int, default=16, help="robots in a forward pass (default: 16)")
    limits.add_argument("--wait", metavar="MS", type=float, default=3.0, help="longest that a plan waits for others to share a forward pass (default: 3)")
    limits.add_argument("--grace", metavar="SECONDS", type=float, default=10.0, help="for plans in flight when it stops (default: 10)")
    clock = parser.add_argument_group("time, of messages that do not say it")
    clock.add_argument("--clock", metavar="NAME", default="auto", choices=("auto", "arrival", "steps"), help="arrival; steps: as if --execute actions passed between two; auto: steps for RoboArena's (default)")
    clock.add_argument("--execute", metavar="N", type=int, help="actions that a client executes of each plan (default: all)")
    clock.add_argument("--frame-tolerance", metavar="X", type=float, default=0.5, help="how far, in frame strides, a frame may be from its place (default: 0.5)")
    clock.add_argument("--frame-offsets", metavar="A,B", help="control steps of a message's frames, the last 0, e.g. -23,-16,-8,0 (default: evenly since the last message)")
    page = parser.add_argument_group("the page at /")
    page.add_argument("--no-page", action="store_true", help="no page to watch the server")
    page.add_argument("--watch-imagined", action="store_true", help="for the page, while it is open and the model rests: imagine what follows from plans that imagine nothing")
    parser.add_argument("--log", metavar="FORM", default="text", choices=("text", "json"), help="text or json (default: text)")


def run(args: argparse.Namespace) -> None:
    """Serve until SIGINT or SIGTERM.

    Raises:
        ValueError, OSError: settings, files or the checkpoint are not what they should be.
        ImportError: the extra is not installed.
    """
    if (args.folder is None) == (args.checkpoint is None):
        raise ValueError(f"{'no checkpoint is' if args.folder is None else 'two checkpoints are'} given; name one: wam serve runs/demo/train/checkpoint")
    args.checkpoint = args.checkpoint or args.folder
    try:
        import prometheus_client  # noqa: F401
        import websockets  # noqa: F401
    except ImportError as error:
        raise ImportError(f"the policy server cannot be imported ({error}); pip install 'wam[serve]'") from error

    from wam.serving import logs

    options = _options(args)
    names = _pairs(args.name)
    logs.set_up(args.log)
    worker = _worker(args, names)
    asyncio.run(_until_signal(worker, options, _recorder(args, worker), lambda: _load(args, names)))


def _options(args: argparse.Namespace) -> Any:
    """Network, limits and time, checked before a model is loaded."""
    from wam.serving.memory import TimeRules
    from wam.serving.options import ServeOptions, read_key
    from wam.serving.wire import MEBI, Limits

    if not 0 < args.max_message <= 1024:
        raise ValueError(f"--max-message is {args.max_message:g}; expected MiB, up to 1024")
    size = int(args.max_message * MEBI)
    return ServeOptions(
        host=args.host,
        port=args.port,
        api_key=None if args.api_key_file is None else read_key(args.api_key_file),
        certificate=args.cert,
        private_key=args.key,
        max_connections=args.max_connections,
        max_sessions=args.max_sessions,
        idle_s=args.idle,
        rate=args.rate,
        burst=max(1, int(args.rate / 2)) if 0 < args.rate < 1e9 else 1,
        grace_s=args.grace,
        page=not args.no_page,
        watch_imagined=args.watch_imagined,
        limits=Limits(message_bytes=size, array_bytes=size),
        times=TimeRules(args.clock, args.execute, args.frame_tolerance, _offsets(args.frame_offsets)),
    )


def _offsets(text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        offsets = tuple(float(part) for part in text.split(","))
    except ValueError:
        offsets = ()
    if not offsets or offsets[-1] != 0 or list(offsets) != sorted(set(offsets)):
        raise ValueError(f"--frame-offsets is {text!r}; expected rising control steps that end with 0, such as -23,-16,-8,0")
    return offsets


def _pairs(names: Sequence[str]) -> dict[str, str]:
    pairs = dict(name.split("=", 1) for name in names if "=" in name)
    if len(pairs) != len(names):
        raise ValueError(f"--name is given as {', '.join(names)}; expected OURS=THEIRS, each once, such as corner4=observation/image")
    return pairs


def _load(args: argparse.Namespace, names: dict[str, str]) -> Any:
    """The checkpoint, and what it takes and gives."""
    from wam.inference.check import SURPRISE, load_scale
    from wam.inference.saved import fingerprint
    from wam.pretrained import load_policy
    from wam.serving.contract import SPACES, Contract
    from wam.serving.reload import Loaded

    if args.action_space not in SPACES:
        raise ValueError(f"--action-space is {args.action_space!r}; expected one of {', '.join(SPACES)}")
    policy = load_policy(args.checkpoint, runtime_of_flags(args))
    about = {"checkpoint": fingerprint(policy)[:12], "checkpoint_step": policy.meta.get("step"), "preset": policy.config.preset}
    contract = Contract.of(policy, args.embodiment, names, args.action_space, {key: value for key, value in about.items() if isinstance(value, (int, str))})
    folder = Path(args.checkpoint)
    return Loaded(policy, contract, load_scale(folder) if (folder / SURPRISE).is_file() else None)


def _worker(args: argparse.Namespace, names: dict[str, str]) -> Any:
    """The policy with its contract, gate and thread."""
    from wam.inference.gate import Gate, GateConfig, read_gate
    from wam.serving.metrics import Metrics
    from wam.serving.worker import Worker, WorkerOptions

    loaded = _load(args, names)
    policy, contract = loaded.policy, loaded.contract
    mode = args.mode or contract.modes[0]
    if mode not in contract.modes:
        raise ValueError(f"--mode is {mode!r}; this policy acts in {', '.join(contract.modes)}")
    if args.steps is not None:
        policy.config.sampling.with_steps(args.steps)
    groups = [(g.name, g.size) for g in contract.robot.action_groups]
    config = GateConfig() if args.gate is None else read_gate(args.gate, groups, contract.robot.raw_action_dim)
    if not config.groups:
        logging.getLogger(__name__).warning("no limits are given (--gate): the gate only refuses numbers that are not finite")
    gate = Gate(config, contract.robot.raw_action_dim, contract.control_hz)
    options = WorkerOptions(mode, args.seed, args.max_batch, args.wait / 1e3, args.steps, args.check, args.check_steps)
    return Worker(policy, contract, gate, options, Metrics(), loaded.scale)


def _recorder(args: argparse.Namespace, worker: Any) -> Any:
    """What keeps what comes and goes, where that is asked for."""
    if args.record is None:
        return None
    from wam.serving.recorder import Recorder

    return Recorder(args.record, worker.contract, worker.metrics)


async def _until_signal(worker: Any, options: Any, recorder: Any, load: Any) -> None:
    from wam.serving.server import PolicyServer, run_server

    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    server = PolicyServer(worker, options, recorder, load)
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)

    def told(server: PolicyServer) -> None:
        scheme = "ws" if options.certificate is None else "wss"
        assert server.reloader is not None
        loop.add_signal_handler(signal.SIGHUP, server.reloader.begin)
        gc.collect()
        gc.freeze()  # the libraries' objects, hundreds of thousands, need not be looked through while a robot waits
        print(f"serving {worker.contract.robot.name} in mode {worker.options.mode!r} on {scheme}://{options.host}:{server.port}; Ctrl-C stops", flush=True)

    await run_server(server, stop, told)
