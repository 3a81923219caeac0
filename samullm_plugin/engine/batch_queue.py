"""The loop for engines with several batches in flight or several KV cache groups.

It follows vLLM request by request: ``step_with_batch_queue`` in vllm/v1/engine/core.py and
``update_from_output`` in vllm/v1/core/sched/scheduler.py and async_scheduler.py.
With pipeline parallelism a batch goes through the stages one after the other while the next ones
follow; a batch takes the same seconds in every stage.
"""

from __future__ import annotations

from typing import Any

from samullm_plugin.engine import records as at
from samullm_plugin.engine.jit import compiled, inner
from samullm_plugin.engine.kv_cache import blocks_for
from samullm_plugin.engine.kv_groups import cache_tokens, give_up
from samullm_plugin.engine.loop import GOES_ON, await_arrival
from samullm_plugin.engine.outcome import (
    log_is_full,
    log_sequences,
    log_step,
    mark_curve,
    prefill_work_of,
    release_successors,
    step_seconds,
)
from samullm_plugin.engine.queue_schedule import (
    known_tokens,
    schedule_running_tracked,
    schedule_waiting_tracked,
)
from samullm_plugin.engine.queues import (
    admit_arrivals,
    next_arrival_key,
    peek_waiting,
    remove_waiting,
)
from samullm_plugin.engine.records import Array, Record
from samullm_plugin.engine.running import remove_running


@inner
def send_batch(
    s: Record, requests: Array, slots: Array, tracks: Array, batches: Array, batch_seqs: Array,
    stages: Array, latency: Record, tables: Array, log: Array, entries: Array, number: int,
) -> Any:  # fmt: skip
    """Send what was scheduled through the stages; return whether it ends in time.

    Args:
        s: the state.
        requests: all requests.
        slots: running slots.
        tracks: of requests.
        batches: the batch queue, a ring.
        batch_seqs: their sequences.
        stages: when each pipeline stage is free.
        latency: scalars of the iteration latency.
        tables: its curves.
        log: recorded steps.
        entries: recorded sequences.
        number: scheduler step.
    """
    decode, prefill_seqs, prefill_tokens, first_tokens = 0, 0, 0, 0
    context, longest, pairs, first_pairs = 0.0, 0.0, 0.0, 0.0
    start = max(stages[0], s.next_call)
    i = s.running_head
    while i >= 0:
        n = slots[i].chunk
        if n > 0:
            request = slots[i].request
            computed = tracks[request].computed
            if slots[i].state == at.DECODE:
                decode += 1
                start = max(start, tracks[request].token_end)  # its last stage is to tell it
                context += computed + 1
                longest = max(longest, float(computed + 1))
            else:
                prefill_seqs += 1
                prefill_tokens += n
                work = prefill_work_of(requests, request, computed, n)
                pairs += work[0]
                first_tokens += work[1]
                first_pairs += work[2]
        i = slots[i].after
    seconds = step_seconds(
        s, latency, tables, decode, prefill_seqs, prefill_tokens, pairs, context, longest
    )
    end = start
    for j in range(len(stages)):
        end = max(end, stages[j]) + seconds
        stages[j] = end
    if end > s.stop:
        return False
    row = s.rows
    if s.record:
        log_step(
            log, row, number, s.free_blocks, decode, prefill_seqs, prefill_tokens, pairs, context,
            longest, start,
        )  # fmt: skip
        if s.record == at.ALL_SEQUENCES:
            log_sequences(s, slots, entries)
    s.rows += 1
    s.num_preemptions += s.step_preemptions
    s.cached_tokens += s.step_cached_tokens
    s.computed_tokens += decode + prefill_tokens
    s.peak_blocks = max(s.peak_blocks, s.usable_blocks - s.free_blocks)
    s.clock = end
    s.busy += seconds
    s.first_tokens += decode + first_tokens
    s.first_pairs += context + first_pairs
    q = (s.first_batch + s.num_batches) % s.max_batches
    batches[q].end = end
    count = 0
    i = s.running_head
    while i >= 0:
        n = slots[i].chunk
        if n > 0:
            request = slots[i].request
            t = tracks[request]
            t.computed += n
            t.in_flight += n
            samples = t.computed >= known_tokens(requests, request) + t.placeholders
            batch_seqs[q, count].request = request
            batch_seqs[q, count].tokens = n
            batch_seqs[q, count].samples = samples
            count += 1
            if samples:
                slots[i].state = at.DECODE
                note_sample(s, requests, tracks, request, end, number)
        i = slots[i].after
    batches[q].num_seqs = count
    if s.record:
        log[row].seq_end = s.logged_seqs
        log[row].preempted_end = s.logged_preempted
        log[row].finished_end = s.logged_finished
    return True


@inner
def note_sample(
    s: Record, requests: Array, tracks: Array, request: int, end: float, number: int
) -> None:
    """Count an output token of ``request`` that is there at ``end``."""
    t = tracks[request]
    t.sampling += 1
    t.token_end = end
    if s.async_scheduling:
        t.placeholders += 1
        t.eligible_step = number + s.decode_stagger
    count = requests[request].generated + t.sampling
    if count == 1:
        requests[request].first_token = end
    if count == requests[request].output_tokens:
        requests[request].finish = end
        if s.record == at.ALL_SEQUENCES:
            requests[s.logged_finished].finished = request
        s.logged_finished += 1
        s.num_unfinished -= 1


