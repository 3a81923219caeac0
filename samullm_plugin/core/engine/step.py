"""One scheduler step: running sequences first, then the waiting queue, then the outcome.

The rules are those of vllm/v1/core/sched/scheduler.py, ``schedule`` and ``update_from_output``.
"""

from __future__ import annotations

from samullm_plugin.core.engine.blocks import (
    find_prefix,
    give_back_blocks,
    remember_blocks,
    take_block,
    use_block,
)
from samullm_plugin.core.engine.jit import compiled
from samullm_plugin.core.engine.layout import (
    AFTER,
    ASYNC,
    BLOCK,
    CACHING,
    CHUNK,
    CLASS_AFTER,
    COMPUTED_BEFORE,
    CONTEXT_TOKEN,
    COUNT,
    DECODE,
    FINISHING,
    FIRST,
    FREE_BLOCKS,
    GENERATED,
    HASHED,
    HEAD,
    HELD,
    LATE,
    LAUNCH,
    LOG_PREEMPTED,
    LONGEST_OVER,
    LONGEST_TOKEN,
    MAX_SEQS,
    NUM_DECODE,
    NUM_FINISHING,
    NUM_HELD,
    NUM_LATE,
    NUM_PREFILL,
    NUM_RUNNING,
    NUM_WAITING,
    OFFSET,
    ORDER,
    OUTPUT,
    OVERLAP,
    PREFILL,
    PREFILL_LAUNCH,
    PREFILL_PAIR,
    PREFILL_SEQ,
    PREFILL_TOKEN,
    PRIORITY,
    PROMPT,
    RANK,
    RECORD,
    REQUEST,
    RESIDUE,
    SCHEDULED,
    STATE,
    STEP_CACHED,
    STEP_PREEMPTED,
    TAIL,
    TARGET,
    TICK,
)
from samullm_plugin.core.engine.queues import drop_waiting, peek_waiting, wait_first
from samullm_plugin.core.engine.sequences import (
    computed_tokens,
    generated_tokens,
    leave_prefill,
    sit_down,
    stand_up,
    start_decoding,
    stop_decoding,
)


@compiled
def blocks_for(tokens, block):
    """Return the blocks that hold ``tokens`` tokens."""
    return (tokens + block - 1) // block


@compiled
def preempt(
    Z, R, S, K, seats, calendar, classes, prefill, finishing, ranked, table, log_preempted, s, extra
):
    """Take away seat ``s`` and its blocks, ``extra`` tokens of which were allocated just now."""
    request = S[s, REQUEST]
    computed = computed_tokens(Z, S, s)
    generated = generated_tokens(Z, S, R, s)
    if S[s, STATE] == DECODE:
        stop_decoding(Z, S, calendar, classes, s)
        if S[s, LATE]:
            Z[NUM_LATE] -= 1
    elif S[s, STATE] == PREFILL:
        leave_prefill(Z, prefill, s)
    held = blocks_for(computed + extra, Z[BLOCK])
    if Z[CACHING]:
        give_back_blocks(Z, K, table, s, held)
    else:
        Z[FREE_BLOCKS] += held
    if S[s, STATE] == FINISHING:  # its last token arrives nevertheless
        for j in range(Z[NUM_FINISHING]):
            if finishing[j, 0] == s:
                finishing[j, 0] = -1
    else:
        R[request, GENERATED] = generated
        R[request, COMPUTED_BEFORE] = max(R[request, COMPUTED_BEFORE], computed)
        wait_first(Z, R, ranked, request)
    stand_up(Z, S, seats, s)
    if Z[RECORD] == 2:
        log_preempted[Z[LOG_PREEMPTED] + Z[STEP_PREEMPTED]] = request
    Z[STEP_PREEMPTED] += 1


@compiled
def last_in_priority(Z, R, S):
    """Return the seat that policy ``priority`` preempts first."""
    worst = Z[HEAD]
    s = S[worst, AFTER]
    while s >= 0:
        if R[S[s, REQUEST], RANK] > R[S[worst, REQUEST], RANK]:
            worst = s
        s = S[s, AFTER]
    return worst


