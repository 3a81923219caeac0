"""Engines that die, do not start, or take requests down with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from samullm_simulated.plugin import SimulatedExecutor

from samullm_plugin.host.interfaces.executor import EngineEvent, EngineSpec, RequestOutput
from samullm_plugin.host.interfaces.observer import RunEvent, RunInfo
from samullm_plugin.model.parallel import ParallelConfig
from samullm_plugin.model.plan import Assignment, Plan, Stage
from samullm_plugin.model.problem import Problem
from samullm_plugin.run.coordinator import Coordinator
from samullm_plugin.run.ledger import Status
from samullm_plugin.run.log import SETTLED, RunLog
from tests.run.worlds import run_with_truth, small_plan, small_problem


class Mortal(SimulatedExecutor):
    """Reports engines as failed when ``dies`` says so after a poll."""

    def __init__(self, dies: Callable[[Mortal, EngineSpec], bool], *, forgets: bool) -> None:
        super().__init__()
        self.dies, self.forgets = dies, forgets
        self.polls = 0
        self.failed: set[str] = set()

    def poll(self, timeout_s: float) -> Sequence[EngineEvent]:
        self.polls += 1
        events = list(super().poll(timeout_s))
        for key, engine in self._cluster.engines.items():
            if key not in self.failed and self.dies(self, engine.spec):
                self.failed.add(key)
                # Dead at the moment at which it would have been ready: it has not started.
                events = [e for e in events if e.key != key or e.kind != "ready"]
                events.append(EngineEvent(key, "failed", self.now_s(), reason="killed"))
        return events

    def stop_engine(self, key: str) -> Sequence[RequestOutput]:
        outputs = super().stop_engine(key)
        if key in self.failed and self.forgets:  # nobody knows what it had generated
            for o in outputs:
                self._cluster._requests[self.spec_node[key]].generated[o.request] -= o.num_tokens
            return [RequestOutput(o.request, 0) for o in outputs]
        return outputs

    @property
    def spec_node(self) -> dict[str, int]:
        return self._nodes

    def start_engine(self, spec: EngineSpec) -> None:
        self._nodes = {**getattr(self, "_nodes", {}), spec.key: spec.node}
        super().start_engine(spec)


def run(
    problem: Problem, plan: Plan, executor: SimulatedExecutor, log: RunLog | None = None
) -> Coordinator:
    coordinator = run_with_truth(problem, plan, executor, problem, log=log)
    assert coordinator.ledger.all_settled or coordinator.stopped
    held: dict[int, str] = {}
    for record in coordinator.log.records:  # no device is ever held twice
        if record["kind"] == "engine_started":
            for device in record["devices"]:
                assert device not in held
                held[device] = record["key"]
        elif record["kind"] == "engine_stopped":
            held = {d: k for d, k in held.items() if k != record["key"]}
    assert not held
    return coordinator


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 3),
    polls=st.lists(st.integers(1, 120), max_size=8, unique=True),
    forgets=st.booleans(),
)
def test_requests_survive_random_deaths(seed: int, polls: list[int], forgets: bool) -> None:
    """Each request finishes once with all its tokens, unless too many engines died under it."""
    problem = small_problem(seed)
    rng = np.random.default_rng(seed)

    def dies(executor: Mortal, spec: EngineSpec) -> bool:
        return executor.polls in polls and bool(rng.random() < 0.6)

    events: list[RunEvent] = []
    log = RunLog(RunInfo("deaths", problem.app.name, "simulated"))
    log.add_listener(lambda e: events.append(e) if e.kind in SETTLED else None)
    coordinator = run(problem, small_plan(), Mortal(dies, forgets=forgets), log)
    ledger = coordinator.ledger
    settled = [e.fields["node"] + str(e.fields["request"]) for e in events]
    assert len(settled) == len(set(settled))
    assert coordinator.drained or len(settled) == problem.app.num_requests
    for i, lengths in enumerate(problem.scenarios[0].output_tokens):
        done = ledger.status[i] == Status.FINISHED
        np.testing.assert_array_equal(ledger.generated[i][done], lengths[done])
    for (i, r), result in ledger.results.items():
        if result.error is None:
            continue
        why = ("engines died under it", "finished in between", "its input")
        assert any(w in result.error for w in why), (i, r)


def test_a_death_is_healed_on_other_devices() -> None:
    problem = small_problem(num_gpus=4)
    one = ParallelConfig()
    nodes = ("a", "b", "judge")
    plan = Plan((Stage(tuple(Assignment(n, one, (d,)) for d, n in enumerate(nodes))),))
    executor = Mortal(lambda e, s: e.polls == 10 and s.key == "b.0.0", forgets=True)
    coordinator = run(problem, plan, executor)
    starts = [r for r in coordinator.log.records if r["kind"] == "engine_started"]
    assert [r["devices"] for r in starts if r["node"] == "b"] == [(1,), (3,)]
    assert not any((s == Status.FAILED).any() for s in coordinator.ledger.status)


def test_a_model_that_never_starts_stops_the_run_resumable() -> None:
    """Its requests do not fail for an engine argument that can be corrected."""
    problem = small_problem()
    executor = Mortal(lambda e, s: s.key.startswith("b."), forgets=True)
    coordinator = run_with_truth(problem, small_plan(), executor, problem)
    assert coordinator.drained
    assert coordinator.stopped == "engines of b do not start (3 in a row); the last: killed"
    for status in coordinator.ledger.status:
        assert not (status == Status.FAILED).any()
    failures = [r for r in coordinator.log.records if r["kind"] == "engine_failed"]
    assert len(failures) == 3
    assert coordinator.log.records[-1]["kind"] == "drained"
    assert not executor._cluster.engines


@pytest.mark.parametrize("works", ["at first", "in between"])
def test_engines_that_do_not_start_are_counted_apart(works: str) -> None:
    """Two die at work, then three do not start; or one dies at work after every two of those."""
    problem = small_problem()
    turns = {"at first": [1, 1, 0, 0, 0], "in between": [0, 0, 1] * 20}[works]
    died: dict[str, int] = {}

    def dies(executor: Mortal, spec: EngineSpec) -> bool:
        if spec.node != 1:
            return False
        turn = turns[min(died.setdefault(spec.key, len(died)), len(turns) - 1)]
        running = executor._cluster.engine(spec.key).generated(executor.now_s())
        return not turn or bool(list(running))

    executor = Mortal(dies, forgets=True)
    coordinator = run_with_truth(problem, small_plan(), executor, problem)
    failed = [r["failures"] for r in coordinator.log.records if r["kind"] == "engine_failed"]
    if works == "at first":
        assert coordinator.stopped == "engines of b do not start (3 in a row); the last: killed"
        assert failed == [1, 2, 1, 2, 3]
        assert not any((s == Status.FAILED).any() for s in coordinator.ledger.status)
    else:
        assert not coordinator.stopped
        assert failed[:6] == [1, 2, 1, 1, 2, 2]
        assert len(failed) > 6
        assert (coordinator.ledger.status[1] == Status.FAILED).any()


def test_a_model_whose_engines_die_at_work_is_given_up_and_the_rest_goes_on() -> None:
    problem = small_problem()

    def dies(executor: Mortal, spec: EngineSpec) -> bool:
        engine = executor._cluster.engine(spec.key)
        return spec.node == 1 and bool(list(engine.generated(executor.now_s())))

    coordinator = run(problem, small_plan(), Mortal(dies, forgets=True))
    ledger = coordinator.ledger
    assert (ledger.status[0] == Status.FINISHED).all()
    failed = ledger.status[1] == Status.FAILED
    assert failed.any()
    errors = {str(ledger.results[1, r].error) for r in np.flatnonzero(failed).tolist()}
    assert any("engines" in e and "the last: killed" in e for e in errors)
    np.testing.assert_array_equal(failed, ledger.status[2] == Status.FAILED)


def test_a_request_that_kills_engines_is_given_up_alone() -> None:
    """Whenever one request of node a has run for a while, its engine dies."""
    problem = small_problem()
    poison = int(np.argmax(problem.scenarios[0].output_tokens[0]))

    def dies(executor: Mortal, spec: EngineSpec) -> bool:
        if spec.node != 0:
            return False
        running = executor._cluster.engine(spec.key).generated(executor.now_s())
        return any(s.request == poison and tokens >= 2 for s, tokens in running)

    executor = Mortal(dies, forgets=True)
    coordinator = run(problem, small_plan(), executor)
    ledger = coordinator.ledger
    assert "3 engines died under it" in str(ledger.results[0, poison].error)
    assert ledger.status[2][poison] == Status.FAILED
    survivors = int((ledger.status[0] == Status.FINISHED).sum())
    assert survivors >= 12  # all but those that were beside it every time


@pytest.mark.parametrize("forgets", [False, True])
def test_every_engine_dies_once(forgets: bool) -> None:
    problem = small_problem(1)
    seen: set[str] = set()

    def dies(executor: Mortal, spec: EngineSpec) -> bool:
        name = spec.key.split(".")[0]
        if name in seen or not executor._cluster.engine(spec.key).submitted:
            return False
        seen.add(name)
        return True

    coordinator = run(problem, small_plan(), Mortal(dies, forgets=forgets))
    assert seen == {"a", "b", "judge"}
    for i in range(3):
        assert (coordinator.ledger.status[i] == Status.FINISHED).all()
