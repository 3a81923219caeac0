"""Requests of one node that wait for earlier ones of the same node."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

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
