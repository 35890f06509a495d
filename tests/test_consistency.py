"""Does video follow actions, and do they return from it?  On a world whose dynamics are known, with models that listen and models that do not.

The world: a bright square moves right by as many pixels as the first action of each frame says.  A latent holds its block's actions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_config

from wam.config import ImagineConfig
from wam.evaluation.consistency import action_following, dimension_names, errors, inverse_of_forward, partners_of
from wam.evaluation.imagination import Clip

A = 8


def world(actions: np.ndarray, speed: float = 1.0) -> np.ndarray:
    """Frames (1 + A / 2 per block, 24, 64, 3): one every 2 actions."""
    frames = np.full((1 + len(actions) // 2, 24, 64, 3), 50, np.uint8)
    for i, at in enumerate(np.concatenate([[0], np.cumsum(actions[:, 0])])[::2]):
        left = int(np.clip(20 + speed * at, 0, 56))
        frames[i, 8:16, left : left + 8] = 220
    return frames


def clips(count: int = 6, blocks: int = 2, episodes: int = 3) -> list[Clip]:
    rng = np.random.default_rng(0)
    out = []
    for i in range(count):
        executed = np.repeat(rng.uniform(-2, 2, (blocks * A // 4, 4)), 4, axis=0).astype(np.float32)
        executed[:, 3] = 0.5  # a gripper that stays open
        states = rng.normal(size=(blocks * A, 4)).astype(np.float32)
        out.append(Clip(i % episodes, i, world(executed), states[0], executed, "x", states, executed + np.float32(0.1)))
    return out


def listens(of: Sequence[Clip]) -> list[np.ndarray]:
    return [world(clip.executed) for clip in of]


def ignores(of: Sequence[Clip]) -> list[np.ndarray]:
    return [world(np.ones_like(clip.executed)) for clip in of]


def test_a_model_that_listens_is_told_from_one_that_does_not() -> None:
    some = clips()
    heard = action_following(some, [world(c.executed, 0.9) for c in some], listens)
    deaf = action_following(some, ignores(some), ignores)
    assert isinstance(heard, dict) and isinstance(deaf, dict)
    assert heard["ratio"] > 3 and heard["nearer"] == 6 and heard["nearer_low"] > 0.5 and heard["apart"] > 0
    assert deaf["ratio"] == 1 and deaf["nearer"] == 0 and deaf["apart"] == 0 and deaf["error"] > 0
    assert 0.5 < heard["actions_differ"] < 1.5, "as much as unrelated actions do"
    alike = [dataclasses.replace(c, executed=some[0].executed) for c in some]
    same = action_following(alike, listens(alike), listens)
    assert isinstance(same, dict) and same["actions_differ"] == 0 and same["apart"] == 0
    blurred = [np.full_like(c.frames, 120) for c in some]
    seen = action_following(some, listens(some), listens, blurred)
    assert isinstance(seen, dict) and seen["error"] > 0, "against what the codec shows, not the frames"


def test_partners_are_of_other_episodes_each_once() -> None:
    for episodes in ([0, 0, 1, 1], [3, 1, 2, 3, 1, 2, 3], [5, 4]):
        partners = partners_of(episodes)
        assert partners is not None and sorted(partners) == list(range(len(episodes)))
        assert all(episodes[i] != episodes[partner] for i, partner in enumerate(partners))
    assert partners_of([0, 0, 0, 1]) is None and partners_of([]) is None
    told = action_following(clips(episodes=1), listens(clips(episodes=1)), listens)
    assert isinstance(told, str) and "other episode" in told


def test_errors_are_a_share_of_the_spread() -> None:
    rng = np.random.default_rng(0)
    true = rng.normal(size=(500, 3)) * [1, 2, 0]
    mean = errors(np.broadcast_to(true.mean(axis=0), true.shape), true)
    assert mean["unexplained"] == pytest.approx(1) and mean["unexplained_by_dimension"][:2] == pytest.approx([1, 1])
    assert mean["unexplained_by_dimension"][2] is None and mean["rmse_by_dimension"] == pytest.approx([true[:, 0].std(), true[:, 1].std(), 0])
    half = errors(true + np.array([0.5, 0, 0]), true)
    assert half["rmse"] == pytest.approx(0.5 / np.sqrt(3)) and half["unexplained_by_dimension"] == [pytest.approx(0.25 / true[:, 0].var()), 0, None]


# ------------------------------------------------------------------------------------------------ IDM(FD(a)) = a


class FakeSession:
    """A session whose latents hold the block's actions; it insists on being told what happened, in order."""

    deaf = False
    told: list[str]

    def __init__(self, policy: Any, instructions: list[str], embodiment: str, seeds: list[int]) -> None:
        self.rows, self.told, self.origin = len(instructions), [], None
        self.normalizer = SimpleNamespace(normalize=lambda key, x: x / 2)
        self.units = SimpleNamespace(encode_actions=lambda x, origin: x)

    def observe(self, frames: np.ndarray, state: np.ndarray) -> None:
        assert frames.shape[1] == (1 if not self.told else 4) and (not self.told or self.told[-1] == "commit")
        self.told.append("observe")

    def commit(self, actions: np.ndarray) -> None:
        assert self.told[-1] == "inverse"
        self.told.append("commit")

    def plan(self, mode: str, solver: Any, actions: np.ndarray | None = None, future: torch.Tensor | None = None) -> Any:
        self.told.append(mode)
        if mode == "forward":
            heard = np.zeros_like(actions) if self.deaf else actions
            return SimpleNamespace(imagined=torch.from_numpy(np.asarray(heard)).transpose(1, 2)[..., None, None], actions=None)
        assert future is not None and future.shape[2] in (1, A)
        return SimpleNamespace(imagined=None, actions=future[:, :, :, 0, 0].transpose(1, 2).numpy() if future.shape[2] == A else FakeCodec.actions[float(future[0, 0, 0, 0, 0])])


