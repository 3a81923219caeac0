"""The constraints, one function each; :func:`add_constraints` is the list of them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from ortools.sat.python import cp_model

from samullm_cpsat.bounding import paths
from samullm_cpsat.instance import Instance, Mode
from samullm_cpsat.variables import SegmentVars, Variables


def add_constraints(
    model: cp_model.CpModel, instance: Instance, v: Variables, units: int, *, pooled: bool
) -> None:
    """Add everything a schedule has to obey, then what only helps the search."""
    one_mode(model, v)
    durations(model, instance, v, units)
    all_work_done(model, v, units)
    segments_in_order(model, v)
    task_ends(model, v)
    enough_devices(model, instance, v)
    if pooled:
        parts_of_modes(model, instance, v)
        enough_devices_by_pool(model, instance, v)
        stages_together(model, instance, v)
    consumers_start_after_producers(model, instance, v)
    consumers_end_after_producers(model, instance, v)
    energy(model, instance, v, units)
    critical_path(model, instance, v)
    if pooled:
        pools_in_order(model, instance, v)


def one_mode(model: cp_model.CpModel, v: Variables) -> None:
    """A segment that is present runs in exactly one mode, another one in none."""
    for segments in v.segments:
        model.add(segments[0].present == 1)
        for s in segments:
            model.add_exactly_one([*s.mode, s.present.negated()])


def durations(model: cp_model.CpModel, instance: Instance, v: Variables, units: int) -> None:
    """A segment lasts as long as its engine start and its share of the work, or longer.

    Only consumers and tasks of several segments ever last longer: a consumer may hold its devices
    while it waits for its producers.
    """
    for i, task in enumerate(instance.tasks):
        for s in v.segments[i]:
            if s.share is not None:
                model.add(units * s.size >= _held(s, task.modes, units))
                continue
            needed = sum(m.duration * x for m, x in zip(task.modes, s.mode, strict=True))
            if instance.producers(i):
                model.add(s.size >= needed)
            else:
                model.add(s.size == needed)


def _held(s: SegmentVars, modes: Sequence[Mode], units: int) -> cp_model.LinearExprT:
    """Return the ticks a segment needs, times ``units``."""
    assert s.share is not None
    return sum(
        mode.load * units * x + mode.work * share
        for mode, x, share in zip(modes, s.mode, s.share, strict=True)
    )


def all_work_done(model: cp_model.CpModel, v: Variables, units: int) -> None:
    """The shares of a task's segments add up to all of its work, each done in the chosen mode."""
    for segments in v.segments:
        shares: list[cp_model.IntVar] = []
        for s in segments:
            if s.share is None:
                continue
            for x, share in zip(s.mode, s.share, strict=True):
                model.add(share <= units * x)
                model.add(share >= x)
            shares += s.share
        if shares:
            model.add(sum(shares) == units)


def segments_in_order(model: cp_model.CpModel, v: Variables) -> None:
    """Segments are used in order and follow each other; unused ones lie empty at the end."""
    for segments in v.segments:
        for before, s in pairwise(segments):
            model.add_implication(s.present, before.present)
            model.add(before.end <= s.start)
            model.add(s.size == 0).only_enforce_if(s.present.negated())
            model.add(s.start == before.end).only_enforce_if(s.present.negated())
            model.add(s.end == s.start).only_enforce_if(s.present.negated())


def task_ends(model: cp_model.CpModel, v: Variables) -> None:
    """A task ends with its last segment, and the makespan is not before any end."""
    assert v.makespan is not None
    for end, segments in zip(v.task_end, v.segments, strict=True):
        model.add(end == segments[-1].end)
        model.add(v.makespan >= end)


def enough_devices(model: cp_model.CpModel, instance: Instance, v: Variables) -> None:
    """At no time more devices of a kind are held than there are."""
    for gpu, capacity in _capacities(instance).items():
        intervals, demands = [], []
        for i, task in enumerate(instance.tasks):
            for s in v.segments[i]:
                for mode, interval in zip(task.modes, s.mode_interval, strict=True):
                    if mode.gpu == gpu:
                        intervals.append(interval)
                        demands.append(mode.devices)
        model.add_cumulative(intervals, demands, capacity)


def parts_of_modes(model: cp_model.CpModel, instance: Instance, v: Variables) -> None:
    """A segment holds as many tensor-parallel groups as its mode has, each within one pool."""
    for i, task in enumerate(instance.tasks):
        for s in v.segments[i]:
            assert s.parts is not None
            assert s.devices is not None
            for m, mode in enumerate(task.modes):
                count = mode.parallel.data_parallel_size * mode.parallel.pipeline_parallel_size
                model.add(sum(parts[m] for parts in s.parts) == count * s.mode[m])
            for held, parts in zip(s.devices, s.parts, strict=True):
                sizes = [m.parallel.tensor_parallel_size for m in task.modes]
                model.add(held == cp_model.LinearExpr.weighted_sum(list(parts), sizes))


def enough_devices_by_pool(model: cp_model.CpModel, instance: Instance, v: Variables) -> None:
    """At no time more devices of a pool are held than it has.

    Within a pool any devices do; so counting suffices, and device ids can be given afterwards.
    """
    segments = [s for of_task in v.segments for s in of_task]
    for g, pool in enumerate(instance.pools):
        demands = [s.devices[g] for s in segments if s.devices is not None]
        model.add_cumulative([s.interval for s in segments], demands, len(pool.devices))


