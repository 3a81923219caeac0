"""Request bookkeeping of one node: what it waits for, and which replica serves what."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from copy import copy

import numpy as np

from samullm_plugin.model.application import Application
from samullm_plugin.model.chains import chains_of
from samullm_plugin.model.types import Bools, Floats, Ints


class NodeInputs:
    """The inputs of one node's requests, laid out for vectorised use.

    Attributes:
        has_chain: some requests wait for earlier ones of the same node.
        chain: by request, the first request of its chain in this node, shape ``(n,)``; chains that
            join anywhere are one.
        own_row: requests that wait for an earlier one of this node, one entry per such input,
            increasing.
        own_request: the earlier request of each entry.
    """

    def __init__(self, app: Application, node: int) -> None:
        """Lay out the inputs of ``app.all_nodes[node]``."""
        table = app.all_nodes[node].requests
        self._num = len(table)
        rows = table.input_row
        own = table.input_node == node
        self.own_row, self.own_request = rows[own], table.input_request[own]
        # Rows of a Python node that wait for its calls are dealt to no replica.
        self.has_chain = node < len(app.nodes) and bool(own.any())
        self.chain = (
            chains_of(self._num, self.own_row, self.own_request).first
            if self.has_chain
            else np.arange(self._num)
        )
        outside = ~own
        self._rows = rows[outside]
        self._sources = [
            (int(s), np.flatnonzero(table.input_node[outside] == s))
            for s in np.unique(table.input_node[outside])
        ]
        self._nodes, self._requests = table.input_node[outside], table.input_request[outside]
        counts = np.bincount(self._rows, minlength=self._num)
        self._waiting = np.flatnonzero(counts)
        self._starts = np.cumsum(counts[self._waiting]) - counts[self._waiting]
        self._past: tuple[Ints, Ints] | None = None

    def past(self, taken: Bools) -> NodeInputs:
        """Return the inputs where some requests are not taken: those are settled with their inputs.

        Whoever waits for one that is not taken waits for what that waits for.

        Args:
            taken: which requests are needed, shape ``(n,)``.
        """
        if not self.has_chain or taken.all():
            return self
        plain = taken[self.own_row] & taken[self.own_request]
        waits: dict[int, set[int]] = defaultdict(set)  # taken requests before, in this node
        past: dict[int, set[int]] = defaultdict(set)  # those between, one for equal outside inputs
        alike = self._alike(taken)
        rest = (self.own_row[~plain].tolist(), self.own_request[~plain].tolist())
        for r, q in zip(*rest, strict=True):  # inputs come before
            waits[r] |= {q} if taken[q] else waits[q]
            if not taken[q]:
                past[r] |= past[q]
                if q in alike:
                    past[r].add(alike[q])
        rows, requests = _pairs(waits)
        new = copy(self)
        row = np.concatenate([self.own_row[plain], rows])
        order = np.argsort(row, kind="stable")
        new.own_row = row[order]
        new.own_request = np.concatenate([self.own_request[plain], requests])[order]
        new._past = _pairs(past)
        return new

    def _alike(self, taken: Bools) -> dict[int, int]:
        """Return, for those not taken, the first that waits for the same requests of other nodes.

        Those that wait for none are left out.
        """
        found: dict[int, int] = {}
        first: dict[tuple[tuple[int, int], ...], int] = {}
        bounds = np.append(self._starts, len(self._rows)).tolist()
        parts = zip(self._waiting.tolist(), bounds[:-1], bounds[1:], strict=True)
        for r, a, b in parts:
            if not taken[r]:
                pairs = zip(self._nodes[a:b].tolist(), self._requests[a:b].tolist(), strict=True)
                found[r] = first.setdefault(tuple(sorted(pairs)), r)
        return found

    def settled_s(self, taken: Bools, available_s: Floats | None, finish_s: Floats) -> Floats:
        """Return ``finish_s`` with requests that are not taken settled once their inputs are.

        Args:
            taken: as given to :meth:`past`.
            available_s: as :meth:`available_s` returned.
            finish_s: when the requests finish that are taken, shape ``(n,)``.
        """
        done = np.zeros(self._num) if available_s is None else available_s
        result = np.where(taken, finish_s, done)
        if self.has_chain:
            mine = ~taken[self.own_row]
            np.maximum.at(result, self.own_row[mine], finish_s[self.own_request[mine]])
        return result

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
        if self._past is not None:
            rows, past = self._past
            np.maximum.at(result, rows, result[past])
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
        first = self.heads(remaining)
        if arrival_s is not None:
            first = first[np.argsort(arrival_s[first], kind="stable")]
        chains, at = np.unique(self.chain[remaining[first]], return_index=True)
        turn = np.empty(len(chains), np.int64)
        turn[np.argsort(at)] = np.arange(len(chains))
        mine = np.searchsorted(chains, self.chain[remaining])
        return np.asarray(turn[mine] % num_replicas, dtype=np.int64)

    def heads(self, remaining: Ints) -> Ints:
        """Return the positions in ``remaining`` of requests that wait for none of them."""
        left = np.zeros(self._num, bool)
        left[remaining] = True
        left[self.own_row[left[self.own_request]]] = False
        return np.flatnonzero(left[remaining])

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


def _pairs(sets: Mapping[int, set[int]]) -> tuple[Ints, Ints]:
    """Return keys and members of sets as two arrays, one entry per member."""
    rows = [r for r, members in sets.items() for _ in members]
    return np.array(rows, np.int64), np.array([q for m in sets.values() for q in m], np.int64)
