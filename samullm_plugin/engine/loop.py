"""The loop over scheduler steps: arrivals, a step, its duration, its outcome."""

from __future__ import annotations

from typing import Any

from samullm_plugin.engine import layout as at
from samullm_plugin.engine.arrays import Array
from samullm_plugin.engine.jit import compiled
from samullm_plugin.engine.outcome import (
    compute_step,
    new_work,
    process_outcome,
    step_seconds,
)
from samullm_plugin.engine.owned import take_blocks
from samullm_plugin.engine.preempt import blocks_for, release_held
from samullm_plugin.engine.queues import admit_arrivals, next_arrival_key, peek_waiting
from samullm_plugin.engine.record import log_is_full, log_sequences, log_step, mark_curve
from samullm_plugin.engine.running import longest_offset
from samullm_plugin.engine.schedule import schedule_running, schedule_waiting

GOES_ON = -1


@compiled
def only_decodes(z: Array, requests: Array, seats: Array, calendar: Array) -> Any:
    """Return whether the next step surely does nothing but decode, with the same sequences."""
    if z[at.CACHING] == at.SHARED_BLOCKS or z[at.RECORD] == 2:
        return False
    if z[at.NUM_PREFILL] > 0 or z[at.NUM_FINISHING] > 0 or z[at.NUM_LATE] > 0:
        return False
    if not 0 < z[at.NUM_DECODE] <= z[at.BUDGET]:
        return False
    if calendar[(z[at.TICK] + 1) & z[at.CALENDAR_MASK]] >= 0:
        return False
    if z[at.NUM_WAITING] == 0 or z[at.NUM_RUNNING] >= z[at.MAX_SEQS]:
        return True
    request = peek_waiting(z, requests)
    tokens = requests[request, at.PROMPT] + requests[request, at.GENERATED]
    return blocks_for(tokens, z[at.BLOCK]) > z[at.FREE_BLOCKS]


@compiled
def glide(
    z: Array,
    f: Array,
    requests: Array,
    times: Array,
    seats: Array,
    calendar: Array,
    classes: Array,
    costs: Array,
    curve: Array,
    log: Array,
) -> Any:
    """Run steps until something else than decoding happens; return their number.

    The sequences stay the same, so the sums over them change by fixed amounts from step to step
    and no sequence is touched.
    """
    decode, offsets = z[at.NUM_DECODE], z[at.OFFSETS]
    longest = longest_offset(z, seats)
    tick, residue, free = z[at.TICK], z[at.RESIDUE], z[at.FREE_BLOCKS]
    mask, block = z[at.CALENDAR_MASK], z[at.BLOCK]
    clock, call, previous_end, busy = f[at.CLOCK], f[at.CALL], f[at.PREVIOUS_END], f[at.BUSY]
    in_flight, row, step = z[at.IN_FLIGHT], z[at.ROWS], z[at.STEP]
    first_row, end_row = row, z[at.MAX_ROWS]
    if z[at.RECORD]:
        end_row = min(end_row, len(log))
    next_key = next_arrival_key(z, times)
    while (
        row < end_row
        and calendar[(tick + 1) & mask] < 0
        and classes[residue, at.COUNT] <= free
        and not next_key <= (step if z[at.BY_STEP] else call)
    ):
        context = float(offsets + decode * (tick + 1))
        longest_now = float(longest + tick + 1)
        seconds = step_seconds(z, f, costs, decode, 0, 0, 0.0, context, longest_now)
        start = max(clock, call)
        if start + seconds > f[at.STOP]:
            break
        free -= classes[residue, at.COUNT]
        if z[at.RECORD]:
            log_step(log, row, step, free, decode, 0, 0, 0.0, context, longest_now, start)
        tick += 1
        residue = residue - 1 if residue > 0 else block - 1
        row += 1
        step += 1
        busy += seconds
        clock = start + seconds
        if not z[at.ASYNC]:
            call = clock
        elif in_flight:
            call = previous_end
        in_flight = z[at.ASYNC]
        previous_end = clock
        f[at.TOKENS] += decode
        f[at.PAIRS] += context
        if z[at.CURVE] and row == z[at.CURVE_NEXT]:
            z[at.ROWS] = row
            f[at.CLOCK] = clock
            mark_curve(z, f, curve)
    take_blocks(z, requests, z[at.FREE_BLOCKS] - free)
    z[at.TICK], z[at.RESIDUE] = tick, residue
    z[at.IN_FLIGHT], z[at.ROWS], z[at.STEP] = in_flight, row, step
    z[at.COMPUTED] += decode * (row - first_row)
    z[at.PEAK_BLOCKS] = max(z[at.PEAK_BLOCKS], z[at.USABLE] - free)
    f[at.CLOCK], f[at.CALL], f[at.PREVIOUS_END], f[at.BUSY] = clock, call, previous_end, busy
    return row - first_row


