"""`wam calibrate`: how wrong a checkpoint's imagination usually is, on episodes it was not trained on.

    clip      H | block 0 | block 1 | ...      observed and committed block after block, as the recorded robot did
    plan          imagined    imagined         in every trained mode that imagines and acts: what the policy expects
    forward       imagined    imagined         from the actions really executed: what follows from them
    compared      with what came               latent frame by latent frame (`wam.inference.check`)

The policy is used as a robot uses it, through a session.  A plan's own imagination is compared with what a demonstrator did next, who may
have done something else as well; so `plan` is measured a little too kindly, `forward` is not.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import wam
from wam.config import ImagineConfig
from wam.config_check import CalibrateConfig
from wam.evaluation.imagination import Clip, held_out_clips
from wam.inference.check import SurpriseScale, imagines, measure, observed_floor, source_name
from wam.inference.outcome import newest, outcome
from wam.inference.session import Session
from wam.pretrained import Policy, load_policy, weights_sha256
from wam.relations import acting_modes, untrained_mode_warning

log = logging.getLogger(__name__)


def calibrate(checkpoint: Path, config: CalibrateConfig, dataset: str | None = None) -> SurpriseScale:
    """Measure the errors of imagination and write them into the checkpoint's folder as `surprise.json`.

    Args:
        dataset: root of a LeRobot dataset with the training data's columns; default: the one the checkpoint was trained on.

    Raises:
        ValueError: no held-out episode is long enough, nothing moves in any, or the checkpoint imagines nothing.
    """
    policy = load_policy(checkpoint, config.runtime)
    clips = held_out_clips(policy.config, ImagineConfig(clips=config.clips, blocks=config.blocks, seed=config.seed), dataset)
    scale = measured(policy, clips, config, weights_sha256(checkpoint), dataset or policy.config.data.root)
    log.info("wrote %s", scale.save(checkpoint))
    return scale


def measured(policy: Policy, clips: Sequence[Clip], config: CalibrateConfig, weights: str, dataset: str) -> SurpriseScale:
    """The scale of a policy from clips.

    Raises:
        ValueError: as `calibrate`, or a model whose first frame lies inside its first block.
    """
    if policy.config.timeline.first_frame == "inside":
        raise ValueError("this model's first block holds its first frame (timeline.first_frame: inside), so its blocks are not of one length; surprise is measured for models with first_frame: before")
    plans = [mode for mode in acting_modes(policy.config) if imagines(policy, mode)]
    forward = config.forward_steps if untrained_mode_warning(policy.config, "forward") is None else ()
    if not plans and not forward:
        raise ValueError(f"this checkpoint imagines nothing to compare with what comes: it was trained in {', '.join(policy.config.training.modes)}; train forward, joint or imagine as well")
    blocks = _Blocks()
    for first in tqdm(range(0, len(clips), config.batch), desc="calibrate", unit="batch"):
        _observe_all(policy, clips[first : first + config.batch], plans, forward, config, first, blocks)
    before, observed = torch.cat(blocks.before), torch.cat(blocks.observed)
    floor = observed_floor((observed - before.unsqueeze(2)).square().mean(1).sqrt())
    sources = {name: measure(torch.cat(imagined), observed, before, floor) for name, imagined in blocks.imagined.items()}
    about = {"dataset": dataset, "episodes": len({c.episode for c in clips}), "clips": len(clips), "blocks": len(before), "seed": config.seed, "wam_version": wam.__version__}
    return SurpriseScale(weights, sources, about)


class _Blocks:
    """What was seen before, what came, and what each way of imagining thought would come: lists of batches, (B, C, h, w) and (B, C, k, h, w)."""

    def __init__(self) -> None:
        self.before: list[Tensor] = []
        self.observed: list[Tensor] = []
        self.imagined: dict[str, list[Tensor]] = defaultdict(list)


def _observe_all(policy: Policy, clips: Sequence[Clip], plans: Sequence[str], forward: Sequence[int], config: CalibrateConfig, first: int, into: _Blocks) -> None:
    """Go through clips side by side, as recorded, imagining every block in every way before it is observed."""
    t, how = policy.config.timeline, policy.config.sampling.with_steps(config.steps)
    seeds = [config.seed * 100_003 + first + i for i in range(len(clips))]
    session = Session(policy, [c.instruction for c in clips], policy.config.data.embodiment, seeds)
    session.observe(np.stack([c.frames[:1] for c in clips]), np.stack([c.state for c in clips]))
    for block in range(len(clips[0].executed) // t.actions_per_block):
        acted = slice(block * t.actions_per_block, (block + 1) * t.actions_per_block)
        executed = np.stack([c.executed[acted] for c in clips])
        imagined = {source_name(mode, how.steps): session.plan(mode, how).imagined for mode in plans}
        imagined |= {source_name("forward", n): outcome(session, range(len(clips)), executed, how.with_steps(n), [s + 7919 * (block + 1) for s in seeds]) for n in forward}
        session.commit(executed)
        first_frame = block * t.frames_per_block
        frames = np.stack([c.frames[first_frame : first_frame + t.frames_per_block + 1] for c in clips])
        at, before = session.block, newest(policy, frames[:, 0])
        latents = session.observe(frames[:, 1:], _states_after(clips, acted.stop))
        if session.block != at + 1:
            continue  # the memory began again, and encoded the newest frame alone
        into.before.append(before.cpu())
        into.observed.append(latents.cpu())
        for name, video in imagined.items():
            assert video is not None
            into.imagined[name].append(video.float().cpu())


def _states_after(clips: Sequence[Clip], step: int) -> np.ndarray | None:
    """States (B, .) after a control step of each clip; None behind the last, which nothing is planned from."""
    if any(c.states is None or step >= len(c.states) for c in clips):
        return None
    return np.stack([c.states[step] for c in clips if c.states is not None])


def table(scale: SurpriseScale, thresholds: Sequence[float] = (0.8, 1.0, 1.2, 1.5, 2.0)) -> str:
    """For people: the usual error of each way of imagining, and how often held-out blocks exceed thresholds."""
    lines = [f"{'imagined by':<16} {'latent frame':<13} {'median error':>12} {'95% (= 1.0)':>12} {'frames':>7} {'still':>6}"]
    for name, source in scale.sources.items():
        for i, h in enumerate(source.horizons):
            lines.append(f"{name if i == 0 else '':<16} {i + 1:<13} {h.quantile('moving', 0.5):>12.3f} {h.quantile('moving', 0.95):>12.3f} {h.frames:>7} {h.still:>6}")
    lines += ["", f"{'blocks above':<16} " + " ".join(f"{t:>7g}" for t in thresholds) + "   (check.threshold; the rate of false alarms to expect)"]
    lines += [f"{name:<16} " + " ".join(f"{100 * source.exceeded(t, 'blocks'):>6.1f}%" for t in thresholds) for name, source in scale.sources.items()]
    return "\n".join(lines)
