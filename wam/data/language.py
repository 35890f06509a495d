"""What a robot is asked to do, row by row: an instruction may change within an episode.

    row        0 1 2 3 4 5 6 7 8
    rows       0 0 0 0 1 1 1 0 0        which of `texts` holds
    spans      [0, 4) [4, 7) [7, 9)     a window that must know one instruction stays inside one span

Where the texts come from (task indices, columns of strings, annotations) is the reader's business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Span:
    """Rows `start` to `stop` (exclusive) of an episode, under one instruction."""

    start: int
    stop: int
    text: str


@dataclass(frozen=True)
class Words:
    """The instructions of an episode.

    Attributes:
        texts: each once, in order of appearance.
        rows: (length,) int64, which text holds at each row.
    """

    texts: tuple[str, ...]
    rows: np.ndarray

    @classmethod
    def of(cls, rows: Sequence[str]) -> Words:
        """From the text of every row."""
        texts = tuple(dict.fromkeys(rows))
        number = {text: i for i, text in enumerate(texts)}
        return cls(texts, np.array([number[text] for text in rows], np.int64))

    def at(self, row: int) -> str:
        """The instruction at a row."""
        return self.texts[self.rows[row]]

    def spans(self) -> list[Span]:
        """Runs of rows under one instruction, which cover the episode."""
        edges = [0, *(np.flatnonzero(np.diff(self.rows)) + 1).tolist(), len(self.rows)]
        return [Span(start, stop, self.at(start)) for start, stop in zip(edges, edges[1:], strict=False)]


def first_written(columns: Sequence[Words]) -> Words | int:
    """The first alternative that says something, row by row; where none does, that row's number.

    Alternatives are several wordings of the same instruction (DROID has three), some of them empty.
    """
    rows: list[str] = []
    for row in range(len(columns[0].rows)):
        text = next((words.at(row) for words in columns if words.at(row).strip()), None)
        if text is None:
            return row
        rows.append(text)
    return Words.of(rows)
