"""Taking blocks and seats away from running sequences."""

from __future__ import annotations

from typing import Any

from samullm_plugin.engine import layout as at
from samullm_plugin.engine.arrays import Array
from samullm_plugin.engine.blocks import give_back_blocks
from samullm_plugin.engine.jit import compiled
from samullm_plugin.engine.owned import hashed_blocks, keep_blocks
from samullm_plugin.engine.queues import wait_first
from samullm_plugin.engine.running import (
    computed_tokens,
    generated_tokens,
    leave_prefill,
    stand_up,
    start_decoding,
    stop_decoding,
)


@compiled
def blocks_for(tokens: int, block: int) -> Any:
    """Return the blocks that hold ``tokens`` tokens."""
    return (tokens + block - 1) // block


@compiled
def release_blocks(
    z: Array,
    requests: Array,
    seats: Array,
    kv: Array,
    hashes: Array,
    table: Array,
    s: int,
    computed: int,
    extra: int,
) -> None:
    """Free the blocks of seat ``s``: of computed tokens, and of ``extra`` ones of this step."""
    count = blocks_for(computed + extra, z[at.BLOCK])
    if z[at.CACHING] == at.SHARED_BLOCKS:
        give_back_blocks(z, kv, hashes, table, s, count)
    elif z[at.CACHING] == at.OWN_BLOCKS:
        hashed = hashed_blocks(z, seats, s, computed, extra)
        keep_blocks(z, requests, seats[s, at.REQUEST], count, hashed)
    else:
        z[at.FREE_BLOCKS] += count


@compiled
def preempt(
    z: Array,
    requests: Array,
    seats: Array,
    calendar: Array,
    classes: Array,
    kv: Array,
    hashes: Array,
    table: Array,
    preempted: Array,
    s: int,
    extra: int,
) -> None:
    """Take away seat ``s`` and its blocks, ``extra`` tokens of which were allocated just now."""
    request = seats[s, at.REQUEST]
    computed = computed_tokens(z, seats, s)
    generated = generated_tokens(z, requests, seats, s)
    if seats[s, at.STATE] == at.DECODE:
        stop_decoding(z, seats, calendar, classes, s)
        z[at.NUM_LATE] -= seats[s, at.LATE]
    elif seats[s, at.STATE] == at.PREFILL:
        leave_prefill(z, seats, s)
    release_blocks(z, requests, seats, kv, hashes, table, s, computed, extra)
    if seats[s, at.STATE] == at.FINISHING:  # its last token arrives nevertheless
        for j in range(z[at.NUM_FINISHING]):
            if seats[j, at.LEAVING] == s:
                seats[j, at.LEAVING] = -1
    else:
        requests[request, at.GENERATED] = generated
        requests[request, at.COMPUTED_BEFORE] = max(requests[request, at.COMPUTED_BEFORE], computed)
        wait_first(z, requests, request)
    stand_up(z, seats, s)
    if z[at.RECORD] == 2:
        preempted[z[at.LOG_PREEMPTED] + z[at.STEP_PREEMPTED]] = request
    z[at.STEP_PREEMPTED] += 1


@compiled
def last_in_priority(z: Array, requests: Array, seats: Array) -> Any:
    """Return the seat that policy ``priority`` preempts first."""
    worst = z[at.HEAD]
    s = seats[worst, at.AFTER]
    while s >= 0:
        if requests[seats[s, at.REQUEST], at.RANK] > requests[seats[worst, at.REQUEST], at.RANK]:
            worst = s
        s = seats[s, at.AFTER]
    return worst


@compiled
def hold(z: Array, seats: Array, calendar: Array, classes: Array, s: int) -> None:
    """Leave the decoding seat ``s`` out of the step at hand."""
    computed = computed_tokens(z, seats, s)
    stop_decoding(z, seats, calendar, classes, s)
    seats[s, at.STATE] = at.HELD
    seats[s, at.OFFSET] = computed
    seats[s, at.TARGET] -= z[at.TICK]
    seats[z[at.NUM_HELD], at.LEFT_OUT] = s
    z[at.NUM_HELD] += 1


@compiled
def release_held(z: Array, seats: Array, calendar: Array, classes: Array) -> None:
    """Let the sequences left out of the step decode on."""
    for j in range(z[at.NUM_HELD]):
        s = seats[j, at.LEFT_OUT]
        start_decoding(z, seats, calendar, classes, s, seats[s, at.OFFSET], seats[s, at.TARGET])
        if z[at.ASYNC] and z[at.CACHING] and not seats[s, at.LATE]:
            seats[s, at.LATE] = 1
            z[at.NUM_LATE] += 1
    z[at.NUM_HELD] = 0
