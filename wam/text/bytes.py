"""The embedded text encoder: an instruction's bytes (ByT5's tokenizer needs no files) through a small T5 encoder.

It is trained with the model, so a machine with no downloaded weights still conditions on language.  As Wan does with UMT5, the
embedding is cut to the text's length and padded with zeros, so what an instruction means never depends on its batch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

from wam.config import TextConfig


class ByteText(nn.Module):
    """Instructions to embeddings (U, T, width); the empty one, an end mark alone, is the unconditional one of guidance."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        self.tokenizer = ByT5Tokenizer()
        width = config.width
        self.encoder = T5EncoderModel(
            T5Config(
                vocab_size=len(self.tokenizer),
                d_model=width,
                d_kv=width // config.heads,
                d_ff=2 * width,
                num_layers=config.layers,
                num_heads=config.heads,
                dropout_rate=0.0,
                use_cache=False,
            )
        )

    def forward(self, instructions: list[str]) -> Tensor:
        """Embed U instructions to (U, max_tokens, width), zero beyond each text's end.

        Raises:
            ValueError: an instruction longer than `text.max_tokens` bytes.
        """
        tokens = [self._tokens(text) for text in instructions]
        device = self.encoder.shared.weight.device
        ids = torch.tensor([t + [0] * (self.config.max_tokens - len(t)) for t in tokens], device=device)
        mask = torch.tensor([[1] * len(t) + [0] * (self.config.max_tokens - len(t)) for t in tokens], device=device)
        return self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state * mask.unsqueeze(-1)

    def _tokens(self, text: str) -> list[int]:
        ids = self.tokenizer(text).input_ids
        if len(ids) > self.config.max_tokens:
            raise ValueError(f"instruction {text!r} has {len(ids)} byte tokens, more than text.max_tokens {self.config.max_tokens}; raise text.max_tokens or shorten it")
        return ids
