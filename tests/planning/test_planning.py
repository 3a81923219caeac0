"""Plans are verified, re-simulated and bounded by the host, whoever made them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from samullm_plugin import (
    Assignment,
    InputError,
    ParallelConfig,
    Plan,
    PlanError,
    PluginError,
    PluginHost,
    Stage,
)
from samullm_plugin.planning.planner import PlanningOptions, make_plan
from samullm_plugin.planning.reporting import (
    LOADING,
    device_list,
    differences,
    stage_lines,
    text_gantt,
)
from samullm_plugin.simulator import PlanSimulator
from samullm_plugin.testing.factories import TestNode, make_problem


@pytest.fixture(scope="module")
def host() -> PluginHost:
    return PluginHost()


def problem(num_gpus=2):
    nodes = [
        TestNode("a", [5] * 8, [10] * 8, load_s=3.0, sizes=(1, 2)),
        TestNode("b", [5] * 4, [30] * 4, load_s=3.0),
    ]
    return make_problem(nodes, num_gpus)


def test_the_hosts_own_figures_are_in_the_result(host):
    result = make_plan(host, problem(), "max-heuristic")
    again = PlanSimulator(problem()).simulate(result.plan)
    assert result.makespan_s.tolist() == [t.makespan_s for t in again]
    assert 0 < result.lower_bound_s[0] <= result.makespan_s[0]
    assert result.gap == pytest.approx(result.makespan_s[0] / result.lower_bound_s[0] - 1)
    assert result.planning_s > 0


def test_an_unknown_scheduler_is_an_input_error(host):
    with pytest.raises(InputError, match="did you mean"):
        make_plan(host, problem(), "gredy")


def test_a_wrong_option_is_named(host):
    with pytest.raises(InputError, match="preemptoin"):
        make_plan(host, problem(), "greedy", PlanningOptions(options={"preemptoin": False}))


def test_an_invalid_plan_is_refused_with_every_violation(host, monkeypatch):
    from samullm_baselines.plugin import MaxHeuristic

    overlapping = Stage(
        (Assignment("a", ParallelConfig(), (0,)), Assignment("b", ParallelConfig(), (0,)))
    )
    faulty = Plan((overlapping, Stage((Assignment("c", ParallelConfig(), (7,)),))))
    monkeypatch.setattr(MaxHeuristic, "schedule", lambda self, problem, context: faulty)
    with pytest.raises(PlanError) as error:
        make_plan(host, problem(), "max-heuristic")
    for rule in ("[devices] stage 0", "[shape] stage 1, node c", "max-heuristic"):
        assert rule in str(error.value)


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        (lambda *_: None, "returned a NoneType, not a Plan"),
        (lambda *_: 1 / 0, "raised ZeroDivisionError"),
    ],
)
def test_a_faulty_scheduler_is_named(host, monkeypatch, answer, fault):
    from samullm_baselines.plugin import MaxHeuristic

    monkeypatch.setattr(MaxHeuristic, "schedule", answer)
    with pytest.raises(PluginError, match=fault) as error:
        make_plan(host, problem(), "max-heuristic")
    assert "samullm-plugin:max-heuristic" in str(error.value)


def test_schedulers_cannot_call_each_other_for_ever(host, monkeypatch):
    from samullm_baselines.plugin import MaxHeuristic

    def again(self, problem, context):
        return context.schedule_with("max-heuristic")

    monkeypatch.setattr(MaxHeuristic, "schedule", again)
    with pytest.raises(PluginError, match="call each other"):
        make_plan(host, problem(), "max-heuristic")


def test_the_gantt_chart_shows_every_device_and_engine_start(host):
    result = make_plan(host, problem(), "min-heuristic")
    trace = result.traces[0]
    lines = text_gantt(trace, problem().cluster, width=40).splitlines()
    assert lines[0].startswith("GPU 0")
    assert lines[1].startswith("GPU 1")
    for device in range(2):
        held = [s for s in trace.segments if device in s.devices]
        assert (LOADING in lines[device]) == bool(held)
    bars = "".join(lines[:2])
    loading = sum((min(s.ready_s, s.end_s) - s.start_s) * len(s.devices) for s in trace.segments)
    columns = loading / trace.makespan_s * 40
    assert bars.count(LOADING) == pytest.approx(columns, abs=2 * len(trace.segments))
    assert "a" in lines[-1]
    assert "b" in lines[-1]


def test_tables_and_charts_name_machines_where_there_are_several(host):
    result = make_plan(host, problem(), "max-heuristic")
    two = replace(problem().cluster, nvlink_groups=(), machines=((0,), (1,)))
    assert text_gantt(result.traces[0], two, width=40).splitlines()[1].startswith("GPU m1:0|")
    shown = {line.devices for line in stage_lines(result.plan, result.traces[0], two)}
    assert shown == {"m0:0 m1:0"}


def test_stage_lines_and_differences(host):
    first = make_plan(host, problem(), "max-heuristic")
    second = make_plan(host, problem(), "min-heuristic")
    lines = stage_lines(first.plan, first.traces[0], problem().cluster)
    assert {line.node for line in lines} == {"a", "b"}
    assert lines[0].start_s == 0.0
    found = differences(first, second)
    assert {d.node for d in found} == {"a", "b"}
    assert differences(first, first) == []
    held = sum(
        (s.end_s - s.start_s) * len(s.devices) for s in first.traces[0].segments if s.node == "a"
    )
    assert next(d for d in found if d.node == "a").first_device_s == pytest.approx(held)


def test_devices_are_listed_as_ranges():
    assert device_list([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8"
    assert device_list([3]) == "3"


def test_seeds_make_plans_repeatable(host):
    plans = {make_plan(host, problem(), "greedy", PlanningOptions(seed=3)).plan for _ in range(2)}
    assert len(plans) == 1
    assert np.isfinite(make_plan(host, problem(4), "greedy").makespan_s).all()
