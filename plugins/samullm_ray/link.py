"""Exactly-once streams over calls that may be lost, repeated or overtake one another.

The coordinator and the agent of a machine exchange two streams of items: commands one way, news
the other. Every item has a number. A sender keeps items until they are acknowledged and sends them
again as often as it likes; a receiver hands each item on once, in order. This is the sliding window
of TCP (RFC 9293) with items in place of bytes and without a limit of the window.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Batch(Generic[Item]):
    """Consecutive items of a stream.

    Attributes:
        first: number of the first.
        items: the items.
    """

    first: int
    items: tuple[Item, ...]


@dataclass(slots=True)
class Outgoing(Generic[Item]):
    """The sender's end: keeps items until they are acknowledged.

    Attributes:
        acknowledged: number of items the other side has.
    """

    acknowledged: int = 0
    _kept: deque[Item] = field(default_factory=deque)

    def add(self, item: Item) -> None:
        """Append an item to the stream."""
        self._kept.append(item)

    def acknowledge(self, count: int) -> None:
        """Forget the first ``count`` items of the stream; word of older counts changes nothing."""
        while self.acknowledged < count and self._kept:
            self._kept.popleft()
            self.acknowledged += 1

    def __len__(self) -> int:
        """Return the number of items that are not acknowledged."""
        return len(self._kept)

    def batch(self) -> Batch[Item]:
        """Return everything that is not acknowledged."""
        return Batch(self.acknowledged, tuple(self._kept))

    def since(self, number: int) -> Batch[Item]:
        """Return what is not acknowledged, without the items before ``number``."""
        skipped = max(0, number - self.acknowledged)
        return Batch(self.acknowledged + skipped, tuple(self._kept)[skipped:])


@dataclass(slots=True)
class Incoming(Generic[Item]):
    """The receiver's end: hands every item on once, in order.

    Attributes:
        received: number of items handed on, which is what to acknowledge.
    """

    received: int = 0
    _early: dict[int, Item] = field(default_factory=dict)

    def take(self, batch: Batch[Item]) -> Sequence[Item]:
        """Return the items that are due now; those that came early are kept until theirs are."""
        self._early |= _numbered(batch, self.received)
        due = []
        while self.received in self._early:
            due.append(self._early.pop(self.received))
            self.received += 1
        return due


def _numbered(batch: Batch[Item], wanted: int) -> dict[int, Item]:
    numbers: Iterable[int] = range(batch.first, batch.first + len(batch.items))
    return {n: item for n, item in zip(numbers, batch.items, strict=True) if n >= wanted}
