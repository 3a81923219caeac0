"""A lower bound on the simulated makespan of any plan whatsoever, for one length scenario.

Two arguments, both from the iteration latencies themselves:

* *Critical path*: an output token needs an iteration of its own request, no iteration is faster
  than the fastest possible one, and a request begins after its inputs and an engine start.
* *Device seconds*: the iterations of a node, over all its replicas and stages, cost at least what
  its tokens cost at the best batch, and are at least as many as its longest chain of requests has
  output tokens; with the engine starts they must fit into makespan times devices
  (:mod:`samullm_plugin.rules.packing`).

A plan may mix parallel sizes within a node, so the device seconds per token, per iteration and per
token of context are each taken at their cheapest size. It may also preempt a request at any moment:
then one decode step is replaced by a prefill of everything so far, which may be the cheaper of the
two where reading context is dear.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np

from samullm_plugin.model.application import PythonNode
from samullm_plugin.model.costs import ModeCosts
from samullm_plugin.model.engine_config import EngineConfig
from samullm_plugin.model.latency import StepLatency
from samullm_plugin.model.problem import ModeKey, Problem
from samullm_plugin.model.scenarios import LengthScenario
from samullm_plugin.model.types import Floats
from samullm_plugin.rules.packing import Demand, fitting_s
from samullm_plugin.rules.transition import Running

MIXED = 1 / 16
"""Weight of the steepest line in the mixed ones."""


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
        longest: output tokens of the longest chain of requests that follow one another.
    """

    decode: float
    prefill: float
    context: float
    requests: float
    pairs: float
    longest: float

    @property
    def amounts(self) -> tuple[float, ...]:
        """Return the totals in the order of :func:`_unit_costs`."""
        return (
            self.decode,
            self.prefill,
            self.context,
            self.requests,
            self.pairs,
            self.longest,
        )


def lower_bound(
    problem: Problem,
    scenario: LengthScenario,
    running: Mapping[str, tuple[Running, float]] | None = None,
) -> LowerBound:
    """Return a bound that no simulated plan of the problem beats in this scenario.

    Args:
        problem: the instance.
        scenario: lengths.
        running: engines that run when plans begin, and in how many seconds they are ready: their
            nodes need no start, and those ready before 0 have done that much of their work.
    """
    ahead = {
        problem.app.index(name): (max(0.0, -ready_s), len(engine.devices))
        for name, (engine, ready_s) in (running or {}).items()
    }
    engine_of = problem.engine_numbers
    numbers = {engine_of[i] for i in ahead}  # of engines that are there
    started = {i for i, k in enumerate(engine_of) if k in numbers}
    demands = []
    for i in range(len(problem.app.nodes)):
        demand = _device_seconds(problem, scenario, i)
        if demand is not None and i in ahead:
            done_s, devices = ahead[i]
            demand = Demand(max(0.0, demand.work - done_s * devices), 0.0, 0.0, 0.0)
        elif demand is not None and engine_of[i] in numbers:
            demand = Demand(demand.work, 0.0, 0.0, 0.0)  # it may take over another's engines
        if demand is not None:
            numbers.add(engine_of[i])
            demands.append(demand)
    device_s = fitting_s(demands, problem.cluster.num_gpus)
    work_s = {i: seconds for i, (seconds, _) in ahead.items()}
    path_s = _critical_path_s(problem, scenario, work_s, started)
    return LowerBound(max(device_s, path_s), path_s, device_s)


