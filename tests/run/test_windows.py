"""Engines are given few requests at a time, and decide as if they had them all."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from samullm_simulated.plugin import SimulatedExecutor

from samullm_plugin.bench.cases import CaseSettings, make_case
from samullm_plugin.host.interfaces.backlog import Backlog
from samullm_plugin.host.interfaces.executor import WINDOW, EngineRequest, EngineSpec
from samullm_plugin.host.interfaces.observer import RunInfo
from samullm_plugin.host.manager import PluginHost
from samullm_plugin.model.application import ModelSpec
from samullm_plugin.planning.planner import make_plan
from samullm_plugin.planning.policies import policy_call
from samullm_plugin.run import results
from samullm_plugin.run.journal import Journal, read_journal
from samullm_plugin.run.ledger import Status
from samullm_plugin.run.log import RunLog
from samullm_plugin.run.results import Result, Results
from samullm_plugin.testing.strategies import plans, problems
from tests.run.test_coordinator_equals_simulator import assert_equal, consistent
from tests.run.test_failures import Mortal
from tests.run.worlds import run_with_truth, small_plan, small_problem


class Windowed(SimulatedExecutor):
    """Simulated engines that are given requests as real ones are.

    Attributes:
        most: by how many requests an engine has had more than its window, at most.
        urgent: requests beyond a window that were to be served before others of the engine.
        idle: requests beyond a window that were not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.most = -1_000_000
        self.urgent = self.idle = 0
        self._priority: dict[str, dict[int, int]] = {}

    def window(self, model: ModelSpec) -> int | None:
        return WINDOW * model.engine.max_num_seqs

    def window_of(self, spec: EngineSpec) -> int | None:
        return self.window(spec.model)

    def submit(self, key: str, requests: Sequence[EngineRequest]) -> None:
        engine, given = self.cluster.engine(key), self._priority.setdefault(key, {})
        window = WINDOW * engine.spec.model.engine.max_num_seqs
        held = [given[state.request] for state, _ in engine.generated(self.now_s())]
        for request in requests:
            if len(held) >= window and request.priority < max(held):
                self.urgent += 1
            elif len(held) >= window:
                self.idle += 1
            held.append(request.priority)
            given[request.request] = request.priority
        self.most = max(self.most, len(held) - window)
        super().submit(key, requests)


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(st.data())
def test_the_window_changes_no_time(data: st.DataObject) -> None:
    """To 1e-9 s, whatever stages, chains, moves and replicas there are."""
    problem = consistent(data.draw(problems()))
    plan = data.draw(plans(problem))
    executor = Windowed()
    assert_equal(problem, plan, executor=executor)
    assert executor.most <= 0


@pytest.mark.parametrize("name", ["longest-first", "shortest-first"])
def test_the_window_changes_no_order_of_a_policy(name: str) -> None:
    host = PluginHost.from_settings()
    problem = make_case(host, "small-1", CaseSettings(seeds=0)).problem
    plan = make_plan(host, problem, "min-heuristic").plan
    policy = policy_call(problem.app, host.create("request-policy", name), problem.scenarios)
    executor = Windowed()
    assert_equal(problem, plan, policy, executor=executor)
    assert not executor.idle


def test_only_what_is_to_be_served_before_others_goes_beyond_the_window() -> None:
    """Judgements become ready a few at a time: some are longer than what the engine has."""
    problem, executor = small_problem(n=300), Windowed()
    chosen = PluginHost.from_settings().create("request-policy", "longest-first")
    policy = policy_call(problem.app, chosen, problem.scenarios)
    whole = run_with_truth(problem, small_plan(), SimulatedExecutor(), problem, policy=policy)
    found = run_with_truth(problem, small_plan(), executor, problem, policy=policy)
    for finish_s, expected_s in zip(found.ledger.finish_s, whole.ledger.finish_s, strict=True):
        np.testing.assert_allclose(finish_s, expected_s, rtol=1e-9)
    assert executor.most > 0
    assert executor.urgent > 0
    assert not executor.idle


