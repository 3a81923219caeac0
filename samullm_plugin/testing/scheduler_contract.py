"""The contract of stage schedulers.

Subclass it in a test module, and every rule becomes a test::

    class TestMine(SchedulerContract):
        scheduler_class = MyScheduler
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest
from pydantic import BaseModel

from samullm_plugin.errors import InputError, PlanError
from samullm_plugin.host.interfaces.scheduler import SchedulingContext, StageScheduler
from samullm_plugin.host.isolation import digest
from samullm_plugin.model.cluster import Network
from samullm_plugin.model.plan import Plan
from samullm_plugin.model.problem import Problem
from samullm_plugin.rules.verify import verify
from samullm_plugin.simulator import PlanSimulator
from samullm_plugin.testing.factories import TestNode, make_problem
from samullm_plugin.testing.rules import ContractViolation, require


def contract_problems() -> dict[str, Problem]:
    """Return the problems every scheduler is tried on, by what is special about them."""
    pair = [(0, 0)]
    return {
        "one node, one device": make_problem([TestNode("a", [5, 6], [7, 8])], 1),
        "independent nodes": make_problem(
            [
                TestNode("a", [5] * 12, [4 + i for i in range(12)], sizes=(1, 2)),
                TestNode("b", [9] * 4, [30] * 4, sizes=(1, 2), load_s=3.0),
                TestNode("c", [2] * 6, [5] * 6),
            ],
            4,
        ),
        "a chain of nodes": make_problem(
            [
                TestNode("first", [5, 5], [6, 9], sizes=(1, 2)),
                TestNode("second", [3, 3], [4, 4], inputs=[pair, [(0, 1)]]),
                TestNode("third", [3], [5], inputs=[[(1, 0), (1, 1)]]),
            ],
            2,
        ),
        "requests that wait for each other": make_problem(
            [
                TestNode("writer", [5] * 4, [6] * 4, inputs=[[], [(0, 0)], [(0, 1)], []]),
                TestNode("judge", [3] * 2, [4] * 2, inputs=[[(0, 2)], [(0, 3)]], sizes=(2,)),
            ],
            4,
        ),
        "more nodes than devices": make_problem(
            [TestNode(f"n{i}", [4] * (i + 1), [5 + i] * (i + 1)) for i in range(5)], 2
        ),
        "several length scenarios": make_problem(
            [
                TestNode("a", [5, 5], [[4, 9], [20, 2]]),
                TestNode("b", [5, 5, 5], [[8, 8, 8], [3, 3, 3]], sizes=(1, 2)),
            ],
            2,
            num_scenarios=2,
        ),
        "a node that nobody needs": make_problem(
            [
                TestNode("router", [5, 5], [2, 2]),
                TestNode("large", [4, 4], [9, 9], inputs=[pair, [(0, 1)]], taken=[False, False]),
                TestNode("small", [4, 4], [6, 6], inputs=[pair, [(0, 1)]]),
            ],
            2,
        ),
        "a replica larger than a machine": _larger_than_a_machine(),
    }


def _larger_than_a_machine() -> Problem:
    """Return a problem of four machines of one device, and a node whose replicas need two."""
    nodes = [TestNode("large", [5] * 6, [7 + i for i in range(6)]), TestNode("small", [4], [30])]
    problem = make_problem(nodes, 4, nvlink=1)
    large = {
        replace(key, pipeline_parallel_size=2): costs for key, costs in problem.costs[0].items()
    }
    machines = tuple((d,) for d in range(4))
    cluster = replace(problem.cluster, machines=machines, network=Network(1e9, 1e-4))
    return replace(problem, cluster=cluster, costs=(large, problem.costs[1]))


class SchedulerContract:
    """Rules every stage scheduler keeps.

    Attributes:
        scheduler_class: the class under test.
        options: its options.
        may_refuse: it may answer a problem with :class:`InputError`, as schedulers for small
            instances do.
    """

    scheduler_class: ClassVar[type[StageScheduler]]
    options: ClassVar[dict[str, object]] = {}
    may_refuse: ClassVar[bool] = False

    def make(self) -> StageScheduler:
        """Return a new instance."""
        config: type[BaseModel] = self.scheduler_class.Config
        return self.scheduler_class(config.model_validate(self.options))

    def plan(self, problem: Problem, seed: int = 0) -> tuple[Plan, SchedulingContext] | None:
        """Return a plan and the context it was made in; None if the scheduler refuses."""
        context = SchedulingContext(PlanSimulator(problem), np.random.default_rng(seed))
        try:
            plan = self.make().schedule(problem, context)
        except InputError:
            if self.may_refuse:
                return None
            raise
        require(isinstance(plan, Plan), "returns-plan", f"got a {type(plan).__name__}")
        return plan, context

    @pytest.mark.parametrize("case", list(contract_problems()))
    def test_valid_plan(self, case: str) -> None:
        """The plan keeps every rule of the verifier and finishes every node."""
        problem = contract_problems()[case]
        found = self.plan(problem)
        if found is None:
            return
        plan, _ = found
        violations = verify(problem, plan)
        require(not violations, "valid-plan", f"{case}: " + "; ".join(map(str, violations)))
        try:
            traces = PlanSimulator(problem).simulate(plan)
        except PlanError as error:
            raise ContractViolation("finishes", f"{case}: {error}") from error
        require(
            all(np.isfinite(t.makespan_s) for t in traces), "finishes", f"{case}: it never ends"
        )

    @pytest.mark.parametrize("case", ["independent nodes", "a chain of nodes"])
    def test_equal_seeds_equal_plans(self, case: str) -> None:
        """Two instances with equal problems and seeds make equal plans."""
        found = [self.plan(contract_problems()[case], seed=7) for _ in range(2)]
        plans = [f[0] for f in found if f is not None]
        require(len(set(plans)) <= 1, "deterministic", f"{case}: equal seeds gave different plans")

    def test_problem_is_left_alone(self) -> None:
        """The scheduler does not change the problem it is given."""
        problem = contract_problems()["independent nodes"]
        before = digest(problem)
        self.plan(problem)
        require(digest(problem) == before, "leaves-problem", "the problem was changed")

    def test_report_is_true(self) -> None:
        """A reported bound is not above the reported objective; explanations name nodes."""
        for case, problem in contract_problems().items():
            found = self.plan(problem)
            if found is None:
                continue
            report = found[1].report
            names = {n.name for n in problem.app.nodes}
            unknown = set(report.explanation) - names
            require(not unknown, "explains-nodes", f"{case}: no node is called {sorted(unknown)}")
            if report.bound is not None and report.objective_s is not None:
                require(
                    report.bound.value_s <= report.objective_s * (1 + 1e-9) + 1e-9,
                    "true-bound",
                    f"{case}: bound {report.bound.value_s} above objective {report.objective_s}",
                )
