"""Checkpoint and environment: a table of both where they differ."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
from tiny import tiny_config

from wam.cli import run_main
from wam.evaluation.fit import camera_settings, disagreement

POLICY: Any = SimpleNamespace(config=tiny_config(), control_hz=80.0, meta={"tasks": ["open it", "b", "c", "d"]})


def robot(**changes: Any) -> Any:
    """An environment that fits the policy, but for some changes."""
    config = POLICY.config
    dims = config.model.embodiments[0]
    own = dict(name="sim/one", cameras=(config.data.cameras[0].rsplit(".", 1)[-1],), image_size=tuple(config.codec.image_size), control_hz=80, instruction="open it")
    return SimpleNamespace(**{**own, "state_dim": dims.raw_state_dim, "action_dim": dims.raw_action_dim, **changes})


def test_what_fits_is_not_told() -> None:
    assert disagreement(POLICY, robot()) is None and disagreement(POLICY, robot(instruction="dance")) is None
    square = dataclasses.replace(POLICY.config, codec=dataclasses.replace(POLICY.config.codec, image_size=(32, 32)))
    assert disagreement(SimpleNamespace(config=square, control_hz=80.0, meta={}), robot(image_size=32)) is None


@pytest.mark.parametrize(
    ("changes", "row"),
    [
        ({"cameras": ("wrist",)}, "cameras | corner4 | wrist | <- differs"),
        ({"image_size": (96, 128)}, "picture of each | 32 x 48 | 96 x 128 | <- differs"),
        ({"state_dim": 2}, "state | 4 numbers | 2 numbers | <- differs"),
        ({"action_dim": 9}, "action | 4 numbers | 9 numbers | <- differs"),
        ({"control_hz": 10}, "control rate | 80 a second | 10 a second | <- differs"),
    ],
)
def test_what_differs_is_told_beside_all_else(changes: dict[str, Any], row: str) -> None:
    told = str(disagreement(POLICY, robot(**changes)))
    assert told.count("<- differs") == 1 and told.startswith("sim/one is not the robot"), told
    squeezed = " ".join(told.split())
    assert row in squeezed and "instruction | b; c; d; 1 more | open it" in squeezed, told
    assert len({line.index("|") for line in told.splitlines() if "|" in line}) == 1, "columns stand below one another"


def test_the_command_line_shows_the_table_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    told = str(disagreement(POLICY, robot(control_hz=10)))

    def refuse() -> None:
        raise ValueError(told)

    assert run_main(refuse) == 2 and told in capsys.readouterr().err


def test_what_is_drawn_for_a_policy() -> None:
    assert camera_settings(POLICY) == {"camera": "corner4", "image_size": tuple(POLICY.config.codec.image_size)}
    data = dataclasses.replace(POLICY.config.data, cameras=("a.image", "a.wrist"), layout="width")
    codec = dataclasses.replace(POLICY.config.codec, image_size=(32, 64))
    wide: Any = SimpleNamespace(config=SimpleNamespace(data=data, codec=codec))
    assert camera_settings(wide) == {"camera": ("image", "wrist"), "image_size": 32}
