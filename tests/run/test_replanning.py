"""Planning again while a run goes on."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from samullm_simulated.plugin import SimulatedExecutor

from samullm_plugin.app.spec import Component, PlannerSection
from samullm_plugin.host.manager import PluginHost
from samullm_plugin.model.application import Application, EngineOptions, ModelNode
from samullm_plugin.model.cluster import Cluster
from samullm_plugin.model.parallel import ParallelConfig
from samullm_plugin.model.plan import Assignment, Plan, Stage, StageEnd
from samullm_plugin.model.problem import Problem
from samullm_plugin.model.requests import RequestTable
from samullm_plugin.model.scenarios import make_scenario
from samullm_plugin.planning.instances import Instance
from samullm_plugin.rules.transition import Running
from samullm_plugin.run.coordinator import Coordinator
from samullm_plugin.run.drift import DriftEstimator, Snapshot, length_observations
from samullm_plugin.run.ledger import Status
from samullm_plugin.run.proposing import Proposal, Proposer, ReplanOptions
from samullm_plugin.run.replanning import Replanner
from samullm_plugin.run.residual import residual_problem, residual_work
from samullm_plugin.run.residual_plans import aligned, residual_plan
from samullm_plugin.run.view import Replanning, RunView
from samullm_plugin.simulator import PlanSimulator
from samullm_plugin.testing.factories import GPU, TestNode, make_problem
from tests.run.worlds import NoLatency, Uniform, run_with_truth, small_plan, small_problem


class Looking(Replanning):
    """Keeps a snapshot at one moment."""

    def __init__(self, at_s: float) -> None:
        self.at_s, self.snapshot = at_s, None
        self._drift = DriftEstimator()

    def consider(self, coordinator: Coordinator, *, stage_changed: bool) -> Plan | None:
        if self.snapshot is None and coordinator.now_s() >= self.at_s:
            self._drift.take_steps(coordinator)
            self.snapshot = self._drift.snapshot(coordinator)
            self.stage = coordinator.rule.stage
            self.observations = length_observations(coordinator, self.snapshot)
        return None


def looked(problem: Problem, plan: Plan, at_s: float) -> tuple[Coordinator, Looking, Snapshot]:
    look = Looking(at_s)
    coordinator = run_with_truth(problem, plan, SimulatedExecutor(), problem, replanner=look)
    assert look.snapshot is not None
    return coordinator, look, look.snapshot


@pytest.mark.parametrize("at_s", [0.0, 3.0, 4.5, 6.0, 7.0])
def test_what_is_left_takes_as_long_as_it_did(at_s: float) -> None:
    """The remaining problem with true lengths, simulated from the running engines.

    Up to what running requests prefill again in the simulation.
    """
    problem = small_problem(1)
    coordinator, look, snapshot = looked(problem, small_plan(), at_s)
    left = residual_work(problem.app, snapshot)
    assert left is not None
    lengths = [problem.scenarios[0].output_tokens[i][rows] for i, rows in left.kept]
    rest_lengths = tuple(n - g for n, g in zip(lengths, left.generated, strict=True))
    prompts = [problem.scenarios[0].prompt_tokens[i][rows] for i, rows in left.kept]
    scenario = replace(
        problem.scenarios[0],
        prompt_tokens=tuple(p + g for p, g in zip(prompts, left.generated, strict=True)),
        output_tokens=rest_lengths,
    )
    rest = residual_problem(problem, left, (scenario,), snapshot)
    engines = {n: r for n, (r, _) in snapshot.running.items()}
    plan = residual_plan(small_plan(), look.stage, left, snapshot.status, engines)
    running = {n: v for n, v in snapshot.running.items() if n in {x.name for x in rest.app.nodes}}
    took_s = PlanSimulator(rest, running=running).simulate_scenario(plan, 0).makespan_s
    end_s = max(float(f.max()) for f in coordinator.ledger.finish_s)
    assert snapshot.now_s + took_s == pytest.approx(end_s, rel=0.06)


@pytest.mark.parametrize("chained", [False, True])
def test_engines_that_go_on_keep_their_caches(chained: bool) -> None:
    """Going on costs no prefilling; an engine that is moved pays for it, and for its start."""
    engine = EngineOptions(max_num_seqs=8, max_num_batched_tokens=256, async_scheduling=False)
    inputs = [[(0, 0)]] * 8 if chained else None
    nodes = [
        TestNode("first", [5] * 30, [5 * k + 5 for k in range(30)], step_s=0.1, load_s=1.0),
        TestNode("a", [250] * 8, [200] * 8, inputs, step_s=0.05, token_s=0.004, load_s=1.0,
                 engine=engine),
    ]  # fmt: skip
    problem = make_problem(nodes, 3, nvlink=1)
    one = ParallelConfig()
    plan = Plan((Stage((Assignment("first", one, (0,)), Assignment("a", one, (1,)))),
                 Stage((Assignment("a", one, (1,)),))))  # fmt: skip
    coordinator, look, snapshot = looked(problem, plan, 13.0)
    end_s = max(float(f.max()) for f in coordinator.ledger.finish_s)
    left = residual_work(problem.app, snapshot)
    assert left is not None
    kept = [(problem.scenarios[0].output_tokens[i][rows]) for i, rows in left.kept]
    lengths = tuple(n - g for n, g in zip(kept, left.generated, strict=True))
    rest = residual_problem(problem, left, (make_scenario(left.app, lengths),), snapshot)
    engines = {n: r for n, (r, _) in snapshot.running.items()}
    going_on = residual_plan(plan, look.stage, left, snapshot.status, engines)
    simulator = PlanSimulator(rest, running=snapshot.running)
    held_s = -snapshot.running["a"][1]
    assert held_s > 8.0  # 8 x 250 tokens and more, at 4 ms
    took_s = simulator.simulate_scenario(going_on, 0).makespan_s
    assert took_s == pytest.approx(end_s - snapshot.now_s, rel=0.03)
    stages = tuple(
        Stage(tuple(replace(a, devices=(2,)) if a.node == "a" else a for a in s.assignments), s.end)
        for s in going_on.stages
    )
    moved_s = simulator.simulate_scenario(Plan(stages), 0).makespan_s
    assert moved_s - took_s == pytest.approx(1.0 + held_s, rel=0.1)


def test_the_remainder_keeps_who_waits_for_whom() -> None:
    problem = small_problem(1)
    _, _, snapshot = looked(problem, small_plan(), 5.0)
    left = residual_work(problem.app, snapshot)
    assert left is not None
    place = {i: k for k, (i, _) in enumerate(left.kept)}
    for k, (i, rows) in enumerate(left.kept):
        old, new = problem.app.nodes[i].requests, left.app.nodes[k].requests
        assert (snapshot.status[i][rows] < Status.FINISHED).all()
        for position, r in enumerate(rows):
            part = slice(old.input_indptr[r], old.input_indptr[r + 1])
            pairs = list(zip(old.input_node[part], old.input_request[part], strict=True))
            waits = [(s, q) for s, q in pairs if snapshot.status[s][q] < Status.FINISHED]
            part = slice(new.input_indptr[position], new.input_indptr[position + 1])
            found = [
                (left.kept[s][0], left.kept[s][1][q])
                for s, q in zip(new.input_node[part], new.input_request[part], strict=True)
            ]
            assert found == waits
            entered = sum(int(snapshot.generated[s][q]) for s, q in pairs if (s, q) not in waits)
            own = int(old.prompt_tokens[r] + snapshot.generated[i][r])
            assert new.prompt_tokens[position] == own + entered
            assert new.max_tokens[position] == old.max_tokens[r] - snapshot.generated[i][r]
    assert place


def test_running_requests_are_censored_observations() -> None:
    problem = small_problem(1)
    _, look, snapshot = looked(problem, small_plan(), 5.0)
    for seen in look.observations:
        i = problem.app.index(seen.model.removeprefix("model-"))
        finished = snapshot.status[i] == Status.FINISHED
        assert int((~seen.censored).sum()) == int(finished.sum())
        truth = np.sort(problem.scenarios[0].output_tokens[i][finished])
        np.testing.assert_array_equal(np.sort(seen.output_tokens[~seen.censored]), truth)
        assert seen.censored.any()
        assert (seen.output_tokens[seen.censored] >= 1).all()


def test_measured_factors() -> None:
    """Latencies and load times 1.5 and 2 times as long as planned are found out."""
    problem = small_problem(1, n=40)
    slow = Problem(
        problem.app,
        problem.cluster,
        problem.scenarios,
        tuple(
            {
                k: replace(
                    c,
                    latency=c.latency.scaled(1.5),  # type: ignore[attr-defined]
                    load=replace(c.load, warm_s=2 * c.load.warm_s),
                )
                for k, c in modes.items()
            }
            for modes in problem.costs
        ),
    )
    look = Looking(9.0)
    run_with_truth(problem, small_plan(), SimulatedExecutor(), slow, replanner=look)
    assert look.snapshot is not None
    assert look.snapshot.latency_factor == pytest.approx((1.5, 1.5, 1.5))
    assert look.snapshot.load_factor == pytest.approx(2.0)


def test_alignment_keeps_engines_where_they_are() -> None:
    two = ParallelConfig(1, 2)
    nodes = [TestNode(n, [4], [4], sizes=(1, 2)) for n in "abc"]
    problem = make_problem(nodes, 4, nvlink=2)
    plan = Plan(
        (
            Stage((Assignment("a", two, (0, 1)), Assignment("b", ParallelConfig(2), (2, 3)))),
            Stage((Assignment("a", two, (0, 1)), Assignment("c", ParallelConfig(), (2,)))),
        )
    )
    held = Running(Assignment("a", two, (3, 2)), (3, 2), 0)
    found = aligned(plan, problem, {"a": held})
    assert found.stages[0].assignment("a") == held.planned
    assert found.stages[1].assignment("a") == held.planned
    b, c = found.stages[0].assignment("b"), found.stages[1].assignment("c")
    assert b is not None
    assert c is not None
    assert set(b.devices) == {0, 1}
    assert set(c.devices) < {0, 1}


def test_alignment_exchanges_whole_machines() -> None:
    two = ParallelConfig(1, 2)
    nodes = [TestNode(n, [4], [4], sizes=(1, 2)) for n in "ab"]
    base = make_problem(nodes, 4, nvlink=2)
    cluster = Cluster(base.cluster.gpus, ((0, 1), (2, 3)), ((0, 1), (2, 3)))
    problem = replace(base, cluster=cluster)
    plan = Plan((Stage((Assignment("a", two, (0, 1)), Assignment("b", two, (2, 3)))),))
    held = Running(Assignment("a", two, (2, 3)), (2, 3), 0)
    found = aligned(plan, problem, {"a": held})
    assert found.stages[0].assignment("a") == held.planned
    assert found.stages[0].assignment("b") == Assignment("b", two, (0, 1))


def test_alignment_keeps_to_machines_of_the_same_shape() -> None:
    one = ParallelConfig()
    problem = make_problem([TestNode("a", [4], [4])], 3)
    cluster = Cluster(problem.cluster.gpus, (), ((0,), (1, 2)))
    plan = Plan((Stage((Assignment("a", one, (0,)),)),))
    held = Running(Assignment("a", one, (2,)), (2,), 0)
    assert aligned(plan, replace(problem, cluster=cluster), {"a": held}) == plan


def mis_estimated(factor: float) -> tuple[Instance, Plan, Problem]:
    """Two models on two devices; the second runs after the first although both could run at once.

    The planner believed the first to be short, so that a stage on both devices seemed best.
    """
    n = 200
    table = RequestTable.of([10] * n, 400)
    base = make_problem(
        [TestNode(x, [10] * n, [20] * n, step_s=0.05, token_s=1e-3, load_s=3.0) for x in "ab"], 2
    )
    nodes = tuple(replace(node, requests=table) for node in base.app.nodes)
    app = Application("test", tuple(ModelNode(x.name, x.model, x.requests) for x in nodes))
    problem = Problem(app, Cluster.uniform(GPU, 2, nvlink=2), base.scenarios, base.costs)
    rng = np.random.default_rng(3)
    lengths = tuple(np.minimum(rng.integers(1, int(30 * factor), n), 400) for _ in range(2))
    truth = problem.with_scenarios((replace(problem.scenarios[0], output_tokens=lengths),))
    planner = PlannerSection(scheduler=Component(type="min-heuristic"), scenarios=1)
    both = ParallelConfig(2)
    plan = Plan(
        (
            Stage((Assignment("a", both, (0, 1)),), StageEnd("node_finished", "a")),
            Stage((Assignment("b", ParallelConfig(), (0,)),)),
        )
    )
    return Instance(problem, Uniform(), NoLatency(), planner), plan, truth


def test_a_bad_plan_is_left() -> None:
    instance, plan, truth = mis_estimated(8.0)
    host = PluginHost.from_settings()

    def makespan_s(replanner: Replanner | None) -> float:
        done = run_with_truth(
            instance.problem, plan, SimulatedExecutor(), truth, replanner=replanner
        )
        for i, lengths in enumerate(truth.scenarios[0].output_tokens):
            np.testing.assert_array_equal(done.ledger.generated[i], lengths)
        return max(float(f.max()) for f in done.ledger.finish_s)

    fixed_s = makespan_s(None)
    replanner = Replanner(host, instance)
    adjusted_s = makespan_s(replanner)
    assert adjusted_s < 0.85 * fixed_s
    adopted = [p for p in replanner.proposals if p.plan is not None]
    assert 1 <= len(adopted) <= 3
    assert all(p.gain_s > 0 for p in adopted)


def test_a_small_gain_changes_nothing() -> None:
    instance, plan, truth = mis_estimated(8.0)
    replanner = Replanner(PluginHost.from_settings(), instance, ReplanOptions(min_gain=0.9))
    run_with_truth(instance.problem, plan, SimulatedExecutor(), truth, replanner=replanner)
    assert any(p.gain_s > 0 for p in replanner.proposals)
    assert all(p.plan is None for p in replanner.proposals)


class Halfway(Proposer):
    """Proposes to change over when half of what is left of the first model is done."""

    def _plans(
        self, rest: Problem, simulator: PlanSimulator, incumbent: Plan | None
    ) -> Iterator[Plan]:
        one = ParallelConfig()
        a, b, moved = (Assignment(n, one, (d,)) for n, d in (("a", 0), ("b", 1), ("b", 0)))
        at_half = Stage((a, b), StageEnd("node_progress", "a", 0.5))
        yield Plan((at_half, Stage((Assignment("a", one, (1,)), moved))))


def test_a_share_of_what_is_left_is_none_of_what_was_to_do() -> None:
    """The stage ends when half of the rest is done, 0.45 being done already, not half of all."""
    instance, plan, truth = mis_estimated(8.0)
    host, options = PluginHost.from_settings(), ReplanOptions(min_gain=0.0)
    replanner = Replanner(host, instance, options)
    replanner.proposer = Halfway(host, instance, options)
    done = run_with_truth(instance.problem, plan, SimulatedExecutor(), truth, replanner=replanner)
    records = done.log.records
    adopted = [k for k, r in enumerate(records) if r["kind"] == "plan"]
    assert adopted
    for k in adopted:
        after = records[k + 1 :]
        began, ended = (
            next(r["time_s"] for r in after if r["kind"] == "stage" and r["stage"] == s)
            for s in (0, 1)
        )
        left = done.ledger.finish_s[0] > began
        assert np.mean(done.ledger.finish_s[0][left] <= ended) == pytest.approx(0.5, abs=0.02)


class Thinking(Replanner):
    """Has a plan at once, and answers at the first look or when another stage has begun."""

    def __init__(self, instance: Instance, proposal: Proposal, *, late: bool) -> None:
        super().__init__(PluginHost.from_settings(), instance)
        self.proposal, self.late = proposal, late
        self.answers: list[Plan | None] = []

    def consider(self, run: RunView, *, stage_changed: bool) -> Plan | None:
        if self._asked is None and len(run.rule.running) == 2:
            self._asked, self.stage = self._question(run, drifted_only=False), run.rule.stage
            self._future = Future()
            self._future.set_result(self.proposal)
        if self._future is not None and (not self.late or run.rule.stage > self.stage):
            self.answers.append(self._answer(run))
            if self.answers[-1] is None:
                self._checked_s = run.now_s()  # no look for drift is due
                return super().consider(run, stage_changed=False)
            return self.answers[-1]
        return None


@pytest.mark.parametrize("late", [False, True])
def test_a_plan_for_engines_that_have_changed_is_not_adopted_but_asked_for_again(
    late: bool,
) -> None:
    problem, plan = small_problem(1), small_plan()
    planner = PlannerSection(scheduler=Component(type="min-heuristic"), scenarios=1)
    instance = Instance(problem, Uniform(), NoLatency(), planner)
    proposal = Proposal(plan, 1.0, 10.0, 0.0)
    replanner = Thinking(instance, proposal, late=late)
    run_with_truth(problem, plan, SimulatedExecutor(), problem, replanner=replanner)
    assert replanner.answers == [None if late else plan]
    assert (replanner.proposals == [proposal]) is not late
    assert len(replanner.proposals) == 1


def test_a_run_with_several_plans_can_be_resumed(tmp_path: Path) -> None:
    """The journal's last plan is the one that goes on."""
    from samullm_plugin.app.loaded import LoadedApplication
    from samullm_plugin.run.journal import read_journal
    from samullm_plugin.run.run import resume_run, start_run
    from samullm_plugin.run.setup import RunSetup

    instance, plan, truth = mis_estimated(8.0)
    host = PluginHost.from_settings()
    loaded = LoadedApplication(
        truth.app, truth.cluster, output_tokens=truth.scenarios[0].output_tokens
    )
    directory = tmp_path / "run"
    known = Instance(truth, instance.estimator, instance.latency_model, instance.planner)
    setup = RunSetup(
        host, loaded, known, "simulated", directory, replanner=Replanner(host, instance)
    )
    start_run(setup, plan)
    records = list(read_journal(directory / "events.jsonl"))
    plans = [k for k, r in enumerate(records) if r["kind"] == "plan"]
    assert len(plans) >= 2
    lines = (directory / "events.jsonl").read_bytes().splitlines(keepends=True)
    (directory / "events.jsonl").write_bytes(b"".join(lines[: plans[-1] + 2]))
    fresh = replace(setup, replanner=Replanner(host, instance))
    outcome = resume_run(fresh)
    assert outcome.metrics["requests"]["finished"] == truth.app.num_requests


