"""What a scheduled step takes and what comes of it: seconds, finished sequences, successors.

The rules of finishing are those of ``update_from_output`` in vllm/v1/core/sched/scheduler.py.
"""

from __future__ import annotations

from typing import Any

from samullm_plugin.engine import layout as at
from samullm_plugin.engine.arrays import Array
from samullm_plugin.engine.blocks import remember_blocks
from samullm_plugin.engine.jit import compiled
from samullm_plugin.engine.preempt import release_blocks
from samullm_plugin.engine.queues import admit_arrivals, pend, wait_last
from samullm_plugin.engine.running import forget_decoding, stand_up, start_decoding


@compiled
def step_seconds(
    z: Array,
    f: Array,
    costs: Array,
    decode: int,
    prefill_seqs: int,
    prefill_tokens: int,
    pairs: float,
    context: float,
    longest: float,
) -> Any:
    """Return the seconds of an iteration, term by term as ``StepLatency.step_seconds``."""
    if z[at.TIMED]:
        return 1.0
    seqs = decode + prefill_seqs
    longest_token_s = f[at.LONGEST_TOKEN] if decode > z[at.LONGEST_OVER] else 0.0
    attention = max(f[at.CONTEXT_TOKEN] * context, longest_token_s * longest)
    device = costs[decode + prefill_tokens, at.BY_TOKENS] + costs[seqs, at.BY_SEQS]
    launch = f[at.LAUNCH]
    if prefill_seqs > 0:
        device += f[at.PREFILL_TOKEN] * prefill_tokens
        device += f[at.PREFILL_SEQ] * prefill_seqs
        device += f[at.PREFILL_PAIR] * pairs
        device += f[at.PREFILL_STEP]
        launch = f[at.PREFILL_LAUNCH]
    device = max(device + attention, launch)
    host = costs[seqs, at.HOST_BY_SEQS]
    return max(device, host) if z[at.OVERLAP] else device + host


@compiled
def new_work(z: Array, requests: Array, seats: Array) -> tuple[int, int, float, int, float]:
    """Return what the prefilling sequences compute in the step at hand.

    Returns:
        Sequences, tokens, query-key pairs; tokens and pairs of those computed for the first time.
    """
    seqs, tokens, pairs = 0, 0, 0.0
    first_tokens, first_pairs = 0, 0.0
    for j in range(z[at.NUM_PREFILL]):
        s = seats[j, at.PREFILLING]
        n = seats[s, at.CHUNK]
        if n == 0:
            continue
        computed = seats[s, at.OFFSET]
        seqs += 1
        tokens += n
        pairs += n * float(computed) + 0.5 * n * (n + 1)
        seen = max(computed, requests[seats[s, at.REQUEST], at.COMPUTED_BEFORE])
        fresh = computed + n - seen
        if fresh > 0:
            first_tokens += fresh
            first_pairs += fresh * float(seen) + 0.5 * fresh * (fresh + 1)
    return seqs, tokens, pairs, first_tokens, first_pairs


@compiled
def sort_by_order(seats: Array, count: int) -> None:
    """Sort the first ``count`` ending seats by their place in the running list."""
    for i in range(1, count):
        s = seats[i, at.ENDING]
        order = seats[s, at.ORDER]
        j = i - 1
        while j >= 0 and seats[seats[j, at.ENDING], at.ORDER] > order:
            seats[j + 1, at.ENDING] = seats[j, at.ENDING]
            j -= 1
        seats[j + 1, at.ENDING] = s


