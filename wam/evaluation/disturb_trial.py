"""Can it be recovered from, and what does it look like?  Disturbances met by Meta-World's scripted expert, and a picture of each kind.

    python -m wam.evaluation.disturb_trial metaworld/push-v3 metaworld/pick-place-v3 --kinds object_moved,arm_pushed --episodes 10
    python -m wam.evaluation.disturb_trial --picture disturbances.png

A disturbance that not even the expert recovers from, which knows where everything is, tests nothing.  The same seeds are driven without
any first, so that what an episode would have been is known.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from wam.config_disturbances import DISTURBANCES, DisturbanceConfig
from wam.evaluation.disturbances import KINDS, NO_FRAME, extra_delay
from wam.evaluation.environments import make_env
from wam.evaluation.recovery import recovery, recovery_table
from wam.figures import KIND_COLORS, new_figure
from wam.timeline import Kind as Token

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PHYSICAL = ("object_moved", "gripper_opened", "arm_pushed")
PICTURED = "metaworld/drawer-open-v3"
WHOLE = ("camera_shifted", "light_changed", "occlusion")  # seen in the whole picture; the others in its middle
MIDDLE = (slice(36, 156), slice(96, 216))  # of 240 x 240
GRASPED = "metaworld/basketball-v3"  # where fingers close
MOMENTS = (-4, 0, 4, 12, 40)  # control steps from the event, one picture each


def drive_expert(name: str, seeds: Sequence[int], disturbances: DisturbanceConfig, max_steps: int = 500) -> list[dict[str, Any]]:
    """Episodes of the scripted expert, as `wam.evaluation.recovery` takes them; nothing is drawn.

    Raises:
        ValueError: the environment has no expert, or cannot meet a kind.
    """
    env: Any = make_env(name, disturbances=disturbances, max_steps=max_steps, image_size=32)
    if not hasattr(env, "expert_action"):
        raise ValueError(f"{name} has no scripted expert; use a task of metaworld/")
    results = []
    for seed in seeds:
        events, length, done, success = list(env.reset(seed).events), 0, False, False
        while not done:
            ran = env.run(env.expert_action()[None], NO_FRAME)
            events += ran.events
            length, done, success = length + len(ran.states), ran.done, bool(ran.success.any())
        results.append({"seed": seed, "success": success, "length": length, "events": [dataclasses.asdict(event) for event in events]})
    env.close()
    return results


def trial(names: Sequence[str], kinds: Sequence[str], seeds: Sequence[int], strength: float = 1.0) -> dict[str, dict[str, Any]]:
    """Name -> kind -> what `recovery` says of the expert, against the same seeds without disturbances."""
    report: dict[str, dict[str, Any]] = {}
    for name in names:
        hz = make_env(name, image_size=32).control_hz
        without = drive_expert(name, seeds, DisturbanceConfig())
        report[name] = {kind: recovery(drive_expert(name, seeds, DisturbanceConfig((kind,), strength)), hz, without) for kind in kinds}
    return report


# ------------------------------------------------------------------------------------------------ what it looks like


def film(kind: str, name: str, seed: int = 0) -> tuple[list[np.ndarray], np.ndarray, Any]:
    """Pictures of one episode at `MOMENTS`, the first number of the state measured and true (n, 2), and the event.

    Raises:
        ValueError: nothing happened.
    """
    env: Any = make_env(name, disturbances=DisturbanceConfig((kind,), begins=(0.05, 0.05)), image_size=240)
    first = env.reset(seed)
    frames, states, events = [first.frames[0]], [(first.state[0], env.state()[0])], list(first.events)
    while len(frames) < 200 and not (events and len(frames) > events[0].step + MOMENTS[-1] + 1):
        ran = env.run(env.expert_action()[None], 1)
        frames.append(ran.frames[0])
        states.append((ran.states[0, 0], env.state()[0]))
        events += ran.events
        if ran.done:
            break
    if not events:
        raise ValueError(f"{kind} did not begin in {name}, seed {seed}; use another seed")
    # what is seen right after step `event.step` is frame `event.step + 1`
    chosen = [frames[min(max(events[0].step + 1 + moment, 0), len(frames) - 1)] for moment in MOMENTS]
    return chosen, np.asarray(states), events[0]


def draw_kinds(path: Path) -> None:
    """One row a kind: pictures where something can be seen, else what is measured, delayed or said; with 256 colours, which keeps the file small."""
    with new_figure(path, 6.4, 1.1 * len(KINDS)) as figure:
        grid = figure.subplots(len(KINDS), len(MOMENTS) + 1, gridspec_kw={"width_ratios": [1.2] + [1] * len(MOMENTS)})
        for row, kind in zip(grid, KINDS, strict=True):
            pictures, states, event = film(kind, GRASPED if kind == "gripper_opened" else PICTURED)
            for axes in row:
                axes.set_axis_off()
            row[0].text(0, 0.9, kind.replace("_", " "), weight="bold", va="top", transform=row[0].transAxes)
            row[0].text(0, 0.7, f"{event.size:.2g} {event.unit}\nat control step {event.step}", va="top", fontsize=7.5, transform=row[0].transAxes)
            wide = row[1].get_gridspec()[list(KINDS).index(kind), 1:]
            if kind in ("state_noise", "latency", "paraphrase"):
                _draw_unseen(figure.add_subplot(wide), kind, states, event)
                continue
            for axes, picture, moment in zip(row[1:], pictures, MOMENTS, strict=True):
                axes.imshow(picture if kind in WHOLE else picture[MIDDLE])
                axes.set_title(f"{moment:+d}" if moment else "at once", fontsize=7, pad=2)
    Image.open(path).convert("RGB").quantize(256).save(path, optimize=True)


def _draw_unseen(axes: Axes, kind: str, states: np.ndarray, event: Any) -> None:
    """Disturbances that no picture shows."""
    axes.tick_params(labelsize=6.5)
    if kind == "state_noise":
        axes.plot(states[:, 0], color=KIND_COLORS[Token.S], lw=1, label="gripper x as measured, m")
        axes.plot(states[:, 1], color="#24292f", lw=1, label="as it is")
        axes.legend(fontsize=6.5, loc="upper right", ncols=2)
    elif kind == "latency":
        config = DisturbanceConfig((kind,), begins=(0.05, 0.05))
        steps = np.arange(60)
        axes.step(steps, [extra_delay(config, 0, 80, 500)(int(step)) for step in steps], where="post", color=KIND_COLORS[Token.A])
        axes.set_ylabel("steps later", fontsize=6.5)
        axes.set_xlabel("control step at which a plan is asked for", fontsize=6.5)
    else:
        axes.set_axis_off()
        env: Any = make_env(PICTURED, disturbances=DisturbanceConfig((kind,)), image_size=32)
        said = dict.fromkeys(str(env.reset(seed).instruction) for seed in range(20))
        for line, words in enumerate(list(said)[:3]):
            axes.text(0, 0.8 - 0.32 * line, f"“{env.env.instruction}”  →  “{words}”", va="center", fontsize=8, transform=axes.transAxes)


# ------------------------------------------------------------------------------------------------ by hand


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m wam.evaluation.disturb_trial", description="The scripted expert under disturbances, or a picture of each kind."
    )
    parser.add_argument("env", nargs="*", help="e.g. metaworld/push-v3")
    parser.add_argument("--kinds", default=",".join(PHYSICAL), help=f"of {', '.join(DISTURBANCES)}")
    parser.add_argument("--episodes", type=int, default=10)
    parser.add_argument("--seed", type=int, default=20000)
    parser.add_argument("--strength", type=float, default=1.0)
    parser.add_argument("--picture", type=Path, help="draw every kind into this file instead")
    asked = parser.parse_args(arguments)
    if asked.picture:
        draw_kinds(asked.picture)
        return
    if not asked.env:
        parser.error("name at least one environment, or --picture FILE")
    report = trial(asked.env, asked.kinds.split(","), range(asked.seed, asked.seed + asked.episodes), asked.strength)
    for name, kinds in report.items():
        for kind, result in kinds.items():
            print(f"{name}, {kind}\n{recovery_table(result)}\n")


if __name__ == "__main__":
    main()
