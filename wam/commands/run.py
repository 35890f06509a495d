"""Commands that train, drive, imagine and report."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

from wam.commands.common import Command, add_checkpoint, add_config, add_output, add_overrides, beside, flag_overrides, names, runtime_flags, section
from wam.config import ImagineConfig, RolloutConfig, load_config
from wam.config_execution import TimeMode
from wam.config_runtime import add_runtime

TRAIN = """\
Train one model on every mode of the config. If the output directory holds a training state, training goes on from
it, to the bit; --fresh starts over and moves what was there to previous/. Ctrl-C (or SIGTERM) finishes the step, saves
and stops; once more stops at once.

examples:
  wam train                                          the config's steps, into its output directory
  wam train --config configs/metaworld_tiny.yaml training.steps=200 --output runs/try
  wam train training.max_minutes=15 training.learning_rate=5e-4
  wam train 'training.modes={skip: 1}' --output runs/skip_only --fresh
  wam train training.finetune_from=runs/demo/train/checkpoint --output runs/tuned    a new run from a policy's weights

writes (in output, or --output):
  config.yaml                the resolved settings
  checkpoint/                weights, codec, normaliser and settings: all that `wam rollout` needs
  best/                      the same, of the best validation
  state/                     what the run goes on from
  skipped/                   batches that were left out, where there were any
  and the log of the run
"""


def _train_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    add_output(parser, "run directory (the config's output)")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--fresh", action="store_true", help="start over instead of going on from a state in the run directory, which is moved aside")
    how.add_argument("--resume", action="store_true", help="refuse to start a run: there must be a state to go on from (going on is the default where there is one)")


def _train(args: argparse.Namespace) -> None:
    config = load_config(args.config, [*args.overrides, *flag_overrides({"output": args.output and str(args.output)})])

    from wam.training.loop import train

    if args.resume:
        from wam.training.state import require_state

        require_state(Path(config.output), config)
    checkpoint = train(config, Path(config.output), not args.fresh)
    print(f"wrote {checkpoint}")


EVALUATE = f"""\
Drive a robot in a simulator, closed loop, and count successes. Every mode sees the same episodes (the same seeds), so
that two policies or two modes can be compared episode by episode (wam paired).

examples:
  wam evaluate --checkpoint runs/demo/train/checkpoint
  wam evaluate --checkpoint runs/demo/train/checkpoint --env metaworld/drawer-open-v3 --mode joint --episodes 50
  wam evaluate --checkpoint runs/demo/train/checkpoint --mode skip,joint --replan 4 --steps 8 rollout.videos=10
  wam evaluate --checkpoint runs/metaworld_mt10/checkpoint --env metaworld/mt10 --mode skip      ten tasks, one table (also mt50)
  wam evaluate --checkpoint DIR --time asynchronous --delay 8             the next plan is made while this one runs, and takes 8 control steps
  wam evaluate --checkpoint DIR --mode skip --time synchronous,asynchronous,naive --delay 0,4,8       success against delay, a table and a picture
  wam evaluate --checkpoint DIR --time asynchronous --realtime            as many as it really takes on this machine
  wam evaluate --checkpoint DIR --budget 80 --mode joint,skip             the first of these modes that plans within 80 ms, with the steps that fit
  wam evaluate --checkpoint DIR --disturb object_moved,arm_pushed rollout.check.source=forward     replan on surprise (needs wam calibrate)
  wam evaluate --checkpoint DIR rollout.planner.kind=best_of_n            several plans, imagined, and the best of them
  wam evaluate --checkpoint DIR rollout.record=data/driven                every episode into a LeRobot dataset
  wam evaluate --checkpoint DIR --device cuda:1 --dtype bfloat16 --compile      how the policy computes (rollout.runtime)
  wam evaluate --checkpoint DIR --dry-run                                 print the first plan of each mode; nothing moves
  wam evaluate --server ws://127.0.0.1:8000 --mode skip                   plans from a policy server (wam serve); no checkpoint here

writes (beside the checkpoint in rollout-<task>/, of a server in runs/served/rollout-<task>/, or --output):
  success with counts and intervals, one row an episode (seed, outcome, length, interventions of the gate, latencies), versions, command, mp4 of the first episodes

