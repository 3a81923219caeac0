"""What the loop notes down on its way: steps and the progress curve."""

from __future__ import annotations

from typing import Any

from samullm_plugin.engine import layout as at
from samullm_plugin.engine.arrays import Array
from samullm_plugin.engine.jit import compiled


@compiled
def log_is_full(z: Array, log: Array, entries: Array, preempted: Array) -> Any:
    """Return whether the next step may not fit into the record."""
    if z[at.RECORD] == 0:
        return False
    if z[at.ROWS] >= len(log):
        return True
    return z[at.RECORD] == 2 and (
        z[at.LOG_SEQS] + z[at.MAX_SEQS] > len(entries)
        or z[at.LOG_PREEMPTED] + z[at.NUM_RUNNING] > len(preempted)
    )


@compiled
def log_step(
    log: Array,
    row: int,
    step: int,
    free: int,
    decode: int,
    prefill_seqs: int,
    prefill_tokens: int,
    pairs: float,
    context: float,
    longest: float,
    start: float,
) -> None:
    """Record the composition of a step."""
    log[row, at.LOG_STEP] = step
    log[row, at.LOG_NUM_SEQS] = decode + prefill_seqs
    log[row, at.LOG_NUM_TOKENS] = decode + prefill_tokens
    log[row, at.LOG_PREFILL_SEQS] = prefill_seqs
    log[row, at.LOG_PREFILL_TOKENS] = prefill_tokens
    log[row, at.LOG_FREE] = free
    log[row, at.LOG_START] = start
    log[row, at.LOG_PAIRS] = pairs
    log[row, at.LOG_CONTEXT] = context
    log[row, at.LOG_LONGEST] = longest


@compiled
def log_sequences(z: Array, seats: Array, entries: Array) -> None:
    """Record who is scheduled in the step at hand, in running order."""
    i = z[at.LOG_SEQS]
    s = z[at.HEAD]
    while s >= 0:
        state = seats[s, at.STATE]
        n = 0
        if state == at.DECODE:
            n = 1
        elif state == at.PREFILL:
            n = seats[s, at.CHUNK]
        if n > 0:
            entries[i, 0] = seats[s, at.REQUEST]
            entries[i, 1] = n
            i += 1
        s = seats[s, at.AFTER]
    z[at.LOG_SEQS] = i
    z[at.LOG_PREEMPTED] += z[at.STEP_PREEMPTED]


@compiled
def mark_curve(z: Array, f: Array, curve: Array) -> None:
    """Add a point to the progress curve; when it is full, drop every other one."""
    i = z[at.CURVE_COUNT]
    if i == len(curve) - 1:
        i = 0
        for j in range(0, z[at.CURVE_COUNT], 2):
            curve[i] = curve[j]
            i += 1
        z[at.CURVE_STRIDE] *= 2
    curve[i, 0] = f[at.CLOCK]
    curve[i, 1] = f[at.TOKENS]
    curve[i, 2] = f[at.PAIRS]
    z[at.CURVE_COUNT] = i + 1
    z[at.CURVE_NEXT] = z[at.ROWS] + z[at.CURVE_STRIDE]
