"""Every preset's mask is the paper's, written here a second time from the papers; no mode of any preset leaks; published answers are as published."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from wam.config import Config, ConfigError, load_config, save_config
from wam.presets import PRESETS, get_preset
from wam.relations import BASE, LeakError, Mode, Reach, Relations, RelationTable, trained_modes, untrained_mode_warning
from wam.relations_text import describe_config, present_kinds
from wam.timeline import Kind, Layout, Segment

H, S, VC, V, AC, A, G, _ = Kind  # the last, R, is in no preset
Token = tuple[Kind, int]
LABELS = {kind.label: kind for kind in Kind}


def config_of(preset: str, *overrides: str) -> Config:
    return load_config(None, [f"preset={preset}", *overrides])


def table_of(preset: str, mode: str) -> RelationTable:
    return Relations.of(config_of(preset)).mode(mode).table


def tokens_of(kinds: Iterable[Kind], blocks: int, noisy_first: bool = False) -> list[Token]:
    """One token for every segment of a window."""
    found: list[Token] = []
    for kind in kinds:
        first = -1 if kind is V and noisy_first else 0
        found += [(kind, -1)] if kind in (H, G) else [(kind, block) for block in range(first, blocks)]
    return found


def mask_of(table: RelationTable, tokens: list[Token], reach: Reach) -> list[list[bool]]:
    """The table's dense mask of one token per segment."""
    return table.dense(Layout(tuple(Segment(kind, block, torch.zeros(1, 4)) for kind, block in tokens)), reach).tolist()


def assert_mask_is(preset: str, mode: str, tokens: list[Token], paper: Callable[[Token, Token], bool]) -> None:
    config = config_of(preset)
    kinds = {kind for kind, _ in tokens}
    assert set(present_kinds(config, [Relations.of(config).mode(mode)])) == kinds, "these are all the kinds there are"
    mask = mask_of(table_of(preset, mode), tokens, Reach.of(config.timeline))
    for row, query in zip(mask, tokens, strict=True):
        assert {k for seen, k in zip(row, tokens, strict=True) if seen} == {k for k in tokens if paper(query, k)}, f"{preset}: row {query}"


# ------------------------------------------------------------------------------------------------ the papers' masks


@pytest.mark.parametrize(
    ("preset", "mode", "rows"),
    [
        ("fast_wam", "skip", {"H": "H", "V": "H V", "A": "H A"}),
        ("fast_wam_joint", "joint", {"H": "H", "V": "H V", "A": "H V A"}),
        ("fast_wam_idm", "imagine", {"H": "H", "Vc": "H Vc", "V": "H V", "A": "H Vc A"}),
        ("uwm", "joint_mutual", {"H": "H", "V": "H V A", "A": "H V A"}),  # H stands for UWM's global condition
        *[("uwm", mode, {"H": "H", "V": "H V A", "A": "H V A"}) for mode in ("forward", "inverse", "video", "skip_registers", "imagine")],
        ("vla", "action_only", {"H": "H", "S": "S", "A": "H S A"}),
    ],
)
def test_masks_of_one_block(preset: str, mode: str, rows: dict[str, str]) -> None:
    config = config_of(preset)
    assert config.timeline.blocks == 1 and not Relations.of(config).remembers
    tokens = tokens_of([LABELS[label] for label in rows], 1)
    assert_mask_is(preset, mode, tokens, lambda q, k: k[0].label in rows[q[0].label].split())


@pytest.mark.parametrize("preset", ["dreamzero", "dreamzero_flash"])
def test_dreamzero_trains_with_this_mask(preset: str) -> None:
    def paper(query: Token, key: Token) -> bool:
        (kind, b), history = query, [(H, -1), *((VC, c) for c in range(4))]
        if kind is H:
            return key == (H, -1)
        if kind is VC:  # clean block b: clean f0, clean blocks 0..b
            return key in history[: b + 2]
        if kind is S or query == (V, -1):  # a state sees itself, and so does the noisy first frame
            return key == query
        return key in history[: b + 1] or key in [(V, b), (A, b), (S, b)]

    assert_mask_is(preset, "joint_mutual", tokens_of((H, VC, V, A, S), 4, noisy_first=True), paper)


def test_dreamzero_as_released_lets_the_state_see_everything_of_its_block() -> None:
    cells = {**config_of("dreamzero").relations.cells, "S->H": "all", "S->Vc": "<", "S->V": "=", "S->A": "="}
    table = Relations.of(config_of("dreamzero", f"relations.cells={cells}")).mode("joint_mutual").table
    seen = {key for key in tokens_of((H, VC, V, A, S), 4) if table.allow(S, 2, *key)}
    assert seen == {(H, -1), (VC, 0), (VC, 1), (V, 2), (A, 2), (S, 2)}


