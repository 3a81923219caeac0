"""Which pipeline-parallel sizes are worth planning with.

An engine of several stages is simulated request by request, some ten times the work of one stage,
and most such sizes are of no use: where a model and its KV cache fit on fewer devices, replicas of
one stage on as many are faster. So each shape of a replica is timed, once with few replicas and
once with many, and left out where one stage is as good in both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from samullm_plugin.model.parallel import ParallelConfig
from samullm_plugin.model.problem import ModeKey, Problem
from samullm_plugin.simulator import PlanSimulator

WORTH = 0.01
"""Share of a node's time that pipeline stages must save to be planned with."""


def without_useless_pipelines(problem: Problem) -> Problem:
    """Return the problem without pipeline-parallel sizes that a size of one stage replaces.

    That one needs no more devices, and none that are joined more closely, so it has a place
    wherever the other has, and alone, with all inputs there, the node takes as long with it at
    most, in the first length scenario, with the fewest replicas and with the most.

    Args:
        problem: the instance; sizes of models that fit nowhere in one stage are kept.
    """
    if all(key.pipeline_parallel_size == 1 for sizes in problem.costs for key in sizes):
        return problem
    simulator = PlanSimulator(problem.with_scenarios(problem.scenarios[:1])).coarse()
    costs = []
    for i, sizes in enumerate(problem.costs):
        configs = problem.parallel_configs(i)
        single = [p for p in configs if p.pipeline_parallel_size == 1]
        shapes = {_shape(p) for p in configs if p.pipeline_parallel_size > 1}
        useless = {s for s in shapes if not _is_useful(simulator, i, configs, single, s)}
        costs.append({key: c for key, c in sizes.items() if _sizes(key) not in useless})
    return replace(problem, costs=tuple(costs))


def _is_useful(
    simulator: PlanSimulator,
    node: int,
    configs: Sequence[ParallelConfig],
    single: Sequence[ParallelConfig],
    shape: tuple[int, int],
) -> bool:
    """Return whether replicas of a shape are faster than all of one stage in their place."""
    same = [p for p in configs if _shape(p) == shape]
    for size in dict.fromkeys((same[0], same[-1])):
        others = [
            p
            for p in single
            if p.tensor_parallel_size <= shape[0] and p.num_devices <= size.num_devices
        ]
        if not others:
            return True
        mine_s, *others_s = simulator.alone_many_s(0, [(node, p) for p in (size, *others)])
        if mine_s < min(others_s) * (1 - WORTH):
            return True
    return False


def _shape(parallel: ParallelConfig) -> tuple[int, int]:
    return parallel.tensor_parallel_size, parallel.pipeline_parallel_size


def _sizes(key: ModeKey) -> tuple[int, int]:
    return key.tensor_parallel_size, key.pipeline_parallel_size
