"""Validation on held-out windows: the losses of every mode, what is sampled from the same memory in every mode, and pictures of it.

    block        0        1           2 ...           the recorded past is written into the memory, block after block;
    memory       H S0     Vc0 Ac0 S1  Vc1 Ac1 S2      from each, the coming block is sampled in every trained mode
    sampled               block 1     block 2         (of a window of one block: block 0)

    val/<mode>/<video|action|value>  losses as in training             val/loss      all of them, weighted as in training
    val/action_mse/<mode>         sampled actions against the label (`inverse`: with the video that really came), normalised units; beside
                                  `hold`, which repeats the last executed action (a relative one: stays), and `mean`, which always does the average one
    val/video_mse/<mode>          sampled latents against those that came (`forward`: with the actions really executed); beside `static`,
    val/psnr/<mode>               a copy of the last frame; and in pixels, dB over those that move
    val/value_auroc/<valuation>   with a value head: how well it tells blocks of episodes that succeed from blocks of those that fail (0.5: not
    val/value_error/<valuation>   at all); and its mean distance from what it should be, 0..1

Windows are dealt out to the processes, all of which do the same number of forward passes, so that collectives inside the network meet; a
window's noise is a function of the seed and its place, so any number of processes measures the same.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wam.config import Config, SamplingConfig
from wam.data.dataset import WindowDataset, collate
from wam.model.actions import pad_actions, pad_states
from wam.model.sampling import Held, Noise, Sample, Situation, sample
from wam.pictures import film, moving_mask, psnr, write_png
from wam.relations import Mode, trained_modes, trained_valuations
from wam.timeline import Kind
from wam.training.draws import Draws
from wam.training.engine import Engine
from wam.training.objective import PARTS, Drawn, Losses, Objective, latent_padding

WITHOUT_ASKING = ("video", "imagine", "joint_mutual", "joint")  # modes that imagine from what was observed; the first that is trained is drawn
CLIPS = 4  # in a picture


@dataclass(frozen=True)
class HeldOut:
    """Held-out windows of one dataset.

    Attributes:
        name: of the dataset, for figures of its own where there are several.
        windows: a map-style dataset of `wam.data.dataset.Sample`.
        mean_action: (action_dim,) the average label, normalised.
        still: (action_dim,) no motion, normalised, in dimensions that are relative to the state; NaN in the others; None: all are absolute.
    """

    name: str
    windows: Any
    mean_action: Tensor
    still: Tensor | None = None


def still_of(windows: WindowDataset) -> Tensor | None:
    """`HeldOut.still` of a dataset."""
    if windows.normalizer is None or not windows.units.relative:
        return None
    return torch.as_tensor(windows.normalizer.normalize("action", windows.units.no_motion()))


class Sums:
    """Numerators and denominators by name, of this process; one all-reduce makes means of them."""

    def __init__(self) -> None:
        self.pairs: dict[str, list[Tensor]] = {}

    def add(self, prefixes: Sequence[str], name: str, total: Tensor | float, count: Tensor | float) -> None:
        """Add to a figure, under every prefix.  The names must not depend on the data: all processes have the same."""
        pair = torch.stack([torch.as_tensor(x, dtype=torch.float64).cpu() for x in (total, count)])
        for prefix in prefixes:
            self.pairs.setdefault(prefix + name, []).append(pair)

    def means(self, engine: Engine) -> dict[str, float]:
        """Means over all processes, without figures that nothing was counted for.  All processes call it together."""
        if not self.pairs:
            return {}
        numbers = engine.sum(torch.stack([torch.stack(pairs).sum(0) for pairs in self.pairs.values()]).to(engine.device)).tolist()
        return {name: total / count for name, (total, count) in zip(self.pairs, numbers, strict=True) if count > 0}


@torch.no_grad()
def validate(objective: Objective, parts: Sequence[HeldOut], engine: Engine, picture: Path | None = None) -> dict[str, float]:
    """Every figure of the module's docstring; with several datasets also each one's own, as `val/<dataset>/...`.  All processes call it together.

    Args:
        picture: where the main process writes a strip of real and imagined frames.
    """
    config, model, sums, told = objective.config, objective.model, Sums(), Told(trained_valuations(objective.config))
    clips: list[list[tuple[str, np.ndarray]]] = []
    model.eval()
    for part in parts:
        prefixes = ["val/"] if len(parts) == 1 else ["val/", f"val/{part.name}/"]
        for dealt in _deal(part, config.training.validation_batches * config.training.batch_size, config, engine):
            _losses(objective, dealt, sums, prefixes, told)
        for dealt in _deal(part, config.training.validation_samples, config, engine):
            driven = Driven(objective, dealt, part)
            driven.measure(sums, prefixes)
            if engine.is_main and len(clips) < CLIPS:
                clips += driven.clips()
    model.train()
    out = sums.means(engine) | told.figures(engine)
    if picture is not None and engine.is_main and clips:
        write_png(film(clips[:CLIPS]), picture)
    return {**out, **_loss(config, out)}


def _loss(config: Config, figures: dict[str, float]) -> dict[str, float]:
    """What training minimises, of held-out windows: modes by their weights."""
    t = config.training
    weights = {"video": t.video_weight, "action": t.action_weight, "value": t.value_weight}
    named = [(p * weights[part], f"val/{mode}/{part}") for mode, p in t.modes.items() for part in weights]
    if not any(name in figures for _, name in named):
        return {}
    return {"val/loss": sum(w * figures.get(name, 0.0) for w, name in named) / sum(t.modes.values())}


# ------------------------------------------------------------------------------------------------ windows, and their losses


@dataclass(frozen=True)
class Dealt:
    """Some windows of this process: a batch, each row's place among all held-out ones, and 0 for rows that only fill it up."""

    batch: dict[str, Any]
    places: list[int]
    weight_B: Tensor
    seed: int


