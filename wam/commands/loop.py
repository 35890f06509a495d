"""Commands that prepare a closed loop."""

from __future__ import annotations

import argparse

from wam.commands.common import Command, add_checkpoint, add_output, add_overrides, beside, flag_overrides, names, runtime_flags, section
from wam.config_check import CalibrateConfig, CheckConfig, TrialConfig
from wam.config_runtime import add_runtime

CALIBRATE = """\
Measure how wrong a checkpoint's imagination usually is on held-out episodes. The closed loop's check compares what
was imagined with what comes in these units: a surprise of 1.0 is above 95 of 100 held-out latent frames.

examples:
  wam calibrate --checkpoint runs/demo/train/checkpoint
  wam calibrate --checkpoint runs/demo/train/checkpoint --dataset data/metaworld --clips 96
  wam calibrate --checkpoint runs/demo/train/checkpoint calibrate.steps=8 'calibrate.forward_steps=[1, 4]'

writes:
  surprise.json in the checkpoint's folder, for these weights only; a table of errors, and of the false alarms to expect
"""


def _calibrate_arguments(parser: argparse.ArgumentParser) -> None:
    add_checkpoint(parser)
    parser.add_argument("--dataset", metavar="DIR", help="LeRobot dataset (default: the one the checkpoint was trained on)")
    parser.add_argument("--clips", metavar="N", type=int, help="held-out stretches (calibrate.clips)")
    parser.add_argument("--blocks", metavar="N", type=int, help="blocks of each (calibrate.blocks)")
    add_runtime(parser)
    add_overrides(parser, "calibrate.key=value", "change a setting, e.g. calibrate.seed=1")


def _calibrate(args: argparse.Namespace) -> None:
    flags = {"calibrate.clips": args.clips, "calibrate.blocks": args.blocks} | runtime_flags(args, "calibrate")
    config = section(CalibrateConfig, "calibrate", [*args.overrides, *flag_overrides(flags)])

    from wam.evaluation.calibrate import calibrate, table
    from wam.inference.check import SURPRISE

    print(table(calibrate(args.checkpoint, config, args.dataset)))
    print(f"wrote {args.checkpoint / SURPRISE}")


SURPRISE = f"""\
Try the check in a simulator: episodes without and with disturbances, and how well surprise tells them apart (AUROC by
latent frame since something happened, and shares above thresholds). Nothing is replanned. Calibrate first.

examples:
  wam surprise --checkpoint runs/demo/train/checkpoint
  wam surprise --checkpoint runs/demo/train/checkpoint --kinds arm_pushed,occlusion --episodes 20
  wam surprise --checkpoint runs/demo/train/checkpoint --source plan --mode joint surprise.strength=0.5

writes (beside the checkpoint in surprise/, or --output):
  every episode's surprises, and a figure

defaults: env {TrialConfig().env}, mode {TrialConfig().mode}, {TrialConfig().episodes} episodes of each kind: {",".join(TrialConfig().kinds)}
"""


def _surprise_arguments(parser: argparse.ArgumentParser) -> None:
    add_checkpoint(parser)
    parser.add_argument("--env", metavar="NAME", help="environment (surprise.env)")
    parser.add_argument("--mode", metavar="NAME", help="how the policy acts (surprise.mode)")
    parser.add_argument("--kinds", metavar="A,B", type=names, help="disturbances (surprise.kinds)")
    parser.add_argument("--episodes", metavar="N", type=int, help="episodes of each kind, and without any (surprise.episodes)")
    parser.add_argument("--source", choices=("forward", "plan"), default="forward", help="what is compared (default: forward, imagined from the plan's actions)")
    parser.add_argument("--steps", metavar="N", type=int, default=1, help="solver steps of forward (default: 1)")
    add_output(parser, "where results go (default: beside the checkpoint)")
    add_overrides(parser, "surprise.key=value", "change a setting, e.g. surprise.strength=0.5")


def _surprise(args: argparse.Namespace) -> None:
    flags = {"surprise.env": args.env, "surprise.mode": args.mode, "surprise.kinds": args.kinds, "surprise.episodes": args.episodes}
    config = section(TrialConfig, "surprise", [*args.overrides, *flag_overrides(flags)])
    check = CheckConfig(source=args.source, steps=args.steps)
    output = args.output or beside(args.checkpoint, "surprise")

    from wam.evaluation.surprise_trial import text, trial

    print(text(trial(args.checkpoint, config, check, output)))
    print(f"wrote {output}")


COMMANDS = (
    Command("calibrate", "measure the errors that surprise is counted in", CALIBRATE, _calibrate_arguments, _calibrate),
    Command("surprise", "try the check on disturbed episodes", SURPRISE, _surprise_arguments, _surprise),
)
