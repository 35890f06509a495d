"""Commands on datasets: record, check, describe a robot, encode ahead."""

from __future__ import annotations

import argparse
from pathlib import Path

from wam.commands.common import Command, add_config, add_output, flag_overrides, names, positive
from wam.config import load_config

EXIT_FOUND = 1  # `wam check` found errors in a dataset

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
    add_config(parser)
    parser.add_argument("--tasks", metavar="A,B", type=names, help="Meta-World tasks (collect.tasks)")
    parser.add_argument("--episodes", metavar="N", type=int, help="successful episodes of each task (collect.episodes_per_task)")
    parser.add_argument("--workers", metavar="N", type=int, help="simulators side by side (collect.workers)")
    add_output(parser, "dataset directory (data.root)")


def _collect(args: argparse.Namespace) -> None:
    flags = {
        "collect.tasks": args.tasks,
        "collect.episodes_per_task": args.episodes,
        "collect.workers": args.workers,
        "data.root": args.output and str(args.output),
    }
    config = load_config(args.config, [*args.overrides, *flag_overrides(flags)])

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
    add_config(parser)
    parser.add_argument("--checkpoint", metavar="DIR", type=Path, help="a checkpoint that training will go on from: its rate, statistics and adapters are checked too")
    parser.add_argument("--episodes", metavar="N", type=positive, default=16, help="episodes whose frames are looked at, spread over the dataset (default: 16)")
    add_output(parser, "where the report goes (default: runs/check-<dataset>)")


def _check(args: argparse.Namespace) -> int:
    config = load_config(args.config, [*args.overrides, *flag_overrides({"data.root": str(args.dataset)})])

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
    add_config(parser)
    add_output(parser, "where encoded windows go (data.latents)")
    parser.add_argument("--workers", metavar="N", type=positive, help="processes that decode and encode (default: one a core; on GPUs, four each)")


def _cache(args: argparse.Namespace) -> None:
    config = load_config(args.config, [*args.overrides, *flag_overrides({"data.latents": args.output and str(args.output)})])

    from wam.training.caches import cache

    print(cache(config, args.workers))


COMMANDS = (
    Command("collect", "record demonstrations of scripted experts as a LeRobot dataset", COLLECT, _collect_arguments, _collect),
    Command("check", "look for what breaks policies silently in a dataset", CHECK, _check_arguments, _check),
    Command("robots", "list robot cards, or show what one says", ROBOTS, _robots_arguments, _robots),
    Command("cache", "encode a dataset's windows once, for training to read", CACHE, _cache_arguments, _cache),
)
