"""`wam`: one command for each thing one does with a world action model.

A command is a row of `COMMANDS`: its name, what it is for, a help text that teaches, its arguments and its handler.  A handler checks
its settings first and imports what it needs after that, so help and a wrong key answer at once, and a missing extra only stops the
command that uses it.  Settings come from one place, the typed configs: YAML first, then `section.key=value`; flags such as
`--episodes` are short names for such overrides.

    argv  ->  argparse  ->  handler(args)  under `run_main`, which turns errors a person can mend into one line and an exit code
"""

from __future__ import annotations

import argparse
import errno
import json
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from wam import __version__
from wam.config import ConfigError, ImagineConfig, RolloutConfig, from_dict, load_config
from wam.config_tree import read_yaml
from wam.files import is_disk_full

T = TypeVar("T")

DEFAULT_CONFIG = Path("configs/metaworld_tiny.yaml")
EXIT_FOUND = 1  # `wam check` found errors in a dataset
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
    """One line for people; of a worker's traceback, its last line."""
    said = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.strerror and error.filename else ""
    if is_disk_full(error) and (not said or said.endswith(os.strerror(errno.ENOSPC))):
        return f"disk is full: {getattr(error, 'filename', None) or Path.cwd()}; free some space and run the same command again, finished work is kept"
    if said:
        return said
    what, traced, trace = str(error).partition("Traceback (most recent call last):")
    if traced:
        last = trace.strip().rpartition("\n")[2]
        what += f" {last} (--debug shows where)"
    return " ".join(what.split()) or type(error).__name__


# ------------------------------------------------------------------------------------------------ settings


def _flag_overrides(flags: dict[str, Any]) -> list[str]:
    """Flags that were given, as overrides (JSON is YAML, so text keeps its quotes)."""
    return [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in flags.items() if value is not None]


def _section(cls: type[T], name: str, overrides: Sequence[str]) -> T:
    """One section by itself: defaults and `name.key=value`.  The other sections are the checkpoint's and cannot be changed here."""
    tree: dict[str, Any] = {}
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key.startswith(f"{name}."):
            raise ConfigError(f"override {override!r}: this command takes {name}.key=value; everything else comes from the checkpoint")
        tree[key.removeprefix(f"{name}.")] = read_yaml(value, f"override {override!r}: the value")
    return from_dict(cls, tree, where=name)


def _names(text: str) -> list[str]:
    """`a,b` to `["a", "b"]`."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise argparse.ArgumentTypeError("expected at least one name, e.g. a or a,b")
    return names


def _beside(checkpoint: Path, name: str) -> Path:
    """Default output: next to the checkpoint, so that results of two checkpoints never mix."""
    return checkpoint.parent / name


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="PATH", type=Path, default=DEFAULT_CONFIG, help=f"YAML config (default: {DEFAULT_CONFIG})")
    _add_overrides(parser, "section.key=value", "change a setting, e.g. training.steps=200 timeline.blocks=4")


def _add_overrides(parser: argparse.ArgumentParser, shape: str, about: str) -> None:
    parser.add_argument("overrides", nargs="*", metavar=shape, help=about)


def _add_output(parser: argparse.ArgumentParser, about: str) -> None:
    parser.add_argument("--output", metavar="DIR", type=Path, help=about)


def _add_checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", metavar="DIR", type=Path, required=True, help="a checkpoint directory written by `wam train`")


# ------------------------------------------------------------------------------------------------ commands

COLLECT = """\
Record demonstrations: Meta-World's scripted experts act, the simulator renders, and successful episodes are
written as a LeRobot v3.0 dataset. An interrupted collection goes on where it stopped; a finished one is left alone.

examples:
  wam collect                                        the tasks and sizes of the config
  wam collect --tasks drawer-open-v3,door-open-v3 --episodes 40 --output data/two_tasks
  wam collect collect.image_size=96 collect.action_noise=0

