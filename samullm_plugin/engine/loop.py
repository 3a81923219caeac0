"""The loop over scheduler steps: arrivals, a step, its duration, its outcome."""

from __future__ import annotations

from typing import Any

from samullm_plugin.engine import records as at
from samullm_plugin.engine.jit import compiled, inner
from samullm_plugin.engine.kv_cache import blocks_for, take_blocks
from samullm_plugin.engine.outcome import (
    compute_step,
    log_is_full,
    log_sequences,
    log_step,
    mark_curve,
    prefill_work,
    process_outcome,
    step_seconds,
)
from samullm_plugin.engine.queues import admit_arrivals, next_arrival_key, peek_waiting
from samullm_plugin.engine.records import Array, Record
from samullm_plugin.engine.running import longest_offset, resume_skipped
from samullm_plugin.engine.schedule import schedule_running, schedule_waiting

GOES_ON = -1


@inner
def only_decodes(s: Record, requests: Array, slots: Array, finish_wheel: Array) -> Any:
    """Return whether the next step surely does nothing but decode, with the same sequences."""
    if s.caching == at.SHARED_BLOCKS or s.record == at.ALL_SEQUENCES:
        return False
    if s.num_prefill > 0 or s.num_finishing > 0 or s.num_no_token_in_flight > 0:
        return False
    if not 0 < s.num_decode <= s.max_num_batched_tokens:
        return False
    if finish_wheel[(s.decode_step + 1) & s.wheel_mask] >= 0:
        return False
    if s.num_waiting == 0 or s.num_running >= s.max_num_seqs:
        return True
    request = peek_waiting(s, requests)
    tokens = requests[request].prompt_tokens + requests[request].generated
    return blocks_for(tokens, s.block_size) > s.free_blocks


@inner
def fast_forward_decode(
    s: Record,
    requests: Array,
    slots: Array,
    finish_wheel: Array,
    phases: Array,
    latency: Record,
    tables: Array,
    curve: Array,
    log: Array,
) -> Any:
    """Run steps until something else than decoding happens; return their number.

    The sequences stay the same, so the sums over them change by fixed amounts from step to step
    and no sequence is touched.
    """
    decode, offsets = s.num_decode, s.offset_sum
    longest = longest_offset(s, slots)
    decode_step, phase, free = s.decode_step, s.block_phase, s.free_blocks
    mask, block = s.wheel_mask, s.block_size
    clock, call, previous_end, busy = s.clock, s.next_call, s.previous_end, s.busy
    in_flight, row, step = s.in_flight, s.rows, s.step
    first_row, end_row = row, s.max_rows
    if s.record:
        end_row = min(end_row, len(log))
    next_key = next_arrival_key(s, requests)
    while (
        row < end_row
        and finish_wheel[(decode_step + 1) & mask] < 0
        and phases[phase].count <= free
        and not next_key <= (step if s.arrivals_by_step else call)
    ):
        context = float(offsets + decode * (decode_step + 1))
        longest_now = float(longest + decode_step + 1)
        seconds = step_seconds(s, latency, tables, decode, 0, 0, 0.0, context, longest_now)
        start = max(clock, call)
        if start + seconds > s.stop:
            break
        free -= phases[phase].count
        if s.record:
            log_step(log, row, step, free, decode, 0, 0, 0.0, context, longest_now, start)
        decode_step += 1
        phase = phase - 1 if phase > 0 else block - 1
        row += 1
        step += 1
        busy += seconds
        clock = start + seconds
        if not s.async_scheduling:
            call = clock
        elif in_flight:
            call = previous_end
        in_flight = s.async_scheduling
        previous_end = clock
        s.first_tokens += decode
        s.first_pairs += context
        if s.curve_points and row == s.curve_next_row:
            s.rows = row
            s.clock = clock
            mark_curve(s, curve)
    take_blocks(s, requests, s.free_blocks - free)
    s.decode_step, s.block_phase = decode_step, phase
    s.in_flight, s.rows, s.step = in_flight, row, step
    s.computed_tokens += decode * (row - first_row)
    s.peak_blocks = max(s.peak_blocks, s.usable_blocks - free)
    s.clock, s.next_call, s.previous_end, s.busy = clock, call, previous_end, busy
    return row - first_row


@inner
def await_arrival(s: Record, requests: Array) -> Any:
    """Go to the next arrival, as nothing can be done before it."""
    key = next_arrival_key(s, requests)
    if key == float("inf"):
        return at.IDLE if s.more_to_come else at.DONE
    if s.arrivals_by_step:
        s.step = max(s.step, int(key))
    elif key > s.stop:
        return at.STOPPED
    else:
        s.next_call = max(s.next_call, key)
    return GOES_ON


