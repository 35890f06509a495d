"""What follows from actions, imagined beside a session, and what really followed, in the same latents.

    session           H | Vc Ac | ...  now                                 stays as it is: memory, generators, timings, encoder
    outcome                            now | Ac given -> V imagined        on a copy of the memory, dropped afterwards
    arrived                            now | frames   -> latents           on a copy of the encoder, which the session's own call repeats later

The first is what a check by forward dynamics and a planner over candidates are made of; the second lets a plan be checked while its block
still runs, before the session observes the whole of it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from wam.config import SamplingConfig
from wam.inference.session import Session
from wam.pretrained import Policy


def outcome(session: Session, rows: Sequence[int], actions: np.ndarray, sampling: SamplingConfig | None, seeds: Sequence[int]) -> Tensor:
    """What some rows of a session think will follow from actions: latents (n, C, k, h, w) of the coming block.

    Args:
        rows: n positions in the session; one may be asked for more than once, with other actions.
        actions: (n, A, action_dim), physical units.
        sampling: how; default: as the checkpoint says.
        seeds: of the noise, one a row.

    Raises:
        ValueError: rows, actions and seeds that are not as many, or as `Session.plan`.
    """
    if not len(rows) == len(actions) == len(seeds):
        raise ValueError(f"{len(rows)} rows, actions for {len(actions)} and {len(seeds)} seeds; give one of each per row")
    aside = copy.copy(session)
    aside.timings = {}
    aside.select(rows)  # copies the cache
    aside.generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
    imagined = aside.plan("forward", sampling, actions).imagined
    assert imagined is not None
    return imagined


def arrived(session: Session, rows: Sequence[int], frames: np.ndarray) -> Tensor:
    """Latents (n, C, F, h, w) of the frames that came since the session last observed, without telling it.

    Args:
        frames: uint8 (n, 4F, H, W, 3), whole latent frames.

    Raises:
        ValueError: nothing observed yet, another number of rows or type of frames, or as the codec's stream.
    """
    if session.block < 0:
        raise ValueError("nothing has been observed yet; call observe(first_frame, state) before arrived()")
    if len(frames) != len(rows) or frames.dtype != np.uint8:
        raise ValueError(f"frames are {frames.dtype} of {len(frames)} rows; expected uint8 of {len(rows)}")
    with torch.no_grad():
        return session.stream.select(list(rows)).encode(torch.from_numpy(np.ascontiguousarray(frames)).to(session.model.device))


def newest(policy: Policy, frames: np.ndarray) -> Tensor:
    """Latents (n, C, h, w) of the newest frames, uint8 (n, H, W, 3), each encoded alone, as a picture that stands still: what motion is counted from."""
    with torch.no_grad():
        return policy.codec.encode(torch.from_numpy(np.ascontiguousarray(frames)).to(policy.model.device).unsqueeze(1))[:, :, 0]
