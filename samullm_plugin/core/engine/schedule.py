"""Who is scheduled in a step: running sequences first, then the waiting queue.

The rules are those of ``schedule`` in vllm/v1/core/sched/scheduler.py.
"""

from __future__ import annotations

from typing import Any

from samullm_plugin.core.engine import layout as at
from samullm_plugin.core.engine.arrays import Array
from samullm_plugin.core.engine.blocks import (
    find_prefix,
    give_back_blocks,
    remember_blocks,
    take_block,
    use_block,
)
from samullm_plugin.core.engine.jit import compiled
from samullm_plugin.core.engine.owned import (
    hashed_blocks,
    keep_blocks,
    reuse_blocks,
    take_blocks,
)
from samullm_plugin.core.engine.queues import drop_waiting, peek_waiting, wait_first
from samullm_plugin.core.engine.running import (
    computed_tokens,
    generated_tokens,
    leave_prefill,
    sit_down,
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
def plan_running(z: Array, seats: Array, classes: Array, threshold: int) -> tuple[int, int]:
    """Set the chunks of the prefilling sequences as if all running sequences could be scheduled.

    Returns:
        Their tokens, and the blocks they need.
    """
    block = z[at.BLOCK]
    tokens = z[at.NUM_DECODE]
    needed = classes[z[at.RESIDUE], at.COUNT]
    for j in range(z[at.NUM_PREFILL]):
        s = seats[j, at.PREFILLING]
        computed = seats[s, at.OFFSET]
        n = seats[s, at.TARGET] - computed
        if 0 < threshold < n:
            n = threshold
        if j == z[at.NUM_PREFILL] - 1 and s == z[at.TAIL] and tokens < z[at.BUDGET]:
            n = min(n, z[at.BUDGET] - tokens)  # the last of all takes what the others leave
        seats[s, at.CHUNK] = n
        tokens += n
        needed += blocks_for(computed + n, block) - blocks_for(computed, block)
    return tokens, needed


@compiled
def blocks_needed(z: Array, seats: Array, s: int) -> Any:
    """Return the blocks that seat ``s`` needs for what is planned for it."""
    state = seats[s, at.STATE]
    if state == at.DECODE:
        return 1 if seats[s, at.CLASS] == z[at.RESIDUE] else 0
    if state == at.PREFILL:
        computed = seats[s, at.OFFSET]
        after = blocks_for(computed + seats[s, at.CHUNK], z[at.BLOCK])
        return after - blocks_for(computed, z[at.BLOCK])
    return 0


@compiled
def allocate_decoding(
    z: Array,
    requests: Array,
    seats: Array,
    classes: Array,
    kv: Array,
    hashes: Array,
    buckets: Array,
    table: Array,
    prompt_hash: Array,
) -> None:
    """Hand out the blocks of a step in which every running sequence decodes (prefix caching)."""
    block, tick = z[at.BLOCK], z[at.TICK]
    residue = z[at.RESIDUE]
    s = classes[residue, at.FIRST]
    while s >= 0:
        table[s, (seats[s, at.OFFSET] + tick) // block] = take_block(z, kv, hashes, buckets)
        s = seats[s, at.CLASS_AFTER]
    # A block gets its hash when its last token is known: asynchronously one step later.
    ahead = 0 if z[at.ASYNC] else 1
    if ahead:
        residue = residue - 1 if residue > 0 else block - 1
    s = classes[residue, at.FIRST]
    while s >= 0:
        remember_blocks(
            z,
            requests,
            seats,
            kv,
            hashes,
            buckets,
            table,
            prompt_hash,
            s,
            seats[s, at.OFFSET] + tick + ahead,
        )
        s = seats[s, at.CLASS_AFTER]


@compiled
def schedule_one_by_one(
    z: Array,
    requests: Array,
    seats: Array,
    calendar: Array,
    classes: Array,
    kv: Array,
    hashes: Array,
    buckets: Array,
    table: Array,
    prompt_hash: Array,
    preempted: Array,
    threshold: int,
) -> Any:
    """Schedule the running list in order, preempting where blocks run out; return the tokens left.

    Needed where the order decides who gets less, or which block.
    """
    block = z[at.BLOCK]
    budget = z[at.BUDGET]
    s = z[at.HEAD]
    while s >= 0:
        seats[s, at.SCHEDULED] = 0
        s = seats[s, at.AFTER]
    s = z[at.HEAD]
    while s >= 0 and budget > 0:
        if seats[s, at.STATE] == at.FINISHING:
            s = seats[s, at.AFTER]
            continue
        decoding = seats[s, at.STATE] == at.DECODE
        computed = computed_tokens(z, seats, s)
        n = 1 if decoding else seats[s, at.TARGET] - computed
        if 0 < threshold < n:
            n = threshold
        n = min(n, budget)
        have = blocks_for(computed, block)
        need = blocks_for(computed + n, block) - have
        victim = -1
        while need > z[at.FREE_BLOCKS] and victim != s:
            victim = last_in_priority(z, requests, seats) if z[at.PRIORITY] else z[at.TAIL]
            extra = seats[victim, at.SCHEDULED]
            budget += extra
            preempt(
                z, requests, seats, calendar, classes, kv, hashes, table, preempted, victim, extra
            )
        if victim == s:
            break
        if z[at.CACHING] == at.SHARED_BLOCKS:
            for j in range(have, have + need):
                table[s, j] = take_block(z, kv, hashes, buckets)
        else:
            take_blocks(z, requests, need)
        if z[at.CACHING]:
            known = computed + n
            if z[at.ASYNC] and decoding:
                known = computed + seats[s, at.LATE]
                z[at.NUM_LATE] -= seats[s, at.LATE]
                seats[s, at.LATE] = 0
            remember_blocks(z, requests, seats, kv, hashes, buckets, table, prompt_hash, s, known)
        seats[s, at.SCHEDULED] = n
        seats[s, at.CHUNK] = n
        budget -= n
        s = seats[s, at.AFTER]
    s = z[at.HEAD]
    while s >= 0:
        if seats[s, at.SCHEDULED] == 0:
            seats[s, at.CHUNK] = 0
            if seats[s, at.STATE] == at.DECODE:
                hold(z, seats, calendar, classes, s)
        s = seats[s, at.AFTER]
    return budget


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


@compiled
def schedule_running(
    z: Array,
    requests: Array,
    seats: Array,
    calendar: Array,
    classes: Array,
    kv: Array,
    hashes: Array,
    buckets: Array,
    table: Array,
    prompt_hash: Array,
    preempted: Array,
    threshold: int,
) -> Any:
    """Schedule the running sequences; return the tokens left of the budget."""
    tokens, needed = plan_running(z, seats, classes, threshold)
    in_order = tokens > z[at.BUDGET] or z[at.NUM_LATE] > 0
    if z[at.CACHING] == at.SHARED_BLOCKS:
        in_order |= needed > z[at.FREE_BLOCKS] or z[at.NUM_PREFILL] > 0
    else:
        in_order |= needed > z[at.FREE_BLOCKS] and z[at.PRIORITY] != 0
    if in_order:
        return schedule_one_by_one(
            z,
            requests,
            seats,
            calendar,
            classes,
            kv,
            hashes,
            buckets,
            table,
            prompt_hash,
            preempted,
            threshold,
        )
    # Preempting the last ones until the rest fits is what preempting them one by one comes to.
    while needed > z[at.FREE_BLOCKS]:
        last = z[at.TAIL]
        others = needed - blocks_needed(z, seats, last)
        if others <= z[at.FREE_BLOCKS]:
            # It is the last one's own turn that blocks run out at: the others have theirs.
            take_blocks(z, requests, others)
            preempt(z, requests, seats, calendar, classes, kv, hashes, table, preempted, last, 0)
            return z[at.BUDGET] - tokens
        preempt(z, requests, seats, calendar, classes, kv, hashes, table, preempted, last, 0)
        tokens, needed = plan_running(z, seats, classes, threshold)
    if z[at.CACHING] == at.SHARED_BLOCKS:
        allocate_decoding(z, requests, seats, classes, kv, hashes, buckets, table, prompt_hash)
    else:
        take_blocks(z, requests, needed)
    return z[at.BUDGET] - tokens


@compiled
def schedule_waiting(
    z: Array,
    requests: Array,
    seats: Array,
    kv: Array,
    hashes: Array,
    buckets: Array,
    table: Array,
    prompt_hash: Array,
    budget: int,
    threshold: int,
) -> None:
    """Move requests from the waiting queue to the running list while they fit."""
    block = z[at.BLOCK]
    while budget > 0 and z[at.NUM_WAITING] > 0 and z[at.NUM_RUNNING] < z[at.MAX_SEQS]:
        request = peek_waiting(z, requests)
        tokens = requests[request, at.PROMPT] + requests[request, at.GENERATED]
        hits, unused = 0, 0
        if z[at.CACHING] == at.OWN_BLOCKS:
            hits = unused = requests[request, at.KEPT]
            if hits > (tokens - 1) // block:
                z[at.NOT_PREFIX] = 1
                break
        elif z[at.CACHING]:
            hits, unused = find_prefix(
                z, requests, kv, hashes, buckets, table, prompt_hash, request, tokens
            )
        # All its tokens must fit, though only the chunk's blocks are taken.
        if blocks_for(tokens, block) - hits + unused > z[at.FREE_BLOCKS]:
            break
        computed = hits * block
        n = tokens - computed
        if 0 < threshold < n:
            n = threshold
        n = min(n, budget)
        drop_waiting(z, requests)
        s = sit_down(z, seats, request)
        seats[s, at.OFFSET] = computed
        seats[s, at.TARGET] = tokens
        seats[s, at.CHUNK] = n
        seats[s, at.HASHED] = hits
        if z[at.CACHING] == at.SHARED_BLOCKS:
            for j in range(hits):
                table[s, j] = table[len(table) - 1, j]
                use_block(z, kv, table[len(table) - 1, j])
            for j in range(hits, blocks_for(computed + n, block)):
                table[s, j] = take_block(z, kv, hashes, buckets)
            remember_blocks(
                z, requests, seats, kv, hashes, buckets, table, prompt_hash, s, computed + n
            )
        else:
            reuse_blocks(z, requests, request)
            take_blocks(z, requests, blocks_for(computed + n, block) - hits)
        seats[z[at.NUM_PREFILL], at.PREFILLING] = s
        z[at.NUM_PREFILL] += 1
        z[at.STEP_CACHED] += computed
        budget -= n
