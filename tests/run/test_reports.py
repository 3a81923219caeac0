"""What a run tells: observers, progress, trace and outputs."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from samullm_simulated.plugin import SimulatedExecutor

from samullm_plugin.host.interfaces.observer import RunEvent, RunInfo, StageRecord
from samullm_plugin.model.plan import Stage
from samullm_plugin.run.ledger import Ledger, Status
from samullm_plugin.run.log import RunLog
from samullm_plugin.run.outputs import BatchOutput, batch_line
from samullm_plugin.run.progress import RunProgress
from samullm_plugin.run.results import Result
from samullm_plugin.run.trace import Slice, trace_json
from samullm_plugin.simulator import PlanSimulator
from tests.run.worlds import run_with_truth, small_plan, small_problem


class Watching:
    """Stands for a plugin host with an observer."""

    has_observers = True

    def __init__(self) -> None:
        self.heard: list[tuple[str, Any]] = []

    def before_stage_run(self, run: RunInfo, stage: Stage) -> None:
        self.heard.append(("before", stage))

    def after_stage_run(self, run: RunInfo, stage: Stage, record: StageRecord) -> None:
        self.heard.append(("after", (stage, record)))

    def on_run_event(self, run: RunInfo, event: RunEvent) -> None:
        self.heard.append((event.kind, event))


def test_observers_hear_of_stages_and_events() -> None:
    problem, host = small_problem(), Watching()
    log = RunLog(RunInfo("x", "test", "simulated"), host=host)  # type: ignore[arg-type]
    coordinator = run_with_truth(problem, small_plan(), SimulatedExecutor(), problem, log=log)
    stages = [(kind, value) for kind, value in host.heard if kind in ("before", "after")]
    assert [kind for kind, _ in stages] == ["before", "after"] * 3
    assert [v for k, v in stages if k == "before"] == list(small_plan().stages)
    records = [value[1] for k, value in stages if k == "after"]
    assert [r.index for r in records] == [0, 1, 2]
    assert all(a.ended_s == b.started_s for a, b in pairwise(records))
    assert sorted(n for r in records for n in r.finished_nodes) == ["a", "b", "judge"]
    finished = [k for k, _ in host.heard if k == "finished"]
    assert len(finished) == problem.app.num_requests
    assert records[-1].ended_s == max(float(f.max()) for f in coordinator.ledger.finish_s)


def test_progress_and_remaining_time() -> None:
    """A run that goes as planned has what the plan has left; one twice as slow has twice that."""
    problem = small_problem()
    trace = PlanSimulator(problem).simulate_scenario(small_plan(), 0)
    for factor in (1.0, 2.0):
        progress = RunProgress(problem.app, [trace])
        log = RunLog(RunInfo("x", "test", "simulated"))
        remaining = []

        def take(
            event: RunEvent, followed: RunProgress = progress, seen: list[Any] = remaining
        ) -> None:
            scaled = RunEvent(event.time_s * factor, event.kind, event.fields)  # noqa: B023  # called at once
            followed.take(scaled)
            seen.append((followed.now_s, followed.settled, followed.remaining_s()))

        log.add_listener(take)
        run_with_truth(problem, small_plan(), SimulatedExecutor(), problem, log=log)
        assert progress.settled == progress.total == problem.app.num_requests
        assert progress.stage == 3
        assert all(n.engines == 0 for n in progress.nodes)
        tokens = [int(o.sum()) for o in problem.scenarios[0].output_tokens]
        assert [n.tokens for n in progress.nodes] == tokens
        end_s = trace.makespan_s * factor
        halfway = next(r for r in remaining if r[1] == progress.total // 2)
        assert halfway[2][0] == pytest.approx(end_s - halfway[0], rel=0.02)
        assert remaining[-1][2] == (0.0, 0.0)


def test_progress_of_a_run_that_goes_on() -> None:
    """What was settled before counts, and does not look like speed."""
    problem = small_problem()
    trace = PlanSimulator(problem).simulate_scenario(small_plan(), 0)
    before = RunProgress(problem.app, [trace])
    log = RunLog(RunInfo("x", "test", "simulated"))
    events: list[RunEvent] = []
    log.add_listener(events.append)
    run_with_truth(problem, small_plan(), SimulatedExecutor(), problem, log=log)
    half = next(k for k, e in enumerate(events) if e.time_s > trace.makespan_s / 2)
    ledger = Ledger(problem.app)
    for event in events[:half]:
        before.take(event)
        if event.kind == "finished":
            node = problem.app.index(str(event.fields["node"]))
            result = Result(int(str(event.fields["num_tokens"])))
            request = (node, int(str(event.fields["request"])))
            ledger.settle(request, Status.FINISHED, event.time_s, result)
    after = RunProgress(problem.app, ())
    assert after.remaining_s() is None
    after.expect([trace])
    after.take_up(ledger, lambda: before.now_s)
    assert after.settled == before.settled > 0
    assert [n.tokens for n in after.nodes] == [n.tokens for n in before.nodes]
    assert after.remaining_s() == before.remaining_s()
    least, most = before.remaining_s() or (0.0, 0.0)
    after.take_up(ledger, lambda: before.now_s + 1.0)  # an event there, then nothing for a second
    after.now_s = before.now_s
    assert after.remaining_s() == pytest.approx((least - 1.0, most - 1.0))
    for node in after.nodes:
        node.began_s = before.now_s
        assert node.tokens_per_s(before.now_s + 1) is None


times = st.floats(0, 1000, allow_nan=False)


@given(st.lists(st.tuples(st.integers(0, 3), times, times), max_size=12))
def test_slices_of_a_device_never_overlap(spans: list[tuple[int, float, float]]) -> None:
    slices = [Slice(d, "x", min(a, b), max(a, b), "run") for d, a, b in spans]
    made = trace_json({"one": slices, "two": slices}, [(1.0, "mark")])
    ends: dict[tuple[int, int], int] = {}
    for event in made["traceEvents"]:
        if event["ph"] == "X":
            track = (event["pid"], event["tid"])
            assert event["ts"] >= ends.get(track, 0)
            assert event["dur"] > 0
            ends[track] = event["ts"] + event["dur"]


def test_batch_lines() -> None:
    done = BatchOutput(5, 7, "length", "hi", chat=True, stop_reason=None)
    line = batch_line("r1", "m", [done], "a-0")
    body = line["response"]["body"]
    assert line["custom_id"] == "r1"
    assert line["error"] is None
    assert body["usage"] == {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12}
    assert body["choices"][0]["message"] == {"role": "assistant", "content": "hi"}
    assert body["choices"][0]["finish_reason"] == "length"
    failed = batch_line("r2", "m", [BatchOutput(0, 0, "error", error="broke")], "a-1")
    assert failed["response"] is None
    assert failed["error"] == {"code": "request_failed", "message": "broke"}
