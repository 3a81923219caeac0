"""What the columns of a joined table mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from samullm_plugin.errors import InputError, suggest

FIGURES = {
    "error": "error",
    "text": "text",
    "finish_reason": "finish_reason",
    "prompt_tokens": "prompt_tokens",
    "completion_tokens": "num_tokens",
}
"""What a column ``node.X`` shows besides outputs, and its name in the journal."""


@dataclass(frozen=True, slots=True)
class Column:
    """One column of the table.

    Attributes:
        name: its heading.
        node: index of the node it shows; -1: the item itself.
        path: what of it; empty: the item's id, or the node's output.
    """

    name: str
    node: int = -1
    path: tuple[str, ...] = ()


def find_columns(
    columns: Sequence[str],
    nodes: Mapping[str, frozenset[str] | None],
    fields: Sequence[str],
    rows_of: str | None = None,
) -> tuple[Column, ...]:
    """Return what names of columns mean.

    Args:
        columns: ``id``, names of input fields, nodes, ``node.field`` of outputs that are mappings,
            ``node.error``, ``.text`` (as generated), ``.finish_reason``, ``.prompt_tokens``,
            ``.completion_tokens``; ``input.x`` is always the input's. A node with several
            models stands for one column per model. Empty: everything.
        nodes: by the names of the nodes, the fields that their outputs have; None: nobody knows.
        fields: names of the inputs' fields.
        rows_of: the node whose requests are the rows; None: items are.

    Raises:
        InputError: for a column or node that is not there.
    """
    if rows_of is not None and rows_of not in nodes:
        hint = suggest(rows_of, nodes) or f"; nodes: {', '.join(nodes)}"
        raise InputError(f"output.rows: there is no node {rows_of!r}{hint}")
    names = _Names(nodes, fields)
    return names.chosen(columns) if columns else names.everything()


class _Names:
    """Names that columns may have."""

    def __init__(self, nodes: Mapping[str, frozenset[str] | None], fields: Sequence[str]) -> None:
        self._names, self._outputs, self._fields = list(nodes), nodes, list(fields)

    def everything(self) -> tuple[Column, ...]:
        clash = set(self._names) | {"id"}
        own = [
            Column(f"input.{name}" if name in clash else name, path=(name,))
            for name in self._fields
        ]
        made = [
            Column(f"{name}{end}", i, path)
            for i, name in enumerate(self._names)
            for end, path in (("", ()), (".error", ("error",)))
        ]
        return (Column("id"), *own, *made)

    def chosen(self, names: Sequence[str]) -> tuple[Column, ...]:
        found = [column for name in names for column in self._column(name)]
        headings = [c.name for c in found]
        if twice := next((n for n in headings if headings.count(n) > 1), None):
            raise InputError(f"output.columns: {twice!r} is there twice")
        return tuple(found)

    def _column(self, name: str) -> list[Column]:
        """Return what a name in ``columns`` means: one column, or one per model of a node."""
        if name == "id":
            return [Column("id")]
        if name.startswith("input.") and "input" not in self._names:
            return [Column(name, path=(name.removeprefix("input."),))]
        parts = name.split(".")
        for length in range(len(parts), 0, -1):
            node, path = ".".join(parts[:length]), tuple(parts[length:])
            if node in self._names:
                if node in self._fields and not path:
                    raise InputError(
                        f"output.columns: {name!r} is a node and a field of the input; write "
                        f"input.{name} for the field, or rename it"
                    )
                self._check(name, node, path)
                return [Column(name, self._names.index(node), path)]
            models = [n for n in self._names if n.rpartition(".")[0] == node]
            if models:
                self._check(name, models[0], path)
                ends = f".{'.'.join(path)}" if path else ""
                return [Column(f"{m}{ends}", self._names.index(m), path) for m in models]
        if name in self._fields or parts[0] in self._fields:
            return [Column(name, path=(name,) if name in self._fields else tuple(parts))]
        known = ["id", *self._fields, *self._names]
        hint = suggest(name, known) or f"; there are {', '.join(known)}"
        raise InputError(f"output.columns: there is no {name!r}{hint}")

    def _check(self, name: str, node: str, path: tuple[str, ...]) -> None:
        """Refuse a field that outputs of a node cannot have."""
        known = self._outputs[node]
        if not path or known is None or path[0] in FIGURES or path[0] in known:
            return
        hint = suggest(path[0], known) or (
            f"; there are {', '.join(sorted(known))}" if known else "; they are texts"
        )
        raise InputError(
            f"output.columns: {name!r}: outputs of {node} have no field {path[0]!r}{hint}"
        )
