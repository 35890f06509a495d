"""Check: what was imagined against what came, latent frame by latent frame, in units of the error on held-out episodes.

    before     the newest frame when the plan was made, encoded alone: a picture that stands still
    imagined        | z1 | z2 | ...        by the plan itself, or by `forward` from the plan's actions
    observed        | y1 | y2 |  .         as they arrive
    error            e1   e2               over patches that move in either: |y - before| above the floor of what is seen, or
                                           |z - before| above the floor of what is imagined

A still background is always well predicted, so it has no say: only patches that move count.  Where motion was imagined and none came (a
stuck robot), or came and was not imagined (a moved object), its patches count in full.  Where nothing moves in either, a frame says
nothing: it is *still*.  The floors are measured, not chosen: what is seen changes by noise or by motion, two heaps that Otsu's threshold
(1979) parts; what is imagined moves where, of the patches that really stayed, 99 in 100 stay.

The error of a frame is taken over all moving patches and over the worst few, and each is divided by its 95th percentile on held-out
episodes, at that latent frame and for that way of imagining.  The greater is the surprise: above 1.0 lie about 1 in 20 held-out frames.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wam.config import CheckConfig
from wam.files import write_json_atomic
from wam.pretrained import Policy, weights_sha256
from wam.relations import Relations
from wam.timeline import Kind

SURPRISE, FORMAT = "surprise.json", "wam-surprise-1"
UNIT = 0.95  # the quantile of held-out errors that a surprise of 1.0 is
LEVELS = tuple(i / 100 for i in range(101))  # of the quantiles that are kept
WORST = 4  # patches: a small object that moves by itself
STAYS = 0.99  # of the patches that stay, how many are to be imagined to stay
QUIET = 1e-3  # of the greatest change: below it, changes are all the same to the floor
STATISTICS = ("moving", "worst")


@dataclass(frozen=True)
class Surprise:
    """What a check found.

    Attributes:
        value: the greatest of the latent frames that have come; 1.0: 95 of 100 held-out frames were imagined better.
        why: for people: which latent frame, and what about it.
        still: nothing moved, neither imagined nor seen; `value` is 0 then, and says nothing.
        frames: the value of each latent frame.
    """

    value: float
    surprised: bool
    why: str
    still: bool = False
    frames: tuple[float, ...] = ()


# ------------------------------------------------------------------------------------------------ errors of a frame


@dataclass(frozen=True)
class Floors:
    """Changes of a patch, RMS over channels, above which it moves."""

    observed: float
    imagined: float


@dataclass(frozen=True)
class FrameError:
    """Of one latent frame: RMS over moving patches and over the worst few, and how many patches moved, seen and imagined."""

    moving: float
    worst: float
    seen: int
    expected: int


def frame_error(imagined_CHW: Tensor, observed_CHW: Tensor, before_CHW: Tensor, floors: Floors) -> FrameError:
    """Compare one latent frame, patch by patch; see the module's docstring."""
    came, thought, apart = (_change(a, b) for a, b in ((observed_CHW, before_CHW), (imagined_CHW, before_CHW), (imagined_CHW, observed_CHW)))
    seen, expected = came > floors.observed, thought > floors.imagined
    squares = apart[seen | expected].square()
    if not len(squares):
        return FrameError(0.0, 0.0, 0, 0)
    worst = squares.topk(min(WORST, len(squares))).values.sum() / WORST
    return FrameError(float(squares.mean().sqrt()), float(worst.sqrt()), int(seen.sum()), int(expected.sum()))


def _change(a_CHW: Tensor, b_CHW: Tensor) -> Tensor:
    """(h, w): RMS over channels."""
    return (a_CHW.float() - b_CHW.float()).square().mean(0).sqrt()


