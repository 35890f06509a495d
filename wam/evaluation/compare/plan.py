"""What will be trained and driven, counted before anything is computed.

    settings + shared config  ->  variants (a whole config each, steps from the budget)  ->  rows (what is driven)  ->  phases with estimates

Equal budgets are counted in floating-point operations (`wam.model.flops`): a variant that needs fewer tokens a window gets more updates.
Counted is what a variant *needs*, so `vla` does not pay for noisy video that nobody looks at; what the program computes all the same
(the network always carries those tokens) costs it minutes, and both are in the report.

Estimates of time rest on this machine's matmul rate and on what a control step takes elsewhere; once phases are done, theirs correct them.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from wam.config import Config, ConfigError, DisturbanceConfig, RolloutConfig, load_config
from wam.config_tree import require as _require
from wam.evaluation.compare.settings import CompareConfig, shared_config, variant_of
from wam.model.flops import training_flops
from wam.pretrained import CONFIG, META
from wam.relations import Reach, Relations, acting_modes
from wam.timeline import Clock, Kind, Layout, Parts, training_layout
from wam.training.objective import needed
from wam.training.rates import device_rate

Condition = Literal["calm", "disturbed"]
PhaseKind = Literal["collect", "train", "calibrate", "drive", "baselines", "latency", "imagine", "report"]

# For estimates alone: measured on two cores of an AMD EPYC with configs/metaworld_tiny.yaml.
UTILISATION = 0.4  # of the machine's matmul rate, in training
SECONDS_PER_CONTROL_STEP = 0.014  # simulated, drawn and planned for, two simulators side by side
STEPS_PER_EPISODE = {"calm": 150, "disturbed": 220}  # of 500 at most: some fail
SECONDS_PER_DEMONSTRATION, SECONDS_PER_CLIP_BLOCK, SECONDS_PER_LATENCY_PLAN, SECONDS_TO_BEGIN = 1.5, 0.12, 0.25, 8.0


@dataclass(frozen=True)
class StepCost:
    """Floating-point operations of one training step, forward and backward.

    Attributes:
        needed: of the tokens that are supervised, and of what those see.
        computed: of all that goes through the network.
    """

    needed: float
    computed: float


@dataclass(frozen=True)
class Variant:
    """What is trained, or was taken.

    Attributes:
        config: whole; a taken checkpoint's own.
        steps: updates; None where minutes decide.
        taken: the checkpoint that is not trained here.
        overrides: what differs from the shared config, as it was asked for.
    """

    name: str
    about: str
    config: Config
    modes: tuple[str, ...]
    cost: StepCost
    steps: int | None
    overrides: tuple[str, ...] = ()
    taken: Path | None = None

    @property
    def flops(self) -> float | None:
        """Of the whole training; None where minutes decide."""
        return None if self.steps is None else self.steps * self.cost.needed


@dataclass(frozen=True)
class Row:
    """What is driven: a variant in a mode, under the shared rollout or under one of its own.

    Attributes:
        rollout: without disturbances; of this mode alone.
        extra: it is driven apart, because its closed loop is another.
    """

    name: str
    variant: str
    mode: str
    about: str
    rollout: RolloutConfig
    extra: bool = False


@dataclass(frozen=True)
class Phase:
    """A part of the work that is kept when it is done.

    Attributes:
        what: for people.
        seconds: estimated.
        of: the variant that is trained or driven, or the row that is driven by itself.
        condition: that is driven in.
    """

    name: str
    kind: PhaseKind
    what: str
    seconds: float
    of: str = ""
    condition: Condition = "calm"


@dataclass(frozen=True)
class Plan:
    """Everything that will be done; see the module's docstring."""

    settings: CompareConfig
    config: Config
    variants: tuple[Variant, ...]
    rows: tuple[Row, ...]
    phases: tuple[Phase, ...]

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """With disturbances as well, where there are any."""
        return ("calm", "disturbed") if self.settings.disturbances.kinds else ("calm",)

    @property
    def reference(self) -> Row:
        """The row that every other is tested against."""
        return next(row for row in self.rows if row.name == self.settings.reference)

    def variant(self, name: str) -> Variant:
        """The variant called `name`."""
        return next(v for v in self.variants if v.name == name)

    def rollout(self, row: Row, condition: Condition) -> RolloutConfig:
        """What `wam.evaluation.rollout` is asked for."""
        return replace(row.rollout, disturbances=self.settings.disturbances if condition == "disturbed" else DisturbanceConfig())


