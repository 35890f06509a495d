"""`wam`: one command for each thing one does with a world action model.

A command is a row of `COMMANDS` (`wam/commands/`): its name, what it is for, a help text that teaches, its arguments and its handler.  A handler checks
its settings first and imports what it needs after that, so help and a wrong key answer at once, and a missing extra only stops the
command that uses it.  Settings come from one place, the typed configs: YAML first, then `section.key=value`; flags such as
`--episodes` are short names for such overrides.

    argv  ->  argparse  ->  handler(args)  under `run_main`, which turns errors a person can mend into one line and an exit code
"""

from __future__ import annotations

import argparse
import errno
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from wam import __version__
from wam.commands import baselines, bench, compare, data, loop, model, results, run
from wam.commands.common import Command
from wam.files import is_disk_full

EXIT_ERROR = 2  # as argparse does for a wrong command line
EXIT_INTERRUPTED = 130  # 128 + SIGINT
MENDABLE = (ValueError, OSError, RuntimeError, ImportError)  # a person can mend these; anything else is a bug and keeps its traceback


# ------------------------------------------------------------------------------------------------ errors


def run_main(handler: Callable[[], int | None], debug: bool = False) -> int:
    """Run a command and return its exit code: its own (none is 0), 2 after one line that says what went wrong, or 130 after Ctrl-C.

    Args:
        handler: the command, without arguments.
        debug: also show the traceback.
    """
    try:
        return handler() or 0
    except KeyboardInterrupt as interrupt:
        if debug:
            traceback.print_exc()
        print(f"wam: {str(interrupt) or 'interrupted; run the same command again to go on'}", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Exception as error:
        if not (isinstance(error, MENDABLE) or is_disk_full(error)):
            raise
        if debug:
            traceback.print_exc()
        print(f"wam: error: {_explain(error)}", file=sys.stderr)
        return EXIT_ERROR


def _explain(error: Exception) -> str:
    """One line for people, or a table as it is; of a worker's traceback, its last line."""
    said = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.strerror and error.filename else ""
    if is_disk_full(error) and (not said or said.endswith(os.strerror(errno.ENOSPC))):
        return f"disk is full: {getattr(error, 'filename', None) or Path.cwd()}; free some space and run the same command again, finished work is kept"
    if said:
        return said
    what, traced, trace = str(error).partition("Traceback (most recent call last):")
    if traced:
        last = trace.strip().rpartition("\n")[2]
        what += f" {last} (--debug shows where)"
    if "\n    " in what:  # a table, such as that of `wam.evaluation.fit.disagreement`
        return what.rstrip()
    return " ".join(what.split()) or type(error).__name__


# ------------------------------------------------------------------------------------------------ commands


def _serve_command() -> Command:
    from wam.serving.cli import SERVE, add_arguments  # imports nothing heavy

    def serve(args: argparse.Namespace) -> None:
        from wam.serving.cli import run

        run(args)

    return Command("serve", "serve plans to robots over websockets", SERVE, add_arguments, serve)


def _replay_command() -> Command:
    from wam.serving.replay_cli import REPLAY, add_arguments  # imports nothing heavy

    def replay(args: argparse.Namespace) -> None:
        from wam.serving.replay_cli import run

        run(args)

    return Command("replay", "plan a server's recording again with another checkpoint", REPLAY, add_arguments, replay)


COMMANDS = (*data.COMMANDS, *run.COMMANDS, *loop.COMMANDS, *baselines.COMMANDS, *compare.COMMANDS, _serve_command(), _replay_command(), *model.COMMANDS, *results.COMMANDS, *bench.COMMANDS)


# ------------------------------------------------------------------------------------------------ entry point


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(prog="wam", description="World action models: `wam COMMAND --help` teaches each command.", allow_abbrev=False)
    parser.add_argument("-V", "--version", action="version", version=f"wam {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS:
        sub = commands.add_parser(
            command.name,
            help=command.summary,
            description=command.about,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        command.add_arguments(sub)
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        sub.set_defaults(handler=command.handler, parser=sub)
    return parser


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse a command line; overrides may stand anywhere, also between flags, which argparse alone does not allow."""
    args, rest = build_parser().parse_known_args(argv)
    strangers = [word for word in rest if word.startswith("-") or "=" not in word or not hasattr(args, "overrides")]
    if strangers:
        args.parser.error(f"unrecognized arguments: {' '.join(strangers)}")
    if rest:
        args.overrides = [*args.overrides, *rest]
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (default: this process's) and return the exit code."""
    args = parse(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("wam").setLevel(logging.INFO)
    return run_main(partial(args.handler, args), debug=args.debug)


if __name__ == "__main__":
    sys.exit(main())
