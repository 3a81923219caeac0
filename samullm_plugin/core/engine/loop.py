"""The loop over scheduler steps: arrivals, a step, its duration, its outcome."""

from __future__ import annotations

from samullm_plugin.core.engine.blocks import remember_blocks
from samullm_plugin.core.engine.jit import compiled
from samullm_plugin.core.engine.layout import (
    AFTER,
    ASYNC,
    BAD_BLOCKS,
    BAD_REQUEST,
    BLOCK,
    BUDGET,
    BUSY,
    BY_STEP,
    CACHED,
    CACHING,
    CALENDAR_AFTER,
    CALENDAR_MASK,
    CALL,
    CHUNK,
    CLOCK,
    COMPUTED,
    COMPUTED_BEFORE,
    COUNT,
    CURVE,
    CURVE_COUNT,
    CURVE_NEXT,
    CURVE_STRIDE,
    DECODE,
    DELAY,
    DONE,
    FINISHING,
    FREE_BLOCKS,
    GENERATED,
    HEAD,
    IDLE,
    IN_FLIGHT,
    LOG_CONTEXT,
    LOG_FINISHED,
    LOG_FINISHED_END,
    LOG_FREE,
    LOG_FULL,
    LOG_LONGEST,
    LOG_NUM_SEQS,
    LOG_NUM_TOKENS,
    LOG_PAIRS,
    LOG_PREEMPTED,
    LOG_PREEMPTED_END,
    LOG_PREFILL_SEQS,
    LOG_PREFILL_TOKENS,
    LOG_SEQ_END,
    LOG_SEQS,
    LOG_START,
    LOG_STEP,
    MAX_ROWS,
    MAX_SEQS,
    MORE,
    NEVER_FITS,
    NUM_DECODE,
    NUM_FINISHING,
    NUM_HELD,
    NUM_LATE,
    NUM_PREFILL,
    NUM_RUNNING,
    NUM_WAITING,
    OFFSET,
    OFFSETS,
    OUTPUT,
    OWN_ARRIVAL,
    PAIRS,
    PEAK_BLOCKS,
    PREDECESSORS,
    PREEMPTIONS,
    PREFILL,
    PREVIOUS_END,
    PRIORITY,
    PROMPT,
    RECORD,
    RELEASED,
    REQUEST,
    RESIDUE,
    ROW_LIMIT,
    ROWS,
    STATE,
    STEP,
    STEP_CACHED,
    STEP_PREEMPTED,
    STOP,
    STOPPED,
    TAIL,
    TARGET,
    THRESHOLD,
    TICK,
    TIMED,
    TOKENS,
    UNFINISHED,
    USABLE,
)
from samullm_plugin.core.engine.queues import admit_arrivals, next_arrival_key, peek_waiting, pend, wait_last
from samullm_plugin.core.engine.sequences import forget_decoding, longest_offset, start_decoding
from samullm_plugin.core.engine.step import (
    admit,
    allocate_decoding,
    blocks_for,
    give_up_seat,
    plan_prefill,
    release_held,
    schedule_one_by_one,
    sort_by_order,
    step_seconds,
)


@compiled
def mark_curve(Z, F, curve):
    """Add a point to the progress curve; when it is full, drop every other one."""
    i = Z[CURVE_COUNT]
    if i == len(curve) - 1:
        i = 0
        for j in range(0, Z[CURVE_COUNT], 2):
            curve[i] = curve[j]
            i += 1
        Z[CURVE_STRIDE] *= 2
    curve[i, 0] = F[CLOCK]
    curve[i, 1] = F[TOKENS]
    curve[i, 2] = F[PAIRS]
    Z[CURVE_COUNT] = i + 1
    Z[CURVE_NEXT] = Z[ROWS] + Z[CURVE_STRIDE]


@compiled
def log_row(Z, F, log_int, log_float, prefill_seqs, prefill_tokens, pairs, context, longest, start):
    """Record the composition of the step at hand."""
    i = Z[ROWS]
    log_int[i, LOG_STEP] = Z[STEP]
    log_int[i, LOG_NUM_SEQS] = Z[NUM_DECODE] + prefill_seqs
    log_int[i, LOG_NUM_TOKENS] = Z[NUM_DECODE] + prefill_tokens
    log_int[i, LOG_PREFILL_SEQS] = prefill_seqs
    log_int[i, LOG_PREFILL_TOKENS] = prefill_tokens
    log_int[i, LOG_FREE] = Z[FREE_BLOCKS]
    log_float[i, LOG_START] = start
    log_float[i, LOG_PAIRS] = pairs
    log_float[i, LOG_CONTEXT] = context
    log_float[i, LOG_LONGEST] = longest