writes (in data.root, or --output):
  meta/, data/, videos/      the dataset: features, episodes and tasks; states and actions; mp4
"""


def _collect_arguments(parser: argparse.ArgumentParser) -> None:
    _add_config(parser)
    parser.add_argument("--tasks", metavar="A,B", type=_names, help="Meta-World tasks (collect.tasks)")
    parser.add_argument("--episodes", metavar="N", type=int, help="successful episodes of each task (collect.episodes_per_task)")
    parser.add_argument("--workers", metavar="N", type=int, help="simulators side by side (collect.workers)")
    _add_output(parser, "dataset directory (data.root)")


def _collect(args: argparse.Namespace) -> None:
    flags = {
        "collect.tasks": args.tasks,
        "collect.episodes_per_task": args.episodes,
        "collect.workers": args.workers,
        "data.root": args.output and str(args.output),
    }
    config = load_config(args.config, [*args.overrides, *_flag_overrides(flags)])

    from wam.evaluation.collect import collect

    collect(config.collect, Path(config.data.root))
    print(f"wrote {config.data.root}")


CHECK = """\
Look for what is known to break policies without a word, before anything is trained on a dataset: turned or swapped
cameras, columns of another robot, labels that are the state, frames and rows out of step, clipped or dead dimensions,
signs that flip, missing instructions, wrong rates, statistics or adapters that belong to something else. Every row is
read, and the frames of some episodes. Exit code 0 without errors, 1 with errors (warnings do not count), 2 where the
check itself could not run.

examples:
  wam check data/metaworld
  wam check data/mine --config configs/metaworld_tiny.yaml 'data.cameras=[observation.images.front]'
  wam check data/mine --checkpoint runs/mine/checkpoint --episodes 50 --output runs/check

writes (in runs/check-<dataset>, or --output):
  report.html                findings, a contact sheet of every camera, motion against state, histograms
  findings.json              the findings alone
"""


def _check_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dataset", metavar="DATASET", type=Path, help="LeRobot dataset directory")
    _add_config(parser)
    parser.add_argument("--checkpoint", metavar="DIR", type=Path, help="a checkpoint that training will go on from: its rate, statistics and adapters are checked too")
    parser.add_argument("--episodes", metavar="N", type=_positive, default=16, help="episodes whose frames are looked at, spread over the dataset (default: 16)")
    _add_output(parser, "where the report goes (default: runs/check-<dataset>)")


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError("expected a whole number, at least 1")
    return int(text)


def _check(args: argparse.Namespace) -> int:
    config = load_config(args.config, [*args.overrides, *_flag_overrides({"data.root": str(args.dataset)})])

    from wam.evaluation.check_report import check

    return EXIT_FOUND if check(args.dataset, config, args.output or Path("runs") / f"check-{args.dataset.resolve().name}", args.episodes, args.checkpoint) else 0


ROBOTS = """\
List the robot cards there are, or show what one resolves to: its canvas, its groups and sizes, and the text its
instructions are put into. A card is one YAML file; docs/robots.md explains how to write yours.

examples:
  wam robots
  wam robots droid
  wam robots lab/my_arm.yaml

writes nothing; a card is used by naming it in a config (robot: droid)
"""


def _robots_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("robot", metavar="ROBOT", nargs="?", help="name of a card in data/robots/, or path to one (default: list them)")


def _robots(args: argparse.Namespace) -> None:
    from wam.robots import describe, known_cards, read_card

    if args.robot is not None:
        print(describe(args.robot, read_card(args.robot)))
        return
    cards = {name: read_card(str(path)) for name, path in known_cards().items()}
    for name, card in cards.items():
        print(f"{name:<{max(map(len, cards))}}  {card.robot.raw_state_dim:>3} state  {card.robot.raw_action_dim:>3} action  {len(card.cameras)} camera{'s' if len(card.cameras) > 1 else ' '}  {card.description}")


CACHE = """\
Encode every window of a config's datasets once, with the codec that training would use, and embed their instructions
where text.cache names a directory. Training then reads latents instead of decoding and encoding frames at every step,
and ends at the same weights. An interrupted run goes on where it stopped; a second run verifies what is there.

