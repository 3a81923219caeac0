"""Optimal makespans by enumeration, knowing nothing of the solver's model."""

from __future__ import annotations

import random
from itertools import combinations, permutations, product

from samullm_cpsat.instance import Instance, Lag, Mode, Pool, Task

from samullm_plugin.model.parallel import ParallelConfig

INFINITE = 10**9


def random_instance(rng: random.Random, max_tasks: int, max_devices: int) -> Instance:
    """Return a tiny instance with arbitrary durations, groups and lags."""
    num_devices = rng.randint(1, max_devices)
    group = rng.choice([1, 2, num_devices])
    pools = tuple(
        Pool(tuple(range(first, min(first + group, num_devices))))
        for first in range(0, num_devices, group)
    )
    largest = max(len(p.devices) for p in pools)
    tasks = []
    for i in range(rng.randint(1, max_tasks)):
        sizes = [
            (dp, tp)
            for tp in (1, 2, 3)
            for dp in range(1, 5)
            if tp <= largest and dp <= sum(len(p.devices) // tp for p in pools)
        ]
        modes = []
        for dp, tp in rng.sample(sizes, min(len(sizes), rng.randint(1, 3))):
            load = rng.randint(0, 3)
            modes.append(Mode(ParallelConfig(dp, tp), load, load + rng.randint(1, 12)))
        tasks.append(Task(f"t{i}", tuple(modes)))
    lags = []
    for c in range(len(tasks)):
        for p in range(c):
            if rng.random() < 0.35:
                tail = tuple(
                    tuple(rng.randint(0, m.duration) for m in tasks[c].modes)
                    for _ in tasks[p].modes
                )
                lags.append(Lag(p, c, tail))
    return Instance("random", tuple(tasks), tuple(lags), pools)


def device_sets(instance: Instance, mode: Mode) -> list[tuple[int, ...]]:
    """Return every set of devices that can carry the mode (one pipeline stage)."""
    every = [d for p in instance.pools for d in p.devices]
    size = mode.parallel.tensor_parallel_size
    return [
        chosen
        for chosen in combinations(every, mode.devices)
        if all(len(set(chosen) & set(p.devices)) % size == 0 for p in instance.pools)
    ]


def best_without_switching(instance: Instance) -> int:
    """Return the least makespan over all modes, device sets and orders.

    In the order of their starts tasks are appended to their devices; every schedule in which
    nothing can start earlier is of this form.
    """
    best = INFINITE
    choices = [
        [
            (m, mode, devices)
            for m, mode in enumerate(t.modes)
            for devices in device_sets(instance, mode)
        ]
        for t in instance.tasks
    ]

    def extend(placed: dict[int, tuple[int, int, int]], free: dict[int, int]) -> None:
        nonlocal best
        if len(placed) == len(instance.tasks):
            best = min(best, max(end for _, _, end in placed.values()))
            return
        for i in range(len(instance.tasks)):
            lags = [lag for lag in instance.lags if lag.consumer == i]
            if i in placed or any(lag.producer not in placed for lag in lags):
                continue
            for m, mode, devices in choices[i]:
                start = max([free[d] for d in devices] + [placed[g.producer][1] for g in lags])
                end = start + mode.duration
                for lag in lags:
                    producer_mode, _, producer_end = placed[lag.producer]
                    end = max(end, producer_end + lag.tail[producer_mode][m])
                if end < best:
                    extend({**placed, i: (m, start, end)}, {**free, **dict.fromkeys(devices, end)})

    extend({}, {d: 0 for p in instance.pools for d in p.devices})
    return best


def best_with_segments(instance: Instance, units: int) -> int:
    """Return the least makespan if every task has one or two segments of whole work units."""
    options = []
    for task in instance.tasks:
        modes = range(len(task.modes))
        one = [((m, units),) for m in modes]
        two = [((m, s), (n, units - s)) for m in modes for n in modes for s in range(1, units)]
        options.append(one + two)
    best = INFINITE
    for parts in product(*options):
        segments = [
            (i, k, m, s) for i, of_task in enumerate(parts) for k, (m, s) in enumerate(of_task)
        ]
        sets = [device_sets(instance, instance.tasks[i].modes[m]) for i, _, m, _ in segments]
        needed = []
        for i, _, m, s in segments:
            mode = instance.tasks[i].modes[m]
            needed.append(mode.load + -(-mode.work * s // units))
        for order in permutations(range(len(segments))):
            if any(
                segments[a][0] == segments[b][0] and a > b
                for n, a in enumerate(order)
                for b in order[n + 1 :]
            ):
                continue
            for devices in product(*sets):
                best = min(best, _makespan(instance, parts, segments, needed, order, devices, best))
    return best


def _makespan(instance, parts, segments, needed, order, devices, best):  # type: ignore[no-untyped-def]
    """Return the makespan of segments in this order on these devices; INFINITE if impossible."""
    start, end = [0] * len(segments), [0] * len(segments)
    first = {segments[n][0]: n for n in reversed(range(len(segments)))}
    last = {segments[n][0]: n for n in range(len(segments))}
    while True:  # longest paths; a cycle shows as times beyond the best
        before = (list(start), list(end))
        free: dict[int, int] = {}
        for n in order:
            i, k, m, _ = segments[n]
            times = [free.get(d, 0) for d in devices[n]]
            if k:
                times.append(end[n - 1])
            for lag in instance.lags:
                if lag.consumer == i:
                    times.append(start[first[lag.producer]])
                    if len(parts[i]) > 1:
                        times.append(end[last[lag.producer]])
            start[n] = max(times)
            end[n] = max(end[n], start[n] + needed[n])
            if len(parts[i]) == 1:
                for lag in instance.lags:
                    if lag.consumer == i:
                        producer = last[lag.producer]
                        tail = lag.tail[segments[producer][2]][m]
                        end[n] = max(end[n], end[producer] + tail)
            for d in devices[n]:
                free[d] = end[n]
        if max(end) >= best:
            return INFINITE
        if (start, end) == before:
            return max(end)
