"""What each row imagines, on the same held-out clips: from one frame, block after block, in the row's own mode.

A row that denoises video beside or before its actions is asked for both, acts on its own actions in imagination, and goes on from what it
imagined; `forward` is given the recorded actions instead, where the weights were trained for it.  Compared is with what was recorded, over
the pixels that move, beside the baseline that repeats the first frame (`wam.evaluation.imagination`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from wam.evaluation.compare.plan import Plan, imagining
from wam.evaluation.compare.run import checkpoint_of
from wam.evaluation.imagination import Clip, held_out_clips, score
from wam.evaluation.imagination import rollout as imagine_clips
from wam.files import write_json_atomic
from wam.pictures import MASK, strip, write_png
from wam.pretrained import load_policy
from wam.relations import trained_modes

FOLDER, RESULTS = "imagine", "imagine.json"
SHOWN = 2  # clips that the report shows


def imagine_rows(plan: Plan, output: Path) -> None:
    """Imagine in every row that can; writes `imagine/imagine.json` and a strip for each row and clip."""
    wanted = {row.name: (row.variant, row.mode) for row in imagining(plan.rows)}
    wanted |= {f"{v.name}/forward": (v.name, "forward") for v in plan.variants if "forward" in trained_modes(v.config)}
    folder, rows = output / FOLDER, dict[str, Any]()
    shown: list[Clip] = []
    for variant in plan.variants:
        own = {name: mode for name, (of, mode) in wanted.items() if of == variant.name}
        if not own:
            continue
        policy = load_policy(checkpoint_of(variant, output))
        clips = held_out_clips(policy.config, plan.config.imagine, plan.config.data.root)
        for name, mode in own.items():
            videos = imagine_clips(policy, clips, mode, plan.config.imagine)
            rows[name] = score(clips, videos)
            _show(folder, name, videos)
        shown = shown or clips
    _show(folder, "real", [clip.frames for clip in shown])
    write_json_atomic(folder / RESULTS, {"mask": MASK, "blocks": plan.config.imagine.blocks, "rows": rows, "clips": [[c.episode, c.start] for c in shown[:SHOWN]]})


def _show(folder: Path, name: str, videos: list[np.ndarray]) -> None:
    for index, video in enumerate(videos[:SHOWN]):
        write_png(strip([video]), strip_path(folder, name, index))


def strip_path(folder: Path, name: str, index: int) -> Path:
    """Where the stills of a row's clip are."""
    return folder / f"{name.replace('/', '_')}_{index}.png"