@inner
def pass_empty_step(
    s: Record,
    requests: Array,
    slots: Array,
    finish_wheel: Array,
    phases: Array,
    successors: Array,
    blocks: Array,
    buckets: Array,
    table: Array,
    prompt_hash: Array,
) -> Any:
    """Process a step that scheduled nothing."""
    s.num_preemptions += s.step_preemptions
    if s.in_flight:
        s.in_flight = 0
        process_outcome(
            s,
            requests,
            slots,
            successors,
            blocks,
            buckets,
            table,
            prompt_hash,
            s.previous_end,
        )
        resume_skipped(s, slots, finish_wheel, phases)
        # Time has passed: an outside clock may have something to say.
        return at.ROW_LIMIT if s.external_latency else GOES_ON
    s.step += 1
    resume_skipped(s, slots, finish_wheel, phases)
    if s.step_preemptions > 0 or s.num_running > 0:
        return GOES_ON
    # All blocks are free and the first of the queue does not fit; with priorities another request
    # may still come before it.
    if s.priority and (s.more_to_come or next_arrival_key(s, requests) < float("inf")):
        return await_arrival(s, requests)
    request = peek_waiting(s, requests)
    s.misfit_request = request
    s.misfit_blocks = blocks_for(
        requests[request].prompt_tokens + requests[request].generated, s.block_size
    )
    return at.NEVER_FITS


@inner
def run_step(
    s: Record,
    requests: Array,
    slots: Array,
    finish_wheel: Array,
    phases: Array,
    successors: Array,
    blocks: Array,
    buckets: Array,
    table: Array,
    prompt_hash: Array,
    latency: Record,
    tables: Array,
    curve: Array,
    log: Array,
    entries: Array,
    preempted: Array,
) -> Any:
    """Schedule a step, and unless it would end too late, run it."""
    s.step_preemptions = 0
    s.step_cached_tokens = 0
    threshold = s.long_prefill_token_threshold if s.num_running + s.num_waiting > 1 else 0
    budget = schedule_running(
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
    if s.step_preemptions == 0:
        schedule_waiting(s, requests, slots, blocks, buckets, table, prompt_hash, budget, threshold)
    if s.not_private:
        return at.NOT_PRIVATE
    decode = s.num_decode
    prefill_seqs, prefill_tokens, pairs, first_tokens, first_pairs = prefill_work(
        s, requests, slots
    )
    if decode + prefill_tokens == 0:
        return pass_empty_step(
            s,
            requests,
            slots,
            finish_wheel,
            phases,
            successors,
            blocks,
            buckets,
            table,
            prompt_hash,
        )

    context, longest = 0.0, 0.0
    if decode > 0:
        context = float(s.offset_sum + decode * (s.decode_step + 1))
        longest = float(longest_offset(s, slots) + s.decode_step + 1)
    start = max(s.clock, s.next_call)
    seconds = step_seconds(
        s, latency, tables, decode, prefill_seqs, prefill_tokens, pairs, context, longest
    )
    end = start + seconds
    if end > s.stop:
        resume_skipped(s, slots, finish_wheel, phases)
        return at.STOPPED

    row = s.rows
    if s.record:
        log_step(
            log,
            row,
            s.step,
            s.free_blocks,
            decode,
            prefill_seqs,
            prefill_tokens,
            pairs,
            context,
            longest,
            start,
        )
        if s.record == at.ALL_SEQUENCES:
            log_sequences(s, slots, entries)
    s.rows += 1
    s.step += 1
    s.num_preemptions += s.step_preemptions
    s.cached_tokens += s.step_cached_tokens
    s.computed_tokens += decode + prefill_tokens
    s.peak_blocks = max(s.peak_blocks, s.usable_blocks - s.free_blocks)
    s.clock = end
    s.busy += seconds
    s.first_tokens += decode + first_tokens
    s.first_pairs += context + first_pairs

    finished = compute_step(s, requests, slots, finish_wheel, phases, end)
    if s.record:
        log[row].seq_end = s.logged_seqs
        log[row].preempted_end = s.logged_preempted
        log[row].finished_end = s.logged_finished
    # Asynchronously, it is the step before whose outcome is processed after this was scheduled.
    if s.async_scheduling:
        if s.in_flight:
            process_outcome(
                s,
                requests,
                slots,
                successors,
                blocks,
                buckets,
                table,
                prompt_hash,
                s.previous_end,
            )
        s.in_flight = 1
        s.previous_end = end
    for j in range(finished):
        slots[j].leaving = slots[j].ending
        slots[j].leaving_request = slots[slots[j].ending].request
    s.num_finishing = finished
    if not s.async_scheduling:
        process_outcome(s, requests, slots, successors, blocks, buckets, table, prompt_hash, end)
    if s.num_skipped > 0:
        resume_skipped(s, slots, finish_wheel, phases)
    if s.curve_points and s.rows >= s.curve_next_row:
        mark_curve(s, curve)
    return GOES_ON


@compiled
def advance(
    s: Record,
    requests: Array,
    slots: Array,
    finish_wheel: Array,
    phases: Array,
    successors: Array,
    blocks: Array,
    buckets: Array,
    table: Array,
    prompt_hash: Array,
    latency: Record,
    tables: Array,
    curve: Array,
    log: Array,
    entries: Array,
    preempted: Array,
) -> Any:
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
        if s.num_running == 0 and s.num_waiting == 0:
            why = await_arrival(s, requests)
        elif only_decodes(s, requests, slots, finish_wheel) and fast_forward_decode(
            s, requests, slots, finish_wheel, phases, latency, tables, curve, log
        ):
            continue
        else:
            why = run_step(
                s,
                requests,
                slots,
                finish_wheel,
                phases,
                successors,
                blocks,
                buckets,
                table,
                prompt_hash,
                latency,
                tables,
                curve,
                log,
                entries,
                preempted,
            )
        if why != GOES_ON:
            return why
