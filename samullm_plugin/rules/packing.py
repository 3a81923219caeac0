"""The least makespan in which the device time of all nodes fits into the devices.

* *Whole starts*: an engine that takes ``l`` seconds to start works at most ``C - l`` seconds of a
  makespan ``C`` on each of its devices. Devices are whole, so ``w`` device seconds of work are done
  on at least ``ceil(w / (C - l))`` of them, counted once for every start, and each such *share*
  costs a start.
* *Few nodes*: take nodes and devices as the two sides of a graph, a share as an edge. A connected
  part of ``k`` nodes and ``g`` devices has at least ``k + g - 1`` edges. So a set of nodes that has
  ``g`` devices for itself costs, in ``g * C`` device seconds, the work of its nodes and at least
  that many starts; and the nodes can be divided into such sets whose devices are no more than there
  are. All divisions of few nodes are tried.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import combinations

import numpy as np

from samullm_plugin.model.types import Floats, Ints

DIVIDED = 9
"""Nodes up to which all divisions into sets are tried (3 to that power)."""

HALVINGS, EXACT = 60, 1e-6
"""Steps of bisection by device time, and relative width at which that by divisions ends."""


@dataclass(frozen=True, slots=True, eq=False)
class InOneGo:
    """Ways to do all of a node's work without interruption; of many devices there are thousands.

    Attributes:
        devices: [ways] held, all of them to the end.
        held_s: [ways] seconds for which they are held at least, engine start included.
        end_s: [ways] no makespan is less.
        counts: numbers of devices that there is a way for, in order.
    """

    devices: Ints
    held_s: Floats
    end_s: Floats
    counts: list[int] = field(init=False, repr=False)
    _order: Ints = field(init=False, repr=False)
    _ends_s: list[float] = field(init=False, repr=False)
    _cheapest: dict[float, list[float]] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        """Order the ways by their end."""
        order = np.argsort(self.end_s, kind="stable")
        object.__setattr__(self, "counts", np.unique(self.devices).tolist())
        object.__setattr__(self, "_order", order)
        object.__setattr__(self, "_ends_s", self.end_s[order].tolist())

    def within(self, makespan_s: float, edge_s: float) -> float:
        """Return the device seconds of the cheapest that ends in time (inf: none does)."""
        count = bisect_right(self._ends_s, makespan_s * (1 + 1e-12))
        if count == 0:
            return float("inf")
        if edge_s not in self._cheapest:
            costs_s = (self.devices * (self.held_s - edge_s))[self._order]
            self._cheapest[edge_s] = np.minimum.accumulate(costs_s).tolist()
        return self._cheapest[edge_s][count - 1]


@dataclass(frozen=True, slots=True)
class Demand:
    """Device seconds that a node certainly costs.

    Either it is done in one go, in one of the ways of ``whole``, or engines are started for it at
    least twice, one after the other. Where nothing is known of what it takes in one go, one start
    is all that is sure.

    Attributes:
        work: of iterations.
        one_start: of one engine start.
        start_s: seconds that an engine start holds a device.
        head_s: no iteration begins before this; an engine has been started by then.
        tail_s: the makespan is no less than this after the last of them.
        whole: ways to do it in one go; None: not looked at.
        parted_end_s: no makespan is less if it is not done in one go.
        parted_head_s: as ``head_s`` then, without the seconds in which no engine is ready.
    """

    work: float
    one_start: float
    start_s: float
    head_s: float
    tail_s: float = 0.0
    whole: InOneGo | None = None
    parted_end_s: float = 0.0
    parted_head_s: float = 0.0

    def between(self, head_s: float, tail_s: float) -> Demand:
        """Return the demand of which no iteration is before ``head_s``, nor too near the end."""
        return replace(self, head_s=max(self.head_s, head_s), tail_s=tail_s)

    def joined(self, other: Demand) -> Demand:
        """Return the demand of two nodes that the same engines may serve one after another.

        A device that works for either has had these engines started.
        """
        return replace(
            self,
            work=self.work + other.work,
            head_s=min(self.head_s, other.head_s),
            tail_s=min(self.tail_s, other.tail_s),
        )

    def shares(self, makespan_s: float) -> float:
        """Return on how many devices at once the work is done at some time (inf: it cannot be)."""
        room_s = makespan_s - max(self.head_s, self.parted_head_s) - self.tail_s
        if room_s <= 0.0 or makespan_s < self.parted_end_s:
            return float("inf")
        shares = max(1.0, float(np.ceil(self.work / room_s - 1e-9)))
        if self.whole is None:
            return shares
        place = bisect_left(self.whole.counts, shares)
        return self.whole.counts[place] if place < len(self.whole.counts) else float("inf")

    def within(self, makespan_s: float, edge_s: float = 0.0) -> float:
        """Return the device seconds if all is done by ``makespan_s`` (inf: it cannot be).

        Args:
            makespan_s: the end.
            edge_s: at most ``start_s``: what is taken off for every device that works for it.
        """
        least = self.parted(makespan_s, edge_s)
        return least if self.whole is None else min(least, self.whole.within(makespan_s, edge_s))

    def parted(self, makespan_s: float, edge_s: float = 0.0) -> float:
        """Return :meth:`within` if it is not done in one go."""
        shares = self.shares(makespan_s)
        if np.isinf(shares):
            return shares
        # Those that work at once were started at once. Another start came before or after that.
        starts = max(self.one_start, shares * self.start_s)
        starts += 0.0 if self.whole is None else self.one_start
        off = edge_s / self.start_s if self.start_s > 0.0 else 0.0
        return self.work + starts * (1.0 - off)


def fitting_s(demands: Sequence[Demand], num_gpus: int, at_least_s: float = 0.0) -> float:
    """Return the least makespan in which the demands fit into the devices' time.

    Args:
        demands: of all nodes.
        num_gpus: devices.
        at_least_s: known to be no more than that, for demands that were no larger, say.
    """
    if not demands:
        return at_least_s
    if at_least_s > 0.0:
        nearly_s = at_least_s * (1 + EXACT)
        if _within(demands, num_gpus, nearly_s) and _divided(demands, num_gpus, nearly_s):
            return at_least_s
    low = max(sum(d.work + d.one_start for d in demands) / num_gpus, at_least_s)
    high = 2 * low + 2 * max(max(d.head_s + d.tail_s, d.parted_end_s) for d in demands) + 1e-9
    while not _within(demands, num_gpus, high):
        high *= 2
    for _ in range(HALVINGS):  # the demands fall with the makespan, what devices offer rises
        middle = (low + high) / 2
        if _within(demands, num_gpus, middle):
            high = middle
        else:
            low = middle
    if _divided(demands, num_gpus, high):
        return low
    low, high = high, 2 * high
    while not _divided(demands, num_gpus, high):
        low, high = high, 2 * high
    while high - low > EXACT * low:
        middle = (low + high) / 2
        if _divided(demands, num_gpus, middle):
            high = middle
        else:
            low = middle
    return low


def _within(demands: Sequence[Demand], num_gpus: int, makespan_s: float) -> bool:
    """Return whether the demands are no more than the devices' time."""
    return sum(d.within(makespan_s) for d in demands) <= num_gpus * makespan_s


