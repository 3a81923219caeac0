"""Devices for the models of a stage, leaving those that go on where they are."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from samullm_plugin.errors import PlanError
from samullm_plugin.model.cluster import FreeDevices
from samullm_plugin.model.parallel import ParallelConfig
from samullm_plugin.model.plan import Assignment, Plan, Stage, StageEnd
from samullm_plugin.model.problem import Problem


def place(
    problem: Problem, wanted: Mapping[str, ParallelConfig], held: Mapping[str, Assignment]
) -> tuple[Assignment, ...] | None:
    """Return assignments for all wanted models, or None if the devices do not suffice.

    A model whose configuration is that of the engines it already has keeps its devices. If that
    leaves no room for another (free devices scattered over NVLink groups), models with the fewest
    devices are moved; a moved model starts anew.

    Args:
        problem: the instance.
        wanted: configuration by node name, in the order in which places are given.
        held: by node name, the assignments of the engines that run now.
    """
    if sum(p.num_devices for p in wanted.values()) > problem.cluster.num_gpus:
        return None
    kept = [held[n] for n, p in wanted.items() if n in held and held[n].parallel == p]
    kept.sort(key=lambda a: -len(a.devices))
    while True:
        chosen = _around(problem, wanted, {a.node: a for a in kept})
        if chosen is not None or not kept:
            return chosen
        kept.pop()


def _around(
    problem: Problem,
    wanted: Mapping[str, ParallelConfig],
    kept: Mapping[str, Assignment],
) -> tuple[Assignment, ...] | None:
    """Return assignments for all wanted models with ``kept`` where they are, or None."""
    free = FreeDevices(problem.cluster, range(problem.cluster.num_gpus))
    for assignment in kept.values():
        free.remove(assignment.devices)
    result = dict(kept)
    # Large replicas first: small ones fit into what is left of the groups.
    others = [n for n in wanted if n not in kept]
    for name in sorted(others, key=lambda n: -wanted[n].tensor_parallel_size):
        parallel = wanted[name]
        kinds = problem.fitting_kinds(problem.app.index(name), parallel)
        devices = free.take(parallel, kinds=kinds)
        if devices is None:
            return None
        result[name] = Assignment(name, parallel, devices)
    return tuple(result[n] for n in wanted)


def one_at_a_time(problem: Problem, nodes: Sequence[int], devices: Collection[int]) -> Plan:
    """Return the plan that runs nodes one after another, each on as many devices as it can use.

    What is left to do when nothing better is known: it needs no estimates and always finishes.

    Args:
        problem: the instance.
        nodes: the nodes to run, each after those it waits for.
        devices: those that may be used.

    Raises:
        PlanError: naming a node that fits on none of them.
    """
    stages = []
    for node in nodes:
        assignment = _largest(problem, node, devices)
        if assignment is None:
            name, model = problem.app.nodes[node].name, problem.app.nodes[node].model.name
            raise PlanError(f"node {name}: model {model} fits on none of devices {sorted(devices)}")
        stages.append(Stage((assignment,), StageEnd("all_finished")))
    return Plan(tuple(stages))


def _largest(problem: Problem, node: int, devices: Collection[int]) -> Assignment | None:
    """Return a node on as many of the devices as it can use, smaller replicas before larger."""
    best: tuple[tuple[int, int], Assignment] | None = None
    for key in problem.costs[node]:
        if not problem.fits(node, key):
            continue
        alike = [d for d in devices if problem.cluster.kinds[d] == key.gpu]
        for dp in range(len(alike) // key.num_devices, 0, -1):
            parallel = key.parallel(dp)
            found = problem.cluster.find_devices(alike, parallel)
            if found is not None:
                rank = (len(found), -key.num_devices)
                if best is None or rank > best[0]:
                    best = rank, Assignment(problem.app.nodes[node].name, parallel, found)
                break
    return best[1] if best else None
