"""What a scheduled step takes and what comes of it: seconds, finished sequences, records.

The rules of finishing are those of ``update_from_output`` in vllm/v1/core/sched/scheduler.py.
"""

from __future__ import annotations

from typing import Any

from samullm_plugin.engine import records as at
from samullm_plugin.engine.jit import inner
from samullm_plugin.engine.kv_cache import release_blocks, remember_blocks
from samullm_plugin.engine.queues import admit_arrivals, push_arrival
from samullm_plugin.engine.records import Array, Record
from samullm_plugin.engine.running import leave_sums, remove_running, start_decoding
from samullm_plugin.model.latency import iteration_seconds as latency_formula

iteration_seconds = inner(latency_formula)


@inner
def step_seconds(
    s: Record,
    latency: Record,
    tables: Array,
    decode: int,
    prefill_seqs: int,
    prefill_tokens: int,
    pairs: float,
    context: float,
    longest: float,
) -> Any:
    """Return the seconds of an iteration; 1 where a model outside tells them later."""
    if s.external_latency:
        return 1.0
    seqs = decode + prefill_seqs
    return iteration_seconds(
        latency,
        tables[decode + prefill_tokens].by_tokens,
        tables[seqs].by_seqs,
        tables[seqs].host_by_seqs,
        decode,
        prefill_seqs,
        prefill_tokens,
        pairs,
        context,
        longest,
    )


@inner
def prefill_work_of(
    requests: Array, request: int, computed: int, n: int
) -> tuple[float, int, float]:
    """Return what ``n`` tokens of ``request`` after ``computed`` ones are to compute.

    Returns:
        Query-key pairs; tokens and pairs of those computed for the first time.
    """
    pairs = n * float(computed) + 0.5 * n * (n + 1)
    seen = max(computed, requests[request].computed_before)
    fresh = computed + n - seen
    if fresh <= 0:
        return pairs, 0, 0.0
    return pairs, fresh, fresh * float(seen) + 0.5 * fresh * (fresh + 1)


@inner
def prefill_work(s: Record, requests: Array, slots: Array) -> tuple[int, int, float, int, float]:
    """Return what the prefilling sequences compute in the step at hand.

    Returns:
        Sequences, tokens, query-key pairs; tokens and pairs of those computed for the first time.
    """
    seqs, tokens, pairs = 0, 0, 0.0
    first_tokens, first_pairs = 0, 0.0
    for j in range(s.num_prefill):
        i = slots[j].prefilling
        n = slots[i].chunk
        if n == 0:
            continue
        seqs += 1
        tokens += n
        work = prefill_work_of(requests, slots[i].request, slots[i].offset, n)
        pairs += work[0]
        first_tokens += work[1]
        first_pairs += work[2]
    return seqs, tokens, pairs, first_tokens, first_pairs


@inner
def sort_by_order(slots: Array, count: int) -> None:
    """Sort the first ``count`` ending slots by their place in the running list."""
    for k in range(1, count):
        i = slots[k].ending
        order = slots[i].order
        j = k - 1
        while j >= 0 and slots[slots[j].ending].order > order:
            slots[j + 1].ending = slots[j].ending
            j -= 1
        slots[j + 1].ending = i


@inner
def compute_step(
    s: Record,
    requests: Array,
    slots: Array,
    finish_wheel: Array,
    phases: Array,
    end: float,
) -> Any:
    """Advance every scheduled sequence; return how many finish (their slots are in ``ENDING``)."""
    s.decode_step += 1
    step = s.decode_step
    s.block_phase = s.block_phase - 1 if s.block_phase > 0 else s.block_size - 1
    finished = 0
    day = step & s.wheel_mask
    i = finish_wheel[day]
    finish_wheel[day] = -1
    while i >= 0:
        leave_sums(s, slots, phases, i)
        slots[i].offset += step
        slots[finished].ending = i
        finished += 1
        i = slots[i].wheel_after
    kept = 0
    for j in range(s.num_prefill):
        i = slots[j].prefilling
        slots[i].offset += slots[i].chunk
        if slots[i].offset < slots[i].target:
            slots[kept].prefilling = i
            kept += 1
            continue
        if s.caching == at.PRIVATE_BLOCKS:
            slots[i].hashed_blocks = slots[i].offset // s.block_size
        request = slots[i].request
        requests[request].generated += 1
        if requests[request].generated == 1:
            requests[request].first_token = end
        left = requests[request].output_tokens - requests[request].generated
        if left == 0:
            slots[finished].ending = i
            finished += 1
        else:
            start_decoding(s, slots, finish_wheel, phases, i, slots[i].offset, left)
    s.num_prefill = kept
    if finished > 1:
        sort_by_order(slots, finished)
    for j in range(finished):
        i = slots[j].ending
        request = slots[i].request
        slots[i].state = at.FINISHING
        requests[request].generated = requests[request].output_tokens
        requests[request].finish = end
        if s.record == at.ALL_SEQUENCES:
            requests[s.logged_finished + j].finished = request
    s.logged_finished += finished
    s.num_unfinished -= finished
    return finished