@compiled
def schedule_one_by_one(
    Z,
    R,
    S,
    K,
    seats,
    calendar,
    classes,
    prefill,
    finishing,
    held,
    ranked,
    table,
    buckets,
    prompt_hash,
    prompt_at,
    log_preempted,
    budget,
    threshold,
):
    """Schedule the running list in order, preempting where blocks run out; return the budget left.

    Needed where order matters: too few blocks or tokens for all.
    """
    block = Z[BLOCK]
    s = Z[HEAD]
    while s >= 0:
        S[s, SCHEDULED] = 0
        s = S[s, AFTER]
    s = Z[HEAD]
    while s >= 0 and budget > 0:
        if S[s, STATE] == FINISHING:
            s = S[s, AFTER]
            continue
        decoding = S[s, STATE] == DECODE
        computed = computed_tokens(Z, S, s)
        n = 1 if decoding else S[s, TARGET] - computed
        if 0 < threshold < n:
            n = threshold
        n = min(n, budget)
        have = blocks_for(computed, block)
        need = blocks_for(computed + n, block) - have
        victim = -1
        while need > Z[FREE_BLOCKS]:
            victim = last_in_priority(Z, R, S) if Z[PRIORITY] else Z[TAIL]
            extra = S[victim, SCHEDULED]
            budget += extra
            preempt(
                Z, R, S, K, seats, calendar, classes, prefill, finishing, ranked, table,
                log_preempted, victim, extra,
            )  # fmt: skip
            if victim == s:
                break
        if victim == s:
            break
        if Z[CACHING]:
            for j in range(have, have + need):
                table[s, j] = take_block(Z, K, buckets)
            known = computed + n
            if Z[ASYNC] and decoding:
                known = computed + S[s, LATE]
                if S[s, LATE]:
                    S[s, LATE] = 0
                    Z[NUM_LATE] -= 1
            remember_blocks(Z, R, S, K, buckets, table, prompt_hash, prompt_at, s, known)
        else:
            Z[FREE_BLOCKS] -= need
        S[s, SCHEDULED] = n
        S[s, CHUNK] = n
        budget -= n
        s = S[s, AFTER]
    s = Z[HEAD]
    while s >= 0:
        if S[s, SCHEDULED] == 0:
            S[s, CHUNK] = 0
            if S[s, STATE] == DECODE:
                computed = computed_tokens(Z, S, s)
                stop_decoding(Z, S, calendar, classes, s)
                S[s, STATE] = HELD
                S[s, OFFSET] = computed
                S[s, TARGET] -= Z[TICK]
                held[Z[NUM_HELD]] = s
                Z[NUM_HELD] += 1
        s = S[s, AFTER]
    return budget


@compiled
def release_held(Z, S, calendar, classes, held):
    """Let the sequences left out of the step decode on."""
    for j in range(Z[NUM_HELD]):
        s = held[j]
        start_decoding(Z, S, calendar, classes, s, S[s, OFFSET], S[s, TARGET])
        if Z[ASYNC] and Z[CACHING] and not S[s, LATE]:
            S[s, LATE] = 1
            Z[NUM_LATE] += 1
    Z[NUM_HELD] = 0


@compiled
def plan_prefill(Z, S, prefill, threshold):
    """Set the chunks of the prefilling sequences.

    Returns:
        Tokens and blocks of a step that schedules every running sequence in full, or -1, -1 where
        the order of the running list decides who gets less.
    """
    block = Z[BLOCK]
    tokens = Z[NUM_DECODE]
    blocks = 0
    for j in range(Z[NUM_PREFILL]):
        s = prefill[j]
        n = S[s, TARGET] - S[s, OFFSET]
        if 0 < threshold < n:
            n = threshold
        S[s, CHUNK] = n
        tokens += n
        blocks += blocks_for(S[s, OFFSET] + n, block) - blocks_for(S[s, OFFSET], block)
    return tokens, blocks


