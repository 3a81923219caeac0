"""Small runs for the tests of the running phase."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from samullm_plugin.app.loaded import LoadedApplication
from samullm_plugin.app.spec import Component, PlannerSection
from samullm_plugin.host.interfaces.executor import Executor
from samullm_plugin.host.interfaces.latency import LatencyModel
from samullm_plugin.host.interfaces.length import LengthEstimator, LengthObservations, LengthQuery
from samullm_plugin.host.interfaces.observer import RunInfo
from samullm_plugin.host.manager import PluginHost
from samullm_plugin.model.application import EngineOptions
from samullm_plugin.model.parallel import ParallelConfig
from samullm_plugin.model.plan import Assignment, Plan, Stage, StageEnd
from samullm_plugin.model.problem import Problem
from samullm_plugin.planning.instances import Instance
from samullm_plugin.run.calibrating import Calibrator
from samullm_plugin.run.coordinator import Coordinator
from samullm_plugin.run.length_prompts import LengthPrompts
from samullm_plugin.run.log import RunLog
from samullm_plugin.run.setup import RunSetup
from samullm_plugin.run.view import Replanning
from samullm_plugin.simulator.runs import PolicyCall
from samullm_plugin.testing.factories import TestNode, make_problem


class Uniform(LengthEstimator):
    """Lengths from 1 to the limit, or as observed."""

    name = "uniform"

    def __init__(self, largest: int = 30) -> None:
        super().__init__()
        self.largest = largest
        self.seen: list[LengthObservations] = []

    def fit(self, observations: list[LengthObservations]) -> Uniform:  # type: ignore[override]
        new = Uniform(self.largest)
        new.seen = list(observations)
        values = [o.output_tokens[~o.censored] for o in observations]
        known = np.concatenate(values) if values else np.zeros(0)
        if len(known) >= 5:
            new.largest = max(1, round(2 * float(np.mean(known))))
        return new

    def sample(
        self, query: LengthQuery, rng: np.random.Generator, num_scenarios: int
    ) -> np.ndarray:
        drawn = rng.integers(1, self.largest + 1, (num_scenarios, len(query)))
        drawn = np.maximum(drawn, query.generated_tokens + 1)
        return np.minimum(drawn, query.max_tokens)


def small_problem(seed: int = 0, n: int = 20, num_gpus: int = 3) -> Problem:
    """Three models: two answer, the third judges both answers; one of the two is a chain."""
    rng = np.random.default_rng(seed)
    engine = EngineOptions(max_num_seqs=8, max_num_batched_tokens=64, async_scheduling=True)

    def lengths() -> list[int]:
        return [int(v) for v in rng.integers(1, 30, n)]

    chain = [[(1, r - 1)] if r % 3 else [] for r in range(n)]
    judge = [[(0, r), (1, r)] for r in range(n)]
    nodes = [
        TestNode("a", [8] * n, lengths(), step_s=0.05, load_s=2.0, engine=engine),
        TestNode("b", [6] * n, lengths(), chain, step_s=0.08, load_s=1.0, engine=engine),
        TestNode("judge", [9] * n, lengths(), judge, step_s=0.06, load_s=1.5, engine=engine),
    ]
    return make_problem(nodes, num_gpus, nvlink=1)


def small_plan() -> Plan:
    """Both answer, one of them on two devices; then it gives one up to the judge."""
    one, two = ParallelConfig(), ParallelConfig(2)
    return Plan(
        (
            Stage(
                (Assignment("a", two, (0, 1)), Assignment("b", one, (2,))),
                StageEnd("node_progress", "a", 0.5),
            ),
            Stage(
                (
                    Assignment("a", one, (0,)),
                    Assignment("b", one, (2,)),
                    Assignment("judge", one, (1,)),
                ),
                StageEnd("first_finisher"),
            ),
            Stage((Assignment("b", one, (0,)), Assignment("judge", two, (1, 2)))),
        )
    )


class NoLatency(LatencyModel):
    """Is never asked."""

    name = "none"
    step_latency = kv_cache_tokens = load_times = provenance = None  # type: ignore[assignment]


NoLatency.__abstractmethods__ = frozenset()


def setup_run(problem: Problem, directory: Path, **changes: object) -> RunSetup:
    """Return a simulated run of a problem whose lengths are known."""
    host = PluginHost.from_settings()
    loaded = LoadedApplication(
        problem.app, problem.cluster, output_tokens=problem.scenarios[0].output_tokens
    )
    planner = PlannerSection(scheduler=Component(type="min-heuristic"))
    instance = Instance(problem, Uniform(), NoLatency(), planner)
    values: dict[str, object] = {"executor": "simulated", "directory": directory, **changes}
    return RunSetup(host, loaded, instance, **values)  # type: ignore[arg-type]


def run_with_truth(
    problem: Problem,
    plan: Plan,
    executor: Executor,
    truth: Problem,
    *,
    log: RunLog | None = None,
    replanner: Replanning | None = None,
    policy: PolicyCall | None = None,
    calibrator: Calibrator | None = None,
) -> Coordinator:
    """Carry a plan out where ``truth`` holds, without a run directory.

    Args:
        problem: what the plan and its replanner assume.
        plan: the plan.
        executor: a simulated one; it is closed afterwards.
        truth: lengths (its first scenario), latencies and load times.
        log: where events go; None: a new one.
        replanner: may replace the plan.
        policy: order and replicas of requests; None: first come, first served, in turn.
        calibrator: gathers what the run measures.

    Returns:
        The coordinator after the run.
    """
    log = log or RunLog(RunInfo("imitated", problem.app.name, executor.name))
    executor.imitate(truth)
    executor.open(problem.cluster, None)
    try:
        source = LengthPrompts(truth.scenarios[0])
        coordinator = Coordinator(
            problem,
            plan,
            executor,
            source,
            log,
            replanner=replanner,
            policy=policy,
            calibrator=calibrator,
        )
        coordinator.run()
    finally:
        executor.close()
    return coordinator
