"""The command that measures."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from wam.commands.common import Command, add_overrides, names, positive
from wam.config import load_config

BENCH = """\
Measure how fast the network is: training and cached steps side by side with diffusers' own model over as many tokens,
modes and chunks against each other, what a session computes only once; and for the released sizes (on a GPU) every
stage of a chunk and of training against the machine's own matmul rate. Both sides run in turns, call by call.
And how fast data is read (`data`): this reader, raw decord and LeRobot's own over the same windows of the same files.
What a closed loop spends its time on (`loop`): stages of a plan, plans of several robots, episodes side by side and one by one.
What several candidates cost beside one (`planner`), drawn and imagined on one memory.
What a policy server gives many robots (`serve`), beside itself without batching and openpi's loop around the same policy; or, with --soak, whether it stays as it was.
And training (`train`): steps of a config by phase, on one process and on several, and the memory of every ZeRO stage against arithmetic.

examples:
  wam bench model                                                widths 256, 512 and 1024 on this CPU
  wam bench model --sizes 256 --quick                            only to see that all runs
  wam bench model --device cuda --sizes 1.3b,5b,14b --json gpu.json
  wam bench model --markdown --json cpu.json                     tables as docs/benchmarks.md has them
  wam bench data --lerobot-python lerobot/bin/python             readers, on datasets made for it
  wam bench data --data data/metaworld_sample --workers 0,4      on one that is there
  wam bench loop --checkpoint runs/demo/train/checkpoint         in the simulator that it was trained for
  wam bench planner --checkpoint runs/demo/train/checkpoint      eight candidates against one, on it and at widths 256, 512 and 1024
  wam bench serve --checkpoint runs/demo/train/checkpoint        latencies and plans a second of 1, 4 and 16 robots, in skip and joint
  wam bench serve --checkpoint runs/demo/train/checkpoint --soak 60          an hour of robots that come and go; exit code 1 if memory grows or a request is lost
  wam bench train data.root=data/metaworld_sample                where a step's time goes, and what each process holds, engine by engine
  wam bench train --engines ddp,zero3 --processes 4 training.batch_size=16