examples:
  wam cache --output cache/latents                   then: wam train data.latents=cache/latents
  wam cache --config configs/mixture_example.yaml --workers 8 data.latents=cache/latents
  wam cache data.latents=cache/latents data.start_stride=4      fewer windows, less disk

writes (in data.latents, or --output):
  <dataset>-<key>/           manifest.json and the latents of its windows, about 100 MB a file; the key is a hash of all
                             that decides them, so what was made with other settings is never read
  codec-<key>.safetensors    the linear codec, where there is one: fitted once, and what training then takes
"""


def _cache_arguments(parser: argparse.ArgumentParser) -> None:
    _add_config(parser)
    _add_output(parser, "where encoded windows go (data.latents)")
    parser.add_argument("--workers", metavar="N", type=_positive, help="processes that decode and encode (default: one a core; on GPUs, four each)")


def _cache(args: argparse.Namespace) -> None:
    config = load_config(args.config, [*args.overrides, *_flag_overrides({"data.latents": args.output and str(args.output)})])

    from wam.training.caches import cache

    print(cache(config, args.workers))


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
    _add_config(parser)
    _add_output(parser, "run directory (the config's output)")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--fresh", action="store_true", help="start over instead of going on from a state in the run directory, which is moved aside")
    how.add_argument("--resume", action="store_true", help="refuse to start a run: there must be a state to go on from (going on is the default where there is one)")


def _train(args: argparse.Namespace) -> None:
    config = load_config(args.config, [*args.overrides, *_flag_overrides({"output": args.output and str(args.output)})])

    from wam.training.loop import train

    if args.resume:
        from wam.training.state import require_state

        require_state(Path(config.output), config)
    checkpoint = train(config, Path(config.output), not args.fresh)
    print(f"wrote {checkpoint}")


ROLLOUT = f"""\
Drive a robot in a simulator, closed loop, and count successes. Every mode sees the same episodes (the same seeds).

examples:
  wam rollout --checkpoint runs/demo/train/checkpoint
  wam rollout --checkpoint runs/demo/train/checkpoint --env metaworld/drawer-open-v3 --mode joint --episodes 50
  wam rollout --checkpoint runs/demo/train/checkpoint --mode skip,joint --replan 4 --steps 8 rollout.videos=10
  wam rollout --checkpoint runs/metaworld_mt10/checkpoint --env metaworld/mt10 --mode skip      ten tasks, one table (also mt50)

writes (beside the checkpoint in rollout-<task>/, or --output):
  success with counts and intervals, one row an episode, latencies, and mp4 of the first episodes

