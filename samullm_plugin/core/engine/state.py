"""The arrays of one simulation, made from settings, requests and latency."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samullm_plugin.core.engine import layout
from samullm_plugin.core.engine.blocks import fill_pool
from samullm_plugin.core.engine.config import EngineConfig
from samullm_plugin.core.engine.latency import StepLatency
from samullm_plugin.core.engine.prefixes import hash_prefixes, hash_token_ids
from samullm_plugin.core.engine.workload import Workload

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

_NO_INTS = np.zeros(1, np.int64)
_NO_PAIRS = np.zeros((1, 2), np.int64)
_NO_BLOCKS = np.zeros((1, layout.K_SIZE), np.int64)
_NO_LOG_INT = np.zeros((0, layout.LOG_INT_SIZE), np.int64)
_NO_LOG_FLOAT = np.zeros((0, layout.LOG_FLOAT_SIZE))
_NO_LOG = np.zeros(0, np.int32)
_ONE_SECOND = np.zeros(1)


@dataclass(slots=True)
class EngineState:
    """Arguments of ``loop.advance`` in its order; shapes are told in ``layout`` and below.

    With ``n`` requests, ``m`` seats and blocks of ``b`` tokens: ``calendar`` holds for each tick
    to come (modulo its length) the first seat whose last token it computes; ``classes`` ``(b, 3)``
    counts decode sequences by offset modulo ``b``; ``table`` ``(m, blocks)`` lists the blocks of a
    seat; ``successors`` ``(2, ...)`` holds starts and entries of the successors of each request.
    """

    Z: Ints
    F: Floats
    R: Ints
    S: Ints
    K: Ints
    seats: Ints
    calendar: Ints
    classes: Ints
    prefill: Ints
    held: Ints
    ending: Ints
    finishing: Ints
    ranked: Ints
    by_rank: Ints
    arrival_key: Floats
    arrival_request: Ints
    pending_key: Floats
    pending: Ints
    own_arrival: Floats
    successors: Ints
    released: Ints
    table: Ints
    buckets: Ints
    found: Ints
    prompt_hash: Ints
    prompt_at: Ints
    by_tokens: Floats
    by_seqs: Floats
    host_by_seqs: Floats
    finish_s: Floats
    first_token_s: Floats
    curve: Floats
    log_int: Ints
    log_float: Floats
    log_request: NDArray[np.int32]
    log_tokens: NDArray[np.int32]
    log_preempted: NDArray[np.int32]
    log_finished: NDArray[np.int32]

    def arguments(self) -> tuple[Any, ...]:
        """Return the arrays in the order of the loop's parameters."""
        return tuple(getattr(self, name) for name in _FIELDS)


_FIELDS = tuple(f.name for f in fields(EngineState))


@lru_cache(maxsize=64)
def _latency_tables(latency: StepLatency, tokens: int, seqs: int) -> tuple[Floats, Floats, Floats]:
    """Return the curves of ``latency`` at every whole argument up to the engine's limits."""
    return (
        latency.by_tokens.table(tokens),
        latency.by_seqs.table(seqs),
        latency.host_by_seqs.table(seqs),
    )


