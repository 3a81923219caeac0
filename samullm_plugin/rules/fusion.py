"""Consecutive nodes of one model made one node, so that one engine serves them all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samullm_plugin.errors import InputError
from samullm_plugin.model.application import Application, ModelNode
from samullm_plugin.model.chains import Chains
from samullm_plugin.model.requests import RequestTable

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
        for i in range(len(self.app.all_nodes)):
            mine = [k for k in range(len(self.node)) if self.node[k] == i]
            mine.sort(key=lambda k: self.offset[k])
            found.append(np.concatenate([arrays[k] for k in mine]))
        return tuple(found)


def fuse_chains(app: Application, num_devices: int) -> Fused:
    """Fuse every node into the one before it that uses the same model, where it can.

    A node joins the fused node of one of its upstream nodes if all its other upstream nodes are
    upstream of that fused node as well, however far (paper, section 4: vertical fusion). Its
    requests then wait inside one engine for those before, as the requests of a chain do; chunked
    documents written as one node per chunk become one node.

    Requests that hang together are served by one data-parallel replica. Nodes stay apart if fusing
    would tie together so many that could run side by side (all outputs in one prompt) that replicas
    could not share the work evenly: more than half of a device's even share.

    Args:
        app: the application.
        num_devices: of the cluster.
    """
    groups: dict[int, NodeGroup] = {}
    group_of = [0] * len(app.nodes)
    for i in app.order:
        before = {group_of[u] for u in app.upstreams[i]}
        head = _join(app, i, groups, before, num_devices)
        if head is None:
            head = i
            groups[i] = NodeGroup(set().union(before, *(groups[g].upstream for g in before)))
            groups[i].add(app, i)
        group_of[i] = head
    return _fuse(app, {g: groups[g].members for g in groups}, {})


def fuse_groups(app: Application, groups: Mapping[str, Sequence[str]]) -> Fused:
    """Fuse the nodes that are named, as a plan was made for them.

    Args:
        app: the application.
        groups: by the name of each fused node, its nodes; their requests are in this order, as far
            as none comes before one that it waits for.

    Raises:
        InputError: if one is not there, they have different models, or a cycle comes of it.
    """
    members = {i: [i] for i in range(len(app.nodes))}
    names: dict[int, str] = {}
    taken: set[str] = set()
    for name, parts in groups.items():
        once = len({*parts} - taken) == len(parts)
        taken |= {*parts}
        if not parts or not once:
            raise InputError(f"fused node {name}: it has no nodes, or one that is fused already")
        mine = _in_order(app, [app.index(p) for p in parts])
        if any(app.nodes[i].model != app.nodes[mine[0]].model for i in mine):
            raise InputError(f"{', '.join(parts)} have different models and cannot be one node")
        for i in mine:
            del members[i]
        members[mine[0]], names[mine[0]] = mine, name
    return _fuse(app, members, names)


def _in_order(app: Application, nodes: Sequence[int]) -> list[int]:
    """Return nodes as they are given, but each behind those among them that it waits for."""
    left, found = list(nodes), []
    while left:
        able = (i for i in left if app.upstreams[i].isdisjoint(left))
        found.append(next(able))
        left.remove(found[-1])
    return found


def _fuse(
    app: Application, members: Mapping[int, Sequence[int]], names: Mapping[int, str]
) -> Fused:
    """Return the application with nodes made one.

    Args:
        app: the application.
        members: by the first node of each, all nodes that become one, in topological order.
        names: names of those, where they are given.
    """
    heads = sorted(members)
    node, offset = [0] * len(app.nodes), [0] * len(app.nodes)
    for k, head in enumerate(heads):
        start = 0
        for i in members[head]:
            node[i], offset[i] = k, start
            start += len(app.nodes[i].requests)
    node += range(len(heads), len(heads) + len(app.python))
    offset += [0] * len(app.python)
    nodes = tuple(_fused(app, members[h], node, offset, names.get(h)) for h in heads)
    python = tuple(replace(p, requests=_renumbered(p.requests, node, offset)) for p in app.python)
    return Fused(Application(app.name, nodes, app.notes, python), tuple(node), tuple(offset))


@dataclass(slots=True)
class NodeGroup:
    """Nodes that become one.

    Attributes:
        upstream: heads of the groups whose outputs it needs, however far.
        members: in topological order.
        start: by member, its first request.
        chains: of all their requests.
    """

    upstream: set[int]
    members: list[int] = field(default_factory=list)
    start: dict[int, int] = field(default_factory=dict)
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

    def is_even(self, num_devices: int) -> bool:
        """Return whether replicas can share the requests evenly, though some hang together."""
        return num_devices == 1 or 2 * num_devices * self.chains.most_beside <= len(self.chains)

    def with_node(self, app: Application, i: int) -> NodeGroup:
        """Return the group with another node."""
        copies = self.members.copy(), self.start.copy(), self.chains.copy()
        other = NodeGroup(self.upstream, *copies)
        other.add(app, i)
        return other


def _join(
    app: Application, i: int, groups: dict[int, NodeGroup], before: set[int], num_devices: int
) -> int | None:
    """Let node ``i`` join one of the groups before it, if it can; return its head, or None."""
    for head in sorted(before):
        if app.nodes[head].model != app.nodes[i].model:
            continue
        if not before - {head} <= groups[head].upstream:
            continue
        if app.through_python[i] & set(groups[head].members):
            continue  # it would wait for a Python node that waits for it
        group = groups[head].with_node(app, i)
        if group.is_even(num_devices):
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
    app: Application,
    members: Sequence[int],
    node: Sequence[int],
    offset: Sequence[int],
    name: str | None,
) -> ModelNode:
    """Return one node with the requests of all members, in topological order."""
    first = app.nodes[members[0]]
    tables = [_renumbered(app.nodes[i].requests, node, offset) for i in members]
    if len(tables) == 1:
        return replace(first, requests=tables[0])
    gate = needed = None
    if any(t.gate is not None for t in tables):
        gate = np.concatenate([np.full(len(t), -1) if t.gate is None else t.gate for t in tables])
    if any(t.input_needed is not None for t in tables):
        needed = np.concatenate(
            [
                np.zeros(len(t.input_node), bool) if t.input_needed is None else t.input_needed
                for t in tables
            ]
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
        input_needed=needed,
    )
    parts = tuple(
        replace(p, start=p.start + offset[i], stop=p.stop + offset[i])
        for i in members
        for p in app.nodes[i].parts
    )
    own, taken = name or fused_name([p.name for p in parts]), {n.name for n in app.nodes}
    while own in taken:
        own += "+"
    return ModelNode(own, first.model, requests, first.task, parts)


def _renumbered(table: RequestTable, node: Sequence[int], offset: Sequence[int]) -> RequestTable:
    """Return the table with its inputs named by new nodes and requests."""
    old = table.input_node
    return replace(
        table,
        input_node=np.asarray(node, dtype=np.int64)[old],
        input_request=table.input_request + np.asarray(offset, dtype=np.int64)[old],
    )
