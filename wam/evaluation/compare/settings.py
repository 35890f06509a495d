"""What a comparison is: the file `wam compare` reads, and the variants it knows.

    config: metaworld_tiny.yaml            what every variant shares (beside this file)
    overrides: [rollout.episodes=50]       changed for all of them
    budget: {equal: flops, steps: 400}     what each may spend on training
    variants: [all, vla, ...]              rows of VARIANTS, below, or of `more`

A variant is a few overrides on the shared config and nothing else, so what it changes can be read in one table, and is worked out again
from the configs that were really trained for the report.  All else is the same: data, order of windows, sizes, memory, solver, seeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from wam.config import Config, ConfigError, DisturbanceConfig, from_dict, load_config
from wam.config_check import CalibrateConfig
from wam.config_tree import read_yaml
from wam.config_tree import require as _require

SECTION = "compare."  # of an override that is the comparison's own


@dataclass(frozen=True)
class BudgetConfig:
    """What each variant may spend on training."""

    equal: Literal["flops", "steps", "minutes"] = "flops"  # the same floating-point operations, updates, or minutes by the clock
    steps: int = 400  # flops: of the first variant, whose operations the others may spend too; steps: of each
    minutes: float = 7.0  # minutes: of each

    def __post_init__(self) -> None:
        _require(self.steps >= 1, f"budget.steps is {self.steps}", "it must be at least 1")
        _require(self.minutes > 0, f"budget.minutes is {self.minutes}", "it must be above 0")


@dataclass(frozen=True)
class VariantConfig:
    """One answer to where prediction lives."""

    modes: tuple[str, ...]  # it is driven in
    overrides: tuple[str, ...] = ()  # on the shared config
    about: str = ""

    def __post_init__(self) -> None:
        _require(len(self.modes) > 0, "a variant has no modes", "name at least one that drives, e.g. [skip]")


@dataclass(frozen=True)
class ExtraConfig:
    """One more row: a variant's mode in another closed loop, such as with a check or with several candidates."""

    variant: str
    mode: str
    overrides: tuple[str, ...]  # of `rollout`, e.g. rollout.planner.kind=best_of_n
    about: str = ""


@dataclass(frozen=True)
class CompareConfig:
    """A comparison; keys of the shared config are in the file that `config` names."""

    config: str = "metaworld_tiny.yaml"  # from the folder of the comparison's file
    overrides: tuple[str, ...] = ()
    budget: BudgetConfig = BudgetConfig()
    variants: tuple[str, ...] = ("all", "vla", "fast_wam", "dreamzero", "imagine")
    more: dict[str, VariantConfig] = field(default_factory=dict)  # variants of one's own, by name
    reference: str = "all/skip"  # the row that every other is tested against
    disturbances: DisturbanceConfig = DisturbanceConfig()  # of the second half of the episodes; without kinds there is no second half
    extras: dict[str, ExtraConfig] = field(default_factory=dict)  # more rows, by name
    calibrate: CalibrateConfig = CalibrateConfig()  # errors of imagination that a check measures surprise in; of variants whose extras check
    latency_plans: int = 20  # plans of each row that are timed
    collect: bool = True  # demonstrations are collected into the output; else data.root is a dataset that is there

    def __post_init__(self) -> None:
        _require(len(self.variants) > 0, "compare.variants is empty", "name at least one")
        _require(len(set(self.variants)) == len(self.variants), f"compare.variants is {list(self.variants)}", "name each once")
        _require(self.latency_plans >= 1, f"compare.latency_plans is {self.latency_plans}", "it must be at least 1")


