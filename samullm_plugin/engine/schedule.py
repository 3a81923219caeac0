"""What is scheduled in a step: running sequences first, then the waiting queue.

The rules are those of ``schedule`` in vllm/v1/core/sched/scheduler.py.
"""

from __future__ import annotations

from typing import Any

from samullm_plugin.engine import records as at
from samullm_plugin.engine.jit import inner
from samullm_plugin.engine.kv_cache import (
    blocks_for,
    find_prefix,
    remember_blocks,
    reuse_blocks,
    take_block,
    take_blocks,
    use_block,
)
from samullm_plugin.engine.queues import peek_waiting, pop_waiting
from samullm_plugin.engine.records import Array, Record
from samullm_plugin.engine.running import (
    add_running,
    computed_tokens,
    last_in_priority,
    preempt,
    skip,
)


@inner
def plan_running(s: Record, slots: Array, phases: Array, threshold: int) -> tuple[int, int]:
    """Set the chunks of the prefilling sequences as if all running sequences could be scheduled.

    Returns:
        Their tokens, and the blocks they need.
    """
    block = s.block_size
    tokens = s.num_decode
    needed = phases[s.block_phase].count
    for j in range(s.num_prefill):
        i = slots[j].prefilling
        computed = slots[i].offset
        n = slots[i].target - computed
        if 0 < threshold < n:
            n = threshold
        if j == s.num_prefill - 1 and i == s.running_tail and tokens < s.max_num_batched_tokens:
            n = min(
                n, s.max_num_batched_tokens - tokens
            )  # the last of all takes what the others leave
        slots[i].chunk = n
        tokens += n
        needed += blocks_for(computed + n, block) - blocks_for(computed, block)
    return tokens, needed


@inner
def blocks_needed(s: Record, slots: Array, i: int) -> Any:
    """Return the blocks that slot ``i`` needs for what is planned for it."""
    state = slots[i].state
    if state == at.DECODE:
        return 1 if slots[i].phase == s.block_phase else 0
    if state == at.PREFILL:
        computed = slots[i].offset
        after = blocks_for(computed + slots[i].chunk, s.block_size)
        return after - blocks_for(computed, s.block_size)
    return 0


@inner
def next_in_order(slots: Array, j: int, num_prefill: int, i: int) -> Any:
    """Return the earlier of the ``j``-th prefilling slot and slot ``i``; -1: there is neither."""
    if j >= num_prefill:
        return i
    prefilling = slots[j].prefilling
    if i < 0 or slots[prefilling].order < slots[i].order:
        return prefilling
    return i


@inner
def schedule_in_blocks(
    s: Record,
    requests: Array,
    slots: Array,
    finish_wheel: Array,
    phases: Array,
    blocks: Array,
    buckets: Array,
    table: Array,
    prompt_hash: Array,
    preempted: Array,
) -> None:
    """Hand out blocks in running order, preempting the last ones where they run out.

    For policy fcfs with tokens for all: then only sequences that need blocks, and those that fill
    one, have to be touched.
    """
    block, step, phase = s.block_size, s.decode_step, s.block_phase
    j, i = 0, phases[phase].first
    while True:
        current = next_in_order(slots, j, s.num_prefill, i)
        if current < 0:
            break
        computed = computed_tokens(s, slots, current)
        have = blocks_for(computed, block)
        need = blocks_needed(s, slots, current)
        victim = -1
        while need > s.free_blocks and victim != current:
            victim = s.running_tail
            preempt(s, requests, slots, finish_wheel, phases, blocks, table, preempted, victim, 0)
        if victim == current:
            break
        for b in range(have, have + need):
            table[current, b] = take_block(s, blocks, buckets)
        if current == i:
            i = slots[i].phase_after
        else:
            j += 1
    # A block gets its hash when its last token is known: asynchronously one step later.
    ahead = 0 if s.async_scheduling else 1
    if ahead:
        phase = phase - 1 if phase > 0 else block - 1
    j, i = 0, phases[phase].first
    while True:
        current = next_in_order(slots, j, s.num_prefill, i)
        if current < 0:
            break
        if current == i:
            known = slots[i].offset + step + ahead
            i = slots[i].phase_after
        else:
            known = slots[current].offset + slots[current].chunk
            j += 1
        remember_blocks(s, requests, slots, blocks, buckets, table, prompt_hash, current, known)