@inner
def process_batch(
    s: Record, requests: Array, slots: Array, tracks: Array, batches: Array, batch_seqs: Array,
    blocks: Array, buckets: Array, groups: Array, held: Array, group_table: Array, chain: Array,
    prompt_hash: Array, successors: Array,
) -> None:  # fmt: skip
    """Process the outcome of the oldest batch in flight."""
    q = s.first_batch
    s.first_batch = (q + 1) % s.max_batches
    s.num_batches -= 1
    count = batches[q].num_seqs
    if count == 0:
        return
    s.next_call = max(s.next_call, batches[q].end)
    finished = 0
    for j in range(count):
        request = batch_seqs[q, j].request
        t = tracks[request]
        t.in_flight -= batch_seqs[q, j].tokens
        is_stale = t.stale > 0
        if is_stale:
            t.stale -= batch_seqs[q, j].tokens
        if not batch_seqs[q, j].samples:
            continue
        requests[request].generated += 1
        t.sampling -= 1
        i = t.slot
        if s.async_scheduling and not is_stale:
            t.placeholders -= 1
        if s.async_scheduling and s.caching and i >= 0:
            cache_tokens(
                s, requests, slots, blocks, buckets, groups, held, group_table, chain, prompt_hash,
                i, t.computed - t.placeholders,
            )  # fmt: skip
        if requests[request].generated < requests[request].output_tokens:
            continue
        if i >= 0:
            give_up(s, blocks, groups, held, group_table, i)
            remove_running(s, slots, i)
            t.slot = -1
        else:
            remove_waiting(s, requests, request)
        s.has_finished = 1
        batch_seqs[q, finished].request = request
        finished += 1
    key = float(s.step) if s.arrivals_by_step else s.next_call
    for j in range(finished):
        release_successors(s, requests, successors, batch_seqs[q, j].request, key)
    if finished > 0:
        admit_arrivals(s, requests, key)


@inner
def nothing_scheduled(s: Record, requests: Array, groups: Array, batches: Array) -> Any:
    """Say what follows a step that scheduled nothing."""
    for j in range(s.num_batches):
        if batches[(s.first_batch + j) % s.max_batches].num_seqs > 0:
            return GOES_ON
    if s.step_preemptions > 0 or s.num_running > 0 or s.num_waiting == 0:
        return GOES_ON
    # All blocks are free and the first of the queue does not fit; with priorities another request
    # may still come before it.
    if s.priority and (s.more_to_come or next_arrival_key(s, requests) < float("inf")):
        return await_arrival(s, requests)
    request = peek_waiting(s, requests)
    s.misfit_request = request
    s.misfit_blocks = 0
    for g in range(len(groups)):
        needed = blocks_for(known_tokens(requests, request), groups[g].block_size)
        s.misfit_blocks += min(needed, groups[g].most_blocks)
    return at.NEVER_FITS


@compiled
def advance_queue(
    s: Record, requests: Array, slots: Array, tracks: Array, batches: Array, batch_seqs: Array,
    stages: Array, blocks: Array, buckets: Array, groups: Array, held: Array, group_table: Array,
    chain: Array, prompt_hash: Array, successors: Array, latency: Record, tables: Array,
    curve: Array, log: Array, entries: Array, preempted: Array,
) -> Any:  # fmt: skip
    """Run the engine until something stops it; return what (the last names in ``records``)."""
    while True:
        if s.rows >= s.max_rows:
            return at.ROW_LIMIT
        if s.num_released > 0:
            return at.RELEASED
        if log_is_full(s, log, entries, preempted):
            return at.LOG_FULL
        now = float(s.step) if s.arrivals_by_step else s.next_call
        admit_arrivals(s, requests, now)
        wanted = s.num_running + s.num_waiting > 0
        if wanted or s.has_finished:
            s.has_finished = 0
            s.step_preemptions = 0
            s.step_cached_tokens = 0
            number = s.step
            threshold = s.long_prefill_token_threshold if s.num_running + s.num_waiting > 1 else 0
            budget = schedule_running_tracked(
                s, requests, slots, tracks, blocks, buckets, groups, held, group_table, chain,
                prompt_hash, preempted, threshold,
            )  # fmt: skip
            if s.step_preemptions == 0:
                schedule_waiting_tracked(
                    s, requests, slots, tracks, blocks, buckets, groups, held, group_table, chain,
                    prompt_hash, budget, threshold,
                )  # fmt: skip
            scheduled = 0
            i = s.running_head
            while i >= 0:
                scheduled += slots[i].chunk
                i = slots[i].after
            if scheduled > 0:
                if not send_batch(
                    s, requests, slots, tracks, batches, batch_seqs, stages, latency, tables, log,
                    entries, number,
                ):  # fmt: skip
                    return at.STOPPED
            else:
                s.num_preemptions += s.step_preemptions
                batches[(s.first_batch + s.num_batches) % s.max_batches].num_seqs = 0
                why = nothing_scheduled(s, requests, groups, batches)
                if why != GOES_ON:
                    return why
            s.step = number + 1
            s.num_batches += 1
            if s.curve_points and s.rows >= s.curve_next_row:
                mark_curve(s, curve)
            more = scheduled > 0 or s.num_running + s.num_waiting > 0
            if s.num_batches < s.max_batches and more:
                continue
        elif s.num_batches == 0:
            why = await_arrival(s, requests)
            if why != GOES_ON:
                return why
            continue
        told = batches[s.first_batch].num_seqs > 0
        process_batch(
            s, requests, slots, tracks, batches, batch_seqs, blocks, buckets, groups, held,
            group_table, chain, prompt_hash, successors,
        )  # fmt: skip
        if told and s.external_latency and s.max_batches > 1:
            return at.ROW_LIMIT  # time has passed: an outside clock may have something to say