defaults: env {RolloutConfig().env}, modes {",".join(RolloutConfig().modes)}, {RolloutConfig().episodes} episodes from seed {RolloutConfig().seed}
"""


def _rollout_arguments(parser: argparse.ArgumentParser) -> None:
    _add_checkpoint(parser)
    parser.add_argument("--env", metavar="NAME", help="environment, e.g. metaworld/drawer-open-v3 (rollout.env)")
    parser.add_argument("--mode", metavar="A,B", type=_names, help="ways to get actions from the model; `wam relations` lists them (rollout.modes)")
    parser.add_argument("--episodes", metavar="N", type=int, help="episodes of each mode (rollout.episodes)")
    parser.add_argument("--seed", metavar="N", type=int, help="seed of the first episode (rollout.seed)")
    parser.add_argument("--replan", metavar="N", type=int, help="control steps between plans; default: the whole block (rollout.replan)")
    parser.add_argument("--steps", metavar="N", type=int, help="solver steps of a plan (rollout.steps)")
    _add_output(parser, "where results go (default: beside the checkpoint)")
    _add_overrides(parser, "rollout.key=value", "change a setting, e.g. rollout.batch=10 rollout.videos=0")


def _rollout(args: argparse.Namespace) -> None:
    flags = {
        "rollout.env": args.env,
        "rollout.modes": args.mode,
        "rollout.episodes": args.episodes,
        "rollout.seed": args.seed,
        "rollout.replan": args.replan,
        "rollout.steps": args.steps,
    }
    config = _section(RolloutConfig, "rollout", [*args.overrides, *_flag_overrides(flags)])
    output = args.output or _beside(args.checkpoint, f"rollout-{config.env.rsplit('/', 1)[-1]}")

    from wam.evaluation.rollout import rollout
    from wam.evaluation.suite import SUITES, rollout_suite, table

    if config.env in SUITES:
        print(table(rollout_suite(args.checkpoint, config, output)))
    else:
        rollout(args.checkpoint, config, output)
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
    _add_checkpoint(parser)
    parser.add_argument("--dataset", metavar="DIR", help="LeRobot dataset (default: the one the checkpoint was trained on)")
    parser.add_argument("--clips", metavar="N", type=int, help="clips (imagine.clips)")
    parser.add_argument("--blocks", metavar="N", type=int, help="blocks imagined one after another (imagine.blocks)")
    parser.add_argument("--steps", metavar="N", type=int, help="solver steps of a block (imagine.steps)")
    _add_output(parser, "where results go (default: beside the checkpoint)")
    _add_overrides(parser, "imagine.key=value", "change a setting, e.g. imagine.seed=1")


def _imagine(args: argparse.Namespace) -> None:
    flags = {"imagine.clips": args.clips, "imagine.blocks": args.blocks, "imagine.steps": args.steps}
    config = _section(ImagineConfig, "imagine", [*args.overrides, *_flag_overrides(flags)])
    output = args.output or _beside(args.checkpoint, "imagine")

    from wam.evaluation.imagination import imagine

    imagine(args.checkpoint, config, output, args.dataset)
    print(f"wrote {output}")


RELATIONS = """\
Show who attends to whom: the one table behind every mode, with the cells that a mode opens, and what each published system makes of it.

examples:
  wam relations                                      the modes, one line each
  wam relations --mode joint                         its table; --mode all for every table
  wam relations --preset dreamzero                   a preset: its table, its modes and their weights, what else its weights can do
  wam relations --preset lingbot_va --tokens         and every token against every other, over two blocks
  wam relations --preset all --png all.png           and as a picture, one mask for each mode
  wam relations --mode imagine --png imagine.png     one mode as a picture

writes: nothing, or the picture named by --png
"""


def _relations_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--mode", metavar="NAME", help="a mode of the default table, or all")
    what.add_argument("--preset", metavar="NAME", help="a preset: all, dreamzero, fast_wam, lingbot_va, uwm, ...")
    parser.add_argument("--tokens", action="store_true", help="also print which tokens see which (with --preset)")
    parser.add_argument("--png", metavar="FILE", type=Path, help="draw the attention masks")


def _relations(args: argparse.Namespace) -> None:
    config = load_config(None, [f"preset={args.preset}"]) if args.preset else None
    if args.png and config is None and args.mode in (None, "all"):
        raise ValueError("--png draws one mode or one preset; add --mode NAME or --preset NAME, e.g. --mode joint")
    if args.tokens and config is None:
        raise ValueError("--tokens pictures the modes of a preset; add --preset NAME, e.g. --preset all")

    from wam.relations import MODES
    from wam.relations_text import describe, describe_config, pictures

    if config is not None:
        print(describe_config(config))
        if args.tokens:
            print(f"\n{pictures(config)}")
    elif args.mode is None:
        print("\n".join(f"{name:<16}{mode.about}" for name, mode in MODES.items()))
    else:
        print("\n\n".join(describe(name) for name in (MODES if args.mode == "all" else [args.mode])))
    if args.png and config is not None:
        from wam.evaluation.plots import draw_relations

        draw_relations(config, args.png)
    elif args.png:
        from wam.evaluation.plots import draw_mask

        draw_mask(args.mode, args.png)
    if args.png:
        print(f"wrote {args.png}")


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
    _add_config(parser)
    parser.add_argument("--task", metavar="NAME", default="drawer-open-v3", help="Meta-World task (default: drawer-open-v3)")
    _add_output(parser, "run directory")


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


CONFORMANCE = """\
Compute again what the released systems computed: tiny weights under the released names go through the converter into
this network, and every stored output is compared. Exit code 0 only if all are within tolerance; none is left out.
Tables of levels (schedules.json) and lists of a checkpoint's tensors (dreamzero_keys_*.json) are checked too.

