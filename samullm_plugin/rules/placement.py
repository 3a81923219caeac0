"""Devices for the models of a stage, leaving those that go on where they are."""

from __future__ import annotations

from collections.abc import Mapping

from samullm_plugin.model.parallel import ParallelConfig
from samullm_plugin.model.plan import Assignment
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
    free = set(range(problem.cluster.num_gpus))
    for assignment in kept.values():
        free -= set(assignment.devices)
    result = dict(kept)
    # Large replicas first: small ones fit into what is left of the groups.
    others = [n for n in wanted if n not in kept]
    for name in sorted(others, key=lambda n: -wanted[n].tensor_parallel_size):
        devices = problem.find_devices(problem.app.index(name), wanted[name], free)
        if devices is None:
            return None
        free -= set(devices)
        result[name] = Assignment(name, wanted[name], devices)
    return tuple(result[n] for n in wanted)
