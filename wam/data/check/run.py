"""All checks in one table; a new one is a function from `Evidence` to findings, and a row here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from wam.config import Config
from wam.data.check import columns, metadata, pictures, timing
from wam.data.check.evidence import Evidence, gather
from wam.data.check.findings import LEVELS, Finding
from wam.data.lerobot import LeRobotDataset


@dataclass(frozen=True)
class Check:
    """A check: its name in findings, what it looks for in a line, and how."""

    name: str
    about: str
    run: Callable[[Evidence], list[Finding]]


CHECKS = (
    Check("files", "everything that is named can be read", lambda evidence: evidence.problems),
    Check("look", "cameras are the right way up and in order: a person must look", pictures.look),
    Check("pictures", "frames have the size they should, are not black and not frozen", pictures.pictures),
    Check("turned", "no episode is upside down or mirrored beside the rest", pictures.turned),
    Check("order", "cameras keep their names, and none is another's copy", pictures.order),
    Check("slices", "states and actions are as wide as the config's robot", columns.slices),
    Check("finite", "every number is one", columns.finite),
    Check("labels", "actions are not the state itself", columns.labels),
    Check("in_step", "pictures move when the state moves", timing.in_step),
    Check("ranges", "dimensions move, and none far outside the rest", columns.ranges),
    Check("clipping", "actions do not lie at their limits", columns.clipping),
    Check("gripper", "a switch and its state keep one polarity", columns.gripper),
    Check("quaternions", "rotations do not jump from q to -q", columns.quaternions),
    Check("language", "instructions say something", metadata.language),
    Check("rates", "timestamps, videos and checkpoint have the dataset's rate, and videos no frames that no row shows", timing.rates),
    Check("windows", "episodes hold a window", timing.windows),
    Check("statistics", "stored statistics are those of the data", metadata.statistics),
    Check("lora_base", "adapters belong to the backbone that is named", metadata.lora_base),
)


def check_dataset(root: Path, config: Config, episodes: int = 16, checkpoint: Path | None = None) -> tuple[Evidence | None, list[Finding]]:
    """What is looked at, and what is found, errors first.  A dataset that cannot be opened is one finding, and no evidence.

    Args:
        episodes: how many are looked at through every camera; rows are all read.
        checkpoint: a policy folder that training will go on from.

    Raises:
        FileNotFoundError: there is no dataset at all.
    """
    try:
        dataset = LeRobotDataset(root, config.data.language)
    except (ValueError, OSError) as error:
        if not (root / "meta/info.json").is_file():
            raise
        return None, [Finding("error", "files", str(root), str(error), "a dataset that training can open", "mend this first; nothing else was checked")]
    evidence = gather(dataset, config, episodes, checkpoint)
    findings = [finding for check in CHECKS for finding in check.run(evidence)]
    return evidence, sorted(findings, key=lambda finding: LEVELS.index(finding.level))
