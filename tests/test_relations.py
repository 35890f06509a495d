"""The relation table: taught by small pictures, equal in every rendering, and leak-free."""

import warnings

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from wam.cells import KIND_LABELS
from wam.config import ConfigError, RelationsConfig, TimelineConfig, load_config
from wam.relations import (
    BASE,
    EVERYTHING,
    MODES,
    LeakError,
    Mode,
    Reach,
    Relations,
    RelationTable,
    block_mask,
    dense_masks,
    get_mode,
    parse_cells,
    union,
    untrained_mode_warning,
)
from wam.relations_text import describe
from wam.timeline import Kind, Layout, Segment

H, S, VC, V, AC, A, G, _ = Kind  # the last, R, is in no mode: see test_value
REACHES = [EVERYTHING, Reach(1), Reach(2, sink=True), Reach(3, "segment"), Reach(4, "segment", sink=True)]


def layout_of(blocks: int, *, patches: int = 3, actions: int = 2, first: int = 0) -> Layout:
    """A training window with every kind of token, the noisy first frame included; nothing here looks at positions."""
    sizes = {H: patches, G: patches, VC: patches, V: patches, S: 1, AC: actions, A: actions}
    order = [(G, -1), (H, -1), *((VC, b) for b in range(blocks)), *((V, b) for b in range(-1, blocks))]
    order += [(kind, b) for kind in (S, AC, A) for b in range(first, blocks)]
    return Layout(tuple(Segment(kind, block, torch.zeros(sizes[kind], 4)) for kind, block in order))


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
    assert _picture("joint", "va") == _picture("skip_registers", "va") == ["1000", "1100", "0010", "0011"]
    assert _picture("joint_mutual", "va") == ["1100", "1100", "0011", "0011"]


def test_imagine_sees_the_clean_copy_of_its_own_block() -> None:
    # c0 x0 a0 c1 x1 a1
    assert _picture("imagine", "cxa") == ["100000", "010000", "101000", "110100", "110010", "110101"]


def test_forward_sees_the_actions_of_its_own_block() -> None:
    # c0 v0 x0 c1 v1 x1
    assert _picture("forward", "cvx") == ["100000", "011000", "001000", "101100", "101011", "101001"]


def test_a_goal_is_seen_by_all_but_the_first_frame_and_states() -> None:
    for mode in MODES.values():
        assert {k for k in Kind if mode.table.allow(k, 5, G, -1, Reach(1))} == {VC, V, AC, A, G}


def test_what_must_be_present() -> None:
    live = {name: "".join(k.label for k in mode.live) for name, mode in MODES.items()}
    one_way = {"skip": "A", "imagine": "A", "inverse": "A", "action_only": "A", "forward": "V", "video": "V"}
    assert live == {**one_way, "skip_registers": "VA", "joint": "VA", "joint_mutual": "VA"}
    assert MODES["skip_registers"].pinned == {V: 1.0} and MODES["skip_registers"].denoised == (A,)


# ------------------------------------------------------------------------------------------------ renderings


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("reach", REACHES, ids=str)
def test_dense_mask_equals_the_predicate(mode: str, reach: Reach) -> None:
    layout = layout_of(4)
    table = get_mode(mode).table
    dense = table.dense(layout, reach)
    assert dense.any(dim=1).all(), "a token that sees nothing would give NaN"
    kinds, blocks = [Kind(k) for k in layout.kinds_L.tolist()], layout.blocks_L.tolist()
    expected = [[table.allow(kq, bq, kk, bk, reach) for kk, bk in zip(kinds, blocks, strict=True)] for kq, bq in zip(kinds, blocks, strict=True)]
    assert dense.tolist() == expected


