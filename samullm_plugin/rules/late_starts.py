"""A bound by who has to wait for devices that others hold.

At a moment at which several nodes cannot have finished yet, no more of them hold engines than there
are devices. The others start engines after that moment, and what they have not done by then comes
after such a start. Which ones these are is up to the plan: every choice delays some node, and what
waits for it, and behind that there may be such a moment again. The choices are looked at best
first; the least of what is left open is a bound.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, combinations, count

import numpy as np

from samullm_plugin.model.types import Floats
from samullm_plugin.rules.critical_path import Earliest, Paths

CHOICES, ENTRIES, NODES, MOMENTS = 300, 1_000_000, 12, 24
"""Choices that are looked at, at most; requests and inputs in all of them; unfinished nodes up to
which there are choices; and moments that are looked at for one of them. Any give a bound."""


@dataclass(frozen=True, slots=True)
class Held:
    """What a node holds.

    Attributes:
        devices: by its engines at least.
        start_s: seconds at least from beginning to start engines until they are ready.
    """

    devices: int
    start_s: float


@dataclass(frozen=True, slots=True)
class _Cut:
    """A moment at which not all nodes that are unfinished hold devices.

    Attributes:
        time_s: the moment.
        end_s: no makespan is less.
        nodes: those that are unfinished.
        without: so many devices at least are missing for them.
    """

    time_s: float
    end_s: float
    nodes: tuple[int, ...]
    without: int


def late_starts_s(
    paths: Paths, held: Mapping[int, Held], num_gpus: int, later_s: Mapping[int, Floats]
) -> float:
    """Return seconds that no makespan is less than.

    Args:
        paths: the requests.
        held: by index of a model that has something to do, what it holds.
        num_gpus: devices that there are.
        later_s: moments before which requests do not finish, see :meth:`Paths.earliest`.
    """
    first = paths.earliest(later_s)
    if sum(h.devices for h in held.values()) <= num_gpus:
        return first.end_s
    numbers, left = count(), min(CHOICES, ENTRIES // max(1, paths.entries))
    cut = _cut(paths, held, num_gpus, first)
    end_s = first.end_s if cut is None else max(first.end_s, cut.end_s)
    open_ = [(end_s, next(numbers), dict(later_s), first, cut)]
    while True:
        end_s, _, later, earliest, cut = open_[0]
        if cut is None or len(cut.nodes) > NODES:
            return end_s
        choices = list(_late(cut, held, left))
        left -= len(choices)
        if left <= 0:
            return end_s
        heapq.heappop(open_)
        for chosen in choices:
            more = dict(later)
            for node in chosen:
                more[node] = _delayed(paths, held[node].start_s, earliest, node, cut.time_s)
            then = paths.earliest(more)
            # A choice that delays nothing would be made again and again.
            pairs = zip(then.finish_s, earliest.finish_s, strict=True)
            news = any((a > b).any() for a, b in pairs)
            next_cut = _cut(paths, held, num_gpus, then) if news else None
            least_s = max(end_s, then.end_s, 0.0 if next_cut is None else next_cut.end_s)
            heapq.heappush(open_, (least_s, next(numbers), more, then, next_cut))


def _cut(paths: Paths, held: Mapping[int, Held], num_gpus: int, earliest: Earliest) -> _Cut | None:
    """Return the moment that says most, or None if there are devices for all at each."""
    ends_s = {i: float(earliest.finish_s[i][paths.taken[i]].max()) for i in held}
    moments = sorted(set(ends_s.values()))
    best: _Cut | None = None
    for time_s in moments[:: -(-len(moments) // MOMENTS)]:
        nodes = tuple(i for i in held if ends_s[i] >= time_s)
        without = sum(held[i].devices for i in nodes) - num_gpus
        if without <= 0:
            break
        ends = sorted((_end_s(paths, held[i], earliest, i, time_s), i) for i in nodes)
        waiting = accumulate(held[i].devices for _, i in ends)
        end_s = next(e for (e, _), devices in zip(ends, waiting, strict=True) if devices >= without)
        if best is None or end_s > best.end_s:
            best = _Cut(time_s, end_s, nodes, without)
    return best


def _late(cut: _Cut, held: Mapping[int, Held], most: int) -> Iterator[Sequence[int]]:
    """Yield the least sets of nodes that can be without devices, ``most`` + 1 of them at most."""
    found = 0
    for size in range(1, len(cut.nodes) + 1):
        for chosen in combinations(cut.nodes, size):
            devices = [held[i].devices for i in chosen]
            if sum(devices) - min(devices) < cut.without <= sum(devices):
                yield chosen
                found += 1
                if found > most:
                    return


def _delayed(paths: Paths, start_s: float, earliest: Earliest, node: int, time_s: float) -> Floats:
    """Return when a node's requests finish at the earliest if it has no device at a moment.

    What it can have computed of a request by then is no more than the seconds since that was ready.
    """
    finish_s, alone_s = earliest.finish_s[node], paths.alone_s[node]
    left_s = np.clip(earliest.ready_s[node] + alone_s - time_s, 0.0, alone_s)
    waits = paths.taken[node] & (finish_s >= time_s)
    return np.where(waits, np.maximum(finish_s, time_s + start_s + left_s), finish_s)


def _end_s(paths: Paths, held: Held, earliest: Earliest, node: int, time_s: float) -> float:
    """Return seconds that no makespan is less than if a node has no device at a moment."""
    ends_s = _delayed(paths, held.start_s, earliest, node, time_s) + paths.after_s[node]
    return float(ends_s.max())
