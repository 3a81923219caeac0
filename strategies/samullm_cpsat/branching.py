"""Chronological branch and bound, compiled: proves makespans that the solver alone cannot.

Constraint propagation on cumulative resources sees idle devices late; here they are what is
branched on. Time runs forward from event to event. At each event tasks are started, each in one
of its modes, or the next event is awaited. What is started can no longer be moved, so the device
ticks used and left idle so far are exact, and a partial schedule is given up as soon as these, with
the cheapest modes of the tasks that are left, no longer fit into the makespan sought. Going through
time by extending partial schedules: Stinson, Davis and Khumawala (1978); remembering states:
Demeulemeester and Herroelen (1992).

Devices of one kind are counted only: NVLink groups are not looked at, so an exhausted search gives
a lower bound for any groups, and a schedule found need not be placeable in them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numba
import numpy as np

from samullm_cpsat.instance import Instance
from samullm_plugin.model.types import Ints

CHUNK = 2_000_000
"""Nodes between two looks at the clock."""
NEVER = np.int64(1) << 60
MEMORY = 1 << 20
"""States remembered as hopeless."""

TIME, LAST, FREE, BEFORE, NEXT, USED, ACTION, KEY, CHECK = range(9)
"""Columns of a level: its tick; the last task started at it; devices free; devices that were free
just before it; next choice to try; device ticks used or idle so far; choice taken; two hashes of
the state in which the event was reached, 0 where something was started at it since."""
DEPTH, NODES, LIMIT = range(3)
"""Entries of the search's scalars."""


@dataclass(frozen=True, slots=True)
class Tables:
    """An instance in arrays; tasks in a fixed order with producers first.

    Attributes:
        order: task of each position.
        capacity: devices.
        choice: rows of position, devices, duration and mode, by position and falling cost.
        first: by position, its first row in ``choice``; one more at the end.
        twin: by position, an earlier position of an equal task, or -1.
        rest: by position, ticks that its consumers need after its end at least.
        lag_first: by position, its first lag; one more at the end.
        lag_producer: by lag, position of the producer.
        lag_tail: by lag, its first entry in ``tail``.
        tail: tails, by the producer's row, then the consumer's.
    """

    order: tuple[int, ...]
    capacity: int
    choice: Ints
    first: Ints
    twin: Ints
    rest: Ints
    lag_first: Ints
    lag_producer: Ints
    lag_tail: Ints
    tail: Ints


class Branching:
    """A search for schedules of at most a given makespan, resumable in pieces.

    Attributes:
        best: makespan of the best schedule found, or None.
        exhausted: nothing better than ``best`` (or the limit given) exists.
    """

    def __init__(self, tables: Tables, limit: int) -> None:
        """Look for schedules that take at most ``limit`` ticks."""
        count = len(tables.order)
        self._tables = tables
        self._levels = np.zeros((3 * count + 4, 9), np.int64)
        self._memory = np.zeros((MEMORY, 3), np.int64)
        self._levels[:, LAST] = self._levels[:, ACTION] = -1
        self._levels[0, FREE], self._levels[0, BEFORE] = tables.capacity, -1
        self._tasks = np.full((4, count), -1, np.int64)  # row started with, start, end, devices
        self._solution = np.zeros((2, count), np.int64)
        self._scalars = np.array([0, 0, limit], np.int64)
        self._asked = limit
        self.exhausted = False

    @property
    def nodes(self) -> int:
        """Return the tasks started so far."""
        return int(self._scalars[NODES])

    @property
    def best(self) -> int | None:
        """Return the makespan of the best schedule found, if any."""
        limit = int(self._scalars[LIMIT])
        return limit + 1 if limit < self._asked else None

    def modes_and_starts(self) -> tuple[list[int], list[int]]:
        """Return, by task, mode and start of the best schedule."""
        modes, starts = [0] * len(self._tables.order), [0] * len(self._tables.order)
        for position, task in enumerate(self._tables.order):
            row, start = self._solution[:, position]
            modes[task] = int(self._tables.choice[row, 3])
            starts[task] = int(start)
        return modes, starts

    def run(self, nodes: int, keep_on: Callable[[], bool]) -> None:
        """Go on until exhausted, or ``nodes`` more were visited, or ``keep_on`` says no."""
        t = self._tables
        last = self.nodes + nodes
        while not self.exhausted and self.nodes < last and keep_on():
            self.exhausted = _search(
                t.capacity,
                t.choice,
                t.first,
                t.twin,
                t.rest,
                t.lag_first,
                t.lag_producer,
                t.lag_tail,
                t.tail,
                self._levels,
                self._tasks,
                self._scalars,
                self._solution,
                self._memory,
                min(CHUNK, last - self.nodes),
            )


