"""Where the compiled loop keeps what: indices and columns of the arrays in ``arrays``.

The state of a simulation is a handful of arrays, so that a run can be paused, copied and resumed.
``z`` and ``f`` hold whole and floating numbers; requests, seats (running sequences) and KV blocks
have one row each in arrays of their own.

While a sequence decodes, it advances by one token per *tick*. Its computed tokens are kept as
``offset + tick``, so that a step needs to touch only the sequences to which something happens.
"""

from __future__ import annotations

# --- z: settings ----------------------------------------------------------------------------------
(
    NUM_REQUESTS,
    MAX_SEQS,
    BUDGET,
    BLOCK,
    USABLE,  # blocks without the null block
    THRESHOLD,
    PRIORITY,
    CACHING,  # NO_CACHING, SHARED_BLOCKS or OWN_BLOCKS
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
    # --- z: state ---------------------------------------------------------------------------------
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
    NUM_RELEASED,
    NEXT_SEAT,
    FREE_SEATS,
    FREE_BLOCKS,
    IN_FLIGHT,
    UNFINISHED,
    PLAIN_BLOCKS,  # free ones without a hash (OWN_BLOCKS)
    OLDEST,  # list of requests with cached free blocks (OWN_BLOCKS)
    NEWEST,
    NOT_PREFIX,  # a cached block was left over: blocks must be told apart after all
    PREEMPTIONS,
    PEAK_BLOCKS,
    COMPUTED,
    CACHED,
    CURVE_COUNT,
    CURVE_STRIDE,
    CURVE_NEXT,
    BAD_REQUEST,
    BAD_BLOCKS,
    # --- z: the step at hand ----------------------------------------------------------------------
    STEP_PREEMPTED,
    STEP_CACHED,
    # --- z: filling of the record -----------------------------------------------------------------
    LOG_SEQS,
    LOG_PREEMPTED,
    LOG_FINISHED,
    NUM_INTS,
) = range(65)

# --- f --------------------------------------------------------------------------------------------
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
    PREFILL_STEP,
    NUM_FLOATS,
) = range(17)

# --- one row per request (requests); the last columns are lists that need one entry per request ---
(
    PROMPT,
    OUTPUT,  # tokens it generates: asked for, or up to max_model_len
    GENERATED,  # kept here while it does not decode
    COMPUTED_BEFORE,  # tokens computed before a preemption
    LINK,  # next in the waiting list (fcfs)
    RANK,  # order under policy priority
    PREDECESSORS,  # requests it still waits for
    HASHES_FROM,  # where its full prompt blocks begin in prompt_hash
    TAIL_HASH,  # of the tokens of the block with the end of its prompt, filled up with generated
    RANKED,  # heap of ranks of the waiting requests (priority)
    BY_RANK,  # the request of each rank
    ARRIVING,  # requests by ARRIVAL_KEY
    PENDING_ORDER,  # order of release, and
    PENDING,  # request, of the heap by PENDING_KEY
    RELEASED_REQUEST,  # released requests whose arrival an outside clock has to tell
    FINISHED_REQUEST,  # finished ones in order, if recorded
    KEPT,  # cached free blocks, and its neighbours in the list of such requests (OWN_BLOCKS)
    KEPT_BEFORE,
    KEPT_AFTER,
    REQUEST_COLUMNS,
) = range(20)

# --- one row per request (times) ------------------------------------------------------------------
(
    FINISH,
    FIRST_TOKEN,
    OWN_ARRIVAL,
    ARRIVAL_KEY,  # arrivals known beforehand, in order: seconds or steps
    PENDING_KEY,  # heap of the arrivals of released requests
    TIME_COLUMNS,
) = range(6)

# --- one row per seat (seats); the last columns are lists of seats --------------------------------
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
    LATE,  # asynchronous with caching: has no token in flight
    UNUSED,  # stack of empty seats
    PREFILLING,  # in running order
    LEFT_OUT,  # decoding seats left out of the step at hand
    ENDING,  # finish with the step at hand
    LEAVING,  # finished, outcome not processed yet; -1: preempted meanwhile
    LEAVING_REQUEST,
    SEAT_COLUMNS,
) = range(23)

NO_CACHING, SHARED_BLOCKS, OWN_BLOCKS = range(3)

EMPTY, PREFILL, DECODE, FINISHING, HELD = 0, 1, 2, 3, 4

# --- decode sequences whose offsets are equal modulo the block size -------------------------------
COUNT, FIRST, LAST = range(3)

# --- one row per KV block (kv); the last row ties the free list into a ring -----------------------
(
    FREE_AFTER,
    FREE_BEFORE,
    USERS,
    BUCKET_AFTER,
    BUCKET_BEFORE,
    BLOCK_COLUMNS,
) = range(6)

# --- curves of a StepLatency at 0, 1, 2, ... (costs) ----------------------------------------------
BY_TOKENS, BY_SEQS, HOST_BY_SEQS, COST_COLUMNS = range(4)

# --- one row per recorded step (log) --------------------------------------------------------------
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
    LOG_START,
    LOG_PAIRS,
    LOG_CONTEXT,
    LOG_LONGEST,
    LOG_COLUMNS,
) = range(14)

# --- why the loop returned ------------------------------------------------------------------------
DONE, STOPPED, NEVER_FITS, ROW_LIMIT, LOG_FULL, IDLE, RELEASED, NOT_A_PREFIX = range(8)