@compiled
def log_sequences(Z, S, log_request, log_tokens):
    """Record who is scheduled in the step at hand, in running order."""
    i = Z[LOG_SEQS]
    s = Z[HEAD]
    while s >= 0:
        state = S[s, STATE]
        if state == DECODE:
            log_request[i] = S[s, REQUEST]
            log_tokens[i] = 1
            i += 1
        elif state == PREFILL and S[s, CHUNK] > 0:
            log_request[i] = S[s, REQUEST]
            log_tokens[i] = S[s, CHUNK]
            i += 1
        s = S[s, AFTER]
    Z[LOG_SEQS] = i


@compiled
def release_successors(
    Z, F, R, ranked, arrival_key, arrival_request, pending_key, pending, own_arrival, successors,
    released, request, now,
):  # fmt: skip
    """Let the requests that waited for ``request`` arrive."""
    for j in range(successors[0, request], successors[0, request + 1]):
        successor = successors[1, j]
        R[successor, PREDECESSORS] -= 1
        if R[successor, PREDECESSORS] > 0:
            continue
        if Z[TIMED] and (F[DELAY] > 0.0 or R[successor, OWN_ARRIVAL]):
            released[1 + released[0]] = successor
            released[0] += 1
            continue
        key = max(now + F[DELAY], own_arrival[successor])
        if key <= now:
            # after all that arrived before
            admit_arrivals(
                Z, R, ranked, arrival_key, arrival_request, pending_key, pending, now
            )
            wait_last(Z, R, ranked, successor)
        else:
            pend(Z, pending_key, pending, key, successor)


@compiled
def glide(
    Z, F, calendar, classes, arrival_key, pending_key, by_tokens, by_seqs, host_by_seqs, log_int,
    log_float, curve, longest,
):  # fmt: skip
    """Run steps in which every sequence decodes and nothing else happens.

    Their number of sequences is constant, so the sums change by fixed amounts from step to step.

    Returns:
        The number of steps.
    """
    decode = Z[NUM_DECODE]
    offsets = Z[OFFSETS]
    tick = Z[TICK]
    residue = Z[RESIDUE]
    free = Z[FREE_BLOCKS]
    rows = Z[ROWS]
    first_row = rows
    clock, call, previous_end, busy = F[CLOCK], F[CALL], F[PREVIOUS_END], F[BUSY]
    in_flight = Z[IN_FLIGHT]
    mask, block, stop = Z[CALENDAR_MASK], Z[BLOCK], F[STOP]
    next_key = next_arrival_key(Z, arrival_key, pending_key)
    by_step, asynchronous, record = Z[BY_STEP], Z[ASYNC], Z[RECORD]
    timed = Z[TIMED]
    step = Z[STEP]
    rows_end = Z[MAX_ROWS]
    if record:
        rows_end = min(rows_end, len(log_int))
    while rows < rows_end and calendar[(tick + 1) & mask] < 0 and classes[residue, COUNT] <= free:
        if next_key <= (step if by_step else call):
            break
        context = offsets + decode * (tick + 1)
        start = max(clock, call)
        if timed:
            seconds = 1.0
        else:
            seconds = step_seconds(
                Z, F, by_tokens, by_seqs, host_by_seqs, decode, 0, 0, 0.0, context,
                longest + tick + 1,
            )  # fmt: skip
        end = start + seconds
        if end > stop:
            break
        free -= classes[residue, COUNT]
        if record:
            Z[STEP] = step
            Z[ROWS] = rows
            Z[FREE_BLOCKS] = free
            log_row(Z, F, log_int, log_float, 0, 0, 0.0, context, longest + tick + 1, start)
        tick += 1
        residue = residue - 1 if residue > 0 else block - 1
        rows += 1
        step += 1
        busy += seconds
        clock = end
        if not asynchronous:
            call = end
        else:
            if in_flight:
                call = previous_end
            in_flight = 1
            previous_end = end
        F[TOKENS] += decode
        F[PAIRS] += context
        if Z[CURVE] and rows == Z[CURVE_NEXT]:
            Z[ROWS] = rows
            F[CLOCK] = clock
            mark_curve(Z, F, curve)
    Z[TICK], Z[RESIDUE], Z[FREE_BLOCKS], Z[ROWS], Z[STEP] = tick, residue, free, rows, step
    Z[IN_FLIGHT] = in_flight
    Z[COMPUTED] += decode * (rows - first_row)
    Z[PEAK_BLOCKS] = max(Z[PEAK_BLOCKS], Z[USABLE] - free)
    F[CLOCK], F[CALL], F[PREVIOUS_END], F[BUSY] = clock, call, previous_end, busy
    return rows - first_row


