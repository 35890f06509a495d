"""The world action model: video, states and actions as one stream through a pretrained video transformer.

Three paths, and no flags inside any of them:

    forward_train   a whole window, clean and noisy copy side by side, under a mask      -> velocities of V and A
    prefill         clean segments (H, S, Vc, Ac) written into the cache
    denoise         noisy segments (V, A) of one block against the cache; no mask        -> velocities of V and A

The module holds weights only.  Letters in shapes: B batch, N blocks, F latent frames, P patches a frame, A actions a block,
L tokens, D width, H heads, C latent channels, K distinct noise levels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from wam.config import Config
from wam.flow import velocity_from_sample
from wam.model.actions import ActionDecoder, ActionEncoder, StateEncoder
from wam.model.attention import attention
from wam.model.backbone import Attend, Backbone, Context, Levels, Modulation, initialise
from wam.model.cache import KVCache, Prefix, segments_of
from wam.model.rotary import Rotary
from wam.relations import RelationTable
from wam.text.bytes import ByteText
from wam.timeline import Clock, Kind, Layout, training_layout


@dataclass(frozen=True)
class Window:
    """A training window on the device, normalised.

    Attributes:
        clean_BCFHW: latents of the whole window, (B, C, 1 + kN, h, w): H and Vc, as the context sees them.
        noisy_BCFHW: noised latents of blocks 0..N-1, (B, C, kN, h, w).
        state_BNS, executed_BTA, noisy_action_BTA: states (B, N, .), actions (B, N A, .).
        clean_sigma_BF: level of each clean frame (B, 1 + kN); zero but for conditioning noise.
        video_sigma_BF: level of each noisy frame (B, kN).
        action_sigma_BT: level of each noisy action (B, N A).
    """

    clean_BCFHW: Tensor
    noisy_BCFHW: Tensor
    state_BNS: Tensor
    executed_BTA: Tensor
    noisy_action_BTA: Tensor
    clean_sigma_BF: Tensor
    video_sigma_BF: Tensor
    action_sigma_BT: Tensor
    embodiment_B: Tensor


@dataclass(frozen=True)
class Noisy:
    """The noisy tokens of one block per row; either part may be absent.

    Attributes:
        video_BCFHW: (B, C, k, h, w), all at `video_sigma`.
        action_BTA: (B, A, action_dim), each at its own level of `action_sigma_BT`.
    """

    video_BCFHW: Tensor | None = None
    video_sigma: Tensor | None = None
    action_BTA: Tensor | None = None
    action_sigma_BT: Tensor | None = None


@dataclass(frozen=True)
class View:
    """What the noisy tokens of a plan see, worked out once and used at every solver step.

    Attributes:
        layout: the noisy tokens.
        groups: queries that see the same keys: (queries, keys among the noisy tokens, prefix).
    """

    layout: Layout
    rotary: Rotary
    groups: tuple[tuple[slice, slice, Prefix], ...]


class WorldActionModel(nn.Module):
    """A Wan transformer with action and state tokens; see the module's docstring for its three paths."""

    def __init__(self, config: Config, backbone: Backbone | None = None):
        super().__init__()
        self.config = config
        m = config.model
        if backbone is None:
            backbone = Backbone(
                patch_size=m.patch,
                num_attention_heads=m.heads,
                attention_head_dim=m.head_dim,
                in_channels=config.codec.channels,
                out_channels=config.codec.channels,
                text_dim=config.text.width,
                freq_dim=m.freq_dim,
                ffn_dim=m.ffn_dim,
                num_layers=m.layers,
            )
            initialise(backbone, config.training.seed)
        self.backbone = backbone
        self.text = ByteText(config.text)
        self.action_encoder = ActionEncoder(m.embodiments, backbone.width)
        self.state_encoder = StateEncoder(m.embodiments, backbone.width)
        self.action_decoder = ActionDecoder(m.embodiments, backbone.width)
        height, width = (size // config.codec.patch for size in config.codec.image_size)
        self.latent_size = (height, width)
        self.clock = Clock(config.timeline, (height // m.patch[1], width // m.patch[2]))

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.action_decoder.table.device

    def embodiment_index(self, name: str) -> int:
        """Index of an embodiment's weights.

        Raises:
            ValueError: naming the embodiments this model has.
        """
        names = [e.name for e in self.config.model.embodiments]
        if name not in names:
            raise ValueError(f"this model has no embodiment {name!r}; it was trained for {', '.join(names)}")
        return names.index(name)

    def encode_text(self, instructions: list[str]) -> Context:
        """Instructions of B samples; each distinct one is embedded once."""
        distinct = list(dict.fromkeys(instructions))
        rows = torch.tensor([distinct.index(text) for text in instructions], device=self.device)
        return self.backbone.embed_text(self.text(distinct), rows)

    # ------------------------------------------------------------------------------------------ training

    def forward_train(self, window: Window, context: Context, mask_B1LL: Tensor) -> tuple[Tensor, Tensor]:
        """Velocities of the noisy video (B, C, kN, h, w) and actions (B, N A, action_dim) of a whole window."""
        layout = training_layout(self.clock, window.state_BNS.shape[1])
        levels = _training_levels(window, layout, self.clock.patches)
        modulation = self.backbone.embed_levels(levels)
        x_BLD = torch.cat(
            [
                self.backbone.embed_video(window.clean_BCFHW),
                self.backbone.embed_video(window.noisy_BCFHW),
                self.state_encoder(window.state_BNS, window.embodiment_B),
                self.action_encoder(window.executed_BTA, torch.zeros_like(window.action_sigma_BT), window.embodiment_B),
                self.action_encoder(window.noisy_action_BTA, window.action_sigma_BT, window.embodiment_B),
            ],
            dim=1,
        )
        rotary = Rotary.at(layout.positions_L3, self.backbone.config.attention_head_dim, x_BLD.device)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attention(rotary.rotate(q), rotary.rotate(k), v, mask_B1LL)

        x_BLD = self.backbone.run(x_BLD, modulation, context, lambda layer: attend)
        video = self._video_head(x_BLD, modulation, layout, window.noisy_BCFHW, window.video_sigma_BF)
        return video, self._action_head(x_BLD, modulation, layout.span(Kind.A), window.embodiment_B)

    forward = forward_train  # what a wrapper (DDP, DeepSpeed, FSDP) calls, so that its hooks run

    # ------------------------------------------------------------------------------------------ inference

    def new_cache(self, batch: int) -> KVCache:
        """An empty cache for `batch` sessions."""
        c = self.backbone.config
        return KVCache(self.clock, batch, c.num_layers, c.num_attention_heads, c.attention_head_dim, self.device, self.backbone.dtype)

    def embed_clean(self, kind: Kind, value: Tensor, sigma: float, embodiment_B: Tensor) -> Tensor:
        """Tokens of one clean segment: latents (B, C, F, h, w), a state (B, 1, .) or actions (B, A, .)."""
        if kind is Kind.S:
            return self.state_encoder(value, embodiment_B)
        if kind is Kind.AC:
            return self.action_encoder(value, torch.full(value.shape[:2], sigma, device=value.device), embodiment_B)
        return self.backbone.embed_video(value)

    def prefill(self, cache: KVCache, table: RelationTable, kind: Kind, value: Tensor, blocks: list[int], context: Context, embodiment_B: Tensor, sigma: float = 0.0) -> None:
        """Write one clean segment per row into the cache, at each row's own block, replacing what was there.

        Args:
            sigma: the level the segment is really at: 0, or the level at which imagined video stopped.
        """
        x_BTD = self.embed_clean(kind, value, sigma, embodiment_B)
        segments = segments_of(self.clock, (kind,), blocks)
        at = [parts[0].block for parts in segments]
        prefix = cache.read(_without(cache, kind, at, cache.visible(table, kind, at)))
        index = cache.place(segments)
        positions = torch.stack([parts[0].positions for parts in segments])
        rotary = Rotary.at(positions, self.backbone.config.attention_head_dim, x_BTD.device)
        levels = Levels(torch.full((len(x_BTD), 1), sigma, device=x_BTD.device), torch.zeros(x_BTD.shape[1], dtype=torch.int64, device=x_BTD.device))

        def attends(layer: int) -> Attend:
            def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                cache.write(layer, index, k, v)
                return _attend_prefix(rotary.rotate(q), rotary.rotate(k), v, prefix, layer)

            return attend

        self.backbone.run(x_BTD, self.backbone.embed_levels(levels), context, attends)

    def view(self, cache: KVCache, table: RelationTable, kinds: tuple[Kind, ...], blocks: list[int]) -> View:
        """Work out, once per plan, what the noisy tokens of `kinds` (V before A) see in the cache and among themselves."""
        per_row = segments_of(self.clock, kinds, blocks)
        layout = Layout(tuple(per_row[0]))
        positions = torch.stack([torch.cat([s.positions for s in parts]) for parts in per_row])
        rotary = Rotary.at(positions, self.backbone.config.attention_head_dim, self.device)
        groups = []
        for kind in kinds:
            among = [other for other in kinds if table.allow(kind, 0, other, 0)]
            prefix = cache.read(cache.visible(table, kind, blocks))
            groups.append((layout.span(kind), layout.span(*among), prefix))
        return View(layout, rotary, tuple(groups))

    def denoise(self, view: View, noisy: Noisy, context: Context, embodiment_B: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Velocities of one block's noisy video (B, C, k, h, w) and actions (B, A, action_dim) against the cache."""
        tokens, sigmas, indices, offset = [], [], [], 0
        if noisy.video_BCFHW is not None:
            assert noisy.video_sigma is not None
            x = self.backbone.embed_video(noisy.video_BCFHW)
            tokens.append(x)
            sigmas.append(noisy.video_sigma.expand(len(x), 1))
            indices.append(torch.zeros(x.shape[1], dtype=torch.int64))
            offset = 1
        if noisy.action_BTA is not None:
            assert noisy.action_sigma_BT is not None
            tokens.append(self.action_encoder(noisy.action_BTA, noisy.action_sigma_BT, embodiment_B))
            sigmas.append(noisy.action_sigma_BT)
            indices.append(torch.arange(noisy.action_BTA.shape[1]) + offset)
        x_BLD = torch.cat(tokens, dim=1)
        levels = Levels(torch.cat(sigmas, dim=1), torch.cat(indices).to(x_BLD.device))
        modulation = self.backbone.embed_levels(levels)

        def attends(layer: int) -> Attend:
            def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                q, k = view.rotary.rotate(q), view.rotary.rotate(k)
                return torch.cat([_attend_prefix(q[:, queries], k[:, keys], v[:, keys], prefix, layer) for queries, keys, prefix in view.groups], dim=1)

            return attend

        x_BLD = self.backbone.run(x_BLD, modulation, context, attends)
        video = action = None
        if noisy.video_BCFHW is not None:
            assert noisy.video_sigma is not None
            video = self._video_head(x_BLD, modulation, view.layout, noisy.video_BCFHW, noisy.video_sigma.expand(len(x_BLD), 1))
        if noisy.action_BTA is not None:
            action = self._action_head(x_BLD, modulation, view.layout.span(Kind.A), embodiment_B)
        return video, action

    def _video_head(self, x_BLD: Tensor, modulation: Modulation, layout: Layout, noisy_BCFHW: Tensor, sigma_BF: Tensor) -> Tensor:
        """Velocity of the noisy video, whichever way the head puts it."""
        out = self.backbone.video_head(x_BLD, modulation, layout.span(Kind.V), self.clock.grid)
        if self.config.model.video_head == "velocity":
            return out
        return velocity_from_sample(noisy_BCFHW, out.float(), sigma_BF[:, None, :, None, None])

    def _action_head(self, x_BLD: Tensor, modulation: Modulation, tokens: slice, embodiment_B: Tensor) -> Tensor:
        shift, scale = modulation.head(self.action_decoder.table, tokens)
        return self.action_decoder(x_BLD[:, tokens], shift, scale, embodiment_B)


def _attend_prefix(q: Tensor, k: Tensor, v: Tensor, prefix: Prefix, layer: int) -> Tensor:
    """Queries over what they see of the cache and then of their own block."""
    keys = torch.cat([prefix.keys[layer].type_as(k), k], dim=1)
    values = torch.cat([prefix.values[layer].type_as(v), v], dim=1)
    mask = None
    if prefix.mask_B11S is not None:
        own = prefix.mask_B11S.new_ones(len(q), 1, 1, k.shape[1])
        mask = torch.cat([prefix.mask_B11S, own], dim=-1)
    return attention(q, keys, values, mask)


def _without(cache: KVCache, kind: Kind, blocks: list[int], visible_BS: Tensor) -> Tensor:
    """A segment that is written again must not see its own earlier version."""
    stale = (cache.kinds_BS == int(kind)) & (cache.blocks_BS == torch.tensor(blocks).unsqueeze(1))
    return visible_BS & ~stale


def _training_levels(window: Window, layout: Layout, patches: int) -> Levels:
    """Slot 0 is clean; then one level per clean frame, per noisy frame and per noisy action, in the layout's order."""
    batch = len(window.state_BNS)
    sigma = torch.cat([window.clean_sigma_BF.new_zeros(batch, 1), window.clean_sigma_BF, window.video_sigma_BF, window.action_sigma_BT], dim=1)
    clean, noisy, actions = (x.shape[1] for x in (window.clean_sigma_BF, window.video_sigma_BF, window.action_sigma_BT))
    between = len(layout) - (clean + noisy) * patches - actions
    index = torch.cat(
        [
            torch.arange(1, 1 + clean + noisy).repeat_interleave(patches),
            torch.zeros(between, dtype=torch.int64),
            torch.arange(actions) + 1 + clean + noisy,
        ]
    )
    return Levels(sigma, index.to(sigma.device))

