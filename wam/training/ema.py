"""The exponential moving average of the weights, which is what a policy is saved with.

Every process averages the fragments that it updates (`Engine.fragments`), so the average is sharded as the optimiser's state is: whole on
each process with DDP, a part of it with ZeRO and FSDP.  It is gathered when it is saved.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from wam.training.engine import Engine, Gathered


class Ema:
    """Averages of what trains, with a warm-up so that early weights are forgotten.

    With a decay of 0 it is the parameters themselves, and takes no memory.

    Attributes:
        shadow: by name, the average of each fragment.
    """

    def __init__(self, engine: Engine, decay: float):
        self.engine, self.decay = engine, decay
        self.shadow = {name: f.clone() if decay else f for name, f in engine.fragments().items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the weights after optimiser step number `step` (from 1)."""
        if not self.decay:
            return
        fragments: Any = self.engine.fragments()
        decay = min(self.decay, step / (step + 10))
        torch._foreach_lerp_(list(self.shadow.values()), [fragments[name] for name in self.shadow], 1 - decay)

    def state(self) -> Mapping[str, Tensor]:
        """Averages by name, whole, each gathered when it is asked for; nothing where there is no averaging."""
        return Gathered(self.engine, self.shadow) if self.decay else {}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `state` gave."""
        for name, value in self.shadow.items() if self.decay else ():
            value.copy_(self.engine.piece(name, tensors[name].to(self.engine.device)))
