"""Where an interrupted run goes on, from its journal alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import samullm_plugin as sl
from samullm_plugin.errors import InputError
from samullm_plugin.files import to_json
from samullm_plugin.model.application import Application
from samullm_plugin.records import to_record
from samullm_plugin.run.journal import JournalReader, read_journal_places
from samullm_plugin.run.ledger import Status
from samullm_plugin.run.recovery import Recovered, recover
from tests.run.worlds import small_plan, small_problem


def recovered(app: Application, journal: list[dict[str, Any]]) -> Recovered:
    return recover(app, enumerate(journal), "events.jsonl", journal.__getitem__)


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
    before = recovered(app, journal).resume
    assert (before.stage, before.stages_run) == (1, 1)
    assert before.finished_before == {"a"}
    journal.append({"time_s": 6.0, "kind": "plan", "plan": plan})
    after = recovered(app, journal)
    assert (after.resume.stage, after.resume.finished_before) == (-1, frozenset())
    assert after.resume.stages_run == 1
    assert after.plan == small_plan()
    assert after.resume.clock_s == 6.0


def test_a_list_whose_rows_are_missing_is_made_again(tmp_path: Path) -> None:
    """A call that ended just before the end of the process, its elements not yet written."""
    app = sl.App("lists", models={"m": "THUDM/chatglm3-6b"}, folder=tmp_path)
    words = app.python("words", split, data=[{"id": "x", "text": "a b"}], max=2)
    app.llm("say", model="m", for_each=words, prompt="{{ words }}", max_tokens=4)
    known, node = app.load().app, 1
    call = {"time_s": 1.0, "kind": "finished", "node": "words", "request": 0, "num_tokens": 2}
    rows = [{**call, "request": r, "value": "a"} for r in (1, 2)]
    for missing in (0, 1):
        ledger = recovered(known, [call, *rows[:missing]]).resume.ledger
        assert ledger.status[node][0] == Status.WAITING
    ledger = recovered(known, [call, *rows]).resume.ledger
    assert ledger.status[node].tolist() == [Status.FINISHED] * 3


def split(row: dict[str, str]) -> list[str]:
    return row["text"].split()


def test_failures_before_a_retry_are_open_again() -> None:
    app, plan = small_problem().app, to_record(small_plan())
    journal: list[dict[str, Any]] = [
        {"time_s": 0.0, "kind": "plan", "plan": plan},
        *finished("a", 19, 5.0),
        {"time_s": 6.0, "kind": "failed", "node": "a", "request": 19, "error": "no"},
    ]
    assert recovered(app, journal).resume.ledger.status[0][19] == Status.FAILED
    journal.append({"time_s": 7.0, "kind": "retry", "requests": 1})
    found = recovered(app, journal)
    assert found.resume.ledger.status[0][19] == Status.WAITING
    assert not any(r["kind"] == "failed" for r in found.records)
    journal += finished("a", 20, 8.0)[19:]
    assert recovered(app, journal).resume.ledger.settled(0)


def test_what_many_finished_requests_leave_is_what_one_by_one_leave(tmp_path: Path) -> None:
    """Read short and settled together, or as mappings and by themselves."""
    app = small_problem().app
    records = [
        *finished("a", 20, 5.0),
        {"time_s": 6.0, "kind": "moved", "node": "b", "request": 1, "num_tokens": 2},
        {**finished("b", 3, 7.0)[2], "finish_reason": "length", "prompt_tokens": 4},
        {"time_s": 8.0, "kind": "failed", "node": "b", "request": 0, "error": "x"},
        *finished("b", 2, 9.0)[1:],
    ]
    path = tmp_path / "events.jsonl"
    path.write_bytes(b"".join(to_json(r) + b"\n" for r in records))
    reader = JournalReader(path)
    many = recover(app, read_journal_places(path), str(path), reader.read).resume
    single = recovered(app, records).resume
    for name in ("status", "generated", "finish_s", "prompt_tokens", "cut", "_open"):
        ours, theirs = getattr(many.ledger, name), getattr(single.ledger, name)
        assert [a.tolist() for a in ours] == [a.tolist() for a in theirs], name
    assert (many.clock_s, many.moved, many.ledger.all_settled) == (9.0, {}, False)
    assert [many.ledger.num_settled(i) for i in range(2)] == [20, 3]
    assert list(many.ledger.results) == list(single.ledger.results)

    for wrong, reason in ((19, "the request was settled before"), (20, "there is no such request")):
        again = to_json({**records[0], "request": wrong}) + b"\n"
        path.write_bytes(b"".join(to_json(r) + b"\n" for r in records) + again)
        with pytest.raises(InputError, match=f"line {len(records) + 1}: {reason}"):
            recover(app, read_journal_places(path), str(path), reader.read)
    reader.close()
