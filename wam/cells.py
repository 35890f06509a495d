"""The notation of the relation table, without the network's libraries, so that a config can refuse a wrong cell as it is read.

    {"A->Vc": "<="}     the query's kind, the key's kind, and which of the key's blocks the query sees: none, "<", "=", "<=" or all
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches

KIND_LABELS = ("H", "S", "Vc", "V", "Ac", "A", "G", "R")  # in the order of `wam.timeline.Kind`
NONE, PAST, SAME, PAST_AND_SAME, ALL = "", "<", "=", "<=", "all"
RELATIONS = (NONE, PAST, SAME, PAST_AND_SAME, ALL)


def read_cells(cells: Mapping[str, str]) -> dict[tuple[str, str], str]:
    """Cells as configs write them to pairs of labels; `none` closes a cell.

    Raises:
        ValueError: an unknown kind or relation, with the nearest right one, or a first frame that would see more than itself.
    """
    out = {}
    for text, relation in cells.items():
        labels = [part.strip() for part in text.split("->")]
        if len(labels) != 2:
            raise ValueError(f"relations.cells: {text!r} is not a cell; write QUERY->KEY, e.g. A->Vc, with the kinds {', '.join(KIND_LABELS)}")
        for label in labels:
            if label not in KIND_LABELS:
                raise ValueError(f"relations.cells: unknown kind {label!r} in {text!r}; {_hint(label, KIND_LABELS)}kinds: {', '.join(KIND_LABELS)}")
        value = NONE if relation == "none" else relation
        if value not in RELATIONS:
            signs = "".join(sorted(set(relation)))  # =< and == for <= and =
            hint = f"did you mean {signs!r}? " if signs in (PAST, SAME, PAST_AND_SAME) else _hint(relation, ("none", ALL))
            raise ValueError(f"relations.cells: {text} is {relation!r}; {hint}relations: none, '<', '=', '<=', all")
        if labels[0] == "H" and labels[1] != "H" and value != NONE:
            raise ValueError(f"relations.cells: {text} is {relation!r}, but the first frame is cached before anything else is known; H may see H alone")
        out[labels[0], labels[1]] = value
    return out


def _hint(wrong: str, right: Iterable[str]) -> str:
    by_lower = {name.lower(): name for name in right}
    near = get_close_matches(wrong.lower(), by_lower, n=1, cutoff=0.5)
    return f"did you mean {by_lower[near[0]]!r}? " if near else ""
