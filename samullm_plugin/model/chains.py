"""Requests that wait for each other: chains within a node, and programs across nodes."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from samullm_plugin.model.application import Application
from samullm_plugin.model.scenarios import LengthScenario
from samullm_plugin.model.types import Floats, Ints


class Chains:
    """Which requests hang together, and how deep; grows by requests and their inputs.

    Attributes:
        depth: per request, the longest line of requests before it.
    """

    def __init__(self) -> None:
        """Begin without requests."""
        self.depth: list[int] = []
        self._parent: list[int] = []
        self._size: list[int] = []
        self._height: list[int] = []

    def copy(self) -> Chains:
        """Return one that can grow on its own."""
        other = Chains()
        other.depth, other._parent = self.depth.copy(), self._parent.copy()
        other._size, other._height = self._size.copy(), self._height.copy()
        return other

    def grow(self, num: int, inputs: Iterable[tuple[int, int]]) -> None:
        """Add requests.

        Args:
            num: how many.
            inputs: pairs of a new request and an earlier one it waits for, by new request.
        """
        begin = len(self.depth)
        self.depth += [0] * num
        self._parent += range(begin, begin + num)
        self._size += [1] * num
        self._height += [1] * num
        depth, size, height = self.depth, self._size, self._height
        for r, q in inputs:
            depth[r] = max(depth[r], depth[q] + 1)
            a, b = self._find(r), self._find(q)
            low, high = min(a, b), max(a, b)
            if low != high:
                self._parent[high] = low
                size[low] += size[high]
            height[low] = max(height[low], height[high], depth[r] + 1)

    def _find(self, r: int) -> int:
        parent = self._parent
        while parent[r] != r:
            parent[r] = parent[parent[r]]
            r = parent[r]
        return r

    def __len__(self) -> int:
        """Return the number of requests."""
        return len(self.depth)

    @property
    def first(self) -> Ints:
        """Return the least request each request hangs together with, shape ``(n,)``."""
        return np.array([self._find(r) for r in range(len(self))], dtype=np.int64)

    @property
    def most_beside(self) -> int:
        """Return the most requests of one chain that are beside its longest line.

        0 if every chain is a line.
        """
        roots = np.asarray(self._parent) == np.arange(len(self))
        beside = np.asarray(self._size) - np.asarray(self._height)
        return int(np.max(beside, where=roots, initial=0))


def chains_of(num: int, own_row: Ints, own_request: Ints) -> Chains:
    """Return the chains of a node.

    Args:
        num: its requests.
        own_row: requests that wait for others of the node, increasing.
        own_request: the earlier requests they wait for.
    """
    chains = Chains()
    chains.grow(num, zip(own_row.tolist(), own_request.tolist(), strict=True))
    return chains


def lines_of(weights: Floats, own_row: Ints, own_request: Ints) -> Ints:
    """Return requests divided into lines, in each of which every one waits for the one before.

    The heaviest line is one of them.

    Args:
        weights: of the requests, shape ``(n,)``; those of none are in no line with others.
        own_row: requests that wait for others of the node, increasing.
        own_request: the earlier requests they wait for.

    Returns:
        The number of each request's line, shape ``(n,)``.
    """
    count, weight = len(weights), weights.tolist()
    pairs = [
        (r, q)
        for r, q in zip(own_row.tolist(), own_request.tolist(), strict=True)
        if weight[r] > 0 and weight[q] > 0
    ]
    before, after = [0.0] * count, [0.0] * count
    come_from, go_to = [-1] * count, [-1] * count
    for r, q in pairs:  # earlier ones first
        if before[q] + weight[q] > before[r]:
            before[r], come_from[r] = before[q] + weight[q], q
    for r, q in reversed(pairs):
        if come_from[r] == q and after[r] + weight[r] > after[q]:
            after[q], go_to[q] = after[r] + weight[r], r
    line = list(range(count))
    for r in range(count):
        q = come_from[r]
        if q >= 0 and go_to[q] == r:
            line[r] = line[q]
    return np.array(line, np.int64)


def program_ids(app: Application) -> tuple[Ints, ...]:
    """Return for every request the program it belongs to.

    Requests that wait for each other, directly or through others, are one program. Programs are
    numbered in the order of their first request.

    Returns:
        Per node, shape ``(n,)``.
    """
    sizes = [len(n.requests) for n in app.all_nodes]
    first = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    label = np.arange(first[-1])
    edges = [
        (first[i] + n.requests.input_row, first[n.requests.input_node] + n.requests.input_request)
        for i, n in enumerate(app.all_nodes)
        if len(n.requests.input_node)
    ]
    if edges:
        rows = np.concatenate([e[0] for e in edges])
        sources = np.concatenate([e[1] for e in edges])
        while True:  # labels fall to the least of each program; paths are halved in each round
            least = label.copy()
            np.minimum.at(least, rows, label[sources])
            np.minimum.at(least, sources, label[rows])
            least = np.minimum(least, least[least])
            if np.array_equal(least, label):
                break
            label = least
    _, label = np.unique(label, return_inverse=True)
    return tuple(label[first[i] : first[i + 1]] for i in range(len(sizes)))


def tokens_before(app: Application, lengths: LengthScenario) -> tuple[Ints, ...]:
    """Return for every request the tokens on the longest path of requests that precede it.

    Args:
        app: the application.
        lengths: prompt and output lengths.

    Returns:
        Per node, shape ``(n,)``.
    """
    before: list[Ints] = [np.zeros(len(n.requests), np.int64) for n in app.all_nodes]
    for i in app.full_order:
        table, rows = app.all_nodes[i].requests, app.all_nodes[i].requests.input_row
        own = table.input_node == i
        for source in np.unique(table.input_node[~own]):
            part = table.input_node == source
            requests = table.input_request[part]
            service = lengths.prompt_tokens[source] + lengths.output_tokens[source]
            np.maximum.at(before[i], rows[part], before[source][requests] + service[requests])
        service = lengths.prompt_tokens[i] + lengths.output_tokens[i]
        for r, q in zip(rows[own], table.input_request[own], strict=True):  # earlier ones first
            before[i][r] = max(before[i][r], before[i][q] + service[q])
    return tuple(before)