defaults: env {RolloutConfig().env}, modes {",".join(RolloutConfig().modes)}, {RolloutConfig().episodes} episodes from seed {RolloutConfig().seed}
It has two names: evaluate and rollout.
"""


def _rollout_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", metavar="DIR", type=Path, help="a checkpoint directory written by `wam train`")
    parser.add_argument("--server", metavar="URL", help="a policy server that makes the plans, in place of a checkpoint (rollout.server)")
    parser.add_argument("--key-file", metavar="FILE", help="with that server's API key (rollout.key_file)")
    parser.add_argument("--env", metavar="NAME", help="environment, e.g. metaworld/drawer-open-v3 (rollout.env)")
    parser.add_argument("--mode", metavar="A,B", type=names, help="ways to get actions from the model; `wam relations` lists them (rollout.modes)")
    parser.add_argument("--episodes", metavar="N", type=int, help="episodes of each mode (rollout.episodes)")
    parser.add_argument("--seed", metavar="N", type=int, help="seed of the first episode (rollout.seed)")
    parser.add_argument("--replan", metavar="N", type=int, help="control steps between plans; default: the whole block (rollout.replan)")
    parser.add_argument("--steps", metavar="N", type=int, help="solver steps of a plan (rollout.steps)")
    parser.add_argument("--time", metavar="HOW", type=times, help=f"how plans meet time: {', '.join(get_args(TimeMode))} (rollout.execution.time); several, with delays, are compared")
    parser.add_argument("--delay", metavar="N", type=counts, help="control steps that the world moves on while a plan is made (rollout.execution.delay); several draw a curve")
    parser.add_argument("--realtime", action="store_true", default=None, help="as many as plans really take here; one robot at a time (rollout.execution.realtime)")
    parser.add_argument("--budget", metavar="MS", type=float, help="milliseconds a plan may take (rollout.execution.budget_ms)")
    parser.add_argument("--disturb", metavar="A,B", type=names, help="what goes wrong on purpose (rollout.disturbances.kinds)")
    parser.add_argument("--dry-run", action="store_true", help="print the first plan of each mode, and move nothing")
    add_runtime(parser)
    add_output(parser, "where results go (default: beside the checkpoint)")
    add_overrides(parser, "rollout.key=value", "change a setting, e.g. rollout.batch=10 rollout.videos=0")


def times(text: str) -> list[str]:
    """`asynchronous,naive`, of the ways there are."""
    given = names(text)
    strange = [name for name in given if name not in get_args(TimeMode)]
    if strange:
        raise argparse.ArgumentTypeError(f"{', '.join(strange)}: expected some of {', '.join(get_args(TimeMode))}")
    return given


def counts(text: str) -> list[int]:
    """`0,4,8`."""
    given = names(text)
    if not all(number.isdigit() for number in given):
        raise argparse.ArgumentTypeError("expected control steps, e.g. 8 or 0,4,8")
    return [int(number) for number in given]


def _rollout(args: argparse.Namespace) -> None:
    sweep = len(args.delay or ()) > 1 or len(args.time or ()) > 1
    flags = {
        "rollout.env": args.env,
        "rollout.modes": args.mode,
        "rollout.episodes": args.episodes,
        "rollout.seed": args.seed,
        "rollout.replan": args.replan,
        "rollout.steps": args.steps,
        "rollout.execution.time": args.time[0] if args.time and not sweep else None,
        "rollout.execution.delay": args.delay[0] if args.delay and not sweep else None,
        "rollout.execution.realtime": args.realtime,
        "rollout.execution.budget_ms": args.budget,
        "rollout.disturbances.kinds": args.disturb,
        "rollout.server": args.server,
        "rollout.key_file": args.key_file,
    }
    config = section(RolloutConfig, "rollout", [*args.overrides, *flag_overrides(flags | runtime_flags(args, "rollout"))])
    if (args.checkpoint is None) == (config.server is None):
        raise ValueError("plans come from a checkpoint or from a server; give one of --checkpoint DIR and --server ws://host:port")
    output = args.output or beside(args.checkpoint or Path("runs/served/checkpoint"), f"rollout-{config.env.rsplit('/', 1)[-1]}")

    if args.dry_run:
        from wam.evaluation.rollout import dry_run

        print(dry_run(args.checkpoint, config))
        return

    if sweep:
        from wam.evaluation import delays

        found = delays.rollout_delays(args.checkpoint, config, args.time or [config.execution.time], args.delay or [config.execution.delay], output)
        print(f"{delays.table(found)}\nwrote {output}")
        return

    from wam.evaluation.results import summary
    from wam.evaluation.rollout import rollout
    from wam.evaluation.suite import SUITES, rollout_suite, table

    if config.env in SUITES:
        print(table(rollout_suite(args.checkpoint, config, output)))
    else:
        print(summary(rollout(args.checkpoint, config, output)))
    print(f"wrote {output}")


IMAGINE = """\
Let the model imagine video from one frame of held-out episodes, given the actions that followed, and compare it
with what happened.