def tables_of(instance: Instance, order: list[int], rest: list[int]) -> Tables | None:
    """Return the instance in arrays, or None if its devices are of several kinds.

    Args:
        instance: tasks and devices.
        order: tasks, producers before consumers; large ones should come first.
        rest: by task, ticks that its consumers need after its end at least.
    """
    if len({p.gpu for p in instance.pools}) > 1:
        return None
    position = {task: n for n, task in enumerate(order)}
    rows: list[list[tuple[int, int, int, int]]] = []
    for n, task in enumerate(order):
        modes = instance.tasks[task].modes
        by_cost = sorted(range(len(modes)), key=lambda m: modes[m].devices * modes[m].duration)
        rows.append([(n, modes[m].devices, max(1, modes[m].duration), m) for m in by_cost])
    lag_first: list[int] = [0]
    producers: list[int] = []
    starts: list[int] = []
    tail: list[int] = []
    for n, task in enumerate(order):
        for lag in instance.producers(task):
            producer = position[lag.producer]
            producers.append(producer)
            starts.append(len(tail))
            for _, _, _, mp in rows[producer]:
                tail += [lag.tail[mp][m] for _, _, _, m in rows[n]]
        lag_first.append(len(producers))
    return Tables(
        tuple(order),
        instance.num_devices,
        np.array([r for of_task in rows for r in of_task], np.int64),
        np.cumsum([0, *(len(r) for r in rows)], dtype=np.int64),
        np.array(_twins(instance, order), np.int64),
        np.array([rest[task] for task in order], np.int64),
        np.array(lag_first, np.int64),
        np.array(producers, np.int64),
        np.array(starts, np.int64),
        np.array(tail, np.int64),
    )


def _twins(instance: Instance, order: list[int]) -> list[int]:
    """Return by position an earlier position of a task that may be exchanged with it, or -1."""
    seen: dict[object, int] = {}
    twins = []
    for n, task in enumerate(order):
        key = (
            instance.tasks[task].modes,
            tuple((lag.producer, lag.tail) for lag in instance.lags if lag.consumer == task),
            tuple((lag.consumer, lag.tail) for lag in instance.lags if lag.producer == task),
        )
        twins.append(seen.get(key, -1))
        seen[key] = n
    return twins


@numba.njit(cache=True, nogil=True)
def _mix(value, salt):  # type: ignore[no-untyped-def]  # typed by numba from its arguments
    """Return well spread bits of two numbers (the finaliser of splitmix64)."""
    x = np.uint64(value) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(salt) * np.uint64(
        0xD1B54A32D192ED03
    )
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.int64(x ^ (x >> np.uint64(31)))


