"""Tests import their shared helpers by name, and compute on one thread: tiny tensors gain nothing from two, and busy machines stay usable."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)
