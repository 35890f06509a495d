"""The objective: a batch of windows, noised, through the network, to one loss for video and one for actions.

    modes, levels, what is dropped and what is supervised: drawn per sample, on the CPU    ->  `Drawn`
    frames -> latents, noised  ->  `Window`  ->  network  ->  squared errors of velocities
    errors x weight of their level x what is supervised  ->  `Losses`, reduced in one of three ways

With a value head every window has a value token a block beside all else, asked of the block's actions or of its video (drawn per sample);
where it is not known what came of the episode (`outcome` is negative, or missing), nothing of it is supervised.

Padding, channels a robot does not have, tokens that are given (level 0) and what a mode does not predict are not supervised, so
samples of different modes share a batch without rescaling one another.  A sample without video, or without states and actions,
shows nothing in their place: no token of them is seen by another, so what they are made with has no gradient from that sample.

How much is supervised is known before the network runs, so a loss over many processes and micro-batches can be divided by the
whole batch's count: `total / denominator`, each summed over all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from wam.codec.clip_image import ClipImage
from wam.codec.codec import Codec
from wam.codec.first_frame import first_frame_condition
from wam.config import Config
from wam.data.outcomes import UNKNOWN
from wam.flow import SMALLEST_SIGMA, TIMESTEPS, add_noise, velocity_target
from wam.model.actions import channel_masks, pad_actions, pad_states
from wam.model.conditions import Conditions
from wam.model.value import value_errors, value_target
from wam.model.wam import TrainingMask, Window, WorldActionModel
from wam.model.window_mask import WindowMask, window_mask
from wam.relations import Mode, Reach, block_mask, trained_valuations
from wam.text.text import prompt
from wam.timeline import VIDEO_KINDS, Kind, Layout
from wam.training.draws import Draws
from wam.training.noise import LevelDraw, draw_levels, draw_modes, level_weights

PARTS = ("video", "action", "value")  # of a loss, the last where there is a value head
OF_VIDEO, OF_ACTIONS = (Kind.G, Kind.H, Kind.VC, Kind.V), (Kind.S, Kind.AC, Kind.A)  # what a sample without video, or without actions, does not show
OF_VALUATION = {"action": "has_action", "outcome": "has_video"}  # what a sample must have for its values to be asked of it
Errors = tuple[Tensor, ...]  # video's and actions' per sample (B,), then per frame and per action (B, .); with a value head its own per sample and per block, and its logits (B, N)


@dataclass(frozen=True)
class Part:
    """Weighted squared errors of one kind of token: per sample their sum over what is supervised, how many those are, and how many there are at all.

    Attributes:
        error_BU, weight_BU: the same for every frame or action by itself, where asked for: its sum over what is supervised of it, and how much that is.
        sigma_BU: its noise level.
    """

    sum_B: Tensor
    count_B: Tensor
    total_B: Tensor
    error_BU: Tensor | None = None
    weight_BU: Tensor | None = None
    sigma_BU: Tensor | None = None

    def to(self, device: torch.device) -> Part:
        """The same on a device."""
        return Part(*(None if x is None else x.to(device) for x in vars(self).values()))  # type: ignore[arg-type]

    @staticmethod
    def cat(parts: Sequence[Part]) -> Part:
        """Those of several micro-batches as one batch's."""
        columns = zip(*(vars(part).values() for part in parts), strict=True)
        return Part(*(None if column[0] is None else torch.cat(column) for column in columns))  # type: ignore[arg-type]

    def mean(self, reduction: str) -> Tensor:
        """One loss; 0 where nothing is supervised.

        Args:
            reduction: `supervised` divides by what is supervised in the batch; `sample` takes each sample's own mean first (Fast-WAM);
                `all` divides by everything, padding included (DreamZero).
        """
        return self.total(reduction) / self.denominator(reduction).clamp_min(1)

    def total(self, reduction: str) -> Tensor:
        """What `mean` divides."""
        return (self.sum_B / self.count_B.clamp_min(1)).sum() if reduction == "sample" else self.sum_B.sum()

    def denominator(self, reduction: str) -> Tensor:
        """What `mean` divides by; known without the errors."""
        if reduction == "sample":
            return (self.count_B > 0).sum()
        return (self.count_B if reduction == "supervised" else self.total_B).sum()


