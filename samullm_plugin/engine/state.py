"""The state of one simulation, made from settings, requests and latency."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import lru_cache

import numpy as np

from samullm_plugin.engine import layout as at
from samullm_plugin.engine.blocks import fill_pool
from samullm_plugin.engine.jit import announced_compilation
from samullm_plugin.engine.loop import advance
from samullm_plugin.engine.prefixes import first_block_hashes, hash_prefixes, hash_token_ids
from samullm_plugin.engine.workload import Workload
from samullm_plugin.model.engine_config import EngineConfig
from samullm_plugin.model.latency import StepLatency
from samullm_plugin.model.types import Floats, Ints, SmallInts

NO_LIMIT = 1 << 62
LEAST_CURVE = 4
"""With fewer points only the ends of the progress curve are kept."""

_NO_BLOCKS = (
    np.zeros((1, at.BLOCK_COLUMNS), np.int32),
    np.zeros(1, np.int64),
    np.zeros(1, np.int32),
    np.zeros((1, 1), np.int32),
    np.zeros(1, np.int64),
)


@dataclass(slots=True)
class EngineState:
    """Everything about a simulation under way: the arguments of the loop, in its order.

    With ``n`` requests, ``m`` seats (most sequences that run at once) and blocks of ``b`` tokens;
    the columns are told in ``layout``.

    Attributes:
        z: whole numbers.
        f: floating numbers.
        requests: one row per request, shape ``(n, REQUEST_COLUMNS)``.
        times: one row per request, shape ``(n, TIME_COLUMNS)``.
        seats: one row per seat, shape ``(m, SEAT_COLUMNS)``.
        calendar: for each tick to come, modulo its length (a power of two), the first of the seats
            whose last token it computes, or -1.
        classes: decode sequences whose offsets are equal modulo ``b``: how many, and with prefix
            caching the first and the last in running order; shape ``(b, 3)``.
        successors: row 0: where those of each request begin in row 1, which holds them.
        kv: links and users of KV blocks (prefix caching only, as all until ``prompt_hash``), shape
            ``(num_blocks + 1, BLOCK_COLUMNS)``.
        hashes: hash of each block, 0 for none.
        buckets: first block of each hash bucket, or -1; as many as a power of two.
        table: blocks of each seat, and a row to spare, shape ``(m + 1, most)``.
        prompt_hash: chained hashes of the full prompt blocks of all requests.
        costs: curves of a ``StepLatency``, shape ``(tokens, COST_COLUMNS)``.
        curve: time, tokens and pairs of the points of the progress curve.
        log: recorded steps, shape ``(rows, LOG_COLUMNS)``.
        entries: request and tokens of every scheduled sequence, shape ``(sequences, 2)``.
        preempted: requests preempted in recorded steps.
    """

    z: Ints
    f: Floats
    requests: Ints
    times: Floats
    seats: Ints
    calendar: Ints
    classes: Ints
    successors: Ints
    kv: SmallInts
    hashes: Ints
    buckets: SmallInts
    table: SmallInts
    prompt_hash: Ints
    costs: Floats
    curve: Floats
    log: Floats
    entries: SmallInts
    preempted: SmallInts

    def advance(self) -> int:
        """Run on until something stops the loop; return what (the last names in ``layout``)."""
        with announced_compilation(advance):
            why: int = advance(*(getattr(self, name) for name in _ARGUMENTS))
        return why

    def copy(self) -> EngineState:
        """Return a state to come back to; what a run only reads or appends to is shared."""
        return EngineState(
            *(
                value if name in _SHARED else value.copy()
                for name, value in ((n, getattr(self, n)) for n in _ARGUMENTS)
            )
        )


_ARGUMENTS = tuple(f.name for f in fields(EngineState))
_SHARED = {"successors", "prompt_hash", "costs", "log", "entries", "preempted"}


@lru_cache(maxsize=64)
def _costs(latency: StepLatency, tokens: int, seqs: int) -> Floats:
    """Return the curves of ``latency`` at every whole argument up to the engine's limits."""
    table = np.zeros((max(tokens, seqs) + 1, at.COST_COLUMNS))
    table[: tokens + 1, at.BY_TOKENS] = latency.by_tokens.table(tokens)
    table[: seqs + 1, at.BY_SEQS] = latency.by_seqs.table(seqs)
    table[: seqs + 1, at.HOST_BY_SEQS] = latency.host_by_seqs.table(seqs)
    return table


