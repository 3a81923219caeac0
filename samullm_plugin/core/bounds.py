"""A lower bound on the simulated makespan of any plan whatsoever, for one length scenario.

Two arguments, both from the iteration latencies themselves:

* *Critical path*: an output token needs an iteration of its own request, no iteration is faster
  than the fastest possible one, and a request begins after its inputs and an engine start.
* *Device seconds*: the iterations of a node, over all its replicas and stages, cost at least what
  its tokens cost at the best batch; with the engine starts they must fit into makespan times
  devices.

A plan may mix parallel sizes within a node, so the device seconds per token, per iteration and per
token of context are each taken at their cheapest size.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from samullm_plugin.core.costs import ModeCosts
from samullm_plugin.core.engine.config import EngineConfig
from samullm_plugin.core.engine.latency import Floats, StepLatency
from samullm_plugin.core.problem import Problem
from samullm_plugin.core.scenarios import LengthScenario


@dataclass(frozen=True, slots=True)
class LowerBound:
    """The bound and its two parts.

    Attributes:
        value_s: the larger of the two.
        critical_path_s: by the longest chain of requests.
        device_s: by device seconds over devices.
    """

    value_s: float
    critical_path_s: float
    device_s: float


@dataclass(frozen=True, slots=True)
class _Work:
    """Totals of a node: what certainly has to be computed.

    Attributes:
        decode: output tokens after the first of each request.
        prefill: prompt tokens that no cache can hold.
        context: sum over decode tokens of the context they read.
        requests: requests taken.
        pairs: query-key pairs of the prompts.
    """

    decode: float
    prefill: float
    context: float
    requests: float
    pairs: float


def lower_bound(problem: Problem, scenario: LengthScenario) -> LowerBound:
    """Return a bound that no simulated plan of the problem beats in this scenario."""
    nodes = range(len(problem.app.nodes))
    total = sum(_device_seconds(problem, scenario, i) for i in nodes)
    device_s = total / problem.cluster.num_gpus
    path_s = _critical_path_s(problem, scenario)
    return LowerBound(max(device_s, path_s), path_s, device_s)


def _modes(problem: Problem, node: int) -> list[tuple[int, ModeCosts, EngineConfig]]:
    """Return devices per replica, costs and engine settings of every size that fits."""
    return [
        (
            key.tensor_parallel_size * key.pipeline_parallel_size,
            costs,
            problem.engine_config(node, costs),
        )
        for key, costs in problem.costs[node].items()
        if problem.fits(node, key)
    ]


def _work(problem: Problem, scenario: LengthScenario, node: int) -> _Work:
    outputs = scenario.output_tokens[node]
    taken = outputs > 0
    prompts = scenario.prompt_tokens[node][taken].astype(np.float64)
    decode = outputs[taken].astype(np.float64) - 1
    fresh = prompts
    if problem.app.nodes[node].model.engine.enable_prefix_caching:
        # Any full block may be found in the cache; the last token never is.
        block = problem.app.nodes[node].model.engine.block_size
        fresh = prompts - ((prompts - 1) // block) * block
    context = decode * prompts + decode * (decode + 1) / 2
    pairs = fresh * (fresh + 1) / 2
    return _Work(
        float(decode.sum()),
        float(fresh.sum()),
        float(context.sum()),
        float(taken.sum()),
        float(pairs.sum()),
    )


def _hull(values: Floats) -> list[tuple[float, float]]:
    """Return (intercept, slope) of lines that lie nowhere above ``values`` at 1, 2, ...

    Only lines with a non-negative intercept and slope, so that more iterations or more tokens
    never lower the bound; the flat line through the smallest value is always among them.
    """
    lines = [(max(0.0, float(values.min())), 0.0)]
    hull: list[int] = []
    for i in range(len(values)):
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            if (values[b] - values[a]) * (i - a) >= (values[i] - values[a]) * (b - a):
                hull.pop()
            else:
                break
        hull.append(i)
    for a, b in zip(hull, hull[1:], strict=False):
        slope = float(values[b] - values[a]) / (b - a)
        intercept = float(values[a]) - slope * (a + 1)
        if slope > 0 and intercept >= 0:
            lines.append((intercept, slope))
    slope = float((values / np.arange(1, len(values) + 1)).min())
    lines.append((0.0, max(0.0, slope)))
    return lines


def _tables(latency: StepLatency, config: EngineConfig) -> tuple[Floats, Floats]:
    """Return seconds by scheduled tokens and by sequences, at 1, 2, ..."""
    tokens = latency.by_tokens.table(config.max_num_batched_tokens)[1:]
    if latency.prefill_token_s < 0:  # prefill tokens are at most all scheduled tokens
        tokens = tokens + latency.prefill_token_s * np.arange(1, len(tokens) + 1)
    seqs = latency.by_seqs.table(config.max_num_seqs)[1:]
    if not latency.overlap_host:
        seqs = seqs + latency.host_by_seqs.table(config.max_num_seqs)[1:]
    return tokens, seqs


def _device_seconds(problem: Problem, scenario: LengthScenario, node: int) -> float:
    """Return device seconds the node certainly costs, one engine start included."""
    work = _work(problem, scenario, node)
    modes = _modes(problem, node)
    load = min(size * problem.load_s(costs) for size, costs, _ in modes)
    if work.requests == 0:
        return 0.0
    per_mode = [_unit_costs(size, costs, config) for size, costs, config in modes]
    best = 0.0
    # One choice of lines for all sizes gives costs per unit of work; the cheapest size of each
    # unit is what any mixture costs at least.
    for variant in range(max(len(v) for v in per_mode)):
        units = np.min([v[min(variant, len(v) - 1)] for v in per_mode], axis=0)
        amounts = (work.decode, work.prefill, work.context, work.requests, work.pairs)
        best = max(best, float(np.dot(units, amounts)))
    return load + best


def _unit_costs(size: int, costs: ModeCosts, config: EngineConfig) -> list[NDArray[np.float64]]:
    """Return device seconds per decode token, prefill token, context token, request and pair.

    Several variants, each valid: a line under the table of seconds by tokens, and what the number
    of iterations is bounded by (sequences at once, or KV-cache capacity).
    """
    latency = costs.latency
    if not isinstance(latency, StepLatency):
        return [np.zeros(5)]
    tokens, seqs = _tables(latency, config)
    capacity = (config.num_blocks - 1) * config.block_size
    seq_floor = float(seqs.min())
    seq_slope = max(0.0, float((seqs / np.arange(1, len(seqs) + 1)).min()))
    variants = []
    for intercept, slope in _hull(tokens):
        base = intercept + max(0.0, seq_floor)
        common = np.array(
            [
                slope,
                slope + max(0.0, latency.prefill_token_s),
                max(0.0, latency.context_token_s),
                0.0,
                max(0.0, latency.prefill_pair_s),
            ]
        )
        by_seqs = common + np.array([base / config.max_num_seqs, 0, 0, 0, 0])
        by_memory = common + np.array([0, 0, base / capacity, 0, 0])
        by_rows = common + np.array(
            [intercept / config.max_num_seqs + seq_slope, 0, 0, seq_slope, 0]
        )
        variants += [by_seqs, by_memory, by_rows]
    return [size * v for v in variants]


def _critical_path_s(problem: Problem, scenario: LengthScenario) -> float:
    """Return when the last request can finish at the earliest, devices being unlimited."""
    app = problem.app
    finish: list[Floats] = [np.empty(0)] * len(app.nodes)
    for i in app.order:
        table = app.nodes[i].requests
        modes = _modes(problem, i)
        load = min(problem.load_s(costs) for _, costs, _ in modes)
        alone = np.min([_alone_s(scenario, i, c.latency, e) for _, c, e in modes], axis=0)
        taken = scenario.output_tokens[i] > 0
        ready = np.where(taken, load, 0.0)
        own = table.input_node == i
        outside = np.flatnonzero(~own)
        rows = table.input_row
        for source in np.unique(table.input_node[outside]):
            part = outside[table.input_node[outside] == source]
            np.maximum.at(ready, rows[part], finish[source][table.input_request[part]])
        finish[i] = ready + np.where(taken, alone, 0.0)
        for r, q in zip(rows[own], table.input_request[own], strict=True):  # earlier ones first
            start = max(ready[r], finish[i][q])
            finish[i][r] = max(finish[i][r], start + (alone[r] if taken[r] else 0.0))
    return float(max(f.max() for f in finish))


def _alone_s(
    scenario: LengthScenario, node: int, latency: object, config: EngineConfig
) -> Floats:
    """Return the least seconds of each request with an engine for itself, shape ``(n,)``."""
    prompts = scenario.prompt_tokens[node].astype(np.float64)
    outputs = scenario.output_tokens[node].astype(np.float64)
    if not isinstance(latency, StepLatency):
        return np.zeros(len(prompts))
    tokens, seqs = _tables(latency, config)
    step = max(0.0, float(tokens.min())) + max(0.0, float(seqs.min()))
    per_context = max(latency.context_token_s, latency.longest_token_s, 0.0)
    decode = np.maximum(outputs - 1, 0)
    context = decode * prompts + decode * (decode + 1) / 2
    prefill_steps = 1.0 if config.enable_prefix_caching else np.ceil(
        prompts / config.max_num_batched_tokens
    )
    return np.asarray((prefill_steps + decode) * step + per_context * context)
