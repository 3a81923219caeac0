"""The records that the compiled loop works on: structured numpy arrays, one row per thing.

The state of a simulation is a handful of arrays, so that a run can be paused, copied and resumed.
Requests, running slots (one per running sequence) and KV blocks have one row each in arrays of
their own; what there is only once is in the one row of the state. Links are indices; -1 is none.

While a sequence decodes, it advances by one token per *decode step*. Its computed tokens are kept
as ``offset + decode_step``, so that a step needs to touch only the sequences to which something
happens.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samullm_plugin.model.latency import CURVES, StepLatency, StepTable

Array = NDArray[Any]
"""Arrays of compiled functions. Their element types are left open to the type checker: compiled
code computes with machine integers, for which neither ``int`` nor ``numpy.int64`` would be right in
every expression."""

Record = Any
"""One row, passed by reference."""


def _of_type(kind: Any, names: str | Iterable[str]) -> list[tuple[str, Any]]:
    return [(n, kind) for n in (names.split() if isinstance(names, str) else names)]


def _record(*columns: list[tuple[str, Any]]) -> np.dtype[Any]:
    """Return the type of a row whose fields are attributes, in Python and in compiled code."""
    plain = np.dtype([c for group in columns for c in group], align=True)
    return np.dtype((np.record, plain))


# --- the state ------------------------------------------------------------------------------------
_SETTINGS = """
    max_num_seqs max_num_batched_tokens block_size usable_blocks long_prefill_token_threshold
    priority caching async_scheduling arrivals_by_step record curve_points max_rows external_latency
    more_to_come wheel_mask with_queue max_model_len hit_alignment num_specs is_simple_hybrid
    max_batches decode_stagger self_preemption_ends_step enable_chunked_prefill
"""
# usable_blocks: without the null block
# caching: NO_CACHING, SHARED_BLOCKS or PRIVATE_BLOCKS
# arrivals_by_step: arrival keys are scheduler steps, else seconds
# record: NOTHING, STEPS or ALL_SEQUENCES
# curve_points: points of the progress curve
# max_rows: pause after so many steps that schedule tokens
# external_latency: finish times are step counts: a latency model outside turns them into seconds
# more_to_come: more requests may arrive from outside

# with_queue: run by ``batch_queue``: several batches in flight or KV cache groups
# hit_alignment: tokens of which prefix cache hits are multiples
# num_specs: kinds of KV cache groups; is_simple_hybrid: full attention and one other
# max_batches: scheduled and not yet processed; decode_stagger: steps between two of a sequence

_PROGRESS = """
    decode_step block_phase step rows num_running num_decode num_prefill num_finishing num_skipped
    num_no_token_in_flight num_waiting offset_sum longest_offset longest_is_stale running_head
    running_tail waiting_head waiting_tail next_arrival num_arrivals num_due_later
    num_released next_order num_free_slots free_blocks in_flight num_unfinished
    unhashed_free_blocks oldest_kept newest_kept not_private num_preemptions peak_blocks
    computed_tokens cached_tokens curve_count curve_stride curve_next_row misfit_request
    misfit_blocks step_preemptions step_cached_tokens logged_seqs logged_preempted logged_finished
    num_batches first_batch has_finished