examples:
  wam imagine --checkpoint runs/demo/train/checkpoint
  wam imagine --checkpoint runs/demo/train/checkpoint --clips 4 --blocks 8 --output runs/demo/long
  wam imagine --checkpoint runs/demo/train/checkpoint --dataset data/metaworld imagine.seed=1

writes (beside the checkpoint in imagine/, or --output):
  video of imagined next to real, and the error of each block
"""


def _imagine_arguments(parser: argparse.ArgumentParser) -> None:
    add_checkpoint(parser)
    parser.add_argument("--dataset", metavar="DIR", help="LeRobot dataset (default: the one the checkpoint was trained on)")
    parser.add_argument("--clips", metavar="N", type=int, help="clips (imagine.clips)")
    parser.add_argument("--blocks", metavar="N", type=int, help="blocks imagined one after another (imagine.blocks)")
    parser.add_argument("--steps", metavar="N", type=int, help="solver steps of a block (imagine.steps)")
    add_runtime(parser)
    add_output(parser, "where results go (default: beside the checkpoint)")
    add_overrides(parser, "imagine.key=value", "change a setting, e.g. imagine.seed=1")


def _imagine(args: argparse.Namespace) -> None:
    flags = {"imagine.clips": args.clips, "imagine.blocks": args.blocks, "imagine.steps": args.steps} | runtime_flags(args, "imagine")
    config = section(ImagineConfig, "imagine", [*args.overrides, *flag_overrides(flags)])
    output = args.output or beside(args.checkpoint, "imagine")

    from wam.evaluation.imagination import imagine

    imagine(args.checkpoint, config, output, args.dataset)
    print(f"wrote {output}")


DEMO = """\
Everything on one task: collect demonstrations, train, drive the robot in every mode, imagine, and write a report.
Stages that are finished are kept: run it again to go on after an interruption.

examples:
  wam demo
  wam demo --task door-open-v3
  wam demo training.steps=200 rollout.episodes=10 --output runs/quick

writes (in runs/demo, runs/demo-<task> for another task, or --output):
  the dataset's checks, the trained checkpoint, rollouts, imagined video and the report, whose path is printed last
"""


def _demo_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.add_argument("--task", metavar="NAME", default="drawer-open-v3", help="Meta-World task (default: drawer-open-v3)")
    add_output(parser, "run directory")


def _demo(args: argparse.Namespace) -> None:
    config = load_config(args.config, args.overrides)

    from wam.evaluation.demo import demo

    print(f"wrote {demo(config, args.task, args.output)}")


REPORT = """\
Write the report of a run again from the numbers, curves and videos in its directory.

examples:
  wam report runs/demo

writes: the report in the run directory; its path is printed
"""


def _report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", type=Path, help="run directory, e.g. runs/demo")


def _report(args: argparse.Namespace) -> None:
    from wam.evaluation.report import write_report

    print(f"wrote {write_report(args.run)}")


COMMANDS = (
    Command("train", "train a model, or go on training it", TRAIN, _train_arguments, _train),
    Command("evaluate", "drive a robot in a simulator and count successes", EVALUATE, _rollout_arguments, _rollout),
    Command("rollout", "another name of evaluate", EVALUATE.replace("wam evaluate", "wam rollout"), _rollout_arguments, _rollout),
    Command("imagine", "compare imagined video with what happened", IMAGINE, _imagine_arguments, _imagine),
    Command("demo", "collect, train, drive and report one task", DEMO, _demo_arguments, _demo),
    Command("report", "write the report of a run again", REPORT, _report_arguments, _report),
)