@compiled
def await_arrival(z: Array, f: Array, times: Array) -> Any:
    """Go to the next arrival, as nothing can be done before it."""
    key = next_arrival_key(z, times)
    if key == float("inf"):
        return at.IDLE if z[at.MORE] else at.DONE
    if z[at.BY_STEP]:
        z[at.STEP] = max(z[at.STEP], int(key))
    elif key > f[at.STOP]:
        return at.STOPPED
    else:
        f[at.CALL] = max(f[at.CALL], key)
    return GOES_ON


@compiled
def pass_empty_step(
    z: Array,
    f: Array,
    requests: Array,
    times: Array,
    seats: Array,
    calendar: Array,
    classes: Array,
    successors: Array,
    kv: Array,
    hashes: Array,
    buckets: Array,
    table: Array,
    prompt_hash: Array,
) -> Any:
    """Process a step that scheduled nothing."""
    z[at.PREEMPTIONS] += z[at.STEP_PREEMPTED]
    if z[at.IN_FLIGHT]:
        z[at.IN_FLIGHT] = 0
        process_outcome(
            z,
            f,
            requests,
            times,
            seats,
            successors,
            kv,
            hashes,
            buckets,
            table,
            prompt_hash,
            f[at.PREVIOUS_END],
        )
        release_held(z, seats, calendar, classes)
        # Time has passed: an outside clock may have something to say.
        return at.ROW_LIMIT if z[at.TIMED] else GOES_ON
    z[at.STEP] += 1
    release_held(z, seats, calendar, classes)
    if z[at.STEP_PREEMPTED] > 0 or z[at.NUM_RUNNING] > 0:
        return GOES_ON
    # All blocks are free and the first of the queue does not fit; with priorities another request
    # may still come before it.
    if z[at.PRIORITY] and (z[at.MORE] or next_arrival_key(z, times) < float("inf")):
        return await_arrival(z, f, times)
    request = peek_waiting(z, requests)
    z[at.BAD_REQUEST] = request
    z[at.BAD_BLOCKS] = blocks_for(
        requests[request, at.PROMPT] + requests[request, at.GENERATED], z[at.BLOCK]
    )
    return at.NEVER_FITS


