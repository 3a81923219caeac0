"""Replicas of one model, simulated with arrays that are made and read for all of them at once.

Each runs as :func:`samullm_plugin.engine.simulate.simulate_engine` runs it. What Python does before
and after the compiled loop takes longer than the loop where replicas have few requests each.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from samullm_plugin.engine import records as at
from samullm_plugin.engine.initial_state import (
    LEAST_CURVE,
    NO_BLOCKS,
    first_state,
    latency_arrays,
    may_share,
    no_phases,
)
from samullm_plugin.engine.jit import announced_compilation
from samullm_plugin.engine.loop import advance
from samullm_plugin.engine.simulate import Values, run_of
from samullm_plugin.engine.workload import FURTHEST_S, EngineRun, Workload
from samullm_plugin.model.engine_config import EngineConfig
from samullm_plugin.model.latency import StepLatency
from samullm_plugin.model.types import Floats, Ints


def is_simple(config: EngineConfig, workload: Workload) -> bool:
    """Return whether :func:`simulate_replicas` can run a workload: what most plans ask for."""
    return (
        config.is_plain
        and config.scheduling_policy == "fcfs"
        and len(workload) > 0
        and workload.arrival_step is None
        and workload.release_index is None
        and not (config.enable_prefix_caching and may_share(workload))
    )


def simulate_replicas(
    config: EngineConfig,
    workloads: Sequence[Workload],
    latency: StepLatency,
    *,
    stop_s: float,
    curve_points: int,
) -> list[EngineRun | None]:
    """Return what each replica does.

    Args:
        config: scheduler settings of all of them.
        workloads: one per replica, each :func:`is_simple`; arrivals for all or for none.
        latency: seconds of iterations.
        stop_s: iterations that end by then count.
        curve_points: most points of the progress curves; 0 for none.

    Returns:
        By replica; None for one that has to be simulated alone, to say what is wrong with it or to
        tell its KV blocks apart.
    """
    prompt = np.concatenate([w.prompt_tokens for w in workloads])
    output = np.concatenate([w.output_tokens for w in workloads])
    timed = [w.arrival_s for w in workloads if w.arrival_s is not None]
    arrival_s = np.concatenate(timed) if timed else None
    counts = np.array([len(w) for w in workloads])
    if _is_wrong(config, prompt, output, arrival_s, curve_points):
        return [None] * len(workloads)
    output = np.minimum(output, config.max_model_len - prompt)
    requests, ends = _requests(prompt, output, arrival_s, counts), np.cumsum(counts)
    begins = ends - counts
    seqs = np.minimum(config.max_num_seqs, counts)
    slot_ends = np.cumsum(seqs)
    slots = np.zeros(int(slot_ends[-1]), at.SLOT)
    slots["free_slot"] = np.repeat(slot_ends, seqs) - 1 - np.arange(len(slots))
    longest = np.maximum.reduceat(output, begins).tolist()
    wheels = np.array([1 << n.bit_length() for n in longest])
    wheel_ends = np.cumsum(wheels)
    finish_wheel = np.full(int(wheel_ends[-1]), -1, np.int64)
    caching = at.PRIVATE_BLOCKS if config.enable_prefix_caching else at.NO_CACHING
    states = np.tile(first_state(config, caching), len(counts)).view(at.STATE)
    states["num_free_slots"], states["num_unfinished"] = seqs, counts
    states["num_arrivals"], states["wheel_mask"] = counts, wheels - 1
    states["curve_points"] = curve_points if curve_points >= LEAST_CURVE else 0
    states["stop"] = stop_s
    phases = np.tile(no_phases(config.block_size), (len(counts), 1)).view(at.PHASE)
    curves = np.zeros((len(counts), max(curve_points, 1)), at.POINT)
    scalars, tables = latency_arrays(latency, config.max_num_batched_tokens, config.max_num_seqs)
    log, entries = np.zeros(0, at.LOG), np.zeros(0, at.SCHEDULED)
    preempted = np.zeros(0, np.int32)
    whys = []
    with announced_compilation(advance):
        for k, (a, b) in enumerate(zip(begins.tolist(), ends.tolist(), strict=True)):
            slot, wheel = slot_ends[k], wheel_ends[k]
            why = advance(
                states[k],
                requests[a:b],
                slots[slot - seqs[k] : slot],
                finish_wheel[wheel - wheels[k] : wheel],
                phases[k],
                np.zeros((2, b - a + 1), np.int64),
                *NO_BLOCKS,
                scalars,
                tables,
                curves[k],
                log,
                entries,
                preempted,
            )
            whys.append(why)
    generated = _generated(requests, slots, states, begins, seqs)
    finish_s, first_token_s = requests["finish"].copy(), requests["first_token"].copy()
    done_s = np.where(np.isfinite(finish_s), finish_s, 0.0)
    makespan_s = np.maximum.reduceat(done_s, begins).tolist()
    found: list[EngineRun | None] = []
    for k, row in enumerate(states.tolist()):
        if whys[k] not in (at.DONE, at.STOPPED):
            found.append(None)
            continue
        mine = slice(begins[k], ends[k])
        columns = finish_s[mine], first_token_s[mine], generated[mine]
        curve = curves[k] if curve_points else None
        found.append(run_of(Values(*row), columns, makespan_s[k], curve))
    return found


def _is_wrong(
    config: EngineConfig, prompt: Ints, output: Ints, arrival_s: Floats | None, curve_points: int
) -> bool:
    """Return whether some replica's workload has to be refused."""
    return bool(
        len(prompt) != len(output)
        or prompt.min() < 1
        or output.min() < 1
        or prompt.max() >= config.max_model_len
        or curve_points == 1
        or curve_points < 0
        or (
            arrival_s is not None
            and (len(arrival_s) != len(prompt) or not (np.abs(arrival_s) <= FURTHEST_S).all())
        )
    )


def _requests(prompt: Ints, output: Ints, arrival_s: Floats | None, counts: Ints) -> at.Array:
    """Return the requests of all replicas, one after another."""
    requests = np.zeros(len(prompt), at.REQUEST)
    requests["prompt_tokens"], requests["output_tokens"] = prompt, output
    requests["finish"] = requests["first_token"] = np.inf
    owner = np.repeat(np.arange(len(counts)), counts)
    place = np.arange(len(prompt)) - np.repeat(np.cumsum(counts) - counts, counts)
    requests["arriving"] = place
    if arrival_s is not None:
        order = np.lexsort((arrival_s, owner))
        requests["arrival"] = arrival_s
        requests["arriving"], requests["arrival_key"] = place[order], arrival_s[order]
    return requests


def _generated(
    requests: at.Array, slots: at.Array, states: at.Array, begins: Ints, seqs: Ints
) -> Ints:
    """Return the output tokens that each request has generated."""
    generated: Ints = requests["generated"].copy()
    decoding = slots["state"] == at.DECODE
    if decoding.any():
        owner = np.repeat(np.arange(len(seqs)), seqs)[decoding]
        request = slots["request"][decoding] + begins[owner]
        left = slots["target"][decoding] - states["decode_step"][owner]
        generated[request] = requests["output_tokens"][request] - left
    return generated
