"""Functions that have a name of their own: the best of several rows, or what most of them say."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from samullm_plugin.app.expressions import parsed

Row = Mapping[str, Any]
"""A row's fields by name."""


def _candidates(row: Row) -> list[Row]:
    """Return the rows among which a function chooses: those of its only input.

    A row's own conversation is a list of mappings as well, and no input.
    """
    lists = [
        v
        for v in row.values()
        if isinstance(v, list)
        and v
        and isinstance(v[0], Mapping)
        and not {"role", "content"} <= v[0].keys()
    ]
    if len(lists) != 1:
        raise ValueError(f"it chooses among the rows of one input, and there are {len(lists)}")
    return list(lists[0])


def _with_values(row: Row, by: str) -> list[tuple[Row, Any]]:
    """Return the candidates with what an expression makes of each; without those of no value."""
    expression = parsed(by)
    made = [(candidate, expression.value(candidate)) for candidate in _candidates(row)]
    return [(candidate, value) for candidate, value in made if value is not None]


def best(row: Row, by: str) -> Row | None:
    """Return the row of the input for which an expression is highest; the first of equal ones.

    None: none of them has a value.
    """
    found = _with_values(row, by)
    return max(found, key=lambda pair: pair[1])[0] if found else None


def vote(row: Row, by: str) -> Row | None:
    """Return the first row with the value that most have; ``votes`` and ``share`` say how many.

    None: none of them has a value.
    """
    candidates = _with_values(row, by)
    values = [json.dumps(value, sort_keys=True) for _, value in candidates]
    if not values:
        return None
    winner = max(values, key=values.count)
    votes = values.count(winner)
    chosen = {"winner": json.loads(winner), "votes": votes, "share": votes / len(values)}
    return {**candidates[values.index(winner)][0], **chosen}


BUNDLED: Mapping[str, Callable[..., Any]] = {"best": best, "vote": vote}
"""Functions with a name of their own."""
