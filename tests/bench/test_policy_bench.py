"""What the policies' bench says, against what can be worked out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from samullm_plugin import Assignment, EngineOptions, ParallelConfig, Plan, PluginHost, Stage
from samullm_plugin.bench.policy_bench import (
    PREDICTIONS,
    compare_policies,
    predictions,
)
from samullm_plugin.cli.app import main
from samullm_plugin.testing.factories import TestNode, make_problem

DOCS = Path(__file__).parents[2] / "docs" / "policies.md"


@pytest.fixture(scope="module")
def host():
    return PluginHost()


def one_after_the_other(outputs, **changes):
    node = TestNode(
        "a", [4] * len(outputs), outputs, engine=EngineOptions(max_num_seqs=1), **changes
    )
    plan = Plan((Stage((Assignment("a", ParallelConfig(1, 1, 1), (0,)),)),))
    return make_problem([node], 1), plan


def rows(host, problem, plan, *policies, noise=0.0):
    believed = {
        "exact": problem.scenarios,
        "noisy": predictions(host, problem, "noisy", estimator="ecdf", noise=noise, seed=0),
    }
    found = compare_policies(host, "it", problem, plan, policies, believed)
    return {(r.policy, r.prediction): r for r in found}


def test_means_are_what_they_are_by_hand(host):
    problem, plan = one_after_the_other([30, 10, 20], step_s=1.0, load_s=10.0)
    found = rows(host, problem, plan, "fcfs", "shortest-first", "longest-first")
    finish = {"fcfs": [30, 40, 60], "shortest-first": [10, 30, 60], "longest-first": [30, 50, 60]}
    for policy, seconds in finish.items():
        row = found[policy, "exact"]
        assert row.makespan_s == pytest.approx(10 + 60)
        assert row.request_s == pytest.approx(10 + np.mean(seconds))
        assert row.program_s == row.request_s
        assert found[policy, "noisy"].request_s == row.request_s  # noise of nothing


def test_noise_takes_from_shortest_first(host):
    outputs = np.random.default_rng(0).integers(1, 100, 200).tolist()
    problem, plan = one_after_the_other(outputs)
    found = rows(host, problem, plan, "fcfs", "shortest-first", noise=1.0)
    exact, noisy = (found["shortest-first", k].request_s for k in ("exact", "noisy"))
    assert exact < noisy < found["fcfs", "exact"].request_s


def test_noisy_predictions_are_centred_and_seeded(host):
    problem, _ = one_after_the_other([50] * 4000)
    noisy = [
        predictions(host, problem, "noisy", estimator="ecdf", noise=0.5, seed=s)[0].output_tokens[0]
        for s in (0, 0, 1)
    ]
    assert (noisy[0] == noisy[1]).all()
    assert (noisy[0] != noisy[2]).any()
    assert np.std(np.log(noisy[0] / 50)) == pytest.approx(0.5, abs=0.03)
    assert np.median(noisy[0]) == pytest.approx(50, abs=2)


def test_prefix_affinity_pays_where_prefixes_are_cached_and_only_there(capsys):
    words = ["bench", "policies", "--policies", "fcfs prefix-affinity", "--draws", "1"]
    gain = {}
    for caching in ("true", "false"):
        app = f"document-questions:documents=100,prefix_caching={caching}"
        assert main([*words, "--apps", app, "--output-json", "-"]) == 0
        found = json.loads(capsys.readouterr().out)["rows"]
        by_policy = {r["policy"]: r["makespan_s"] for r in found if r["prediction"] == "exact"}
        assert {r["prediction"] for r in found} == set(PREDICTIONS)
        gain[caching] = 1 - by_policy["prefix-affinity"] / by_policy["fcfs"]
    assert gain["true"] > 0.2
    assert abs(gain["false"]) < 0.05


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (["--policies", "shortest-frist"], "did you mean 'shortest-first'"),
        (["--policies", "multi-bin:bin=3"], "bin"),
        (["--policies", " "], "--policies is empty"),
        (["--apps", " "], "--apps is empty"),
        (["--apps", "vot"], "did you mean"),
        (["--scheduler", "gredy"], "did you mean"),
    ],
)
def test_wrong_input_is_one_message_and_exit_code_2(capsys, words, fault):
    assert main(["bench", "policies", *words]) == 2
    err = capsys.readouterr().err
    assert fault in err
    assert "Traceback" not in err


def test_the_measured_table_holds_every_shipped_policy():
    text = DOCS.read_text()
    for name in PluginHost().names("request-policy"):
        if name != "fcfs":
            assert text.count(f"| `{name}` |") == text.count("(fcfs: makespan"), name
