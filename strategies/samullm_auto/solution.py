"""A plan's solution: who comes first, spread how, when consumers start, what is resized."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from samullm_plugin import ParallelConfig, Plan, Problem


@dataclass(frozen=True, slots=True)
class Split:
    """A model is started anew in another configuration once it has done a share of its requests.

    Attributes:
        node: index of the node.
        fraction: share of its requests.
        parallel: configuration from then on.
    """

    node: int
    fraction: float
    parallel: ParallelConfig


@dataclass(frozen=True, slots=True)
class Solution:
    """From which a :class:`~samullm_auto.builder.Builder` makes a plan.

    Attributes:
        order: node indices; whoever comes first gets devices first.
        modes: configuration by node index.
        starts: by node index, share of their requests that all its upstream nodes must have done
            before it starts; 0: they need only have started, 1: they must have finished.
        splits: configurations changed on the way.
        strict: no model overtakes one before it in the order that is ready and lacks devices.
        grow: devices nobody can use go to running models that finish sooner by it.
        patient: a model waits for engines that it can take over if they become free before its own
            would have started.
    """

    order: tuple[int, ...]
    modes: tuple[ParallelConfig, ...]
    starts: tuple[float, ...]
    splits: tuple[Split, ...] = ()
    strict: bool = False
    grow: bool = True
    patient: bool = False


def by_shape(configs: Iterable[ParallelConfig]) -> list[list[ParallelConfig]]:
    """Return configurations grouped by the shape of a replica."""
    shapes: dict[tuple[int, int], list[ParallelConfig]] = {}
    for p in configs:
        shapes.setdefault((p.tensor_parallel_size, p.pipeline_parallel_size), []).append(p)
    return list(shapes.values())


def solutions_of(problem: Problem, plan: Plan) -> list[Solution]:
    """Return solutions that resemble a plan: first starts, first configurations.

    Models that start together come in the order of their devices, so that a builder puts them
    together as the plan does: which of them share an NVLink group decides when it is free again.
    In one of two, models wait for those before them, as they may do in the plan. Where models can
    take engines over there is one in which they wait for these.
    """
    nodes = problem.app.nodes
    modes = [problem.parallel_configs(i)[0] for i in range(len(nodes))]
    first: dict[int, tuple[int, int]] = {}
    for number, stage in enumerate(plan.stages):
        for assignment in stage.assignments:
            i = problem.app.index(assignment.node)
            if i not in first:
                first[i] = number, min(assignment.devices)
                modes[i] = assignment.parallel
    starts = [0.0] * len(nodes)
    for i, (number, _) in first.items():
        upstreams = problem.app.upstreams[i]
        over = [plan.last_stage(nodes[u].name) < number for u in upstreams]
        starts[i] = 1.0 if over and all(over) else 0.0
    order = sorted(first, key=first.__getitem__)
    lenient = Solution(tuple(order), tuple(modes), tuple(starts))
    found = [lenient, replace(lenient, strict=True)]
    return [*found, replace(lenient, patient=True)] if problem.same_engine else found
