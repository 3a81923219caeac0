"""The state before the first step, made from settings, requests and latency."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from samullm_plugin.engine import records as at
from samullm_plugin.engine.kv_cache import fill_pool
from samullm_plugin.engine.prefixes import first_block_hashes, hash_prefixes, hash_token_ids
from samullm_plugin.engine.records import Array, Record
from samullm_plugin.engine.state import EngineState, QueueState
from samullm_plugin.engine.workload import FURTHEST_S, Workload
from samullm_plugin.errors import InputError
from samullm_plugin.model.engine_config import EngineConfig
from samullm_plugin.model.latency import CURVES, LONGEST_S, StepLatency
from samullm_plugin.model.types import Floats, Ints, SmallInts

NO_LIMIT = 1 << 62
LEAST_CURVE = 4
"""With fewer points only the ends of the progress curve are kept."""

Pool = tuple[Array, SmallInts, SmallInts, Ints]
NO_BLOCKS: Pool = (
    np.zeros(1, at.BLOCK),
    np.zeros(1, np.int32),
    np.zeros((1, 1), np.int32),
    np.zeros(1, np.int64),
)


@lru_cache(maxsize=64)
def latency_arrays(latency: StepLatency, tokens: int, seqs: int) -> tuple[Record, Array]:
    """Return the scalars of ``latency``, and its curves at every argument up to the limits.

    Raises:
        InputError: if one is no number of seconds that an iteration can take.
    """
    scalars = np.zeros(1, at.LATENCY)[0]
    for name in at.LATENCY.names or ():
        value = getattr(latency, name)
        if name.endswith("_s"):
            _check_seconds(name, np.array([value]))
        setattr(scalars, name, value)
    tables = np.zeros(max(tokens, seqs) + 1, at.TABLES)
    for name in CURVES:
        tables[name] = getattr(latency, name).table(len(tables) - 1)
        _check_seconds(name, tables[name])
    return scalars, tables


def _check_seconds(name: str, values: Floats) -> None:
    """Refuse what would make the compiled loop leave its arrays, or never end."""
    wrong = ~(np.abs(values) <= LONGEST_S)
    if wrong.any():
        raise InputError(
            f"latency: {name} comes to {values[np.argmax(wrong)]:g} s; no term of an "
            f"iteration is beyond {LONGEST_S:,.0f} s: correct the profile or the latency model"
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
    if not 0 <= release_delay_s <= FURTHEST_S:
        raise InputError(f"release_delay_s is {release_delay_s:g}; it must be 0 to {FURTHEST_S:g}")
    n = len(workload)
    most_seqs = min(config.max_num_seqs, n)
    output = np.minimum(workload.output_tokens, config.max_model_len - workload.prompt_tokens)
    requests = np.zeros(n, at.REQUEST)
    requests["prompt_tokens"] = workload.prompt_tokens
    requests["output_tokens"] = output
    if config.scheduling_policy == "priority":
        _rank(workload, requests)
    num_arrivals, successors = _arrivals(workload, requests, timed=latency is None)
    caching, prompt_hash = at.NO_CACHING, None
    if config.enable_prefix_caching:
        caching = at.PRIVATE_BLOCKS
        if tell_blocks_apart or may_share(workload) or not config.is_plain:
            prompt_hash = _prompt_hashes(workload, requests, _hash_block(config))
            caching = at.SHARED_BLOCKS
            if (
                config.is_plain
                and not tell_blocks_apart
                and _is_unshared(requests, prompt_hash, config.block_size)
            ):
                caching, prompt_hash = at.PRIVATE_BLOCKS, None
    if not config.is_plain and prompt_hash is None:
        prompt_hash = np.zeros(1, np.int64)
    pool = NO_BLOCKS if prompt_hash is None else _blocks(config, requests, prompt_hash)
    slots = np.zeros(most_seqs, at.SLOT)
    slots["free_slot"] = np.arange(most_seqs - 1, -1, -1)
    wheel_size = 1 << int(output.max()).bit_length()
    # Bytes and columns: simulations are many and short, and rows are slow to copy and to set.
    state = first_state(config, caching).copy().view(at.STATE)
    state["num_free_slots"], state["num_unfinished"] = most_seqs, n
    state["arrivals_by_step"] = workload.arrival_step is not None
    state["num_arrivals"], state["wheel_mask"] = num_arrivals, wheel_size - 1
    state["record"], state["release_delay"] = record, release_delay_s
    state["curve_points"] = curve_points if curve_points >= LEAST_CURVE else 0
    state["external_latency"] = latency is None
    state["more_to_come"] = latency is None and workload.arrival_s is not None
    state["stop"] = np.inf if latency is None else stop_s
    s = state[0]
    if latency is None:
        scalars, tables = np.zeros(1, at.LATENCY)[0], np.zeros(1, at.TABLES)
    else:
        scalars, tables = latency_arrays(
            latency, config.max_num_batched_tokens, config.max_num_seqs
        )
    return EngineState(
        s,
        requests,
        slots,
        np.full(wheel_size, -1, np.int64),
        no_phases(config.block_size).copy().view(at.PHASE),
        successors,
        *pool,
        scalars,
        tables,
        curve=np.zeros(max(curve_points, 1), at.POINT),
        log=np.zeros(0, at.LOG),
        entries=np.zeros(0, at.SCHEDULED),
        preempted=np.zeros(0, np.int32),
        queue=None if config.is_plain else _queue(config, requests, s),
    )


def _hash_block(config: EngineConfig) -> int:
    """Return the tokens of which prefix caching keeps hashes: they divide all block sizes."""
    return math.gcd(*(g.block_size for g in config.groups))


def _queue(config: EngineConfig, requests: Array, s: Record) -> QueueState:
    """Return the state of ``batch_queue``; fills in its settings."""
    told = config.groups
    n, seqs, depth = len(requests), int(s.num_free_slots), config.max_concurrent_batches
    longest = int((requests["prompt_tokens"] + requests["output_tokens"]).max())
    groups = np.zeros(len(told), at.GROUP)
    specs: list[tuple[object, ...]] = []
    for spec in sorted(((g.kind, g.block_size, g.window_tokens, g.page_bytes) for g in told),
                       key=lambda spec: spec[0] != "full"):  # fmt: skip
        if spec not in specs:
            specs.append(spec)
    for row, group in zip(groups, told, strict=True):
        row["kind"] = _KINDS.index(group.kind)
        row["block_size"] = group.block_size if group.kind != "mamba" else config.max_model_len
        row["window_tokens"] = group.window_tokens
        row["most_blocks"] = group.blocks_of_longest(
            config.max_model_len, config.max_in_flight_tokens
        )
        row["spec"] = specs.index(
            (group.kind, group.block_size, group.window_tokens, group.page_bytes)
        )
    s.with_queue = 1
    s.max_model_len = config.max_model_len
    s.block_size = _hash_block(config)
    s.hit_alignment = math.lcm(*(g.block_size for g in told))
    s.num_specs = len(specs)
    s.is_simple_hybrid = len(specs) == 2 and specs[0][0] == "full"
    s.max_batches = depth
    s.decode_stagger = config.pipeline_parallel_size
    most = max(-(-longest // int(size)) for size in groups["block_size"]) + 1
    tracks = np.zeros(n, at.TRACK)
    tracks["slot"] = -1
    return QueueState(
        tracks,
        np.zeros(depth, at.BATCH),
        np.zeros((depth, seqs), at.BATCH_SEQ),
        np.zeros(config.pipeline_parallel_size),
        groups,
        np.zeros((len(told), seqs + 1), at.HELD),
        np.zeros((len(told), seqs + 1, most), np.int32),
        np.zeros((seqs + 1, longest // int(s.block_size) + 2 if s.caching else 1), np.int64),
    )


_KINDS = ("full", "sliding_window", "chunked_local", "mamba")


@lru_cache(maxsize=64)
def no_phases(block_size: int) -> Array:
    """Return the phases of no sequences, as bytes to be copied."""
    return np.full(block_size, np.array((0, -1, -1), at.PHASE)).view(np.uint8)


@lru_cache(maxsize=256)
def first_state(config: EngineConfig, caching: int) -> Array:
    """Return the one row of what all workloads begin with, as bytes to be copied."""
    state = np.zeros(1, at.STATE)
    s = state[0]
    s.max_num_seqs = config.max_num_seqs
    s.max_num_batched_tokens = config.max_num_batched_tokens
    s.block_size = config.block_size
    s.usable_blocks = s.free_blocks = s.unhashed_free_blocks = config.num_blocks - 1
    s.long_prefill_token_threshold = config.long_prefill_token_threshold
    s.priority = config.scheduling_policy == "priority"
    s.self_preemption_ends_step = (
        config.self_preemption_ends_step or config.scheduling_policy != "priority"
    )
    s.enable_chunked_prefill = config.enable_chunked_prefill
    s.caching = caching
    s.oldest_kept = s.newest_kept = -1
    s.async_scheduling = config.async_scheduling
    s.curve_count = s.curve_stride = s.curve_next_row = 1
    s.max_rows = NO_LIMIT
    s.running_head = s.running_tail = s.waiting_head = s.waiting_tail = s.misfit_request = -1
    return state.view(np.uint8)


def _rank(workload: Workload, requests: Array) -> None:
    """Fill in where the ranks of each priority begin; of equal ones the order is of arrival."""
    if workload.priority is not None:
        requests["first_rank"] = np.searchsorted(np.sort(workload.priority), workload.priority)


def _arrivals(workload: Workload, requests: Array, timed: bool) -> tuple[int, Ints]:
    """Return how many requests arrive of themselves, and the successors.

    The requests that arrive are left in ``requests``, in order.
    """
    n = len(workload)
    requests["finish"] = requests["first_token"] = np.inf
    if workload.arrival_step is not None:
        requests["arrival"] = workload.arrival_step
    elif workload.arrival_s is not None:
        requests["arrival"] = workload.arrival_s
    first = np.arange(n)
    successors = np.zeros((2, n + 1), np.int64)
    index, indptr = workload.release_index, workload.release_indptr
    if index is not None and indptr is not None:
        successors = np.zeros((2, max(n + 1, len(index))), np.int64)
        successors[0, : n + 1] = indptr
        successors[1, : len(index)] = index
        requests["num_predecessors"] = np.bincount(index, minlength=n)
        first = np.flatnonzero(requests["num_predecessors"] == 0)
    if timed and workload.arrival_s is not None:
        return 0, successors  # an outside clock tells when they arrive
    own = requests["arrival"][first]
    if own.any():
        first = first[np.argsort(own, kind="stable")]
    requests["arriving"][: len(first)] = first
    requests["arrival_key"][: len(first)] = requests["arrival"][first]
    return len(first), successors


def may_share(workload: Workload) -> bool:
    """Return whether anything is known of equal prompts."""
    return workload.prompt_token_ids is not None or (
        workload.prefix_id is not None and workload.prefix_tokens is not None
    )


def _is_unshared(requests: Array, prompt_hash: Ints, block: int) -> bool:
    """Return whether the first blocks of all requests differ, so that all others do too."""
    first = np.empty(len(requests), np.int64)
    first_block_hashes(requests, prompt_hash, block, first)
    return len(np.unique(first)) == len(first)


def _blocks(config: EngineConfig, requests: Array, prompt_hash: Ints) -> Pool:
    """Return the pool of KV blocks, all of them free, and the hashes of the prompts."""
    block, num_blocks = config.block_size, config.num_blocks
    most_seqs = min(config.max_num_seqs, len(requests))
    longest = int((requests["prompt_tokens"] + requests["output_tokens"]).max())
    most_blocks = min(-(-longest // block), num_blocks) + 1
    blocks = np.zeros(num_blocks + 1, at.BLOCK)
    fill_pool(blocks)
    return (
        blocks,
        np.full(1 << num_blocks.bit_length(), -1, np.int32),
        np.empty((most_seqs + 1, most_blocks), np.int32),
        prompt_hash,
    )


def _prompt_hashes(workload: Workload, requests: Array, block: int) -> Ints:
    """Return the hashes of all full prompt blocks; fills in where each prompt's begin."""
    full = requests["prompt_tokens"] // block
    requests["first_hash"][1:] = np.cumsum(full[:-1])
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
