"""What the network's predictions depend on is what the table allows, no more and no less: the mask is used as it is written.

    d prediction / d input  is zero  <=>  no path of at most `layers` steps over the table leads from the prediction to that input

`tests/test_relations.py` checks tables for leaks; this is the same statement about numbers, for every preset and mode, samples of
different modes in one batch included.
"""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from tiny import TASKS, random_window, tiny_model, tiny_preset
from torch import Tensor

from wam.model.attention import attention
from wam.model.wam import Window, WorldActionModel
from wam.model.window_mask import window_mask
from wam.presets import PRESETS
from wam.relations import LeakError, Mode, Reach, block_mask, dense_masks
from wam.timeline import FIRST_BLOCK, Kind, Layout

V, A = Kind.V, Kind.A
LAYERS = 2
INPUTS = ("goal_BC1HW", "clean_BCFHW", "noisy_BCFHW", "state_BNS", "executed_BTA", "noisy_action_BTA")
Token = tuple[Kind, int]


def _modes(model: WorldActionModel) -> Iterator[Mode]:
    for name in model.relations.modes:
        try:
            yield model.relations.mode(name)
        except LeakError:
            continue


def _segments(model: WorldActionModel, layout: Layout, tensors: dict[str, Tensor]) -> dict[Token, Tensor]:
    """The part of a window's tensors (or of their gradients) that each segment is made of."""
    t, before = model.config.timeline, model.config.timeline.first_frame == "before"
    k, a, first = t.latents_per_block, t.actions_per_block, int(model.config.training.predict_first_frame)

    def part(kind: Kind, block: int) -> Tensor:
        actions = slice(block * a, (block + 1) * a)
        if kind in (Kind.H, Kind.VC):
            return tensors["clean_BCFHW"][:, :, :1] if kind is Kind.H else tensors["clean_BCFHW"][:, :, before + block * k : before + (block + 1) * k]
        if kind is V:
            return tensors["noisy_BCFHW"][:, :, :1] if block == FIRST_BLOCK else tensors["noisy_BCFHW"][:, :, first + block * k : first + (block + 1) * k]
        if kind is Kind.S:
            return tensors["state_BNS"][:, block : block + 1]
        return tensors["goal_BC1HW"] if kind is Kind.G else tensors["executed_BTA" if kind is Kind.AC else "noisy_action_BTA"][:, actions]

    return {(s.kind, s.block): part(s.kind, s.block) for s in layout.segments}


def _reached(mode: Mode, layout: Layout, reach: Reach) -> dict[Token, set[Token]]:
    """What each segment's tokens come to know of within the network's layers."""
    tokens = [(s.kind, s.block) for s in layout.segments]
    step = torch.tensor([[q == k or mode.table.allow(*q, *k, reach) for k in tokens] for q in tokens]).float()
    within = torch.linalg.matrix_power(step, LAYERS) > 0
    return {q: {k for k, seen in zip(tokens, row, strict=True) if seen} for q, row in zip(tokens, within.tolist(), strict=True)}


def _predict(model: WorldActionModel, window: Window, modes: list[Mode], layout: Layout) -> dict[Token, Tensor]:
    """The velocities of every noisy segment, one mode per sample."""
    mask = dense_masks([m.table for m in modes], layout, Reach.of(model.config.timeline)).unsqueeze(1)
    video, action = model.forward_train(window, model.encode_text(TASKS[: len(modes)]), mask, layout)
    outputs = {**{name: getattr(window, name) for name in INPUTS}, "noisy_BCFHW": video, "noisy_action_BTA": action}
    return {token: x for token, x in _segments(model, layout, outputs).items() if token[0] in (V, A)}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("expert", [None, 32])
