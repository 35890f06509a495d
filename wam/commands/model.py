"""Commands on models: who attends to whom, released checkpoints, and the numbers they must give."""

from __future__ import annotations

import argparse
from pathlib import Path

from wam.commands.common import Command, size
from wam.config import load_config

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
    parser.add_argument("--image-size", metavar="HxW", type=size, help="pixels the model sees, where they are not the published ones")
    parser.add_argument("--tokenizer", metavar="DIR|ID", help="tokenizer of the text encoder, where the release has none, e.g. google/umt5-xxl")
    parser.add_argument("--variant", metavar="NAME", help="fast-wam: base, joint or idm, which have the same tensors")
    parser.add_argument("--head-dim", metavar="N", type=int, help="fast-wam: numbers in an attention head, which its file does not say (default: 128)")


def _convert(args: argparse.Namespace) -> None:
    from wam.convert import convert
    from wam.convert.options import Options

    chosen = {name: value for name, value in vars(args).items() if name in Options.__dataclass_fields__}
    print(convert(args.format, args.src, args.dst, Options(**chosen)).table())
    print(f"wrote {args.dst}")


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


COMMANDS = (
    Command("relations", "show who attends to whom in each mode", RELATIONS, _relations_arguments, _relations),
    Command("convert", "turn a released checkpoint into a policy folder", CONVERT, _convert_arguments, _convert),
    Command("conformance", "compute the released systems' own numbers again", CONFORMANCE, _conformance_arguments, _conformance),
)
