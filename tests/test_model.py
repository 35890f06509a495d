"""The network: parity with diffusers, cached = uncached in every mode, independence of what a mode does not see."""

import dataclasses

import pytest
import torch
from diffusers import WanTransformer3DModel
from tiny import random_window, tiny_config, tiny_model

from wam.flow import TIMESTEPS
from wam.model.attention import attention
from wam.model.backbone import Backbone, Levels
from wam.model.rotary import Rotary
from wam.model.wam import Noisy, Window, WorldActionModel
from wam.relations import Reach, get_mode
from wam.timeline import FIRST_BLOCK, Kind, training_layout

MODES = ["skip", "joint", "joint_mutual", "imagine", "forward"]
TINY_WAN = dict(num_attention_heads=2, attention_head_dim=24, in_channels=6, out_channels=6, text_dim=16, freq_dim=32, ffn_dim=64, num_layers=3)


def _wan_like(model: Backbone, latents: torch.Tensor, sigma_BF: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """Our forward used as diffusers' own: video only, everything attends to everything."""
    _, _, frames, height, width = latents.shape
    grid = (height // 2, width // 2)
    positions = torch.cartesian_prod(*(torch.arange(n, dtype=torch.float64) for n in (frames, *grid)))
    positions = torch.nn.functional.pad(positions, (0, 1))
    rotary = Rotary.at(positions, model.config.attention_head_dim)
    patches = grid[0] * grid[1]
    modulation = model.embed_levels(Levels(sigma_BF * TIMESTEPS, (patches,) * frames))
    context = model.embed_text(text, torch.arange(len(latents)))
    x = model.run(model.embed_video(latents), modulation, context, lambda layer: lambda q, k, v: attention(rotary.rotate(q), rotary.rotate(k), v))
    return model.video_head(x, modulation, grid)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("per_token", [False, True])
def test_parity_with_diffusers(batch: int, per_token: bool) -> None:
    torch.manual_seed(0)
    theirs = WanTransformer3DModel(**TINY_WAN).eval()
    ours = Backbone(**TINY_WAN).eval()
    ours.load_state_dict(theirs.state_dict())
    latents, text = torch.randn(batch, 6, 3, 4, 6), torch.randn(batch, 7, 16)
    sigma = torch.rand(batch, 3) if per_token else torch.rand(batch, 1).expand(-1, 3)
    timestep = (sigma * TIMESTEPS).repeat_interleave(6, dim=1) if per_token else sigma[:, 0] * TIMESTEPS
    with torch.no_grad():
        expected = theirs(latents, timestep, text, return_dict=False)[0]
        found = _wan_like(ours, latents, sigma, text)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_diffusers_checkpoint_loads_and_saves_under_its_own_names(tmp_path) -> None:
    theirs = WanTransformer3DModel(**TINY_WAN)
    theirs.save_pretrained(tmp_path / "wan")
    ours = Backbone.from_pretrained(tmp_path / "wan")
    ours.save_pretrained(tmp_path / "back")
    again = WanTransformer3DModel.from_pretrained(tmp_path / "back")
    assert all(torch.equal(a, b) for a, b in zip(theirs.state_dict().values(), again.state_dict().values(), strict=True))


def _rollout(model: WorldActionModel, window: Window, mode: str, kinds: tuple[Kind, ...], drop_video: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Block by block through the cache, as a robot would go, with the window's own contents; velocities of V and A."""
    table, t = get_mode(mode).table, model.config.timeline
    k, a, batch = t.latents_per_block, t.actions_per_block, len(window.state_BNS)
    context = model.prepare(model.encode_text(["open the drawer", "close it", "open the drawer"][:batch]))
    cache = model.new_cache(batch)
    videos, actions = [], []

    def write(kind: Kind, value: torch.Tensor, block: int) -> None:
        model.prefill(cache, table, kind, value, [block] * batch, context, window.embodiment_B)

    write(Kind.H, window.clean_BCFHW[:, :, :1], FIRST_BLOCK)
    for block in range(window.state_BNS.shape[1]):
        frames, acts = slice(block * k, (block + 1) * k), slice(block * a, (block + 1) * a)
        seen = window.clean_BCFHW[:, :, 1:][:, :, frames]
        write(Kind.S, window.state_BNS[:, block : block + 1], block)
        if mode == "forward":
            write(Kind.AC, window.executed_BTA[:, acts], block)
        if mode == "imagine":
            write(Kind.VC, seen, block)
        view = model.view(cache, table, kinds, [block] * batch)
        noisy = Noisy(
            window.noisy_BCFHW[:, :, frames] if Kind.V in kinds else None,
            window.video_t_BF[:, block * k : block * k + 1] if Kind.V in kinds else None,
            window.noisy_action_BTA[:, acts] if Kind.A in kinds else None,
            window.action_t_BT[:, acts] if Kind.A in kinds else None,
        )
        video, action = model.denoise(view, noisy, context, window.embodiment_B)
        videos.append(video)
        actions.append(action)
        write(Kind.AC, window.executed_BTA[:, acts], block)
        write(Kind.VC, seen, block)
    return (torch.cat(videos, dim=2) if Kind.V in kinds else torch.empty(0)), torch.cat(actions, dim=1)


def _teacher(model: WorldActionModel, window: Window, mode: str) -> tuple[torch.Tensor, torch.Tensor]:
    batch, blocks = window.state_BNS.shape[:2]
    layout = training_layout(model.clock, blocks)
    mask = get_mode(mode).table.dense(layout, Reach.of(model.config.timeline))[None, None].expand(batch, 1, -1, -1)
    return model.forward_train(window, model.encode_text(["open the drawer", "close it", "open the drawer"][:batch]), mask)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sizes", [("timeline.history=2",), ("timeline.history=1", "timeline.latents_per_block=2", "timeline.actions_per_block=16")])
def test_cached_equals_uncached(mode: str, batch: int, sizes: tuple[str, ...]) -> None:
    """Every block, also after the first blocks have left the history (6 blocks, a history of 1 or 2)."""
    model = tiny_model(tiny_config(*sizes))
    window = random_window(model, batch, blocks=6)
    with torch.no_grad():
        expected = _teacher(model, window, mode)
        found = _rollout(model, window, mode, (Kind.V, Kind.A))
    for a, b in zip(found, expected, strict=True):
        assert float(b.abs().mean()) > 0.05
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 3])
def test_skip_actions_do_not_change_when_video_is_removed(batch: int) -> None:
    model = tiny_model(tiny_config())
    window = random_window(model, batch, blocks=3)
    with torch.no_grad():
        with_video = _rollout(model, window, "skip", (Kind.V, Kind.A))[1]
        without = _rollout(model, window, "skip", (Kind.A,))[1]
    torch.testing.assert_close(without, with_video, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_the_future_never_changes_a_prediction(mode: str) -> None:
    model = tiny_model(tiny_config())
    window = random_window(model, 1, blocks=3)
    other = random_window(model, 1, blocks=3, seed=2)
    t = model.config.timeline
    k, a = t.latents_per_block, t.actions_per_block
    changed = dataclasses.replace(
        window,
        clean_BCFHW=torch.cat([window.clean_BCFHW[:, :, : 1 + 2 * k], other.clean_BCFHW[:, :, 1 + 2 * k :]], dim=2),
        executed_BTA=torch.cat([window.executed_BTA[:, : 2 * a], other.executed_BTA[:, 2 * a :]], dim=1),
        state_BNS=torch.cat([window.state_BNS[:, :2], other.state_BNS[:, 2:]], dim=1),
    )
    with torch.no_grad():
        before, after = _teacher(model, window, mode), _teacher(model, changed, mode)
    assert torch.equal(before[0][:, :, : 2 * k], after[0][:, :, : 2 * k])
    assert torch.equal(before[1][:, : 2 * a], after[1][:, : 2 * a])
    assert not torch.equal(before[1][:, 2 * a :], after[1][:, 2 * a :])


def test_noise_at_level_one_carries_nothing_of_the_data() -> None:
    from wam.flow import add_noise

    noise, a, b = torch.randn(4), torch.randn(4), torch.randn(4)
    assert torch.equal(add_noise(a, noise, torch.tensor(1.0)), add_noise(b, noise, torch.tensor(1.0)))


def test_a_cache_row_at_another_block_gets_what_it_would_get_alone() -> None:
    """Rows of a batch may be at different blocks: the mask of each comes from its own bookkeeping."""
    from wam.model.cache import KVCache

    model = tiny_model(tiny_config())
    windows = [random_window(model, 1, blocks=4, seed=s) for s in (3, 4)]
    context = model.prepare(model.encode_text(["open the drawer"]))
    table, alone, caches, at = get_mode("skip").table, [], [], [1, 3]
    for window, block in zip(windows, at, strict=True):
        cache = model.new_cache(1)
        for kind, value, b in _history(window, block, model):
            model.prefill(cache, table, kind, value, [b], context, window.embodiment_B)
        caches.append(cache)
        view = model.view(cache, table, (Kind.A,), [block])
        alone.append(model.denoise(view, _actions_only(window), context, window.embodiment_B)[1])
    both = KVCache.concat(caches)
    noisy = Noisy(None, None, *(torch.cat(x) for x in zip(*[(n.action_BTA, n.action_t_BT) for n in map(_actions_only, windows)], strict=True)))
    context = model.prepare(model.encode_text(["open the drawer"] * 2))
    view = model.view(both, table, (Kind.A,), at)
    together = model.denoise(view, noisy, context, torch.zeros(2, dtype=torch.int64))[1]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-6)
    picked = both.select([1])
    assert torch.equal(picked.blocks_BS, caches[1].blocks_BS)


def _history(window: Window, block: int, model: WorldActionModel):
    k, a = model.config.timeline.latents_per_block, model.config.timeline.actions_per_block
    yield Kind.H, window.clean_BCFHW[:, :, :1], FIRST_BLOCK
    for b in range(block + 1):
        yield Kind.S, window.state_BNS[:, b : b + 1], b
        if b < block:
            yield Kind.AC, window.executed_BTA[:, b * a : (b + 1) * a], b
            yield Kind.VC, window.clean_BCFHW[:, :, 1 + b * k : 1 + (b + 1) * k], b


def _actions_only(window: Window) -> Noisy:
    return Noisy(None, None, window.noisy_action_BTA[:, :8], window.action_t_BT[:, :8])


@pytest.mark.parametrize("supervised", ["video", "action"])
def test_a_loss_on_one_part_gives_the_other_part_no_gradient(supervised: str) -> None:
    model = tiny_model(tiny_config()).requires_grad_(True)
    video, action = _teacher(model, random_window(model, 2, blocks=2), "skip")
    (video if supervised == "video" else action).square().mean().backward()
    untouched = model.action_decoder if supervised == "video" else model.backbone.proj_out
    assert all(p.grad is None or not p.grad.any() for p in untouched.parameters())
