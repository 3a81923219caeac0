"""Stored plans, problems and results come back equal; wrong files are named with the path."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from samullm_plugin.checkpoints.models import bundled_model
from samullm_plugin.errors import InputError
from samullm_plugin.model.application import Application, EngineOptions, ModelNode, RequestTable
from samullm_plugin.model.cluster import Cluster, Gpu
from samullm_plugin.model.costs import LoadTimes, ModeCosts, Provenance
from samullm_plugin.model.latency import Curve, StepLatency, StepTable
from samullm_plugin.model.parallel import ParallelConfig
from samullm_plugin.model.plan import Assignment, Plan, Stage, StageEnd
from samullm_plugin.model.problem import ModeKey, Problem
from samullm_plugin.model.result import Bound, EngineSegment, PlanResult, PlanStatus, PlanTrace
from samullm_plugin.model.scenarios import make_scenario
from samullm_plugin.planning.arrays import decode_array, encode_array
from samullm_plugin.planning.artifacts import (
    read_plan,
    read_problem,
    read_result,
    write_plan,
    write_problem,
    write_result,
)

PLAN = Plan(
    (
        Stage(
            (Assignment("a", ParallelConfig(2, 1), (0, 1)),), StageEnd("node_progress", "a", 0.5)
        ),
        Stage((Assignment("b", ParallelConfig(1, 2), (0, 1)),)),
    )
)


def make_problem(latency: Any = None) -> Problem:
    rng = np.random.default_rng(0)
    a = bundled_model("vicuna-13b-v1.5", engine=EngineOptions(extra=(("quantization", "awq"),)))
    count = 100
    prompts = rng.integers(1, 500, count)
    gate = np.arange(count, dtype=np.int64)
    first = RequestTable.of(prompts, 256)
    second = RequestTable.of(
        prompts, 64, [[(0, r)] for r in range(count)], probability=np.full(count, 0.5), gate=gate
    )
    app = Application("t", (ModelNode("a", a, first), ModelNode("b", a, second, "t")), ("note",))
    sampled = [rng.integers(1, 300, count) for _ in range(2)]
    step = latency or StepLatency(Curve((0.0, 16.0, 17.0), (0.01, 0.012, 0.02)), launch_s=0.001)
    costs = {
        ModeKey("G", tp): ModeCosts(
            step, 50_000 * tp, LoadTimes(30.0, 100.0, wake1_s=2.0), Provenance("measured", "x", 3.0)
        )
        for tp in (1, 2)
    }
    cluster = Cluster.uniform(Gpu("G", 80 * 2**30), 4, nvlink=2)
    return Problem(app, cluster, (make_scenario(app, sampled),), (costs, costs), "cold")


def same(a: Any, b: Any) -> bool:
    """Deep equality of dataclasses with arrays."""
    if isinstance(a, np.ndarray):
        return bool(a.dtype == b.dtype and np.array_equal(a, b, equal_nan=a.dtype.kind == "f"))
    if hasattr(a, "__dataclass_fields__"):
        return type(a) is type(b) and all(
            same(getattr(a, f), getattr(b, f)) for f in a.__dataclass_fields__
        )
    if isinstance(a, tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    return bool(a == b)


def test_problems_come_back_equal(tmp_path: Path) -> None:
    problem = make_problem()
    write_problem(tmp_path / "p.json", problem)
    back = read_problem(tmp_path / "p.json")
    assert same(problem, back)
    assert (tmp_path / "p.json").stat().st_size < 9_000
    assert not same(problem, replace(problem, page_cache="warm"))  # the comparison can fail


def test_plans_come_back_equal_and_readable(tmp_path: Path) -> None:
    write_plan(
        tmp_path / "plan.json",
        PLAN,
        application="t",
        num_gpus=4,
        scheduler="greedy",
        provenance={"latency": "measured"},
        makespan_s=np.array([3.0, float("inf")]),
    )
    stored = read_plan(tmp_path / "plan.json")
    assert stored.plan == PLAN
    assert (stored.application, stored.num_gpus, stored.scheduler) == ("t", 4, "greedy")
    assert stored.makespan_s == (3.0, float("inf"))
    record = json.loads((tmp_path / "plan.json").read_text())
    assert record["format"] == "samullm-plan-1"
    assert record["plan"]["stages"][0]["assignments"][0]["devices"] == [0, 1]


def test_results_come_back_equal(tmp_path: Path) -> None:
    segment = EngineSegment("a", ParallelConfig(), (0,), 0, 0.0, 1.0, 9.0, 7.5, 3, 1, True)
    trace = PlanTrace(
        9.0,
        (segment,),
        (0.0,),
        np.array([9.0, np.inf]),
        (np.arange(40.0), np.full(30, np.nan)),
        0.25,
    )
    result = PlanResult(
        "exact",
        PLAN,
        np.array([9.0]),
        (trace,),
        np.array([4.0]),
        PlanStatus.OPTIMAL,
        Bound(8.0, "two stages"),
        None,
        0.5,
        (("a", "first"),),
    )
    write_result(tmp_path / "r.json", result)
    assert same(read_result(tmp_path / "r.json"), result)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ("plan", "stages", 0, "assignments", 0, "device", 1),
            "device: unknown field (did you mea",
        ),
        (
            ("plan", "stages", 0, "assignments", 0, "devices", [0, "1"]),
            "devices.1: must be of type",
        ),
        (("plan", "stages", 0, "assignments", 0, "devices", 3), "devices: must be a list"),
        (("plan", "stages", 1, "end", "kind", "soon"), "plan.stages.1.end.kind: must be one of"),
        (("plan", "stages", 0, "end", "node", None), "plan.stages.0.end: stage end node_progress"),
        (("plan", "stages", 0, "end", "fraction", 1.5), "fraction 1.5 is not in (0, 1]"),
        (("plan", "stages", 0, "end", "fraction", True), "fraction: must be a number"),
        (("application", 3), "application: must be of type str"),
        (("format", "samullm-plan-2"), "format: samullm-plan-2 was written by another release"),
        (("format", "samullm-problem-1"), "format: samullm-problem-1 instead of samullm-plan-1"),
        (("format", None), "format: missing"),
    ],
)
def test_wrong_plans_are_named(tmp_path: Path, change: tuple[Any, ...], message: str) -> None:
    path = tmp_path / "plan.json"
    write_plan(path, PLAN, application="t")
    record = json.loads(path.read_text())
    *parents, last, value = change
    inner = record
    for part in parents:
        inner = inner[part]
    inner[last] = value
    path.write_text(json.dumps(record))
    with pytest.raises(InputError) as error:
        read_plan(path)
    assert str(error.value).startswith(str(path))
    assert message in str(error.value)


def test_missing_fields_and_broken_files(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    with pytest.raises(InputError, match="there is no such file"):
        read_plan(path)
    path.write_text("{")
    with pytest.raises(InputError, match="is not JSON"):
        read_plan(path)
    path.write_text('{"format": "samullm-plan-1", "plan": {"stages": []}}')
    with pytest.raises(InputError, match="application: missing"):
        read_plan(path)


class Foreign:
    """An iteration latency that is no StepLatency."""

    def step_seconds(self, steps: StepTable) -> Any:
        return np.full(len(steps), 0.02)


@dataclass(frozen=True)
class Storable(Foreign):
    """One that can write itself."""

    seconds: float = 0.02

    def to_json(self) -> object:
        return {"seconds": self.seconds}


def test_foreign_latencies_are_refused_unless_they_can_be_stored(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    with pytest.raises(InputError, match=r"Foreign cannot be stored: .* has no to_json"):
        write_problem(path, make_problem(Foreign()))
    assert not path.exists()
    write_problem(path, make_problem(Storable(0.03)))
    with pytest.raises(InputError, match="cannot be read without its plugin"):
        read_problem(path)
    kind = f"{Storable.__module__}.{Storable.__qualname__}"
    back = read_problem(path, {kind: lambda data: Storable(**data)})
    assert next(iter(back.costs[0].values())).latency == Storable(0.03)


def test_problem_checks_run_on_reading(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    write_problem(path, make_problem())
    record = json.loads(path.read_text())
    record["app"]["nodes"][1]["requests"]["input_node"] = {"count": 100, "all": 7}
    path.write_text(json.dumps(record))
    with pytest.raises(InputError, match="app: application t, node b: it waits for node 7"):
        read_problem(path)


@given(
    st.one_of(
        arrays(np.int64, st.integers(0, 60)),
        arrays(np.float64, st.integers(0, 60)),
        arrays(np.bool_, st.integers(0, 60)),
    )
)
def test_arrays_come_back_equal(values: Any) -> None:
    record = json.loads(json.dumps(encode_array(values), allow_nan=False))
    assert same(values, decode_array(record, values.dtype, "x"))


@pytest.mark.parametrize("large", [2**31, 2**40, -(2**31), 2**63 - 1])
def test_long_arrays_of_large_numbers_come_back_equal(large: int) -> None:
    values = np.array([0, 0, large] * 10)
    assert same(values, decode_array(encode_array(values), values.dtype, "x"))


@pytest.mark.parametrize(
    "record",
    [
        [1.5],
        [True],
        "abc",
        {"count": 3, "delta-int32": "%%%"},
        {"count": 3, "delta-int32": "eJwDAAAAAAE="},
        {"count": 3, "float64": "eJwDAAAAAAE="},
        {"count": 3, "all": "x"},
        {"count": 3},
    ],
)
def test_wrong_arrays_are_refused(record: object) -> None:
    with pytest.raises(InputError, match=r"file: a\.b"):
        decode_array(record, np.dtype(np.int64), "file: a.b")
