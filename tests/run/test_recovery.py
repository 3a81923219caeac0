"""Where an interrupted run goes on, from its journal alone."""

from __future__ import annotations

from typing import Any

from samullm_plugin.planning.records import to_record
from samullm_plugin.run.recovery import recover
from tests.run.worlds import small_plan, small_problem


def finished(node: str, count: int, time_s: float) -> list[dict[str, Any]]:
    return [
        {"time_s": time_s, "kind": "finished", "node": node, "request": r, "num_tokens": 3}
        for r in range(count)
    ]


def test_a_new_plan_begins_before_its_first_stage() -> None:
    """A run killed between a new plan and its first stage does not skip that plan's stages."""
    app, plan = small_problem().app, to_record(small_plan())
    journal: list[dict[str, Any]] = [
        {"time_s": 0.0, "kind": "plan", "plan": plan},
        {"time_s": 0.0, "kind": "stage", "stage": 0, "number": 0},
        *finished("a", 20, 5.0),
        {"time_s": 5.0, "kind": "stage", "stage": 1, "number": 1},
    ]
    before = recover(app, enumerate(journal), "events.jsonl", journal.__getitem__).resume
    assert (before.stage, before.stages_run) == (1, 1)
    assert before.finished_before == {"a"}
    journal.append({"time_s": 6.0, "kind": "plan", "plan": plan})
    after = recover(app, enumerate(journal), "events.jsonl", journal.__getitem__)
    assert (after.resume.stage, after.resume.finished_before) == (-1, frozenset())
    assert after.resume.stages_run == 1
    assert after.plan == small_plan()
    assert after.resume.clock_s == 6.0