@dataclass(frozen=True)
class Losses:
    """Errors of a batch; `modes` is each sample's, `among` the modes whose tokens were laid out for it (`Objective.lay`)."""

    modes: list[str]
    video_part: Part
    action_part: Part
    reduction: str = "supervised"
    among: tuple[frozenset[int], ...] = ()
    value_part: Part | None = None  # with a value head
    logit_BN: Tensor | None = None  # likewise: what it said, detached

    @property
    def parts(self) -> tuple[Part, ...]:
        """Video's, actions', and where there is a value head its own."""
        return (self.video_part, self.action_part, *(() if self.value_part is None else (self.value_part,)))

    @staticmethod
    def cat(parts: Sequence[Losses]) -> Losses:
        """Errors of several micro-batches as those of one batch."""
        if len(parts) == 1:
            return parts[0]
        video, action = (Part.cat([getattr(part, name) for part in parts]) for name in ("video_part", "action_part"))
        value = [part.value_part for part in parts if part.value_part is not None]
        logits = [part.logit_BN for part in parts if part.logit_BN is not None]
        modes, among = [mode for part in parts for mode in part.modes], tuple(among for part in parts for among in part.among)
        return Losses(modes, video, action, parts[0].reduction, among, Part.cat(value) if value else None, torch.cat(logits) if logits else None)

    def video(self) -> Tensor:
        """The loss of the video velocity (0 when none is supervised)."""
        return self.video_part.mean(self.reduction)

    def action(self) -> Tensor:
        """The loss of the action velocity (0 when none is supervised)."""
        return self.action_part.mean(self.reduction)

    def value(self) -> Tensor:
        """The loss of the values (0 when none is supervised, or there is no value head)."""
        return self.video_part.sum_B.new_zeros(()) if self.value_part is None else self.value_part.mean(self.reduction)

    def by_mode(self) -> dict[str, float]:
        """`<mode>/video`, `<mode>/action` and `<mode>/value`: mean errors over what is supervised, of the modes in the batch."""
        out = {}
        for name in dict.fromkeys(self.modes):
            rows = torch.tensor([m == name for m in self.modes], device=self.video_part.sum_B.device)
            for part, errors in zip(PARTS, self.parts, strict=False):
                n = errors.count_B[rows].sum()
                if n > 0:
                    out[f"{name}/{part}"] = float(errors.sum_B[rows].detach().sum() / n)
        return out


def video_errors(velocity_BCFHW: Tensor, target_BCFHW: Tensor, weight_BF: Tensor, seen_BF: Tensor) -> Part:
    """Weighted mean squared error of each frame, summed over the frames that are supervised."""
    error_BF = (velocity_BCFHW.float() - target_BCFHW).square().mean(dim=(1, 3, 4)) * weight_BF
    return Part((error_BF * seen_BF).sum(1), seen_BF.sum(1), torch.ones_like(error_BF).sum(1), (error_BF * seen_BF).detach(), seen_BF.float())


def action_errors(velocity_BTA: Tensor, target_BTA: Tensor, weight_BT: Tensor, seen_BTA: Tensor) -> Part:
    """Weighted squared error of each action channel that is supervised; counts are in actions, not channels, where a robot has all of them."""
    channels = velocity_BTA.shape[2]
    error_BTA = (velocity_BTA.float() - target_BTA).square() * weight_BT.unsqueeze(2)
    seen = seen_BTA.expand_as(error_BTA)
    error_BT, seen_BT = (error_BTA * seen).sum(2) / channels, seen.sum(2) / channels
    return Part((error_BTA * seen).sum((1, 2)) / channels, seen.sum((1, 2)) / channels, torch.ones_like(error_BTA).sum((1, 2)) / channels, error_BT.detach(), seen_BT)