@compiled
def allocate_decoding(Z, R, S, K, classes, table, buckets, prompt_hash, prompt_at):
    """Hand out the blocks of a step in which every decoding sequence takes part."""
    block = Z[BLOCK]
    residue = Z[RESIDUE]
    tick = Z[TICK]
    if not Z[CACHING]:
        Z[FREE_BLOCKS] -= classes[residue, COUNT]
        return
    s = classes[residue, FIRST]
    while s >= 0:
        table[s, (S[s, OFFSET] + tick) // block] = take_block(Z, K, buckets)
        s = S[s, CLASS_AFTER]
    # A block gets its hash when its last token is known: asynchronously one step later.
    ahead = 0 if Z[ASYNC] else 1
    if ahead:
        residue = residue - 1 if residue > 0 else block - 1
    s = classes[residue, FIRST]
    while s >= 0:
        known = S[s, OFFSET] + tick + ahead
        remember_blocks(Z, R, S, K, buckets, table, prompt_hash, prompt_at, s, known)
        s = S[s, CLASS_AFTER]


@compiled
def admit(
    Z,
    R,
    S,
    K,
    seats,
    prefill,
    ranked,
    by_rank,
    table,
    buckets,
    found,
    prompt_hash,
    prompt_at,
    budget,
    threshold,
):
    """Move requests from the waiting queue to the running list while they fit."""
    block = Z[BLOCK]
    while budget > 0 and Z[NUM_WAITING] > 0 and Z[NUM_RUNNING] < Z[MAX_SEQS]:
        request = peek_waiting(Z, ranked, by_rank)
        tokens = R[request, PROMPT] + R[request, GENERATED]
        hits, unused = 0, 0
        if Z[CACHING]:
            hits, unused = find_prefix(
                Z, R, K, buckets, found, prompt_hash, prompt_at, request, tokens
            )
        # All its tokens must fit, though only the chunk's blocks are taken.
        if blocks_for(tokens, block) - hits + unused > Z[FREE_BLOCKS]:
            break
        computed = hits * block
        n = tokens - computed
        if 0 < threshold < n:
            n = threshold
        n = min(n, budget)
        drop_waiting(Z, R, ranked)
        s = sit_down(Z, S, seats, request)
        S[s, OFFSET] = computed
        S[s, TARGET] = tokens
        S[s, CHUNK] = n
        if Z[CACHING]:
            S[s, HASHED] = hits
            for j in range(hits):
                table[s, j] = found[j]
                use_block(Z, K, found[j])
            for j in range(hits, blocks_for(computed + n, block)):
                table[s, j] = take_block(Z, K, buckets)
            remember_blocks(Z, R, S, K, buckets, table, prompt_hash, prompt_at, s, computed + n)
        else:
            Z[FREE_BLOCKS] -= blocks_for(n, block)
        prefill[Z[NUM_PREFILL]] = s
        Z[NUM_PREFILL] += 1
        Z[STEP_CACHED] += computed
        budget -= n


@compiled
def step_seconds(
    Z, F, by_tokens, by_seqs, host_by_seqs, decode, prefill_seqs, prefill_tokens, pairs, context,
    longest,
):  # fmt: skip
    """Return the seconds of an iteration, term by term as ``StepLatency.step_seconds``."""
    seqs = decode + prefill_seqs
    longest_token_s = F[LONGEST_TOKEN] if decode > Z[LONGEST_OVER] else 0.0
    attention = max(F[CONTEXT_TOKEN] * context, longest_token_s * longest)
    device = by_tokens[decode + prefill_tokens] + by_seqs[seqs]
    launch = F[LAUNCH]
    if prefill_seqs > 0:
        device += F[PREFILL_TOKEN] * prefill_tokens
        device += F[PREFILL_SEQ] * prefill_seqs
        device += F[PREFILL_PAIR] * pairs
        launch = F[PREFILL_LAUNCH]
    device = max(device + attention, launch)
    host = host_by_seqs[seqs]
    return max(device, host) if Z[OVERLAP] else device + host


@compiled
def give_up_seat(Z, S, K, seats, table, s):
    """Free seat and blocks of a finished sequence."""
    held = blocks_for(S[s, OFFSET], Z[BLOCK])
    if Z[CACHING]:
        give_back_blocks(Z, K, table, s, held)
    else:
        Z[FREE_BLOCKS] += held
    stand_up(Z, S, seats, s)


@compiled
def sort_by_order(S, found, count):
    """Sort seats ``found[:count]`` by their place in the running list."""
    for i in range(1, count):
        s = found[i]
        order = S[s, ORDER]
        j = i - 1
        while j >= 0 and S[found[j], ORDER] > order:
            found[j + 1] = found[j]
            j -= 1
        found[j + 1] = s
