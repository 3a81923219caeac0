"""Bench cases, rows and speedups."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from samullm_plugin import InputError, PluginHost
from samullm_plugin.bench.cases import SUITES, CaseSettings, make_case, planning_options, suite
from samullm_plugin.bench.rows import BASELINES, carry_out, run_case, speedups
from samullm_plugin.cli.app import main
from samullm_plugin.planning.planner import PlanningOptions, make_plan
from samullm_plugin.simulator import PlanSimulator


@pytest.fixture(scope="module")
def host() -> PluginHost:
    return PluginHost()


@pytest.fixture(scope="module")
def case(host):
    return make_case(host, "small-1", CaseSettings(seeds=2, shifts=("longer", "sharegpt")))


def test_hidden_lengths_differ_from_the_planners(case):
    seen = case.problem.scenarios[0].output_tokens[0]
    same = next(d for d in case.hidden if d.label == "same").problem.scenarios
    longer = next(d for d in case.hidden if d.label == "longer").problem.scenarios
    assert len(same) == 2
    assert (same[0].output_tokens[0] != same[1].output_tokens[0]).any()
    assert all((s.output_tokens[0] != seen).any() for s in same)
    mean = sum(s.output_tokens[0].mean() for s in same) / 2
    assert sum(s.output_tokens[0].mean() for s in longer) / 2 > 1.05 * mean


def test_rows_hold_together(host, case):
    rows = run_case(
        host, case, ["greedy", "max-heuristic", "min-heuristic"], lambda n: PlanningOptions()
    )
    totals = {r.scheduler: r.total_s for r in rows}
    for row in rows:
        assert row.total_s == pytest.approx(row.realised_s + row.planning_s)
        assert row.bound_s <= row.simulated_s
        assert set(row.shifted_s) == {"longer", "sharegpt"}
        assert 0 <= row.idle_share < 1
    greedy = rows[0]
    assert greedy.speedup_max == pytest.approx(totals["max-heuristic"] / totals["greedy"])
    assert rows[1].speedup_max is None
    assert rows[1].speedup_min == pytest.approx(totals["min-heuristic"] / totals["max-heuristic"])


def test_a_request_policy_may_be_chosen_with_the_plan_and_is_carried_out(host):
    """As ``plan`` does; the plan of a scheduler that cannot choose is carried out without."""
    text = "chain-summary:documents=100,judges=1"
    case = make_case(host, text, CaseSettings(seeds=2, shifts=()))
    auto, greedy = run_case(host, case, ["auto", "greedy"], lambda n: PlanningOptions())
    assert auto.note == "request policy isolate-longest"
    assert greedy.note == ""
    plan = make_plan(host, case.problem, "auto").plan
    hidden = PlanSimulator(case.hidden[0].problem)
    assert auto.realised_s < 0.97 * sum(carry_out(hidden, plan)[0]) / 2


def test_a_scheduler_that_fails_gets_a_row_that_says_so(host, case):
    rows = run_case(
        host,
        case,
        ["exact", "max-heuristic"],
        lambda n: PlanningOptions(options={"max_nodes": 1} if n == "exact" else {}),
    )
    assert rows[0].simulated_s is None
    assert "auto" in rows[0].note
    assert rows[1].simulated_s > 0
    assert rows[0].bound_s == rows[1].bound_s


def test_speedups_compare_the_same_rounds_and_nobody_with_itself():
    seconds = {"mine": {0: 5.0, 1: 4.0}, "max-heuristic": {0: 10.0, 2: 1.0}}
    over = speedups(seconds, "mine", BASELINES)
    assert {k: (s.median, s.least, s.most) for k, s in over.items()} == {
        "speedup_max": (2.0, 2.0, 2.0)
    }
    assert speedups(seconds, "max-heuristic", BASELINES) == {}


def test_a_time_limit_goes_to_schedulers_that_have_one(host):
    assert planning_options(host, "exact", 3, 7.5).options == {"time_limit_s": 7.5}
    assert planning_options(host, "greedy", 3, 7.5).options == {}


@pytest.mark.parametrize("name", SUITES)
def test_every_suite_names_applications_that_exist(host, name):
    from samullm_plugin.planning.applications import parse_named

    for text in suite(name):
        application, options = parse_named(text)
        host.check_options("application", application, options)


def test_the_full_suite_has_the_papers_sizes_on_8_and_4_gpus():
    full = suite("full")
    for text in ("ensembling:requests=10000,max_tokens=512", "routing:known=true"):
        assert text in full
        assert f"{text},gpus=4" in full
    with pytest.raises(InputError, match="known: default, small, cores, full"):
        suite("fulll")


def test_the_command_writes_json_and_a_table(capsys):
    words = ["bench", "--apps", "small-1", "--schedulers", "greedy,max-heuristic", "--seeds", "1"]
    assert main([*words, "--output-json", "-"]) == 0
    out, err = capsys.readouterr()
    rows = json.loads(out)["rows"]
    assert [r["scheduler"] for r in rows] == ["greedy", "max-heuristic"]
    assert "small-1 on 2 GPUs" in err
    assert "vs max" in err


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (["--apps", "smal-1"], "did you mean"),
        (["--apps", "small-1:requests"], "small-1:requests"),
        (["--apps", "ensembling:requests=-4"], "requests"),
        (["--schedulers", "gredy"], "did you mean 'greedy'"),
        (["--schedulers", ","], "--schedulers is empty"),
        (["--suite", "everything"], "unknown suite"),
        (["--gpus", "0", "--apps", "small-1"], "--gpus is 0"),
        (["--apps", "small-1", "--shifts", "sideways"], "unknown shift"),
        (["--apps", "routing", "--gpus", "1"], "fits on no set of devices"),
    ],
)
def test_wrong_input_is_one_message_and_exit_code_2(capsys, words, fault):
    assert main(["bench", *words]) == 2
    err = capsys.readouterr().err
    assert fault in err
    assert "Traceback" not in err


def test_the_tables_are_one_page(tmp_path: Path) -> None:
    """``bench --html``: a table per application, with the figures of the JSON, nothing loaded."""
    page, figures = tmp_path / "bench.html", tmp_path / "bench.json"
    words = ["--apps", "small-1 small-2", "--schedulers", "max-heuristic,min-heuristic"]
    words += ["--seeds", "1", "--shifts", "", "--html", str(page), "--output-json", str(figures)]
    assert main(["bench", *words]) == 0
    text = page.read_text(encoding="utf-8")
    assert text.count("<table") == 2
    rows = json.loads(figures.read_text())["rows"]
    assert len(rows) == 4
    for row in rows:
        assert row["scheduler"] in text
        assert f"{row['application']} on {row['num_gpus']} GPUs" in text
        assert f"{row['realised_s']:.1f}" in text
    assert "http://" not in text.replace("http://www.w3.org", "")
    assert "https://" not in text
