"""The scheduler for engines with several batches in flight or several KV cache groups.

It follows vLLM request by request: ``schedule`` in vllm/v1/core/sched/scheduler.py and
async_scheduler.py. Unlike in ``schedule``, what a sequence has computed and what is in flight are
kept per request.
"""

from __future__ import annotations

from typing import Any

from samullm_plugin.engine import records as at
from samullm_plugin.engine.jit import inner
from samullm_plugin.engine.kv_groups import (
    adopt_hits,
    blocks_to_grow,
    blocks_to_start,
    cache_tokens,
    drop_skipped,
    find_common_prefix,
    give_up,
    grow,
)
from samullm_plugin.engine.queues import peek_waiting, pop_waiting, prepend_waiting
from samullm_plugin.engine.records import Array, Record
from samullm_plugin.engine.running import add_running, last_in_priority, remove_running


@inner
def known_tokens(requests: Array, request: int) -> Any:
    """Return the tokens of ``request`` that are known: its prompt and its output so far."""
    return requests[request].prompt_tokens + requests[request].generated


@inner
def preempt_tracked(
    s: Record, requests: Array, slots: Array, tracks: Array, blocks: Array, groups: Array,
    held: Array, group_table: Array, preempted: Array, i: int,
) -> None:  # fmt: skip
    """Take away slot ``i`` and its blocks; what is in flight is delivered, and counts no more."""
    request = slots[i].request
    t = tracks[request]
    give_up(s, blocks, groups, held, group_table, i)
    requests[request].computed_before = max(requests[request].computed_before, t.computed)
    t.computed = 0
    t.stale = t.in_flight
    t.placeholders = 0
    t.slot = -1
    remove_running(s, slots, i)
    prepend_waiting(s, requests, request)
    if s.record == at.ALL_SEQUENCES:
        preempted[s.logged_preempted + s.step_preemptions] = request
    s.step_preemptions += 1


@inner
def schedule_running_tracked(
    s: Record, requests: Array, slots: Array, tracks: Array, blocks: Array, buckets: Array,
    groups: Array, held: Array, group_table: Array, chain: Array, prompt_hash: Array,
    preempted: Array, threshold: int,
) -> Any:  # fmt: skip
    """Schedule the running list in order, preempting where blocks run out.

    Returns:
        The tokens left of the budget.
    """
    budget = s.max_num_batched_tokens
    i = s.running_head
    while i >= 0:
        slots[i].scheduled = 0
        slots[i].chunk = 0
        i = slots[i].after
    i = s.running_head
    while i >= 0 and budget > 0:
        request = slots[i].request
        t = tracks[request]
        ends = requests[request].prompt_tokens + requests[request].output_tokens
        known = known_tokens(requests, request)
        n = known + t.placeholders - t.computed
        if 0 < threshold < n:
            n = threshold
        n = min(n, budget, s.max_model_len - t.computed - 1)
        if t.placeholders > 0 and t.computed + 2 - t.placeholders >= ends:
            n = 0  # its last token is in flight
        if s.step < t.eligible_step:
            n = 0
        if n == 0:
            i = slots[i].after
            continue
        drop_skipped(s, blocks, groups, held, group_table, i, max(0, t.computed - t.in_flight))
        victim = -1
        while victim != i and blocks_to_grow(groups, held, i, t.computed + n) > s.free_blocks:
            victim = last_in_priority(s, requests, slots) if s.priority else s.running_tail
            budget += slots[victim].scheduled
            preempt_tracked(
                s, requests, slots, tracks, blocks, groups, held, group_table, preempted, victim
            )
        if victim == i:
            if s.self_preemption_ends_step:
                break
            i = slots[i].after  # left as it was when the slot was given up
            continue
        grow(s, blocks, buckets, groups, held, group_table, i, t.computed + n)
        if s.caching:
            cache_tokens(
                s, requests, slots, blocks, buckets, groups, held, group_table, chain, prompt_hash,
                i, min(t.computed + n, known),
            )  # fmt: skip
        slots[i].scheduled = n
        slots[i].chunk = n
        budget -= n
        i = slots[i].after
    return budget


@inner
def schedule_waiting_tracked(
    s: Record, requests: Array, slots: Array, tracks: Array, blocks: Array, buckets: Array,
    groups: Array, held: Array, group_table: Array, chain: Array, prompt_hash: Array,
    budget: int, threshold: int,
) -> None:  # fmt: skip
    """Move requests from the waiting queue to the running list while they fit."""
    spare = held.shape[1] - 1
    passed_over = 0
    while budget > 0 and s.num_waiting > 0 and s.num_running < s.max_num_seqs:
        request = peek_waiting(s, requests)
        t = tracks[request]
        if t.stale > 0:  # what was in flight when it was preempted must come first
            tracks[passed_over].passed_over = request
            passed_over += 1
            pop_waiting(s, requests)
            continue
        tokens = known_tokens(requests, request)
        computed = 0
        for g in range(len(groups)):
            held[g, spare].num_blocks = 0
        if s.caching:
            computed = find_common_prefix(
                s, requests, blocks, buckets, groups, held, group_table, chain, prompt_hash,
                request, tokens,
            )  # fmt: skip
        n = tokens - computed
        if 0 < threshold < n:
            n = threshold
        if n > budget and not s.enable_chunked_prefill:
            break
        n = min(n, budget)
        # All its tokens must fit, though only the chunk's blocks are taken.
        needed = blocks_to_start(blocks, groups, held, group_table, computed, tokens, True)
        if needed > s.free_blocks:
            break
        needed = blocks_to_start(blocks, groups, held, group_table, computed, computed + n, False)
        if needed > s.free_blocks:
            break
        pop_waiting(s, requests)
        i = add_running(s, slots, request)
        t.slot = i
        t.computed = computed
        slots[i].scheduled = n
        slots[i].chunk = n
        chain[i, 0] = 0
        adopt_hits(s, blocks, groups, held, group_table, i, computed)
        grow(s, blocks, buckets, groups, held, group_table, i, computed + n)
        if s.caching:
            cache_tokens(
                s, requests, slots, blocks, buckets, groups, held, group_table, chain, prompt_hash,
                i, min(computed + n, tokens),
            )  # fmt: skip
        s.step_cached_tokens += computed
        budget -= n
    for j in range(passed_over - 1, -1, -1):
        prepend_waiting(s, requests, tracks[j].passed_over)
