"""LeRobot's side of `wam bench data`: its own dataset class over the same windows, in an interpreter of another environment.

A script that needs lerobot and numpy and nothing of this project, started as `PYTHON lerobot_side.py REQUEST.json`.  The request says
where the dataset is, which windows (`delta_timestamps`) of which rows make a batch, and how many threads to use.  It answers in lines
of JSON: first what it is and what its first window holds, then, to every line {"workers": N, "least": S} that it is sent, how long its
rounds over all batches took.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

REMEDY = "install it there: PYTHON -m pip install lerobot==0.4.4 (Python 3.10 or 3.11), and the libraries of FFmpeg 4 or newer for torchcodec"


def say(answer: dict[str, Any], stream: Any) -> None:
    """One line of JSON."""
    stream.write(json.dumps(answer) + "\n")
    stream.flush()


def open_dataset(request: dict[str, Any]) -> Any:
    """LeRobot's dataset with windows, on one thread."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    import torch
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    torch.set_num_threads(request["threads"])
    return LeRobotDataset("bench/data", root=request["root"], delta_timestamps=request["delta_timestamps"])


def first_window(dataset: Any, request: dict[str, Any]) -> dict[str, Any]:
    """The first window of the first batch: the mean of each frame in 0..255 by camera, its actions, and how long a window is."""
    item = dataset[request["batches"][0][0]]
    means = {camera: (255 * item[camera].float().mean(dim=(1, 2, 3))).tolist() for camera in request["cameras"]}
    return {"means": means, "action": item[request["action"]].tolist(), "state": item[request["state"]].tolist()}


def versions() -> dict[str, str]:
    """Of what speed depends on."""
    found = {"python": sys.version.split()[0]}
    for name in ("lerobot", "torch", "torchcodec", "av", "datasets"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    return found


def forget_files() -> None:
    """Close what this process has open: workers that are forked with it would share its place in every file, and read garbage."""
    from lerobot.datasets import video_utils

    cache = getattr(video_utils, "_default_decoder_cache", None)
    if cache is not None:
        cache.clear()


def rounds(loader: Any, least: float) -> dict[str, Any]:
    """Wall and process seconds of whole rounds over the loader: one, and more until `least` seconds are gone."""
    wall, cpu, count = time.perf_counter(), time.process_time(), 0
    while count == 0 or time.perf_counter() - wall < least:
        for _ in loader:
            pass
        count += 1
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu, "rounds": count}


def serve(dataset: Any, request: dict[str, Any], orders: Iterator[str], stream: Any) -> None:
    """Answer orders until there are no more."""
    import torch

    loaders: dict[int, Any] = {}
    for line in orders:
        order = json.loads(line)
        workers = order["workers"]
        if workers not in loaders:
            forget_files()
            loaders[workers] = torch.utils.data.DataLoader(dataset, batch_sampler=request["batches"], num_workers=workers, persistent_workers=workers > 0)
            rounds(loaders[workers], 0)  # starts the workers, opens the files
        say(rounds(loaders[workers], order["least"]), stream)


def main() -> None:
    """Run."""
    stream, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer
    request = json.loads(Path(sys.argv[1]).read_text())
    try:
        dataset = open_dataset(request)
        say({"versions": versions(), **first_window(dataset, request)}, stream)
    except ImportError as error:
        say({"error": f"lerobot cannot be used by {sys.executable} ({error}); {REMEDY}"}, stream)
        return
    except Exception as error:  # whatever LeRobot raises is told on the other side, in one line
        say({"error": f"LeRobot cannot read {request['root']} ({type(error).__name__}: {' '.join(str(error).split())[:300]}); {REMEDY}"}, stream)
        return
    serve(dataset, request, sys.stdin, stream)


if __name__ == "__main__":
    main()
