"""The text encoder that a config names, and the text that an instruction is put into.

    instruction  ->  template  ->  encoder  ->  (T, width), zero beyond the text's end

    bytes   a small encoder that is trained with the model; a part of the model's weights
    umt5    Wan's: frozen, 11 GB, and needed once per instruction.  It stays outside of the model: it neither moves with it nor is saved
            in its weights, and where a directory of embeddings holds every instruction it is not loaded at all
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from wam.config import TextConfig
from wam.text.bytes import ByteText
from wam.text.cache import CachedText
from wam.text.umt5 import UMT5Text

TEXT_ENCODER, TOKENIZER = "text_encoder", "tokenizer"  # subfolders, as diffusers' pipelines name them


class OutsideText(nn.Module):
    """A frozen encoder beside a model: its embeddings arrive on the model's device, itself it stays where it is."""

    place: Tensor

    def __init__(self, encoder: UMT5Text):
        super().__init__()
        self._outside = (encoder,)
        self.max_tokens, self.width = encoder.max_tokens, encoder.width
        self.register_buffer("place", torch.zeros(0), persistent=False)  # moves with the model: where embeddings are put

    @property
    def encoder(self) -> UMT5Text:
        """The encoder."""
        return self._outside[0]

    def forward(self, instructions: list[str]) -> Tensor:
        """Embed U instructions to float32 (U, max_tokens, width), zero beyond each text's end."""
        embeddings: Tensor = self.encoder(instructions)
        return embeddings.to(self.place.device)


Text = ByteText | CachedText | OutsideText


def make_text(config: TextConfig, folder: Path | None = None, space: str | None = None) -> Text:
    """The text encoder a config names; a pretrained one from `folder` (a checkpoint's) or else from `text.pretrained`.

    With `text.cache`, the encoder is loaded for the first instruction that is not in it; without an encoder, what it holds is all there is.

    Args:
        space: which embeddings of `text.cache` the model was trained with (`CachedText.space`).

    Raises:
        FileNotFoundError: there are neither weights nor embeddings, or nothing says where they are.
        ValueError: embeddings of another width or length than the config says; names the field.
    """
    if config.kind == "bytes":
        return ByteText(config)
    source = str(folder) if folder is not None and (folder / TEXT_ENCODER).is_dir() else config.pretrained
    text: Text
    if config.cache is not None:
        text = CachedText(None, config.cache, space, (lambda: _umt5(source, config)) if source is not None else None)
    elif source is not None:
        text = OutsideText(_umt5(source, config))
    else:
        where = f" ({folder} holds no {TEXT_ENCODER}/)" if folder is not None else ""
        raise FileNotFoundError(f"text.kind is 'umt5', but text.pretrained and text.cache are null{where}; set text.pretrained to a folder in diffusers' layout or a Hub id, or text.cache to a directory of embeddings")
    for name in ("width", "max_tokens"):
        found, expected = getattr(text, name), getattr(config, name)
        if found != expected:
            raise ValueError(f"text.{name} is {expected}, but the embeddings of {config.pretrained or config.cache or folder} have {found}; set text.{name}={found}")
    return text


def _umt5(source: str, config: TextConfig) -> UMT5Text:
    dtype = torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
    return UMT5Text.from_pretrained(source, TEXT_ENCODER, TOKENIZER, dtype=dtype, max_tokens=config.max_tokens)


def prompt(instruction: str, template: str = "{instruction}") -> str:
    """An instruction in the text that a model was trained with; the template may hold it more than once.

    `{instruction}` stands for it, `{instruction:lower}` for it in lower case.

    Raises:
        ValueError: a template that does not hold the instruction.
    """
    if "{instruction}" not in template and "{instruction:lower}" not in template:
        raise ValueError(f"the prompt template {template!r} does not hold the instruction; write {{instruction}} where it belongs")
    parts = template.split("{instruction:lower}")
    return instruction.lower().join(part.replace("{instruction}", instruction) for part in parts)


def prompts(instructions: Iterable[str], template: str = "{instruction}") -> list[str]:
    """`prompt` of each instruction."""
    return [prompt(text, template) for text in instructions]