class FakeCodec:
    """Real latents are numbered; the number stands for the block's actions."""

    actions: dict[float, np.ndarray]

    def encode(self, frames: torch.Tensor) -> torch.Tensor:
        return torch.arange(1 + frames.shape[1] // 4, dtype=torch.float32).view(1, 1, -1, 1, 1).expand(len(frames), 4, -1, 1, 1)


@pytest.mark.parametrize("deaf", [False, True])
def test_actions_return_from_imagined_video_only_where_it_holds_them(monkeypatch: pytest.MonkeyPatch, deaf: bool) -> None:
    some, config = clips(), tiny_config("timeline.latents_per_block=1")
    monkeypatch.setattr("wam.inference.session.Session", type("S", (FakeSession,), {"deaf": deaf}))
    FakeCodec.actions = {float(b + 1): np.stack([c.executed[b * A : (b + 1) * A] + 0.2 for c in some]) for b in range(2)}
    policy: Any = SimpleNamespace(config=config, codec=FakeCodec(), model=SimpleNamespace(device="cpu"))
    found = inverse_of_forward(policy, some, ImagineConfig())
    assert isinstance(found, dict) and found["blocks"] == 12 and len(found["dimensions"]) == 4
    assert found["real"]["rmse"] == pytest.approx(0.1, abs=1e-6) and found["real_against_label"]["rmse"] == pytest.approx(0.05, abs=1e-6), "in normalised units: half"
    own = np.concatenate([c.executed / 2 for c in some])
    if deaf:
        assert found["swapped"]["unexplained"] > 0.9
        assert found["imagined"]["unexplained"] > 0.9 and found["imagined"]["unexplained_by_dimension"][3] is None
    else:
        assert found["swapped"]["rmse"] == pytest.approx(0, abs=1e-6) and found["swapped_against_own"]["rmse"] > own.std(axis=0).mean()
        assert found["imagined"]["rmse"] == pytest.approx(0, abs=1e-6) and found["imagined"]["unexplained"] == pytest.approx(0, abs=1e-6)


def test_what_was_not_trained_is_not_asked() -> None:
    def ask(*overrides: str) -> Any:
        return inverse_of_forward(SimpleNamespace(config=tiny_config(*overrides)), clips(), ImagineConfig())  # type: ignore[arg-type]

    assert "mode 'forward'" in ask("training.modes={skip: 1, imagine: 1}") and "mode 'inverse'" in ask("training.modes={skip: 1, forward: 1}")


def test_dimensions_are_named_after_their_groups() -> None:
    robot = tiny_config().model.embodiments[0]
    assert len(dimension_names(robot)) == robot.action_dim