examples:
  wam conformance cases/fastwam_base.json
  wam conformance cases/*.json --json conformance.json
  wam conformance cases/lingbot.json --tolerance 3e-6

prints, per output: the largest absolute error, the relative L2 error, pass or FAIL
writes: nothing, or the numbers as JSON (--json)
"""


def _conformance_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("cases", metavar="CASE.json", type=Path, nargs="+", help="a case, its tensors beside it in CASE.safetensors; or a table or list that stands alone")
    parser.add_argument("--tolerance", metavar="X", type=float, default=1e-5, help="largest relative L2 error (default: 1e-5); the largest absolute error may be ten times that")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the numbers to FILE")


def _conformance(args: argparse.Namespace) -> None:
    from wam.evaluation.conformance.run import conformance

    conformance(args.cases, args.tolerance, args.json)


CONVERT = """\
Turn a released checkpoint into a policy folder that every other command takes (or, for Wan itself, a folder in
diffusers' layout to train from). Names and shapes are checked as a whole before anything is written; then tensors
are streamed one by one, so a checkpoint may be larger than memory.

examples:
  wam convert dreamzero downloads/DreamZero-DROID runs/droid
  wam convert dreamzero downloads/DreamZero-DROID runs/droid --components reference
  wam convert dreamzero my_lora runs/mine --base downloads/DreamZero-AgiBot --base-hash 3f1c...
  wam convert fast-wam libero.pt runs/fast_wam --variant base
  wam convert lingbot-va downloads/lingbot-va-posttrain-robotwin runs/lingbot
  wam convert wan downloads/Wan2.1-T2V-1.3B checkpoints/wan21_1b

writes (in DST):
  the weights, settings, statistics and frozen parts, and conversion.json: the fate of every tensor
"""


def _convert_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("format", metavar="FORMAT", choices=("dreamzero", "fast-wam", "lingbot-va", "wan"), help="dreamzero, fast-wam, lingbot-va or wan")
    parser.add_argument("src", metavar="SRC", type=Path, help="the downloaded checkpoint: a folder, or a file where the release is one")
    parser.add_argument("dst", metavar="DST", type=Path, help="folder that is written")
    parser.add_argument("--components", choices=("include", "reference"), default="include", help="write text encoder, image encoder and VAE too, or only say where they are read from (default: include)")
    parser.add_argument("--reference", metavar="DIR|ID", help="where referenced components are read from (default: the release's backbone on the Hub)")
    parser.add_argument("--base", metavar="DIR", type=Path, help="of a LoRA checkpoint: the checkpoint it was trained on")
    parser.add_argument("--base-hash", metavar="SHA256", help="identity that the base must have, where the LoRA checkpoint does not say")
    parser.add_argument("--accept-unknown-base", action="store_true", help="take your word that --base is the right one")
    parser.add_argument("--base-is-wan", action="store_true", help="the LoRA checkpoint was trained on Wan itself")
    parser.add_argument("--embodiment", metavar="NAME", help="whose statistics and prompt are taken, where there are several")
    parser.add_argument("--control-hz", metavar="HZ", type=float, help="control steps a second, where the release does not say")
    parser.add_argument("--prompt-template", metavar="TEXT", help="text around an instruction, e.g. 'A robot {instruction:lower}'")
    parser.add_argument("--image-size", metavar="HxW", type=_size, help="pixels the model sees, where they are not the published ones")
    parser.add_argument("--tokenizer", metavar="DIR|ID", help="tokenizer of the text encoder, where the release has none, e.g. google/umt5-xxl")
    parser.add_argument("--variant", metavar="NAME", help="fast-wam: base, joint or idm, which have the same tensors")
    parser.add_argument("--head-dim", metavar="N", type=int, help="fast-wam: numbers in an attention head, which its file does not say (default: 128)")


def _size(text: str) -> tuple[int, int]:
    """`352x640` to (352, 640)."""
    height, _, width = text.partition("x")
    if not (height.isdigit() and width.isdigit()):
        raise argparse.ArgumentTypeError("expected HEIGHTxWIDTH in pixels, e.g. 352x640")
    return int(height), int(width)


def _convert(args: argparse.Namespace) -> None:
    from wam.convert import convert
    from wam.convert.options import Options

    chosen = {name: value for name, value in vars(args).items() if name in Options.__dataclass_fields__}
    print(convert(args.format, args.src, args.dst, Options(**chosen)).table())
    print(f"wrote {args.dst}")


BENCH = """\
Measure how fast the network is: training and cached steps side by side with diffusers' own model over as many tokens,
modes and chunks against each other, what a session computes only once; and for the released sizes (on a GPU) every
stage of a chunk and of training against the machine's own matmul rate. Both sides run in turns, call by call.
And how fast data is read (`data`): this reader, raw decord and LeRobot's own over the same windows of the same files.
And training (`train`): steps of a config by phase, on one process and on several, and the memory of every ZeRO stage against arithmetic.

examples:
  wam bench model                                                widths 256, 512 and 1024 on this CPU
  wam bench model --sizes 256 --quick                            only to see that all runs
  wam bench model --device cuda --sizes 1.3b,5b,14b --json gpu.json
  wam bench model --markdown --json cpu.json                     tables as docs/benchmarks.md has them
  wam bench data --lerobot-python lerobot/bin/python             readers, on datasets made for it
  wam bench data --data data/metaworld_sample --workers 0,4      on one that is there
  wam bench train data.root=data/metaworld_sample                where a step's time goes, and what each process holds, engine by engine
  wam bench train --engines ddp,zero3 --processes 4 training.batch_size=16

prints: the tables, and which limits hold; exit code 0 unless --check is given and one does not
writes: nothing, or every number as JSON (--json)
"""


def _bench_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", metavar="WHAT", choices=("model", "data", "train"), help="model, data or train")
    parser.add_argument("--device", metavar="NAME", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--sizes", metavar="A,B", help="model: widths, and 1.3b, 5b, 14b, tiny (default: 256,512,1024 on a CPU, 1.3b,5b,14b on a GPU); data: 64x64, 180x320")
    parser.add_argument("--dtype", metavar="NAME", help="float32 or bfloat16 (default: float32 on a CPU, bfloat16 on a GPU)")
    parser.add_argument("--threads", metavar="N", type=int, default=1, help="of a CPU (default: 1)")
    parser.add_argument("--repeats", metavar="N", type=int, default=9, help="rounds of both sides (default: 9)")
    parser.add_argument("--quick", action="store_true", help="two rounds and short sessions: shows that all runs, not how fast")
    parser.add_argument("--check", action="store_true", help="exit with an error where a limit does not hold")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write every number to FILE")
    parser.add_argument("--markdown", action="store_true", help="print the tables in Markdown")
    data = parser.add_argument_group("of data")
    data.add_argument("--data", metavar="DIR", type=Path, action="append", default=[], help="a LeRobot v3.0 dataset to read, also more than one (default: those of --sizes are made)")
    data.add_argument("--make", metavar="DIR", type=Path, help="where datasets are made, and found again (default: a folder that is removed)")
    data.add_argument("--lerobot-python", metavar="PATH", type=Path, help="python of another environment that has lerobot 0.4, to measure it too")
    data.add_argument("--workers", metavar="A,B", type=_names, default=["0", "2"], help="loader processes (default: 0,2)")
    data.add_argument("--batch", metavar="N", type=_positive, default=8, help="windows in a batch (default: 8)")
    train = parser.add_argument_group("of train")
    train.add_argument("--config", metavar="FILE", default="configs/metaworld_tiny.yaml", help="what is trained (default: configs/metaworld_tiny.yaml)")
    train.add_argument("--engines", metavar="A,B", type=_names, help="single, ddp, zero1, zero2, zero3, fsdp2 (default: all)")
    train.add_argument("--processes", metavar="N", type=_positive, default=2, help="of the engines that take several (default: 2)")
    _add_overrides(parser, "section.key=value", "train: change a setting of the config, e.g. training.batch_size=16")


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


def _bench(args: argparse.Namespace) -> None:
    if args.what == "train":
        return _bench_train(args)
    if args.overrides:
        raise ValueError(f"wam bench {args.what} reads no config, so {' '.join(args.overrides)} changes nothing; leave it out, or use wam bench train")
    if args.what == "data":
        return _bench_data(args)

    from wam.evaluation.bench.run import Options, bench_model

    chosen = {name: value for name, value in vars(args).items() if name in Options.__dataclass_fields__}
    words = [w for flag in ("device", "sizes", "dtype", "threads", "repeats") if (value := getattr(args, flag)) != args.parser.get_default(flag) for w in (f"--{flag}", str(value))]
    chosen["sizes"] = tuple(size for size in (args.sizes or "").split(",") if size)
    bench_model(Options(**{**chosen, "command": " ".join(["wam bench model", *words, *(["--quick"] if args.quick else [])])}))


def _serve_command() -> Command:
    from wam.serving.cli import SERVE, add_arguments  # imports nothing heavy

    def serve(args: argparse.Namespace) -> None:
        from wam.serving.cli import run

        run(args)

    return Command("serve", "serve plans to robots over websockets", SERVE, add_arguments, serve)


@dataclass(frozen=True)
class Command:
    """One `wam` command: `summary` is its line in `wam --help`, `about` its own help text."""

    name: str
    summary: str
    about: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    handler: Callable[[argparse.Namespace], int | None]


COMMANDS = (
    Command("collect", "record demonstrations of scripted experts as a LeRobot dataset", COLLECT, _collect_arguments, _collect),
    Command("check", "look for what breaks policies silently in a dataset", CHECK, _check_arguments, _check),
    Command("robots", "list robot cards, or show what one says", ROBOTS, _robots_arguments, _robots),
    Command("cache", "encode a dataset's windows once, for training to read", CACHE, _cache_arguments, _cache),
    Command("train", "train a model, or go on training it", TRAIN, _train_arguments, _train),
    Command("rollout", "drive a robot in a simulator and count successes", ROLLOUT, _rollout_arguments, _rollout),
    Command("imagine", "compare imagined video with what happened", IMAGINE, _imagine_arguments, _imagine),
    Command("relations", "show who attends to whom in each mode", RELATIONS, _relations_arguments, _relations),
    _serve_command(),
    Command("convert", "turn a released checkpoint into a policy folder", CONVERT, _convert_arguments, _convert),
    Command("demo", "collect, train, drive and report one task", DEMO, _demo_arguments, _demo),
    Command("report", "write the report of a run again", REPORT, _report_arguments, _report),
    Command("conformance", "compute the released systems' own numbers again", CONFORMANCE, _conformance_arguments, _conformance),
    Command("bench", "measure how fast the network is", BENCH, _bench_arguments, _bench),
)


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
