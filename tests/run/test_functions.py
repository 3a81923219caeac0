"""Users' functions in worker processes: what they may return, and what may go wrong."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from samullm_plugin.app.functions import Function, best, function_of, vote
from samullm_plugin.app.loading import load_application
from samullm_plugin.errors import InputError
from samullm_plugin.planning.applications import check_functions
from samullm_plugin.run.python_calls import Call, WorkerCalls

STEPS = """
import os, sys, time
from dataclasses import dataclass
from datetime import date
import numpy as np
from samullm_plugin import Reject

@dataclass
class Point:
    x: int
def one(row): return {"length": len(row["text"])}
def drop(row): return None if row["text"] == "b" else row["text"]
def split(row): return list(row["text"])
def reject(row): raise Reject("too short")
def broken(row): return row["nothing"]
def kind(row): return object()
def hang(row): time.sleep(60) if row["text"] == "b" else None; return 1
def hold(row):
    while row["text"] == "b":
        try: time.sleep(60)
        except BaseException: pass
    return 1
def leave(row): os._exit(3) if row["text"] == "b" else None; return 1
def batch(rows): return [r["text"] * 2 for r in rows]
def short(rows): return [1]
def bad_batch(rows): return [1 / (r["text"] != "b") for r in rows]
def unique(rows): return [{**r, "rank": k} for k, r in enumerate(rows) if r["text"] != "b"]
def stranger(rows): return [{"id": "zz"}]
def with_option(row, *, suffix): return row["text"] + suffix
def keys(row): return {1: (row["text"], None)}
def pair(row): return {"half": "\\ud800"}
def endless(row):
    found = []
    found.append(found)
    return {"x": found}
def deep(row):
    found = 1
    for _ in range(200): found = [found]
    return {"x": found}
def deeper(row):
    found = 1
    for _ in range(100_000): found = [found]
    return {"x": found}
def stop(row): raise KeyboardInterrupt
def give_up(row): sys.exit(3) if row["text"] == "b" else None; return 1
def give_up_batch(rows): return [give_up(r) for r in rows]
def array(row): return np.arange(2)
def inside(row):
    return {"v": np.arange(2), "s": np.float32(0.5), "p": Point(1), "d": date(2020, 1, 2)}
