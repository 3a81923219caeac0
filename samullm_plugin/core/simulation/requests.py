"""Request bookkeeping of one node: what it waits for, and which replica serves what."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from samullm_plugin.core.application import Application

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


class NodeInputs:
    """The inputs of one node's requests, laid out for vectorised use.

    Attributes:
        has_chain: some requests wait for earlier ones of the same node.
        chain: by request, the first request of its chain in this node, shape ``(n,)``; chains that
            join anywhere are one.
        own_row: requests that wait for an earlier one of this node, one entry per such input.
        own_request: the earlier request of each entry.
    """

    def __init__(self, app: Application, node: int) -> None:
        """Lay out the inputs of ``app.nodes[node]``."""
        table = app.nodes[node].requests
        self._num = len(table)
        rows = table.input_row
        own = table.input_node == node
        self.own_row, self.own_request = rows[own], table.input_request[own]
        self.has_chain = bool(own.any())
        self.chain = _first_of_chain(self._num, self.own_row, self.own_request)
        outside = ~own
        self._rows = rows[outside]
        self._sources = [
            (int(s), np.flatnonzero(table.input_node[outside] == s))
            for s in np.unique(table.input_node[outside])
        ]
        self._requests = table.input_request[outside]
        counts = np.bincount(self._rows, minlength=self._num)
        self._waiting = np.flatnonzero(counts)
        self._starts = np.cumsum(counts[self._waiting]) - counts[self._waiting]

    def available_s(self, finish_s: Sequence[Floats]) -> Floats | None:
        """Return when the outputs of other nodes that each request needs are there.

        Args:
            finish_s: per node, when its requests finish (inf: not foreseen).

        Returns:
            Shape ``(n,)``, 0 for requests that wait for no other node; None if none does.
        """
        if not len(self._waiting):
            return None
        values = np.empty(len(self._rows))
        for source, part in self._sources:
            values[part] = finish_s[source][self._requests[part]]
        result = np.zeros(self._num)
        result[self._waiting] = np.maximum.reduceat(values, self._starts)
        return result

    def spread(self, remaining: Ints, num_replicas: int, arrival_s: Floats | None = None) -> Ints:
        """Deal requests to replicas in turn as they arrive, whole chains together.

        Args:
            remaining: request indices in order.
            num_replicas: data-parallel size.
            arrival_s: when the outputs of other nodes that each of ``remaining`` waits for are
                there; None: from the start.

        Returns:
            The replica of each of ``remaining``.
        """
        replica = np.empty(len(remaining), np.int64)
        if not self.has_chain:
            order = slice(None) if arrival_s is None else np.argsort(arrival_s, kind="stable")
            replica[order] = np.arange(len(remaining)) % num_replicas
            return replica
        # A chain arrives with the first of its requests that waits for none of this node.
        left = np.zeros(self._num, bool)
        left[remaining] = True
        left[self.own_row[left[self.own_request]]] = False
        first = np.flatnonzero(left[remaining])
        if arrival_s is not None:
            first = first[np.argsort(arrival_s[first], kind="stable")]
        chains, at = np.unique(self.chain[remaining[first]], return_index=True)
        turn = np.empty(len(chains), np.int64)
        turn[np.argsort(at)] = np.arange(len(chains))
        mine = np.searchsorted(chains, self.chain[remaining])
        return np.asarray(turn[mine] % num_replicas, dtype=np.int64)

    def with_chains_whole(self, remaining: Ints, replica: Ints) -> Ints:
        """Return the replicas with every chain on the one of its first remaining request."""
        if not self.has_chain:
            return replica
        _, first, rank = np.unique(self.chain[remaining], return_index=True, return_inverse=True)
        return np.asarray(replica[first][rank], dtype=np.int64)

    def releases(self, part: Ints) -> tuple[Ints, Ints] | None:
        """Return the successor lists of the requests of one replica.

        Args:
            part: request indices of the replica, increasing.

        Returns:
            ``release_index`` and ``release_indptr`` over positions in ``part``, or None without
            chains. Inputs outside ``part`` (finished before) are left out.
        """
        if not self.has_chain:
            return None
        position = np.full(self._num, -1, np.int64)
        position[part] = np.arange(len(part))
        source, target = position[self.own_request], position[self.own_row]
        inside = (source >= 0) & (target >= 0)
        source, target = source[inside], target[inside]
        order = np.argsort(source, kind="stable")
        counts = np.bincount(source, minlength=len(part))
        return target[order], np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def _first_of_chain(num: int, own_row: Ints, own_request: Ints) -> Ints:
    """Return the least request each request is joined with."""
    first = np.arange(num)

    def find(r: int) -> int:
        while first[r] != r:
            first[r] = first[first[r]]
            r = int(first[r])
        return r

    for r, q in zip(own_row, own_request, strict=True):
        a, b = find(int(r)), find(int(q))
        first[max(a, b)] = min(a, b)
    for r in range(num if len(own_row) else 0):  # earlier ones are settled first
        first[r] = first[first[r]]
    return first