@pytest.mark.parametrize("preset", PRESETS)
def test_a_prediction_depends_on_what_it_sees_and_on_nothing_else(preset: str, expert: int | None, batch: int) -> None:
    config = tiny_preset(preset, expert, *(["model.goal_image=true"] if preset == "all" else []))
    model, blocks, reach = tiny_model(config), min(3, config.timeline.blocks), Reach.of(config.timeline)
    layout, modes = model.training_layout(blocks), list(_modes(model))
    for start in range(0, len(modes), batch):
        chosen = (modes[start:] + modes)[:batch]
        window = random_window(model, batch, blocks)
        leaves = {name: x.requires_grad_(True) for name in INPUTS if (x := getattr(window, name)) is not None}
        expected = [_reached(mode, layout, reach) for mode in chosen]
        for target, prediction in _predict(model, window, chosen, layout).items():
            gradients = torch.autograd.grad(prediction.square().sum(), list(leaves.values()), retain_graph=True, allow_unused=True, materialize_grads=True)
            parts = _segments(model, layout, dict(zip(leaves, gradients, strict=True)))
            for row, mode in enumerate(chosen):
                found = {token for token, gradient in parts.items() if bool(gradient[row].any())}
                assert found == expected[row][target], f"{mode.name}: {target}"


@pytest.mark.parametrize("expert", [None, 32])
@pytest.mark.parametrize("preset", ["all", "dreamzero", "lingbot_va", "ge_act", "uwm"])
def test_what_is_not_seen_leaves_a_prediction_to_the_bit(preset: str, expert: int | None) -> None:
    model = tiny_model(tiny_preset(preset, expert))
    blocks, reach = min(3, model.config.timeline.blocks), Reach.of(model.config.timeline)
    layout = model.training_layout(blocks)
    window, other = (random_window(model, 1, blocks, seed) for seed in (1, 2))
    for mode in _modes(model):
        reached, before = _reached(mode, layout, reach), _predict(model, window, [mode], layout)
        for target in ((kind, blocks // 2) for kind in sorted(mode.predicts)):
            changed = replace(window, **{name: getattr(window, name).clone() for name in INPUTS if getattr(window, name) is not None})
            theirs, ours = (_segments(model, layout, {name: getattr(w, name) for name in INPUTS}) for w in (other, changed))
            for token, x in ours.items():
                if token not in reached[target]:
                    x.copy_(theirs[token])
            assert torch.equal(_predict(model, changed, [mode], layout)[target], before[target]), f"{mode.name}: {target}"


# ------------------------------------------------------------------------------------------------ one table, every rendering


@pytest.mark.parametrize("preset", PRESETS)
def test_every_rendering_of_every_preset_is_the_same(preset: str) -> None:
    """Predicate, dense mask, flex BlockMask, and a window in parts, over the preset's own training window."""
    model = tiny_model(tiny_preset(preset))
    layout, reach, modes = model.training_layout(model.config.timeline.blocks), Reach.of(model.config.timeline), list(_modes(model))
    kinds, blocks = [Kind(k) for k in layout.kinds_L.tolist()], layout.blocks_L.tolist()
    dense = dense_masks([m.table for m in modes], layout, reach)
    flex, parts = block_mask([m.table for m in modes], layout, reach, tile=16), window_mask(dense, layout)
    rows = torch.arange(len(layout))
    assert torch.equal(flex.mask_mod(torch.arange(len(modes))[:, None, None], torch.tensor(0), rows[None, :, None], rows[None, None, :]), dense)
    tiles = torch.nn.functional.pad(dense, (0, -len(layout) % 16) * 2).unflatten(2, (-1, 16)).unflatten(1, (-1, 16))
    assert torch.equal(flex.to_dense()[:, 0].bool(), tiles.any(dim=4).any(dim=2))
    for mode, mask in zip(modes, dense, strict=True):
        predicate = [[mode.table.allow(q, b, k, c, reach) for k, c in zip(kinds, blocks, strict=True)] for q, b in zip(kinds, blocks, strict=True)]
        assert mask.tolist() == predicate, mode.name
    assert parts is not None
    q, k, v = torch.randn(3, len(modes), len(layout), 2, 8, generator=torch.Generator().manual_seed(0)).unbind(0)
    torch.testing.assert_close(parts.attend(q, k, v), attention(q, k, v, dense.unsqueeze(1)), rtol=1e-4, atol=1e-5)
