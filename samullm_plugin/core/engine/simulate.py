"""Simulate one engine replica, step for step as vLLM's scheduler runs it."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from samullm_plugin.core.engine import layout
from samullm_plugin.core.engine.check import NeverFitsError, check_workload
from samullm_plugin.core.engine.config import EngineConfig
from samullm_plugin.core.engine.jit import announced_compilation
from samullm_plugin.core.engine.latency import StepLatency, StepModel, StepTable
from samullm_plugin.core.engine.loop import advance
from samullm_plugin.core.engine.state import EngineState, make_state
from samullm_plugin.core.engine.workload import EngineRun, ProgressCurve, StepTrace, Workload
from samullm_plugin.errors import InputError

CHECKED_VLLM_VERSIONS = ("0.32.0",)
"""Versions of vLLM whose own scheduler the conformance suite found no difference to."""


def simulate_engine(
    config: EngineConfig,
    workload: Workload,
    latency: StepModel,
    *,
    stop_s: float = math.inf,
    record_steps: bool = False,
    curve_points: int = 0,
    release_delay_s: float = 0.0,
) -> EngineRun:
    """Run ``workload`` on one engine replica.

    At every step exactly the tokens per request are scheduled, and the requests preempted, that
    vLLM's scheduler would (``CHECKED_VLLM_VERSIONS``). A request that arrives by time is seen by
    the first call of the scheduler at or after it; with asynchronous scheduling that call is one
    iteration ahead of the device.

    Args:
        config: scheduler settings of the replica.
        workload: requests with known output lengths; a request ends at ``max_model_len`` tokens.
        latency: seconds of iterations. A :class:`StepLatency` is evaluated inside the compiled
            loop, anything else a table of iterations at a time.
        stop_s: iterations that end by then count.
        record_steps: keep every step.
        curve_points: most points of the progress curve; 0 for none.
        release_delay_s: seconds between a finish and the arrival of its successors.

    Raises:
        InputError: the workload cannot be given to an engine, or its requests wait for each other.
        NeverFitsError: a request needs more KV blocks than there are (carries the run until then).
    """
    check_workload(config, workload)
    if curve_points == 1 or curve_points < 0:
        raise InputError(f"curve_points is {curve_points}; it must be 0 or at least 2")
    if release_delay_s > 0 and workload.arrival_step is not None:
        raise InputError("release_delay_s needs arrivals by time, not by step")
    if len(workload) == 0:
        return _nothing(record_steps, curve_points)
    if not isinstance(latency, StepLatency):
        raise NotImplementedError
    record = 2 if record_steps else 0
    state = make_state(
        config,
        workload,
        latency,
        stop_s=stop_s,
        record=record,
        curve_points=curve_points,
        release_delay_s=release_delay_s,
        timed=False,
    )
    if record:
        reserve_log(state, record, int(workload.prompt_tokens.sum()) // 64)
    why = run_state(state, record)
    return finished_run(state, workload, why, curve_points, record_steps)


def run_state(state: EngineState, record: int) -> int:
    """Advance ``state``, enlarging its record when it is full; return why it stopped."""
    with announced_compilation(advance):
        why: int = advance(*state.arguments())
    while why == layout.LOG_FULL:
        reserve_log(state, record, 0)
        why = advance(*state.arguments())
    return why


def _grown(array: NDArray, rows: int) -> NDArray:  # type: ignore[type-arg]  # any element type
    result = np.empty((rows, *array.shape[1:]), array.dtype)
    result[: len(array)] = array
    return result


def reserve_log(state: EngineState, record: int, extra: int) -> None:
    """Make room in the record of steps: first for what the lengths suggest, then twice as much."""
    z, r = state.Z, state.R
    if len(state.log_int) == 0:
        tokens = int(r[:, layout.OUTPUT].sum())
        rows = tokens // max(int(min(z[layout.MAX_SEQS], len(r))) // 2, 1) + extra + 1024
        sequences = tokens + len(r) + rows + extra + int(z[layout.MAX_SEQS])
        preempted = 1024 + int(z[layout.MAX_SEQS])
    else:
        rows = 2 * len(state.log_int)
        sequences = 2 * len(state.log_request)
        preempted = 2 * len(state.log_preempted)
    if z[layout.ROWS] >= len(state.log_int):
        state.log_int = _grown(state.log_int, rows)
        state.log_float = _grown(state.log_float, rows)
    if record == 2:
        if z[layout.LOG_SEQS] + z[layout.MAX_SEQS] > len(state.log_request):
            state.log_request = _grown(state.log_request, sequences)
            state.log_tokens = _grown(state.log_tokens, sequences)
        if z[layout.LOG_PREEMPTED] + z[layout.NUM_RUNNING] >= len(state.log_preempted):
            state.log_preempted = _grown(state.log_preempted, preempted)


def finished_run(
    state: EngineState, workload: Workload, why: int, curve_points: int, record_steps: bool
) -> EngineRun:
    """Read the result off the arrays.

    Raises:
        NeverFitsError: the loop stopped for that.
        InputError: requests are left that wait for each other.
    """
    z, f = state.Z, state.F
    finish = state.finish_s
    if why == layout.DONE and z[layout.UNFINISHED] > 0:
        i = int(np.argmax(state.R[:, layout.PREDECESSORS] > 0))
        raise InputError(f"request {i} waits for requests that wait for it: break the cycle")
    generated = state.R[:, layout.GENERATED].copy()
    seats = state.S
    decoding = seats[seats[:, layout.STATE] == layout.DECODE]
    request = decoding[:, layout.REQUEST]
    left = decoding[:, layout.TARGET] - z[layout.TICK]
    generated[request] = state.R[request, layout.OUTPUT] - left
    done = finish[np.isfinite(finish)]
    run = EngineRun(
        finish_s=finish,
        first_token_s=state.first_token_s,
        generated_tokens=generated,
        makespan_s=float(done.max()) if len(done) else 0.0,
        busy_s=float(f[layout.BUSY]),
        num_steps=int(z[layout.ROWS]),
        num_preemptions=int(z[layout.PREEMPTIONS]),
        peak_blocks=int(z[layout.PEAK_BLOCKS]),
        computed_tokens=int(z[layout.COMPUTED]),
        cached_tokens=int(z[layout.CACHED]),
        curve=_curve(state, curve_points) if curve_points else None,
        steps=step_trace(state) if record_steps else None,
    )
    if why == layout.NEVER_FITS:
        raise NeverFitsError(
            int(z[layout.BAD_REQUEST]), int(z[layout.BAD_BLOCKS]), int(z[layout.USABLE]), run
        )
    return run


def _curve(state: EngineState, points: int) -> ProgressCurve:
    z, f = state.Z, state.F
    count = int(z[layout.CURVE_COUNT])
    rows = state.curve[:count]
    end = (f[layout.CLOCK], f[layout.TOKENS], f[layout.PAIRS])
    if z[layout.ROWS] > 0 and rows[-1, 0] < end[0]:
        rows = np.vstack((rows, end))
    return ProgressCurve(rows[:, 0].copy(), rows[:, 1].copy(), rows[:, 2].copy())


def step_table(state: EngineState, first: int, last: int) -> StepTable:
    """Return the recorded compositions of rows ``first`` to ``last`` (excluded)."""
    ints, floats = state.log_int[first:last], state.log_float[first:last]
    return StepTable(
        num_seqs=ints[:, layout.LOG_NUM_SEQS],
        num_tokens=ints[:, layout.LOG_NUM_TOKENS],
        prefill_seqs=ints[:, layout.LOG_PREFILL_SEQS],
        prefill_tokens=ints[:, layout.LOG_PREFILL_TOKENS],
        prefill_pairs=floats[:, layout.LOG_PAIRS],
        context_tokens=floats[:, layout.LOG_CONTEXT],
        longest_tokens=floats[:, layout.LOG_LONGEST],
    )


def step_trace(state: EngineState) -> StepTrace:
    """Return everything recorded."""
    rows = int(state.Z[layout.ROWS])
    ints = state.log_int[:rows]

    def ends(column: int) -> NDArray[np.int64]:
        return np.concatenate((np.zeros(1, np.int64), ints[:, column]))

    return StepTrace(
        table=step_table(state, 0, rows),
        step=ints[:, layout.LOG_STEP],
        start_s=state.log_float[:rows, layout.LOG_START],
        seq_indptr=ends(layout.LOG_SEQ_END),
        seq_request=state.log_request[: state.Z[layout.LOG_SEQS]],
        seq_tokens=state.log_tokens[: state.Z[layout.LOG_SEQS]],
        preempted_indptr=ends(layout.LOG_PREEMPTED_END),
        preempted_request=state.log_preempted[: state.Z[layout.LOG_PREEMPTED]],
        finished_indptr=ends(layout.LOG_FINISHED_END),
        finished_request=state.log_finished[: state.Z[layout.LOG_FINISHED]],
        free_blocks=ints[:, layout.LOG_FREE],
    )


def _nothing(record_steps: bool, curve_points: int) -> EngineRun:
    """Return the run of no requests."""
    none, zero = np.zeros(0), np.zeros(0, np.int64)
    ends, few = np.zeros(1, np.int64), np.zeros(0, np.int32)
    table = StepTable(zero, zero, zero, zero, none, none, none)
    trace = StepTrace(table, zero, none, ends, few, few, ends, few, ends, few, zero)
    point = np.zeros(1)
    return EngineRun(
        finish_s=none,
        first_token_s=none,
        generated_tokens=zero,
        makespan_s=0.0,
        busy_s=0.0,
        num_steps=0,
        num_preemptions=0,
        peak_blocks=0,
        computed_tokens=0,
        curve=ProgressCurve(point, point, point) if curve_points else None,
        steps=trace if record_steps else None,
    )
