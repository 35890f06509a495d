"""A `wam train` checkpoint as a folder that LeRobot loads with --policy.path.

    outputs/wam_demo/config.json                    LeRobot's: type wam, inputs, outputs, options
                     policy_preprocessor.json, ...  LeRobot's pipelines, which change no number
                     wam/                           the policy itself, as `wam` reads it (or, with --link, where it is)

What `lerobot-train` saves looks the same, so `wam rollout --checkpoint .../pretrained_model/wam` drives what LeRobot trained.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from wam.pretrained import CONFIG, META, NORMALIZER


def to_lerobot(checkpoint: Path, output: Path, cameras: Mapping[str, str] | None = None, link: bool = False, device: str | None = None) -> Path:
    """Write `output`; returns it.

    Args:
        checkpoint: a folder that `wam train` or `wam convert` wrote.
        cameras: the observation's key of each camera whose name differs there.
        link: name the checkpoint's place instead of copying it.
        device: where LeRobot runs it; None: what the machine has.

    Raises:
        FileNotFoundError: no policy there.
        ValueError: a camera that the policy does not have, or an output that exists.
    """
    from lerobot_policy_wam.configuration_wam import INSIDE, WAMConfig
    from lerobot_policy_wam.processor_wam import make_wam_pre_post_processors

    for name in (CONFIG, META, NORMALIZER):
        if not (checkpoint / name).is_file():
            raise FileNotFoundError(f"{checkpoint} is no policy: {name} is missing; give the folder that `wam train` wrote, e.g. runs/demo/train/checkpoint")
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"{output} exists and is not empty; name a new folder")
    config = WAMConfig(checkpoint=str(checkpoint.resolve()), cameras=dict(cameras or {}), device=device, push_to_hub=False)
    config.input_features, config.output_features = config.features(config.wam_config())
    config.validate_features()
    output.mkdir(parents=True, exist_ok=True)
    if not link:
        shutil.copytree(checkpoint, output / INSIDE)
        config.checkpoint = INSIDE
    config.save_pretrained(output)
    for pipeline in make_wam_pre_post_processors(config):
        pipeline.save_pretrained(output)
    return output


def main(arguments: Sequence[str] | None = None) -> int:
    """The command `wam-to-lerobot`."""
    parser = argparse.ArgumentParser(prog="wam-to-lerobot", description="make a folder for LeRobot's --policy.path of a checkpoint that `wam train` wrote")
    parser.add_argument("checkpoint", type=Path, help="folder of the policy, e.g. runs/demo/train/checkpoint")
    parser.add_argument("output", type=Path, help="a new folder")
    parser.add_argument("--camera", action="append", default=[], metavar="NAME=KEY", help="the observation's key of a camera that has another name there, e.g. corner4=observation.image")
    parser.add_argument("--link", action="store_true", help="name the checkpoint's place instead of copying it")
    parser.add_argument("--device", help="cpu, cuda, ...; default: what the machine has")
    given = parser.parse_args(arguments)
    pairs = [text.partition("=") for text in given.camera]
    if any(not sign or not key for _, sign, key in pairs):
        parser.error(f"--camera is {given.camera}; expected NAME=KEY, e.g. corner4=observation.image")
    try:
        folder = to_lerobot(given.checkpoint, given.output, {name: key for name, _, key in pairs}, given.link, given.device)
    except (FileNotFoundError, ValueError) as error:
        print(f"wam-to-lerobot: {error}", file=sys.stderr)
        return 1
    print(f"{folder}: use it with --policy.path={folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
