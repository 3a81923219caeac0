"""Lower bounds in ticks, and the order in which they are sought."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from samullm_cpsat.branching import Branching, tables_of
from samullm_cpsat.instance import Instance, Mode
from samullm_cpsat.placing import Counted, place
from samullm_cpsat.pools import give_parts
from samullm_cpsat.schedule import Schedule, by_weight


@dataclass(frozen=True, slots=True)
class Paths:
    """What precedence alone demands, whatever the modes.

    Attributes:
        earliest: by task, no end is before this tick.
        rest: by task, no makespan is less than this after its end.
    """

    earliest: tuple[int, ...]
    rest: tuple[int, ...]


def paths(instance: Instance, *, switching: bool) -> Paths:
    """Return the shortest paths to and from each task.

    Args:
        instance: tasks and lags.
        switching: tasks may have several segments; a consumer that is taken up again later is then
            not held to its tail.
    """
    order = instance.order()
    earliest = [_shortest(t.modes, switching) for t in instance.tasks]
    rest = [0] * len(instance.tasks)
    tails = [0 if switching else min(map(min, lag.tail)) for lag in instance.lags]
    for i in order:
        for lag, tail in zip(instance.lags, tails, strict=True):
            if lag.consumer == i:
                earliest[i] = max(earliest[i], earliest[lag.producer] + tail)
    for i in reversed(order):
        for lag, tail in zip(instance.lags, tails, strict=True):
            if lag.producer == i:
                rest[i] = max(rest[i], rest[lag.consumer] + tail)
    return Paths(tuple(earliest), tuple(rest))


def _shortest(modes: Sequence[Mode], switching: bool) -> int:
    """Return the least ticks of a task."""
    if switching:  # work shared between modes takes no less than all of it in the fastest
        return min(m.load for m in modes) + min(m.work for m in modes)
    return min(m.duration for m in modes)


def simple_bound(instance: Instance, *, switching: bool) -> int:
    """Return a bound by device ticks and by the longest shortest path."""
    ticks = 0
    for task in instance.tasks:
        if switching:
            load = min(m.devices * m.load for m in task.modes)
            ticks += load + min(m.devices * m.work for m in task.modes)
        else:
            ticks += min(m.devices * m.duration for m in task.modes)
    by_path = paths(instance, switching=switching)
    longest = max(e + r for e, r in zip(by_path.earliest, by_path.rest, strict=True))
    return max(-(-ticks // instance.num_devices), longest)


@dataclass(frozen=True, slots=True)
class Proof:
    """What branch and bound found.

    Attributes:
        bound: no schedule without switching takes fewer ticks.
        schedule: the best schedule known.
        nodes: nodes visited.
    """

    bound: int
    schedule: Schedule
    nodes: int


def branch(
    instance: Instance,
    first: Schedule,
    *,
    nodes: int,
    keep_on: Callable[[], bool] = lambda: True,
    progress: Callable[[float, float], None] | None = None,
) -> Proof:
    """Improve a schedule and its bound by branch and bound, without switching.

    The makespan just below the best known is tried first. Where that takes too long, smaller ones
    are refuted instead, for what they are worth as bounds.

    Args:
        instance: tasks and devices, simplified.
        first: a schedule to improve.
        nodes: most nodes to visit.
        keep_on: asked now and then whether to go on.
        progress: called with (bound, incumbent) whenever one of them moves.
    """
    bound, best = simple_bound(instance, switching=False), first
    weight = [float(min(m.devices * m.duration for m in t.modes)) for t in instance.tasks]
    order = by_weight(instance, weight)
    rest = paths(instance, switching=False).rest
    tables = tables_of(instance, order, list(rest))
    if tables is None or bound >= best.makespan:
        return Proof(min(bound, best.makespan), best, 0)
    used, share = 0, nodes // 2
    beyond = best.makespan  # makespans from here on are known or could not be refuted in time
    target = beyond - 1
    while bound < beyond and used < nodes and keep_on():
        search = Branching(tables, target)
        search.run(share, keep_on)
        used += search.nodes
        if search.best is not None:
            found = _placed(instance, *search.modes_and_starts())
            if found is not None and found.makespan < best.makespan:
                best = found
        if search.exhausted and search.best is not None:
            bound = beyond = search.best
        elif search.exhausted:
            bound = target + 1
        else:
            beyond, share = target, max(1, (nodes - used) // 3)
        target = (bound + beyond) // 2
        if progress is not None:
            progress(bound, best.makespan)
    return Proof(min(bound, best.makespan), best, used)


def _placed(instance: Instance, modes: list[int], starts: list[int]) -> Schedule | None:
    """Return the schedule with these modes and starts, or None if its groups have no room."""
    ends: dict[int, int] = {}
    for i in instance.order():
        ends[i] = starts[i] + instance.tasks[i].modes[modes[i]].duration
        for lag in instance.producers(i):
            ends[i] = max(ends[i], ends[lag.producer] + lag.tail[modes[lag.producer]][modes[i]])
    parts = give_parts(instance, modes, starts, [ends[i] for i in range(len(modes))])
    if parts is None:
        return None
    counted = [Counted(i, modes[i], starts[i], ends[i], 1, parts[i]) for i in range(len(modes))]
    return place(instance, counted, 1)
