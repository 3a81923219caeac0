"""The nodes of a run as its user wrote them, where several are served as one."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator

from samullm_plugin.model.application import Application
from samullm_plugin.model.requests import NodePart
from samullm_plugin.run.results import RequestId


class UserNodes:
    """Translates between the nodes that are planned and those the user wrote.

    Requests are reported under the user's nodes (journal, outputs, metrics, progress), engines
    under the planned ones. They differ where nodes were fused.

    Attributes:
        parts: by the user's name, the planned node and its part, in the planned order.
    """

    def __init__(self, app: Application) -> None:
        """Take the names from an application as it is planned."""
        self.parts: dict[str, tuple[int, NodePart]] = {
            p.name: (i, p) for i, node in enumerate(app.all_nodes) for p in node.parts
        }
        self._names = [[p.name for p in node.parts] for node in app.all_nodes]
        self._starts = [[p.start for p in node.parts] for node in app.all_nodes]
        repeated = any(p.repeats for node in app.all_nodes for p in node.parts)
        tries = [[1 + p.repeats for p in n.parts] for n in app.all_nodes]
        self._tries = tries if repeated else []

    def __iter__(self) -> Iterator[tuple[str, int, NodePart]]:
        """Yield each of the user's nodes, the planned node it is in, and its part of that."""
        for name, (node, part) in self.parts.items():
            yield name, node, part

    def written(self, request: RequestId) -> tuple[str, int]:
        """Return the user's node a request belongs to, and its index there.

        Of a planned repetition these are what it repeats.
        """
        node, r = request
        starts = self._starts[node]
        k = bisect_right(starts, r) - 1 if len(starts) > 1 else 0
        index = r - starts[k]
        if self._tries:
            index //= self._tries[node][k]
        return self._names[node][k], index

    def repeats(self, request: RequestId) -> bool:
        """Return whether a request is there for the case that another's output is rejected."""
        if not self._tries:
            return False
        node, r = request
        k = bisect_right(self._starts[node], r) - 1
        return (r - self._starts[node][k]) % self._tries[node][k] > 0

    def planned(self, name: str, request: int) -> RequestId | None:
        """Return the planned request behind one of the user's; None if there is none."""
        if name not in self.parts:
            return None
        node, part = self.parts[name]
        return (node, part.place(request)) if 0 <= request < len(part) else None
