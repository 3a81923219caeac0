"""Stored plans come back equal; what is wrong with a file is named with its path."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from samullm_plugin.errors import InputError
from samullm_plugin.model.parallel import ParallelConfig
from samullm_plugin.model.plan import Assignment, Plan, Stage, StageEnd
from samullm_plugin.planning.artifacts import StoredPlan, read_plan, write_plan

PLAN = Plan(
    (
        Stage(
            (Assignment("a", ParallelConfig(2, 1), (0, 1)),), StageEnd("node_progress", "a", 0.5)
        ),
        Stage((Assignment("b", ParallelConfig(1, 2), (0, 1)),)),
    )
)


def test_plans_come_back_equal_and_readable(tmp_path: Path) -> None:
    given = StoredPlan(
        PLAN,
        application="t",
        num_gpus=4,
        machines=((0, 1), (2, 3)),
        scheduler="greedy",
        makespan_s=(3.0, 4.5),
        request_policy="isolate-longest",
        cards=((0,), (1, 2), (3,)),
    )
    write_plan(tmp_path / "plan.json", given)
    stored = read_plan(tmp_path / "plan.json")
    assert stored == given
    assert stored.plan == PLAN
    assert (stored.application, stored.num_gpus, stored.scheduler) == ("t", 4, "greedy")
    assert stored.machines == ((0, 1), (2, 3))
    assert stored.makespan_s == (3.0, 4.5)
    assert stored.request_policy == "isolate-longest"
    record = json.loads((tmp_path / "plan.json").read_text())
    assert record["format"] == "samullm-plan-1"
    assert record["plan"]["stages"][0]["assignments"][0]["devices"] == [0, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ("plan", "stages", 0, "assignments", 0, "device", 1),
            "device: unknown field",
        ),
        (
            ("plan", "stages", 0, "assignments", 0, "devices", [0, "1"]),
            "devices.1: Input should be a valid integer",
        ),
        (
            ("plan", "stages", 0, "assignments", 0, "devices", 3),
            "devices: Input should be a",
        ),
        (
            ("plan", "stages", 1, "end", "kind", "soon"),
            "plan.stages.1.end.kind: Input should be",
        ),
        (("plan", "stages", 0, "end", "node", None), "stage end node_progress: node must be given"),
        (("plan", "stages", 0, "end", "fraction", 1.5), "fraction 1.5 is not in (0, 1]"),
        (
            ("plan", "stages", 0, "end", "fraction", True),
            "fraction: Input should be a",
        ),
        (("application", 3), "application: Input should be a valid string"),
        (("format", "samullm-plan-2"), "format: samullm-plan-2 was written by another release"),
        (("format", "samullm-problem-1"), "format: samullm-problem-1 instead of samullm-plan-1"),
        (("format", None), "format: missing"),
    ],
)
def test_wrong_plans_are_named(tmp_path: Path, change: tuple[Any, ...], message: str) -> None:
    path = tmp_path / "plan.json"
    write_plan(path, StoredPlan(PLAN, "t"))
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


def test_numbers_of_numpy_are_written_as_plain_ones(tmp_path: Path) -> None:
    devices: Any = tuple(np.arange(2))
    plan = Plan((Stage((Assignment("a", ParallelConfig(np.int64(2)), devices),)),))  # type: ignore[arg-type]  # as a plugin may make it
    write_plan(tmp_path / "plan.json", StoredPlan(plan, "t", makespan_s=tuple(np.array([3.0]))))
    stored = read_plan(tmp_path / "plan.json")
    assert stored.plan.stages[0].assignments[0].devices == (0, 1)
    assert stored.makespan_s == (3.0,)


def test_files_of_earlier_releases_are_read(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    write_plan(path, StoredPlan(PLAN, "t"))
    record = json.loads(path.read_text()) | {"provenance": {"latency": "measured"}}
    path.write_text(json.dumps(record))
    assert read_plan(path).plan == PLAN
