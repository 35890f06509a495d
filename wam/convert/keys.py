"""Key maps: what a released checkpoint calls a tensor, and what it is called here, as tables that read both ways.

    Rule("blocks.{n}.self_attn.{x}.{p}",  "blocks.{n}.attn1.to_{x}.{p}")                  the same numbers
    Rule("proprio.weight",                "state_encoder.embed.weight", TRANSPOSED)       (out, in) to (1, in, out)
    Rule("attn.to_qkv.weight",            "self_attn.q_proj.weight",    part(0, 3))       a third of the rows

Places in braces stand for a number (`n`, `m`), `weight` or `bias` (`p`), or `q`, `k` or `v` (`x`); the same place holds the same text on
both sides.  Nothing but reshaping, transposing and cutting happens to numbers, so the L2 norm of a tensor, or of its gradient, is the
same under both names (parts of one tensor together).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from torch import Tensor

PLACES = {"n": r"\d+", "m": r"\d+", "p": r"weight|bias", "x": r"q|k|v"}


@dataclass(frozen=True)
class Op:
    """What happens to the numbers of a tensor, and the way back.

    Attributes:
        fate: what a report calls it.
        undo: from here to the release; None for a part, which alone does not make the whole.
    """

    fate: str
    do: Callable[[Tensor], Tensor]
    undo: Callable[[Tensor], Tensor] | None


SAME = Op("renamed", lambda x: x, lambda x: x)
TRANSPOSED = Op("transposed", lambda x: x.t().unsqueeze(0), lambda x: x.squeeze(0).t())  # nn.Linear's (out, in) to an embodiment's (1, in, out)
ROW = Op("reshaped", lambda x: x.unsqueeze(0), lambda x: x.squeeze(0))  # a bias (out) to (1, out)


def flat(axes: int) -> Op:
    """Drop the first `axes` axes, each of length 1."""
    return Op("reshaped", lambda x: x.reshape(x.shape[axes:]), lambda x: x.reshape((1,) * axes + x.shape))


def part(index: int, parts: int) -> Op:
    """One of `parts` equal parts along the first axis."""
    return Op("split", lambda x: x.chunk(parts)[index], None)


@dataclass(frozen=True)
class Rule:
    """One line of a table."""

    source: str
    target: str
    op: Op = SAME


@dataclass(frozen=True)
class Unused:
    """Tensors that a release carries and never uses here, and why."""

    source: str
    reason: str


class KeyMap:
    """A table of rules, read in both directions."""

    def __init__(self, rules: Iterable[Rule], unused: Iterable[Unused] = ()):
        self.rules, self.unused_rules = tuple(rules), tuple(unused)
        self._forward = [(_pattern(rule.source), _template(rule.target), rule.op) for rule in self.rules]
        self._backward = [(_pattern(rule.target), _template(rule.source), rule.op) for rule in self.rules]
        self._unused = [(re.compile(rule.source), rule.reason) for rule in self.unused_rules]

    def within(self, source: str = "", target: str = "") -> KeyMap:
        """The same table with prefixes, e.g. `within("action_head.model.", "backbone.")`."""
        rules = [replace(rule, source=source + rule.source, target=target + rule.target) for rule in self.rules]
        return KeyMap(rules, [replace(rule, source=re.escape(source) + rule.source) for rule in self.unused_rules])

    def __add__(self, other: KeyMap) -> KeyMap:
        return KeyMap([*self.rules, *other.rules], [*self.unused_rules, *other.unused_rules])

    def targets(self, name: str) -> list[tuple[str, Op]]:
        """What a released tensor becomes: one name, several where it is split, or none."""
        return [(match.expand(template), op) for pattern, template, op in self._forward if (match := pattern.fullmatch(name))]

    def unused(self, name: str) -> str | None:
        """Why a released tensor has no use here, or None."""
        return next((reason for pattern, reason in self._unused if pattern.fullmatch(name)), None)

    def apply(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """A released tensor under its names here (several where it is split); empty where this table has no rule for it."""
        return {target: op.do(tensor) for target, op in self.targets(name)}

    def forward(self, name: str, tensor: Tensor) -> tuple[str, Tensor]:
        """A released tensor under its one name here.

        Raises:
            ValueError: there is no rule for it, or it is split.
        """
        found = self.apply(name, tensor)
        if len(found) != 1:
            raise ValueError(f"tensor {name!r} becomes {len(found)} tensors ({', '.join(found) or 'no rule'}); expected one: is it of this release?")
        return next(iter(found.items()))

    def source_of(self, target: str) -> str:
        """The released name of a tensor here.

        Raises:
            ValueError: no rule leads to it.
        """
        return self._back(target)[0]

    def backward(self, target: str, tensor: Tensor) -> tuple[str, Tensor]:
        """A tensor here under its released name and in its released shape.

        Raises:
            ValueError: no rule leads to it, or it is only a part of a released tensor.
        """
        source, op = self._back(target)
        if op.undo is None:
            raise ValueError(f"tensor {target!r} is a part of the released {source!r} and does not make it alone")
        return source, op.undo(tensor)

    def _back(self, target: str) -> tuple[str, Op]:
        for pattern, template, op in self._backward:
            if match := pattern.fullmatch(target):
                return match.expand(template), op
        raise ValueError(f"no released tensor becomes {target!r}; is it a name of this model?")


def _pattern(text: str) -> re.Pattern[str]:
    parts = re.split(r"\{(\w)\}", text)
    return re.compile("".join(f"(?P<{part}>{PLACES[part]})" if i % 2 else re.escape(part) for i, part in enumerate(parts)))


def _template(text: str) -> str:
    return re.sub(r"\{(\w)\}", r"\\g<\1>", text)