def make_plan(path: Path, settings: CompareConfig, overrides: Sequence[str], taken: Mapping[str, Path], rate: float) -> Plan:
    """Work out what will be done.

    Args:
        path: the comparison's file; the shared config lies beside it.
        overrides: on the shared config.
        taken: checkpoints by variant, that are not trained.
        rate: this machine's matmul rate, FLOP a second.

    Raises:
        FileNotFoundError, ConfigError: a file that is not there, an unknown key, variant, mode or row, or sizes that do not fit.
    """
    config = shared_config(path, settings, overrides)
    variants: list[Variant] = []
    for name in dict.fromkeys((*settings.variants, *taken)):
        budget = next((v.flops for v in variants[:1]), None)
        variants.append(_taken(settings, name, taken[name]) if name in taken else _trained(path, settings, overrides, name, budget))
    rows = [
        Row(f"{v.name}/{mode}", v.name, mode, Relations.of(v.config).mode(mode).about, replace(config.rollout, modes=(mode,))) for v in variants for mode in v.modes
    ] + [_extra(path, settings, overrides, name, variants) for name in settings.extras]
    names = [row.name for row in rows]
    _require(settings.reference in names, f"compare.reference is {settings.reference!r}", f"name one of the rows {', '.join(names)}")
    plan = Plan(settings, config, tuple(variants), tuple(rows), ())
    return replace(plan, phases=tuple(_phases(plan, rate)))


# ------------------------------------------------------------------------------------------------ variants and rows


def _trained(path: Path, settings: CompareConfig, overrides: Sequence[str], name: str, budget: float | None) -> Variant:
    """A variant that is trained here; `budget` is what the first one spends, None for the first itself."""
    asked, b = variant_of(settings, name), settings.budget
    own = [*overrides, *asked.overrides]
    if b.equal == "minutes":
        own += [f"training.max_minutes={b.minutes}", "training.steps=1000000"]
        config = shared_config(path, settings, own)
        return _checked(Variant(name, asked.about, config, asked.modes, training_cost(config), None, asked.overrides))
    cost = training_cost(shared_config(path, settings, own))
    steps = b.steps if b.equal == "steps" or budget is None else max(1, round(budget / cost.needed))
    config = shared_config(path, settings, [*own, "training.max_minutes=null", f"training.steps={steps}"])
    return _checked(Variant(name, asked.about, config, asked.modes, cost, steps, asked.overrides))


def _taken(settings: CompareConfig, name: str, folder: Path) -> Variant:
    """A variant whose checkpoint is there already; it is driven in the table's modes, or in those it was trained for."""
    for file in (CONFIG, META):
        if not (folder / file).is_file():
            raise FileNotFoundError(f"--checkpoint {name}={folder}: there is no {folder / file}; name a folder that `wam train` wrote (RUN/checkpoint)")
    config = load_config(folder / CONFIG)
    try:
        asked = variant_of(settings, name)
        modes, about = asked.modes, asked.about
    except ConfigError:
        modes, about = acting_modes(config), "A checkpoint that was named on the command line."
    step = json.loads((folder / META).read_text()).get("step")
    return _checked(Variant(name, about, config, modes, training_cost(config), int(step) if step is not None else None, taken=folder))


