"""Schedules of an instance: what is placed where and when, and list scheduling (Graham, 1966)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from samullm_cpsat.instance import Instance, Mode, Pool


@dataclass(frozen=True, slots=True)
class Placement:
    """One segment of one task.

    Attributes:
        task: index of the task.
        mode: index of its mode.
        devices: device indices; replica ``i`` holds the ``i``-th run of them.
        start: first tick.
        end: tick after the last.
        done: share of the task's work that is done at the end of the segment, 1 at its last.
    """

    task: int
    mode: int
    devices: tuple[int, ...]
    start: int
    end: int
    done: float = 1.0


@dataclass(frozen=True, slots=True)
class Schedule:
    """Placements in order of their start, producers first."""

    placements: tuple[Placement, ...]

    @property
    def makespan(self) -> int:
        """Return the tick at which everything is finished."""
        return max(p.end for p in self.placements)


def in_order(instance: Instance, placements: Sequence[Placement]) -> Schedule:
    """Return a schedule of these placements, sorted."""
    rank = {task: n for n, task in enumerate(instance.order())}
    return Schedule(tuple(sorted(placements, key=lambda p: (p.start, rank[p.task], p.end))))


def list_schedule(instance: Instance, order: Sequence[int], modes: Sequence[int]) -> Schedule:
    """Place tasks one after the other, each as early as the devices' last users allow.

    Args:
        instance: tasks and devices.
        order: tasks, producers before consumers.
        modes: by task, the mode to use.
    """
    free = {d: 0 for p in instance.pools for d in p.devices}
    start: dict[int, int] = {}
    end: dict[int, int] = {}
    placements = []
    for i in order:
        mode = instance.tasks[i].modes[modes[i]]
        earliest = max((start[lag.producer] for lag in instance.producers(i)), default=0)
        devices = choose_devices(instance, mode, free)
        start[i] = max(earliest, *(free[d] for d in devices))
        end[i] = start[i] + mode.duration
        for lag in instance.producers(i):
            tail = lag.tail[modes[lag.producer]][modes[i]]
            end[i] = max(end[i], end[lag.producer] + tail)
        for d in devices:
            free[d] = end[i]
        placements.append(Placement(i, modes[i], devices, start[i], end[i]))
    return in_order(instance, placements)


def choose_devices(instance: Instance, mode: Mode, free: Mapping[int, int]) -> tuple[int, ...]:
    """Return the devices that can carry a mode the earliest.

    Args:
        instance: the devices.
        mode: what they shall carry.
        free: by device, when it is free.
    """
    size, stages = mode.parallel.tensor_parallel_size, mode.stages_together
    found: list[tuple[int, int, int, list[tuple[int, ...]]]] = []
    for machine in dict.fromkeys(p.machine for p in instance.pools):
        parts = []
        for number, pool in enumerate(instance.pools):
            if pool.machine == machine and pool.gpu == mode.gpu:
                parts += _parts(pool, number, size, free)
        parts.sort()
        for first in range(0, len(parts) - stages + 1, stages):
            chosen = parts[first : first + stages]
            at = max(at for at, _, _ in chosen)
            found.append((at, chosen[0][1], machine, [part for _, _, part in chosen]))
    found.sort()
    replicas = mode.parallel.data_parallel_size
    if mode.machines == 1:
        return tuple(d for *_, parts in found[:replicas] for part in parts for d in part)
    room = dict.fromkeys((p.machine for p in instance.pools), replicas)
    groups: list[tuple[int, tuple[int, ...]]] = []
    for _, _, machine, stage_devices in found:
        if room[machine] and len(groups) < replicas * mode.parallel.pipeline_parallel_size:
            room[machine] -= 1
            groups += [(machine, devices) for devices in stage_devices]
    return replicas_in_order(mode, groups)


def replicas_in_order(mode: Mode, groups: Sequence[tuple[int, tuple[int, ...]]]) -> tuple[int, ...]:
    """Return the devices so that the pipeline stages of each replica lie together.

    Of replicas on several machines, the parts of one machine go to one replica after the other; as
    no machine has more of them than there are replicas, none gets two.

    Args:
        mode: what the devices carry.
        groups: machine and devices of each pipeline stage; on each machine those of whole replicas,
            or of whole parts of them.
    """
    by_machine: dict[int, list[tuple[int, ...]]] = {}
    for machine, group in sorted(groups):
        by_machine.setdefault(machine, []).append(group)
    stages = mode.stages_together
    assert all(len(of) % stages == 0 for of in by_machine.values())
    parts = [
        [d for group in of[n : n + stages] for d in group]
        for of in by_machine.values()
        for n in range(0, len(of), stages)
    ]
    count = mode.parallel.data_parallel_size
    return tuple(d for r in range(count) for part in parts[r::count] for d in part)


def _parts(
    pool: Pool, number: int, size: int, free: Mapping[int, int]
) -> list[tuple[int, int, tuple[int, ...]]]:
    """Return the tensor-parallel groups of a pool, with when each can start."""
    devices = sorted(pool.devices, key=lambda d: (free[d], d))
    parts = [tuple(devices[n : n + size]) for n in range(0, len(devices) - size + 1, size)]
    return [(max(free[d] for d in part), number, part) for part in parts]


def best_list_schedule(
    instance: Instance, suggestions: Sequence[tuple[Sequence[int], Sequence[int]]] = ()
) -> Schedule:
    """Return the best of several list schedules.

    For a row of target durations every task takes the mode of least device ticks that meets the
    target (else its fastest); tasks are then placed by duration or by devices, largest first.

    Args:
        instance: tasks and devices.
        suggestions: further (order, modes) to try.
    """
    candidates = [list_schedule(instance, order, modes) for order, modes in suggestions]
    targets = sorted({m.duration for t in instance.tasks for m in t.modes})
    step = max(1, len(targets) // 64)
    for target in [*targets[::step], targets[-1]]:
        modes = [_mode_for(instance, i, target) for i in range(len(instance.tasks))]
        chosen = [t.modes[m] for t, m in zip(instance.tasks, modes, strict=True)]
        for weight in (
            [float(m.duration) for m in chosen],
            [float(m.devices * m.duration) for m in chosen],
            [float(m.devices) * 1e9 + m.duration for m in chosen],
        ):
            candidates.append(list_schedule(instance, by_weight(instance, weight), modes))
    return min(candidates, key=lambda s: s.makespan)


def by_weight(instance: Instance, weight: Sequence[float]) -> list[int]:
    """Return the tasks by falling weight, producers before consumers."""
    left, order = set(range(len(instance.tasks))), []
    while left:
        ready = [i for i in left if not any(lag.producer in left for lag in instance.producers(i))]
        chosen = max(ready, key=lambda i: (weight[i], -i))
        left.remove(chosen)
        order.append(chosen)
    return order


def _mode_for(instance: Instance, task: int, target: int) -> int:
    """Return the cheapest mode that meets a target duration, or the fastest."""
    modes = instance.tasks[task].modes
    meets = [m for m in range(len(modes)) if modes[m].duration <= target]
    if not meets:
        return min(range(len(modes)), key=lambda m: modes[m].duration)
    return min(meets, key=lambda m: (modes[m].devices * modes[m].duration, modes[m].duration))
