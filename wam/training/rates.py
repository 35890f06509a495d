"""How fast the machine could be: its matmul rate, measured in a moment at a run's start, and the published one of well-known GPUs.

The share of it that a run reaches (MFU, model FLOP utilisation: Chowdhery et al. 2022, PaLM, section 4.1) says how much is left to gain.
Against the measured rate it says how well *this* machine is used; against the published one it compares with numbers elsewhere.
"""

from __future__ import annotations

import json
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from wam.files import write_json_atomic

PUBLISHED = {  # FLOP a second of dense bfloat16 products, from NVIDIA's data sheets; the first name that a device's name holds is its
    "B300": 2.5e15,
    "GB200": 2.5e15,
    "B200": 2.25e15,
    "GH200": 9.89e14,
    "H200": 9.89e14,
    "H100 PCIe": 7.56e14,
    "H100 NVL": 8.35e14,
    "H100": 9.89e14,
    "H800": 9.89e14,
    "H20": 1.48e14,
    "A100": 3.12e14,
    "A800": 3.12e14,
    "L40S": 3.62e14,
    "L40": 1.81e14,
    "L4": 1.21e14,
    "A10": 1.25e14,
    "RTX 4090": 1.65e14,
    "RTX 3090": 7.1e13,
}
SLOW = 0.5  # seconds that one product may be expected to take


@dataclass(frozen=True)
class Rate:
    """FLOP a second of one device.

    Attributes:
        device, dtype, threads: what was measured; threads of a CPU, 0 of a GPU.
        measured: best of a few products of two square matrices.
        published: the data sheet's, where the device is known and computes in bfloat16.
    """

    device: str
    dtype: str
    threads: int
    measured: float
    published: float | None = None


def device_rate(device: torch.device, dtype: torch.dtype, path: Path) -> Rate:
    """The rate of `device` in `dtype`: read from `path` where the same device was measured before, else measured (about 0.2 s) and kept there."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    threads = 0 if device.type == "cuda" else torch.get_num_threads()
    known = _read(path)
    if known is not None and (known.device, known.dtype, known.threads) == (name, str(dtype), threads):
        return known
    published = published_rate(name) if dtype == torch.bfloat16 else None
    rate = Rate(name, str(dtype), threads, _measure(device, dtype), published)
    write_json_atomic(path, asdict(rate))
    return rate


def published_rate(name: str) -> float | None:
    """Of a GPU by the name that CUDA gives it, e.g. `NVIDIA H100 80GB HBM3`; None where the table has none."""
    words = name.replace("-", " ").split()
    for known, rate in PUBLISHED.items():
        wanted = known.split()
        if all(word in words for word in wanted):
            return rate
    return None


def _read(path: Path) -> Rate | None:
    try:
        return Rate(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None  # not there, or of another version: it is measured again


def _measure(device: torch.device, dtype: torch.dtype, repeats: int = 5) -> float:
    """The best of some products; where a small one is slow already (16 bits on a CPU without instructions for them), that is the answer."""
    small, large = (2048, 8192) if device.type == "cuda" else (128, 1024)
    rate = _best_product(device, dtype, small, 2)
    return rate if 2 * large**3 / rate > SLOW else max(rate, _best_product(device, dtype, large, repeats))


def _best_product(device: torch.device, dtype: torch.dtype, size: int, repeats: int) -> float:
    generator = torch.Generator(device).manual_seed(0)  # torch's global stream is the run's
    a, b = (torch.randn(size, size, generator=generator, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(repeats + 1):
        _wait(device)
        begun = time.perf_counter()
        torch.mm(a, b)
        _wait(device)
        best = min(best, time.perf_counter() - begun)
    return 2 * size**3 / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
