"""Simulate one engine replica, step for step as vLLM's scheduler runs it."""

from __future__ import annotations

import math
from collections import namedtuple
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samullm_plugin.engine import records as at
from samullm_plugin.engine.external_latency import ExternalRun, step_table
from samullm_plugin.engine.initial_state import make_state
from samullm_plugin.engine.state import EngineState
from samullm_plugin.engine.workload import (
    EngineRun,
    NeverFitsError,
    ProgressCurve,
    StepTrace,
    Workload,
    check_workload,
)
from samullm_plugin.errors import InputError
from samullm_plugin.model.engine_config import EngineConfig
from samullm_plugin.model.latency import StepLatency, StepModel, StepTable
from samullm_plugin.model.types import Floats, Ints

Values = namedtuple("Values", at.STATE.names or ())  # type: ignore[misc]  # a dtype's names
"""The state's one row as plain numbers, read at once."""

CHECKED_VLLM_VERSIONS = ("0.32.0", "0.33.0")
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
        latency: seconds of iterations, with pipeline parallelism of one stage of them. A
            :class:`StepLatency` is evaluated inside the compiled
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
    if inside is None and config.pipeline_parallel_size > 1:
        raise InputError(
            "engine: pipeline_parallel_size above 1 needs a StepLatency: the seconds of one stage"
        )
    record = at.ALL_SEQUENCES if record_steps else int(inside is None)
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
            external = ExternalRun(state, workload, latency, stop_s, release_delay_s, reserve_log)
            why = external.run()
            state = external.state
            tell_seconds(external)
        if why != at.NOT_PRIVATE:
            break
    return finished_run(state, why, curve_points, record_steps)


def tell_seconds(run: ExternalRun) -> None:
    """Turn all moments of a run counted in steps into seconds."""
    state = run.state
    rows = int(state.s.rows)
    for name in ("finish", "first_token"):
        state.requests[name] = run.seconds(state.requests[name])
    points = state.curve[: state.s.curve_count]
    points["time"] = run.seconds(points["time"])
    state.log["start"][:rows] = run.starts[:rows]
    state.s.clock = run.ends[rows]
    state.s.busy = float((run.ends[1 : rows + 1] - run.starts[:rows]).sum())


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
    s, log = state.s, state.log
    seqs = int(s.max_num_seqs)
    if len(log) == 0:
        tokens = int(state.requests["output_tokens"].sum())
        prompts = int(state.requests["prompt_tokens"].sum())
        rows = 2 * (tokens + prompts) // min(seqs, len(state.requests)) + 1024
        sequences = tokens + len(state.requests) + rows + seqs
        preempted = 1024 + seqs
    else:
        rows, sequences, preempted = 2 * len(log), 2 * len(state.entries), 2 * len(state.preempted)
    if s.rows >= len(log):
        state.log = _grown(log, rows)
    if s.record == at.ALL_SEQUENCES:
        if s.logged_seqs + seqs > len(state.entries):
            state.entries = _grown(state.entries, sequences)
        if s.logged_preempted + s.num_running >= len(state.preempted):
            state.preempted = _grown(state.preempted, preempted)


def finished_run(state: EngineState, why: int, curve_points: int, record_steps: bool) -> EngineRun:
    """Read the result off the arrays.

    Raises:
        NeverFitsError: the loop stopped for that.
        InputError: requests are left that wait for each other.
    """
    s: Any = Values(*state.s.item())
    requests = state.requests
    finish = requests["finish"].copy()
    if why == at.DONE and s.num_unfinished > 0:
        i = int(np.argmax(requests["num_predecessors"] > 0))
        raise InputError(f"request {i} waits for requests that wait for it: break the cycle")
    generated = requests["generated"].copy()
    if state.queue is not None:
        generated += state.queue.tracks["sampling"]
    else:
        decoding = state.slots[state.slots["state"] == at.DECODE]
        request = decoding["request"]
        left = decoding["target"] - s.decode_step
        generated[request] = requests["output_tokens"][request] - left
    done = finish[np.isfinite(finish)]
    makespan_s = float(done.max()) if len(done) else 0.0
    columns = finish, requests["first_token"].copy(), generated
    curve = state.curve if curve_points else None
    run = run_of(s, columns, makespan_s, curve, step_trace(state) if record_steps else None)
    if why == at.NEVER_FITS:
        raise NeverFitsError(s.misfit_request, s.misfit_blocks, s.usable_blocks, run)
    return run


def run_of(
    s: Any,
    columns: tuple[Floats, Floats, Ints],
    makespan_s: float,
    curve: at.Array | None,
    steps: StepTrace | None = None,
) -> EngineRun:
    """Return a result.

    Args:
        s: the state's values.
        columns: when each request finished, when its first token was there, generated tokens.
        makespan_s: when the last finished request finished.
        curve: the progress curve, if asked for.
        steps: every step, if asked for.
    """
    finish_s, first_token_s, generated = columns
    return EngineRun(
        finish_s=finish_s,
        first_token_s=first_token_s,
        generated_tokens=generated,
        makespan_s=makespan_s,
        busy_s=s.busy,
        num_steps=s.rows,
        num_preemptions=s.num_preemptions,
        peak_blocks=s.peak_blocks,
        computed_tokens=s.computed_tokens,
        cached_tokens=s.cached_tokens,
        curve=None if curve is None else _curve(curve, s),
        steps=steps,
    )


def _curve(curve: at.Array, s: Any) -> ProgressCurve:
    points = curve[: s.curve_count]
    columns = [points[name] for name in ("time", "tokens", "pairs")]
    if s.rows > 0 and columns[0][-1] < s.clock:
        ends = (s.clock, s.first_tokens, s.first_pairs)
        return ProgressCurve(*(np.append(c, e) for c, e in zip(columns, ends, strict=True)))
    return ProgressCurve(*(c.copy() for c in columns))


def step_trace(state: EngineState) -> StepTrace:
    """Return everything recorded."""
    s = state.s
    log = state.log[: s.rows]
    entries = state.entries[: s.logged_seqs]

    def starts(name: str) -> Ints:
        return np.concatenate((np.zeros(1, np.int64), log[name]))

    return StepTrace(
        table=step_table(log),
        step=log["step"].copy(),
        start_s=log["start"].copy(),
        seq_indptr=starts("seq_end"),
        seq_request=entries["request"].copy(),
        seq_tokens=entries["tokens"].copy(),
        preempted_indptr=starts("preempted_end"),
        preempted_request=state.preempted[: s.logged_preempted],
        finished_indptr=starts("finished_end"),
        finished_request=state.requests["finished"][: s.logged_finished].astype(np.int32),
        free_blocks=log["free_blocks"].copy(),
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