VARIANTS: dict[str, VariantConfig] = {
    "all": VariantConfig(("skip", "joint", "joint_mutual", "imagine"), (), "Wherever one likes: several modes in one set of weights, chosen plan by plan."),
    "vla": VariantConfig(
        ("action_only",),
        ("training.modes={action_only: 1}", "training.video_weight=0"),
        "Nowhere: actions from what was observed, and no future video even in training (pi0 and other vision-language-action models).",
    ),
    "fast_wam": VariantConfig(
        ("skip",),
        ("training.modes={skip: 1}", "noise.video.at_one=0"),
        "In training only: future video is predicted beside the actions as a training signal, and left out when the robot acts (Fast-WAM).",
    ),
    "dreamzero": VariantConfig(
        ("joint_mutual",),
        ("training.modes={joint_mutual: 1}", "noise.coupled=1", "noise.video.at_one=0"),
        "Beside the actions: video and actions are denoised together at every step, each seeing the other (DreamZero).",
    ),
    "imagine": VariantConfig(
        ("imagine",),
        ("training.modes={imagine: 1}", "noise.video.at_one=0"),
        "Before the actions: the video is imagined first, then the actions that lead there are read off it (inverse dynamics: Fast-WAM-IDM, LingBot-VA).",
    ),
}
QUICK = (  # `--quick`: everything once, in small; the numbers mean nothing
    "compare.budget.steps=40",
    "compare.budget.minutes=0.5",
    "compare.latency_plans=5",
    "compare.calibrate.clips=6",
    "compare.calibrate.blocks=4",
    "collect.episodes_per_task=20",
    "training.validate_every=20",
    "training.save_every=20",
    "training.log_every=10",
    "training.validation_batches=1",
    "training.validation_samples=4",
    "rollout.episodes=4",
    "rollout.batch=4",
    "rollout.videos=1",
    "rollout.max_steps=200",
    "imagine.clips=4",
    "imagine.blocks=4",
)


def load_compare(path: Path, overrides: Sequence[str] = ()) -> tuple[CompareConfig, list[str]]:
    """Read a comparison's file; overrides with `compare.` are its own, the others are for the shared config.

    Returns:
        The comparison, and all overrides of the shared config: the file's, then those given.

    Raises:
        FileNotFoundError, ConfigError: as `wam.config.load_config`.
    """
    if not path.is_file():
        near = ", ".join(sorted(str(p) for p in path.parent.glob("compare*.yaml"))) or "none"
        raise FileNotFoundError(f"no comparison {path}; there: {near}")
    tree: dict[str, Any] = read_yaml(path.read_text(encoding="utf-8"), str(path)) or {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} holds a {type(tree).__name__}; expected the keys of a comparison, such as config, budget, variants (configs/compare_tiny.yaml)")
    own = [o.removeprefix(SECTION) for o in overrides if o.startswith(SECTION)]
    for override in own:
        _lay(tree, override)
    settings = from_dict(CompareConfig, tree)
    return settings, [*settings.overrides, *(o for o in overrides if not o.startswith(SECTION))]


def _lay(tree: dict[str, Any], override: str) -> None:
    """Lay one `key.key=value` over a tree."""
    key, equals, value = override.partition("=")
    _require(bool(equals), f"override {SECTION}{override} has no '='", "write compare.key=value, e.g. compare.budget.steps=200")
    *parents, last = key.split(".")
    node = tree
    for name in parents:
        node[name] = node.get(name) or {}
        _require(isinstance(node[name], dict), f"override {SECTION}{override}: {name} is {node[name]!r}, not a section", "give it as a whole")
        node = node[name]
    node[last] = read_yaml(value, f"override {SECTION}{override}: the value")


def shared_config(path: Path, settings: CompareConfig, overrides: Sequence[str]) -> Config:
    """What every variant is laid over.

    Raises:
        FileNotFoundError, ConfigError: as `wam.config.load_config`.
    """
    return load_config(path.parent / settings.config, overrides)


def variant_of(settings: CompareConfig, name: str) -> VariantConfig:
    """The variant called `name`: one's own before those of the table.

    Raises:
        ConfigError: naming those there are.
    """
    known = {**VARIANTS, **settings.more}
    _require(name in known, f"compare.variants names {name!r}", f"use one of {', '.join(known)}, or describe it under more")
    return known[name]
