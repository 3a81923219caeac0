"""Simulate one engine replica, step for step as vLLM's scheduler runs it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samullm_plugin.engine import layout as at
from samullm_plugin.engine.check import NeverFitsError, check_workload
from samullm_plugin.engine.outside import OutsideRun, step_table
from samullm_plugin.engine.state import EngineState, make_state
from samullm_plugin.engine.workload import EngineRun, ProgressCurve, StepTrace, Workload
from samullm_plugin.errors import InputError
from samullm_plugin.model.engine_config import EngineConfig
from samullm_plugin.model.latency import StepLatency, StepModel, StepTable
from samullm_plugin.model.types import Ints

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
    inside = latency if isinstance(latency, StepLatency) else None
    record = 2 if record_steps else int(inside is None)
    for tell_blocks_apart in (False, True):
        state = make_state(
            config,
            workload,
            inside,
            stop_s=stop_s,
            record=record,
            curve_points=curve_points,
            release_delay_s=release_delay_s,
            tell_blocks_apart=tell_blocks_apart,
        )
        if record:
            reserve_log(state)
        if inside is not None:
            why = run_state(state)
        else:
            outside = OutsideRun(state, workload, latency, stop_s, release_delay_s, reserve_log)
            why = outside.run()
            state = outside.state
            tell_seconds(outside)
        if why != at.NOT_A_PREFIX:
            break
    return finished_run(state, why, curve_points, record_steps)


def tell_seconds(outside: OutsideRun) -> None:
    """Turn all moments of a run counted in steps into seconds."""
    state = outside.state
    rows = int(state.z[at.ROWS])
    for column in (at.FINISH, at.FIRST_TOKEN):
        state.times[:, column] = outside.seconds(state.times[:, column])
    points = state.curve[: state.z[at.CURVE_COUNT]]
    points[:, 0] = outside.seconds(points[:, 0])
    state.log[:rows, at.LOG_START] = outside.starts[:rows]
    state.f[at.CLOCK] = outside.ends[rows]
    state.f[at.BUSY] = float((outside.ends[1 : rows + 1] - outside.starts[:rows]).sum())


def run_state(state: EngineState) -> int:
    """Advance ``state``, enlarging its record when it is full; return why it stopped."""
    why = state.advance()
    while why == at.LOG_FULL:
        reserve_log(state)
        why = state.advance()
    return why


def _grown(array: NDArray[Any], rows: int) -> NDArray[Any]:
    result = np.empty((rows, *array.shape[1:]), array.dtype)
    result[: len(array)] = array
    return result


def reserve_log(state: EngineState) -> None:
    """Make room in the record of steps: first for what the lengths suggest, then twice as much."""
    z, log = state.z, state.log
    seqs = int(z[at.MAX_SEQS])
    if len(log) == 0:
        tokens = int(state.requests[:, at.OUTPUT].sum())
        prompts = int(state.requests[:, at.PROMPT].sum())
        rows = 2 * (tokens + prompts) // min(seqs, len(state.requests)) + 1024
        sequences = tokens + len(state.requests) + rows + seqs
        preempted = 1024 + seqs
    else:
        rows, sequences, preempted = 2 * len(log), 2 * len(state.entries), 2 * len(state.preempted)
    if z[at.ROWS] >= len(log):
        state.log = _grown(log, rows)
    if z[at.RECORD] == 2:
        if z[at.LOG_SEQS] + seqs > len(state.entries):
            state.entries = _grown(state.entries, sequences)
        if z[at.LOG_PREEMPTED] + z[at.NUM_RUNNING] >= len(state.preempted):
            state.preempted = _grown(state.preempted, preempted)


def finished_run(state: EngineState, why: int, curve_points: int, record_steps: bool) -> EngineRun:
    """Read the result off the arrays.

    Raises:
        NeverFitsError: the loop stopped for that.
        InputError: requests are left that wait for each other.
    """
    z, f = state.z, state.f
    finish = state.times[:, at.FINISH].copy()
    if why == at.DONE and z[at.UNFINISHED] > 0:
        i = int(np.argmax(state.requests[:, at.PREDECESSORS] > 0))
        raise InputError(f"request {i} waits for requests that wait for it: break the cycle")
    generated = state.requests[:, at.GENERATED].copy()
    seats = state.seats
    decoding = seats[seats[:, at.STATE] == at.DECODE]
    request = decoding[:, at.REQUEST]
    left = decoding[:, at.TARGET] - z[at.TICK]
    generated[request] = state.requests[request, at.OUTPUT] - left
    done = finish[np.isfinite(finish)]
    run = EngineRun(
        finish_s=finish,
        first_token_s=state.times[:, at.FIRST_TOKEN].copy(),
        generated_tokens=generated,
        makespan_s=float(done.max()) if len(done) else 0.0,
        busy_s=float(f[at.BUSY]),
        num_steps=int(z[at.ROWS]),
        num_preemptions=int(z[at.PREEMPTIONS]),
        peak_blocks=int(z[at.PEAK_BLOCKS]),
        computed_tokens=int(z[at.COMPUTED]),
        cached_tokens=int(z[at.CACHED]),
        curve=_curve(state, curve_points) if curve_points else None,
        steps=step_trace(state) if record_steps else None,
    )
    if why == at.NEVER_FITS:
        raise NeverFitsError(int(z[at.BAD_REQUEST]), int(z[at.BAD_BLOCKS]), int(z[at.USABLE]), run)
    return run


def _curve(state: EngineState, points: int) -> ProgressCurve:
    z, f = state.z, state.f
    count = int(z[at.CURVE_COUNT])
    rows = state.curve[:count]
    end = (f[at.CLOCK], f[at.TOKENS], f[at.PAIRS])
    if z[at.ROWS] > 0 and rows[-1, 0] < end[0]:
        rows = np.vstack((rows, end))
    return ProgressCurve(rows[:, 0].copy(), rows[:, 1].copy(), rows[:, 2].copy())


def step_trace(state: EngineState) -> StepTrace:
    """Return everything recorded."""
    z = state.z
    log = state.log[: z[at.ROWS]]

    def starts(column: int) -> Ints:
        return np.concatenate((np.zeros(1), log[:, column])).astype(np.int64)

    return StepTrace(
        table=step_table(log),
        step=log[:, at.LOG_STEP].astype(np.int64),
        start_s=log[:, at.LOG_START].copy(),
        seq_indptr=starts(at.LOG_SEQ_END),
        seq_request=state.entries[: z[at.LOG_SEQS], 0],
        seq_tokens=state.entries[: z[at.LOG_SEQS], 1],
        preempted_indptr=starts(at.LOG_PREEMPTED_END),
        preempted_request=state.preempted[: z[at.LOG_PREEMPTED]],
        finished_indptr=starts(at.LOG_FINISHED_END),
        finished_request=state.requests[: z[at.LOG_FINISHED], at.FINISHED_REQUEST].astype(np.int32),
        free_blocks=log[:, at.LOG_FREE].astype(np.int64),
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
