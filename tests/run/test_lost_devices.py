"""Machines that go away during a run, and come back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from samullm_simulated.plugin import SimulatedExecutor

from samullm_plugin.errors import RunError
from samullm_plugin.host.interfaces.executor import EngineEvent, RequestOutput
from samullm_plugin.host.interfaces.observer import RunInfo
from samullm_plugin.host.manager import PluginHost
from samullm_plugin.model.cluster import Cluster, Network
from samullm_plugin.model.parallel import ParallelConfig
from samullm_plugin.model.plan import Assignment, Plan, Stage
from samullm_plugin.model.problem import Problem
from samullm_plugin.rules.placement import one_at_a_time
from samullm_plugin.rules.verify import verify
from samullm_plugin.run.coordinator import Coordinator
from samullm_plugin.run.log import RunLog
from samullm_plugin.run.replanning import Replanner
from tests.run.worlds import run_with_truth, setup_run, small_plan, small_problem


class Vanishing(SimulatedExecutor):
    """Loses devices after so many polls, and gets them back; their engines are heard of no more."""

    def __init__(self, changes: dict[int, tuple[str, tuple[int, ...]]]) -> None:
        super().__init__()
        self.changes, self.polls = changes, 0
        self.gone: set[int] = set()
        self.dead: set[str] = set()

    def poll(self, timeout_s: float) -> Sequence[EngineEvent]:
        self.polls += 1
        events = list(super().poll(timeout_s))
        if self.polls in self.changes:
            kind, devices = self.changes[self.polls]
            self.gone = self.gone | set(devices) if kind == "lost" else self.gone - set(devices)
            events.append(
                EngineEvent("", kind, self.now_s(), reason="unplugged", devices=devices)  # type: ignore[arg-type]
            )
            for key, engine in self._cluster.engines.items():
                if kind == "lost" and not self.gone.isdisjoint(engine.spec.devices):
                    self.dead.add(key)
                    events.append(EngineEvent(key, "failed", self.now_s(), reason="unplugged"))
        return events

    def start_engine(self, spec) -> None:  # type: ignore[no-untyped-def]
        assert self.gone.isdisjoint(spec.devices), "an engine starts on lost devices"
        super().start_engine(spec)

    def stop_engine(self, key: str) -> Sequence[RequestOutput]:
        outputs = super().stop_engine(key)
        self.dead.discard(key)
        return outputs


def two_machines(problem: Problem) -> Problem:
    cluster = Cluster(problem.cluster.gpus, (), ((0,), (1, 2)))
    return replace(problem, cluster=cluster)


def carry_out(
    problem: Problem, plan: Plan, executor: Vanishing, tmp_path: object = None
) -> Coordinator:
    replanner = None
    if tmp_path is not None:
        setup = setup_run(problem, tmp_path)  # type: ignore[arg-type]
        replanner = Replanner(PluginHost.from_settings(), setup.instance)
    return run_with_truth(problem, plan, executor, problem, replanner=replanner)


def tokens(run: Coordinator) -> dict[object, int]:
    return {request: result.num_tokens for request, result in run.ledger.results.items()}


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.integers(0, 3),
    st.lists(
        st.tuples(
            st.integers(1, 60), st.sampled_from(["lost", "joined"]), st.sampled_from([(0,), (1,)])
        ),
        max_size=5,
        unique_by=lambda change: change[0],
    ),
    st.booleans(),
)
def test_every_request_finishes_once_whatever_goes_away(
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    changes: list[tuple[int, str, tuple[int, ...]]],
    replans: bool,
) -> None:
    problem = two_machines(small_problem(seed, n=10))
    executor = Vanishing({polls: (kind, devices) for polls, kind, devices in changes})
    folder = tmp_path_factory.mktemp("run") if replans else None
    run = carry_out(problem, small_plan(), executor, folder)
    assert run.ledger.all_settled
    assert not any(r.error for _, r in run.ledger.results.items())
    expected = {
        (i, r): int(n)
        for i, lengths in enumerate(problem.scenarios[0].output_tokens)
        for r, n in enumerate(lengths)
    }
    assert tokens(run) == expected
    assert not any(r["kind"] == "engine_failed" for r in run.log.records)


def test_lost_devices_are_no_failures_of_the_node_and_healthy_replicas_go_on() -> None:
    problem = two_machines(small_problem(1, n=40))
    executor = Vanishing({12: ("lost", (0,))})
    run = carry_out(problem, small_plan(), executor)
    kinds = [r["kind"] for r in run.log.records]
    at = kinds.index("devices_lost")
    assert run.log.records[at]["devices"] == [0]
    assert run.log.records[at]["reason"] == "unplugged"
    stopped = [r["key"] for r in run.log.records[at:] if r["kind"] == "engine_stopped"]
    assert stopped[0] == "a.0.0"  # the one on device 0, first
    assert run.ledger.all_settled


def test_the_plan_is_made_again_for_what_is_left(tmp_path) -> None:
    problem = two_machines(small_problem(2, n=60))
    executor = Vanishing({10: ("lost", (1, 2)), 40: ("joined", (1, 2))})
    run = carry_out(problem, small_plan(), executor, tmp_path)
    plans = [r for r in run.log.records if r["kind"] == "plan"]
    assert plans, "nothing was planned for the devices that are left"
    used = {d for s in plans[0]["plan"]["stages"] for a in s["assignments"] for d in a["devices"]}
    assert used == {0}
    later = [r for r in run.log.records if r["kind"] == "engine_started"]
    assert any(set(r["devices"]) & {1, 2} for r in later[-2:]), "devices that came back are used"


def test_a_lost_machine_takes_the_replicas_that_lie_on_it_in_part(tmp_path) -> None:
    """Stages of a replica are on two machines; with one of them gone it starts on two others."""
    problem = small_problem(3, n=40)
    machines = tuple((d,) for d in range(3))
    cluster = replace(problem.cluster, machines=machines, network=Network(1e9, 1e-4))
    wide = {replace(k, pipeline_parallel_size=2): c for k, c in problem.costs[0].items()}
    problem = replace(problem, cluster=cluster, costs=(wide, *problem.costs[1:]))
    two, one = ParallelConfig(1, 1, 2), ParallelConfig()
    stages = (
        Stage((Assignment("a", two, (0, 1)), Assignment("b", one, (2,)))),
        Stage((Assignment("judge", one, (2,)),)),
    )
    assert verify(problem, Plan(stages)) == ()
    run = carry_out(problem, Plan(stages), Vanishing({12: ("lost", (1,))}), tmp_path)
    assert run.ledger.all_settled
    assert tokens(run) == {
        (i, r): int(n)
        for i, lengths in enumerate(problem.scenarios[0].output_tokens)
        for r, n in enumerate(lengths)
    }
    starts = [r for r in run.log.records if r["kind"] == "engine_started" and r["node"] == "a"]
    assert [sorted(r["devices"]) for r in starts] == [[0, 1], [0, 2]]
    assert not any(r["kind"] == "engine_failed" for r in run.log.records)


def test_a_run_without_any_device_left_says_so_and_can_be_resumed() -> None:
    problem = two_machines(small_problem(0))
    with pytest.raises(RunError, match=r"devices \[0, 1, 2\] are lost \(unplugged\).*resume it"):
        carry_out(problem, small_plan(), Vanishing({8: ("lost", (0, 1, 2))}))


def test_one_at_a_time_is_a_valid_plan_on_the_devices_given() -> None:
    problem = two_machines(small_problem(0))
    plan = one_at_a_time(problem, problem.app.order, {1, 2})
    assert verify(problem, plan) == ()
    assert {d for s in plan.stages for a in s.assignments for d in a.devices} == {1, 2}
    assert [s.assignments[0].parallel for s in plan.stages] == [ParallelConfig(2)] * 3


def test_unused_lost_devices_leave_the_engines_alone() -> None:
    # The judge needs two devices: it cannot start early on the one that is not planned for.
    problem = two_machines(small_problem(0))
    one = ParallelConfig()
    plan = Plan(
        (
            Stage((Assignment("a", one, (1,)), Assignment("b", one, (2,)))),
            Stage((Assignment("judge", ParallelConfig(2), (1, 2)),)),
        )
    )
    run = carry_out(problem, plan, Vanishing({6: ("lost", (0,))}))
    assert not any(r["kind"] == "plan" for r in run.log.records)
    starts = [r["node"] for r in run.log.records if r["kind"] == "engine_started"]
    assert sorted(starts) == ["a", "b", "judge", "judge"]


def test_events_name_the_devices() -> None:
    log = RunLog(RunInfo("run", "app", "simulated"))
    problem = two_machines(small_problem(0))
    executor = Vanishing({3: ("lost", (2,)), 9: ("joined", (2,)), 10: ("joined", (2,))})
    run_with_truth(problem, small_plan(), executor, problem, log=log)
    changes = [r for r in log.records if r["kind"].startswith("devices_")]
    assert [r["kind"] for r in changes] == ["devices_lost", "devices_joined"]
    assert np.all([r["devices"] == [2] for r in changes])