def test_reach_counts_blocks_or_segments() -> None:
    timeline = TimelineConfig(history=2)
    assert Reach.of(timeline) == Reach(2) and Reach.of(TimelineConfig(sink=True, history=1)) == Reach(1, sink=True)
    assert [b for b in range(9) if Reach(2).allow(A, 6, VC, b)] == [4, 5, 6, 7, 8] and not Reach(2).allow(A, 6, H, -1)
    by_segment = Reach(3, "segment")  # ids: video 2b, actions 2b + 1; A6 is 13
    assert [b for b in range(7) if by_segment.allow(A, 6, VC, b)] == [5, 6]
    assert [b for b in range(7) if by_segment.allow(A, 6, AC, b)] == [5, 6]
    assert [b for b in range(7) if by_segment.allow(V, 6, AC, b)] == [4, 5, 6]
    assert [b for b in range(7) if by_segment.allow(V, 6, VC, b)] == [5, 6]
    assert Reach(1, sink=True).allow(A, 6, H, -1) and not Reach(1).allow(A, 6, H, -1)


def _hidden(layout: Layout, batch: int) -> torch.Tensor:
    """States of some samples and the goal of others are hidden, and a few single tokens."""
    hidden = torch.zeros(batch, len(layout), dtype=torch.bool)
    hidden[0::2] |= layout.kinds_L == int(S)
    hidden[1::2] |= layout.kinds_L == int(G)
    return hidden | (torch.rand(batch, len(layout), generator=torch.Generator().manual_seed(0)) < 0.02)


@pytest.mark.parametrize("reach", [EVERYTHING, Reach(1), Reach(3, "segment")], ids=str)
@pytest.mark.parametrize("hide", [False, True])
def test_block_mask_of_a_mixed_batch_equals_the_dense_mask(reach: Reach, hide: bool) -> None:
    layout = layout_of(4, patches=19, actions=8)
    tables = [mode.table for mode in MODES.values()]
    hidden = _hidden(layout, len(tables)) if hide else None
    dense = dense_masks(tables, layout, reach, hidden)
    ours = block_mask(tables, layout, reach, hidden, tile=16)

    batch, length = len(tables), len(layout)
    index = torch.arange(length)
    by_token = ours.mask_mod(torch.arange(batch)[:, None, None], torch.tensor(0), index[None, :, None], index[None, None, :])
    assert torch.equal(by_token, dense)
    theirs = create_block_mask(lambda b, h, q, k: dense[b, q, k], batch, None, length, length, device="cpu", BLOCK_SIZE=16)
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    assert torch.equal(ours.to_dense(), theirs.to_dense())
    assert ours.full_kv_num_blocks is not None and int(ours.full_kv_num_blocks.sum()) > 0 and ours.sparsity() > 20, "whole tiles are known to be full or empty"


def test_flex_attention_equals_attention_under_the_dense_mask() -> None:
    layout = layout_of(3, patches=5)
    tables = [get_mode(name).table for name in ("joint", "imagine", "forward")]
    hidden = _hidden(layout, 3)
    q, k, v = torch.randn(3, 3, 2, len(layout), 16, generator=torch.Generator().manual_seed(1)).unbind(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "flex_attention called without torch.compile")  # said once a process
        flex = flex_attention(q, k, v, block_mask=block_mask(tables, layout, Reach(2), hidden, tile=16))
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=dense_masks(tables, layout, Reach(2), hidden).unsqueeze(1))
    torch.testing.assert_close(flex, dense, atol=1e-6, rtol=1e-5)


def test_what_is_hidden_is_seen_by_itself_alone() -> None:
    layout = layout_of(2)
    hidden = (layout.kinds_L == int(G)).unsqueeze(0)
    masks = dense_masks([get_mode("skip").table], layout, EVERYTHING, hidden)[0]
    goal = hidden[0]
    assert torch.equal(masks[:, goal], torch.eye(len(layout), dtype=torch.bool)[:, goal])
    assert torch.equal(masks[:, ~goal], get_mode("skip").table.dense(layout)[:, ~goal])


def test_mask_of_rows_at_different_blocks() -> None:
    table = RelationTable(BASE)
    kinds = torch.tensor([[H, VC, VC], [H, VC, VC]])
    blocks = torch.tensor([[-1, 0, 1], [-1, 3, 4]])
    query = torch.full((2, 1), int(A)), torch.tensor([[2], [4]])
    assert table.mask(*query, kinds, blocks, Reach(2)).squeeze(1).tolist() == [[False, True, True], [False, True, False]]
    assert table.mask(*query, kinds, blocks, Reach(2, sink=True)).squeeze(1).tolist() == [[True, True, True], [True, True, False]]


