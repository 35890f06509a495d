"""The pretrained text encoder: UMT5-XXL as Wan conditions on it.

    instruction -> cleaned -> tokens, end mark included -> UMT5 encoder -> (T, width), zero beyond the text's end

Wan was trained to see padding as zeros: 512 rows, of which an instruction fills some twenty.  The encoder itself is not given the
padding (it would be masked, to the same result), only the longest text of a batch.  It is frozen, and large: 5.7 billion numbers.
Wrap it in `wam.text.cache.CachedText`, and it is needed once per instruction, not once per run.
"""

from __future__ import annotations

import hashlib
import html
import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, UMT5EncoderModel

# What changes the encoder's answer and cannot be read off the shapes of its weights.
MATHEMATICS = ("num_heads", "relative_attention_num_buckets", "relative_attention_max_distance", "feed_forward_proj", "layer_norm_epsilon")
SAMPLES = 64  # numbers of each weight that tell encoders apart


def clean_prompt(text: str, repair_unicode: bool = False) -> str:
    """Clean an instruction as Wan's pipelines do: HTML entities to characters (twice, for `&amp;lt;`), runs of white space to one space.

    Before that, Wan repairs Unicode with the package ftfy: text that was decoded wrongly ("cafÃ©" to "café"), curly quotes to straight
    ones, ligatures and full-width letters to plain ones, control characters away.  Plain ASCII passes through it unchanged.  It is
    asked for by name, not used when it happens to be installed: the same instruction must mean the same on every machine.

    Raises:
        ModuleNotFoundError: `repair_unicode` without ftfy.
    """
    if repair_unicode:
        try:
            import ftfy
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("text.repair_unicode needs ftfy: pip install ftfy, or leave it off (instructions in plain ASCII do not need it)") from error
        text = ftfy.fix_text(text)
    return re.sub(r"\s+", " ", html.unescape(html.unescape(text))).strip()


class UMT5Text(nn.Module):
    """Instructions to embeddings (U, T, width), by a frozen UMT5 encoder.

    Attributes:
        max_tokens: T, rows of an embedding (Wan: 512).
        width: numbers a row (UMT5-XXL: 4096).
    """

    def __init__(self, encoder: UMT5EncoderModel, tokenizer: Any, max_tokens: int = 512, repair_unicode: bool = False):
        """Wrap an encoder, which is frozen, and its tokenizer.

        Raises:
            ValueError: the tokenizer knows more tokens than the encoder.
        """
        super().__init__()
        if len(tokenizer) > encoder.config.vocab_size:
            raise ValueError(f"the tokenizer has {len(tokenizer)} tokens and the encoder embeds {encoder.config.vocab_size}; they do not belong together")
        self.encoder = encoder.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.max_tokens, self.repair_unicode = max_tokens, repair_unicode
        self.width: int = encoder.config.d_model

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo: str | Path,
        subfolder: str = "text_encoder",
        tokenizer_subfolder: str = "tokenizer",
        dtype: torch.dtype = torch.bfloat16,
        max_tokens: int = 512,
        repair_unicode: bool = False,
    ) -> UMT5Text:
        """Load encoder and tokenizer from a folder in diffusers' layout (`text_encoder/`, `tokenizer/`) or a repository's name.

        `google/umt5-xxl` itself keeps both at its root: pass "" for the subfolders.

        Raises:
            FileNotFoundError: one of the two is not there.
            ValueError: weights are missing.
        """
        source = str(path_or_repo)
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, subfolder=tokenizer_subfolder)
            encoder, loaded = UMT5EncoderModel.from_pretrained(source, subfolder=subfolder, dtype=dtype, output_loading_info=True)
        except OSError as error:
            raise FileNotFoundError(f"no UMT5 encoder in {source} ({subfolder!r}, {tokenizer_subfolder!r}): {error}; give a folder in diffusers' layout, e.g. a download of Wan-AI/Wan2.1-T2V-1.3B-Diffusers") from error
        missing = set(loaded["missing_keys"]) - {"encoder.embed_tokens.weight"}
        if missing:
            raise ValueError(f"the text encoder in {source} lacks {len(missing)} weights, e.g. {sorted(missing)[:3]}; download it again")
        encoder.set_input_embeddings(encoder.shared)  # Wan's checkpoints say they are not tied, and some transformers then leave zeros
        return cls(encoder, tokenizer, max_tokens, repair_unicode)

    @torch.no_grad()
    def forward(self, instructions: list[str]) -> Tensor:
        """Embed U instructions to float32 (U, max_tokens, width), zero beyond each text's end.

        The empty instruction is allowed: it is the unconditional one of guidance.

        Raises:
            ValueError: an instruction longer than `max_tokens` tokens (Wan's pipelines cut it silently).
        """
        tokens = [self._tokens(text) for text in instructions]
        longest = max(map(len, tokens), default=0)
        device = self.encoder.shared.weight.device
        ids = torch.tensor([t + [0] * (longest - len(t)) for t in tokens], dtype=torch.int64, device=device)
        mask = torch.tensor([[1] * len(t) + [0] * (longest - len(t)) for t in tokens], dtype=torch.int64, device=device)
        embeddings = torch.zeros(len(tokens), self.max_tokens, self.width, device=device)
        if tokens:
            embeddings[:, :longest] = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state.float() * mask.unsqueeze(-1)
        return embeddings

    def identity(self) -> str:
        """A hash of all that decides an embedding except `max_tokens`: weights (sampled evenly), their types, tokenizer, cleaning."""
        digest = hashlib.sha256()
        config = {name: getattr(self.encoder.config, name) for name in MATHEMATICS}
        digest.update(json.dumps(["umt5", config, _tokenizer_identity(self.tokenizer), self.repair_unicode], sort_keys=True).encode())
        for name, weight in sorted(self.encoder.named_parameters()):
            flat = weight.detach().flatten()
            places = torch.linspace(0, len(flat) - 1, SAMPLES, dtype=torch.float64).long().to(flat.device)
            digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
            digest.update(flat[places].float().cpu().numpy().tobytes())
        return digest.hexdigest()

    def _tokens(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(clean_prompt(text, self.repair_unicode)).input_ids
        if len(ids) > self.max_tokens:
            raise ValueError(f"instruction {text!r} has {len(ids)} tokens, more than text.max_tokens {self.max_tokens}; shorten it")
        return ids


def _tokenizer_identity(tokenizer: Any) -> str:
    """What a tokenizer does, as text; for fast ones their whole pipeline, less what a call sets."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        pipeline = {k: v for k, v in json.loads(backend.to_str()).items() if k not in ("padding", "truncation")}
    else:
        pipeline = {"class": type(tokenizer).__name__, "vocabulary": sorted(tokenizer.get_vocab().items())}
    return hashlib.sha256(json.dumps(pipeline, sort_keys=True).encode()).hexdigest()