def _checked(variant: Variant) -> Variant:
    """Refuse a mode that is unknown or leaks in the variant's table, before anything is trained."""
    relations = Relations.of(variant.config)
    for mode in (*variant.config.training.modes, *variant.modes):
        relations.mode(mode)
    return variant


def _extra(path: Path, settings: CompareConfig, overrides: Sequence[str], name: str, variants: Sequence[Variant]) -> Row:
    asked = settings.extras[name]
    known = [v.name for v in variants]
    taken = [f"{v.name}{mode}" for v in variants for mode in ("", *(f"/{m}" for m in v.modes))]
    _require(name not in taken, f"compare.extras.{name} has the name of a variant or of another row", "choose another, e.g. all/adaptive")
    _require(asked.variant in known, f"compare.extras.{name}.variant is {asked.variant!r}", f"use one of {', '.join(known)}")
    for override in asked.overrides:
        _require(override.startswith("rollout."), f"compare.extras.{name}.overrides has {override!r}", "a row changes rollout.key=value and nothing else")
    config = shared_config(path, settings, [*overrides, *asked.overrides])
    return Row(name, asked.variant, asked.mode, asked.about, replace(config.rollout, modes=(asked.mode,)), extra=True)


# ------------------------------------------------------------------------------------------------ what training costs


