"""The whole job on one task: collect, train, drive, imagine, report.

    runs/demo/dataset      demonstrations           runs/demo/rollout    closed loop: rollout.json, videos
    runs/demo/train        run, checkpoint          runs/demo/imagine    imagined video: imagine.json, videos
    runs/demo/results.json every figure             runs/demo/report.html

Each phase keeps what it finished, so an interrupted demo goes on when it is run again; the seconds of every attempt are added up in
`wall_seconds`.  Memory is measured over all processes of the run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
import sys
import threading
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from wam.config import Config, to_dict
from wam.files import write_json_atomic
from wam.relations import get_mode

DEFAULT_TASK = "drawer-open-v3"
RESULTS, STATE = "results.json", "demo_state.json"
PACKAGES = ("wam", "torch", "diffusers", "transformers", "metaworld", "mujoco", "gymnasium", "decord", "av", "numpy")


def demo(config: Config, task: str = DEFAULT_TASK, output: Path | None = None) -> Path:
    """Run every phase for one Meta-World task; returns the report's path.

    Args:
        output: run directory; default `runs/demo`, or `runs/demo-<task>` for another task than the default.

    Raises:
        ValueError: an unknown task (before anything is computed), or an output directory of a run with other settings.
    """
    from wam.evaluation.baselines import run_baselines
    from wam.evaluation.collect import collect
    from wam.evaluation.environments import make_env
    from wam.evaluation.imagination import imagine
    from wam.evaluation.report import write_report
    from wam.evaluation.rollout import rollout
    from wam.training.loop import train

    env = f"metaworld/{task}"
    _check_phases_fit(config)
    make_env(env, camera=config.collect.camera).close()  # an unknown task, or a machine that cannot render, shows before anything is written
    output = output or Path("runs") / ("demo" if task == DEFAULT_TASK else f"demo-{task}")
    config = _for_task(config, task, output)
    checkpoint = output / "train" / "checkpoint"
    with _Watch(output) as watch:
        with watch.phase("collect"):
            collect(config.collect, Path(config.data.root))
        with watch.phase("train"):
            train(config, output / "train")
        with watch.phase("rollout"):
            r = config.rollout
            driven = rollout(checkpoint, r, output / "rollout")
            baselines = run_baselines(env, r.episodes, r.seed, r.workers, r.max_steps, replay=Path(config.data.root))
        with watch.phase("imagine"):
            imagined = imagine(checkpoint, config.imagine, output / "imagine")
        results = {
            "task": task,
            "modes": {mode: _without(figures, "episode_results") for mode, figures in driven["modes"].items()},
            "baselines": {name: _without(row, "episode_results") for name, row in baselines.items()},
            "imagination": {mode: _without(figures, "per_clip") for mode, figures in imagined["modes"].items()},
            "versions": versions(),
            "machine": machine(),
            "commands": [" ".join(["wam", *sys.argv[1:]])],
            "config": to_dict(config),
        }
        with watch.phase("report"):
            write_json_atomic(output / RESULTS, {**watch.figures(), **results})
            report = write_report(output)
    write_json_atomic(output / RESULTS, {**watch.figures(), **results})
    return report


def _check_phases_fit(config: Config) -> None:
    """What a later phase would refuse, after the time that the earlier ones took."""
    for mode in (*config.training.modes, *config.rollout.modes):
        get_mode(mode)
    recorded, height_width = f"observation.images.{config.collect.camera}", config.codec.image_size
    if config.data.cameras != (recorded,):
        raise ValueError(f"data.cameras is {list(config.data.cameras)}, but collect.camera {config.collect.camera!r} records {recorded}; set data.cameras=[{recorded}]")
    if height_width[0] != height_width[1]:
        raise ValueError(f"codec.image_size is {list(height_width)}, but the simulator's images are square; use e.g. [{height_width[0]}, {height_width[0]}]")


def _for_task(config: Config, task: str, output: Path) -> Config:
    """The same config, pointed at a task: nothing else depends on which one it is."""
    return dataclasses.replace(
        config,
        output=str(output),
        collect=dataclasses.replace(config.collect, tasks=(task,)),
        data=dataclasses.replace(config.data, root=str(output / "dataset")),
        rollout=dataclasses.replace(config.rollout, env=f"metaworld/{task}"),
    )


class _Watch:
    """Seconds of each phase and the peak memory of all processes, added up over attempts."""

    def __init__(self, output: Path):
        self.path = output / STATE
        self.seconds: dict[str, float] = {}
        self.peak_bytes = 0
        if self.path.is_file():
            state = json.loads(self.path.read_text())
            self.seconds, self.peak_bytes = state["seconds"], state["peak_bytes"]
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> _Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._save()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a phase; what an interrupted one took is kept."""
        begun = time.monotonic()
        print(f"== {name}", file=sys.stderr, flush=True)
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - begun
            self._save()

    def figures(self) -> dict[str, Any]:
        """`wall_seconds` per phase and in all, and `peak_memory_gb`."""
        wall = {name: round(value, 1) for name, value in self.seconds.items()}
        return {"wall_seconds": {**wall, "total": round(sum(self.seconds.values()), 1)}, "peak_memory_gb": round(self.peak_bytes / 1e9, 2)}

    def _save(self) -> None:
        write_json_atomic(self.path, {"seconds": self.seconds, "peak_bytes": self.peak_bytes})

    def _sample(self) -> None:
        while not self._stop.wait(0.5):
            self.peak_bytes = max(self.peak_bytes, memory_of_tree(os.getpid()))


def memory_of_tree(root: int) -> int:
    """Bytes of a process and its descendants on Linux, shared pages counted once (PSS); 0 where /proc does not tell."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError):
            parents[int(entry.parent.name)] = int(entry.read_text().rsplit(")", 1)[1].split()[1])
    tree = {root}
    while grown := {pid for pid, parent in parents.items() if parent in tree} - tree:
        tree |= grown
    total = 0
    for pid in tree:
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    return total


def _without(figures: dict[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in figures.items() if key not in names}


def versions() -> dict[str, str]:
    """Of Python and of the packages that figures depend on, as far as they are installed."""
    return {"python": platform.python_version(), **{name: v for name in PACKAGES if (v := _version(name))}}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    memory = None
    with contextlib.suppress(OSError, ValueError, AttributeError):
        memory = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    return {"cpu": cpu, "cores": os.cpu_count(), "memory_gb": memory, "system": f"{platform.system()} {platform.release()}"}
