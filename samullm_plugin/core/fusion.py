"""Consecutive nodes of one model made one node, so that one engine serves them all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samullm_plugin.core.application import Application, ModelNode, RequestTable
from samullm_plugin.core.chains import Chains

NAMED = 3
"""Nodes up to which a fused node's name tells them all."""


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

    def joined(self, arrays: Sequence[NDArray[Any]]) -> tuple[NDArray[Any], ...]:
        """Return by new node what ``arrays`` hold by old node, a value per request."""
        found = []
        for i in range(len(self.app.nodes)):
            mine = [k for k in range(len(self.node)) if self.node[k] == i]
            mine.sort(key=lambda k: self.offset[k])
            found.append(np.concatenate([arrays[k] for k in mine]))
        return tuple(found)


def fuse_chains(app: Application, num_devices: int) -> Fused:
    """Fuse every node into the one before it that uses the same model, where it can.

    A node joins the fused node of one of its upstream nodes if all its other upstream nodes are
    upstream of that fused node as well (paper, section 4: vertical fusion). Its requests then wait
    inside one engine for those before, as the requests of a chain do; chunked documents written as
    one node per chunk become one node.

    Requests that hang together are served by one data-parallel replica. Nodes stay apart if fusing
    would tie together so many that could run side by side (all outputs in one prompt) that replicas
    could not share the work evenly: more than half of a device's even share.

    Args:
        app: the application.
        num_devices: of the cluster.
    """
    groups: dict[int, _Group] = {}
    group_of = [0] * len(app.nodes)
    for i in app.order:
        head = _join(app, i, groups, group_of, num_devices)
        if head is None:
            head = i
            groups[i] = _Group([], {}, Chains())
            groups[i].add(app, i)
        group_of[i] = head
    heads = sorted(groups)
    node = tuple(heads.index(g) for g in group_of)
    offset = tuple(groups[g].start[i] for i, g in enumerate(group_of))
    nodes = tuple(_fused(app, groups[head].members, node, offset) for head in heads)
    return Fused(Application(app.name, nodes, app.notes), node, offset)


@dataclass(slots=True)
class _Group:
    """Nodes that become one.

    Attributes:
        members: in topological order.
        start: by member, its first request.
        chains: of all their requests.
    """

    members: list[int]
    start: dict[int, int]
    chains: Chains = field(default_factory=Chains)

    def add(self, app: Application, i: int) -> None:
        """Take in a node, all of whose inputs from the group are members."""
        table, begin = app.nodes[i].requests, len(self.chains)
        self.members.append(i)
        self.start[i] = begin
        inside = np.flatnonzero(np.isin(table.input_node, self.members))
        rows = (table.input_row[inside] + begin).tolist()
        starts = np.array([self.start[int(k)] for k in table.input_node[inside]], np.int64)
        requests = (table.input_request[inside] + starts).tolist()
        self.chains.grow(len(table), zip(rows, requests, strict=True))

    def with_node(self, app: Application, i: int) -> _Group:
        """Return the group with another node."""
        other = _Group(self.members.copy(), self.start.copy(), self.chains.copy())
        other.add(app, i)
        return other


def _join(
    app: Application, i: int, groups: dict[int, _Group], group_of: list[int], num_devices: int
) -> int | None:
    """Let node ``i`` join a group if there is one; return its head, or None."""
    before = {group_of[u] for u in app.upstreams[i]}
    for head in sorted(before):
        if app.nodes[head].model != app.nodes[i].model:
            continue
        known = {group_of[u] for k in groups[head].members for u in app.upstreams[k]}
        if not before - {head} <= known:
            continue
        group = groups[head].with_node(app, i)
        even = 2 * num_devices * group.chains.most_beside <= len(group.chains)
        if even or num_devices == 1:
            groups[head] = group
            return head
    return None


def fused_name(names: Sequence[str]) -> str:
    """Return the name of a node fused of several: ``draft+revise``, ``chunk-0..chunk-59``.

    Args:
        names: of the nodes; what is before a slash (a mixed application's part) is named once.
    """
    part = names[0].rpartition("/")[0]
    rest = [n.removeprefix(f"{part}/") if part else n for n in names[1:]]
    if len(names) > NAMED:
        return f"{names[0]}..{rest[-1]}"
    return "+".join((names[0], *rest))


def _fused(
    app: Application, members: list[int], node: tuple[int, ...], offset: tuple[int, ...]
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
    parts = tuple(
        replace(p, start=p.start + offset[i], stop=p.stop + offset[i])
        for i in members
        for p in app.nodes[i].parts
    )
    name, taken = fused_name([p.name for p in parts]), {n.name for n in app.nodes}
    while name in taken:
        name += "+"
    return ModelNode(name, first.model, requests, first.task, parts)


def _renumbered(
    table: RequestTable, node: tuple[int, ...], offset: tuple[int, ...]
) -> RequestTable:
    """Return the table with its inputs named by new nodes and requests."""
    old = table.input_node
    return replace(
        table,
        input_node=np.asarray(node, dtype=np.int64)[old],
        input_request=table.input_request + np.asarray(offset, dtype=np.int64)[old],
    )
