"""One plan: from what is in the cache to actions, video, or both, in any mode.

    skip             A from noise, against the cache
    skip_registers   V, pure noise, through the network once; A against the cache and that
    joint(_mutual)   V and A from noise, side by side
    imagine          V from noise; written into the cache as if it had been seen; A from noise against it; forgotten again
    inverse          as imagine, with a given future in place of the imagined one
    forward          given actions written into the cache; V from noise against them
    video            V from noise

These are functions of a model and a cache; they hold nothing.  What is pinned by a mode is present and never stepped.  What is *held* is
given at level 0 among tokens that are denoised: a committed prefix of the actions, or a first frame inside its block.  What a plan is
*pulled* to is not given: each step's velocities are turned towards it, through the network's own gradient (`wam.inference.guided`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from wam.config import SamplingConfig
from wam.flow import TIMESTEPS, guidance
from wam.model.cache import KVCache
from wam.model.conditions import Conditions
from wam.model.view import View
from wam.model.wam import Ahead, Noisy, WorldActionModel
from wam.relations import Mode
from wam.solvers import Solver, choose_rows, make_grid, make_reuse, make_solver
from wam.timeline import Kind


@dataclass(frozen=True)
class Held:
    """Tokens that are given: values in the places where `mask` is true, at level 0.

    Attributes:
        video: values (B, C, k, h, w), mask (B, k).
        action: values (B, A, .), mask (B, A).
    """

    video: tuple[Tensor, Tensor] | None = None
    action: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class Pull:
    """Actions that the sampled ones are drawn to, by guidance.

    Attributes:
        towards_BTA: normalised actions (B, A, .).
        weight_BTA: how much each counts: 1 is wanted exactly, 0 is free; 0 in channels that the robot does not have.
        most: the largest weight of the guidance.
        through_network: what is expected of the actions follows them through the network; else as if the network's answer stayed as it is.
    """

    towards_BTA: Tensor
    weight_BTA: Tensor
    most: float
    through_network: bool = True


@dataclass(frozen=True)
class Situation:
    """Whom a plan is for: rows of a batch, each at its own block.

    Attributes:
        state_BnS: the states now (B, 1, .), for models whose states are not cached.
        guided: the rows are two halves, the same robots with their instructions and with the negative one; samples are for the first half.
        pull: what actions are drawn to, a row a robot.
    """

    cache: KVCache
    blocks: list[int]
    conditions: Conditions
    embodiment_B: Tensor
    state_BnS: Tensor | None = None
    held: Held = Held()
    guided: bool = False
    pull: Pull | None = None

    @property
    def rows(self) -> int:
        """Robots."""
        return len(self.blocks) // 2 if self.guided else len(self.blocks)


@dataclass(frozen=True)
class Sample:
    """What was sampled; absent parts are None.  Actions (B, A, .) are normalised, video (B, C, k, h, w) is latents."""

    action_BTA: Tensor | None = None
    video_BCFHW: Tensor | None = None


@dataclass(frozen=True)
class Noise:
    """Where sampling starts: pure noise, drawn by the caller so that each row can have its own generator."""

    action_BTA: Tensor
    video_BCFHW: Tensor


@dataclass(frozen=True)
class Step:
    """What a watcher of a trajectory is told after every solver step: the sample there, and the (guided) velocities that led to it."""

    index: int
    sample: Sample
    video_velocity: Tensor | None
    action_velocity: Tensor | None


Watch = Callable[[Step], None]
_Pair = tuple[Tensor | None, Tensor | None]  # of video and actions


def _unwatched(step: Step) -> None:
    """Nobody looks."""


@torch.no_grad()
def sample(
    model: WorldActionModel, mode: Mode, at: Situation, noise: Noise, how: SamplingConfig, given: Tensor | None = None, with_video: bool = False, watch: Watch = _unwatched
) -> Sample:
    """Sample one block.

    Args:
        given: normalised actions (B, A, .) for `forward`, latents (B, C, k, h, w) for `inverse`.
        with_video: also denoise the video where the mode's actions do not need it.

    Raises:
        ValueError: a mode that needs `given` without it, or guidance of a situation that is not guided.
    """
    if how.guided and not at.guided:
        scale = how.guidance if how.guidance != 1 else how.action_guidance
        raise ValueError(f"guidance {scale} compares two instructions, but this memory was written with one; open the session with guidance, or use guidance 1")
    if mode.name in ("forward", "inverse"):
        if given is None:
            raise ValueError(f"mode {mode.name!r} needs {'actions' if mode.name == 'forward' else 'a future video'} to be given")
        if mode.pinned:
            return _denoise(model, mode, at, noise, how, mode.live, given, watch=watch)
        kind = Kind.AC if mode.name == "forward" else Kind.VC
        return _conditioned(model, mode, at, noise, how, kind, given, 0.0, watch)
    if mode.name == "imagine":
        return _imagined(model, mode, at, noise, how, watch)
    steady = not mode.sees(Kind.V, Kind.A) and not (model.live_state and mode.sees(Kind.V, Kind.S))
    if mode.pinned.get(Kind.V) and steady:
        return _with_registers(model, mode, at, noise, how, watch)
    live = (Kind.V, Kind.A) if with_video and mode.live == (Kind.A,) else mode.live
    return _denoise(model, mode, at, noise, how, live, watch=watch)


def _imagined(model: WorldActionModel, mode: Mode, at: Situation, noise: Noise, how: SamplingConfig, watch: Watch) -> Sample:
    """First the video, then the actions: against it as a clean copy, or beside it, held clean, where there is a single copy of everything."""
    alone = model.relations.mode("video")
    stop = 0.0 if mode.pinned else how.video_stop
    video = _denoise(model, alone, at, noise, how, alone.live, stop=stop, watch=watch).video_BCFHW
    assert video is not None
    if mode.pinned:
        acted = _denoise(model, mode, at, noise, how, mode.live, video, watch=watch)
    else:
        acted = _conditioned(model, mode, at, noise, how, Kind.VC, video, stop, watch)
    return Sample(acted.action_BTA, video)


def _conditioned(model: WorldActionModel, mode: Mode, at: Situation, noise: Noise, how: SamplingConfig, kind: Kind, given: Tensor, stop: float, watch: Watch) -> Sample:
    """Write a condition into the block, denoise what follows from it, and forget it."""
    level: float | Tensor = TIMESTEPS * stop
    if kind is Kind.VC and at.held.video is not None:
        level = torch.where(_rows(at, at.held.video[1]), 0.0, TIMESTEPS * stop)
    model.prefill(at.cache, mode.table, kind, _rows(at, given), at.blocks, at.conditions, at.embodiment_B, level)
    try:
        return _denoise(model, mode, at, noise, how, mode.live, watch=watch)
    finally:
        at.cache.drop(kind, at.blocks)


def _with_registers(model: WorldActionModel, mode: Mode, at: Situation, noise: Noise, how: SamplingConfig, watch: Watch) -> Sample:
    """Video tokens of pure noise that see nothing of what changes from step to step (actions, live states): one pass serves all."""
    model.prefill(at.cache, mode.table, Kind.V, _rows(at, noise.video_BCFHW), at.blocks, at.conditions, at.embodiment_B, TIMESTEPS * mode.pinned[Kind.V])
    try:
        return _denoise(model, mode, at, noise, how, (Kind.A,), watch=watch)
    finally:
        at.cache.drop(Kind.V, at.blocks)


# ------------------------------------------------------------------------------------------------ the loop


@dataclass
class _Track:
    """One kind of token along its grid: where it is, and what holds parts of it."""

    x: Tensor
    timesteps: Tensor  # (steps,) on the device
    sigmas: tuple[float, ...]  # where each step starts, and where the last one ends
    solver: Solver | None  # None: pinned
    held: tuple[Tensor, Tensor] | None  # values and mask of the tokens' own axis
    axis: int
    keep: Tensor | None = None  # 1 for channels that mean something

    def __post_init__(self) -> None:
        self.x = self._settled(self.x)

    def level(self, i: int) -> Tensor:
        """Timesteps of step i: (B, 1), or one per token where some are held."""
        t = self.timesteps[min(i, len(self.timesteps) - 1)]
        if self.held is None:
            return t.expand(len(self.x), 1)
        return torch.where(self.held[1], 0.0, t)

    def step(self, velocity: Tensor, i: int) -> None:
        """One solver step; what is held stays."""
        if self.solver is not None:
            self.x = self._settled(self.solver.step(velocity.float(), i, self.x))

    def _settled(self, x: Tensor) -> Tensor:
        if self.held is not None:
            values, mask = self.held
            shape = [1] * x.ndim
            shape[0], shape[self.axis] = mask.shape
            x = torch.where(mask.view(shape), values.to(x.dtype), x)
        return x if self.keep is None else x * self.keep


def _denoise(
    model: WorldActionModel, mode: Mode, at: Situation, noise: Noise, how: SamplingConfig, live: tuple[Kind, ...], given: Tensor | None = None, stop: float = 0.0, watch: Watch = _unwatched
) -> Sample:
    """Step the tokens of `live` (V before A) along their grids, from pure noise to `stop`."""
    video_moves = Kind.V in live and Kind.V not in mode.pinned
    if at.guided and not video_moves and how.action_guidance == 1:
        for kind in live:
            at.cache.forget(kind, at.blocks)  # on both sides: what is written next must see the same past on each
        at = conditional(at)  # actions that nothing guides need one side
    tracks = {kind: _track(model, mode, at, noise, how, kind, given, stop) for kind in live}
    steps = how.steps if video_moves or how.action_steps is None else how.action_steps
    view, reuse = model.view(at.cache, mode.table, live, at.blocks), make_reuse(how.reuse, steps, how.evaluations, at.rows)
    ahead = model.embed_ahead([_noisy(model, at, tracks, _places(tracks), i) for i in range(steps)])
    velocities: _Pair = (None, None)
    for i in range(steps):
        if any(due := reuse.due(i)):
            evaluate = _velocities if at.pull is None or Kind.A not in tracks else _pulled
            found = evaluate(model, view, at, how, tracks, i, ahead[i])
            velocities = _chosen(due, found[0], velocities[0]), _chosen(due, found[1], velocities[1])
            reuse.record(next(v for v in velocities if v is not None))
        for kind, velocity in zip((Kind.V, Kind.A), velocities, strict=True):
            if kind in tracks and velocity is not None:
                tracks[kind].step(velocity, i)
        watch(Step(i, _sampled(tracks, mode), *velocities))
    return _sampled(tracks, mode)


def _chosen(due: Sequence[bool], new: Tensor | None, old: Tensor | None) -> Tensor | None:
    return new if new is None or old is None else choose_rows(due, new, old)


def _sampled(tracks: dict[Kind, _Track], mode: Mode) -> Sample:
    free = {kind: track.x for kind, track in tracks.items() if kind not in mode.pinned}
    return Sample(free.get(Kind.A), free.get(Kind.V))


def _track(model: WorldActionModel, mode: Mode, at: Situation, noise: Noise, how: SamplingConfig, kind: Kind, given: Tensor | None, stop: float) -> _Track:
    config, video = model.config.noise, kind is Kind.V
    start = noise.video_BCFHW if video else noise.action_BTA
    held, axis, keep = (at.held.video, 2, None) if video else (at.held.action, 1, model.action_channels(at.embodiment_B[: at.rows]))
    if kind in mode.pinned:
        level = mode.pinned[kind]
        x = given if level == 0 and given is not None else start
        return _Track(x, torch.full((1,), TIMESTEPS * level, device=model.device), (level,), None, held, axis, keep)
    steps = how.steps if video or how.action_steps is None or Kind.V in mode.denoised else how.action_steps
    shift = (how.video_shift or config.video.shift) if video else (how.action_shift or config.action.shift)
    grid = make_grid(how.solver, steps, shift)
    final = max(stop, how.video_final if mode.denoised == (Kind.V, Kind.A) else 0.0) if video else 0.0
    grid = grid.ending_at(final) if final > 0 else grid
    return _Track(start, grid.timesteps.to(model.device), tuple(grid.sigmas.tolist()), make_solver(how.solver, grid), held, axis, keep)


def _places(tracks: dict[Kind, _Track]) -> dict[Kind, Tensor]:
    return {kind: track.x for kind, track in tracks.items()}


def _noisy(model: WorldActionModel, at: Situation, tracks: dict[Kind, _Track], places: dict[Kind, Tensor], i: int, ahead: Ahead | None = None) -> Noisy:
    """The tokens of step i at `places`, for every row."""
    parts: dict[str, Any] = {"ahead": ahead}
    for kind, track in tracks.items():
        names = ("video_BCFHW", "video_t_BF") if kind is Kind.V else ("action_BTA", "action_t_BT")
        parts |= dict(zip(names, (_rows(at, places[kind]), _rows(at, track.level(i))), strict=True))
    if model.live_state and Kind.A in tracks:
        parts["state_BnS"] = at.state_BnS
    return Noisy(**parts)


def _velocities(model: WorldActionModel, view: View, at: Situation, how: SamplingConfig, tracks: dict[Kind, _Track], i: int, ahead: Ahead) -> _Pair:
    """Velocities of video and actions where the tracks are."""
    return _velocities_at(_places(tracks), model, view, at, how, tracks, i, ahead)


def _velocities_at(places: dict[Kind, Tensor], model: WorldActionModel, view: View, at: Situation, how: SamplingConfig, tracks: dict[Kind, _Track], i: int, ahead: Ahead) -> _Pair:
    """The network's velocities of video and actions, guided where both sides are there; unless guided, actions are the condition's."""
    video, action = model.denoise(view, _noisy(model, at, tracks, places, i, ahead), at.conditions, at.embodiment_B)
    if not at.guided:
        return video, action
    rows = at.rows
    if action is not None:
        action = action[:rows] if how.action_guidance == 1 else guidance(action[:rows].float(), action[rows:].float(), how.action_guidance)
    return None if video is None else guidance(video[:rows].float(), video[rows:].float(), how.guidance), action


def _pulled(model: WorldActionModel, view: View, at: Situation, how: SamplingConfig, tracks: dict[Kind, _Track], i: int, ahead: Ahead) -> _Pair:
    """Velocities turned towards `at.pull`: what is expected of the actions is compared with it, and the difference goes back through the network."""
    pull = at.pull
    assert pull is not None
    with torch.set_grad_enabled(pull.through_network):
        places = {kind: track.x.detach().requires_grad_(pull.through_network and track.solver is not None) for kind, track in tracks.items()}
        velocities = _velocities_at(places, model, view, at, how, tracks, i, ahead)
        assert velocities[1] is not None
        expected = places[Kind.A] - tracks[Kind.A].sigmas[i] * velocities[1].float()
        error = pull.weight_BTA * (pull.towards_BTA - expected.detach())
        turns: dict[Kind, Tensor | None] = {Kind.A: error}
        if pull.through_network:
            moving = [kind for kind in places if places[kind].requires_grad]
            turns = dict(zip(moving, torch.autograd.grad(expected, [places[kind] for kind in moving], error, allow_unused=True), strict=True))

    def turned(kind: Kind, velocity: Tensor | None) -> Tensor | None:
        turn = turns.get(kind)
        if velocity is None or turn is None:
            return None if velocity is None else velocity.detach()
        return velocity.detach().float() - _pull_weight(tracks, kind, i, pull.most) * turn

    return turned(Kind.V, velocities[0]), turned(Kind.A, velocities[1])


def _pull_weight(tracks: dict[Kind, _Track], kind: Kind, i: int, most: float) -> float:
    """sigma / ((1 - sigma) r^2) of a kind at step i, with r^2 = sigma_A^2 / (sigma_A^2 + (1 - sigma_A)^2); at most `most`, and no more than one step can take in."""
    sigma, acting = tracks[kind].sigmas[i], tracks[Kind.A].sigmas[i]
    most = min(most, 1 / max(sigma - tracks[kind].sigmas[i + 1], 1e-6))
    r2 = acting**2 / (acting**2 + (1 - acting) ** 2)
    return min(most, sigma / ((1 - sigma) * r2)) if sigma < 1 else most


def _rows(at: Situation, x: Tensor) -> Tensor:
    """What every robot has, for every row."""
    return torch.cat([x, x]) if at.guided else x


def conditional(at: Situation) -> Situation:
    """The first half of a guided situation: the robots with their instructions."""
    rows = list(range(at.rows))
    index = torch.tensor(rows, device=at.embodiment_B.device)
    state = None if at.state_BnS is None else at.state_BnS[index]
    return replace(at, cache=at.cache.head(len(rows)), blocks=at.blocks[: len(rows)], conditions=at.conditions.select(index), embodiment_B=at.embodiment_B[index], state_BnS=state, guided=False)
