"""Baselines beside a policy's rows."""

from __future__ import annotations

import argparse
from pathlib import Path

from wam.commands.common import Command, names

BASELINES = """\
Drive baselines through the same episodes as a policy: scripted expert, holding still, random actions, replay of
recorded episodes, and policies of LeRobot (ACT, diffusion policy, ...), loaded or trained here first.

examples:
  wam baselines metaworld/drawer-open-v3 --replay data/metaworld
  wam baselines pusht --seed 100000 --max-steps 300
  wam baselines metaworld/drawer-open-v3 --only expert --episodes 10
  wam baselines metaworld/drawer-open-v3 --train act --dataset data/metaworld --steps 5000 --lerobot-python ~/lerobot/bin/python
  wam baselines pusht --only none --policy outputs/train/checkpoints/last/pretrained_model --lerobot-python ~/lerobot/bin/python

LeRobot pins other versions than this project, so it lives in an environment of its own: pip install lerobot==0.4.4 there.

writes:
  baselines.json: counts, Wilson intervals, and every episode by seed, so that rows can be compared in pairs
"""


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("env", metavar="ENV", help="environment, e.g. metaworld/drawer-open-v3, pusht, gym/<id>?<settings>")
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: runs/baselines/<environment>")
    parser.add_argument("--episodes", type=int, default=50, metavar="N", help="of each row (default: 50)")
    parser.add_argument("--seed", type=int, default=20000, metavar="N", help="first seed (default: 20000)")
    parser.add_argument("--max-steps", type=int, default=500, metavar="N", help="control steps of an episode (default: 500)")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="simulators side by side (default: 2)")
    parser.add_argument("--only", type=names, metavar="A,B", help="which of expert, hold_still, random; none for none of them (default: all)")
    parser.add_argument("--replay", type=Path, metavar="DIR", help="LeRobot dataset whose episodes are replayed")
    parser.add_argument("--policy", type=Path, action="append", default=[], metavar="DIR", help="a LeRobot policy (pretrained_model); may be said several times")
    parser.add_argument("--train", type=names, default=[], metavar="KIND", help="train LeRobot policies first, e.g. act,diffusion")
    parser.add_argument("--dataset", type=Path, metavar="DIR", help="LeRobot dataset that they are trained on")
    parser.add_argument("--steps", type=int, default=2000, metavar="N", help="training steps (default: 2000)")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="of training (default: 8)")
    parser.add_argument("--train-option", action="append", default=[], metavar="--KEY=VALUE", help="an argument of lerobot-train, e.g. --train-option=--policy.chunk_size=16")
    parser.add_argument("--lerobot-python", type=Path, metavar="PYTHON", help="python of an environment with LeRobot (default: this one)")
    parser.add_argument("--device", default="cpu", help="of LeRobot's policies (default: cpu)")


def _baselines(args: argparse.Namespace) -> None:
    from wam.evaluation.baseline_runs import RESULTS, BaselineRun, run, table

    only = None if args.only is None else () if args.only == ["none"] else tuple(args.only)
    config = BaselineRun(
        env=args.env,
        episodes=args.episodes,
        seed=args.seed,
        max_steps=args.max_steps,
        workers=args.workers,
        names=only,
        replay=args.replay,
        policies=tuple(args.policy),
        train=tuple(args.train),
        dataset=args.dataset,
        train_steps=args.steps,
        batch_size=args.batch_size,
        lerobot_python=args.lerobot_python,
        device=args.device,
        train_options=tuple(args.train_option),
    )
    output = args.output or Path("runs/baselines") / "".join(c if c.isalnum() or c in "-_." else "_" for c in args.env)
    print(table(run(config, output)))
    print(f"wrote {output / RESULTS}")


COMMANDS = (Command("baselines", "drive expert, replay, random, LeRobot's policies through the same episodes", BASELINES, _arguments, _baselines),)
