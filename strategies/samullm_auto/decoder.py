"""Solutions decoded, compiled.

A decoding goes through a solution from event to event as the builder does, with each model's
progress read off the table of its run alone. Tens of thousands take a second.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from samullm_plugin.engine.jit import Compiled, inner
from samullm_plugin.model.types import Bools, Floats, Ints

WORTHWHILE = 0.01
"""A resized model must finish sooner by this share of its remaining time."""

EARLY = 0.05
"""Weight of the mean finish of all models beside the makespan: where one model decides the
makespan, in other lengths another may, so all are to be early."""

GROWN = 8
"""Models that finish last and are considered for devices that nobody else can use."""

SURELY = 0.98
"""Share of the least value known in a scenario that any solution is taken to need there."""

NEVER = 1e300
SLACK = 1e-9
WAITING, RUNNING, FINISHED = 0, 1, 2

compiled = Compiled(
    "auto", (Path(__file__).with_name(f"{n}.py") for n in ("decoder", "neighbourhood"))
)


class Tables(NamedTuple):
    """A problem in arrays.

    Attributes:
        first: by node, its first mode; one more at the end. Modes of a node are in the order of
            their devices.
        devices: by mode, devices of all replicas.
        width: by mode, devices that must lie in one NVLink group.
        parts: by mode, how many such sets it takes.
        wider: by mode, the next mode of the same shape on more devices, or -1.
        engines: by mode, the number of its engines, which go on as those of a mode of the same
            number that starts when they become free; -1 if there is none.
        allowed: by mode and NVLink group, whether it fits on its kind of GPU.
        size: by group, its devices.
        kind: by group, the number of its kind of GPU.
        load_s: by scenario and mode, seconds of an engine start.
        work_s: by scenario, mode and share, seconds after that until this share of the node's
            requests is finished.
        shares: the shares, from 0 to 1.
        up_first: by node, its first producer; one more at the end.
        up: producers.
        tail_first: by producer entry, its first entry in ``tail_s``.
        tail_s: tails, by the producer's mode, then the consumer's.
        topological: nodes, producers first.
    """

    first: Ints
    devices: Ints
    width: Ints
    parts: Ints
    wider: Ints
    engines: Ints
    allowed: Bools
    size: Ints
    kind: Ints
    load_s: Floats
    work_s: Floats
    shares: Floats
    up_first: Ints
    up: Ints
    tail_first: Ints
    tail_s: Floats
    topological: Ints


class EncodedSolution(NamedTuple):
    """A solution in arrays, by node (``order`` by position).

    Attributes:
        order: nodes.
        mode: index of the mode.
        start: share of their requests that producers must have done.
        split: share at which the mode changes; 0: never.
        then: the mode from then on.
        flags: 1 or 0 for strict, for grow and for patient.
    """

    order: Ints
    mode: Ints
    start: Floats
    split: Floats
    then: Ints
    flags: Ints


@inner
def _sum(values, total):  # type: ignore[no-untyped-def]  # typed by numba from its arguments
    """Return ``total`` and all values."""
    for i in range(len(values)):
        total += values[i]
    return total


@inner
def _take(t, mode, free, held):  # type: ignore[no-untyped-def]  # as above
    """Take devices for a mode, in place: from the fullest groups that have room."""
    width, parts = t.width[mode], t.parts[mode]
    kinds = 0
    for g in range(len(free)):
        kinds = max(kinds, t.kind[g] + 1)
    for kind in range(kinds):
        room = 0
        for g in range(len(free)):
            if t.kind[g] == kind and t.allowed[mode, g]:
                room += free[g] // width
        if room < parts:
            continue
        for _ in range(parts):
            best = -1
            for g in range(len(free)):
                usable = t.kind[g] == kind and t.allowed[mode, g] and free[g] >= width
                if usable and (best < 0 or free[g] < free[best]):
                    best = g
            free[best] -= width
            held[best] += width
        return True
    return False


@inner
def _share_after(work_s, shares, seconds):  # type: ignore[no-untyped-def]  # as above
    """Return the share of the requests that is finished after so many seconds of work."""
    last = len(shares) - 1
    if seconds >= work_s[last]:
        return 1.0
    for k in range(1, last + 1):
        if seconds < work_s[k]:
            if seconds <= work_s[k - 1]:
                return shares[k - 1]
            part = (seconds - work_s[k - 1]) / (work_s[k] - work_s[k - 1])
            return shares[k - 1] + part * (shares[k] - shares[k - 1])
    return 1.0


@inner
def _work_until(work_s, shares, share):  # type: ignore[no-untyped-def]  # as above
    """Return the seconds of work in which a share of the requests is finished."""
    for k in range(1, len(shares)):
        if share <= shares[k]:
            part = (share - shares[k - 1]) / (shares[k] - shares[k - 1])
            return work_s[k - 1] + part * (work_s[k] - work_s[k - 1])
    return work_s[len(shares) - 1]


@inner
def _find_ends(t, state, mode, base_s, floor_s, total_s, end_s):  # type: ignore[no-untyped-def]  # as above
    """Write when each running model finishes, its producers considered."""
    for i in t.topological:
        if state[i] != RUNNING:
            continue
        end = max(base_s[i], floor_s[i])
        for k in range(t.up_first[i], t.up_first[i + 1]):
            u = t.up[k]
            if state[u] == RUNNING:
                end = max(end, end_s[u] + _tail(t, k, u, mode[u], i, mode[i], total_s[i]))
        end_s[i] = end


@inner
def _tail(t, entry, producer, its_mode, node, mode, total_s):  # type: ignore[no-untyped-def]  # as above
    """Return what a consumer needs after its producer's end, at most its whole time."""
    width = t.first[node + 1] - t.first[node]
    at = t.tail_first[entry] + (its_mode - t.first[producer]) * width + mode - t.first[node]
    return min(t.tail_s[at], total_s)