@compiled
def run_step(
    z: Array,
    f: Array,
    requests: Array,
    times: Array,
    seats: Array,
    calendar: Array,
    classes: Array,
    successors: Array,
    kv: Array,
    hashes: Array,
    buckets: Array,
    table: Array,
    prompt_hash: Array,
    costs: Array,
    curve: Array,
    log: Array,
    entries: Array,
    preempted: Array,
) -> Any:
    """Schedule a step, and unless it would end too late, run it."""
    z[at.STEP_PREEMPTED] = 0
    z[at.STEP_CACHED] = 0
    threshold = z[at.THRESHOLD] if z[at.NUM_RUNNING] + z[at.NUM_WAITING] > 1 else 0
    budget = schedule_running(
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
    if z[at.STEP_PREEMPTED] == 0:
        schedule_waiting(
            z, requests, seats, kv, hashes, buckets, table, prompt_hash, budget, threshold
        )
    if z[at.NOT_PREFIX]:
        return at.NOT_A_PREFIX
    decode = z[at.NUM_DECODE]
    prefill_seqs, prefill_tokens, pairs, first_tokens, first_pairs = new_work(z, requests, seats)
    if decode + prefill_tokens == 0:
        return pass_empty_step(
            z,
            f,
            requests,
            times,
            seats,
            calendar,
            classes,
            successors,
            kv,
            hashes,
            buckets,
            table,
            prompt_hash,
        )

    context, longest = 0.0, 0.0
    if decode > 0:
        context = float(z[at.OFFSETS] + decode * (z[at.TICK] + 1))
        longest = float(longest_offset(z, seats) + z[at.TICK] + 1)
    start = max(f[at.CLOCK], f[at.CALL])
    seconds = step_seconds(
        z, f, costs, decode, prefill_seqs, prefill_tokens, pairs, context, longest
    )
    end = start + seconds
    if end > f[at.STOP]:
        release_held(z, seats, calendar, classes)
        return at.STOPPED

    row = z[at.ROWS]
    if z[at.RECORD]:
        log_step(
            log,
            row,
            z[at.STEP],
            z[at.FREE_BLOCKS],
            decode,
            prefill_seqs,
            prefill_tokens,
            pairs,
            context,
            longest,
            start,
        )
        if z[at.RECORD] == 2:
            log_sequences(z, seats, entries)
    z[at.ROWS] += 1
    z[at.STEP] += 1
    z[at.PREEMPTIONS] += z[at.STEP_PREEMPTED]
    z[at.CACHED] += z[at.STEP_CACHED]
    z[at.COMPUTED] += decode + prefill_tokens
    z[at.PEAK_BLOCKS] = max(z[at.PEAK_BLOCKS], z[at.USABLE] - z[at.FREE_BLOCKS])
    f[at.CLOCK] = end
    f[at.BUSY] += seconds
    f[at.TOKENS] += decode + first_tokens
    f[at.PAIRS] += context + first_pairs

    finished = compute_step(z, requests, times, seats, calendar, classes, end)
    if z[at.RECORD]:
        log[row, at.LOG_SEQ_END] = z[at.LOG_SEQS]
        log[row, at.LOG_PREEMPTED_END] = z[at.LOG_PREEMPTED]
        log[row, at.LOG_FINISHED_END] = z[at.LOG_FINISHED]
    # Asynchronously, it is the step before whose outcome is processed after this was scheduled.
    if z[at.ASYNC]:
        if z[at.IN_FLIGHT]:
            process_outcome(
                z,
                f,
                requests,
                times,
                seats,
                successors,
                kv,
                hashes,
                buckets,
                table,
                prompt_hash,
                f[at.PREVIOUS_END],
            )
        z[at.IN_FLIGHT] = 1
        f[at.PREVIOUS_END] = end
    for j in range(finished):
        seats[j, at.LEAVING] = seats[j, at.ENDING]
        seats[j, at.LEAVING_REQUEST] = seats[seats[j, at.ENDING], at.REQUEST]
    z[at.NUM_FINISHING] = finished
    if not z[at.ASYNC]:
        process_outcome(
            z, f, requests, times, seats, successors, kv, hashes, buckets, table, prompt_hash, end
        )
    if z[at.NUM_HELD] > 0:
        release_held(z, seats, calendar, classes)
    if z[at.CURVE] and z[at.ROWS] >= z[at.CURVE_NEXT]:
        mark_curve(z, f, curve)
    return GOES_ON


@compiled
def advance(
    z: Array,
    f: Array,
    requests: Array,
    times: Array,
    seats: Array,
    calendar: Array,
    classes: Array,
    successors: Array,
    kv: Array,
    hashes: Array,
    buckets: Array,
    table: Array,
    prompt_hash: Array,
    costs: Array,
    curve: Array,
    log: Array,
    entries: Array,
    preempted: Array,
) -> Any:
    """Run the engine until something stops it; return what (the last names in ``layout``)."""
    while True:
        if z[at.ROWS] >= z[at.MAX_ROWS]:
            return at.ROW_LIMIT
        if z[at.NUM_RELEASED] > 0:
            return at.RELEASED
        if log_is_full(z, log, entries, preempted):
            return at.LOG_FULL
        now = float(z[at.STEP]) if z[at.BY_STEP] else f[at.CALL]
        admit_arrivals(z, requests, times, now)
        if z[at.NUM_RUNNING] == 0 and z[at.NUM_WAITING] == 0:
            why = await_arrival(z, f, times)
        elif only_decodes(z, requests, seats, calendar) and glide(
            z, f, requests, times, seats, calendar, classes, costs, curve, log
        ):
            continue
        else:
            why = run_step(
                z,
                f,
                requests,
                times,
                seats,
                calendar,
                classes,
                successors,
                kv,
                hashes,
                buckets,
                table,
                prompt_hash,
                costs,
                curve,
                log,
                entries,
                preempted,
            )
        if why != GOES_ON:
            return why
