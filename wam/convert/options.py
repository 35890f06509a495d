"""What a conversion may be told; each format reads what concerns it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from wam.shards import SHARD_BYTES


@dataclass(frozen=True)
class Options:
    """Choices of a conversion.

    Attributes:
        components: whether text encoder, image encoder and VAE are written too (`include`), or read from elsewhere (`reference`).
        reference: folder in diffusers' layout or Hub id that they are then read from; default: the release's own backbone on the Hub.
        base: of a LoRA checkpoint, the checkpoint it was trained on.
        base_hash: the identity that base must have, where the LoRA checkpoint does not say.
        accept_unknown_base: merge a LoRA checkpoint that does not say what it was trained on.
        base_is_wan: the base is Wan itself, and the LoRA checkpoint brings all the parts that Wan lacks.
        embodiment: whose statistics and prompt are taken, where a release has several.
        control_hz: control steps a second, where a release does not say.
        prompt_template: the text that an instruction is put into, where it is not known by the embodiment's name.
        image_size: height and width in pixels of what the model sees, where they are not the published ones.
        tokenizer: folder or Hub id of the text encoder's tokenizer, where a release has none.
        variant: which of several models with the same tensors, where a release does not say.
        head_dim: numbers in an attention head, where weights do not tell and a release does not say; default: 128, as in every released Wan.
        max_bytes: largest shard written.
    """

    components: Literal["include", "reference"] = "include"
    reference: str | None = None
    base: Path | None = None
    base_hash: str | None = None
    accept_unknown_base: bool = False
    base_is_wan: bool = False
    embodiment: str | None = None
    control_hz: float | None = None
    prompt_template: str | None = None
    image_size: tuple[int, int] | None = None
    tokenizer: str | None = None
    variant: str | None = None
    head_dim: int | None = None
    max_bytes: float = SHARD_BYTES