@inner
def schedule_one_by_one(
    s: Record,
    requests: Array,
    slots: Array,
    finish_wheel: Array,
    phases: Array,
    blocks: Array,
    buckets: Array,
    table: Array,
    prompt_hash: Array,
    preempted: Array,
    threshold: int,
) -> Any:
    """Schedule the running list in order, preempting where blocks run out; return the tokens left.

    Needed where the order decides who gets less, or which block.
    """
    block = s.block_size
    budget = s.max_num_batched_tokens
    i = s.running_head
    while i >= 0:
        slots[i].scheduled = 0
        i = slots[i].after
    i = s.running_head
    while i >= 0 and budget > 0:
        if slots[i].state == at.FINISHING:
            i = slots[i].after
            continue
        decoding = slots[i].state == at.DECODE
        computed = computed_tokens(s, slots, i)
        n = 1 if decoding else slots[i].target - computed
        if 0 < threshold < n:
            n = threshold
        n = min(n, budget)
        have = blocks_for(computed, block)
        need = blocks_for(computed + n, block) - have
        victim = -1
        while need > s.free_blocks and victim != i:
            victim = last_in_priority(s, requests, slots) if s.priority else s.running_tail
            extra = slots[victim].scheduled
            budget += extra
            preempt(
                s, requests, slots, finish_wheel, phases, blocks, table, preempted, victim, extra
            )
        if victim == i:
            if s.self_preemption_ends_step:
                break
            i = slots[i].after  # left as it was when the slot was given up
            continue
        if s.caching == at.SHARED_BLOCKS:
            for j in range(have, have + need):
                table[i, j] = take_block(s, blocks, buckets)
        else:
            take_blocks(s, requests, need)
        if s.caching:
            known = computed + n
            if s.async_scheduling and decoding:
                known = computed + slots[i].no_token_in_flight
                s.num_no_token_in_flight -= slots[i].no_token_in_flight
                slots[i].no_token_in_flight = 0
            remember_blocks(s, requests, slots, blocks, buckets, table, prompt_hash, i, known)
        slots[i].scheduled = n
        slots[i].chunk = n
        budget -= n
        i = slots[i].after
    i = s.running_head
    while i >= 0:
        if slots[i].scheduled == 0:
            slots[i].chunk = 0
            if slots[i].state == at.DECODE:
                skip(s, slots, finish_wheel, phases, i)
        i = slots[i].after
    return budget


@inner
def schedule_running(
    s: Record,
    requests: Array,
    slots: Array,
    finish_wheel: Array,
    phases: Array,
    blocks: Array,
    buckets: Array,
    table: Array,
    prompt_hash: Array,
    preempted: Array,
    threshold: int,
) -> Any:
    """Schedule the running sequences; return the tokens left of the budget."""
    tokens, needed = plan_running(s, slots, phases, threshold)
    in_order = tokens > s.max_num_batched_tokens or s.num_no_token_in_flight > 0
    in_order |= needed > s.free_blocks and s.priority != 0
    if in_order:
        return schedule_one_by_one(
            s,
            requests,
            slots,
            finish_wheel,
            phases,
            blocks,
            buckets,
            table,
            prompt_hash,
            preempted,
            threshold,
        )
    if s.caching == at.SHARED_BLOCKS:
        schedule_in_blocks(
            s,
            requests,
            slots,
            finish_wheel,
            phases,
            blocks,
            buckets,
            table,
            prompt_hash,
            preempted,
        )
        return s.max_num_batched_tokens - tokens  # not asked for after a preemption
    # Preempting the last ones until the rest fits is what preempting them one by one comes to.
    while needed > s.free_blocks:
        last = s.running_tail
        others = needed - blocks_needed(s, slots, last)
        if others <= s.free_blocks:
            # It is the last one's own turn that blocks run out at: the others have theirs.
            take_blocks(s, requests, others)
            preempt(s, requests, slots, finish_wheel, phases, blocks, table, preempted, last, 0)
            return s.max_num_batched_tokens - tokens
        preempt(s, requests, slots, finish_wheel, phases, blocks, table, preempted, last, 0)
        tokens, needed = plan_running(s, slots, phases, threshold)
    take_blocks(s, requests, needed)
    return s.max_num_batched_tokens - tokens


@inner
def schedule_waiting(
    s: Record,
    requests: Array,
    slots: Array,
    blocks: Array,
    buckets: Array,
    table: Array,
    prompt_hash: Array,
    budget: int,
    threshold: int,
) -> None:
    """Move requests from the waiting queue to the running list while they fit."""
    block = s.block_size
    while budget > 0 and s.num_waiting > 0 and s.num_running < s.max_num_seqs:
        request = peek_waiting(s, requests)
        tokens = requests[request].prompt_tokens + requests[request].generated
        hits, unused = 0, 0
        if s.caching == at.PRIVATE_BLOCKS:
            hits = unused = requests[request].kept_blocks
            if hits > (tokens - 1) // block:
                s.not_private = 1
                break
        elif s.caching:
            hits, unused = find_prefix(
                s, requests, blocks, buckets, table, prompt_hash, request, tokens
            )
        # All its tokens must fit, though only the chunk's blocks are taken.
        if blocks_for(tokens, block) - hits + unused > s.free_blocks:
            break
        computed = hits * block
        n = tokens - computed
        if 0 < threshold < n:
            n = threshold
        if n > budget and not s.enable_chunked_prefill:
            break
        n = min(n, budget)
        pop_waiting(s, requests)
        i = add_running(s, slots, request)
        slots[i].offset = computed
        slots[i].target = tokens
        slots[i].chunk = n
        slots[i].hashed_blocks = hits
        if s.caching == at.SHARED_BLOCKS:
            for j in range(hits):
                table[i, j] = table[len(table) - 1, j]
                use_block(s, blocks, table[len(table) - 1, j])
            for j in range(hits, blocks_for(computed + n, block)):
                table[i, j] = take_block(s, blocks, buckets)
            remember_blocks(
                s, requests, slots, blocks, buckets, table, prompt_hash, i, computed + n
            )
        else:
            reuse_blocks(s, requests, request)
            take_blocks(s, requests, blocks_for(computed + n, block) - hits)
        slots[s.num_prefill].prefilling = i
        s.num_prefill += 1
        s.step_cached_tokens += computed
        budget -= n
