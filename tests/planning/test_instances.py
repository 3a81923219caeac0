"""plan and compare, as a user types them."""

from __future__ import annotations

import json

import pytest

from samullm_plugin.cli.app import main
from samullm_plugin.host.manager import PluginHost
from samullm_plugin.planning.applications import find_application
from samullm_plugin.planning.instances import cluster_of


def test_plan_shows_stages_a_chart_and_what_the_figures_rest_on(capsys, tmp_path):
    target = tmp_path / "plan.json"
    words = ["plan", "small-1", "--scheduler", "greedy", "--scenarios", "2", "--explain"]
    assert main([*words, "--output", str(target), "--output-json", "-"]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert len(result["makespan_s"]) == 2
    assert result["application"] == "small-1"
    assert result["latency_rests_on"]
    assert result["starts_rest_on"]
    for text in result["starts_rest_on"]:
        assert " s (" in text
        assert "measured on A100-80GB" in text
        assert text in err
    for text in ("GPU 0", "Lower bound", "Gap", "Why:", "measured", "assumed:"):
        assert text in err
    stored = json.loads(target.read_text())
    assert stored["application"] == "small-1"


def test_options_and_no_preemption_reach_the_scheduler(capsys):
    assert main(["plan", "small-1", "--scheduler", "greedy", "--no-preemption"]) == 0
    capsys.readouterr()
    words = ["plan", "small-1", "--scheduler", "greedy", "--option", "objective=corrected"]
    assert main(words) == 0
    capsys.readouterr()
    assert main(["plan", "small-1", "--scheduler", "max-heuristic", "--no-preemption"]) == 2
    assert "preemption" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (["plan", "small-1", "--option", "objective"], "is not key=value"),
        (["plan", "small-1", "--gpus", "0"], "--gpus is 0"),
        (["plan", "small-1", "--budget", "-3"], "--budget is -3"),
        (["compare", "small-1", "--budget", "nan"], "--budget is nan"),
        (["plan", "nothing-like-it"], "unknown application"),
        (["plan", "missing.yaml"], "missing.yaml"),
        (["compare", "small-1", "--schedulers", ""], "--schedulers is empty"),
    ],
)
def test_wrong_input_is_one_message_and_exit_code_2(capsys, words, fault):
    assert main(words) == 2
    err = capsys.readouterr().err
    assert fault in err
    assert "Traceback" not in err


def test_compare_puts_plans_side_by_side(capsys):
    words = ["compare", "small-1", "--schedulers", "greedy,min-heuristic,max-heuristic"]
    assert main([*words, "--output-json", "-"]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert {p["scheduler"] for p in result["plans"]} == {"greedy", "min-heuristic", "max-heuristic"}
    best = min(result["plans"], key=lambda p: sum(p["makespan_s"]))
    assert sum(best["makespan_s"]) == min(sum(p["makespan_s"]) for p in result["plans"])
    assert "over best" in err
    assert "differs from" in err
    assert err.count("GPU 0") == 3


def test_another_number_of_gpus_leaves_the_rest_of_the_cluster(tmp_path):
    (tmp_path / "r.jsonl").write_text('{"id": "a", "prompt_tokens": 9}\n')
    section = "gpus: 2, nvlink: 2, host_memory_gib: 96, engines_per_gpu: 2, slowdown: 1.5"
    (tmp_path / "app.yaml").write_text(
        "version: 1\nname: a\nmodels: {m: {model: THUDM/chatglm3-6b}}\n"
        "nodes: {n: {model: m, requests: r.jsonl, sampling_params: {max_tokens: 9}}}\n"
        f"cluster: {{{section}}}\n"
    )
    loaded = find_application(PluginHost.from_settings(), str(tmp_path / "app.yaml"))
    four, two = cluster_of(loaded, 4), cluster_of(loaded, 2)
    assert two == loaded.cluster
    assert four.host_memory_bytes == 96 << 30
    assert four.cards == ((0, 1), (2, 3), (4, 5), (6, 7))
    assert four.kinds == (two.kinds[0],) * 8