def test_another_plan_keeps_engines_that_are_elsewhere_than_planned() -> None:
    """It names the devices they hold."""
    nodes = [TestNode(n, [4], [k], load_s=10.0) for n, k in (("a", 10), ("b", 60), ("c", 60))]
    problem = make_problem(nodes, 2)
    one = ParallelConfig()
    a, b, c, elsewhere = (
        Assignment(n, one, (d,)) for n, d in (("a", 0), ("b", 1), ("c", 1), ("c", 0))
    )

    class Once(Replanning):
        adopted = False

        def consider(self, run: Coordinator, *, stage_changed: bool) -> Plan | None:
            if self.adopted or run.now_s() < 40.0:
                return None
            self.adopted = True
            assert run.rule.running["c"].planned == c
            return Plan((Stage((b, elsewhere), StageEnd("all_finished")),))

    plan = Plan((Stage((a, b)), Stage((c,), StageEnd("all_finished"))))
    replanner = Once()
    run = run_with_truth(problem, plan, SimulatedExecutor(), problem, replanner=replanner)
    assert replanner.adopted
    assert run.now_s() == pytest.approx(10 + 10 + 10 + 60)


def late_chains() -> tuple[Instance, Plan]:
    """Return a model, and behind it documents of which one is much longer than the others."""
    rng = np.random.default_rng(3)
    parts = [30, *[6] * 15]
    last: dict[int, int] = {}
    inputs: list[list[tuple[int, int]]] = []
    for k in range(max(parts)):
        for d in [d for d, count in enumerate(parts) if count > k]:
            inputs.append([(1, last[d])] if k else [(0, d)])
            last[d] = len(inputs) - 1
    few = EngineOptions(max_num_seqs=8, async_scheduling=False)
    lengths = rng.integers(2, 9, len(inputs)).tolist()
    nodes = [
        TestNode("first", [5] * 16, [*range(10, 170, 10)], step_s=0.02, load_s=1.0, engine=few),
        TestNode(
            "documents", [9] * len(inputs), lengths, inputs,
            step_s=0.02, token_s=0.005, load_s=1.0, engine=few,
        ),
    ]  # fmt: skip
    problem = make_problem(nodes, 2, nvlink=1)
    planner = PlannerSection(scheduler=Component(type="min-heuristic"), scenarios=1)
    both = ParallelConfig(2)
    plan = Plan(
        (
            Stage((Assignment("first", both, (0, 1)),), StageEnd("node_finished", "first")),
            Stage((Assignment("documents", both, (0, 1)),)),
        )
    )
    return Instance(problem, Uniform(10), NoLatency(), planner), plan