@inner
def decode(t, solution, s, limit_s):  # type: ignore[no-untyped-def]  # as above
    """Return the makespan and the sum of all finishes in scenario ``s``.

    Both are ``NEVER`` if the makespan is seen to exceed ``limit_s``.
    """
    order, modes, starts, splits, then, flags = solution
    count = len(order)
    state = np.zeros(count, np.int64)
    mode = modes.copy()
    origin_s, begun_s = np.zeros(count), np.zeros(count)
    base_s, floor_s, total_s = np.zeros(count), np.zeros(count), np.zeros(count)
    end_s = np.zeros(count)
    split = splits.copy()
    for i in range(count):
        if then[i] == modes[i]:
            split[i] = 0.0  # nothing would change there
    held = np.zeros((count, len(t.size)), np.int64)
    free = t.size.copy()
    by_end = np.zeros(count, np.int64)
    now, left = 0.0, count
    offered = -1  # engines that have just become free
    awaited = np.full(count, -1, np.int64)
    for step in range(12 * count + 60):
        # Devices to models in order.
        for i in order:
            if state[i] != WAITING:
                continue
            ready = True
            for k in range(t.up_first[i], t.up_first[i + 1]):
                u = t.up[k]
                if state[u] == WAITING or (state[u] == RUNNING and starts[i] >= 1.0):
                    ready = False
                elif state[u] == RUNNING and starts[i] > 0.0:
                    done = _share_after(t.work_s[s, mode[u]], t.shares, now - origin_s[u])
                    ready = ready and done >= starts[i] - SLACK
            if not ready:
                continue
            wanted = t.engines[mode[i]]
            if flags[2] and wanted >= 0 and wanted != offered:
                # Engines that become free before others would have started are waited for.
                limit = now + t.load_s[s, mode[i]]
                for u in range(count):
                    alike = state[u] == RUNNING and t.engines[mode[u]] == wanted
                    soon = begun_s[u] < now and end_s[u] < limit
                    if ready and alike and soon and awaited[u] != step:
                        awaited[u], ready = step, False
                if not ready:
                    continue
            if not _take(t, mode[i], free, held[i]):
                if flags[0]:
                    break
                continue
            m = mode[i]
            load_s = t.load_s[s, m]
            if offered >= 0 and t.engines[m] == offered:
                load_s, offered = 0.0, -1
            state[i], begun_s[i] = RUNNING, now
            origin_s[i] = now + load_s
            total_s[i] = load_s + t.work_s[s, m, -1]
            base_s[i] = now + total_s[i]
            left -= 1
        offered = -1
        _find_ends(t, state, mode, base_s, floor_s, total_s, end_s)
        num_free = _sum(free, 0)
        if left == 0 and flags[1] and num_free > 0:
            # What is left over to models that finish sooner by it, what finishes last first.
            running = 0
            for i in range(count):
                if state[i] == RUNNING:
                    by_end[running] = i
                    running += 1
            for a in range(min(GROWN, running)):
                for b in range(a + 1, running):
                    if end_s[by_end[b]] > end_s[by_end[a]]:
                        by_end[a], by_end[b] = by_end[b], by_end[a]
                i = by_end[a]
                waits = False
                for k in range(t.up_first[i], t.up_first[i + 1]):
                    waits = waits or state[t.up[k]] == RUNNING
                if waits or begun_s[i] == now or num_free == 0:
                    continue
                mine = t.devices[mode[i]]
                share = _share_after(t.work_s[s, mode[i]], t.shares, now - origin_s[i])
                limit, chosen = end_s[i] - WORTHWHILE * (end_s[i] - now), -1
                for m in range(t.first[i], t.first[i + 1]):
                    room = mine + num_free
                    if t.devices[m] <= mine or t.devices[m] > room:
                        continue
                    if t.wider[m] >= 0 and t.devices[t.wider[m]] <= room:
                        continue
                    rest = t.work_s[s, m, -1] - _work_until(t.work_s[s, m], t.shares, share)
                    if now + t.load_s[s, m] + rest < limit:
                        limit, chosen = now + t.load_s[s, m] + rest, m
                if chosen >= 0 and _resize(t, s, i, chosen, share, now, free, held, mode,
                                           origin_s, begun_s, base_s, total_s):  # fmt: skip
                    num_free = _sum(free, 0)
            _find_ends(t, state, mode, base_s, floor_s, total_s, end_s)
        # The next event.
        at, who, kind = NEVER, -1, 0
        for i in range(count):
            if state[i] == RUNNING and end_s[i] < at:
                at, who, kind = end_s[i], i, 1
        for i in range(count):
            if state[i] == RUNNING and split[i] > 0.0:
                when = origin_s[i] + _work_until(t.work_s[s, mode[i]], t.shares, split[i])
                when = max(when, now)
                if when < at:
                    at, who, kind = when, i, 2
            elif state[i] == WAITING and 0.0 < starts[i] < 1.0:
                for k in range(t.up_first[i], t.up_first[i + 1]):
                    u = t.up[k]
                    if state[u] == RUNNING:
                        work_s = t.work_s[s, mode[u]]
                        when = origin_s[u] + _work_until(work_s, t.shares, starts[i])
                        if now + SLACK < when < at:
                            at, who, kind = when, u, 3
        if who < 0:
            break
        if at > limit_s:
            return NEVER, NEVER
        now = at
        if kind == 1:
            state[who], offered = FINISHED, t.engines[mode[who]]
            for g in range(len(free)):
                free[g] += held[who, g]
            for c in range(count):
                for k in range(t.up_first[c], t.up_first[c + 1]):
                    if t.up[k] == who and state[c] == RUNNING:
                        tail = _tail(t, k, who, mode[who], c, mode[c], total_s[c])
                        floor_s[c] = max(floor_s[c], now + tail)
        elif kind == 2:
            split[who] = 0.0
            if then[who] != mode[who]:
                share = _share_after(t.work_s[s, mode[who]], t.shares, now - origin_s[who])
                _resize(t, s, who, then[who], share, now, free, held, mode,
                        origin_s, begun_s, base_s, total_s)  # fmt: skip
    makespan, total = 0.0, 0.0
    for i in range(count):
        if state[i] != FINISHED:
            return NEVER, NEVER
        makespan = max(makespan, end_s[i])
        total += end_s[i]
    return makespan, total


