"""A session that was saved and loaded goes on as if it had not been; those of other policies and damaged files are refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
from test_session import SETTINGS, _blocks, _new, _parts, _policy, _step

from wam.inference.saved import load_session, save_session


@pytest.mark.parametrize("name", ["all", "guidance", "first frame inside", "states in the text", "first frame on the channels", "goal"])
def test_a_session_goes_on_where_it_was_saved(name: str, tmp_path: Path) -> None:
    policy, mode = _policy(name, None), SETTINGS[name][1]
    session = _new(policy, [0, 2])
    for i, block in enumerate(_blocks(policy.config)):
        if i == 1:
            save_session(session, tmp_path / "session.safetensors")
            restored = load_session(policy, tmp_path / "session.safetensors")
        plan = _step(session, [0, 2], block, mode)
        if i >= 1:
            for mine, theirs in zip(_parts(_step(restored, [0, 2], block, mode)), _parts(plan), strict=True):
                np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)  # tensors are laid out anew, which moves the last bit
    assert i >= 2, "it went on for more than one block"


def test_what_is_no_session_of_this_policy_is_refused(tmp_path: Path) -> None:
    policy, path = _policy("all", None), tmp_path / "session.safetensors"
    session = _new(policy, [0])
    _step(session, [0], next(iter(_blocks(policy.config))), "skip")
    save_session(session, path)
    other = _policy("all", None)
    with torch.no_grad():
        next(iter(other.model.parameters())).add_(1e-3)
    with pytest.raises(ValueError, match="memory of another policy"):
        load_session(other, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="cannot be read as a saved session"):
        load_session(policy, path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="cannot be read"):
        load_session(policy, path)
    with pytest.raises(FileNotFoundError):
        load_session(policy, tmp_path / "none")
    session.commit(np.zeros((1, policy.config.timeline.actions_per_block, 4), np.float32))
    session.imagine(torch.zeros(1, policy.config.codec.channels, policy.config.timeline.latents_per_block, *policy.model.latent_size))
    with pytest.raises(ValueError, match="imagined future"):
        save_session(session, path)
