"""Requests that ask again where an output is rejected, as rows of the tables that are planned.

How often outputs will be rejected is not known, so every try beyond the first is a request of its
own that is taken with a probability, as rows are that a function may give back. A run on real
engines asks the request itself again, and settles these rows with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from samullm_plugin.model.application import Application
from samullm_plugin.model.requests import RequestTable
from samullm_plugin.model.types import Bools, Ints


def with_repeats(app: Application) -> Application:
    """Return an application whose tables hold the requests that retries may make.

    A repeated request waits for what the one before it waits for, so that their prompts are alike,
    and for that one; if that one is taken, it is with the node's ``reject_rate``. Whoever waits for
    a request waits for the last of its repetitions as well, whose output is part of no prompt. They
    follow the request at once, so that the next one of a chain comes behind them.
    """
    repeats = [0 if node.fused or node.repeats else node.retries for node in app.nodes]
    if not any(repeats):
        return app
    tries = np.array([*repeats, *(0 for _ in app.python)], np.int64) + 1
    tables = [_with_waits(node.requests, tries) for node in app.all_nodes]
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


def _with_waits(table: RequestTable, tries: Ints) -> RequestTable:
    """Let requests wait for the last repetitions of those they wait for as well.

    Args:
        table: of any node.
        tries: by node, how often each of its requests will be in its table, one after another.
    """
    times = tries[table.input_node]
    also = times > 1
    if not also.any():
        return table
    none, mine = np.zeros(int(also.sum()), bool), _Entries.of(table)
    mine = replace(mine, request=mine.request * times)
    last = (mine.request + times - 1)[also]
    added = _Entries(mine.row[also], mine.node[also], last, none, none)
    return _joined([mine, added]).put_into(table)


def _repeated(table: RequestTable, index: int, count: int, rate: float) -> RequestTable:
    """Return the table of a node with every request repeated so often.

    Args:
        table: of the node; requests of its own that it waits for are numbered as they will be.
        index: of the node.
        count: repetitions of each request.
        rate: probability of each repetition.
    """
    if not count:
        return table
    num, mine, parts = len(table), _Entries.of(table), []
    rows, ones = np.arange(num) * (1 + count), np.ones(num, bool)
    for k in range(1 + count):
        parts.append(replace(mine, row=mine.row * (1 + count) + k))
        if k:
            parts.append(_Entries(rows + k, np.full(num, index), rows + k - 1, ~ones, ones))
    first = np.arange(num * (1 + count)) % (1 + count) == 0

    def repeated(column: Ints) -> Ints:
        return np.repeat(column, 1 + count)

    def free(column: Ints) -> Ints:
        return np.where(first, repeated(column), -1)

    return _joined(parts).put_into(
        replace(
            table,
            prompt_tokens=repeated(table.prompt_tokens),
            max_tokens=repeated(table.max_tokens),
            prefix_id=repeated(table.prefix_id),
            prefix_tokens=repeated(table.prefix_tokens),
            probability=np.where(first, np.repeat(table.probability, 1 + count), rate),
            choice=free(table.choice),
            gate=None if table.gate is None else free(table.gate),
        )
    )
