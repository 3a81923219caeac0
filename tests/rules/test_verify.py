"""Each rule of the verifier is broken by a plan of its own."""

from __future__ import annotations

import pytest

from samullm_plugin.errors import InputError, PlanError
from samullm_plugin.model.cluster import Cluster, Gpu
from samullm_plugin.model.parallel import ParallelConfig
from samullm_plugin.model.plan import Assignment, Plan, Stage, StageEnd
from samullm_plugin.model.problem import Problem
from samullm_plugin.rules.verify import require_valid, verify
from samullm_plugin.testing.factories import GPU, TestNode, make_problem

ONE, PAIR, TWO = ParallelConfig(1), ParallelConfig(1, 2), ParallelConfig(2)


@pytest.fixture
def problem() -> Problem:
    """b waits for a; b fits only on two joined GPUs."""
    a = TestNode("a", [4], [4], sizes=(1, 2))
    b = TestNode("b", [4], [4], [[(0, 0)]], sizes=(2,))
    return make_problem([a, b], num_gpus=4)


def stage(*assignments: Assignment, end: StageEnd | None = None) -> Stage:
    return Stage(assignments, end or StageEnd())


A, B = Assignment("a", ONE, (0,)), Assignment("b", PAIR, (2, 3))
VALID = Plan((stage(A, B),))


def test_a_valid_plan(problem: Problem) -> None:
    assert verify(problem, VALID) == ()
    require_valid(problem, VALID, "test")


@pytest.mark.parametrize(
    ("plan", "rule", "words"),
    [
        (Plan(()), "completeness", "no stages"),
        (Plan((stage(A),)), "completeness", "no stage assigns it"),
        (Plan((stage(A, B), stage())), "shape", "no assignments"),
        (Plan((stage(A, A, B),)), "shape", "assigned 2 times"),
        (Plan((stage(A, B, Assignment("z", ONE, (1,))),)), "shape", "no such node"),
        (Plan((stage(A, Assignment("b", PAIR, (2,))),)), "shape", "needs 2 devices, it has 1"),
        (
            Plan((stage(A, B, end=StageEnd("node_finished", "c")),)),
            "shape",
            "end event names c",
        ),
        (Plan((stage(Assignment("a", ONE, (2,)), B),)), "devices", "device 2 is held by a, b"),
        (Plan((stage(Assignment("a", ONE, (4,)), B),)), "devices", "device 4 does not exist"),
        (Plan((stage(Assignment("a", ONE, (-1,)), B),)), "devices", "device -1 does not exist"),
        (Plan((stage(Assignment("a", TWO, (0, 0)), B),)), "devices", "repeat"),
        (Plan((stage(A, Assignment("b", PAIR, (1, 2))),)), "nvlink", "not in one NVLink group"),
        (Plan((stage(A, Assignment("b", ONE, (2,))),)), "memory", "has no costs"),
        (Plan((stage(B), stage(A))), "precedence", "a, which starts only in stage 1"),
        (Plan((stage(B),)), "precedence", "a, which no stage assigns"),
    ],
)
def test_each_rule(problem: Problem, plan: Plan, rule: str, words: str) -> None:
    found = verify(problem, plan)
    assert any(v.rule == rule and words in str(v) for v in found), found


def test_memory_that_lacks_is_stated() -> None:
    tight = TestNode("a", [4], [4], sizes=(1, 2), kv_cache_tokens=3000)
    problem = make_problem([tight], num_gpus=2)
    (violation,) = verify(problem, Plan((stage(A),)))
    assert violation.rule == "memory"
    assert "3000 tokens" in violation.message
    assert "4096" in violation.message


def test_replicas_of_one_model_are_on_one_kind_of_gpu() -> None:
    problem = make_problem([TestNode("a", [4], [4])], num_gpus=2)
    other = Gpu("other", GPU.memory_bytes)
    mixed = Problem(problem.app, Cluster((GPU, other)), problem.scenarios, problem.costs)
    found = verify(mixed, Plan((stage(Assignment("a", TWO, (0, 1))),)))
    assert any("different kinds" in v.message for v in found)


def test_replicas_lie_on_one_machine() -> None:
    problem = make_problem([TestNode("a", [4], [4], sizes=(2,))], num_gpus=2)
    apart = Cluster((GPU, GPU), (), ((0,), (1,)))
    with pytest.raises(InputError, match=r"fits on no set.*replicas_across_machines: true"):
        Problem(problem.app, apart, problem.scenarios, problem.costs)


def test_every_violation_is_listed(problem: Problem) -> None:
    plan = Plan((stage(Assignment("b", PAIR, (1, 2)), Assignment("a", ONE, (2,))),))
    rules = {v.rule for v in verify(problem, plan)}
    assert rules == {"nvlink", "devices"}
    with pytest.raises(PlanError, match=r"nobody.*\[nvlink\].*\[devices\]"):
        require_valid(problem, plan, "nobody")


@pytest.mark.parametrize(
    "fields", [("first_finisher", "a"), ("node_finished", None), ("node_progress", "a", 0.0)]
)
def test_end_events_name_what_they_need(fields: tuple[object, ...]) -> None:
    with pytest.raises(InputError):
        StageEnd(*fields)  # type: ignore[arg-type]