@numba.njit(cache=True, nogil=True)
def _search(  # type: ignore[no-untyped-def]  # typed by numba from its arguments
    capacity, choice, first, twin, rest, lag_first, lag_producer, lag_tail, tail,
    levels, tasks, scalars, solution, memory, more,
):  # fmt: skip
    """Visit at most ``more`` nodes; return whether the search is exhausted."""
    count, rows = len(twin), len(choice)
    row_of, start_of, end_of, held = tasks[0], tasks[1], tasks[2], tasks[3]
    depth, nodes, limit = scalars[DEPTH], scalars[NODES], scalars[LIMIT]
    last_node = nodes + more
    while depth >= 0:
        taken = levels[depth, ACTION]
        if taken >= 0:  # back from below: take it back
            row_of[choice[taken, 0]] = -1
            levels[depth, ACTION] = -1
        now, free, before = levels[depth, TIME], levels[depth, FREE], levels[depth, BEFORE]
        deeper = False
        r = levels[depth, NEXT]
        while r <= rows:
            row = r
            r += 1
            await_next = row == rows
            task, end, used, then = np.int64(-1), np.int64(0), levels[depth, USED], now
            if await_next:
                then = NEVER
                for i in range(count):
                    if row_of[i] >= 0 and now < end_of[i] < then:
                        then = end_of[i]
                if then == NEVER:
                    continue
                used += free * (then - now)
            else:
                task = choice[row, 0]
                devices = choice[row, 1]
                # At one tick tasks start in the order of their positions; equal ones never swap.
                if row_of[task] >= 0 or task <= levels[depth, LAST] or devices > free:
                    continue
                if twin[task] >= 0 and row_of[twin[task]] < 0:
                    continue
                end = now + choice[row, 2]
                ready, blocked = True, devices > before
                for k in range(lag_first[task], lag_first[task + 1]):
                    p = lag_producer[k]
                    if row_of[p] < 0:
                        ready = False
                        break
                    blocked = blocked or start_of[p] == now
                    width = first[task + 1] - first[task]
                    at = lag_tail[k] + (row_of[p] - first[p]) * width + row - first[task]
                    end = max(end, end_of[p] + tail[at])
                # What could have started at the event before is not started only now.
                if not ready or not blocked or end + rest[task] > limit:
                    continue
                used += devices * (end - now)
            # The tasks that are left, each in its cheapest mode that can still be in time.
            needed = used
            for i in range(count):
                if row_of[i] >= 0 or i == task:
                    continue
                cheapest = NEVER
                for q in range(first[i], first[i + 1]):
                    if then + choice[q, 2] + rest[i] <= limit:
                        cheapest = choice[q, 1] * choice[q, 2]
                        break  # rows are in the order of their cost
                needed = NEVER if cheapest == NEVER else needed + cheapest
                if needed > capacity * limit:
                    break
            if needed > capacity * limit:
                continue
            if await_next:
                for i in range(count):
                    if row_of[i] >= 0 and end_of[i] == then:
                        free += held[i]
                # The future depends on who is left, when devices are released, and on producers;
                # a state that led nowhere with fewer devices free before leads nowhere again.
                key, check = np.int64(0), np.int64(0)
                for i in range(count):
                    if row_of[i] < 0:
                        key += _mix(np.int64(i), np.int64(1))
                        check += _mix(np.int64(i), np.int64(2))
                        for k in range(lag_first[i], lag_first[i + 1]):
                            p = lag_producer[k]
                            if row_of[p] >= 0:
                                key += _mix(end_of[p] * rows + row_of[p], np.int64(3 + p))
                                check += _mix(end_of[p] * rows + row_of[p], np.int64(7919 + p))
                    elif end_of[i] > then:
                        key += held[i] * _mix(end_of[i], np.int64(-1))
                        check += held[i] * _mix(end_of[i], np.int64(-2))
                key ^= _mix(then, np.int64(-3))
                check ^= _mix(then, np.int64(-4))
                slot = key & (MEMORY - 1)
                before = levels[depth, FREE]
                if (
                    memory[slot, 0] == key
                    and memory[slot, 1] == check
                    and memory[slot, 2] <= before
                ):
                    continue
                levels[depth, NEXT] = r
                depth += 1
                levels[depth, TIME], levels[depth, LAST] = then, -1
                levels[depth, BEFORE] = before
                levels[depth, KEY], levels[depth, CHECK] = key, check
                levels[depth, FREE] = free
                levels[depth, NEXT], levels[depth, USED] = 0, used
                levels[depth, ACTION] = -1
                deeper = True
                break
            nodes += 1
            row_of[task], start_of[task], end_of[task] = row, now, end
            held[task] = choice[row, 1]
            complete, makespan = True, np.int64(0)
            for i in range(count):
                complete = complete and row_of[i] >= 0
                makespan = max(makespan, end_of[i])
            if complete:
                if makespan <= limit:
                    limit = makespan - 1
                    for i in range(count):
                        solution[0, i], solution[1, i] = row_of[i], start_of[i]
                row_of[task] = -1
                continue
            levels[depth, ACTION], levels[depth, NEXT] = row, r
            depth += 1
            levels[depth, TIME], levels[depth, LAST] = now, task
            levels[depth, BEFORE] = before
            levels[depth, KEY] = levels[depth, CHECK] = 0
            levels[depth, FREE] = free - choice[row, 1]
            levels[depth, NEXT], levels[depth, USED] = 0, used
            levels[depth, ACTION] = -1
            deeper = True
            break
        if not deeper:
            if levels[depth, KEY] != 0:
                slot = levels[depth, KEY] & (MEMORY - 1)
                memory[slot, 0], memory[slot, 1] = levels[depth, KEY], levels[depth, CHECK]
                memory[slot, 2] = levels[depth, BEFORE]
            depth -= 1
        scalars[DEPTH], scalars[NODES], scalars[LIMIT] = depth, nodes, limit
        if nodes >= last_node and depth >= 0:
            return False
    return True