def observed_floor(changes: Tensor) -> float:
    """Otsu's threshold of the logarithm of changes (any shape), between what is noise and what is motion.

    Raises:
        ValueError: nothing ever changes.
    """
    most = float(changes.max())
    if most <= 0:
        raise ValueError("nothing moves in any of the held-out clips, so there is no motion to be surprised by; check the camera and the dataset")
    logs = changes.flatten().clamp_min(most * QUIET).log().double().numpy()
    counts, edges = np.histogram(logs, bins=200)
    share, middle = counts / counts.sum(), (edges[1:] + edges[:-1]) / 2
    below = share.cumsum()
    mean = (share * middle).cumsum()
    between = (mean[-1] * below - mean) ** 2 / np.maximum(below * (1 - below), 1e-12)
    best = np.flatnonzero(np.isclose(between[:-1], between[:-1].max(), rtol=1e-9))  # an empty gap is a plateau: its middle
    return float(np.exp(edges[1 + best].mean()))


def imagined_floor(imagined: Tensor, changes: Tensor, observed: float) -> float:
    """The imagined change that 99 in 100 patches which stay are below; never below what counts as seen.  Both of one shape."""
    stays = imagined[changes <= observed]
    return max(observed, float(np.quantile(stays.numpy(), STAYS))) if len(stays) else observed


# ------------------------------------------------------------------------------------------------ the scale


@dataclass(frozen=True)
class Horizon:
    """Held-out errors at one latent frame of a block: quantiles at `LEVELS`, over frames in which something moved.

    Attributes:
        frames: how many those were.
        still: how many others.
    """

    frames: int
    still: int
    moving: tuple[float, ...]
    worst: tuple[float, ...]

    def value(self, error: FrameError) -> float:
        """The error in units of its 95th percentile, by the statistic that is further out."""
        return max(getattr(error, name) / max(self.quantile(name, UNIT), 1e-9) for name in STATISTICS)

    def quantile(self, statistic: str, level: float) -> float:
        """Of held-out errors, interpolated."""
        return float(np.interp(level, LEVELS, getattr(self, statistic)))


@dataclass(frozen=True)
class Source:
    """One way of imagining: its floors, its errors at each latent frame, and how often whole values were exceeded.

    Attributes:
        values: quantiles, at `LEVELS`, of the surprise of held-out latent frames, all together.
        blocks: likewise of held-out blocks, each its greatest.
    """

    floors: Floors
    horizons: tuple[Horizon, ...]
    values: tuple[float, ...]
    blocks: tuple[float, ...]

    def exceeded(self, threshold: float, of: str = "values") -> float:
        """The share of held-out latent frames (or of `blocks`) whose surprise is above a threshold: the rate of false alarms to expect."""
        quantiles = getattr(self, of)
        return float(1 - np.interp(threshold, quantiles, LEVELS, left=0.0, right=1.0))


@dataclass(frozen=True)
class SurpriseScale:
    """What errors of imagination are usual for a checkpoint (`wam calibrate`).

    Attributes:
        sources: by `source_name`.
        measured: on what, for people.
    """

    weights_sha256: str
    sources: Mapping[str, Source]
    measured: Mapping[str, Any]

    def source(self, name: str) -> Source:
        """One way of imagining.

        Raises:
            ValueError: it was not measured; lists those that were.
        """
        if name not in self.sources:
            raise ValueError(f"surprise was not calibrated for {name!r} (it was for {', '.join(self.sources)}); run `wam calibrate` with calibrate.steps or calibrate.forward_steps for it")
        return self.sources[name]

    def save(self, folder: Path) -> Path:
        """Write `surprise.json` beside the weights, atomically; returns its path."""
        path = folder / SURPRISE
        write_json_atomic(path, {"format": FORMAT, "unit": UNIT, "levels": LEVELS, **asdict(self)})
        return path


def source_name(mode: str, steps: int) -> str:
    """How a way of imagining is called: `joint/4`, `forward/1`."""
    return f"{mode}/{steps}"


