"""Text embeddings on disk: each instruction is encoded once, and the encoder can stay at home.

    DIRECTORY/<space>/encoder.json             which encoder and how many tokens; `space` is a hash of both
    DIRECTORY/<space>/<sha256 of text>.safetensors   the rows of the text alone, without the zeros beyond its end

A dataset has a few hundred instructions, their encoder has 11 GB: a robot or a training node needs the former.  An entry carries its
text and a checksum and is verified whenever it is read.  One that does not hold is encoded again and counted; without an encoder it is
an error that names the text.  Files appear whole or not at all, and the same text gives the same file, so processes may share a
directory without locks: at worst, two encode the same text.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from tqdm import tqdm

from wam.files import atomic_path, write_json_atomic

log = logging.getLogger(__name__)

FORMAT = "wam-text-1"
ENCODER = "encoder.json"


class TextEncoder(Protocol):
    """What can be cached: an encoder whose embeddings depend on the text alone, zero beyond its end (`UMT5Text`)."""

    max_tokens: int
    width: int

    def identity(self) -> str:
        """A hash of all that decides an embedding, except `max_tokens`."""
        ...

    def __call__(self, instructions: list[str]) -> Tensor:
        """Embeddings (U, max_tokens, width)."""
        ...


@dataclass
class Counts:
    """What a cache did.  `damaged` entries are also `encoded`, where there is an encoder."""

    read: int = 0
    encoded: int = 0
    damaged: int = 0


class CachedText(nn.Module):
    """An encoder's embeddings through a directory; same interface as the encoder, which may be absent if all is cached.

    The encoder is not a submodule: it neither moves to the model's device nor is saved with its weights.

    Attributes:
        space: name of the folder that holds this encoder's embeddings; enough to find them again without the encoder.
        counts: what was read, encoded and found damaged so far.
    """

    place: Tensor

    def __init__(self, encoder: TextEncoder | None, directory: str | Path, space: str | None = None, load: Callable[[], TextEncoder] | None = None):
        """Open a directory with an encoder, or without one to read what is there.

        Args:
            space: without an encoder, which embeddings to read; needed only where a directory holds several encoders'.
            load: gives the encoder when it is needed first: at once where it is not clear which embeddings are its own, or else for a
                text that is not there.

        Raises:
            FileNotFoundError: no encoder, and no embeddings in the directory.
            ValueError: no encoder, and embeddings of several; or `space` is another encoder's.
        """
        super().__init__()
        if encoder is None and load is not None and space is None and len(_spaces(Path(directory))) != 1:
            encoder = load()
        self._outside, self._load = (encoder,), load
        if encoder is None:
            self.space = _only_space(Path(directory), space)
        else:
            identity = encoder.identity()
            self.space = _hash(FORMAT, identity, encoder.max_tokens)[:16]
            if space not in (None, self.space):
                raise ValueError(f"text embeddings of space {space!r} were asked for, but this encoder's are {self.space!r}: other weights, tokenizer, cleaning or max_tokens; use the encoder they were made with, or none")
            described = {"format": FORMAT, "identity": identity, "max_tokens": encoder.max_tokens, "width": encoder.width}
            write_json_atomic(Path(directory) / self.space / ENCODER, described)
        self.folder = Path(directory) / self.space
        described = json.loads((self.folder / ENCODER).read_text())
        self.max_tokens, self.width = int(described["max_tokens"]), int(described["width"])
        self.counts = Counts()
        self.register_buffer("place", torch.zeros(0), persistent=False)  # moves with the model: where embeddings are put

    @property
    def encoder(self) -> TextEncoder | None:
        """The encoder, where there is one."""
        return self._outside[0]

    def forward(self, instructions: list[str]) -> Tensor:
        """Embed U instructions to float32 (U, max_tokens, width), zero beyond each text's end.

        Raises:
            FileNotFoundError: an embedding is missing or damaged and there is no encoder; names the text and the remedy.
        """
        distinct = list(dict.fromkeys(instructions))
        rows = {text: self._read(text) for text in distinct}
        missing = [text for text in distinct if rows[text] is None]
        if missing:
            rows |= zip(missing, self._encode(missing), strict=True)
        out = torch.zeros(len(instructions), self.max_tokens, self.width, device=self.place.device)
        for i, text in enumerate(instructions):
            found = rows[text]
            assert found is not None
            out[i, : len(found)] = found.to(out.device)
        return out

    def precompute(self, instructions: Iterable[str], batch_size: int = 16) -> int:
        """Encode and store what is not there yet, `batch_size` texts at a time; returns how many were encoded.

        Raises:
            FileNotFoundError: something is missing and there is no encoder.
        """
        missing = [text for text in dict.fromkeys(instructions) if self._read(text) is None]
        for start in tqdm(range(0, len(missing), batch_size), desc="embedding instructions", unit="batch", disable=not missing):
            self._encode(missing[start : start + batch_size])
        return len(missing)

    def release(self) -> None:
        """Let go of an encoder that can be had again when it is needed."""
        if self._load is not None:
            self._outside = (None,)

    def path(self, text: str) -> Path:
        """The file of a text's embedding, whether it exists or not."""
        return self.folder / f"{_hash(text)}.safetensors"

    def _read(self, text: str) -> Tensor | None:
        """The rows of a text, (tokens, width) in float32; None where there is no entry, or none that holds."""
        path = self.path(text)
        if not path.is_file():
            return None
        try:
            rows = _read_entry(path, text, self.space)
            if rows.ndim != 2 or rows.shape[0] > self.max_tokens or rows.shape[1] != self.width:
                raise ValueError(f"it has the shape {tuple(rows.shape)}; expected (at most {self.max_tokens}, {self.width})")
        except (ValueError, OSError, safetensors.SafetensorError) as error:
            self.counts.damaged += 1
            log.warning("the cached embedding of %r is damaged (%s: %s)%s", text, path, error, "; it is encoded again" if self.encoder else "")
            return None
        self.counts.read += 1
        return rows

    def _encode(self, texts: list[str]) -> list[Tensor]:
        """Encode texts and store them; their rows (tokens, width)."""
        if self.encoder is None and self._load is not None:
            encoder = self._load()
            found = _hash(FORMAT, encoder.identity(), encoder.max_tokens)[:16]
            if found != self.space:
                raise ValueError(f"{self.folder} holds the embeddings of another encoder than the one that was to encode {texts[0]!r} (space {found!r}): other weights, tokenizer, cleaning or max_tokens; use another directory")
            self._outside = (encoder,)
        if self.encoder is None:
            more = f" and {len(texts) - 1} more" if len(texts) > 1 else ""
            raise FileNotFoundError(
                f"no sound embedding of the instruction {texts[0]!r}{more} in {self.folder}, and there is no text encoder here; "
                "where the encoder is, run CachedText(UMT5Text.from_pretrained(...), directory).precompute(instructions), and copy the directory"
            )
        rows_of = []
        with torch.no_grad():
            embeddings = self.encoder(texts).float().cpu()
        for text, embedding in zip(texts, embeddings, strict=True):
            filled = (embedding != 0).any(dim=-1).nonzero()
            rows = embedding[: int(filled[-1]) + 1 if len(filled) else 0].contiguous()
            self.counts.encoded += 1
            metadata = {"format": FORMAT, "space": self.space, "text": text, "sha256": _checksum(rows)}
            with atomic_path(self.path(text)) as temporary:
                safetensors.torch.save_file({"embedding": rows}, temporary, metadata=metadata)
            rows_of.append(rows)
        return rows_of


