"""Runs on executors that imitate engines: the truth is known, though not to the coordinator."""

from __future__ import annotations

from samullm_plugin.host.interfaces.executor import Executor
from samullm_plugin.host.interfaces.observer import RunInfo
from samullm_plugin.model.plan import Plan
from samullm_plugin.model.problem import Problem
from samullm_plugin.run.adjustments import Adjustments
from samullm_plugin.run.coordinator import Coordinator
from samullm_plugin.run.log import RunLog
from samullm_plugin.run.sources import LengthSource
from samullm_plugin.simulator.runs import PolicyCall


def run_imitated(
    problem: Problem,
    plan: Plan,
    executor: Executor,
    truth: Problem,
    *,
    log: RunLog | None = None,
    adjustments: Adjustments | None = None,
    policy: PolicyCall | None = None,
) -> Coordinator:
    """Carry a plan out where ``truth`` holds, without a run directory.

    Args:
        problem: what the plan and its adjustments assume.
        plan: the plan.
        executor: one that imitates engines; it is closed afterwards.
        truth: lengths (its first scenario), latencies and load times.
        log: is told what happens; None: a new one.
        adjustments: may replace the plan.
        policy: order and replicas of requests.
        policy: order and replicas of requests; None: first come, first served, in turn.

    Returns:
        The coordinator after the run.
    """
    log = log or RunLog(RunInfo("imitated", problem.app.name, executor.name))
    executor.imitate(truth)
    executor.open(problem.cluster, None)
    try:
        source = LengthSource(truth.scenarios[0])
        coordinator = Coordinator(
            problem, plan, executor, source, log, adjustments=adjustments, policy=policy
        )
        coordinator.run()
    finally:
        executor.close()
    return coordinator
