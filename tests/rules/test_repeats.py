"""Requests that retries may make, as rows that are planned with a probability."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from samullm_simulated.plugin import SimulatedExecutor

from samullm_plugin.app.loading import load_application
from samullm_plugin.engine import Curve, StepLatency
from samullm_plugin.host.manager import PluginHost
from samullm_plugin.model.application import Application, ModelNode, ModelSpec
from samullm_plugin.model.cluster import Cluster, Gpu
from samullm_plugin.model.costs import LoadTimes, ModeCosts, Provenance
from samullm_plugin.model.problem import ModeKey, Problem
from samullm_plugin.model.requests import RequestTable
from samullm_plugin.model.scenarios import draw_taken
from samullm_plugin.planning.building import sample_scenarios
from samullm_plugin.planning.planner import make_plan
from samullm_plugin.rules.fusion import fuse_chains, fuse_groups
from samullm_plugin.rules.repeats import with_repeats
from samullm_plugin.run.metrics import counts_of_ledger
from samullm_plugin.run.user_nodes import UserNodes
from samullm_plugin.simulator import PlanSimulator
from tests.run.worlds import Uniform, run_with_truth

COSTS = ModeCosts(
    StepLatency(Curve.line(0.004, 0.0001)), 8192, LoadTimes(1.5, 3.0), Provenance("assumed", "")
)
RATED = {
    "requests": "r.jsonl",
    "output_schema": {"choice": ["a", "b"]},
    "reject_rate": 0.4,
    "retries": 2,
}


def load(folder: Path, nodes: dict[str, Any], rows: int, models: int = 1) -> Application:
    lines = [
        json.dumps({"id": f"r{i}", "prompt": "go on " * (i % 7 + 1), "topic": f"t{i % 9}"})
        for i in range(rows)
    ]
    (folder / "r.jsonl").write_text("\n".join(lines) + "\n")
    known = {f"m{k}": {"model": f"m{k}", "max_model_len": 4096} for k in range(models)}
    for number, (name, section) in enumerate(nodes.items()):
        limit = {"max_tokens": 30 + number}
        nodes[name] = {"model": f"m{number % models}", "sampling_params": limit, **section}
    app = {"version": 1, "name": "t", "models": known, "nodes": nodes}
    (folder / "app.yaml").write_text(json.dumps(app))
    return load_application(folder / "app.yaml").app


def test_rows_for_the_second_and_the_third_try(tmp_path: Path) -> None:
    behind = {"for_each": "rate", "inputs": {"all": "rate"}}
    app = with_repeats(load(tmp_path, {"rate": RATED, "next": behind}, rows=3))
    rate, after = app.nodes
    assert (len(rate.requests), rate.repeats, len(rate.parts[0])) == (9, 2, 3)
    assert rate.requests.probability.tolist() == [1.0, 0.4, 0.4] * 3
    assert np.diff(rate.requests.input_indptr).tolist() == [0, 1, 1] * 3
    assert rate.requests.input_request.tolist() == [0, 1, 3, 4, 6, 7]  # each for the one before
    assert after.requests.input_request.tolist() == [0, 0, 2, 2, 3, 3, 5, 5, 6, 6, 8, 8]
    assert not after.requests.input_in_prompt[after.requests.input_request % 3 > 0].any()


def test_as_many_as_the_rate_says_one_after_another(tmp_path: Path) -> None:
    app = with_repeats(load(tmp_path, {"rate": RATED, "next": {"for_each": "rate"}}, rows=2000))
    rate, after = draw_taken(app, np.random.default_rng(0))
    first, second, third = rate.reshape(-1, 3).T
    assert first.all()
    assert 0.36 < second.mean() < 0.44
    assert 0.13 < third.mean() < 0.19
    assert not (third & ~second).any()
    assert 0.9 < after.mean() < 0.97  # 1 - 0.4 ** 3


def test_their_prompts_hold_the_same_outputs(tmp_path: Path) -> None:
    nodes = {"draft": {"requests": "r.jsonl"}, "rate": {**RATED, "for_each": "draft"}}
    del nodes["rate"]["requests"]
    app = with_repeats(load(tmp_path, nodes, rows=40))
    (scenario,) = sample_scenarios(app, Uniform(30), np.random.default_rng(0), 1)
    first, second, third = scenario.prompt_tokens[1].reshape(-1, 3).T
    assert (first == second).all()
    assert (first == third).all()
    assert (first == app.nodes[1].requests.prompt_tokens[::3] + scenario.output_tokens[0]).all()


def test_the_next_of_a_chain_waits_for_every_try() -> None:
    table = RequestTable.of([5, 6], 9, [[], [(0, 0)]])
    node = ModelNode("chain", ModelSpec("m", 100), table, retries=1, reject_rate=0.3)
    (made,) = with_repeats(Application("a", (node,))).nodes
    assert made.requests.prompt_tokens.tolist() == [5, 5, 6, 6]
    assert made.requests.probability.tolist() == [1.0, 0.3, 1.0, 0.3]
    inputs = [made.requests.input_request[list(made.requests.entries(r))] for r in range(4)]
    assert [i.tolist() for i in inputs] == [[], [0], [0, 1], [0, 1, 2]]
    assert made.requests.input_in_prompt.tolist() == [False, True, False, True, False, False]


def test_a_repetition_is_reported_as_what_it_repeats(tmp_path: Path) -> None:
    nodes = {"draft": {"requests": "r.jsonl"}, "rate": {**RATED, "for_each": "draft"}}
    del nodes["rate"]["requests"]
    app = fuse_chains(with_repeats(load(tmp_path, nodes, rows=4)), 1).app
    users = UserNodes(app)
    assert len(app.nodes) == 1
    assert [(n, len(p)) for n, _, p in users] == [("draft", 4), ("rate", 4)]
    assert users.written((0, 4 + 3 + 1)) == ("rate", 1)
    assert users.repeats((0, 4 + 3 + 1))
    assert not users.repeats((0, 4 + 3))
    assert users.planned("rate", 3) == (0, 4 + 9)
    assert users.planned("rate", 4) is None


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("chain", [False, True])
def test_plan_and_simulated_run_are_one(tmp_path: Path, fused: bool, chain: bool) -> None:
    """The same lengths and the same rejections: to the bit the same run, node by node."""
    rated = {**RATED, "chain": "topic"} if chain else RATED
    nodes: dict[str, Any] = {
        "draft": {"requests": "r.jsonl", "model": "m0"},
        "rate": {**rated, "model": "m1", "for_each": "draft"},
        "again": {**RATED, "model": "m1", "retries": 1, "for_each": "rate"},
        "last": {"model": "m0", "for_each": "again"},
    }
    del nodes["rate"]["requests"], nodes["again"]["requests"]
    written = with_repeats(load(tmp_path, nodes, rows=60, models=2))
    app = (fuse_chains(written, 2) if fused else fuse_groups(written, {})).app
    scenarios = sample_scenarios(app, Uniform(30), np.random.default_rng(1), 1)
    modes = {ModeKey("core", 1): COSTS}
    cluster = Cluster.uniform(Gpu("core", 1 << 30), 2)
    problem = Problem(app, cluster, scenarios, (modes,) * len(app.nodes))
    plan = make_plan(PluginHost.from_settings(), problem, "min-heuristic").plan
    trace = PlanSimulator(problem).simulate_scenario(plan, 0)
    run = run_with_truth(problem, plan, SimulatedExecutor(), problem)
    for i, finish_s in enumerate(trace.finish_s):
        np.testing.assert_allclose(run.ledger.finish_s[i], finish_s, rtol=1e-9, atol=1e-9)
    counts = counts_of_ledger(run.ledger)
    assert {n: c.finished + c.skipped for n, c in counts.items()} == dict.fromkeys(nodes, 60)
    ended = [r["node"] for r in run.log.records if r["kind"] == "node_finished"]
    assert sorted(ended) == sorted(nodes)
    asked = sum(int((o > 0).sum()) for o in scenarios[0].output_tokens)
    assert asked > 60 * 4 * 0.9 + 60 * 0.4  # some were asked again
    none = [o.copy() for o in scenarios[0].output_tokens]
    for i, node in enumerate(app.nodes):
        for part in node.parts:
            none[i][part.again] = 0
    without = problem.with_scenarios((replace(scenarios[0], output_tokens=tuple(none)),))
    fewer = PlanSimulator(without).simulate_scenario(plan, 0)
    assert sum(s.busy_s for s in fewer.segments) < sum(s.busy_s for s in trace.segments)
    assert fewer.makespan_s <= trace.makespan_s
