"""Seats: the running list, and decode sequences grouped by the tick of their last token."""

from __future__ import annotations

from samullm_plugin.core.engine.jit import compiled
from samullm_plugin.core.engine.layout import (
    AFTER,
    BEFORE,
    BLOCK,
    CACHING,
    CALENDAR_AFTER,
    CALENDAR_BEFORE,
    CALENDAR_MASK,
    CLASS,
    CLASS_AFTER,
    CLASS_BEFORE,
    COUNT,
    DECODE,
    EMPTY,
    FIRST,
    FREE_SEATS,
    GENERATED,
    HEAD,
    LAST,
    LATE,
    LONGEST,
    LONGEST_STALE,
    NEXT_SEAT,
    NUM_DECODE,
    NUM_PREFILL,
    NUM_RUNNING,
    OFFSET,
    OFFSETS,
    ORDER,
    OUTPUT,
    PREFILL,
    REQUEST,
    STATE,
    TAIL,
    TARGET,
    TICK,
)


@compiled
def sit_down(Z, S, seats, request):
    """Append ``request`` to the running list and return its seat."""
    Z[FREE_SEATS] -= 1
    s = seats[Z[FREE_SEATS]]
    S[s, REQUEST] = request
    S[s, STATE] = PREFILL
    S[s, ORDER] = Z[NEXT_SEAT]
    S[s, LATE] = 0
    Z[NEXT_SEAT] += 1
    tail = Z[TAIL]
    S[s, BEFORE] = tail
    S[s, AFTER] = -1
    if tail >= 0:
        S[tail, AFTER] = s
    else:
        Z[HEAD] = s
    Z[TAIL] = s
    Z[NUM_RUNNING] += 1
    return s


@compiled
def stand_up(Z, S, seats, s):
    """Take seat ``s`` out of the running list."""
    before, after = S[s, BEFORE], S[s, AFTER]
    if before >= 0:
        S[before, AFTER] = after
    else:
        Z[HEAD] = after
    if after >= 0:
        S[after, BEFORE] = before
    else:
        Z[TAIL] = before
    S[s, STATE] = EMPTY
    seats[Z[FREE_SEATS]] = s
    Z[FREE_SEATS] += 1
    Z[NUM_RUNNING] -= 1


@compiled
def computed_tokens(Z, S, s):
    """Return the tokens whose keys and values seat ``s`` has."""
    if S[s, STATE] == DECODE:
        return S[s, OFFSET] + Z[TICK]
    return S[s, OFFSET]


@compiled
def generated_tokens(Z, S, R, s):
    """Return the output tokens of the request on seat ``s``."""
    if S[s, STATE] == DECODE:
        return R[S[s, REQUEST], OUTPUT] - (S[s, TARGET] - Z[TICK])
    return R[S[s, REQUEST], GENERATED]


@compiled
def start_decoding(Z, S, calendar, classes, s, computed, left):
    """Enter seat ``s`` with ``computed`` tokens and ``left`` ticks to go among the decoding."""
    tick = Z[TICK]
    offset = computed - tick
    S[s, STATE] = DECODE
    S[s, OFFSET] = offset
    S[s, TARGET] = tick + left
    c = (tick + left) & Z[CALENDAR_MASK]
    first = calendar[c]
    S[s, CALENDAR_AFTER] = first
    S[s, CALENDAR_BEFORE] = -1
    if first >= 0:
        S[first, CALENDAR_BEFORE] = s
    calendar[c] = s
    k = offset % Z[BLOCK]
    S[s, CLASS] = k
    classes[k, COUNT] += 1
    if Z[CACHING]:
        # kept in running order: blocks are handed out in this order
        order = S[s, ORDER]
        before = classes[k, LAST]
        after = -1
        while before >= 0 and S[before, ORDER] > order:
            after = before
            before = S[before, CLASS_BEFORE]
        S[s, CLASS_BEFORE] = before
        S[s, CLASS_AFTER] = after
        if before >= 0:
            S[before, CLASS_AFTER] = s
        else:
            classes[k, FIRST] = s
        if after >= 0:
            S[after, CLASS_BEFORE] = s
        else:
            classes[k, LAST] = s
    Z[NUM_DECODE] += 1
    Z[OFFSETS] += offset
    if Z[NUM_DECODE] == 1:
        Z[LONGEST] = offset
        Z[LONGEST_STALE] = 0
    elif offset > Z[LONGEST]:
        Z[LONGEST] = offset


@compiled
def forget_decoding(Z, S, classes, s):
    """Take seat ``s`` out of the sums over decoding sequences (not out of the calendar)."""
    k = S[s, CLASS]
    classes[k, COUNT] -= 1
    if Z[CACHING]:
        before, after = S[s, CLASS_BEFORE], S[s, CLASS_AFTER]
        if before >= 0:
            S[before, CLASS_AFTER] = after
        else:
            classes[k, FIRST] = after
        if after >= 0:
            S[after, CLASS_BEFORE] = before
        else:
            classes[k, LAST] = before
    Z[NUM_DECODE] -= 1
    Z[OFFSETS] -= S[s, OFFSET]
    if S[s, OFFSET] == Z[LONGEST]:
        Z[LONGEST_STALE] = 1


@compiled
def stop_decoding(Z, S, calendar, classes, s):
    """Take seat ``s`` out of the decoding before its last token."""
    before, after = S[s, CALENDAR_BEFORE], S[s, CALENDAR_AFTER]
    if before >= 0:
        S[before, CALENDAR_AFTER] = after
    else:
        calendar[S[s, TARGET] & Z[CALENDAR_MASK]] = after
    if after >= 0:
        S[after, CALENDAR_BEFORE] = before
    forget_decoding(Z, S, classes, s)


@compiled
def leave_prefill(Z, prefill, s):
    """Take seat ``s`` out of the list of prefilling sequences, keeping its order."""
    kept = 0
    for j in range(Z[NUM_PREFILL]):
        if prefill[j] != s:
            prefill[kept] = prefill[j]
            kept += 1
    Z[NUM_PREFILL] = kept


@compiled
def longest_offset(Z, S):
    """Return the largest offset of a decoding sequence."""
    if Z[LONGEST_STALE]:
        longest = -(1 << 60)
        s = Z[HEAD]
        while s >= 0:
            if S[s, STATE] == DECODE and S[s, OFFSET] > longest:
                longest = S[s, OFFSET]
            s = S[s, AFTER]
        Z[LONGEST] = longest
        Z[LONGEST_STALE] = 0
    return Z[LONGEST]