def stages_together(model: cp_model.CpModel, instance: Instance, v: Variables) -> None:
    """All pipeline stages of a replica lie on one machine, or equally many on each of several.

    No machine has more parts of replicas than there are replicas, so that the parts of each can be
    of different machines (:func:`samullm_cpsat.schedule.place`).
    """
    for (machine, i, k, m), replicas in v.machine_replicas.items():
        s, stages = v.segments[i][k], instance.tasks[i].modes[m].stages_together
        assert s.parts is not None
        held = [s.parts[g][m] for g, p in enumerate(instance.pools) if p.machine == machine]
        model.add(sum(held) == stages * replicas)


def consumers_start_after_producers(
    model: cp_model.CpModel, instance: Instance, v: Variables
) -> None:
    """A consumer starts no earlier than its producers; in several segments, after their end."""
    for lag in instance.lags:
        first, *rest = v.segments[lag.consumer]
        model.add(first.start >= v.segments[lag.producer][0].start)
        if rest:
            model.add(first.start >= v.task_end[lag.producer]).only_enforce_if(rest[0].present)


def consumers_end_after_producers(
    model: cp_model.CpModel, instance: Instance, v: Variables
) -> None:
    """A consumer in one segment needs its tail after each producer's end."""
    for lag in instance.lags:
        consumer = v.segments[lag.consumer]
        for k, s in enumerate(v.segments[lag.producer]):
            last = _last_literals(v.segments[lag.producer], k) + _last_literals(consumer, 0)
            for p, row in enumerate(lag.tail):
                if len(set(row)) == 1:
                    model.add(consumer[0].end >= s.end + row[0]).only_enforce_if([s.mode[p], *last])
                    continue
                for c, ticks in enumerate(row):
                    literals = [s.mode[p], consumer[0].mode[c], *last]
                    model.add(consumer[0].end >= s.end + ticks).only_enforce_if(literals)
        model.add(v.task_end[lag.consumer] >= v.task_end[lag.producer])


def energy(model: cp_model.CpModel, instance: Instance, v: Variables, units: int) -> None:
    """Redundant: device ticks fit into makespan times devices, also in distorted measures.

    A dual feasible function ``f`` keeps ``sum f(demand) <= f(capacity)`` wherever
    ``sum demand <= capacity`` (Fekete and Schepers, 2001), so each gives a valid energy bound; the
    identity gives the plain one.
    """
    assert v.makespan is not None
    for gpu, capacity in _capacities(instance).items():
        for measure in dual_feasible(capacity):
            terms: list[cp_model.LinearExprT] = []
            for i, task in enumerate(instance.tasks):
                for s in v.segments[i]:
                    for m, mode in enumerate(task.modes):
                        weight = measure[mode.devices] if mode.gpu == gpu else 0
                        if weight and s.share is None:
                            terms.append(weight * mode.duration * units * s.mode[m])
                        elif weight and s.share is not None:
                            ticks = mode.load * units * s.mode[m] + mode.work * s.share[m]
                            terms.append(weight * ticks)
            model.add(sum(terms) <= measure[capacity] * units * v.makespan)


def dual_feasible(capacity: int) -> list[list[int]]:
    """Return whole-number dual feasible functions for demands ``0 .. capacity``.

    The identity, then for thresholds ``e`` up to half the capacity the function that counts
    demands above ``capacity - e`` as all of it and those below ``e`` as nothing, then the rounding
    functions of 2 to 4 steps.
    """
    demands = range(capacity + 1)
    found = [list(demands)]
    for e in range(1, capacity // 2 + 1):
        found.append([capacity if d > capacity - e else 0 if d < e else d for d in demands])
    for steps in range(1, 4):
        scaled = [(steps + 1) * d for d in demands]
        found.append(
            [
                d * steps if x % capacity == 0 else (x // capacity) * capacity
                for d, x in zip(demands, scaled, strict=True)
            ]
        )
        found[-1][capacity] = capacity * steps
    unique: list[list[int]] = []
    for f in found:
        if f not in unique:
            unique.append(f)
    return unique


def critical_path(model: cp_model.CpModel, instance: Instance, v: Variables) -> None:
    """Redundant: no task ends before its shortest path allows, nor the makespan before its rest."""
    assert v.makespan is not None
    shortest = paths(instance, switching=len(v.segments[0]) > 1)
    for end, earliest, rest in zip(v.task_end, shortest.earliest, shortest.rest, strict=True):
        model.add(end >= earliest)
        model.add(v.makespan >= end + rest)


def pools_in_order(model: cp_model.CpModel, instance: Instance, v: Variables) -> None:
    """Symmetry: of pools that are alike, the first task's first segment prefers earlier ones."""
    devices = v.segments[0][0].devices
    assert devices is not None
    last: dict[tuple[int, str, int], int] = {}
    for g, pool in enumerate(instance.pools):
        if pool.alike in last:
            model.add(devices[last[pool.alike]] >= devices[g])
        last[pool.alike] = g


def _capacities(instance: Instance) -> dict[str, int]:
    """Return the devices of each kind."""
    capacities: dict[str, int] = {}
    for pool in instance.pools:
        capacities[pool.gpu] = capacities.get(pool.gpu, 0) + len(pool.devices)
    return capacities


def _last_literals(segments: Sequence[SegmentVars], k: int) -> list[cp_model.BoolVarT]:
    """Return what is true, beside its presence, if segment ``k`` is the last one used."""
    return [segments[k + 1].present.negated()] if k + 1 < len(segments) else []
