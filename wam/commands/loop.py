"""Commands that prepare a closed loop."""

from __future__ import annotations

import argparse

from wam.commands.common import Command, add_checkpoint, add_overrides, flag_overrides, section
from wam.config_check import CalibrateConfig

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
    add_overrides(parser, "calibrate.key=value", "change a setting, e.g. calibrate.seed=1")


def _calibrate(args: argparse.Namespace) -> None:
    config = section(CalibrateConfig, "calibrate", [*args.overrides, *flag_overrides({"calibrate.clips": args.clips, "calibrate.blocks": args.blocks})])

    from wam.evaluation.calibrate import calibrate, table
    from wam.inference.check import SURPRISE

    print(table(calibrate(args.checkpoint, config, args.dataset)))
    print(f"wrote {args.checkpoint / SURPRISE}")


COMMANDS = (Command("calibrate", "measure the errors that surprise is counted in", CALIBRATE, _calibrate_arguments, _calibrate),)