def test_many_requests_wait_outside() -> None:
    """Eight at a time: an engine with 300 requests has never more than 24."""
    problem, executor = small_problem(n=300), Windowed()
    expected = run_with_truth(problem, small_plan(), SimulatedExecutor(), problem).ledger
    found = run_with_truth(problem, small_plan(), executor, problem).ledger
    for finish_s, expected_s in zip(found.finish_s, expected.finish_s, strict=True):
        np.testing.assert_allclose(finish_s, expected_s, rtol=1e-9)
    assert executor.most == 0
    assert not executor.idle


class MortalWindowed(Mortal, Windowed):
    """The same with engines that die."""


@pytest.mark.parametrize("seed", range(4))
def test_what_waited_for_an_engine_that_died_is_served_elsewhere(seed: int) -> None:
    """Two deaths are too few to give a request up, and what waited was under none."""
    problem = small_problem(seed, n=80)
    executor = MortalWindowed(lambda e, s: e.polls in (7, 30), forgets=seed % 2 == 0)
    ledger = run_with_truth(problem, small_plan(), executor, problem).ledger
    for status, generated, lengths in zip(
        ledger.status, ledger.generated, problem.scenarios[0].output_tokens, strict=True
    ):
        assert (status == Status.FINISHED).all()
        np.testing.assert_array_equal(generated, lengths)


@given(st.lists(st.integers(0, 3)), st.integers(0, 5))
def test_a_backlog_is_in_order(priorities: list[int], taken: int) -> None:
    backlog: Backlog[int] = Backlog()
    expected = []
    for request, priority in enumerate(priorities):
        backlog.add(priority, request)
        expected.append((priority, request))
    expected.sort()
    found = [backlog.take() for _ in range(min(taken, len(backlog)))]
    assert found == expected[:taken]
    assert sorted(backlog.clear()) == sorted(r for _, r in expected[taken:])
    assert not len(backlog)


def test_results_are_read_back_from_the_journal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is in them, once more has come than is kept in memory."""
    monkeypatch.setattr(results, "KEPT_BYTES", 2000)
    journal = Journal(tmp_path / "events.jsonl")
    log = RunLog(RunInfo("r", "a", "x"), journal)
    held = Results([100])
    held.read, log.written = journal.read, held.written
    texts = {r: "é🚲\u2028\n" * r for r in range(100)}  # some longer than one read
    texts[7] = "x" * 100_000
    for r, text in texts.items():
        held.add((0, r), Result(r, 3, "stop", text))
        log.add_settled(
            (0, r),
            {"time_s": 1.5, "kind": "finished", "node": "n", "request": r, "num_tokens": r,
             "prompt_tokens": 3, "finish_reason": "stop", "text": text},
        )  # fmt: skip
        if r % 10 == 0:
            log.flush()
    log.flush()
    assert len(held._recent) < 10
    assert {r: held[0, r] for r in texts} == {
        r: Result(r, 3, "stop", text) for r, text in texts.items()
    }
    assert [k for k, _ in held.items()] == [(0, r) for r in range(100)]
    held.pop((0, 5))
    assert held.get((0, 5)) is None
    assert (0, 5) not in held
    assert (0, 6) in held
    size = journal.path.stat().st_size
    beside = size - sum(len(json.dumps(t, ensure_ascii=False).encode()) for t in texts.values())
    assert beside / 100 <= 300
    journal.close()
    assert len(list(read_journal(journal.path))) == 100
    assert log.records == []


def test_values_count_as_what_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Vectors are as large as texts, though they have none."""
    monkeypatch.setattr(results, "KEPT_BYTES", 100_000)
    journal = Journal(tmp_path / "events.jsonl")
    log = RunLog(RunInfo("r", "a", "x"), journal)
    held = Results([50])
    held.read, log.written = journal.read, held.written
    vectors = np.random.default_rng(0).normal(size=(50, 1024)).tolist()
    for r, vector in enumerate(vectors):
        held.add((0, r), Result(1, 3, "stop", value=vector))
        log.add_settled(
            (0, r),
            {"time_s": 1.5, "kind": "finished", "node": "n", "request": r, "num_tokens": 1,
             "finish_reason": "stop", "value": vector},
        )  # fmt: skip
    log.flush()
    assert 1 <= len(held._recent) <= 3
    assert [held[0, r].value for r in range(50)] == vectors
    journal.close()
