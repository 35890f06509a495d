"""A recording of a server, planned again by another checkpoint: what would it have done, where the robot was?

    recorded                         observation   observation   observation ...     frames from the dataset, states, what was executed
    memory, as the server's           told the same, in the same steps
    this checkpoint                   plan          plan          plan                same mode, steps and seed, unless others are asked for
    compared with                     what was planned then, and, step by step, with what was executed after it
    and                               the gate's verdict on both, and how long it took

The robot stays where it was: from the second plan on, what is observed is what came of the recorded actions.  Nothing is exact, not even
the same checkpoint, for a video is not what the camera saw.  So the same checkpoint's error is what others are to be read against.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from wam.data.lerobot import LeRobotDataset
from wam.data.recording import EXECUTED
from wam.data.video import VideoDecoder
from wam.figures import INK, new_figure
from wam.inference.batch import Think, run
from wam.inference.gate import MAX_HISTORY, Gate, GateRefusal
from wam.inference.memory import PolicySpan, StepMemory
from wam.inference.session import Session
from wam.pretrained import Policy
from wam.serving.contract import Contract
from wam.serving.served import FOLDER, Served, read_served, robot_facts

PASSED = "passed"
LATENCY = (50, 95)
CURVES = 4  # dimensions at most in the picture


@dataclass(frozen=True)
class Again:
    """One plan, made again; arrays (n, d) from the observation's step on, as far as both go.

    Attributes:
        step: control step of the episode.
        then, now: what was planned when it was recorded (before the gate), and what is planned now.
        done: what was executed in these steps; NaN where nobody knows.
        verdict_then, verdict_now: passed, or the rule by which it was cut or refused.
        blocks: that the memory held, then and now; where they differ, the recording begins later than the robot's memory did.
        took_ms: then and now.
    """

    step: int
    then: np.ndarray
    now: np.ndarray
    done: np.ndarray
    verdict_then: str
    verdict_now: str
    blocks: tuple[int, int]
    took_ms: tuple[float, float]


@dataclass(frozen=True)
class Episode:
    """A recorded episode, planned again."""

    name: str
    prompt: str
    rows: int
    executed: np.ndarray
    plans: tuple[Again, ...]


@dataclass(frozen=True)
class Replay:
    """A recording, planned again; `unread`: episodes that the dataset does not hold (yet)."""

    episodes: tuple[Episode, ...]
    names: tuple[str, ...]
    unread: int = 0
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def plans(self) -> list[Again]:
        """Of all episodes."""
        return [plan for episode in self.episodes for plan in episode.plans]


# ------------------------------------------------------------------------------------------------ planning again


def replay(root: Path, policy: Policy, contract: Contract, gate: Gate, mode: str | None = None, steps: int | None = None, most: int | None = None) -> Replay:
    """Plan again what a recording holds.

    Args:
        mode, steps: instead of the recorded ones.
        most: episodes, the newest.

    Raises:
        FileNotFoundError: there are no plans in the recording.
        ValueError: the checkpoint is of another robot (a table of both), a damaged recording, or a mode that it does not act in.
    """
    paths = sorted((root / FOLDER).glob("[!.]*.npz"))
    if not paths:
        raise FileNotFoundError(f"{root / FOLDER} holds no plans; give a directory that `wam serve --record` wrote")
    served = {path.stem: read_served(path) for path in paths[-most if most else 0 :]}
    for name, one in served.items():
        _fits(name, one, contract)
    if mode is not None and mode not in contract.modes:
        raise ValueError(f"--mode is {mode!r}; this checkpoint acts in {', '.join(contract.modes)}")
    dataset = LeRobotDataset(root) if (root / "meta/info.json").is_file() else None
    known = [] if dataset is None else list(((dataset.info.get("wam") or {}).get("recording") or {}).get("episodes", ()))
    decoder, episodes, unread = VideoDecoder(), [], 0
    for name, one in served.items():
        if one.told["rows"] and name not in known:
            unread += 1
            continue
        frames, executed = _rows(dataset, known.index(name), decoder) if dataset is not None and one.told["rows"] else (None, np.zeros((0, contract.robot.raw_action_dim), np.float32))
        episodes.append(Episode(name, one.told["prompt"], one.told["rows"], executed, tuple(_again(one, frames, executed, policy, contract, gate, mode, steps))))
    return Replay(tuple(episodes), _names(contract), unread, {"mode": mode, "steps": steps})


def _fits(name: str, served: Served, contract: Contract) -> None:
    theirs, ours = served.told["robot"], robot_facts(contract)
    if all(theirs.get(key) == value for key, value in ours.items()):
        return
    table = [("what", "recording", "checkpoint", "")] + [(key, str(theirs.get(key)), value, "" if theirs.get(key) == value else "<- differs") for key, value in ours.items()]
    widths = [max(len(row[i]) for row in table) for i in range(3)]
    lines = "\n".join("    " + " | ".join(cell.ljust(width) for cell, width in zip(row, [*widths, 0], strict=True)).rstrip(" |") for row in table)
    raise ValueError(f"episode {name} was recorded of another robot than the checkpoint was trained for:\n{lines}\nuse a checkpoint of that robot")


def _rows(dataset: LeRobotDataset, index: int, decoder: VideoDecoder) -> tuple[np.ndarray, np.ndarray]:
    """Frames (rows, H, W, 3) and executed actions (rows, d) of an episode."""
    (camera,) = [key for key, feature in dataset.features.items() if feature.dtype == "video"]
    episode = dataset.episodes[index]
    span = episode.videos[camera]
    return decoder.read_frames(span.path, span.first_frame + np.arange(episode.length)), dataset.read(index, EXECUTED)


def _again(served: Served, frames: np.ndarray | None, executed: np.ndarray, policy: Policy, contract: Contract, gate: Gate, mode: str | None, steps: int | None) -> Iterator[Again]:
    """The plans of an episode, made again one after another, as the server told its session."""
    told, memory = served.told, StepMemory(PolicySpan.of(policy))
    session: Session | None = None
    opened: tuple[int, int | None] | None = None
    pictures = sorted([(at, frames[int(row)]) for row, at in served.seen if frames is not None] + list(zip(served.tail_at.tolist(), served.tail, strict=True)), key=lambda pair: pair[0])
    states = {int(row[0]): row[1:].astype(np.float32) for row in served.states}
    shown, now = 0, 0
    for number, observation in enumerate(told["observations"]):
        before, now = now, int(observation["step"])
        while shown < len(pictures) and pictures[shown][0] <= now + 0.5:
            memory.frames.append(pictures[shown])
            shown += 1
        if now in states:
            memory.states.append((float(now), states[now]))
        memory.executed.update({step: executed[step] for step in range(before, min(now, len(executed)))})
        memory.now = now
        memory.forget()
        for index, plan in enumerate(told["plans"]):
            if plan["at"] != number or not memory.frames:
                continue
            asked = plan["seed"], plan["goal"]
            if session is None or asked != opened:
                goal = None if plan["goal"] is None else served.goals[plan["goal"]][None]
                session, memory.head, opened = Session(policy, [told["prompt"]], contract.robot.name, [plan["seed"]], goal), None, asked
            yield _one(served, index, plan, now, executed, memory, session, policy, gate, mode or plan["mode"], steps or plan["steps"])


def _one(served: Served, index: int, told: Mapping[str, Any], now: int, executed: np.ndarray, memory: StepMemory, session: Session, policy: Policy, gate: Gate, mode: str, steps: int) -> Again:
    committed = served.made[index, : told["committed"]] if told["committed"] else None
    begun = time.perf_counter()
    calls, _ = memory.calls(session)
    plan = run([session], [[*calls, Think(mode, policy.config.sampling.with_steps(steps), None if committed is None else committed[None])]])[0]
    took = 1e3 * (time.perf_counter() - begun)
    memory.head = memory.now
    assert plan is not None and plan.actions is not None
    made = plan.actions[0]
    if committed is not None:
        made[: len(committed)] = committed
    count = min(len(made), told["length"])
    done = np.full((count, made.shape[1]), np.nan, np.float32)
    followed = executed[now : now + count]
    done[: len(followed)] = followed
    sent = executed[max(0, now - MAX_HISTORY) : now]
    then = PASSED if told["plan"]["cut"] is None else told["plan"]["cut"]["reason"]
    return Again(now, served.made[index, :count], made[:count], done, then, _verdict(gate, made, sent), (told["plan"]["memory_blocks"], session.block), (told["policy_timing"]["infer_ms"], took))


def _verdict(gate: Gate, made: np.ndarray, sent: np.ndarray) -> str:
    try:
        passed = gate(made, sent if len(sent) else None)
    except GateRefusal as refusal:
        return refusal.cut.reason
    return PASSED if passed.cut is None else passed.cut.reason


def _names(contract: Contract) -> tuple[str, ...]:
    return tuple(f"{g.name}_{i}" for g in contract.robot.action_groups for i in range(g.size)) or tuple(f"action_{i}" for i in range(contract.robot.raw_action_dim))


# ------------------------------------------------------------------------------------------------ what is told


def numbers(replayed: Replay) -> dict[str, Any]:
    """All of it, for JSON: root mean square differences by dimension and by step of a plan, verdicts, times.

    Raises:
        ValueError: there is nothing to compare.
    """
    plans = replayed.plans
    if not plans:
        raise ValueError("no plan of the recording could be made again: it holds none, or its episodes are not assembled yet (stop the server, or start it again with --record)")
    most = max(len(plan.now) for plan in plans)
    out: dict[str, Any] = {"episodes": len(replayed.episodes), "plans": len(plans), "unread_episodes": replayed.unread, "dimensions": list(replayed.names), **replayed.about}
    for what, pairs in (("planned_then", [(p.now, p.then) for p in plans]), ("executed", [(p.now, p.done) for p in plans]), ("then_against_executed", [(p.then, p.done) for p in plans])):
        apart = np.full((len(plans), most, len(replayed.names)), np.nan)
        for row, (a, b) in enumerate(pairs):
            apart[row, : len(a)] = a - b
        out[what] = {"by_dimension": _rms(apart, (0, 1)), "by_step": _rms(apart, (0, 2)), "all": _rms(apart, None), "steps": int(np.isfinite(apart).all(axis=2).sum())}
    out["gate"] = {"then": dict(Counter(p.verdict_then for p in plans)), "now": dict(Counter(p.verdict_now for p in plans))}
    out["latency_ms"] = {name: {f"p{q}": float(np.percentile([p.took_ms[i] for p in plans], q)) for q in LATENCY} for i, name in enumerate(("then", "now"))}
    out["other_memory"] = sum(p.blocks[0] != p.blocks[1] for p in plans)
    return out


def _rms(apart: np.ndarray, axes: tuple[int, ...] | None) -> Any:
    """Root mean square over axes, None where nothing is known."""
    known = np.isfinite(apart)
    count, total = known.sum(axis=axes), np.square(np.where(known, apart, 0.0)).sum(axis=axes)
    values = np.sqrt(np.divide(total, count, out=np.full(np.shape(total), np.nan), where=count > 0))
    return [None if np.isnan(v) else float(v) for v in values] if np.ndim(values) else None if np.isnan(values) else float(values)


def table(told: Mapping[str, Any]) -> str:
    """For people."""
    lines = [f"{told['plans']} plans of {told['episodes']} episodes, made again" + (f" ({told['unread_episodes']} episodes are not assembled yet)" if told["unread_episodes"] else "")]
    lines.append(f"{'root mean square difference':<28} {'now - then':>12} {'now - executed':>16} {'then - executed':>16}")
    columns = [told[name] for name in ("planned_then", "executed", "then_against_executed")]
    last = len(columns[0]["by_step"]) - 1
    rows = [(name, [column["by_dimension"][i] for column in columns]) for i, name in enumerate(told["dimensions"])]
    rows += [(f"action {step} of a plan", [column["by_step"][step] for column in columns]) for step in sorted({0, last // 4, last // 2, last})]
    rows.append(("all", [column["all"] for column in columns]))
    lines += [f"  {name:<26} " + " ".join(_cell(value, width) for value, width in zip(values, (12, 16, 16), strict=True)) for name, values in rows]
    lines.append("gate, then: " + _counts(told["gate"]["then"]) + "; now: " + _counts(told["gate"]["now"]))
    lines.append("plan, ms:   " + "; ".join(f"{when}: " + ", ".join(f"{name} {value:.1f}" for name, value in times.items()) for when, times in told["latency_ms"].items()))
    if told["other_memory"]:
        lines.append(f"{told['other_memory']} plans are from a memory of another length than then: this checkpoint's blocks are longer or shorter, or the recording lacks what the robot's memory held")
    return "\n".join(lines)


def _cell(value: float | None, width: int) -> str:
    return f"{'-' if value is None else f'{value:.4f}':>{width}}"


def _counts(verdicts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(verdicts.items()))


def draw(replayed: Replay, path: Path) -> None:
    """Curves of the episode with most plans: what was executed, and over it every plan, as it was then and as it is now."""
    episode = max(replayed.episodes, key=lambda e: len(e.plans))
    spread = np.concatenate([plan.now - plan.then for plan in episode.plans]).std(axis=0)
    shown: Sequence[int] = sorted(np.argsort(-spread)[:CURVES].tolist())
    with new_figure(path, 9.6, 1.6 * len(shown) + 0.9) as figure:
        axes = figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
        for axis, dimension in zip(axes, shown, strict=True):
            axis.plot(np.arange(len(episode.executed)), episode.executed[:, dimension], color=INK, linewidth=1.4, label="executed")
            for i, plan in enumerate(episode.plans):
                at = plan.step + np.arange(len(plan.now))
                axis.plot(at, plan.then[:, dimension], color="#56b4e9", linewidth=1.0, label="planned then" if i == 0 else None)
                axis.plot(at, plan.now[:, dimension], color="#d55e00", linewidth=1.0, linestyle=(0, (3, 2)), label="planned now" if i == 0 else None)
            axis.set_ylabel(replayed.names[dimension], fontsize=8)
        axes[0].legend(loc="lower left", bbox_to_anchor=(0, 1.02), ncols=3, fontsize=8, frameon=False)
        axes[-1].set_xlabel(f"control steps of episode {episode.name}: {episode.prompt}")