def load_scale(folder: Path) -> SurpriseScale:
    """The scale of the checkpoint in a folder.

    Raises:
        FileNotFoundError: it was not calibrated.
        ValueError: another format, a damaged file, or errors of other weights than those that lie there now.
    """
    path = folder / SURPRISE
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: the errors that surprise is measured in are not known for this checkpoint; run `wam calibrate --checkpoint {folder}`")
    again = f"run `wam calibrate --checkpoint {folder}` again"
    try:
        tree = json.loads(path.read_text())
        if tree["format"] != FORMAT or tuple(tree["levels"]) != LEVELS or tree["unit"] != UNIT:
            raise ValueError(f"it has format {tree['format']!r}, and this version reads {FORMAT!r}")
        sources = {name: _source(part) for name, part in tree["sources"].items()}
        scale = SurpriseScale(tree["weights_sha256"], sources, tree["measured"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read ({error}); {again}") from error
    found = weights_sha256(folder)
    if found != scale.weights_sha256:
        raise ValueError(f"{path} is of other weights ({scale.weights_sha256[:12]}) than those in {folder} ({found[:12]}); {again}")
    return scale


def _source(tree: dict[str, Any]) -> Source:
    horizons = tuple(Horizon(int(h["frames"]), int(h["still"]), _quantiles(h["moving"]), _quantiles(h["worst"])) for h in tree["horizons"])
    return Source(Floors(**tree["floors"]), horizons, _quantiles(tree["values"]), _quantiles(tree["blocks"]))


def _quantiles(numbers: Sequence[float]) -> tuple[float, ...]:
    out = tuple(float(x) for x in numbers)
    if len(out) != len(LEVELS) or not all(math.isfinite(x) for x in out) or list(out) != sorted(out):
        raise ValueError(f"expected {len(LEVELS)} quantiles in order")
    return out


# ------------------------------------------------------------------------------------------------ measuring the scale


def measure(imagined_NCkHW: Tensor, observed_NCkHW: Tensor, before_NCHW: Tensor, observed: float) -> Source:
    """The errors of one way of imagining, from N blocks; `observed` is the floor of what is seen (`observed_floor`).

    Raises:
        ValueError: at some latent frame nothing ever moves.
    """
    thought = (imagined_NCkHW - before_NCHW.unsqueeze(2)).square().mean(1).sqrt()
    came = (observed_NCkHW - before_NCHW.unsqueeze(2)).square().mean(1).sqrt()
    floors = Floors(observed, imagined_floor(thought, came, observed))
    errors = [[frame_error(z, y, b, floors) for z, y in zip(zs.unbind(1), ys.unbind(1), strict=True)] for zs, ys, b in zip(imagined_NCkHW, observed_NCkHW, before_NCHW, strict=True)]
    horizons = tuple(_horizon(i, [block[i] for block in errors]) for i in range(imagined_NCkHW.shape[2]))
    values = [[horizon.value(error) for horizon, error in zip(horizons, block, strict=True) if error.seen or error.expected] for block in errors]
    return Source(floors, horizons, _levels([v for block in values for v in block]), _levels([max(block) for block in values if block]))


def _horizon(index: int, errors: Sequence[FrameError]) -> Horizon:
    moved = [e for e in errors if e.seen or e.expected]
    if not moved:
        raise ValueError(f"nothing moves at latent frame {index + 1} of any held-out block; check the camera and the dataset")
    return Horizon(len(moved), len(errors) - len(moved), _levels([e.moving for e in moved]), _levels([e.worst for e in moved]))


def _levels(numbers: Sequence[float]) -> tuple[float, ...]:
    return tuple(float(x) for x in np.quantile(np.asarray(numbers, np.float64), LEVELS))


# ------------------------------------------------------------------------------------------------ the check


@dataclass(frozen=True)
class Checker:
    """Compares plans with what comes; one for all robots of a policy.

    Raises:
        ValueError: nothing to compare, or a way of imagining that was not calibrated.
    """

    policy: Policy
    config: CheckConfig
    scale: SurpriseScale

    def __post_init__(self) -> None:
        if self.config.source == "none":
            raise ValueError("check.source is 'none', so there is nothing to compare; set it to plan or forward")
        if self.config.source == "forward":
            self.scale.source(source_name("forward", self.config.steps))

    def require(self, mode: str, steps: int) -> None:
        """Check, before anything runs, that plans in a mode can be compared.

        Raises:
            ValueError: they imagine nothing to compare, or were not calibrated.
        """
        if self.config.source == "plan":
            if not imagines(self.policy, mode):
                raise ValueError(f"check.source is 'plan', but plans in mode {mode!r} imagine no video; use check.source=forward, or a mode that imagines")
            self.scale.source(source_name(mode, steps))

    def compare(self, imagined_CkHW: Tensor, observed_CkHW: Tensor, before_CHW: Tensor, mode: str | None = None, steps: int | None = None) -> Surprise:
        """Compare a plan with the latent frames that have come since.

        Args:
            imagined_CkHW: of the whole block, or at least as many latent frames as are observed.
            observed_CkHW: those that have come, from the block's first on.
            before_CHW: the newest frame when the plan was made, encoded alone (`wam.inference.outcome.newest`), as in calibration.
            mode, steps: of the plan whose own imagination this is (`source: plan`); not needed where only one was calibrated, or for `source: forward`.

        Raises:
            ValueError: shapes that do not fit, numbers that are not finite, or a way of imagining that was not calibrated.
        """
        source = self.scale.source(self._name(mode, steps))
        self._check_shapes(imagined_CkHW, observed_CkHW, before_CHW, len(source.horizons))
        pairs = zip(imagined_CkHW.cpu().unbind(1), observed_CkHW.cpu().unbind(1), source.horizons, strict=False)
        before, errors, values = before_CHW.cpu(), [], []
        for imagined, observed, horizon in pairs:
            errors.append(frame_error(imagined, observed, before, source.floors))
            values.append(horizon.value(errors[-1]))
        if not any(e.seen or e.expected for e in errors):
            return Surprise(0.0, False, "still: nothing moved, imagined or seen", True, tuple(values))
        worst = int(np.argmax(values))
        return Surprise(values[worst], values[worst] > self.config.threshold, self._why(worst, values[worst], errors[worst]), False, tuple(values))

    def _why(self, index: int, value: float, error: FrameError) -> str:
        verdict = "above" if value > self.config.threshold else "within"
        moved = f"{error.seen} patches moved, {error.expected} were imagined to"
        return f"latent frame {index + 1}: {value:.2f} of the usual error, {verdict} {self.config.threshold:g}; {moved}"

    def _name(self, mode: str | None, steps: int | None) -> str:
        if self.config.source == "forward":
            return source_name("forward", self.config.steps)
        if mode is not None:
            return source_name(mode, steps or self.policy.config.sampling.steps)
        plans = [name for name in self.scale.sources if not name.startswith("forward/")]
        if len(plans) != 1:
            raise ValueError(f"surprise was calibrated for plans of {', '.join(plans) or 'no mode'}; say whose imagination is compared: compare(..., mode=, steps=)")
        return plans[0]

    def _check_shapes(self, imagined: Tensor, observed: Tensor, before: Tensor, horizons: int) -> None:
        size = tuple(before.shape)
        fits = before.ndim == 3 and imagined.ndim == observed.ndim == 4 and all((x.shape[0], *x.shape[2:]) == size for x in (imagined, observed))
        if not fits or not 1 <= observed.shape[1] <= min(imagined.shape[1], horizons):
            raise ValueError(
                f"imagined {tuple(imagined.shape)}, observed {tuple(observed.shape)} and before {size} do not fit; "
                f"expected (channels, frames, height, width) twice, 1 to {horizons} observed and no fewer imagined, and (channels, height, width)"
            )
        for name, x in (("imagined", imagined), ("observed", observed), ("before", before)):
            if not bool(torch.isfinite(x).all()):
                raise ValueError(f"the {name} latents hold numbers that are not finite; nothing was compared")


def imagines(policy: Policy, mode: str) -> bool:
    """Whether plans in a mode come with imagined video."""
    return mode == "imagine" or Kind.V in Relations.of(policy.config).mode(mode).denoised
