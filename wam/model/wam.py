"""The world action model: video, states and actions as one stream through a pretrained video transformer.

Three paths, and no flags inside any of them:

    forward_train   a whole window, clean and noisy copy side by side, under a mask      -> velocities of V and A
    prefill         one clean segment (G, H, S, Vc, Ac) or register written into the cache
    denoise         noisy segments (V, A) of one block against the cache; no mask        -> velocities of V and A

    appraise        where there is a value head: a clean segment (Ac, Vc) of one block and its R against the cache  -> values

    video kinds   -- patches --> backbone.blocks ---------------.--> video head
                                                  one attention |
    action kinds  -- encoders -> backbone.blocks, or expert ----'--> action decoder

The module holds weights only.  Noise levels are timesteps t = 1000 sigma.  Letters in shapes: B batch, N blocks, F latent frames,
P patches a frame, A actions a block, L tokens, D width, E the action tokens' width, H heads, C latent channels, K noise levels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wam.config import Config
from wam.flow import TIMESTEPS, velocity_from_sample
from wam.model.actions import ActionDecoder, ActionEncoder, StateEncoder, channel_masks
from wam.model.attention import Mask, attention
from wam.model.backbone import Attend, Backbone, Context, ExactTimesteps, Levels, Modulation, Uncompiled, initialise
from wam.model.cache import KVCache
from wam.model.conditions import Conditions
from wam.model.expert import Expert, TimeEmbedder, run_both
from wam.model.loading import backbone_arguments, model_from_backbone
from wam.model.rotary import Rotary
from wam.model.value import ValueHead
from wam.model.view import View, attend_after, make_view
from wam.model.window_mask import WindowMask
from wam.relations import Relations, RelationTable
from wam.text.bytes import ByteText
from wam.text.text import Text
from wam.timeline import FIRST_BLOCK, VIDEO_KINDS, Clock, Kind, Layout, Parts, training_layout

TrainingMask = WindowMask | Mask


@dataclass(frozen=True)
class Window:
    """A training window on the device, normalised.

    Attributes:
        clean_BCFHW: latents of the whole window, (B, C, F, h, w): H and Vc, as the context sees them.
        noisy_BCFHW: noised latents of blocks 0..N-1, (B, C, kN, h, w); preceded by the noised first frame where that is predicted.
        executed_BTA, noisy_action_BTA: actions (B, N A, .).
        clean_t_BF: timestep of each clean frame (B, F); zero but for conditioning noise.
        video_t_BF: timestep of each noisy frame, as `noisy_BCFHW`.
        action_t_BT: timestep of each noisy action (B, N A).
        state_BNS: states (B, N states_per_block, .), where states are tokens.
        goal_BC1HW: a goal image's latent, where the model takes one.
    """

    clean_BCFHW: Tensor
    noisy_BCFHW: Tensor
    executed_BTA: Tensor
    noisy_action_BTA: Tensor
    clean_t_BF: Tensor
    video_t_BF: Tensor
    action_t_BT: Tensor
    embodiment_B: Tensor
    state_BNS: Tensor | None = None
    goal_BC1HW: Tensor | None = None


@dataclass(frozen=True)
class Noisy:
    """The noisy tokens of one block per row; either part may be absent.

    Attributes:
        video_BCFHW: (B, C, k, h, w).
        video_t_BF: timesteps (B, k), or (B, 1) for all frames.
        action_BTA: (B, A, .).
        action_t_BT: timesteps (B, A), or (B, 1) for all actions.
        state_BnS: the block's states (B, states_per_block, .), where they are not cached because they take the actions' level.
        ahead: the levels, embedded ahead; default: they are embedded now.
    """

    video_BCFHW: Tensor | None = None
    video_t_BF: Tensor | None = None
    action_BTA: Tensor | None = None
    action_t_BT: Tensor | None = None
    state_BnS: Tensor | None = None
    ahead: Ahead | None = None


@dataclass(frozen=True)
class Ahead:
    """Noise levels of one solver step, embedded with those of all the others (`WorldActionModel.embed_ahead`)."""

    video: Modulation | None = None
    action: Modulation | None = None


@dataclass(frozen=True)
class Stream:
    """Embedded tokens with their levels and what they cross-attend to."""

    x_BLD: Tensor
    modulation: Modulation
    context: Context


@dataclass(frozen=True)
class Hidden:
    """Tokens after the last block, video and action kinds apart; either may be absent."""

    video_BLD: Tensor | None = None
    video_modulation: Modulation | None = None
    action_BLE: Tensor | None = None
    action_modulation: Modulation | None = None


class WorldActionModel(nn.Module):
    """A Wan transformer with action and state tokens; see the module's docstring for its three paths."""

    def __init__(self, config: Config, backbone: Backbone | None = None, text: Text | None = None):
        """Build a model.

        Args:
            backbone: a loaded one; default: a new one, initialised from the config's seed.
            text: a pretrained text encoder, which stays outside of the weights; the embedded one (`text.kind: bytes`) is built here.
        """
        super().__init__()
        self.config = config
        m = config.model
        if backbone is None:
            backbone = Backbone(**backbone_arguments(config))
            if not backbone.proj_out.weight.is_meta:
                initialise(backbone, config.training.seed)
        self.backbone = backbone
        if m.gradient_checkpointing:
            self.backbone.enable_gradient_checkpointing()
        self.text = ByteText(config.text) if config.text.kind == "bytes" else text
        self.expert = Expert(m.expert_width, m.expert_ffn_dim or 4 * m.expert_width, backbone) if m.expert_width else None
        self.action_time = TimeEmbedder(backbone.width, m.freq_dim) if m.action_time == "own" and not m.expert_width else None
        if m.angles == "float64":
            for embedder in (self.backbone.condition_embedder, self.expert and self.expert.condition_embedder, self.action_time):
                if embedder is not None:
                    embedder.timesteps_proj = ExactTimesteps(m.freq_dim)
        self.action_encoder = ActionEncoder(m)
        self.state_encoder = StateEncoder(m, config.text.width) if m.state != "none" else None
        self.action_decoder = ActionDecoder(m)
        if m.goal_image:
            self.goal_embedding = nn.Parameter(torch.zeros(backbone.width))
        height, width = (size // config.codec.patch for size in config.codec.image_size)
        self.latent_size = (height, width)
        self.clock = Clock(config.timeline, (height // m.patch[1], width // m.patch[2]), m.positions, config.codec.views)
        if config.codec.views > 1:
            self.view_table = nn.Parameter(torch.zeros(config.codec.views, backbone.width))
        self.relations = Relations.of(config)
        self.value_head = ValueHead(m.token_width) if m.value != "none" else None

    @classmethod
    def from_pretrained_backbone(cls, path_or_repo: str | Path, config: Config, text: Text | None = None, dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> WorldActionModel:
        """A model on a pretrained Wan transformer in diffusers' layout, from a folder or the Hub; see `wam.model.loading.model_from_backbone`."""
        return model_from_backbone(lambda c, backbone: cls(c, backbone, text), path_or_repo, config, dtype, device)

    # ------------------------------------------------------------------------------------------ facts

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.action_decoder.out.weight.device

    @property
    def live_state(self) -> bool:
        """Whether states take the actions' noise level, so that they go through the network at every step and are never cached."""
        return self.config.model.state == "token" and self.config.model.state_level == "action"

    @property
    def cached_kinds(self) -> frozenset[Kind]:
        """Kinds that a session's memory holds."""
        m, kinds = self.config.model, {Kind.VC, Kind.AC}
        kinds |= {Kind.H} if self.config.timeline.first_frame == "before" else set()
        kinds |= {Kind.S} if m.state == "token" and not self.live_state else set()
        return frozenset(kinds | ({Kind.G} if m.goal_image else set()))

    def embodiment_index(self, name: str) -> int:
        """Index of an embodiment's weights.

        Raises:
            ValueError: naming the embodiments this model has.
        """
        names = [e.name for e in self.config.model.embodiments]
        if name not in names:
            raise ValueError(f"this model has no embodiment {name!r}; it was trained for {', '.join(names)}")
        return names.index(name)

    def robot_channels(self, embodiment_B: Tensor) -> Tensor:
        """(B, 1, .): 1 for the action channels that a row's robot has, 0 for the others."""
        return channel_masks(self.config.model).to(self.device)[embodiment_B].unsqueeze(1)

    def action_channels(self, embodiment_B: Tensor) -> Tensor | None:
        """`robot_channels`, where the others are held at zero while actions are denoised; None where every channel is free."""
        if self.config.model.action_padding == "noise" or bool(channel_masks(self.config.model).all()):
            return None
        return self.robot_channels(embodiment_B)

    # ------------------------------------------------------------------------------------------ conditions

    def encode_text(self, instructions: list[str]) -> Conditions:
        """Embed the distinct instructions of a batch, and remember which row has which.

        Raises:
            ValueError: there is no text encoder.
        """
        if self.text is None:
            raise ValueError("this model was built without its text encoder (text.kind 'umt5'), so it cannot read instructions; load the checkpoint with it, or give embeddings to embed_text")
        distinct = list(dict.fromkeys(instructions))
        rows = torch.tensor([distinct.index(text) for text in instructions], device=self.device)
        return self.embed_text(self.text(distinct), rows)

    def embed_text(self, text_UTE: Tensor, rows_B: Tensor) -> Conditions:
        """Conditions from the text encoder's states of U distinct instructions, (U, T, text width)."""
        text_UTE = text_UTE.to(self.backbone.dtype)
        action = self.expert.embed_text(text_UTE, rows_B) if self.expert is not None else None
        return Conditions(text_UTE, rows_B, self.backbone.embed_text(text_UTE, rows_B), action)

    def with_state(self, conditions: Conditions, state_BS: Tensor, embodiment_B: Tensor, known_B: Tensor | None = None) -> Conditions:
        """The conditions with each row's state as the last token of its text (`model.state: context`); zero, as what lies beyond a text, where it is not `known_B`."""
        assert self.state_encoder is not None
        token_B1E = self.state_encoder(state_BS.unsqueeze(1), embodiment_B).type_as(conditions.text_UTE)
        if known_B is not None:
            token_B1E = token_B1E * known_B[:, None, None].type_as(token_B1E)
        rows = torch.arange(len(token_B1E), device=token_B1E.device)
        state = self.embed_text(token_B1E, rows)
        if conditions.video.text_keys_values is not None:  # of the instruction they are there already
            state = self.prepare(state)
        action = None if conditions.action is None or state.action is None else conditions.action.followed_by(state.action)
        text = torch.cat([conditions.text_UTE[conditions.rows_B], token_B1E], dim=1)
        return replace(conditions, text_UTE=text, rows_B=rows, video=conditions.video.followed_by(state.video), action=action)

    def with_image(self, conditions: Conditions, image_BMI: Tensor) -> Conditions:
        """The conditions with each row's image embeddings (B, M, image_dim)."""
        return replace(conditions, video=self.backbone.embed_image(conditions.video, image_BMI.to(self.backbone.dtype)))

    def prepare(self, conditions: Conditions) -> Conditions:
        """Compute every layer's cross-attention keys and values that are not there yet: once per instruction, once per image."""
        action = conditions.action
        if self.expert is not None and action is not None and action.text_keys_values is None:
            action = self.expert.prepare_context(action)
        return replace(conditions, video=self.backbone.prepare_context(conditions.video), action=action)

    # ------------------------------------------------------------------------------------------ embedding

    def embed_video(self, latents_BCFHW: Tensor, first_frame_BCFHW: Tensor | None) -> Tensor:
        """Patch tokens (B, F P, D); `first_frame_BCFHW` (B, mask and latent channels, F, h, w) is joined to the channels where the model takes it."""
        if first_frame_BCFHW is not None:
            latents_BCFHW = torch.cat([latents_BCFHW, first_frame_BCFHW.type_as(latents_BCFHW)], dim=1)
        x_BLD = self.backbone.embed_video(latents_BCFHW.to(self.backbone.dtype))
        if self.clock.views == 1:
            return x_BLD
        x = x_BLD.unflatten(1, (-1, self.clock.views, self.clock.grid[1] // self.clock.views))  # frames and rows, views, columns of a view
        return (x + self.view_table[:, None].type_as(x)).flatten(1, 3)

    def _video_levels(self, timestep_BK: Tensor, runs: tuple[int, ...]) -> Modulation:
        return self.backbone.embed_levels(Levels(timestep_BK.float(), runs))

    def _action_levels(self, timestep_BK: Tensor, runs: tuple[int, ...]) -> Modulation:
        levels = Levels(timestep_BK.float(), runs)
        if self.expert is not None:
            return self.expert.condition_embedder(levels)
        return self.action_time(levels) if self.action_time is not None else self.backbone.embed_levels(levels)

    def _encode_actions(self, action_BTA: Tensor, timestep_BT: Tensor, embodiment_B: Tensor) -> Tensor:
        return self.action_encoder(action_BTA.to(self.backbone.dtype), timestep_BT, embodiment_B)

    def _encode_states(self, state_BnS: Tensor, embodiment_B: Tensor) -> Tensor:
        assert self.state_encoder is not None
        return self.state_encoder(state_BnS.to(self.backbone.dtype), embodiment_B)

    # ------------------------------------------------------------------------------------------ running the blocks

    def run(self, video: Stream | None, action: Stream | None, attends: Callable[[int], Attend]) -> Hidden:
        """Tokens of both kinds through their blocks; `attends` sees video tokens first, then action tokens."""
        if self.expert is not None and video is not None and action is not None:
            sides = [(s.x_BLD, s.modulation, s.context) for s in (video, action)]
            x_v, x_a = run_both(self.backbone, self.expert, sides[0], sides[1], attends)
            return Hidden(x_v, video.modulation, x_a, action.modulation)
        if self.expert is not None and action is not None:
            return Hidden(None, None, self.expert.run(action.x_BLD, action.modulation, action.context, attends), action.modulation)
        streams_here = [s for s in (video, action) if s is not None]
        modulation = Modulation.cat([s.modulation for s in streams_here])
        x = torch.cat([s.x_BLD for s in streams_here], dim=1) if len(streams_here) == 2 else streams_here[0].x_BLD
        x = self.backbone.run(x, modulation, streams_here[0].context, attends)
        split = video.x_BLD.shape[1] if video is not None else 0
        return Hidden(
            x[:, :split] if video is not None else None,
            video.modulation if video is not None else None,
            x[:, split:] if action is not None else None,
            action.modulation if action is not None else None,
        )

    def _stream(self, x_BLD: Tensor, modulation: Modulation, conditions: Conditions, video: bool) -> Stream:
        context = conditions.video if video or self.expert is None else conditions.action
        assert context is not None
        return Stream(x_BLD, modulation, context)

    # ------------------------------------------------------------------------------------------ heads

    def video_velocity(self, hidden: Hidden, tokens: slice, noisy_BCFHW: Tensor, timestep_BF: Tensor) -> Tensor:
        """Velocity of whole frames among the video tokens, (B, C, F, h, w), whichever way the head puts it."""
        assert hidden.video_BLD is not None and hidden.video_modulation is not None
        out = self.backbone.video_head(hidden.video_BLD[:, tokens], hidden.video_modulation.narrow(tokens), self.clock.grid)
        if self.config.model.video_head == "velocity":
            return out
        return velocity_from_sample(noisy_BCFHW, out.float(), timestep_BF[:, None, :, None, None] / TIMESTEPS)

    def action_velocity(self, hidden: Hidden, tokens: slice, embodiment_B: Tensor) -> Tensor:
        """Velocity of a run of the action tokens, (B, n, .)."""
        assert hidden.action_BLE is not None and hidden.action_modulation is not None
        x, modulation = hidden.action_BLE[:, tokens], hidden.action_modulation.narrow(tokens)
        if self.config.model.action_head == "modulated_linear":
            x = self.backbone.norm_head(x, modulation)
        return self.action_decoder(x, modulation, embodiment_B)

    # ------------------------------------------------------------------------------------------ training

    def training_layout(self, blocks: int) -> Layout:
        """Every token of a training window of `blocks` blocks."""
        m = self.config.model
        return training_layout(self.clock, blocks, Parts(m.goal_image, self.config.training.predict_first_frame, m.state == "token", m.value != "none"))

    def forward_train(self, window: Window, conditions: Conditions, mask: TrainingMask, layout: Layout | None = None) -> tuple[Tensor, Tensor]:
        """Velocities of the noisy video and actions of a whole window.

        Args:
            mask: what attends to what among the layout's tokens: in parts (`WindowMask`), bool (B or 1, 1, L, L), a flex `BlockMask`, or None for everything.
            layout: default: `training_layout` of the window's blocks; a smaller one leaves out tokens that nothing supervised sees.

        Returns:
            Video (B, C, frames of `noisy_BCFHW`, h, w) and actions (B, N A, .).
        """
        layout = layout or self._whole_layout(window)
        return self._velocities(self.hidden_train(window, conditions, mask, layout), window, layout)

    def forward(self, window: Window, conditions: Conditions, mask: TrainingMask, layout: Layout | None = None) -> tuple[Tensor, ...]:
        """`forward_train`, and after its two the logits of values (B, N) where the model has a value head; what a wrapper (DDP, DeepSpeed, FSDP) calls, so that its hooks run."""
        layout = layout or self._whole_layout(window)
        hidden = self.hidden_train(window, conditions, mask, layout)
        return (*self._velocities(hidden, window, layout), *self._values(hidden, layout))

    def _whole_layout(self, window: Window) -> Layout:
        return self.training_layout(window.noisy_action_BTA.shape[1] // self.config.timeline.actions_per_block)

    def _values(self, hidden: Hidden, layout: Layout) -> tuple[Tensor, ...]:
        if self.value_head is None:
            return ()
        assert hidden.action_BLE is not None
        values = layout.span(Kind.R)
        return (self.value_head(hidden.action_BLE[:, values.start - layout.video_tokens : values.stop - layout.video_tokens]),)

    def _velocities(self, hidden: Hidden, window: Window, layout: Layout) -> tuple[Tensor, Tensor]:
        video = self.video_velocity(hidden, layout.span(Kind.V), window.noisy_BCFHW, window.video_t_BF)
        actions = layout.span(Kind.A)
        first = layout.video_tokens
        return video, self.action_velocity(hidden, slice(actions.start - first, actions.stop - first), window.embodiment_B)

    def hidden_train(self, window: Window, conditions: Conditions, mask: TrainingMask, layout: Layout) -> Hidden:
        """Every token of a training window after the last block; heads may read any of them."""
        video = self._stream(*self._embed_window_video(window, conditions, layout), conditions, video=True)
        action = self._stream(*self._embed_window_actions(window, layout), conditions, video=False)
        rotary = Rotary.at(layout.positions_L4, self.backbone.config.attention_head_dim, self.device)
        backend = self.config.model.attention

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k = rotary.rotate(q), rotary.rotate(k)
            return mask.attend(q, k, v, backend) if isinstance(mask, WindowMask) else attention(q, k, v, mask, backend)

        return self.run(video, action, lambda layer: attend)

    def _embed_window_video(self, window: Window, conditions: Conditions, layout: Layout) -> tuple[Tensor, Modulation]:
        """Tokens and levels of the layout's video kinds: one patch embedding for all frames."""
        clean, goal = _frames(layout, self.clock, Kind.H, Kind.VC), [s for s in layout.segments if s.kind is Kind.G]
        noisy = _frames(layout, self.clock, Kind.V)
        latents, levels, firsts = [], [], []
        if goal:
            assert window.goal_BC1HW is not None
            latents.append(window.goal_BC1HW)
            levels.append(window.clean_t_BF.new_zeros(len(window.clean_t_BF), 1))
            firsts.append(given_frame(window.goal_BC1HW) if conditions.first_frame_BCFHW is not None else None)
        for chosen, x, t, at in ((clean, window.clean_BCFHW, window.clean_t_BF, clean), (noisy, window.noisy_BCFHW, window.video_t_BF, range(len(noisy)))):
            latents.append(_take(x, at))
            levels.append(t[:, list(at)] if len(at) != t.shape[1] else t)
            firsts.append(conditions.first_frame_of(chosen))
        x_BLD = self.embed_video(torch.cat(latents, dim=2), None if conditions.first_frame_BCFHW is None else torch.cat([f for f in firsts if f is not None], dim=2))
        if goal:
            P = self.clock.patches
            x_BLD = torch.cat([x_BLD[:, :P] + self.goal_embedding.type_as(x_BLD), x_BLD[:, P:]], dim=1)
        timestep_BK = torch.cat(levels, dim=1)
        return x_BLD, self._video_levels(timestep_BK, (self.clock.patches,) * timestep_BK.shape[1])

    def _embed_window_actions(self, window: Window, layout: Layout) -> tuple[Tensor, Modulation]:
        """Tokens and levels of the layout's states and actions."""
        A, embodiment = self.config.timeline.actions_per_block, window.embodiment_B
        zero_B1 = window.action_t_BT.new_zeros(len(window.action_t_BT), 1)
        tokens, levels, runs = [], [], []
        states, executed = (([s.block for s in layout.segments if s.kind is kind]) for kind in (Kind.S, Kind.AC))
        if states:
            assert window.state_BNS is not None
            n = self.config.timeline.states_per_block
            state = window.state_BNS.unflatten(1, (-1, n))[:, states].flatten(1, 2)
            tokens.append(self._encode_states(state, embodiment))
            levels.append(window.action_t_BT[:, :: A // n].unflatten(1, (-1, n))[:, states].flatten(1, 2) if self.live_state else zero_B1)
            runs += [1] * state.shape[1] if self.live_state else [state.shape[1]]
        if executed:
            clean = window.executed_BTA.unflatten(1, (-1, A))[:, executed].flatten(1, 2)
            tokens.append(self._encode_actions(clean, zero_B1, embodiment))
            levels.append(zero_B1)
            runs.append(clean.shape[1])
        tokens.append(self._encode_actions(window.noisy_action_BTA, window.action_t_BT, embodiment))
        levels.append(window.action_t_BT)
        runs += [1] * window.action_t_BT.shape[1]
        valued = sum(s.kind is Kind.R for s in layout.segments)
        if valued:
            assert self.value_head is not None
            tokens.append(self.value_head.tokens(len(zero_B1), valued).type_as(tokens[-1]))
            levels.append(zero_B1)
            runs.append(valued)
        return torch.cat(tokens, dim=1), self._action_levels(torch.cat(levels, dim=1), tuple(runs))

    # ------------------------------------------------------------------------------------------ inference

    def new_cache(self, batch: int) -> KVCache:
        """An empty cache for `batch` sessions."""
        c = self.backbone.config
        return KVCache(self.clock, self.cached_kinds, batch, c.num_layers, c.num_attention_heads, c.attention_head_dim, self.device, self.backbone.dtype)

    def prefill(
        self, cache: KVCache, table: RelationTable, kind: Kind, value: Tensor, blocks: list[int], conditions: Conditions, embodiment_B: Tensor, timestep: float | Tensor = 0.0
    ) -> Hidden:
        """Write one segment per row into the cache, at each row's own block, replacing what was there.

        Args:
            value: latents (B, C, F, h, w) for G, H, Vc and registers V, a state (B, 1, .) for S, actions (B, A, .) for Ac.
            timestep: the level the segment is really at: 0, the level at which imagined video stopped, or one per frame (B, F).

        Returns:
            The segment's tokens after the last block, which heads may read.
        """
        if kind in (Kind.H, Kind.G):
            blocks = [FIRST_BLOCK] * len(blocks)
        segments = [self.clock.segment(kind, block) for block in blocks]
        stream = self._embed_segment(kind, value, blocks, conditions, embodiment_B, timestep)
        cache.forget(kind, blocks)
        prefix = cache.read(cache.without(cache.visible(table, kind, blocks), kind, blocks), own=0)
        index = cache.place(segments)
        rotary = Rotary.at(torch.stack([s.positions for s in segments]), self.backbone.config.attention_head_dim, self.device)
        among, backend = table.allow(kind, 0, kind, 0), self.config.model.attention
        assert among, f"{kind.label} must see itself to be cached"

        def attends(layer: int) -> Attend:
            before, write = prefix.of_layer(layer), cache.writer(layer, index)

            def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                write(k, v)
                return attend_after(before, rotary.rotate(q), rotary.rotate(k), v, backend)

            return Uncompiled(attend)

        return self.run(stream, None, attends) if kind in VIDEO_KINDS else self.run(None, stream, attends)

    def _embed_segment(self, kind: Kind, value: Tensor, blocks: list[int], conditions: Conditions, embodiment_B: Tensor, timestep: float | Tensor) -> Stream:
        batch, tokens = len(value), self.clock.tokens(kind)
        t_BK = timestep if isinstance(timestep, Tensor) else torch.full((batch, 1), timestep, device=value.device)
        if kind in VIDEO_KINDS:
            first = given_frame(value) if kind is Kind.G and conditions.first_frame_BCFHW is not None else conditions.first_frame_at([list(self.clock.frames(b)) for b in blocks])
            x = self.embed_video(value, first)
            if kind is Kind.G:
                x = x + self.goal_embedding.type_as(x)
            return self._stream(x, self._video_levels(t_BK, (tokens // t_BK.shape[1],) * t_BK.shape[1]), conditions, video=True)
        x = self._encode_states(value, embodiment_B) if kind is Kind.S else self._encode_actions(value, t_BK, embodiment_B)
        return self._stream(x, self._action_levels(t_BK, (tokens // t_BK.shape[1],) * t_BK.shape[1]), conditions, video=False)

    def view(self, cache: KVCache, table: RelationTable, kinds: tuple[Kind, ...], blocks: list[int]) -> View:
        """Work out, once per plan, what the noisy tokens of `kinds` (V before A) see in the cache and among themselves."""
        if self.live_state and Kind.A in kinds:
            kinds = (*(k for k in kinds if k is not Kind.A), Kind.S, Kind.A)
        for kind in kinds:
            cache.forget(kind, blocks)
        return make_view(cache, table, kinds, blocks, self.config.model.attention)

    def denoise(self, view: View, noisy: Noisy, conditions: Conditions, embodiment_B: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Velocities of one block's noisy video (B, C, k, h, w) and actions (B, A, .) against the cache."""
        hidden = self.hidden_denoise(view, noisy, conditions, embodiment_B)
        video = action = None
        if noisy.video_BCFHW is not None:
            assert noisy.video_t_BF is not None
            frames = noisy.video_BCFHW.shape[2]
            video = self.video_velocity(hidden, slice(0, view.layout.video_tokens), noisy.video_BCFHW, noisy.video_t_BF.expand(-1, frames))
        if noisy.action_BTA is not None:
            steps = noisy.action_BTA.shape[1]
            states = view.layout.span(Kind.S) if noisy.state_BnS is not None else slice(0, 0)
            count = states.stop - states.start
            action = self.action_velocity(hidden, slice(count, count + steps), embodiment_B)
        return video, action

    def hidden_denoise(self, view: View, noisy: Noisy, conditions: Conditions, embodiment_B: Tensor) -> Hidden:
        """One block's noisy tokens after the last block."""
        ahead = noisy.ahead or self.embed_ahead([noisy])[0]
        video = action = None
        if noisy.video_BCFHW is not None:
            assert ahead.video is not None
            x = self.embed_video(noisy.video_BCFHW, conditions.first_frame_at([list(self.clock.frames(b)) for b in view.blocks]))
            video = self._stream(x, ahead.video, conditions, video=True)
        if noisy.action_BTA is not None:
            assert ahead.action is not None and noisy.action_t_BT is not None
            x = self._encode_actions(noisy.action_BTA, noisy.action_t_BT, embodiment_B)
            if noisy.state_BnS is not None:
                x = torch.cat([self._encode_states(noisy.state_BnS, embodiment_B), x], dim=1)
            action = self._stream(x, ahead.action, conditions, video=False)
        return self.run(video, action, view.attends)

    def appraisal_view(self, cache: KVCache, table: RelationTable, kind: Kind, blocks: list[int]) -> View:
        """What a clean segment of `kind` (Ac or Vc) and its block's value token see in the cache and of each other."""
        return make_view(cache, table, (kind, Kind.R), blocks, self.config.model.attention)

    def appraise(self, view: View, kind: Kind, value: Tensor, conditions: Conditions, embodiment_B: Tensor, timestep: float | Tensor = 0.0) -> Tensor:
        """Logits (B,) of the value of one block, of its actions (B, A, .) or its latents (B, C, k, h, w), which are not written anywhere.

        Args:
            view: of `appraisal_view`, with the same kind.
            timestep: the level that imagined video stopped at.
        """
        assert self.value_head is not None, "no value head"
        own = self._embed_segment(kind, value, view.blocks, conditions, embodiment_B, timestep)
        token = self.value_head.tokens(len(value), 1).to(self.backbone.dtype)
        zero_B1 = torch.zeros(len(value), 1, device=value.device)
        if kind in VIDEO_KINDS:
            hidden = self.run(own, self._stream(token, self._action_levels(zero_B1, (1,)), conditions, video=False), view.attends)
        else:
            x = torch.cat([own.x_BLD, token.type_as(own.x_BLD)], dim=1)
            hidden = self.run(None, self._stream(x, self._action_levels(zero_B1, (x.shape[1],)), conditions, video=False), view.attends)
        assert hidden.action_BLE is not None
        return self.value_head(hidden.action_BLE[:, -1:]).squeeze(1)

    def embed_ahead(self, steps: Sequence[Noisy]) -> list[Ahead]:
        """Embed the noise levels of all steps of a plan at once: they are known beforehand, and one pass over the embedder's weights serves them all.

        Only timesteps are read, and which parts are there.
        """
        video = _embed_together(self._video_levels, [None if s.video_BCFHW is None else self._levels_of_video(s) for s in steps])
        action = _embed_together(self._action_levels, [None if s.action_BTA is None else self._levels_of_actions(s) for s in steps])
        return [Ahead(v, a) for v, a in zip(video, action, strict=True)]

    def _levels_of_video(self, noisy: Noisy) -> Levels:
        assert noisy.video_BCFHW is not None and noisy.video_t_BF is not None
        frames, count = noisy.video_BCFHW.shape[2], noisy.video_t_BF.shape[1]
        return Levels(noisy.video_t_BF, (frames // count * self.clock.patches,) * count)

    @staticmethod
    def _levels_of_actions(noisy: Noisy) -> Levels:
        """Of states that are live, each at the level of the action it stands before, and of the actions."""
        assert noisy.action_BTA is not None and noisy.action_t_BT is not None
        steps, t_BK = noisy.action_BTA.shape[1], noisy.action_t_BT
        count = t_BK.shape[1]
        runs: tuple[int, ...] = (steps // count,) * count
        if noisy.state_BnS is not None:
            n = noisy.state_BnS.shape[1]
            state_t = t_BK[:, :: steps // n] if count == steps else t_BK[:, :1]
            t_BK, runs = torch.cat([state_t, t_BK], dim=1), (*(n // state_t.shape[1],) * state_t.shape[1], *runs)
        return Levels(t_BK, runs)


def _embed_together(embed: Callable[[Tensor, tuple[int, ...]], Modulation], steps: list[Levels | None]) -> list[Modulation | None]:
    there = [levels for levels in steps if levels is not None]
    if not there:
        return [None] * len(steps)
    together = embed(torch.cat([levels.timestep_BK for levels in there], dim=1), tuple(run for levels in there for run in levels.runs))
    parts = iter(together.split([levels.runs for levels in there]))
    return [None if levels is None else next(parts) for levels in steps]


def given_frame(latents_BCFHW: Tensor, mask_channels: int = 4) -> Tensor:
    """First-frame condition of frames that are given: mask 1 and the latents themselves, (B, mask + C, F, h, w)."""
    batch, _, *rest = latents_BCFHW.shape
    return torch.cat([latents_BCFHW.new_ones(batch, mask_channels, *rest), latents_BCFHW], dim=1)


def _frames(layout: Layout, clock: Clock, *kinds: Kind) -> list[int]:
    """Latent frames of the layout's segments of `kinds`, in order."""
    return [frame for s in layout.segments if s.kind in kinds for frame in clock.frames(s.block)]


def _take(x_BCFHW: Tensor, frames: Any) -> Tensor:
    return x_BCFHW if len(frames) == x_BCFHW.shape[2] else x_BCFHW[:, :, list(frames)]
