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

import numpy as np

from samullm_plugin.model.application import PythonNode
from samullm_plugin.model.costs import ModeCosts
from samullm_plugin.model.engine_config import EngineConfig
from samullm_plugin.model.latency import StepLatency
from samullm_plugin.model.problem import ModeKey, Problem
from samullm_plugin.model.scenarios import LengthScenario
from samullm_plugin.model.types import Floats
from samullm_plugin.rules.iteration_prices import iteration_parts, unit_prices, work_of
from samullm_plugin.rules.packing import Demand, fitting_s
from samullm_plugin.rules.transition import Running


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


def _device_seconds(problem: Problem, scenario: LengthScenario, node: int) -> Demand | None:
    """Return what the node certainly costs, or None if none of its requests is needed."""
    work = work_of(problem, scenario, node)
    modes = _modes(problem, node)
    if work.requests == 0:
        return None
    # One choice of prices for all sizes; the cheapest size of each unit is what any mixture costs
    # at least.
    offers = [
        unit_prices(size, costs.latency, config)
        if isinstance(costs.latency, StepLatency)
        else None  # nothing is known of another model's least iteration
        for size, costs, config in modes
    ]
    known = [offer for offer in offers if offer is not None]
    best = work.least_s(known) if len(known) == len(offers) else 0.0
    one_start = min(size * problem.least_start_s(costs) for size, costs, _ in modes)
    return Demand(
        best,
        one_start,
        min(problem.least_start_s(costs) for _, costs, _ in modes),
        min(problem.first_ready_s(node, costs) for _, costs, _ in modes),
    )


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
    # Chunks of a prompt follow each other through the pipeline's stages; a token that is generated
    # has passed all of them before the next one begins.
    stages = config.pipeline_parallel_size
    return np.asarray((prefill_steps + stages - 1) * step_s[0] + stages * generate_s)


@lru_cache(maxsize=1024)
def _least_step_s(latency: StepLatency, config: EngineConfig) -> Floats:
    """Return the least seconds of an iteration that lengthens a sequence, by its length.

    At ``n - 1``: the sequence has ``n`` tokens including the one computed; it decodes, or it was
    preempted and is computed anew. Shape ``(max_model_len,)``, not decreasing.
    """
    tables = iteration_parts(latency, config)
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
    start_s, work = problem.least_start_s(costs), work_of(problem, scenario, node)
    if work.requests == 0 or not isinstance(costs.latency, StepLatency):
        return LeastHeld(start_s)
    config = problem.engine_config(node, costs)
    shared_s = work.least_s([unit_prices(1, costs.latency, config)])
    taken = scenario.output_tokens[node] > 0
    alone_s = _alone_s(scenario, node, costs.latency, config)[taken]
    return LeastHeld(start_s, shared_s, float(alone_s.max()))
