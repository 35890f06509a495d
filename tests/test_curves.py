"""The picture of a run is drawn from its log alone, whatever of it there is, and a run goes on where it cannot be drawn."""

import json
import logging
from pathlib import Path

import pytest
from PIL import Image

from wam.training.curves import CURVES, draw_at_end, draw_curves
from wam.training.meters import LOG


def _record(step: int) -> dict[str, float]:
    losses = {f"train/{m}{p}": 1.0 / step for m in ("", "skip/", "forward/") for p in ("video", "action")}
    levels = {f"level/{p}/{x}": float(x) / step for p in ("video", "action") for x in ("0.05", "0.55", "0.95")}
    rest = {"samples_per_second": 10.0, "share/data": 0.02, "mfu": 0.3, "learning_rate": 1e-3, "learning_rate/new": 1e-3, "learning_rate/text": 1e-4, "grad_norm": 2.0, "grad_norm/new": 1.0}
    return {"step": step, **losses, **levels, **rest}


def _validation(step: int) -> dict[str, float]:
    names = ("val/skip/action", "val/forward/video", "val/action_mse/skip", "val/action_mse/hold", "val/action_mse/mean", "val/psnr/forward", "val/psnr/static")
    return {"step": step, **dict.fromkeys(names, 1.0)}


@pytest.mark.parametrize("records", [[*map(_record, range(1, 30)), _validation(10), _validation(20)], [_record(1)], [_validation(3)]], ids=["whole", "one record", "validation alone"])
def test_curves_are_drawn_from_whatever_there_is(tmp_path: Path, records: list[dict[str, float]]) -> None:
    (tmp_path / LOG).write_text("".join(json.dumps(r) + "\n" for r in records) + '{"step": 31, "cut of')
    draw_curves(tmp_path / LOG, tmp_path / CURVES)
    with Image.open(tmp_path / CURVES) as image:
        assert min(image.size) > 1000 and len(image.convert("RGB").resize((60, 60)).getcolors(10**4) or ()) > 20, "more than an empty page"


def test_a_log_without_losses_is_said_and_a_run_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / LOG).write_text('{"step": 1, "progress": 0.1}\n')
    with pytest.raises(ValueError, match="1 records and no losses"):
        draw_curves(tmp_path / LOG, tmp_path / CURVES)
    with caplog.at_level(logging.WARNING):
        draw_at_end(tmp_path)
        draw_at_end(tmp_path / "nothing")
    assert caplog.text.count(f"no {CURVES}:") == 2 and not (tmp_path / CURVES).exists()
