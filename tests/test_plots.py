"""Figures show what the program uses: the drawn mask is the relation table's, and every figure is written whole."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from wam.config import TimelineConfig, load_config
from wam.evaluation.plots import (
    DEMO_MODES,
    draw_learning_curves,
    draw_mask,
    draw_readme_images,
    draw_relations,
    draw_timeline,
    mask_picture,
)
from wam.figures import KIND_COLORS, MODE_STYLES, read_log, smooth
from wam.relations import MODES
from wam.timeline import Kind

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize("mode", MODES)
def test_the_drawn_mask_is_the_relation_table(mode: str) -> None:
    picture = mask_picture(mode)
    for row, query in enumerate(picture.spans):
        for column, key in enumerate(picture.spans):
            tokens = (query.kind, query.block, key.kind, key.block)
            seen = MODES[mode].table.allow(*tokens)
            assert picture.seen_SS[row, column] == seen, f"{mode}: {query} -> {key}"
            assert picture.opened_SS[row, column] == (seen and not MODES["skip"].table.allow(*tokens))


def test_what_is_outlined() -> None:
    picture = mask_picture("joint")
    rows, columns = np.nonzero(picture.opened_SS)
    assert {(picture.spans[r].kind, picture.spans[c].kind) for r, c in zip(rows, columns, strict=True)} == {(Kind.A, Kind.V)}
    assert not mask_picture("skip").opened_SS.any()


def test_a_preset_is_drawn_under_its_own_table_and_reach() -> None:
    config = load_config(None, ["preset=lingbot_va", "timeline.history=1"])
    picture = mask_picture("imagine", config, {Kind.VC, Kind.AC})
    assert [s.label for s in picture.spans] == ["Vc0", "Vc1", "Ac0", "Ac1"]
    assert picture.seen_SS.tolist() == [[True, False, False, False], [False, True, True, False], [True, False, True, False], [False, True, False, True]]
    assert "V held at" in mask_picture("skip_registers", config).note and "30%" in mask_picture("skip").note


def test_every_kind_and_mode_has_a_look_of_its_own() -> None:
    assert KIND_COLORS.keys() == set(Kind) and len(set(KIND_COLORS.values())) == len(Kind)
    assert MODE_STYLES.keys() == MODES.keys()
    assert len({color for color, _ in MODE_STYLES.values()}) == len({marker for _, marker in MODE_STYLES.values()}) == len(MODES)


def test_figures_are_written(tmp_path: Path) -> None:
    draw_mask("imagine", tmp_path / "mask.png")
    draw_timeline(TimelineConfig(latents_per_block=2, actions_per_block=16), tmp_path / "timeline.svg")
    draw_relations(load_config(None, ["preset=dreamzero"]), tmp_path / "preset.png")
    readme = draw_readme_images(tmp_path / "new" / "images")
    assert [path.name for path in readme] == ["timeline.png", "masks.png"]
    for path in (tmp_path / "mask.png", tmp_path / "preset.png", *readme):
        assert path.read_bytes().startswith(PNG) and path.stat().st_size < 150_000
    assert "</svg>" in (tmp_path / "timeline.svg").read_text()
    with pytest.raises(ValueError, match="did you mean 'imagine'"):
        draw_mask("imagin", tmp_path / "no.png")
    assert not (tmp_path / "no.png").exists()


def write_log(path: Path, records: list[dict[str, float]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_learning_curves(tmp_path: Path) -> None:
    training = [{"step": s, "train/video": 1.0 / s, "train/action": 2.0 / s} for s in range(1, 40)]
    validation = {
        "step": 40,
        **{f"val/{m}/{p}": 0.1 for m in DEMO_MODES for p in ("video", "action")},
        **{f"val/action_mse/{k}": 0.2 for k in ("skip", "hold", "mean")},
    }
    cases = {"all": [*training, validation], "training only": training, "validation only": [validation]}
    for name, records in cases.items():
        draw_learning_curves(write_log(tmp_path / "log.jsonl", records), tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").read_bytes().startswith(PNG)


def test_logs_that_show_nothing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="wam train"):
        read_log(tmp_path / "log.jsonl")
    log = write_log(tmp_path / "log.jsonl", [{"step": 1}])
    with pytest.raises(ValueError, match=r"1 records and no losses; train for at least training\.log_every"):
        draw_learning_curves(log, tmp_path / "curves.png")
    with log.open("a") as stream:
        stream.write('{"step": 2, "train/vid')  # a crash in the middle of a line
    assert read_log(log) == [{"step": 1}]


def test_smoothing_has_no_bias_at_its_start() -> None:
    assert smooth(np.full(5, 3.0)) == pytest.approx(np.full(5, 3.0))
    assert smooth(np.array([0.0, 1.0]), decay=0.5) == pytest.approx([0.0, 2 / 3])


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'wam\[train\]'"):
        draw_mask("skip", tmp_path / "mask.png")
