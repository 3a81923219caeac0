"""A bound by who has to wait for devices that others hold.

At a moment at which several nodes cannot have finished yet, no more of them hold engines than there
are devices. The others start engines after that moment, and what they have not done by then comes
after such a start. Which ones these are is up to the plan: every choice delays some node, and what
waits for it, and behind that there may be such a moment again. The choices are looked at best
first; the least of what is left open is a bound.

A choice says who holds devices, too: each of the unfinished nodes that do not wait. So none of them
holds more than these leave, and whatever more works for it is started after that moment. What a
node has to do takes until all these devices together can have done it. Nodes that wait for no other
are as simulated in sizes with no more devices than that, see :class:`Simulated`.

Whoever has no device at a moment is taken to need ``Held.start_s`` from then on until one works: an
engine start, or nothing where engines of another node may serve it, at once or after they slept. It
would be the seconds of waking if engines slept that a node gives up before it has finished.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, combinations, count

import numpy as np

from samullm_plugin.model.types import Floats
from samullm_plugin.rules.critical_path import Earliest, Paths

CHOICES, ENTRIES, NODES, MOMENTS = 600, 2_000_000, 12, 24
"""Choices that are looked at, at most; requests and inputs in all of them; unfinished nodes up to
which there are choices; and moments that are looked at for one of them. Any give a bound."""


@dataclass(frozen=True, slots=True)
class Held:
    """What a node holds.

    Attributes:
        devices: by its engines at least.
        start_s: seconds at least from beginning to start engines until they are ready.
        work_s: device seconds of its iterations at least.
    """

    devices: int
    start_s: float
    work_s: float = 0.0


@dataclass(frozen=True, slots=True)
class InSize:
    """A node that waits for no other in one size and number of replicas.

    Attributes:
        devices: that it holds.
        start_s: seconds at least of an engine start.
        ready_s: its engines are ready no earlier.
        run_s: when its requests finish, counted from then (0: not needed).
    """

    devices: int
    start_s: float
    ready_s: float
    run_s: Floats


@dataclass(frozen=True, slots=True)
class Simulated:
    """A node that waits for no other, in all its sizes.

    Attributes:
        runs: its simulations.
        again_s: moments before which its requests do not finish with engines that are started once
            more.
    """

    runs: Sequence[InSize]
    again_s: Floats

    def later_s(self, limits: Sequence[tuple[float, int]] = ()) -> Floats:
        """Return moments before which its requests do not finish.

        Those that finish before the engines that were ready first stop are where the simulation in
        their size has them, or later. If there are more of these than the node holds at some
        moment, they have stopped by then, or are started later.

        Args:
            limits: moments and how many devices it holds then at most.
        """
        least_s = self.again_s
        for run in self.runs:
            late_s = min((t for t, n in limits if n < run.devices), default=np.inf)
            finish_s = np.where(run.run_s > 0.0, run.ready_s + run.run_s, 0.0)
            if late_s < np.inf:
                after_s = late_s + run.start_s + run.run_s
                finish_s = np.where(finish_s <= late_s, finish_s, np.maximum(finish_s, after_s))
            least_s = np.minimum(least_s, finish_s)
        return least_s


@dataclass(frozen=True, slots=True)
class _Cut:
    """A moment at which it is asked which of the nodes that are unfinished hold devices.

    Attributes:
        time_s: the moment.
        nodes: those that are unfinished.
        without: so many devices at least are missing for them, if above 0.
    """

    time_s: float
    nodes: tuple[int, ...]
    without: int


@dataclass(frozen=True, slots=True)
class _Choices:
    """Who has no device at some moments, and what follows.

    Attributes:
        later_s: moments before which requests do not finish.
        least_s: by node, a moment before which its last request does not finish.
        limits: by node, moments and how many devices it holds then at most, in order.
        open_s: by node that had to wait, when an engine works for it again, and for each request a
            moment: alone from then on, it would be as far by ``open_s`` as it can be.
        time_s: the last of these moments.
    """

    later_s: Mapping[int, Floats]
    least_s: Mapping[int, float]
    limits: Mapping[int, tuple[tuple[float, int], ...]]
    open_s: Mapping[int, tuple[float, Floats]]
    time_s: float = -1.0


@dataclass(frozen=True, slots=True)
class _Found:
    """What follows from choices.

    Attributes:
        choices: they.
        earliest: when requests can begin and finish.
        ends_s: by node, a moment before which its last request does not finish.
        end_s: no makespan is less.
        cut: where the next choice is; None: there is none.
    """

    choices: _Choices
    earliest: Earliest
    ends_s: Mapping[int, float]
    end_s: float
    cut: _Cut | None


def late_starts_s(
    paths: Paths, held: Mapping[int, Held], num_gpus: int, simulated: Mapping[int, Simulated]
) -> float:
    """Return seconds that no makespan is less than.

    Args:
        paths: the requests.
        held: by index of a model that has something to do, what it holds.
        num_gpus: devices that there are.
        simulated: by index of nodes that wait for no other, how they are simulated.
    """
    if not held:
        return paths.earliest().end_s
    devices = _Devices(paths, held, num_gpus, simulated)
    first = devices.found(_Choices({}, {}, {}, {}))
    numbers, left = count(), min(CHOICES, ENTRIES // max(1, paths.entries))
    # Choices that are not followed yet stand with what is known at once of those waiting.
    least_s = max(first.end_s, devices.without_choices_s(first))
    open_: list[tuple[float, int, _Found, Sequence[int] | None]] = [
        (least_s, next(numbers), first, None)
    ]
    while True:
        end_s, _, found, chosen = open_[0]
        cut = found.cut
        if cut is None or len(cut.nodes) > NODES or left <= 0:
            return end_s
        heapq.heappop(open_)
        if chosen is not None:
            left -= 1
            then = devices.found(devices.choose(found, cut, chosen))
            heapq.heappush(open_, (max(end_s, then.end_s), next(numbers), then, None))
            continue
        ends_s = {i: devices.late_s(found, i, cut.time_s) for i in cut.nodes}
        for waiting in _late(cut, held):
            least_s = max((end_s, *(ends_s[i] for i in waiting)))
            heapq.heappush(open_, (least_s, next(numbers), found, waiting))


class _Devices:
    """Who can hold devices when."""

    def __init__(
        self,
        paths: Paths,
        held: Mapping[int, Held],
        num_gpus: int,
        simulated: Mapping[int, Simulated],
    ) -> None:
        self._paths, self._held, self._num_gpus = paths, held, num_gpus
        self._simulated = simulated
        self._behind = {(i, c): s for c in held for i, s in paths.behind_s(c).items() if i in held}
        self._tails = {i: paths.tail_s(i) for i in held}
        self._order = [i for i in paths.order if i in held]

    def found(self, choices: _Choices) -> _Found:
        """Return what follows from choices."""
        later_s = dict(choices.later_s)
        for i, simulated in self._simulated.items():
            least_s = simulated.later_s(choices.limits.get(i, ()))
            later_s[i] = np.maximum(later_s[i], least_s) if i in later_s else least_s
        earliest = self._paths.earliest(later_s)
        ends_s: dict[int, float] = {}
        heads_s = []
        for i in self._order:
            taken = self._paths.taken[i]
            head_s = float(earliest.ready_s[i][taken].min())
            if head_s > self._paths.load_s[i]:
                heads_s.append(head_s)
            limits = choices.limits.get(i, ())
            ends = [
                float(earliest.finish_s[i][taken].max()),
                choices.least_s.get(i, 0.0),
                done_s(self._held[i], head_s, limits, self._num_gpus),
            ]
            ends += [ends_s[u] + s for (u, c), s in self._behind.items() if c == i]
            ends_s[i] = max(ends)
        end_s = max((earliest.end_s, *(ends_s[i] + self._tails[i] for i in ends_s)))
        return _Found(choices, earliest, ends_s, end_s, self._cut(ends_s, heads_s, choices.time_s))

    def choose(self, found: _Found, cut: _Cut, waiting: Sequence[int]) -> _Choices:
        """Return the choices and that of who waits at a moment."""
        before, held = found.choices, self._held
        later_s, least_s = dict(before.later_s), dict(before.least_s)
        open_s = dict(before.open_s)
        for i in waiting:
            later_s[i], open_s[i] = self._delayed(found, i, cut.time_s)
            least_s[i] = max(least_s.get(i, 0.0), cut.time_s + held[i].start_s)
        holding = [i for i in cut.nodes if i not in waiting]
        free = self._num_gpus - sum(held[i].devices for i in holding)
        limits = dict(before.limits)
        for i in held:
            most = 0 if i in waiting else free + (held[i].devices if i in holding else 0)
            limits[i] = (*limits.get(i, ()), (cut.time_s, most))
        return _Choices(later_s, least_s, limits, open_s, cut.time_s)

    def _cut(
        self, ends_s: Mapping[int, float], heads_s: Sequence[float], after_s: float
    ) -> _Cut | None:
        """Return the next moment at which a node can be the next that ends, if any.

        Before them comes the one at which the first inputs are there.
        """
        moments = [e for e in ends_s.values() if e > after_s]
        if after_s < 0.0:
            moments += sorted(heads_s)[:1]
        if not moments:
            return None
        time_s = min(moments)
        nodes = tuple(i for i, e in ends_s.items() if e >= time_s)
        devices = sum(self._held[i].devices for i in nodes)
        if len(nodes) < 2:
            return None
        return _Cut(time_s, nodes, devices - self._num_gpus)

    def without_choices_s(self, found: _Found) -> float:
        """Return seconds that no makespan is less than, whoever waits at any one moment."""
        held, best_s = self._held, 0.0
        moments = sorted(set(found.ends_s.values()))
        for time_s in moments[:: -(-len(moments) // MOMENTS)]:
            nodes = [i for i in held if found.ends_s[i] >= time_s]
            without = sum(held[i].devices for i in nodes) - self._num_gpus
            if without <= 0:
                break
            ends = sorted((self.late_s(found, i, time_s), i) for i in nodes)
            waiting = accumulate(held[i].devices for _, i in ends)
            best_s = max(
                best_s,
                next(e for (e, _), n in zip(ends, waiting, strict=True) if n >= without),
            )
        return best_s

    def _delayed(
        self, found: _Found, node: int, time_s: float
    ) -> tuple[Floats, tuple[float, Floats]]:
        """Return when a node's requests finish if it has no device at a moment, and ``open_s``.

        What it can have computed of a request by then is no more than the seconds since that was
        ready, less those in which it had no device.
        """
        paths, open_at_s = self._paths, time_s + self._held[node].start_s
        finish_s, ready_s = found.earliest.finish_s[node], found.earliest.ready_s[node]
        alone_s, from_s = paths.alone_s[node], time_s
        if node in found.choices.open_s:
            since_s, known_s = found.choices.open_s[node]
            ready_s, from_s = np.maximum(ready_s, known_s), max(time_s, since_s)
        left_s = np.clip(ready_s + alone_s - from_s, 0.0, alone_s)
        waits = paths.taken[node] & (finish_s >= time_s)
        delayed_s = np.where(waits, np.maximum(finish_s, open_at_s + left_s), finish_s)
        return delayed_s, (open_at_s, open_at_s + left_s - alone_s)

    def late_s(self, found: _Found, node: int, time_s: float) -> float:
        """Return seconds that no makespan is less than if a node has no device at a moment."""
        delayed_s, _ = self._delayed(found, node, time_s)
        least_s = time_s + self._held[node].start_s + self._tails[node]
        return max(float((delayed_s + self._paths.after_s[node]).max()), least_s)


def done_s(held: Held, head_s: float, limits: Sequence[tuple[float, int]], num_gpus: int) -> float:
    """Return when a node's work can be done at the earliest.

    A device that works for it has been held since an engine start before; so at every moment in
    between.

    Args:
        held: its work and an engine start.
        head_s: no iteration of it begins before this.
        limits: moments and how many devices it holds then at most, in order.
        num_gpus: devices that there are.
    """
    left, now_s = held.work_s, head_s
    edges = sorted({e for t, _ in limits for e in (t, t + held.start_s) if e > head_s})
    for edge_s in (*edges, float("inf")):
        most = min((n for t, n in limits if t <= now_s < t + held.start_s), default=num_gpus)
        if most > 0 and left <= most * (edge_s - now_s):
            return now_s + left / most
        left -= most * (edge_s - now_s)
        now_s = edge_s
    raise AssertionError("after all limits every device can work")


def _late(cut: _Cut, held: Mapping[int, Held]) -> Iterator[tuple[int, ...]]:
    """Yield all sets of unfinished nodes without which there are devices for the others."""
    for size in range(len(cut.nodes) + 1):
        for chosen in combinations(cut.nodes, size):
            if sum(held[i].devices for i in chosen) >= cut.without:
                yield chosen