@compiled
def compute_step(
    z: Array,
    requests: Array,
    times: Array,
    seats: Array,
    calendar: Array,
    classes: Array,
    end: float,
) -> Any:
    """Advance every scheduled sequence; return how many finish (their seats are in ``ENDING``)."""
    z[at.TICK] += 1
    tick = z[at.TICK]
    z[at.RESIDUE] = z[at.RESIDUE] - 1 if z[at.RESIDUE] > 0 else z[at.BLOCK] - 1
    finished = 0
    day = tick & z[at.CALENDAR_MASK]
    s = calendar[day]
    calendar[day] = -1
    while s >= 0:
        forget_decoding(z, seats, classes, s)
        seats[s, at.OFFSET] += tick
        seats[finished, at.ENDING] = s
        finished += 1
        s = seats[s, at.CALENDAR_AFTER]
    kept = 0
    for j in range(z[at.NUM_PREFILL]):
        s = seats[j, at.PREFILLING]
        seats[s, at.OFFSET] += seats[s, at.CHUNK]
        if seats[s, at.OFFSET] < seats[s, at.TARGET]:
            seats[kept, at.PREFILLING] = s
            kept += 1
            continue
        if z[at.CACHING] == at.OWN_BLOCKS:
            seats[s, at.HASHED] = seats[s, at.OFFSET] // z[at.BLOCK]
        request = seats[s, at.REQUEST]
        requests[request, at.GENERATED] += 1
        if requests[request, at.GENERATED] == 1:
            times[request, at.FIRST_TOKEN] = end
        left = requests[request, at.OUTPUT] - requests[request, at.GENERATED]
        if left == 0:
            seats[finished, at.ENDING] = s
            finished += 1
        else:
            start_decoding(z, seats, calendar, classes, s, seats[s, at.OFFSET], left)
    z[at.NUM_PREFILL] = kept
    if finished > 1:
        sort_by_order(seats, finished)
    for j in range(finished):
        s = seats[j, at.ENDING]
        request = seats[s, at.REQUEST]
        seats[s, at.STATE] = at.FINISHING
        requests[request, at.GENERATED] = requests[request, at.OUTPUT]
        times[request, at.FINISH] = end
        if z[at.RECORD] == 2:
            requests[z[at.LOG_FINISHED] + j, at.FINISHED_REQUEST] = request
    z[at.LOG_FINISHED] += finished
    z[at.UNFINISHED] -= finished
    return finished


@compiled
def release_successors(
    z: Array, f: Array, requests: Array, times: Array, successors: Array, request: int, now: float
) -> None:
    """Let the requests that waited for ``request`` arrive."""
    for j in range(successors[0, request], successors[0, request + 1]):
        successor = successors[1, j]
        requests[successor, at.PREDECESSORS] -= 1
        if requests[successor, at.PREDECESSORS] > 0:
            continue
        outside = f[at.DELAY] > 0.0 or times[successor, at.OWN_ARRIVAL] > 0.0
        if z[at.TIMED] and not z[at.BY_STEP] and outside:
            requests[z[at.NUM_RELEASED], at.RELEASED_REQUEST] = successor
            z[at.NUM_RELEASED] += 1
            continue
        key = max(now + f[at.DELAY], times[successor, at.OWN_ARRIVAL])
        if key <= now:
            admit_arrivals(z, requests, times, now)  # what arrived before comes before
            wait_last(z, requests, successor)
        else:
            pend(z, requests, times, key, successor)


@compiled
def process_outcome(
    z: Array,
    f: Array,
    requests: Array,
    times: Array,
    seats: Array,
    successors: Array,
    kv: Array,
    hashes: Array,
    buckets: Array,
    table: Array,
    prompt_hash: Array,
    now: float,
) -> None:
    """Free what the sequences in ``LEAVING`` held, and let their successors arrive."""
    count = z[at.NUM_FINISHING]
    z[at.NUM_FINISHING] = 0
    f[at.CALL] = now
    # Asynchronously, blocks that a token known only now fills get their hash now.
    if z[at.ASYNC] and z[at.CACHING]:
        for j in range(z[at.NUM_HELD]):
            s = seats[j, at.LEFT_OUT]
            remember_blocks(
                z, requests, seats, kv, hashes, buckets, table, prompt_hash, s, seats[s, at.OFFSET]
            )
    for j in range(count):
        s = seats[j, at.LEAVING]
        if s >= 0:
            if z[at.ASYNC] and z[at.CACHING]:
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
                    seats[s, at.OFFSET],
                )
            release_blocks(z, requests, seats, kv, hashes, table, s, seats[s, at.OFFSET], 0)
            stand_up(z, seats, s)
    key = float(z[at.STEP]) if z[at.BY_STEP] else now
    for j in range(count):
        release_successors(z, f, requests, times, successors, seats[j, at.LEAVING_REQUEST], key)
