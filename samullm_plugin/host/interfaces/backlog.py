"""What waits for an engine, in the order in which it is to be served."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Backlog(Generic[Item]):
    """Requests that wait for an engine: the lower priority number first, then the earlier one."""

    def __init__(self) -> None:
        """Begin with none."""
        self._heap: list[tuple[int, int, Item]] = []
        self._equal: deque[Item] = deque()  # those of priority 0, as long as there are no others
        self._count = 0

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._heap) + len(self._equal)

    def add(self, priority: int, item: Item) -> None:
        """Add a request."""
        if not priority and not self._heap:
            self._equal.append(item)
            return
        while self._equal:
            self._push(0, self._equal.popleft())
        self._push(priority, item)

    def add_all(self, items: Iterable[Item]) -> None:
        """Add requests of priority 0."""
        if self._heap:
            for item in items:
                self._push(0, item)
        else:
            self._equal.extend(items)

    def _push(self, priority: int, item: Item) -> None:
        heapq.heappush(self._heap, (priority, self._count, item))
        self._count += 1

    def first(self) -> int:
        """Return the priority of the next request."""
        return self._heap[0][0] if self._heap else 0

    def take(self) -> tuple[int, Item]:
        """Return the next request, after its priority."""
        if self._heap:
            priority, _, item = heapq.heappop(self._heap)
            return priority, item
        return 0, self._equal.popleft()

    def clear(self) -> list[Item]:
        """Take all of them out and return them."""
        left = [*self._equal, *(item for _, _, item in self._heap)]
        self._equal.clear()
        self._heap.clear()
        return left
