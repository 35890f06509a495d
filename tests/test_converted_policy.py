"""From a released folder to a robot in a loop: a tiny DreamZero release is converted, loaded, observes, plans, commits, and starts again."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.released import IMAGE, tiny_tensors, write_release
from wam.config import SamplingConfig
from wam.convert import convert
from wam.convert.options import Options
from wam.inference.session import Session
from wam.pretrained import Policy, from_pretrained


def _policy(which: str, tmp_path: Path) -> Policy:
    source = write_release(tmp_path / "src", which, tiny_tensors(which))
    from transformers import ByT5Tokenizer

    ByT5Tokenizer().save_pretrained(source / "tokenizer")
    convert("dreamzero", source, tmp_path / "dst", Options(image_size=IMAGE[which]))
    return from_pretrained(tmp_path / "dst", dtype=torch.float32)


@pytest.mark.parametrize("which", ["14b", "5b"])
def test_a_converted_release_drives(which: str, tmp_path: Path) -> None:
    policy = _policy(which, tmp_path)
    t, rng = policy.config.timeline, np.random.default_rng(0)
    session = Session(policy, ["pick up the cup", "open the drawer"], "oxe_droid", [1, 2])
    assert session.guided and policy.config.sampling.solver == "unipc" and policy.config.sampling.steps == 16
    how = SamplingConfig(solver="unipc", steps=2, guidance=5.0)

    def frames(count: int) -> np.ndarray:
        return rng.integers(0, 255, (2, count, *IMAGE[which], 3), dtype=np.uint8)

    state = rng.normal(size=(2, 8)).astype(np.float32)
    session.observe(frames(1), state)
    for chunk in range(t.blocks + 1):  # the memory is full after t.blocks blocks, and starts again from the newest frame
        assert session.block == chunk % t.blocks
        plan = session.plan("joint_mutual", how)
        assert plan.actions.shape == (2, t.actions_per_block, 8) and np.isfinite(plan.actions).all() and plan.imagined is not None
        joints = plan.actions[..., :7] - state[:, None, :7]  # differences of at most 0.2 a step in the statistics, and unclipped
        assert np.abs(joints).mean() < 5 and not np.allclose(plan.actions[0], plan.actions[1])
        session.commit(plan.actions)
        session.observe(frames(t.frames_per_block), state)


def test_rows_with_guidance_are_independent(tmp_path: Path) -> None:
    policy = _policy("5b", tmp_path)
    rng = np.random.default_rng(0)
    pictures, states, texts = rng.integers(0, 255, (2, 1, *IMAGE["5b"], 3), dtype=np.uint8), rng.normal(size=(2, 8)).astype(np.float32), ["pick", "push"]
    how = SamplingConfig(solver="unipc", steps=2, guidance=5.0)

    def plan(rows: list[int]) -> np.ndarray:
        session = Session(policy, [texts[r] for r in rows], "oxe_droid", [10 + r for r in rows])
        session.observe(pictures[rows], states[rows])
        return session.plan("joint_mutual", how).actions

    together = plan([0, 1])
    for row in range(2):
        np.testing.assert_allclose(plan([row])[0], together[row], rtol=1e-3, atol=1e-4)