@pytest.mark.parametrize("asked", [False, True])
def test_a_plan_made_during_a_run_chooses_the_policy_of_nodes_without_engines(asked: bool) -> None:
    """By the lengths learned it gains; not where requests are asked to run as they come."""
    instance, plan = late_chains()
    if asked:
        fcfs = {"request_policy": Component(type="fcfs")}
        instance = replace(instance, planner=instance.planner.model_copy(update=fcfs))
    replanner = Replanner(PluginHost.from_settings(), instance)
    problem = instance.problem
    done = run_with_truth(problem, plan, SimulatedExecutor(), problem, replanner=replanner)
    assert done.ledger.all_settled
    chosen = [p for p in replanner.proposals if p.policy is not None]
    journal = [r["request_policy"] for r in done.log.records if "request_policy" in r]
    assert journal == ([] if asked else ["isolate-longest"])
    assert [p.policy for p in chosen] == journal
    assert all(p.gain_s > 0.05 * p.remaining_s for p in chosen)
    if not asked:  # the longest document is alone: its replica has finished its 30 parts, no more
        stopped = [r for r in done.log.records if r["kind"] == "engine_stopped"]
        counts = [r["num_finished"] for r in stopped if r["node"] == "documents"]
        assert 30 in counts


@pytest.mark.parametrize("late", [False, True])
def test_engines_keep_the_policy_they_were_started_with(late: bool) -> None:
    instance, plan = late_chains()
    asked: set[int] = set()

    def policy(scenario: int, node: int, *_: object) -> tuple[None, None]:
        del scenario
        asked.add(node)
        return None, None

    class Choosing(Replanning):
        def consider(self, run: Coordinator, *, stage_changed: bool) -> Plan | None:
            del stage_changed
            if not late or 1 in run.engines.deployments:
                run.choose_policy(policy)
            return None

    problem = instance.problem
    run_with_truth(problem, plan, SimulatedExecutor(), problem, replanner=Choosing())
    assert asked == (set() if late else {1})


