"""Tests import their shared helpers by name, and compute on one thread: tiny tensors gain nothing from two, and busy machines stay usable."""

import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def without_curves() -> None:
    """A run ends with a picture of its curves, which takes longer than a tiny run itself: test_curves.py draws it, and test_training.py once at the end of a run."""
    if loop := sys.modules.get("wam.training.loop"):  # imported by the tests that train, and by no others
        loop.draw_at_end = lambda output: None  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def interrupts_are_as_they_were() -> Iterator[None]:
    """A test that leaves a handler of Ctrl-C behind would make another one wait for an interrupt that never comes."""
    before = signal.getsignal(signal.SIGINT)
    yield
    assert signal.getsignal(signal.SIGINT) is before, f"SIGINT goes to {signal.getsignal(signal.SIGINT)} now, and went to {before}"
