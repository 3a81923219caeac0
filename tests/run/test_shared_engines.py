"""Engines of a node that has finished go on for other nodes of the same checkpoint."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from samullm_cpsat.certificate import certify
from samullm_cpsat.durations import measure
from samullm_simulated.plugin import SimulatedExecutor

from samullm_plugin.api.app import App
from samullm_plugin.cli.app import main
from samullm_plugin.host.manager import PluginHost
from samullm_plugin.model.cluster import Cluster, Gpu
from samullm_plugin.model.parallel import ParallelConfig
from samullm_plugin.model.plan import Assignment, Plan, Stage
from samullm_plugin.model.problem import Problem
from samullm_plugin.planning.planner import PlanningOptions, make_plan
from samullm_plugin.rules.bounds import lower_bound
from samullm_plugin.rules.sharing import shared_problem, sharing_choices
from samullm_plugin.rules.transition import Running, RunState, next_transition
from samullm_plugin.run.journal import read_journal
from samullm_plugin.run.metrics import measured_engines
from samullm_plugin.simulator import PlanSimulator
from samullm_plugin.testing.factories import TestNode, make_problem
from samullm_plugin.testing.strategies import plans
from tests.run.worlds import run_with_truth

ONE, TWO = ParallelConfig(), ParallelConfig(2)


def judged(devices: int = 1) -> Problem:
    """A writer, three checks by one judge, and another model between two of them."""
    n = 6
    each = [[(0, r)] for r in range(n)]
    nodes = [
        TestNode("write", [5] * n, [7 + r for r in range(n)], step_s=0.05, load_s=4.0),
        TestNode("check0", [5] * n, [2] * n, each, step_s=0.04, load_s=3.0),
        TestNode("other", [5] * n, [3] * n, [[(1, r)] for r in range(n)], step_s=0.05, load_s=2.0),
        TestNode("check1", [5] * n, [2] * n, each, step_s=0.04, load_s=3.0),
        TestNode("check2", [5] * n, [4] * n, [[(2, r)] for r in range(n)], step_s=0.04, load_s=3.0),
    ]
    problem = make_problem(nodes, devices, nvlink=1)
    judge, costs = problem.app.nodes[1].model, problem.costs[1]
    same = (1, 3, 4)
    app = replace(
        problem.app,
        nodes=tuple(
            replace(node, model=judge) if i in same else node
            for i, node in enumerate(problem.app.nodes)
        ),
    )
    return replace(
        problem,
        app=app,
        costs=tuple(costs if i in same else c for i, c in enumerate(problem.costs)),
    )


def run_equals_plan(problem: Problem, plan: Plan) -> list[str | None]:
    """Return which engines took others over, after comparing a run with its plan."""
    trace = PlanSimulator(problem).simulate_scenario(plan, 0)
    run = run_with_truth(problem, plan, SimulatedExecutor(), problem)
    for i, finish_s in enumerate(trace.finish_s):
        np.testing.assert_allclose(run.ledger.finish_s[i], finish_s, rtol=1e-9, atol=1e-9)
    starts = [r for r in run.log.records if r["kind"] == "engine_started"]
    engines = measured_engines(run.log.records)
    for record, engine in zip(starts, engines, strict=True):
        loaded = "takes_over" not in record
        assert engine.ready_s is not None
        assert (engine.ready_s > engine.start_s) == loaded == (not engine.taken_over), record
    assert all(e.end_s is not None for e in engines)
    return [r.get("takes_over") for r in starts]


def stages(*names: str, parallel: ParallelConfig = ONE, devices: tuple[int, ...] = (0,)) -> Plan:
    return Plan(tuple(Stage((Assignment(n, parallel, devices),)) for n in names))


def test_a_judge_is_loaded_once() -> None:
    problem = judged()
    assert problem.same_engine == {"check0": 1, "check1": 1, "check2": 1}
    plan = stages("write", "check0", "check1", "other", "check2")
    assert run_equals_plan(problem, plan) == [None, None, "check0.0.0", None, None]
    apart = problem.without_shared_engines()
    assert run_equals_plan(apart, plan) == [None] * 5
    shared_s, apart_s = (
        PlanSimulator(p).simulate_scenario(plan, 0).makespan_s for p in (problem, apart)
    )
    assert apart_s - shared_s == pytest.approx(3.0)


def test_the_bound_of_exact_counts_no_start_that_may_be_spared() -> None:
    """Nodes that wait for others as well as those that do not."""
    problem = judged()
    simulator = PlanSimulator(problem)
    bound_s, _ = certify(problem, measure(problem, simulator, 200), 100_000, lambda: True)
    plan = stages("write", "check0", "check1", "other", "check2")
    assert 6.0 < bound_s <= simulator.simulate_scenario(plan, 0).makespan_s


def test_several_replicas_are_taken_over_together() -> None:
    problem = judged(2)
    plan = stages("write", "check0", "check1", "other", "check2", parallel=TWO, devices=(0, 1))
    taken = [t for t in run_equals_plan(problem, plan) if t is not None]
    assert taken == ["check0.0.0", "check0.0.1"]


def test_engines_of_another_size_are_started() -> None:
    problem = judged(2)
    first = stages("write", "check0", parallel=TWO, devices=(0, 1))
    plan = Plan((*first.stages, *stages("check1", "other", "check2").stages))
    assert [t for t in run_equals_plan(problem, plan) if t is not None] == []


def moved(*also: Assignment) -> dict[str, Running]:
    """Return what starts when ``a`` has finished on device 0 and ``c`` is planned on device 1."""
    cluster = Cluster.uniform(Gpu("g", 1), 3)
    work = Assignment("work", ONE, (2,))
    first = Assignment("a", ONE, (0,))
    plan = Plan((Stage((first, work)), Stage((Assignment("c", ONE, (1,)), work, *also))))
    state = RunState(0, {"work": Running(work, (2,), 0)}, {"a"})
    state.released = {"a": Running(first, (0,), 0)}
    move = next_transition(plan, cluster, {}, state, same_engine={"a": 0, "c": 0})
    return {r.planned.node: r for r in move.start}


def test_where_they_are_and_not_where_it_was_planned() -> None:
    taken = moved()["c"]
    assert (taken.devices, taken.takes_over) == ((0,), "a")


def test_nobody_loses_its_place_by_that() -> None:
    started = moved(Assignment("d", ONE, (0,)))
    assert (started["c"].devices, started["c"].takes_over) == ((1,), None)
    assert started["d"].devices == (0,)


@pytest.mark.parametrize("scheduler", ["greedy", "min-heuristic", "max-heuristic", "auto", "exact"])
@pytest.mark.parametrize("devices", [1, 2])
def test_every_scheduler_plans_with_it(scheduler: str, devices: int) -> None:
    """What is planned is what is run, above the bound; sharing is never longer on one device."""
    problem = judged(devices)
    host = PluginHost.from_settings()
    result = make_plan(host, problem, scheduler)
    taken = [t for t in run_equals_plan(problem, result.plan) if t is not None]
    bound = lower_bound(problem, problem.scenarios[0]).value_s
    assert bound <= float(result.makespan_s[0]) + 1e-9
    if devices == 1:
        apart = make_plan(host, problem.without_shared_engines(), scheduler)
        assert taken
        assert float(result.makespan_s[0]) < float(apart.makespan_s[0])


SHARING = PlanningOptions(simulator_of=PlanSimulator)


def siblings(devices: int, *, long: bool = False, n: int = 12) -> Problem:
    """A writer, and two nodes of one judge that read what it writes; or two long lines of them."""
    each = [[(0, r)] for r in range(n)]
    line = [[(1, r - 1)] if r else [(0, 0)] for r in range(n)]
    other = [[(2, r - 1)] if r else [(0, 0)] for r in range(n)]
    problem = make_problem(
        [
            TestNode("write", [5] * n, [7 + r for r in range(n)], step_s=0.05, load_s=4.0),
            TestNode("one", [5] * n, [9] * n, line if long else each, step_s=0.04, load_s=3.0),
            TestNode("two", [6] * n, [5] * n, other if long else each, step_s=0.04, load_s=3.0),
        ],
        devices,
        nvlink=1,
    )
    nodes, costs = problem.app.nodes, problem.costs
    app = replace(problem.app, nodes=(*nodes[:2], replace(nodes[2], model=nodes[1].model)))
    return replace(problem, app=app, costs=(*costs[:2], costs[1]))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_a_run_with_siblings_as_one_is_as_planned(data: st.DataObject) -> None:
    devices, long = data.draw(st.integers(1, 3)), data.draw(st.booleans())
    problem = siblings(devices, long=long)
    choices = sharing_choices(problem)
    assert len(choices) == 1
    shared = shared_problem(problem, choices[0])
    run_equals_plan(shared, data.draw(plans(shared)))


@pytest.mark.parametrize("devices", [1, 2, 3])
@pytest.mark.parametrize("long", [False, True])
def test_auto_shares_where_that_is_shorter(devices: int, long: bool) -> None:
    """Never longer than without, and below no bound; what is planned is what is run."""
    problem = siblings(devices, long=long)
    host = PluginHost.from_settings()
    apart, result = make_plan(host, problem, "auto"), make_plan(host, problem, "auto", SHARING)
    assert result.makespan_s[0] <= apart.makespan_s[0] + 1e-9
    assert result.lower_bound_s[0] <= result.makespan_s[0] + 1e-9
    assert bool(result.shared) == (result.makespan_s[0] < apart.makespan_s[0] - 1e-9)
    assert [n.name for n in result.problem.app.nodes] == (
        ["write", "one+two"] if result.shared else ["write", "one", "two"]
    )
    run_equals_plan(result.problem, result.plan)
    starts = [sum(s.ready_s > s.start_s for s in r.traces[0].segments) for r in (apart, result)]
    assert starts[1] <= starts[0]
    assert any("engines shared by one with two" in note for note in result.notes)


def test_it_is_a_choice_and_no_rule() -> None:
    chosen = {
        (devices, long): bool(
            make_plan(
                PluginHost.from_settings(), siblings(devices, long=long), "auto", SHARING
            ).shared
        )
        for devices in (2, 3)
        for long in (False, True)
    }
    assert set(chosen.values()) == {False, True}, chosen


@pytest.mark.parametrize("scheduler", ["greedy", "min-heuristic"])
def test_schedulers_that_do_not_choose_plan_what_they_are_given(scheduler: str) -> None:
    host, problem = PluginHost.from_settings(), siblings(2)
    result = make_plan(host, problem, scheduler, SHARING)
    assert result.shared == {}
    assert result.problem is problem


APP = """
version: 1
name: two-checks
models:
  writer: {model: THUDM/chatglm3-6b, max_model_len: 4096}
  judge: {model: lmsys/vicuna-13b-v1.5}