"""
# block_phase: (-decode_step) mod block size: decode sequences of this phase need a block now
# step: scheduler steps, those that schedule nothing included as vLLM's loop counts them
# rows: steps that scheduled tokens
# num_finishing: asynchronous: last token in flight, slot and blocks still held
# num_skipped: decode sequences left out of the step at hand (no token budget)
# num_no_token_in_flight: asynchronous with caching: such decode sequences
# offset_sum, longest_offset: of the decode sequences
# waiting_head, waiting_tail: the waiting list (fcfs)
# next_arrival: index into the arrivals sorted by key
# num_due_later: released requests that are not yet due
# unhashed_free_blocks, oldest_kept, newest_kept: see ``private_prefix_cache``
# not_private: a cached block was left over: blocks must be distinguished after all

_CLOCKS = "clock next_call previous_end stop busy release_delay first_tokens first_pairs"
# clock: end of the last step
# next_call: when the scheduler is called next
# previous_end: asynchronous: end of the step in flight
# first_tokens, first_pairs: tokens computed for the first time, and their query-key pairs

# num_batches, first_batch: of the batch queue, a ring; has_finished: since the last step

STATE = _record(
    _of_type(np.int64, _SETTINGS), _of_type(np.int64, _PROGRESS), _of_type(np.float64, _CLOCKS)
)

# --- iteration latency ----------------------------------------------------------------------------
_KINDS = {"float": np.float64, "int": np.int64, "bool": np.bool_}
LATENCY = _record(
    [(f.name, _KINDS[str(f.type)]) for f in fields(StepLatency) if f.name not in CURVES]
)
TABLES = _record(_of_type(np.float64, CURVES))
"""Values of the curves of a latency at 0, 1, 2, ..."""

# --- requests; the last fields are lists that need one entry per request --------------------------
REQUEST = _record(
    _of_type(
        np.int64,
        """
        prompt_tokens output_tokens generated computed_before after_waiting rank num_predecessors
        first_hash tail_hash first_rank num_ranked heap_rank of_rank arriving due_order due_request
        released finished
        kept_blocks kept_before kept_after
        """,
    ),
    _of_type(np.float64, "finish first_token arrival arrival_key due_key"),
)
# output_tokens: tokens it generates: asked for, or up to max_model_len
# generated: kept here while it does not decode
# computed_before: tokens computed before a preemption
# after_waiting: next in the waiting list (fcfs)
# rank: order under policy priority, known when it arrives: by priority, then arrival
# num_predecessors: requests it still waits for
# first_hash: where its full prompt blocks begin in prompt_hash
# tail_hash: of the tokens of the block with the end of its prompt, filled up with generated ones
# first_rank: least rank of its priority
# num_ranked: at a priority's first rank, how many of its requests have arrived
# heap_rank, of_rank: heap of ranks of the waiting requests (priority); the request of each rank
# arriving, arrival_key: requests that arrive by themselves, in order, and when
# due_order, due_request, due_key: heap of released requests not yet due: which of those that
#     arrive at one moment is first, request, when
# released: requests whose arrival an outside clock has to tell
# finished: in order, if recorded
# kept_blocks, kept_before, kept_after: see ``private_prefix_cache``

# --- running slots; the last fields are lists of slots --------------------------------------------
SLOT = _record(
    _of_type(
        np.int64,
        """
        request state offset target chunk scheduled order before after wheel_before wheel_after
        phase phase_before phase_after hashed_blocks no_token_in_flight
        free_slot prefilling skipped ending leaving leaving_request
        """,
    )
)
# offset: computed tokens: prefill as they are, decode minus decode_step
# target: prefill: tokens to compute; decode: decode step of its last token
# chunk: prefill: tokens scheduled in the step at hand
# scheduled: tokens scheduled by the walk at hand
# order: grows with the position in the running list (before, after)
# wheel_before, wheel_after: decode sequences with their last token in the same step
# phase: offset mod block size (phase_before, phase_after)
# no_token_in_flight: asynchronous with caching
# free_slot: stack of empty slots
# prefilling: in running order
# skipped: decode sequences left out of the step at hand
# ending: finish with the step at hand
# leaving, leaving_request: finished, outcome not processed yet; -1: preempted meanwhile

EMPTY, PREFILL, DECODE, FINISHING, SKIPPED = range(5)

PHASE = _record(_of_type(np.int64, "count first last"))
"""Decode sequences whose offsets are equal modulo the block size."""

# --- what only ``batch_queue`` keeps --------------------------------------------------------------
TRACK = _record(
    _of_type(
        np.int64,
        "slot computed in_flight stale sampling placeholders eligible_step passed_over",
    ),
    _of_type(np.float64, "token_end"),
)
"""One row per request."""
# computed: tokens computed or being computed
# in_flight: tokens being computed; stale: those of them from before a preemption
# sampling: output tokens in flight; placeholders: those that count as tokens (asynchronous)
# eligible_step: first step that may schedule its next token
# passed_over: list of waiting requests that the step at hand cannot take yet
# token_end: when its newest output token is there, which the next one is computed from
BATCH = _record(_of_type(np.int64, "num_seqs"), _of_type(np.float64, "end"))
BATCH_SEQ = _record(_of_type(np.int64, "request tokens samples"))
GROUP = _record(_of_type(np.int64, "kind block_size window_tokens most_blocks spec"))
HELD = _record(_of_type(np.int64, "num_blocks num_cached"))

FULL, SLIDING_WINDOW, CHUNKED_LOCAL, PER_SEQUENCE = range(4)

# --- KV blocks; the last row ties the free list into a ring ---------------------------------------
BLOCK = _record(
    _of_type(np.int64, "hash"),
    _of_type(np.int32, "free_after free_before ref_cnt bucket_after bucket_before"),
)

NO_CACHING, SHARED_BLOCKS, PRIVATE_BLOCKS = range(3)

# --- what is recorded -----------------------------------------------------------------------------
_COLUMNS = {"Ints": np.int64, "Floats": np.float64}
LOG = _record(
    [(f.name, _COLUMNS[str(f.type)]) for f in fields(StepTable)],
    _of_type(np.int64, "step free_blocks seq_end preempted_end finished_end"),
    _of_type(np.float64, "start"),
)
SCHEDULED = _record(_of_type(np.int32, "request tokens"))
POINT = _record(_of_type(np.float64, "time tokens pairs"))
"""Of the progress curve."""

NOTHING, STEPS, ALL_SEQUENCES = range(3)

# --- why the loop returned ------------------------------------------------------------------------
DONE, STOPPED, NEVER_FITS, ROW_LIMIT, LOG_FULL, IDLE, RELEASED, NOT_PRIVATE = range(8)