def _divided(demands: Sequence[Demand], num_gpus: int, makespan_s: float) -> bool:
    """Return whether no division says that they do not fit; of many nodes none is looked at."""
    return len(demands) > DIVIDED or _divisible(demands, num_gpus, makespan_s)


def _divisible(demands: Sequence[Demand], num_gpus: int, makespan_s: float) -> bool:
    """Return whether some division into sets with devices of their own is not ruled out."""
    needed = _devices_of_sets(demands, makespan_s)
    least = np.zeros_like(needed)
    for whole, part in _parts(len(demands)):
        least[whole] = (needed[part] + least[whole[:, None] ^ part]).min(axis=1)
    return bool(least[-1] <= num_gpus)


@cache
def _parts(count: int) -> tuple[tuple[Ints, Ints], ...]:
    """Return the sets of so many nodes by size, each with its subsets that hold its first node.

    Every division of a set has one such part, and what is left of the set is smaller than it.

    Returns:
        by size, sets [sets] and their parts [sets, parts], nodes as bits.
    """
    found = []
    for size in range(1, count + 1):
        sets = [sum(1 << i for i in chosen) for chosen in combinations(range(count), size)]
        parts = []
        for whole in sets:
            lowest = whole & -whole
            rest = part = whole ^ lowest
            row = [lowest | rest]
            while part:
                part = (part - 1) & rest
                row.append(lowest | part)
            parts.append(row)
        found.append((np.array(sets), np.array(parts)))
    return tuple(found)


def _devices_of_sets(demands: Sequence[Demand], makespan_s: float) -> Ints:
    """Return by set of nodes (bits of its index) how many devices of their own they need."""
    start_s = np.array([d.start_s for d in demands])
    seconds = np.array([d.within(makespan_s) for d in demands])
    many = 10**6
    if np.isinf(seconds).any():
        return np.full(1 << len(demands), many)
    member = (np.arange(1 << len(demands))[:, None] >> np.arange(len(demands))) & 1
    nodes: Ints = member.sum(axis=1)
    devices: Floats = np.ceil(member @ seconds / makespan_s - 1e-9)
    # A connected part has k + g - 1 edges at least. What its nodes cost is, for any price of an
    # edge up to that of a start, no less than all edges at that price and the rest of the nodes.
    least_s = np.where(member == 1, start_s, np.inf).min(axis=1, initial=np.inf)
    for edge_s in set(start_s[start_s > 0.0].tolist()):
        rest = member @ np.array([d.within(makespan_s, min(edge_s, d.start_s)) for d in demands])
        joined = np.ceil((rest + (nodes - 1) * edge_s) / max(makespan_s - edge_s, 1e-12) - 1e-9)
        devices = np.where(least_s == edge_s, np.maximum(devices, joined), devices)
    return np.clip(devices, 1, many).astype(np.int64)
