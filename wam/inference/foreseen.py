"""What a plan foresaw, and what came of it so far, latent frame by latent frame.

    origin                 + 1 latent frame          + 2
    imagined   z1 ......... | z2 ................... |
    came       encoded as soon as its pictures are there, on from the plan's observation
    before     the newest picture when the plan was made, by itself: what motion is counted from
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wam.inference.memory import StepMemory
from wam.inference.outcome import newest
from wam.inference.session import Session
from wam.pretrained import Policy


@dataclass
class Foreseen:
    """See the module's docstring.

    Attributes:
        imagined: (C, k, h, w), from control step `origin` on.
        before: (C, h, w).
        stream: encodes what comes.
        way: mode and solver steps that imagined it.
        came: (C, h, w) each.
        lost: what came of it is not known, and will not be.
    """

    imagined: Tensor
    before: Tensor
    stream: Any
    origin: int
    way: tuple[str, int]
    came: list[Tensor] = field(default_factory=list)
    lost: bool = False

    @classmethod
    def of(cls, session: Session, memory: StepMemory, imagined: Tensor, origin: int, way: tuple[str, int]) -> Foreseen:
        """What a plan of a session of one robot foresees, made from where its memory stands now."""
        before = newest(session.policy, memory.frames[-1][1][None])[0]
        return cls(imagined, before, session.stream.select([0]), origin, way)

    @property
    def over(self) -> bool:
        """Whether nothing more is to be compared."""
        return self.lost or len(self.came) == self.imagined.shape[1]

    def next_steps(self, policy: Policy, stride: int) -> range:
        """The control steps that the next latent frame covers; frames come every `stride`."""
        length = policy.codec.temporal_stride * stride
        first = self.origin + len(self.came) * length
        return range(first, first + length)

    def take(self, policy: Policy, memory: StepMemory) -> range | None:
        """Take in the next latent frame, if its pictures have come; the control steps that it covers, or None: not yet, or never."""
        stride = memory.span.frame_stride
        steps = self.next_steps(policy, stride)
        if self.over or memory.now is None or steps.stop > memory.now:
            return None
        seen = [memory.frame(at) for at in range(steps.start + stride, steps.stop + 1, stride)]
        if any(frame is None for frame in seen):
            self.lost = True
            return None
        with torch.no_grad():
            pixels = torch.from_numpy(np.stack([frame for frame in seen if frame is not None]))[None]
            self.came.append(self.stream.encode(pixels.to(policy.model.device))[0, :, 0])
        return steps

    @property
    def observed(self) -> Tensor:
        """(C, n, h, w): what has come."""
        return torch.stack(self.came, dim=1)