def _modes(problem: Problem, node: int) -> list[tuple[int, ModeCosts, EngineConfig]]:
    """Return devices per replica, costs and engine settings of every size that fits."""
    return [
        (
            key.tensor_parallel_size * key.pipeline_parallel_size,
            costs,
            problem.engine_config(node, costs, key.pipeline_parallel_size),
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
        _longest_tokens(problem, scenario, node),
    )


def _longest_tokens(problem: Problem, scenario: LengthScenario, node: int) -> float:
    """Return the most output tokens of requests of a node that follow one another."""
    table, model = problem.app.nodes[node].requests, problem.app.nodes[node].model
    room = np.maximum(model.max_model_len - scenario.prompt_tokens[node], 0)
    tokens = np.minimum(scenario.output_tokens[node], room).astype(np.float64)
    own = table.input_node == node
    if own.any():
        so_far = tokens.tolist()
        rows, befores = table.input_row[own].tolist(), table.input_request[own].tolist()
        most = np.zeros(len(so_far)).tolist()
        for r, q in zip(rows, befores, strict=True):  # earlier ones first
            if so_far[r] > 0 and so_far[q] > 0:
                most[r] = max(most[r], so_far[q] + most[q])
        tokens += most
    return float(tokens.max(initial=0.0))


def _hull(values: Floats, knots: tuple[float, ...]) -> list[tuple[float, float]]:
    """Return (intercept, slope) of lines that lie nowhere above ``values`` at 1, 2, ...

    ``values`` is linear between ``knots``. Only lines with a non-negative intercept and slope, so
    that more iterations or more tokens never lower the bound; the flat line through the smallest
    value is always among them.
    """
    lines = [(max(0.0, float(values.min())), 0.0)]
    hull: list[int] = []
    around = {int(f(k)) - 1 for k in knots for f in (np.floor, np.ceil)}
    corners = sorted({0, len(values) - 1} | {i for i in around if 0 <= i < len(values)})
    for i in corners:
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            if (values[b] - values[a]) * (i - a) >= (values[i] - values[a]) * (b - a):
                hull.pop()
            else:
                break
        hull.append(i)
    for a, b in pairwise(hull):
        slope = float(values[b] - values[a]) / (b - a)
        intercept = float(values[a]) - slope * (a + 1)
        if slope > 0 and intercept >= 0:
            lines.append((intercept, slope))
    steepest = max(0.0, float((values / np.arange(1, len(values) + 1)).min()))
    # A little of the steepest makes up for context that recomputation may save.
    mixed = [(a * (1 - MIXED), b * (1 - MIXED) + steepest * MIXED) for a, b in lines]
    return [*lines, *mixed, (0.0, steepest)]


@dataclass(frozen=True, slots=True)
class _IterationParts:
    """Seconds of the parts of an iteration, at 1, 2, ... tokens or sequences.

    Attributes:
        tokens: device seconds by scheduled tokens, what prefills may save taken off.
        seqs: device seconds by sequences.
        host: host seconds by sequences that are not hidden behind the device.
        launch: least device seconds of any iteration.
    """

    tokens: Floats
    seqs: Floats
    host: Floats
    launch: float


def _tables(latency: StepLatency, config: EngineConfig) -> _IterationParts:
    tokens = latency.by_tokens.table(config.max_num_batched_tokens)[1:]
    credit = min(0.0, latency.prefill_token_s) + min(0.0, latency.prefill_seq_s)
    if credit < 0:  # prefill tokens and sequences are at most all scheduled tokens
        tokens = tokens + credit * np.arange(1, len(tokens) + 1)
    tokens = tokens + min(0.0, latency.prefill_step_s)
    seqs = latency.by_seqs.table(config.max_num_seqs)[1:]
    host = latency.host_by_seqs.table(config.max_num_seqs)[1:]
    if latency.overlap_host:
        host = np.zeros_like(host)
    launch = max(0.0, min(latency.launch_s, latency.prefill_launch_s))
    return _IterationParts(tokens, seqs, host, launch)


def _device_seconds(problem: Problem, scenario: LengthScenario, node: int) -> Demand | None:
    """Return what the node certainly costs, or None if none of its requests is needed."""
    work = _work(problem, scenario, node)
    modes = _modes(problem, node)
    if work.requests == 0:
        return None
    per_mode = [
        _unit_costs(size, costs.latency, config)
        if isinstance(costs.latency, StepLatency)
        else [np.zeros(6)]  # nothing is known of another model's least iteration
        for size, costs, config in modes
    ]
    best = 0.0
    # One choice of lines for all sizes gives costs per unit of work; the cheapest size of each
    # unit is what any mixture costs at least.
    for variant in range(max(len(v) for v in per_mode)):
        units = np.min([v[min(variant, len(v) - 1)] for v in per_mode], axis=0)
        best = max(best, float(np.dot(units, work.amounts)))
    one_start = min(size * problem.least_start_s(costs) for size, costs, _ in modes)
    return Demand(
        best,
        one_start,
        min(problem.least_start_s(costs) for _, costs, _ in modes),
        min(problem.first_ready_s(node, costs) for _, costs, _ in modes),
    )


@lru_cache(maxsize=1024)
def _unit_costs(size: int, latency: StepLatency, config: EngineConfig) -> list[Floats]:
    """Return device seconds per decode token, prefill token, context token, request and pair.

    And, last, per output token of the longest chain. Several variants, each valid: a line under the
    table of seconds by tokens, and what the number of iterations is bounded by (sequences at once,
    KV-cache capacity, or the longest chain: each of its output tokens is one of another iteration).
    """
    tables = _tables(latency, config)
    per_row = np.arange(1, len(tables.seqs) + 1)
    both = tables.seqs + tables.host
    seq_floor = max(0.0, float(both.min()))
    seq_slope = max(0.0, float((both / per_row).min()))
    launch = tables.launch + max(0.0, float(tables.host.min()))
    capacity = (config.num_blocks - 1) * config.block_size
    caching = config.enable_prefix_caching
    variants = []

    def add(intercept: float, units: Floats) -> None:
        """Add ``units`` with ``intercept`` per iteration, by each bound on their number."""
        variants.append(units + np.array([intercept / config.max_num_seqs, 0, 0, 0, 0, 0]))
        variants.append(units + np.array([0, 0, 0, 0, 0, intercept]))
        if not caching:  # cached blocks count for several sequences at once
            variants.append(units + np.array([0, 0, intercept / capacity, 0, 0, 0]))

    add(launch, np.zeros(6))
    for intercept, slope in _hull(tables.tokens, latency.by_tokens.knots):
        prefill_token_s = slope + max(0.0, latency.prefill_token_s)
        prefill_pair_s = max(0.0, latency.prefill_pair_s)
        # A request that is resumed with n tokens computes n - 1 that were computed before (n >= 2)
        # instead of reading n; of cached ones it makes n pairs.
        resumed_s = prefill_pair_s if caching else prefill_token_s / 2 + prefill_pair_s
        context_s = max(0.0, min(latency.context_token_s, resumed_s))
        prefill_seq_s = max(0.0, latency.prefill_seq_s)
        units = np.array([slope, prefill_token_s, context_s, prefill_seq_s, prefill_pair_s, 0.0])
        add(intercept + seq_floor, units)
        per_seq = units + np.array([seq_slope, 0, 0, seq_slope, 0, 0])
        add(intercept, per_seq)
    return [size * v for v in variants]


def _critical_path_s(
    problem: Problem,
    scenario: LengthScenario,
    ahead_s: Mapping[int, float],
    started: Container[int],
) -> float:
    """Return when the last request can finish at the earliest, devices being unlimited.

    Args:
        problem: the instance.
        scenario: lengths.
        ahead_s: by index of a node whose engines run, the seconds of work they have done.
        started: nodes that may be served by engines which run.
    """
    app = problem.app
    finish: list[Floats] = [np.empty(0)] * len(app.all_nodes)
    for i in app.full_order:
        node, table = app.all_nodes[i], app.all_nodes[i].requests
        taken = scenario.output_tokens[i] > 0
        if isinstance(node, PythonNode):
            load, alone = 0.0, np.where(np.arange(len(table)) < node.num_calls, node.seconds, 0.0)
        else:
            modes = _modes(problem, i)
            load = min(problem.first_ready_s(i, costs) for _, costs, _ in modes)
            alone = np.min([_alone_s(scenario, i, c.latency, e) for _, c, e in modes], axis=0)
            if i in started:
                load, alone = 0.0, np.maximum(alone - ahead_s.get(i, 0.0), 0.0)
        ready = np.where(taken, load, 0.0)
        own = table.input_node == i
        outside = np.flatnonzero(~own)
        rows = table.input_row
        for source in np.unique(table.input_node[outside]):
            part = outside[table.input_node[outside] == source]
            np.maximum.at(ready, rows[part], finish[source][table.input_request[part]])
        finish[i] = ready + np.where(taken, alone, 0.0)
        for r, q in zip(rows[own], table.input_request[own], strict=True):  # earlier ones first
            if taken[r] and taken[q]:
                start = max(ready[r], finish[i][q])
                finish[i][r] = max(finish[i][r], start + alone[r])
    return float(max(f.max() for f in finish))


def _alone_s(scenario: LengthScenario, node: int, latency: object, config: EngineConfig) -> Floats:
    """Return the least seconds of each request with an engine for itself, shape ``(n,)``."""
    prompts = scenario.prompt_tokens[node]
    outputs = scenario.output_tokens[node]
    if not isinstance(latency, StepLatency):
        return np.zeros(len(prompts))
    step_s: Floats = _least_step_s(latency, config)
    so_far = np.concatenate(([0.0], np.cumsum(step_s)))  # at n: the steps of lengths 1 to n
    decode = np.maximum(outputs - 1, 0)
    prefill_steps = (
        1.0 if config.enable_prefix_caching else np.ceil(prompts / config.max_num_batched_tokens)
    )
    ends = np.minimum(prompts + decode, len(step_s))
    generate_s = so_far[ends] - so_far[np.minimum(prompts, ends)]
    return np.asarray(prefill_steps * step_s[0] + generate_s)


@lru_cache(maxsize=1024)
def _least_step_s(latency: StepLatency, config: EngineConfig) -> Floats:
    """Return the least seconds of an iteration that lengthens a sequence, by its length.

    At ``n - 1``: the sequence has ``n`` tokens including the one computed; it decodes, or it was
    preempted and is computed anew. Shape ``(max_model_len,)``, not decreasing.
    """
    tables = _tables(latency, config)
    lengths = np.arange(1, config.max_model_len + 1)
    lone_s = latency.longest_token_s if latency.longest_over_seqs < 1 else 0.0
    read_s = max(latency.context_token_s, lone_s, 0.0) * lengths
    least = np.minimum.accumulate(tables.tokens[::-1])[::-1]  # of at least so many tokens
    floor_s = max(0.0, float(least[0]))
    pairs_s = max(0.0, latency.prefill_pair_s)
    if config.enable_prefix_caching:
        again_s = pairs_s * lengths
    else:
        # In one iteration with at least so many tokens, or in several.
        at_once = np.minimum(lengths, len(least))
        again_s = np.minimum(np.maximum(least[at_once - 1] - floor_s, 0.0), floor_s)
        again_s += max(0.0, latency.prefill_token_s) * lengths
        again_s += pairs_s * lengths * (lengths + 1) / 2
        again_s[lengths > 1] = np.minimum.accumulate(again_s[:0:-1])[::-1]
    seqs_s = max(0.0, float(tables.seqs.min()))
    work_s = floor_s + seqs_s + np.minimum(read_s, again_s)
    host_s = max(0.0, float(tables.host.min()))
    return np.asarray(np.maximum(work_s, tables.launch) + host_s)


@dataclass(frozen=True, slots=True)
class LeastHeld:
    """What a node takes at least that runs once, in one size, whenever its inputs come.

    Attributes:
        start_s: seconds of an engine start.
        shared_s: seconds of the iterations of all replicas: its tokens at the best batch.
        longest_s: seconds of its longest request alone.
    """

    start_s: float
    shared_s: float = 0.0
    longest_s: float = 0.0

    def seconds(self, replicas: int) -> float:
        """Return how long so many replicas hold their devices at least, sharing evenly."""
        return self.start_s + max(self.shared_s / replicas, self.longest_s)


def least_held(problem: Problem, scenario: LengthScenario, node: int, key: ModeKey) -> LeastHeld:
    """Return what a node takes at least with replicas of a shape on a kind of GPU."""
    costs = problem.costs[node][key]
    start_s, work = problem.least_start_s(costs), _work(problem, scenario, node)
    if work.requests == 0 or not isinstance(costs.latency, StepLatency):
        return LeastHeld(start_s)
    config = problem.engine_config(node, costs)
    shared_s = max(float(np.dot(u, work.amounts)) for u in _unit_costs(1, costs.latency, config))
    taken = scenario.output_tokens[node] > 0
    alone_s = _alone_s(scenario, node, costs.latency, config)[taken]
    return LeastHeld(start_s, shared_s, float(alone_s.max()))