@inner
def release_successors(
    s: Record, requests: Array, successors: Array, request: int, now: float
) -> None:
    """Release the requests that waited for ``request``; :func:`admit_arrivals` lets them in."""
    for j in range(successors[0, request], successors[0, request + 1]):
        successor = successors[1, j]
        requests[successor].num_predecessors -= 1
        if requests[successor].num_predecessors > 0:
            continue
        outside = s.release_delay > 0.0 or requests[successor].arrival > 0.0
        if s.external_latency and not s.arrivals_by_step and outside:
            requests[s.num_released].released = successor
            s.num_released += 1
            continue
        key = max(now + s.release_delay, requests[successor].arrival)
        push_arrival(s, requests, key, successor, successor)


@inner
def process_outcome(
    s: Record,
    requests: Array,
    slots: Array,
    successors: Array,
    blocks: Array,
    buckets: Array,
    table: Array,
    prompt_hash: Array,
    now: float,
) -> None:
    """Free what the sequences in ``LEAVING`` held, and let their successors arrive."""
    count = s.num_finishing
    s.num_finishing = 0
    s.next_call = now
    # Asynchronously, blocks that a token known only now fills get their hash now.
    if s.async_scheduling and s.caching:
        for j in range(s.num_skipped):
            i = slots[j].skipped
            remember_blocks(
                s, requests, slots, blocks, buckets, table, prompt_hash, i, slots[i].offset
            )
    for j in range(count):
        i = slots[j].leaving
        if i >= 0:
            if s.async_scheduling and s.caching:
                remember_blocks(
                    s,
                    requests,
                    slots,
                    blocks,
                    buckets,
                    table,
                    prompt_hash,
                    i,
                    slots[i].offset,
                )
            release_blocks(s, requests, slots, blocks, table, i, slots[i].offset, 0)
            remove_running(s, slots, i)
    key = float(s.step) if s.arrivals_by_step else now
    for j in range(count):
        release_successors(s, requests, successors, slots[j].leaving_request, key)
    if count > 0:
        admit_arrivals(s, requests, key)


@inner
def log_is_full(s: Record, log: Array, entries: Array, preempted: Array) -> Any:
    """Return whether the next step may not fit into the record."""
    if s.record == at.NOTHING:
        return False
    if s.rows >= len(log):
        return True
    return s.record == at.ALL_SEQUENCES and (
        s.logged_seqs + s.max_num_seqs > len(entries)
        or s.logged_preempted + s.num_running > len(preempted)
    )


@inner
def log_step(
    log: Array,
    row: int,
    step: int,
    free: int,
    decode: int,
    prefill_seqs: int,
    prefill_tokens: int,
    pairs: float,
    context: float,
    longest: float,
    start: float,
) -> None:
    """Record the composition of a step."""
    log[row].step = step
    log[row].num_seqs = decode + prefill_seqs
    log[row].num_tokens = decode + prefill_tokens
    log[row].prefill_seqs = prefill_seqs
    log[row].prefill_tokens = prefill_tokens
    log[row].free_blocks = free
    log[row].start = start
    log[row].prefill_pairs = pairs
    log[row].context_tokens = context
    log[row].longest_tokens = longest


@inner
def log_sequences(s: Record, slots: Array, entries: Array) -> None:
    """Record who is scheduled in the step at hand, in running order."""
    k = s.logged_seqs
    i = s.running_head
    while i >= 0:
        state = slots[i].state
        n = 0
        if state == at.PREFILL or s.with_queue:
            n = slots[i].chunk
        elif state == at.DECODE:
            n = 1
        if n > 0:
            entries[k].request = slots[i].request
            entries[k].tokens = n
            k += 1
        i = slots[i].after
    s.logged_seqs = k
    s.logged_preempted += s.step_preemptions


@inner
def mark_curve(s: Record, curve: Array) -> None:
    """Add a point to the progress curve; when it is full, drop every other one."""
    i = s.curve_count
    if i == len(curve) - 1:
        i = 0
        for j in range(0, s.curve_count, 2):
            curve[i] = curve[j]
            i += 1
        s.curve_stride *= 2
    curve[i].time = s.clock
    curve[i].tokens = s.first_tokens
    curve[i].pairs = s.first_pairs
    s.curve_count = i + 1
    s.curve_next_row = s.rows + s.curve_stride