@pytest.mark.parametrize("window", [1, 2, 4, 5, 64])
def test_lingbot_is_causal_over_interleaved_segments(window: int) -> None:
    """Ids are 2c for video and 2c + 1 for actions: the clean copy sees ids up to its own, the noisy one smaller ids and itself."""
    config = config_of("lingbot_va", f"timeline.history={window}")
    reach, table = Reach.of(config.timeline), Relations.of(config).mode("imagine").table
    tokens = tokens_of((V, VC, A, AC), 6)
    ids = [2 * block + (kind in (A, AC)) for kind, block in tokens]
    clean = [kind in (VC, AC) for kind, _ in tokens]
    expected = [
        [
            abs(ids[q] - ids[k]) <= window and ((clean[k] and (ids[k] <= ids[q] if clean[q] else ids[k] < ids[q])) or tokens[q] == tokens[k])
            for k in range(len(tokens))
        ]
        for q in range(len(tokens))
    ]
    assert mask_of(table, tokens, reach) == expected
    assert set(present_kinds(config, [Relations.of(config).mode("imagine")])) == {V, VC, A, AC}, "neither a first frame of its own nor states"


def test_video_alone_is_teacher_forcing() -> None:
    """Self-Forcing's clean and noisy halves: clean blocks see clean ones up to their own, noisy blocks earlier clean ones and themselves."""
    tokens = tokens_of((H, VC, V), 5)  # H is the clean block before the first
    expected = [[(k[0] is not V and k[1] < q[1] + (q[0] is not V)) or (q == k) for k in tokens] for q in tokens]
    assert mask_of(table_of("all", "video"), tokens, Reach()) == expected


def test_ge_act_reads_video_that_reads_no_actions() -> None:
    def paper(query: Token, key: Token) -> bool:
        (kind, b), (other, c) = query, key
        observed = other is H or (other is VC and c < b)
        if kind in (H, S):
            return query == key
        if kind is VC:
            return other is H or (other is VC and c <= b)
        return observed or (c == b and other in ((V,) if kind is V else (V, A, S)))

    assert_mask_is("ge_act", "skip_registers", tokens_of((H, VC, V, A, S), 4), paper)


def test_the_base_table_word_for_word() -> None:
    words = """H: H all | S: S = | Vc: H all, Vc <=, Ac <, S <= | Ac: H all, Vc <, Ac <=, S <= | V: H all, Vc <, Ac <, S <=, V = | A: H all, Vc <, Ac <, S <=, A ="""
    rows = [row.strip().split(": ") for row in words.split("|")]
    cells = {(LABELS[q], LABELS[cell.split()[0]]): cell.split()[1] for q, row in rows for cell in row.split(", ")}
    goal = {(q, G): "all" for q in (VC, V, AC, A, G)}
    assert {**cells, **goal} == BASE


# ------------------------------------------------------------------------------------------------ no leak, by brute force


def existing(mode: Mode, target: Token) -> set[Kind]:
    """Kinds of the target's own block that are there when it is predicted at inference."""
    return {S, target[0], *mode.live, *mode.given.get(target[0], ())}


@pytest.mark.parametrize("preset", PRESETS)
def test_nothing_predicted_reaches_what_does_not_exist(preset: str) -> None:
    config = config_of(preset)
    relations = Relations.of(config)
    tokens = tokens_of(Kind, 4, noisy_first=config.training.predict_first_frame)
    built = 0
    for name in relations.modes:
        try:
            mode = relations.mode(name)
        except LeakError:
            assert name not in trained_modes(config)
            continue
        built += 1
        reaches = torch.tensor(mask_of(mode.table, tokens, Reach())).float()
        for _ in range(5):  # closure over 32 layers
            reaches = ((reaches + reaches @ reaches) > 0).float()
        for target, row in zip(tokens, reaches.bool().tolist(), strict=True):
            if target[0] not in mode.predicts:
                continue
            for (kind, block), reached in zip(tokens, row, strict=True):
                first_frame = target == (V, -1)
                there = kind is G or (kind is H and not first_frame) or (block == target[1] and kind in existing(mode, target))
                there |= kind in (S, VC, AC) and block < target[1]
                assert not reached or there, f"{preset}, {name}: {target} reaches {(kind, block)}"
    assert built == len(relations.modes) - (preset == "lingbot_va"), "lingbot_va's executed actions have seen their video: no forward dynamics"