def make_state(
    config: EngineConfig,
    workload: Workload,
    latency: StepLatency | None,
    *,
    stop_s: float,
    record: int,
    curve_points: int,
    release_delay_s: float,
    tell_blocks_apart: bool = False,
) -> EngineState:
    """Build the state before the first step.

    Args:
        config: scheduler settings.
        workload: checked requests.
        latency: iteration latency; None: a model outside tells the seconds, times count steps.
        stop_s: when to stop.
        record: 0 nothing, 1 the table of steps, 2 who was scheduled as well.
        curve_points: points of the progress curve, 0 for none.
        release_delay_s: between a finish and the arrival of its successors.
        tell_blocks_apart: with prefix caching, keep every block's identity even if no two requests
            have one in common.
    """
    n = len(workload)
    most_seqs = min(config.max_num_seqs, n)
    output = np.minimum(workload.output_tokens, config.max_model_len - workload.prompt_tokens)
    requests = np.zeros((n, at.REQUEST_COLUMNS), np.int64)
    requests[:, at.PROMPT] = workload.prompt_tokens
    requests[:, at.OUTPUT] = output
    if config.scheduling_policy == "priority":
        _rank(workload, requests)
    times, num_arrivals, successors = _arrivals(workload, requests, timed=latency is None)
    caching, prompt_hash = at.NO_CACHING, None
    if config.enable_prefix_caching:
        caching = at.OWN_BLOCKS
        if tell_blocks_apart or _may_share(workload):
            prompt_hash = _prompt_hashes(workload, requests, config.block_size)
            caching = at.SHARED_BLOCKS
            if not tell_blocks_apart and _is_unshared(requests, prompt_hash, config.block_size):
                caching, prompt_hash = at.OWN_BLOCKS, None
    seats = np.zeros((most_seqs, at.SEAT_COLUMNS), np.int64)
    seats[:, at.UNUSED] = np.arange(most_seqs - 1, -1, -1)
    calendar_size = 1 << int(output.max()).bit_length()
    z = _whole_numbers(config, workload, latency, caching)
    z[at.NUM_ARRIVALS] = num_arrivals
    z[at.CALENDAR_MASK] = calendar_size - 1
    z[at.RECORD] = record
    z[at.CURVE] = curve_points if curve_points >= LEAST_CURVE else 0
    if latency is None:
        costs = np.zeros((1, at.COST_COLUMNS))
    else:
        costs = _costs(latency, config.max_num_batched_tokens, config.max_num_seqs)
    return EngineState(
        z,
        _floating_numbers(latency, stop_s, release_delay_s),
        requests,
        times,
        seats,
        np.full(calendar_size, -1, np.int64),
        np.tile(np.array((0, -1, -1), np.int64), (config.block_size, 1)),
        successors,
        *(_NO_BLOCKS if prompt_hash is None else _blocks(config, requests, prompt_hash)),
        costs,
        curve=np.zeros((max(curve_points, 1), 3)),
        log=np.zeros((0, at.LOG_COLUMNS)),
        entries=np.zeros((0, 2), np.int32),
        preempted=np.zeros(0, np.int32),
    )


def _whole_numbers(
    config: EngineConfig, workload: Workload, latency: StepLatency | None, caching: int
) -> Ints:
    z = np.zeros(at.NUM_INTS, np.int64)
    z[at.MAX_SEQS] = config.max_num_seqs
    z[at.BUDGET] = config.max_num_batched_tokens
    z[at.BLOCK] = config.block_size
    z[at.USABLE] = z[at.FREE_BLOCKS] = config.num_blocks - 1
    z[at.THRESHOLD] = config.long_prefill_token_threshold
    z[at.PRIORITY] = config.scheduling_policy == "priority"
    z[at.CACHING] = caching
    z[at.PLAIN_BLOCKS] = config.num_blocks - 1
    z[at.OLDEST] = z[at.NEWEST] = -1
    z[at.ASYNC] = config.async_scheduling
    z[at.BY_STEP] = workload.arrival_step is not None
    z[at.CURVE_COUNT] = z[at.CURVE_STRIDE] = z[at.CURVE_NEXT] = 1
    z[at.MAX_ROWS] = NO_LIMIT
    z[at.TIMED] = latency is None
    z[at.MORE] = latency is None and workload.arrival_s is not None
    z[[at.HEAD, at.TAIL, at.WAIT_HEAD, at.WAIT_TAIL, at.BAD_REQUEST]] = -1
    z[at.FREE_SEATS] = min(config.max_num_seqs, len(workload))
    z[at.UNFINISHED] = len(workload)
    if latency is not None:
        z[at.LONGEST_OVER] = latency.longest_over_seqs
        z[at.OVERLAP] = latency.overlap_host
    return z


def _floating_numbers(latency: StepLatency | None, stop_s: float, release_delay_s: float) -> Floats:
    f = np.zeros(at.NUM_FLOATS)
    f[at.DELAY] = release_delay_s
    f[at.STOP] = np.inf
    if latency is not None:
        f[at.STOP] = stop_s
        f[at.PREFILL_TOKEN] = latency.prefill_token_s
        f[at.PREFILL_SEQ] = latency.prefill_seq_s
        f[at.PREFILL_PAIR] = latency.prefill_pair_s
        f[at.CONTEXT_TOKEN] = latency.context_token_s
        f[at.LONGEST_TOKEN] = latency.longest_token_s
        f[at.LAUNCH] = latency.launch_s
        f[at.PREFILL_LAUNCH] = latency.prefill_launch_s
        f[at.PREFILL_STEP] = latency.prefill_step_s
    return f


