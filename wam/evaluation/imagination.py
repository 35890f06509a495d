"""Imagined rollouts on held-out episodes: from one frame, block after block, with nothing observed in between.

    forward   the frame and the actions that were really executed      ->  what follows from them
    imagine   the frame and the instruction                            ->  what the policy expects to happen (and the actions to it)

What was imagined enters the memory as if it had been seen, and the next block is imagined from there.  Each clip is compared with what
really followed, over the pixels that move (see `wam.pictures`), as a whole and by how far ahead it was imagined; beside it two
predictors that know nothing of the scene, one that copies the first frame and one that adds the dataset's mean motion to it.  Whether the
video follows the actions, and whether inverse dynamics finds them in it again, is asked in `wam.evaluation.consistency`.
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
from wam.evaluation.consistency import action_following, inverse_of_forward, sentences
from wam.evaluation.horizon import FIGURE, draw_horizon
from wam.evaluation.mean_motion import ABOUT, MeanMotion, mean_motion
from wam.files import write_json_atomic
from wam.inference.session import Session
from wam.pictures import MASK, Lpips, beside, enlarge, has_windows, load_lpips, lpips_is_missing, moving_mask, psnr, ssim, strip, write_mp4, write_png
from wam.pretrained import Policy, load_policy

log = logging.getLogger(__name__)
MODES = ("forward", "imagine")
RESULTS = "imagine.json"
FPS = 10  # of the saved videos: slow enough to watch
METHODS = ("", "static_", "mean_motion_", "codec_")  # what was imagined, two baselines, and the ceiling, as prefixes of the figures' names


@dataclass(frozen=True)
class Clip:
    """A stretch of a held-out episode.

    Attributes:
        frames: (1 + 4k blocks, H, W, 3) uint8.
        state: (state_dim,) at the first frame.
        executed: (blocks * A, action_dim), physical units.
        states: (blocks * A, state_dim): before each of these actions, where they are relative to a state.
        labels: (blocks * A, action_dim): what the policy was asked to do at each step, where that is not what was executed.
    """

    episode: int
    start: int
    frames: np.ndarray
    state: np.ndarray
    executed: np.ndarray
    instruction: str
    states: np.ndarray | None = None
    labels: np.ndarray | None = None


def imagine(checkpoint: Path, config: ImagineConfig, output: Path, dataset: str | None = None) -> dict[str, Any]:
    """Imagine held-out clips in both modes; writes `imagine.json`, `horizon.png`, videos and strips into `output`, and returns the results.

    Args:
        dataset: root of a LeRobot dataset with the training data's columns; default: the one the checkpoint was trained on.

    Raises:
        ValueError: no held-out episode is long enough, or nothing moves in any of them.
    """
    policy = load_policy(checkpoint, config.runtime)
    t = policy.config.timeline
    clips = held_out_clips(policy.config, config, dataset)
    blocks = len(clips[0].executed) // t.actions_per_block
    judge = _judge(policy, clips, dataset)
    results: dict[str, Any] = {
        "checkpoint": str(checkpoint),
        "mask": MASK,
        "mean_motion": {"is": ABOUT, "clips": judge.motion.clips if judge.motion else 0},
        "blocks": blocks,
        "block_seconds": t.actions_per_block / policy.control_hz,
        "solver_steps": policy.config.sampling.with_steps(config.steps).steps,
        "modes": {},
        "left_out": judge.left_out,
    }
    videos: dict[str, list[np.ndarray]] = {}
    for mode in tqdm(MODES, desc="imagine", unit="mode"):
        if mode not in policy.config.training.modes:
            told = f"the checkpoint was not trained in mode {mode!r} (training.modes: {', '.join(policy.config.training.modes)})"
            results["left_out"][mode] = told
            continue
        videos[mode] = rollout(policy, clips, mode, config)
        results["modes"][mode] = {**score(clips, videos[mode], judge), "blocks": blocks}
    following, consistency = _following(policy, clips, videos.get("forward"), config, judge), inverse_of_forward(policy, clips, config)
    for name, measured in (("action_following", following), ("consistency", consistency)):
        if isinstance(measured, str):
            results["left_out"][name] = measured
        else:
            results[name] = measured
    for index, clip in enumerate(clips[: config.videos]):
        _show(clip, {mode: v[index] for mode, v in videos.items()}, output)
    _draw(results, output)
    write_json_atomic(output / RESULTS, results)
    for mode, found in results["modes"].items():
        over = "" if "gain_over_mean_motion_db" not in found else f", {found['gain_over_mean_motion_db']:+.1f} over the dataset's mean motion"
        log.info("%s: PSNR %.1f dB over moving pixels, %+.1f over copying the first frame%s", mode, found["psnr_db"], found["gain_db"], over)
    for sentence in sentences(results):
        log.info("%s", sentence)
    return results


@dataclass(frozen=True)
class Judge:
    """What imagined clips are judged with.

    Attributes:
        motion: the dataset's mean motion; None leaves that baseline out.
        codec: the real clips (F, H, W, 3), encoded and decoded; None leaves the ceiling out.
        lpips: None leaves it out.
        group: frames that share a point of the curve by horizon: those of one latent.
        group_seconds: how long they last.
        left_out: what is not measured, and why.
    """

    motion: MeanMotion | None = None
    codec: Sequence[np.ndarray] | None = None
    lpips: Lpips | None = None
    group: int = 4
    group_seconds: float = 1.0
    left_out: dict[str, str] = dataclasses.field(default_factory=dict)


def _judge(policy: Policy, clips: Sequence[Clip], dataset: str | None) -> Judge:
    t, left_out = policy.config.timeline, {}
    missing = lpips_is_missing()
    if missing:
        left_out["lpips"] = missing
    data = dataclasses.replace(policy.config.data, root=dataset or policy.config.data.root, cache="none")
    source = WindowDataset(data, t, "train", image_size=policy.config.codec.image_size, robot=policy.config.model.embodiment(data.embodiment))
    motion = mean_motion(source, len(clips[0].frames) - 1, t.stride)
    if motion is None:
        left_out["mean_motion"] = "no training episode is as long as the clips; use fewer imagine.blocks"
    group = policy.codec.temporal_stride
    with torch.no_grad():
        real = torch.from_numpy(np.stack([clip.frames for clip in clips])).to(policy.model.device)
        codec = list(policy.codec.decode(policy.codec.encode(real)).cpu().numpy())
    return Judge(motion, codec, None if missing else load_lpips(), group, group * t.stride / policy.control_hz, left_out)


def _following(policy: Policy, clips: Sequence[Clip], videos: Sequence[np.ndarray] | None, config: ImagineConfig, judge: Judge) -> dict[str, Any] | str:
    if videos is None:
        return "the checkpoint was not trained in mode 'forward', which is what follows actions"
    return action_following(clips, videos, lambda others: rollout(policy, others, "forward", config), judge.codec)


def _draw(results: dict[str, Any], output: Path) -> None:
    if not results["modes"]:
        return
    try:
        draw_horizon(results, output / FIGURE)
    except ImportError as error:
        results["left_out"]["figure"] = str(error)


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
    return Clip(episode, start, view.frames[start : start + steps + 1 : stride], view.state[start], view.executed[acted], view.instruction, view.state[acted], view.action[acted])


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


def score(clips: Sequence[Clip], imagined: Sequence[np.ndarray], judge: Judge | None = None) -> dict[str, Any]:
    """Means over clips of PSNR, SSIM (whole frames, and moving pixels) and LPIPS, of the imagined video and of the baselines; `horizon`: by time.

    Raises:
        ValueError: nothing moves in any clip.
    """
    judge = judge or Judge()
    rows: list[dict[str, Any]] = []
    curves = []
    for index, (clip, video) in enumerate(zip(clips, imagined, strict=True)):
        mask = moving_mask(clip.frames)
        if not mask.any():
            continue
        videos, real = _videos(clip, video, judge, index), clip.frames[1:]
        figures = {prefix + key: value for prefix, v in videos.items() for key, value in _figures(v, real, mask, judge.lpips).items()}
        rows.append({"episode": clip.episode, "start": clip.start, **figures, "moving_fraction": float(mask.mean())})
        curves.append(_by_horizon(videos, real, mask, judge))
    if not rows:
        raise ValueError("nothing moves in any of the clips; check the camera and the dataset")
    known = {key: [value for row in rows if (value := row[key]) is not None] for key in rows[0] if key not in ("episode", "start")}
    means = {key: float(np.mean(values)) for key, values in known.items() if values}
    gains = {"gain_db": means["psnr_db"] - means["static_psnr_db"]}
    if "mean_motion_psnr_db" in means:
        gains["gain_over_mean_motion_db"] = means["psnr_db"] - means["mean_motion_psnr_db"]
    return {**means, **gains, "clips": len(rows), "still_clips_left_out": len(clips) - len(rows), "horizon": _mean_curve(curves, judge), "per_clip": rows}


def _videos(clip: Clip, video: np.ndarray, judge: Judge, index: int) -> dict[str, np.ndarray]:
    """What was imagined, what the baselines expect and what the codec makes of the truth, without the first frame, by prefix."""
    videos = {"": video[1:], "static_": np.broadcast_to(clip.frames[:1], clip.frames[1:].shape)}
    if judge.motion is not None:
        videos["mean_motion_"] = judge.motion.video(clip.frames[0], len(video) - 1)
    if judge.codec is not None:
        videos["codec_"] = judge.codec[index][1:]
    return videos


def _figures(video: np.ndarray, real: np.ndarray, mask: np.ndarray, lpips: Lpips | None) -> dict[str, float | None]:
    moving = ssim(video, real, mask) if has_windows(mask) else None
    perceived = {} if lpips is None else {"lpips": lpips(video, real, mask)}
    return {"psnr_db": psnr(video, real, mask), "ssim": ssim(video, real), "moving_ssim": moving, **perceived}


def _by_horizon(videos: dict[str, np.ndarray], real: np.ndarray, mask: np.ndarray, judge: Judge) -> list[dict[str, float | None]]:
    """Squared error and SSIM over moving pixels of each group of frames."""
    points = []
    for begin in range(0, len(real), judge.group):
        part = slice(begin, begin + judge.group)
        point: dict[str, float | None] = {}
        for prefix, video in videos.items():
            point[f"{prefix}mse"] = 10 ** (-psnr(video[part], real[part], mask) / 10)
            point[f"{prefix}moving_ssim"] = ssim(video[part], real[part], mask) if has_windows(mask) else None
        points.append(point)
    return points


def _mean_curve(curves: Sequence[list[dict[str, float | None]]], judge: Judge) -> list[dict[str, float | None]]:
    """By time: PSNR of the squared error over all clips (where hardly anything has moved yet a mean of dB would be ruled by one clip), and mean SSIM."""
    out = []
    for index, points in enumerate(zip(*curves, strict=True)):
        known = {key: [value for p in points if (value := p[key]) is not None] for key in points[0]}
        mean = {key: float(np.mean(values)) if values else None for key, values in known.items()}
        point: dict[str, float | None] = {"seconds": (index + 1) * judge.group_seconds}
        for prefix in METHODS:
            if f"{prefix}mse" in mean:
                point[f"{prefix}psnr_db"] = float(-10 * np.log10(mean[f"{prefix}mse"]))  # type: ignore[arg-type]  # never None
                point[f"{prefix}moving_ssim"] = mean[f"{prefix}moving_ssim"]
        out.append(point)
    return out


def _show(clip: Clip, videos: dict[str, np.ndarray], output: Path) -> None:
    """Real and imagined side by side as mp4, and as a strip."""
    rows = [clip.frames, *videos.values()]
    name = f"episode{clip.episode:04d}_{clip.start:04d}"
    write_mp4(enlarge(beside(rows), 4), output / f"{name}_real_{'_'.join(videos)}.mp4", FPS)
    write_png(strip(rows), output / f"{name}_real_{'_'.join(videos)}.png")