# ------------------------------------------------------------------------------------------------ leaks


@pytest.mark.parametrize(
    ("cells", "given", "path"),
    [
        ({(AC, VC): "=", (V, AC): "="}, {V: {AC}}, "V[1] -> Ac[1] -> Vc[1]"),  # executed actions that saw their video tell it
        ({(VC, AC): "=", (A, VC): "="}, {A: {VC}}, "A[1] -> Vc[1] -> Ac[1]"),  # and the other way round
        ({(V, A): "=", (A, VC): "="}, {A: {VC}}, "V[1] -> A[1] -> Vc[1]"),  # two hops, through what is denoised alongside
        ({(A, V): "=", (V, AC): "="}, {V: {AC}}, "A[1] -> V[1] -> Ac[1]"),
        ({(A, A): "all"}, {}, "A[1] -> A[0]"),
        ({(V, VC): "="}, {}, "V[1] -> Vc[1]"),
        ({(S, A): "="}, {}, "V[1] -> S[0] -> A[0]"),  # states of earlier blocks are seen, their noisy actions are gone
        ({(S, S): "all"}, {}, "V[1] -> S[0] -> S[2]"),
        ({(G, VC): "all"}, {}, "V[1] -> G -> Vc[1]"),
    ],
)
def test_a_leaking_table_is_refused_with_its_path(cells: dict, given: dict, path: str) -> None:
    with pytest.raises(LeakError) as error:
        Mode("bad", cells, {kind: frozenset(kinds) for kind, kinds in given.items()}, frozenset({V, A}), "")
    assert path in str(error.value) and "close a cell" in str(error.value)


def test_actions_must_not_read_video_that_is_absent_at_inference() -> None:
    with pytest.raises(LeakError, match=r"A\[1\] -> V\[1\]"):
        Mode("bad", {(A, V): "="}, {}, frozenset({A}), "", live=(A,))
    Mode("good", {(A, V): "="}, {}, frozenset({A}), "", live=(V, A), pinned={V: 1.0})


def test_a_state_may_see_the_noisy_tokens_of_its_own_block() -> None:
    """DreamZero's plans as released; legal, since nothing sees the states of other blocks."""
    seen = {"S->H": "all", "S->Vc": "<", "S->V": "=", "S->A": "=", **{f"{q}->S": "=" for q in ("V", "A")}, **{f"{q}->S": "none" for q in ("Vc", "Ac")}}
    relations = Relations(RelationsConfig(seen))
    assert relations.mode("joint_mutual").table.allow(S, 1, A, 1)
    with pytest.raises(LeakError, match=r"A\[1\] -> S\[1\] -> V\[1\]"):
        relations.mode("skip")


def test_the_first_frame_cannot_be_copied_where_it_is_predicted() -> None:
    with pytest.raises(LeakError, match=r"V\[-1\] -> H"):
        Relations(predict_first_frame=True).mode("joint")
    table = Relations(RelationsConfig({"V->H": "<"}), predict_first_frame=True).mode("joint").table
    layout = layout_of(2)
    row = table.dense(layout)[int(((layout.kinds_L == int(V)) & (layout.blocks_L == -1)).nonzero()[0])]
    assert {(Kind(int(k)), int(b)) for k, b in zip(layout.kinds_L[row], layout.blocks_L[row], strict=True)} == {(V, -1), (G, -1)}
    assert table.allow(V, 0, H, -1) and not table.allow(V, 0, V, -1)


def test_a_preset_leaks_only_in_the_modes_it_cannot_do() -> None:
    relations = Relations(RelationsConfig({"Ac->Vc": "<="}))
    assert relations.mode("imagine").table.allow(AC, 1, VC, 1)
    with pytest.raises(LeakError, match=r"V\[1\] -> Ac\[1\] -> Vc\[1\]"):
        relations.mode("forward")


