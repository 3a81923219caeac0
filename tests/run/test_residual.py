"""What is left of a run as a problem: chances of requests behind filters, stages at shares."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from samullm_plugin.model.application import Application, ModelNode, ModelSpec, PythonNode
from samullm_plugin.model.cluster import Cluster
from samullm_plugin.model.requests import RequestTable
from samullm_plugin.rules.repeats import with_repeats
from samullm_plugin.run.drift import Snapshot
from samullm_plugin.run.ledger import Status
from samullm_plugin.run.residual import residual_problem, residual_work, taken_rate
from samullm_plugin.run.residual_plans import residual_plan, whole_plan
from tests.run.worlds import small_plan, small_problem

MODEL = ModelSpec("m", 256)
COUNT = 60


def filtered() -> Application:
    """A filter of 60 items and a node behind it that is expected to get 40 % of them."""
    first = RequestTable.of([8] * COUNT, 16)
    behind = RequestTable.of(
        [8] * COUNT,
        16,
        [[(0, r)] for r in range(COUNT)],
        probability=np.full(COUNT, 0.4),
        gate=np.arange(COUNT),
    )
    nodes = (ModelNode("filter", MODEL, first), ModelNode("behind", MODEL, behind))
    return Application("filtered", nodes)


def snapshot_of(app: Application, behind: dict[int, Status]) -> Snapshot:
    """A run in which the first requests of the filter have finished, and these are behind it."""
    status = [np.zeros(len(n.requests), np.int8) for n in app.nodes]
    status[0][list(behind)] = Status.FINISHED
    for r, state in behind.items():
        status[1][r] = state
    none = tuple(np.zeros(len(s), np.int64) for s in status)
    cut = tuple(np.zeros(len(s), bool) for s in status)
    return Snapshot(0.0, tuple(status), none, cut, {}, (1.0,) * 2, 1.0, (0,))


def test_requests_that_have_started_are_sure() -> None:
    app = filtered()
    states = {0: Status.SUBMITTED, 1: Status.READY, 2: Status.SKIPPED}
    left = residual_work(app, snapshot_of(app, states))
    assert left is not None
    table = left.app.nodes[1].requests
    assert table.probability.tolist() == [1.0, 1.0, *[0.4] * (COUNT - 3)]
    assert table.gate is not None
    assert table.gate.tolist() == [-1, -1, *range(3, COUNT)]


@pytest.mark.parametrize(("passed", "rate"), [(20, 2.0), (10, 1.0), (5, 0.5)])
def test_what_the_filter_let_through_is_learned(passed: int, rate: float) -> None:
    """Of 25 items 10 were expected: the others are as likely as those were."""
    app = filtered()
    states = {r: Status.FINISHED if r < passed else Status.SKIPPED for r in range(25)}
    snapshot = snapshot_of(app, states)
    assert taken_rate(app, 1, snapshot) == pytest.approx(rate)
    left = residual_work(app, snapshot)
    assert left is not None
    assert left.app.nodes[1].requests.probability == pytest.approx(min(1.0, 0.4 * rate))


def test_what_was_rejected_is_learned() -> None:
    """What waits for an output that failed was not taken: 15 of 25, 10 were expected."""
    app = filtered()
    states = {r: Status.FINISHED if r < 15 else Status.FAILED for r in range(25)}
    snapshot = snapshot_of(app, states)
    snapshot.status[0][15:25] = Status.FAILED
    assert taken_rate(app, 1, snapshot) == pytest.approx(1.5)


def test_the_rate_of_rejections_is_learned() -> None:
    """Of 25 outputs and 15 rejected ones 40 were judged; the plan had counted on a tenth."""
    first = RequestTable.of([10] * COUNT, 8)
    behind = RequestTable.of([8] * COUNT, 16, [[(0, r)] for r in range(COUNT)])
    rate = ModelNode("rate", MODEL, first, retries=2, reject_rate=0.1)
    app = with_repeats(Application("rated", (rate, ModelNode("behind", MODEL, behind))))
    snapshot = snapshot_of(app, dict.fromkeys(range(25), Status.READY))
    asked = app.nodes[0].parts[0].place(np.arange(25))
    snapshot.status[0][:] = Status.WAITING
    snapshot.status[0][asked] = Status.FINISHED
    snapshot.status[0][asked + 1] = Status.SKIPPED  # of the third tries nobody has said anything
    for rejected, expected in (({"rate": 15}, 15 / 40), ({}, 0.0)):
        left = residual_work(app, replace(snapshot, rejected=rejected))
        assert left is not None
        chance = left.app.nodes[0].requests.probability
        assert chance[:25] == pytest.approx(expected)
        first_tries, again = chance[25::3], np.delete(chance[25:], np.s_[::3])
        assert first_tries.tolist() == [1.0] * (COUNT - 25)
        assert again == pytest.approx(np.full(2 * (COUNT - 25), expected))
        assert left.requests[0].max() == COUNT - 1  # of whose lengths each is a sample
    snapshot.status[0][asked[5:]] = Status.SUBMITTED  # five say nothing
    left = residual_work(app, replace(snapshot, rejected={"rate": 4}))
    assert left is not None
    assert left.app.nodes[0].requests.probability[-1] == pytest.approx(0.1)


def test_measured_seconds_of_calls_are_planned_with() -> None:
    app = filtered()
    calls = RequestTable.of([0] * COUNT, 1, [[(1, r)] for r in range(COUNT)])
    python = (PythonNode("f", calls, COUNT, 0.5), PythonNode("g", calls, COUNT, 0.25))
    app = Application("called", app.nodes, python=python)
    none = [np.zeros(COUNT, np.int64)] * 4
    status, cut = [np.zeros(COUNT, np.int8)] * 4, [np.zeros(COUNT, bool)] * 4
    snapshot = Snapshot(
        0.0, tuple(status), tuple(none), tuple(cut), {}, (1.0,) * 2, 1.0, (0,), call_s={2: 3.0}
    )
    left = residual_work(app, snapshot)
    assert left is not None
    assert [p.seconds for p in left.app.python] == [3.0, 0.25]


def test_few_decisions_say_nothing() -> None:
    app = filtered()
    assert taken_rate(app, 1, snapshot_of(app, dict.fromkeys(range(19), Status.FINISHED))) == 1.0


def test_a_share_is_of_all_requests_not_of_those_left() -> None:
    """A stage that ends at half of 20 requests waits for 2 of the 12 that are left after 8."""
    problem, plan = small_problem(), small_plan()
    status = [np.zeros(20, np.int8) for _ in range(3)]
    status[0][:8] = Status.FINISHED
    app = problem.app
    zeros = tuple(np.zeros(20, np.int64) for _ in range(3))
    cut = tuple(np.zeros(20, bool) for _ in range(3))
    snapshot = Snapshot(0.0, tuple(status), zeros, cut, {}, (1.0,) * 3, 1.0, (0, 1, 2))
    left = residual_work(app, snapshot)
    assert left is not None
    first = residual_plan(plan, 0, left, status, {}).stages[0]
    assert (first.end.kind, first.end.node) == ("node_progress", "a")
    assert first.end.fraction == pytest.approx(2 / 12)
    back = whole_plan(residual_plan(plan, 0, left, status, {}), left, status)
    assert back.stages[0].end.fraction == pytest.approx(10 / 20)
    assert [s.assignments for s in back.stages] == [s.assignments for s in plan.stages]
    status[0][:10] = Status.FINISHED
    left = residual_work(app, replace(snapshot, status=tuple(status)))
    assert left is not None
    assert residual_plan(plan, 0, left, status, {}).stages[0].end.kind == "first_finisher"


def test_what_machines_have_read_stays_read_on_those_that_are_left() -> None:
    whole = small_problem()
    gpu = whole.cluster.gpus[0]
    cluster = Cluster((gpu,) * 3, ((0,), (1,), (2,)), ((0,), (1, 2)))
    problem = replace(whole, cluster=cluster, page_cache="cold")
    status = tuple(np.zeros(20, np.int8) for _ in range(3))
    zeros = tuple(np.zeros(20, np.int64) for _ in range(3))
    cut = tuple(np.zeros(20, bool) for _ in range(3))
    read = frozenset({("model-a", 0), ("model-b", 1)})
    snapshot = Snapshot(0.0, status, zeros, cut, {}, (1.0,) * 3, 1.0, (1, 2), read)
    left = residual_work(problem.app, snapshot)
    assert left is not None
    after = residual_problem(problem, left, problem.scenarios, snapshot)
    assert (after.page_cache, after.in_page_cache) == ("cold", {("model-b", 0)})
