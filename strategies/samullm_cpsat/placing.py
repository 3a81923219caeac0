"""Device ids for counted devices, and everything as early as the order lets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from samullm_cpsat.instance import Instance
from samullm_cpsat.schedule import Placement, Schedule, in_order, replicas_in_order


@dataclass(frozen=True, slots=True)
class Counted:
    """A segment with counted devices.

    Attributes:
        task: index of the task.
        mode: index of its mode.
        start: first tick.
        end: tick after the last.
        units: work units it does.
        parts: by pool, tensor-parallel groups held; None where there is one pool.
    """

    task: int
    mode: int
    start: int
    end: int
    units: int
    parts: tuple[int, ...] | None


def place(instance: Instance, counted: Sequence[Counted], units: int) -> Schedule:
    """Return the schedule of counted segments, no segment later than it was.

    Args:
        instance: tasks and devices.
        counted: all segments of all tasks.
        units: work units of a task.
    """
    rank = {task: n for n, task in enumerate(instance.order())}
    ordered = sorted(counted, key=lambda c: (c.start, rank[c.task], c.end))
    devices = _give_devices(instance, ordered)
    times = _as_early_as_possible(instance, ordered, devices, units)
    done = dict.fromkeys(range(len(instance.tasks)), 0)
    placements = []
    for c, held, (start, end) in zip(ordered, devices, times, strict=True):
        done[c.task] += c.units
        placements.append(Placement(c.task, c.mode, held, start, end, done[c.task] / units))
    return in_order(instance, placements)


def _give_devices(instance: Instance, ordered: Sequence[Counted]) -> list[tuple[int, ...]]:
    """Give each segment devices of its pools; those longest free first.

    Where the counts fit at all times, whoever comes next finds enough free devices in its pools,
    for within a pool all devices are alike.
    """
    free = {d: 0 for p in instance.pools for d in p.devices}
    result = []
    for c in ordered:
        mode = instance.tasks[c.task].modes[c.mode]
        parts = c.parts or (
            mode.parallel.data_parallel_size * mode.parallel.pipeline_parallel_size,
        )
        groups: list[tuple[int, tuple[int, ...]]] = []  # machine, devices of one part
        size = mode.parallel.tensor_parallel_size
        for pool, count in zip(instance.pools, parts, strict=True):
            idle = sorted(
                (d for d in pool.devices if free[d] <= c.start), key=lambda d: (free[d], d)
            )
            chosen = sorted(idle[: count * size])
            groups += [
                (pool.machine, tuple(chosen[n : n + size])) for n in range(0, len(chosen), size)
            ]
        result.append(replicas_in_order(mode, groups))
        for d in result[-1]:
            free[d] = c.end
    return result


def _as_early_as_possible(
    instance: Instance,
    ordered: Sequence[Counted],
    devices: Sequence[tuple[int, ...]],
    units: int,
) -> list[tuple[int, int]]:
    """Return start and end of each segment if devices are used in the same order.

    A consumer may start before the last segment of its producer does, so its end may depend on
    what comes later in the order; passes are repeated until nothing moves any more.
    """
    count = [sum(c.task == i for c in ordered) for i in range(len(instance.tasks))]
    last = {c.task: n for n, c in enumerate(ordered)}
    times = [(0, 0)] * len(ordered)
    while True:
        before = list(times)
        free = {d: 0 for p in instance.pools for d in p.devices}
        began: dict[int, int] = {}
        own_end: dict[int, int] = {}
        for n, c in enumerate(ordered):
            mode = instance.tasks[c.task].modes[c.mode]
            start = max([own_end.get(c.task, 0), *(free[d] for d in devices[n])])
            end = 0
            for lag in instance.producers(c.task):
                producer_end = times[last[lag.producer]][1]
                if count[c.task] > 1:
                    start = max(start, producer_end)
                    continue
                start = max(start, began[lag.producer])
                tail = lag.tail[ordered[last[lag.producer]].mode][c.mode]
                end = max(end, producer_end + tail)
            end = max(end, start + mode.load - (-mode.work * c.units // units))
            began.setdefault(c.task, start)
            own_end[c.task] = end
            for d in devices[n]:
                free[d] = end
            times[n] = (start, end)
        if times == before:
            return times
