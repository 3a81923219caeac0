"""Where the compiled loop keeps what: columns of its integer and float arrays.

The state of a simulation is a handful of arrays, so that a run can be paused, copied and resumed.
``Z`` and ``F`` hold scalars, ``R`` one row per request, ``S`` one row per seat (a running
sequence), ``K`` one row per KV block (prefix caching only).

While a sequence decodes, it advances by one token per *tick*. Its computed tokens are kept as
``offset + tick``, so that a step needs to touch only the sequences to which something happens.
"""

from __future__ import annotations

# --- Z: integer scalars: settings -----------------------------------------------------------------
(
    NUM_REQUESTS,
    MAX_SEQS,
    BUDGET,
    BLOCK,
    USABLE,  # blocks without the null block
    THRESHOLD,
    PRIORITY,
    CACHING,
    ASYNC,
    BY_STEP,  # arrival keys are scheduler steps, else seconds
    OVERLAP,
    LONGEST_OVER,  # longest_token_s applies with more decode sequences than this
    RECORD,  # 0 nothing, 1 the table of steps, 2 who was scheduled as well
    CURVE,  # points of the progress curve
    MAX_ROWS,  # pause after so many steps that schedule tokens
    TIMED,  # finish times are step counts: an outside model turns them into seconds
    MORE,  # more requests may arrive from outside
    CALENDAR_MASK,
    BUCKET_MASK,
    # --- Z: state ---------------------------------------------------------------------------------
    TICK,
    RESIDUE,  # (-tick) mod block size: decode sequences of this residue need a block now
    STEP,  # scheduler steps, those that schedule nothing included as vLLM's loop counts them
    ROWS,  # steps that scheduled tokens
    NUM_RUNNING,
    NUM_DECODE,
    NUM_PREFILL,
    NUM_FINISHING,  # asynchronous: last token in flight, seat and blocks still held
    NUM_HELD,  # decode sequences left out of the step at hand
    NUM_LATE,  # asynchronous with caching: decode sequences without a token in flight
    NUM_WAITING,
    OFFSETS,  # sum of offsets of the decode sequences
    LONGEST,  # largest offset of a decode sequence
    LONGEST_STALE,
    HEAD,  # running list, in order
    TAIL,
    WAIT_HEAD,  # waiting list (fcfs)
    WAIT_TAIL,
    NEXT_ARRIVAL,  # index into arrivals sorted by key
    NUM_ARRIVALS,
    NUM_PENDING,  # released requests that are not yet due
    PENDING_COUNT,
    NEXT_SEAT,
    FREE_SEATS,
    FREE_BLOCKS,
    IN_FLIGHT,
    UNFINISHED,
    PREEMPTIONS,
    PEAK_BLOCKS,
    COMPUTED,
    CACHED,
    CURVE_COUNT,
    CURVE_STRIDE,
    CURVE_NEXT,
    BAD_REQUEST,
    BAD_BLOCKS,
    # --- Z: the step at hand ----------------------------------------------------------------------
    STEP_PREEMPTED,
    STEP_CACHED,
    STEP_FINISHED,
    # --- Z: filling of the record -----------------------------------------------------------------
    LOG_SEQS,
    LOG_PREEMPTED,
    LOG_FINISHED,
    Z_SIZE,
) = range(62)

# --- F: float scalars -----------------------------------------------------------------------------
(
    CLOCK,  # end of the last step
    CALL,  # when the scheduler is called next
    PREVIOUS_END,  # asynchronous: end of the step in flight
    STOP,
    BUSY,
    DELAY,
    TOKENS,  # computed for the first time
    PAIRS,
    PREFILL_TOKEN,
    PREFILL_SEQ,
    PREFILL_PAIR,
    CONTEXT_TOKEN,
    LONGEST_TOKEN,
    LAUNCH,
    PREFILL_LAUNCH,
    F_SIZE,
) = range(16)

# --- R: one row per request -----------------------------------------------------------------------
(
    PROMPT,
    OUTPUT,  # tokens it generates: asked for, or up to max_model_len
    GENERATED,  # kept here while it does not run
    COMPUTED_BEFORE,  # tokens computed before a preemption
    LINK,  # next in the waiting list
    RANK,  # order under policy priority
    PREDECESSORS,
    OWN_ARRIVAL,  # 1: has an arrival of its own to be checked at release
    R_SIZE,
) = range(9)

# --- S: one row per seat --------------------------------------------------------------------------
(
    REQUEST,
    STATE,
    OFFSET,  # computed tokens: prefill as they are, decode minus TICK
    TARGET,  # prefill: tokens to compute; decode: tick of its last token
    CHUNK,  # prefill: tokens scheduled in the step at hand
    SCHEDULED,  # row number of the last walk that scheduled it
    ORDER,  # grows with the position in the running list
    BEFORE,
    AFTER,
    CALENDAR_BEFORE,
    CALENDAR_AFTER,
    CLASS,  # offset mod block size
    CLASS_BEFORE,
    CLASS_AFTER,
    HASHED,  # blocks with a hash
    LATE,
    S_SIZE,
) = range(17)

EMPTY, PREFILL, DECODE, FINISHING, HELD = 0, 1, 2, 3, 4

# --- decode sequences whose offsets are equal modulo the block size -------------------------------
COUNT, FIRST, LAST = range(3)

# --- K: one row per KV block ----------------------------------------------------------------------
(
    FREE_AFTER,
    FREE_BEFORE,
    USERS,
    HASH,  # 0: none
    BUCKET_AFTER,
    BUCKET_BEFORE,
    K_SIZE,
) = (0, 1, 2, 3, 4, 5, 8)

# --- recorded steps -------------------------------------------------------------------------------
(
    LOG_STEP,
    LOG_NUM_SEQS,
    LOG_NUM_TOKENS,
    LOG_PREFILL_SEQS,
    LOG_PREFILL_TOKENS,
    LOG_FREE,
    LOG_SEQ_END,
    LOG_PREEMPTED_END,
    LOG_FINISHED_END,
    LOG_INT_SIZE,
) = range(10)
LOG_START, LOG_PAIRS, LOG_CONTEXT, LOG_LONGEST, LOG_FLOAT_SIZE = range(5)

# --- why the loop returned ------------------------------------------------------------------------
DONE, STOPPED, NEVER_FITS, ROW_LIMIT, LOG_FULL, IDLE, RELEASED = range(7)
