"""Who is scheduled in a step: running sequences first, then the waiting queue.

The rules are those of ``schedule`` in vllm/v1/core/sched/scheduler.py.
"""

from __future__ import annotations

from typing import Any

from samullm_plugin.engine import layout as at
from samullm_plugin.engine.arrays import Array
from samullm_plugin.engine.blocks import (
    find_prefix,
    remember_blocks,
    take_block,
    use_block,
)
from samullm_plugin.engine.jit import compiled
from samullm_plugin.engine.owned import reuse_blocks, take_blocks
from samullm_plugin.engine.preempt import (
    blocks_for,
    hold,
    last_in_priority,
    preempt,
)
from samullm_plugin.engine.queues import drop_waiting, peek_waiting
from samullm_plugin.engine.running import computed_tokens, sit_down


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
def next_in_order(seats: Array, j: int, num_prefill: int, s: int) -> Any:
    """Return the earlier of the ``j``-th prefilling seat and seat ``s``; -1: there is neither."""
    if j >= num_prefill:
        return s
    prefilling = seats[j, at.PREFILLING]
    if s < 0 or seats[prefilling, at.ORDER] < seats[s, at.ORDER]:
        return prefilling
    return s


@compiled
def schedule_in_blocks(
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
) -> None:
    """Hand out blocks in running order, preempting the last ones where they run out.

    For policy fcfs with tokens for all: then only sequences that need blocks, and those that fill
    one, have to be touched.
    """
    block, tick, residue = z[at.BLOCK], z[at.TICK], z[at.RESIDUE]
    j, s = 0, classes[residue, at.FIRST]
    while True:
        current = next_in_order(seats, j, z[at.NUM_PREFILL], s)
        if current < 0:
            break
        computed = computed_tokens(z, seats, current)
        have = blocks_for(computed, block)
        need = blocks_needed(z, seats, current)
        victim = -1
        while need > z[at.FREE_BLOCKS] and victim != current:
            victim = z[at.TAIL]
            preempt(z, requests, seats, calendar, classes, kv, hashes, table, preempted, victim, 0)
        if victim == current:
            break
        for b in range(have, have + need):
            table[current, b] = take_block(z, kv, hashes, buckets)
        if current == s:
            s = seats[s, at.CLASS_AFTER]
        else:
            j += 1
    # A block gets its hash when its last token is known: asynchronously one step later.
    ahead = 0 if z[at.ASYNC] else 1
    if ahead:
        residue = residue - 1 if residue > 0 else block - 1
    j, s = 0, classes[residue, at.FIRST]
    while True:
        current = next_in_order(seats, j, z[at.NUM_PREFILL], s)
        if current < 0:
            break
        if current == s:
            known = seats[s, at.OFFSET] + tick + ahead
            s = seats[s, at.CLASS_AFTER]
        else:
            known = seats[current, at.OFFSET] + seats[current, at.CHUNK]
            j += 1
        remember_blocks(z, requests, seats, kv, hashes, buckets, table, prompt_hash, current, known)


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
    if z[at.CACHING] == at.SHARED_BLOCKS:
        schedule_in_blocks(
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
        )
        return z[at.BUDGET] - tokens  # not asked for after a preemption
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