def _deal(part: HeldOut, wanted: int, config: Config, engine: Engine) -> Iterator[Dealt]:
    """About `wanted` windows, spread evenly, dealt out to the processes; each gets as many, if need be one twice."""
    total, size, seed = len(part.windows), config.training.batch_size, config.training.seed
    chosen = np.unique(np.linspace(0, total - 1, min(total, wanted)).round().astype(int)).tolist()
    each = -(-len(chosen) // engine.world)
    mine = [(chosen[i], 1.0) if i < len(chosen) else (chosen[0], 0.0) for i in range(engine.rank, each * engine.world, engine.world)]
    for start in range(0, each, size):
        rows = mine[start : start + size]
        batch: Any = collate([part.windows[place] for place, _ in rows])
        yield Dealt(batch, [place for place, _ in rows], torch.tensor([weight for _, weight in rows]), seed)


def _losses(objective: Objective, dealt: Dealt, sums: Sums, prefixes: Sequence[str], told: Told) -> None:
    weight = dealt.weight_B.to(objective.model.device)
    for mode in trained_modes(objective.config):
        drawn = objective.draw(dealt.batch, Draws.at(dealt.seed, 0, dealt.places), mode)
        losses = objective.losses(dealt.batch, drawn)
        for name, part in zip(PARTS, losses.parts, strict=False):
            sums.add(prefixes, f"{mode}/{name}", (part.sum_B * weight).sum(), (part.count_B * weight).sum())
        if losses.logit_BN is not None:
            told.add(drawn, losses, dealt)


class Told:
    """What the value head said of blocks whose outcome is known: counts by logit, so that processes can be added up.

    Args:
        valuations: those that are trained; none without a value head.
    """

    BINS, LARGEST = 4096, 16.0  # of logits from -LARGEST to LARGEST: values that differ by less than a quarter of a percent may tie

    def __init__(self, valuations: Sequence[str]):
        self.valuations = list(valuations)
        self.counts = torch.zeros(len(self.valuations), 2, self.BINS, dtype=torch.float64)  # by valuation, of episodes that fail and that succeed
        self.errors = torch.zeros(len(self.valuations), 2, dtype=torch.float64)

    def add(self, drawn: Drawn, losses: Losses, dealt: Dealt) -> None:
        """Take in a batch."""
        assert losses.logit_BN is not None and drawn.value_BN is not None and drawn.value_seen_BN is not None and drawn.valuations is not None
        logit_BN, steps_BN = losses.logit_BN.cpu().double(), dealt.batch.get("outcome")
        place_BN = ((logit_BN + self.LARGEST) * (self.BINS / (2 * self.LARGEST))).long().clamp(0, self.BINS - 1)
        weight_BN = drawn.value_seen_BN.double() * dealt.weight_B.double().unsqueeze(1)
        error_BN = (torch.sigmoid(logit_BN) - drawn.value_BN.double()).abs()
        for row, valuation in enumerate(drawn.valuations):
            if steps_BN is None:
                continue
            for outcome, those in enumerate((steps_BN[row].isinf(), steps_BN[row].isfinite())):
                self.counts[valuation, outcome].index_add_(0, place_BN[row], weight_BN[row] * those)
            self.errors[valuation] += torch.stack([(error_BN[row] * weight_BN[row]).sum(), weight_BN[row].sum()])

    def figures(self, engine: Engine) -> dict[str, float]:
        """Over all processes, those that something was counted for.  All processes call it together."""
        if not self.valuations:
            return {}
        flat = engine.sum(torch.cat([self.counts.flatten(), self.errors.flatten()]).to(engine.device)).cpu()
        counts, errors = flat[: self.counts.numel()].view_as(self.counts), flat[self.counts.numel() :].view_as(self.errors)
        out: dict[str, float] = {}
        for index, name in enumerate(self.valuations):
            failed, succeeded = counts[index]
            if failed.sum() > 0 and succeeded.sum() > 0:
                out[f"val/value_auroc/{name}"] = auroc(failed, succeeded)
            if errors[index, 1] > 0:
                out[f"val/value_error/{name}"] = float(errors[index, 0] / errors[index, 1])
        return out


def auroc(negatives: Tensor, positives: Tensor) -> float:
    """The chance that a positive lies above a negative, ties counting half, from how many of each lie in bins of rising score."""
    below = negatives.cumsum(0) - negatives
    return float((positives * (below + negatives / 2)).sum() / (negatives.sum() * positives.sum()))


# ------------------------------------------------------------------------------------------------ what is sampled


class Driven:
    """A batch of windows, driven block after block with the recorded past, and what was sampled of the blocks to come.

    Attributes:
        sampled: of every mode, a sample for each block from `first` on.
        first: the first block that is sampled: one that has a past, where the window has another.
    """

    def __init__(self, objective: Objective, dealt: Dealt, part: HeldOut):
        self.objective, self.batch, self.dealt, self.part = objective, dealt.batch, dealt, part
        self.config, self.model = objective.config, objective.model
        self.timeline, self.device = objective.config.timeline, objective.model.device
        self.size = len(dealt.places)
        self.first = min(1, self.timeline.blocks - 1)
        self.has_video, self.has_action = (bool(dealt.batch[key].all()) if key in dealt.batch else True for key in ("has_video", "has_action"))
        self.sampled: dict[str, list[Sample]] = defaultdict(list)
        if self.has_video and (self.has_action or not self.model.live_state):
            self._drive([self.model.relations.mode(name) for name in self._modes()])

    def _modes(self) -> list[str]:
        """Modes that are sampled: all that are trained; where no action is known, the one that is drawn."""
        trained = trained_modes(self.config)
        return list(trained) if self.has_action else [name for name in WITHOUT_ASKING if name in trained][:1]

    @cached_property
    def latents(self) -> Tensor:
        """(B, C, F, h, w)"""
        return self.objective.latents_of(self.batch)

    @cached_property
    def executed(self) -> Tensor:
        """(B, N A, .) what the robot did, normalised, on the model's channels."""
        return self.objective.actions_of(self.batch, "executed")

    @cached_property
    def embodiment(self) -> Tensor:
        """(B,)"""
        return self.objective.embodiments(self.batch).to(self.device)

    def frames(self, block: int) -> list[int]:
        """Latent frames of a block."""
        return list(self.model.clock.frames(block))

    def _drive(self, modes: Sequence[Mode]) -> None:
        """Write what was recorded into the memory, and before each block is written, sample it."""
        t, model = self.timeline, self.model
        state = pad_states(self.config.model, self.batch["state"].to(self.device))
        conditions = model.prepare(self.objective.conditions_of(self.batch, state, self.embodiment))
        cache, base = model.new_cache(self.size), model.relations.mode(modes[0].name).table if modes else None

        def write(kind: Kind, value: Tensor, block: int) -> None:
            if kind in model.cached_kinds and base is not None:
                model.prefill(cache, base, kind, value, [block] * self.size, conditions, self.embodiment)

        if self.config.model.goal_image and self.config.training.goal_image >= 0.5:
            write(Kind.G, self.objective.codec.encode(self.batch["frames"][:, -1:].to(self.device)), -1)
        if t.first_frame == "before":
            write(Kind.H, self.latents[:, :, :1], -1)
        for block in range(t.blocks):
            now, done = state[:, block * t.states_per_block : (block + 1) * t.states_per_block], self._actions(block)
            if self.has_action:
                write(Kind.S, now, block)
            if block >= self.first:
                at = Situation(cache, [block] * self.size, conditions, self.embodiment, now if model.live_state else None, self._held(block))
                for mode in modes:
                    self.sampled[mode.name].append(self._sample(mode, at, block))
            write(Kind.VC, self.latents[:, :, self.frames(block)], block)  # first: in some tables executed actions see the video they led to
            if self.has_action:
                write(Kind.AC, done, block)

    def _actions(self, block: int) -> Tensor:
        A = self.timeline.actions_per_block
        return self.executed[:, block * A : (block + 1) * A]

    def _held(self, block: int) -> Held:
        """Inside block 0, the first frame and the actions that would lead to it."""
        t = self.timeline
        if block > 0 or t.first_frame == "before":
            return Held()
        video = self.latents[:, :, self.frames(0)]
        given = torch.arange(t.latents_per_block, device=self.device).expand(self.size, -1) == 0
        lead = torch.arange(t.actions_per_block, device=self.device).expand(self.size, -1) < t.lead
        return Held((video, given), (torch.zeros_like(self._actions(0)), lead) if t.lead else None)

    def _sample(self, mode: Mode, at: Situation, block: int) -> Sample:
        t, how = self.timeline, unguided(self.config.sampling)
        draws = Draws.at(self.dealt.seed, 1 + block, self.dealt.places)
        shapes = [(t.actions_per_block, self.config.model.actions), (self.config.codec.channels, t.latents_per_block, *self.model.latent_size)]
        noise = Noise(*draws.normals(shapes, self.device))
        given = {"forward": self._actions(block), "inverse": self.latents[:, :, self.frames(block)]}.get(mode.name)
        return sample(self.model, mode, at, noise, how, given)

    # ------------------------------------------------------------------------------------------ figures

    def measure(self, sums: Sums, prefixes: Sequence[str]) -> None:
        """Add this batch's errors, beside those of what knows nothing."""
        actions = {name: [s.action_BTA for s in samples] for name, samples in self.sampled.items() if samples and samples[0].action_BTA is not None}
        videos = {name: [s.video_BCFHW for s in samples] for name, samples in self.sampled.items() if samples and samples[0].video_BCFHW is not None}
        if actions and self.has_action:
            self._measure_actions({name: torch.cat(x, dim=1) for name, x in actions.items()}, sums, prefixes)  # type: ignore[arg-type]
        if videos:
            self._measure_videos({name: torch.cat(x, dim=2) for name, x in videos.items()}, sums, prefixes)  # type: ignore[arg-type]

    def _measure_actions(self, guesses: dict[str, Tensor], sums: Sums, prefixes: Sequence[str]) -> None:
        t, A = self.timeline, self.timeline.actions_per_block
        start = self.first * A
        target = self.objective.actions_of(self.batch, "action")
        channels = self.model.robot_channels(self.embodiment)
        seen = (~self.batch["action_is_pad"]).to(self.device).float() * self.dealt.weight_B.to(self.device)[:, None]
        seen[:, : t.lead] = 0
        robot = self.config.model.embodiments[int(self.embodiment[0])]
        guesses["mean"] = pad_actions(self.config.model, robot, self.part.mean_action.to(self.device)[: robot.action_dim]).expand_as(target[:, start:])
        if self.first:
            last = self.executed.unflatten(1, (-1, A))[:, self.first - 1 : -1, -1:].expand(-1, -1, A, -1).flatten(1, 2)
            still = None if self.part.still is None else pad_actions(self.config.model, robot, self.part.still.to(self.device)[: robot.action_dim])
            guesses["hold"] = last if still is None else torch.where(still.isnan(), last, still)
        for name, guess in guesses.items():
            error = ((guess.float() - target[:, start:]).square() * channels).sum(-1) / channels.sum(-1)
            sums.add(prefixes, f"action_mse/{name}", (error * seen[:, start:]).sum(), seen[:, start:].sum())

    def _measure_videos(self, guesses: dict[str, Tensor], sums: Sums, prefixes: Sequence[str]) -> None:
        chosen = self._sampled_frames
        real = self.latents[:, :, chosen]
        last = [self.frames(block)[0] - 1 for block in self._blocks for _ in range(self.timeline.latents_per_block)]
        seen = ~latent_padding(self.batch["frames_is_pad"], self.config)[:, chosen].to(self.device) * self.dealt.weight_B.to(self.device)[:, None]
        guesses = {**guesses, "static": self.latents[:, :, [max(0, f) for f in last]]}
        for name, guess in guesses.items():
            error = (guess.float() - real).square().mean(dim=(1, 3, 4))
            sums.add(prefixes, f"video_mse/{name}", (error * seen).sum(), seen.sum())
        for name, video in self.videos.items():
            scores = [self._psnr(row, video) for row in range(self.size)]
            sums.add(prefixes, f"psnr/{name}", sum(s for s in scores if s is not None), float(sum(s is not None for s in scores)))

    @property
    def _blocks(self) -> range:
        return range(self.first, self.timeline.blocks)

    @property
    def _sampled_frames(self) -> list[int]:
        return [frame for block in self._blocks for frame in self.frames(block)]

    # ------------------------------------------------------------------------------------------ pixels

    @cached_property
    def drawn(self) -> list[str]:
        """Modes whose video becomes pixels: from the actions that were executed, and from what was observed alone."""
        choices = [name for name in WITHOUT_ASKING if name in self.sampled and self.sampled[name][0].video_BCFHW is not None]
        return [*(["forward"] if "forward" in self.sampled else []), *choices[:1]]

    @cached_property
    def real(self) -> np.ndarray:
        """(B, frames, H, W, 3) uint8: what was seen; of a batch of latents alone, what they decode to."""
        frames = self.batch.get("frames")
        if frames is None or frames.shape[1] != 1 + self.timeline.temporal_stride * (self.latents.shape[2] - 1):
            frames = self.objective.codec.decode(self.latents)
        return frames.cpu().numpy()

    @cached_property
    def videos(self) -> dict[str, np.ndarray]:
        """The drawn modes' frames (B, frames, H, W, 3), with the real ones before; and the copy of the last real frame before each block."""
        out, start = {}, self._sampled_frames[0]
        for name in self.drawn:
            imagined = torch.cat([self.latents[:, :, :start], *(s.video_BCFHW for s in self.sampled[name] if s.video_BCFHW is not None)], dim=2)
            out[name] = self.objective.codec.decode(imagined).cpu().numpy()
        if out:
            out["static"] = self.real.copy()
            for block in self._blocks:
                a, b = self._pixels(self.frames(block))
                out["static"][:, a:b] = self.real[:, max(0, a - 1) : max(1, a)]
        return out

    def _pixels(self, frames: Sequence[int]) -> tuple[int, int]:
        """First and end of the pixel frames of neighbouring latent frames."""
        stride = self.timeline.temporal_stride
        return 0 if frames[0] == 0 else 1 + stride * (frames[0] - 1), 1 + stride * frames[-1]

    def _psnr(self, row: int, video: np.ndarray) -> float | None:
        """Of what was imagined, over the pixels that move; None where nothing does, or the episode ends."""
        a, _ = self._pixels(self._sampled_frames)
        mask = moving_mask(self.real[row, max(0, a - 1) :])
        if not self.dealt.weight_B[row] or bool(self.batch["frames_is_pad"][row].any()) or not mask.any():
            return None
        return psnr(video[row, a:], self.real[row, a:], mask)

    def clips(self) -> list[list[tuple[str, np.ndarray]]]:
        """Per window, named rows of frames: real, and imagined below; from the last frame before what is imagined on."""
        if not self.drawn:
            return []
        begin = max(0, self._pixels(self._sampled_frames)[0] - 1)
        rows = [("real", self.real), *((name, self.videos[name]) for name in self.drawn)]
        whole = [r for r in range(self.size) if self.dealt.weight_B[r] and not bool(self.batch["frames_is_pad"][r].any())]
        return [[(name, video[r, begin:]) for name, video in rows] for r in _spread(whole, CLIPS)]


def unguided(how: SamplingConfig) -> SamplingConfig:
    """A checkpoint's way of sampling, without guidance's second side and without reuse: what the network itself says."""
    return replace(how, guidance=1.0, action_guidance=1.0, reuse="none")


def _spread(items: Sequence[int], count: int) -> list[int]:
    """At most `count` of them, evenly spread."""
    return [items[i] for i in np.unique(np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int))] if items else []
