"""The aggregated problem with its engines brought to the speed of the whole problem's."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from samullm_plugin.engine import EngineCache, EngineJob, Workload, simulate_engines
from samullm_plugin.model.costs import ModeCosts
from samullm_plugin.model.latency import StepLatency, StepModel, StepTable
from samullm_plugin.model.problem import Problem
from samullm_plugin.model.types import Floats, Ints
from samullm_plugin.rules.aggregation import Aggregate, aggregate

SAMPLE_BATCHES = 6
"""Requests of a node, in batches of its engines, whose simulation as they are and aggregated tells
by how much aggregation makes iterations too fast or too slow (a choice)."""

SERVED = 0.75
"""Share of the sample that is finished at the moment that is compared."""


@dataclass(frozen=True, slots=True)
class Rescaled:
    """Another model's latencies, times a factor."""

    model: StepModel
    factor: float

    def step_seconds(self, steps: StepTable) -> Floats:
        """Return the seconds of each iteration, shape ``(len(steps),)``."""
        return np.asarray(self.model.step_seconds(steps) * self.factor)


def calibrated_aggregate(
    problem: Problem, most_requests: int, cache: EngineCache
) -> Aggregate | None:
    """Return the aggregated problem, or None if there is nothing to gain.

    Batches of fewer, heavier sequences meet other steps of the latency curves. What that changes
    is measured on a sample of every node in every size, and taken out of its latencies.

    Args:
        problem: the whole problem.
        most_requests: requests of all nodes that are aimed at.
        cache: results of engine simulations.
    """
    if problem.app.python:
        return None  # what Python nodes do to counts and times is simulated whole
    found = aggregate(problem, most_requests)
    if found is None:
        return None
    smaller = found.problem
    asked: list[tuple[int, object]] = []
    jobs: list[EngineJob] = []
    for i, k in enumerate(found.alike):
        if k < 1.5:
            continue
        whole, part = _samples(problem, i, k)
        for key, costs in smaller.costs[i].items():
            if smaller.fits(i, key):
                asked.append((i, key))
                jobs.append(_job(problem, i, problem.costs[i][key], whole))
                jobs.append(_job(smaller, i, costs, part))
    # Not the end, which the longest request decides, but when most are served.
    ends = [float(np.quantile(run.finish_s, SERVED)) for run in simulate_engines(jobs, cache=cache)]
    ratios = {a: ends[2 * n] / max(ends[2 * n + 1], 1e-9) for n, a in enumerate(asked)}
    costs_of = tuple(
        {key: _rescaled(c, ratios.get((i, key), 1.0)) for key, c in of_node.items()}
        for i, of_node in enumerate(smaller.costs)
    )
    return replace(found, problem=replace(smaller, costs=costs_of))


def _samples(problem: Problem, node: int, alike: float) -> tuple[Workload, Workload]:
    """Return some requests of a node, and about one of ``alike`` of them."""
    scenario = problem.scenarios[0]
    prompts, outputs = scenario.prompt_tokens[node], scenario.output_tokens[node]
    taken = np.flatnonzero(outputs > 0)
    most = SAMPLE_BATCHES * problem.app.nodes[node].model.engine.max_num_seqs
    rows = taken[np.linspace(0, len(taken) - 1, min(most, len(taken))).astype(np.int64)]
    by_size = rows[np.lexsort((prompts[rows], outputs[rows]))]
    keep = max(1, round(len(rows) / alike))
    part = np.sort(by_size[((np.arange(keep) + 0.5) * len(rows) / keep).astype(np.int64)])

    def workload(chosen: Ints) -> Workload:
        return Workload(prompts[chosen], outputs[chosen])

    return workload(rows), workload(part)


def _job(problem: Problem, node: int, costs: ModeCosts, workload: Workload) -> EngineJob:
    config = replace(problem.engine_config(node, costs), enable_prefix_caching=False)
    return EngineJob(config, workload, costs.latency)


def _rescaled(costs: ModeCosts, ratio: float) -> ModeCosts:
    if ratio == 1.0:
        return costs
    latency = costs.latency
    if isinstance(latency, StepLatency):
        return replace(costs, latency=latency.scaled(ratio))
    return replace(costs, latency=Rescaled(latency, ratio))