prints: the tables, and which limits hold; exit code 0 unless --check is given and one does not
writes: nothing, or every number as JSON (--json)
"""


REPEATS = {"loop": 20, "serve": 3}  # where it is not 9


def _bench_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", metavar="WHAT", choices=("model", "data", "loop", "planner", "serve", "train"), help="model, data, loop, planner, serve or train")
    parser.add_argument("--device", metavar="NAME", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--sizes", metavar="A,B", help="model, planner: widths, and of model 1.3b, 5b, 14b, tiny (default: 256,512,1024 on a CPU, 1.3b,5b,14b on a GPU); data: 64x64, 180x320")
    parser.add_argument("--dtype", metavar="NAME", help="float32 or bfloat16 (default: float32 on a CPU, bfloat16 on a GPU)")
    parser.add_argument("--threads", metavar="N", type=int, default=1, help="of a CPU (default: 1)")
    parser.add_argument("--repeats", metavar="N", type=int, help=f"rounds of both sides (default: 9; {', '.join(f'of {what} {count}' for what, count in REPEATS.items())})")
    parser.add_argument("--quick", action="store_true", help="two rounds and short sessions: shows that all runs, not how fast")
    parser.add_argument("--check", action="store_true", help="exit with an error where a limit does not hold")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write every number to FILE")
    parser.add_argument("--markdown", action="store_true", help="print the tables in Markdown")
    data = parser.add_argument_group("of data")
    data.add_argument("--data", metavar="DIR", type=Path, action="append", default=[], help="a LeRobot v3.0 dataset to read, also more than one (default: those of --sizes are made)")
    data.add_argument("--make", metavar="DIR", type=Path, help="where datasets are made, and found again (default: a folder that is removed)")
    data.add_argument("--lerobot-python", metavar="PATH", type=Path, help="python of another environment that has lerobot 0.4, to measure it too")
    data.add_argument("--workers", metavar="A,B", type=names, default=["0", "2"], help="loader processes (default: 0,2)")
    data.add_argument("--batch", metavar="N", type=positive, default=8, help="windows in a batch (default: 8)")
    loop = parser.add_argument_group("of loop")
    loop.add_argument("--checkpoint", metavar="DIR", type=Path, help="the policy that is driven, or served; of planner, one that is measured too")
    loop.add_argument("--env", metavar="NAME", default="metaworld/drawer-open-v3", help="where (default: metaworld/drawer-open-v3)")
    loop.add_argument("--modes", metavar="A,B", type=names, help="modes whose stages are measured; the first is driven (default: those of the checkpoint)")
    loop.add_argument("--robots", metavar="N", type=positive, default=16, help="side by side (default: 16)")
    serve = parser.add_argument_group("of serve (and --checkpoint, --modes)")
    serve.add_argument("--sessions", metavar="A,B", type=names, default=["1", "4", "16"], help="numbers of robots (default: 1,4,16)")
    serve.add_argument("--soak", metavar="MINUTES", type=float, help="in place of speed: robots that come and go, memory, and requests that are all accounted for")
    serve.add_argument("--rate", metavar="N", type=float, help="with --soak: requests a second of all robots together (default: as fast as they are answered)")
    train = parser.add_argument_group("of train")
    train.add_argument("--config", metavar="FILE", default="configs/metaworld_tiny.yaml", help="what is trained (default: configs/metaworld_tiny.yaml)")
    train.add_argument("--engines", metavar="A,B", type=names, help="single, ddp, zero1, zero2, zero3, fsdp2 (default: all)")
    train.add_argument("--processes", metavar="N", type=positive, default=2, help="of the engines that take several (default: 2)")
    add_overrides(parser, "section.key=value", "train: change a setting of the config, e.g. training.batch_size=16")


def _bench_data(args: argparse.Namespace) -> None:
    from wam.evaluation.bench.data import DataOptions, bench_data

    if not all(name.isdigit() for name in args.workers):
        raise ValueError(f"--workers is {','.join(args.workers)}; expected numbers of processes such as 0,2 (0: read in this one)")
    chosen = {name: value for name, value in vars(args).items() if name in DataOptions.__dataclass_fields__}
    given = {"sizes": args.sizes, "threads": args.threads, "workers": args.workers, "batch": args.batch}
    words = [w for flag, value in given.items() if value != args.parser.get_default(flag) for w in (f"--{flag}", ",".join(value) if isinstance(value, list) else str(value))]
    words = [*(w for path in args.data for w in ("--data", str(path))), *words, *(["--repeats", str(args.repeats)] if args.repeats != args.parser.get_default("repeats") else [])]
    words += [*(["--lerobot-python", str(args.lerobot_python)] if args.lerobot_python else []), *(["--quick"] if args.quick else [])]
    shapes = tuple(size for size in (args.sizes or "").split(",") if size)
    more = {"data": tuple(args.data), "shapes": shapes, "workers": tuple(map(int, args.workers)), "command": " ".join(["wam bench data", *words])}
    bench_data(DataOptions(**(chosen | more)))


def _bench_train(args: argparse.Namespace) -> None:
    from wam.evaluation.bench.train import ENGINES, TrainOptions, bench_train

    chosen = {name: getattr(args, name) for name in ("processes", "threads", "check", "json", "markdown")}
    given = {"config": args.config, "engines": ",".join(args.engines or []) or None, "processes": args.processes, "threads": args.threads, "repeats": args.repeats}
    words = [w for flag, value in given.items() if value is not None and value != args.parser.get_default(flag) for w in (f"--{flag}", str(value))]
    steps = 2 if args.quick else args.repeats
    bench_train(TrainOptions(load_config(args.config, args.overrides), tuple(args.engines or ENGINES), steps=steps, **chosen, command=" ".join(["wam bench train", *words, *(["--quick"] if args.quick else []), *args.overrides])))


def _bench_loop(args: argparse.Namespace) -> None:
    from wam.evaluation.bench.loop import LoopOptions, bench_loop

    if args.checkpoint is None:
        raise ValueError("wam bench loop drives a trained policy; name its folder, e.g. --checkpoint runs/demo/train/checkpoint")
    chosen = {name: getattr(args, name) for name in ("checkpoint", "env", "device", "robots", "threads", "quick", "check", "json", "markdown")}
    given = {name: getattr(args, name) for name in ("checkpoint", "env", "modes", "device", "robots", "threads", "repeats")}
    words = [w for flag, value in given.items() if value != args.parser.get_default(flag) for w in (f"--{flag}", ",".join(value) if isinstance(value, list) else str(value))]
    repeats = {} if args.repeats == args.parser.get_default("repeats") else {"repeats": args.repeats}
    command = " ".join(["wam bench loop", *words, *(["--quick"] if args.quick else [])])
    bench_loop(LoopOptions(**chosen, **repeats, modes=tuple(args.modes or ()), command=command))


def _bench_planner(args: argparse.Namespace) -> None:
    from wam.evaluation.bench.planner import PlannerOptions, bench_planner

    chosen = {name: getattr(args, name) for name in ("checkpoint", "threads", "repeats", "quick", "check", "json", "markdown")}
    words = [w for flag in ("checkpoint", "sizes", "threads", "repeats") if (value := getattr(args, flag)) != args.parser.get_default(flag) for w in (f"--{flag}", str(value))]
    sizes = tuple(size for size in (args.sizes or "").split(",") if size)
    bench_planner(PlannerOptions(**chosen, sizes=sizes, command=" ".join(["wam bench planner", *words, *(["--quick"] if args.quick else [])])))


def _bench_serve(args: argparse.Namespace) -> int:
    if args.checkpoint is None:
        raise ValueError("wam bench serve serves a trained policy; name its folder, e.g. --checkpoint runs/demo/train/checkpoint")
    if not all(name.isdigit() and int(name) for name in args.sessions):
        raise ValueError(f"--sessions is {','.join(args.sessions)}; expected numbers of robots such as 1,4,16")
    try:
        import websockets  # noqa: F401
    except ImportError as error:
        raise ImportError(f"the policy server cannot be imported ({error}); pip install 'wam[serve]'") from error
    if args.soak is not None:
        from wam.evaluation.bench.serve_soak import SoakOptions, bench_soak

        if args.soak <= 0:
            raise ValueError(f"--soak is {args.soak:g}; expected minutes, above 0")
        if args.rate is not None and args.rate <= 0:
            raise ValueError(f"--rate is {args.rate:g}; expected requests a second, above 0")
        mode = {"mode": args.modes[0]} if args.modes else {}
        return bench_soak(SoakOptions(checkpoint=args.checkpoint, minutes=args.soak, rate=args.rate, device=args.device, threads=args.threads, json=args.json, **mode))

    from wam.evaluation.bench.serve import ServeBenchOptions, bench_serve

    chosen = {name: getattr(args, name) for name in ("checkpoint", "device", "threads", "repeats", "quick", "check", "json", "markdown")}
    given = {name: getattr(args, name) for name in ("checkpoint", "modes", "sessions", "device", "threads", "repeats")}
    words = [w for flag, value in given.items() if value != args.parser.get_default(flag) for w in (f"--{flag}", ",".join(value) if isinstance(value, list) else str(value))]
    more: dict[str, Any] = {"modes": tuple(args.modes)} if args.modes else {}
    command = " ".join(["wam bench serve", *words, *(["--quick"] if args.quick else [])])
    bench_serve(ServeBenchOptions(**chosen, **more, sessions=tuple(map(int, args.sessions)), command=command))
    return 0


def _bench(args: argparse.Namespace) -> int:
    usual = REPEATS.get(args.what, 9)
    args.repeats = usual if args.repeats is None else args.repeats
    args.parser.set_defaults(repeats=usual)  # what need not be told in the command that a report names
    if args.what == "train":
        _bench_train(args)
        return 0
    if args.overrides:
        raise ValueError(f"wam bench {args.what} reads no config, so {' '.join(args.overrides)} changes nothing; leave it out, or use wam bench train")
    if args.what == "data":
        _bench_data(args)
        return 0
    if args.what == "loop":
        _bench_loop(args)
        return 0
    if args.what == "planner":
        _bench_planner(args)
        return 0
    if args.what == "serve":
        return _bench_serve(args)

    from wam.evaluation.bench.run import Options, bench_model

    chosen = {name: value for name, value in vars(args).items() if name in Options.__dataclass_fields__}
    words = [w for flag in ("device", "sizes", "dtype", "threads", "repeats") if (value := getattr(args, flag)) != args.parser.get_default(flag) for w in (f"--{flag}", str(value))]
    chosen["sizes"] = tuple(size for size in (args.sizes or "").split(",") if size)
    bench_model(Options(**{**chosen, "command": " ".join(["wam bench model", *words, *(["--quick"] if args.quick else [])])}))
    return 0


COMMANDS = (
    Command("bench", "measure how fast the network is", BENCH, _bench_arguments, _bench),
)