# ------------------------------------------------------------------------------------------------ as configs


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_a_whole_config_that_can_be_saved(preset: str, tmp_path: Path) -> None:
    config = config_of(preset)
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    assert f"preset {preset}" in describe_config(config)
    for mode in {*config.training.modes, *config.rollout.modes}:
        assert untrained_mode_warning(config, mode) is None, f"{preset} is driven in {mode}, which it was not trained for"
    for section, settings in get_preset(preset).items():
        default = getattr(Config(), section)
        assert any(getattr(config, section) != default for _ in settings), f"{preset}.{section} repeats the defaults"


def test_what_is_written_lies_over_a_preset(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"preset": "fast_wam", "model": {"expert_width": 96}, "training": {"modes": {"joint": 1.0}}}))
    config = load_config(tmp_path / "mine.yaml", ["noise.action.shift=2"])
    assert (config.model.expert_width, config.model.state, config.noise.action.shift, config.noise.action.per) == (96, "context", 2.0, "sample")
    assert config.training.modes == {"joint": 1.0}
    with pytest.raises(ConfigError, match="did you mean 'fast_wam_idm'"):
        config_of("fast_wam_idn")


def test_blocks_that_would_see_no_observation_are_refused() -> None:
    with pytest.raises(ValueError, match=r"timeline\.blocks is 3, but relations\.cells \(preset 'uwm'\) let nothing see earlier blocks; set timeline\.blocks=1"):
        Relations.of(config_of("uwm", "timeline.blocks=3"))
    assert [preset for preset in PRESETS if not Relations.of(config_of(preset)).remembers] == ["fast_wam", "fast_wam_joint", "fast_wam_idm", "uwm", "vla"]


@pytest.mark.parametrize(
    ("preset", "path", "value"),
    [
        ("dreamzero", "noise.coupled", 1.0),
        ("dreamzero", "noise.video.shift", 5.0),
        ("dreamzero", "noise.action.weighting", "bump"),
        ("dreamzero", "model.expert_width", None),
        ("dreamzero", "model.positions", "index"),
        ("dreamzero", "model.state_level", "action"),
        ("dreamzero", "training.reduction", "all"),
        ("dreamzero", "sampling.guidance", 5.0),
        ("dreamzero", "sampling.evaluations", 8),
        ("dreamzero_flash", "noise.video.alpha", 7.0),
        ("dreamzero_flash", "noise.action.per", "token"),
        ("dreamzero_flash", "noise.coupled", 0.0),
        ("dreamzero_flash", "sampling.video_final", 0.8),
        ("fast_wam", "model.expert_width", 1024),
        ("fast_wam", "model.expert_ffn_dim", 4096),
        ("fast_wam", "noise.action.shift", 5.0),
        ("fast_wam", "sampling.steps", 10),
        ("fast_wam_idm", "noise.condition_probability", 0.5),
        ("lingbot_va", "model.positions", "frame_fraction"),
        ("lingbot_va", "noise.video.per", "frame"),
        ("lingbot_va", "sampling.action_steps", 50),
        ("lingbot_va", "noise.action.shift", 1.0),
        ("lingbot_va", "noise.history_probability", 0.5),
        ("lingbot_va", "training.text_dropout", 0.1),
        ("uwm", "relations.copies", "single"),
        ("uwm", "noise.video.at_zero", 0.01),
        ("ge_act", "model.expert_width", 512),
        ("ge_act", "noise.action.weighting", "none"),
        ("vla", "training.video_weight", 0.0),
    ],
)
def test_published_answers(preset: str, path: str, value: Any) -> None:
    found: Any = config_of(preset)
    for name in path.split("."):
        found = getattr(found, name)
    assert found == value


@pytest.mark.parametrize(
    ("preset", "mode", "choice"),
    [
        ("fast_wam", "imagine", "skip"),
        ("fast_wam_joint", "skip", "joint"),
        ("dreamzero", "skip", "joint_mutual"),
        ("lingbot_va", "skip", "imagine, or"),
        ("ge_act", "joint", "skip_registers"),
        ("uwm", "skip", "joint_mutual or skip_registers"),
        ("vla", "joint", "action_only"),
    ],
)
def test_a_preset_says_which_mode_to_choose(preset: str, mode: str, choice: str) -> None:
    warning = untrained_mode_warning(config_of(preset), mode)
    assert warning and f"preset {preset!r}" in warning and f"choose {choice}" in warning


def test_uwm_was_trained_for_every_mode_of_its_levels() -> None:
    config = config_of("uwm")
    assert all(untrained_mode_warning(config, mode) is None for mode in ("skip_registers", "joint_mutual", "forward", "inverse", "video", "imagine"))


def test_every_preset_is_documented() -> None:
    text = (Path(__file__).resolve().parents[1] / "docs" / "presets.md").read_text()
    assert all(f"`{preset}`" in text for preset in PRESETS)
