"""A first schedule written into the model, variable by variable."""

from __future__ import annotations

from ortools.sat.python import cp_model

from samullm_cpsat.instance import Instance
from samullm_cpsat.schedule import Placement, Schedule
from samullm_cpsat.variables import SegmentVars, Variables


def complete_hint(
    model: cp_model.CpModel, instance: Instance, v: Variables, first: Schedule, units: int
) -> None:
    """Hint a value for every variable.

    Args:
        model: the model.
        instance: tasks and devices.
        v: its variables.
        first: one placement per task.
        units: work units of a task.
    """
    renamed = _renamed_pools(instance, first)
    for placement in first.placements:
        used, *unused = v.segments[placement.task]
        _hint_used(model, instance, used, placement, units, renamed)
        for s in unused:
            _hint_unused(model, s, placement.end)
        model.add_hint(v.task_end[placement.task], placement.end)
    assert v.makespan is not None
    model.add_hint(v.makespan, first.makespan)
    modes = {p.task: p.mode for p in first.placements}
    for (machine, i, k, m), replicas in v.machine_replicas.items():
        mode = instance.tasks[i].modes[m]
        count = 0
        if k == 0 and modes[i] == m:
            placement = next(p for p in first.placements if p.task == i)
            held = [
                len(set(pool.devices) & set(placement.devices))
                for g, pool in enumerate(instance.pools)
                if pool.machine == machine
            ]
            count = sum(held) * mode.machines // mode.parallel.devices_per_replica
        model.add_hint(replicas, count)


def _hint_used(
    model: cp_model.CpModel,
    instance: Instance,
    s: SegmentVars,
    placement: Placement,
    units: int,
    renamed: list[int],
) -> None:
    for var, value in (
        (s.start, placement.start),
        (s.end, placement.end),
        (s.size, placement.end - placement.start),
        (s.present, 1),
    ):
        model.add_hint(var, value)
    for m, x in enumerate(s.mode):
        model.add_hint(x, m == placement.mode)
        if s.share is not None:
            model.add_hint(s.share[m], units if m == placement.mode else 0)
    if s.devices is None or s.parts is None:
        return
    size = instance.tasks[placement.task].modes[placement.mode].parallel.tensor_parallel_size
    for g, source in enumerate(renamed):
        held = len(set(instance.pools[source].devices) & set(placement.devices))
        model.add_hint(s.devices[g], held)
        for m, parts in enumerate(s.parts[g]):
            model.add_hint(parts, held // size if m == placement.mode else 0)


def _hint_unused(model: cp_model.CpModel, s: SegmentVars, at: int) -> None:
    for var, value in ((s.start, at), (s.end, at), (s.size, 0), (s.present, 0)):
        model.add_hint(var, value)
    for x in (*s.mode, *(s.share or ()), *(s.devices or ())):
        model.add_hint(x, 0)
    for of_pool in s.parts or ():
        for parts in of_pool:
            model.add_hint(parts, 0)


def _renamed_pools(instance: Instance, first: Schedule) -> list[int]:
    """Return by pool the pool whose role it takes, so that task 0 prefers earlier pools."""
    devices = set(next(p.devices for p in first.placements if p.task == 0))
    renamed = list(range(len(instance.pools)))
    for kind in {p.alike for p in instance.pools}:
        alike = [g for g, p in enumerate(instance.pools) if p.alike == kind]
        by_use = sorted(alike, key=lambda g: -len(devices & set(instance.pools[g].devices)))
        for g, source in zip(alike, by_use, strict=True):
            renamed[g] = source
    return renamed
