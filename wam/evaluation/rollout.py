"""Closed-loop evaluation: one checkpoint, one environment, several modes, the same episodes for each.

    checks  ->  for each mode:  waves of `batch` episodes  ->  latency at batch 1  ->  rollout.json, videos/

What a reader needs to believe a success rate is in the file beside it: seeds, counts, intervals, versions, settings, and the hash of the
weights.  The file is written after every wave, so an interrupted run goes on; a file made with other weights or settings is never mixed
with this run's.  Latency is measured apart, one robot at a time, because that is what a robot would feel: a share of a batch is not.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import platform
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import wam
from wam.config import RolloutConfig, to_dict
from wam.data.views import Canvas
from wam.evaluation.environments import Floats, Frames, StepResult
from wam.evaluation.episodes import Driver, Episode, Watcher, generator_seed, imagine_outcome
from wam.evaluation.gl import choose_backend
from wam.evaluation.seeds import SPLITS, TEST
from wam.evaluation.seen import seen_through
from wam.evaluation.statistics import percentile, wilson
from wam.evaluation.vector import VectorEnv
from wam.files import write_json_atomic
from wam.inference.session import Plan, Session
from wam.pictures import beside, enlarge, strip, write_mp4, write_png
from wam.pretrained import Policy, from_pretrained, weights_sha256
from wam.relations import MODES, untrained_mode_warning
from wam.timeline import Kind

log = logging.getLogger(__name__)

RESULTS = "rollout.json"
FORMAT = "wam-rollout-1"
NEEDS_MORE = frozenset({"forward", "inverse"})  # modes that are asked about given actions or a given future
LATENCY_CHUNKS = 20  # measured at least, after each episode's first
LATENCY_EPISODES = 20  # driven at most for them
WATCHABLE_FPS = 20


def rollout(checkpoint: Path, config: RolloutConfig, output: Path) -> dict[str, Any]:
    """Drive episodes in every mode of `config`; go on where an earlier call was interrupted.

    Args:
        checkpoint: directory that `wam train` wrote.
        config: what to drive, and how.
        output: gets `rollout.json` and `videos/`.

    Returns:
        The contents of `rollout.json`.

    Raises:
        FileNotFoundError: no checkpoint there.
        ValueError: settings, environment and checkpoint do not fit, results of another run in `output`, or a plan that is not finite.
        EnvironmentCrash: a simulator failed, which says nothing about the policy.
        KeyboardInterrupt: Ctrl-C; finished waves are kept, and the message says so.
    """
    policy = from_pretrained(checkpoint, "cuda" if torch.cuda.is_available() else "cpu")
    check_settings(policy, config)
    path = Path(output) / RESULTS
    results = _open_results(path, _identity(Path(checkpoint), policy, config))
    todo = [mode for mode in config.modes if not _is_complete(results["modes"].get(mode), config)]
    if not todo:
        log.info("%s already holds these episodes, with the same weights and settings; nothing to do", path)
        return results
    results["finished"] = None
    try:
        with _open_environment(policy, config) as env:
            check_environment(policy, env)
            for mode in todo:
                _drive_mode(mode, policy, config, env, results, path)
    except KeyboardInterrupt:
        kept = sum(len(mode["episode_results"]) for mode in results["modes"].values())
        raise KeyboardInterrupt(f"interrupted; {kept} finished episodes are kept in {path}; the same command goes on from there") from None
    results["finished"] = _now()
    write_json_atomic(path, results)
    return results


def _drive_mode(mode: str, policy: Policy, config: RolloutConfig, env: VectorEnv, results: dict[str, Any], path: Path) -> None:
    """Drive what is missing of one mode, wave by wave, then measure its latency."""
    driver = Driver(policy, mode, policy.config.sampling.with_steps(config.steps), replan_of(policy, config), config.seed)
    done = [Episode(**entry) for entry in results["modes"].get(mode, {}).get("episode_results", [])]
    known = {episode.seed for episode in done}
    seeds = [seed for seed in range(config.seed, config.seed + config.episodes) if seed not in known]
    filmed = range(config.seed, config.seed + min(config.videos, config.episodes))
    with tqdm(total=config.episodes, initial=len(done), desc=mode, unit="episode", smoothing=0.1) as progress:
        for wave in (seeds[i : i + config.batch] for i in range(0, len(seeds), config.batch)):
            film = Film(driver, wave, [row for row, seed in enumerate(wave) if seed in filmed], env.control_hz)
            episodes = driver.drive(env, wave, [_Progress(progress), film])
            film.save(path.parent / "videos", episodes, strip_of=config.seed)
            done += episodes
            results["modes"][mode] = summarize(done)
            write_json_atomic(path, results)
    results["modes"][mode] |= measure_latency(driver, env, config.seed + config.episodes)
    write_json_atomic(path, results)
    r = results["modes"][mode]
    rate = f"{100 * r['wilson_low']:.1f}-{100 * r['wilson_high']:.1f} %"
    log.info("%s: %d/%d (%s), %s ms a plan (p50)", mode, r["successes"], r["episodes"], rate, "?" if r["latency_ms_p50"] is None else f"{r['latency_ms_p50']:.0f}")


class _Progress(Watcher):
    """Counts episodes as they end."""

    def __init__(self, bar: Any) -> None:
        self._bar = bar

    def ran(self, rows: Sequence[int], results: Sequence[StepResult]) -> None:
        self._bar.update(sum(result.done for result in results))


# ------------------------------------------------------------------------------------------------ checks


def replan_of(policy: Policy, config: RolloutConfig) -> int:
    """Control steps executed of each plan."""
    return policy.config.timeline.actions_per_block if config.replan is None else config.replan


def check_settings(policy: Policy, config: RolloutConfig) -> None:
    """Check what can be checked before a simulator is started; warn of what makes a result mean less.

    Raises:
        ValueError: an unknown mode, one that plans no actions or that the checkpoint's table leaks in, or a replan interval that does not fit the checkpoint's timeline.
    """
    for name in config.modes:
        mode = policy.model.relations.mode(name)
        if Kind.A not in mode.predicts or name in NEEDS_MORE:
            able = ", ".join(n for n, m in MODES.items() if Kind.A in m.predicts and n not in NEEDS_MORE)
            raise ValueError(f"mode {name!r} ({mode.about}) does not plan actions from what was observed, so it cannot drive; modes that can: {able}")
        warning = untrained_mode_warning(policy.config, name)
        if warning:
            log.warning("%s", warning)
    timeline, replan = policy.config.timeline, replan_of(policy, config)
    if not 1 <= replan <= timeline.actions_per_block:
        raise ValueError(f"rollout.replan is {replan}, but a plan of this checkpoint holds {timeline.actions_per_block} control steps; use 1..{timeline.actions_per_block}")
    if replan % timeline.stride:
        allowed = ", ".join(str(n) for n in range(timeline.stride, timeline.actions_per_block + 1, timeline.stride))
        raise ValueError(f"rollout.replan is {replan}, but frames come every {timeline.stride} control steps and a plan begins at a frame; use one of {allowed}")
    _warn_of_seeds(policy, config)


def _warn_of_seeds(policy: Policy, config: RolloutConfig) -> None:
    seeds = range(config.seed, config.seed + config.episodes)
    reused = sorted(set(seeds) & demonstration_seeds(policy))
    if reused:
        log.warning("%d of the %d seeds were demonstrations this checkpoint was trained on (first: %s); use --seed %d", len(reused), len(seeds), reused[:5], TEST.start)
    elif seeds[0] not in TEST or seeds[-1] not in TEST:
        overlapping = [name for name, split in SPLITS.items() if name != "test" and seeds[0] < split.stop and seeds[-1] >= split.start]
        overlap = f"overlap the {' and '.join(overlapping)} seeds" if overlapping else "lie outside every range"
        log.warning("seeds %d..%d %s; report results on test seeds, %d..%d", seeds[0], seeds[-1], overlap, TEST.start, TEST.stop - 1)


def demonstration_seeds(policy: Policy) -> set[int]:
    """Seeds of the episodes in the training data, as far as its datasets say."""
    source = policy.meta.get("source") or {}
    recorded = [(part.get("recorded") or {}).get("seeds") or {} for part in source.get("mixture") or [source]]
    return {int(seed) for seeds in recorded for task in seeds.values() for seed in task.get("accepted", [])}


def _open_environment(policy: Policy, config: RolloutConfig) -> VectorEnv:
    """The environment seen through the camera and at the size the policy was trained with."""
    camera = policy.config.data.cameras[0].rsplit(".", 1)[-1]
    rows = min(config.batch, config.episodes)
    canvas = Canvas.of(policy.config.data, policy.config.codec.image_size)
    env = VectorEnv(config.env, rows, config.workers, camera=camera, image_size=policy.config.codec.image_size[0], max_steps=config.max_steps)
    return seen_through(canvas, env)


def check_environment(policy: Policy, env: VectorEnv) -> None:
    """Check that an environment is the robot the policy was trained for.

    Raises:
        ValueError: sizes of states, actions or images, or control rates, that differ.
    """
    embodiment = policy.config.data.embodiment
    dims = next(e for e in policy.config.model.embodiments if e.name == embodiment)
    for what, theirs, ours in (("state", env.state_dim, dims.raw_state_dim), ("action", env.action_dim, dims.raw_action_dim)):
        if theirs != ours:
            raise ValueError(f"{env.name} has {theirs} {what} dimensions, but the checkpoint's embodiment {embodiment!r} has {ours}; use an environment of that robot")
    size = tuple(policy.config.codec.image_size)
    if size != (env.image_size, env.image_size):
        raise ValueError(f"{env.name} gives images of {env.image_size}x{env.image_size}, but the checkpoint's codec takes {size[0]}x{size[1]}; use a checkpoint trained at the camera's size")
    if env.control_hz != policy.control_hz:
        raise ValueError(f"{env.name} runs at {env.control_hz} control steps a second, but the checkpoint was trained at {policy.control_hz:g}; use an environment at that rate")
    tasks = policy.meta.get("tasks")
    if tasks and env.instruction not in tasks:
        log.warning("%s asks for %r, but the checkpoint was trained on: %s", env.name, env.instruction, "; ".join(sorted(tasks)))


# ------------------------------------------------------------------------------------------------ results


def _identity(checkpoint: Path, policy: Policy, config: RolloutConfig) -> dict[str, Any]:
    """What decides an episode's outcome; results that differ in any of it are never mixed.

    The number of episodes belongs to it, because it is to be chosen before results are seen.
    """
    last = config.seed + config.episodes - 1
    return {
        "env": config.env,
        "checkpoint_sha256": weights_sha256(checkpoint),
        "replan": replan_of(policy, config),
        "sampling": to_dict(policy.config.sampling.with_steps(config.steps)),
        "max_steps": config.max_steps,
        "seeds": {"first": config.seed, "last": last, "test": config.seed in TEST and last in TEST},
        "control_hz": policy.control_hz,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "gl_backend": choose_backend(),
        "versions": _versions(),
    }


def _versions() -> dict[str, str]:
    found = {"wam": wam.__version__, "python": platform.python_version()}
    for name in ("torch", "diffusers", "metaworld", "mujoco"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # simulators are optional
            continue
    return found


def _open_results(path: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """Earlier results of the same run, or an empty file's worth."""
    if not path.is_file():
        return {"format": FORMAT, **identity, "machine": platform.platform(), "started": _now(), "finished": None, "modes": {}}
    earlier: dict[str, Any] = json.loads(path.read_text())
    before, now = _flat(earlier), _flat(identity)
    differences = [f"{name} {before.get(name)!r}, now {value!r}" for name, value in now.items() if before.get(name) != value]
    if differences:
        raise ValueError(f"{path} holds results of another run ({'; '.join(differences)}); choose another --output, or delete it to start again")
    return earlier


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"sampling": {"steps": 2}}` to `{"sampling.steps": 2}`."""
    parts = (_flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value} for name, value in tree.items())
    return {name: value for part in parts for name, value in part.items()}


def _is_complete(mode: dict[str, Any] | None, config: RolloutConfig) -> bool:
    return mode is not None and mode["episodes"] == config.episodes and "latency_ms" in mode


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def summarize(episodes: Sequence[Episode]) -> dict[str, Any]:
    """Counts and interval of a mode's episodes, and the episodes themselves in the order of their seeds."""
    ordered = sorted(episodes, key=lambda episode: episode.seed)
    won = [episode for episode in ordered if episode.success]
    low, high = wilson(len(won), len(ordered))
    return {
        "successes": len(won),
        "episodes": len(ordered),
        "wilson_low": low,
        "wilson_high": high,
        "mean_length": float(np.mean([episode.length for episode in won])) if won else None,
        "interventions": sum(episode.interventions for episode in ordered),
        "episode_results": [asdict(episode) for episode in ordered],
    }


# ------------------------------------------------------------------------------------------------ latency


class _Stopwatch(Watcher):
    """Time of each plan but an episode's first, which has no history and meets cold caches."""

    def __init__(self) -> None:
        self.totals: list[float] = []
        self.stages: list[dict[str, float]] = []
        self._episode: Session | None = None

    def planned(self, session: Session, rows: Sequence[int], plan: Plan, sent: Floats, milliseconds: float) -> None:
        if session is self._episode:
            self.totals.append(milliseconds)
            self.stages.append(plan.timings)
        self._episode = session


def measure_latency(driver: Driver, env: VectorEnv, seed: int) -> dict[str, Any]:
    """From an observation to actions that may be sent, for one robot: median and 95th percentile, whole and by stage.

    Drives episodes from `seed` on, which are not scored, one at a time, until enough plans are measured.
    """
    watch = _Stopwatch()
    for episode in range(LATENCY_EPISODES):
        if len(watch.totals) >= LATENCY_CHUNKS:
            break
        driver.drive(env, [seed + episode], [watch])
    stages = sorted({stage for timings in watch.stages for stage in timings})

    def spread(values: list[float]) -> dict[str, float | None]:
        return {f"p{q}": percentile(values, q) if values else None for q in (50, 95)}

    whole = spread(watch.totals)
    return {
        "latency_ms_p50": whole["p50"],
        "latency_ms_p95": whole["p95"],
        "latency_ms": {stage: spread([timings.get(stage, 0.0) for timings in watch.stages]) for stage in stages},
        "latency_chunks": len(watch.totals),
        "latency_batch": 1,
    }


# ------------------------------------------------------------------------------------------------ videos


class Film(Watcher):
    """Real frames of some rows of a wave, and beside each what the model imagined for that moment when it planned.

    The first frame is left out: it was given.  Modes that plan actions alone are asked, aside, what they expect to follow from them, if
    the checkpoint was trained to answer; this costs nothing of the time that is measured and draws from no generator of the session.
    """

    def __init__(self, driver: Driver, seeds: Sequence[int], rows: Sequence[int], control_hz: float) -> None:
        self._driver, self._seeds = driver, seeds
        self._forward = driver.policy.config.training.modes.get("forward", 0) > 0
        self._rate = control_hz / driver.policy.config.timeline.stride  # frames a second, in the robot's time
        self._real: dict[int, list[Frames]] = {row: [] for row in rows}
        self._imagined: dict[int, list[Frames]] = {row: [] for row in rows}
        self._expected: dict[int, Frames] = {}

    def planned(self, session: Session, rows: Sequence[int], plan: Plan, sent: Floats, milliseconds: float) -> None:
        here = [i for i, row in enumerate(rows) if row in self._real]
        latents = None
        if here and plan.imagined is not None:
            latents = plan.imagined[here]
        elif here and self._forward:
            noise = [generator_seed(self._driver.noise_seed, self._seeds[rows[i]], session.block) for i in here]
            latents = imagine_outcome(session, here, sent[here], self._driver.solver, noise)
        self._expected = {}
        if latents is not None:
            decoded = self._driver.policy.codec.decode(latents, first=False).cpu().numpy()
            self._expected = {rows[i]: frames for i, frames in zip(here, decoded, strict=True)}

    def ran(self, rows: Sequence[int], results: Sequence[StepResult]) -> None:
        for row, result in zip(rows, results, strict=True):
            if row in self._real:
                self._real[row].append(result.frames)
            if row in self._expected:
                self._imagined[row].append(self._expected[row][: len(result.frames)])

    def clips(self, row: int) -> dict[str, Frames]:
        """`real` (F, H, W, 3), and `imagined` of the same moments where there is one."""
        clips = {"real": np.concatenate(self._real[row])}
        if self._imagined[row]:
            clips["imagined"] = np.concatenate(self._imagined[row])
        return clips

    def save(self, directory: Path, episodes: Sequence[Episode], strip_of: int) -> None:
        """Write `<mode>_<seed>.mp4` for each recorded row, and a still of the episode whose seed is `strip_of`."""
        mode = self._driver.mode
        for row in self._real:
            clips = self.clips(row)
            if len(clips["real"]) == 0:  # the episode ended before a frame was due
                continue
            episode, fps = episodes[row], max(1, round(min(WATCHABLE_FPS, self._rate)))
            title = f"{mode}   seed {episode.seed}   {fps / self._rate:.2g}x speed"
            write_mp4(titled(clips, title, episode.success, hold=fps), directory / f"{mode}_{episode.seed}.mp4", fps)
            if episode.seed == strip_of:
                write_png(strip(list(clips.values())), directory / f"{mode}_{episode.seed}.png")


_BAR, _BORDER, _GREEN, _RED = 22, 4, (40, 160, 70), (200, 60, 50)


def titled(clips: dict[str, Frames], title: str, success: bool, hold: int, factor: int = 4) -> Frames:
    """Clips (F, H, W, 3) enlarged side by side, names above and title below; the last frame stays for `hold` frames, marked with how it ended."""
    videos = beside([enlarge(clip, factor) for clip in clips.values()], _BORDER)
    width = videos.shape[2]
    names, below = (Image.new("RGB", (width, _BAR), "white") for _ in range(2))
    pen, font = ImageDraw.Draw(names), ImageFont.load_default(14)
    each = (width + _BORDER) // len(clips)
    for i, name in enumerate(clips):
        pen.text((i * each + each // 2, _BAR // 2), name, fill="black", font=font, anchor="mm")
    ImageDraw.Draw(below).text((6, _BAR // 2), title, fill="black", font=font, anchor="lm")
    ended = below.copy()
    colour, word = (_GREEN, "success") if success else (_RED, "failed")
    ImageDraw.Draw(ended).text((width - 6, _BAR // 2), word, fill=colour, font=font, anchor="rm")

    def framed(frames: Frames, bar: Image.Image) -> Frames:
        top, bottom = (np.broadcast_to(np.asarray(part), (len(frames), _BAR, width, 3)) for part in (names, bar))
        return np.concatenate([top, frames, bottom], axis=1)

    last = videos[-1:].copy()
    for edge in (np.s_[:, :_BORDER], np.s_[:, -_BORDER:], np.s_[:, :, :_BORDER], np.s_[:, :, -_BORDER:]):
        last[edge] = colour
    return np.concatenate([framed(videos, below), framed(last.repeat(hold, axis=0), ended)])
