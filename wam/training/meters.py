"""What a run says while it works: a progress bar for people, JSON lines for tools, TensorBoard for curves."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from wam.files import writing

LOG = "log.jsonl"


class Meters:
    """Smooths what the bar shows, and writes every record."""

    def __init__(self, output: Path, total: int, start: int):
        output.mkdir(parents=True, exist_ok=True)
        self.path = output / LOG
        _keep_until(self.path, start)
        self.bar = tqdm(total=total, initial=start, desc="train", unit="step", dynamic_ncols=True, mininterval=1.0 if sys.stderr.isatty() else 15.0)
        self.board = _tensorboard(output / "tensorboard", start)
        self.shown: dict[str, float] = {}
        self.mark = (time.perf_counter(), start)

    def step(self, losses: dict[str, float]) -> None:
        """Advance the bar by one step."""
        for name, value in losses.items():
            self.shown[name] = value if name not in self.shown else 0.95 * self.shown[name] + 0.05 * value
        self.bar.set_postfix({k: f"{v:.4f}" for k, v in self.shown.items()}, refresh=False)
        self.bar.update(1)

    def rate(self, step: int, batch: int) -> float:
        """Samples per second since the last call."""
        now, (then, before) = time.perf_counter(), self.mark
        self.mark = (now, step)
        return (step - before) * batch / max(now - then, 1e-9)

    def record(self, step: int, values: dict[str, Any]) -> None:
        """Write one record at `step`: JSON line and TensorBoard scalars."""
        with writing(self.path), self.path.open("a") as log:
            log.write(json.dumps({"step": step, **values}) + "\n")
        if self.board is not None:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)

    def close(self) -> None:
        """Close the bar and the event file."""
        self.bar.close()
        if self.board is not None:
            self.board.close()


def _keep_until(path: Path, step: int) -> None:
    """Drop records after `step`: a resumed run writes them again."""
    if path.exists():
        kept = [line for line in path.read_text().splitlines() if line.endswith("}") and json.loads(line)["step"] <= step]
        path.write_text("".join(f"{line}\n" for line in kept))


def _tensorboard(directory: Path, start: int) -> Any:
    """A TensorBoard writer, or None where the `train` extra is not installed (the JSON lines hold the same)."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(directory), purge_step=start if start else None)