def make_state(
    config: EngineConfig,
    workload: Workload,
    latency: StepLatency | None,
    *,
    stop_s: float,
    record: int,
    curve_points: int,
    release_delay_s: float,
    timed: bool,
) -> EngineState:
    """Build the state before the first step.

    Args:
        config: scheduler settings.
        workload: checked requests.
        latency: iteration latency, or None if ``timed``.
        stop_s: when to stop.
        record: 0 nothing, 1 the table of steps, 2 who was scheduled as well.
        curve_points: points of the progress curve, 0 for none.
        release_delay_s: between a finish and the arrival of its successors.
        timed: an outside model tells the seconds; times count steps.
    """
    n = len(workload)
    block = config.block_size
    most_seqs = min(config.max_num_seqs, n)
    requests = np.zeros((n, layout.R_SIZE), np.int64)
    requests[:, layout.PROMPT] = workload.prompt_tokens
    output = np.minimum(workload.output_tokens, config.max_model_len - workload.prompt_tokens)
    requests[:, layout.OUTPUT] = output

    ranked, by_rank = _NO_INTS, _NO_INTS
    if config.scheduling_policy == "priority":
        ranked, by_rank = _rank(workload, requests)
    key, order, own_arrival, successors = _arrivals(workload, requests, timed)
    own_timed = timed and workload.arrival_s is not None

    z = np.zeros(layout.Z_SIZE, np.int64)
    f = np.zeros(layout.F_SIZE)
    calendar_size = 1 << int(output.max()).bit_length()
    z[layout.NUM_REQUESTS] = n
    z[layout.MAX_SEQS] = config.max_num_seqs
    z[layout.BUDGET] = config.max_num_batched_tokens
    z[layout.BLOCK] = block
    z[layout.USABLE] = z[layout.FREE_BLOCKS] = config.num_blocks - 1
    z[layout.THRESHOLD] = config.long_prefill_token_threshold
    z[layout.PRIORITY] = config.scheduling_policy == "priority"
    z[layout.CACHING] = config.enable_prefix_caching
    z[layout.ASYNC] = config.async_scheduling
    z[layout.BY_STEP] = workload.arrival_step is not None
    z[layout.RECORD] = record
    z[layout.CURVE] = curve_points if curve_points >= 4 else 0
    z[layout.CURVE_COUNT] = z[layout.CURVE_STRIDE] = z[layout.CURVE_NEXT] = 1
    z[layout.MAX_ROWS] = 1 << 62
    z[layout.TIMED] = timed
    z[layout.CALENDAR_MASK] = calendar_size - 1
    for i in (layout.HEAD, layout.TAIL, layout.WAIT_HEAD, layout.WAIT_TAIL):
        z[i] = -1
    z[layout.NUM_ARRIVALS] = 0 if own_timed else len(key)
    z[layout.FREE_SEATS] = most_seqs
    z[layout.UNFINISHED] = n
    z[layout.BAD_REQUEST] = -1
    f[layout.STOP] = np.inf if timed else stop_s
    f[layout.DELAY] = release_delay_s
    if own_timed:
        z[layout.MORE] = 1
        requests[:, layout.OWN_ARRIVAL] = 1

    tables = (_ONE_SECOND, _ONE_SECOND, _ONE_SECOND)
    if latency is not None:
        tables = _latency_tables(latency, config.max_num_batched_tokens, config.max_num_seqs)
        f[layout.PREFILL_TOKEN] = latency.prefill_token_s
        f[layout.PREFILL_SEQ] = latency.prefill_seq_s
        f[layout.PREFILL_PAIR] = latency.prefill_pair_s
        f[layout.CONTEXT_TOKEN] = latency.context_token_s
        f[layout.LONGEST_TOKEN] = latency.longest_token_s
        f[layout.LAUNCH] = latency.launch_s
        f[layout.PREFILL_LAUNCH] = latency.prefill_launch_s
        z[layout.LONGEST_OVER] = latency.longest_over_seqs
        z[layout.OVERLAP] = latency.overlap_host

    pool, table, buckets, found = _NO_BLOCKS, _NO_PAIRS, _NO_PAIRS, _NO_INTS
    prompt_hash, prompt_at = _NO_INTS, _NO_PAIRS
    if config.enable_prefix_caching:
        longest = int((workload.prompt_tokens + output).max())
        most_blocks = min(-(-longest // block), config.num_blocks) + 1
        pool = np.zeros((config.num_blocks + 1, layout.K_SIZE), np.int64)
        bucket_count = 1 << (2 * config.num_blocks).bit_length()
        buckets = np.empty((bucket_count, 2), np.int64)
        z[layout.BUCKET_MASK] = bucket_count - 1
        table = np.empty((most_seqs, most_blocks), np.int64)
        found = np.empty(most_blocks, np.int64)
        prompt_hash, prompt_at = _prompt_hashes(workload, block)
        fill_pool(z, pool, buckets)

    return EngineState(
        Z=z,
        F=f,
        R=requests,
        S=np.zeros((most_seqs, layout.S_SIZE), np.int64),
        K=pool,
        seats=np.arange(most_seqs - 1, -1, -1, dtype=np.int64),
        calendar=np.full(calendar_size, -1, np.int64),
        classes=_empty_classes(block),
        prefill=np.empty(most_seqs, np.int64),
        held=np.empty(most_seqs, np.int64),
        ending=np.empty(most_seqs, np.int64),
        finishing=np.empty((most_seqs, 2), np.int64),
        ranked=ranked,
        by_rank=by_rank,
        arrival_key=key,
        arrival_request=order,
        pending_key=np.empty(n if len(successors[0]) > 1 or timed else 1),
        pending=np.empty((n if len(successors[0]) > 1 or timed else 1, 2), np.int64),
        own_arrival=own_arrival,
        successors=successors,
        released=np.zeros(n + 1 if timed else 1, np.int64),
        table=table,
        buckets=buckets,
        found=found,
        prompt_hash=prompt_hash,
        prompt_at=prompt_at,
        by_tokens=tables[0],
        by_seqs=tables[1],
        host_by_seqs=tables[2],
        finish_s=np.full(n, np.inf),
        first_token_s=np.full(n, np.inf),
        curve=np.zeros((max(curve_points, 1), 3)),
        log_int=_NO_LOG_INT,
        log_float=_NO_LOG_FLOAT,
        log_request=_NO_LOG,
        log_tokens=_NO_LOG,
        log_preempted=_NO_LOG,
        log_finished=np.empty(n, np.int32) if record == 2 else _NO_LOG,
    )


def _empty_classes(block: int) -> Ints:
    classes = np.full((block, 3), -1, np.int64)
    classes[:, layout.COUNT] = 0
    return classes


def _rank(workload: Workload, requests: Ints) -> tuple[Ints, Ints]:
    """Fill in each request's rank under policy ``priority``; return the heap and the inverse."""
    n = len(workload)
    priority = workload.priority if workload.priority is not None else np.zeros(n, np.int64)
    by_rank = np.argsort(priority, kind="stable").astype(np.int64)
    requests[by_rank, layout.RANK] = np.arange(n)
    return np.empty(n, np.int64), by_rank


def _arrivals(
    workload: Workload, requests: Ints, timed: bool
) -> tuple[Floats, Ints, Floats, Ints]:
    """Return keys and requests in order of arrival, own arrivals, and the successors.

    Requests that wait for others are left out of the first two.
    """
    n = len(workload)
    if workload.arrival_step is not None:
        own = workload.arrival_step.astype(np.float64)
    elif workload.arrival_s is not None:
        own = np.ascontiguousarray(workload.arrival_s, np.float64)
    else:
        own = np.zeros(n)
    successors = np.zeros((2, 1), np.int64)
    first = np.arange(n, dtype=np.int64)
    if workload.release_index is not None and workload.release_indptr is not None:
        index, indptr = workload.release_index, workload.release_indptr
        successors = np.zeros((2, max(n + 1, len(index))), np.int64)
        successors[0, : n + 1] = indptr
        successors[1, : len(index)] = index
        requests[:, layout.PREDECESSORS] = np.bincount(index, minlength=n)
        first = np.flatnonzero(requests[:, layout.PREDECESSORS] == 0)
    else:
        successors = np.zeros((2, n + 1), np.int64)
    if workload.arrival_step is None and workload.arrival_s is None:
        return np.zeros(len(first)), first, own, successors
    order = first[np.argsort(own[first], kind="stable")]
    return own[order], order, own, successors


def _prompt_hashes(workload: Workload, block: int) -> tuple[Ints, Ints]:
    """Return the hashes of all full prompt blocks, and per request where they begin."""
    n = len(workload)
    full = workload.prompt_tokens // block
    prompt_at = np.zeros((n, 2), np.int64)
    np.cumsum(full[:-1], out=prompt_at[1:, 0])
    prompt_hash = np.zeros(max(int(full.sum()), 1), np.int64)
    if workload.prompt_token_ids is not None:
        ids = np.concatenate(workload.prompt_token_ids).astype(np.int64, copy=False)
        start = np.zeros(n + 1, np.int64)
        np.cumsum(workload.prompt_tokens, out=start[1:])
        hash_token_ids(ids, start, block, prompt_hash, prompt_at)
    else:
        none = np.full(n, -1, np.int64)
        shared_id = workload.prefix_id if workload.prefix_id is not None else none
        shared = workload.prefix_tokens if workload.prefix_tokens is not None else none
        prompt = np.ascontiguousarray(workload.prompt_tokens, np.int64)
        hash_prefixes(
            prompt,
            np.ascontiguousarray(shared_id, np.int64),
            np.ascontiguousarray(shared, np.int64),
            block,
            prompt_hash,
            prompt_at,
        )
    return prompt_hash, prompt_at