def with_none(row): return [1, None]
def stop_batch(rows): raise KeyboardInterrupt
def nothing(): return 1
async def later(row): return 1
def several(row): yield 1
NUMBER = 4
"""


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("steps")
    (folder / "steps.py").write_text(STEPS)
    return folder


@pytest.fixture
def runner() -> Iterator[WorkerCalls]:
    made = WorkerCalls()
    yield made
    made.close()


def called(runner: WorkerCalls, function: Function, **how: Any) -> list[tuple[str, Any]]:
    """Return kind and value or reason for rows a, b, c, in order."""
    rows = [{"id": t, "text": t} for t in "abc"]
    if how.get("scope") == "all":
        runner.submit((0, 0), Call(function, tuple(rows), **how), 0.0)
    else:
        for k, row in enumerate(rows):
            runner.submit((0, k), Call(function, (row,), **how), 0.0)
    found = {}
    while runner.busy:
        for end in runner.take(0.0):
            returned = end.returned
            found[end.request[1]] = returned.kind, returned.value or returned.reason
    return [found[k] for k in sorted(found)]


@pytest.mark.parametrize(
    ("name", "how", "expected"),
    [
        ("one", {}, [("value", {"length": 1})] * 3),
        ("keys", {}, [("value", {"1": [t, None]}) for t in "abc"]),
        ("pair", {}, [("value", {"half": "\ud800"})] * 3),
        ("array", {}, [("value", [0, 1])] * 3),
        ("array", {"most": 2}, [("value", [0, 1])] * 3),
        ("inside", {}, [("value", {"v": [0, 1], "s": 0.5, "p": {"x": 1}, "d": "2020-01-02"})] * 3),
        ("drop", {}, [("value", "a"), ("dropped", ""), ("value", "c")]),
        ("split", {"most": 2}, [("value", ["a"]), ("value", ["b"]), ("value", ["c"])]),
        ("reject", {}, [("rejected", "too short")] * 3),
        ("batch", {"scope": "batch"}, [("value", "aa"), ("value", "bb"), ("value", "cc")]),
        ("unique", {"scope": "all"}, [("value", {"a": {"rank": 0}, "c": {"rank": 2}})]),
    ],
)
def test_what_functions_return(
    steps: Path, runner: WorkerCalls, name: str, how: dict[str, Any], expected: list[Any]
) -> None:
    assert called(runner, function_of(f"steps.py:{name}", steps, {}, "here"), **how) == expected


@pytest.mark.parametrize(
    ("name", "how", "message"),
    [
        ("split", {}, "returned a list; set `max`"),
        ("broken", {}, "raised KeyError: 'nothing'; steps.py line 15, in broken"),
        ("endless", {}, "that is not JSON: Circular reference"),
        ("with_none", {"most": 2}, "element 2 is a NoneType; leave out"),
        ("stop", {}, "raised KeyboardInterrupt"),
        ("stop_batch", {"scope": "batch"}, "raised KeyboardInterrupt"),
        ("deep", {}, "of more than 100 levels"),
        ("deeper", {}, "that is not JSON: maximum recursion depth"),
        ("kind", {}, "returned a object; it may return"),
        ("short", {"scope": "batch"}, "1 results for"),
        ("stranger", {"scope": "all"}, "the id 'zz', which it was not given"),
    ],
)
def test_what_they_may_not_return(
    steps: Path, runner: WorkerCalls, name: str, how: dict[str, Any], message: str
) -> None:
    for kind, reason in called(runner, function_of(f"steps.py:{name}", steps, {}, "h"), **how):
        assert kind == "failed"
        assert message in reason


@pytest.mark.parametrize(
    ("name", "how", "message"),
    [
        ("hang", {"limit_s": 0.5}, "took more than 0.5 s"),
        ("hold", {"limit_s": 0.2}, "did not answer within"),
        ("give_up", {}, "raised SystemExit: 3"),
        ("give_up_batch", {"scope": "batch"}, "raised SystemExit: 3"),
        ("leave", {}, "ended its process (exit status 3)"),
        ("bad_batch", {"scope": "batch"}, "raised ZeroDivisionError"),
    ],
)
def test_one_bad_row_costs_one_row(
    steps: Path, runner: WorkerCalls, name: str, how: dict[str, Any], message: str
) -> None:
    a, b, c = called(runner, function_of(f"steps.py:{name}", steps, {}, "here"), **how)
    assert (a[0], c[0]) == ("value", "value")
    assert b[0] == "failed"
    assert message in b[1]


def test_functions_are_imported_before_they_have_rows(tmp_path: Path, runner: WorkerCalls) -> None:
    mark = tmp_path / "imported"
    code = f"open({str(mark)!r}, 'a').write('x')\ndef f(row): return 1\n"
    (tmp_path / "early.py").write_text(code)
    function = function_of("early.py:f", tmp_path, {}, "here")
    runner.prepare(0, Call(function))
    while not mark.exists():  # the test's own limit ends it
        time.sleep(0.01)
    assert called(runner, function) == [("value", 1)] * 3
    assert mark.read_text() == "x"  # by the process that was there already


def test_functions_of_a_notebook_are_sent(runner: WorkerCalls, steps: Path) -> None:
    factor = 3
    function = function_of(lambda row: row["text"] * factor, steps, {}, "here")
    assert function.pickled is not None
    assert [v for _, v in called(runner, function)] == ["aaa", "bbb", "ccc"]


def test_choosing_passes_over_what_has_no_value() -> None:
    scores = [{"score": s} for s in (None, 1, 3, 3, None, None)]
    assert best({"given": scores[:4]}, "score") is scores[2]
    assert best({"given": scores[:1]}, "score") is None
    assert vote({"given": scores}, "score") == {"score": 3, "winner": 3, "votes": 2, "share": 2 / 3}
    assert vote({"given": scores[4:]}, "score") is None
    ties = [{"label": t} for t in "abba"]
    assert vote({"given": ties}, "label")["winner"] == "a"


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ("{python: 'steps.py:wonder'}", "nodes.p.python: .*steps.py has no 'wonder'"),
        ("{python: 'steps.py:nothing'}", r"nothing\(\) cannot be called with a row"),
        ("{python: 'steps.py:NUMBER'}", "is a int, not a function"),
        ("{python: 'steps.py:later'}", "steps.py:later is async and gives no value"),
        ("{python: 'steps.py:several'}", "steps.py:several yields; give a function that returns"),
        ("{python: 'steps.py:with_option'}", "missing a required .*argument: 'suffix'"),
        ("{python: 'nowhere.py:f'}", "there is no file .*nowhere.py"),
        ("{python: 'no_such_module:f'}", "cannot be imported: ModuleNotFoundError"),
        ("{python: 'what'}", "names no function; write file.py:name"),
        ("{python: best}", "say what is best"),
        ("{python: 'steps.py:one', keep: {expr: 'lenght > 1'}, sample: {length: 2}}",
         "nodes.p.keep.expr: there is no field 'lenght' .did you mean 'length'"),
    ],
)  # fmt: skip
def test_wrong_functions_are_refused_before_anything_starts(
    steps: Path, node: str, message: str
) -> None:
    (steps / "rows.jsonl").write_text('{"id": "a", "text": "x"}\n')
    app = steps / "app.yaml"
    app.write_text(
        "version: 1\nname: n\nmodels: {m: {model: lmsys/vicuna-13b-v1.5}}\nnodes:\n"
        f"  p: {{requests: rows.jsonl, {node[1:]}\n"
        "  q: {model: m, for_each: p, prompt: '{{ p }}', sampling_params: {max_tokens: 4}}\n"
    )
    with pytest.raises(InputError, match=message):
        check_functions(load_application(app))
