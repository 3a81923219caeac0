"""Consecutive nodes of one model made one node, so that one engine serves them all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samullm_plugin.core.application import Application, ModelNode, RequestTable


@dataclass(frozen=True, slots=True, eq=False)
class Fused:
    """An application with fused nodes, and where the requests went.

    Attributes:
        app: the fused application.
        node: by old node index, the new one.
        offset: by old node index, what is added to its request indices.
    """

    app: Application
    node: tuple[int, ...]
    offset: tuple[int, ...]


def fuse_chains(app: Application) -> Fused:
    """Fuse every node into the one before it that uses the same model and task, where it can.

    A node joins the fused node of one of its upstream nodes if all its other upstream nodes are
    upstream of that fused node as well (paper, section 4: vertical fusion). Its requests then wait
    inside one engine for those before, as the requests of a chain do; chunked documents written as
    one node per chunk become one node.

    Args:
        app: the application.
    """
    upstreams = [set(u) for u in app.upstreams]
    group = list(range(len(app.nodes)))
    members: dict[int, list[int]] = {i: [i] for i in group}
    for i in app.order:
        head = _joins(app, i, upstreams, group)
        if head is not None:
            group[i] = head
            members[head].append(i)
            del members[i]
    heads = sorted(members)
    node = tuple(heads.index(g) for g in group)
    offset = [0] * len(app.nodes)
    for head in heads:
        total = 0
        for i in members[head]:
            offset[i] = total
            total += len(app.nodes[i].requests)
    nodes = [_fused(app, members[head], node, offset) for head in heads]
    return Fused(Application(app.name, tuple(nodes), app.notes), node, tuple(offset))


def _joins(app: Application, i: int, upstreams: list[set[int]], group: list[int]) -> int | None:
    """Return the head of the group that node ``i`` can join, or None."""
    mine = app.nodes[i]
    before = {group[u] for u in upstreams[i]}
    for head in sorted(before):
        other = app.nodes[head]
        if (other.model, other.task) != (mine.model, mine.task):
            continue
        inside = [j for j in range(len(group)) if group[j] == head]
        known = set().union(*({group[u] for u in upstreams[j]} for j in inside))
        if before - {head} <= known:
            return head
    return None


def _fused(
    app: Application, members: list[int], node: tuple[int, ...], offset: list[int]
) -> ModelNode:
    """Return one node with the requests of all members, in topological order."""
    first = app.nodes[members[0]]
    tables = [_renumbered(app.nodes[i].requests, node, offset) for i in members]
    if len(tables) == 1:
        return replace(first, requests=tables[0])
    gates = [t.gate for t in tables]
    gate = None
    if any(g is not None for g in gates):
        gate = np.concatenate(
            [np.full(len(t), -1) if g is None else g for t, g in zip(tables, gates, strict=True)]
        )
    counts = np.concatenate([np.diff(t.input_indptr) for t in tables])

    def joined(column: Callable[[RequestTable], NDArray[Any]]) -> NDArray[Any]:
        return np.concatenate([column(t) for t in tables])

    requests = RequestTable(
        prompt_tokens=joined(lambda t: t.prompt_tokens),
        max_tokens=joined(lambda t: t.max_tokens),
        prefix_id=joined(lambda t: t.prefix_id),
        prefix_tokens=joined(lambda t: t.prefix_tokens),
        input_indptr=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        input_node=joined(lambda t: t.input_node),
        input_request=joined(lambda t: t.input_request),
        input_in_prompt=joined(lambda t: t.input_in_prompt),
        probability=joined(lambda t: t.probability),
        choice=joined(lambda t: t.choice),
        gate=gate,
    )
    return replace(first, requests=requests)


def _renumbered(table: RequestTable, node: tuple[int, ...], offset: list[int]) -> RequestTable:
    """Return the table with its inputs named by new nodes and requests."""
    old = table.input_node
    return replace(
        table,
        input_node=np.asarray(node, dtype=np.int64)[old],
        input_request=table.input_request + np.asarray(offset, dtype=np.int64)[old],
    )