@dataclass(frozen=True)
class Drawn:
    """What is random about a batch, and what of it is supervised: everything but the noise itself, on the CPU.

    Attributes:
        modes: of each sample, an index into the config's.
        among: the modes whose tokens are laid out; at least those of `modes`.
        levels: noise levels.
        hidden: per sample, the kinds that nobody sees.
        dropped: samples whose instruction is dropped.
        video_seen_BF, action_seen_BTA: what is supervised (of actions, per channel).
        draws: goes on to the noise.
        valuations: with a value head, what each sample's values are asked of, as an index into `Objective.valuations`.
        value_BN, value_seen_BN: likewise, what they should be, and where that is known.
    """

    modes: list[int]
    among: frozenset[int]
    levels: LevelDraw
    hidden: list[frozenset[Kind]]
    dropped: list[bool]
    video_seen_BF: Tensor
    action_seen_BTA: Tensor
    draws: Draws
    valuations: list[int] | None = None
    value_BN: Tensor | None = None
    value_seen_BN: Tensor | None = None

    def counts(self) -> tuple[Part, ...]:
        """The parts of the losses without their errors: how many tokens are supervised, and how many there are; of what a sample lacks, none."""
        video, action = self.video_seen_BF, self.action_seen_BTA
        channels, none = action.shape[2], torch.zeros(len(video))
        total = [torch.tensor([float(x.shape[1] * (kind not in hidden)) for hidden in self.hidden]) for kind, x in ((Kind.V, video), (Kind.A, action))]
        video_sigma = self.levels.video_BF if self.levels.first_B1 is None else torch.cat([self.levels.first_B1, self.levels.video_BF], dim=1)
        return (
            Part(none, video.sum(1), total[0], None, video.float(), video_sigma),
            Part(none, action.sum((1, 2)) / channels, total[1], None, action.sum(2) / channels, self.levels.action_BT),
            *(() if self.value_seen_BN is None else (Part(none, self.value_seen_BN.sum(1), torch.full((len(none),), float(self.value_seen_BN.shape[1])), None, self.value_seen_BN.float()),)),
        )


@dataclass(frozen=True)
class Laid:
    """The tokens that some modes need, and who sees whom among them in each of these modes (with a value head, under each valuation)."""

    modes: list[int]
    layout: Layout
    dense_MLL: Tensor
    parts: WindowMask | None
    valuations: int = 1

    def row(self, mode: int, valuation: int) -> int:
        """Where a mode's mask is."""
        return self.modes.index(mode) * self.valuations + valuation


