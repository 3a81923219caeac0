"""Requests that ask again where an output is rejected, as rows of the tables that are planned.

How often outputs will be rejected is not known, so every try beyond the first is a request of its
own that is taken with a probability, as rows are that a function may give back. A run on real
engines asks the request itself again, and settles these rows with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from samullm_plugin.model.application import Application, RequestTable
from samullm_plugin.model.types import Bools, Ints


def with_repeats(app: Application) -> Application:
    """Return an application whose tables hold the requests that retries may make.

    A repeated request waits for what the one before it waits for, so that their prompts are alike,
    and for that one; if that one is taken, it is with the node's ``reject_rate``. Whoever waits for
    a request waits for the last of its repetitions as well, whose output is part of no prompt.

    Nodes whose requests wait for one another (chains) are left as they are: a repetition would have
    to come before the request that waits for it.
    """
    repeats = [
        0 if node.fused or node.repeats or (node.requests.input_node == i).any() else node.retries
        for i, node in enumerate(app.nodes)
    ]
    if not any(repeats):
        return app
    last = [r * len(n.requests) for n, r in zip(app.nodes, repeats, strict=True)]
    last += [0] * len(app.python)
    tables = [_with_waits(node.requests, last) for node in app.all_nodes]
    nodes = tuple(
        replace(node, requests=_repeated(table, i, count, node.reject_rate), repeats=count)
        for i, (node, table, count) in enumerate(zip(app.nodes, tables, repeats, strict=False))
    )
    rest = tables[len(nodes) :]
    python = tuple(replace(n, requests=t) for n, t in zip(app.python, rest, strict=True))
    return Application(app.name, nodes, app.notes, python)


@dataclass(frozen=True, slots=True, eq=False)
class _Entries:
    """Inputs of a table in any order, a value of each per entry."""

    row: Ints
    node: Ints
    request: Ints
    in_prompt: Bools
    needed: Bools

    @classmethod
    def of(cls, table: RequestTable) -> _Entries:
        """Return the inputs of a table."""
        needed = table.input_needed
        return cls(
            table.input_row,
            table.input_node,
            table.input_request,
            table.input_in_prompt,
            np.zeros(len(table.input_node), bool) if needed is None else needed,
        )

    def put_into(self, table: RequestTable) -> RequestTable:
        """Return the table with these inputs."""
        order = np.argsort(self.row, kind="stable")
        counts = np.bincount(self.row, minlength=len(table))
        return replace(
            table,
            input_indptr=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            input_node=self.node[order],
            input_request=self.request[order],
            input_in_prompt=self.in_prompt[order],
            input_needed=self.needed[order] if self.needed.any() else None,
        )


def _joined(parts: Sequence[_Entries]) -> _Entries:
    """Return the inputs of several."""
    columns = ("row", "node", "request", "in_prompt", "needed")
    return _Entries(*(np.concatenate([getattr(p, c) for p in parts]) for c in columns))


def _with_waits(table: RequestTable, last: Sequence[int]) -> RequestTable:
    """Let requests wait for the last repetitions of those they wait for as well.

    Args:
        table: of any node.
        last: by node, how far behind a request its last repetition is; 0: it has none.
    """
    behind = np.asarray(last, np.int64)[table.input_node]
    also = behind > 0
    if not also.any():
        return table
    none = np.zeros(int(also.sum()), bool)
    mine = _Entries.of(table)
    added = _Entries(mine.row[also], mine.node[also], mine.request[also] + behind[also], none, none)
    return _joined([mine, added]).put_into(table)


def _repeated(table: RequestTable, index: int, count: int, rate: float) -> RequestTable:
    """Return the table of a node with every request repeated so often.

    Args:
        table: of the node.
        index: of the node.
        count: repetitions of each request.
        rate: probability of each repetition.
    """
    if not count:
        return table
    num, mine = len(table), _Entries.of(table)
    rows, ones, parts = np.arange(num), np.ones(num, bool), [mine]
    for k in range(1, count + 1):
        parts.append(replace(mine, row=mine.row + k * num))
        before = rows + (k - 1) * num
        parts.append(_Entries(rows + k * num, np.full(num, index), before, ~ones, ones))
    free = np.full(count * num, -1, np.int64)

    def tiled(column: Ints) -> Ints:
        return np.tile(column, 1 + count)

    return _joined(parts).put_into(
        replace(
            table,
            prompt_tokens=tiled(table.prompt_tokens),
            max_tokens=tiled(table.max_tokens),
            prefix_id=tiled(table.prefix_id),
            prefix_tokens=tiled(table.prefix_tokens),
            probability=np.concatenate([table.probability, np.full(count * num, rate)]),
            choice=np.concatenate([table.choice, free]),
            gate=None if table.gate is None else np.concatenate([table.gate, free]),
        )
    )
