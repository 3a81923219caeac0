"""Kinds of devices, places for replicas, and the sizes that are considered."""

from __future__ import annotations

import pickle
from dataclasses import replace
from itertools import pairwise
from time import process_time

import pytest

from samullm_plugin.host.isolation import digest
from samullm_plugin.host.manager import PluginHost
from samullm_plugin.model.cluster import Cluster, Gpu, Network
from samullm_plugin.model.parallel import ParallelConfig
from samullm_plugin.model.problem import ModeKey, Problem
from samullm_plugin.planning.planner import PlanningOptions, make_plan
from samullm_plugin.planning.reporting import idle_lines
from samullm_plugin.rules.verify import verify
from samullm_plugin.testing.factories import TestNode, make_problem

BIG, SMALL = Gpu("G", 80 * 2**30), Gpu("G", 20 * 2**30)


def test_gpus_of_one_name_and_different_memory_are_of_different_kinds() -> None:
    assert Cluster((BIG, BIG)).kinds == ("G", "G")
    assert Cluster((SMALL, BIG)).kinds == ("G with 20 GiB", "G with 80 GiB")
    mixed = Cluster((SMALL, BIG), ((0, 1),))
    assert mixed.replica_violation((0, 1), 2) is not None


def uneven(*, first_small: bool) -> Problem:
    """One model that fits on the larger GPUs alone, one that fits on both kinds."""
    base = make_problem([TestNode("large", [4] * 8, [9] * 8), TestNode("any", [4] * 8, [5] * 8)], 4)
    gpus = (SMALL, SMALL, BIG, BIG) if first_small else (BIG, BIG, SMALL, SMALL)
    costs = next(iter(base.costs[0].values()))
    small, big = ModeKey("G with 20 GiB", 1), ModeKey("G with 80 GiB", 1)
    too_small = replace(costs, kv_cache_tokens=0)
    both = {small: costs, big: costs}
    return Problem(
        base.app,
        Cluster(gpus, ((0, 1), (2, 3))),
        base.scenarios,
        ({**both, small: too_small}, both),
    )


@pytest.mark.parametrize("first_small", [True, False])
@pytest.mark.parametrize("scheduler", ["auto", "exact", "greedy", "max-heuristic", "min-heuristic"])
def test_models_go_where_they_fit(scheduler: str, first_small: bool) -> None:
    problem = uneven(first_small=first_small)
    options = {"objective": "tokens"} if scheduler == "greedy" else {}
    plan = make_plan(PluginHost(), problem, scheduler, PlanningOptions(options=options)).plan
    assert verify(problem, plan) == ()
    room = {2, 3} if first_small else {0, 1}
    held = {d for s in plan.stages if (a := s.assignment("large")) for d in a.devices}
    assert held <= room
    assert problem.parallel_configs(0)[-1].data_parallel_size == 2


def test_questions_do_not_change_a_problem() -> None:
    problem = uneven(first_small=True)
    before = digest(problem)
    place = problem.idle_devices(0, ParallelConfig(1, 1))
    assert place == problem.find_devices(0, ParallelConfig(1, 1), range(4)) == (2,)
    assert digest(problem) == before
    copy = pickle.loads(pickle.dumps(problem))
    assert copy.parallel_configs(0) == problem.parallel_configs(0)
    assert copy.idle_devices(0, ParallelConfig(1, 1)) == place
    copy.scenarios[0].output_tokens[0][0] += 1
    assert digest(copy) != before


def test_questions_about_machines_do_not_change_a_problem() -> None:
    base = uneven(first_small=True)
    machines = ((0, 1), (2, 3))
    cluster = replace(base.cluster, machines=machines, network=Network(1e9, 1e-4))
    problem = replace(base, cluster=cluster)
    before = digest(problem)
    assert problem.cluster.machines_per_replica(problem.cluster.kinds[0], 2, 2) == 1
    assert problem.cluster.replicas_by_machine(problem.cluster.kinds[2], 1, 2) == [0, 1]
    assert digest(problem) == before
    some = pickle.loads(pickle.dumps(problem.cluster.subset((2, 3))))
    assert some.kinds == problem.cluster.kinds[2:]
    assert some.replicas_by_machine(some.kinds[0], 1, 2) == [1]


def test_gpus_without_figures_are_named() -> None:
    base = make_problem([TestNode("a", [4] * 8, [9] * 8)], 2, nvlink=1)
    kinds = (base.cluster.gpus[0], Gpu("other", 2**30))
    problem = Problem(base.app, Cluster(kinds), base.scenarios, base.costs)
    plan = make_plan(PluginHost(), problem, "max-heuristic").plan
    (line,) = idle_lines(problem, plan)
    assert "GPU 1 (other)" in line
    assert "no latency figures" in line


def test_a_thousand_gpus_are_offered_in_steps() -> None:
    base = make_problem([TestNode("a", [4] * 8, [9] * 8)], 1, nvlink=1)
    gpus = (base.cluster.gpus[0],) * 1024
    groups = tuple(tuple(range(d, d + 8)) for d in range(0, 1024, 8))
    began_s = process_time()
    problem = Problem(base.app, Cluster(gpus, groups, groups), base.scenarios, base.costs)
    sizes = [p.data_parallel_size for p in problem.parallel_configs(0)]
    places = [problem.idle_devices(0, p) for p in problem.parallel_configs(0)]
    assert process_time() - began_s < 2.0
    assert sizes[:16] == list(range(1, 17))
    assert {32, 64, 128, 256, 512, 1024} <= set(sizes)  # halves, and what fills machines
    assert all(b <= 1.2 * a for a, b in pairwise(sizes[16:]))
    assert all(p is not None for p in places)


def test_replicas_fill_the_fullest_groups_first() -> None:
    cluster = Cluster.uniform(BIG, 8, nvlink=4)
    assert cluster.find_devices({0, 1, 4, 5, 6, 7}, ParallelConfig(1, 2)) == (0, 1)
    assert cluster.find_devices({0, 4, 5, 6, 7}, ParallelConfig(3, 1)) == (0, 4, 5)
    assert cluster.find_devices({0, 1, 2, 4, 5, 6}, ParallelConfig(3, 2)) is None
