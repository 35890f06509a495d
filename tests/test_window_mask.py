"""A window's attention in parts equals one attention under the dense mask, outputs and gradients, for every mode and with tokens hidden."""

import pytest
import torch
from tiny import tiny_config

from wam.model.attention import attention
from wam.model.window_mask import window_mask
from wam.relations import ALL, Reach, Relations, RelationTable, dense_masks
from wam.timeline import Clock, Kind, Parts, training_layout

CONFIG = tiny_config("timeline.latents_per_block=2", "timeline.actions_per_block=16")
LAYOUT = training_layout(Clock(CONFIG.timeline, (2, 3)), 3, Parts(goal=True, noisy_first=True))
RELATIONS = Relations()


def _normal(batch: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, len(LAYOUT), 2, 8, generator=generator, requires_grad=True) for _ in range(3)]


@pytest.mark.parametrize("hide", [False, True])
def test_parts_equal_the_whole(hide: bool) -> None:
    """A batch in which every mode occurs once."""
    tables, reach = [RELATIONS.mode(name).table for name in RELATIONS.modes], Reach.of(CONFIG.timeline)
    dense = dense_masks(tables, LAYOUT, reach)
    parts = window_mask(dense, LAYOUT)
    assert parts is not None
    hidden = torch.zeros(len(tables), len(LAYOUT), dtype=torch.bool)
    if hide:
        hidden[::2] = torch.isin(LAYOUT.kinds_L, torch.tensor([int(Kind.S), int(Kind.G)]))
        hidden[1] = torch.isin(LAYOUT.kinds_L, torch.tensor([int(kind) for kind in (Kind.S, Kind.AC, Kind.A)]))  # no actions: noisy ones either
        parts, dense = parts.hide(hidden), dense_masks(tables, LAYOUT, reach, hidden)
    q, k, v = _normal(len(tables))
    found, expected = parts.attend(q, k, v), attention(q, k, v, dense.unsqueeze(1), "eager")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    weight = torch.randn_like(found)
    for a, b in zip(torch.autograd.grad((found * weight).sum(), (q, k, v)), torch.autograd.grad((expected * weight).sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert sum(0 if m is None else m[0].numel() for m in parts.masks.values()) < 0.7 * len(LAYOUT) ** 2


def test_rows_are_chosen_as_modes_are_drawn() -> None:
    dense = dense_masks([RELATIONS.mode(name).table for name in ("skip", "joint", "imagine")], LAYOUT)
    parts, rows = window_mask(dense, LAYOUT), torch.tensor([2, 0, 2, 1])
    assert parts is not None
    q, k, v = _normal(4)
    torch.testing.assert_close(parts.select(rows).attend(q, k, v), attention(q, k, v, dense[rows].unsqueeze(1), "eager"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cell", [(Kind.V, Kind.V), (Kind.VC, Kind.V), (Kind.A, Kind.V)])
def test_a_table_that_does_not_fall_into_parts_is_left_whole(cell: tuple[Kind, Kind]) -> None:
    table = RelationTable({**RELATIONS.base, cell: ALL})
    assert window_mask(table.dense(LAYOUT).unsqueeze(0), LAYOUT) is None
