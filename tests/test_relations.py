"""The relation table: taught by small pictures, equal in every rendering, and leak-free."""

import pytest
import torch
from tiny import tiny_config

from wam.relations import BASE, MODES, LeakError, Mode, RelationTable, describe, get_mode
from wam.timeline import Clock, Kind, Layout, training_layout

H, S, VC, V, AC, A, G = Kind


def _picture(mode: str, kinds: str, blocks: int = 2) -> list[str]:
    """Who sees whom, one token per segment, as rows of zeros and ones."""
    table = get_mode(mode).table
    names = {"H": H, "S": S, "c": VC, "v": V, "x": AC, "a": A}
    tokens = [(names[n], -1 if n == "H" else b) for b in range(blocks) for n in kinds if n != "H" or b == 0]
    return ["".join(str(int(table.allow(*q, *k))) for k in tokens) for q in tokens]


def test_skip_is_fast_wam_over_blocks() -> None:
    # tokens H c0 v0 a0 c1 v1 a1: video and actions see the clean past and themselves
    assert _picture("skip", "Hcva") == [
        "1000000",
        "1100000",
        "1010000",
        "1001000",
        "1100100",
        "1100010",
        "1100001",
    ]


def test_joint_opens_one_cell_and_mutual_two() -> None:
    assert _picture("joint", "va") == ["1000", "1100", "0010", "0011"]
    assert _picture("joint_mutual", "va") == ["1100", "1100", "0011", "0011"]


def test_imagine_sees_the_clean_copy_of_its_own_block() -> None:
    # c0 x0 a0 c1 x1 a1
    assert _picture("imagine", "cxa") == ["100000", "010000", "101000", "110100", "110010", "110101"]


def test_forward_sees_the_actions_of_its_own_block() -> None:
    # c0 v0 x0 c1 v1 x1
    assert _picture("forward", "cvx") == ["100000", "011000", "001000", "101100", "101011", "101001"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("history", [None, 1, 2])
def test_dense_mask_equals_the_predicate(mode: str, history: int | None) -> None:
    config = tiny_config()
    layout = training_layout(Clock(config.timeline, (2, 3)), 3)
    table = get_mode(mode).table
    dense = table.dense(layout, history)
    assert dense.any(dim=1).all(), "a token that sees nothing would give NaN"
    for q in range(0, len(layout), 5):
        for k in range(len(layout)):
            expected = table.allow(Kind(int(layout.kinds_L[q])), int(layout.blocks_L[q]), Kind(int(layout.kinds_L[k])), int(layout.blocks_L[k]), history)
            assert bool(dense[q, k]) == expected


@pytest.mark.parametrize("mode", MODES)
def test_no_supervised_token_reaches_what_does_not_exist(mode: str) -> None:
    """Transitive closure of the real mask, over all blocks of a window."""
    spec = get_mode(mode)
    layout = training_layout(Clock(tiny_config().timeline, (1, 1)), 4)
    reach = spec.table.dense(layout)
    for _ in range(6):
        reach = (reach.float() @ reach.float()) > 0
    for q in range(len(layout)):
        kind, block = Kind(int(layout.kinds_L[q])), int(layout.blocks_L[q])
        if kind not in spec.predicts:
            continue
        for k in reach[q].nonzero().flatten().tolist():
            other, at = Kind(int(layout.kinds_L[k])), int(layout.blocks_L[k])
            assert at <= block, f"{mode}: {kind.label}[{block}] reaches the future"
            if other in (VC, AC) and at == block:
                assert other in spec.given.get(kind, frozenset())
            if other in (V, A):
                assert at == block


@pytest.mark.parametrize(
    ("cells", "given", "path"),
    [
        ({(V, A): "=", (A, VC): "<="}, {A: frozenset({VC})}, "V[1] -> A[1] -> Vc[1]"),
        ({(A, V): "=", (V, AC): "<="}, {V: frozenset({AC})}, "A[1] -> V[1] -> Ac[1]"),
        ({(AC, VC): "<=", (V, AC): "<="}, {V: frozenset({AC})}, "V[1] -> Ac[1] -> Vc[1]"),
        ({(VC, AC): "<=", (A, VC): "<="}, {A: frozenset({VC})}, "A[1] -> Vc[1] -> Ac[1]"),
        ({(A, A): "all"}, {}, "A[1] -> A[0]"),
    ],
)
def test_a_leaking_table_is_refused_with_its_path(cells: dict, given: dict, path: str) -> None:
    with pytest.raises(LeakError) as error:
        Mode("bad", cells, given, frozenset({V, A}), "")
    assert path in str(error.value)


def test_unknown_mode_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'imagine'"):
        get_mode("imagin")


def test_description_marks_what_changed() -> None:
    assert "<=*" in describe("imagine") and "*" not in describe("skip").split("\n\n")[1]


def test_mask_of_rows_at_different_blocks() -> None:
    table = RelationTable(BASE)
    kinds = torch.tensor([[H, VC, VC], [H, VC, VC]])
    blocks = torch.tensor([[-1, 0, 1], [-1, 3, 4]])
    seen = table.mask(torch.full((2, 1), int(A)), torch.tensor([[2], [4]]), kinds, blocks, history=2)
    assert seen.squeeze(1).tolist() == [[False, True, True], [False, True, False]]


def test_spans_must_lie_side_by_side() -> None:
    clock = Clock(tiny_config().timeline, (1, 1))
    layout = Layout((clock.segment(V, 0), clock.segment(S, 0), clock.segment(A, 0)))
    assert layout.span(A) == slice(2, 10)
    with pytest.raises(AssertionError, match="side by side"):
        layout.span(V, A)
