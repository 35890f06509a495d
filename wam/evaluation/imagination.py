"""Imagined rollouts on held-out episodes: from one frame, block after block, with nothing observed in between.

    forward   the frame and the actions that were really executed      ->  what follows from them
    imagine   the frame and the instruction                            ->  what the policy expects to happen (and the actions to it)

What was imagined enters the memory as if it had been seen, and the next block is imagined from there.  Each clip is compared with what
really followed and with the baseline that copies the first frame, over the pixels that move (see `wam.pictures`).
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from wam.config import Config, ImagineConfig
from wam.data.dataset import EpisodeView, WindowDataset
from wam.files import write_json_atomic
from wam.inference.session import Session
from wam.pictures import MASK, beside, enlarge, moving_mask, psnr, ssim, strip, write_mp4, write_png
from wam.pretrained import Policy, from_pretrained

log = logging.getLogger(__name__)
MODES = ("forward", "imagine")
RESULTS = "imagine.json"
FPS = 10  # of the saved videos: slow enough to watch


@dataclass(frozen=True)
class Clip:
    """A stretch of a held-out episode.

    Attributes:
        frames: (1 + 4k blocks, H, W, 3) uint8.
        state: (state_dim,) at the first frame.
        executed: (blocks * A, action_dim), physical units.
        states: (blocks * A, state_dim): before each of these actions, where they are relative to a state.
    """

    episode: int
    start: int
    frames: np.ndarray
    state: np.ndarray
    executed: np.ndarray
    instruction: str
    states: np.ndarray | None = None


def imagine(checkpoint: Path, config: ImagineConfig, output: Path, dataset: str | None = None) -> dict[str, Any]:
    """Imagine held-out clips in both modes; writes `imagine.json`, videos and strips into `output`, and returns the results.

    Args:
        dataset: root of a LeRobot dataset with the training data's columns; default: the one the checkpoint was trained on.

    Raises:
        ValueError: no held-out episode is long enough, or nothing moves in any of them.
    """
    policy = from_pretrained(checkpoint)
    clips = held_out_clips(policy.config, config, dataset)
    results: dict[str, Any] = {"checkpoint": str(checkpoint), "mask": MASK, "blocks": len(clips[0].executed) // policy.config.timeline.actions_per_block, "solver_steps": policy.config.sampling.with_steps(config.steps).steps, "modes": {}}
    videos: dict[str, list[np.ndarray]] = {}
    for mode in tqdm(MODES, desc="imagine", unit="mode"):
        if mode not in policy.config.training.modes:
            log.warning("the checkpoint was not trained in mode %r (training.modes: %s); left out", mode, ", ".join(policy.config.training.modes))
            continue
        videos[mode] = rollout(policy, clips, mode, config)
        results["modes"][mode] = {**score(clips, videos[mode]), "blocks": results["blocks"]}
    for index, clip in enumerate(clips[: config.videos]):
        _show(clip, {mode: v[index] for mode, v in videos.items()}, output)
    write_json_atomic(output / RESULTS, results)
    return results


def held_out_clips(config: Config, imagine: ImagineConfig, dataset: str | None = None) -> list[Clip]:
    """Clips spread over the validation episodes, each beginning anywhere that leaves room.

    Clips are `imagine.blocks` long, or shorter where half of the episodes would have no room for that; a warning says so.

    Raises:
        ValueError: not even one block fits; says how long the episodes are.
    """
    t = config.timeline
    data = dataclasses.replace(config.data, root=dataset or config.data.root)
    source = WindowDataset(data, t, "validation", image_size=config.codec.image_size, robot=config.model.embodiment(data.embodiment))
    episodes = {i: source.episode(i) for i in source.episodes}
    lengths = sorted(len(view.state) for view in episodes.values())
    blocks = min(imagine.blocks, (lengths[len(lengths) // 2] - 1) // t.actions_per_block)
    if blocks < 1:
        raise ValueError(f"the held-out episodes have {lengths[0]} to {lengths[-1]} rows, and one block needs {t.actions_per_block + 1}; record longer episodes")
    if blocks < imagine.blocks:
        log.warning("clips of %d blocks instead of imagine.blocks %d: the held-out episodes have %d to %d rows", blocks, imagine.blocks, lengths[0], lengths[-1])
    steps = blocks * t.actions_per_block
    room = {i: len(view.state) - steps for i, view in episodes.items() if len(view.state) > steps}
    rng = np.random.default_rng(imagine.seed)
    chosen = [sorted(room)[i % len(room)] for i in range(imagine.clips)]
    return [_clip(i, int(rng.integers(0, room[i])), episodes[i], steps, t.stride) for i in chosen]


def _clip(episode: int, start: int, view: EpisodeView, steps: int, stride: int) -> Clip:
    acted = slice(start, start + steps)
    return Clip(episode, start, view.frames[start : start + steps + 1 : stride], view.state[start], view.executed[acted], view.instruction, view.state[acted])


def rollout(policy: Policy, clips: Sequence[Clip], mode: str, config: ImagineConfig) -> list[np.ndarray]:
    """Imagined frames (F, H, W, 3) of each clip, the given first frame included."""
    embodiment = policy.config.data.embodiment
    session = Session(policy, [c.instruction for c in clips], embodiment, [config.seed * 100_003 + i for i in range(len(clips))])
    latents: list[Tensor] = [session.observe(np.stack([c.frames[:1] for c in clips]), np.stack([c.state for c in clips]))]
    steps, solver = policy.config.timeline.actions_per_block, policy.config.sampling.with_steps(config.steps)
    for block in range(len(clips[0].executed) // steps):
        given = np.stack([c.executed[block * steps : (block + 1) * steps] for c in clips])
        plan = session.plan(mode, solver, given if mode == "forward" else None)
        acted = given if plan.actions is None else plan.actions
        assert plan.imagined is not None
        session.commit(acted)
        after = (block + 1) * steps
        known = [c.states[after] for c in clips if c.states is not None and after < len(c.states)]
        session.imagine(plan.imagined, np.stack(known) if len(known) == len(clips) else None)
        latents.append(plan.imagined)
    frames = policy.codec.decode(torch.cat(latents, dim=2)).cpu().numpy()
    return [np.concatenate([c.frames[:1], f[1:]]) for c, f in zip(clips, frames, strict=True)]


def score(clips: Sequence[Clip], imagined: Sequence[np.ndarray]) -> dict[str, Any]:
    """Means over clips of PSNR (moving pixels) and SSIM (whole frames), of the imagined video and of copying the first frame."""
    rows = []
    for clip, video in zip(clips, imagined, strict=True):
        mask = moving_mask(clip.frames)
        if not mask.any():
            continue
        real, still = clip.frames[1:], np.broadcast_to(clip.frames[:1], clip.frames[1:].shape)
        rows.append(
            {
                "episode": clip.episode,
                "start": clip.start,
                "psnr_db": psnr(video[1:], real, mask),
                "static_psnr_db": psnr(still, real, mask),
                "ssim": ssim(video[1:], real),
                "static_ssim": ssim(still, real),
                "moving_fraction": float(mask.mean()),
            }
        )
    if not rows:
        raise ValueError("nothing moves in any of the clips; check the camera and the dataset")
    means = {key: float(np.mean([r[key] for r in rows])) for key in ("psnr_db", "static_psnr_db", "ssim", "static_ssim", "moving_fraction")}
    return {**means, "gain_db": means["psnr_db"] - means["static_psnr_db"], "clips": len(rows), "still_clips_left_out": len(clips) - len(rows), "per_clip": rows}


def _show(clip: Clip, videos: dict[str, np.ndarray], output: Path) -> None:
    """Real and imagined side by side as mp4, and as a strip."""
    rows = [clip.frames, *videos.values()]
    name = f"episode{clip.episode:04d}_{clip.start:04d}"
    write_mp4(enlarge(beside(rows), 4), output / f"{name}_real_{'_'.join(videos)}.mp4", FPS)
    write_png(strip(rows), output / f"{name}_real_{'_'.join(videos)}.png")