# ------------------------------------------------------------------------------------------------ single copies, cells, names


def test_single_copies_give_conditions_as_levels() -> None:
    relations = Relations(RelationsConfig(copies="single"))
    expected = {"forward": ({A: 0.0}, (V,)), "inverse": ({V: 0.0}, (A,)), "video": ({A: 1.0}, (V,)), "skip_registers": ({V: 1.0}, (A,)), "imagine": ({V: 0.0}, (A,))}
    for name, (pinned, denoised) in expected.items():
        mode = relations.mode(name)
        assert (mode.pinned, mode.denoised, mode.live, mode.predicts) == (pinned, denoised, (V, A), frozenset(denoised))
        assert mode.sees(V, A) and mode.sees(A, V) and not mode.given
        assert mode.table == relations.mode("joint_mutual").table, "modes of a single copy differ in levels alone"
    assert relations.mode("skip").live == (A,)


def test_opening_adds_to_the_table_below() -> None:
    assert [union(a, b) for a, b in (("<", "="), ("", "="), ("all", "="), ("<=", "="), ("", ""))] == ["<=", "=", "all", "<=", ""]
    own_block_only = Relations(RelationsConfig({"A->Vc": "none"})).mode("imagine").table
    assert own_block_only.relation(A, VC) == "=" and get_mode("imagine").table.relation(A, VC) == "<="


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ({"A->Vd": "="}, "unknown kind 'Vd' in 'A->Vd'; did you mean 'V"),
        ({"a->V": "="}, "unknown kind 'a' in 'a->V'; did you mean 'A'"),
        ({"A->V": "=<"}, "A->V is '=<'; did you mean '<='"),
        ({"A->V": "al"}, "A->V is 'al'; did you mean 'all'"),
        ({"A->V": "before"}, "A->V is 'before'; relations: none, '<', '=', '<=', all"),
        ({"A V": "="}, "'A V' is not a cell; write QUERY->KEY"),
        ({"H->G": "all"}, "H->G is 'all', but the first frame is cached before anything else"),
    ],
)
def test_a_wrong_cell_names_the_right_one(cells: dict, message: str) -> None:
    with pytest.raises(ConfigError) as error:  # as the config is read
        RelationsConfig(cells)
    assert message in str(error.value)
    assert parse_cells({" A -> Vc ": "none"}) == {(A, VC): ""} and tuple(k.label for k in Kind) == KIND_LABELS


def test_unknown_mode_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'imagine'"):
        get_mode("imagin")


def test_description_marks_what_changed() -> None:
    assert "<=*" in describe("imagine") and "*" not in describe("skip").split("\n\n")[1]
    assert "V is held at level 1" in describe("skip_registers")


def test_a_mode_that_was_not_trained_is_said_so() -> None:
    config = load_config(None, ["training.modes={skip: 1}"])
    for name in ("skip", "action_only", "video"):
        assert untrained_mode_warning(config, name) is None, "skip trains their rows"
    warning = untrained_mode_warning(config, "imagine")
    assert warning and "'imagine' is not what this model was trained for" in warning and "choose skip or action_only" in warning
    assert "choose video" in (untrained_mode_warning(config, "forward") or "")
    inverse = load_config(None, ["training.modes={inverse: 1}"])
    assert untrained_mode_warning(inverse, "inverse") is None and untrained_mode_warning(inverse, "imagine"), "nothing taught it to imagine"


def test_levels_that_were_drawn_make_a_pinned_mode_trained() -> None:
    joint = ["training.modes={joint: 1}", "noise.coupled=0.5"]
    assert untrained_mode_warning(load_config(None, [*joint, "noise.video.at_one=0.1"]), "skip_registers") is None
    assert untrained_mode_warning(load_config(None, [*joint, "noise.video.at_one=0"]), "skip_registers")
    assert untrained_mode_warning(load_config(None, [*joint, "noise.coupled=1"]), "skip_registers")
    registers = load_config(None, ["training.modes={skip_registers: 1}"])
    assert untrained_mode_warning(registers, "skip_registers") is None and untrained_mode_warning(registers, "joint")
