"""`wam replay`: what another checkpoint would have planned where a recorded robot was."""

from __future__ import annotations

import argparse
from pathlib import Path

from wam.config_runtime import add_runtime, runtime_of_flags

REPLAY = """\
Plan again, with another checkpoint, what `wam serve --record` kept: the memory is told what the robot saw and did, and
every recorded plan is made anew. It is compared with the plan of then, and step by step with what was executed; the gate
judges both. Read it against the same replay of the checkpoint that was recorded: a video is not what the camera saw.

examples:
  wam replay recordings/monday --checkpoint runs/next/train/checkpoint
  wam replay recordings/monday --checkpoint runs/next/train/checkpoint --steps 4 --json next.json --picture next.png
  wam replay recordings/monday --checkpoint runs/next/train/checkpoint --gate limits.yaml --episodes 5

prints: root mean square differences by dimension and by action of a plan, the gate's verdicts, times
writes: nothing, or all numbers (--json) and curves of the longest episode (--picture, PNG or SVG)
an error, with a table of both, where the checkpoint is of another robot than the recording
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `wam replay`."""
    parser.add_argument("recording", metavar="RECORDING", type=Path, help="a directory that `wam serve --record` wrote")
    parser.add_argument("--checkpoint", metavar="DIR|ID", required=True, help="policy folder that `wam train` or `wam convert` wrote, or a Hub id")
    add_runtime(parser)
    parser.add_argument("--embodiment", metavar="NAME", help="the robot (default: the checkpoint's)")
    parser.add_argument("--mode", metavar="NAME", help="how actions are had (default: as recorded)")
    parser.add_argument("--steps", metavar="N", type=int, help="solver steps (default: as recorded)")
    parser.add_argument("--gate", metavar="FILE", type=Path, help="YAML of limits, as of wam serve (default: numbers must be finite)")
    parser.add_argument("--episodes", metavar="N", type=int, help="only the newest N (default: all)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write every number to FILE")
    parser.add_argument("--picture", metavar="FILE", type=Path, help="draw curves to FILE, .png or .svg")


def run(args: argparse.Namespace) -> None:
    """Plan again, and tell.

    Raises:
        ValueError, OSError: the recording, the checkpoint or the settings are not what they should be, or do not fit.
    """
    if args.episodes is not None and args.episodes < 1:
        raise ValueError(f"--episodes is {args.episodes}; expected at least 1")
    from wam.files import write_json_atomic
    from wam.inference.gate import Gate, GateConfig, read_gate
    from wam.pretrained import load_policy
    from wam.serving.contract import Contract
    from wam.serving.replay import draw, numbers, replay, table

    policy = load_policy(args.checkpoint, runtime_of_flags(args))
    contract = Contract.of(policy, args.embodiment)
    groups = [(g.name, g.size) for g in contract.robot.action_groups]
    config = GateConfig() if args.gate is None else read_gate(args.gate, groups, contract.robot.raw_action_dim)
    replayed = replay(args.recording, policy, contract, Gate(config, contract.robot.raw_action_dim, contract.control_hz), args.mode, args.steps, args.episodes)
    told = numbers(replayed)
    print(table(told))
    if args.json is not None:
        write_json_atomic(args.json, told)
        print(f"wrote {args.json}")
    if args.picture is not None:
        draw(replayed, args.picture)
        print(f"wrote {args.picture}")
