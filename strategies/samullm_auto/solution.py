"""A plan's solution: who comes first, spread how, when consumers start, what is resized."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from samullm_plugin import Application, ParallelConfig, Plan, Problem

if TYPE_CHECKING:
    from samullm_auto.surrogate import Surrogate


NUM_DURATIONS, DURATION_STEP = 40, 0.88
"""Durations tried for list schedules: the longest of all, and each next one shorter by a factor."""


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
    """

    order: tuple[int, ...]
    modes: tuple[ParallelConfig, ...]
    starts: tuple[float, ...]
    splits: tuple[Split, ...] = ()
    strict: bool = False
    grow: bool = True


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
    In one of two, models wait for those before them, as they may do in the plan.
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
    return [lenient, replace(lenient, strict=True)]


def list_solutions(
    app: Application, modes: Sequence[Sequence[ParallelConfig]], surrogate: Surrogate
) -> list[Solution]:
    """Return list schedules, the best by the surrogate first.

    For each of several durations, every model gets the configuration of least device time that
    takes no longer (else its fastest); what has the longest way to the end comes first.

    Args:
        app: the application.
        modes: configurations to choose from, by node.
        surrogate: times them.
    """
    times = [[surrogate.seconds(i, p) for p in of_node] for i, of_node in enumerate(modes)]
    longest = max(max(of_node) for of_node in times)
    found: dict[Solution, float] = {}
    for step in range(NUM_DURATIONS):
        limit_s = longest * DURATION_STEP**step
        chosen = []
        for of_node, seconds in zip(modes, times, strict=True):
            able = [k for k, s in enumerate(seconds) if s <= limit_s]
            pick = (
                min(able, key=lambda k: seconds[k] * of_node[k].num_devices)
                if able
                else min(range(len(seconds)), key=seconds.__getitem__)
            )
            chosen.append(pick)
        to_end = [seconds[k] for seconds, k in zip(times, chosen, strict=True)]
        for i in reversed(app.order):
            after = [to_end[c] for c, up in enumerate(app.upstreams) if i in up]
            to_end[i] += max(after, default=0.0)
        order = tuple(sorted(range(len(modes)), key=lambda i: -to_end[i]))
        picked = tuple(of_node[k] for of_node, k in zip(modes, chosen, strict=True))
        for start in {0.0, 1.0} if any(app.upstreams) else {0.0}:
            starts = tuple(start if up else 0.0 for up in app.upstreams)
            solution = Solution(order, picked, starts)
            found.setdefault(solution, surrogate.value_s(solution))
    return sorted(found, key=found.__getitem__)
