"""What machines have read of checkpoints, and when engines are ready because of it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from samullm_plugin.model.application import EngineOptions
from samullm_plugin.model.cluster import Cluster
from samullm_plugin.model.parallel import ParallelConfig
from samullm_plugin.model.plan import Assignment, Plan, Stage, StageEnd
from samullm_plugin.model.problem import ModeKey, Problem
from samullm_plugin.rules.page_cache import PageCaches
from samullm_plugin.simulator import PlanSimulator
from samullm_plugin.testing.factories import GPU, TestNode, make_problem

WARM_S, COLD_S = 10.0, 100.0
ONE = ParallelConfig()


@pytest.fixture
def problem() -> Problem:
    """Return two models on two machines of two GPUs, all on disk."""
    nodes = [TestNode(name, [4], [4]) for name in ("a", "b")]
    cluster = Cluster((GPU,) * 4, ((0, 1), (2, 3)), ((0, 1), (2, 3)))
    return replace(make_problem(nodes, 4), cluster=cluster, page_cache="cold")


def started(caches: PageCaches, problem: Problem, node: int, device: int, at_s: float) -> float:
    return caches.ready_s(node, problem.costs[node][ModeKey(GPU.name, 1)], (device,), at_s)


def test_a_machine_reads_a_checkpoint_once(problem: Problem) -> None:
    caches = PageCaches(problem)
    assert started(caches, problem, 0, 0, 0.0) == COLD_S
    assert started(caches, problem, 0, 1, 200.0) == 200.0 + WARM_S
    assert started(caches, problem, 0, 2, 200.0) == 200.0 + COLD_S  # the other machine has not


def test_who_comes_while_it_is_read_waits(problem: Problem) -> None:
    caches = PageCaches(problem)
    started(caches, problem, 0, 0, 0.0)
    assert started(caches, problem, 0, 1, 30.0) == COLD_S


def test_a_disk_reads_one_checkpoint_after_another_and_machines_side_by_side(
    problem: Problem,
) -> None:
    caches = PageCaches(problem)
    started(caches, problem, 0, 0, 0.0)
    assert started(caches, problem, 1, 1, 0.0) == COLD_S + (COLD_S - WARM_S)
    assert started(caches, problem, 1, 2, 0.0) == COLD_S


def test_the_next_stage_is_read_ahead_where_it_will_run(problem: Problem) -> None:
    caches = PageCaches(problem)
    stages = (Stage((Assignment("a", ONE, (0,)),)), Stage((Assignment("b", ONE, (2,)),)))
    assert caches.read_next(Plan(stages), 0, (), 5.0) == [("b", (2,))]
    assert caches.read_next(Plan(stages), 0, (), 6.0) == []
    assert started(caches, problem, 1, 2, 5.0) == 5.0 + COLD_S
    assert started(caches, problem, 1, 3, 300.0) == 300.0 + WARM_S
    assert started(caches, problem, 1, 1, 300.0) == 300.0 + COLD_S
    assert PageCaches(problem).read_next(Plan(stages), 0, ("b",), 5.0) == []


def test_a_machine_that_comes_back_has_read_nothing(problem: Problem) -> None:
    caches = PageCaches(problem)
    started(caches, problem, 0, 0, 0.0)
    caches.forget(0)
    assert started(caches, problem, 0, 0, 30.0) == 30.0 + COLD_S  # nor does its disk still read


def test_what_is_known_to_be_there_is_not_read(problem: Problem) -> None:
    known = replace(problem, in_page_cache=frozenset({("model-a", 1)}))
    assert started(PageCaches(known), known, 0, 2, 0.0) == WARM_S
    assert started(PageCaches(known), known, 0, 0, 0.0) == COLD_S


def test_copies_are_independent(problem: Problem) -> None:
    caches = PageCaches(problem)
    started(caches.copy(), problem, 0, 0, 0.0)
    assert started(caches, problem, 0, 0, 0.0) == COLD_S
    assert caches.held == {("model-a", 0)}


def test_plans_know_that_a_second_start_is_warm(problem: Problem) -> None:
    """A model that is moved within its machine is not read again; on another one it is ahead."""
    node = TestNode("a", [4] * 8, [4] * 8, engine=EngineOptions(max_num_seqs=1))
    small = replace(make_problem([node], 4), cluster=problem.cluster, page_cache="cold")
    half = StageEnd("node_progress", "a", 0.5)

    def starts_s(devices: tuple[int, ...]) -> list[float]:
        move = Assignment("a", ParallelConfig(2), devices)
        plan = Plan((Stage((Assignment("a", ONE, (0,)),), half), Stage((move,))))
        trace = PlanSimulator(small).simulate_scenario(plan, 0)
        return [s.ready_s - s.start_s for s in trace.segments]

    assert starts_s((0, 1)) == [COLD_S, WARM_S]
    assert starts_s((2, 3)) == [COLD_S, WARM_S]  # read while the first one started
