"""What holds of every plan of every problem."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from samullm_plugin.model.problem import Problem
from samullm_plugin.model.result import PlanTrace
from samullm_plugin.rules.bounds import lower_bound
from samullm_plugin.rules.verify import verify
from samullm_plugin.simulator import PlanSimulator
from samullm_plugin.testing.strategies import plans, problems

relaxed = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def assert_consistent(problem: Problem, trace: PlanTrace, scenario: int) -> None:
    lengths = problem.scenarios[scenario]
    finished: dict[str, int] = {}
    held: dict[int, list[tuple[float, float]]] = {}
    for segment in trace.segments:
        finished[segment.node] = finished.get(segment.node, 0) + segment.num_finished
        assert 0 <= segment.start_s <= segment.end_s
        replicas = segment.parallel.data_parallel_size
        serving = max(0.0, segment.end_s - segment.ready_s)
        assert segment.busy_s <= serving * replicas * (1 + 1e-9) + 1e-9
        for device in segment.devices:
            held.setdefault(device, []).append((segment.start_s, segment.end_s))
    for spans in held.values():
        spans.sort()
        for (_, end), (start, _) in pairwise(spans):
            assert end <= start + 1e-9, "a device is held twice"
    for i, node in enumerate(problem.app.nodes):
        taken = lengths.output_tokens[i] > 0
        # Each taken request finishes in exactly one engine.
        assert finished.get(node.name, 0) == int(taken.sum())
        assert np.isfinite(trace.finish_s[i]).all()
        table = node.requests
        for r, source, q in zip(
            table.input_row, table.input_node, table.input_request, strict=True
        ):
            if taken[r] and (source != i or taken[q]):
                assert trace.finish_s[i][r] >= trace.finish_s[source][q] - 1e-9
    assert trace.makespan_s == max(float(f.max()) for f in trace.finish_s)
    assert list(trace.stage_start_s) == sorted(trace.stage_start_s)
    assert -1e-9 <= trace.idle_share <= 1


@relaxed
@given(st.data())
def test_every_valid_plan_finishes_each_request_once(data: st.DataObject) -> None:
    problem = data.draw(problems())
    plan = data.draw(plans(problem))
    assert verify(problem, plan) == ()
    simulator = PlanSimulator(problem)
    trace = simulator.simulate_scenario(plan, 0)
    assert_consistent(problem, trace, 0)
    bound = lower_bound(problem, problem.scenarios[0])
    assert bound.value_s <= trace.makespan_s * (1 + 1e-9) + 1e-9
    again = simulator.simulate_scenario(plan, 0)  # from kept runs
    assert again.makespan_s == trace.makespan_s
    assert again.segments == trace.segments