class Objective:
    """Computes the losses of a batch; what modes need of a window, and their masks, are laid out once."""

    def __init__(self, config: Config, model: WorldActionModel, codec: Codec, image: ClipImage | None = None, device: torch.device | None = None):
        """`device` is where the model will be when it computes; default: where it is."""
        self.config, self.model, self.codec, self.image = config, model, codec, image
        self.device = device or model.device
        self.valuations = trained_valuations(config)
        relations = model.relations
        self.forms: list[list[Mode]] = [[relations.valued(name, v) for v in self.valuations] or [relations.mode(name)] for name in config.training.modes]
        self.modes: list[Mode] = [forms[0] for forms in self.forms]  # what a mode does to video and actions is the same under every valuation
        self.robot = config.model.embodiment(config.data.embodiment)
        self.reach = Reach.of(config.timeline)
        self.flex = config.model.attention == "flex"
        self._laid: dict[frozenset[int], Laid] = {}
        self.all_modes = frozenset(range(len(self.modes)))
        self.layout = self.lay(self.all_modes).layout

    def lay(self, among: frozenset[int]) -> Laid:
        """What `among` (indices of modes) need, laid out once."""
        if among not in self._laid:
            order = sorted(among)
            modes = [form for i in order for form in self.forms[i]]
            layout = needed(self.model.training_layout(self.config.timeline.blocks), modes, self.reach)
            dense = torch.stack([m.table.dense(layout, self.reach) for m in modes]).to(self.device)
            self._laid[among] = Laid(order, layout, dense, window_mask(dense, layout), max(1, len(self.valuations)))
        return self._laid[among]

    def __call__(self, batch: dict[str, Any], random: Draws | torch.Generator, mode: str | None = None) -> Losses:
        """Losses of a collated batch; modes are drawn from the config unless one is given."""
        return self.losses(batch, self.draw(batch, random, mode))

    def draw(self, batch: dict[str, Any], random: Draws | torch.Generator, mode: str | None = None) -> Drawn:
        """Draw what is random about a batch; modes from the config unless one is given."""
        t, size = self.config.training, len(batch["instruction"])
        draws, names = Draws.of(random, size), list(t.modes)
        video, action = has(batch, "has_video"), has(batch, "has_action")
        chosen = [names.index(mode)] * size if mode else draw_modes(t.modes, size, draws, self._fitting(video, action))
        modes = [self.modes[i] for i in chosen]
        levels = draw_levels(self.config.noise, self.config.timeline, modes, draws, t.predict_first_frame)
        stateless, goal, textless = (draws.uniform(1)[:, 0] for _ in range(3))
        hidden = [
            frozenset([*((Kind.S,) if s else ()), *(() if g else (Kind.G,)), *(() if v else OF_VIDEO), *(() if a else OF_ACTIONS)])
            for s, g, v, a in zip((stateless < t.state_dropout).tolist(), (goal < t.goal_image).tolist(), video.tolist(), action.tolist(), strict=True)
        ]
        video_seen = self._video_seen(batch, levels) & _predicts(modes, Kind.V) & video.unsqueeze(1)
        action_seen = ~batch["action_is_pad"] & levels.action_seeks & _predicts(modes, Kind.A) & action.unsqueeze(1)
        channels = channel_masks(self.config.model)[self.embodiments(batch)].unsqueeze(1) > 0
        drawn = Drawn(chosen, self.all_modes, levels, hidden, (textless < t.text_dropout).tolist(), video_seen, action_seen.unsqueeze(2) & channels, draws)
        return self._draw_values(batch, drawn) if self.valuations else drawn

    def _draw_values(self, batch: dict[str, Any], drawn: Drawn) -> Drawn:
        """Draw what each sample's values are asked of, last of all, so that the rest is drawn as without a value head; what it lacks they are not asked of."""
        size, weights = len(drawn.modes), self.config.training.valuations
        there = torch.stack([has(batch, OF_VALUATION[name]) for name in self.valuations], dim=1)
        chosen = draw_modes({name: weights[name] for name in self.valuations}, size, drawn.draws, there)
        return self.valued(batch, drawn, chosen)

    def valued(self, batch: dict[str, Any], drawn: Drawn, valuations: list[int]) -> Drawn:
        """The same, with values asked of what `valuations` says for every sample."""
        steps = batch.get("outcome")
        steps = torch.full((len(valuations), self.config.timeline.blocks), UNKNOWN) if steps is None else steps.float().cpu()
        there = torch.stack([has(batch, OF_VALUATION[self.valuations[v]])[i] for i, v in enumerate(valuations)])
        seen = (steps >= 0) & there.unsqueeze(1)
        return replace(drawn, valuations=valuations, value_BN=torch.where(seen, value_target(self.config.model, steps), 0.0), value_seen_BN=seen)

    def _fitting(self, video_B: Tensor, action_B: Tensor) -> Tensor | None:
        """(B, modes): those that predict what a sample has and look at nothing that it lacks; where there are none, those that predict it.  None where all have everything."""
        if bool(video_B.all()) and bool(action_B.all()):
            return None
        predicts = [torch.tensor([kind in m.predicts for m in self.modes]) for kind in (Kind.V, Kind.A)]
        looks = ((Kind.V, (Kind.A, Kind.AC)), (Kind.A, (Kind.V, Kind.VC)))
        lacks_nothing = [torch.tensor([not any(m.sees(kind, other) for other in others) for m in self.modes]) for kind, others in looks]
        weighed = torch.tensor([weight > 0 for weight in self.config.training.modes.values()])
        out = (video_B.unsqueeze(1) & predicts[0]) | (action_B.unsqueeze(1) & predicts[1])
        for only_B, own, alone in ((video_B & ~action_B, predicts[0], lacks_nothing[0]), (action_B & ~video_B, predicts[1], lacks_nothing[1])):
            if bool((own & alone & weighed).any()):
                out = torch.where(only_B.unsqueeze(1), own & alone, out)
        return out

    def losses(self, batch: dict[str, Any], drawn: Drawn) -> Losses:
        """Losses of a collated batch with what was drawn for it."""
        return self.assemble(drawn, self.errors(batch, drawn))

    def errors(self, batch: dict[str, Any], drawn: Drawn) -> Errors:
        """Errors of a collated batch, as tensors and nothing else: what a wrapped module may return."""
        device, laid = self.model.device, self.lay(drawn.among)
        window, video_target, action_target = self._window(batch, drawn)
        state = window.state_BNS
        assert state is not None
        conditions = self.conditions_of(batch, state, window.embodiment_B, drawn.dropped)
        velocity, action_velocity, *logits = self.model(window, conditions, self._mask(laid, drawn), laid.layout)
        video = video_errors(velocity, video_target, self._video_weight(window.video_t_BF / TIMESTEPS), drawn.video_seen_BF.to(device))
        weight = level_weights(self.config.noise.action, window.action_t_BT / TIMESTEPS)
        action = action_errors(action_velocity, action_target, weight, drawn.action_seen_BTA.to(device))
        assert video.error_BU is not None and action.error_BU is not None
        return (video.sum_B, action.sum_B, video.error_BU, action.error_BU, *(self._value_errors(logits[0], drawn) if logits else ()))

    def _value_errors(self, logit_BN: Tensor, drawn: Drawn) -> tuple[Tensor, Tensor, Tensor]:
        """Of the values: errors per sample, per block, and what was said."""
        assert drawn.value_BN is not None and drawn.value_seen_BN is not None
        seen = drawn.value_seen_BN.to(logit_BN.device)
        error = value_errors(logit_BN, drawn.value_BN.to(logit_BN.device)) * seen
        return error.sum(1), error.detach(), logit_BN.detach()

    def assemble(self, drawn: Drawn, errors: Errors) -> Losses:
        """Losses from what was drawn and the errors it led to."""
        pairs = [(errors[0], errors[2]), (errors[1], errors[3]), errors[4:6]]
        parts = [replace(part.to(errors[0].device), sum_B=pair[0], error_BU=pair[1]) for part, pair in zip(drawn.counts(), pairs, strict=False)]
        value, logit = (parts[2], errors[6]) if len(errors) > 4 else (None, None)
        return Losses([self.modes[i].name for i in drawn.modes], parts[0], parts[1], self.config.training.reduction, (drawn.among,) * len(drawn.modes), value, logit)

    def _video_weight(self, sigma_BF: Tensor) -> Tensor:
        """The level's weight; a head that puts out the data is judged on the data: its velocity's error is 1 / sigma times larger."""
        weight = level_weights(self.config.noise.video, sigma_BF)
        return weight if self.config.model.video_head == "velocity" else weight * sigma_BF.clamp_min(SMALLEST_SIGMA).square()

    def _mask(self, laid: Laid, drawn: Drawn) -> TrainingMask:
        """Each sample's mode, without what is hidden in it."""
        kinds_L, device, valuations = laid.layout.kinds_L, self.model.device, drawn.valuations or [0] * len(drawn.modes)
        hidden = torch.stack([torch.isin(kinds_L, torch.tensor([int(k) for k in kinds])) for kinds in drawn.hidden])
        if self.flex:
            return block_mask([self.forms[i][v].table for i, v in zip(drawn.modes, valuations, strict=True)], laid.layout, self.reach, hidden, device)
        rows = torch.tensor([laid.row(i, v) for i, v in zip(drawn.modes, valuations, strict=True)], device=device)
        if laid.parts is not None:
            parts = laid.parts.select(rows)
            return parts.hide(hidden.to(device)) if bool(hidden.any()) else parts
        itself = torch.eye(len(kinds_L), dtype=torch.bool, device=device)
        return (laid.dense_MLL[rows] & (~hidden.to(device).unsqueeze(1) | itself)).unsqueeze(1)

    def _window(self, batch: dict[str, Any], drawn: Drawn) -> tuple[Window, Tensor, Tensor]:
        device, m, levels = self.model.device, self.config.model, drawn.levels
        latents = self.latents_of(batch)
        action, executed = (self.actions_of(batch, key) for key in ("action", "executed"))
        state, embodiment = pad_states(m, batch["state"].to(device)), self.embodiments(batch).to(device)
        future = latents[:, :, 1:] if self.config.timeline.first_frame == "before" and levels.first_B1 is None else latents
        sigma_F = levels.video_BF if levels.first_B1 is None else torch.cat([levels.first_B1, levels.video_BF], dim=1)
        clean_F, video_F, action_T = (x.to(device) for x in (levels.clean_BF, sigma_F, levels.action_BT))
        noise = drawn.draws.normals([x.shape[1:] for x in (latents, future, action)], device)
        keep = self.model.action_channels(embodiment)
        noisy_action = torch.where(action_T[:, :, None] == 0, executed, add_noise(action, noise[2], action_T[:, :, None]))  # without noise it is given: what was done, not what should have been
        window = Window(
            clean_BCFHW=add_noise(latents, noise[0], clean_F[:, None, :, None, None]),
            noisy_BCFHW=add_noise(future, noise[1], video_F[:, None, :, None, None]),
            executed_BTA=executed,
            noisy_action_BTA=noisy_action if keep is None else noisy_action * keep,
            clean_t_BF=TIMESTEPS * clean_F,
            video_t_BF=TIMESTEPS * video_F,
            action_t_BT=TIMESTEPS * action_T,
            embodiment_B=embodiment,
            state_BNS=state,
            goal_BC1HW=self.codec.encode(_frames(batch)[:, -1:].to(device)) if m.goal_image else None,
        )
        return window, velocity_target(future, noise[1]), velocity_target(action, noise[2])

    def latents_of(self, batch: dict[str, Any]) -> Tensor:
        """A batch's latents (B, C, F, h, w) on the device: its own, where it brings them, or its frames', encoded in the codec's own precision."""
        device = self.model.device
        if batch.get("latents") is not None:
            return batch["latents"].to(device).float()
        with torch.autocast(device.type, enabled=False):
            return self.codec.encode(_frames(batch).to(device))

    def embodiments(self, batch: dict[str, Any]) -> Tensor:
        """(B,) which embodiment's weights each sample uses; of one without actions that the model does not know, the first's, which it never asks.

        Raises:
            ValueError: actions of a robot that the model does not have.
        """
        size = len(batch["instruction"])
        names = batch.get("embodiment") or [self.config.data.embodiment] * size
        known = {e.name: i for i, e in enumerate(self.config.model.embodiments)}
        return torch.tensor([known[n] if n in known else self.model.embodiment_index(n) if has_own else 0 for n, has_own in zip(names, has(batch, "has_action").tolist(), strict=True)])

    def actions_of(self, batch: dict[str, Any], key: str) -> Tensor:
        """A batch's actions (B, N A, .) on the device, each robot's on its channels; zeros in place of those that would lead to a first frame inside block 0, as in a session."""
        lead, given, rows = self.config.timeline.lead, batch[key].to(self.model.device), self.embodiments(batch)
        mine = has(batch, "has_action")
        actions = given.new_zeros(*given.shape[:2], self.config.model.actions)
        for index, robot in enumerate(self.config.model.embodiments):
            own = ((rows == index) & mine).to(given.device)
            if bool(own.all()):
                actions = pad_actions(self.config.model, robot, given[..., : robot.action_dim])
                break
            if bool(own.any()):
                actions[own] = pad_actions(self.config.model, robot, given[own][..., : robot.action_dim])
        return torch.cat([torch.zeros_like(actions[:, :lead]), actions[:, lead:]], dim=1)

    def conditions_of(self, batch: dict[str, Any], state_BNS: Tensor, embodiment_B: Tensor, dropped: list[bool] | None = None) -> Conditions:
        """Instructions, some of them `dropped`, and where the model takes them the window's first state, its first frame and that frame's image embeddings."""
        m, device = self.config.model, self.model.device
        robots = batch.get("embodiment") or [self.config.data.embodiment] * len(batch["instruction"])
        texts = [prompt(text, self.config.template(robot)) for text, robot in zip(batch["instruction"], robots, strict=True)]
        conditions = self.model.encode_text(["" if gone else text for text, gone in zip(texts, dropped or [False] * len(texts), strict=True)])
        if m.state == "context":
            conditions = self.model.with_state(conditions, state_BNS[:, 0], embodiment_B, has(batch, "has_action").to(device))
        real = has(batch, "has_video").to(device).float()
        if self.image is not None:
            conditions = self.model.with_image(conditions, self.image(_frames(batch)[:, 0].to(device)).to(device) * real[:, None, None])
        if m.first_frame == "concat":
            first = first_frame_condition(self.codec, _frames(batch)[:, :1].to(device), self.config.timeline.latents)
            conditions = conditions.with_first_frame(first * real[:, None, None, None, None])
        return conditions

    def _video_seen(self, batch: dict[str, Any], levels: LevelDraw) -> Tensor:
        """(B, frames of the noisy video): latent frames that are neither padding nor given."""
        real = ~latent_padding(batch["frames_is_pad"], self.config)
        if levels.first_B1 is not None:
            return real & torch.cat([levels.first_B1 > 0, levels.video_seeks], dim=1)
        return (real[:, 1:] if self.config.timeline.first_frame == "before" else real) & levels.video_seeks