nodes:
  write: {model: writer, requests: rows.jsonl, sampling_params: {max_tokens: 60}}
  facts:
    model: judge
    for_each: write
    prompt: "Facts? {{ output }}"
    sampling_params: {max_tokens: 9, temperature: 0}
  style: {model: judge, for_each: write, prompt: "Style?", sampling_params: {max_tokens: 5}}
cluster: {gpus: 2, gpu: A100-80GB, nvlink: 1}
executor: simulated
"""


def test_a_choice_is_kept_shown_run_and_resumed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """plan.json tells which nodes are one; other sampling and prompts are no reason to be apart."""
    app, plan = tmp_path / "app.yaml", tmp_path / "plan.json"
    app.write_text(APP)
    rows = [{"id": f"r{k}", "prompt": "tell me " * (1 + k % 5)} for k in range(30)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert main(["plan", str(app), "-o", str(plan), "--output-json", "-", "--explain"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["fused"] == {"facts+style": ["facts", "style"]}
    assert "facts+style: facts and style, on the same engines" in err
    assert "engines shared by facts with style" in err
    stored = json.loads(plan.read_text())
    assert stored["fused"] == {"facts+style": ["facts", "style"]}
    for name, words in (("given", ["--plan", str(plan)]), ("made", [])):
        directory = tmp_path / name
        assert main(["run", str(app), *words, "--output-dir", str(directory)]) == 0
        records = list(read_journal(directory / "events.jsonl"))
        starts = {r["node"] for r in records if r["kind"] == "engine_started"}
        assert starts == {"write", "facts+style"}
        assert {p.stem for p in (directory / "outputs").iterdir()} == {"write", "facts", "style"}
    assert main(["plan", str(app), "--no-fusion", "--output-json", "-"]) == 0
    assert json.loads(capsys.readouterr()[0])["fused"] == {}
    for cut in range(2):  # goes on from the command line, and from Python
        data = (tmp_path / "made/events.jsonl").read_bytes()
        directory = tmp_path / f"cut{cut}"
        shutil.copytree(tmp_path / "made", directory)
        (directory / "events.jsonl").write_bytes(data[: len(data) // 2])
        if cut:
            assert App.from_yaml(app).resume(directory).wait().done()
        else:
            assert main(["run", str(app), "--resume", str(directory)]) == 0
        records = list(read_journal(directory / "events.jsonl"))
        done = [(r["node"], r["request"]) for r in records if r["kind"] == "finished"]
        assert len(done) == len(set(done)) == 90
