"""The command that asks where prediction should live."""

from __future__ import annotations

import argparse
from pathlib import Path

from wam.commands.common import Command, add_overrides

CONFIG = Path("configs/compare_tiny.yaml")
COMPARE = f"""\
Where should prediction live: nowhere, in training only, beside the actions, before them, or wherever one likes? Train
one set of weights that knows every mode and one for each answer, under the same data and the same budget; drive all of
them on the same seeds, undisturbed and disturbed; time them in turns; and write one report with paired tests, what the
numbers support and what they do not. Finished phases are kept: run it again to go on after an interruption.

examples:
  wam compare --dry-run                                              what would be done, and about how long it takes
  wam compare --quick                                                everything once, in small: the numbers mean nothing
  wam compare --config {CONFIG} --output runs/compare
  wam compare rollout.episodes=200 compare.budget.steps=800 --output runs/longer
  wam compare compare.budget.equal=minutes compare.budget.minutes=10 --output runs/by_the_clock
  wam compare --checkpoint all=runs/demo/train/checkpoint --output runs/taken          the budget is then what that one had
  wam compare 'compare.variants=[all, fast_wam]' --output runs/two

writes (in runs/compare, runs/compare-quick with --quick, or --output):
  demonstrations, checkpoints and episodes of every variant, all figures and tests as JSON, and the report, whose path is printed last
"""


def _compare_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="PATH", type=Path, default=CONFIG, help=f"what is compared (default: {CONFIG})")
    parser.add_argument("--output", metavar="DIR", type=Path, help="where everything goes")
    parser.add_argument("--checkpoint", metavar="NAME=DIR", action="append", default=[], help="take a variant's checkpoint instead of training it; a name that is no variant becomes one more")
    parser.add_argument("--quick", action="store_true", help="everything once, in small")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    add_overrides(parser, "section.key=value", "change what every variant shares, or with compare.key=value the comparison itself")


def _compare(args: argparse.Namespace) -> None:
    import json
    import sys

    from wam.evaluation.compare.settings import QUICK, load_compare

    output = args.output or Path("runs/compare-quick" if args.quick else "runs/compare")
    settings, overrides = load_compare(args.config, [*(QUICK if args.quick else ()), *args.overrides])
    if settings.collect:
        overrides = [f"data.root={json.dumps(str(output / 'dataset'))}", *overrides]

    from wam.evaluation.compare.plan import describe, machine_rate, make_plan

    plan = make_plan(args.config, settings, overrides, _taken(args.checkpoint), machine_rate())
    print(describe(plan), file=sys.stdout if args.dry_run else sys.stderr)
    if args.dry_run:
        return

    from wam.evaluation.compare.run import run

    print(f"wrote {run(plan, output, _command(args))}")


def _taken(given: list[str]) -> dict[str, Path]:
    """`NAME=DIR` to a name and a folder."""
    taken = {}
    for text in given:
        name, equals, folder = text.partition("=")
        if not (name and equals and folder):
            raise ValueError(f"--checkpoint is {text!r}; expected NAME=DIR, e.g. all=runs/demo/train/checkpoint")
        if name in taken:
            raise ValueError(f"--checkpoint names {name!r} twice; name each variant once")
        taken[name] = Path(folder)
    return taken


def _command(args: argparse.Namespace) -> str:
    """The command line, as the report shows it."""
    words = ["wam compare", "--config", str(args.config)]
    words += ["--output", str(args.output)] if args.output else []
    words += [word for text in args.checkpoint for word in ("--checkpoint", text)]
    return " ".join([*words, *(["--quick"] if args.quick else []), *(f"'{o}'" if " " in o else o for o in args.overrides)])


COMMANDS = (Command("compare", "train and drive every answer to where prediction should live", COMPARE, _compare_arguments, _compare),)
