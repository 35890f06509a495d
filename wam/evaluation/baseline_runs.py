"""`wam baselines`: rows beside a policy's, in one file, whoever drives them.

    ENV, seeds  ->  expert, hold_still, random | replay of a dataset | LeRobot's policies, loaded or trained  ->  baselines.json

The file is written after every row and says what decides an outcome, so an interrupted call goes on with the rows that are missing, and
rows of other seeds, settings or simulators are never mixed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import wam
from wam.evaluation.baselines import REPLAY, run_baselines
from wam.evaluation.environments import off_benchmark, package_versions
from wam.evaluation.lerobot_policies import run_lerobot, train_lerobot
from wam.files import write_json_atomic

FORMAT, RESULTS = "wam-baselines-1", "baselines.json"


@dataclass(frozen=True)
class BaselineRun:
    """What is driven.

    Attributes:
        names: of the built-in baselines; empty for none, None for all that the environment can play.
        replay: dataset whose episodes are replayed.
        policies: folders of LeRobot's policies.
        train: kinds of LeRobot's policies that are trained on `dataset` first, for `train_steps`, into the output.
        lerobot_python: an interpreter with LeRobot; default: this one.
        train_options: further arguments of `lerobot-train`.
    """

    env: str
    episodes: int = 50
    seed: int = 20000
    max_steps: int = 500
    workers: int = 2
    names: tuple[str, ...] | None = None
    replay: Path | None = None
    policies: tuple[Path, ...] = ()
    train: tuple[str, ...] = ()
    dataset: Path | None = None
    train_steps: int = 2000
    batch_size: int = 8
    lerobot_python: Path | None = None
    device: str = "cpu"
    train_options: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.train and (self.dataset is None or self.lerobot_python is None):
            raise ValueError("training a LeRobot policy needs --dataset and --lerobot-python")
        if min(self.episodes, self.max_steps, self.workers, self.train_steps, self.batch_size) < 1:
            raise ValueError("episodes, max_steps, workers, train_steps and batch_size must be at least 1")


def run(config: BaselineRun, output: Path) -> dict[str, Any]:
    """Drive all rows that `output/baselines.json` does not hold yet; returns its contents.

    Raises:
        ValueError: the file holds rows of other episodes or another simulator.
        Others as `run_baselines`, `run_lerobot` and `train_lerobot`.
    """
    path = output / RESULTS
    results = _open(path, config)
    rows: dict[str, Any] = results["baselines"]

    def keep(new: dict[str, Any]) -> None:
        rows.update(new)
        write_json_atomic(path, results)

    if config.names != ():
        names: Sequence[str] | None = config.names
        if names is None and not results.get("built_in"):
            keep(run_baselines(config.env, config.episodes, config.seed, config.workers, config.max_steps))
            results["built_in"] = True  # those that this environment can play
        elif names is not None and (missing := [name for name in names if name not in rows]):
            keep(run_baselines(config.env, config.episodes, config.seed, config.workers, config.max_steps, missing))
    if config.replay is not None and REPLAY not in rows:
        keep(run_baselines(config.env, config.episodes, config.seed, config.workers, config.max_steps, [REPLAY], config.replay))
    for folder in config.policies:
        name = f"lerobot/{folder.resolve()}"
        if name not in rows:
            (row,) = _lerobot(config, folder).values()
            keep({name: row})
    for kind in config.train:
        if kind not in rows:
            (row,) = _lerobot(config, _trained(config, kind, output)).values()
            told = {"dataset": str(config.dataset), "steps": config.train_steps, "batch_size": config.batch_size, "options": list(config.train_options)}
            keep({kind: {**row, "training": told}})
    results["finished"] = datetime.now(UTC).isoformat(timespec="seconds")
    write_json_atomic(path, results)
    return results


def _trained(config: BaselineRun, kind: str, output: Path) -> Path:
    """The policy of a kind: trained by an earlier call, or now."""
    assert config.dataset is not None and config.lerobot_python is not None
    made = output / f"lerobot_{kind}"
    folder = made / "checkpoints" / "last" / "pretrained_model"
    if folder.is_dir():
        steps = json.loads((folder / "train_config.json").read_text()).get("steps")
        if steps != config.train_steps:
            raise ValueError(f"{made} holds a policy trained for {steps} steps, and {config.train_steps} are asked for; delete it, or choose another --output")
        return folder
    return train_lerobot(config.lerobot_python, kind, config.dataset, made, config.train_steps, config.batch_size, config.device, config.train_options)


def _lerobot(config: BaselineRun, folder: Path) -> dict[str, Any]:
    return run_lerobot(config.env, folder, config.episodes, config.seed, config.lerobot_python, config.workers, config.max_steps, device=config.device)


def _open(path: Path, config: BaselineRun) -> dict[str, Any]:
    identity = {
        "format": FORMAT,
        "env": config.env,
        "episodes": config.episodes,
        "seed": config.seed,
        "max_steps": config.max_steps,
        "versions": {"wam": wam.__version__, **package_versions(config.env)},
    }
    if not path.is_file():
        return {**identity, "differs_from_benchmark": off_benchmark(config.env, config.seed, config.episodes, config.max_steps), "finished": None, "baselines": {}}
    earlier: dict[str, Any] = json.loads(path.read_text())
    other = [f"{key} {earlier.get(key)!r}, now {value!r}" for key, value in identity.items() if earlier.get(key) != value]
    if other:
        raise ValueError(f"{path} holds other episodes ({'; '.join(other)}); choose another --output, or delete it to start again")
    return earlier


def table(results: dict[str, Any]) -> str:
    """Rows for people: successes / episodes with their interval, largest rewards, crashes."""
    lines = [f"{results['env']}, seeds {results['seed']}..{results['seed'] + results['episodes'] - 1}, at most {results['max_steps']} steps"]
    for name, row in results["baselines"].items():
        interval = f"{100 * row['wilson_low']:.1f}-{100 * row['wilson_high']:.1f} %"
        reward = "" if row["mean_max_reward"] is None else f"   max reward {row['mean_max_reward']:.3f}"
        crashed = f"   {row['crashed']} crashed" if row["crashed"] else ""
        lines.append(f"  {name if '/' not in name else '/'.join(name.split('/')[-4:]):24s} {row['successes']:4d}/{row['episodes']:<4d} {interval:>14s}{reward}{crashed}")
    if results["differs_from_benchmark"]:
        lines.append(f"note: {results['differs_from_benchmark']}")
    return "\n".join(lines)