def latent_padding(frames_is_pad: Tensor, config: Config) -> Tensor:
    """(B, 1 + 4 (F - 1)) of pixel frames to (B, F) of latent frames, by the config's rule."""
    groups = frames_is_pad[:, 1:].unflatten(1, (-1, config.timeline.temporal_stride))
    later = groups.any(dim=2) if config.training.frame_padding == "any" else groups.all(dim=2)
    return torch.cat([frames_is_pad[:, :1], later], dim=1)


def needed(layout: Layout, modes: list[Mode], reach: Reach) -> Layout:
    """The layout without the segments that nothing supervised sees, over any number of layers, in any of the modes."""
    n, kinds, blocks = len(layout.segments), torch.tensor([int(s.kind) for s in layout.segments]), torch.tensor([s.block for s in layout.segments])
    keep = torch.zeros(n, dtype=torch.bool)
    for mode in modes:
        sees = mode.table.mask(kinds, blocks, kinds, blocks, reach)
        seen = torch.isin(kinds, torch.tensor([int(k) for k in mode.predicts]))
        while True:
            more = seen | (sees & seen[:, None]).any(0)
            if torch.equal(more, seen):
                break
            seen = more
        keep |= seen
    keep |= torch.isin(kinds, torch.tensor([int(Kind.V), int(Kind.A)]))
    assert any(s.kind in VIDEO_KINDS for s in layout.segments)
    return Layout(tuple(s for s, kept in zip(layout.segments, keep.tolist(), strict=True) if kept))


