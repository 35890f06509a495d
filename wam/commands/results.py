"""Commands that read results and say what they show."""

from __future__ import annotations

import argparse
from pathlib import Path

from wam.commands.common import Command, names

PAIRED = """\
Compare two rollouts on the same seeds, or two modes of one: success of each, their difference with its interval,
and whether it is more than chance (McNemar's exact test; several comparisons at once are corrected by Holm).
Runs of other environments, limits or seeds are refused.

examples:
  wam paired runs/a/rollout/rollout.json runs/b/rollout/rollout.json
  wam paired runs/demo/rollout --mode skip,joint                       two modes of one run
  wam paired runs/surprise runs/blind --mode skip --json result.json   the same mode of two runs
  wam paired runs/surprise runs/blind --within 200                     success in the first 200 control steps of an episode
  wam paired runs/a/rollout-mt10 runs/b/rollout-mt10                   suites: by task, and over tasks

writes: nothing but what it prints; with --json, all figures as a file
"""


def _paired_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", metavar="A", type=Path, help="rollout.json, or a folder that holds it or suite.json")
    parser.add_argument("b", metavar="B", type=Path, nargs="?", help="the other (default: A again, for two of its modes)")
    parser.add_argument(
        "--mode", metavar="NAME[,NAME]", type=names, default=[], help="the mode to compare, or A's and B's (default: every mode that both drove)"
    )
    parser.add_argument("--names", metavar="A,B", type=names, help="what to call the two in sentences (default: where their paths differ)")
    parser.add_argument("--within", metavar="STEPS", type=int, help="control steps in which an episode must have succeeded (default: the runs' own limit)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the figures there as well")


def _paired(args: argparse.Namespace) -> None:
    if args.names and len(args.names) != 2:
        raise ValueError(f"--names {','.join(args.names)}: give two names, e.g. --names surprise,blind")

    from wam.evaluation.paired import compare_runs, text
    from wam.files import write_json_atomic

    results = compare_runs(args.a, args.b, args.mode, tuple(args.names) if args.names else None, args.within)
    print(text(results), end="")
    if args.json:
        write_json_atomic(args.json, results)
        print(f"wrote {args.json}")


COMMANDS = (Command("paired", "compare two rollouts on the same seeds", PAIRED, _paired_arguments, _paired),)
