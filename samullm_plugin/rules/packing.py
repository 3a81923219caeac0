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

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from samullm_plugin.model.types import Floats, Ints

DIVIDED = 9
"""Nodes up to which all divisions into sets are tried (3 to that power)."""

HALVINGS, EXACT = 60, 1e-6
"""Steps of bisection by device time, and relative width at which that by divisions ends."""


@dataclass(frozen=True, slots=True)
class Demand:
    """Device seconds that a node certainly costs.

    Attributes:
        work: of iterations.
        one_start: of one engine start.
        start_s: seconds that an engine start holds a device.
        load_s: when an engine can be ready at the earliest.
    """

    work: float
    one_start: float
    start_s: float
    load_s: float

    def shares(self, makespan_s: float) -> float:
        """Return on how many devices the work is done at least (inf: it cannot be)."""
        if makespan_s <= self.load_s:
            return float("inf")
        return max(1.0, float(np.ceil(self.work / (makespan_s - self.load_s) - 1e-9)))

    def within(self, makespan_s: float) -> float:
        """Return the device seconds if all is done by ``makespan_s`` (inf: it cannot be)."""
        shares = self.shares(makespan_s)
        if np.isinf(shares):
            return shares
        return self.work + max(self.one_start, shares * self.start_s)


def fitting_s(demands: Sequence[Demand], num_gpus: int) -> float:
    """Return the least makespan in which the demands fit into the devices' time."""
    if not demands:
        return 0.0
    low = max(sum(d.work + d.one_start for d in demands) / num_gpus, 0.0)
    high = 2 * low + 2 * max(d.load_s for d in demands) + 1e-9
    while sum(d.within(high) for d in demands) > num_gpus * high:
        high *= 2
    for _ in range(HALVINGS):  # the demands fall with the makespan, what devices offer rises
        middle = (low + high) / 2
        if sum(d.within(middle) for d in demands) > num_gpus * middle:
            low = middle
        else:
            high = middle
    if len(demands) > DIVIDED or _divisible(demands, num_gpus, high):
        return low
    low, high = high, 2 * high
    while not _divisible(demands, num_gpus, high):
        low, high = high, 2 * high
    while high - low > EXACT * low:
        middle = (low + high) / 2
        if _divisible(demands, num_gpus, middle):
            high = middle
        else:
            low = middle
    return low


def _divisible(demands: Sequence[Demand], num_gpus: int, makespan_s: float) -> bool:
    """Return whether some division into sets with devices of their own is not ruled out."""
    needed = _devices_of_sets(demands, makespan_s)
    count = 1 << len(demands)
    least = [0] * count
    for whole in range(1, count):
        lowest = whole & -whole
        rest = whole ^ lowest
        part, best = rest, num_gpus + 1
        while True:  # every set that holds the first node of the whole
            chosen = part | lowest
            devices = needed[chosen] + least[whole ^ chosen]
            best = min(best, devices)
            if part == 0:
                break
            part = (part - 1) & rest
        least[whole] = best
    return least[-1] <= num_gpus


def _devices_of_sets(demands: Sequence[Demand], makespan_s: float) -> list[int]:
    """Return by set of nodes (bits of its index) how many devices of their own they need."""
    shares = np.array([d.shares(makespan_s) for d in demands])
    start_s = np.array([d.start_s for d in demands])
    seconds = np.array([d.within(makespan_s) for d in demands])
    many = 10**6
    if np.isinf(shares).any():
        return [many] * (1 << len(demands))
    member = (np.arange(1 << len(demands))[:, None] >> np.arange(len(demands))) & 1
    total: Floats = member @ seconds
    edges: Floats = member @ shares
    nodes: Ints = member.sum(axis=1)
    least_s = np.where(member == 1, start_s, np.inf).min(axis=1, initial=np.inf)
    least_s[0] = 0.0
    # Without further starts; with one for each edge that a connected part has more.
    plain = np.ceil(total / makespan_s - 1e-9)
    room = np.maximum(makespan_s - least_s, 1e-12)
    joined = np.ceil((total + (nodes - 1 - edges) * least_s) / room - 1e-9)
    devices = np.where(plain + nodes - 1 <= edges, plain, np.maximum(plain, joined))
    return [int(min(d, many)) for d in np.maximum(devices, 1)]