class Supervised(nn.Module):
    """The objective as one module, model included, so that whatever wraps a module to share its work between processes sees all of it.

    What it returns are `Errors`; what they are divided by is known already (`Drawn.counts`).
    """

    def __init__(self, objective: Objective, autocast: torch.autocast):
        super().__init__()
        self.model, self.objective, self.autocast = objective.model, objective, autocast

    def forward(self, batch: dict[str, Any], drawn: Drawn) -> Errors:
        """Errors of a batch."""
        with self.autocast:
            return self.objective.errors(batch, drawn)


def take_rows(batch: dict[str, Any], rows: slice) -> dict[str, Any]:
    """Some of a batch's samples."""
    return {key: value[rows] if isinstance(value, (Tensor, list)) else value for key, value in batch.items()}


def has(batch: dict[str, Any], key: str) -> Tensor:
    """(B,) bool on the CPU: which samples have video (`has_video`) or states and actions (`has_action`); all, where the batch does not say."""
    given = batch.get(key)
    return torch.ones(len(batch["instruction"]), dtype=torch.bool) if given is None else given.cpu()


def _frames(batch: dict[str, Any]) -> Tensor:
    if batch.get("frames") is None:
        raise ValueError("the batch has latents and no frames, but this config looks at pixels (image encoder, model.first_frame concat, or a goal image); make the cache with frames kept, or train without it")
    return batch["frames"]


def _predicts(modes: Iterable[Mode], kind: Kind) -> Tensor:
    return torch.tensor([[kind in m.predicts] for m in modes])
