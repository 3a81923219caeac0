"""Which configurations the search considers, and which nodes it changes."""

from __future__ import annotations

import numpy as np

from samullm_auto.budget import Costs
from samullm_auto.solution import by_shape
from samullm_plugin import ParallelConfig, Problem
from samullm_plugin.model.result import PlanTrace
from samullm_plugin.model.types import Floats

MANY_CONFIGS, NEXT_SIZE = 16, 1.3
"""Of more configurations than the first, data-parallel sizes are offered in steps of the second."""

THINNED = (1.0, 1.3, 1.6, 2.0, 3.0, 8.0)
"""Steps that are tried where timing all configurations takes too long."""


def offered(problem: Problem, node: int, next_size: float = 1.0) -> tuple[ParallelConfig, ...]:
    """Return the configurations of a node that the search considers.

    All of them on small clusters; on large ones the data-parallel sizes 1 to 4, then in steps, and
    always the largest: sizes are thinned, never cut off.

    Args:
        problem: the instance.
        node: index of the node.
        next_size: ratio of two data-parallel sizes, at least; 1: all that the problem offers.
    """
    configs = problem.parallel_configs(node)
    ratio = max(next_size, NEXT_SIZE if len(configs) > MANY_CONFIGS else 1.0)
    every = 4 if ratio <= NEXT_SIZE else 1
    kept: set[ParallelConfig] = set()
    for same in by_shape(configs):
        last = 0
        for p in same:
            size = p.data_parallel_size
            if ratio == 1.0 or size <= every or size >= ratio * last or p is same[-1]:
                kept.add(p)
                last = size
    return tuple(p for p in configs if p in kept)


def affordable(
    problem: Problem, costs: Costs, most_s: float
) -> tuple[list[tuple[ParallelConfig, ...]], float]:
    """Return by node the configurations to consider, and the reference seconds of timing them.

    Args:
        problem: the instance.
        costs: what simulating costs.
        most_s: reference seconds that timing may take.
    """
    nodes = range(len(problem.app.nodes))
    for ratio in THINNED:
        modes = [offered(problem, i, ratio) for i in nodes]
        work_s = sum(costs.modes_s(i, of_node) for i, of_node in enumerate(modes))
        if work_s <= most_s:
            break
    return modes, work_s


def focus(problem: Problem, trace: PlanTrace) -> Floats:
    """Return how likely each node is changed: by the device time it holds in a plan, partly."""
    held = np.zeros(len(problem.app.nodes))
    for s in trace.segments:
        held[problem.app.index(s.node)] += (s.end_s - s.start_s) * len(s.devices)
    even = np.full(len(held), 1.0 / len(held))
    return 0.5 * even + 0.5 * held / held.sum() if held.sum() > 0 else even
