"""torch.compile for the blocks that repeat, from outside of the model.

Every block is compiled when it is first called.  A block is given its own layer's tensors and no number, so the code that is made for
the first serves them all: what is compiled anew is a new layout of tokens, not a new layer.  At inference a block is compiled in two
pieces, before and after the attention, which is called as it is (`Uncompiled`): it depends on what memories hold, and on how many robots
share a pass.
"""

from __future__ import annotations

import warnings

import torch
from torch import nn

from wam.model.wam import WorldActionModel

LAYOUTS = 64  # that code is kept for, of the blocks of one kind; torch's own limit, 8, is less than the modes of a policy make


def repeated_blocks(model: WorldActionModel) -> list[nn.Module]:
    """Those of the backbone, and of the expert where there is one."""
    return [*model.backbone.blocks, *(model.expert.blocks if model.expert is not None else ())]


def compile_blocks(model: WorldActionModel, backend: str = "inductor") -> None:
    """Compile every repeated block when it is first called, by one of torch.compile's backends."""
    torch._dynamo.config.recompile_limit = max(LAYOUTS, torch._dynamo.config.recompile_limit)
    warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru_cache`")  # of pure functions: they are traced as they are
    for block in repeated_blocks(model):
        block.compile(backend=backend)


def is_compiled(model: WorldActionModel) -> bool:
    """Whether `compile_blocks` was called on it."""
    return any(block._compiled_call_impl is not None for block in repeated_blocks(model))


def uncompile_blocks(model: WorldActionModel) -> None:
    """Call the blocks as they are again, and forget the code that was made."""
    for block in repeated_blocks(model):
        block._compiled_call_impl = None
    torch._dynamo.reset()