def _read_entry(path: Path, text: str, space: str) -> Tensor:
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        expected = {"format": FORMAT, "space": space, "text": text}
        wrong = [name for name, value in expected.items() if metadata.get(name) != value]
        if wrong:
            raise ValueError(f"its {wrong[0]} is {metadata.get(wrong[0])!r}, expected {expected[wrong[0]]!r}")
        rows: Tensor = file.get_tensor("embedding")
    if _checksum(rows) != metadata.get("sha256"):
        raise ValueError("its checksum does not hold")
    return rows


def _spaces(directory: Path) -> list[str]:
    return sorted(path.parent.name for path in directory.glob(f"*/{ENCODER}"))


def _only_space(directory: Path, space: str | None) -> str:
    spaces = _spaces(directory)
    if space is None and len(spaces) > 1:
        raise ValueError(f"{directory} holds the embeddings of {len(spaces)} encoders ({', '.join(spaces)}); say which with `space`, or give the encoder")
    if not spaces or space not in (None, *spaces):
        what = f"no text embeddings of space {space!r} (there are: {', '.join(spaces) or 'none'})" if space else "no text embeddings"
        raise FileNotFoundError(f"{what} in {directory}, and there is no text encoder here; precompute them where the encoder is, and copy the directory")
    return space or spaces[0]


def _checksum(rows: Tensor) -> str:
    return hashlib.sha256(rows.contiguous().numpy().tobytes()).hexdigest()


def _hash(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