def test_a_chosen_policy_is_taken_up_again(tmp_path: Path) -> None:
    """An interrupted run goes on under the policy that was chosen during it."""
    from samullm_plugin.app.loaded import LoadedApplication
    from samullm_plugin.run.journal import read_journal
    from samullm_plugin.run.run import resume_run, start_run
    from samullm_plugin.run.setup import RunSetup

    instance, plan = late_chains()
    host, problem = PluginHost.from_settings(), instance.problem
    loaded = LoadedApplication(
        problem.app, problem.cluster, output_tokens=problem.scenarios[0].output_tokens
    )
    directory = tmp_path / "run"
    setup = RunSetup(
        host, loaded, instance, "simulated", directory, replanner=Replanner(host, instance)
    )
    start_run(setup, plan)
    journal = directory / "events.jsonl"
    records = list(read_journal(journal))
    chosen = [k for k, r in enumerate(records) if r.get("request_policy") == "isolate-longest"]
    assert chosen
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[: chosen[-1] + 1]))
    seen: list[str | None] = []

    class Watching(Replanner):
        def start_with_policy(self, name: str) -> None:
            seen.append(name)
            super().start_with_policy(name)

    resume_run(replace(setup, replanner=Watching(host, instance)))
    assert seen == ["isolate-longest"]
    makespan_s = max(float(r["time_s"]) for r in read_journal(journal) if r["kind"] == "finished")
    assert makespan_s < 1.2 * float(records[-1]["time_s"])