@compiled
def take_outputs(
    Z, F, R, S, K, seats, finishing, count, held, ranked, table, buckets, prompt_hash, prompt_at,
    arrival_key, arrival_request, pending_key, pending, own_arrival, successors, released, now,
):  # fmt: skip
    """Process the outcome of a step: finished sequences leave, their successors arrive."""
    if Z[ASYNC] and Z[CACHING]:
        for j in range(Z[NUM_HELD]):
            s = held[j]
            remember_blocks(
                Z, R, S, K, buckets, table, prompt_hash, prompt_at, s, S[s, OFFSET]
            )
    for j in range(count):
        s = finishing[j, 0]
        if s >= 0:
            if Z[ASYNC] and Z[CACHING]:
                remember_blocks(
                    Z, R, S, K, buckets, table, prompt_hash, prompt_at, s, S[s, OFFSET]
                )
            give_up_seat(Z, S, K, seats, table, s)
    F[CALL] = now
    for j in range(count):
        release_successors(
            Z, F, R, ranked, arrival_key, arrival_request, pending_key, pending, own_arrival,
            successors, released, finishing[j, 1], Z[STEP] if Z[BY_STEP] else now,
        )  # fmt: skip


@compiled
def advance(
    Z,
    F,
    R,
    S,
    K,
    seats,
    calendar,
    classes,
    prefill,
    held,
    ending,
    finishing,
    ranked,
    by_rank,
    arrival_key,
    arrival_request,
    pending_key,
    pending,
    own_arrival,
    successors,
    released,
    table,
    buckets,
    found,
    prompt_hash,
    prompt_at,
    by_tokens,
    by_seqs,
    host_by_seqs,
    finish_s,
    first_token_s,
    curve,
    log_int,
    log_float,
    log_request,
    log_tokens,
    log_preempted,
    log_finished,
):
    """Run the engine until something stops it; return why (see ``layout``)."""
    block = Z[BLOCK]
    while True:
        if Z[ROWS] >= Z[MAX_ROWS]:
            return ROW_LIMIT
        if released[0] > 0:
            return RELEASED
        if Z[RECORD] and (
            Z[ROWS] >= len(log_int)
            or (
                Z[RECORD] == 2
                and (
                    Z[LOG_SEQS] + Z[MAX_SEQS] > len(log_request)
                    or Z[LOG_PREEMPTED] + Z[NUM_RUNNING] > len(log_preempted)
                )
            )
        ):
            return LOG_FULL
        now = float(Z[STEP]) if Z[BY_STEP] else F[CALL]
        admit_arrivals(Z, R, ranked, arrival_key, arrival_request, pending_key, pending, now)
        if Z[NUM_RUNNING] == 0 and Z[NUM_WAITING] == 0:
            key = next_arrival_key(Z, arrival_key, pending_key)
            if key == float("inf"):
                return IDLE if Z[MORE] else DONE
            if Z[BY_STEP]:
                Z[STEP] = int(key)
            elif key > F[STOP]:
                return STOPPED
            else:
                F[CALL] = key
            continue

        if (
            Z[RECORD] < 2
            and not Z[CACHING]
            and Z[NUM_PREFILL] == 0
            and Z[NUM_FINISHING] == 0
            and 0 < Z[NUM_DECODE] <= Z[BUDGET]
            and calendar[(Z[TICK] + 1) & Z[CALENDAR_MASK]] < 0
        ):
            stuck = Z[NUM_WAITING] == 0 or Z[NUM_RUNNING] >= Z[MAX_SEQS]
            if not stuck:
                request = peek_waiting(Z, ranked, by_rank)
                tokens = R[request, PROMPT] + R[request, GENERATED]
                stuck = blocks_for(tokens, block) > Z[FREE_BLOCKS]
            if stuck and glide(
                Z, F, calendar, classes, arrival_key, pending_key, by_tokens, by_seqs,
                host_by_seqs, log_int, log_float, curve, longest_offset(Z, S),
            ):  # fmt: skip
                continue

        # --- schedule ---
        Z[STEP_PREEMPTED] = 0
        Z[STEP_CACHED] = 0
        threshold = Z[THRESHOLD] if Z[NUM_RUNNING] + Z[NUM_WAITING] > 1 else 0
        tokens, blocks = plan_prefill(Z, S, prefill, threshold)
        blocks += classes[Z[RESIDUE], COUNT]
        if tokens > Z[BUDGET] and Z[NUM_PREFILL] == 1 and Z[TAIL] == prefill[0]:
            # the last of the running list takes what is left
            s = prefill[0]
            n = S[s, CHUNK] - (tokens - Z[BUDGET])
            if n > 0:
                blocks -= blocks_for(S[s, OFFSET] + S[s, CHUNK], block)
                blocks += blocks_for(S[s, OFFSET] + n, block)
                S[s, CHUNK] = n
                tokens = Z[BUDGET]
        if (
            tokens > Z[BUDGET]
            or blocks > Z[FREE_BLOCKS]
            or (Z[CACHING] and Z[NUM_PREFILL] > 0)
            or Z[NUM_LATE] > 0
        ):
            budget = schedule_one_by_one(
                Z, R, S, K, seats, calendar, classes, prefill, finishing, held, ranked, table,
                buckets, prompt_hash, prompt_at, log_preempted, Z[BUDGET], threshold,
            )  # fmt: skip
        else:
            budget = Z[BUDGET] - tokens
            if not Z[CACHING]:
                Z[FREE_BLOCKS] -= blocks
            else:
                allocate_decoding(Z, R, S, K, classes, table, buckets, prompt_hash, prompt_at)
        if Z[STEP_PREEMPTED] == 0:
            admit(
                Z, R, S, K, seats, prefill, ranked, by_rank, table, buckets, found, prompt_hash,
                prompt_at, budget, threshold,
            )  # fmt: skip

        # --- what the step does ---
        decode = Z[NUM_DECODE]
        prefill_seqs = 0
        prefill_tokens = 0
        pairs = 0.0
        new_tokens = 0
        new_pairs = 0.0
        for j in range(Z[NUM_PREFILL]):
            s = prefill[j]
            n = S[s, CHUNK]
            if n > 0:
                c = S[s, OFFSET]
                prefill_seqs += 1
                prefill_tokens += n
                pairs += n * float(c) + n * (n + 1) * 0.5
                seen = R[S[s, REQUEST], COMPUTED_BEFORE]
                if c + n > seen:
                    fresh = c + n - max(c, seen)
                    new_tokens += fresh
                    new_pairs += fresh * float(max(c, seen)) + fresh * (fresh + 1) * 0.5
        total = decode + prefill_tokens

        if total == 0:
            if Z[IN_FLIGHT]:
                count = Z[NUM_FINISHING]
                Z[NUM_FINISHING] = 0
                Z[IN_FLIGHT] = 0
                take_outputs(
                    Z, F, R, S, K, seats, finishing, count, held, ranked, table, buckets,
                    prompt_hash, prompt_at, arrival_key, arrival_request, pending_key, pending,
                    own_arrival, successors, released, F[PREVIOUS_END],
                )  # fmt: skip
            else:
                Z[STEP] += 1
                if Z[STEP_PREEMPTED] == 0 and Z[NUM_RUNNING] == 0:
                    # All blocks are free, and the first of the queue does not fit.
                    key = next_arrival_key(Z, arrival_key, pending_key)
                    if Z[PRIORITY] and key < float("inf"):
                        if Z[BY_STEP]:
                            Z[STEP] = max(Z[STEP], int(key))
                        elif key > F[STOP]:
                            return STOPPED
                        else:
                            F[CALL] = max(F[CALL], key)
                    elif Z[PRIORITY] and Z[MORE]:
                        return IDLE
                    else:
                        request = peek_waiting(Z, ranked, by_rank)
                        Z[BAD_REQUEST] = request
                        Z[BAD_BLOCKS] = blocks_for(
                            R[request, PROMPT] + R[request, GENERATED], block
                        )
                        return NEVER_FITS
            Z[PREEMPTIONS] += Z[STEP_PREEMPTED]
            release_held(Z, S, calendar, classes, held)
            continue

        context = 0.0
        longest = 0.0
        if decode > 0:
            context = float(Z[OFFSETS] + decode * (Z[TICK] + 1))
            longest = float(longest_offset(Z, S) + Z[TICK] + 1)
        start = max(F[CLOCK], F[CALL])
        if Z[TIMED]:
            seconds = 1.0
        else:
            seconds = step_seconds(
                Z, F, by_tokens, by_seqs, host_by_seqs, decode, prefill_seqs, prefill_tokens,
                pairs, context, longest,
            )  # fmt: skip
        end = start + seconds
        if end > F[STOP]:
            release_held(Z, S, calendar, classes, held)
            return STOPPED

        # --- it counts ---
        row = Z[ROWS]
        if Z[RECORD]:
            log_row(
                Z, F, log_int, log_float, prefill_seqs, prefill_tokens, pairs, context, longest,
                start,
            )  # fmt: skip
            if Z[RECORD] == 2:
                log_sequences(Z, S, log_request, log_tokens)
                Z[LOG_PREEMPTED] += Z[STEP_PREEMPTED]
        Z[ROWS] = row + 1
        Z[STEP] += 1
        Z[PREEMPTIONS] += Z[STEP_PREEMPTED]
        Z[CACHED] += Z[STEP_CACHED]
        Z[COMPUTED] += total
        Z[PEAK_BLOCKS] = max(Z[PEAK_BLOCKS], Z[USABLE] - Z[FREE_BLOCKS])
        F[CLOCK] = end
        F[BUSY] += seconds
        F[TOKENS] += decode + new_tokens
        F[PAIRS] += context + new_pairs
        Z[TICK] += 1
        tick = Z[TICK]
        Z[RESIDUE] = Z[RESIDUE] - 1 if Z[RESIDUE] > 0 else block - 1

        # --- who finishes with its output ---
        finished = 0
        c = tick & Z[CALENDAR_MASK]
        s = calendar[c]
        calendar[c] = -1
        while s >= 0:
            forget_decoding(Z, S, classes, s)
            S[s, OFFSET] += tick
            ending[finished] = s
            finished += 1
            s = S[s, CALENDAR_AFTER]
        kept = 0
        for j in range(Z[NUM_PREFILL]):
            s = prefill[j]
            S[s, OFFSET] += S[s, CHUNK]
            if S[s, OFFSET] < S[s, TARGET]:
                prefill[kept] = s
                kept += 1
                continue
            request = S[s, REQUEST]
            R[request, GENERATED] += 1
            if R[request, GENERATED] == 1:
                first_token_s[request] = end
            left = R[request, OUTPUT] - R[request, GENERATED]
            if left == 0:
                ending[finished] = s
                finished += 1
            else:
                start_decoding(Z, S, calendar, classes, s, S[s, OFFSET], left)
        Z[NUM_PREFILL] = kept
        if finished > 1:
            sort_by_order(S, ending, finished)
        for j in range(finished):
            request = S[ending[j], REQUEST]
            S[ending[j], STATE] = FINISHING
            R[request, GENERATED] = R[request, OUTPUT]
            finish_s[request] = end
            if Z[RECORD] == 2:
                log_finished[Z[LOG_FINISHED]] = request
                Z[LOG_FINISHED] += 1
        Z[UNFINISHED] -= finished
        if Z[RECORD]:
            log_int[row, LOG_SEQ_END] = Z[LOG_SEQS]
            log_int[row, LOG_PREEMPTED_END] = Z[LOG_PREEMPTED]
            log_int[row, LOG_FINISHED_END] = Z[LOG_FINISHED]

        # --- asynchronously, the outcome of the step before is processed now, else this one's ---
        count = finished
        done_at = end
        if Z[ASYNC]:
            count = Z[NUM_FINISHING]
            done_at = F[PREVIOUS_END] if Z[IN_FLIGHT] else F[CALL]
            Z[IN_FLIGHT] = 1
            F[PREVIOUS_END] = end
        else:
            for j in range(finished):
                finishing[j, 0] = ending[j]
                finishing[j, 1] = S[ending[j], REQUEST]
        Z[NUM_FINISHING] = 0
        take_outputs(
            Z, F, R, S, K, seats, finishing, count, held, ranked, table, buckets, prompt_hash,
            prompt_at, arrival_key, arrival_request, pending_key, pending, own_arrival, successors,
            released, done_at,
        )  # fmt: skip
        if Z[ASYNC]:
            for j in range(finished):
                finishing[j, 0] = ending[j]
                finishing[j, 1] = S[ending[j], REQUEST]
            Z[NUM_FINISHING] = finished
        if Z[NUM_HELD] > 0:
            release_held(Z, S, calendar, classes, held)
        if Z[CURVE] and Z[ROWS] >= Z[CURVE_NEXT]:
            mark_curve(Z, F, curve)
