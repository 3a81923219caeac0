"""Transitions that random plans seldom bring about."""

from __future__ import annotations

import numpy as np
from samullm_simulated.plugin import SimulatedExecutor

from samullm_plugin.host.interfaces.observer import RunInfo
from samullm_plugin.model.parallel import ParallelConfig
from samullm_plugin.model.plan import Assignment, Plan, Stage, StageEnd
from samullm_plugin.run.coordinator import Coordinator
from samullm_plugin.run.ledger import Ledger, Status
from samullm_plugin.run.length_prompts import LengthPrompts
from samullm_plugin.run.log import RunLog
from samullm_plugin.run.prompts import Prompt, Refused
from samullm_plugin.run.results import RequestId
from samullm_plugin.simulator import PlanSimulator
from samullm_plugin.testing.factories import TestNode, make_problem
from tests.run.worlds import run_with_truth, small_plan, small_problem

ONE = ParallelConfig()


def test_a_stage_that_cannot_end_gives_way_at_once() -> None:
    """The second stage runs only what waits for the first one's paused model."""
    n = 10
    problem = make_problem(
        [
            TestNode("a", [4] * n, list(range(5, 5 + n)), load_s=1.0, step_s=0.1),
            TestNode("b", [4] * n, [6] * n, [[(0, r)] for r in range(n)], load_s=1.0, step_s=0.1),
        ],
        1,
    )
    plan = Plan(
        (
            Stage((Assignment("a", ONE, (0,)),), StageEnd("node_progress", "a", 0.5)),
            Stage((Assignment("b", ONE, (0,)),), StageEnd("node_finished", "b")),
            Stage((Assignment("a", ONE, (0,)),)),
            Stage((Assignment("b", ONE, (0,)),)),
        )
    )
    trace = PlanSimulator(problem).simulate_scenario(plan, 0)
    coordinator = run_with_truth(problem, plan, SimulatedExecutor(), problem)
    for found, expected in zip(coordinator.ledger.finish_s, trace.finish_s, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-9)
    stages = [r["time_s"] for r in coordinator.log.records if r["kind"] == "stage"]
    assert stages[1] == stages[2] > 0
    np.testing.assert_allclose(stages, trace.stage_start_s, atol=1e-9)


class Immovable(LengthPrompts):
    """One node's requests have a parameter that nobody knows how to move."""

    def prepare(self, request: RequestId, ledger: Ledger) -> Prompt | Refused | None:
        made = super().prepare(request, ledger)
        if request[0] == 0 and isinstance(made, Prompt):
            return Prompt(
                made.prompt_tokens,
                made.max_tokens,
                sampling={"extra_args": {"processor": "x"}},
                output_tokens=made.output_tokens,
            )
        return made


def test_engines_of_immovable_requests_stay_until_they_have_finished() -> None:
    problem = small_problem()
    executor = SimulatedExecutor()
    executor.imitate(problem)
    executor.open(problem.cluster, None)
    log = RunLog(RunInfo("x", "test", "simulated"))
    source = Immovable(problem.scenarios[0])
    coordinator = Coordinator(problem, small_plan(), executor, source, log)
    coordinator.run()
    assert all((s == Status.FINISHED).all() for s in coordinator.ledger.status)
    assert not [r for r in log.records if r["kind"] == "moved" and r["node"] == "a"]
    stopped = [r for r in log.records if r["kind"] == "engine_stopped" and r["node"] == "a"]
    assert sum(r["num_finished"] for r in stopped) == 20
    # the plan's second stage wanted device 1, which the engine kept
    resized = [r for r in log.records if r["kind"] == "stage"][1]["time_s"]
    assert min(r["time_s"] for r in stopped) > resized
    moved = run_with_truth(problem, small_plan(), SimulatedExecutor(), problem)
    assert [r for r in moved.log.records if r["kind"] == "moved" and r["node"] == "a"]