def training_cost(config: Config) -> StepCost:
    """Operations of a training step, in the mean over the modes that are drawn; one instruction a batch."""
    m, t = config.model, config.training
    rows, columns = (size // config.codec.patch // patch for size, patch in zip(config.codec.image_size, m.patch[1:], strict=True))
    clock = Clock(config.timeline, (rows, columns), m.positions, config.codec.views)
    relations, reach = Relations.of(config), Reach.of(config.timeline)
    modes = [relations.mode(name) for name in t.modes]
    computed = needed(training_layout(clock, config.timeline.blocks, Parts(m.goal_image, t.predict_first_frame, m.state == "token")), modes, reach)
    idle = frozenset({Kind.V, Kind.A}) - frozenset(kind for mode in modes for kind in (*mode.predicts, *mode.live))
    useful = Layout(tuple(s for s in computed.segments if s.kind not in idle))
    total = sum(t.modes.values())

    def mean(layout: Layout) -> float:
        by_mode, instruction = training_flops(config, layout, modes, reach)
        return t.batch_size * sum(weight / total * by_mode[name] for name, weight in t.modes.items()) + instruction

    return StepCost(mean(useful), mean(computed))


# ------------------------------------------------------------------------------------------------ phases


def _phases(plan: Plan, rate: float) -> list[Phase]:
    r, demonstrated, c = plan.config.rollout, plan.config.collect, plan.settings.calibrate
    demonstrations = len(demonstrated.tasks) * demonstrated.episodes_per_task
    collected = Phase("collect", "collect", f"{demonstrations} demonstrations of {', '.join(demonstrated.tasks)}", demonstrations * SECONDS_PER_DEMONSTRATION)
    phases = [collected] if plan.settings.collect else []
    phases += [_training(v, plan.settings.budget.minutes, rate) for v in plan.variants if v.taken is None]
    checked = [v for v in plan.variants if any(row.variant == v.name and row.rollout.check.source != "none" for row in plan.rows)]
    phases += [Phase(f"calibrate {v.name}", "calibrate", f"{c.clips} held-out clips: what a surprise is", SECONDS_TO_BEGIN + c.clips * c.blocks * SECONDS_PER_CLIP_BLOCK, v.name) for v in checked]
    for condition in plan.conditions:
        each = r.episodes * STEPS_PER_EPISODE[condition] * min(1.0, r.max_steps / 500) * SECONDS_PER_CONTROL_STEP
        for v in plan.variants:
            what = f"{len(v.modes)} x {r.episodes} episodes: {', '.join(v.modes)}"
            phases.append(Phase(f"drive {v.name} {condition}", "drive", what, SECONDS_TO_BEGIN + len(v.modes) * each, v.name, condition))
        phases += [Phase(f"drive {row.name} {condition}", "drive", f"{r.episodes} episodes", SECONDS_TO_BEGIN + each, row.name, condition) for row in plan.rows if row.extra]
    phases.append(Phase("baselines", "baselines", f"4 x {r.episodes} episodes without a model", 4 * r.episodes * 0.4))
    timed = len(plan.rows) * plan.settings.latency_plans
    phases.append(Phase("latency", "latency", f"{timed} plans, one robot at a time, rows in turns", SECONDS_TO_BEGIN + timed * SECONDS_PER_LATENCY_PLAN))
    i = plan.config.imagine
    clips = len(imagining(plan.rows)) * i.clips * i.blocks
    phases.append(Phase("imagine", "imagine", f"{i.clips} held-out clips, {len(imagining(plan.rows))} rows that imagine", SECONDS_TO_BEGIN + clips * SECONDS_PER_CLIP_BLOCK))
    return [*phases, Phase("report", "report", "tests, figures, page", 5.0)]


def _training(variant: Variant, minutes: float, rate: float) -> Phase:
    if variant.steps is None:
        return Phase(f"train {variant.name}", "train", f"{minutes:g} minutes", SECONDS_TO_BEGIN + 60 * minutes, variant.name)
    seconds = SECONDS_TO_BEGIN + variant.steps * variant.cost.computed / (UTILISATION * rate)
    what = f"{variant.steps} updates x {variant.cost.needed / 1e9:.3g} GFLOP = {(variant.flops or 0) / 1e12:.3g} TFLOP"
    return Phase(f"train {variant.name}", "train", what, seconds, variant.name)


def imagining(rows: Sequence[Row]) -> list[Row]:
    """The rows whose plans hold imagined video; of a closed loop of its own, none: its imagination is its mode's."""
    return [row for row in rows if row.mode in ("joint", "joint_mutual", "imagine") and not row.extra]


def describe(plan: Plan) -> str:
    """The plan as text: what is trained, what is driven, how long it may take."""
    r = plan.config.rollout
    lines = [f"Where should prediction live?  {len(plan.variants)} variants, {len(plan.rows)} rows, {r.episodes} episodes each from seed {r.seed} of {r.env}", ""]
    width = max(len(p.name) for p in plan.phases)
    lines += [f"{p.name:<{width}}  {duration(p.seconds):>9}  {p.what}" for p in plan.phases]
    episodes = len(plan.rows) * len(plan.conditions) * r.episodes
    lines += ["", f"{'in all':<{width}}  {duration(sum(p.seconds for p in plan.phases)):>9}  {episodes} episodes; estimated; what is done already is not taken off"]
    for v in plan.variants:
        lines.append(f"{v.name}: {f'taken from {v.taken}' if v.taken else ' '.join(v.overrides) or 'the shared config as it is'}")
    disturbed = f"{', '.join(plan.settings.disturbances.kinds)} (strength {plan.settings.disturbances.strength:g})" if plan.settings.disturbances.kinds else "none"
    return "\n".join([*lines, f"disturbances: {disturbed}", f"tested against: {plan.settings.reference}"])


def duration(seconds: float) -> str:
    """`1 h 05 min`, `12 min`, `40 s`."""
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min" if seconds >= 90 else f"{round(seconds)} s"


def machine_rate() -> float:
    """FLOP a second that this machine's matrix products reach, measured in a moment.

    Of a CPU on one thread, times the threads that are used: on a busy machine two threads that wait for each other would be measured a thousand times too slow.
    """
    device, threads = torch.device("cuda" if torch.cuda.is_available() else "cpu"), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            rates = [device_rate(device, torch.float32, Path(folder) / f"rate_{i}.json").measured for i in range(3)]
    finally:
        torch.set_num_threads(threads)
    return max(rates) * (threads if device.type == "cpu" else 1)