@inner
def _resize(  # type: ignore[no-untyped-def]  # as above
    t, s, i, m, share, now, free, held, mode, origin_s, begun_s, base_s, total_s
):
    """Start a running model anew in another mode, in place; return whether there is a place."""
    before = held[i].copy()
    for g in range(len(free)):
        free[g] += held[i, g]
        held[i, g] = 0
    if not _take(t, m, free, held[i]):
        for g in range(len(free)):
            free[g] -= before[g]
            held[i, g] = before[g]
        return False
    mode[i], begun_s[i] = m, now
    origin_s[i] = now + t.load_s[s, m] - _work_until(t.work_s[s, m], t.shares, share)
    base_s[i] = origin_s[i] + t.work_s[s, m, -1]
    total_s[i] = t.load_s[s, m] + t.work_s[s, m, -1]
    return True


@inner
def inner_value_s(t, solution, limit_s, least_s):  # type: ignore[no-untyped-def]  # as above
    """Return the mean makespan of a solution, plus a little of the mean finish of all models.

    Args:
        t: the problem.
        solution: the solution.
        limit_s: solutions of a higher value may be given up: ``NEVER`` is returned for them.
        least_s: by scenario, the least value known; made smaller, in place, where this one's is.
    """
    count, scenarios = len(solution.order), t.load_s.shape[0]
    total, rest = 0.0, SURELY * _sum(least_s, 0.0)
    for s in range(scenarios):
        rest -= SURELY * least_s[s]
        makespan, finishes = decode(t, solution, s, limit_s * scenarios - total - rest)
        value = makespan + EARLY * finishes / count
        total += value
        if total + rest > limit_s * scenarios:
            return NEVER
        least_s[s] = min(least_s[s], value)
    return total / scenarios


@compiled
def value_s(t, solution, limit_s, least_s):  # type: ignore[no-untyped-def]  # as above
    """Return what ``inner_value_s`` does; for Python."""
    return inner_value_s(t, solution, limit_s, least_s)