def _rank(workload: Workload, requests: Ints) -> None:
    """Fill in the order of the requests under policy ``priority``."""
    n = len(workload)
    priority = np.zeros(n, np.int64) if workload.priority is None else workload.priority
    by_rank = np.argsort(priority, kind="stable")
    requests[:, at.BY_RANK] = by_rank
    requests[by_rank, at.RANK] = np.arange(n)


def _arrivals(workload: Workload, requests: Ints, timed: bool) -> tuple[Floats, int, Ints]:
    """Return the times, how many requests arrive of themselves, and the successors.

    The requests that arrive are left in ``requests``, in order.
    """
    n = len(workload)
    times = np.zeros((n, at.TIME_COLUMNS))
    times[:, at.FINISH] = times[:, at.FIRST_TOKEN] = np.inf
    if workload.arrival_step is not None:
        times[:, at.OWN_ARRIVAL] = workload.arrival_step
    elif workload.arrival_s is not None:
        times[:, at.OWN_ARRIVAL] = workload.arrival_s
    first = np.arange(n)
    successors = np.zeros((2, n + 1), np.int64)
    index, indptr = workload.release_index, workload.release_indptr
    if index is not None and indptr is not None:
        successors = np.zeros((2, max(n + 1, len(index))), np.int64)
        successors[0, : n + 1] = indptr
        successors[1, : len(index)] = index
        requests[:, at.PREDECESSORS] = np.bincount(index, minlength=n)
        first = np.flatnonzero(requests[:, at.PREDECESSORS] == 0)
    if timed and workload.arrival_s is not None:
        return times, 0, successors  # an outside clock tells when they arrive
    own = times[first, at.OWN_ARRIVAL]
    if own.any():
        first = first[np.argsort(own, kind="stable")]
    requests[: len(first), at.ARRIVING] = first
    times[: len(first), at.ARRIVAL_KEY] = times[first, at.OWN_ARRIVAL]
    return times, len(first), successors


def _may_share(workload: Workload) -> bool:
    """Return whether anything is known of equal prompts."""
    return workload.prompt_token_ids is not None or (
        workload.prefix_id is not None and workload.prefix_tokens is not None
    )


def _is_unshared(requests: Ints, prompt_hash: Ints, block: int) -> bool:
    """Return whether the first blocks of all requests differ, so that all others do too."""
    first = np.empty(len(requests), np.int64)
    first_block_hashes(requests, prompt_hash, block, first)
    return len(np.unique(first)) == len(first)


def _blocks(
    config: EngineConfig, requests: Ints, prompt_hash: Ints
) -> tuple[SmallInts, Ints, SmallInts, SmallInts, Ints]:
    """Return the pool of KV blocks, all of them free, and the hashes of the prompts."""
    block, num_blocks = config.block_size, config.num_blocks
    most_seqs = min(config.max_num_seqs, len(requests))
    longest = int((requests[:, at.PROMPT] + requests[:, at.OUTPUT]).max())
    most_blocks = min(-(-longest // block), num_blocks) + 1
    kv = np.zeros((num_blocks + 1, at.BLOCK_COLUMNS), np.int32)
    fill_pool(kv)
    return (
        kv,
        np.zeros(num_blocks + 1, np.int64),
        np.full(1 << num_blocks.bit_length(), -1, np.int32),
        np.empty((most_seqs + 1, most_blocks), np.int32),
        prompt_hash,
    )


def _prompt_hashes(workload: Workload, requests: Ints, block: int) -> Ints:
    """Return the hashes of all full prompt blocks; fills in where each prompt's begin."""
    full = requests[:, at.PROMPT] // block
    requests[1:, at.HASHES_FROM] = np.cumsum(full[:-1])
    prompt_hash = np.zeros(max(int(full.sum()), 1), np.int64)
    if workload.prompt_token_ids is not None:
        token_ids = np.concatenate(workload.prompt_token_ids).astype(np.int64, copy=False)
        hash_token_ids(requests, token_ids, block, prompt_hash)
    else:
        none = np.full(len(workload), -1, np.int64)
        prefix_id = none if workload.prefix_id is None else workload.prefix_id
        shared = none if workload.prefix_tokens is None else workload.prefix_tokens
        hash_prefixes(
            requests,
            np.ascontiguousarray(prefix_id, np.int64),
            np.ascontiguousarray(shared, np.int64),
            block,
            prompt_hash,
        )
    return prompt_hash
