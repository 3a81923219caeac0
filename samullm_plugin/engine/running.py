"""Seats: the running list, and decode sequences grouped by the tick of their last token."""

from __future__ import annotations

from typing import Any

from samullm_plugin.engine import layout as at
from samullm_plugin.engine.arrays import Array
from samullm_plugin.engine.jit import compiled


@compiled
def sit_down(z: Array, seats: Array, request: int) -> int:
    """Append ``request`` to the running list and return its seat."""
    z[at.FREE_SEATS] -= 1
    s: int = seats[z[at.FREE_SEATS], at.UNUSED]
    seats[s, at.REQUEST] = request
    seats[s, at.STATE] = at.PREFILL
    seats[s, at.ORDER] = z[at.NEXT_SEAT]
    seats[s, at.LATE] = 0
    z[at.NEXT_SEAT] += 1
    tail = z[at.TAIL]
    seats[s, at.BEFORE] = tail
    seats[s, at.AFTER] = -1
    if tail >= 0:
        seats[tail, at.AFTER] = s
    else:
        z[at.HEAD] = s
    z[at.TAIL] = s
    z[at.NUM_RUNNING] += 1
    return s


@compiled
def stand_up(z: Array, seats: Array, s: int) -> None:
    """Take seat ``s`` out of the running list."""
    before, after = seats[s, at.BEFORE], seats[s, at.AFTER]
    if before >= 0:
        seats[before, at.AFTER] = after
    else:
        z[at.HEAD] = after
    if after >= 0:
        seats[after, at.BEFORE] = before
    else:
        z[at.TAIL] = before
    seats[s, at.STATE] = at.EMPTY
    seats[z[at.FREE_SEATS], at.UNUSED] = s
    z[at.FREE_SEATS] += 1
    z[at.NUM_RUNNING] -= 1


@compiled
def computed_tokens(z: Array, seats: Array, s: int) -> Any:
    """Return the tokens whose keys and values seat ``s`` has."""
    if seats[s, at.STATE] == at.DECODE:
        return seats[s, at.OFFSET] + z[at.TICK]
    return seats[s, at.OFFSET]


@compiled
def generated_tokens(z: Array, requests: Array, seats: Array, s: int) -> Any:
    """Return the output tokens of the request on seat ``s``."""
    if seats[s, at.STATE] == at.DECODE:
        return requests[seats[s, at.REQUEST], at.OUTPUT] - (seats[s, at.TARGET] - z[at.TICK])
    return requests[seats[s, at.REQUEST], at.GENERATED]


@compiled
def start_decoding(
    z: Array, seats: Array, calendar: Array, classes: Array, s: int, computed: int, left: int
) -> None:
    """Enter seat ``s`` with ``computed`` tokens and ``left`` ticks to go among the decoding."""
    tick = z[at.TICK]
    offset = computed - tick
    seats[s, at.STATE] = at.DECODE
    seats[s, at.OFFSET] = offset
    seats[s, at.TARGET] = tick + left
    c = (tick + left) & z[at.CALENDAR_MASK]
    first = calendar[c]
    seats[s, at.CALENDAR_AFTER] = first
    seats[s, at.CALENDAR_BEFORE] = -1
    if first >= 0:
        seats[first, at.CALENDAR_BEFORE] = s
    calendar[c] = s
    k = offset % z[at.BLOCK]
    seats[s, at.CLASS] = k
    classes[k, at.COUNT] += 1
    if z[at.CACHING] == at.SHARED_BLOCKS:
        # kept in running order: blocks are handed out in this order
        order = seats[s, at.ORDER]
        before = classes[k, at.LAST]
        after = -1
        while before >= 0 and seats[before, at.ORDER] > order:
            after = before
            before = seats[before, at.CLASS_BEFORE]
        seats[s, at.CLASS_BEFORE] = before
        seats[s, at.CLASS_AFTER] = after
        if before >= 0:
            seats[before, at.CLASS_AFTER] = s
        else:
            classes[k, at.FIRST] = s
        if after >= 0:
            seats[after, at.CLASS_BEFORE] = s
        else:
            classes[k, at.LAST] = s
    z[at.NUM_DECODE] += 1
    z[at.OFFSETS] += offset
    if z[at.NUM_DECODE] == 1:
        z[at.LONGEST] = offset
        z[at.LONGEST_STALE] = 0
    elif offset > z[at.LONGEST]:
        z[at.LONGEST] = offset


@compiled
def forget_decoding(z: Array, seats: Array, classes: Array, s: int) -> None:
    """Take seat ``s`` out of the sums over decoding sequences (not out of the calendar)."""
    k = seats[s, at.CLASS]
    classes[k, at.COUNT] -= 1
    if z[at.CACHING] == at.SHARED_BLOCKS:
        before, after = seats[s, at.CLASS_BEFORE], seats[s, at.CLASS_AFTER]
        if before >= 0:
            seats[before, at.CLASS_AFTER] = after
        else:
            classes[k, at.FIRST] = after
        if after >= 0:
            seats[after, at.CLASS_BEFORE] = before
        else:
            classes[k, at.LAST] = before
    z[at.NUM_DECODE] -= 1
    z[at.OFFSETS] -= seats[s, at.OFFSET]
    if seats[s, at.OFFSET] == z[at.LONGEST]:
        z[at.LONGEST_STALE] = 1


@compiled
def stop_decoding(z: Array, seats: Array, calendar: Array, classes: Array, s: int) -> None:
    """Take seat ``s`` out of the decoding before its last token."""
    before, after = seats[s, at.CALENDAR_BEFORE], seats[s, at.CALENDAR_AFTER]
    if before >= 0:
        seats[before, at.CALENDAR_AFTER] = after
    else:
        calendar[seats[s, at.TARGET] & z[at.CALENDAR_MASK]] = after
    if after >= 0:
        seats[after, at.CALENDAR_BEFORE] = before
    forget_decoding(z, seats, classes, s)


@compiled
def leave_prefill(z: Array, seats: Array, s: int) -> None:
    """Take seat ``s`` out of the list of prefilling sequences, keeping its order."""
    kept = 0
    for j in range(z[at.NUM_PREFILL]):
        if seats[j, at.PREFILLING] != s:
            seats[kept, at.PREFILLING] = seats[j, at.PREFILLING]
            kept += 1
    z[at.NUM_PREFILL] = kept


@compiled
def longest_offset(z: Array, seats: Array) -> Any:
    """Return the largest offset of a decoding sequence."""
    if z[at.LONGEST_STALE]:
        longest = -(1 << 60)
        s = z[at.HEAD]
        while s >= 0:
            if seats[s, at.STATE] == at.DECODE and seats[s, at.OFFSET] > longest:
                longest = seats[s, at.OFFSET]
            s = seats[s, at.AFTER]
        z[at.LONGEST] = longest
        z[at.LONGEST_STALE] = 0
    return z[at.LONGEST]
